//! One circuit in use: the gate that calls pass, and behind it what the server told and the local breaker.
//!
//! A call through a closed circuit reads one word, the [`Gate word`](FREE), and counts itself in a [`Tally`] when it
//! went well. All else goes by a lock of the circuit: refusals that are not told at once, calls that failed or were
//! slow, news of the server, and the first good call of each slice of the window, which tells the local breaker of
//! those that were counted before. So it sees what it would if each call were told to it: till then no good call can
//! open it, which it says itself ([`quiet_until`](circuit::Circuit::quiet_until)).

use std::{
    cell::Cell,
    collections::VecDeque,
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use fusebox_core::{
    Time,
    circuit::{
        self, Call, Counts, Delta, Generation, Outcome, Passage, ProbeId, Refusal, Reporter, Turn,
    },
    saturating_nanos,
};
use fusebox_proto::v1;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{
    Verdict, local,
    news::News,
    permit::{Pass, Permit},
    probe::{Grant, Held, Offer},
    shared::{Change, Gate, Shared, State, Told},
    tally::{self, Seen, Tag, Tally},
};
use crate::{
    Clock, Decider, Evidence, Reason, Rejected,
    binding::Binding,
    context::Context,
    exchange::{Answers, Question, Unanswered, duration, lasts_until},
    settings::{Kind, Settings},
    telemetry::{Counts as Counted, Event},
};

/// Outcomes of probes that wait for a report, at most: a few for each circuit that is half-open at a time. A probe that
/// is not told of has failed, when its time is over.
const OUTCOMES_MOST: usize = 10_000;

/// How long a circuit without news is looked after.
const REST: Duration = Duration::from_secs(1);

/// The least time between two asks for a probe that got none: a circuit is half-open for seconds, and each client that
/// has calls for it asks.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// How long an answer is waited for that its caller did not wait for: longer than a server takes, and shorter than
/// most probes live.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// A probe that waits for a caller is given back when it has no longer to live.
const LEAST_LIFE: Duration = Duration::from_millis(100);

/// How long the server is not told of a circuit that it has no room for.
const NOT_SHARED_FOR: Duration = Duration::from_secs(60);

/// How often the server is asked for the generation of a circuit, by a report of none.
const UNKNOWN_EVERY: Duration = Duration::from_secs(1);

/// In the word of the gate: calls go through, and nothing is to be looked at. Beside it are the generation of the local
/// breaker, in 31 bits, and the number of that of the shared circuit, in 32.
const FREE: u64 = 1 << 63;

const SELF: Reporter<'static> = Reporter { id: "self", zone: "" };

/// What all circuits of a client have in common.
pub(super) struct Home {
    pub(super) context: Arc<Context>,
    /// Until when all is believed that a Watch told, in nanoseconds.
    watched_until: AtomicU64,
    /// Circuits that have something to tell, or had of late.
    pub(super) active: Mutex<Vec<Arc<Circuit>>>,
    /// How probes went.
    pub(super) outcomes: Mutex<VecDeque<v1::GrantOutcome>>,
    pub(super) is_closed: AtomicBool,
}

impl Home {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            watched_until: AtomicU64::new(0),
            active: Mutex::default(),
            outcomes: Mutex::default(),
            is_closed: AtomicBool::new(false),
        }
    }

    pub(super) fn now(&self) -> Time {
        self.context.clock.now()
    }

    pub(super) fn watched_until(&self) -> Time {
        Time::from_nanos(self.watched_until.load(Ordering::Acquire))
    }

    pub(super) fn is_watched_until(&self, until: Time) {
        self.watched_until.store(until.as_nanos(), Ordering::Release);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// Tells the server how a probe went, at once: others wait for it.
    pub(super) fn settle(&self, outcome: v1::GrantOutcome) {
        let is_room = {
            let mut outcomes = self.outcomes.lock();
            let is_room = outcomes.len() < OUTCOMES_MOST;
            if is_room {
                outcomes.push_back(outcome);
            }
            is_room
        };
        if is_room {
            self.context.exchange.hurry();
        } else {
            let dropped = Event::Dropped { what: "outcomes of probes", count: 1 };
            self.context.telemetry.tell(&dropped);
        }
    }
}

/// The user's own settings of the local breakers of a policy.
pub(super) type OwnSettings = ArcSwapOption<circuit::Breaker>;

/// One circuit in use.
pub(super) struct Circuit {
    pub(super) binding: Arc<Binding>,
    pub(super) home: Arc<Home>,
    clock: Clock,
    own: Arc<OwnSettings>,
    /// Whether the server is told of it at all; else there are too many.
    is_shared: bool,
    gate: AtomicU64,
    /// Till then a good call needs not be told to the local breaker; in nanoseconds.
    quiet_until: AtomicU64,
    /// A call that took longer is not good; in nanoseconds.
    slow_over: AtomicU64,
    tally: Tally,
    /// How calls are refused without a look at anything else.
    refused: ArcSwapOption<Refused>,
    refused_by_memory: AtomicU64,
    refused_by_local: AtomicU64,
    inner: Mutex<Inner>,
}

/// A refusal that holds for a time.
struct Refused {
    until: Time,
    reason: Reason,
    decider: Decider,
    evidence: Option<Arc<Evidence>>,
}

/// What is behind the lock.
struct Inner {
    own: circuit::Circuit,
    breaker: Arc<circuit::Breaker>,
    /// What `breaker` was made of.
    settings: Option<Arc<Settings>>,
    own_settings: Option<Arc<circuit::Breaker>>,
    /// The last generation of the local breaker.
    generations: u64,
    /// Why the local breaker is open in that generation.
    own_evidence: Option<(Generation, Arc<Evidence>)>,
    /// Whether it was closed when that was told last.
    own_closed: bool,
    shared: Shared,
    /// Counts the generations of the shared circuit.
    shared_number: u32,
    /// What a Watch tells goes for it.
    is_watched: bool,
    /// The snapshot in which it was told of last.
    snapshot: u64,
    not_shared_until: Time,
    asked_generation_at: Option<Time>,
    /// What of the tally was read.
    seen: Seen,
    /// Good calls that the local breaker was not told of yet.
    untold: u32,
    news: News,
    /// The server knows that there are many failures, or will at once.
    has_hurried: bool,
    is_asking: bool,
    pocket: Option<Grant>,
    is_active: bool,
    busy_at: Time,
    used_at: Time,
    by_memory: u64,
    by_local: u64,
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
    pub(super) fn new(
        home: &Arc<Home>,
        binding: Arc<Binding>,
        own: Arc<OwnSettings>,
        is_shared: bool,
        now: Time,
    ) -> Self {
        let breaker = Arc::new(local::default_breaker());
        let inner = Inner {
            own: circuit::Circuit::new(Generation(1), &breaker, now),
            breaker,
            settings: None,
            own_settings: None,
            generations: 1,
            own_evidence: None,
            own_closed: true,
            shared: Shared::default(),
            shared_number: 0,
            is_watched: false,
            snapshot: 0,
            not_shared_until: Time::ZERO,
            asked_generation_at: None,
            seen: [0; circuit::LATENCIES],
            untold: 0,
            news: News::default(),
            has_hurried: false,
            is_asking: false,
            pocket: None,
            is_active: false,
            busy_at: now,
            used_at: now,
            by_memory: 0,
            by_local: 0,
        };
        let word = inner.word();
        let circuit = Self {
            binding,
            home: Arc::clone(home),
            clock: home.context.clock.clone(),
            own,
            is_shared,
            gate: AtomicU64::new(word),
            quiet_until: AtomicU64::new(0),
            slow_over: AtomicU64::new(u64::MAX),
            tally: Tally::new(tag(word)),
            refused: ArcSwapOption::empty(),
            refused_by_memory: AtomicU64::new(0),
            refused_by_local: AtomicU64::new(0),
            inner: Mutex::new(inner),
        };
        let mut inner = circuit.inner.lock();
        circuit.fit(&mut inner);
        circuit.publish(&mut inner, now);
        drop(inner);
        circuit
    }

    /// Lets a call through, or does not. With `waits` the server may be asked for it.
    #[inline]
    pub(super) fn admit(self: &Arc<Self>, waits: bool) -> Decided {
        let now = self.clock.now();
        let word = self.gate.load(Ordering::Acquire);
        if word & FREE != 0 {
            return Decided::Now(Ok(Permit::new(Arc::clone(self), Pass::Free, word, now)));
        }
        self.decide(now, waits)
    }

    #[inline(never)]
    fn decide(self: &Arc<Self>, now: Time, waits: bool) -> Decided {
        if let Some(refused) = &*self.refused.load()
            && now < refused.until
        {
            let wait = Duration::from_nanos(refused.until.nanos_since(now));
            let Refused { reason, decider, ref evidence, .. } = **refused;
            return Decided::Now(Err(self.refuse(reason, decider, Some(wait), evidence.clone())));
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
            Decider::Memory => _ = self.refused_by_memory.fetch_add(1, Ordering::Relaxed),
            Decider::Local => _ = self.refused_by_local.fetch_add(1, Ordering::Relaxed),
            Decider::Server | Decider::Fallback => {
                self.home.context.telemetry.rejected(decider, reason);
            }
        }
        let (policy, key) = (Arc::clone(&self.binding.policy), Arc::clone(&self.binding.key));
        Rejected { policy, key, reason, retry_after, decider, evidence }
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
        self.refused.store(Some(Arc::new(refused)));
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
        let now = self.clock.now();
        if let (Pass::Free, End::Told(Verdict::Success)) = (&*pass, end) {
            let latency = now.nanos_since(began);
            let is_same = (self.gate.load(Ordering::Acquire) ^ word) & !FREE == 0;
            let is_quiet = now.as_nanos() < self.quiet_until.load(Ordering::Acquire);
            let is_good = latency <= self.slow_over.load(Ordering::Relaxed);
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
        Duration::from_nanos(self.clock.now().nanos_since(began))
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
        let last = self.quiet_until.load(Ordering::Acquire).checked_sub(1);
        let at = last.map_or(now, |last| now.min(Time::from_nanos(last)));
        let counts = Counts { calls, ..Counts::default() };
        let delta = Delta { counts, ..Delta::default() };
        inner.turn(at, self.draw(), |own, turn| own.report(own.generation(), delta, SELF, turn));
    }

    /// Goes by the settings in force: the user's own, those of the policy, or the defaults.
    fn fit(&self, inner: &mut Inner) {
        let (settings, own) = (self.binding.settings(), self.own.load_full());
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
        self.slow_over.store(over.map_or(u64::MAX, saturating_nanos), Ordering::Relaxed);
        (inner.settings, inner.own_settings) = (settings, own);
    }

    /// Shows calls what has become of it, and tells what has changed.
    fn publish(&self, inner: &mut Inner, now: Time) -> Changes {
        let shown = self.gate.load(Ordering::Acquire);
        let word = inner.word() | if inner.is_free(&self.home, now) { FREE } else { 0 };
        if word != shown {
            self.gate.store(word, Ordering::Release);
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
            self.refused.store(None);
        }
        let is_active = inner.is_active;
        let quiet = inner.turn(now, 0, |own, turn| own.quiet_until(turn)).filter(|_| is_active);
        self.quiet_until.store(quiet.map_or(0, Time::as_nanos), Ordering::Release);
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

/// What the server has to do with it.
impl Circuit {
    /// The server is asked for a probe, by one call at a time.
    fn ask(self: &Arc<Self>, inner: &mut Inner, waits: bool) -> Passed {
        if inner.is_asking || self.home.is_closed() {
            return inner.refuse_by_shared();
        }
        inner.is_asking = true;
        let (waiter, offer) = oneshot::channel();
        let context = Arc::clone(&self.home.context);
        let request_id = format!("{:016x}{:016x}", context.random.next(), context.random.next());
        let question = Question { request_id, ..Question::of(&self.binding) };
        let waiter = waits.then_some(waiter);
        context.runtime.spawn(Arc::clone(self).await_answer(question, waiter));
        if waits { Passed::Asked(offer) } else { inner.refuse_by_shared() }
    }

    /// Waits for the answer: with its caller for as long as that does, then without.
    async fn await_answer(
        self: Arc<Self>,
        question: Question,
        waiter: Option<oneshot::Sender<Offer>>,
    ) {
        let Context { exchange, decide_within, .. } = &*self.home.context;
        let mut asked = exchange.ask(vec![question]);
        let (answer, waiter) = match tokio::time::timeout(*decide_within, &mut asked).await {
            Ok(answer) => (answer, waiter),
            Err(_) => {
                drop(waiter);
                let late = tokio::time::timeout(ANSWER_WITHIN, asked).await;
                (late.unwrap_or(Err(Unanswered::Unreachable)), None)
            }
        };
        let offer = self.answered(answer);
        if let (Some(offer), Some(waiter)) = (offer, waiter) {
            // A probe that nobody waits for any more goes to the pocket.
            drop(waiter.send(offer));
        }
    }

    /// What an answer offers to who waits for it; nothing of none.
    fn answered(self: &Arc<Self>, answer: Result<Answers, Unanswered>) -> Option<Offer> {
        let now = self.home.now();
        let answer = answer.ok().and_then(|all| Some((all.answers.into_iter().next()?, all.sent)));
        let mut changes = Changes::default();
        let offer = {
            let mut inner = self.inner.lock();
            self.visit(&mut inner, now);
            inner.is_asking = false;
            let Some((answer, sent)) = answer else {
                inner.shared.asks_at(now.after(ASK_AGAIN));
                return None;
            };
            let verdict = &answer.verdict;
            let retry_after = duration(verdict.retry_after);
            let evidence = verdict.evidence.clone().map(|evidence| Arc::new(evidence.into()));
            if verdict.reason() == v1::Reason::NotShared {
                self.is_not_shared(&mut inner, now);
            } else if let Some(state) = State::of(verdict.circuit_state())
                && verdict.reason() != v1::Reason::CircuitForcedOpen
            {
                let change = inner.is_answered(state, verdict, evidence.clone(), (sent, now));
                changes = self.take(&mut inner, change, now);
            }
            let offer = if !answer.allowed {
                // Others may give probes back before the server can know.
                let is_open = verdict.reason() == v1::Reason::CircuitOpen;
                let wait = retry_after.filter(|_| is_open).unwrap_or(ASK_AGAIN);
                inner.shared.asks_at(now.after(wait));
                Offer::Denied { reason: Reason::of(verdict.reason), retry_after, evidence }
            } else if verdict.probe {
                let life = duration(verdict.expires_in).unwrap_or_default();
                let grant = Grant { id: answer.grant_id, until: lasts_until(sent, life) };
                Offer::Probe(Held::new(self, grant))
            } else {
                Offer::Again
            };
            self.refused.store(None);
            let published = self.publish(&mut inner, now);
            changes = Changes { shared: changes.shared, ..published };
            offer
        };
        self.tell(changes);
        Some(offer)
    }

    /// A call that would have to wait is refused.
    pub(super) fn is_undecided(&self) -> Rejected {
        self.refuse(Reason::Undecided, Decider::Memory, None, None)
    }

    /// Waits for what the server offers.
    pub(super) async fn offered(
        self: &Arc<Self>,
        offer: oneshot::Receiver<Offer>,
    ) -> Result<Permit, Rejected> {
        let Ok(offer) = offer.await else {
            // Nobody else decides while what was told may be believed.
            let (reason, evidence) = {
                let inner = self.inner.lock();
                let told = inner.shared.told();
                (inner.shared_reason(), told.and_then(|told| told.evidence.clone()))
            };
            return Err(self.refuse(reason, Decider::Memory, None, evidence));
        };
        let now = self.clock.now();
        match offer {
            Offer::Denied { reason, retry_after, evidence } => {
                Err(self.refuse(reason, Decider::Server, retry_after, evidence))
            }
            Offer::Probe(held) => match held.take(now) {
                Some(grant) => {
                    let word = self.gate.load(Ordering::Acquire);
                    Ok(self.permit(Pass::Probe(Box::new(grant)), word, now))
                }
                None => Err(self.refuse(Reason::ProbesInUse, Decider::Memory, None, None)),
            },
            Offer::Again => match self.decide(now, false) {
                Decided::Now(decided) => decided,
                Decided::Asked(_) => {
                    Err(self.refuse(Reason::ProbesInUse, Decider::Memory, None, None))
                }
            },
        }
    }

    /// A probe that nobody took: it waits for the next call, or is given back.
    pub(super) fn pocket(self: &Arc<Self>, grant: Grant) {
        let now = self.home.now();
        let left = {
            let mut inner = self.inner.lock();
            let is_open = inner.shared.told().is_some_and(|told| told.state != State::Closed);
            if inner.pocket.is_none()
                && is_open
                && grant.lives(now, LEAST_LIFE)
                && !self.home.is_closed()
            {
                inner.pocket = Some(grant);
                self.refused.store(None);
                self.visit(&mut inner, now);
                None
            } else {
                Some(grant)
            }
        };
        if let Some(grant) = left {
            self.home.settle(grant.given_back());
        }
    }

    /// What is told of it by name, in that snapshot of a Watch if it is one.
    pub(super) fn is_told(&self, told: Told, snapshot: Option<u64>, now: Time) -> Changes {
        let mut inner = self.inner.lock();
        if let Some(snapshot) = snapshot {
            inner.snapshot = snapshot;
        }
        self.read(&mut inner, now);
        self.catch_up(&mut inner, now);
        let change = inner.shared.is_told(told);
        let told = self.take(&mut inner, change, now);
        self.refused.store(None);
        let changes = self.publish(&mut inner, now);
        Changes { shared: told.shared, ..changes }
    }

    /// A snapshot is complete, or it is new among circuits of which all is told.
    pub(super) fn is_in_snapshot(
        &self,
        snapshot: u64,
        generation: u64,
        at: Time,
        now: Time,
    ) -> Changes {
        let was_told = {
            let mut inner = self.inner.lock();
            inner.is_watched = true;
            inner.snapshot == snapshot
        };
        if was_told {
            return Changes::default();
        }
        self.is_told(Told::closed(generation, at), None, now)
    }

    /// Circuits that nothing is told of are of that generation now.
    pub(super) fn grows(&self, generation: u64, at: Time) {
        self.inner.lock().shared.grows(generation, at);
    }

    /// The server started again: nothing that it told is believed, and of its probes it knows nothing.
    pub(super) fn is_stale(&self, is_replaced: bool, now: Time) {
        let mut inner = self.inner.lock();
        self.read(&mut inner, now);
        self.catch_up(&mut inner, now);
        inner.is_watched = false;
        inner.pocket = None;
        inner.shared.is_stale();
        if is_replaced {
            let change = inner.shared.forget();
            self.take(&mut inner, change, now);
        }
        self.refused.store(None);
        self.publish(&mut inner, now);
    }

    /// The server has no room for it: the local breaker acts alone.
    fn is_not_shared(&self, inner: &mut Inner, now: Time) {
        inner.not_shared_until = now.after(NOT_SHARED_FOR);
        let change = inner.shared.forget();
        self.take(inner, change, now);
    }

    /// As the answer to a report says.
    pub(super) fn is_refused_room(&self, now: Time) {
        let mut inner = self.inner.lock();
        self.read(&mut inner, now);
        self.catch_up(&mut inner, now);
        self.is_not_shared(&mut inner, now);
        self.refused.store(None);
        self.publish(&mut inner, now);
    }

    /// Does what follows from news; what was counted is told before.
    fn take(&self, inner: &mut Inner, change: Change, now: Time) -> Changes {
        if change.generation {
            inner.shared_number = inner.shared_number.wrapping_add(1);
            inner.news = News::default();
            inner.has_hurried = false;
        }
        if change.closed {
            inner.generations += 1;
            inner.untold = 0;
            inner.own = circuit::Circuit::new(Generation(inner.generations), &inner.breaker, now);
        }
        let shared = (change.opened || change.closed).then_some(change.closed);
        Changes { shared, ..Changes::default() }
    }
}

/// What the session has to do with it.
impl Circuit {
    /// Looks after what time does to it; whether it needs that again soon.
    pub(super) fn tend(self: &Arc<Self>, now: Time) -> bool {
        let mut inner = self.inner.lock();
        self.read(&mut inner, now);
        let given_back = inner.take_spent_probe(now);
        let is_told = inner.is_breaker() && inner.shared.generation() > 0;
        let has_news = is_told && !inner.news.is_empty();
        let rests = inner.pocket.is_none() && !has_news && inner.busy_at.after(REST) <= now;
        if rests {
            // The next call finds it, and tells what is counted from now on.
            self.catch_up(&mut inner, now);
            inner.is_active = false;
            self.publish(&mut inner, now);
        }
        drop(inner);
        if let Some(grant) = given_back {
            self.home.settle(grant.given_back());
        }
        !rests
    }

    /// What the server is to be told of it, if there is anything.
    pub(super) fn delta(&self, now: Time) -> Option<v1::CircuitDelta> {
        let mut inner = self.inner.lock();
        self.read(&mut inner, now);
        self.fit(&mut inner);
        if inner.news.is_empty() || !inner.is_breaker() || now < inner.not_shared_until {
            return None;
        }
        let generation = inner.shared.generation();
        let mut news = News::default();
        if generation == 0 {
            // It tells nothing but that it does not know.
            let asked_at = inner.asked_generation_at;
            if asked_at.is_some_and(|asked_at| now < asked_at.after(UNKNOWN_EVERY)) {
                return None;
            }
            inner.asked_generation_at = Some(now);
        } else {
            news = mem::take(&mut inner.news);
        }
        inner.has_hurried = false;
        Some(news.delta(&self.binding, generation))
    }

    /// Gives back what it holds, as the client ends.
    pub(super) fn close(&self) -> Option<v1::GrantOutcome> {
        self.inner.lock().pocket.take().map(Grant::given_back)
    }

    /// Adds what it decided by itself.
    pub(super) fn count(&self, counts: &mut Counted) {
        {
            let mut inner = self.inner.lock();
            self.read(&mut inner, self.home.now());
            counts.memory += inner.by_memory;
            counts.local += inner.by_local;
        }
        let memory = self.refused_by_memory.load(Ordering::Relaxed);
        let local = self.refused_by_local.load(Ordering::Relaxed);
        counts.memory += memory;
        counts.local += local;
        counts.rejected += memory + local;
    }

    /// Whether no call came for so long.
    pub(super) fn is_idle(&self, time: Duration, now: Time) -> bool {
        let inner = self.inner.lock();
        !inner.is_active && inner.used_at.after(time) <= now
    }

    /// Whether the server is told of it.
    pub(super) fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// Whether the server says that it is a breaker's.
    pub(super) fn is_breaker(&self) -> bool {
        self.is_shared && is_breaker(self.binding.settings().as_deref())
    }

    /// The user's settings have changed: the next call goes by them.
    pub(super) fn is_set(self: &Arc<Self>) {
        let now = self.home.now();
        let changes = {
            let mut inner = self.inner.lock();
            self.visit(&mut inner, now);
            inner.turn(now, 0, circuit::Circuit::touch);
            self.publish(&mut inner, now)
        };
        self.tell(changes);
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

impl Inner {
    /// The word of the gate, but for whether it is free.
    fn word(&self) -> u64 {
        ((self.own.generation().0 << 32) & !FREE) | u64::from(self.shared_number)
    }

    fn turn<T>(
        &mut self,
        now: Time,
        draw: u32,
        act: impl FnOnce(&mut circuit::Circuit, Turn<'_>) -> T,
    ) -> T {
        let last = Cell::new(self.generations);
        let generations = || {
            last.set(last.get() + 1);
            Generation(last.get())
        };
        let turn = Turn { breaker: &self.breaker, now, draw, generations: &generations };
        let result = act(&mut self.own, turn);
        self.generations = last.get();
        result
    }

    fn watched_until(&self, home: &Home) -> Time {
        if self.is_watched { home.watched_until() } else { Time::ZERO }
    }

    fn gate(&self, home: &Home, now: Time) -> Gate {
        self.shared.gate(self.watched_until(home), now)
    }

    /// Whether calls go through without a look at anything: also later, if nothing happens.
    fn is_free(&self, home: &Home, now: Time) -> bool {
        let is_own_free = self.own.phase() == circuit::Phase::Closed && !self.own.is_timed();
        // What is stale or over stays so until something is told; a Watch may say that all it told is as it was.
        let stays = self.shared.leaves_all_to_local() || !self.is_watched;
        is_own_free && stays && self.gate(home, now) == Gate::Local && !self.only_watches()
    }

    /// The policy only watches, and the user wants no breaker of this process's own.
    fn only_watches(&self) -> bool {
        self.own_settings.is_none()
            && self.settings.as_ref().is_some_and(|settings| settings.shadow)
    }

    fn is_breaker(&self) -> bool {
        is_breaker(self.settings.as_deref())
    }

    /// Whether the server counts calls that are let through now.
    fn is_told_of(&self, is_shared: bool) -> bool {
        is_shared && self.shared.told().is_none_or(|told| told.state == State::Closed)
    }

    fn shared_reason(&self) -> Reason {
        match self.shared.told().map(|told| told.state) {
            Some(State::HalfOpen) => Reason::ProbesInUse,
            _ => Reason::CircuitOpen,
        }
    }

    fn refuse_by_shared(&self) -> Passed {
        let evidence = self.shared.told().and_then(|told| told.evidence.clone());
        let (reason, decider) = (self.shared_reason(), Decider::Memory);
        Passed::Refused { reason, decider, retry_after: None, evidence }
    }

    fn has_probe(&self, now: Time) -> bool {
        self.pocket.as_ref().is_some_and(|grant| grant.lives(now, Duration::ZERO))
    }

    /// A probe that waited for too long, or for nothing: the circuit has closed.
    fn take_spent_probe(&mut self, now: Time) -> Option<Grant> {
        let is_open = self.shared.told().is_some_and(|told| told.state != State::Closed);
        self.pocket.take_if(|grant| !is_open || !grant.lives(now, LEAST_LIFE))
    }

    /// Tells the local breaker of a call that it let through, in this generation.
    fn tell_own(
        &mut self,
        probe: Option<ProbeId>,
        end: End,
        latency: Duration,
        (now, draw): (Time, u32),
    ) {
        let is_slow = self.breaker.is_slow(latency);
        let call = Call { outcome: end.outcome(), latency: Some(latency), kind: end.kind() };
        self.turn(now, draw, |own, turn| {
            let generation = own.generation();
            match (probe, call.outcome) {
                (Some(probe), _) => own.report_probe((generation, probe), call, SELF, turn),
                (None, Outcome::Success) => {
                    // Without its latency, which only the server is told.
                    let counts = Counts { calls: 1, failures: 0, slow: is_slow.into() };
                    let delta = Delta { counts, ..Delta::default() };
                    own.report(generation, delta, SELF, turn)
                }
                (None, _) => own.report_call(generation, call, SELF, turn),
            }
        });
    }

    /// Notes a call for the server; whether it should know at once.
    fn note(&mut self, end: End, latency: Duration) -> bool {
        let (slow, enough) = match self.settings.as_deref() {
            Some(Settings { kind: Kind::Breaker(breaker), .. }) => {
                (breaker.is_slow(latency), breaker.min_calls)
            }
            _ => (false, u32::MAX),
        };
        self.news.add(end, tally::bucket(latency), slow);
        let many = self.news.failures() >= u64::from(enough);
        many && !mem::replace(&mut self.has_hurried, true)
    }

    /// Counts decisions that were made by memory: by what the server told, or by this process alone.
    fn count(&mut self, home: &Home, calls: u64, now: Time) {
        if self.shared.is_fresh(self.watched_until(home), now) {
            self.by_memory += calls;
        } else {
            self.by_local += calls;
        }
    }

    /// Takes what the answer to an ask says of the circuit: for how long that may be believed it does not say.
    fn is_answered(
        &mut self,
        state: State,
        verdict: &v1::Verdict,
        evidence: Option<Arc<Evidence>>,
        (sent, now): (Time, Time),
    ) -> Change {
        let before = self.shared.told();
        let retry_after = duration(verdict.retry_after).unwrap_or_default();
        let is_open = state == State::Open;
        let is_same = before.is_some_and(|told| told.generation == verdict.generation);
        self.shared.is_told(Told {
            state,
            generation: verdict.generation,
            ramp: before.filter(|_| is_same).and_then(|told| told.ramp),
            ask_at: if is_open { now.after(retry_after) } else { now },
            forced: None,
            evidence,
            at: sent,
            until: before.map_or(Time::ZERO, |told| told.until),
            absent: false,
        })
    }

    /// Why the local breaker is open.
    fn own_evidence(&mut self, now: Time) -> Option<Arc<Evidence>> {
        let generation = self.own.generation();
        if let Some((of, evidence)) = &self.own_evidence
            && *of == generation
        {
            return Some(Arc::clone(evidence));
        }
        let view = self.turn(now, 0, |own, turn| own.view(turn));
        let seen = view.evidence?;
        let names = |names: &[Arc<str>]| names.iter().map(ToString::to_string).collect();
        let share = |share: circuit::Share| f64::from(share.basis_points()) / 10_000.0;
        let since = view.opened_at.map_or(0, |opened_at| now.nanos_since(opened_at));
        let evidence = Arc::new(Evidence {
            failure_rate: share(seen.failure_rate),
            slow_rate: share(seen.slow_rate),
            calls: seen.calls,
            reporters: 1,
            unhealthy_reporters: 1,
            zones: Vec::new(),
            error_kinds: names(&seen.kinds),
            forced_reason: String::new(),
            open_since: Duration::from_nanos(since),
        });
        self.own_evidence = Some((generation, Arc::clone(&evidence)));
        Some(evidence)
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
