//! One request for a lease, sent again under the same `request_id`.
//!
//! Its copies and their answers may be late or lost. A copy that meets the first one undecided joins it,
//! one that comes later is told the remembered answer, and a crash forgets. Others charge the same bucket.

use super::{BURST, Bound, Bucket, Countdown, Outrun, count_down, expect_harm, expect_nothing};
use crate::search::World;

/// Ticks that a lease lives, on the server's clock from its grant.
const LEASE_TIME: u8 = 2;
/// Most copies on their way at a time.
const COPIES: usize = 2;
/// Most grants that all copies together get: a crash forgets the first.
const GRANTS: usize = 2;

/// A rule that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Broken {
    Nothing,
    /// A remembered answer tells the lease time as it was told first, not what is left of it.
    RememberedInFull,
    /// One that joined is told the whole lease time, though the lease began before it was sent.
    JoinedInFull,
    /// A client counts from the latest copy that it sent, whichever is answered.
    CountsFromTheLast,
    /// A client takes the lease of each answer, also of the second to one request.
    TakesEveryAnswer,
    /// A lease is credited when its answer seems not to have reached anybody.
    UndeliveredCredits,
    /// A copy that comes before the first one is decided is charged as well.
    NotJoined,
    /// A copy that comes after the first one was decided is charged as well.
    NotRemembered,
    /// An answer is remembered after its lease has ended.
    RememberedTooLong,
    /// It is, and it tells the whole lease time again.
    RememberedTooLongInFull,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Copy {
    sent_ago: u8,
    place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Place {
    OnItsWay,
    /// The server holds its answer until the charge is durable.
    Waiting {
        grant: usize,
    },
    Answered {
        grant: usize,
        told: u8,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Grant {
    amount: u8,
    open: bool,
    /// Until the server ends it.
    ends_in: u8,
    /// What the client holds of it, and until it holds it for ended.
    left: u8,
    usable_for: Countdown,
}

/// What the server knows of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Memory {
    Nothing,
    InProgress { grant: usize },
    Answered { grant: usize },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Request {
    broken: Broken,
    bound: Bound,
    /// A client counts from the first copy that it sent, rather than from the one that is answered.
    counts_from_the_first: bool,
    bucket: Bucket,
    outrun: Outrun,
    crashed: bool,
    memory: Memory,
    grants: Vec<Grant>,
    copies: Vec<Copy>,
    /// When the client sent the first copy and the last.
    first_sent_ago: Option<u8>,
    last_sent_ago: u8,
    answered: bool,
    charged_twice: bool,
}

#[derive(Clone, Debug)]
#[allow(dead_code)] // they are told by `Debug`
enum Event {
    Tick,
    ChargeAnother { tokens: u8 },
    Send,
    Lose { copy: usize },
    Receive { copy: usize, amount: u8 },
    Answer,
    Deliver { copy: usize },
    SeemUndelivered { copy: usize },
    Spend { grant: usize },
    Return { grant: usize },
    Expire { grant: usize },
    Crash,
}

impl Request {
    fn new(broken: Broken, bound: Bound) -> Self {
        Self {
            broken,
            bound,
            counts_from_the_first: false,
            bucket: Bucket::FULL,
            outrun: Outrun::default(),
            crashed: false,
            memory: Memory::Nothing,
            grants: Vec::new(),
            copies: Vec::new(),
            first_sent_ago: None,
            last_sent_ago: 0,
            answered: false,
            charged_twice: false,
        }
    }

    fn tick(&self) -> Self {
        // Longer ago than a lease lives is as good as for ever.
        let one_more = |ago: u8| (ago + 1).min(LEASE_TIME + 1);
        let mut next = self.clone();
        next.bucket = self.bucket.after_a_tick();
        next.outrun.tick();
        next.first_sent_ago = self.first_sent_ago.map(one_more);
        next.last_sent_ago = one_more(self.last_sent_ago);
        for copy in &mut next.copies {
            copy.sent_ago = one_more(copy.sent_ago);
        }
        for grant in &mut next.grants {
            grant.ends_in = grant.ends_in.saturating_sub(1);
            grant.usable_for = count_down(grant.usable_for);
        }
        next.forgetting()
    }

    /// An answer is forgotten when its lease ends.
    fn forgetting(self) -> Self {
        let too_long = [Broken::RememberedTooLong, Broken::RememberedTooLongInFull];
        match self.memory {
            Memory::Answered { grant } if self.grants[grant].ends_in == 0 => {
                let kept = too_long.contains(&self.broken);
                if kept { self } else { Self { memory: Memory::Nothing, ..self } }
            }
            _ => self,
        }
    }

    fn charge_another(&self, tokens: u8) -> Option<Self> {
        let bucket = self.bucket.charged(tokens, false)?;
        let mut next = Self { bucket, ..self.clone() };
        next.outrun.spend(tokens);
        Some(next)
    }

    fn send(&self) -> Option<Self> {
        if self.answered || self.copies.len() == COPIES {
            return None;
        }
        let mut next = self.clone();
        next.copies.push(Copy { sent_ago: 0, place: Place::OnItsWay });
        next.first_sent_ago = self.first_sent_ago.or(Some(0));
        next.last_sent_ago = 0;
        Some(next)
    }

    fn lose(&self, copy: usize) -> Self {
        let mut next = self.clone();
        next.copies.remove(copy);
        next
    }

    fn receive(&self, copy: usize, amount: u8) -> Option<Self> {
        if self.copies[copy].place != Place::OnItsWay {
            return None;
        }
        match (self.memory, self.broken) {
            (Memory::InProgress { .. }, Broken::NotJoined)
            | (Memory::Answered { .. }, Broken::NotRemembered) => {
                Some(Self { charged_twice: true, ..self.grant(copy, amount)? })
            }
            (Memory::Nothing, _) => self.grant(copy, amount),
            (Memory::InProgress { grant }, _) => Some(self.place(copy, Place::Waiting { grant })),
            (Memory::Answered { grant }, broken) => {
                let in_full = [Broken::RememberedInFull, Broken::RememberedTooLongInFull];
                let left = self.grants[grant].ends_in;
                let told = if in_full.contains(&broken) { LEASE_TIME } else { left };
                Some(self.place(copy, Place::Answered { grant, told }))
            }
        }
    }

    fn place(&self, copy: usize, place: Place) -> Self {
        let mut next = self.clone();
        next.copies[copy].place = place;
        next
    }

    fn grant(&self, copy: usize, amount: u8) -> Option<Self> {
        let grant = self.grants.len();
        if grant == GRANTS {
            return None;
        }
        let mut next = self.place(copy, Place::Waiting { grant });
        next.bucket = self.bucket.charged(amount, true)?;
        next.memory = Memory::InProgress { grant };
        let (ends_in, usable_for) = (LEASE_TIME, None);
        next.grants.push(Grant { amount, open: true, ends_in, left: 0, usable_for });
        Some(next)
    }

    /// The charge is durable: all who wait for it are told.
    fn answer(&self) -> Option<Self> {
        let Memory::InProgress { grant } = self.memory else {
            return None;
        };
        let told = match self.broken {
            Broken::JoinedInFull => LEASE_TIME,
            _ => self.grants[grant].ends_in,
        };
        let mut next = Self { memory: Memory::Answered { grant }, ..self.clone() }.forgetting();
        for copy in &mut next.copies {
            if copy.place == (Place::Waiting { grant }) {
                copy.place = Place::Answered { grant, told };
            }
        }
        Some(next)
    }

    fn deliver(&self, copy: usize) -> Option<Self> {
        let Copy { sent_ago, place: Place::Answered { grant, told } } = self.copies[copy] else {
            return None;
        };
        let mut next = self.lose(copy);
        next.answered = true;
        if !self.answered || self.broken == Broken::TakesEveryAnswer {
            let counted = match self.broken {
                Broken::CountsFromTheLast => self.last_sent_ago,
                _ if self.counts_from_the_first => self.first_sent_ago?,
                _ => sent_ago,
            };
            let lease = &mut next.grants[grant];
            lease.left += lease.amount;
            // Told nothing, it has ended, perhaps long ago.
            lease.usable_for = told.checked_sub(counted).filter(|_| told > 0);
        }
        Some(next)
    }

    /// The stream broke after the answer was sent; it may have arrived all the same.
    fn seem_undelivered(&self, copy: usize) -> Option<Self> {
        let Place::Answered { grant, .. } = self.copies[copy].place else {
            return None;
        };
        if self.broken != Broken::UndeliveredCredits || !self.grants[grant].open {
            return None;
        }
        let credited = self.grants[grant].amount;
        Some(self.end(grant, credited))
    }

    fn spend(&self, grant: usize) -> Option<Self> {
        let mut next = self.clone();
        let lease = &mut next.grants[grant];
        if lease.left == 0 || lease.usable_for.is_none() {
            return None;
        }
        lease.left -= 1;
        next.outrun.spend(1);
        Some(next)
    }

    /// What is left comes back at once: slow reports are the other world's.
    fn give_back(&self, grant: usize) -> Option<Self> {
        let Grant { open, left, amount, .. } = self.grants[grant];
        if left == 0 || !open {
            return None;
        }
        let mut next = self.end(grant, left.min(amount));
        next.grants[grant].left = 0;
        Some(next)
    }

    fn expire(&self, grant: usize) -> Option<Self> {
        let Grant { open, ends_in, .. } = self.grants[grant];
        (open && ends_in == 0).then(|| self.end(grant, 0))
    }

    fn end(&self, grant: usize, credited: u8) -> Self {
        let mut next = self.clone();
        let record = &mut next.grants[grant];
        record.open = false;
        next.bucket = self.bucket.settled(record.amount, record.amount - credited);
        next
    }

    /// Calls in progress fail, and what is on its way stays so.
    fn crash(&self) -> Self {
        let mut next = Self { crashed: true, memory: Memory::Nothing, ..self.clone() };
        next.bucket = self.bucket.recovered();
        next.copies.retain(|copy| !matches!(copy.place, Place::Waiting { .. }));
        for grant in &mut next.grants {
            grant.open = false;
        }
        next
    }
}

impl World for Request {
    type Event = Event;

    fn next(&self) -> Vec<(Event, Self)> {
        let mut next = Vec::new();
        let mut add = |event, world: Option<Self>| next.extend(world.map(|world| (event, world)));
        add(Event::Tick, Some(self.tick()));
        for tokens in 1..=BURST {
            add(Event::ChargeAnother { tokens }, self.charge_another(tokens));
        }
        add(Event::Send, self.send());
        for copy in 0..self.copies.len() {
            add(Event::Lose { copy }, Some(self.lose(copy)));
            for amount in 1..=BURST {
                add(Event::Receive { copy, amount }, self.receive(copy, amount));
            }
            add(Event::Deliver { copy }, self.deliver(copy));
            add(Event::SeemUndelivered { copy }, self.seem_undelivered(copy));
        }
        add(Event::Answer, self.answer());
        for grant in 0..self.grants.len() {
            add(Event::Spend { grant }, self.spend(grant));
            add(Event::Return { grant }, self.give_back(grant));
            add(Event::Expire { grant }, self.expire(grant));
        }
        add(Event::Crash, Some(self.crash()));
        next
    }

    fn wrong(&self) -> Option<String> {
        let widened = self.bound.widened(self.crashed, LEASE_TIME);
        let charged_twice = "one request was charged twice in one life".to_owned();
        self.charged_twice.then_some(charged_twice).or_else(|| self.outrun.wrong(widened))
    }
}

#[test]
fn a_request_sent_again_spends_no_more_than_one() {
    expect_nothing(Request::new(Broken::Nothing, Bound::Exact), 100_000);
}

#[test]
fn every_rule_is_needed() {
    use Broken::*;
    for broken in [
        JoinedInFull,
        CountsFromTheLast,
        TakesEveryAnswer,
        UndeliveredCredits,
        NotJoined,
        NotRemembered,
        RememberedTooLongInFull,
    ] {
        expect_harm(broken, Request::new(broken, Bound::Promised));
    }
    // One lease time more is what the promise allows; but it is meant for a crash.
    expect_harm(RememberedInFull, Request::new(RememberedInFull, Bound::Exact));
}

/// A lease that has ended is of no use to a caller who is told so, but it does no harm.
#[test]
fn to_remember_too_long_harms_nobody_who_is_told_what_is_left() {
    expect_nothing(Request::new(Broken::RememberedTooLong, Bound::Exact), 100_000);
}

/// A client that counts from the first copy need not be told what is left.
#[test]
fn to_count_from_the_first_copy_makes_up_for_answers_in_full() {
    for broken in [Broken::RememberedInFull, Broken::RememberedTooLongInFull, Broken::JoinedInFull]
    {
        let request = Request::new(broken, Bound::Exact);
        expect_nothing(Request { counts_from_the_first: true, ..request }, 100_000);
    }
}
