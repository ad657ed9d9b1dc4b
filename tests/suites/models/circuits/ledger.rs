//! What the judge of a shared circuit knows: how the probes ended, and what was seen and told of it.

use super::rules::{Generation, Outcome, Settings, State};

type Told = (State, Generation);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ledger {
    /// The latest that anybody was told.
    pub told: Told,
    /// What there was to read after the last event.
    pub seen: Told,
    pub half_open_for: u16,
    /// Probes of the generation that is half-open, and how they ended.
    pub admitted: u8,
    pub successes: u8,
    pub failures: u8,
    given_back: u8,
    pub wrong: Option<&'static str>,
}

impl Ledger {
    pub fn new(now: Told) -> Self {
        Self {
            told: now,
            seen: now,
            half_open_for: 0,
            admitted: 0,
            successes: 0,
            failures: 0,
            given_back: 0,
            wrong: None,
        }
    }

    pub fn tick(&mut self) {
        self.half_open_for += u16::from(self.seen.0 == State::HalfOpen);
    }

    /// A probe has ended, or its time has.
    pub fn end(&mut self, generation: Generation, outcome: Outcome) {
        if self.seen != (State::HalfOpen, generation) {
            return;
        }
        match outcome {
            Outcome::Success => self.successes += 1,
            Outcome::Failure => self.failures += 1,
            Outcome::GivenBack => self.given_back += 1,
        }
    }

    pub fn tell(&mut self, now: Told) {
        if now.1 < self.told.1 {
            self.wrong = Some("a generation went back");
        } else if now.1 == self.told.1 && now.0 != self.told.0 {
            self.wrong = Some("a generation was told in two states");
        }
        self.told = now;
    }

    pub fn restart(&mut self, recovered: State, now: Told) {
        if self.told.0 != State::Closed && recovered == State::Closed {
            self.wrong = Some("a restart closed it");
        }
        self.begin(now);
    }

    /// Looks at it, and at why it changed if it did.
    pub fn see(&mut self, now: Told, settings: Settings) {
        if now == self.seen {
            return;
        }
        let Settings { enough, max_duration, probes, .. } = settings;
        let counted = self.successes + self.failures;
        let failing = self.failures * 2 >= counted;
        let too_early = counted < enough && self.half_open_for < max_duration;
        let all_given_back = self.given_back > probes;
        let wrong = match (self.seen.0, now.0) {
            (State::HalfOpen, State::Closed) if counted == 0 || failing => {
                "it closed, and no more succeeded than failed"
            }
            (State::HalfOpen, State::Open) if !failing => {
                "it opened, and more succeeded than failed"
            }
            (State::HalfOpen, _) if too_early && !all_given_back => {
                "it was judged before enough was counted"
            }
            (State::Open, State::Closed) => "it closed without a probe",
            _ => return self.begin(now),
        };
        self.wrong = Some(wrong);
        self.begin(now);
    }

    fn begin(&mut self, now: Told) {
        self.seen = now;
        (self.half_open_for, self.admitted) = (0, 0);
        (self.successes, self.failures, self.given_back) = (0, 0, 0);
    }
}
