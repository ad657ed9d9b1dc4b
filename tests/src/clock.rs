//! Time and randomness that a test controls.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use fusebox_server::{clock::Clock, entropy::Entropy};
use parking_lot::Mutex;

/// Both clocks, standing still until told otherwise.
#[derive(Debug)]
pub struct ManualClock {
    now: Mutex<(Duration, Duration)>,
}

impl Default for ManualClock {
    /// Some time after boot, and on a day in 2026.
    fn default() -> Self {
        Self { now: Mutex::new((Duration::from_secs(1_000), Duration::from_secs(1_790_000_000))) }
    }
}

impl ManualClock {
    /// Moves both clocks on.
    pub fn advance(&self, by: Duration) {
        self.advance_each(by, by);
    }

    /// Moves each clock on, as where one of them is slow or fast.
    pub fn advance_each(&self, monotonic: Duration, wall: Duration) {
        let mut now = self.now.lock();
        now.0 += monotonic;
        now.1 += wall;
    }

    /// Sets the wall clock forward by so much, as people do.
    pub fn turn_wall_on(&self, by: Duration) {
        self.now.lock().1 += by;
    }

    /// Sets the wall clock back by so much, as people do.
    pub fn turn_wall_back(&self, by: Duration) {
        let mut now = self.now.lock();
        now.1 = now.1.saturating_sub(by);
    }

    /// Sets the wall clock, as people do.
    pub fn set_wall(&self, wall: Duration) {
        self.now.lock().1 = wall;
    }
}

impl Clock for ManualClock {
    fn monotonic(&self) -> Duration {
        self.now.lock().0
    }

    fn wall(&self) -> Duration {
        self.now.lock().1
    }
}

/// Bytes that anyone can guess, and that are never the same twice.
#[derive(Debug, Default)]
pub struct Counting(AtomicU64);

impl From<u64> for Counting {
    /// Counts from there on.
    fn from(first: u64) -> Self {
        Self(AtomicU64::new(first))
    }
}

impl Entropy for Counting {
    fn fill(&self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let next = self.0.fetch_add(1, Ordering::Relaxed).to_be_bytes();
            chunk.copy_from_slice(&next[..chunk.len()]);
        }
    }
}
