//! From a journal and a configuration to a storage that answers.

use std::{
    collections::{BTreeMap, HashSet},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use fusebox_core::{Cell, Kind, Time};
use prost::Message;
use thiserror::Error;

use super::{
    Embedded, Writer,
    journal::{Batch, Journal, JournalError, Keyspace, OpenJournal},
    record::{CellRecord, Clocks, Directory, FORMAT, PolicyRecord},
    writer::CLOCKS,
};
use crate::{
    catalogue::{Catalogue, CellHasher, CellId, Policy, PolicyNumber},
    clock::{Clock, ServerClock},
    config::Namespaces,
    entropy::Entropy,
    limits,
};

/// Key of the record of the directory itself.
const DIRECTORY: &[u8] = b"directory";

/// All that a start needs.
pub struct Recovered {
    /// The policies in force.
    pub catalogue: Catalogue,
    /// The cells.
    pub cells: Arc<Embedded>,
    /// Follows them on disk.
    pub writer: Writer,
    /// Goes on where the last life stopped.
    pub clock: ServerClock,
    /// Number of this start; above that of every earlier one.
    pub boot: u64,
}

/// Why a start must not be.
#[derive(Debug, Error)]
pub enum RecoveryError {
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Written by another version.
    #[error(
        "the data directory has format {found}, and this version reads {FORMAT}; \
         start the version that wrote it, or use another directory with --data"
    )]
    Format {
        /// The format found.
        found: u32,
    },
}

/// Recovers cells and policies, and writes the number of this start before any answer.
///
/// # Errors
/// If the journal fails, or holds what this version cannot read.
pub fn recover(
    open: OpenJournal,
    namespaces: &Namespaces,
    clock: Arc<dyn Clock>,
    entropy: &dyn Entropy,
) -> Result<Recovered, RecoveryError> {
    // sled panics where it finds that it is broken.
    let recovered =
        catch_unwind(AssertUnwindSafe(|| recover_from(open()?, namespaces, clock, entropy)));
    recovered.unwrap_or_else(|_| Err(JournalError::panicked("read").into()))
}

fn recover_from(
    mut journal: Box<dyn Journal>,
    namespaces: &Namespaces,
    clock: Arc<dyn Clock>,
    entropy: &dyn Entropy,
) -> Result<Recovered, RecoveryError> {
    let wall_seconds = clock.wall().as_secs();
    let last = read::<Clocks>(&*journal, CLOCKS)?.map(Clocks::pair);
    let clock = ServerClock::resume(clock, last);
    let mut directory = read::<Directory>(&*journal, DIRECTORY)?.unwrap_or_else(|| Directory {
        format: FORMAT,
        secret: entropy.bytes16().to_vec(),
        ..Directory::default()
    });
    if directory.format != FORMAT {
        return Err(RecoveryError::Format { found: directory.format });
    }
    let secret = directory.secret.as_slice().try_into().map_err(|_| corrupt("its secret"))?;
    directory.boot = wall_seconds.max(directory.boot.saturating_add(1));

    let stored = stored_policies(&*journal)?;
    let highest = stored.values().map(|known| known.number.0).max();
    directory.next_policy = directory.next_policy.max(highest.map_or(0, |number| number + 1));
    let policies = merge(stored, namespaces, &mut directory.next_policy, clock.now());
    let mut batch = Batch::default();
    batch.put(Keyspace::Meta, DIRECTORY, directory.encode_to_vec());
    batch.put(Keyspace::Meta, CLOCKS, Clocks::of(clock.pair()).encode_to_vec());
    for ((namespace, name), known) in policies.iter().filter(|(_, known)| known.configured) {
        let record = PolicyRecord::of(namespace, name, known.number, &known.settings);
        batch.put(Keyspace::Policies, policy_key(namespace, name), record.encode_to_vec());
    }
    journal.commit(batch)?;
    journal.sync()?;

    let catalogue = catalogue(policies, secret);
    let cells = Arc::new(Embedded::new(journal.keeps(), limits::CELLS));
    let in_use = revive(&*journal, &catalogue, clock.now(), &cells)?;
    journal.commit(retire(&catalogue, &in_use))?;
    let writer = Writer::new(Arc::clone(&cells), journal, clock.clone());
    Ok(Recovered { catalogue, cells, writer, clock, boot: directory.boot })
}

/// A policy that the configuration or the data directory knows.
struct Known {
    number: PolicyNumber,
    settings: fusebox_core::Policy,
    configured: bool,
}

/// Policies by namespace and name.
type Policies = BTreeMap<(String, String), Known>;

fn stored_policies(journal: &dyn Journal) -> Result<Policies, JournalError> {
    let mut stored = Policies::new();
    journal.scan(Keyspace::Policies, &mut |key, value| {
        let record = PolicyRecord::decode(value).ok();
        let settings = record.as_ref().and_then(PolicyRecord::policy);
        let (Some(record), Some(settings)) = (record, settings) else {
            return Err(corrupt_record("policy", key));
        };
        let number = PolicyNumber(record.number);
        let known = Known { number, settings, configured: false };
        stored.insert((record.namespace, record.name), known);
        Ok(())
    })?;
    Ok(stored)
}

/// The configured policies under the numbers that their cells know, and those that are no longer
/// configured.
fn merge(stored: Policies, namespaces: &Namespaces, next: &mut u32, now: Time) -> Policies {
    let mut policies = stored;
    for (namespace, configured) in namespaces {
        for (name, configured) in &configured.policies {
            let configured = configured.settings();
            let name = (namespace.as_str().to_owned(), name.as_str().to_owned());
            let known = policies.entry(name).or_insert_with(|| {
                let number = PolicyNumber(*next);
                *next += 1;
                Known { number, settings: configured.clone(), configured: true }
            });
            known.configured = true;
            if known.settings.limit != configured.limit {
                known.settings = known.settings.changed(configured.limit, now);
            }
            known.settings.max_debt = configured.max_debt;
        }
    }
    policies
}

fn catalogue(policies: Policies, secret: &[u8; 16]) -> Catalogue {
    let policies = policies.into_iter().map(|((namespace, name), known)| {
        let policy = Policy {
            cells: CellHasher::new(secret, &namespace, &name),
            namespace: namespace.into(),
            name: name.into(),
            number: known.number,
            settings: known.settings,
            decisions: Arc::default(),
        };
        (policy, known.configured)
    });
    Catalogue::new(1, policies)
}

/// Every cell that is not full by now, and the policies they are of. What was out stays spent: credits are
/// for the living.
fn revive(
    journal: &dyn Journal,
    catalogue: &Catalogue,
    now: Time,
    cells: &Embedded,
) -> Result<HashSet<PolicyNumber>, JournalError> {
    let mut in_use = HashSet::new();
    journal.scan(Keyspace::Cells, &mut |key, value| {
        let id = CellId::from_bytes(key);
        let record = CellRecord::decode(value).ok();
        let policy = record.and_then(|record| catalogue.numbered(PolicyNumber(record.number)));
        let cell = record.and_then(CellRecord::cell);
        let (Some(id), Some(policy), Some(cell)) = (id, policy, cell) else {
            return Err(corrupt_record("cell", key));
        };
        let settings = &policy.settings;
        let state = settings.limit.revive(settings.current(cell), now);
        // Also of one that leaves: its record is still there.
        in_use.insert(policy.number);
        let leaves = match settings.limit.full_at(state) {
            Some(full_at) => full_at <= now,
            // It never fills: that is for the policy to say, as long as there is one.
            None => !catalogue.names(policy),
        };
        if leaves {
            cells.forget(id);
        } else {
            // Converted for good: at the next start the change that it slept through may be forgotten.
            let converted = cell.revision != settings.revision;
            let cell = Cell { revision: settings.revision, state };
            cells.restore(id, policy.number, cell, converted);
        }
        Ok(())
    })?;
    Ok(in_use)
}

/// Forgets the policies that are neither configured nor in use, so that they do not pile up.
fn retire(catalogue: &Catalogue, in_use: &HashSet<PolicyNumber>) -> Batch {
    let mut batch = Batch::default();
    for policy in catalogue.unnamed().filter(|policy| !in_use.contains(&policy.number)) {
        batch.delete(Keyspace::Policies, policy_key(&policy.namespace, &policy.name));
    }
    batch
}

fn read<M: Message + Default>(
    journal: &dyn Journal,
    key: &[u8],
) -> Result<Option<M>, RecoveryError> {
    let value = journal.get(Keyspace::Meta, key)?;
    let message = value.map(|value| M::decode(value.as_slice())).transpose();
    message.map_err(|_| corrupt_record("meta", key).into())
}

/// Names have no dots, so this one is unambiguous.
fn policy_key(namespace: &str, name: &str) -> Vec<u8> {
    format!("{namespace}.{name}").into_bytes()
}

fn corrupt(what: &str) -> JournalError {
    JournalError::Corrupt(what.to_owned())
}

fn corrupt_record(kind: &str, key: &[u8]) -> JournalError {
    let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    corrupt(&format!("a {kind} record under key 0x{key} that makes no sense"))
}
