//! Which clients have which policy and key bound: alone each has its part of the limit.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::BuildHasherDefault,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;

use crate::{catalogue::CellId, limits, reservation::Reservation, storage::Hashed};

/// The clients of each policy and key that sessions have bound, each once, however many sessions it has.
#[derive(Debug)]
pub(super) struct Bindings {
    shards: [Mutex<Shard>; limits::BINDING_SHARDS],
    bound: Arc<AtomicUsize>,
    version: AtomicU64,
}

type Shard = HashMap<CellId, Clients, BuildHasherDefault<Hashed>>;

/// The clients of one policy and key.
#[derive(Debug, Default)]
struct Clients {
    /// How often each has bound it.
    times: HashMap<Arc<str>, u32>,
    count: Arc<AtomicU32>,
}

/// A policy and key that a session has bound, until it is dropped.
#[derive(Debug)]
pub(super) struct Binding {
    bindings: Arc<Bindings>,
    cell: CellId,
    client: Arc<str>,
    count: Arc<AtomicU32>,
    _room: Reservation,
}

impl Bindings {
    /// Nothing is bound.
    pub(super) fn new() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            bound: Arc::default(),
            version: AtomicU64::new(0),
        }
    }

    /// Binds what that cell counts for a client; `None` if as much is bound as there may be.
    pub(super) fn bind(self: &Arc<Self>, cell: CellId, client: &Arc<str>) -> Option<Binding> {
        let room = Reservation::of(&self.bound, 1, limits::BINDINGS)?;
        let mut shard = self.shard(cell).lock();
        let clients = shard.entry(cell).or_default();
        *clients.times.entry(Arc::clone(client)).or_default() += 1;
        self.recount(clients);
        Some(Binding {
            bindings: Arc::clone(self),
            cell,
            client: Arc::clone(client),
            count: Arc::clone(&clients.count),
            _room: room,
        })
    }

    /// Grows with each change of how many clients have something bound.
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    fn recount(&self, clients: &Clients) {
        let count = u32::try_from(clients.times.len()).unwrap_or(u32::MAX);
        if clients.count.swap(count, Ordering::Relaxed) != count {
            self.version.fetch_add(1, Ordering::Release);
        }
    }

    #[allow(clippy::cast_possible_truncation)] // one of few
    fn shard(&self, cell: CellId) -> &Mutex<Shard> {
        &self.shards[cell.0[0] as usize % limits::BINDING_SHARDS]
    }
}

impl Binding {
    /// Clients that have it bound now.
    pub(super) fn clients(&self) -> u32 {
        self.count.load(Ordering::Relaxed)
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        let mut shard = self.bindings.shard(self.cell).lock();
        let Entry::Occupied(mut entry) = shard.entry(self.cell) else { return };
        let clients = entry.get_mut();
        if let Some(times) = clients.times.get_mut(&self.client) {
            *times -= 1;
            if *times == 0 {
                clients.times.remove(&self.client);
            }
        }
        self.bindings.recount(clients);
        if clients.times.is_empty() {
            entry.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CELL: CellId = CellId([1, 2]);

    #[test]
    fn a_client_counts_once_until_its_last_session_has_unbound_it() {
        let bindings = Arc::new(Bindings::new());
        let [one, other] = ["one", "other"].map(Arc::<str>::from);
        let first = bindings.bind(CELL, &one).unwrap();
        let second = bindings.bind(CELL, &one).unwrap();
        assert_eq!(first.clients(), 1);
        let version = bindings.version();
        let third = bindings.bind(CELL, &other).unwrap();
        let elsewhere = bindings.bind(CellId([1, 3]), &other).unwrap();
        assert_eq!((first.clients(), elsewhere.clients()), (2, 1));
        assert!(bindings.version() > version);
        drop(first);
        assert_eq!(second.clients(), 2);
        drop(second);
        assert_eq!(third.clients(), 1);
        drop((third, elsewhere));
        assert!(bindings.shards.iter().all(|shard| shard.lock().is_empty()), "nothing is left");
        assert_eq!(bindings.bound.load(Ordering::Relaxed), 0);
    }
}
