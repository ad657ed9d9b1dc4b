//! One circuit in use: the gate that calls pass, and behind it what the server told and the local breaker.
//!
//! A call through a closed circuit reads one word, the [`Gate word`](FREE), and counts itself in a [`Tally`] when it
//! went well. All else goes by a lock of the circuit: refusals that are not told at once, calls that failed or were
//! slow, news of the server, and the first good call of each slice of the window, which tells the local breaker of
//! those that were counted before. So it sees what it would if each call were told to it: till then no good call can
//! open it, which it says itself ([`quiet_until`](circuit::Circuit::quiet_until)).

mod inner;
mod server;
mod session;

use std::{
    mem,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use fusebox_core::{
    Time,
    circuit::{self, Counts, Delta, Outcome, Passage, Refusal, Reporter},
    saturating_nanos,
};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use self::inner::{Inner, LEAST_LIFE};
use super::{
    Verdict,
    home::Home,
    local,
    permit::{Pass, Permit},
    probe::Offer,
    shared::{Gate, State},
    tally::{self, Tag, Tally},
};
use crate::{
    Clock, Decider, Evidence, Reason, Rejected,
    binding::Binding,
    context::Context,
    settings::{Kind, Settings},
    telemetry::Event,
};

/// In the word of the gate: calls go through, and nothing is to be looked at. Beside it are the generation of the local
/// breaker, in 31 bits, and the number of that of the shared circuit, in 32.
const FREE: u64 = 1 << 63;

const SELF: Reporter<'static> = Reporter { id: "self", zone: "" };

/// The user's own settings of the local breakers of a policy.
pub(super) type OwnSettings = ArcSwapOption<circuit::Breaker>;

/// One circuit in use.
pub(super) struct Circuit {
    pub(super) binding: Arc<Binding>,
    /// Where the settings of the policy are.
    policy: Arc<Binding>,
    pub(super) home: Arc<Home>,
    own: Arc<OwnSettings>,
    /// Whether the server is told of it at all; else there are too many.
    is_shared: bool,
    shown: Shown,
    tally: Tally,
    refusals: Refusals,
    inner: Mutex<Inner>,
}

/// What every call reads, in cache lines that calls do not write.
#[repr(align(64))]
struct Shown {
    gate: AtomicU64,
    /// Till then a good call needs not be told to the local breaker; in nanoseconds.
    quiet_until: AtomicU64,
    /// A call that took longer is not good; in nanoseconds.
    slow_over: AtomicU64,
    clock: Clock,
    /// How calls are refused without a look at anything else.
    refused: ArcSwapOption<Refused>,
}

/// Calls that were refused, in a cache line of their own.
#[derive(Default)]
#[repr(align(64))]
struct Refusals {
    by_memory: AtomicU64,
    by_local: AtomicU64,
}

/// A refusal that holds for a time.
struct Refused {
    until: Time,
    reason: Reason,
    decider: Decider,
    evidence: Option<Arc<Evidence>>,
}

/// What changed, and is to be told once nothing is locked.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Changes {
    own: Option<bool>,
    shared: Option<bool>,
    urgent: bool,
}

/// What becomes of a call, before there is a permit.
enum Passed {
    As(Pass),
    Refused {
        reason: Reason,
        decider: Decider,
        retry_after: Option<Duration>,
        evidence: Option<Arc<Evidence>>,
    },
    Asked(oneshot::Receiver<Offer>),
}

/// What becomes of a call.
pub(super) enum Decided {
    Now(Result<Permit, Rejected>),
    Asked(oneshot::Receiver<Offer>),
}

/// How a call ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum End {
    Told(Verdict),
    Abandoned,
}

impl End {
    fn outcome(self) -> Outcome {
        match self {
            Self::Told(Verdict::Success) => Outcome::Success,
            Self::Told(Verdict::Failure(_)) => Outcome::Failure,
            Self::Told(Verdict::LocalFailure) => Outcome::LocalFailure,
            Self::Told(Verdict::Ignored) => Outcome::Ignored,
            Self::Abandoned => Outcome::Abandoned,
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::Told(Verdict::Failure(kind)) => kind,
            _ => "",
        }
    }
}

fn tag(word: u64) -> Tag {
    #[allow(clippy::cast_possible_truncation)] // the low halves of both generations
    Tag((((word >> 32) as u32) << 16) | (word as u32 & 0xffff))
}

fn own_generation(word: u64) -> u64 {
    (word & !FREE) >> 32
}

fn shared_number(word: u64) -> u32 {
    #[allow(clippy::cast_possible_truncation)] // the low half
    let number = word as u32;
    number
}

impl Circuit {
    /// A circuit that the server is told of.
    pub(super) fn shared(
        home: &Arc<Home>,
        binding: Arc<Binding>,
        own: Arc<OwnSettings>,
        now: Time,
    ) -> Self {
        let policy = Arc::clone(&binding);
        Self::new(home, (binding, policy), own, (true, now))
    }

    /// One that it is not told of, with the settings of another key of the policy: there are too many.
    pub(super) fn unshared(
        home: &Arc<Home>,
        key: &str,
        policy: &Arc<Binding>,
        own: Arc<OwnSettings>,
        now: Time,
    ) -> Self {
        let binding = Arc::new(Binding::new(&policy.policy, key, 0));
        Self::new(home, (binding, Arc::clone(policy)), own, (false, now))
    }

    fn new(
        home: &Arc<Home>,
        (binding, policy): (Arc<Binding>, Arc<Binding>),
        own: Arc<OwnSettings>,
        (is_shared, now): (bool, Time),
    ) -> Self {
        let inner = Inner::new(now);
        let word = inner.word();
        let circuit = Self {
            binding,
            policy,
            home: Arc::clone(home),
            own,
            is_shared,
            shown: Shown {
                gate: AtomicU64::new(word),
                quiet_until: AtomicU64::new(0),
                slow_over: AtomicU64::new(u64::MAX),
                clock: home.context.clock.clone(),
                refused: ArcSwapOption::empty(),
            },
            tally: Tally::new(tag(word)),
            refusals: Refusals::default(),
            inner: Mutex::new(inner),
        };
        let mut inner = circuit.inner.lock();
        circuit.fit(&mut inner);
        circuit.publish(&mut inner, now);
        drop(inner);
        circuit
    }

    /// The word of the gate if a call goes through without a look at anything else, and when that was.
    ///
    /// # Errors
    /// If it has to be [decided](Self::decide): when that was.
    #[inline]
    pub(super) fn cross(&self) -> Result<(u64, Time), Time> {
        let now = self.shown.clock.now();
        let word = self.shown.gate.load(Ordering::Acquire);
        if word & FREE != 0 { Ok((word, now)) } else { Err(now) }
    }

    /// A call is refused without a look at anything else, if calls are for a time.
    #[inline(never)]
    pub(super) fn refused(&self, now: Time) -> Option<Rejected> {
        let refused = self.shown.refused.load();
        let Refused { until, reason, decider, evidence } =
            refused.as_deref().filter(|refused| now < refused.until)?;
        let wait = Duration::from_nanos(until.nanos_since(now));
        Some(self.refuse(*reason, *decider, Some(wait), evidence.clone()))
    }

    /// Decides about a call that the gate does not let through by itself. With `waits` the server may be asked for it.
    #[inline(never)]
    pub(super) fn decide(self: &Arc<Self>, now: Time, waits: bool) -> Decided {
        if let Some(rejected) = self.refused(now) {
            return Decided::Now(Err(rejected));
        }
        let (passed, changes, word) = {
            let mut inner = self.inner.lock();
            self.visit(&mut inner, now);
            let passed = self.pass(&mut inner, now, waits);
            let changes = self.publish(&mut inner, now);
            (passed, changes, inner.word())
        };
        self.tell(changes);
        match passed {
            Passed::As(pass) => Decided::Now(Ok(self.permit(pass, word, now))),
            Passed::Asked(offer) => Decided::Asked(offer),
            Passed::Refused { reason, decider, retry_after, evidence } => {
                Decided::Now(Err(self.refuse(reason, decider, retry_after, evidence)))
            }
        }
    }

    fn permit(self: &Arc<Self>, pass: Pass, word: u64, now: Time) -> Permit {
        if matches!(pass, Pass::Probe(_)) {
            self.home.context.telemetry.decided(Decider::Server);
        }
        Permit::new(Arc::clone(self), pass, word, now)
    }

    fn refuse(
        &self,
        reason: Reason,
        decider: Decider,
        retry_after: Option<Duration>,
        evidence: Option<Arc<Evidence>>,
    ) -> Rejected {
        match decider {
            Decider::Memory => _ = self.refusals.by_memory.fetch_add(1, Ordering::Relaxed),
            Decider::Local => _ = self.refusals.by_local.fetch_add(1, Ordering::Relaxed),
            Decider::Server | Decider::Fallback => {
                self.home.context.telemetry.rejected(decider, reason);
            }
        }
        Rejected::new(&self.binding, reason, retry_after, decider, evidence)
    }

    /// What becomes of a call that the gate does not let through by itself.
    fn pass(self: &Arc<Self>, inner: &mut Inner, now: Time, waits: bool) -> Passed {
        if inner.only_watches() {
            return Passed::As(Pass::Watched);
        }
        let gate = inner.gate(&self.home, now);
        let evidence = |inner: &Inner| inner.shared.told().and_then(|told| told.evidence.clone());
        match gate {
            Gate::LetThrough { counted: true } => Passed::As(Pass::Watched),
            Gate::LetThrough { counted: false } => {
                inner.count(&self.home, 1, now);
                Passed::As(Pass::Uncounted)
            }
            Gate::RefusedByForce { until } => {
                let evidence = evidence(inner);
                self.refuse_until(until, Reason::CircuitForcedOpen, Decider::Memory, evidence, now)
            }
            Gate::RefusedByShared { .. } | Gate::Ask if inner.has_probe(now) => {
                // What is not there is abandoned by nobody.
                inner.pocket.take().map_or_else(
                    || inner.refuse_by_shared(),
                    |grant| Passed::As(Pass::Probe(Box::new(grant))),
                )
            }
            Gate::RefusedByShared { until } => {
                let evidence = evidence(inner);
                self.refuse_until(until, inner.shared_reason(), Decider::Memory, evidence, now)
            }
            Gate::Ask => self.ask(inner, waits),
            Gate::Local => self.pass_own(inner, None, now),
            Gate::Ramp(share) => self.pass_own(inner, Some(share), now),
        }
    }

    /// Refuses a call, and those that come until then.
    fn refuse_until(
        &self,
        until: Time,
        reason: Reason,
        decider: Decider,
        evidence: Option<Arc<Evidence>>,
        now: Time,
    ) -> Passed {
        let refused = Refused { until, reason, decider, evidence: evidence.clone() };
        self.shown.refused.store(Some(Arc::new(refused)));
        let retry_after = Some(Duration::from_nanos(until.nanos_since(now)));
        Passed::Refused { reason, decider, retry_after, evidence }
    }

    /// The local breaker decides, and then the ramp of the shared circuit: what it refuses takes no place of a probe.
    fn pass_own(&self, inner: &mut Inner, ramp: Option<u16>, now: Time) -> Passed {
        let draw = self.draw();
        let passage = inner.turn(now, draw, circuit::Circuit::ask);
        if let Passage::Refused { refusal, retry_after } = passage {
            inner.turn(now, draw, |own, turn| own.refuse(passage, turn));
            let evidence = inner.own_evidence(now);
            let reason = match refusal {
                Refusal::Open => Reason::CircuitOpen,
                Refusal::ForcedOpen => Reason::CircuitForcedOpen,
                Refusal::ProbesInUse => Reason::ProbesInUse,
                Refusal::Ramping => Reason::Ramping,
            };
            return match (refusal, retry_after) {
                (Refusal::Open, Some(left)) => {
                    self.refuse_until(now.after(left), reason, Decider::Local, evidence, now)
                }
                _ => Passed::Refused { reason, decider: Decider::Local, retry_after, evidence },
            };
        }
        if ramp.is_some_and(|share| !inner.shared.passes_ramp(share)) {
            let (reason, decider) = (Reason::Ramping, Decider::Memory);
            return Passed::Refused { reason, decider, retry_after: None, evidence: None };
        }
        let admitted = inner.turn(now, draw, |own, turn| own.admit(passage, turn));
        Passed::As(admitted.probe.map_or(Pass::Free, |(probe, _)| Pass::OwnProbe(probe)))
    }

    /// A call is over.
    #[inline]
    pub(super) fn end(self: &Arc<Self>, pass: &mut Pass, word: u64, began: Time, end: End) {
        let now = self.shown.clock.now();
        if let (Pass::Free, End::Told(Verdict::Success)) = (&*pass, end) {
            let latency = now.nanos_since(began);
            let is_same = (self.shown.gate.load(Ordering::Acquire) ^ word) & !FREE == 0;
            let is_quiet = now.as_nanos() < self.shown.quiet_until.load(Ordering::Acquire);
            let is_good = latency <= self.shown.slow_over.load(Ordering::Relaxed);
            if is_same && is_quiet && is_good {
                let bucket = tally::bucket_of(latency / 1_000);
                if self.tally.add(bucket, tag(word)) {
                    return;
                }
            }
        }
        self.end_slowly(mem::replace(pass, Pass::Uncounted), word, (began, now), end);
    }

    pub(super) fn elapsed(&self, began: Time) -> Duration {
        Duration::from_nanos(self.shown.clock.now().nanos_since(began))
    }

    #[inline(never)]
    fn end_slowly(self: &Arc<Self>, pass: Pass, word: u64, (began, now): (Time, Time), end: End) {
        let latency = Duration::from_nanos(now.nanos_since(began));
        let probe = match pass {
            Pass::Uncounted => return,
            Pass::Probe(grant) => {
                return self.home.settle(grant.outcome(end.outcome(), latency, end.kind()));
            }
            Pass::Watched => None,
            Pass::Free => Some(None),
            Pass::OwnProbe(probe) => Some(Some(probe)),
        };
        let changes = {
            let mut inner = self.inner.lock();
            self.visit(&mut inner, now);
            if let Some(probe) = probe
                && own_generation(word) == own_generation(inner.word())
            {
                inner.tell_own(probe, end, latency, (now, self.draw()));
            }
            let mut urgent = false;
            if shared_number(word) == inner.shared_number && inner.is_told_of(self.is_shared) {
                urgent = inner.note(end, latency);
            }
            inner.count(&self.home, 1, now);
            let changes = self.publish(&mut inner, now);
            Changes { urgent: changes.urgent | urgent, ..changes }
        };
        self.tell(changes);
    }

    /// Reads what was counted since, and tells the local breaker: before anything else is done to it.
    fn visit(self: &Arc<Self>, inner: &mut Inner, now: Time) {
        (inner.used_at, inner.busy_at) = (now, now);
        self.read(inner, now);
        self.catch_up(inner, now);
        self.fit(inner);
        if !inner.is_active && !self.home.is_closed() {
            inner.is_active = true;
            self.home.active.lock().push(Arc::clone(self));
        }
    }

    /// Reads what was counted since.
    fn read(&self, inner: &mut Inner, now: Time) {
        let Inner { seen, untold, news, shared, .. } = inner;
        let is_told =
            self.is_shared && shared.told().is_none_or(|told| told.state == State::Closed);
        let mut all = 0;
        self.tally.read(seen, |bucket, calls| {
            all += u64::from(calls);
            *untold = untold.saturating_add(calls);
            if is_told {
                news.add_good(bucket, calls);
            }
        });
        if all > 0 {
            (inner.busy_at, inner.used_at) = (now, now);
            inner.count(&self.home, all, now);
        }
    }

    /// Tells the local breaker of the good calls that were read, as of the slice in which they were.
    fn catch_up(&self, inner: &mut Inner, now: Time) {
        let calls = mem::take(&mut inner.untold);
        if calls == 0 {
            return;
        }
        let last = self.shown.quiet_until.load(Ordering::Acquire).checked_sub(1);
        let at = last.map_or(now, |last| now.min(Time::from_nanos(last)));
        let counts = Counts { calls, ..Counts::default() };
        let delta = Delta { counts, ..Delta::default() };
        inner.turn(at, self.draw(), |own, turn| own.report(own.generation(), delta, SELF, turn));
    }

    /// Goes by the settings in force: the user's own, those of the policy, or the defaults.
    fn fit(&self, inner: &mut Inner) {
        let (settings, own) = (self.policy.settings(), self.own.load_full());
        if is_same(&settings, &inner.settings) && is_same(&own, &inner.own_settings) {
            return;
        }
        let policy = match settings.as_deref() {
            Some(Settings { kind: Kind::Breaker(breaker), .. }) => Some(breaker),
            _ => None,
        };
        // Without a policy, that of before stays.
        if let Some(own) = &own {
            inner.breaker = Arc::clone(own);
        } else if let Some(policy) = policy {
            inner.breaker = Arc::new(local::of_policy(policy));
        } else if inner.own_settings.is_some() {
            inner.breaker = Arc::new(local::default_breaker());
        }
        let over = policy.and_then(|policy| policy.slow_call).map(|slow| slow.over);
        let over = over.into_iter().chain(inner.breaker.slow_call.map(|slow| slow.over)).min();
        self.shown.slow_over.store(over.map_or(u64::MAX, saturating_nanos), Ordering::Relaxed);
        (inner.settings, inner.own_settings) = (settings, own);
    }

    /// Shows calls what has become of it, and tells what has changed.
    fn publish(&self, inner: &mut Inner, now: Time) -> Changes {
        let shown = self.shown.gate.load(Ordering::Acquire);
        let word = inner.word() | if inner.is_free(&self.home, now) { FREE } else { 0 };
        if word != shown {
            self.shown.gate.store(word, Ordering::Release);
        }
        if tag(word) != tag(shown) {
            let is_same_own = own_generation(word) == own_generation(shown);
            let is_same_shared = shared_number(word) == shared_number(shown);
            let Inner { seen, untold, news, .. } = inner;
            self.tally.begin(tag(word), seen, |bucket, calls| {
                // They were counted while this was decided.
                if is_same_own {
                    *untold += calls;
                }
                if is_same_shared && self.is_shared {
                    news.add_good(bucket, calls);
                }
            });
        }
        if (word ^ shown) & !FREE != 0 {
            self.shown.refused.store(None);
        }
        let is_active = inner.is_active;
        let quiet = inner.turn(now, 0, |own, turn| own.quiet_until(turn)).filter(|_| is_active);
        self.shown.quiet_until.store(quiet.map_or(0, Time::as_nanos), Ordering::Release);
        let is_closed = inner.own.phase() == circuit::Phase::Closed;
        let changed = mem::replace(&mut inner.own_closed, is_closed) != is_closed;
        Changes { own: changed.then_some(is_closed), shared: None, urgent: changed && !is_closed }
    }

    /// Tells of changes; nothing is locked.
    pub(super) fn tell(&self, changes: Changes) {
        let Context { telemetry, exchange, .. } = &*self.home.context;
        let (policy, key) = (&*self.binding.policy, &*self.binding.key);
        for (closed, decider) in [(changes.own, Decider::Local), (changes.shared, Decider::Server)]
        {
            if let Some(closed) = closed {
                telemetry.tell(&Event::Circuit { policy, key, decider, closed });
            }
        }
        if changes.urgent {
            exchange.hurry();
        }
    }

    fn draw(&self) -> u32 {
        #[allow(clippy::cast_possible_truncation)] // the high half
        let draw = (self.home.context.random.next() >> 32) as u32;
        draw
    }
}

fn is_breaker(settings: Option<&Settings>) -> bool {
    settings.is_some_and(|settings| matches!(settings.kind, Kind::Breaker(_)))
}

fn is_same<T>(one: &Option<Arc<T>>, other: &Option<Arc<T>>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (None, None) => true,
        _ => false,
    }
}

#[cfg(test)]
impl Circuit {
    /// What the local breaker is now, and its generation.
    pub(super) fn own(&self) -> (circuit::Phase, u64) {
        let mut inner = self.inner.lock();
        let now = self.home.now();
        self.read(&mut inner, now);
        self.catch_up(&mut inner, now);
        inner.turn(now, 0, circuit::Circuit::touch);
        self.publish(&mut inner, now);
        (inner.own.phase(), inner.own.generation().0)
    }

    pub(super) fn has_pocket(&self) -> bool {
        self.inner.lock().pocket.is_some()
    }
}
