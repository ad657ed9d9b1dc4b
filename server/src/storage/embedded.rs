//! Cells in memory, in shards.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicUsize, Ordering},
};

use arrayvec::ArrayVec;
use crossbeam_utils::CachePadded;
use fusebox_core::{
    Cell, Cells, Cost, Decision, Kind, MAX_RULES, Policy, Rule, Rules, Settled, Time,
};
use hashbrown::HashTable;
use parking_lot::{Mutex, MutexGuard};

use super::{Answer, CellAsk, Charge, Settlement, Storage, StorageError};
use crate::{
    catalogue::{Catalogue, CellId, PolicyNumber},
    limits,
    reservation::Reservation,
};

/// Cells in memory. What changes is remembered, so that a [`Writer`](super::Writer) can follow.
pub struct Embedded {
    shards: Box<[CachePadded<Mutex<Shard>>]>,
    live: Arc<AtomicUsize>,
    capacity: usize,
    /// Counts the rounds of housekeeping: each looks at the next shard.
    tended: AtomicUsize,
    /// Whether a journal keeps the cells: otherwise nobody takes what is noted as changed.
    kept: bool,
    failure: OnceLock<Arc<str>>,
}

#[derive(Default)]
struct Shard {
    cells: HashTable<Entry>,
    /// Cells changed or gone since the writer last looked.
    changed: Vec<CellId>,
    /// When a full cell last left. A caller whose clock was read before that must not find the cell fuller
    /// than it was then: it is decided as of this time.
    swept: Time,
}

struct Entry {
    id: CellId,
    cell: Cell,
    number: PolicyNumber,
    changed: bool,
}

/// A cell that changed: what it is now, or that it is gone.
pub(super) type Change = (CellId, Option<(PolicyNumber, Cell)>);

impl Embedded {
    /// No cells yet, and room for `capacity` of them.
    pub fn new(kept: bool, capacity: usize) -> Self {
        let shards = (0..limits::CELL_SHARDS).map(|_| CachePadded::default()).collect();
        Self {
            shards,
            live: Arc::default(),
            capacity,
            tended: AtomicUsize::new(0),
            kept,
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
        let Shard { cells, changed, .. } = &mut *shard;
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

    /// Puts a cell that was recovered, and whether its record is to be written again.
    pub(super) fn restore(&self, id: CellId, number: PolicyNumber, cell: Cell, changed: bool) {
        let entry = Entry { id, cell, number, changed };
        let mut shard = self.shards[shard_of(id)].lock();
        if changed {
            shard.changed.push(id);
        }
        shard.cells.insert_unique(table_hash(id), entry, |entry| table_hash(entry.id));
        self.live.fetch_add(1, Ordering::Relaxed);
    }

    /// Deletes a cell that was recovered, but is full by now.
    pub(super) fn forget(&self, id: CellId) {
        self.shards[shard_of(id)].lock().changed.push(id);
    }

    fn write(
        &self,
        shard: &mut Shard,
        (id, number): (CellId, PolicyNumber),
        cell: Cell,
        room: &mut Option<Reservation>,
    ) {
        let hash = table_hash(id);
        match shard.cells.find_mut(hash, |entry| entry.id == id) {
            Some(entry) => {
                entry.cell = cell;
                if self.kept && !entry.changed {
                    entry.changed = true;
                    shard.changed.push(id);
                }
            }
            None => {
                let entry = Entry { id, cell, number, changed: self.kept };
                shard.cells.insert_unique(hash, entry, |entry| table_hash(entry.id));
                if !room.as_mut().is_some_and(Reservation::keep_one) {
                    self.live.fetch_add(1, Ordering::Relaxed);
                }
                if self.kept {
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
    fn apply(
        &self,
        charge: &Charge<'_>,
        mut room: Option<Reservation>,
        now: Time,
    ) -> Result<Answer<Decision>, StorageError> {
        self.check_alive()?;

        let mut ids = ArrayVec::<(CellId, PolicyNumber), MAX_RULES>::new();
        let mut rules = Rules::new();
        for ask in &charge.asks {
            let cell = ids.iter().position(|(id, _)| *id == ask.cell).unwrap_or_else(|| {
                ids.push((ask.cell, ask.number));
                ids.len() - 1
            });
            rules.push(Rule { cell, policy: ask.policy, cost: ask.cost });
        }

        let mut shards = Locked::new(self, &ids);
        let now = shards.not_before_a_sweep(now);
        let mut cells: Cells = ids.iter().map(|(id, _)| shards.read(*id)).collect();
        let creates =
            |rule: &&Rule<'_>| cells[rule.cell].is_none() && may_create(rule.policy, rule.cost);
        let new = rules.iter().filter(creates).count();
        if new > 0 && room.is_none() && self.live() + new > self.capacity {
            return Err(StorageError::Full(self.live()));
        }

        let before = cells.clone();
        let decision = fusebox_core::apply(&rules, charge.charging, &mut cells, now);
        for (id, (before, after)) in ids.into_iter().zip(before.iter().zip(&cells)) {
            if let Some(cell) = after.filter(|_| before != after) {
                shards.write(id, cell, &mut room);
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
        let now = now.max(shard.swept);
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
            self.write(&mut shard, (id, settlement.number), cell, &mut None);
        }
        Ok(Answer::Now(settled))
    }

    fn reserve(&self, charge: &Charge<'_>) -> Result<Reservation, StorageError> {
        self.check_alive()?;
        let creates = |ask: &&CellAsk<'_>| {
            let shard = self.shards[shard_of(ask.cell)].lock();
            let live = shard.cells.find(table_hash(ask.cell), |entry| entry.id == ask.cell);
            may_create(ask.policy, ask.cost) && live.is_none()
        };
        let cells = charge.asks.iter().filter(creates).count();
        Reservation::of(&self.live, cells, self.capacity).ok_or(StorageError::Full(self.live()))
    }

    fn tend(&self, catalogue: &Catalogue, now: Time) {
        let next = self.tended.fetch_add(1, Ordering::Relaxed) % limits::CELL_SHARDS;
        let mut shard = self.shards[next].lock();
        let Shard { cells, changed, swept } = &mut *shard;
        let before = cells.len();
        cells.retain(|entry| {
            let policy = catalogue.numbered(entry.number);
            let full_at = policy.map_or(Some(now), |policy| policy.settings.full_at(entry.cell));
            let keep = full_at.is_none_or(|full_at| full_at > now);
            if !keep && self.kept && !entry.changed {
                changed.push(entry.id);
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
    storage: &'a Embedded,
    shards: ArrayVec<(usize, MutexGuard<'a, Shard>), MAX_RULES>,
}

impl<'a> Locked<'a> {
    fn new(storage: &'a Embedded, ids: &[(CellId, PolicyNumber)]) -> Self {
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

    /// `now`, or the latest sweep of these shards.
    fn not_before_a_sweep(&self, now: Time) -> Time {
        self.shards.iter().fold(now, |now, (_, shard)| now.max(shard.swept))
    }

    fn read(&self, id: CellId) -> Option<Cell> {
        let (_, shard) = self.shards.iter().find(|(index, _)| *index == shard_of(id))?;
        shard.cells.find(table_hash(id), |entry| entry.id == id).map(|entry| entry.cell)
    }

    fn write(&mut self, id: (CellId, PolicyNumber), cell: Cell, room: &mut Option<Reservation>) {
        let shard = self.shards.iter_mut().find(|(index, _)| *index == shard_of(id.0));
        if let Some((_, shard)) = shard {
            self.storage.write(shard, id, cell, room);
        }
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

fn table_hash(id: CellId) -> u64 {
    id.0[1]
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
    fn charge<'a>(policy: &'a Policy, cells: &[u64], tokens: u64) -> Charge<'a> {
        let ask = |cell: &u64| CellAsk {
            cell: CellId([*cell << 32, *cell]),
            number: PolicyNumber(0),
            policy,
            cost: Cost { tokens, estimated: false },
        };
        Charge { charging: Charging::AllOrNothing, asks: cells.iter().map(ask).collect() }
    }

    #[test]
    fn a_full_server_serves_live_keys_on_and_charges_nothing_for_new_ones() {
        let (policy, cells) = (policy(), Embedded::new(false, 2));
        let apply = |ids: &[u64], tokens| cells.apply(&charge(&policy, ids, tokens), None, NOW);
        assert!(apply(&[1, 2], 1).is_ok());
        assert!(matches!(apply(&[3], 1), Err(StorageError::Full(2))));
        assert!(matches!(apply(&[1, 3], 1), Err(StorageError::Full(2))));
        assert!(apply(&[3], 0).is_ok(), "a peek needs no room");
        let Ok(Answer::Now(decision)) = apply(&[1], 1) else { panic!("1 is live") };
        assert_eq!(decision.verdicts[0].remaining, 8);
    }

    #[test]
    fn more_than_there_is_room_for_may_be_recovered_and_is_served() {
        let (policy, cells) = (policy(), Embedded::new(false, 1));
        let state = fusebox_core::token_bucket::State { spent: 5, remainder: 0, out: 0, at: NOW };
        let cell = Cell { revision: 1, state: fusebox_core::State::TokenBucket(state) };
        for id in [1, 2] {
            cells.restore(CellId([id << 32, id]), PolicyNumber(0), cell, false);
        }
        let apply = |id| cells.apply(&charge(&policy, &[id], 5), None, NOW);
        assert!(apply(1).is_ok() && apply(2).is_ok());
        assert!(cells.reserve(&charge(&policy, &[1, 2], 1)).is_ok());
        assert!(matches!(apply(3), Err(StorageError::Full(2))));
    }

    #[test]
    fn room_is_reserved_for_what_is_new_and_no_more_than_that() {
        let (policy, cells) = (policy(), Embedded::new(false, 2));
        let live = charge(&policy, &[1], 1);
        let room = cells.reserve(&live).unwrap();
        assert!(cells.apply(&live, Some(room), NOW).is_ok());
        assert_eq!(cells.live(), 1);

        assert!(cells.reserve(&charge(&policy, &[2, 3], 1)).is_err());
        let room = cells.reserve(&charge(&policy, &[1, 2], 1)).unwrap();
        assert_eq!(cells.live(), 2, "what is reserved is counted");
        assert!(cells.reserve(&charge(&policy, &[1], 1)).is_ok(), "a live key needs no room");
        assert!(cells.reserve(&charge(&policy, &[3], 0)).is_ok(), "nor does a peek");
        assert!(cells.reserve(&charge(&policy, &[3], 1)).is_err());
        drop(room);
        assert_eq!(cells.live(), 1, "and given back when it was not needed");
    }

    #[test]
    fn cells_that_are_full_leave_and_make_room() {
        let (policy, cells) = (policy(), Embedded::new(true, 1));
        assert!(cells.apply(&charge(&policy, &[1], 1), None, NOW).is_ok());
        // An empty catalogue knows no policy, so nothing holds the cell.
        for _ in 0..cells.shards() {
            cells.tend(&Catalogue::default(), NOW);
        }
        assert_eq!(cells.live(), 0);
        let changes: Vec<_> =
            (0..cells.shards()).flat_map(|shard| cells.take_changes(shard)).collect();
        assert!(
            matches!(changes[..], [(CellId([_, 1]), None)]),
            "the writer deletes it: {changes:?}"
        );
        assert!(cells.apply(&charge(&policy, &[2], 1), None, NOW).is_ok());
    }

    #[test]
    fn a_caller_that_is_late_does_not_find_a_swept_cell_full_before_it_was() {
        let (policy, cells) = (policy(), Embedded::new(false, 10));
        let at = |millis: u64| Time::from_nanos(millis * 1_000_000);
        let apply = |tokens, now| {
            let answer = cells.apply(&charge(&policy, &[1], tokens), None, now).unwrap();
            let Answer::Now(decision) = answer else { panic!("memory answers at once") };
            decision.allowed
        };
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
        let (policy, cells) = (policy(), Embedded::new(false, 1));
        assert!(cells.apply(&charge(&policy, &[1], 1), None, NOW).is_ok());
        let nothing = TokenBucket::new(0, Duration::from_secs(1), 0).unwrap();
        let closed = Policy::new(Limit::TokenBucket(nothing), 0);
        assert!(cells.apply(&charge(&closed, &[2], 1), None, NOW).is_ok(), "it is an answer");
    }
}
