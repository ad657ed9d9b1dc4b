//! What retries come to.

use std::sync::atomic::{AtomicU64, Ordering};

use super::GaveUp;

/// What the handles of one budget did since the first of them was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Calls, whatever was tried of each.
    pub calls: u64,
    /// Tries after the first.
    pub retries: u64,
    /// Calls that failed and might have been tried again, had the budget allowed it.
    pub denied: u64,
    /// Calls that failed as often as they may be tried, or until their deadline.
    pub exhausted: u64,
}

/// The counters behind [`Counts`].
#[derive(Debug, Default)]
pub(super) struct Tally {
    calls: AtomicU64,
    retries: AtomicU64,
    denied: AtomicU64,
    exhausted: AtomicU64,
}

impl Tally {
    pub(super) fn call(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn retry(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn gave_up(&self, why: GaveUp) {
        let counter = match why {
            GaveUp::Done => return,
            GaveUp::Budget | GaveUp::Unreachable | GaveUp::Refused => &self.denied,
            GaveUp::Attempts | GaveUp::Deadline | GaveUp::Pushback => &self.exhausted,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(%why, "a call that failed is not tried again");
    }

    pub(super) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    pub(super) fn counts(&self) -> Counts {
        Counts {
            calls: self.calls(),
            retries: self.retries.load(Ordering::Relaxed),
            denied: self.denied.load(Ordering::Relaxed),
            exhausted: self.exhausted.load(Ordering::Relaxed),
        }
    }
}
