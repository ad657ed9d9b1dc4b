//! The journal on sled: the only file that names it.

use std::{
    cell::Cell,
    collections::BTreeMap,
    fs::{self, File},
    hash::Hasher,
    io,
    ops::Bound,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    thread,
};

use siphasher::sip::SipHasher24;

use super::{Batch, Journal, JournalError, Keyspace, Stats, Visit, directory::Directory};
use crate::limits;

/// A data directory whose stores are sled's.
pub struct Sled {
    store: Store,
    rotation: Option<Rotation>,
    directory: Directory,
    /// For each keyspace the sum of a hash of every record: part of every commit. sled may come back from a
    /// damage with an older value here and there, and not know it; the sum does.
    sums: Cell<Sums>,
    /// Where loss is accepted, the sums need not agree with what is there.
    accept_loss: bool,
    /// Bytes below which the store is not moved.
    rotation_bytes: u64,
    /// Bytes of the store when it was fresh.
    fresh_bytes: u64,
    syncs: u64,
    rotations: u64,
}

/// One sled database: one tree, the first byte of a key is its keyspace.
struct Store {
    db: sled::Db,
    /// sled's flush hands its data to the kernel but never asks the disk to keep it; syncing this does. Open
    /// for good, so that a sync needs no file descriptor that may be had no more.
    log: File,
    path: PathBuf,
}

/// What is alive on its way to a fresh store.
struct Rotation {
    fresh: Store,
    /// The last key that was copied.
    copied: Option<sled::IVec>,
}

type Sums = [u64; Keyspace::ALL.len()];

/// Runs of sled's collector after each commit: each takes away as much as a few hundred writes leave.
const COLLECTIONS: usize = 8;

/// Key of the sums. Its first byte is no keyspace's.
const SUMS: &[u8] = &[0xff];

impl Sled {
    /// Opens a data directory, and makes it if there is none. What is damaged is refused, unless its loss is
    /// accepted.
    ///
    /// # Errors
    /// If another process has it, it is not ours, or it cannot be read.
    pub fn open(path: &Path, accept_loss: bool) -> Result<Self, JournalError> {
        let directory = Directory::open(path, accept_loss)?;
        let store = Store::open(directory.current())?;
        directory.settle().map_err(failed("write"))?;
        let sums = store.sums()?;
        Ok(Self {
            store,
            rotation: None,
            directory,
            sums: Cell::new(sums),
            accept_loss,
            rotation_bytes: limits::ROTATION_BYTES,
            fresh_bytes: 0,
            syncs: 0,
            rotations: 0,
        })
    }

    fn begin_rotation(&mut self) -> Result<(), JournalError> {
        let fresh = Store::open(self.directory.next())?;
        tracing::debug!(bytes = self.store.bytes(), "moving what is alive to a fresh store");
        self.rotation = Some(Rotation { fresh, copied: None });
        Ok(())
    }

    /// From here on the fresh store counts.
    fn end_rotation(&mut self, fresh: Store) -> Result<(), JournalError> {
        fresh.sync()?;
        self.syncs += 1;
        File::open(&fresh.path)
            .and_then(|directory| directory.sync_all())
            .map_err(failed("sync"))?;
        self.directory.switch().map_err(failed("switch"))?;
        self.fresh_bytes = fresh.bytes();
        self.rotations += 1;
        let old = std::mem::replace(&mut self.store, fresh);
        tracing::debug!(was = old.bytes(), is = self.fresh_bytes, "moved what is alive");
        // It takes its time to let go of everything, and nobody needs to wait for that. If it fails, the
        // next start tries again.
        let removal = thread::Builder::new().name("old store".into()).spawn(move || old.remove());
        removal.map(drop).map_err(failed("remove"))
    }
}

impl Store {
    fn open(path: PathBuf) -> Result<Self, JournalError> {
        let config = sled::Config::new().path(&path).cache_capacity(limits::SLED_CACHE_BYTES);
        let opened = config.open().or_else(|error| match error {
            // A process that was killed while it opened the store may have left a torn snapshot. It saves
            // reading the log, and no more: without it all is there.
            sled::Error::Corruption { .. } => {
                tracing::warn!("a snapshot of the store is torn; reading its whole log instead");
                set_snapshots_aside(&path)?;
                config.open()
            }
            error => Err(error),
        });
        let db = opened.map_err(|error| match error {
            sled::Error::Corruption { .. } => {
                JournalError::Broken(format!("{}: {error}", path.display()))
            }
            error => {
                JournalError::Io { action: "open", cause: format!("{}: {error}", path.display()) }
            }
        })?;
        let log = File::open(path.join("db")).map_err(failed("open"))?;
        Ok(Self { db, log, path })
    }

    fn sums(&self) -> Result<Sums, JournalError> {
        let mut sums = Sums::default();
        let stored = self.db.get(SUMS).map_err(failed("read"))?.unwrap_or_default();
        for (sum, bytes) in sums.iter_mut().zip(stored.as_chunks().0) {
            *sum = u64::from_be_bytes(*bytes);
        }
        Ok(sums)
    }

    fn apply(&self, batch: sled::Batch) -> Result<(), JournalError> {
        self.db.apply_batch(batch).map_err(failed("write"))?;
        // sled leaves what it replaces to a collector that a large batch keeps from running: without this
        // it grows by gigabytes, and slows down tenfold.
        for _ in 0..COLLECTIONS {
            crossbeam_epoch::pin().flush();
        }
        Ok(())
    }

    /// A sync after a flush that failed succeeds all the same: never one without the other.
    fn sync(&self) -> Result<(), JournalError> {
        self.db.flush().map_err(failed("sync"))?;
        self.log.sync_data().map_err(failed("sync"))
    }

    fn bytes(&self) -> u64 {
        self.log.metadata().map_or(0, |metadata| metadata.len())
    }

    fn remove(self) {
        let Self { db, log, path } = self;
        // It panics where its last write fails; what it holds is not needed any more.
        let dropped = catch_unwind(AssertUnwindSafe(|| drop((db, log))));
        if dropped.is_err() || fs::remove_dir_all(&path).is_err() {
            tracing::warn!(path = %path.display(), "an old store is left; the next start removes it");
        }
    }
}

impl Journal for Sled {
    fn keeps(&self) -> bool {
        true
    }

    fn scan(&self, keyspace: Keyspace, visit: &mut Visit<'_>) -> Result<(), JournalError> {
        let mut sum = 0_u64;
        for pair in self.store.db.scan_prefix([keyspace as u8]) {
            let (key, value) = pair.map_err(failed("read"))?;
            sum = sum.wrapping_add(hash(&key, &value));
            visit(&key[1..], &value)?;
        }
        let mut sums = self.sums.get();
        let written = std::mem::replace(&mut sums[keyspace as usize], sum);
        self.sums.set(sums);
        if sum != written && !self.accept_loss {
            let message = format!("some of its {keyspace:?} are not those that were written last");
            return Err(JournalError::Damaged(message));
        }
        Ok(())
    }

    fn commit(&mut self, batch: Batch) -> Result<(), JournalError> {
        // Of a key that is written twice only the last counts.
        let writes: BTreeMap<Vec<u8>, Option<Vec<u8>>> = batch
            .writes
            .into_iter()
            .map(|write| (full_key(write.keyspace, &write.key), write.value))
            .collect();
        let mut sums = self.sums.get();
        let mut batch = sled::Batch::default();
        for (key, value) in writes {
            let sum = &mut sums[usize::from(key[0])];
            if let Some(old) = self.store.db.get(&key).map_err(failed("read"))? {
                *sum = sum.wrapping_sub(hash(&key, &old));
            }
            match value {
                Some(value) => {
                    *sum = sum.wrapping_add(hash(&key, &value));
                    batch.insert(key, value);
                }
                None => batch.remove(key),
            }
        }
        self.sums.set(sums);
        batch.insert(SUMS, sums.map(u64::to_be_bytes).concat());
        if let Some(rotation) = &self.rotation {
            rotation.fresh.apply(batch.clone())?;
        }
        self.store.apply(batch)
    }

    fn sync(&mut self) -> Result<(), JournalError> {
        self.store.sync()?;
        self.syncs += 1;
        Ok(())
    }

    fn witnessed(&self) -> u64 {
        self.directory.witnessed()
    }

    fn witness(&mut self, commit: u64) -> Result<(), JournalError> {
        self.directory.witness(commit).map_err(failed("sync"))?;
        self.syncs += 1;
        Ok(())
    }

    /// Moves what is alive to a fresh store where the present one has grown far beyond it: neither the
    /// space that sled takes nor the time that it needs to open has another bound.
    fn tidy(&mut self, live: usize) -> Result<bool, JournalError> {
        let Some(mut rotation) = self.rotation.take() else {
            let bound = (4 * live as u64 * limits::RECORD_BYTES).max(2 * self.fresh_bytes);
            let rotates = self.store.bytes() > bound.max(self.rotation_bytes);
            if rotates {
                self.begin_rotation()?;
            }
            return Ok(rotates);
        };
        let mut batch = sled::Batch::default();
        let mut copied = 0;
        let after = rotation.copied.take().map_or(Bound::Unbounded, Bound::Excluded);
        for pair in self
            .store
            .db
            .range::<sled::IVec, _>((after, Bound::Unbounded))
            .take(limits::WRITER_SLICE)
        {
            let (key, value) = pair.map_err(failed("read"))?;
            rotation.copied = Some(key.clone());
            batch.insert(key, value);
            copied += 1;
        }
        rotation.fresh.apply(batch)?;
        if copied < limits::WRITER_SLICE {
            self.end_rotation(rotation.fresh)?;
            return Ok(false);
        }
        self.rotation = Some(rotation);
        Ok(true)
    }

    fn stop_tidying(&mut self) {
        // The next start removes it.
        self.rotation = None;
    }

    fn stats(&self) -> Stats {
        Stats { syncs: self.syncs, rotations: self.rotations, bytes: self.store.bytes() }
    }
}

/// Renames every snapshot, so that sled does not see it.
fn set_snapshots_aside(path: &Path) -> io::Result<()> {
    let names = fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.file_name()));
    for name in names.collect::<io::Result<Vec<_>>>()? {
        let name = name.to_string_lossy();
        if name.starts_with("snap.") {
            fs::rename(path.join(&*name), path.join(format!("torn-{name}")))?;
        }
    }
    Ok(())
}

fn hash(key: &[u8], value: &[u8]) -> u64 {
    let mut hasher = SipHasher24::new();
    hasher.write(key);
    hasher.write(value);
    hasher.finish()
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom, Write};

    use super::*;

    type Records = BTreeMap<Vec<u8>, Vec<u8>>;

    const COMMIT: &[u8] = b"commit";

    fn open(path: &Path) -> Sled {
        Sled::open(path, false).unwrap()
    }

    fn records(journal: &Sled) -> Result<Records, JournalError> {
        let mut records = Records::new();
        for keyspace in Keyspace::ALL {
            journal.scan(keyspace, &mut |key, value| {
                records.insert(full_key(keyspace, key), value.to_vec());
                Ok(())
            })?;
        }
        Ok(records)
    }

    /// Writes some records, overwrites and deletes others; what is there then.
    fn write(journal: &mut Sled, records: &mut Records, round: u64) {
        let mut batch = Batch::default();
        batch.put(Keyspace::Meta, COMMIT, round.to_be_bytes().to_vec());
        records.insert(full_key(Keyspace::Meta, COMMIT), round.to_be_bytes().to_vec());
        for key in 0..40 {
            let key = (round * 17 + key * 29) % 3_000;
            let (name, full) = (key.to_be_bytes(), full_key(Keyspace::Cells, &key.to_be_bytes()));
            if key % 7 == round % 7 {
                batch.delete(Keyspace::Cells, name);
                records.remove(&full);
            } else {
                let value = vec![u8::try_from(round % 251).unwrap(); 40];
                batch.put(Keyspace::Cells, name, value.clone());
                records.insert(full, value);
            }
        }
        journal.commit(batch).unwrap();
        journal.sync().unwrap();
    }

    #[test]
    fn a_rotation_keeps_what_is_alive_whatever_is_written_meanwhile() {
        let data = tempfile::tempdir().unwrap();
        let (mut journal, mut written) = (open(data.path()), Records::new());
        for round in 0..200 {
            write(&mut journal, &mut written, round);
        }
        journal.rotation_bytes = 1;
        let mut round = 200;
        while journal.stats().rotations == 0 {
            journal.tidy(0).unwrap();
            write(&mut journal, &mut written, round);
            round += 1;
        }
        assert!(round > 203, "it took some slices");
        assert!(records(&journal).unwrap() == written);
        drop(journal);

        let journal = open(data.path());
        assert!(journal.store.path.ends_with("store-2"));
        assert!(records(&journal).unwrap() == written);
    }

    #[test]
    fn a_rotation_that_did_not_end_never_was() {
        for slices in 1..5 {
            let data = tempfile::tempdir().unwrap();
            let (mut journal, mut written) = (open(data.path()), Records::new());
            for round in 0..200 {
                write(&mut journal, &mut written, round);
            }
            journal.rotation_bytes = 1;
            for _ in 0..slices {
                assert!(journal.tidy(0).unwrap());
            }
            drop(journal);

            let journal = open(data.path());
            assert!(journal.store.path.ends_with("store-1"));
            assert!(!data.path().join("store-2").exists());
            assert!(records(&journal).unwrap() == written);
        }
    }

    #[test]
    fn a_torn_snapshot_costs_time_and_no_more() {
        let data = tempfile::tempdir().unwrap();
        let (mut journal, mut written) = (open(data.path()), Records::new());
        for round in 0..20 {
            write(&mut journal, &mut written, round);
        }
        drop(journal);
        let store = data.path().join("store-1");
        fs::write(store.join("snap.00000000FFFFFFFF.generating"), [0; 9]).unwrap();
        assert!(matches!(
            sled::Config::new().path(&store).open(),
            Err(sled::Error::Corruption { .. })
        ));
        assert!(records(&open(data.path())).unwrap() == written);
    }

    fn commit(records: &Records) -> Option<&Vec<u8>> {
        records.get(&full_key(Keyspace::Meta, COMMIT))
    }

    /// What is read of a damaged store: an error or a panic, or what was written.
    fn reads(path: &Path) -> Option<Records> {
        let read = || Sled::open(path, false).and_then(|journal| records(&journal));
        catch_unwind(AssertUnwindSafe(read)).ok().and_then(Result::ok)
    }

    #[test]
    fn damage_is_told_or_does_no_harm() {
        let data = tempfile::tempdir().unwrap();
        let (mut journal, mut written) = (open(data.path()), Records::new());
        for round in 0..300 {
            write(&mut journal, &mut written, round);
            journal.witness(round).unwrap();
        }
        drop(journal);
        let log = fs::read(data.path().join("store-1/db")).unwrap();
        let mut told = 0;
        for place in 0..24 {
            let damaged = tempfile::tempdir().unwrap();
            fs::create_dir(damaged.path().join("store-1")).unwrap();
            for name in ["CURRENT", "WITNESS", "store-1/conf"] {
                fs::copy(data.path().join(name), damaged.path().join(name)).unwrap();
            }
            let path = damaged.path().join("store-1/db");
            fs::write(&path, &log).unwrap();
            let mut file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
            let at = (log.len() as u64 / 24) * place + 777;
            if place % 3 == 0 {
                file.set_len(at).unwrap();
            } else {
                let mut byte = [0];
                file.seek(SeekFrom::Start(at)).unwrap();
                file.read_exact(&mut byte).unwrap();
                file.seek(SeekFrom::Start(at)).unwrap();
                file.write_all(&[!byte[0]]).unwrap();
            }
            match reads(damaged.path()) {
                None => told += 1,
                // The log ends early. That is consistent in itself, but older than the witness knows.
                Some(read) if commit(&read) != commit(&written) => told += 1,
                Some(read) => assert!(read == written, "silent loss by damage {place}"),
            }
        }
        assert!(told >= 8, "only {told} of 24 damages were noticed: they hit nothing");
    }

    #[test]
    fn accepted_loss_is_over_with_the_next_commit() {
        let data = tempfile::tempdir().unwrap();
        let (mut journal, mut written) = (open(data.path()), Records::new());
        write(&mut journal, &mut written, 1);
        // As if sled had come back with an older value.
        journal.store.db.insert(written.keys().next().unwrap(), b"older".as_slice()).unwrap();
        journal.sync().unwrap();
        drop(journal);
        let refused = records(&open(data.path())).unwrap_err().to_string();
        assert!(refused.contains("--accept-loss"), "{refused}");

        let mut journal = Sled::open(data.path(), true).unwrap();
        let kept = records(&journal).unwrap();
        assert_eq!(kept.len(), written.len());
        let mut kept = kept;
        write(&mut journal, &mut kept, 2);
        drop(journal);
        assert!(records(&open(data.path())).unwrap() == kept);
    }
}
