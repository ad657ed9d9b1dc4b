//! Who leases from which cell: what can be leased is shared by all that do.

use std::{collections::HashMap, time::Duration};

use fusebox_core::Time;
use parking_lot::Mutex;

use crate::{catalogue::CellId, limits};

/// Clients by the cells that they lease from, each until it has not asked for a while.
#[derive(Debug, Default)]
pub(super) struct Lessees {
    cells: Mutex<Cells>,
}

#[derive(Debug, Default)]
struct Cells {
    by_cell: HashMap<CellId, HashMap<Box<str>, Time>>,
    /// Of all cells.
    clients: usize,
    tended: Time,
}

impl Lessees {
    /// How many clients lease from a cell now that this one does, too; `None` if there is no room to remember
    /// it. Leases are few: a client asks once in a lease time.
    pub(super) fn count(
        &self,
        cell: CellId,
        client: &str,
        lease_time: Duration,
        now: Time,
    ) -> Option<u32> {
        let mut cells = self.cells.lock();
        let Cells { by_cell, clients, .. } = &mut *cells;
        let of_cell = by_cell.entry(cell).or_default();
        // Two leases long: who pauses for one is still there.
        let until = now.after(2 * lease_time);
        match of_cell.get_mut(client) {
            Some(before) => *before = until,
            None => {
                let before = of_cell.len();
                of_cell.retain(|_, until| *until > now);
                *clients -= before - of_cell.len();
                if *clients >= limits::LESSEES {
                    return None;
                }
                *clients += 1;
                of_cell.insert(client.into(), until);
            }
        }
        u32::try_from(of_cell.len()).ok()
    }

    /// Forgets those that have not asked for a while, once in a few seconds.
    pub(super) fn tend(&self, now: Time) {
        let mut cells = self.cells.lock();
        if cells.tended.after(limits::LESSEES_TENDED) > now {
            return;
        }
        cells.tended = now;
        let Cells { by_cell, clients, .. } = &mut *cells;
        by_cell.retain(|_, of_cell| {
            of_cell.retain(|_, until| *until > now);
            !of_cell.is_empty()
        });
        *clients = by_cell.values().map(HashMap::len).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(1);

    #[test]
    fn those_that_asked_lately_are_counted_once_each() {
        let (lessees, cell) = (Lessees::default(), CellId([1, 2]));
        let at = |seconds: u64| Time::from_nanos(seconds * 1_000_000_000);
        let count = |client, now| lessees.count(cell, client, LEASE, at(now)).unwrap();
        assert_eq!((count("a", 0), count("a", 0), count("b", 1)), (1, 1, 2));
        assert_eq!(count("c", 2), 2, "a was not heard of for two leases");
        assert_eq!(lessees.count(CellId([1, 3]), "a", LEASE, at(2)), Some(1));
        lessees.tend(at(100));
        assert_eq!(lessees.cells.lock().clients, 0);
    }
}
