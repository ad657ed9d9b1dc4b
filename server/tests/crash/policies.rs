//! The policies that are served, as the ledger counts them and as the server reads them.

use std::{fmt, time::Duration};

/// A limiter, and what a kill may do to it.
#[derive(Debug, PartialEq, Eq)]
pub struct Policy {
    pub name: &'static str,
    limit: u64,
    kind: Kind,
    pub kept: Kept,
}

/// What is counted, and when it comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Tokens that flow in.
    Bucket { per: Duration, burst: u64 },
    /// All at once, when the clock of the wall says so.
    Window { per: Duration },
    /// All at once, every day.
    Day,
    /// As the stretch of that length moves on.
    Sliding { per: Duration },
    /// When they are released, or after this time.
    Permits { ttl: Duration },
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

pub const SLOW: Policy = bucket("slow", 1_000_000, DAY, 5_000, Kept::Strict);
/// Spent in no time, so that it is asked for its very last token.
pub const TIGHT: Policy = bucket("tight", 1_000, HOUR, 100, Kept::Strict);
pub const FAST: Policy = bucket("fast", 100, SECOND, 100, Kept::Fast);
/// As slow as a fast one can be: what is spent twice of it shows.
pub const BRISK: Policy = bucket("brisk", 10, SECOND, 100, Kept::Fast);
pub const RELAXED: Policy = bucket("relaxed", 1_000_000, DAY, 50_000, Kept::Relaxed);
pub const WINDOW: Policy = strict("window", 2_000, Kind::Window { per: HOUR });
pub const CALENDAR: Policy = strict("calendar", 500, Kind::Day);
/// Slow enough to be written, and fast enough to come back in a history.
pub const SLIDING: Policy =
    strict("sliding", 1_000, Kind::Sliding { per: Duration::from_secs(15) });
pub const PERMITS: Policy = strict("permits", 8, Kind::Permits { ttl: Duration::from_secs(2) });

pub static ALL: [&Policy; 9] =
    [&SLOW, &TIGHT, &FAST, &BRISK, &RELAXED, &WINDOW, &CALENDAR, &SLIDING, &PERMITS];

const fn bucket(name: &'static str, limit: u64, per: Duration, burst: u64, kept: Kept) -> Policy {
    Policy { name, limit, kind: Kind::Bucket { per, burst }, kept }
}

const fn strict(name: &'static str, limit: u64, kind: Kind) -> Policy {
    Policy { name, limit, kind, kept: Kept::Strict }
}

/// The namespace of all of them.
pub const NAMESPACE: &str = "crash";

/// The file that a server reads.
pub fn configuration() -> String {
    let mut text = format!("namespaces:\n  {NAMESPACE}:\n    policies:\n");
    for Policy { name, limit, kind, kept } in ALL {
        let durability = if *kept == Kept::Relaxed { ", durability: relaxed" } else { "" };
        let limiter = match kind {
            Kind::Bucket { per, burst } => {
                let per = per.as_secs();
                format!("token_bucket: {{limit: {limit}, per: {per}s, burst: {burst}}}")
            }
            Kind::Window { per } => {
                format!("fixed_window: {{limit: {limit}, per: {}s}}", per.as_secs())
            }
            Kind::Day => format!("calendar_window: {{limit: {limit}, every: day}}"),
            Kind::Sliding { per } => {
                format!("sliding_window: {{limit: {limit}, per: {}s}}", per.as_secs())
            }
            Kind::Permits { ttl } => {
                format!("concurrency: {{limit: {limit}, ttl: {}s}}", ttl.as_secs())
            }
        };
        text += &format!("      {name}: {{{limiter}{durability}}}\n");
    }
    text
}

/// So many keys of each policy.
pub fn keys(of_each: u64) -> impl Iterator<Item = Key> {
    ALL.iter().flat_map(move |policy| (0..of_each).map(|number| Key { policy, number }))
}

impl Policy {
    /// Most that can be had at once.
    pub fn burst(&self) -> i128 {
        match self.kind {
            Kind::Bucket { burst, .. } => burst.into(),
            _ => self.limit.into(),
        }
    }

    /// Whether a call may turn out to cost less, or more: what it gives back, or owes, counts in a bucket at
    /// any time, and in a window only as long as that one lasts.
    pub fn is_bucket(&self) -> bool {
        matches!(self.kind, Kind::Bucket { .. })
    }

    /// How long a permit is held, if it counts permits.
    pub fn ttl(&self) -> Option<Duration> {
        match self.kind {
            Kind::Permits { ttl } => Some(ttl),
            _ => None,
        }
    }

    /// Parts of a token, so that a nanosecond refills a whole number of them.
    pub fn parts(&self) -> i128 {
        match self.kind {
            Kind::Bucket { per, .. } => per.as_nanos().cast_signed(),
            _ => 1,
        }
    }

    /// Parts that flow in meanwhile, at least.
    pub fn refill(&self, meanwhile: Duration) -> i128 {
        match self.kind {
            Kind::Bucket { .. } => i128::from(self.limit) * meanwhile.as_nanos().cast_signed(),
            _ => 0,
        }
    }

    /// Parts that flow in from one moment to another, at most; both since the Unix epoch.
    pub fn most_refill(&self, start: Duration, end: Duration) -> i128 {
        let limit = i128::from(self.limit);
        let stretch = end.saturating_sub(start);
        let ends_of = |per: Duration| {
            let window = |at: Duration| at.as_nanos() / per.as_nanos();
            window(end).saturating_sub(window(start)).cast_signed()
        };
        match self.kind {
            Kind::Bucket { .. } => self.refill(stretch),
            Kind::Window { per } => limit * ends_of(per),
            Kind::Day => limit * ends_of(DAY),
            Kind::Sliding { per } => limit * (stretch.as_nanos() / per.as_nanos()).cast_signed(),
            Kind::Permits { .. } => 0,
        }
    }

    /// Whether what is left at one moment says how much can be had soon after it: in a stretch that slides
    /// anything may come back.
    pub fn is_bound_by_what_is_left(&self) -> bool {
        !matches!(self.kind, Kind::Sliding { .. })
    }

    /// Tokens that a kill may take: those that a mark runs ahead.
    pub fn step(&self) -> i128 {
        (i128::from(self.limit).min(self.burst()) / 100).max(1)
    }

    /// Costs that make sense, so that a life spends a part of the bucket that shows.
    pub fn costs(&self) -> std::ops::Range<u64> {
        let most = u64::try_from(self.burst()).unwrap_or(u64::MAX);
        1..(most / 250).clamp(4, 20)
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
