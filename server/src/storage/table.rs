//! The cells of one shard: densely packed, found by a table of four bytes each.

use std::num::NonZeroU8;

use fusebox_core::{Cell, Mark, State};
use hashbrown::{HashTable, hash_table};

use crate::catalogue::{CellId, LimiterNumber};

/// Entries that are allocated together: few enough that a shard wastes little, many enough that the
/// allocator adds nothing.
const CHUNK: usize = 64;

/// A cell, and what of it is on disk. 88 bytes; every one more is ten megabytes at ten million keys.
pub(super) struct Entry {
    pub(super) id: CellId,
    pub(super) number: LimiterNumber,
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
    flags: u8,
}

/// A record of the cell is on disk, or will be.
const ON_DISK: u8 = 1;

/// Many keys share the cell.
const OVERFLOW: u8 = 2;

/// The cell was charged in this life.
const SEEN: u8 = 4;

impl Entry {
    pub(super) fn new(id: CellId, number: LimiterNumber, cell: Cell, is_overflow: bool) -> Self {
        Self {
            id,
            number,
            revision: cell.revision,
            state: cell.state,
            mark: Mark::default(),
            round: 0,
            above_step: None,
            queued: false,
            lagging: Lagging::Not,
            flags: if is_overflow { OVERFLOW } else { 0 },
        }
    }

    pub(super) fn cell(&self) -> Cell {
        Cell { revision: self.revision, state: self.state }
    }

    pub(super) fn set_cell(&mut self, number: LimiterNumber, cell: Cell) {
        (self.number, self.revision, self.state) = (number, cell.revision, cell.state);
    }

    pub(super) fn is_on_disk(&self) -> bool {
        self.flags & ON_DISK != 0
    }

    pub(super) fn set_on_disk(&mut self, on_disk: bool) {
        self.flags = self.flags & !ON_DISK | if on_disk { ON_DISK } else { 0 };
    }

    /// Notes that it was charged in this life; whether it was before.
    pub(super) fn see(&mut self) -> bool {
        let seen = self.flags & SEEN != 0;
        self.flags |= SEEN;
        seen
    }

    pub(super) fn is_overflow(&self) -> bool {
        self.flags & OVERFLOW != 0
    }

    /// The mark that is on disk, or on its way there.
    pub(super) fn mark(&self) -> Option<Marked> {
        let step = self.above_step?.get() - 1;
        Some(Marked { mark: self.mark, round: self.round, step })
    }

    pub(super) fn set_mark(&mut self, Marked { mark, round, step }: Marked) {
        (self.mark, self.round) = (mark, round);
        self.set_on_disk(true);
        self.above_step = Some(NonZeroU8::MIN.saturating_add(step));
    }

    /// Nothing is marked: what is to be on disk is the present state.
    pub(super) fn clear_mark(&mut self) {
        self.above_step = None;
    }

    /// Whether there is a mark that covers more than the present state.
    pub(super) fn exceeds_lowest_mark(&self) -> bool {
        self.above_step.is_some() && self.mark.spent > self.state.lowest_mark(self.mark.at).spent
    }

    /// The mark, if there is one, covers the present state and nothing more; that round carries it.
    pub(super) fn lower_mark(&mut self, round: u32) {
        (self.mark, self.round) = (self.state.lowest_mark(self.mark.at), round);
    }

    /// What is to be on disk of the cell while it lives.
    pub(super) fn kept(&self) -> Cell {
        let state = if self.above_step.is_some() { self.state.kept(self.mark) } else { self.state };
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

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Entry> {
        self.chunks.iter_mut().flatten()
    }

    /// Looks at the `most` entries before `end` and removes those that `keep` does not want. Where it is to go
    /// on: 0 when all have been looked at.
    pub(super) fn retain_before(
        &mut self,
        end: u32,
        most: u32,
        mut keep: impl FnMut(&mut Entry) -> bool,
    ) -> u32 {
        #[allow(clippy::cast_possible_truncation)]
        let end = end.min(self.len() as u32);
        let start = end.saturating_sub(most);
        // From the end, so that the one that fills a gap has been looked at.
        for place in (start..end).rev() {
            if !keep(self.get_mut(place)) {
                self.remove(place);
            }
        }
        start
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
        Entry::new(CellId([0, id]), LimiterNumber(0), cell, false)
    }

    #[test]
    fn an_entry_stays_small() {
        assert_eq!(size_of::<Entry>(), 88);
    }

    #[test]
    fn what_is_kept_is_found_and_what_is_not_is_gone() {
        let mut table = Table::default();
        for id in 0..1_000 {
            table.insert(entry(id));
        }
        for keep in [3, 5, 7, 1_001] {
            let mut place = u32::MAX;
            while place > 0 {
                place = table.retain_before(place, 100, |entry| entry.id.0[1] % keep != 0);
            }
        }
        for id in 0..1_000 {
            let kept = [3, 5, 7].iter().all(|keep| id % keep != 0) && id % 1_001 != 0;
            let found = table.place(CellId([0, id])).map(|place| table.get(place).id.0[1]);
            assert_eq!(found, kept.then_some(id));
        }
        assert_eq!(table.iter().count(), table.len());
        table.retain_before(u32::MAX, u32::MAX, |_| false);
        assert_eq!((table.len(), table.chunks.len()), (0, 0));
    }
}
