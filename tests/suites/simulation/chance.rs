//! Numbers that a seed decides.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// Numbers that a seed decides: `SplitMix64`.
pub struct Chance(AtomicU64);

impl Chance {
    pub fn of(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// Another, which this one decides, so that what one of them is used for does not change the other.
    pub fn fork(&self) -> Self {
        Self::of(self.next())
    }

    pub fn next(&self) -> u64 {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        let z = self.0.fetch_add(GOLDEN, Ordering::Relaxed).wrapping_add(GOLDEN);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number of a range.
    pub fn within(&self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// Whether one of so many.
    pub fn one_in(&self, many: u64) -> bool {
        self.next().is_multiple_of(many)
    }
}
