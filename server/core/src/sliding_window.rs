//! The sliding window: never more than `limit` in any stretch of `per`, wherever it begins.
//!
//! Time is cut into slices of a [`SLICES`]th of `per`, and charges are counted by slice. Any stretch of `per`
//! lies in `SLICES + 1` slices, so what these hold together never exceeds the limit. The price: under steady
//! demand it grants `SLICES / (SLICES + 1)` of the limit, six sevenths.

use core::{num::NonZeroU64, time::Duration};

use thiserror::Error;

use crate::{
    Admission, Ask, Kind, Level, Mark, Moment, Plan, Purpose, Reason, Settled, Settlement, Time,
    kind::admit,
    slices::{Cut, Slices},
    time::saturating_nanos,
    token_bucket::MAX_PER,
};

pub use crate::slices::SLICES;

/// Most tokens of a window: what the count of a slice holds.
pub const MAX_LIMIT: u64 = u32::MAX as u64;

/// `limit` tokens in any stretch of `per`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlidingWindow {
    limit: u32,
    per_nanos: NonZeroU64,
}

/// Settings that no sliding window can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum InvalidSlidingWindow {
    /// Too many tokens.
    #[error("`limit` is {0}, above 4294967295 (2^32 - 1)")]
    Limit(u64),
    /// No window, or too long a one.
    #[error("`per` is {0:?}, outside 1ns to 366 days")]
    Per(Duration),
}

impl SlidingWindow {
    /// `limit` tokens, at most 2^32 - 1, in any `per` of 1 ns to 366 days. `limit: 0` denies all.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn new(limit: u64, per: Duration) -> Result<Self, InvalidSlidingWindow> {
        let limit = u32::try_from(limit).map_err(|_| InvalidSlidingWindow::Limit(limit))?;
        match NonZeroU64::new(saturating_nanos(per)) {
            Some(per_nanos) if per <= MAX_PER => Ok(Self { limit, per_nanos }),
            _ => Err(InvalidSlidingWindow::Per(per)),
        }
    }

    /// Tokens of any stretch of [`per`](Self::per).
    #[must_use]
    pub const fn limit(&self) -> u64 {
        self.limit as u64
    }

    /// The length of a stretch.
    #[must_use]
    pub const fn per(&self) -> Duration {
        Duration::from_nanos(self.per_nanos.get())
    }
}

/// What one cell remembers: tokens by slice; more than the limit in all is debt.
pub type State = Slices<u32>;

impl State {
    pub(crate) fn kept(&self, mark: Mark) -> Self {
        let mut kept = *self;
        kept.counts[0] = saturated(mark.spent);
        kept
    }

    pub(crate) const fn lowest_mark(&self, at: Time) -> Mark {
        Mark { spent: self.counts[0] as u64, at }
    }

    pub(crate) fn reset(mut self, held: impl Fn(u64) -> u64) -> Self {
        let newest = self.newest();
        for (age, count) in self.counts.iter_mut().enumerate() {
            let slice = newest.checked_sub(age as u64);
            *count = saturated(slice.map_or(0, &held)).min(*count);
        }
        self
    }

    fn sum(&self) -> u64 {
        self.counts.iter().map(|count| u64::from(*count)).sum()
    }

    /// The same with so many tokens less, of the newest slices first: those are limited the longest.
    fn with_less(mut self, tokens: u64) -> Self {
        let mut left = saturated(tokens);
        for count in &mut self.counts {
            let less = left.min(*count);
            (*count, left) = (*count - less, left - less);
        }
        self
    }

    /// The same with so many tokens more in the newest slice.
    fn with_more(mut self, tokens: u64) -> Self {
        self.counts[0] = saturated(u64::from(self.counts[0]).saturating_add(tokens));
        self
    }
}

fn saturated(tokens: u64) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

impl Kind for SlidingWindow {
    type State = State;

    fn capacity(&self) -> u64 {
        self.limit()
    }

    fn plan(&self, state: Option<State>, ask: Ask, now: Moment) -> Plan<State> {
        let reserved = ask.reserved;
        let before = self.cut().current(state, now.time);
        let left = self.limit().saturating_sub(before.sum());
        let tokens = ask.granted_of(left);
        let admission = if self.limit == 0 && ask.purpose != Purpose::Credit {
            Admission::Deny { reason: Reason::Blocked, retry_after: None }
        } else if ask.finds_nothing(left) {
            let retry_after = Some(self.wait_until(&before, self.limit() - 1, now.time));
            Admission::Deny { reason: Reason::RateLimited, retry_after }
        } else {
            admit(tokens, left, reserved, Reason::RateLimited, || {
                let most = self.limit().checked_sub(tokens.saturating_add(reserved))?;
                Some(self.wait_until(&before, most, now.time))
            })
        };
        let after = before.with_more(tokens.min(left)).with_less(ask.credited());
        let level = |state: State| Level {
            remaining: self.limit().saturating_sub(state.sum()).saturating_sub(reserved),
            reset_after: self.wait_until(&state, 0, now.time),
        };
        Plan {
            admission,
            spent: before.sum(),
            limit: self.limit().saturating_sub(reserved),
            before: level(before),
            after: level(after),
            charged: if after.counts == before.counts { state } else { Some(after) },
            granted: tokens,
            slice: before.newest(),
        }
    }

    fn settle(&self, state: Option<State>, settlement: Settlement, now: Moment) -> Settled<State> {
        let before = self.cut().current(state, now.time);
        let mut after = before;
        let age = settlement.slice.and_then(|slice| before.newest().checked_sub(slice));
        let charged = age.and_then(|age| after.counts.get_mut(usize::try_from(age).ok()?));
        let refunded = charged.map_or(0, |count| {
            let refunded = saturated(settlement.refund()).min(*count);
            *count -= refunded;
            u64::from(refunded)
        });
        let most = self.limit().saturating_add(settlement.max_debt);
        let room = most.saturating_sub(before.sum());
        let room = room.min(u64::from(u32::MAX - after.counts[0]));
        let owed = settlement.excess().min(room);
        after = after.with_more(owed);
        Settled {
            state: if after.counts == before.counts { state } else { Some(after) },
            refunded,
            owed,
            dropped: settlement.excess() - owed,
        }
    }

    fn mark(&self, state: State, step: u64, now: Moment) -> Mark {
        let newest = u64::from(state.counts[0]);
        let left = self.limit().saturating_sub(state.sum());
        Mark { spent: newest + step.min(left), at: now.time }
    }

    fn max_step(&self) -> u64 {
        (self.limit() / 100).max(1)
    }

    fn covers(&self, mark: Mark, before: State, after: State) -> bool {
        // The older slices are as they were when the mark was written, or less.
        before.newest() == after.newest() && mark.spent >= u64::from(after.counts[0])
    }

    fn revive(&self, state: State, _: u64, now: Moment) -> State {
        self.cut().revived(state, now.time)
    }

    fn spent(&self, state: State, now: Moment) -> u64 {
        self.cut().current(Some(state), now.time).sum()
    }

    fn having_spent(&self, tokens: u64, at: Moment) -> State {
        self.cut().current(None, at.time).with_more(tokens)
    }

    fn fills_in(&self) -> Option<Duration> {
        (self.limit > 0).then(|| self.cut().all())
    }

    fn full_at(&self, state: State, now: Moment) -> Option<Time> {
        let wait = self.wait_until(&state, 0, Time::ZERO);
        Some(if wait.is_zero() {
            now.time.min(self.cut().begin(state.newest()))
        } else {
            Time::ZERO.after(wait)
        })
    }

    fn rebase(&self, state: State, older: Option<&Self>, at: Moment) -> State {
        if older.is_some_and(|older| older.per_nanos == self.per_nanos) {
            return state;
        }
        let state = older.map_or(state, |older| older.cut().current(Some(state), at.time));
        // Where in its slices it was spent cannot be said in others: as late as can be.
        self.having_spent(state.sum(), at)
    }
}

impl SlidingWindow {
    /// A stretch is cut into slices.
    fn cut(&self) -> Cut {
        Cut::of(self.per_nanos)
    }

    /// Time until no more than `most` tokens are left in the slices.
    fn wait_until(&self, state: &State, most: u64, now: Time) -> Duration {
        let mut sum = state.sum();
        let mut age = SLICES + 1;
        while sum > most && age > 0 {
            age -= 1;
            sum -= u64::from(state.counts[age]);
        }
        if age > SLICES {
            return Duration::ZERO;
        }
        // The slice of that age was the last one to go.
        self.cut().until_gone(state, age, now)
    }
}
