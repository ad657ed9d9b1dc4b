//! A circuit that a whole fleet shares: it opens when reporters see the target failing, and finds out by a few
//! probes whether it may close.
//!
//! The rules were proved by a model before they were written (`tests/suites/models/circuits`). Nothing happens
//! by time itself: whoever touches a circuit lets what was due happen first, in the order in which it was, and
//! as of the time when it was. Every change of its [`Phase`] begins a [`Generation`], and what is told of
//! another generation changes nothing.
//!
//! Boundaries: a rate opens at its threshold and above, a call is slow above `over`, a wait is over when it has
//! passed; and every report is judged, so that a success can open a circuit.

mod breaker;
mod evidence;
mod phase;
mod quorum;
#[cfg(test)]
mod tests;
mod window;

use alloc::{boxed::Box, collections::VecDeque, sync::Arc, vec::Vec};
use core::time::Duration;

pub use self::{
    breaker::{
        Breaker, HalfOpen, InvalidBreaker, MAX_PROBES, MAX_REPORTERS, MAX_STEPS, OpenFor, Ramp,
        Settings, Share, SlowCall, Window as WindowSettings,
    },
    evidence::{Evidence, LATENCIES, MAX_KINDS},
    phase::{Event, Mode, Phase, State},
    window::{Counts, Reporter},
};
use self::{
    evidence::{Details, note},
    quorum::judge,
    window::{Calm, Window},
};
use crate::Time;

/// Transitions that a circuit remembers.
pub const HISTORY: usize = 16;

/// Counts the transitions of circuits: no two of one circuit are the same, and later ones are larger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u64);

/// Which probe of its generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProbeId(pub u32);

/// What every step of a circuit is taken in.
#[derive(Clone, Copy)]
pub struct Turn<'a> {
    /// The settings in force.
    pub breaker: &'a Breaker,
    /// When.
    pub now: Time,
    /// Drawn anew for each turn, of all numbers alike.
    pub draw: u32,
    /// The next generation, above all before it.
    pub generations: &'a dyn Fn() -> Generation,
}

/// Why calls are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The circuit is open.
    Open,
    /// An operator forced it open.
    ForcedOpen,
    /// All probes are under way.
    ProbesInUse,
    /// It closed a moment ago, and lets a share of the calls through.
    Ramping,
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// It goes through.
    Free,
    /// It goes through as a probe.
    Probe,
    /// It is refused.
    Refused {
        /// Why.
        refusal: Refusal,
        /// When it may be otherwise; `None` if nobody knows, or it is not a matter of time.
        retry_after: Option<Duration>,
    },
}

/// What a circuit let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// The generation, of which a report tells.
    pub generation: Generation,
    /// The probe that the call is, if it is one, and how long it lives.
    pub probe: Option<(ProbeId, Duration)>,
}

/// How a call went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Outcome {
    /// The target did what it was asked.
    Success,
    /// It did not.
    Failure,
    /// It failed before it reached the target.
    LocalFailure,
    /// It says nothing about the target.
    Ignored,
    /// Nobody knows.
    #[default]
    Abandoned,
}

/// How one call went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Call<'a> {
    /// How.
    pub outcome: Outcome,
    /// How long it took, if that is known.
    pub latency: Option<Duration>,
    /// What kind of failure it was; may be empty.
    pub kind: &'a str,
}

impl Call<'_> {
    /// The call as it counts; `None` if it says nothing about the target.
    fn counts(self, breaker: &Breaker) -> Option<Counts> {
        let failed = match self.outcome {
            Outcome::Success => false,
            Outcome::Failure => true,
            Outcome::LocalFailure | Outcome::Ignored | Outcome::Abandoned => return None,
        };
        let slow = self.latency.is_some_and(|latency| breaker.is_slow(latency));
        Some(Counts { calls: 1, failures: failed.into(), slow: slow.into() })
    }
}

/// How many calls went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Delta<'a> {
    /// Those that say something about the target.
    pub counts: Counts,
    /// Those that say nothing about it.
    pub ignored: u64,
    /// Those that failed before they reached it.
    pub local_failures: u64,
    /// Calls by latency, as [`LATENCIES`] says.
    pub latencies: &'a [u64],
    /// Kinds of failure that were seen.
    pub kinds: &'a [&'a str],
}

/// What became of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reported {
    /// It counts.
    Applied,
    /// It tells of another generation, or of a probe that is not out: nothing changed.
    Stale,
}

/// An operator's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// What it is to be.
    pub mode: Mode,
    /// For how long; of [`Mode::Normal`] it means nothing.
    pub ttl: Duration,
    /// Why.
    pub reason: Arc<str>,
    /// Who says so.
    pub actor: Arc<str>,
}

/// What an operator made of a circuit, and until when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forced {
    /// When it is back to normal.
    pub until: Time,
    /// Why.
    pub reason: Arc<str>,
    /// Who said so.
    pub actor: Arc<str>,
}

/// One change of a circuit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transition {
    /// The generation that began.
    pub generation: Generation,
    /// When.
    pub at: Time,
    /// What happened.
    pub event: Event,
    /// What the circuit was from then on.
    pub phase: Phase,
    /// What was known, if it opened.
    pub evidence: Option<Arc<Evidence>>,
    /// Why an operator wanted it, and who, if one did.
    pub order: Option<(Arc<str>, Arc<str>)>,
}

/// Calls of this generation that say nothing about the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Aside {
    /// Ignored, or abandoned.
    pub ignored: u64,
    /// Failed before they reached it.
    pub local_failures: u64,
}

/// What of a circuit is kept on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// What it is.
    pub phase: Phase,
    /// Its generation.
    pub generation: Generation,
    /// Since when.
    pub since: Time,
    /// When it opened, if it has not closed since.
    pub opened_at: Option<Time>,
    /// Until when it stays open.
    pub wait_until: Time,
    /// How often it was half-open in vain since it was closed.
    pub attempt: u32,
    /// Whether it lets a share of the calls through.
    pub ramps: bool,
    /// What an operator made of it.
    pub forced: Option<Forced>,
    /// Its latest transitions, the newest last.
    pub history: Vec<Transition>,
}

/// What is told of a circuit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// What it is.
    pub phase: Phase,
    /// Its generation.
    pub generation: Generation,
    /// Since when.
    pub since: Time,
    /// When it opened, if it has not closed since.
    pub opened_at: Option<Time>,
    /// When it may let probes through, if it is open.
    pub half_open_at: Option<Time>,
    /// The share of calls that it lets through, if that is not all or none.
    pub ramp: Option<Share>,
    /// Why it is open, if it is.
    pub evidence: Option<Arc<Evidence>>,
    /// What an operator made of it.
    pub forced: Option<Arc<Forced>>,
}

/// The calls that a half-open circuit has let through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Probes {
    /// Those that run, and since when, the oldest first.
    out: Vec<(ProbeId, Time)>,
    next: u32,
    counts: Counts,
    given_back: u32,
    told_by: Vec<Arc<str>>,
    zones: Vec<Arc<str>>,
}

/// One circuit.
#[derive(Clone, Debug)]
pub struct Circuit {
    phase: Phase,
    generation: Generation,
    since: Time,
    opened_at: Option<Time>,
    wait_until: Time,
    attempt: u32,
    /// Until when probes of an earlier generation may run.
    stragglers_until: Time,
    /// What the ramp owes to the calls that come, in basis points of a call; `None` if it lets all through.
    ramp: Option<u16>,
    window: Window,
    probes: Option<Box<Probes>>,
    aside: Aside,
    details: Option<Box<Details>>,
    /// Which rates were over their threshold in [`Phase::MetricsOnly`]: each is noted once.
    exceeded: Exceeded,
    forced: Option<Arc<Forced>>,
    history: VecDeque<Transition>,
    /// Since when it is told who is there: who was before that, it does not know.
    known_since: Time,
}

/// Rates that were over their threshold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exceeded {
    /// That of failures.
    pub failures: bool,
    /// That of slow calls.
    pub slow: bool,
}

impl Circuit {
    /// A circuit that nothing is known of: closed.
    #[must_use]
    pub fn new(generation: Generation, breaker: &Breaker, now: Time) -> Self {
        Self {
            phase: Phase::Closed,
            generation,
            since: now,
            opened_at: None,
            wait_until: Time::ZERO,
            attempt: 0,
            stragglers_until: Time::ZERO,
            ramp: None,
            window: Window::new(breaker),
            probes: None,
            aside: Aside::default(),
            details: None,
            exceeded: Exceeded::default(),
            forced: None,
            history: VecDeque::new(),
            known_since: now,
        }
    }

    /// The circuit that a later start finds on disk. An open one begins a generation: it may have been half-open
    /// since, and what probes there were may still run.
    #[must_use]
    pub fn recovered(kept: Kept, turn: Turn<'_>) -> Self {
        let Kept { phase, generation, since, opened_at, wait_until, attempt, ramps, .. } = kept;
        let mut circuit = Self {
            phase,
            since,
            opened_at,
            wait_until,
            attempt,
            ramp: ramps.then_some(0),
            stragglers_until: turn.now.after(turn.breaker.half_open.probe_timeout),
            forced: kept.forced.map(Arc::new),
            history: kept.history.into_iter().rev().take(HISTORY).rev().collect(),
            ..Self::new(generation, turn.breaker, turn.now)
        };
        if let Some(after) = phase.after(Event::Restarted) {
            // It opened when it did, and waits as long as it would have.
            circuit.phase = after;
            circuit.generation = (turn.generations)();
        }
        circuit.touch(turn);
        circuit
    }

    /// What is to be kept on disk.
    #[must_use]
    pub fn kept(&self) -> Kept {
        Kept {
            phase: self.phase,
            generation: self.generation,
            since: self.since,
            opened_at: self.opened_at,
            wait_until: self.wait_until,
            attempt: self.attempt,
            ramps: self.ramp.is_some(),
            forced: self.forced.as_deref().cloned(),
            history: self.history.iter().cloned().collect(),
        }
    }

    /// What it is.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// Its generation.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// Its latest transitions, the newest last.
    pub fn history(&self) -> impl ExactSizeIterator<Item = &Transition> + DoubleEndedIterator {
        self.history.iter()
    }

    /// Calls of this generation that say nothing about the target.
    #[must_use]
    pub const fn aside(&self) -> Aside {
        self.aside
    }

    /// Which rates were over their threshold while it only counts.
    #[must_use]
    pub const fn exceeded(&self) -> Exceeded {
        self.exceeded
    }

    /// Probes that run, and since when.
    pub fn probes(&self) -> impl Iterator<Item = (ProbeId, Time)> {
        self.probes.iter().flat_map(|probes| &probes.out).copied()
    }

    /// Whether something happens to it by time, which somebody should look at: it is half-open, ramps up, or an
    /// operator's order ends.
    #[must_use]
    pub const fn is_timed(&self) -> bool {
        self.ramp.is_some() || !matches!(self.phase, Phase::Closed | Phase::Open)
    }

    /// Whether it equals one that nothing is known of, but for what it remembers of long ago; or is open, and would
    /// find out by the next call whether it still must be.
    #[must_use]
    pub fn is_idle(&self, now: Time) -> bool {
        match self.phase {
            Phase::Closed => self.ramp.is_none() && self.window.is_quiet(now),
            Phase::Open => self.half_open_at() <= now,
            Phase::HalfOpen | Phase::ForcedOpen | Phase::Disabled | Phase::MetricsOnly => false,
        }
    }

    /// What is told of it.
    #[must_use]
    pub fn view(&self, turn: Turn<'_>) -> View {
        let state = self.phase.state();
        View {
            phase: self.phase,
            generation: self.generation,
            since: self.since,
            opened_at: self.opened_at,
            half_open_at: (self.phase == Phase::Open).then(|| self.half_open_at()),
            ramp: self.share(turn),
            evidence: (state != State::Closed).then(|| self.opened_by()).flatten().cloned(),
            forced: self.forced.clone(),
        }
    }

    /// Why it opened.
    fn opened_by(&self) -> Option<&Arc<Evidence>> {
        let since_closed = self.history.iter().rev();
        let since_closed = since_closed.take_while(|one| one.phase.state() != State::Closed);
        since_closed.filter_map(|transition| transition.evidence.as_ref()).next()
    }

    /// What its window says now: of a half-open circuit, its probes.
    #[must_use]
    pub fn evidence(&self, turn: Turn<'_>) -> Evidence {
        match &self.probes {
            Some(probes) => self.seen_by(probes),
            None => Evidence::of(&self.window, turn.breaker, self.details.as_deref(), turn.now),
        }
    }

    /// Until when calls that neither fail nor are slow cannot open it, however many there are: till then they may be
    /// told together, before whatever else is told. `None` if the next such call can open it, if several reporters tell
    /// of calls, or if it does not count any.
    ///
    /// The end of time where a window goes by order: there a good call lets a circuit open only while fewer calls are
    /// counted than say something.
    #[must_use]
    pub fn quiet_until(&self, turn: Turn<'_>) -> Option<Time> {
        if self.phase != Phase::Closed {
            return None;
        }
        let calm = self.window.calm(turn.breaker, turn.now)?;
        let opens = || judge(&self.window, self.known_since, turn.breaker, turn.now).opens();
        match calm {
            Calm { nothing_bad: true, until, .. } => Some(until),
            Calm { enough: true, until, .. } => (!opens()).then_some(until),
            Calm { .. } => None,
        }
    }

    /// The latency that such a share of the calls did not exceed, of late; `None` if none was told.
    #[must_use]
    pub fn latency(&self, share: Share) -> Option<Duration> {
        self.details.as_ref()?.latency(share)
    }

    /// Visits each reporter that is there: who it is, its calls in the window, and whether it sees the target
    /// failing by itself. One without a name is all that are not told apart.
    pub fn visit_reporters(
        &self,
        turn: Turn<'_>,
        mut visit: impl FnMut(Reporter<'_>, Counts, bool),
    ) {
        let Window::Time(reporters) = &self.window else { return };
        let fleet = quorum::Fleet::of(reporters.seen(turn.now), turn.breaker);
        for seen in reporters.seen(turn.now).filter(|seen| seen.is_present) {
            let reporter = Reporter { id: &seen.by.id, zone: &seen.by.zone };
            visit(reporter, seen.counts, fleet.is_unhealthy(seen.counts));
        }
    }

    /// Whether a reporter fails alone: the circuit is closed, and its own breaker should act.
    #[must_use]
    pub fn is_outlier(&self, reporter: &str, turn: Turn<'_>) -> bool {
        self.phase == Phase::Closed
            && quorum::is_unhealthy(&self.window, reporter, turn.breaker, turn.now)
    }

    /// Lets all happen that was due.
    pub fn touch(&mut self, turn: Turn<'_>) {
        if self.window.fit(turn.breaker) {
            self.details = None;
            // Who tells from now on may be the first of many.
            self.known_since = turn.now;
        }
        self.catch_up(turn);
        if let Some(details) = &mut self.details {
            details.slide(turn.now);
        }
    }

    fn catch_up(&mut self, turn: Turn<'_>) {
        loop {
            match self.phase {
                Phase::HalfOpen => {
                    let half_open = &turn.breaker.half_open;
                    let over_at = self.since.after(half_open.max_duration);
                    let Some(probes) = &mut self.probes else { return };
                    let oldest =
                        probes.out.first().map(|(_, at)| at.after(half_open.probe_timeout));
                    match oldest.filter(|expires_at| *expires_at <= over_at.min(turn.now)) {
                        Some(expired_at) => {
                            probes.out.remove(0);
                            probes.counts.add(Counts { calls: 1, failures: 1, slow: 0 });
                            self.judge_probes(false, Turn { now: expired_at, ..turn });
                        }
                        None if over_at <= turn.now => {
                            self.judge_probes(true, Turn { now: over_at, ..turn });
                        }
                        None => return,
                    }
                }
                Phase::ForcedOpen | Phase::Disabled | Phase::MetricsOnly => {
                    let until = self.forced.as_ref().map_or(Time::ZERO, |forced| forced.until);
                    if until > turn.now {
                        return;
                    }
                    let ended = Turn { now: until.max(self.since), ..turn };
                    self.happen(Event::Set(Mode::Normal), ended, None);
                }
                Phase::Closed => {
                    if self.share(turn).is_none() {
                        self.ramp = None;
                    }
                    return;
                }
                Phase::Open => return,
            }
        }
    }

    /// What would become of a call now. It changes nothing but what was due.
    pub fn ask(&mut self, turn: Turn<'_>) -> Passage {
        self.touch(turn);
        let refused = |refusal, retry_after| Passage::Refused { refusal, retry_after };
        match self.phase {
            Phase::Disabled | Phase::MetricsOnly => Passage::Free,
            Phase::ForcedOpen => refused(Refusal::ForcedOpen, None),
            Phase::Closed => match (self.ramp, self.share(turn)) {
                (Some(owed), Some(share))
                    if owed + share.basis_points() < Share::ALL.basis_points() =>
                {
                    refused(Refusal::Ramping, None)
                }
                _ => Passage::Free,
            },
            Phase::Open => match self.half_open_at().nanos_since(turn.now) {
                0 => Passage::Probe,
                left => refused(Refusal::Open, Some(Duration::from_nanos(left))),
            },
            Phase::HalfOpen => {
                let half_open = &turn.breaker.half_open;
                let Some(probes) = &self.probes else { return Passage::Probe };
                let out = u32::try_from(probes.out.len()).unwrap_or(u32::MAX);
                if out + probes.counts.calls < half_open.probes && out < half_open.max_in_flight {
                    return Passage::Probe;
                }
                // By then at the latest something is known.
                let over_at = self.since.after(half_open.max_duration);
                let oldest = probes.out.first().map(|(_, at)| at.after(half_open.probe_timeout));
                let known_at = oldest.map_or(over_at, |expires_at| expires_at.min(over_at));
                let left = Duration::from_nanos(known_at.nanos_since(turn.now));
                refused(Refusal::ProbesInUse, Some(left))
            }
        }
    }

    /// Lets the call through that was just [asked](Self::ask) for, in the same turn.
    pub fn admit(&mut self, passage: Passage, turn: Turn<'_>) -> Admitted {
        let probe = (passage == Passage::Probe).then(|| {
            self.happen(Event::Asked, turn, None);
            let probes = self.probes.get_or_insert_default();
            let id = ProbeId(probes.next);
            probes.next += 1;
            // The clock may have been read before that of the latest.
            let at = probes.out.last().map_or(turn.now, |(_, latest)| turn.now.max(*latest));
            probes.out.push((id, at));
            (id, turn.breaker.half_open.probe_timeout)
        });
        self.count_in_ramp(passage, turn);
        Admitted { generation: self.generation, probe }
    }

    /// The call that was just [asked](Self::ask) for, in the same turn, is not made.
    pub fn refuse(&mut self, passage: Passage, turn: Turn<'_>) {
        // One that others refuse does not use up its place in the ramp.
        if matches!(passage, Passage::Refused { .. }) {
            self.count_in_ramp(passage, turn);
        }
    }

    /// The share of the ramp is met by a counter: each call adds it, and one that makes a whole goes through.
    fn count_in_ramp(&mut self, passage: Passage, turn: Turn<'_>) {
        let share = self.share(turn);
        let (Some(owed), Some(share)) = (&mut self.ramp, share) else { return };
        let passed = if passage == Passage::Free { Share::ALL.basis_points() } else { 0 };
        *owed = (*owed + share.basis_points()).saturating_sub(passed);
    }

    /// How a probe went that was let through in that generation.
    pub fn report_probe(
        &mut self,
        (generation, probe): (Generation, ProbeId),
        call: Call<'_>,
        by: Reporter<'_>,
        turn: Turn<'_>,
    ) -> Reported {
        self.touch(turn);
        let Some(probes) = self.probes.as_mut().filter(|_| generation == self.generation) else {
            return Reported::Stale;
        };
        let Some(place) = probes.out.iter().position(|(id, _)| *id == probe) else {
            return Reported::Stale;
        };
        probes.out.remove(place);
        if let Some(counts) = call.counts(turn.breaker) {
            probes.counts.add(counts);
            note(&mut probes.told_by, &by.id.into(), MAX_REPORTERS);
            if counts.failures + counts.slow > 0 {
                note(&mut probes.zones, &by.zone.into(), MAX_KINDS);
            }
            self.note_call(call, turn);
        } else {
            probes.given_back += 1;
            self.set_aside(call.outcome);
        }
        self.judge_probes(false, turn);
        Reported::Applied
    }

    /// How a call went that was let through as any other in that generation.
    pub fn report_call(
        &mut self,
        generation: Generation,
        call: Call<'_>,
        by: Reporter<'_>,
        turn: Turn<'_>,
    ) -> Reported {
        self.touch(turn);
        if !self.counts(generation) {
            return self.uncounted(generation);
        }
        let counts = call.counts(turn.breaker);
        match counts {
            Some(_) => self.note_call(call, turn),
            None => self.set_aside(call.outcome),
        }
        // Also none: the reporter is there.
        self.window.count(by, counts.unwrap_or_default(), turn.now);
        self.judge_window(turn);
        Reported::Applied
    }

    /// How many calls went that were let through in that generation.
    pub fn report(
        &mut self,
        generation: Generation,
        delta: Delta<'_>,
        by: Reporter<'_>,
        turn: Turn<'_>,
    ) -> Reported {
        self.touch(turn);
        if !self.counts(generation) {
            return self.uncounted(generation);
        }
        self.aside.ignored = self.aside.ignored.saturating_add(delta.ignored);
        self.aside.local_failures = self.aside.local_failures.saturating_add(delta.local_failures);
        if !delta.latencies.is_empty() || !delta.kinds.is_empty() {
            let details = self.details.get_or_insert_with(|| Details::new(turn.breaker));
            details.add_latencies(delta.latencies, turn.now);
            delta.kinds.iter().for_each(|kind| details.add_kind(kind, turn.now));
        }
        // Also none: the reporter is there.
        self.window.count(by, delta.counts, turn.now);
        self.judge_window(turn);
        Reported::Applied
    }

    /// A reporter leaves, and takes what it told along.
    pub fn leave(&mut self, reporter: &str, turn: Turn<'_>) {
        self.touch(turn);
        self.window.leave(reporter);
    }

    /// An operator gives an order. Whether it changed anything.
    pub fn set(&mut self, order: &Order, turn: Turn<'_>) -> bool {
        self.touch(turn);
        let forced = (order.mode != Mode::Normal).then(|| {
            let Order { ttl, reason, actor, .. } = order;
            let until = turn.now.after(*ttl);
            Arc::new(Forced { until, reason: Arc::clone(reason), actor: Arc::clone(actor) })
        });
        let changes = self.phase.after(Event::Set(order.mode)).is_some();
        if changes {
            self.happen(Event::Set(order.mode), turn, Some(order));
        }
        // Another reason, or a longer time, for what it is already.
        let differs = self.forced != forced;
        self.forced = forced;
        changes || differs
    }

    /// Whether reports of that generation are counted now.
    fn counts(&self, generation: Generation) -> bool {
        generation == self.generation && matches!(self.phase, Phase::Closed | Phase::MetricsOnly)
    }

    /// What became of a report that is not counted.
    fn uncounted(&self, generation: Generation) -> Reported {
        // It is this one's, and nothing is to be counted of it.
        let is_disabled = self.phase == Phase::Disabled && generation == self.generation;
        if is_disabled { Reported::Applied } else { Reported::Stale }
    }

    fn set_aside(&mut self, outcome: Outcome) {
        let sum = match outcome {
            Outcome::LocalFailure => &mut self.aside.local_failures,
            _ => &mut self.aside.ignored,
        };
        *sum = sum.saturating_add(1);
    }

    fn note_call(&mut self, call: Call<'_>, turn: Turn<'_>) {
        if call.latency.is_none() && call.kind.is_empty() {
            return;
        }
        let details = self.details.get_or_insert_with(|| Details::new(turn.breaker));
        if let Some(latency) = call.latency {
            details.add_latency(latency, turn.now);
        }
        if !call.kind.is_empty() {
            details.add_kind(call.kind, turn.now);
        }
    }

    fn judge_window(&mut self, turn: Turn<'_>) {
        let judged = judge(&self.window, self.known_since, turn.breaker, turn.now);
        if self.phase == Phase::MetricsOnly {
            self.exceeded.failures |= judged.failing;
            self.exceeded.slow |= judged.slow;
        } else if judged.opens() {
            self.happen(Event::Tripped, turn, None);
        }
    }

    /// Judges a half-open circuit, if enough is known or it must be.
    fn judge_probes(&mut self, must: bool, turn: Turn<'_>) {
        let Some(probes) = &self.probes else { return };
        let Counts { calls, failures, slow } = probes.counts;
        let too_many_given_back = probes.given_back > turn.breaker.half_open.probes;
        if !must && calls < turn.breaker.enough() && !too_many_given_back {
            return;
        }
        let over = |bad: u32, rate: Share| rate.is_reached(bad.into(), calls.into());
        let is_slow = turn.breaker.slow_rate().is_some_and(|rate| over(slow, rate));
        let fails = calls == 0 || is_slow || over(failures, turn.breaker.failure_rate);
        self.happen(if fails { Event::Failed } else { Event::Passed }, turn, None);
    }

    /// Lets something happen, and what follows from it.
    fn happen(&mut self, event: Event, turn: Turn<'_>, order: Option<&Order>) {
        let Some(after) = self.phase.after(event) else { return };
        let evidence = match event {
            Event::Tripped | Event::Failed => Some(Arc::new(self.evidence(turn))),
            _ => None,
        };
        let before = core::mem::replace(&mut self.phase, after);
        self.generation = (turn.generations)();
        self.since = turn.now;
        // Probes that are out may run on; a new generation's must not come on top of them.
        let timeout = turn.breaker.half_open.probe_timeout;
        let expiries = self.probes().map(|(_, at)| at.after(timeout)).max();
        self.stragglers_until = self.stragglers_until.max(expiries.unwrap_or(Time::ZERO));
        self.probes = None;
        self.window.clear();
        self.details = None;
        (self.aside, self.exceeded) = (Aside::default(), Exceeded::default());
        self.ramp = None;
        match after {
            Phase::Open => {
                self.attempt =
                    if before == Phase::HalfOpen { self.attempt.saturating_add(1) } else { 0 };
                self.wait_until = turn.now.after(turn.breaker.wait(self.attempt, turn.draw));
                self.opened_at = self.opened_at.or(Some(turn.now));
            }
            Phase::HalfOpen => self.probes = Some(Box::default()),
            Phase::ForcedOpen => self.opened_at = self.opened_at.or(Some(turn.now)),
            Phase::Closed | Phase::Disabled | Phase::MetricsOnly => {
                (self.attempt, self.opened_at) = (0, None);
                let recovers = after == Phase::Closed && before.state() != State::Closed;
                // The first call goes through.
                let whole = Share::ALL.basis_points();
                let first = turn.breaker.ramp.steps.first().filter(|_| recovers);
                self.ramp = first.map(|share| whole - share.basis_points());
            }
        }
        if after.mode() == Mode::Normal {
            self.forced = None;
        }
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(Transition {
            generation: self.generation,
            at: turn.now,
            event,
            phase: after,
            evidence,
            order: order.map(|order| (Arc::clone(&order.reason), Arc::clone(&order.actor))),
        });
    }

    /// When an open circuit may let probes through.
    fn half_open_at(&self) -> Time {
        self.wait_until.max(self.stragglers_until)
    }

    /// The share of calls that it lets through, if it ramps up.
    fn share(&self, turn: Turn<'_>) -> Option<Share> {
        self.ramp?;
        let ramp = &turn.breaker.ramp;
        let each = crate::saturating_nanos(ramp.each).max(1);
        let step = usize::try_from(turn.now.nanos_since(self.since) / each).unwrap_or(usize::MAX);
        ramp.steps.get(step).copied()
    }

    /// What the probes of a half-open circuit say.
    fn seen_by(&self, probes: &Probes) -> Evidence {
        let Counts { calls, failures, slow } = probes.counts;
        let reporters = u32::try_from(probes.told_by.len()).unwrap_or(u32::MAX);
        Evidence {
            failure_rate: Share::of(failures.into(), calls.into()),
            slow_rate: Share::of(slow.into(), calls.into()),
            calls: calls.into(),
            reporters,
            unhealthy: 0,
            zones: probes.zones.clone(),
            kinds: self.details.as_deref().map(Details::most_frequent).unwrap_or_default(),
        }
    }
}
