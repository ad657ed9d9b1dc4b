//! More keys than cells: one key has its own, all others share the overflow cell.
//!
//! A cell may leave when it is full, and whoever comes next gets its place, as a copy of the overflow cell.
//! Each key is held to the limit alone, over all the cells that it ever had. Answers and reports are as fast
//! as can be: slow ones are the other worlds'.

use super::{BURST, Bound, Bucket, Countdown, Outrun, count_down, expect_harm, expect_nothing};
use crate::search::World;

/// Ticks that a lease lives, on the server's clock from its grant.
const LEASE_TIME: u8 = 2;
/// Most grants at a time.
const GRANTS: usize = 2;
const KEYS: usize = 2;

/// A rule that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Broken {
    Nothing,
    /// A cell starts full, whatever its key spent in the overflow cell.
    BornFull,
    /// A cell leaves before it is full, to make room.
    LeavesBeforeFull,
    /// A cell leaves once all that is missing is out.
    LeavesWhileOut,
    /// A copy also has what is out of the overflow cell, though it all comes back to that one. This and the
    /// next admit nothing extra, but leave a cell behind that never fills.
    CopiesWhatIsOut,
    /// What is returned is credited to the cell that its key has by now.
    CreditsTheKey,
    /// Who waits is charged to the cell in whose line it stands, also when its key has its own by now.
    WaiterKeepsItsCell,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Place {
    Own,
    Overflow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Grant {
    key: usize,
    place: Place,
    amount: u8,
    open: bool,
    /// Until the server ends it, and the client holds it for ended.
    ends_in: Countdown,
    left: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Waiter {
    key: usize,
    tokens: u8,
    place: Place,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Cells {
    broken: Broken,
    bound: Bound,
    /// Whether any lease is given.
    leases: bool,
    own: Option<(usize, Bucket)>,
    overflow: Bucket,
    outrun: [Outrun; KEYS],
    grants: Vec<Grant>,
    waiter: Option<Waiter>,
}

#[derive(Clone, Debug)]
#[allow(dead_code)] // they are told by `Debug`
enum Event {
    Tick,
    Charge { key: usize, tokens: u8 },
    Grant { key: usize, amount: u8 },
    Spend { grant: usize },
    Return { grant: usize },
    Expire { grant: usize },
    Wait { key: usize, tokens: u8 },
    Admit,
    LeaveLine,
    Leave,
}

impl Cells {
    fn new(broken: Broken, bound: Bound, leases: bool) -> Self {
        Self {
            broken,
            bound,
            leases,
            own: None,
            overflow: Bucket::FULL,
            outrun: [Outrun::default(); KEYS],
            grants: Vec::new(),
            waiter: None,
        }
    }

    fn tick(&self) -> Self {
        let mut next = self.clone();
        next.own = self.own.map(|(key, bucket)| (key, bucket.after_a_tick()));
        next.overflow = self.overflow.after_a_tick();
        next.outrun.iter_mut().for_each(Outrun::tick);
        for grant in &mut next.grants {
            grant.ends_in = count_down(grant.ends_in);
        }
        next
    }

    /// Where a key is counted: it gets its own cell if that is still to be had.
    fn place_of(&self, key: usize) -> Place {
        match self.own {
            Some((owner, _)) if owner != key => Place::Overflow,
            _ => Place::Own,
        }
    }

    fn bucket(&self, place: Place) -> Bucket {
        match (place, self.own) {
            (Place::Overflow, _) => self.overflow,
            (Place::Own, Some((_, bucket))) => bucket,
            (Place::Own, None) => match self.broken {
                Broken::BornFull => Bucket::FULL,
                Broken::CopiesWhatIsOut => self.overflow,
                _ => self.overflow.copied(),
            },
        }
    }

    fn with_bucket(&self, key: usize, place: Place, bucket: Bucket) -> Self {
        let mut next = self.clone();
        match place {
            Place::Own => next.own = Some((key, bucket)),
            Place::Overflow => next.overflow = bucket,
        }
        next
    }

    fn charge(&self, key: usize, tokens: u8, place: Place) -> Option<Self> {
        let bucket = self.bucket(place).charged(tokens, false)?;
        let mut next = self.with_bucket(key, place, bucket);
        next.outrun[key].spend(tokens);
        Some(next)
    }

    fn grant(&self, key: usize, amount: u8) -> Option<Self> {
        if self.grants.len() == GRANTS || !self.leases {
            return None;
        }
        let place = self.place_of(key);
        let bucket = self.bucket(place).charged(amount, true)?;
        let mut next = self.with_bucket(key, place, bucket);
        let ends_in = Some(LEASE_TIME);
        next.grants.push(Grant { key, place, amount, open: true, ends_in, left: amount });
        Some(next)
    }

    fn spend(&self, grant: usize) -> Option<Self> {
        let mut next = self.clone();
        let lease = &mut next.grants[grant];
        if lease.left == 0 || lease.ends_in.is_none() {
            return None;
        }
        lease.left -= 1;
        next.outrun[lease.key].spend(1);
        Some(next)
    }

    fn give_back(&self, grant: usize) -> Option<Self> {
        let left = self.grants[grant].left;
        let mut next = self.end(grant, left)?;
        next.grants[grant].left = 0;
        Some(next)
    }

    fn expire(&self, grant: usize) -> Option<Self> {
        let over = self.grants[grant].ends_in.is_none_or(|ticks| ticks == 0);
        over.then(|| self.end(grant, 0))?
    }

    fn end(&self, grant: usize, returned: u8) -> Option<Self> {
        let Grant { key, place, amount, open: true, .. } = self.grants[grant] else {
            return None;
        };
        let place = match self.broken {
            Broken::CreditsTheKey => self.place_of(key),
            _ => place,
        };
        let bucket = self.bucket(place).settled(amount, amount - returned);
        let gone = place == Place::Own && self.own.is_none_or(|(owner, _)| owner != key);
        let mut next = if gone { self.clone() } else { self.with_bucket(key, place, bucket) };
        next.grants[grant].open = false;
        Some(next)
    }

    fn wait(&self, key: usize, tokens: u8) -> Option<Self> {
        let place = self.place_of(key);
        let waiter = Some(Waiter { key, tokens, place });
        self.waiter.is_none().then(|| Self { waiter, ..self.clone() })
    }

    fn admit(&self) -> Option<Self> {
        let Waiter { key, tokens, place } = self.waiter?;
        let place = match self.broken {
            Broken::WaiterKeepsItsCell if place == Place::Overflow => place,
            _ => self.place_of(key),
        };
        Some(Self { waiter: None, ..self.charge(key, tokens, place)? })
    }

    fn leave_line(&self) -> Option<Self> {
        self.waiter.map(|_| Self { waiter: None, ..self.clone() })
    }

    /// The cell of its own makes room for another key's.
    fn leave(&self) -> Option<Self> {
        let (_, bucket) = self.own?;
        let may = match self.broken {
            Broken::LeavesBeforeFull => bucket.out == 0,
            Broken::LeavesWhileOut => bucket.spent == bucket.out && bucket.remainder == 0,
            _ => bucket == Bucket::FULL,
        };
        may.then(|| Self { own: None, ..self.clone() })
    }

    /// The same world, told in one way only: without the grants that have no more effect, and in one order.
    fn told_once(mut self) -> Self {
        self.grants.retain(|grant| grant.open || grant.left > 0 && grant.ends_in.is_some());
        if self.broken == Broken::Nothing {
            self.grants.sort_unstable();
        }
        self
    }

    /// What is out of a cell is what its open grants may bring back: of more, it would never be full again.
    fn out_for_nobody(&self) -> bool {
        let owed = |place: Place| {
            let open = self.grants.iter().filter(|grant| grant.open && grant.place == place);
            open.map(|grant| grant.amount).sum::<u8>()
        };
        let own = self.own.map_or(0, |(_, bucket)| bucket.out);
        own > owed(Place::Own) || self.overflow.out > owed(Place::Overflow)
    }
}

impl World for Cells {
    type Event = Event;

    fn next(&self) -> Vec<(Event, Self)> {
        let mut next = Vec::new();
        let mut add = |event, cells: Option<Self>| {
            next.extend(cells.map(|cells| (event, cells.told_once())));
        };
        add(Event::Tick, Some(self.tick()));
        for key in 0..KEYS {
            for tokens in 1..=BURST {
                add(Event::Charge { key, tokens }, self.charge(key, tokens, self.place_of(key)));
                add(Event::Grant { key, amount: tokens }, self.grant(key, tokens));
                add(Event::Wait { key, tokens }, self.wait(key, tokens));
            }
        }
        for grant in 0..self.grants.len() {
            add(Event::Spend { grant }, self.spend(grant));
            add(Event::Return { grant }, self.give_back(grant));
            add(Event::Expire { grant }, self.expire(grant));
        }
        add(Event::Admit, self.admit());
        add(Event::LeaveLine, self.leave_line());
        add(Event::Leave, self.leave());
        next
    }

    fn wrong(&self) -> Option<String> {
        let widened = self.bound.widened(false, LEASE_TIME);
        let spent = self.outrun.iter().find_map(|outrun| outrun.wrong(widened));
        spent.or_else(|| self.out_for_nobody().then(|| "what is out never comes back".to_owned()))
    }
}

#[test]
fn no_key_spends_more_for_being_counted_in_several_cells() {
    expect_nothing(Cells::new(Broken::Nothing, Bound::Exact, false), 1_000);
    // What is out of the overflow cell is not out of a copy, which refills while the lease is spent: as
    // after a crash, a lease time more.
    expect_nothing(Cells::new(Broken::Nothing, Bound::Promised, true), 100_000);
    expect_harm("a copy", Cells::new(Broken::Nothing, Bound::Exact, true));
}

#[test]
fn every_rule_is_needed() {
    use Broken::*;
    for broken in [
        BornFull,
        LeavesBeforeFull,
        LeavesWhileOut,
        CopiesWhatIsOut,
        CreditsTheKey,
        WaiterKeepsItsCell,
    ] {
        expect_harm(broken, Cells::new(broken, Bound::Promised, true));
    }
}
