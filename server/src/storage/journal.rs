//! The blocking byte store under the cells.

mod directory;
mod sled;

use thiserror::Error;

pub use self::sled::Sled;

/// Keeps bytes by key. Blocking: it is owned by one thread, never by an async task.
pub trait Journal: Send + 'static {
    /// Whether anything that is committed can be read again: engine `memory` does not.
    fn keeps(&self) -> bool;

    /// Calls `visit` with every key and value of a keyspace, in the order of the keys.
    ///
    /// # Errors
    /// If one cannot be read, if they are not those that were written, or the first error of `visit`.
    fn scan(&self, keyspace: Keyspace, visit: &mut Visit<'_>) -> Result<(), JournalError>;

    /// Applies all writes of a batch, or none.
    ///
    /// # Errors
    /// If it cannot; a journal that failed once is not used again.
    fn commit(&mut self, batch: Batch) -> Result<(), JournalError>;

    /// Returns when everything committed survives a loss of power.
    ///
    /// # Errors
    /// If it cannot; a journal that failed once is not used again.
    fn sync(&mut self) -> Result<(), JournalError>;

    /// The latest commit that is known to have been synced, told by something that fails apart from the
    /// journal: one that is behind it has lost something.
    fn witnessed(&self) -> u64;

    /// Makes the number of a commit that is synced the [witnessed](Self::witnessed) one, and returns when
    /// that survives a loss of power.
    ///
    /// # Errors
    /// If it cannot; a journal that failed once is not used again.
    fn witness(&mut self, commit: u64) -> Result<(), JournalError>;

    /// A short piece of the journal's own housekeeping, with so many records alive. Whether there is more.
    ///
    /// # Errors
    /// If it cannot; a journal that failed once is not used again.
    fn tidy(&mut self, live: usize) -> Result<bool, JournalError> {
        let _ = live;
        Ok(false)
    }

    /// Gives up the housekeeping that is under way: what follows is the end.
    fn stop_tidying(&mut self) {}

    /// What it has done so far, if it counts.
    fn stats(&self) -> Stats {
        Stats::default()
    }
}

/// What a journal has done since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Times that the disk was asked to keep what it was given.
    pub syncs: u64,
    /// Times that what is alive was moved to a fresh store.
    pub rotations: u64,
    /// Bytes of the store.
    pub bytes: u64,
}

/// What [`Journal::scan`] calls.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> Result<(), JournalError> + 'a;

/// Opens a journal; it may take long, so the server already answers its health checks meanwhile.
pub type OpenJournal = Box<dyn FnOnce() -> Result<Box<dyn Journal>, JournalError> + Send>;

/// What a key is about: its first byte on disk, so that one batch is atomic over all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Keyspace {
    /// The data directory itself.
    Meta = 0,
    /// Limiters by name.
    Policies = 1,
    /// Cells by id.
    Cells = 2,
    /// Grants by id, written by a clean stop.
    Grants = 3,
    /// What operators wrote of each policy, by name.
    Made = 4,
    /// The audit trail, by number.
    Events = 5,
    /// Circuits by id.
    Circuits = 6,
}

impl Keyspace {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Meta,
        Self::Policies,
        Self::Cells,
        Self::Grants,
        Self::Made,
        Self::Events,
        Self::Circuits,
    ];
}

/// Writes that are applied together.
#[derive(Debug, Default)]
pub struct Batch {
    /// In order: a later write of the same key wins.
    pub writes: Vec<Write>,
}

/// One write; without a value it deletes.
#[derive(Debug)]
pub struct Write {
    /// Where.
    pub keyspace: Keyspace,
    /// Which.
    pub key: Vec<u8>,
    /// What.
    pub value: Option<Vec<u8>>,
}

impl Write {
    /// Of a value.
    pub fn put(keyspace: Keyspace, key: impl Into<Vec<u8>>, value: Vec<u8>) -> Self {
        Self { keyspace, key: key.into(), value: Some(value) }
    }

    /// That deletes a key, if it is there.
    pub fn delete(keyspace: Keyspace, key: impl Into<Vec<u8>>) -> Self {
        Self { keyspace, key: key.into(), value: None }
    }
}

impl Batch {
    /// Writes a value.
    pub fn put(&mut self, keyspace: Keyspace, key: impl Into<Vec<u8>>, value: Vec<u8>) {
        self.writes.push(Write::put(keyspace, key, value));
    }

    /// Deletes a key, if it is there.
    pub fn delete(&mut self, keyspace: Keyspace, key: impl Into<Vec<u8>>) {
        self.writes.push(Write::delete(keyspace, key));
    }
}

/// Why a journal could not be opened, read or written.
#[derive(Debug, Error)]
pub enum JournalError {
    /// Another process has it.
    #[error(
        "data directory `{0}` is in use: another fusebox serves from it; stop that one, or use --data"
    )]
    InUse(String),
    /// Somebody else's.
    #[error(
        "directory `{directory}` is not empty and holds no data of fusebox, but `{found}`; \
         use a new or empty one with --data"
    )]
    NotOurs {
        /// The directory.
        directory: String,
        /// Something that is in it.
        found: String,
    },
    /// The store says no.
    #[error("cannot {action} the data directory: {cause}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the store said.
        cause: String,
    },
    /// What is there is not what was written.
    #[error(
        "the data directory is damaged: {0}. Restore a copy of it, use another one with --data, or start \
         with --accept-loss: then what is lost of what was spent may be spent again"
    )]
    Damaged(String),
    /// What is there is not what was written, and nothing can be made of it.
    #[error(
        "the data directory is damaged: {0}. Restore a copy of it, or use another one with --data: then \
         every quota starts full"
    )]
    Broken(String),
}

impl JournalError {
    /// The store panicked while it was to do this.
    pub(crate) fn panicked(action: &'static str) -> Self {
        Self::Io { action, cause: "the store panicked; the log says where".into() }
    }
}

/// Keeps nothing: the journal of engine `memory`.
#[derive(Debug, Default)]
pub struct Nothing;

impl Nothing {
    /// Opens it, which cannot fail.
    pub fn open() -> OpenJournal {
        Box::new(|| Ok(Box::new(Self)))
    }
}

impl Journal for Nothing {
    fn keeps(&self) -> bool {
        false
    }

    fn scan(&self, _: Keyspace, _: &mut Visit<'_>) -> Result<(), JournalError> {
        Ok(())
    }

    fn commit(&mut self, _: Batch) -> Result<(), JournalError> {
        Ok(())
    }

    fn sync(&mut self) -> Result<(), JournalError> {
        Ok(())
    }

    fn witnessed(&self) -> u64 {
        0
    }

    fn witness(&mut self, _: u64) -> Result<(), JournalError> {
        Ok(())
    }
}
