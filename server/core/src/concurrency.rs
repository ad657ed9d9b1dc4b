//! Permits: so many calls at once.
//!
//! A cell counts permits; which ones they are, and when each expires, is known by the grants. After a crash
//! nobody knows the grants: what was held then is held on without a name, until every one of them would have
//! expired.

use core::{num::NonZeroU64, time::Duration};

use thiserror::Error;

use crate::{
    Admission, Ask, Kind, Level, Mark, Moment, Plan, Purpose, Reason, Settled, Settlement, Time,
    kind::admit, time::saturating_nanos, token_bucket::MAX_TOKENS,
};

/// Longest life of a permit: a day. What a crash forgets is held for as long.
pub const MAX_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// `limit` permits at once, each for `ttl` if it is neither released nor renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Concurrency {
    limit: u64,
    ttl_nanos: NonZeroU64,
}

/// Settings that nothing can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum InvalidConcurrency {
    /// Too many permits.
    #[error("`limit` is {0}, above 10^12")]
    Limit(u64),
    /// Too short a life, or too long a one.
    #[error("`ttl` is {0:?}, outside 100ms to 24 hours")]
    Ttl(Duration),
}

impl Concurrency {
    /// `limit` permits, at most 10^12, each for `ttl` of 100 ms to 24 hours. `limit: 0` denies all.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn new(limit: u64, ttl: Duration) -> Result<Self, InvalidConcurrency> {
        if limit > MAX_TOKENS {
            return Err(InvalidConcurrency::Limit(limit));
        }
        match NonZeroU64::new(saturating_nanos(ttl)) {
            Some(ttl_nanos) if (Duration::from_millis(100)..=MAX_TTL).contains(&ttl) => {
                Ok(Self { limit, ttl_nanos })
            }
            _ => Err(InvalidConcurrency::Ttl(ttl)),
        }
    }

    /// Permits at once.
    #[must_use]
    pub const fn limit(&self) -> u64 {
        self.limit
    }

    /// Life of a permit.
    #[must_use]
    pub const fn ttl(&self) -> Duration {
        Duration::from_nanos(self.ttl_nanos.get())
    }
}

/// What one cell remembers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Permits of grants that are open.
    pub held: u64,
    /// Permits that somebody held when a crash forgot whose they are.
    pub anonymous: u64,
    /// Until when those are held.
    pub until: Time,
}

impl State {
    pub(crate) const fn kept(&self, mark: Mark) -> Self {
        Self { held: mark.spent, anonymous: 0, until: self.until }
    }

    pub(crate) const fn lowest_mark(&self, at: Time) -> Mark {
        Mark { spent: self.held + self.anonymous, at }
    }

    /// Permits that nobody else can have now.
    const fn taken(&self) -> u64 {
        self.held + self.anonymous
    }

    /// With `permits` of those that nobody has a name for held by a grant; `None` if there are not as many.
    pub(crate) fn attested(self, permits: u64, now: Time) -> Option<Self> {
        let state = self.at(now);
        let anonymous = state.anonymous.checked_sub(permits)?;
        Some(Self { held: state.held + permits, anonymous, ..state })
    }

    pub(crate) const fn reset(self) -> Self {
        Self { held: self.held, anonymous: 0, until: Time::ZERO }
    }

    /// As time alone has made it by `now`.
    fn at(self, now: Time) -> Self {
        if now < self.until { self } else { Self { held: self.held, ..Self::default() } }
    }
}

impl Kind for Concurrency {
    type State = State;

    fn capacity(&self) -> u64 {
        self.limit
    }

    fn plan(&self, state: Option<State>, ask: Ask, now: Moment) -> Plan<State> {
        let reserved = ask.reserved;
        let before = state.unwrap_or_default().at(now.time);
        let left = self.limit.saturating_sub(before.taken());
        let tokens = ask.granted_of(left);
        let admission = if self.limit == 0 && ask.purpose != Purpose::Credit {
            Admission::Deny { reason: Reason::Blocked, retry_after: None }
        } else if ask.finds_nothing(left) {
            Admission::Deny { reason: Reason::ConcurrencyLimited, retry_after: None }
        } else {
            admit(tokens, left, reserved, Reason::ConcurrencyLimited, || {
                // Nobody knows when a call will end; of what a crash forgot it is known.
                let without = left + before.anonymous;
                let enough = tokens.saturating_add(reserved) <= without;
                let wait = before.until.nanos_since(now.time);
                (enough && before.anonymous > 0).then_some(Duration::from_nanos(wait))
            })
        };
        let allowed = admission == Admission::Allow;
        let after = State { held: before.held + if allowed { tokens } else { 0 }, ..before };
        let level = |state: State| Level {
            remaining: self.limit.saturating_sub(state.taken()).saturating_sub(reserved),
            // By then every permit of today has expired, unless it is renewed.
            reset_after: if state.taken() == 0 { Duration::ZERO } else { self.ttl() },
        };
        Plan {
            admission,
            spent: before.taken(),
            limit: self.limit.saturating_sub(reserved),
            before: level(before),
            after: level(after),
            charged: if after.held == before.held { state } else { Some(after) },
            granted: tokens,
            slice: 0,
        }
    }

    fn settle(&self, state: Option<State>, settlement: Settlement, now: Moment) -> Settled<State> {
        let released = if settlement.partial { 0 } else { settlement.charged };
        let after = state.map(|state| {
            let state = state.at(now.time);
            State { held: state.held.saturating_sub(released), ..state }
        });
        Settled { state: after, refunded: released, owed: 0, dropped: 0 }
    }

    fn mark(&self, state: State, _: u64, now: Moment) -> Mark {
        // Always in whole steps: permits come and go, and most of it must not reach the disk.
        let step = self.max_step();
        let ahead = state.taken().div_ceil(step).saturating_mul(step);
        Mark { spent: ahead.min(self.limit).max(state.taken()), at: now.time }
    }

    fn max_step(&self) -> u64 {
        (self.limit / 8).max(1)
    }

    fn covers(&self, mark: Mark, _: State, after: State) -> bool {
        mark.spent >= after.taken()
    }

    fn revive(&self, state: State, held: u64, now: Moment) -> State {
        let held = held.min(state.held);
        let anonymous = state.held - held + state.at(now.time).anonymous;
        let until = if anonymous == 0 { Time::ZERO } else { now.time.after(self.ttl()) };
        State { held, anonymous, until }
    }

    fn spent(&self, state: State, now: Moment) -> u64 {
        state.at(now.time).taken()
    }

    fn having_spent(&self, tokens: u64, at: Moment) -> State {
        State { held: 0, anonymous: tokens, until: at.time.after(self.ttl()) }
    }

    fn fills_in(&self) -> Option<Duration> {
        None
    }

    fn full_at(&self, state: State, _: Moment) -> Option<Time> {
        (state.held == 0).then_some(if state.anonymous == 0 { Time::ZERO } else { state.until })
    }

    fn rebase(&self, state: State, _: Option<&Self>, _: Moment) -> State {
        state
    }
}
