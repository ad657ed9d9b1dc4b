//! The retry budget: retries for at most a share of the requests, and a few besides.
//!
//! A request deposits `ratio` of a retry, a retry withdraws one; both are forgotten after `ttl`, slice by
//! slice, so that a budget is earned by the traffic of now. (As in Finagle's `RetryBudget`, whose slices also
//! hold deposits less withdrawals.)

use core::{num::NonZeroU64, time::Duration};

use thiserror::Error;

use crate::{
    Admission, Ask, Kind, Level, Mark, Moment, Plan, Reason, Settled, Settlement, Time,
    slices::{Cut, Slices},
    time::saturating_nanos,
};

pub use crate::slices::SLICES;

/// A retry, in the units of a slice: deposits are counted in thousandths.
const RETRY: i64 = 1_000;

/// Longest `ttl`: a minute; a budget says what the target bears now.
pub const MAX_TTL: Duration = Duration::from_secs(60);

/// Most retries a second that need no requests.
pub const MAX_FLOOR: u32 = 10_000;

/// Most tokens of one ask: what the count of a slice surely holds.
const MOST_AT_ONCE: u64 = 1_000_000;

/// Retries for a share of the requests, and `min_per_second` besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryBudget {
    ratio_per_mille: u16,
    min_per_second: u32,
    ttl_nanos: NonZeroU64,
}

/// Settings that no budget can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum InvalidRetryBudget {
    /// More than one retry for each request.
    #[error("`ratio` is {}.{}%, above 100%", .0 / 10, .0 % 10)]
    Ratio(u16),
    /// Too many retries that need no requests.
    #[error("`min_per_second` is {0}, above 10000")]
    MinPerSecond(u32),
    /// Too short a memory, or too long a one.
    #[error("`ttl` is {0:?}, outside 1s to 60s")]
    Ttl(Duration),
}

impl RetryBudget {
    /// Retries for at most so many thousandths of the requests of the last `ttl` (1 to 60 s), and for
    /// `min_per_second`, at most 10,000, besides.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn new(
        ratio_per_mille: u16,
        min_per_second: u32,
        ttl: Duration,
    ) -> Result<Self, InvalidRetryBudget> {
        if ratio_per_mille > 1_000 {
            return Err(InvalidRetryBudget::Ratio(ratio_per_mille));
        }
        if min_per_second > MAX_FLOOR {
            return Err(InvalidRetryBudget::MinPerSecond(min_per_second));
        }
        match NonZeroU64::new(saturating_nanos(ttl)) {
            Some(ttl_nanos) if (Duration::from_secs(1)..=MAX_TTL).contains(&ttl) => {
                Ok(Self { ratio_per_mille, min_per_second, ttl_nanos })
            }
            _ => Err(InvalidRetryBudget::Ttl(ttl)),
        }
    }

    /// Retries for each thousand requests.
    #[must_use]
    pub const fn ratio_per_mille(&self) -> u16 {
        self.ratio_per_mille
    }

    /// Retries a second that need no requests.
    #[must_use]
    pub const fn min_per_second(&self) -> u32 {
        self.min_per_second
    }

    /// How long requests and retries are remembered.
    #[must_use]
    pub const fn ttl(&self) -> Duration {
        Duration::from_nanos(self.ttl_nanos.get())
    }
}

/// What one cell remembers: deposits less withdrawals by slice, in thousandths of a retry.
pub type State = Slices<i32>;

impl State {
    fn sum(&self) -> i64 {
        self.counts.iter().map(|balance| i64::from(*balance)).sum()
    }

    /// The same with so much more, or less, in the newest slice.
    fn with_more(mut self, balance: i64) -> Self {
        let sum = i64::from(self.counts[0]).saturating_add(balance);
        let bounded = sum.clamp(i64::from(i32::MIN), i64::from(i32::MAX));
        #[allow(clippy::cast_possible_truncation)] // clamped
        let bounded = bounded as i32;
        self.counts[0] = bounded;
        self
    }
}

impl Kind for RetryBudget {
    type State = State;

    fn capacity(&self) -> u64 {
        MOST_AT_ONCE
    }

    fn plan(&self, state: Option<State>, ask: Ask, now: Moment) -> Plan<State> {
        let before = self.cut().current(state, now.time);
        let wanted = ask.granted_of(u64::MAX);
        let tokens = i64::try_from(wanted).unwrap_or(i64::MAX);
        let price = tokens.saturating_mul(RETRY);
        // Who asks for none is told how many there are, also where that is a debt.
        let admission = if !ask.retry || price == 0 || price <= self.balance(&before) {
            Admission::Allow
        } else {
            let retry_after = self.wait_until(&before, price, now.time);
            Admission::Deny { reason: Reason::RetryBudgetExhausted, retry_after }
        };
        // Also of retries that are refused: who charges them all the same has made them.
        let more = match ask.retry {
            false => tokens.saturating_mul(i64::from(self.ratio_per_mille)),
            true => -price,
        };
        let after = before.with_more(more);
        let level = |state: &State| Level {
            remaining: u64::try_from(self.balance(state) / RETRY).unwrap_or(0),
            reset_after: self.until_forgotten(state, now.time),
        };
        Plan {
            admission,
            spent: spent(&before),
            limit: MOST_AT_ONCE,
            before: level(&before),
            after: level(&after),
            charged: if after.counts == before.counts { state } else { Some(after) },
            granted: wanted,
            slice: 0,
        }
    }

    fn settle(&self, state: Option<State>, _: Settlement, _: Moment) -> Settled<State> {
        // Neither requests nor retries are estimated.
        Settled { state, refunded: 0, owed: 0, dropped: 0 }
    }

    fn mark(&self, _: State, _: u64, now: Moment) -> Mark {
        // Never written while it lives.
        Mark { spent: 0, at: now.time }
    }

    fn max_step(&self) -> u64 {
        1
    }

    fn covers(&self, _: Mark, _: State, _: State) -> bool {
        true
    }

    fn revive(&self, state: State, _: u64, now: Moment) -> State {
        self.cut().revived(state, now.time)
    }

    fn spent(&self, state: State, now: Moment) -> u64 {
        spent(&self.cut().current(Some(state), now.time))
    }

    fn having_spent(&self, tokens: u64, at: Moment) -> State {
        let tokens = i64::try_from(tokens).unwrap_or(i64::MAX).saturating_mul(RETRY);
        self.cut().current(None, at.time).with_more(-tokens.min(self.floor()))
    }

    fn fills_in(&self) -> Option<Duration> {
        Some(self.cut().all())
    }

    fn full_at(&self, state: State, _: Moment) -> Option<Time> {
        Some(Time::ZERO.after(self.until_forgotten(&state, Time::ZERO)))
    }

    fn rebase(&self, state: State, older: Option<&Self>, at: Moment) -> State {
        if older.is_some_and(|older| older.ttl_nanos == self.ttl_nanos) {
            return state;
        }
        let state = older.map_or(state, |older| older.cut().current(Some(state), at.time));
        // What was earned in slices of another length is not earned in these; what was spent is.
        self.cut().current(None, at.time).with_more(state.sum().min(0))
    }
}

/// Retries that were withdrawn, and nothing deposited was for.
fn spent(state: &State) -> u64 {
    u64::try_from((-state.sum()).max(0) / RETRY).unwrap_or(0)
}

impl RetryBudget {
    /// What may be withdrawn without a deposit in one `ttl`, in thousandths of a retry.
    fn floor(&self) -> i64 {
        let nanos = u128::from(self.min_per_second) * self.ttl().as_nanos() * 1_000;
        i64::try_from(nanos / 1_000_000_000).unwrap_or(i64::MAX)
    }

    /// What may be withdrawn now; never more than the newest slice can count.
    fn balance(&self, state: &State) -> i64 {
        let countable = i64::from(state.counts[0]) - i64::from(i32::MIN);
        (state.sum() + self.floor()).min(countable)
    }

    /// A `ttl` is cut into slices.
    fn cut(&self) -> Cut {
        Cut::of(self.ttl_nanos)
    }

    /// Time until a retry of that price would be allowed, if nobody asks meanwhile: what is forgotten first
    /// may have been deposits.
    fn wait_until(&self, state: &State, price: i64, now: Time) -> Option<Duration> {
        let mut balance = state.sum() + self.floor();
        for age in (0..=SLICES).rev() {
            balance -= i64::from(state.counts[age]);
            if price <= balance {
                return Some(self.cut().until_gone(state, age, now));
            }
        }
        None
    }

    /// Time until nothing is remembered.
    fn until_forgotten(&self, state: &State, now: Time) -> Duration {
        let youngest = state.counts.iter().position(|balance| *balance != 0);
        youngest.map_or(Duration::ZERO, |age| self.cut().until_gone(state, age, now))
    }
}
