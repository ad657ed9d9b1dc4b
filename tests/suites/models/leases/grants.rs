//! Leases: granted by one server, spent by their clients alone, given back, expired, and survived by a
//! crash.
//!
//! An answer may arrive late or never, a report late, never or again and again, in any order. A client is
//! nothing but the leases that it holds, so up to [`GRANTS`] clients are in this world. Of requests only the
//! fastest are: a slower one ends sooner for its client, who may let a lease end unused anyway. A lease is
//! of any size up to what remains: the share that one client gets is fairness, and carries no part of
//! the proof. An estimate is a lease whose call spends at once and reports what it did not need.

use super::{BURST, Bound, Bucket, Countdown, Outrun, count_down, expect_harm, expect_nothing};
use crate::search::World;

/// Ticks that a lease lives, on the server's clock from its grant.
const LEASE_TIME: u8 = 2;
/// How slow a client's clock may be in one lease time; as long as the margin that a client takes off.
const SLOW: u8 = 1;
/// Most grants at a time.
const GRANTS: usize = 3;

/// A rule that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Broken {
    Nothing,
    /// A client counts the lease time from the moment at which the answer arrived.
    CountsFromArrival,
    /// A client takes no margin off, though its clock is slow.
    NoMargin,
    /// The call that waited for an answer is let through by it, however late it arrives.
    ExpiredOnArrivalIsUsed,
    /// A client goes on spending what it reported as returned.
    SpendsWhatItReturned,
    /// The server ends a lease before its time.
    EndsEarly,
    /// What is leased is not out: the bucket refills past it.
    RefillsPastOut,
    /// What is left of a lease is credited when it expires.
    ExpiryCredits,
    /// The last report of a lease gives its credit each time that it arrives.
    ReturnedTwice,
    /// A report before the last says what comes back by it, not what has come back so far.
    ReturnsAreDeltas,
    /// A report for a lease of an earlier life is credited.
    CreditTheDead,
    /// A crash gives back what was out, as nobody can return it any more.
    CrashCredits,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Grant {
    amount: u8,
    // The server's record.
    open: bool,
    of_this_life: bool,
    returned: u8,
    /// Until the server may end it; it may be late.
    ends_in: u8,
    // The client's lease.
    arrived: bool,
    left: u8,
    /// Until the client holds it for ended, in true time.
    usable_for: Countdown,
    // The reports on their way, which arrive any number of times: bit n is "n have come back so far"; and
    // the last one, which ends the grant.
    reports: u8,
    last_report: Option<u8>,
}

impl Grant {
    fn given_back(&self) -> u8 {
        u8::try_from(self.reports.checked_ilog2().unwrap_or(0)).unwrap()
    }

    fn usable(&self, broken: Broken) -> bool {
        let waited_for = broken == Broken::ExpiredOnArrivalIsUsed && self.left == self.amount;
        self.arrived && self.left > 0 && (self.usable_for.is_some() || waited_for)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Fleet {
    broken: Broken,
    bound: Bound,
    bucket: Bucket,
    outrun: Outrun,
    crashed: bool,
    grants: Vec<Grant>,
}

#[derive(Clone, Debug)]
#[allow(dead_code)] // they are told by `Debug`
enum Event {
    Tick,
    Charge { tokens: u8 },
    Grant { amount: u8 },
    Arrive { grant: usize },
    Spend { grant: usize },
    GiveBackOne { grant: usize },
    GiveUp { grant: usize },
    Report { grant: usize, returned: u8 },
    LastReport { grant: usize },
    Expire { grant: usize },
    Crash,
}

impl Fleet {
    fn new(broken: Broken, bound: Bound) -> Self {
        let (bucket, outrun) = (Bucket::FULL, Outrun::default());
        Self { broken, bound, bucket, outrun, crashed: false, grants: Vec::new() }
    }

    fn tick(&self) -> Self {
        let mut next = self.clone();
        next.bucket = self.bucket.after_a_tick();
        next.outrun.tick();
        for grant in &mut next.grants {
            grant.ends_in = grant.ends_in.saturating_sub(1);
            grant.usable_for = count_down(grant.usable_for);
        }
        next
    }

    fn charge(&self, tokens: u8) -> Option<Self> {
        let bucket = self.bucket.charged(tokens, false)?;
        let mut next = Self { bucket, ..self.clone() };
        next.outrun.spend(tokens);
        Some(next)
    }

    fn grant(&self, amount: u8) -> Option<Self> {
        if self.grants.len() == GRANTS {
            return None;
        }
        let bucket = self.bucket.charged(amount, self.broken != Broken::RefillsPastOut)?;
        let mut next = Self { bucket, ..self.clone() };
        next.grants.push(Grant {
            amount,
            open: true,
            of_this_life: true,
            returned: 0,
            ends_in: LEASE_TIME - u8::from(self.broken == Broken::EndsEarly),
            arrived: false,
            left: amount,
            usable_for: Some(self.usable_for()),
            reports: 0,
            last_report: None,
        });
        Some(next)
    }

    /// How long a lease is usable in true time when its client begins to count.
    fn usable_for(&self) -> u8 {
        let margin = if self.broken == Broken::NoMargin { 0 } else { SLOW };
        LEASE_TIME + SLOW - margin
    }

    fn arrive(&self, grant: usize) -> Option<Self> {
        let mut next = self.clone();
        let lease = &mut next.grants[grant];
        let first = !lease.arrived;
        lease.arrived = true;
        if self.broken == Broken::CountsFromArrival {
            lease.usable_for = Some(self.usable_for());
        }
        first.then_some(next)
    }

    fn spend(&self, grant: usize) -> Option<Self> {
        let mut next = self.clone();
        let lease = &mut next.grants[grant];
        if !lease.usable(self.broken) {
            return None;
        }
        lease.left -= 1;
        next.outrun.spend(1);
        Some(next)
    }

    /// One token is returned, and the rest is kept.
    fn give_back_one(&self, grant: usize) -> Option<Self> {
        let mut next = self.clone();
        let lease = &mut next.grants[grant];
        if !lease.arrived || lease.left == 0 || lease.last_report.is_some() {
            return None;
        }
        lease.reports |= 1 << (lease.given_back() + 1);
        if self.broken != Broken::SpendsWhatItReturned {
            lease.left -= 1;
        }
        Some(next)
    }

    /// All that is left is returned, and the grant is to end.
    fn give_up(&self, grant: usize) -> Option<Self> {
        let mut next = self.clone();
        let lease = &mut next.grants[grant];
        if !lease.arrived || lease.last_report.is_some() {
            return None;
        }
        lease.last_report = Some(lease.given_back() + lease.left);
        if self.broken != Broken::SpendsWhatItReturned {
            lease.left = 0;
        }
        Some(next)
    }

    fn report(&self, grant: usize, returned: u8) -> Option<Self> {
        let record = self.grants[grant];
        if record.reports & (1 << returned) == 0 || !self.takes_reports_of(&record) {
            return None;
        }
        let more = match self.broken {
            Broken::ReturnsAreDeltas => 1,
            _ => returned.checked_sub(record.returned)?,
        };
        Some(self.credit(grant, more))
    }

    fn last_report(&self, grant: usize) -> Option<Self> {
        let record = self.grants[grant];
        let returned = record.last_report.filter(|_| self.takes_reports_of(&record))?;
        let again = !record.open;
        let before = if again { 0 } else { record.returned };
        let mut next = self.credit(grant, returned.saturating_sub(before));
        if !again {
            next.end(grant);
        }
        Some(next)
    }

    fn takes_reports_of(&self, record: &Grant) -> bool {
        match self.broken {
            Broken::ReturnedTwice => record.of_this_life,
            Broken::CreditTheDead => record.open || !record.of_this_life,
            _ => record.open,
        }
    }

    fn credit(&self, grant: usize, tokens: u8) -> Self {
        let mut next = self.clone();
        next.bucket = self.bucket.settled(tokens, 0);
        let record = &mut next.grants[grant];
        record.returned = record.amount.min(record.returned + tokens);
        next
    }

    /// What has not come back by now never will.
    fn end(&mut self, grant: usize) {
        let record = &mut self.grants[grant];
        let kept = record.amount - record.returned;
        record.open = false;
        self.bucket = self.bucket.settled(kept, kept);
    }

    fn expire(&self, grant: usize) -> Option<Self> {
        let record = self.grants[grant];
        if !record.open || record.ends_in > 0 {
            return None;
        }
        let kept = record.amount - record.returned;
        let mut next = match self.broken {
            Broken::ExpiryCredits => self.credit(grant, kept),
            _ => self.clone(),
        };
        next.end(grant);
        Some(next)
    }

    fn crash(&self) -> Self {
        let mut next = Self { crashed: true, ..self.clone() };
        if self.broken == Broken::CrashCredits {
            next.bucket = next.bucket.settled(next.bucket.out, 0);
        }
        next.bucket = next.bucket.recovered();
        for grant in &mut next.grants {
            (grant.open, grant.of_this_life) = (false, false);
        }
        next
    }

    /// The same world, told in one way only: without the grants that have no more effect, and in one order.
    /// Where a rule is broken they may have one, and events are to name them as they came.
    fn told_once(mut self) -> Self {
        if self.broken == Broken::Nothing {
            // The server ignores their reports, and their clients hold them for ended.
            self.grants.retain(|grant| grant.open || grant.left > 0 && grant.usable_for.is_some());
            self.grants.sort_unstable();
        }
        self
    }
}

impl World for Fleet {
    type Event = Event;

    fn next(&self) -> Vec<(Event, Self)> {
        let mut next = Vec::new();
        let mut add = |event, fleet: Option<Self>| {
            next.extend(fleet.map(|fleet| (event, fleet.told_once())));
        };
        add(Event::Tick, Some(self.tick()));
        for tokens in 1..=BURST {
            add(Event::Charge { tokens }, self.charge(tokens));
            add(Event::Grant { amount: tokens }, self.grant(tokens));
        }
        for grant in 0..self.grants.len() {
            add(Event::Arrive { grant }, self.arrive(grant));
            add(Event::Spend { grant }, self.spend(grant));
            add(Event::GiveBackOne { grant }, self.give_back_one(grant));
            add(Event::GiveUp { grant }, self.give_up(grant));
            for returned in 1..=self.grants[grant].amount {
                add(Event::Report { grant, returned }, self.report(grant, returned));
            }
            add(Event::LastReport { grant }, self.last_report(grant));
            add(Event::Expire { grant }, self.expire(grant));
        }
        add(Event::Crash, Some(self.crash()));
        next
    }

    fn wrong(&self) -> Option<String> {
        if self.bound == Bound::Promised || self.crashed {
            return self.outrun.wrong(LEASE_TIME);
        }
        let held = self.grants.iter().filter(|grant| grant.usable_for.is_some());
        let unspent = self.bucket.remaining() + held.map(|grant| grant.left).sum::<u8>();
        let piled_up = format!("{unspent} tokens are unspent");
        (unspent > BURST).then_some(piled_up).or_else(|| self.outrun.wrong(0))
    }
}

#[test]
fn no_history_spends_more_than_the_limit() {
    expect_nothing(Fleet::new(Broken::Nothing, Bound::Exact), 100_000);
}

#[test]
fn every_rule_is_needed() {
    use Broken::*;
    for broken in [
        CountsFromArrival,
        NoMargin,
        ExpiredOnArrivalIsUsed,
        SpendsWhatItReturned,
        RefillsPastOut,
        ExpiryCredits,
        ReturnedTwice,
        ReturnsAreDeltas,
        CreditTheDead,
        CrashCredits,
    ] {
        expect_harm(broken, Fleet::new(broken, Bound::Promised));
    }
    // A lease that the server ends early is what a crash makes of every lease: the promise allows for it.
    expect_harm(EndsEarly, Fleet::new(EndsEarly, Bound::Exact));
}
