//! Chance that can be had again: all of a history follows from one number.

use std::{ops::Range, time::Duration};

/// A stream of numbers (`SplitMix64`).
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One of a range that is not empty.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// A duration below this one.
    pub fn below(&mut self, most: Duration) -> Duration {
        Duration::from_micros(self.within(0..u64::try_from(most.as_micros()).unwrap().max(1)))
    }

    /// True once in so many.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.within(0..times) == 0
    }

    /// One of them.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::try_from(self.within(0..choices.len() as u64)).unwrap()]
    }

    /// Chance of its own for somebody else.
    pub fn fork(&mut self) -> Self {
        Self(self.next())
    }
}
