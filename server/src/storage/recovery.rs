//! From a journal and a configuration to a storage that answers.

use std::{collections::HashMap, sync::Arc};

use fusebox_core::{Cell, Kind};
use prost::Message;
use thiserror::Error;

use super::{
    Embedded, Writer,
    journal::{Batch, Journal, JournalError, Keyspace},
    record::{CellRecord, Clocks, Directory, FORMAT, PolicyRecord},
    writer::CLOCKS,
};
use crate::{
    catalogue::{Catalogue, CellHasher, CellId, Policy},
    clock::{Clock, ServerClock},
    config::Namespaces,
    entropy::Entropy,
    limits,
    metrics::Decisions,
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

/// Recovers cells and policies from `journal`, and writes the number of this start before any answer.
///
/// # Errors
/// If the journal fails, or holds what this version cannot read.
pub fn recover(
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
        boot: 0,
    });
    if directory.format != FORMAT {
        return Err(RecoveryError::Format { found: directory.format });
    }
    let secret = directory.secret.as_slice().try_into().map_err(|_| corrupt("its secret"))?;
    directory.boot = wall_seconds.max(directory.boot + 1);

    let mut batch = Batch::default();
    batch.put(Keyspace::Meta, DIRECTORY, directory.encode_to_vec());
    batch.put(Keyspace::Meta, CLOCKS, Clocks::of(clock.pair()).encode_to_vec());
    let catalogue = policies(&*journal, namespaces, &clock, secret, &mut batch)?;
    journal.commit(batch)?;
    journal.sync()?;

    let cells = Arc::new(Embedded::new(journal.keeps(), limits::CELLS));
    revive(&*journal, &catalogue, &clock, &cells)?;
    let writer = Writer::new(Arc::clone(&cells), journal, clock.clone());
    Ok(Recovered { catalogue, cells, writer, clock, boot: directory.boot })
}

/// The configured policies under the numbers that their cells know, and those that are no longer
/// configured: their cells live until they are full.
fn policies(
    journal: &dyn Journal,
    namespaces: &Namespaces,
    clock: &ServerClock,
    secret: &[u8; 16],
    batch: &mut Batch,
) -> Result<Catalogue, RecoveryError> {
    let mut stored = Vec::new();
    journal.scan(Keyspace::Policies, &mut |key, value| {
        let record = PolicyRecord::decode(value).ok().filter(|record| record.policy().is_some());
        let record = record.ok_or_else(|| corrupt_record("policy", key))?;
        stored.push(record);
        Ok(())
    })?;
    stored.sort_by_key(|record| record.number);

    let mut numbered = Vec::new();
    let mut named = Vec::new();
    let mut known = HashMap::new();
    for (index, record) in stored.iter().enumerate() {
        let rule = record.policy().filter(|_| record.number as usize == index);
        let rule = rule.ok_or_else(|| corrupt("policies that are not numbered in order"))?;
        known.insert((record.namespace.as_str(), record.name.as_str()), index);
        numbered.push((record.namespace.as_str(), record.name.as_str(), rule));
        named.push(false);
    }

    for (namespace, policies) in namespaces {
        for (name, configured) in &policies.policies {
            let (namespace, name) = (namespace.as_str(), name.as_str());
            let index = match known.get(&(namespace, name)) {
                Some(index) => *index,
                None => {
                    numbered.push((namespace, name, configured.rule()));
                    named.push(false);
                    numbered.len() - 1
                }
            };
            let rule = &mut numbered[index].2;
            if rule.limit != configured.rule().limit {
                *rule = rule.changed(configured.rule().limit, clock.now());
            }
            rule.max_debt = configured.rule().max_debt;
            named[index] = true;
            let number = u32::try_from(index).map_err(|_| corrupt("more policies than numbers"))?;
            let record = PolicyRecord::of(namespace, name, number, rule).encode_to_vec();
            batch.put(Keyspace::Policies, policy_key(namespace, name), record);
        }
    }

    let numbered = (0..).zip(numbered).map(|(number, (namespace, name, rule))| {
        Arc::new(Policy {
            namespace: namespace.into(),
            name: name.into(),
            number,
            rule,
            cells: CellHasher::new(secret, namespace, name),
            decisions: Arc::new(Decisions::default()),
        })
    });
    Ok(Catalogue::new(1, numbered.collect(), &named))
}

/// Every cell that is not full by now. What was out stays spent: credits are for the living.
fn revive(
    journal: &dyn Journal,
    catalogue: &Catalogue,
    clock: &ServerClock,
    cells: &Embedded,
) -> Result<(), RecoveryError> {
    let now = clock.now();
    journal.scan(Keyspace::Cells, &mut |key, value| {
        let id = CellId::from_bytes(key);
        let record = CellRecord::decode(value).ok();
        let policy = record.and_then(|record| catalogue.numbered(record.number));
        let cell = record.and_then(CellRecord::cell);
        let (Some(id), Some(policy), Some(cell)) = (id, policy, cell) else {
            return Err(corrupt_record("cell", key));
        };
        let rule = &policy.rule;
        let state = rule.limit.revive(rule.current(cell), now);
        if rule.limit.full_at(state).is_some_and(|full_at| full_at <= now) {
            cells.forget(id);
        } else {
            cells.restore(id, policy.number, Cell { revision: rule.revision, state });
        }
        Ok(())
    })?;
    Ok(())
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
