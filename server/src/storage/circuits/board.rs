//! What is told to those who watch: which circuits changed, in order.
//!
//! A board remembers the latest changes by name, never what they were: who reads it looks the circuits up, so
//! that a slow reader costs nothing and finds the present. One that is too far behind begins anew.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::CircuitName;
use crate::limits;

/// The boards of all namespaces.
pub struct Boards {
    /// The start that they are of.
    epoch: u64,
    boards: Mutex<HashMap<Arc<str>, Arc<Board>>>,
}

/// What changed of a namespace's circuits.
pub struct Board {
    latest: Mutex<Latest>,
    /// The version of the latest change.
    version: watch::Sender<u64>,
}

#[derive(Default)]
struct Latest {
    /// The version of the newest.
    version: u64,
    /// The newest last.
    changes: VecDeque<Arc<CircuitName>>,
}

impl Boards {
    pub(super) fn new(epoch: u64) -> Self {
        Self { epoch, boards: Mutex::default() }
    }

    /// The start that they are of: versions of another one say nothing.
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// That of a namespace, of which there are as many as namespaces had breakers.
    pub fn of(&self, namespace: &Arc<str>) -> Arc<Board> {
        let mut boards = self.boards.lock();
        if let Some(board) = boards.get(namespace) {
            return Arc::clone(board);
        }
        let board = Arc::new(Board { latest: Mutex::default(), version: watch::Sender::new(0) });
        boards.insert(Arc::clone(namespace), Arc::clone(&board));
        board
    }

    /// A circuit changed, and that is on disk.
    pub(super) fn tell(&self, name: &Arc<CircuitName>) {
        self.of(&name.breaker.namespace).tell(name);
    }
}

impl Board {
    fn tell(&self, name: &Arc<CircuitName>) {
        let mut latest = self.latest.lock();
        if latest.changes.len() == limits::WATCH_LOG {
            latest.changes.pop_front();
        }
        latest.changes.push_back(Arc::clone(name));
        latest.version += 1;
        self.version.send_replace(latest.version);
    }

    /// The version of the latest change, now and whenever there is a later one.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// What changed after that version, each circuit once, and the version that this leads to; `None` if that is
    /// too long ago to be known, or yet to come.
    pub fn since(&self, version: u64) -> Option<(Vec<Arc<CircuitName>>, u64)> {
        let latest = self.latest.lock();
        let missed = usize::try_from(latest.version.checked_sub(version)?).ok()?;
        let known = latest.changes.len().checked_sub(missed)?;
        let mut seen = HashSet::with_capacity(missed);
        let changes = latest.changes.range(known..);
        let changed = changes.filter(|name| seen.insert(name.cell)).cloned().collect();
        Some((changed, latest.version))
    }
}
