//! Random rules against a naive reading of them, and damaged bytes against the decoder.
//!
//! Every round has a seed, which is printed if the round fails. `FUSEBOX_FUZZ_SEED` sets the first one, so that
//! a round can be had again, and `FUSEBOX_FUZZ_ROUNDS` asks for more rounds of each test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod domains;
mod wire;

use std::{env, thread};

/// Runs a test once for each seed.
fn rounds(usual: u64, round: impl Fn(Random)) {
    let number = |name| env::var(name).ok().map(|text| text.parse().expect("a number"));
    let first: u64 = number("FUSEBOX_FUZZ_SEED").unwrap_or(1);
    let rounds: u64 = number("FUSEBOX_FUZZ_ROUNDS").unwrap_or(usual);
    for seed in (first..).take(rounds as usize) {
        let _seed = Seed(seed);
        round(Random::new(seed));
    }
}

/// Tells the seed of a round that fails.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if thread::panicking() {
            let Self(seed) = self;
            eprintln!("again with FUSEBOX_FUZZ_SEED={seed} FUSEBOX_FUZZ_ROUNDS=1");
        }
    }
}

/// Numbers that look random and are the same each time: xorshift64* (Vigna, "An experimental exploration of
/// Marsaglia's xorshift generators, scrambled", TOMS 42(4), 2016).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        // Never zero, and far apart for seeds that are not.
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// Up to `most` letters of `alphabet`.
    fn text(&mut self, alphabet: &[char], most: usize) -> String {
        (0..self.below(most + 1)).map(|_| *self.pick(alphabet)).collect()
    }
}
