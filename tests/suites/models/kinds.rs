//! Marks of windows, sliding windows and permits: the protocol of [`marks`](crate::marks), in short, around
//! the core's own cells.
//!
//! A cell of [`LIMIT`] tokens, a writer, a disk that may forget what was not synced, a wall clock that steps
//! back, and a kill between any two steps. Judged by a ledger of what callers were told, in true time.

use std::{
    hash::{Hash, Hasher},
    time::Duration,
};

use fusebox_core::{
    Admission, Ask, Cell, Concurrency, Kind, Limit, Mark, Moment, Policy, Purpose, Settlement,
    SlidingWindow, State, Time, Wall, WindowLimit,
};

use crate::search::{Found, World, search};

const LIMIT: u64 = 2;
/// What a mark runs ahead.
const STEP: u64 = 1;
/// Where the world ends: what was charged at its begin has left by then, or expired.
const TICKS: u64 = 2;
const CHARGES: usize = 3;
/// What the wall clock shows at first, in ticks: in the middle of a window.
const WALL: u64 = 101;

/// A rule that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Broken {
    Nothing,
    /// An ALLOW leaves when its mark is written, not when it is synced.
    AllowBeforeSync,
    /// A mark of a slice that has gone still counts.
    OldMarksCover,
    /// A cell that leaves keeps its mark for the next one of that name.
    DeleteKeepsTheMark,
    /// What comes back goes into the newest slice, whichever was charged.
    RefundIntoTheNewest,
    /// A window that the clock says has yet to begin is dropped.
    DropsWhatIsToCome,
    /// After a crash the permits that nobody has a name for are free.
    PermitsAreForgotten,
    /// Permits without a name are held for as long as the last start said, not this one.
    PermitsExpireWithTheFirstStart,
    /// Who tells of a permit after a crash is given one more.
    AttestingAdds,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Counts {
    Window,
    SlidingWindow,
    Permits,
}

impl Counts {
    /// Each window, stretch or life of a permit is less than two ticks, or just two.
    fn limit(self) -> Limit {
        match self {
            Self::Window => {
                Limit::Window(WindowLimit::fixed(LIMIT, Duration::from_nanos(2)).unwrap())
            }
            // A tick is four slices: what was charged two ticks ago has left.
            Self::SlidingWindow => {
                Limit::SlidingWindow(SlidingWindow::new(LIMIT, Duration::from_nanos(6)).unwrap())
            }
            Self::Permits => {
                Limit::Concurrency(Concurrency::new(LIMIT, Duration::from_millis(100)).unwrap())
            }
        }
    }

    /// Permits that a crash forgot are there in two ways: in a mark, and by themselves.
    fn starts(self) -> u8 {
        if self == Self::Permits { 3 } else { 2 }
    }

    fn tick(self) -> u64 {
        match self {
            Self::Window => 1,
            Self::SlidingWindow => 4,
            Self::Permits => 50_000_000,
        }
    }
}

/// A cell's state, as something that can be looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kept(State);

impl Hash for Kept {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        match self.0 {
            State::Window(state) => (state.spent, state.start, state.end, state.since).hash(hasher),
            State::SlidingWindow(state) => (state.counts, state.newest()).hash(hasher),
            State::Concurrency(state) => (state.held, state.anonymous, state.until).hash(hasher),
            State::TokenBucket(_) | State::RetryBudget(_) => {}
        }
    }
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
    at: u64,
    /// What of it stands.
    cost: u64,
    slice: u64,
    /// What its ALLOW waits for; `None` if it never leaves.
    stage: Option<Stage>,
    /// The start that may still settle it, or knows of the permit.
    start: u8,
    open: bool,
    /// When a permit expires for its holder.
    until: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Panel {
    broken: Broken,
    counts: Counts,
    /// True time, the server's, and that on the wall.
    now: u64,
    time: u64,
    wall: u64,
    /// What was on the wall when a full cell last left: none is found fuller than it was then.
    swept_wall: u64,
    charges: Vec<Charge>,
    start: u8,
    cell: Option<Kept>,
    mark: Option<(u64, Time, Stage)>,
    queued: bool,
    lowered: bool,
    taken: Option<Option<Kept>>,
    committed: bool,
    written: Option<Kept>,
    synced: Option<Kept>,
    /// Server time and the wall clock at the last commit that is written, and that is synced; the wall clock is
    /// not before a sweep.
    written_at: (u64, u64),
    synced_at: (u64, u64),
}

#[derive(Clone, Debug)]
#[allow(dead_code)] // they are told by `Debug`
enum Event {
    Tick,
    WallGoesBack,
    Charge { cost: u64 },
    Settle,
    Attest,
    Sweep,
    Take,
    TakeLowered,
    Commit,
    Sync,
    Restart { synced_only: bool },
}

impl Panel {
    fn new(broken: Broken, counts: Counts) -> Self {
        Self {
            broken,
            counts,
            now: 0,
            time: 0,
            wall: WALL,
            swept_wall: 0,
            charges: Vec::new(),
            start: 1,
            cell: None,
            mark: None,
            queued: false,
            lowered: false,
            taken: None,
            committed: false,
            written: None,
            synced: None,
            written_at: (0, WALL),
            synced_at: (0, WALL),
        }
    }

    fn moment(&self) -> Moment {
        let tick = self.counts.tick();
        Moment {
            time: Time::from_nanos(self.time * tick),
            wall: Wall::from_nanos(self.wall.max(self.swept_wall) * tick),
        }
    }

    fn state(&self) -> Option<State> {
        self.cell.map(|Kept(state)| state).filter(|state| match state {
            State::Window(window) if self.broken == Broken::DropsWhatIsToCome => {
                window.start <= self.moment().wall
            }
            _ => true,
        })
    }

    /// Time passes; permits that expire are released at once.
    fn tick(&self) -> Option<Self> {
        let mut next = self.clone();
        (next.now, next.time, next.wall) = (self.now + 1, self.time + 1, self.wall + 1);
        if self.counts == Counts::Permits {
            for index in 0..next.charges.len() {
                let charge = next.charges[index];
                if charge.open && charge.start == self.start && charge.until <= next.now {
                    next = next.settled(index)?;
                }
            }
        }
        (self.now < TICKS).then_some(next)
    }

    /// By a tick, once: with more it may be held for longer than this world lasts. Only windows look at it.
    fn wall_goes_back(&self) -> Option<Self> {
        let never_did = self.wall == WALL + self.now && self.counts == Counts::Window;
        never_did.then(|| Self { wall: self.wall - 1, ..self.clone() })
    }

    fn charge(&self, cost: u64) -> Option<Self> {
        let purpose = match self.counts {
            Counts::Permits => Purpose::Spend,
            _ => Purpose::Estimate,
        };
        let limit = self.counts.limit();
        let plan = limit.plan(self.state(), Ask::spend(cost).to(purpose), self.moment());
        if plan.admission != Admission::Allow || self.charges.len() == CHARGES {
            return None;
        }
        let mut next = self.clone();
        let stage = Some(next.change(plan.charged?));
        let (at, until) = (self.now, self.now + 2);
        let (slice, start) = (plan.slice, self.start);
        next.charges.push(Charge { at, cost, slice, stage, start, open: true, until });
        Some(next)
    }

    /// The cell after a change, and what its answer waits for.
    fn change(&mut self, state: State) -> Stage {
        let limit = self.counts.limit();
        let before = self.cell.map_or(state, |Kept(state)| state);
        self.cell = Some(Kept(state));
        if let Some((spent, at, stage)) = self.mark {
            let mark = Mark { spent, at };
            let of_old =
                self.broken == Broken::OldMarksCover && mark.spent >= state.lowest_mark(at).spent;
            if of_old || limit.covers(mark, before, state) {
                return stage;
            }
        }
        let mark = limit.mark(state, STEP, self.moment());
        self.mark = Some((mark.spent, mark.at, Stage::Queued));
        self.queued = true;
        Stage::Queued
    }

    /// The oldest that may be settled: a token of an estimate comes back, or a permit is released.
    fn settle(&self) -> Option<Self> {
        let open = |charge: &Charge| {
            charge.open && charge.stage == Some(Stage::Durable) && charge.start == self.start
        };
        self.settled(self.charges.iter().position(open)?)
    }

    fn settled(&self, index: usize) -> Option<Self> {
        let mut next = self.clone();
        let charge = &mut next.charges[index];
        let newest = || {
            let peek = self.counts.limit().plan(self.state(), Ask::spend(0), self.moment());
            peek.slice
        };
        let refunds_anew = self.broken == Broken::RefundIntoTheNewest;
        let settlement = Settlement {
            charged: charge.cost,
            told: 0,
            actual: if self.counts == Counts::Permits { 0 } else { charge.cost - 1 },
            partial: false,
            slice: Some(if refunds_anew { newest() } else { charge.slice }),
            window: None,
            max_debt: 0,
        };
        let settled = self.counts.limit().settle(self.state(), settlement, self.moment());
        charge.open = false;
        // Its caller has given it back, whether or not anybody has it back.
        charge.cost = settlement.actual;
        if let Some(state) = settled.state.filter(|_| settled.refunded > 0) {
            next.change(state);
            next.lowered = true;
        }
        Some(next)
    }

    /// A holder that a crash forgot tells of its permit.
    fn attest(&self) -> Option<Self> {
        let forgotten = |charge: &Charge| {
            charge.open && charge.stage == Some(Stage::Durable) && charge.start < self.start
        };
        let index = self.charges.iter().position(forgotten)?;
        let permits = self.charges[index].cost;
        if self.counts != Counts::Permits || self.charges[index].until <= self.now {
            return None;
        }
        let cell = Cell { revision: 1, state: self.state()? };
        let policy = Policy::new(self.counts.limit(), 0);
        let attested = policy.attested(cell, permits, self.moment())?;
        let mut next = self.clone();
        let state = match (attested.state, cell.state) {
            (State::Concurrency(mut after), State::Concurrency(before))
                if self.broken == Broken::AttestingAdds =>
            {
                after.anonymous = before.anonymous;
                State::Concurrency(after)
            }
            (state, _) => state,
        };
        let stage = next.change(state);
        let charge = &mut next.charges[index];
        // Its new life begins once that is told; until then it ends as it would have.
        (charge.start, charge.stage) = (self.start, Some(stage));
        charge.until = self.now + 2;
        Some(next)
    }

    /// A full cell leaves memory and disk.
    fn sweep(&self) -> Option<Self> {
        let full_at = self.counts.limit().full_at(self.cell?.0, self.moment())?;
        if full_at > self.moment().time {
            return None;
        }
        let mut next = self.clone();
        next.cell = None;
        if self.broken != Broken::DeleteKeepsTheMark {
            next.mark = None;
        }
        (next.queued, next.lowered) = (true, false);
        next.swept_wall = self.wall.max(self.swept_wall);
        Some(next)
    }

    fn take(&self) -> Option<Self> {
        if !self.queued || self.taken.is_some() {
            return None;
        }
        let mut next = self.clone();
        next.taken = Some(self.record());
        next.queued = false;
        next.move_on(Stage::Queued, Stage::Taken);
        Some(next)
    }

    /// The writer takes the present state for a mark, now or with what is queued.
    fn take_lowered(&self) -> Option<Self> {
        let Kept(state) = self.cell.filter(|_| self.lowered && self.taken.is_none())?;
        let mut next = self.take().unwrap_or_else(|| self.clone());
        let mark = state.lowest_mark(self.moment().time);
        next.mark = Some((mark.spent, mark.at, Stage::Taken));
        next.taken = Some(next.record());
        next.lowered = false;
        Some(next)
    }

    /// What is to be on disk of the cell.
    fn record(&self) -> Option<Kept> {
        let (Kept(state), (spent, at, _)) = self.cell.zip(self.mark)?;
        Some(Kept(state.kept(Mark { spent, at })))
    }

    fn commit(&self) -> Option<Self> {
        let written = self.taken.filter(|_| !self.committed)?;
        let written_at = (self.time, self.wall.max(self.swept_wall));
        let mut next = Self { written, written_at, committed: true, ..self.clone() };
        if self.broken == Broken::AllowBeforeSync {
            next.move_on(Stage::Taken, Stage::Durable);
        }
        Some(next)
    }

    fn sync(&self) -> Option<Self> {
        let synced = self.committed.then_some(self.written)?;
        let synced_at = self.written_at;
        let mut next = Self { synced, synced_at, taken: None, committed: false, ..self.clone() };
        next.move_on(Stage::Taken, Stage::Durable);
        Some(next)
    }

    fn move_on(&mut self, from: Stage, to: Stage) {
        if let Some((.., stage)) = self.mark.as_mut().filter(|mark| mark.2 == from) {
            *stage = to;
        }
        for charge in self.charges.iter_mut().filter(|charge| charge.stage == Some(from)) {
            charge.stage = Some(to);
        }
    }

    /// A kill, and a start that goes on with what is on disk.
    fn restart(&self, synced_only: bool) -> Option<Self> {
        if self.start == self.counts.starts() {
            return None;
        }
        let mut next = self.clone();
        let is_told = |charge: &&mut Charge| charge.stage != Some(Stage::Durable);
        for charge in next.charges.iter_mut().filter(is_told) {
            (charge.stage, charge.open) = (None, false);
        }
        let record = if synced_only { self.synced } else { self.written };
        (next.written, next.synced) = (record, record);
        (next.taken, next.committed, next.mark) = (None, false, None);
        (next.queued, next.lowered) = (false, false);
        next.start = self.start + 1;
        let (time, wall) = if synced_only { self.synced_at } else { self.written_at };
        next.time = time + self.wall.saturating_sub(wall);
        next.swept_wall = wall;
        next.written_at = (next.time, next.wall.max(wall));
        next.synced_at = next.written_at;
        let limit = self.counts.limit();
        next.cell = record.map(|Kept(state)| {
            let revived = limit.revive(state, 0, next.moment());
            Kept(match (revived, state) {
                (State::Concurrency(mut revived), State::Concurrency(state)) => {
                    match self.broken {
                        Broken::PermitsAreForgotten => revived.anonymous = 0,
                        Broken::PermitsExpireWithTheFirstStart if !state.until.eq(&Time::ZERO) => {
                            revived.until = state.until;
                        }
                        _ => {}
                    }
                    State::Concurrency(revived)
                }
                (revived, _) => revived,
            })
        });
        // Permits without a name are counted apart on disk from here on.
        if self.counts == Counts::Permits {
            (next.written, next.synced) = (next.cell, next.cell);
        }
        Some(next)
    }

    fn told(&self) -> impl Iterator<Item = &Charge> {
        self.charges.iter().filter(|charge| charge.stage == Some(Stage::Durable))
    }
}

impl World for Panel {
    type Event = Event;

    fn next(&self) -> Vec<(Event, Self)> {
        let mut next = Vec::new();
        let mut add = |event, panel: Option<Self>| next.extend(panel.map(|panel| (event, panel)));
        add(Event::Tick, self.tick());
        add(Event::WallGoesBack, self.wall_goes_back());
        for cost in 1..=LIMIT {
            add(Event::Charge { cost }, self.charge(cost));
        }
        add(Event::Settle, self.settle());
        add(Event::Attest, self.attest());
        add(Event::Sweep, self.sweep());
        add(Event::Take, self.take());
        add(Event::TakeLowered, self.take_lowered());
        add(Event::Commit, self.commit());
        add(Event::Sync, self.sync());
        for synced_only in [false, true] {
            add(Event::Restart { synced_only }, self.restart(synced_only));
        }
        next
    }

    fn wrong(&self) -> Option<String> {
        let most = |spent: u64, what: &str| {
            (spent > LIMIT).then(|| format!("{spent} of {LIMIT} in {what}"))
        };
        match self.counts {
            // Its slice is its end.
            Counts::Window => self.told().find_map(|one| {
                let in_it = self.told().filter(|charge| charge.slice == one.slice);
                most(in_it.map(|charge| charge.cost).sum(), "a window")
            }),
            // Six of the eight nanoseconds of two ticks.
            Counts::SlidingWindow => (0..=self.now).find_map(|end| {
                let in_it = self.told().filter(|charge| (charge.at..=charge.at + 1).contains(&end));
                most(in_it.map(|charge| charge.cost).sum(), "two ticks")
            }),
            Counts::Permits => {
                let out = self.told().filter(|charge| charge.open && charge.until > self.now);
                most(out.map(|charge| charge.cost).sum(), "permits").or_else(|| self.miscounted())
            }
        }
    }
}

impl Panel {
    /// A cell holds what the grants of this start do, and all of it is no more than there is.
    fn miscounted(&self) -> Option<String> {
        let Some(Kept(State::Concurrency(state))) = self.cell else { return None };
        let known = self.charges.iter().filter(|charge| charge.open && charge.start == self.start);
        let known: u64 = known.map(|charge| charge.cost).sum();
        if state.held != known {
            return Some(format!("{} held, and {known} are known", state.held));
        }
        let taken = self.counts.limit().spent(State::Concurrency(state), self.moment());
        (taken > LIMIT).then(|| format!("{taken} of {LIMIT} taken"))
    }
}

#[test]
fn no_history_of_any_kind_admits_more_than_the_limit() {
    for counts in [Counts::Window, Counts::SlidingWindow, Counts::Permits] {
        match search(Panel::new(Broken::Nothing, counts)) {
            Found::Nothing { worlds } => {
                println!("{counts:?}: {worlds} worlds");
                assert!(worlds > 10_000, "the search ended early: {worlds} worlds");
            }
            Found::Wrong { events, why } => panic!("{counts:?}: {why} after {events:#?}"),
        }
    }
}

#[test]
fn every_rule_is_needed() {
    use Broken::*;
    for (broken, counts) in [
        (AllowBeforeSync, Counts::Window),
        (AllowBeforeSync, Counts::SlidingWindow),
        (AllowBeforeSync, Counts::Permits),
        (OldMarksCover, Counts::Window),
        (OldMarksCover, Counts::SlidingWindow),
        (DeleteKeepsTheMark, Counts::Permits),
        (RefundIntoTheNewest, Counts::Window),
        (RefundIntoTheNewest, Counts::SlidingWindow),
        (DropsWhatIsToCome, Counts::Window),
        (PermitsAreForgotten, Counts::Permits),
        (PermitsExpireWithTheFirstStart, Counts::Permits),
        (AttestingAdds, Counts::Permits),
    ] {
        if let Found::Nothing { worlds } = search(Panel::new(broken, counts)) {
            panic!("{broken:?} harms nobody of {counts:?} in {worlds} worlds");
        }
    }
}
