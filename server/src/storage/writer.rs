//! Follows the memory of [`Embedded`] on disk.

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError},
    },
};

use fusebox_core::{Moment, Time};
use prost::Message;
use tokio::sync::oneshot;

use super::{
    Circuits, Embedded, OpenGrant, Storage, StorageError,
    embedded::{Change, Waiter, not_before},
    journal::{Batch, Journal, JournalError, Keyspace, Write},
    record::{CellRecord, CleanStop, CommitRecord, GrantRecord, grant_key},
};
use crate::{clock::ServerClock, counters::Disk, limits};

/// Key of the record of the last commit.
pub(super) const COMMIT: &[u8] = b"commit";

/// Key of the record that says that the last start ended as it should.
pub(super) const CLEAN_STOP: &[u8] = b"clean-stop";

/// Writes what is queued, and tells those who wait for it: a loop over a journal, one commit for everything
/// that came while the last one was synced.
pub struct Writer {
    cells: Arc<Embedded>,
    circuits: Arc<Circuits>,
    journal: Numbered,
    /// Words of those who queued something.
    woken: Receiver<()>,
    boot: u64,
    disk: Arc<Disk>,
    /// Rounds done; the marks of cells know in which they are.
    round: u64,
    /// Who waits for a later round than the one that found them.
    waiting: Vec<Waiter>,
    /// Who waits for a note, or a circuit, that this round carries.
    noted: Vec<oneshot::Sender<Result<(), StorageError>>>,
    /// The shards that are yet to be caught up with.
    behind: Range<usize>,
    /// When the writer last began to catch up.
    caught_up: Time,
    failed: bool,
}

/// What a round of the writer leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing: the next round is when there is something new.
    Nothing,
    /// More to do, at once.
    More,
}

/// A journal whose commits are numbered, and carry the moment that they were made at.
pub(super) struct Numbered {
    journal: Box<dyn Journal>,
    clock: ServerClock,
    commit: u64,
    /// What a commit's moment is not before: cells that were full then may have left.
    latest: Moment,
}

impl Numbered {
    /// Goes on after the commit of that number and moment.
    pub(super) fn new(
        journal: Box<dyn Journal>,
        clock: ServerClock,
        commit: u64,
        latest: Moment,
    ) -> Self {
        Self { journal, clock, commit, latest }
    }

    /// The journal, to be read.
    pub(super) fn store(&self) -> &dyn Journal {
        &*self.journal
    }

    pub(super) fn commit(&mut self, mut batch: Batch) -> Result<(), JournalError> {
        self.commit += 1;
        self.latest = not_before(self.clock.now(), self.latest);
        let record = CommitRecord::of(self.commit, self.latest);
        batch.put(Keyspace::Meta, COMMIT, record.encode_to_vec());
        self.journal.commit(batch)
    }

    /// Everything committed is on disk, and its number is known to be.
    pub(super) fn sync_witnessed(&mut self) -> Result<(), JournalError> {
        self.journal.sync()?;
        self.journal.witness(self.commit)
    }

    /// Commits writes in parts of a bounded size, without a sync.
    pub(super) fn commit_all(
        &mut self,
        writes: impl IntoIterator<Item = Write>,
    ) -> Result<(), JournalError> {
        let mut batch = Batch::default();
        for write in writes {
            batch.writes.push(write);
            if batch.writes.len() == limits::COMMIT_RECORDS {
                self.commit(std::mem::take(&mut batch))?;
            }
        }
        if batch.writes.is_empty() { Ok(()) } else { self.commit(batch) }
    }
}

impl Writer {
    pub(super) fn new(
        (cells, circuits): (Arc<Embedded>, Arc<Circuits>),
        journal: Numbered,
        woken: Receiver<()>,
        boot: u64,
    ) -> Self {
        let disk = Disk { queued: cells.queued(), ..Disk::default() };
        disk.set(journal.journal.stats());
        Self {
            cells,
            circuits,
            journal,
            woken,
            boot,
            disk: Arc::new(disk),
            round: 0,
            waiting: Vec::new(),
            noted: Vec::new(),
            behind: 0..0,
            caught_up: Time::ZERO,
            failed: false,
        }
    }

    /// Whether what is written can be read again: not under engine `memory`.
    pub fn keeps(&self) -> bool {
        self.journal.journal.keeps()
    }

    /// What it counts.
    pub fn disk(&self) -> Arc<Disk> {
        Arc::clone(&self.disk)
    }

    /// Waits until something is queued, or it is time to catch up with what nobody waits for.
    pub fn wait(&mut self) {
        if self.woken.recv_timeout(limits::RELAXED_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            self.catch_up();
        }
    }

    /// From the next round on, looks at everything that nobody waits for.
    pub fn catch_up(&mut self) {
        if self.behind.is_empty() {
            self.behind = 0..self.cells.shards();
            self.caught_up = self.journal.clock.time();
        }
    }

    /// One round: all that is queued, and some of what nobody waits for, in one commit. When it returns,
    /// that is on disk, and those who waited for it are told.
    ///
    /// # Errors
    /// The first failure is final: nothing is admitted or written any more.
    pub fn round(&mut self) -> Result<Left, JournalError> {
        self.guarded(Self::write_round)
    }

    /// The last rounds: nothing is decided any more, and what is on disk is exact.
    ///
    /// # Errors
    /// If it could not be written, now or in an earlier round.
    pub fn finish(mut self, grants: &[OpenGrant]) -> Result<(), JournalError> {
        self.cells.stop();
        self.circuits.end(&StorageError::Stopping);
        if !self.keeps() {
            // As durable as anything here.
            let (mut nothing, mut waiting) = (Vec::new(), Vec::new());
            let taken = self.circuits.take_queued(&mut nothing, &mut waiting);
            self.circuits.written(taken);
            waiting.extend(self.cells.take_notes().into_iter().map(|note| note.told));
            for told in waiting {
                let _ = told.send(Ok(()));
            }
            return Ok(());
        }
        self.guarded(|writer| {
            writer.journal.journal.stop_tidying();
            writer.behind = 0..writer.cells.shards();
            while writer.write_round()? == Left::More {}
            // Grants, and cells that only a clean stop writes, go on if all of them are there.
            let boot = writer.boot;
            writer.journal.commit_all(grants.iter().map(|grant| {
                let record = GrantRecord::of(grant, boot).encode_to_vec();
                Write::put(Keyspace::Grants, grant_key(grant.id), record)
            }))?;
            for shard in 0..writer.cells.shards() {
                let mut writes = Vec::new();
                writer.cells.exact(shard, |id, kept| {
                    let record = CellRecord::exact(&kept, boot).encode_to_vec();
                    writes.push(Write::put(Keyspace::Cells, id.to_bytes(), record));
                });
                writer.journal.commit_all(writes)?;
            }
            let mut batch = Batch::default();
            batch.put(Keyspace::Meta, CLEAN_STOP, CleanStop { boot }.encode_to_vec());
            writer.journal.commit(batch)?;
            writer.journal.sync_witnessed()
        })
    }

    fn guarded<T>(
        &mut self,
        write: impl FnOnce(&mut Self) -> Result<T, JournalError>,
    ) -> Result<T, JournalError> {
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
            let failure = StorageError::Failed(error.to_string().into());
            self.cells.end(&failure);
            self.circuits.end(&failure);
            let waiting = self.waiting.drain(..).map(|waiter| waiter.told);
            for told in waiting.chain(self.noted.drain(..)) {
                // Who went away need not know.
                let _ = told.send(Err(failure.clone()));
            }
        })
    }

    fn write_round(&mut self) -> Result<Left, JournalError> {
        // Also where there is always more to do, as during a rotation.
        if self.journal.clock.time() >= self.caught_up.after(limits::RELAXED_INTERVAL) {
            self.catch_up();
        }
        let round = self.round + 1;
        // Before the cells: who waits for a circuit has charged before that, so this round has its marks too.
        let mut batch = Batch::default();
        let taken = self.circuits.take_queued(&mut batch.writes, &mut self.noted);
        let mut changes = Vec::new();
        let now = self.journal.clock.now();
        let mut latest = not_before(now, self.journal.latest);
        for shard in 0..self.cells.shards() {
            let swept = self.cells.take_queued(shard, round, &mut changes, &mut self.waiting);
            latest = latest.max(not_before(now, swept));
        }
        self.journal.latest = latest;
        let slice = changes.len() + limits::WRITER_SLICE;
        while changes.len() < slice
            && let Some(shard) = self.behind.next()
        {
            self.cells.take_lagging(shard, round, &mut changes);
        }
        add_to(&mut batch, changes);
        for note in self.cells.take_notes() {
            batch.writes.extend(note.writes);
            self.noted.push(note.told);
        }
        if !batch.writes.is_empty() {
            self.disk.records.fetch_add(batch.writes.len() as u64, Ordering::Relaxed);
            self.disk.commits.fetch_add(1, Ordering::Relaxed);
            self.journal.commit(batch)?;
            self.journal.sync_witnessed()?;
        }
        self.round = round;
        self.cells.set_durable(round);
        self.circuits.written(taken);
        for waiter in self.waiting.extract_if(.., |waiter| waiter.round <= round) {
            // Who went away need not know.
            let _ = waiter.told.send(Ok(()));
        }
        for told in self.noted.drain(..) {
            let _ = told.send(Ok(()));
        }
        let untidy = self.journal.journal.tidy(self.cells.live())?;
        self.disk.set(self.journal.journal.stats());
        let more = untidy || !self.behind.is_empty() || !self.waiting.is_empty();
        Ok(if more { Left::More } else { Left::Nothing })
    }
}

fn add_to(batch: &mut Batch, changes: Vec<Change>) {
    for Change { id, kept } in changes {
        match kept {
            Some(kept) => {
                let record = CellRecord::of(&kept).encode_to_vec();
                batch.put(Keyspace::Cells, id.to_bytes(), record);
            }
            None => batch.delete(Keyspace::Cells, id.to_bytes()),
        }
    }
}
