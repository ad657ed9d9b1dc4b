//! Cells in memory, in shards, and what is queued of them for the disk.

use std::{
    collections::HashSet,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::Duration,
};

use arrayvec::ArrayVec;
use crossbeam_utils::CachePadded;
use fusebox_core::{Cell, Cells, Kind, MAX_RULES, Moment, Purpose, Rule, Rules, Settled};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::oneshot;

use super::{
    Answer, CellAsk, Charge, Charged, Decided, Durable, Judge, Keeping, Room, Settlement, Storage,
    StorageError,
    journal::Write,
    table::{Entry, Lagging, Marked, Table},
};
use crate::{
    catalogue::{Catalogue, CellId, Limiter, LimiterNumber},
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
    /// Records of no cell that wait for the writer.
    notes: Mutex<Vec<Note>>,
    /// Wakes the writer; one waiting word is enough.
    wake: SyncSender<()>,
    /// The shard that housekeeping is at.
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
    swept: Moment,
    /// Housekeeping has yet to look at the entries before this place.
    unswept: u32,
}

/// Somebody who waits until a round of the writer is durable.
pub(super) struct Waiter {
    pub(super) round: u64,
    pub(super) told: oneshot::Sender<Result<(), StorageError>>,
}

/// Records that are written together, and who waits for them.
pub(super) struct Note {
    pub(super) writes: Vec<Write>,
    pub(super) told: oneshot::Sender<Result<(), StorageError>>,
}

/// What is to be on disk of a cell that is there.
pub(super) struct Kept {
    pub(super) number: LimiterNumber,
    pub(super) cell: Cell,
    pub(super) is_overflow: bool,
}

impl Kept {
    fn of(entry: &Entry) -> Self {
        Self { number: entry.number, cell: entry.kept(), is_overflow: entry.is_overflow() }
    }
}

/// What is to be on disk of a cell: its record, or none.
pub(super) struct Change {
    pub(super) id: CellId,
    pub(super) kept: Option<Kept>,
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
            notes: Mutex::default(),
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

    /// Wakes the writer.
    pub(super) fn waker(&self) -> SyncSender<()> {
        self.wake.clone()
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
            for note in self.take_notes() {
                let _ = note.told.send(Err(why.clone()));
            }
        }
    }

    /// The records of no cell that wait.
    pub(super) fn take_notes(&self) -> Vec<Note> {
        std::mem::take(&mut *self.notes.lock())
    }

    /// Everything up to this round of the writer is on disk.
    pub(super) fn set_durable(&self, round: u64) {
        self.durable.store(round, Ordering::Release);
    }

    /// Nothing is decided as of an earlier moment, though the wall clock may have stepped back: cells that were
    /// full then have left.
    pub(super) fn begin_at(&self, moment: Moment) {
        for shard in &self.shards {
            shard.lock().swept = moment;
        }
    }

    /// What the writer's round of that number carries of one shard, and who waits for it. When a full cell last
    /// left it.
    pub(super) fn take_queued(
        &self,
        shard: usize,
        round: u64,
        changes: &mut Vec<Change>,
        waiting: &mut Vec<Waiter>,
    ) -> Moment {
        let mut shard = self.shards[shard].lock();
        let Shard { cells, queued, waiting: here, taken, swept, .. } = &mut *shard;
        *taken = round;
        waiting.append(here);
        self.queued.fetch_sub(queued.len(), Ordering::Relaxed);
        for id in queued.drain(..) {
            let entry = cells.find_mut(id);
            changes.push(Change {
                id,
                kept: entry.map(|entry| {
                    entry.queued = false;
                    Kept::of(entry)
                }),
            });
        }
        *swept
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
                    Kept::of(entry)
                }),
            });
        }
    }

    /// The exact state of every cell of one shard of which something else is on disk.
    pub(super) fn exact(&self, shard: usize, mut visit: impl FnMut(CellId, Kept)) {
        for entry in self.shards[shard].lock().cells.iter() {
            if !entry.is_on_disk() || entry.kept() != entry.cell() {
                visit(entry.id, Kept { cell: entry.cell(), ..Kept::of(entry) });
            }
        }
    }

    /// Puts a cell that was recovered; whether its record is on disk, and is to be written again.
    pub(super) fn restore(
        &self,
        id: CellId,
        limiter: &Limiter,
        kept: &Kept,
        on_disk: bool,
        rewrite: bool,
    ) {
        let mut shard = self.shards[shard_of(id)].lock();
        let entry = Entry::new(id, limiter.number, kept.cell, kept.is_overflow);
        let entry = shard.cells.insert(entry);
        entry.set_on_disk(on_disk);
        if rewrite {
            entry.lagging = Lagging::Write;
            shard.lagging.push(id);
        }
        self.live.fetch_add(1, Ordering::Relaxed);
        limiter.budget.add(kept.is_overflow);
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
        now: Moment,
    ) -> Result<Option<Durable>, StorageError> {
        let durable = self.durable.load(Ordering::Acquire);
        let mut needs = ArrayVec::<Needs, MAX_RULES>::new();
        needs.extend(changes.iter().map(|change| locked.needs(change, durable, now)));
        let new_marks = needs.iter().filter(|needs| matches!(needs, Needs::Mark(..))).count();
        let mut slots = room.map(|room| &mut room.marks);
        let mut own_slots = None;
        if new_marks > 0 && slots.is_none() {
            slots = Some(own_slots.insert(self.reserve_marks(new_marks)?));
        }

        let mut last = None;
        for (change, needs) in changes.iter().zip(&needs) {
            let Shard { cells: table, queued, lagging, .. } = &mut *locked.shards[change.shard].1;
            let number = change.limiter.number;
            let entry = match change.place {
                Some(place) => table.get_mut(place),
                None => {
                    self.live.fetch_add(1, Ordering::Relaxed);
                    change.limiter.budget.add(change.is_overflow);
                    table.insert(Entry::new(change.id, number, change.cell, change.is_overflow))
                }
            };
            entry.set_cell(number, change.cell);
            match needs {
                Needs::Nothing => {}
                Needs::Time => {
                    // One that is left is of a time when it was kept by marks.
                    entry.clear_mark();
                    if entry.lagging == Lagging::Not {
                        entry.lagging = Lagging::Write;
                        entry.set_on_disk(true);
                        lagging.push(change.id);
                    }
                }
                Needs::Round(round) => last = last.max(Some((*round, change.shard))),
                Needs::Mark(marked, round) => {
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

    /// Counts records that were just queued in a shard, and waits for the round that carries them.
    fn queue(&self, shard: &mut Shard, count: usize) -> Answer<()> {
        self.queued.fetch_add(count, Ordering::Relaxed);
        let (told, durable) = oneshot::channel();
        shard.waiting.push(Waiter { round: shard.taken + 1, told });
        let _ = self.wake.try_send(());
        Answer::Later((), durable)
    }

    /// Room for what must not be turned away: a credit that is lost never comes again, and there are no more of
    /// them than grants.
    fn without_bound(&self) -> Room {
        Room { marks: Reservation::nothing(&self.queued) }
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
    limiter: &'a Limiter,
    /// The index of its shard among those that are locked, and where it is there.
    shard: usize,
    place: Option<u32>,
    is_overflow: bool,
    cell: Cell,
}

type Changes<'a> = ArrayVec<Changed<'a>, MAX_RULES>;

/// What a changed cell needs of the disk.
enum Needs {
    /// Nothing: it is not kept, or a mark that is durable covers it.
    Nothing,
    /// To be written when the writer has time.
    Time,
    /// That a round is durable which carries a mark that covers it.
    Round(u64),
    /// A new mark, and the round that will carry it.
    Mark(Marked, u64),
}

/// How far the next mark of a cell runs ahead: twice as far as one that lasted for less than a second, and
/// not at all for one that nobody asked for in a while. So a hot key is written about once a second, and a
/// cold one loses nothing in a crash.
fn next_step(last: Option<Marked>, now: Moment) -> u8 {
    let Some(last) = last else { return 0 };
    match Duration::from_nanos(now.time.nanos_since(last.mark.at)) {
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
        now: Moment,
        decided: &mut Decided,
    ) -> Result<Answer<()>, StorageError> {
        let mut overflows = charge.asks.iter().any(|ask| self.overflows(ask));
        loop {
            let cells = charge.asks.iter().map(|ask| ask.cell);
            let shared = charge.asks.iter().filter_map(|ask| ask.overflow);
            let shared = shared.take(if overflows { usize::MAX } else { 0 });
            let mut locked = Locked::default();
            locked.lock(self, cells.chain(shared));
            self.check_alive()?;
            let now = locked.not_before_a_sweep(now);
            let mut found = ArrayVec::<Found<'_>, MAX_RULES>::new();
            let mut cells = Cells::new();
            let mut rules = Rules::new();
            for ask in charge.asks {
                let place = match self.place_of(ask, charge, &locked, overflows, now) {
                    Some(place) => place,
                    // Somebody else took the last room meanwhile.
                    None => break,
                };
                let known = found.iter().position(|found| found.id == place.id);
                let (overflow, cell) = (place.is_overflow, known.unwrap_or(found.len()));
                if known.is_none() {
                    cells.push(place.cell);
                    found.push(place);
                }
                let policy = &ask.limiter.settings;
                let CellAsk { ask, shadow, quota, held, .. } = *ask;
                rules.push(Rule { cell, policy, ask, shadow, quota, overflow, held });
            }
            if rules.len() < charge.asks.len() {
                overflows = true;
                continue;
            }
            let Decided { decision, charged } = &mut *decided;
            fusebox_core::apply_to(decision, &rules, charge.charging, &mut cells, now);
            charged.clear();
            charged.extend(rules.iter().zip(&decision.verdicts).map(|(rule, verdict)| Charged {
                cell: found[rule.cell].id,
                slice: verdict.slice,
                is_new: false,
            }));
            let mut changes = Changes::new();
            for (found, after) in found.iter().zip(&cells) {
                if let Some(cell) = after.filter(|_| *after != found.cell) {
                    changes.push(found.changed(cell));
                }
            }
            let durable = self.write(&mut locked, &changes, room, now)?;
            for (credit, rule) in charge.asks.iter().zip(&rules) {
                if credit.ask.purpose == Purpose::Credit
                    && credit.limiter.keeping == Keeping::Marked
                {
                    locked.lower(&found[rule.cell]);
                }
            }
            for change in &changes {
                if !locked.see(change) {
                    let new = charged.iter_mut().find(|charged| charged.cell == change.id);
                    new.into_iter().for_each(|charged| charged.is_new = true);
                }
            }
            return Ok(Answer::new((), durable));
        }
    }

    fn settle(
        &self,
        settlement: &Settlement<'_>,
        now: Moment,
    ) -> Result<Answer<Settled<Cell>>, StorageError> {
        let Settlement { cell: id, judge, revision, mut known } = *settlement;
        let mut locked = Locked::default();
        locked.lock(self, [id]);
        self.check_alive()?;
        let now = locked.not_before_a_sweep(now);
        let found = locked.find(id, judge.counted_by(&locked, id), judge.catalogue, now);
        let (mut cell, limiter) = (found.cell, found.limiter);
        let charged = &judge.limiter.settings;
        let is_known =
            charged.is_like_since(revision) && charged.limit.is_like(&limiter.settings.limit);
        if !is_known {
            let nothing = Settled { state: cell, refunded: 0, owed: 0, dropped: 0 };
            return Ok(Answer::Now(nothing));
        }
        // Slices of other settings are others.
        let same = limiter.number == judge.limiter.number && limiter.settings.revision == revision;
        known.slice = known.slice.filter(|_| same);
        let settled = fusebox_core::settle(&limiter.settings, &mut cell, known, now);
        let changed = cell.filter(|_| cell != found.cell);
        let changes = changed.map(|cell| found.changed(cell)).into_iter().collect();
        let durable = self.write(&mut locked, &changes, Some(&mut self.without_bound()), now)?;
        if settled.refunded > 0 && limiter.keeping == Keeping::Marked && !limiter.is_concurrency() {
            locked.lower(&found);
        }
        Ok(Answer::new(settled, durable))
    }

    fn change(
        &self,
        id: CellId,
        judge: Judge<'_>,
        change: &mut dyn FnMut(Cell) -> Option<Cell>,
        now: Moment,
    ) -> Result<Answer<bool>, StorageError> {
        let mut locked = Locked::default();
        locked.lock(self, [id]);
        self.check_alive()?;
        let now = locked.not_before_a_sweep(now);
        let found = locked.find(id, judge.limiter, judge.catalogue, now);
        let Some(cell) = found.cell.and_then(change) else { return Ok(Answer::Now(false)) };
        let changes = std::iter::once(found.changed(cell)).collect();
        let durable = self.write(&mut locked, &changes, Some(&mut self.without_bound()), now)?;
        if judge.limiter.keeping == Keeping::Marked {
            locked.lower(&found);
        }
        Ok(Answer::new(true, durable))
    }

    fn note(&self, writes: Vec<Write>) -> Result<Answer<()>, StorageError> {
        let (told, durable) = oneshot::channel();
        let mut notes = self.notes.lock();
        // Under the lock: whoever says that it is over looks at the notes after that.
        self.check_alive()?;
        if notes.len() >= limits::NOTES {
            return Err(StorageError::Noted(limits::NOTES));
        }
        notes.push(Note { writes, told });
        drop(notes);
        let _ = self.wake.try_send(());
        Ok(Answer::Later((), durable))
    }

    fn write_out(&self, id: CellId) -> Result<Answer<()>, StorageError> {
        let mut shard = self.shards[shard_of(id)].lock();
        self.check_alive()?;
        let round = shard.taken + 1;
        let entry = shard.cells.find_mut(id).filter(|entry| entry.is_on_disk());
        let Some(entry) = entry else { return Ok(Answer::Now(())) };
        // Until that round is durable what is on disk covers more, never less.
        #[allow(clippy::cast_possible_truncation)]
        entry.lower_mark(round as u32);
        let is_new = !std::mem::replace(&mut entry.queued, true);
        if is_new {
            shard.queued.push(id);
        }
        Ok(self.queue(&mut shard, usize::from(is_new)))
    }

    fn write_down(
        &self,
        part: usize,
        limiters: &HashSet<LimiterNumber>,
    ) -> Result<Answer<()>, StorageError> {
        let mut shard = self.shards[part].lock();
        self.check_alive()?;
        let Shard { cells, queued, taken, .. } = &mut *shard;
        let (before, round) = (queued.len(), *taken + 1);
        for entry in cells.iter_mut().filter(|entry| limiters.contains(&entry.number)) {
            // A record of it may be there, and even a mark: of a time before it was not kept.
            entry.set_on_disk(true);
            #[allow(clippy::cast_possible_truncation)]
            entry.lower_mark(round as u32);
            if !entry.queued {
                entry.queued = true;
                queued.push(entry.id);
            }
        }
        let count = queued.len() - before;
        Ok(if count == 0 { Answer::Now(()) } else { self.queue(&mut shard, count) })
    }

    fn look(&self, id: CellId, judge: Judge<'_>, now: Moment) -> Option<Cell> {
        let mut locked = Locked::default();
        locked.lock(self, [id]);
        let now = locked.not_before_a_sweep(now);
        locked.find(id, judge.limiter, judge.catalogue, now).cell
    }

    fn reserve(&self, asks: &[CellAsk<'_>]) -> Result<Room, StorageError> {
        self.check_alive()?;
        let marked =
            |ask: &&CellAsk<'_>| ask.limiter.keeping == Keeping::Marked && ask.ask.tokens > 0;
        Ok(Room { marks: self.reserve_marks(asks.iter().filter(marked).count())? })
    }

    fn tend(&self, catalogue: &Catalogue, now: Moment) {
        let roomy = self.live() < self.capacity / 2;
        let mut left_to_do = limits::SWEPT_PER_ROUND;
        while left_to_do > 0 {
            let at = self.tended.load(Ordering::Relaxed) % limits::CELL_SHARDS;
            let mut shard = self.shards[at].lock();
            let Shard { cells, lagging, swept, unswept, .. } = &mut *shard;
            let (before, slice) = (cells.len(), limits::SWEPT_AT_ONCE);
            let start = if *unswept == 0 { u32::MAX } else { *unswept };
            *unswept = cells.retain_before(start, slice, |entry| {
                let limiter = catalogue.numbered(entry.number);
                // One that nobody here knows came since these policies were looked up.
                let keep = limiter.is_none_or(|limiter| stays(entry, limiter, roomy, now));
                if keep {
                    // Permits come and go: only what was not needed for long is lowered.
                    let is_high = limiter.is_some_and(|limiter| limiter.is_concurrency());
                    if is_high && entry.exceeds_lowest_mark() && entry.lagging == Lagging::Not {
                        entry.lagging = Lagging::Lower;
                        lagging.push(entry.id);
                    }
                } else {
                    if let Some(limiter) = limiter {
                        limiter.budget.remove(entry.is_overflow());
                    }
                    if entry.is_on_disk() && entry.lagging == Lagging::Not {
                        lagging.push(entry.id);
                    }
                }
                keep
            });
            let left = before - cells.len();
            if left > 0 {
                *swept = now.max(*swept);
            }
            self.live.fetch_sub(left, Ordering::Relaxed);
            if *unswept == 0 {
                self.tended.store(at + 1, Ordering::Relaxed);
                // A round ends with a shard, however few cells it has: the next one is the next round's.
                return;
            }
            left_to_do = left_to_do.saturating_sub(slice);
        }
    }

    fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }
}

/// Whether an entry stays: something is owed to it, or it is not full, or was not until lately.
fn stays(entry: &Entry, limiter: &Limiter, roomy: bool, now: Moment) -> bool {
    let lingers = if roomy && entry.is_on_disk() { limits::FULL_LINGERS } else { Duration::ZERO };
    let leaves_at = limiter.settings.leaves_at(entry.cell(), now);
    // What is counted in later settings says nothing in these.
    entry.cell().revision > limiter.settings.revision
        || leaves_at.is_none_or(|leaves_at| leaves_at.after(lingers) > now.time)
}

impl Embedded {
    /// Whether a new key of the ask's policy may not simply start full.
    fn overflows(&self, ask: &CellAsk<'_>) -> bool {
        ask.overflow.is_some() && (ask.limiter.budget.overflows() || self.is_full())
    }

    fn is_full(&self) -> bool {
        self.live() >= self.capacity
    }

    /// The cell that an ask charges: the key's own, a new one, or the one that keys without share. `None` if
    /// that one is not locked.
    fn place_of<'a>(
        &self,
        ask: &CellAsk<'a>,
        Charge { asks, catalogue, .. }: &Charge<'a>,
        locked: &Locked<'_>,
        overflows: bool,
        now: Moment,
    ) -> Option<Found<'a>> {
        let own = locked.find(ask.cell, ask.limiter, catalogue, now);
        // A key lives if any of its limits has a cell: the others are only full.
        let lives = || {
            let of_key = asks.iter().filter(|other| other.key == ask.key);
            own.place.is_some()
                || of_key.into_iter().any(|other| locked.number(other.cell).is_some())
        };
        let overflow = ask.overflow.filter(|_| own.place.is_none() && self.overflows(ask));
        let Some(overflow) = overflow.filter(|_| !lives()) else { return Some(own) };
        if !overflows {
            return None;
        }
        let shared = locked.find(overflow, ask.limiter, catalogue, now);
        let settings = &ask.limiter.settings;
        let spent = shared.cell.map_or(0, |cell| settings.limit.spent(settings.current(cell), now));
        let no_room = ask.limiter.budget.is_full() || self.is_full();
        // Nobody has permits twice by another name.
        if no_room || ask.limiter.is_concurrency() && spent > 0 {
            return Some(Found { is_overflow: true, ..shared });
        }
        // A key that comes back from the crowd has spent what all of it has; what is out there is not its own.
        let copy = shared.cell.filter(|_| spent > 0).map(|cell| Cell {
            revision: settings.revision,
            state: settings.limit.revive(settings.current(cell), 0, now),
        });
        Some(Found { cell: copy, ..own })
    }
}

impl<'a> Judge<'a> {
    /// The limiter that a cell is counted by: another one if the key was moved by a change of overrides.
    fn counted_by(&self, locked: &Locked<'_>, id: CellId) -> &'a Limiter {
        let number = locked.number(id);
        let other = number.and_then(|number| self.catalogue.numbered(number));
        other.map_or(self.limiter, |other| other)
    }
}

/// The locks of the shards that some cells live in, taken in the order of the shards: two callers that
/// want the same ones never wait for each other in a circle.
#[derive(Default)]
struct Locked<'a> {
    shards: ArrayVec<(usize, MutexGuard<'a, Shard>), { 2 * MAX_RULES }>,
}

/// A cell, or the lack of one, in a locked shard.
struct Found<'a> {
    id: CellId,
    limiter: &'a Limiter,
    shard: usize,
    place: Option<u32>,
    is_overflow: bool,
    cell: Option<Cell>,
}

impl<'a> Found<'a> {
    fn changed(&self, cell: Cell) -> Changed<'a> {
        let Self { id, limiter, shard, place, is_overflow, .. } = *self;
        Changed { id, limiter, shard, place, is_overflow, cell }
    }
}

impl<'l> Locked<'l> {
    /// Locks the shards of these cells, where nothing is locked yet.
    ///
    /// Not what makes a `Locked`: these are kilobytes, of which nearly all callers need a few bytes, and they are
    /// filled where they lie.
    fn lock(&mut self, storage: &'l Embedded, ids: impl IntoIterator<Item = CellId>) {
        let mut wanted = ArrayVec::<usize, { 2 * MAX_RULES }>::new();
        wanted.extend(ids.into_iter().map(shard_of));
        wanted.sort_unstable();
        for index in &wanted {
            if self.shards.last().is_none_or(|(last, _)| last != index) {
                self.shards.push((*index, storage.shards[*index].lock()));
            }
        }
    }

    /// `now`, or the latest sweep of these shards.
    fn not_before_a_sweep(&self, now: Moment) -> Moment {
        self.shards.iter().fold(now, |now, (_, shard)| not_before(now, shard.swept))
    }

    /// The shard of a cell, and where it is there.
    ///
    /// # Panics
    /// If its shard is not locked.
    fn place(&self, id: CellId) -> (usize, Option<u32>) {
        let (wanted, mut shards) = (shard_of(id), self.shards.iter());
        let shard = shards.position(|(index, _)| *index == wanted).unwrap_or(usize::MAX);
        (shard, self.shards[shard].1.cells.place(id))
    }

    fn number(&self, id: CellId) -> Option<LimiterNumber> {
        let (shard, place) = self.place(id);
        place.map(|place| self.shards[shard].1.cells.get(place).number)
    }

    /// A cell in the terms of a limiter: one that was counted by another goes on with what it had spent.
    fn find<'a>(
        &self,
        id: CellId,
        limiter: &'a Limiter,
        catalogue: &Catalogue,
        now: Moment,
    ) -> Found<'a> {
        let (shard, place) = self.place(id);
        let entry = place.map(|place| self.shards[shard].1.cells.get(place));
        let cell = entry.map(|entry| {
            let other = (entry.number != limiter.number).then(|| catalogue.numbered(entry.number));
            // Who looked the policy up a moment before it changed does not know what the cell is in now.
            match other {
                Some(Some(other)) => limiter.settings.adopted(entry.cell(), &other.settings, now),
                Some(None) => limiter.settings.adopted_of_unknown(entry.cell(), now),
                None => limiter.settings.overtaken(entry.cell(), now),
            }
        });
        let is_overflow = entry.is_some_and(Entry::is_overflow);
        Found { id, limiter, shard, place, is_overflow, cell }
    }

    /// Notes that a cell is charged in this life; whether it was before.
    fn see(&mut self, change: &Changed<'_>) -> bool {
        let cells = &mut self.shards[change.shard].1.cells;
        match change.place {
            Some(place) => cells.get_mut(place).see(),
            None => cells.find_mut(change.id).is_some_and(Entry::see),
        }
    }

    /// Has the mark of a cell lowered when the writer has time: a crash must not take what came back.
    fn lower(&mut self, found: &Found<'_>) {
        let Shard { cells, lagging, .. } = &mut *self.shards[found.shard].1;
        let Some(entry) = found.place.map(|place| cells.get_mut(place)) else { return };
        if std::mem::replace(&mut entry.lagging, Lagging::Lower) == Lagging::Not {
            lagging.push(found.id);
        }
    }

    /// What a changed cell needs of the disk.
    fn needs(&self, change: &Changed<'_>, durable: u64, now: Moment) -> Needs {
        let shard = &self.shards[change.shard].1;
        let entry = change.place.map(|place| shard.cells.get(place));
        // A crash would believe what another limiter had written of the key: it has to know whose it is now.
        let moved = |entry: &Entry| entry.is_on_disk() && entry.number != change.limiter.number;
        match change.limiter.keeping {
            Keeping::AtStop if !entry.is_some_and(moved) => return Needs::Nothing,
            Keeping::Behind => return Needs::Time,
            Keeping::AtStop | Keeping::Marked => {}
        }
        let is_comparable = |entry: &&Entry| {
            entry.number == change.limiter.number && entry.cell().revision == change.cell.revision
        };
        let entry = entry.filter(is_comparable);
        let last = entry.and_then(Entry::mark);
        let (limit, state) = (&change.limiter.settings.limit, change.cell.state);
        let before = entry.map_or(state, |entry| entry.cell().state);
        if let Some(last) = last.filter(|last| limit.covers(last.mark, before, state)) {
            // What is not durable is in one of the next two rounds: the one that is being written and the
            // one after it.
            #[allow(clippy::cast_possible_truncation)]
            return match last.round.wrapping_sub(durable as u32) {
                ahead @ 1..=2 => Needs::Round(durable + u64::from(ahead)),
                _ => Needs::Nothing,
            };
        }
        let step = next_step(last, now);
        let tokens = if step == 0 { 0 } else { (1 << step).min(limit.max_step()) };
        let round = shard.taken + 1;
        #[allow(clippy::cast_possible_truncation)]
        let marked = Marked { mark: limit.mark(state, tokens, now), round: round as u32, step };
        Needs::Mark(marked, round)
    }
}

/// `now`, or that earlier moment if a clock shows less since. A wall clock that was far ahead then was wrong.
pub(super) fn not_before(now: Moment, earlier: Moment) -> Moment {
    let ahead = Duration::from_nanos(earlier.wall.nanos_since(now.wall));
    let wall = if ahead <= limits::WALL_STEP { earlier.wall } else { now.wall };
    now.max(Moment { wall, ..earlier })
}

/// The id is a hash already: one half chooses the shard, the other the place in its table.
fn shard_of(id: CellId) -> usize {
    (id.0[0] >> 32) as usize % limits::CELL_SHARDS
}

#[cfg(test)]
mod tests {
    use fusebox_core::{Ask, Charging, Decision, Limit, Policy, SlidingWindow, Time, TokenBucket};

    use super::*;
    use crate::catalogue::{Budget, PolicyName};

    const NOW: Moment = Moment::ZERO;

    /// The cell that keys without room share.
    const CROWD: u64 = 99;

    fn limiter(most: usize) -> Limiter {
        let bucket = TokenBucket::new(10, Duration::from_secs(1), 10).unwrap();
        Limiter {
            name: PolicyName { namespace: "test".into(), policy: "policy".into() },
            number: LimiterNumber(0),
            settings: Policy::new(Limit::TokenBucket(bucket), 0),
            keeping: Keeping::AtStop,
            calendar: None,
            budget: Arc::new(Budget::new(most)),
        }
    }

    fn cell(number: u64) -> CellId {
        CellId([number << 32, number])
    }

    /// Asks of cells by number.
    fn asks<'a>(limiter: &'a Limiter, cells: &[u64], tokens: u64) -> Vec<CellAsk<'a>> {
        let ask = |number: &u64| CellAsk {
            cell: cell(*number),
            key: cell(*number),
            overflow: Some(cell(CROWD)),
            limiter,
            ask: Ask::spend(tokens),
            shadow: false,
            quota: false,
            held: false,
        };
        cells.iter().map(ask).collect()
    }

    fn apply(
        cells: &Embedded,
        asks: &[CellAsk<'_>],
        room: Option<&mut Room>,
        now: Moment,
    ) -> Result<Decision, StorageError> {
        // An empty catalogue knows no limiter, so nothing holds a cell.
        let catalogue = &Catalogue::default();
        let charge = Charge { charging: Charging::AllOrNothing, asks, catalogue };
        let mut decided = Decided::default();
        match cells.apply(&charge, room, now, &mut decided)? {
            Answer::Now(()) => Ok(decided.decision),
            Answer::Later(..) => panic!("memory answers at once"),
        }
    }

    /// What is left of each cell after a charge of it.
    fn left(cells: &Embedded, limiter: &Limiter, numbers: &[u64], tokens: u64) -> Vec<u64> {
        let decision = apply(cells, &asks(limiter, numbers, tokens), None, NOW).unwrap();
        assert!(decision.allowed, "{numbers:?}: {decision:?}");
        decision.verdicts.iter().map(|verdict| verdict.remaining).collect()
    }

    #[test]
    fn who_looked_a_policy_up_before_it_changed_forgets_nothing_that_was_spent() {
        let kinds = || {
            let bucket = TokenBucket::new(10, Duration::from_secs(3_600), 10).unwrap();
            [Limit::TokenBucket(bucket), sliding(10, 3_600), sliding(10, 60), sliding(10, 86_400)]
        };
        let now = Moment { time: Time::from_nanos(10_u64.pow(15)), ..NOW };
        for (older, newer) in kinds().into_iter().flat_map(|one| kinds().map(|two| (one, two))) {
            let (before, cells) =
                (Limiter { settings: Policy::new(older, 0), ..limiter(100) }, Embedded::new(100).0);
            let after = Limiter { settings: before.settings.changed(newer, now), ..limiter(100) };
            let charge = |limiter, tokens| apply(&cells, &asks(limiter, &[1], tokens), None, now);
            assert!(charge(&before, 3).unwrap().allowed);
            assert!(charge(&after, 3).unwrap().allowed);
            // A call that is behind.
            let late = charge(&before, 1).unwrap();
            let left = late.verdicts[0].remaining;
            assert!(left <= 3, "{older:?}, {newer:?}: {left}");
            let left = charge(&after, 0).unwrap().verdicts[0].remaining;
            assert!(left <= 4, "{older:?}, {newer:?}: {left}");
        }
    }

    fn sliding(limit: u64, seconds: u64) -> Limit {
        Limit::SlidingWindow(SlidingWindow::new(limit, Duration::from_secs(seconds)).unwrap())
    }

    /// Policies that know these limiters, and nothing else.
    fn knowing<const N: usize>(limiters: [&Arc<Limiter>; N]) -> Catalogue {
        Catalogue::new(1, [], limiters.map(Arc::clone))
    }

    #[test]
    fn who_looked_a_policy_up_before_its_key_was_moved_forgets_nothing_that_was_spent() {
        let now = Moment { time: Time::from_nanos(10_u64.pow(15)), ..NOW };
        for (older, newer) in [(60, 3_600), (3_600, 60), (60, 60)] {
            let before = Limiter { settings: Policy::new(sliding(10, older), 0), ..limiter(100) };
            let (number, settings) = (LimiterNumber(1), Policy::new(sliding(10, newer), 0));
            // It changed once more since it was looked up.
            let known = Arc::new(Limiter { number, settings, ..limiter(100) });
            let settings = known.settings.changed(sliding(10, 2 * newer), now);
            let after = Limiter { number, settings, ..limiter(100) };
            for catalogue in [Catalogue::default(), knowing([&known])] {
                let cells = Embedded::new(100).0;
                assert!(apply(&cells, &asks(&after, &[1], 9), None, now).unwrap().allowed);
                let charge = Charge {
                    charging: Charging::AllOrNothing,
                    asks: &asks(&before, &[1], 2),
                    catalogue: &catalogue,
                };
                let mut decided = Decided::default();
                assert!(cells.apply(&charge, None, now, &mut decided).is_ok());
                assert!(!decided.decision.allowed, "{older}, {newer}: one is left");
            }
        }
    }

    #[test]
    fn who_sweeps_by_policies_of_a_moment_before_removes_nothing_of_what_is_new() {
        let now = Moment { time: Time::from_nanos(10_u64.pow(15)), ..NOW };
        let settings = Policy::new(sliding(10, 1), 0);
        let before = Arc::new(Limiter { settings, ..limiter(100) });
        let settings = before.settings.changed(sliding(10, 3_600), now);
        let after = Limiter { settings, ..limiter(100) };
        for catalogue in [Catalogue::default(), knowing([&before])] {
            let cells = Embedded::new(100).0;
            assert!(apply(&cells, &asks(&after, &[1], 10), None, now).unwrap().allowed);
            for _ in 0..cells.shards() {
                cells.tend(&catalogue, now);
            }
            assert!(!apply(&cells, &asks(&after, &[1], 1), None, now).unwrap().allowed);
        }
    }

    #[test]
    fn what_was_kept_by_marks_is_written_as_it_is_once_it_is_not() {
        let (marked, cells) =
            (Limiter { keeping: Keeping::Marked, ..limiter(9) }, Embedded::new(9).0);
        let behind = Limiter { keeping: Keeping::Behind, ..limiter(9) };
        let (catalogue, mut decided) = (&Catalogue::default(), Decided::default());
        for (limiter, tokens) in [(&marked, 1), (&behind, 5)] {
            let asks = asks(limiter, &[1], tokens);
            let charge = Charge { charging: Charging::AllOrNothing, asks: &asks, catalogue };
            assert!(cells.apply(&charge, None, NOW, &mut decided).is_ok());
        }
        let mut changes = Vec::new();
        cells.take_lagging(shard_of(cell(1)), 1, &mut changes);
        let kept = changes[0].kept.as_ref().map(|kept| kept.cell);
        let judge = Judge { limiter: &behind, catalogue };
        assert_eq!(kept, cells.look(cell(1), judge, NOW));
    }

    #[test]
    fn a_cell_is_new_when_it_is_first_charged() {
        let (limiter, cells) = (limiter(100), Embedded::new(100).0);
        let is_new = |tokens| {
            let (asks, catalogue) = (asks(&limiter, &[1, 2], tokens), &Catalogue::default());
            let charge = Charge { charging: Charging::AllOrNothing, asks: &asks, catalogue };
            let mut decided = Decided::default();
            assert!(cells.apply(&charge, None, NOW, &mut decided).is_ok());
            decided.charged.iter().map(|charged| charged.is_new).collect::<Vec<_>>()
        };
        assert_eq!(is_new(0), [false, false]);
        assert_eq!(is_new(1), [true, true]);
        assert_eq!(is_new(1), [false, false]);
    }

    #[test]
    fn notes_end_somewhere_and_are_told_of_the_end() {
        let (cells, _woken) = Embedded::new(1);
        let mut noted: Vec<_> =
            (0..limits::NOTES).map(|_| cells.note(Vec::new()).unwrap()).collect();
        assert!(matches!(cells.note(Vec::new()), Err(StorageError::Noted(_))));
        cells.end(&StorageError::Failed("the disk is full".into()));
        let Some(Answer::Later((), durable)) = noted.pop() else { panic!("it waits") };
        assert!(matches!(durable.blocking_recv(), Ok(Err(StorageError::Failed(_)))));
        assert!(matches!(cells.note(Vec::new()), Err(StorageError::Failed(_))));
    }

    #[test]
    fn a_full_server_serves_live_keys_on_and_new_ones_share_a_cell() {
        let (limiter, cells) = (limiter(100), Embedded::new(2).0);
        let left = |numbers: &[u64], tokens| left(&cells, &limiter, numbers, tokens);
        assert_eq!(left(&[1, 2], 1), [9, 9]);
        assert_eq!(left(&[3], 0), [10]);
        assert_eq!(cells.live(), 2, "a peek needs no room");
        assert_eq!((left(&[3], 4), left(&[4], 4)), (vec![6], vec![2]));
        assert_eq!(cells.live(), 3, "the shared one comes on top");
        assert_eq!(left(&[1, 5], 2), [7, 0]);
        assert_eq!(left(&[2], 1), [8]);
    }

    #[test]
    fn a_policy_without_room_shares_alone() {
        let (small, large, cells) = (limiter(1), limiter(100), Embedded::new(100).0);
        assert_eq!(left(&cells, &small, &[1], 1), [9]);
        assert_eq!(left(&cells, &small, &[2], 4), [6]);
        assert_eq!(left(&cells, &small, &[3], 4), [2]);
        assert_eq!(left(&cells, &large, &[4], 1), [9]);
        assert_eq!((small.budget.live(), small.budget.overflow_cells()), (2, 1));
    }

    #[test]
    fn a_key_that_finds_room_again_has_spent_what_the_crowd_has() {
        let (limiter, cells) = (limiter(1), Embedded::new(100).0);
        let left = |numbers: &[u64], tokens| left(&cells, &limiter, numbers, tokens);
        assert_eq!((left(&[1], 1), left(&[2], 4)), (vec![9], vec![6]));
        limiter.budget.set_most(100);
        assert_eq!(left(&[2], 1), [5], "not fresh under its own name");
        assert_eq!(left(&[3], 1), [5]);
        assert_eq!(left(&[CROWD], 0), [6], "which is not charged any more");
    }

    #[test]
    fn two_keys_without_room_are_charged_together() {
        let (limiter, cells) = (limiter(0), Embedded::new(100).0);
        assert_eq!(left(&cells, &limiter, &[1, 2], 4), [6, 2]);
        let denied = apply(&cells, &asks(&limiter, &[3, 4], 2), None, NOW).unwrap();
        assert!(!denied.allowed);
        assert_eq!(left(&cells, &limiter, &[5], 0), [2]);
    }

    #[test]
    fn more_than_there_is_room_for_may_be_recovered_and_is_served() {
        let (limiter, cells) = (limiter(100), Embedded::new(1).0);
        let state =
            fusebox_core::token_bucket::State { spent: 5, remainder: 0, out: 0, at: Time::ZERO };
        let state = fusebox_core::State::TokenBucket(state);
        let kept =
            Kept { number: limiter.number, cell: Cell { revision: 1, state }, is_overflow: false };
        for number in [1, 2] {
            cells.restore(cell(number), &limiter, &kept, false, false);
        }
        assert_eq!(left(&cells, &limiter, &[1, 2], 5), [0, 0]);
        assert_eq!(limiter.budget.live(), 2);
        assert_eq!(left(&cells, &limiter, &[3], 1), [9], "in the shared cell");
        assert_eq!(limiter.budget.overflow_cells(), 1);
    }

    #[test]
    fn room_in_the_queue_is_reserved_for_what_may_need_it() {
        let (unmarked, cells) = (limiter(100), Embedded::new(100).0);
        let marked = Limiter { keeping: Keeping::Marked, ..limiter(100) };
        let many: Vec<_> = (0..limits::QUEUED_MARKS as u64).collect();
        let room = cells.reserve(&asks(&marked, &many, 1)).unwrap();
        let refused = cells.reserve(&asks(&marked, &[1], 1)).unwrap_err();
        assert!(matches!(refused, StorageError::Behind(limits::QUEUED_MARKS)), "{refused}");
        assert!(cells.reserve(&asks(&marked, &[1], 0)).is_ok(), "a peek needs none");
        assert!(cells.reserve(&asks(&unmarked, &[1], 1)).is_ok(), "nor does what is not marked");
        drop(room);
        assert!(cells.reserve(&asks(&marked, &[1], 1)).is_ok(), "and it comes back");
    }

    #[test]
    fn cells_that_are_full_leave_and_make_room() {
        let (limiter, cells) = (Arc::new(limiter(100)), Embedded::new(1).0);
        let full = Moment::from_nanos(10_u64.pow(9));
        assert_eq!(left(&cells, &limiter, &[1], 1), [9]);
        for _ in 0..cells.shards() {
            cells.tend(&knowing([&limiter]), full);
        }
        assert_eq!(cells.live(), 0);
        assert_eq!(left(&cells, &limiter, &[2], 1), [9]);
    }

    #[test]
    fn a_caller_that_is_late_does_not_find_a_swept_cell_full_before_it_was() {
        let (limiter, cells) = (Arc::new(limiter(100)), Embedded::new(10).0);
        let at = |millis: u64| Moment::from_nanos(millis * 1_000_000);
        let apply =
            |tokens, now| apply(&cells, &asks(&limiter, &[1], tokens), None, now).unwrap().allowed;
        assert!(apply(10, at(0)));
        // At 900 ms there were 9; the cell leaves at 1,000 ms, when there are 10.
        for _ in 0..cells.shards() {
            cells.tend(&knowing([&limiter]), at(1_000));
        }
        assert!(apply(10, at(900)));
        assert!(!apply(1, at(1_000)), "those 10 were of 1,000 ms");
    }

    #[test]
    fn a_policy_that_denies_all_needs_no_room() {
        let nothing = TokenBucket::new(0, Duration::from_secs(1), 0).unwrap();
        let settings = Policy::new(Limit::TokenBucket(nothing), 0);
        let (closed, cells) = (Limiter { settings, ..limiter(100) }, Embedded::new(1).0);
        assert!(!apply(&cells, &asks(&closed, &[2], 1), None, NOW).unwrap().allowed);
        assert_eq!(cells.live(), 0, "it is an answer");
    }

    #[test]
    fn a_credit_finds_room_where_a_charge_finds_none() {
        let limiter = Limiter { keeping: Keeping::Marked, ..limiter(10) };
        let cells = Embedded::new(10).0;
        let state = limiter.settings.limit.having_spent(5, NOW);
        let kept =
            Kept { number: limiter.number, cell: Cell { revision: 1, state }, is_overflow: false };
        // Recovered, so it has no mark: whatever changes it has to be written.
        cells.restore(cell(1), &limiter, &kept, true, false);
        let every_place = vec![asks(&limiter, &[1], 1)[0]; limits::QUEUED_MARKS];
        let _taken = cells.reserve(&every_place).unwrap();
        let charged = apply(&cells, &asks(&limiter, &[1], 1), None, NOW);
        assert!(matches!(charged, Err(StorageError::Behind(_))));

        let known = fusebox_core::Settlement {
            charged: 5,
            told: 0,
            actual: 0,
            partial: false,
            slice: Some(0),
            window: None,
            max_debt: 0,
        };
        let catalogue = &Catalogue::default();
        let judge = Judge { limiter: &limiter, catalogue };
        let settlement = Settlement { cell: cell(1), judge, revision: 1, known };
        let Answer::Later(settled, _) = cells.settle(&settlement, NOW).unwrap() else {
            panic!("it is to be written");
        };
        assert_eq!(settled.refunded, 5);
    }
}
