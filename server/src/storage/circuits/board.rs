//! What is told to those who watch: which circuits changed, in order.
//!
//! A board remembers the latest changes by name, never what they were: who reads it looks the circuits up, so
//! that a slow reader costs nothing and finds the present. One that is too far behind begins anew. Versions begin
//! at 1: who knows none says 0.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::CircuitName;
use crate::limits;

/// The version before any change.
const FIRST: u64 = 1;

/// The boards of all namespaces.
pub struct Boards {
    /// The start that they are of: its number, and what tells it from another server's.
    epoch: u64,
    boards: Mutex<HashMap<Arc<str>, Arc<Board>>>,
}

/// What changed of a namespace's circuits.
pub struct Board {
    latest: Mutex<Latest>,
    /// Counts the changes, and the end.
    words: AtomicU64,
    /// Wakes who waits in the order in which they came, so that a simulation has them in the same order again.
    word: Notify,
}

/// Who waits for changes of a board.
pub struct Changes {
    board: Arc<Board>,
    /// Words that it has heard.
    heard: u64,
}

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

    /// That of a namespace, of which there are as many as namespaces had circuits, or somebody who watches.
    pub fn of(&self, namespace: &Arc<str>) -> Arc<Board> {
        let mut boards = self.boards.lock();
        if let Some(board) = boards.get(namespace) {
            return Arc::clone(board);
        }
        let board = Arc::new(Board::new());
        boards.insert(Arc::clone(namespace), Arc::clone(&board));
        board
    }

    /// A circuit changed, and that is on disk.
    pub(super) fn tell(&self, name: &Arc<CircuitName>) {
        self.of(&name.breaker.namespace).tell(name);
    }

    /// Wakes all who wait for a change, to find that there will be none.
    pub(super) fn end(&self) {
        for board in self.boards.lock().values() {
            board.give_word();
        }
    }
}

impl Board {
    fn new() -> Self {
        let latest = Latest { version: FIRST, changes: VecDeque::new() };
        Self { latest: Mutex::new(latest), words: AtomicU64::new(0), word: Notify::new() }
    }

    fn tell(&self, name: &Arc<CircuitName>) {
        let mut latest = self.latest.lock();
        if latest.changes.len() == limits::WATCH_LOG {
            latest.changes.pop_front();
        }
        latest.changes.push_back(Arc::clone(name));
        latest.version += 1;
        drop(latest);
        self.give_word();
    }

    fn give_word(&self) {
        self.words.fetch_add(1, Ordering::Release);
        self.word.notify_waiters();
    }

    /// What tells of changes from now on.
    pub fn subscribe(self: &Arc<Self>) -> Changes {
        Changes { heard: self.words.load(Ordering::Acquire), board: Arc::clone(self) }
    }

    /// The version of the latest change.
    pub fn version(&self) -> u64 {
        self.latest.lock().version
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

impl Changes {
    /// Returns once there was a change, or the end, that this has not told of yet. Dropping it misses none.
    pub async fn heard(&mut self) {
        let mut word = pin!(self.board.word.notified());
        // From here on it hears, so what comes after the look is not missed.
        word.as_mut().enable();
        let words = self.board.words.load(Ordering::Acquire);
        if words == self.heard {
            word.await;
        }
        self.heard = self.board.words.load(Ordering::Acquire);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::{CellId, PolicyName};

    fn name(number: u64) -> Arc<CircuitName> {
        let breaker = PolicyName::new("test", "target");
        Arc::new(CircuitName { breaker, key: "".into(), cell: CellId([0, number]) })
    }

    fn since(board: &Board, version: u64) -> Option<(Vec<u64>, u64)> {
        let (names, version) = board.since(version)?;
        Some((names.iter().map(|name| name.cell.0[1]).collect(), version))
    }

    #[test]
    fn what_changed_since_a_version_is_known_each_once() {
        let board = Board::new();
        assert_eq!(since(&board, 1), Some((vec![], 1)), "nothing yet");
        for number in [7, 8, 7] {
            board.tell(&name(number));
        }
        assert_eq!(since(&board, 1), Some((vec![7, 8], 4)));
        assert_eq!(since(&board, 2), Some((vec![8, 7], 4)));
        assert_eq!(since(&board, 4), Some((vec![], 4)));
        assert_eq!(since(&board, 5), None, "yet to come");
        assert_eq!(since(&board, 0), None, "whoever knows nothing is told all that is there");
    }

    #[test]
    fn what_is_too_long_ago_is_not_known() {
        let board = Board::new();
        for number in 0..limits::WATCH_LOG as u64 {
            board.tell(&name(number));
        }
        assert_eq!(since(&board, 1).map(|(names, _)| names.len()), Some(limits::WATCH_LOG));
        board.tell(&name(0));
        assert_eq!(since(&board, 1), None);
        // Of those that are known one is there twice.
        assert_eq!(since(&board, 2).map(|(names, _)| names.len()), Some(limits::WATCH_LOG));
    }

    #[tokio::test]
    async fn who_waits_is_woken_by_a_change_and_by_the_end() {
        let boards = Boards::new(9);
        let board = boards.of(&"test".into());
        let mut changes = board.subscribe();
        boards.tell(&name(1));
        changes.heard().await;
        assert_eq!(board.version(), 2);
        boards.end();
        changes.heard().await;
        assert_eq!(board.version(), 2);
        let again = tokio::time::timeout(std::time::Duration::ZERO, changes.heard()).await;
        assert!(again.is_err(), "each is told once");
    }
}
