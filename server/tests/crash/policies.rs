//! The policies that are served, as the ledger counts them and as the server reads them.

use std::{fmt, time::Duration};

/// A token bucket, and what a kill may do to it.
#[derive(Debug, PartialEq, Eq)]
pub struct Policy {
    pub name: &'static str,
    limit: u64,
    per: Duration,
    burst: u64,
    pub kept: Kept,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// On disk before anybody is told.
    Strict,
    /// Never on disk while it lives; empty after a kill.
    Fast,
    /// On disk a while later.
    Relaxed,
}

/// One bucket.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Key {
    pub policy: &'static Policy,
    pub number: u64,
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const HOUR: Duration = Duration::from_secs(60 * 60);
const SECOND: Duration = Duration::from_secs(1);

pub const SLOW: Policy =
    Policy { name: "slow", limit: 1_000_000, per: DAY, burst: 5_000, kept: Kept::Strict };
/// Spent in no time, so that it is asked for its very last token.
pub const TIGHT: Policy =
    Policy { name: "tight", limit: 1_000, per: HOUR, burst: 100, kept: Kept::Strict };
pub const FAST: Policy =
    Policy { name: "fast", limit: 100, per: SECOND, burst: 100, kept: Kept::Fast };
/// As slow as a fast one can be: what is spent twice of it shows.
pub const BRISK: Policy =
    Policy { name: "brisk", limit: 10, per: SECOND, burst: 100, kept: Kept::Fast };
pub const RELAXED: Policy =
    Policy { name: "relaxed", limit: 1_000_000, per: DAY, burst: 50_000, kept: Kept::Relaxed };

pub static ALL: [&Policy; 5] = [&SLOW, &TIGHT, &FAST, &BRISK, &RELAXED];

/// The namespace of all of them.
pub const NAMESPACE: &str = "crash";

/// The file that a server reads.
pub fn configuration() -> String {
    let mut text = format!("namespaces:\n  {NAMESPACE}:\n    policies:\n");
    for Policy { name, limit, per, burst, kept } in ALL {
        let durability = if *kept == Kept::Relaxed { ", durability: relaxed" } else { "" };
        let bucket = format!("{{limit: {limit}, per: {}s, burst: {burst}}}", per.as_secs());
        text += &format!("      {name}: {{token_bucket: {bucket}{durability}}}\n");
    }
    text
}

/// So many keys of each policy.
pub fn keys(of_each: u64) -> impl Iterator<Item = Key> {
    ALL.iter().flat_map(move |policy| (0..of_each).map(|number| Key { policy, number }))
}

impl Policy {
    pub fn burst(&self) -> i128 {
        self.burst.into()
    }

    /// Parts of a token, so that a nanosecond refills a whole number of them.
    pub fn parts(&self) -> i128 {
        self.per.as_nanos().cast_signed()
    }

    /// Parts that flow in meanwhile.
    pub fn refill(&self, meanwhile: Duration) -> i128 {
        i128::from(self.limit) * meanwhile.as_nanos().cast_signed()
    }

    /// Tokens that a kill may take: those that a mark runs ahead.
    pub fn step(&self) -> i128 {
        (self.limit.min(self.burst) / 100).max(1).into()
    }

    /// Costs that make sense, so that a life spends a part of the bucket that shows.
    pub fn costs(&self) -> std::ops::Range<u64> {
        1..(self.burst / 250).clamp(4, 20)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.policy.name, self.number)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
