//! What a circuit has behind its lock.

use std::{cell::Cell, mem, sync::Arc, time::Duration};

use fusebox_core::{
    Time,
    circuit::{self, Call, Counts, Delta, Generation, Outcome, ProbeId, Turn},
};
use fusebox_proto::v1;

use super::{End, FREE, Passed, SELF, is_breaker};
use crate::{
    Decider, Evidence, Reason,
    breaker::{
        home::Home,
        local,
        news::News,
        probe::Grant,
        shared::{Change, Gate, Shared, State, Told},
        tally::{self, Seen, UNSEEN},
    },
    exchange::duration,
    settings::{Kind, Settings},
};

/// A probe that waits for a caller is given back when it has no longer to live.
pub(super) const LEAST_LIFE: Duration = Duration::from_millis(100);

/// What is behind the lock.
pub(super) struct Inner {
    pub(super) own: circuit::Circuit,
    pub(super) breaker: Arc<circuit::Breaker>,
    /// What `breaker` was made of.
    pub(super) settings: Option<Arc<Settings>>,
    pub(super) own_settings: Option<Arc<circuit::Breaker>>,
    /// The last generation of the local breaker.
    pub(super) generations: u64,
    /// Why the local breaker is open in that generation.
    pub(super) own_evidence: Option<(Generation, Arc<Evidence>)>,
    /// Whether it was closed when that was told last.
    pub(super) own_closed: bool,
    pub(super) shared: Shared,
    /// Counts the generations of the shared circuit.
    pub(super) shared_number: u32,
    /// What a Watch tells goes for it.
    pub(super) is_watched: bool,
    /// The snapshot in which it was told of last.
    pub(super) snapshot: u64,
    pub(super) not_shared_until: Time,
    pub(super) asked_generation_at: Option<Time>,
    /// What of the tally was read.
    pub(super) seen: Seen,
    /// Good calls that the local breaker was not told of yet.
    pub(super) untold: u32,
    pub(super) news: News,
    /// The server knows that there are many failures, or will at once.
    pub(super) has_hurried: bool,
    pub(super) is_asking: bool,
    pub(super) pocket: Option<Grant>,
    pub(super) is_active: bool,
    pub(super) busy_at: Time,
    pub(super) used_at: Time,
    pub(super) by_memory: u64,
    pub(super) by_local: u64,
}

impl Inner {
    /// A circuit that nothing is known of.
    pub(super) fn new(now: Time) -> Self {
        let breaker = Arc::new(local::default_breaker());
        Self {
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
            seen: UNSEEN,
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
        }
    }

    /// The word of the gate, but for whether it is free.
    pub(super) fn word(&self) -> u64 {
        ((self.own.generation().0 << 32) & !FREE) | u64::from(self.shared_number)
    }

    pub(super) fn turn<T>(
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

    pub(super) fn watched_until(&self, home: &Home) -> Time {
        if self.is_watched { home.watched_until() } else { Time::ZERO }
    }

    pub(super) fn gate(&self, home: &Home, now: Time) -> Gate {
        self.shared.gate(self.watched_until(home), now)
    }

    /// Whether calls go through without a look at anything: also later, if nothing happens.
    pub(super) fn is_free(&self, home: &Home, now: Time) -> bool {
        let is_own_free = self.own.phase() == circuit::Phase::Closed && !self.own.is_timed();
        // What is stale or over stays so until something is told; a Watch may say that all it told is as it was.
        let stays = self.shared.leaves_all_to_local() || !self.is_watched;
        is_own_free && stays && self.gate(home, now) == Gate::Local && !self.only_watches()
    }

    /// The policy only watches, and the user wants no breaker of this process's own.
    pub(super) fn only_watches(&self) -> bool {
        self.own_settings.is_none()
            && self.settings.as_ref().is_some_and(|settings| settings.shadow)
    }

    pub(super) fn is_breaker(&self) -> bool {
        is_breaker(self.settings.as_deref())
    }

    /// Whether the server counts calls that are let through now.
    pub(super) fn is_told_of(&self, is_shared: bool) -> bool {
        is_shared && self.shared.told().is_none_or(|told| told.state == State::Closed)
    }

    pub(super) fn shared_reason(&self) -> Reason {
        match self.shared.told().map(|told| told.state) {
            Some(State::HalfOpen) => Reason::ProbesInUse,
            _ => Reason::CircuitOpen,
        }
    }

    pub(super) fn refuse_by_shared(&self) -> Passed {
        let evidence = self.shared.told().and_then(|told| told.evidence.clone());
        let (reason, decider) = (self.shared_reason(), Decider::Memory);
        Passed::Refused { reason, decider, retry_after: None, evidence }
    }

    pub(super) fn has_probe(&self, now: Time) -> bool {
        self.pocket.as_ref().is_some_and(|grant| grant.lives(now, Duration::ZERO))
    }

    /// A probe that waited for too long, or for nothing: the circuit has closed.
    pub(super) fn take_spent_probe(&mut self, now: Time) -> Option<Grant> {
        let is_open = self.shared.told().is_some_and(|told| told.state != State::Closed);
        self.pocket.take_if(|grant| !is_open || !grant.lives(now, LEAST_LIFE))
    }

    /// Tells the local breaker of a call that it let through, in this generation.
    pub(super) fn tell_own(
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
    pub(super) fn note(&mut self, end: End, latency: Duration) -> bool {
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
    pub(super) fn count(&mut self, home: &Home, calls: u64, now: Time) {
        if self.shared.is_fresh(self.watched_until(home), now) {
            self.by_memory += calls;
        } else {
            self.by_local += calls;
        }
    }

    /// Takes what the answer to an ask says of the circuit: for how long that may be believed it does not say.
    pub(super) fn is_answered(
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
    pub(super) fn own_evidence(&mut self, now: Time) -> Option<Arc<Evidence>> {
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
