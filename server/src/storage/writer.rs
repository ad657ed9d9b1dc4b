//! Follows the memory of [`Embedded`] on disk.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use prost::Message;

use super::{
    Embedded,
    journal::{Batch, Journal, JournalError, Keyspace},
    record::{CellRecord, Clocks},
};
use crate::clock::ServerClock;

/// Key of the record of both clocks.
pub(super) const CLOCKS: &[u8] = b"clocks";

/// Writes what changed, `durability: relaxed`: a crash forgets what was charged since the last round.
pub struct Writer {
    cells: Arc<Embedded>,
    journal: Box<dyn Journal>,
    clock: ServerClock,
    failed: bool,
}

impl Writer {
    pub(super) fn new(cells: Arc<Embedded>, journal: Box<dyn Journal>, clock: ServerClock) -> Self {
        Self { cells, journal, clock, failed: false }
    }

    /// Whether what is written can be read again: not under engine `memory`.
    pub fn keeps(&self) -> bool {
        self.journal.keeps()
    }

    /// One round: every cell that changed since the last, each once. What it wrote is on disk.
    ///
    /// # Errors
    /// The first failure is final: nothing is admitted or written any more.
    pub fn round(&mut self) -> Result<(), JournalError> {
        self.guarded(Self::write_changes)
    }

    /// The last round: returns when all of it is on disk.
    ///
    /// # Errors
    /// If it could not be written, now or in an earlier round.
    pub fn finish(mut self) -> Result<(), JournalError> {
        self.guarded(|writer| {
            writer.write_changes()?;
            let mut batch = Batch::default();
            batch.put(Keyspace::Meta, CLOCKS, writer.clocks());
            writer.journal.commit(batch)?;
            writer.journal.sync()
        })
    }

    fn guarded(
        &mut self,
        write: impl FnOnce(&mut Self) -> Result<(), JournalError>,
    ) -> Result<(), JournalError> {
        if self.failed {
            return Err(JournalError::Io {
                action: "write",
                cause: "an earlier write had failed; what was charged since is lost".into(),
            });
        }
        // sled panics where it finds that it is broken: a write that failed like any other.
        let written = catch_unwind(AssertUnwindSafe(|| write(self)));
        let written = written.unwrap_or_else(|_| Err(JournalError::panicked("write")));
        written.inspect_err(|error| {
            self.failed = true;
            self.cells.fail(&error.to_string());
        })
    }

    fn write_changes(&mut self) -> Result<(), JournalError> {
        let mut wrote = false;
        for shard in 0..self.cells.shards() {
            let mut batch = Batch::default();
            for (id, cell) in self.cells.take_changes(shard) {
                match cell {
                    Some((number, cell)) => {
                        let record = CellRecord::of(number, cell).encode_to_vec();
                        batch.put(Keyspace::Cells, id.to_bytes(), record);
                    }
                    None => batch.delete(Keyspace::Cells, id.to_bytes()),
                }
            }
            if batch.writes.is_empty() {
                continue;
            }
            batch.put(Keyspace::Meta, CLOCKS, self.clocks());
            self.journal.commit(batch)?;
            wrote = true;
        }
        if wrote { self.journal.sync() } else { Ok(()) }
    }

    fn clocks(&self) -> Vec<u8> {
        Clocks::of(self.clock.pair()).encode_to_vec()
    }
}
