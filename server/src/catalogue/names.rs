//! The keys of a policy's cells as text: a cell is found by a hash of its key, which nobody can read back.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;

use super::CellId;
use crate::limits;

/// Keys that were charged in this life and whose cells may live. Only operators read them, so one that is not
/// here is no loss: it is counted instead.
#[derive(Debug)]
pub struct Names {
    shards: [Mutex<Shard>; limits::NAME_SHARDS],
    count: AtomicUsize,
    /// Of all policies.
    taken: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
struct Shard {
    cells: BTreeMap<Box<str>, CellId>,
    /// The key that was looked at last.
    looked_at: Option<Box<str>>,
}

impl Names {
    /// None yet; `taken` counts those of all policies.
    pub fn new(taken: Arc<AtomicUsize>) -> Self {
        Self { shards: Default::default(), count: AtomicUsize::new(0), taken }
    }

    /// Remembers the key of a cell, if there is room.
    pub fn add(&self, key: &str, cell: CellId) {
        #[allow(clippy::cast_possible_truncation)]
        let mut shard = self.shards[cell.0[1] as usize % limits::NAME_SHARDS].lock();
        if shard.cells.contains_key(key) {
            return;
        }
        if self.taken.fetch_add(1, Ordering::Relaxed) < limits::NAMES {
            shard.cells.insert(key.into(), cell);
            self.count.fetch_add(1, Ordering::Relaxed);
        } else {
            self.taken.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Keys that are remembered.
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first `count` keys that begin with `prefix`, in order; only those after `after`, if one is given.
    pub fn page(&self, prefix: &str, after: Option<&str>, count: usize) -> Vec<Box<str>> {
        let start = match after.filter(|after| *after >= prefix) {
            Some(after) => Bound::Excluded(after),
            None => Bound::Included(prefix),
        };
        let mut keys = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock();
            let keys_of = shard.cells.range::<str, _>((start, Bound::Unbounded));
            let keys_of = keys_of.map(|(key, _)| key).take_while(|key| key.starts_with(prefix));
            keys.extend(keys_of.take(count).cloned());
        }
        keys.sort_unstable();
        keys.truncate(count);
        keys
    }

    /// Forgets the keys of cells that are gone, of the next few in one shard.
    pub fn prune(&self, shard: usize, is_gone: impl Fn(CellId) -> bool) {
        let mut shard = self.shards[shard % limits::NAME_SHARDS].lock();
        let Shard { cells, looked_at } = &mut *shard;
        let start = looked_at.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
        let (mut gone, mut last, mut seen) = (Vec::new(), None, 0);
        for (key, cell) in cells.range::<str, _>((start, Bound::Unbounded)) {
            if seen == limits::NAMES_PRUNED_AT_ONCE {
                break;
            }
            seen += 1;
            last = Some(key);
            if is_gone(*cell) {
                gone.push(key.clone());
            }
        }
        // From the beginning, once the end is reached.
        *looked_at = last.filter(|_| seen == limits::NAMES_PRUNED_AT_ONCE).cloned();
        for key in &gone {
            cells.remove(key);
        }
        self.count.fetch_sub(gone.len(), Ordering::Relaxed);
        self.taken.fetch_sub(gone.len(), Ordering::Relaxed);
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: u64) -> Names {
        let names = Names::new(Arc::default());
        for index in 0..count {
            names.add(&format!("key-{index:03}"), CellId([0, index]));
        }
        names
    }

    fn page(names: &Names, prefix: &str, after: Option<&str>) -> Vec<String> {
        names.page(prefix, after, 2).into_iter().map(String::from).collect()
    }

    #[test]
    fn keys_come_in_order_page_by_page() {
        let names = names(100);
        names.add("", CellId([0, 200]));
        names.add("z", CellId([0, 201]));
        assert_eq!(page(&names, "", None), ["", "key-000"]);
        assert_eq!(page(&names, "", Some("")), ["key-000", "key-001"]);
        assert_eq!(page(&names, "key-05", None), ["key-050", "key-051"]);
        assert_eq!(page(&names, "key-05", Some("key-058")), ["key-059"]);
        assert_eq!(page(&names, "key-05", Some("a")), ["key-050", "key-051"]);
        assert_eq!(page(&names, "y", None), [""; 0]);
    }

    #[test]
    fn those_of_cells_that_are_gone_are_forgotten_slice_by_slice() {
        let count = 10 * (limits::NAMES_PRUNED_AT_ONCE * limits::NAME_SHARDS) as u64;
        let names = names(count);
        assert_eq!(names.len() as u64, count);
        for round in 0..12 * limits::NAME_SHARDS {
            names.prune(round, |cell| cell.0[1] != 7);
        }
        assert_eq!((names.len(), names.taken.load(Ordering::Relaxed)), (1, 1));
        assert_eq!(page(&names, "", None), ["key-007"]);
    }

    #[test]
    fn there_is_an_end_to_them_and_a_policy_that_goes_makes_room() {
        let taken = Arc::new(AtomicUsize::new(limits::NAMES - 1));
        let names = Names::new(Arc::clone(&taken));
        names.add("a", CellId([0, 1]));
        names.add("a", CellId([0, 1]));
        names.add("b", CellId([0, 2]));
        assert_eq!(page(&names, "", None), ["a"]);
        drop(names);
        assert_eq!(taken.load(Ordering::Relaxed), limits::NAMES - 1);
    }
}
