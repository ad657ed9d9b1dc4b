//! The data directory around the stores: which of them counts, who may use it, and what it must not have
//! lost.
//!
//! ```text
//! LOCK            held while a process serves from the directory
//! CURRENT         the name of the store that counts, replaced by a rename
//! WITNESS         the number of the latest commit that was synced
//! store-N/        a store; any but the current one is left over, and goes at the next start
//! ```

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::JournalError;

const LOCK: &str = "LOCK";
const CURRENT: &str = "CURRENT";
const NEXT_CURRENT: &str = "CURRENT.next";
const WITNESS: &str = "WITNESS";
const STORE: &str = "store-";

const NEEDED: &str =
    "; it must be a directory that this user can write, or use another with --data";

/// A data directory that is ours.
pub(super) struct Directory {
    path: PathBuf,
    witness: File,
    /// The latest commit that was synced, as the file says.
    witnessed: u64,
    /// Number of the store that counts.
    current: u64,
    /// Dropped last: then another process may have the directory.
    _lock: File,
}

impl Directory {
    /// Opens a directory, and makes it if there is none.
    ///
    /// What is damaged is refused; if that is accepted, it counts as lost.
    pub(super) fn open(path: &Path, accept_loss: bool) -> Result<Self, JournalError> {
        fs::create_dir_all(path).map_err(refused(path, "create"))?;
        check_ours(path)?;
        let file = |name: &str| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).open(path.join(name))
        };
        let lock = file(LOCK).map_err(refused(path, "open"))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => JournalError::InUse(path.display().to_string()),
            TryLockError::Error(error) => refused(path, "lock")(error),
        })?;

        let named = read(&path.join(CURRENT))?;
        let told = read(&path.join(WITNESS))?;
        let current = named.as_deref().and_then(store_number);
        let witnessed = told.as_deref().and_then(|text| text.trim_end().parse().ok());
        let whole = match (&named, &told) {
            // New, or a first start that ended before it answered anybody.
            (None, None) => true,
            (None, Some(_)) => witnessed == Some(0),
            (Some(_), _) => current.is_some_and(|n| store(path, n).is_dir()) && witnessed.is_some(),
        };
        if !whole && !accept_loss {
            let what = if witnessed.is_some() { CURRENT } else { WITNESS };
            let shown = path.display();
            return Err(JournalError::Damaged(format!(
                "{shown}: {what} is lost or makes no sense"
            )));
        }
        let directory = Self {
            witness: file(WITNESS).map_err(refused(path, "open"))?,
            path: path.to_owned(),
            witnessed: witnessed.unwrap_or(0),
            current: current.unwrap_or(1),
            _lock: lock,
        };
        directory.remove_left_over().map_err(refused(path, "clean"))?;
        if witnessed.is_none() {
            directory.write_witness(0).map_err(refused(path, "write"))?;
            directory.witness.sync_all().map_err(refused(path, "sync"))?;
        }
        Ok(directory)
    }

    /// Where the store that counts is.
    pub(super) fn current(&self) -> PathBuf {
        store(&self.path, self.current)
    }

    /// Where the next store is to be.
    pub(super) fn next(&self) -> PathBuf {
        store(&self.path, self.current + 1)
    }

    /// Makes the current store the one that counts at the next start, too.
    pub(super) fn settle(&self) -> io::Result<()> {
        if read_to_string(&self.path.join(CURRENT))?.as_deref().and_then(store_number)
            == Some(self.current)
        {
            return Ok(());
        }
        self.name_current(self.current)
    }

    /// From now on the next store is the one that counts.
    pub(super) fn switch(&mut self) -> io::Result<()> {
        self.name_current(self.current + 1)?;
        self.current += 1;
        Ok(())
    }

    /// The latest commit that was synced.
    pub(super) fn witnessed(&self) -> u64 {
        self.witnessed
    }

    /// Remembers the latest commit that was synced.
    pub(super) fn witness(&mut self, commit: u64) -> io::Result<()> {
        self.write_witness(commit)?;
        self.witness.sync_data()?;
        self.witnessed = commit;
        Ok(())
    }

    /// The same length always, so that it is within one sector and its length need not be synced.
    fn write_witness(&self, commit: u64) -> io::Result<()> {
        self.witness.write_all_at(format!("{commit:020}\n").as_bytes(), 0)
    }

    fn name_current(&self, number: u64) -> io::Result<()> {
        let next = self.path.join(NEXT_CURRENT);
        fs::write(&next, format!("{STORE}{number}\n"))?;
        File::open(&next)?.sync_all()?;
        fs::rename(&next, self.path.join(CURRENT))?;
        File::open(&self.path)?.sync_all()
    }

    /// Removes every store but the current one: what a rotation left that did not end.
    fn remove_left_over(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let number = name.and_then(store_number);
            if number.is_some_and(|number| number != self.current) {
                fs::remove_dir_all(&path)?;
            }
        }
        Ok(())
    }
}

/// A directory that holds somebody else's files is not touched.
fn check_ours(path: &Path) -> Result<(), JournalError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(refused(path, "read"))? {
        names
            .push(entry.map_err(refused(path, "read"))?.file_name().to_string_lossy().into_owned());
    }
    let ours = |name: &str| {
        [LOCK, CURRENT, NEXT_CURRENT, WITNESS].contains(&name) || store_number(name).is_some()
    };
    // A file system of its own comes with this one.
    let theirs = names.iter().find(|name| !ours(name) && *name != "lost+found");
    match theirs {
        Some(found) if !names.iter().any(|name| name == CURRENT) => Err(JournalError::NotOurs {
            directory: path.display().to_string(),
            found: found.clone(),
        }),
        _ => Ok(()),
    }
}

fn store(path: &Path, number: u64) -> PathBuf {
    path.join(format!("{STORE}{number}"))
}

fn store_number(name: &str) -> Option<u64> {
    name.trim_end().strip_prefix(STORE)?.parse().ok()
}

fn read(path: &Path) -> Result<Option<String>, JournalError> {
    read_to_string(path).map_err(refused(path, "read"))
}

fn refused(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> JournalError {
    move |error| JournalError::Io { action, cause: format!("{}: {error}{NEEDED}", path.display()) }
}

/// What a file says, if there is one; what is not text says nothing.
fn read_to_string(path: &Path) -> io::Result<Option<String>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8(bytes).unwrap_or_default())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(path: &Path) -> String {
        Directory::open(path, false).err().expect("it is refused").to_string()
    }

    #[test]
    fn a_directory_goes_on_where_it_was() {
        let data = tempfile::tempdir().unwrap();
        let mut directory = Directory::open(data.path(), false).unwrap();
        assert_eq!(directory.current(), data.path().join("store-1"));
        fs::create_dir(directory.current()).unwrap();
        directory.settle().unwrap();
        directory.witness(7).unwrap();
        fs::create_dir(directory.next()).unwrap();
        directory.switch().unwrap();
        drop(directory);

        let directory = Directory::open(data.path(), false).unwrap();
        assert_eq!(directory.witnessed(), 7);
        assert_eq!(directory.current(), data.path().join("store-2"));
        assert!(!data.path().join("store-1").exists(), "what is left over goes");
    }

    #[test]
    fn one_process_at_a_time() {
        let data = tempfile::tempdir().unwrap();
        let _first = Directory::open(data.path(), false).unwrap();
        assert!(refusal(data.path()).contains("in use"));
    }

    #[test]
    fn what_is_somebody_elses_is_not_touched() {
        let data = tempfile::tempdir().unwrap();
        fs::write(data.path().join("thesis.tex"), "").unwrap();
        assert!(refusal(data.path()).contains("`thesis.tex`"));
        assert_eq!(fs::read_dir(data.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_lost_is_noticed() {
        for lost in [CURRENT, WITNESS, "store-1"] {
            let data = tempfile::tempdir().unwrap();
            let mut directory = Directory::open(data.path(), false).unwrap();
            fs::create_dir(directory.current()).unwrap();
            directory.settle().unwrap();
            directory.witness(1).unwrap();
            drop(directory);
            let lost = data.path().join(lost);
            if lost.is_dir() { fs::remove_dir(&lost) } else { fs::remove_file(&lost) }.unwrap();
            assert!(refusal(data.path()).contains("--accept-loss"));
            assert!(Directory::open(data.path(), true).is_ok());
        }
    }

    #[test]
    fn a_first_start_that_did_not_end_is_none() {
        let data = tempfile::tempdir().unwrap();
        let directory = Directory::open(data.path(), false).unwrap();
        fs::create_dir(directory.current()).unwrap();
        drop(directory);
        assert!(Directory::open(data.path(), false).is_ok());
    }
}
