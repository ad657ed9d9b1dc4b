//! From a journal and a configuration to a storage that answers.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use arrayvec::ArrayVec;
use fusebox_core::{Cell, Kind, Limit, Moment};
use prost::Message;
use thiserror::Error;

use super::{
    Embedded, Keeping, OpenGrant, Writer,
    embedded::Kept,
    journal::{Batch, Journal, JournalError, Keyspace, OpenJournal},
    record::{
        CellRecord, CleanStop, CommitRecord, Directory, FORMAT, GrantRecord, LimiterRecord,
        grant_of_key,
    },
    writer::{CLEAN_STOP, COMMIT, Numbered},
};
use crate::{
    catalogue::{
        Almanac, Budget, Catalogue, CellHasher, CellId, Limiter, LimiterNumber, Overrides, Policy,
        PolicyName, Rules,
    },
    clock::{Clock, ServerClock},
    config::{self, Durability, Keys, LimitSettings, Namespaces},
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
    /// Drawn once for the data directory.
    pub secret: [u8; 16],
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
    let latest = last.map(CommitRecord::at);
    let clock = ServerClock::resume(clock, latest);
    let latest = latest.unwrap_or_default();
    let mut directory = decode::<Directory>(&meta, DIRECTORY)?.unwrap_or_else(|| Directory {
        format: FORMAT,
        secret: entropy.bytes16().to_vec(),
        ..Directory::default()
    });
    if directory.format != FORMAT {
        return Err(RecoveryError::Format { found: directory.format });
    }
    let secret: Result<[u8; 16], _> = directory.secret.as_slice().try_into();
    let secret = secret.map_err(|_| JournalError::Broken("its secret makes no sense".into()))?;
    let clean_stop = decode::<CleanStop>(&meta, CLEAN_STOP)?;
    let last_boot = directory.boot;
    // Of what has lost something nobody knows how it ended.
    let believed = |boot: &u64| *boot == last_boot && !accept_loss;
    let exact_of = clean_stop.map(|stop| stop.boot).filter(believed);
    let clean = exact_of.is_some() || last.is_none();
    directory.boot = wall_seconds.max(last_boot.saturating_add(1));

    let stored = stored_limiters(&*journal, clean, clock.now())?;
    let highest = stored.values().map(|known| known.number.0).max();
    directory.next_limiter = directory.next_limiter.max(highest.map_or(0, |number| number + 1));
    let limiters =
        merge(stored, (namespaces, durability), &mut directory.next_limiter, clock.now());
    let keeps = journal.keeps();
    let mut journal = Numbered::new(journal, clock.clone(), found.max(witnessed), latest);
    let mut batch = Batch::default();
    batch.put(Keyspace::Meta, DIRECTORY, directory.encode_to_vec());
    // What the last life wrote at its end is exact once.
    batch.delete(Keyspace::Meta, CLEAN_STOP);
    // One whose cells are written from now on is still recovered as if they were not: records of an older
    // time, before they were not written for a while, would be believed.
    for (id, known) in &limiters {
        let record = known.record(id, known.is_fast || known.was_fast);
        batch.put(Keyspace::Policies, id.to_key(), record.encode_to_vec());
    }
    let turned = limiters.iter().filter(|(_, known)| known.was_fast && !known.is_fast);
    let turned = turned.map(|(id, known)| (id.to_key(), known.record(id, false).encode_to_vec()));
    let turned: Vec<_> = turned.collect();
    journal.commit(batch)?;
    journal.sync_witnessed()?;

    let were_fast =
        limiters.values().filter(|known| known.was_fast).map(|known| known.number).collect();
    let retiring = limiters.iter().filter(|(_, known)| known.configured.is_none());
    let retiring: Vec<_> = retiring.map(|(id, known)| (id.clone(), known.number)).collect();
    let catalogue = catalogue(limiters, namespaces, &secret, keeps);
    let (cells, woken) = Embedded::new(limits::CELLS);
    cells.begin_at(latest);
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
    let now = clock.now();
    let is_done = |number: &LimiterNumber| {
        let limiter = catalogue.numbered(*number);
        let full_at = limiter.and_then(|limiter| limiter.settings.absent_full_at(now));
        full_at.is_none_or(|full_at| full_at <= now.time) && !in_use.contains(number)
    };
    let retired = retiring.iter().filter(|(_, number)| is_done(number));
    let retired = retired.map(|(id, _)| (Keyspace::Policies, id.to_key()));
    let deleted = gone.into_iter().chain(retired).map(|(space, key)| (space, key, None));
    // Last, and before the first answer.
    let turned = turned.into_iter().map(|(key, record)| (Keyspace::Policies, key, Some(record)));
    journal.commit_all(deleted.chain(turned))?;
    journal.sync_witnessed()?;

    let cells = Arc::new(cells);
    let writer = Writer::new(Arc::clone(&cells), journal, woken, directory.boot);
    Ok(Recovered { catalogue, cells, grants, writer, clock, boot: directory.boot, secret, clean })
}

/// Names a limiter.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct LimiterId {
    namespace: String,
    policy: String,
    /// As [`LimiterRecord::keys`].
    keys: String,
    index: u32,
}

impl LimiterId {
    /// Names have no dots, and only keys have what ends them, so this one is unambiguous.
    fn to_key(&self) -> Vec<u8> {
        let Self { namespace, policy, keys, index } = self;
        let rest = if (keys.as_str(), *index) == ("", 0) {
            String::new()
        } else {
            format!(".{index}.{keys}")
        };
        format!("{namespace}.{policy}{rest}").into_bytes()
    }

    fn of(namespace: &str, policy: &str, keys: Option<&Keys>, index: usize) -> Self {
        let keys = match keys {
            None => String::new(),
            Some(Keys::Exactly(key)) => format!("={key}"),
            Some(Keys::Prefixed(prefix)) => format!("^{prefix}"),
        };
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        Self { namespace: namespace.to_owned(), policy: policy.to_owned(), keys, index }
    }
}

/// A limiter that the configuration or the data directory knows.
struct Known {
    number: LimiterNumber,
    settings: fusebox_core::Policy,
    /// In the last life its cells were not written until a clean stop.
    was_fast: bool,
    /// Its cells are not written until a clean stop.
    is_fast: bool,
    /// What the configuration says of its durability; `None` if it does not name the limiter.
    configured: Option<Durability>,
}

impl Known {
    fn record(&self, id: &LimiterId, fast: bool) -> LimiterRecord {
        let names = (id.namespace.as_str(), id.policy.as_str());
        let keys = (id.keys.as_str(), id.index);
        LimiterRecord::of(names, keys, self.number, &self.settings, fast)
    }
}

/// Limiters by name.
type Limiters = BTreeMap<LimiterId, Known>;

/// Whether the cells of a limiter are not worth a write: a crash empties them, and soon they are full again.
/// Permits are not: nobody else would know that they are held.
fn is_fast(limit: &Limit) -> bool {
    match limit {
        Limit::RetryBudget(_) => true,
        limit => limit.fills_in().is_some_and(|fills_in| fills_in <= limits::FAST_FILL),
    }
}

/// The limiters as the last life had them. Where it was killed, nobody knows what the cells of those that
/// are not written while they live had spent: all of it.
fn stored_limiters(
    journal: &dyn Journal,
    clean: bool,
    now: Moment,
) -> Result<Limiters, JournalError> {
    let mut stored = Limiters::new();
    journal.scan(Keyspace::Policies, &mut |key, value| {
        let record = LimiterRecord::decode(value).ok();
        let settings = record.as_ref().and_then(LimiterRecord::policy);
        let (Some(record), Some(mut settings)) = (record, settings) else {
            return Err(broken("policy", key));
        };
        if record.fast && !clean {
            settings = settings.emptied(now);
        } else if settings.absent_full_at(now).is_some_and(|full_at| full_at <= now.time) {
            settings.absent = None;
        }
        let LimiterRecord { namespace, name: policy, keys, index, number, fast, .. } = record;
        let number = LimiterNumber(number);
        let known = Known { number, settings, was_fast: fast, is_fast: fast, configured: None };
        stored.insert(LimiterId { namespace, policy, keys, index }, known);
        Ok(())
    })?;
    Ok(stored)
}

/// The configured limiters under the numbers that their cells know, and those that are no longer
/// configured.
fn merge(
    stored: Limiters,
    (namespaces, durability): (&Namespaces, Durability),
    next: &mut u32,
    now: Moment,
) -> Limiters {
    let mut limiters = stored;
    for (namespace, configured) in namespaces {
        for (name, policy) in &configured.policies {
            for (keys, index, limit) in all_limits(policy) {
                let limit = limit.limit;
                let max_debt = policy.max_debt_of(&limit);
                let id = LimiterId::of(namespace.as_str(), name.as_str(), keys, index);
                let known = limiters.entry(id).or_insert_with(|| {
                    let number = LimiterNumber(*next);
                    *next += 1;
                    let settings = fusebox_core::Policy::new(limit, max_debt);
                    Known { number, settings, was_fast: false, is_fast: false, configured: None }
                });
                known.configured = Some(policy.durability.unwrap_or(durability));
                if known.settings.limit != limit {
                    known.settings = known.settings.changed(limit, now);
                }
                known.settings.max_debt = max_debt;
                // What only watches is not worth a write either.
                known.is_fast = is_fast(&limit) || policy.shadow;
            }
        }
    }
    limiters
}

/// Every limit of a policy, and whose it is.
fn all_limits(
    policy: &config::Policy,
) -> impl Iterator<Item = (Option<&Keys>, usize, &LimitSettings)> {
    let own = policy.limits.iter().enumerate().map(|(index, limit)| (None, index, limit));
    let others = policy.overrides.iter().flat_map(|one| {
        one.limits.iter().enumerate().map(move |(index, limit)| (Some(&one.keys), index, limit))
    });
    own.chain(others)
}

fn catalogue(
    mut limiters: Limiters,
    namespaces: &Namespaces,
    secret: &[u8; 16],
    keeps: bool,
) -> Catalogue {
    let mut policies = Vec::new();
    for (namespace, configured) in namespaces {
        for (name, policy) in &configured.policies {
            let name =
                PolicyName { namespace: namespace.as_str().into(), policy: name.as_str().into() };
            policies.push(named_policy(name, policy, &mut limiters, secret, keeps));
        }
    }
    let retired = limiters.into_iter().map(|(id, known)| {
        let name = PolicyName { namespace: id.namespace.into(), policy: id.policy.into() };
        Arc::new(limiter(&name, known, None, &Arc::default(), keeps))
    });
    Catalogue::new(1, policies, retired)
}

/// A policy of the limiters that are its own.
fn named_policy(
    name: PolicyName,
    policy: &config::Policy,
    limiters: &mut Limiters,
    secret: &[u8; 16],
    keeps: bool,
) -> Policy {
    let cells = CellHasher::new(secret, &name.namespace, &name.policy);
    let budget = Arc::new(Budget::new(policy.max_cells));
    let mut rules = |keys: Option<&Keys>, limits: &[LimitSettings], overflow| {
        let limiters = limits.iter().enumerate().filter_map(|(index, settings)| {
            let id = LimiterId::of(&name.namespace, &name.policy, keys, index);
            let known = limiters.remove(&id)?;
            let almanac = settings.calendar.clone().map(Almanac::new);
            Some(Arc::new(limiter(&name, known, almanac, &budget, keeps)))
        });
        Rules { limiters: limiters.collect::<ArrayVec<_, { limits::LIMITS }>>(), overflow }
    };
    let own = rules(None, &policy.limits, Some(cells.overflow(None)));
    let mut overrides = Overrides::default();
    for one in &policy.overrides {
        match &one.keys {
            Keys::Exactly(key) => {
                let rules = rules(Some(&one.keys), &one.limits, None);
                overrides.exact.insert(key.as_str().into(), rules);
            }
            Keys::Prefixed(prefix) => {
                let overflow = cells.overflow(Some(prefix));
                let rules = rules(Some(&one.keys), &one.limits, Some(overflow));
                overrides.prefixes.push((prefix.as_str().into(), rules));
            }
        }
    }
    overrides.prefixes.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
    Policy {
        namespace: Arc::clone(&name.namespace),
        name: Arc::clone(&name.policy),
        rules: own,
        overrides,
        shadow: policy.shadow,
        reserves: policy.reserves,
        max_waiting: policy.max_waiting,
        lease_time: policy.lease_time,
        cells,
        budget,
        decisions: Arc::default(),
    }
}

fn limiter(
    name: &PolicyName,
    known: Known,
    calendar: Option<Almanac>,
    budget: &Arc<Budget>,
    keeps: bool,
) -> Limiter {
    let keeping = match known.configured {
        _ if !keeps || known.is_fast => Keeping::AtStop,
        Some(Durability::Relaxed) => Keeping::Behind,
        Some(Durability::Strict) | None => Keeping::Marked,
    };
    Limiter {
        name: name.clone(),
        number: known.number,
        settings: known.settings,
        keeping,
        calendar,
        budget: Arc::clone(budget),
    }
}

/// The way of what is on disk into memory.
struct Revival<'a> {
    catalogue: &'a Catalogue,
    cells: &'a Embedded,
    now: Moment,
    /// The start whose clean stop is to be believed.
    exact_of: Option<u64>,
    were_fast: HashSet<LimiterNumber>,
    /// Limiters that have records.
    in_use: HashSet<LimiterNumber>,
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
                let grant = record.grant(id).ok_or_else(|| broken("grant", key))?;
                for part in &grant.parts {
                    *out.entry(part.cell).or_default() += part.out();
                }
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
                self.cell(id, record.kept()?, exact, out)
            });
            revived.ok_or_else(|| broken("cell", key))
        })?;
        Ok(grants)
    }

    /// One cell; `None` if it is of no limiter.
    fn cell(&mut self, id: CellId, kept: Kept, exact: bool, out: u64) -> Option<()> {
        let limiter = self.catalogue.numbered(kept.number)?;
        let settings = &limiter.settings;
        // Also of one that leaves: its record is still there.
        self.in_use.insert(kept.number);
        // What was out is so again only where its grant goes on; nothing flowed into its place meanwhile.
        let left = Cell { state: kept.cell.state.with_out(out), ..kept.cell };
        let state = settings.limit.revive(settings.current(left), out, self.now);
        let revived = Cell { revision: settings.revision, state };
        let leaves = match settings.leaves_at(revived, self.now) {
            Some(leaves_at) => leaves_at <= self.now.time,
            // It never fills: that is for the policy to say, as long as there is one.
            None => !self.catalogue.has(limiter) && state.out() == 0,
        };
        let stale = !exact && self.were_fast.contains(&kept.number);
        let on_disk = limiter.keeping != Keeping::AtStop;
        if stale || leaves || !on_disk {
            self.gone.push((Keyspace::Cells, id.to_bytes().to_vec()));
        }
        if !stale && !leaves {
            // Converted for good: at the next start the change that it slept through may be forgotten. And
            // permits without a name are counted apart from here on.
            let rewrite =
                on_disk && kept.cell != revived && kept.cell.revision != settings.revision;
            let rewrite = rewrite || on_disk && limiter.is_concurrency();
            let kept = Kept { cell: revived, ..kept };
            self.cells.restore(id, limiter, &kept, on_disk, rewrite);
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

fn broken(kind: &str, key: &[u8]) -> JournalError {
    let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    JournalError::Broken(format!("it holds a {kind} record under key 0x{key} that makes no sense"))
}
