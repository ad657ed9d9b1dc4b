//! What was told of a shared circuit, and what that makes of a call. Pure: time is an argument.
//!
//! The rules were proved by a model before they were written (`tests/suites/models/circuits/client.rs`).

use std::{sync::Arc, time::Duration};

use fusebox_core::Time;
use fusebox_proto::v1;

use crate::{Evidence, exchange};

/// All of a ramp, in basis points.
const WHOLE: u16 = 10_000;

/// What the server tells of a circuit at a time.
#[derive(Clone, Debug)]
pub(super) struct Told {
    pub(super) state: State,
    pub(super) generation: u64,
    /// Share of calls that a closed circuit lets through, in basis points, if that is not all.
    pub(super) ramp: Option<u16>,
    /// From when on an ask may get a probe, if it is not closed.
    pub(super) ask_at: Time,
    /// What an operator made of it, and until when that binds.
    pub(super) forced: Option<(Forced, Time)>,
    pub(super) evidence: Option<Arc<Evidence>>,
    /// It was so at this time, or later.
    pub(super) at: Time,
    /// Until when this may be believed by itself.
    pub(super) until: Time,
    /// The generation is that of all circuits which nothing is told of, and grows with theirs.
    pub(super) absent: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Closed,
    Open,
    HalfOpen,
}

impl State {
    pub(super) fn of(wire: v1::CircuitState) -> Option<Self> {
        match wire {
            v1::CircuitState::Closed => Some(Self::Closed),
            v1::CircuitState::Open => Some(Self::Open),
            v1::CircuitState::HalfOpen => Some(Self::HalfOpen),
            v1::CircuitState::Unspecified => None,
        }
    }
}

/// What an operator made of a circuit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Forced {
    Open,
    Disabled,
    MetricsOnly,
}

/// What is to become of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// The local breaker decides.
    Local,
    /// It does, and then the ramp: so many basis points of the calls go through.
    Ramp(u16),
    /// It goes through by force; whether it is told of.
    LetThrough { counted: bool },
    /// It is refused by force.
    RefusedByForce { until: Time },
    /// It is refused, as the circuit is open.
    RefusedByShared { until: Time },
    /// The server is to be asked for a probe, and nobody else decides while what was told may be believed.
    Ask,
}

impl Told {
    /// A circuit that nothing was told of but its generation: it is closed.
    pub(super) fn closed(generation: u64, at: Time) -> Self {
        Self {
            state: State::Closed,
            generation,
            ramp: None,
            ask_at: Time::ZERO,
            forced: None,
            evidence: None,
            at,
            until: Time::ZERO,
            absent: true,
        }
    }

    /// What a status says that was sent for at `at` or later, and arrives `now`; `None` of one that says nothing.
    ///
    /// Lifetimes count from when it was so, and a force is one; the wait for a probe counts from the arrival.
    pub(super) fn of(status: &v1::CircuitStatus, at: Time, now: Time) -> Option<Self> {
        let state = State::of(status.state())?;
        let force = match status.mode() {
            v1::CircuitMode::ForcedOpen => Some(Forced::Open),
            v1::CircuitMode::Disabled => Some(Forced::Disabled),
            v1::CircuitMode::MetricsOnly => Some(Forced::MetricsOnly),
            v1::CircuitMode::Normal | v1::CircuitMode::Unspecified => None,
        };
        let length = |wire| exchange::duration(wire).unwrap_or_default();
        let ramp = status.ramp_basis_points.and_then(|share| u16::try_from(share).ok());
        Some(Self {
            state,
            generation: status.generation,
            ramp: ramp.filter(|share| *share < WHOLE),
            ask_at: now.after(length(status.open_for)),
            forced: force
                .map(|force| (force, exchange::lasts_until(at, length(status.mode_expires_in)))),
            evidence: status.evidence.clone().map(|evidence| Arc::new(evidence.into())),
            at,
            until: exchange::lasts_until(at, length(status.valid_for)),
            absent: false,
        })
    }

    /// As a Watch tells it, which says until when it is believed, and which generation those have that are not told of.
    pub(super) fn watched(self, until: Time, generation: u64) -> Self {
        let absent = self.is_plain() && self.generation == generation;
        Self { until, absent, ..self }
    }

    /// Whether it is what every circuit is that nothing is told of.
    fn is_plain(&self) -> bool {
        self.state == State::Closed && self.forced.is_none() && self.ramp.is_none()
    }
}

/// What a client knows of a shared circuit.
#[derive(Debug, Default)]
pub(super) struct Shared {
    told: Option<Told>,
    /// What the ramp owes to the calls that come, in basis points of a call; `None` while it does not ramp up.
    owed: Option<u16>,
}

/// What news change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// Calls that were let through before are of another generation.
    pub(super) generation: bool,
    /// It was seen to close: the local breaker begins anew.
    pub(super) closed: bool,
    /// It was seen to open.
    pub(super) opened: bool,
}

impl Shared {
    pub(super) fn told(&self) -> Option<&Told> {
        self.told.as_ref()
    }

    /// The generation that calls are let through in; 0 is not known.
    pub(super) fn generation(&self) -> u64 {
        self.told.as_ref().map_or(0, |told| told.generation)
    }

    /// Takes what is told, unless something later is known.
    pub(super) fn is_told(&mut self, mut news: Told) -> Change {
        let Some(before) = &self.told else {
            let opened = news.state != State::Closed;
            self.take(news);
            return Change { generation: true, closed: false, opened };
        };
        // Generations only grow. Within one, what is told later comes later.
        if (news.generation, news.at) < (before.generation, before.at) {
            return Change::default();
        }
        let was_closed = before.state == State::Closed;
        let is_closed = news.state == State::Closed;
        let generation = news.generation != before.generation;
        if !generation {
            news.until = news.until.max(before.until);
            news.absent |= before.absent && news.is_plain();
        }
        self.take(news);
        Change { generation, closed: !was_closed && is_closed, opened: was_closed && !is_closed }
    }

    fn take(&mut self, news: Told) {
        // The first call of a ramp goes through.
        let before = self.owed;
        self.owed = news.ramp.map(|share| before.unwrap_or(WHOLE - share));
        self.told = Some(news);
    }

    /// All that nothing is told of are of a later generation. If this one is among them nothing happened to it, so
    /// calls that were let through before are of that one, too.
    pub(super) fn grows(&mut self, generation: u64, at: Time) {
        let told = self.told.as_mut().filter(|told| told.absent && told.generation <= generation);
        if let Some(told) = told {
            (told.generation, told.at) = (generation, told.at.max(at));
        }
    }

    /// Nothing that was told is believed any more, but what an operator forced.
    pub(super) fn is_stale(&mut self) {
        if let Some(told) = &mut self.told {
            told.until = Time::ZERO;
        }
    }

    /// Another server, another circuit: nothing is known.
    pub(super) fn forget(&mut self) -> Change {
        let knew = self.told.take();
        self.owed = None;
        Change { generation: knew.is_some(), ..Change::default() }
    }

    /// Whether what was told may be believed: by itself, or since all is told that changes until `watched`.
    pub(super) fn is_fresh(&self, watched: Time, now: Time) -> bool {
        self.told.as_ref().is_some_and(|told| now < told.until.max(watched))
    }

    /// What becomes of a call; all that is told of changes is believed until `watched`.
    pub(super) fn gate(&self, watched: Time, now: Time) -> Gate {
        let Some(told) = &self.told else { return Gate::Local };
        match told.forced {
            Some((Forced::Open, until)) if now < until => return Gate::RefusedByForce { until },
            Some((mode, until)) if now < until => {
                return Gate::LetThrough { counted: mode == Forced::MetricsOnly };
            }
            // The order is over; what comes after it was not told.
            Some(_) => return Gate::Local,
            None => {}
        }
        let believed = told.until.max(watched);
        match (told.state, told.ramp) {
            _ if believed <= now => Gate::Local,
            (State::Closed, None) => Gate::Local,
            (State::Closed, Some(share)) => Gate::Ramp(share),
            _ if now < told.ask_at => Gate::RefusedByShared { until: told.ask_at.min(believed) },
            _ => Gate::Ask,
        }
    }

    /// Whether the local breaker decides from now on, if nothing else is told.
    pub(super) fn leaves_all_to_local(&self) -> bool {
        // An order that is over is so for good.
        self.told.as_ref().is_none_or(|told| told.is_plain() || told.forced.is_some())
    }

    /// Counts a call in the ramp: each adds the share, and one that makes a whole goes through.
    pub(super) fn passes_ramp(&mut self, share: u16) -> bool {
        let owed = self.owed.get_or_insert(WHOLE.saturating_sub(share));
        *owed += share;
        let passes = *owed >= WHOLE;
        if passes {
            *owed -= WHOLE;
        }
        passes
    }

    /// The server is not asked again before then.
    pub(super) fn asks_at(&mut self, at: Time) {
        if let Some(told) = &mut self.told {
            told.ask_at = told.ask_at.max(at);
        }
    }
}

/// When something was so, at the earliest, that a Watch tells which was sent for then.
pub(super) fn told_at(sent: Time, elapsed: Option<prost_types::Duration>, now: Time) -> Time {
    let elapsed = exchange::duration(elapsed).unwrap_or(Duration::ZERO);
    // Not in the future, however fast the server's clock is.
    sent.after(elapsed).min(now)
}

#[cfg(test)]
mod tests;
