//! The token bucket, exact for every rate.
//!
//! A cell counts what was *spent*, in tokens and a remainder of `1 / per` nanosecond parts of one token.
//! In these parts a nanosecond refills exactly `limit`, so no rate rounds and nothing drifts, also 3 a
//! second or 1,000,003 a day. (The bucket as a meter: Turner, "New directions in communications", IEEE
//! Communications 24(10), 1986; here it is exact because it is kept in integers.)

use core::{num::NonZeroU64, time::Duration};

use thiserror::Error;

use crate::{
    Admission, Ask, Kind, Level, Mark, Moment, Plan, Purpose, Reason, Settled, Settlement, Time,
    kind::admit, time::saturating_nanos,
};

/// Most tokens of a limit or burst: 10^12. With [`MAX_PER`] every product stays far inside 128 bits.
pub const MAX_TOKENS: u64 = 1_000_000_000_000;

/// Longest period: 366 days, a leap year.
pub const MAX_PER: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// `limit` tokens flow in each `per`; at most `burst` gather.
///
/// Waits are told up to 584 years, the end of server time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenBucket {
    limit: u64,
    per_nanos: NonZeroU64,
    burst: u64,
}

/// Settings that no bucket can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum InvalidTokenBucket {
    /// Too many tokens a period.
    #[error("`limit` is {0}, above 10^12")]
    Limit(u64),
    /// No period, or too long a one.
    #[error("`per` is {0:?}, outside 1ns to 366 days")]
    Per(Duration),
    /// No room for one token, or for too many.
    #[error("`burst` is {0}, outside 1 to 10^12")]
    Burst(u64),
    /// A bucket that starts full and never fills again.
    #[error("`burst` is {0}, but `limit: 0` denies all: leave `burst` out")]
    BurstOfNothing(u64),
}

impl TokenBucket {
    /// A bucket of `burst` tokens, refilled by `limit` tokens in each `per`.
    ///
    /// `limit: 0` (with `burst: 0`) denies all.
    ///
    /// # Errors
    /// If a setting is out of range: `limit` at most 10^12, `per` 1 ns to 366 days, `burst` 1 to 10^12.
    pub fn new(limit: u64, per: Duration, burst: u64) -> Result<Self, InvalidTokenBucket> {
        if limit > MAX_TOKENS {
            return Err(InvalidTokenBucket::Limit(limit));
        }
        if limit == 0 && burst > 0 {
            return Err(InvalidTokenBucket::BurstOfNothing(burst));
        }
        if limit > 0 && !(1..=MAX_TOKENS).contains(&burst) {
            return Err(InvalidTokenBucket::Burst(burst));
        }
        match NonZeroU64::new(saturating_nanos(per)) {
            Some(per_nanos) if per <= MAX_PER => Ok(Self { limit, per_nanos, burst }),
            _ => Err(InvalidTokenBucket::Per(per)),
        }
    }

    /// Tokens that flow in each [`per`](Self::per).
    #[must_use]
    pub const fn limit(&self) -> u64 {
        self.limit
    }

    /// The period.
    #[must_use]
    pub const fn per(&self) -> Duration {
        Duration::from_nanos(self.per_nanos())
    }

    /// The period in nanoseconds.
    #[must_use]
    pub const fn per_nanos(&self) -> u64 {
        self.per_nanos.get()
    }

    /// Most tokens that gather.
    #[must_use]
    pub const fn burst(&self) -> u64 {
        self.burst
    }
}

/// What one bucket remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Whole tokens spent and not yet refilled; more than the burst is debt.
    pub spent: u64,
    /// Parts of one more token spent: nanoseconds of `per`, so always less than it.
    pub remainder: u64,
    /// Of the spent tokens, those that may still come back: of open estimates and leases. Refill stops at
    /// them, so that what comes back never piles up beyond one burst.
    pub out: u64,
    /// When this was true.
    pub at: Time,
}

impl State {
    const fn full(at: Time) -> Self {
        Self { spent: 0, remainder: 0, out: 0, at }
    }

    /// Spent tokens, with a begun one as a whole: what is left is counted in whole tokens.
    const fn spent_rounded_up(&self) -> u64 {
        self.spent + (self.remainder > 0) as u64
    }

    /// What is on disk of the bucket while it lives: its mark, and no part of a token, so that it stays
    /// small.
    pub(crate) const fn kept(&self, mark: Mark) -> Self {
        Self { spent: mark.spent, ..Self::full(mark.at) }
    }

    pub(crate) const fn reset(self) -> Self {
        Self { spent: self.out, remainder: 0, ..self }
    }

    /// The mark that covers this and nothing more.
    pub(crate) const fn lowest_mark(&self) -> Mark {
        Mark { spent: self.spent_rounded_up(), at: self.at }
    }
}

impl Kind for TokenBucket {
    type State = State;

    fn capacity(&self) -> u64 {
        self.burst
    }

    #[inline]
    fn plan(
        &self,
        state: Option<State>,
        ask: Ask,
        Moment { time: now, .. }: Moment,
    ) -> Plan<State> {
        let before = state.map_or(State::full(now), |state| self.refilled(state, now));
        let Ask { purpose, reserved, .. } = ask;
        let left = self.burst.saturating_sub(before.spent_rounded_up());
        let tokens = ask.granted_of(left);
        let admission = if self.limit == 0 && purpose != Purpose::Credit {
            Admission::Deny { reason: Reason::Blocked, retry_after: None }
        } else if ask.finds_nothing(left) {
            let retry_after = self.retry_after(&before, 1, now);
            Admission::Deny { reason: Reason::RateLimited, retry_after }
        } else {
            let wanted = tokens.saturating_add(reserved);
            admit(tokens, left, reserved, Reason::RateLimited, || {
                self.retry_after(&before, wanted, now)
            })
        };
        let credited = ask.credited().min(before.spent.saturating_sub(before.out));
        let owed = matches!(purpose, Purpose::Estimate | Purpose::Lease { .. });
        let after = match admission {
            Admission::Allow => State {
                spent: before.spent + tokens - credited,
                out: before.out + if owed { tokens } else { 0 },
                ..before
            },
            Admission::Deny { .. } => State { spent: before.spent + tokens.min(left), ..before },
        };
        Plan {
            admission,
            spent: before.spent_rounded_up(),
            limit: self.burst.saturating_sub(reserved),
            before: self.level(&before, reserved, now),
            after: self.level(&after, reserved, now),
            charged: if after == before { state } else { Some(after) },
            granted: tokens,
            slice: 0,
        }
    }

    fn settle(
        &self,
        state: Option<State>,
        settlement: Settlement,
        Moment { time: now, .. }: Moment,
    ) -> Settled<State> {
        let before = state.map_or(State::full(now), |state| self.refilled(state, now));
        let out = before.out.saturating_sub(settlement.out_before() - settlement.out_after());
        let refunded = settlement.refund().min(before.spent.saturating_sub(out));
        let most = self.burst.saturating_add(settlement.max_debt);
        let owed = settlement.excess().min(most.saturating_sub(before.spent_rounded_up()));
        let after = State { spent: before.spent - refunded + owed, out, ..before };
        Settled {
            state: if state.is_none() && owed == 0 { None } else { Some(after) },
            refunded,
            owed,
            dropped: settlement.excess() - owed,
        }
    }

    fn mark(&self, state: State, step: u64, _: Moment) -> Mark {
        // A mark alone never puts a bucket into debt: beyond the burst there is nothing to admit.
        let spent = state.spent_rounded_up();
        let ahead = spent.saturating_add(step).min(self.burst);
        Mark { spent: ahead.max(spent), at: state.at }
    }

    fn max_step(&self) -> u64 {
        // Of the smaller one: a crash must take neither a large part of the bucket nor a day's refill.
        (self.limit.min(self.burst) / 100).max(1)
    }

    fn covers(&self, mark: Mark, _: State, after: State) -> bool {
        // What is out is left aside: after a restart nothing comes back, so only debits count.
        let later = mark.at.max(after.at);
        let parts_at_later = |state: State| {
            let state = self.refilled(State { out: 0, ..state }, later);
            (state.spent, state.remainder)
        };
        parts_at_later(after.kept(mark)) >= parts_at_later(after)
    }

    fn revive(&self, state: State, held: u64, Moment { time: now, .. }: Moment) -> State {
        // A state from the future would refill only once its time comes; a key must not wait for that.
        let out = held.min(state.spent);
        self.refilled(State { out, at: state.at.min(now), ..state }, now)
    }

    fn spent(&self, state: State, now: Moment) -> u64 {
        self.refilled(state, now.time).spent_rounded_up()
    }

    fn having_spent(&self, tokens: u64, at: Moment) -> State {
        State { spent: tokens, ..State::full(at.time) }
    }

    fn fills_in(&self) -> Option<Duration> {
        if self.limit == 0 {
            return None;
        }
        let parts = u128::from(self.burst) * u128::from(self.per_nanos());
        self.nanos_to_refill(parts).map(Duration::from_nanos)
    }

    fn full_at(&self, state: State, _: Moment) -> Option<Time> {
        if state.out > 0 {
            return None;
        }
        let nanos = self.nanos_to_refill(self.parts(&state))?;
        Some(state.at.after(Duration::from_nanos(nanos)))
    }

    fn rebase(&self, state: State, older: Option<&Self>, Moment { time: at, .. }: Moment) -> State {
        let Some(older) = older else {
            let spent = state.spent_rounded_up();
            return State { spent, remainder: 0, at: state.at.max(at), ..state };
        };
        let state = older.refilled(state, at);
        // Rounded up: at most one part, a nanosecond's refill of one token, is spent that was not.
        let (old_per, per) = (older.per_nanos(), self.per_nanos());
        let parts = (u128::from(state.remainder) * u128::from(per)).div_ceil(u128::from(old_per));
        self.with_parts(state, u128::from(state.spent) * u128::from(per) + parts)
    }
}

/// All that is spent is computed in parts of a token; in 128 bits none of it overflows: spent tokens stay
/// below 2^43 (burst and debt), `per` below 2^55, `limit` below 2^40 and time below 2^64.
impl TokenBucket {
    fn parts(&self, state: &State) -> u128 {
        u128::from(state.spent) * u128::from(self.per_nanos()) + u128::from(state.remainder)
    }

    fn with_parts(&self, state: State, parts: u128) -> State {
        let (spent, remainder) = self.whole(parts);
        State { spent, remainder, ..state }
    }

    /// So many parts in whole tokens, and the parts that are left.
    fn whole(&self, parts: u128) -> (u64, u64) {
        let per = self.per_nanos;
        match u64::try_from(parts) {
            // Nearly always: a division of 64 bits is one instruction.
            Ok(parts) => (parts / per, parts % per),
            Err(_) => {
                let per = u128::from(per.get());
                (saturate(parts / per), saturate(parts % per))
            }
        }
    }

    /// `state` as time alone has made it by `now`; unchanged if it is already later.
    fn refilled(&self, state: State, now: Time) -> State {
        let elapsed = now.nanos_since(state.at);
        if elapsed == 0 {
            return state;
        }
        let state = State { at: now, ..state };
        if state.spent == 0 && state.remainder == 0 {
            return state;
        }
        // In tokens and parts of one, which compare as the parts alone would: what is spent needs no division.
        let spent = (state.spent, state.remainder);
        let refill = self.whole(u128::from(elapsed) * u128::from(self.limit));
        let floor = spent.min((state.out, 0));
        let (spent, remainder) = self.less(spent, refill).max(floor);
        State { spent, remainder, ..state }
    }

    /// `spent` less `refill`, both in whole tokens and parts of one; nothing if that is less than nothing.
    fn less(&self, spent: (u64, u64), refill: (u64, u64)) -> (u64, u64) {
        if spent <= refill {
            (0, 0)
        } else if spent.1 >= refill.1 {
            (spent.0 - refill.0, spent.1 - refill.1)
        } else {
            (spent.0 - refill.0 - 1, self.per_nanos() - (refill.1 - spent.1))
        }
    }

    fn level(&self, state: &State, reserved: u64, now: Time) -> Level {
        let nanos = self.nanos_to_refill(self.parts(state)).unwrap_or(0);
        let left = self.burst.saturating_sub(state.spent_rounded_up());
        Level {
            remaining: left.saturating_sub(reserved),
            reset_after: Duration::from_nanos(nanos.saturating_add(state.at.nanos_since(now))),
        }
    }

    /// Time until `cost` could be charged, to the nanosecond; `None` if it never could.
    fn retry_after(&self, state: &State, cost: u64, now: Time) -> Option<Duration> {
        let per = u128::from(self.per_nanos());
        let most_spent = u128::from(self.burst.checked_sub(cost)?) * per;
        let nanos = self.nanos_to_refill(self.parts(state).saturating_sub(most_spent))?;
        Some(Duration::from_nanos(nanos.saturating_add(state.at.nanos_since(now))))
    }

    /// Nanoseconds to refill so many parts; `None` if that never happens.
    fn nanos_to_refill(&self, parts: u128) -> Option<u64> {
        match (u64::try_from(parts), self.limit) {
            (Ok(0), _) => Some(0),
            (_, 0) => None,
            (Ok(parts), limit) => Some(parts.div_ceil(limit)),
            (Err(_), limit) => Some(saturate(parts.div_ceil(u128::from(limit)))),
        }
    }
}

fn saturate(wide: u128) -> u64 {
    u64::try_from(wide).unwrap_or(u64::MAX)
}
