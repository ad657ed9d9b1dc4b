//! From a journal and a configuration to a storage that answers.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use fusebox_core::{Cell, Kind, Moment};
use prost::Message;
use thiserror::Error;

use super::{
    Circuits, Embedded, Keeping, OpenGrant, Writer,
    embedded::Kept,
    journal::{Batch, Journal, JournalError, Keyspace, OpenJournal, Write},
    record::{
        CellRecord, CircuitRecord, CleanStop, CommitRecord, Directory, FORMAT, GrantRecord,
        LimiterRecord, PolicyRecord, grant_of_key,
    },
    writer::{CLEAN_STOP, COMMIT, Numbered},
};
use crate::{
    app::events::{self, Action, Appended, Event, EventRecord, Events, event_of_key},
    catalogue::{
        Catalogue, CellId, LimiterNumber, PolicyName,
        registry::{Configured, DIRECTORY, Edit, Known, Limiters, Misfit, Registry, Source},
    },
    clock::{Clock, ServerClock},
    config::{self, Durability, Namespaces, envoy::Ruleset},
    entropy::Entropy,
    limits,
};

/// What a start begins with.
pub struct Start<'a> {
    /// Opens the journal.
    pub journal: OpenJournal,
    /// Go on although the journal has lost some of what was written.
    pub accept_loss: bool,
    /// What is limited.
    pub namespaces: &'a Namespaces,
    /// What Envoy is limited by, if it is.
    pub rules: Option<&'a Ruleset>,
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
    /// The circuits.
    pub circuits: Arc<Circuits>,
    /// Grants that the last life left open.
    pub grants: Vec<OpenGrant>,
    /// What operators wrote and did.
    pub operations: Operations,
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

/// What operators wrote and did.
pub struct Operations {
    /// The policies as they are written.
    pub registry: Registry,
    /// The audit trail.
    pub events: Events,
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
    /// Two policies of one name.
    #[error(
        "`namespaces.{namespace}.policies.{policy}` of the configuration and the policy \
         `{namespace}/{policy}` of the data directory, made by PutPolicy as version {version}, have one name: \
         remove the first from the configuration; or start without it, end the second with DeletePolicy, and \
         put the first back"
    )]
    MadeToo {
        /// Their namespace.
        namespace: Arc<str>,
        /// Their name.
        policy: Arc<str>,
        /// The version of the one in the data directory.
        version: u64,
    },
    /// More than a server holds.
    #[error(
        "{count} policies, with those of the data directory that PutPolicy made, and a server holds at most \
         {}; remove some from the configuration",
        limits::POLICIES
    )]
    TooManyPolicies {
        /// How many.
        count: usize,
    },
}

impl From<Misfit> for RecoveryError {
    fn from(misfit: Misfit) -> Self {
        match misfit {
            Misfit::MadeToo { name, version } => {
                Self::MadeToo { namespace: name.namespace, policy: name.policy, version }
            }
            Misfit::TooMany { count } => Self::TooManyPolicies { count },
        }
    }
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
    let Start { journal, accept_loss, namespaces, rules, durability, clock, entropy } = start;
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
    let boot = wall_seconds.max(last_boot.saturating_add(1));
    directory.boot = boot;

    let now = clock.now();
    let keeps = journal.keeps();
    let limiters = stored_limiters(&*journal, clean, now)?;
    let policies = stored_policies(&*journal)?;
    let events = Events::new(limits::EVENTS, boot);
    let mut forgotten = events.restore(stored_events(&*journal)?);
    let is_first = last.is_none();
    let mut registry = Registry::new(directory, secret, limiters, durability, keeps);
    let own = rules.map(Ruleset::policies).unwrap_or_default();
    let (mut writes, edits) = registry.open(namespaces, &own, policies, now)?;
    let (of_rules, others): (Vec<_>, Vec<_>) =
        edits.into_iter().partition(|edit| edit.source == Source::Envoy);
    let of_rules = events::Change::of_rules(&of_rules);
    // At a first start everything is new, which says nothing.
    for change in others.into_iter().map(edit_event).chain(of_rules).filter(|_| !is_first) {
        let at = Duration::from_nanos(now.wall.as_nanos());
        let Appended { event, evicted } = events.append(at, change);
        writes.push(events::write(&event));
        forgotten.extend(evicted);
    }
    writes.extend(forgotten.into_iter().map(events::deletion));
    // What the last life wrote at its end is exact once.
    writes.push(Write::delete(Keyspace::Meta, CLEAN_STOP));
    let mut journal = Numbered::new(journal, clock.clone(), found.max(witnessed), latest);
    journal.commit(Batch { writes })?;
    journal.sync_witnessed()?;

    let were_fast = registry.were_fast();
    let catalogue = registry.catalogue(rules);
    let (cells, woken) = Embedded::new(limits::CELLS);
    cells.begin_at(latest);
    let mut revival = Revival {
        catalogue: &catalogue,
        cells: &cells,
        now: clock.now(),
        exact_of,
        were_fast,
        watching: registry.watching(),
        in_use: HashSet::new(),
        gone: Vec::new(),
    };
    let grants = revival.revive(journal.store())?;
    let seed = u128::from_be_bytes(entropy.bytes16());
    #[allow(clippy::cast_possible_truncation)] // half of it is enough
    let circuits = Circuits::new(boot, cells.waker(), seed as u64);
    revival.revive_circuits(journal.store(), &circuits)?;
    let Revival { in_use, gone, .. } = revival;
    let now = clock.now();
    let is_done = |number: &LimiterNumber| {
        let limiter = catalogue.numbered(*number);
        let full_at = limiter.and_then(|limiter| limiter.settings.absent_full_at(now));
        full_at.is_none_or(|full_at| full_at <= now.time) && !in_use.contains(number)
    };
    let retired = registry.retired().filter(|(_, number)| is_done(number));
    let retired: Vec<_> = retired.map(|(id, _)| id.clone()).collect();
    registry.forget(&retired);
    let retired = retired.iter().map(|id| Write::delete(Keyspace::Policies, id.to_key()));
    let deleted = gone.into_iter().chain(retired);
    // One whose cells are written from now on was still to be recovered as if they were not: records of an
    // older time, before they were not written for a while, would have been believed. They are gone.
    let turned = registry.written_down(&registry.turning_slow());
    journal.commit_all(deleted.chain(turned))?;
    journal.sync_witnessed()?;

    let cells = Arc::new(cells);
    let circuits = Arc::new(circuits);
    let follows = (Arc::clone(&cells), Arc::clone(&circuits));
    let writer = Writer::new(follows, journal, woken, boot);
    let operations = Operations { registry, events };
    Ok(Recovered {
        catalogue,
        cells,
        circuits,
        grants,
        operations,
        writer,
        clock,
        boot,
        secret,
        clean,
    })
}

/// The limiters as the last life had them.
fn stored_limiters(
    journal: &dyn Journal,
    clean: bool,
    now: Moment,
) -> Result<Limiters, JournalError> {
    let mut stored = Limiters::new();
    journal.scan(Keyspace::Policies, &mut |key, value| {
        let record = LimiterRecord::decode(value).ok();
        let known = record.and_then(|record| Known::of(record, clean, now));
        let (id, known) = known.ok_or_else(|| broken("policy", key))?;
        stored.insert(id, known);
        Ok(())
    })?;
    Ok(stored)
}

/// The policies as operators had written them.
fn stored_policies(
    journal: &dyn Journal,
) -> Result<BTreeMap<PolicyName, Configured>, JournalError> {
    let mut stored = BTreeMap::new();
    journal.scan(Keyspace::Made, &mut |key, value| {
        let record = PolicyRecord::decode(value).ok();
        let policy = record.as_ref().and_then(Configured::of);
        let (name, configured) = policy.ok_or_else(|| broken("policy", key))?;
        stored.insert(name, configured);
        Ok(())
    })?;
    Ok(stored)
}

/// The audit trail so far.
fn stored_events(journal: &dyn Journal) -> Result<Vec<Event>, JournalError> {
    let mut stored = Vec::new();
    journal.scan(Keyspace::Events, &mut |key, value| {
        let record = EventRecord::decode(value).ok().zip(event_of_key(key));
        let event = record.and_then(|(record, number)| record.event(number));
        stored.push(event.ok_or_else(|| broken("event", key))?);
        Ok(())
    })?;
    Ok(stored)
}

/// What the configuration file says differently now.
fn edit_event(Edit { name, before, after, .. }: Edit) -> events::Change {
    let action = match (&before, &after) {
        (None, _) => Action::PolicyCreated,
        (_, None) => Action::PolicyDeleted,
        (Some(_), Some(_)) => Action::PolicyChanged,
    };
    let text = |settings: Option<Arc<config::Policy>>| {
        settings.map(|settings| settings.to_string()).unwrap_or_default()
    };
    events::Change {
        actor: events::FILE.to_owned(),
        action,
        namespace: name.namespace.to_string(),
        policy: name.policy.to_string(),
        key: String::new(),
        reason: String::new(),
        before: text(before),
        after: text(after),
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
    watching: HashSet<LimiterNumber>,
    /// Limiters that have records.
    in_use: HashSet<LimiterNumber>,
    /// Records that no longer say anything.
    gone: Vec<Write>,
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
            self.gone.push(Write::delete(Keyspace::Grants, key));
            Ok(())
        })?;
        journal.scan(Keyspace::Cells, &mut |key, value| {
            let record = CellRecord::decode(value).ok();
            let revived = record.zip(CellId::from_bytes(key)).and_then(|(record, id)| {
                let exact = self.exact_of.is_some_and(|boot| record.exact_of == boot);
                let out = out.get(&id).copied().unwrap_or(0);
                self.cell(id, &record.kept()?, exact, out)
            });
            revived.ok_or_else(|| broken("cell", key))
        })?;
        Ok(grants)
    }

    /// Every circuit of a breaker that is there.
    fn revive_circuits(
        &mut self,
        journal: &dyn Journal,
        circuits: &Circuits,
    ) -> Result<(), JournalError> {
        journal.scan(Keyspace::Circuits, &mut |key, value| {
            let record = CircuitRecord::decode(value).ok();
            let kept = record.as_ref().and_then(|record| Some((record, record.kept()?)));
            let (record, kept) = kept.ok_or_else(|| broken("circuit", key))?;
            let name = PolicyName::new(&record.namespace, &record.policy);
            let policy = self.catalogue.policy(&name);
            match policy.and_then(|policy| policy.place(&record.key)) {
                Some(place) => circuits.restore(&place, kept, self.now.time),
                None => self.gone.push(Write::delete(Keyspace::Circuits, key)),
            }
            Ok(())
        })
    }

    /// One cell; `None` if it is of no limiter.
    fn cell(&mut self, id: CellId, kept: &Kept, exact: bool, out: u64) -> Option<()> {
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
        // What was written of one before it watched stays until it watches no more.
        let watches = self.watching.contains(&kept.number);
        let on_disk = limiter.keeping != Keeping::AtStop || watches;
        if stale || leaves || !on_disk {
            self.gone.push(Write::delete(Keyspace::Cells, id.to_bytes()));
        }
        if !stale && !leaves {
            // Converted for good: at the next start the change that it slept through may be forgotten. And
            // permits without a name are counted apart from here on.
            let rewrite =
                on_disk && kept.cell != revived && kept.cell.revision != settings.revision;
            let rewrite = rewrite || on_disk && limiter.is_concurrency();
            let kept = Kept { cell: revived, ..*kept };
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
