//! A journal that forgets what was not synced, and fails on command.

use std::{collections::BTreeMap, sync::Arc};

use fusebox_server::storage::journal::{
    Batch, Journal, JournalError, Keyspace, OpenJournal, Stats, Visit,
};
use parking_lot::{Condvar, Mutex, MutexGuard};

type Records = BTreeMap<(Keyspace, Vec<u8>), Vec<u8>>;

/// A disk of its own: it outlives the servers that write to it.
#[derive(Default)]
pub struct Simulated {
    disk: Arc<Mutex<Disk>>,
    gate: Arc<Gate>,
}

/// What writes wait at while the disk hangs.
#[derive(Default)]
struct Gate {
    hangs: Mutex<Hangs>,
    opened: Condvar,
}

#[derive(Default)]
struct Hangs {
    is_shut: bool,
    waiting: usize,
}

impl Gate {
    fn pass(&self) {
        let mut hangs = self.hangs.lock();
        hangs.waiting += 1;
        self.opened.wait_while(&mut hangs, |hangs| hangs.is_shut);
        hangs.waiting -= 1;
    }
}

#[derive(Default)]
struct Disk {
    written: Records,
    synced: Records,
    witnessed: u64,
    syncs: u64,
    failing: bool,
    /// Counts the losses of power: who opened the disk before one cannot write after it.
    life: u64,
}

/// What was on a disk at one time.
pub struct Copy(Records);

/// The disk, as one life of a server has it open.
struct Open {
    disk: Arc<Mutex<Disk>>,
    gate: Arc<Gate>,
    life: u64,
}

impl Simulated {
    /// Opens this disk, as often as wanted.
    pub fn open(&self) -> OpenJournal {
        let (disk, gate) = (Arc::clone(&self.disk), Arc::clone(&self.gate));
        Box::new(move || {
            let life = disk.lock().life;
            Ok(Box::new(Open { disk, gate, life }))
        })
    }

    /// The power goes: what was not synced is gone, and whoever has the disk open is, too.
    pub fn lose_power(&self) {
        let mut disk = self.disk.lock();
        disk.life += 1;
        disk.written = disk.synced.clone();
    }

    /// The process is killed: what it wrote is there, and it writes no more.
    pub fn kill(&self) {
        self.disk.lock().life += 1;
    }

    /// From now on every write fails.
    pub fn fail(&self) {
        self.disk.lock().failing = true;
    }

    /// From now on every write hangs, until it [goes on](Self::go_on).
    pub fn hang(&self) {
        self.gate.hangs.lock().is_shut = true;
    }

    /// What hangs is written now.
    pub fn go_on(&self) {
        self.gate.hangs.lock().is_shut = false;
        self.gate.opened.notify_all();
    }

    /// Whether a write hangs.
    pub fn hangs(&self) -> bool {
        self.gate.hangs.lock().waiting > 0
    }

    /// Overwrites the first record of a keyspace.
    pub fn corrupt(&self, keyspace: Keyspace) {
        let mut disk = self.disk.lock();
        let record = disk.written.iter_mut().find(|((of, _), _)| *of == keyspace);
        *record.expect("a record to corrupt").1 = vec![0xff; 7];
    }

    /// Changes a record.
    pub fn edit(&self, keyspace: Keyspace, key: &[u8], change: impl FnOnce(&mut Vec<u8>)) {
        change(self.disk.lock().written.get_mut(&(keyspace, key.to_vec())).expect("a record"));
    }

    /// What is on the disk, without its witness.
    pub fn copy(&self) -> Copy {
        Copy(self.disk.lock().written.clone())
    }

    /// Puts a copy back; the witness stays as it is.
    pub fn restore(&self, copy: &Copy) {
        let mut disk = self.disk.lock();
        (disk.written, disk.synced) = (copy.0.clone(), copy.0.clone());
    }

    /// Number of records in a keyspace.
    pub fn records(&self, keyspace: Keyspace) -> usize {
        self.disk.lock().written.keys().filter(|(of, _)| *of == keyspace).count()
    }
}

impl Open {
    fn alive(&self) -> Result<MutexGuard<'_, Disk>, JournalError> {
        let disk = self.disk.lock();
        if disk.failing || disk.life != self.life {
            return Err(JournalError::Io { action: "write", cause: "told to fail".into() });
        }
        Ok(disk)
    }
}

impl Journal for Open {
    fn keeps(&self) -> bool {
        true
    }

    fn scan(&self, keyspace: Keyspace, visit: &mut Visit<'_>) -> Result<(), JournalError> {
        let disk = self.disk.lock();
        let records = disk.written.iter().filter(|((of, _), _)| *of == keyspace);
        records.into_iter().try_for_each(|((_, key), value)| visit(key, value))
    }

    fn commit(&mut self, batch: Batch) -> Result<(), JournalError> {
        self.gate.pass();
        let mut disk = self.alive()?;
        for write in batch.writes {
            let key = (write.keyspace, write.key);
            match write.value {
                Some(value) => disk.written.insert(key, value),
                None => disk.written.remove(&key),
            };
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), JournalError> {
        let mut disk = self.alive()?;
        disk.synced = disk.written.clone();
        disk.syncs += 1;
        Ok(())
    }

    fn witnessed(&self) -> u64 {
        self.disk.lock().witnessed
    }

    fn witness(&mut self, commit: u64) -> Result<(), JournalError> {
        let mut disk = self.alive()?;
        disk.witnessed = commit;
        disk.syncs += 1;
        Ok(())
    }

    fn stats(&self) -> Stats {
        Stats { syncs: self.disk.lock().syncs, ..Stats::default() }
    }
}
