//! The protocol of marks, for one cell: what is on disk is never behind what callers were told.
//!
//! One bucket of [`BURST`] tokens that refills one a tick, a writer that takes, commits and syncs, a disk
//! that may forget what was not synced, and a kill between any two steps. Judged by a ledger of the
//! charges whose ALLOW left, in true time. [`Broken`] takes out one rule at a time: without any of them
//! the search finds a history that admits too much, so each is needed and the model can tell.

use crate::search::{Found, World, search};

const BURST: u8 = 2;
/// What a mark runs ahead.
const STEP: u8 = 1;
/// Where the world ends: enough for a bucket to drain, die, refill and drain again.
const TICKS: u8 = 2;
const CHARGES: usize = 3;
const STARTS: u8 = 3;

/// A rule that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Broken {
    Nothing,
    /// An ALLOW leaves when its mark is written, not when it is synced.
    AllowBeforeSync,
    /// An ALLOW that a mark on its way covers does not wait for it.
    AllowBesideAMarkOnItsWay,
    /// A cell that leaves keeps its mark for the next one of that name.
    DeleteKeepsTheMark,
    /// A commit during a rotation goes to the old store only.
    CommitToOneStore,
    /// The switch to the fresh store is not preceded by a sync.
    SwitchBeforeSync,
    /// A rotation goes on while a clean stop writes.
    RotateWhileStopping,
    /// After a crash a fast policy's cells are full.
    FastStartsFull,
    /// What keys that are not on disk have spent is forgotten at the second start.
    EmptiedOnce,
    /// What a clean stop wrote is believed at every later start.
    BelieveForEver,
    /// A cell that was recovered has its present state for a mark: on disk it may be an older one, whose
    /// open estimates refill without the living.
    RevivedIsMarked,
    /// Cells are still charged while a clean stop writes them.
    StopWithoutSeal,
    /// A credit is given for a grant of an earlier life, of which nobody knows whether it was settled.
    CreditTheDead,
    /// A repeated report gives its credit again.
    CreditTwice,
    /// A mark that is lowered on disk still counts as what it was.
    LowerOnDiskOnly,
    /// Server time after a restart is read off the wall clock, whatever it says.
    TrustTheWall,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Bucket {
    spent: u8,
    out: u8,
    at: u8,
}

impl Bucket {
    fn full(at: u8) -> Self {
        Self { spent: 0, out: 0, at }
    }

    fn empty(at: u8) -> Self {
        Self { spent: BURST, out: 0, at }
    }

    fn refilled(self, now: u8) -> Self {
        let ticks = now.saturating_sub(self.at);
        let spent = self.spent.saturating_sub(ticks).max(self.out.min(self.spent));
        Self { spent, at: self.at.max(now), ..self }
    }

    fn covers(self, other: Self) -> bool {
        let later = self.at.max(other.at);
        let spent = |bucket: Self| Self { out: 0, ..bucket }.refilled(later).spent;
        spent(self) >= spent(other)
    }

    /// From disk, at `now`: a time to come is now, and nothing comes back.
    fn revived(self, now: u8) -> Self {
        Self { out: 0, at: self.at.min(now), ..self }.refilled(now)
    }
}

/// What is on disk of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Record {
    bucket: Bucket,
    /// The start whose clean stop wrote it; 0 is a mark.
    exact_of: u8,
}

/// One byte store: what a kill -9 leaves, and what a loss of power leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Store {
    written: Option<Record>,
    synced: Option<Record>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Class {
    /// Never written while it lives.
    Fast,
    Slow,
}

/// How far a write has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Queued,
    Taken,
    Durable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Charge {
    /// In true time.
    at: u8,
    cost: u8,
    /// What its ALLOW waits for; durable once it left. `None` if it never will.
    stage: Option<Stage>,
    /// The start that gave it, and whether it may still be settled.
    start: u8,
    open: bool,
    /// When one token of it came back, if it did, and how many charges had been made by then.
    refunded: Option<(u8, usize)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Panel {
    broken: Broken,
    /// True time, and how far the server's is behind it (or ahead, if it trusts the wall).
    now: u8,
    behind: i8,
    charges: Vec<Charge>,
    // In memory.
    alive: bool,
    start: u8,
    class: Class,
    cell: Option<Bucket>,
    /// What a key that is not in memory is; full if none.
    absent: Option<Bucket>,
    mark: Option<(Bucket, Stage)>,
    queued: bool,
    /// Some of what the mark covers came back.
    lowered: bool,
    taken: Option<Option<Record>>,
    committed: bool,
    sealed: bool,
    // On disk.
    store: Store,
    fresh: Option<Store>,
    stored_class: Class,
    stored_absent: Option<Bucket>,
    clean_stop_of: u8,
    /// The highest start on disk, and server time at the last commit with the true time of it.
    last_start: u8,
    clocks: (u8, u8),
}

#[derive(Clone, Debug)]
#[allow(dead_code)] // they are told by `Debug`
enum Event {
    Tick,
    Charge {
        cost: u8,
        estimated: bool,
    },
    Refund {
        again: bool,
    },
    Sweep,
    Take,
    TakeLowered,
    Commit,
    Sync,
    BeginRotation,
    Switch,
    Seal,
    WriteExact,
    WriteCleanStop,
    Restart {
        synced_only: bool,
        wall_went_back: bool,
        wall_went_on: bool,
        turns: bool,
        killed_before_ready: bool,
    },
}

impl Panel {
    fn new(broken: Broken, class: Class) -> Self {
        Self {
            broken,
            now: 0,
            behind: 0,
            charges: Vec::new(),
            alive: true,
            start: 1,
            class,
            cell: None,
            absent: None,
            mark: None,
            queued: false,
            lowered: false,
            taken: None,
            committed: false,
            sealed: false,
            store: Store::default(),
            fresh: None,
            stored_class: class,
            stored_absent: None,
            clean_stop_of: 0,
            last_start: 1,
            clocks: (0, 0),
        }
    }

    fn server_now(&self) -> u8 {
        u8::try_from(i16::from(self.now) - i16::from(self.behind)).unwrap_or(0)
    }

    fn state(&self) -> Bucket {
        let now = self.server_now();
        self.cell.or(self.absent).unwrap_or(Bucket::full(now)).refilled(now)
    }

    fn charge(&self, cost: u8, estimated: bool) -> Option<Self> {
        let before = self.state();
        let may = !self.sealed || self.broken == Broken::StopWithoutSeal;
        if !may || before.spent + cost > BURST || self.charges.len() == CHARGES {
            return None;
        }
        let mut next = self.clone();
        let out = before.out + if estimated { cost } else { 0 };
        let cell = Bucket { spent: before.spent + cost, out, ..before };
        next.cell = Some(cell);
        let stage = match (self.class, self.mark) {
            (Class::Fast, _) => Stage::Durable,
            (Class::Slow, Some((mark, stage))) if mark.covers(cell) => match self.broken {
                Broken::AllowBesideAMarkOnItsWay => Stage::Durable,
                _ => stage,
            },
            (Class::Slow, _) => {
                let spent = (cell.spent + STEP).min(BURST).max(cell.spent);
                next.mark = Some((Bucket { spent, out: 0, ..cell }, Stage::Queued));
                next.queued = true;
                Stage::Queued
            }
        };
        let (at, start) = (self.now, self.start);
        let charge =
            Charge { at, cost, stage: Some(stage), start, open: estimated, refunded: None };
        next.charges.push(charge);
        Some(next)
    }

    /// One token of the latest estimate comes back.
    fn refund(&self, again: bool) -> Option<Self> {
        let reported = |charge: &&mut Charge| {
            charge.stage == Some(Stage::Durable) && charge.open != again && {
                again == charge.refunded.is_some()
            }
        };
        if self.sealed {
            return None;
        }
        let mut next = self.clone();
        let state = self.state();
        let charge = next.charges.iter_mut().rev().find(reported)?;
        let first = charge.open;
        charge.open = false;
        let living = charge.start == self.start;
        let credited = match self.broken {
            Broken::CreditTheDead => first || !living,
            Broken::CreditTwice => living,
            _ => first && living,
        };
        if !credited {
            return Some(next);
        }
        if first {
            charge.refunded = Some((self.now, self.charges.len()));
        }
        let out = state.out.saturating_sub(charge.cost);
        let spent = state.spent - 1.min(state.spent.saturating_sub(out));
        next.cell = Some(Bucket { spent, out, ..state });
        next.lowered = self.class == Class::Slow;
        Some(next)
    }

    /// The writer takes the present state for a mark, now or with what is queued.
    fn take_lowered(&self) -> Option<Self> {
        let cell = self.cell.filter(|_| self.lowered && self.taken.is_none())?;
        let mut next = self.take().unwrap_or_else(|| self.clone());
        let bucket = Bucket { out: 0, ..cell };
        if self.broken != Broken::LowerOnDiskOnly {
            next.mark = Some((bucket, Stage::Taken));
        }
        next.taken = Some(Some(Record { bucket, exact_of: 0 }));
        next.lowered = false;
        Some(next)
    }

    /// A full cell leaves memory and disk.
    fn sweep(&self) -> Option<Self> {
        let cell = self.cell?.refilled(self.server_now());
        let absent_is_full = self.absent.is_none_or(|b| b.refilled(self.server_now()).spent == 0);
        if cell.spent > 0 || cell.out > 0 || !absent_is_full {
            return None;
        }
        let mut next = self.clone();
        next.cell = None;
        if self.broken != Broken::DeleteKeepsTheMark {
            next.mark = None;
        }
        next.queued = self.class == Class::Slow;
        next.lowered = false;
        Some(next)
    }

    fn take(&self) -> Option<Self> {
        if !self.queued || self.taken.is_some() {
            return None;
        }
        let mut next = self.clone();
        let mark = self.cell.and(self.mark);
        next.taken = Some(mark.map(|(bucket, _)| Record { bucket, exact_of: 0 }));
        next.queued = false;
        if let Some((_, stage @ Stage::Queued)) = &mut next.mark {
            *stage = Stage::Taken;
        }
        next.move_on(Stage::Queued, Stage::Taken);
        Some(next)
    }

    fn commit(&self) -> Option<Self> {
        let record = self.taken.filter(|_| !self.committed)?;
        let mut next = self.clone();
        next.committed = true;
        next.store.written = record;
        if let Some(fresh) = next.fresh.as_mut().filter(|_| self.broken != Broken::CommitToOneStore)
        {
            fresh.written = record;
        }
        if self.broken == Broken::AllowBeforeSync {
            next.move_on(Stage::Taken, Stage::Durable);
        }
        Some(next)
    }

    fn sync(&self) -> Option<Self> {
        if !self.committed {
            return None;
        }
        let mut next = self.clone();
        next.store.synced = next.store.written;
        (next.taken, next.committed) = (None, false);
        next.clocks = (self.server_now(), self.now);
        if let Some((_, stage @ Stage::Taken)) = &mut next.mark {
            *stage = Stage::Durable;
        }
        next.move_on(Stage::Taken, Stage::Durable);
        Some(next)
    }

    fn move_on(&mut self, from: Stage, to: Stage) {
        for charge in self.charges.iter_mut().filter(|charge| charge.stage == Some(from)) {
            charge.stage = Some(to);
        }
    }

    /// The fresh store has a copy of what is written; it may be copied before or after any commit.
    fn begin_rotation(&self) -> Option<Self> {
        let mut next = self.clone();
        let stopping = self.sealed && self.broken != Broken::RotateWhileStopping;
        if self.fresh.is_some() || self.committed || stopping {
            return None;
        }
        next.fresh = Some(Store { written: self.store.written, synced: None });
        Some(next)
    }

    fn switch(&self) -> Option<Self> {
        // Between two commits only: the writer does one thing at a time.
        let mut fresh = self.fresh.filter(|_| !self.committed)?;
        if self.broken != Broken::SwitchBeforeSync {
            fresh.synced = fresh.written;
        }
        let mut next = self.clone();
        (next.store, next.fresh) = (fresh, None);
        Some(next)
    }

    /// Nothing is charged from here on, and a rotation is given up.
    fn seal(&self) -> Option<Self> {
        let idle = self.taken.is_none() && !self.queued && !self.lowered && !self.sealed;
        let fresh = self.fresh.filter(|_| self.broken == Broken::RotateWhileStopping);
        idle.then(|| Self { sealed: true, fresh, ..self.clone() })
    }

    fn write_exact(&self) -> Option<Self> {
        let cell = self.cell.filter(|_| self.sealed && self.taken.is_none())?;
        let exact = Some(Record { bucket: cell, exact_of: self.start });
        let written = self.store.written == exact;
        let store = Store { written: exact, synced: exact };
        let clocks = (self.server_now(), self.now);
        (!written).then(|| Self { store, clocks, ..self.clone() })
    }

    fn write_clean_stop(&self) -> Option<Self> {
        let all = self.cell.is_none_or(|cell| {
            self.store.synced == Some(Record { bucket: cell, exact_of: self.start })
        });
        let again = self.clean_stop_of == self.start;
        (self.sealed && all && !again).then(|| Self {
            clean_stop_of: self.start,
            clocks: (self.server_now(), self.now),
            ..self.clone()
        })
    }

    /// A kill, and a start that may itself be killed when its first commit is durable.
    fn restart(
        &self,
        synced_only: bool,
        (went_back, went_on): (bool, bool),
        turns: bool,
        killed_before_ready: bool,
    ) -> Option<Self> {
        if self.start == STARTS {
            return None;
        }
        let mut next = self.clone();
        // Who waited is never told.
        for charge in next.charges.iter_mut().filter(|charge| charge.stage != Some(Stage::Durable))
        {
            charge.stage = None;
            charge.open = false;
        }
        if synced_only {
            next.store.written = next.store.synced;
        }
        next.store.synced = next.store.written;
        (next.fresh, next.taken, next.committed) = (None, None, false);
        (next.alive, next.sealed) = (true, false);
        (next.queued, next.lowered) = (false, false);
        (next.mark, next.cell) = (None, None);

        // Time goes on by as much as the wall clock says, never back.
        let (server, wall) = self.clocks;
        let away = if went_back { 0 } else { self.now - wall };
        let mut server_now = server + away;
        if went_on && self.broken == Broken::TrustTheWall {
            // Not of the failure table's step forward, but of a clock that is read alone.
            server_now = self.now + BURST;
        }
        next.behind = i8::try_from(i16::from(self.now) - i16::from(server_now)).unwrap();

        let believed = match self.broken {
            Broken::BelieveForEver => self.clean_stop_of > 0,
            _ => self.clean_stop_of == self.last_start && self.clean_stop_of > 0,
        };
        let was = self.stored_class;
        next.class = match (was, turns) {
            (class, false) => class,
            (Class::Fast, true) => Class::Slow,
            (Class::Slow, true) => Class::Fast,
        };
        let emptied = was == Class::Fast && !believed && self.broken != Broken::FastStartsFull;
        let absent = if emptied { Some(Bucket::empty(server_now)) } else { self.stored_absent };
        next.absent = absent.map(|bucket| bucket.revived(server_now));
        let record = self.store_after(synced_only);
        next.cell = record.and_then(|record| {
            let exact = record.exact_of > 0
                && match self.broken {
                    Broken::BelieveForEver => believed,
                    _ => believed && record.exact_of == self.last_start,
                };
            match (was, exact) {
                // Open estimates go on as well: their grants were written beside.
                (_, true) => {
                    let at = record.bucket.at.min(server_now);
                    Some(Bucket { at, ..record.bucket }.refilled(server_now))
                }
                (Class::Slow, false) => Some(record.bucket.revived(server_now)),
                (Class::Fast, false) => None,
            }
        });

        // First commit: the number of the start, no clean stop any more, and what absent keys are.
        next.start = self.last_start + 1;
        next.last_start = next.start;
        if self.broken != Broken::BelieveForEver {
            next.clean_stop_of = 0;
        }
        next.clocks = (server_now, self.now);
        next.stored_absent = match self.broken {
            Broken::EmptiedOnce => None,
            _ => next.absent,
        };
        // One that turns slow is so at once: what a clean stop wrote of its cells is as good as a mark.
        next.stored_class = next.class;
        if believed && record.is_some_and(|record| record.exact_of > 0) {
            // Grants of estimates that go on are of this life now.
            let start = next.start;
            for charge in next.charges.iter_mut().filter(|charge| charge.start == self.last_start) {
                charge.start = start;
            }
        }
        if killed_before_ready {
            // Nothing was answered; the next start finds what is on disk.
            (next.cell, next.alive) = (None, false);
            return Some(next);
        }
        if self.broken == Broken::RevivedIsMarked {
            next.mark = next.cell.map(|bucket| (bucket, Stage::Durable));
        }
        Some(next)
    }

    fn store_after(&self, synced_only: bool) -> Option<Record> {
        if synced_only { self.store.synced } else { self.store.written }
    }
}

impl World for Panel {
    type Event = Event;

    fn next(&self) -> Vec<(Event, Self)> {
        let mut next = Vec::new();
        let mut add = |event, panel: Option<Self>| next.extend(panel.map(|panel| (event, panel)));
        add(Event::Tick, (self.now < TICKS).then(|| Self { now: self.now + 1, ..self.clone() }));
        if self.alive {
            for (cost, estimated) in [(1, false), (2, false), (2, true)] {
                add(Event::Charge { cost, estimated }, self.charge(cost, estimated));
            }
            add(Event::Refund { again: false }, self.refund(false));
            add(Event::Refund { again: true }, self.refund(true));
            add(Event::Sweep, self.sweep());
            add(Event::Take, self.take());
            add(Event::TakeLowered, self.take_lowered());
            add(Event::Commit, self.commit());
            add(Event::Sync, self.sync());
            add(Event::BeginRotation, self.begin_rotation());
            add(Event::Switch, self.switch());
            add(Event::Seal, self.seal());
            add(Event::WriteExact, self.write_exact());
            add(Event::WriteCleanStop, self.write_clean_stop());
        }
        for synced_only in [false, true] {
            for wall in [(false, false), (true, false), (false, true)] {
                if wall.1 && self.broken != Broken::TrustTheWall {
                    continue;
                }
                for (turns, killed_before_ready) in
                    [(false, false), (true, false), (false, true), (true, true)]
                {
                    let event = Event::Restart {
                        synced_only,
                        wall_went_back: wall.0,
                        wall_went_on: wall.1,
                        turns,
                        killed_before_ready,
                    };
                    add(event, self.restart(synced_only, wall, turns, killed_before_ready));
                }
            }
        }
        next
    }

    fn wrong(&self) -> Option<String> {
        let mut ideal = Bucket::full(0);
        for (index, charge) in self.charges.iter().enumerate() {
            let credits = self.charges.iter().filter_map(|charge| charge.refunded);
            for (at, _) in credits.filter(|(_, position)| *position == index) {
                ideal = ideal.refilled(at);
                ideal.spent = ideal.spent.saturating_sub(1);
            }
            if charge.stage == Some(Stage::Durable) {
                ideal = ideal.refilled(charge.at);
                ideal.spent += charge.cost;
            }
            if ideal.spent > BURST {
                return Some(format!("{} spent of {BURST} at {}", ideal.spent, charge.at));
            }
        }
        None
    }
}

#[test]
fn no_history_admits_more_than_the_limit() {
    let mut worlds_in_all = 0;
    for class in [Class::Slow, Class::Fast] {
        match search(Panel::new(Broken::Nothing, class)) {
            Found::Nothing { worlds } => worlds_in_all += worlds,
            Found::Wrong { events, why } => panic!("{why} after {events:#?}"),
        }
    }
    println!("{worlds_in_all} worlds");
    assert!(worlds_in_all > 100_000, "the search ended early: {worlds_in_all} worlds");
}

#[test]
fn every_rule_is_needed() {
    use Broken::*;
    for broken in [
        AllowBeforeSync,
        AllowBesideAMarkOnItsWay,
        DeleteKeepsTheMark,
        CommitToOneStore,
        SwitchBeforeSync,
        RotateWhileStopping,
        FastStartsFull,
        EmptiedOnce,
        BelieveForEver,
        RevivedIsMarked,
        StopWithoutSeal,
        CreditTheDead,
        CreditTwice,
        LowerOnDiskOnly,
        TrustTheWall,
    ] {
        let found = [Class::Slow, Class::Fast].map(|class| search(Panel::new(broken, class)));
        let wrong = found.iter().any(|found| matches!(found, Found::Wrong { .. }));
        assert!(wrong, "{broken:?} harms nobody: {found:?}");
    }
}
