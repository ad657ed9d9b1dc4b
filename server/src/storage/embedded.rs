//! Cells in memory, in shards, and what is queued of them for the disk.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::Duration,
};

use arrayvec::ArrayVec;
use crossbeam_utils::CachePadded;
use fusebox_core::{
    Cell, Cells, Cost, Decision, Kind, MAX_RULES, Policy, Rule, Rules, Settled, Time,
};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::oneshot;

use super::{
    Answer, CellAsk, Charge, Durable, Keeping, Room, Settlement, Storage, StorageError,
    table::{Entry, Lagging, Marked, Table},
};
use crate::{
    catalogue::{Catalogue, CellId, PolicyNumber},
    limits,
    reservation::Reservation,
};

/// Cells in memory. What is to be on disk is queued for a [`Writer`](super::Writer), in its shard: there is
/// no queue, and no lock, that all callers share.
pub struct Embedded {
    shards: Box<[CachePadded<Mutex<Shard>>]>,
    live: Arc<AtomicUsize>,
    capacity: usize,
    /// Marks that wait for the writer, in all shards.
    queued: Arc<AtomicUsize>,
    /// The last round of the writer that is on disk.
    durable: AtomicU64,
    /// Wakes the writer; one waiting word is enough.
    wake: SyncSender<()>,
    /// Counts the rounds of housekeeping: each looks at the next shard.
    tended: AtomicUsize,
    /// Why nothing is decided any more.
    over: OnceLock<StorageError>,
}

#[derive(Default)]
struct Shard {
    cells: Table,
    /// Cells whose mark waits for the writer.
    queued: Vec<CellId>,
    /// Cells that the writer is to look at when it has time.
    lagging: Vec<CellId>,
    /// Who waits for marks of this shard, and maybe of others.
    waiting: Vec<Waiter>,
    /// Rounds of the writer that have taken what was queued here: the next one takes what is queued now.
    taken: u64,
    /// When a full cell last left. A caller whose clock was read before that must not find the cell fuller
    /// than it was then: it is decided as of this time.
    swept: Time,
}

/// Somebody who waits until a round of the writer is durable.
pub(super) struct Waiter {
    pub(super) round: u64,
    pub(super) told: oneshot::Sender<Result<(), StorageError>>,
}

/// What is to be on disk of a cell: its record, or none.
pub(super) struct Change {
    pub(super) id: CellId,
    pub(super) kept: Option<(PolicyNumber, Cell)>,
}

impl Embedded {
    /// No cells yet, and room for `capacity` of them. What it returns beside wakes the writer.
    pub fn new(capacity: usize) -> (Self, Receiver<()>) {
        let (wake, woken) = sync_channel(1);
        let cells = Self {
            shards: (0..limits::CELL_SHARDS).map(|_| CachePadded::default()).collect(),
            live: Arc::default(),
            capacity,
            queued: Arc::default(),
            durable: AtomicU64::new(0),
            wake,
            tended: AtomicUsize::new(0),
            over: OnceLock::new(),
        };
        (cells, woken)
    }

    /// Number of shards: as many rounds of [`tend`](Storage::tend) see every cell.
    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// Counts the marks that wait for the writer.
    pub(super) fn queued(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.queued)
    }

    /// Nothing is decided from here on; who waits is told when the last round is on disk.
    pub fn stop(&self) {
        self.end(&StorageError::Stopping);
    }

    /// Nothing is decided from here on, for this reason; if nothing is written any more, who waits is told.
    ///
    /// A caller that holds its locks now still finishes: its marks are queued, or it waits no more.
    pub(super) fn end(&self, why: &StorageError) {
        // The first reason is the one to tell.
        let _ = self.over.set(why.clone());
        if matches!(why, StorageError::Failed(_)) {
            for shard in &self.shards {
                for waiter in shard.lock().waiting.drain(..) {
                    // Who went away need not know.
                    let _ = waiter.told.send(Err(why.clone()));
                }
            }
        }
    }

    /// Everything up to this round of the writer is on disk.
    pub(super) fn set_durable(&self, round: u64) {
        self.durable.store(round, Ordering::Release);
    }

    /// What the writer's round of that number carries of one shard, and who waits for it.
    pub(super) fn take_queued(
        &self,
        shard: usize,
        round: u64,
        changes: &mut Vec<Change>,
        waiting: &mut Vec<Waiter>,
    ) {
        let mut shard = self.shards[shard].lock();
        let Shard { cells, queued, waiting: here, taken, .. } = &mut *shard;
        *taken = round;
        waiting.append(here);
        self.queued.fetch_sub(queued.len(), Ordering::Relaxed);
        for id in queued.drain(..) {
            let entry = cells.find_mut(id);
            changes.push(Change {
                id,
                kept: entry.map(|entry| {
                    entry.queued = false;
                    (entry.number, entry.kept())
                }),
            });
        }
    }

    /// What the writer's round of that number carries of one shard because it has time.
    pub(super) fn take_lagging(&self, shard: usize, round: u64, changes: &mut Vec<Change>) {
        let mut shard = self.shards[shard].lock();
        let Shard { cells, lagging, .. } = &mut *shard;
        for id in lagging.drain(..) {
            let entry = cells.find_mut(id);
            changes.push(Change {
                id,
                kept: entry.map(|entry| {
                    let lagging = std::mem::replace(&mut entry.lagging, Lagging::Not);
                    if lagging == Lagging::Lower {
                        // Until the round is durable what is on disk covers more, never less.
                        #[allow(clippy::cast_possible_truncation)]
                        entry.lower_mark(round as u32);
                    }
                    (entry.number, entry.kept())
                }),
            });
        }
    }

    /// The exact state of every cell of one shard of which something else is on disk.
    pub(super) fn exact(&self, shard: usize, mut visit: impl FnMut(CellId, PolicyNumber, Cell)) {
        for entry in self.shards[shard].lock().cells.iter() {
            if !entry.on_disk || entry.kept() != entry.cell() {
                visit(entry.id, entry.number, entry.cell());
            }
        }
    }

    /// Puts a cell that was recovered; whether its record is on disk, and is to be written again.
    pub(super) fn restore(
        &self,
        id: CellId,
        number: PolicyNumber,
        cell: Cell,
        on_disk: bool,
        rewrite: bool,
    ) {
        let mut shard = self.shards[shard_of(id)].lock();
        let entry = shard.cells.insert(Entry::new(id, number, cell));
        entry.on_disk = on_disk;
        if rewrite {
            entry.lagging = Lagging::Write;
            shard.lagging.push(id);
        }
        self.live.fetch_add(1, Ordering::Relaxed);
    }

    fn check_alive(&self) -> Result<(), StorageError> {
        self.over.get().cloned().map_or(Ok(()), Err)
    }

    /// Writes what changed to the locked shards, and queues what must be on disk before anybody is told.
    fn write(
        &self,
        locked: &mut Locked<'_>,
        changes: &Changes<'_>,
        room: Option<&mut Room>,
        now: Time,
    ) -> Result<Option<Durable>, StorageError> {
        let durable = self.durable.load(Ordering::Acquire);
        let mut kept = ArrayVec::<Kept, MAX_RULES>::new();
        kept.extend(changes.iter().map(|change| locked.keep(change, durable, now)));
        let new_marks = kept.iter().filter(|kept| matches!(kept, Kept::Queue(..))).count();
        let room = room.map(|Room { cells, marks }| (cells, marks));
        let (mut cells, mut slots) = room.unzip();
        let mut own_slots = None;
        if new_marks > 0 && slots.is_none() {
            slots = Some(own_slots.insert(self.reserve_marks(new_marks)?));
        }

        let mut last = None;
        for (change, kept) in changes.iter().zip(&kept) {
            let Shard { cells: table, queued, lagging, .. } = &mut *locked.shards[change.shard].1;
            let entry = match change.place {
                Some(place) => table.get_mut(place),
                None => {
                    take_one(cells.as_deref_mut(), &self.live);
                    table.insert(Entry::new(change.id, change.number, change.cell))
                }
            };
            entry.set_cell(change.cell);
            match kept {
                Kept::Enough => {}
                Kept::Behind if entry.lagging != Lagging::Not => {}
                Kept::Behind => {
                    (entry.lagging, entry.on_disk) = (Lagging::Write, true);
                    lagging.push(change.id);
                }
                Kept::OnItsWay(round) => last = last.max(Some((*round, change.shard))),
                Kept::Queue(marked, round) => {
                    entry.set_mark(*marked);
                    if !entry.queued {
                        entry.queued = true;
                        queued.push(change.id);
                        take_one(slots.as_deref_mut(), &self.queued);
                    }
                    last = last.max(Some((*round, change.shard)));
                }
            }
        }
        let Some((round, shard)) = last else { return Ok(None) };
        let (told, durable) = oneshot::channel();
        locked.shards[shard].1.waiting.push(Waiter { round, told });
        // If a word waits already, the writer will look at all of it.
        let _ = self.wake.try_send(());
        Ok(Some(durable))
    }

    fn reserve_marks(&self, amount: usize) -> Result<Reservation, StorageError> {
        let reserved = Reservation::of(&self.queued, amount, limits::QUEUED_MARKS);
        reserved.ok_or(StorageError::Behind(limits::QUEUED_MARKS))
    }
}

/// Counts one as taken, of what was reserved if there is some left.
fn take_one(reserved: Option<&mut Reservation>, taken: &AtomicUsize) {
    if !reserved.is_some_and(Reservation::keep_one) {
        taken.fetch_add(1, Ordering::Relaxed);
    }
}

/// A cell that changes under its shard's lock.
struct Changed<'a> {
    id: CellId,
    number: PolicyNumber,
    policy: &'a Policy,
    keeping: Keeping,
    /// The index of its shard among those that are locked, and where it is there.
    shard: usize,
    place: Option<u32>,
    cell: Cell,
}

type Changes<'a> = ArrayVec<Changed<'a>, MAX_RULES>;

/// What a changed cell needs of the disk.
enum Kept {
    /// Nothing: it is not kept, or a mark that is durable covers it.
    Enough,
    /// To be written when the writer has time.
    Behind,
    /// A round that is not durable yet carries a mark that covers it.
    OnItsWay(u64),
    /// A new mark, and the round that will carry it.
    Queue(Marked, u64),
}

/// How far the next mark of a cell runs ahead: twice as far as one that lasted for less than a second, and
/// not at all for one that nobody asked for in a while. So a hot key is written about once a second, and a
/// cold one loses nothing in a crash.
fn next_step(last: Option<Marked>, now: Time) -> u8 {
    let Some(last) = last else { return 0 };
    match Duration::from_nanos(now.nanos_since(last.mark.at())) {
        lasted if lasted < limits::MARK_LASTS => (last.step + 1).min(63),
        lasted if lasted < 10 * limits::MARK_LASTS => last.step,
        _ => 0,
    }
}

impl Storage for Embedded {
    fn apply(
        &self,
        charge: &Charge<'_>,
        room: Option<&mut Room>,
        now: Time,
        decision: &mut Decision,
    ) -> Result<Answer<()>, StorageError> {
        let mut locked = Locked::new(self, charge.asks.iter().map(|ask| ask.cell));
        self.check_alive()?;
        let now = locked.not_before_a_sweep(now);

        let mut found = ArrayVec::<Found, MAX_RULES>::new();
        let mut cells = Cells::new();
        let mut rules = Rules::new();
        for ask in charge.asks {
            let known = found.iter().position(|found| found.id == ask.cell);
            let cell = known.unwrap_or_else(|| {
                let place = locked.find(ask.cell);
                cells.push(place.cell);
                found.push(place);
                found.len() - 1
            });
            rules.push(Rule { cell, policy: ask.policy, cost: ask.cost });
        }
        let creates =
            |rule: &&Rule<'_>| cells[rule.cell].is_none() && may_create(rule.policy, rule.cost);
        if room.is_none() {
            let new = rules.iter().filter(creates).count();
            if new > 0 && self.live() + new > self.capacity {
                return Err(StorageError::Full(self.live()));
            }
        }

        fusebox_core::apply_to(decision, &rules, charge.charging, &mut cells, now);
        let mut changes = Changes::new();
        for (index, (found, after)) in found.iter().zip(&cells).enumerate() {
            let Some(cell) = after.filter(|_| *after != found.cell) else { continue };
            let Some(ask) = (rules.iter().zip(charge.asks)).find(|(rule, _)| rule.cell == index)
            else {
                continue;
            };
            changes.push(found.changed(ask.1.number, ask.1.policy, ask.1.keeping, cell));
        }
        let durable = self.write(&mut locked, &changes, room, now)?;
        Ok(Answer::new((), durable))
    }

    fn settle(
        &self,
        settlement: &Settlement<'_>,
        now: Time,
    ) -> Result<Answer<Settled<Cell>>, StorageError> {
        let mut locked = Locked::new(self, [settlement.cell]);
        self.check_alive()?;
        let now = locked.not_before_a_sweep(now);
        let found = locked.find(settlement.cell);
        let Settlement { number, policy, keeping, charged, actual, .. } = *settlement;
        let mut cell = found.cell;
        let settled = fusebox_core::settle(policy, &mut cell, charged, actual, now);
        let changed = cell.filter(|_| cell != found.cell);
        let changes =
            changed.map(|cell| found.changed(number, policy, keeping, cell)).into_iter().collect();
        let durable = self.write(&mut locked, &changes, None, now)?;
        if settled.refunded > 0 && keeping == Keeping::Marked {
            locked.lower(&found);
        }
        Ok(Answer::new(settled, durable))
    }

    fn reserve(&self, asks: &[CellAsk<'_>]) -> Result<Room, StorageError> {
        self.check_alive()?;
        let creates = |ask: &&CellAsk<'_>| may_create(ask.policy, ask.cost);
        let is_new = |ask: &&CellAsk<'_>| {
            self.shards[shard_of(ask.cell)].lock().cells.place(ask.cell).is_none()
        };
        let reserve = |new| Reservation::of(&self.live, new, self.capacity);
        // Room for all is there nearly always; only where it is not, those that live are told apart.
        let cells = reserve(asks.iter().filter(creates).count())
            .or_else(|| reserve(asks.iter().filter(creates).filter(is_new).count()));
        let marked = |ask: &&CellAsk<'_>| ask.keeping == Keeping::Marked && ask.cost.tokens > 0;
        Ok(Room {
            cells: cells.ok_or_else(|| StorageError::Full(self.live()))?,
            marks: self.reserve_marks(asks.iter().filter(marked).count())?,
        })
    }

    fn tend(&self, catalogue: &Catalogue, now: Time) {
        let next = self.tended.fetch_add(1, Ordering::Relaxed) % limits::CELL_SHARDS;
        let mut shard = self.shards[next].lock();
        let Shard { cells, lagging, swept, .. } = &mut *shard;
        let before = cells.len();
        let roomy = self.live() < self.capacity / 2;
        cells.retain(|entry| {
            let policy = catalogue.numbered(entry.number);
            let leaves_at =
                policy.map_or(Some(now), |policy| policy.settings.leaves_at(entry.cell()));
            let lingers =
                if roomy && entry.on_disk { limits::FULL_LINGERS } else { Duration::ZERO };
            let keep = leaves_at.is_none_or(|leaves_at| leaves_at.after(lingers) > now);
            if !keep && entry.on_disk && entry.lagging == Lagging::Not {
                lagging.push(entry.id);
            }
            keep
        });
        let left = before - cells.len();
        if left > 0 {
            *swept = now.max(*swept);
        }
        self.live.fetch_sub(left, Ordering::Relaxed);
    }

    fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }
}

/// The locks of the shards that some cells live in, taken in the order of the shards: two callers that
/// want the same ones never wait for each other in a circle.
struct Locked<'a> {
    shards: ArrayVec<(usize, MutexGuard<'a, Shard>), MAX_RULES>,
}

/// A cell, or the lack of one, in a locked shard.
struct Found {
    id: CellId,
    shard: usize,
    place: Option<u32>,
    cell: Option<Cell>,
}

impl Found {
    fn changed<'a>(
        &self,
        number: PolicyNumber,
        policy: &'a Policy,
        keeping: Keeping,
        cell: Cell,
    ) -> Changed<'a> {
        let Self { id, shard, place, .. } = *self;
        Changed { id, number, policy, keeping, shard, place, cell }
    }
}

impl<'a> Locked<'a> {
    fn new(storage: &'a Embedded, ids: impl IntoIterator<Item = CellId>) -> Self {
        let mut wanted: ArrayVec<usize, MAX_RULES> = ids.into_iter().map(shard_of).collect();
        wanted.sort_unstable();
        let mut shards = ArrayVec::<(usize, MutexGuard<'a, Shard>), MAX_RULES>::new();
        for index in wanted {
            if shards.last().is_none_or(|(last, _)| *last != index) {
                shards.push((index, storage.shards[index].lock()));
            }
        }
        Self { shards }
    }

    /// `now`, or the latest sweep of these shards.
    fn not_before_a_sweep(&self, now: Time) -> Time {
        self.shards.iter().fold(now, |now, (_, shard)| now.max(shard.swept))
    }

    /// Where a cell is.
    ///
    /// # Panics
    /// If its shard is not locked.
    fn find(&self, id: CellId) -> Found {
        let (wanted, mut shards) = (shard_of(id), self.shards.iter());
        let shard = shards.position(|(index, _)| *index == wanted).unwrap_or(usize::MAX);
        let cells = &self.shards[shard].1.cells;
        let place = cells.place(id);
        Found { id, shard, place, cell: place.map(|place| cells.get(place).cell()) }
    }

    /// Has the mark of a cell lowered when the writer has time: a crash must not take what came back.
    fn lower(&mut self, found: &Found) {
        let Shard { cells, lagging, .. } = &mut *self.shards[found.shard].1;
        let Some(entry) = found.place.map(|place| cells.get_mut(place)) else { return };
        if std::mem::replace(&mut entry.lagging, Lagging::Lower) == Lagging::Not {
            lagging.push(found.id);
        }
    }

    /// What a changed cell needs of the disk.
    fn keep(&self, change: &Changed<'_>, durable: u64, now: Time) -> Kept {
        match change.keeping {
            Keeping::AtStop => return Kept::Enough,
            Keeping::Behind => return Kept::Behind,
            Keeping::Marked => {}
        }
        let shard = &self.shards[change.shard].1;
        let entry = change.place.map(|place| shard.cells.get(place));
        let entry = entry.filter(|entry| entry.cell().revision == change.cell.revision);
        let last = entry.and_then(Entry::mark);
        let (limit, state) = (&change.policy.limit, change.cell.state);
        if let Some(last) = last.filter(|last| limit.covers(last.mark, state)) {
            // What is not durable is in one of the next two rounds: the one that is being written and the
            // one after it.
            #[allow(clippy::cast_possible_truncation)]
            return match last.round.wrapping_sub(durable as u32) {
                ahead @ 1..=2 => Kept::OnItsWay(durable + u64::from(ahead)),
                _ => Kept::Enough,
            };
        }
        let step = next_step(last, now);
        let tokens = if step == 0 { 0 } else { (1 << step).min(limit.max_step()) };
        let round = shard.taken + 1;
        #[allow(clippy::cast_possible_truncation)]
        let marked = Marked { mark: limit.mark(state, tokens), round: round as u32, step };
        Kept::Queue(marked, round)
    }
}

/// A peek creates nothing, and neither does what can never be granted.
fn may_create(policy: &Policy, cost: Cost) -> bool {
    (1..=policy.limit.capacity()).contains(&cost.tokens)
}

/// The id is a hash already: one half chooses the shard, the other the place in its table.
fn shard_of(id: CellId) -> usize {
    (id.0[0] >> 32) as usize % limits::CELL_SHARDS
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use fusebox_core::{Charging, Limit, TokenBucket};

    use super::*;

    const NOW: Time = Time::ZERO;

    fn policy() -> Policy {
        let bucket = TokenBucket::new(10, Duration::from_secs(1), 10).unwrap();
        Policy::new(Limit::TokenBucket(bucket), 0)
    }

    /// Asks of cells by number.
    fn asks<'a>(policy: &'a Policy, cells: &[u64], tokens: u64) -> Vec<CellAsk<'a>> {
        let ask = |cell: &u64| CellAsk {
            cell: CellId([*cell << 32, *cell]),
            number: PolicyNumber(0),
            policy,
            keeping: Keeping::AtStop,
            cost: Cost { tokens, estimated: false },
        };
        cells.iter().map(ask).collect()
    }

    fn apply(
        cells: &Embedded,
        asks: &[CellAsk<'_>],
        room: Option<&mut Room>,
        now: Time,
    ) -> Result<Decision, StorageError> {
        let charge = Charge { charging: Charging::AllOrNothing, asks };
        let mut decision = Decision::default();
        match cells.apply(&charge, room, now, &mut decision)? {
            Answer::Now(()) => Ok(decision),
            Answer::Later(..) => panic!("memory answers at once"),
        }
    }

    #[test]
    fn a_full_server_serves_live_keys_on_and_charges_nothing_for_new_ones() {
        let (policy, cells) = (policy(), Embedded::new(2).0);
        let apply = |ids: &[u64], tokens| apply(&cells, &asks(&policy, ids, tokens), None, NOW);
        assert!(apply(&[1, 2], 1).is_ok());
        assert!(matches!(apply(&[3], 1), Err(StorageError::Full(2))));
        assert!(matches!(apply(&[1, 3], 1), Err(StorageError::Full(2))));
        assert!(apply(&[3], 0).is_ok(), "a peek needs no room");
        assert_eq!(apply(&[1], 1).unwrap().verdicts[0].remaining, 8);
    }

    #[test]
    fn more_than_there_is_room_for_may_be_recovered_and_is_served() {
        let (policy, cells) = (policy(), Embedded::new(1).0);
        let state = fusebox_core::token_bucket::State { spent: 5, remainder: 0, out: 0, at: NOW };
        let cell = Cell { revision: 1, state: fusebox_core::State::TokenBucket(state) };
        for id in [1, 2] {
            cells.restore(CellId([id << 32, id]), PolicyNumber(0), cell, false, false);
        }
        let apply = |id| apply(&cells, &asks(&policy, &[id], 5), None, NOW);
        assert!(apply(1).is_ok() && apply(2).is_ok());
        assert!(cells.reserve(&asks(&policy, &[1, 2], 1)).is_ok());
        assert!(matches!(apply(3), Err(StorageError::Full(2))));
    }

    #[test]
    fn room_is_reserved_for_what_is_new_and_no_more_than_that() {
        let (policy, cells) = (policy(), Embedded::new(2).0);
        let live = asks(&policy, &[1], 1);
        let mut room = cells.reserve(&live).unwrap();
        assert!(apply(&cells, &live, Some(&mut room), NOW).is_ok());
        drop(room);
        assert_eq!(cells.live(), 1);

        assert!(cells.reserve(&asks(&policy, &[2, 3], 1)).is_err());
        let room = cells.reserve(&asks(&policy, &[1, 2], 1)).unwrap();
        assert_eq!(cells.live(), 2, "what is reserved is counted");
        assert!(cells.reserve(&asks(&policy, &[1], 1)).is_ok(), "a live key needs no room");
        assert!(cells.reserve(&asks(&policy, &[3], 0)).is_ok(), "nor does a peek");
        assert!(cells.reserve(&asks(&policy, &[3], 1)).is_err());
        drop(room);
        assert_eq!(cells.live(), 1, "and given back when it was not needed");
    }

    #[test]
    fn cells_that_are_full_leave_and_make_room() {
        let (policy, cells) = (policy(), Embedded::new(1).0);
        assert!(apply(&cells, &asks(&policy, &[1], 1), None, NOW).is_ok());
        // An empty catalogue knows no policy, so nothing holds the cell.
        for _ in 0..cells.shards() {
            cells.tend(&Catalogue::default(), NOW);
        }
        assert_eq!(cells.live(), 0);
        assert!(apply(&cells, &asks(&policy, &[2], 1), None, NOW).is_ok());
    }

    #[test]
    fn a_caller_that_is_late_does_not_find_a_swept_cell_full_before_it_was() {
        let (policy, cells) = (policy(), Embedded::new(10).0);
        let at = |millis: u64| Time::from_nanos(millis * 1_000_000);
        let apply =
            |tokens, now| apply(&cells, &asks(&policy, &[1], tokens), None, now).unwrap().allowed;
        assert!(apply(10, at(0)));
        // At 900 ms there were 9; the cell leaves at 1,000 ms, when there are 10.
        for _ in 0..cells.shards() {
            cells.tend(&Catalogue::default(), at(1_000));
        }
        assert!(apply(10, at(900)));
        assert!(!apply(1, at(1_000)), "those 10 were of 1,000 ms");
    }

    #[test]
    fn a_policy_that_denies_all_needs_no_room() {
        let (policy, cells) = (policy(), Embedded::new(1).0);
        assert!(apply(&cells, &asks(&policy, &[1], 1), None, NOW).is_ok());
        let nothing = TokenBucket::new(0, Duration::from_secs(1), 0).unwrap();
        let closed = Policy::new(Limit::TokenBucket(nothing), 0);
        assert!(apply(&cells, &asks(&closed, &[2], 1), None, NOW).is_ok(), "it is an answer");
    }
}
