//! A line in front of one cell: its head, who wants a whole burst, is admitted in bounded time.
//!
//! That is, by everything but calls of a higher priority, which may starve it: there are none here. Calls of
//! its own priority come at any time, with and without patience, for leases and for themselves. The server
//! acts in time: when the head may be admitted or a lease ends, that comes before the next tick.

use super::{BURST, Bucket, PER, expect_harm, expect_nothing};
use crate::search::World;

/// Ticks that a lease lives, on the server's clock from its grant.
const LEASE_TIME: u8 = 2;
/// Most grants at a time.
const GRANTS: usize = 2;
/// Until all that was leased as the head came has ended, and an empty bucket has filled after that.
const LONGEST_WAIT: u8 = LEASE_TIME + BURST * PER;

/// A rule that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Broken {
    Nothing,
    /// Who does not wait is admitted past those who do.
    OthersPassBy,
    /// Leases are given while somebody waits.
    LeasesGoOn,
    /// Who came later and wants less is admitted first.
    LessGoesFirst,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Grant {
    amount: u8,
    ends_in: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Line {
    broken: Broken,
    bucket: Bucket,
    grants: Vec<Grant>,
    /// How long the head has waited.
    head: Option<u8>,
}

#[derive(Clone, Debug)]
#[allow(dead_code)] // they are told by `Debug`
enum Event {
    Tick,
    Charge { tokens: u8 },
    ChargeFromBehind,
    Grant { amount: u8 },
    End { grant: usize, returned: u8 },
    Wait,
    Admit,
}

impl Line {
    fn new(broken: Broken) -> Self {
        Self { broken, bucket: Bucket::FULL, grants: Vec::new(), head: None }
    }

    fn tick(&self) -> Option<Self> {
        if self.admit().is_some() || self.grants.iter().any(|grant| grant.ends_in == 0) {
            return None;
        }
        let mut next = self.clone();
        next.bucket = self.bucket.after_a_tick();
        for grant in &mut next.grants {
            grant.ends_in -= 1;
        }
        next.head = self.head.map(|waited| waited + 1);
        Some(next)
    }

    /// Somebody else is charged; past the head only if the rule against it is broken.
    fn charge(&self, tokens: u8, passes: Broken) -> Option<Self> {
        if self.head.is_some() && self.broken != passes {
            return None;
        }
        Some(Self { bucket: self.bucket.charged(tokens, false)?, ..self.clone() })
    }

    fn grant(&self, amount: u8) -> Option<Self> {
        let given = self.head.is_none() || self.broken == Broken::LeasesGoOn;
        if self.grants.len() == GRANTS || !given {
            return None;
        }
        let mut next = Self { bucket: self.bucket.charged(amount, true)?, ..self.clone() };
        next.grants.push(Grant { amount, ends_in: LEASE_TIME });
        next.grants.sort_unstable();
        Some(next)
    }

    /// A lease ends in time; until then its client may return what is left.
    fn end(&self, grant: usize, returned: u8) -> Option<Self> {
        let mut next = self.clone();
        let Grant { amount, ends_in } = next.grants.remove(grant);
        next.bucket = self.bucket.settled(amount, amount - returned);
        (returned == 0 || ends_in > 0).then_some(next)
    }

    fn wait(&self) -> Option<Self> {
        self.head.is_none().then(|| Self { head: Some(0), ..self.clone() })
    }

    fn admit(&self) -> Option<Self> {
        self.head?;
        Some(Self { bucket: self.bucket.charged(BURST, false)?, head: None, ..self.clone() })
    }
}

impl World for Line {
    type Event = Event;

    fn next(&self) -> Vec<(Event, Self)> {
        let mut next = Vec::new();
        let mut add = |event, line: Option<Self>| next.extend(line.map(|line| (event, line)));
        add(Event::Tick, self.tick());
        for tokens in 1..=BURST {
            add(Event::Charge { tokens }, self.charge(tokens, Broken::OthersPassBy));
            add(Event::Grant { amount: tokens }, self.grant(tokens));
        }
        add(Event::ChargeFromBehind, self.charge(1, Broken::LessGoesFirst));
        for grant in 0..self.grants.len() {
            for returned in 0..=self.grants[grant].amount {
                add(Event::End { grant, returned }, self.end(grant, returned));
            }
        }
        add(Event::Wait, self.wait());
        add(Event::Admit, self.admit());
        next
    }

    fn wrong(&self) -> Option<String> {
        let waited = self.head.filter(|waited| *waited > LONGEST_WAIT)?;
        Some(format!("the head has waited for {waited} ticks"))
    }
}

#[test]
fn the_head_of_a_line_is_admitted_in_bounded_time() {
    expect_nothing(Line::new(Broken::Nothing), 50);
}

#[test]
fn every_rule_is_needed() {
    use Broken::*;
    for broken in [OthersPassBy, LeasesGoOn, LessGoesFirst] {
        expect_harm(broken, Line::new(broken));
    }
}
