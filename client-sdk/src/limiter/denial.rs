//! A denial that is remembered: for its cost and above, for a while.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use fusebox_core::Time;

use super::word::ticks;
use crate::Reason;

/// Bits of the reason; see [`REASONS`].
const REASON_BITS: u32 = 4;

/// Bits of the cost: denials of more than 8 million tokens are not remembered, but asked for again.
const COST_BITS: u32 = 23;

const COST_MOST: u64 = (1 << COST_BITS) - 1;

/// Last tick that fits: some four years after the client's start.
const TICKS_MOST: u64 = u64::MAX >> (REASON_BITS + COST_BITS);

/// Nanoseconds of a tick.
const TICK: u64 = 1 << 20;

/// The reasons of rates and windows, by the number that stands for each.
const REASONS: [Reason; 6] = [
    Reason::RateLimited,
    Reason::ReservedForPriority,
    Reason::LineFull,
    Reason::OverflowBucket,
    Reason::Blocked,
    Reason::Refused,
];

/// The last denial of one key and priority, in one word, so that looking is one load.
#[derive(Debug, Default)]
pub(super) struct Denial(AtomicU64);

impl Denial {
    /// Why `cost` tokens are denied now, and for how long, if that is remembered.
    #[inline]
    pub(super) fn of(&self, cost: u64, now: Time) -> Option<(Reason, Duration)> {
        let word = self.0.load(Ordering::Relaxed);
        let until = word >> (REASON_BITS + COST_BITS);
        if until <= ticks(now) || cost < (word >> REASON_BITS) & COST_MOST {
            return None;
        }
        let reason = usize::try_from(word & ((1 << REASON_BITS) - 1)).unwrap_or_default();
        let nanos = (until * TICK).saturating_sub(now.as_nanos());
        Some((*REASONS.get(reason)?, Duration::from_nanos(nanos)))
    }

    /// `cost` tokens and above are denied until then; the denial of before is forgotten.
    pub(super) fn remember(&self, cost: u64, reason: Reason, until: Time) {
        // Rounded down: early by a tick, never late.
        let tick = ticks(until);
        if cost > COST_MOST || tick > TICKS_MOST {
            return;
        }
        let reason = REASONS.iter().position(|one| *one == reason).unwrap_or_default();
        let reason = u64::try_from(reason).unwrap_or_default();
        let word = (tick << COST_BITS | cost) << REASON_BITS | reason;
        self.0.store(word, Ordering::Relaxed);
    }

    /// Nothing is denied any more.
    pub(super) fn forget(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Time {
        Time::ZERO.after(Duration::from_millis(millis))
    }

    #[test]
    fn a_denial_holds_for_its_cost_and_above_until_its_time() {
        let denial = Denial::default();
        assert_eq!(denial.of(1, at(0)), None);
        denial.remember(5, Reason::ReservedForPriority, at(100));
        assert_eq!(denial.of(4, at(0)), None);
        let (reason, left) = denial.of(5, at(0)).unwrap();
        assert_eq!(reason, Reason::ReservedForPriority);
        assert!(left <= Duration::from_millis(100) && left >= Duration::from_millis(98));
        assert!(denial.of(u64::MAX, at(98)).is_some());
        assert_eq!(denial.of(u64::MAX, at(100)), None);
        denial.remember(1, Reason::RateLimited, at(300));
        denial.forget();
        assert_eq!(denial.of(1, at(200)), None);
    }

    #[test]
    fn each_reason_is_told_as_it_was() {
        let denial = Denial::default();
        for reason in REASONS {
            denial.remember(COST_MOST, reason, at(100));
            assert_eq!(denial.of(COST_MOST, at(0)).unwrap().0, reason);
        }
    }

    #[test]
    fn what_does_not_fit_is_not_remembered() {
        let denial = Denial::default();
        denial.remember(COST_MOST + 1, Reason::RateLimited, at(100));
        denial.remember(1, Reason::RateLimited, at(u64::MAX / 1_000_000));
        assert_eq!(denial.of(u64::MAX, at(0)), None);
    }
}
