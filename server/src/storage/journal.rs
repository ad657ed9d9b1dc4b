//! The blocking byte store under the cells.

mod sled;

use thiserror::Error;

pub use self::sled::Sled;

/// Keeps bytes by key. Blocking: it is owned by one thread, never by an async task.
pub trait Journal: Send + 'static {
    /// Whether anything that is committed can be read again: engine `memory` does not.
    fn keeps(&self) -> bool;

    /// The value of a key.
    ///
    /// # Errors
    /// If it cannot be read.
    fn get(&self, keyspace: Keyspace, key: &[u8]) -> Result<Option<Vec<u8>>, JournalError>;

    /// Calls `visit` with every key and value of a keyspace, in the order of the keys.
    ///
    /// # Errors
    /// If one cannot be read, or the first error of `visit`.
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
    /// Policies by name.
    Policies = 1,
    /// Cells by id.
    Cells = 2,
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

impl Batch {
    /// Writes a value.
    pub fn put(&mut self, keyspace: Keyspace, key: impl Into<Vec<u8>>, value: Vec<u8>) {
        self.writes.push(Write { keyspace, key: key.into(), value: Some(value) });
    }

    /// Deletes a key, if it is there.
    pub fn delete(&mut self, keyspace: Keyspace, key: impl Into<Vec<u8>>) {
        self.writes.push(Write { keyspace, key: key.into(), value: None });
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
    /// The store says no.
    #[error("cannot {action} the data directory: {cause}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the store said.
        cause: String,
    },
    /// What is there is not what was written.
    #[error("the data directory holds {0}; restore a copy of it, or use another one with --data")]
    Corrupt(String),
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

    fn get(&self, _: Keyspace, _: &[u8]) -> Result<Option<Vec<u8>>, JournalError> {
        Ok(None)
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
}
