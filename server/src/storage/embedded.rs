//! Cells in memory, in shards.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicUsize, Ordering},
};

use arrayvec::ArrayVec;
use crossbeam_utils::CachePadded;
use fusebox_core::{Cell, Cells, Decision, MAX_RULES, Rule, Rules, Settled, Time};
use hashbrown::HashTable;
use parking_lot::{Mutex, MutexGuard};

use super::{Answer, Charge, Settlement, Storage, StorageError};
use crate::{
    catalogue::{Catalogue, CellId},
    reservation::Reservation,
};

/// A power of two, many times the cores, so that two callers rarely want the same lock.
const SHARDS: usize = 64;

/// Cells in memory. What changes is remembered, so that a [`Writer`](super::Writer) can follow.
pub struct Embedded {
    shards: Box<[CachePadded<Mutex<Shard>>]>,
    live: Arc<AtomicUsize>,
    capacity: usize,
    /// Counts the rounds of housekeeping: each looks at the next shard.
    tended: AtomicUsize,
    /// Whether there is a journal to follow: otherwise nobody would take what is remembered.
    remembers: bool,
    failure: OnceLock<Arc<str>>,
}

#[derive(Default)]
struct Shard {
    cells: HashTable<Entry>,
    /// Cells changed or gone since the writer last looked.
    changed: Vec<CellId>,
}

struct Entry {
    id: CellId,
    cell: Cell,
    number: u32,
    changed: bool,
}

/// A cell that changed: what it is now, or that it is gone.
pub(super) type Change = (CellId, Option<(u32, Cell)>);

impl Embedded {
    /// No cells yet, and room for `capacity` of them.
    pub fn new(remembers: bool, capacity: usize) -> Self {
        let shards = (0..SHARDS).map(|_| CachePadded::default()).collect();
        Self {
            shards,
            live: Arc::default(),
            capacity,
            tended: AtomicUsize::new(0),
            remembers,
            failure: OnceLock::new(),
        }
    }

    /// Number of shards: as many rounds of [`tend`](Storage::tend) see every cell.
    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// Nothing is admitted from here on.
    pub(super) fn fail(&self, cause: &str) {
        // The first failure is the one to tell.
        let _ = self.failure.set(cause.into());
    }

    /// What changed in one shard since this was last asked.
    pub(super) fn take_changes(&self, shard: usize) -> Vec<Change> {
        let mut shard = self.shards[shard].lock();
        let Shard { cells, changed } = &mut *shard;
        let mut changes = Vec::with_capacity(changed.len());
        for id in changed.drain(..) {
            let entry = cells.find_mut(table_hash(id), |entry| entry.id == id);
            changes.push((
                id,
                entry.map(|entry| {
                    entry.changed = false;
                    (entry.number, entry.cell)
                }),
            ));
        }
        changes
    }

    /// Puts a cell that was recovered; its record is on disk already.
    pub(super) fn restore(&self, id: CellId, number: u32, cell: Cell) {
        let entry = Entry { id, cell, number, changed: false };
        let mut shard = self.shards[shard_of(id)].lock();
        shard.cells.insert_unique(table_hash(id), entry, |entry| table_hash(entry.id));
        self.live.fetch_add(1, Ordering::Relaxed);
    }

    /// Deletes a cell that was recovered, but is full by now.
    pub(super) fn forget(&self, id: CellId) {
        self.shards[shard_of(id)].lock().changed.push(id);
    }

    fn write(&self, shard: &mut Shard, id: CellId, number: u32, cell: Cell) {
        let hash = table_hash(id);
        match shard.cells.find_mut(hash, |entry| entry.id == id) {
            Some(entry) => {
                entry.cell = cell;
                if self.remembers && !entry.changed {
                    entry.changed = true;
                    shard.changed.push(id);
                }
            }
            None => {
                let entry = Entry { id, cell, number, changed: self.remembers };
                shard.cells.insert_unique(hash, entry, |entry| table_hash(entry.id));
                self.live.fetch_add(1, Ordering::Relaxed);
                if self.remembers {
                    shard.changed.push(id);
                }
            }
        }
    }

    fn check_alive(&self) -> Result<(), StorageError> {
        self.failure.get().map_or(Ok(()), |cause| Err(StorageError::Failed(Arc::clone(cause))))
    }
}

impl Storage for Embedded {
    fn apply(&self, charge: &Charge<'_>, now: Time) -> Result<Answer<Decision>, StorageError> {
        self.check_alive()?;

        let mut ids = ArrayVec::<(CellId, u32), MAX_RULES>::new();
        let mut rules = Rules::new();
        for ask in &charge.asks {
            let cell = ids.iter().position(|(id, _)| *id == ask.cell).unwrap_or_else(|| {
                ids.push((ask.cell, ask.number));
                ids.len() - 1
            });
            rules.push(Rule { cell, policy: ask.policy, ask: ask.ask });
        }

        let mut shards = Locked::new(self, &ids);
        let mut cells: Cells = ids.iter().map(|(id, _)| shards.read(*id)).collect();
        let new =
            rules.iter().filter(|rule| cells[rule.cell].is_none() && rule.ask.cost > 0).count();
        if new > 0 && !charge.reserved && self.live() + new > self.capacity {
            return Err(StorageError::Full(self.live()));
        }

        let before = cells.clone();
        let decision = fusebox_core::apply(&rules, charge.charging, &mut cells, now);
        for ((id, number), (before, after)) in ids.into_iter().zip(before.iter().zip(&cells)) {
            if let Some(cell) = after.filter(|_| before != after) {
                shards.write(id, number, cell);
            }
        }
        Ok(Answer::Now(decision))
    }

    fn settle(
        &self,
        settlement: &Settlement<'_>,
        now: Time,
    ) -> Result<Answer<Settled<Cell>>, StorageError> {
        self.check_alive()?;
        let id = settlement.cell;
        let mut shard = self.shards[shard_of(id)].lock();
        let mut cell =
            shard.cells.find(table_hash(id), |entry| entry.id == id).map(|entry| entry.cell);
        let settled = fusebox_core::settle(
            settlement.policy,
            &mut cell,
            settlement.charged,
            settlement.actual,
            now,
        );
        if let Some(cell) = cell {
            self.write(&mut shard, id, settlement.number, cell);
        }
        Ok(Answer::Now(settled))
    }

    fn reserve(&self, cells: usize) -> Result<Reservation, StorageError> {
        self.check_alive()?;
        Reservation::of(&self.live, cells, self.capacity).ok_or(StorageError::Full(self.live()))
    }

    fn tend(&self, catalogue: &Catalogue, now: Time) {
        let next = self.tended.fetch_add(1, Ordering::Relaxed) % SHARDS;
        let mut shard = self.shards[next].lock();
        let Shard { cells, changed } = &mut *shard;
        let before = cells.len();
        cells.retain(|entry| {
            let policy = catalogue.numbered(entry.number);
            let full_at = policy.map_or(Some(now), |policy| policy.rule.full_at(entry.cell));
            let keep = full_at.is_none_or(|full_at| full_at > now);
            if !keep && self.remembers && !entry.changed {
                changed.push(entry.id);
            }
            keep
        });
        self.live.fetch_sub(before - cells.len(), Ordering::Relaxed);
    }

    fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }
}

/// The locks of the shards that some cells live in, taken in the order of the shards: two callers that
/// want the same ones never wait for each other in a circle.
struct Locked<'a> {
    storage: &'a Embedded,
    shards: ArrayVec<(usize, MutexGuard<'a, Shard>), MAX_RULES>,
}

impl<'a> Locked<'a> {
    fn new(storage: &'a Embedded, ids: &[(CellId, u32)]) -> Self {
        let mut wanted: ArrayVec<usize, MAX_RULES> =
            ids.iter().map(|(id, _)| shard_of(*id)).collect();
        wanted.sort_unstable();
        let mut shards = ArrayVec::<(usize, MutexGuard<'a, Shard>), MAX_RULES>::new();
        for index in wanted {
            if shards.last().is_none_or(|(last, _)| *last != index) {
                shards.push((index, storage.shards[index].lock()));
            }
        }
        Self { storage, shards }
    }

    fn read(&self, id: CellId) -> Option<Cell> {
        let (_, shard) = self.shards.iter().find(|(index, _)| *index == shard_of(id))?;
        shard.cells.find(table_hash(id), |entry| entry.id == id).map(|entry| entry.cell)
    }

    fn write(&mut self, id: CellId, number: u32, cell: Cell) {
        let shard = self.shards.iter_mut().find(|(index, _)| *index == shard_of(id));
        if let Some((_, shard)) = shard {
            self.storage.write(shard, id, number, cell);
        }
    }
}

/// The id is a hash already: one half chooses the shard, the other the place in its table.
fn shard_of(id: CellId) -> usize {
    (id.0[0] >> 32) as usize % SHARDS
}

fn table_hash(id: CellId) -> u64 {
    id.0[1]
}
