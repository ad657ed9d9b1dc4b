//! What really happened, by a clock that nothing in the simulation can bend, and what it must obey.

use std::{collections::BTreeMap, time::Duration};

use fusebox_client::Decider;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub at: Duration,
    pub client: usize,
    pub what: What,
}

#[derive(Clone, Debug, PartialEq)]
pub enum What {
    /// Tokens of a policy were used.
    Spent {
        policy: &'static str,
        tokens: u64,
    },
    /// A call was rejected, after so long.
    Rejected {
        policy: &'static str,
        decider: Decider,
        after: Duration,
    },
    /// A permit is held from here on, until it is given up or has expired.
    Held {
        permit: u64,
    },
    LetGo {
        permit: u64,
    },
    /// Nothing reaches the process from the server, from here on; or things may again.
    CutOff,
    Mended,
    /// A call reached the target, and how it went.
    Called {
        success: bool,
    },
}

/// A token bucket, as the promise of spends is written.
#[derive(Clone, Copy, Debug)]
pub struct Promise {
    pub policy: &'static str,
    pub rate_per_second: u64,
    pub burst: u64,
    pub lease: Duration,
}

impl Promise {
    /// In any time d no more is spent than `burst + rate x (d + L)`.
    ///
    /// # Panics
    /// If it is not kept.
    pub fn check(&self, entries: &[Entry]) {
        // All in tokens times nanoseconds per second. The most beyond the rate is spent between two entries whose
        // difference of (spent so far - rate x time) is greatest.
        const SECOND: i128 = 1_000_000_000;
        let rate = i128::from(self.rate_per_second);
        let nanos = |time: Duration| i128::try_from(time.as_nanos()).unwrap();
        let allowed = i128::from(self.burst) * SECOND + rate * nanos(self.lease);
        let (mut spent, mut least, mut since) = (0, i128::MAX, Duration::ZERO);
        for entry in entries {
            let What::Spent { policy, tokens } = entry.what else { continue };
            if policy != self.policy {
                continue;
            }
            let level = spent * SECOND - rate * nanos(entry.at);
            if level < least {
                (least, since) = (level, entry.at);
            }
            spent += i128::from(tokens);
            let beyond = spent * SECOND - rate * nanos(entry.at) - least;
            assert!(
                beyond <= allowed,
                "from {since:?} to {:?}: {} thousandths of a token beyond the rate of `{}`, {} are allowed",
                entry.at,
                beyond * 1_000 / SECOND,
                self.policy,
                allowed * 1_000 / SECOND
            );
        }
    }
}

/// Who is cut off spends what it has leased for as long as a lease lives, and then nothing.
///
/// # Panics
/// If somebody does.
pub fn check_droughts(entries: &[Entry], promises: &[Promise]) {
    let mut since = BTreeMap::new();
    for entry in entries {
        match entry.what {
            // Of two cuts the first counts.
            What::CutOff => _ = since.entry(entry.client).or_insert(entry.at),
            What::Mended => _ = since.remove(&entry.client),
            What::Spent { policy, .. } => {
                let promise = promises.iter().find(|promise| promise.policy == policy);
                let cut = since.get(&entry.client);
                let Some((promise, cut)) = promise.zip(cut) else { continue };
                assert!(entry.at < *cut + promise.lease, "cut off at {cut:?}: {entry:?}");
            }
            _ => {}
        }
    }
}

/// Never more permits than this are held at a time.
///
/// # Panics
/// If more are.
pub fn check_permits(entries: &[Entry], limit: usize) {
    let mut held = BTreeMap::new();
    for entry in entries {
        match entry.what {
            What::Held { permit } => held.insert(permit, entry.client),
            What::LetGo { permit } => held.remove(&permit),
            _ => continue,
        };
        assert!(held.len() <= limit, "{:?}: {} permits are held: {held:?}", entry.at, held.len());
    }
}

/// Calls of a policy are never rejected for want of a server.
///
/// # Panics
/// If one is.
pub fn check_allowed(entries: &[Entry], allowed: &'static str) {
    for entry in entries {
        if let What::Rejected { policy, decider: Decider::Fallback, .. } = entry.what {
            assert_ne!(policy, allowed, "{entry:?}");
        }
    }
}

/// Nobody waits for longer than this to be rejected.
///
/// # Panics
/// If somebody does.
pub fn check_waits(entries: &[Entry], most: Duration) {
    for entry in entries {
        if let What::Rejected { after, .. } = entry.what {
            assert!(after <= most, "{entry:?}");
        }
    }
}

/// Tokens of a policy that were spent in a time.
pub fn spent(entries: &[Entry], wanted: &str, within: std::ops::Range<Duration>) -> u64 {
    let tokens =
        entries.iter().filter(|entry| within.contains(&entry.at)).map(|entry| match entry.what {
            What::Spent { policy, tokens } if policy == wanted => tokens,
            _ => 0,
        });
    tokens.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spent_at(millis: u64, tokens: u64) -> Entry {
        let what = What::Spent { policy: "p", tokens };
        Entry { at: Duration::from_millis(millis), client: 0, what }
    }

    const PROMISE: Promise =
        Promise { policy: "p", rate_per_second: 10, burst: 10, lease: Duration::from_secs(1) };

    #[test]
    fn the_promise_is_kept_to_the_token() {
        PROMISE.check(&[spent_at(0, 20), spent_at(1_000, 10)]);
    }

    #[test]
    #[should_panic(expected = "beyond the rate")]
    fn one_token_more_breaks_it() {
        PROMISE.check(&[spent_at(0, 5), spent_at(5_000, 15), spent_at(5_100, 7)]);
    }

    #[test]
    #[should_panic(expected = "cut off at")]
    fn a_lease_that_outlives_its_time_is_seen() {
        let cut_off = Entry { at: Duration::ZERO, client: 0, what: What::CutOff };
        check_droughts(&[cut_off, spent_at(999, 1), spent_at(1_000, 1)], &[PROMISE]);
    }

    #[test]
    #[should_panic(expected = "permits are held")]
    fn one_permit_more_is_seen() {
        let held = |permit| Entry { at: Duration::ZERO, client: 0, what: What::Held { permit } };
        check_permits(&[held(1), held(2)], 1);
    }
}
