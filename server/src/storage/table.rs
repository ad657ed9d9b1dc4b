//! The cells of one shard: densely packed, found by a table of four bytes each.

use std::num::NonZeroU8;

use fusebox_core::{Cell, Mark, State};
use hashbrown::{HashTable, hash_table};

use crate::catalogue::{CellId, PolicyNumber};

/// Entries that are allocated together: few enough that a shard wastes little, many enough that the
/// allocator adds nothing.
const CHUNK: usize = 64;

/// A cell, and what of it is on disk. 80 bytes; every one more is ten megabytes at ten million keys.
pub(super) struct Entry {
    pub(super) id: CellId,
    pub(super) number: PolicyNumber,
    revision: u32,
    state: State,
    mark: Mark,
    /// The round of the writer that carries the mark, cut to 32 bits: those that are not durable yet are
    /// the next two, so nothing is mistaken.
    round: u32,
    /// If there is a mark, one more than its step: so both fit one byte.
    above_step: Option<NonZeroU8>,
    /// The mark waits for the writer.
    pub(super) queued: bool,
    /// What the writer is to do with the cell when it has time.
    pub(super) lagging: Lagging,
    /// A record of the cell is on disk, or will be.
    pub(super) on_disk: bool,
}

impl Entry {
    pub(super) fn new(id: CellId, number: PolicyNumber, cell: Cell) -> Self {
        Self {
            id,
            number,
            revision: cell.revision,
            state: cell.state,
            mark: Mark::TokenBucket(fusebox_core::token_bucket::Mark::default()),
            round: 0,
            above_step: None,
            queued: false,
            lagging: Lagging::Not,
            on_disk: false,
        }
    }

    pub(super) fn cell(&self) -> Cell {
        Cell { revision: self.revision, state: self.state }
    }

    pub(super) fn set_cell(&mut self, cell: Cell) {
        (self.revision, self.state) = (cell.revision, cell.state);
    }

    /// The mark that is on disk, or on its way there.
    pub(super) fn mark(&self) -> Option<Marked> {
        let step = self.above_step?.get() - 1;
        Some(Marked { mark: self.mark, round: self.round, step })
    }

    pub(super) fn set_mark(&mut self, Marked { mark, round, step }: Marked) {
        (self.mark, self.round, self.on_disk) = (mark, round, true);
        self.above_step = Some(NonZeroU8::MIN.saturating_add(step));
    }

    /// The mark, if there is one, covers the present state and nothing more; that round carries it.
    pub(super) fn lower_mark(&mut self, round: u32) {
        (self.mark, self.round) = (self.state.into(), round);
    }

    /// What is to be on disk of the cell while it lives.
    pub(super) fn kept(&self) -> Cell {
        let state = if self.above_step.is_some() { self.mark.into() } else { self.state };
        Cell { revision: self.revision, state }
    }
}

/// What the writer is to do with a cell when it has time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lagging {
    /// Nothing.
    Not,
    /// To write what is to be on disk of it.
    Write,
    /// And to lower its mark before: some of what it covers came back.
    Lower,
}

/// A mark, and which round carries it.
#[derive(Clone, Copy)]
pub(super) struct Marked {
    pub(super) mark: Mark,
    pub(super) round: u32,
    /// It runs `2^step` tokens ahead, at most 2^63; none if 0.
    pub(super) step: u8,
}

/// Entries by id.
#[derive(Default)]
pub(super) struct Table {
    /// Where each entry is.
    places: HashTable<u32>,
    /// All full but the last one.
    chunks: Vec<Vec<Entry>>,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Where a cell is; it stays there until one is removed.
    pub(super) fn place(&self, id: CellId) -> Option<u32> {
        self.places.find(hash(id), |place| self.get(*place).id == id).copied()
    }

    pub(super) fn get(&self, place: u32) -> &Entry {
        &self.chunks[place as usize / CHUNK][place as usize % CHUNK]
    }

    pub(super) fn get_mut(&mut self, place: u32) -> &mut Entry {
        &mut self.chunks[place as usize / CHUNK][place as usize % CHUNK]
    }

    pub(super) fn find_mut(&mut self, id: CellId) -> Option<&mut Entry> {
        self.place(id).map(|place| self.get_mut(place))
    }

    /// Adds an entry that is not there yet.
    pub(super) fn insert(&mut self, entry: Entry) -> &mut Entry {
        // There is room for ten million cells in all, so 32 bits count those of a shard.
        #[allow(clippy::cast_possible_truncation)]
        let place = self.len() as u32;
        let id = entry.id;
        if self.chunks.last().is_none_or(|chunk| chunk.len() == CHUNK) {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        self.chunks[place as usize / CHUNK].push(entry);
        let chunks = &self.chunks;
        let hash_at =
            |place: &u32| hash(chunks[*place as usize / CHUNK][*place as usize % CHUNK].id);
        self.places.insert_unique(hash(id), place, hash_at);
        self.get_mut(place)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.chunks.iter().flatten()
    }

    /// Removes every entry that `keep` does not want.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&Entry) -> bool) {
        // From the end, so that the one that fills a gap has been looked at.
        #[allow(clippy::cast_possible_truncation)]
        for place in (0..self.len() as u32).rev() {
            if !keep(self.get(place)) {
                self.remove(place);
            }
        }
    }

    /// The last entry moves to where the removed one was.
    fn remove(&mut self, place: u32) {
        self.forget(place);
        let Some(last) = self.chunks.last_mut().and_then(Vec::pop) else { return };
        if self.chunks.last().is_some_and(Vec::is_empty) {
            self.chunks.pop();
        }
        if self.chunks.len() * CHUNK <= place as usize
            || self.chunks[place as usize / CHUNK].len() <= place as usize % CHUNK
        {
            return; // it was the last itself
        }
        let moved = last.id;
        *self.get_mut(place) = last;
        #[allow(clippy::cast_possible_truncation)]
        let was = self.len() as u32;
        if let Some(last) = self.places.find_mut(hash(moved), |place| *place == was) {
            *last = place;
        }
    }

    fn forget(&mut self, place: u32) {
        let found = self.places.find_entry(hash(self.get(place).id), |other| *other == place);
        if let Ok(found) = found {
            hash_table::OccupiedEntry::remove(found);
        }
    }
}

/// The id is a hash already: one half chooses the shard, the other the place in its table.
fn hash(id: CellId) -> u64 {
    id.0[1]
}

#[cfg(test)]
mod tests {
    use fusebox_core::{Time, token_bucket};

    use super::*;

    fn entry(id: u64) -> Entry {
        let state = token_bucket::State { spent: id, remainder: 0, out: 0, at: Time::ZERO };
        let cell = Cell { revision: 1, state: State::TokenBucket(state) };
        Entry::new(CellId([0, id]), PolicyNumber(0), cell)
    }

    #[test]
    fn an_entry_stays_small() {
        assert_eq!(size_of::<Entry>(), 80);
    }

    #[test]
    fn what_is_kept_is_found_and_what_is_not_is_gone() {
        let mut table = Table::default();
        for id in 0..1_000 {
            table.insert(entry(id));
        }
        for keep in [3, 5, 7, 1_001] {
            table.retain(|entry| entry.id.0[1] % keep != 0);
        }
        for id in 0..1_000 {
            let kept = [3, 5, 7].iter().all(|keep| id % keep != 0) && id % 1_001 != 0;
            let found = table.place(CellId([0, id])).map(|place| table.get(place).id.0[1]);
            assert_eq!(found, kept.then_some(id));
        }
        assert_eq!(table.iter().count(), table.len());
        table.retain(|_| false);
        assert_eq!((table.len(), table.chunks.len()), (0, 0));
    }
}
