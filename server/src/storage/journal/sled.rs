//! The journal on sled: the only file that names it.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use super::{Batch, Journal, JournalError, Keyspace, Visit};
use crate::limits;

/// One sled tree; the first byte of a key is its keyspace.
pub struct Sled {
    db: sled::Db,
    /// sled's flush hands its data to the kernel but never asks the disk to keep it; syncing this does. Open
    /// for good, so that a sync needs no file descriptor that may be had no more.
    log: File,
    /// Says that the directory holds state; made once it does.
    marker: PathBuf,
    marked: bool,
}

/// Beside sled's own files: without it, one that lost its state would look like a new directory.
const MARKER: &str = "fusebox-data-is-here";

const NEEDED: &str =
    "; it must be a directory that this user can write, or use another with --data";

impl Sled {
    /// Opens the database in a directory, and makes it if there is none.
    ///
    /// # Errors
    /// If another process has it, or it cannot be read.
    pub fn open(directory: &Path) -> Result<Self, JournalError> {
        let shown = directory.display();
        fs::create_dir_all(directory).map_err(|error| JournalError::Io {
            action: "create",
            cause: format!("{shown}: {error}{NEEDED}"),
        })?;
        let db = sled::Config::new()
            .path(directory)
            .cache_capacity(limits::SLED_CACHE_BYTES)
            .open()
            .map_err(|error| match error {
                sled::Error::Io(error) if error.to_string().contains("could not acquire lock") => {
                    JournalError::InUse(shown.to_string())
                }
                error => {
                    JournalError::Io { action: "open", cause: format!("{shown}: {error}{NEEDED}") }
                }
            })?;
        let marker = directory.join(MARKER);
        let marked = marker.exists();
        if marked && db.is_empty() {
            return Err(JournalError::Corrupt(format!("no state, but was used before: {shown}")));
        }
        let log = File::open(directory.join("db")).map_err(failed("open"))?;
        Ok(Self { db, log, marker, marked })
    }
}

impl Journal for Sled {
    fn keeps(&self) -> bool {
        true
    }

    fn get(&self, keyspace: Keyspace, key: &[u8]) -> Result<Option<Vec<u8>>, JournalError> {
        let value = self.db.get(full_key(keyspace, key)).map_err(failed("read"))?;
        Ok(value.map(|value| value.to_vec()))
    }

    fn scan(&self, keyspace: Keyspace, visit: &mut Visit<'_>) -> Result<(), JournalError> {
        for pair in self.db.scan_prefix([keyspace as u8]) {
            let (key, value) = pair.map_err(failed("read"))?;
            visit(&key[1..], &value)?;
        }
        Ok(())
    }

    fn commit(&mut self, batch: Batch) -> Result<(), JournalError> {
        let mut writes = sled::Batch::default();
        for write in batch.writes {
            let key = full_key(write.keyspace, &write.key);
            match write.value {
                Some(value) => writes.insert(key, value),
                None => writes.remove(key),
            }
        }
        self.db.apply_batch(writes).map_err(failed("write"))
    }

    fn sync(&mut self) -> Result<(), JournalError> {
        self.db.flush().map_err(failed("sync"))?;
        self.log.sync_data().map_err(failed("sync"))?;
        if !self.marked {
            File::create(&self.marker).and_then(|file| file.sync_all()).map_err(failed("mark"))?;
            self.marked = true;
        }
        Ok(())
    }
}

fn full_key(keyspace: Keyspace, key: &[u8]) -> Vec<u8> {
    let mut full = Vec::with_capacity(1 + key.len());
    full.push(keyspace as u8);
    full.extend_from_slice(key);
    full
}

fn failed<E: ToString>(action: &'static str) -> impl Fn(E) -> JournalError {
    move |error| JournalError::Io { action, cause: error.to_string() }
}
