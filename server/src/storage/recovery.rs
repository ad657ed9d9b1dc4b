//! From a journal and a configuration to a storage that answers.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use fusebox_core::{Cell, Kind, Limit, Time};
use prost::Message;
use thiserror::Error;

use super::{
    Embedded, Keeping, OpenGrant, Writer,
    journal::{Batch, Journal, JournalError, Keyspace, OpenJournal},
    record::{
        CellRecord, CleanStop, CommitRecord, Directory, FORMAT, GrantRecord, PolicyRecord,
        grant_of_key,
    },
    writer::{CLEAN_STOP, COMMIT, Numbered},
};
use crate::{
    catalogue::{Catalogue, CellHasher, CellId, Policy, PolicyNumber},
    clock::{Clock, ServerClock},
    config::{Durability, Namespaces},
    entropy::Entropy,
    limits,
};

/// Key of the record of the directory itself.
const DIRECTORY: &[u8] = b"directory";

/// What a start begins with.
pub struct Start<'a> {
    /// Opens the journal.
    pub journal: OpenJournal,
    /// Go on although the journal has lost some of what was written.
    pub accept_loss: bool,
    /// What is limited.
    pub namespaces: &'a Namespaces,
    /// How it is kept where a policy does not say.
    pub durability: Durability,
    /// What time it is.
    pub clock: Arc<dyn Clock>,
    /// What nobody can guess.
    pub entropy: &'a dyn Entropy,
}

/// All that a start needs.
pub struct Recovered {
    /// The policies in force.
    pub catalogue: Catalogue,
    /// The cells.
    pub cells: Arc<Embedded>,
    /// Grants that the last life left open.
    pub grants: Vec<OpenGrant>,
    /// Follows the cells on disk.
    pub writer: Writer,
    /// Goes on where the last life stopped.
    pub clock: ServerClock,
    /// Number of this start; above that of every earlier one.
    pub boot: u64,
    /// The last life ended as it should, or there was none.
    pub clean: bool,
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
    /// What was on disk is there no more.
    #[error(
        "the data directory has lost its last commits: it ends at {found}, and {witnessed} was on disk. \
         Restore a copy of it, or start with --accept-loss: then what they charged may be spent again"
    )]
    Lost {
        /// The last commit that is there.
        found: u64,
        /// The last one that is known to have been.
        witnessed: u64,
    },
}

/// Recovers cells and policies, and writes the number of this start before any answer.
///
/// # Errors
/// If the journal fails, has lost something, or holds what this version cannot read.
pub fn recover(start: Start<'_>) -> Result<Recovered, RecoveryError> {
    // sled panics where it finds that it is broken.
    let recovered = catch_unwind(AssertUnwindSafe(|| recover_from(start)));
    recovered.unwrap_or_else(|_| {
        let what = "the store panics when it is read, and the log says where".to_owned();
        Err(JournalError::Broken(what).into())
    })
}

fn recover_from(start: Start<'_>) -> Result<Recovered, RecoveryError> {
    let Start { journal, accept_loss, namespaces, durability, clock, entropy } = start;
    let journal = journal()?;
    let wall_seconds = clock.wall().as_secs();
    // Also so that all of it is known to be what was written.
    let mut meta = BTreeMap::new();
    journal.scan(Keyspace::Meta, &mut |key, value| {
        meta.insert(key.to_vec(), value.to_vec());
        Ok(())
    })?;
    let last = decode::<CommitRecord>(&meta, COMMIT)?;
    let (found, witnessed) = (last.map_or(0, |last| last.number), journal.witnessed());
    if found < witnessed && !accept_loss {
        return Err(RecoveryError::Lost { found, witnessed });
    }
    let clock = ServerClock::resume(clock, last.map(CommitRecord::pair));
    let mut directory = decode::<Directory>(&meta, DIRECTORY)?.unwrap_or_else(|| Directory {
        format: FORMAT,
        secret: entropy.bytes16().to_vec(),
        ..Directory::default()
    });
    if directory.format != FORMAT {
        return Err(RecoveryError::Format { found: directory.format });
    }
    let secret = directory.secret.as_slice().try_into();
    let secret = secret.map_err(|_| JournalError::Broken("its secret makes no sense".into()))?;
    let clean_stop = decode::<CleanStop>(&meta, CLEAN_STOP)?;
    let last_boot = directory.boot;
    // Of what has lost something nobody knows how it ended.
    let believed = |boot: &u64| *boot == last_boot && !accept_loss;
    let exact_of = clean_stop.map(|stop| stop.boot).filter(believed);
    let clean = exact_of.is_some() || last.is_none();
    directory.boot = wall_seconds.max(last_boot.saturating_add(1));

    let stored = stored_policies(&*journal, clean, clock.now())?;
    let highest = stored.values().map(|known| known.number.0).max();
    directory.next_policy = directory.next_policy.max(highest.map_or(0, |number| number + 1));
    let policies = merge(stored, (namespaces, durability), &mut directory.next_policy, clock.now());
    let keeps = journal.keeps();
    let mut journal = Numbered::new(journal, clock.clone(), found.max(witnessed));
    let mut batch = Batch::default();
    batch.put(Keyspace::Meta, DIRECTORY, directory.encode_to_vec());
    // What the last life wrote at its end is exact once.
    batch.delete(Keyspace::Meta, CLEAN_STOP);
    for ((namespace, name), known) in &policies {
        let fast = is_fast(&known.settings.limit);
        let record = PolicyRecord::of(namespace, name, known.number, &known.settings, fast);
        batch.put(Keyspace::Policies, policy_key(namespace, name), record.encode_to_vec());
    }
    journal.commit(batch)?;
    journal.sync_witnessed()?;

    let were_fast =
        policies.values().filter(|known| known.was_fast).map(|known| known.number).collect();
    let catalogue = catalogue(policies, secret, keeps);
    let (cells, woken) = Embedded::new(limits::CELLS);
    let mut revival = Revival {
        catalogue: &catalogue,
        cells: &cells,
        now: clock.now(),
        exact_of,
        were_fast,
        in_use: HashSet::new(),
        gone: Vec::new(),
    };
    let grants = revival.revive(journal.store())?;
    let Revival { in_use, gone, .. } = revival;
    let retired = catalogue.unnamed().filter(|policy| {
        let full = policy.settings.absent_full_at().is_none_or(|full_at| full_at <= clock.now());
        full && !in_use.contains(&policy.number)
    });
    let retired =
        retired.map(|policy| (Keyspace::Policies, policy_key(&policy.namespace, &policy.name)));
    journal.commit_all(gone.into_iter().chain(retired).map(|(space, key)| (space, key, None)))?;

    let cells = Arc::new(cells);
    let writer = Writer::new(Arc::clone(&cells), journal, woken, directory.boot);
    Ok(Recovered { catalogue, cells, grants, writer, clock, boot: directory.boot, clean })
}

/// A policy that the configuration or the data directory knows.
struct Known {
    number: PolicyNumber,
    settings: fusebox_core::Policy,
    /// In the last life its cells were not written until a clean stop.
    was_fast: bool,
    /// What the configuration says of its durability; `None` if it does not name the policy.
    configured: Option<Durability>,
}

/// Policies by namespace and name.
type Policies = BTreeMap<(String, String), Known>;

/// Whether the cells of a policy are not worth a write: a crash empties them, and soon they are full again.
fn is_fast(limit: &Limit) -> bool {
    limit.fills_in().is_some_and(|fills_in| fills_in <= limits::FAST_FILL)
}

/// The policies as the last life had them. Where it was killed, nobody knows what the cells of those that
/// are not written while they live had spent: all of it.
fn stored_policies(
    journal: &dyn Journal,
    clean: bool,
    now: Time,
) -> Result<Policies, JournalError> {
    let mut stored = Policies::new();
    journal.scan(Keyspace::Policies, &mut |key, value| {
        let record = PolicyRecord::decode(value).ok();
        let settings = record.as_ref().and_then(PolicyRecord::policy);
        let (Some(record), Some(mut settings)) = (record, settings) else {
            return Err(broken("policy", key));
        };
        if record.fast && !clean {
            settings = settings.emptied(now);
        } else if settings.absent_full_at().is_some_and(|full_at| full_at <= now) {
            settings.absent = None;
        }
        let number = PolicyNumber(record.number);
        let known = Known { number, settings, was_fast: record.fast, configured: None };
        stored.insert((record.namespace, record.name), known);
        Ok(())
    })?;
    Ok(stored)
}

/// The configured policies under the numbers that their cells know, and those that are no longer
/// configured.
fn merge(
    stored: Policies,
    (namespaces, durability): (&Namespaces, Durability),
    next: &mut u32,
    now: Time,
) -> Policies {
    let mut policies = stored;
    for (namespace, configured) in namespaces {
        for (name, policy) in &configured.policies {
            let settings = policy.settings();
            let name = (namespace.as_str().to_owned(), name.as_str().to_owned());
            let known = policies.entry(name).or_insert_with(|| {
                let number = PolicyNumber(*next);
                *next += 1;
                Known { number, settings: settings.clone(), was_fast: false, configured: None }
            });
            known.configured = Some(policy.durability().unwrap_or(durability));
            if known.settings.limit != settings.limit {
                known.settings = known.settings.changed(settings.limit, now);
            }
            known.settings.max_debt = settings.max_debt;
        }
    }
    policies
}

fn catalogue(policies: Policies, secret: &[u8; 16], keeps: bool) -> Catalogue {
    let policies = policies.into_iter().map(|((namespace, name), known)| {
        let keeping = match known.configured {
            _ if !keeps || is_fast(&known.settings.limit) => Keeping::AtStop,
            Some(Durability::Relaxed) => Keeping::Behind,
            Some(Durability::Strict) | None => Keeping::Marked,
        };
        let policy = Policy {
            cells: CellHasher::new(secret, &namespace, &name),
            namespace: namespace.into(),
            name: name.into(),
            number: known.number,
            settings: known.settings,
            keeping,
            decisions: Arc::default(),
        };
        (policy, known.configured.is_some())
    });
    Catalogue::new(1, policies)
}

/// The way of what is on disk into memory.
struct Revival<'a> {
    catalogue: &'a Catalogue,
    cells: &'a Embedded,
    now: Time,
    /// The start whose clean stop is to be believed.
    exact_of: Option<u64>,
    were_fast: HashSet<PolicyNumber>,
    /// Policies that have records.
    in_use: HashSet<PolicyNumber>,
    /// Records that no longer say anything.
    gone: Vec<(Keyspace, Vec<u8>)>,
}

impl Revival<'_> {
    /// Every grant that goes on, and every cell that is not full by now.
    fn revive(&mut self, journal: &dyn Journal) -> Result<Vec<OpenGrant>, JournalError> {
        let mut grants = Vec::new();
        let mut out = HashMap::<CellId, u64>::new();
        journal.scan(Keyspace::Grants, &mut |key, value| {
            let record = GrantRecord::decode(value).ok().zip(grant_of_key(key));
            let (record, id) = record.ok_or_else(|| broken("grant", key))?;
            if self.exact_of.is_some_and(|boot| record.exact_of == boot) {
                let grant = record.grant(id);
                *out.entry(grant.cell).or_default() += grant.amount;
                grants.push(grant);
            }
            self.gone.push((Keyspace::Grants, key.to_vec()));
            Ok(())
        })?;
        journal.scan(Keyspace::Cells, &mut |key, value| {
            let record = CellRecord::decode(value).ok();
            let revived = record.zip(CellId::from_bytes(key)).and_then(|(record, id)| {
                let exact = self.exact_of.is_some_and(|boot| record.exact_of == boot);
                let out = out.get(&id).copied().unwrap_or(0);
                self.cell((id, PolicyNumber(record.number)), record.cell()?, exact, out)
            });
            revived.ok_or_else(|| broken("cell", key))
        })?;
        Ok(grants)
    }

    /// One cell; `None` if it is of no policy.
    fn cell(
        &mut self,
        (id, number): (CellId, PolicyNumber),
        cell: Cell,
        exact: bool,
        out: u64,
    ) -> Option<()> {
        let policy = self.catalogue.numbered(number)?;
        let settings = &policy.settings;
        // Also of one that leaves: its record is still there.
        self.in_use.insert(number);
        // What was out is so again only where its grant goes on.
        let state = match out {
            0 => settings.limit.revive(settings.current(cell), self.now),
            _ => settings.current(Cell { state: cell.state.with_out(out), ..cell }),
        };
        let revived = Cell { revision: settings.revision, state };
        let leaves = match settings.leaves_at(revived) {
            Some(leaves_at) => leaves_at <= self.now,
            // It never fills: that is for the policy to say, as long as there is one.
            None => !self.catalogue.names(policy) && state.out() == 0,
        };
        let stale = !exact && self.were_fast.contains(&number);
        let kept = policy.keeping != Keeping::AtStop;
        if stale || leaves || !kept {
            self.gone.push((Keyspace::Cells, id.to_bytes().to_vec()));
        }
        if !stale && !leaves {
            // Converted for good: at the next start the change that it slept through may be forgotten.
            let rewrite = kept && cell.revision != settings.revision;
            self.cells.restore(id, number, revived, kept, rewrite);
        }
        Some(())
    }
}

fn decode<M: Message + Default>(
    meta: &BTreeMap<Vec<u8>, Vec<u8>>,
    key: &[u8],
) -> Result<Option<M>, JournalError> {
    let message = meta.get(key).map(|value| M::decode(value.as_slice())).transpose();
    message.map_err(|_| broken("meta", key))
}

/// Names have no dots, so this one is unambiguous.
fn policy_key(namespace: &str, name: &str) -> Vec<u8> {
    format!("{namespace}.{name}").into_bytes()
}

fn broken(kind: &str, key: &[u8]) -> JournalError {
    let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    JournalError::Broken(format!("it holds a {kind} record under key 0x{key} that makes no sense"))
}
