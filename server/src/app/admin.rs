//! What operators can do: policies, and a look at everything else.

mod circuits;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use arrayvec::ArrayVec;
use fusebox_core::{Cell, Kind, Moment, Time, circuit::Generation};
use parking_lot::{Mutex, RwLock};
use thiserror::Error;

pub use self::circuits::{
    CircuitFilter, CircuitInspected, CircuitTold, ModeSet, ReporterSeen, SetMode,
};
use super::{
    App, Principal,
    clients::Clients,
    events::{self, Action, Appended, Event, Events, Filter},
    grants::Grant,
    top_keys::Ranking,
};
use crate::{
    app::GrantName,
    catalogue::{
        Catalogue, CellId, Policy, PolicyName,
        registry::{self, Configured, Registry, Source},
    },
    config::{
        self, Difference, Durability, difference,
        envoy::{Ruleset, has_no_hits},
    },
    limits,
    storage::{Answer, Holds, Judge, Operations, StorageError, journal::Write},
};

/// What operators change, and what only they look at.
pub(super) struct Desk {
    registry: RwLock<Registry>,
    /// Held while a change is on its way: one at a time.
    changing: tokio::sync::Mutex<()>,
    events: Events,
    pub(super) clients: Clients,
    boot: u64,
    started: Time,
    /// When the counts of top keys were last halved.
    halved: Mutex<Time>,
    /// Where housekeeping is with the keys of policies.
    pruned: AtomicUsize,
}

/// All settings that a policy is to have.
#[derive(Clone, Debug)]
pub struct PutPolicy {
    /// The policy.
    pub name: PolicyName,
    /// Its settings.
    pub settings: config::Policy,
    /// The version that is to be replaced, 0 for none; any if `None`.
    pub expected: Option<u64>,
    /// Change nothing.
    pub dry_run: bool,
    /// Why.
    pub reason: String,
}

/// A policy that is to end.
#[derive(Clone, Debug)]
pub struct DeletePolicy {
    /// The policy.
    pub name: PolicyName,
    /// The version that is to end; any if `None`.
    pub expected: Option<u64>,
    /// Change nothing.
    pub dry_run: bool,
    /// Why.
    pub reason: String,
}

/// A policy that was put.
#[derive(Debug)]
pub struct PolicyPut {
    /// The policy as it is, or would be.
    pub configured: Configured,
    /// What is different.
    pub differences: Vec<Difference>,
    /// Cells that go on under the new settings.
    pub live_cells: usize,
}

/// A policy that has ended.
#[derive(Debug)]
pub struct PolicyDeleted {
    /// The policy as it was.
    pub configured: Configured,
    /// Cells of it that are remembered.
    pub live_cells: usize,
    /// Grants of it that are open.
    pub open_grants: usize,
}

/// What one key of a policy has left.
#[derive(Clone, Debug, Default)]
pub struct Bucket {
    /// The key.
    pub key: String,
    /// By limit.
    pub limits: Vec<BucketLimit>,
    /// Permits that are held.
    pub permits_held: u64,
    /// It is the one that keys past the policy's budget share.
    pub overflow: bool,
    /// Callers that stand in line.
    pub waiting: usize,
    /// It is remembered.
    pub live: bool,
}

/// What is left of one limit.
#[derive(Clone, Copy, Debug)]
pub struct BucketLimit {
    /// Most that could be granted at once.
    pub limit: u64,
    /// Left now.
    pub remaining: u64,
    /// Time until it is full; `None` if time alone does not do that.
    pub reset_after: Option<Duration>,
    /// Spent, and not refilled yet.
    pub spent: u64,
    /// Of that, what may come back.
    pub out: u64,
}

/// Some buckets of a policy.
#[derive(Debug)]
pub struct Buckets {
    /// By key.
    pub buckets: Vec<Bucket>,
    /// The key after which the next page begins.
    pub next: Option<String>,
    /// Buckets that are remembered, but not their keys.
    pub unnamed: usize,
}

/// A client, and what it holds.
#[derive(Debug, Default)]
pub struct ClientStatus {
    /// The service that it is one of.
    pub service: String,
    /// Where it runs.
    pub zone: String,
    /// Time since it called.
    pub last_seen: Option<Duration>,
    /// Grants that are open.
    pub open_grants: usize,
    /// Permits.
    pub permits: u64,
    /// Tokens leased.
    pub leased: u64,
    /// The grants, where they were asked for.
    pub grants: Vec<Holding>,
}

/// What one grant holds.
#[derive(Clone, Debug)]
pub struct Holding {
    /// The grant.
    pub name: GrantName,
    /// The policy; of several the first.
    pub policy: PolicyName,
    /// Permits.
    pub permits: u64,
    /// Tokens leased.
    pub leased: u64,
    /// Tokens charged as an estimate, and not known to be spent.
    pub estimated: u64,
    /// How long it lives.
    pub expires_in: Duration,
}

/// Which clients are wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClientFilter<'a> {
    /// Only what concerns this namespace.
    pub namespace: Option<&'a str>,
    /// Only this one, and its grants one by one.
    pub id: Option<&'a str>,
    /// Only those after this one.
    pub after: Option<&'a str>,
}

/// What the server is, and how much it holds.
#[derive(Debug)]
pub struct Info {
    /// Number of this start.
    pub boot: u64,
    /// Time since then.
    pub uptime: Duration,
    /// Whether it keeps anything on disk.
    pub keeps: bool,
    /// What a crash may forget where a policy does not say.
    pub durability: Durability,
    /// Buckets that are remembered.
    pub live_cells: usize,
    /// Policies that can be asked, without those that are rules.
    pub policies: usize,
    /// Rules of Envoy's rate limit service.
    pub rules: usize,
    /// Grants that are open.
    pub open_grants: usize,
    /// Callers that stand in line.
    pub waiting: usize,
    /// Circuits that are remembered.
    pub circuits: usize,
    /// Streams that watch circuits.
    pub watchers: usize,
    /// Sessions.
    pub sessions: usize,
    /// Names the state.
    pub truth_id: String,
}

/// Why something was not done or told. Nothing was changed, unless the storage failed.
#[derive(Debug, Error)]
pub enum AdminError {
    /// No such namespace.
    #[error("unknown namespace `{0}`")]
    UnknownNamespace(String),
    /// No such policy.
    #[error("unknown policy `{0}`")]
    UnknownPolicy(PolicyName),
    /// No such grant is open.
    #[error("no grant `{0}` is open")]
    UnknownGrant(String),
    /// Another place to change it.
    #[error(
        "policy `{0}` is managed by the configuration file: change it there, as \
         `namespaces.{namespace}.policies.{policy}`, and restart",
        namespace = .0.namespace, policy = .0.policy
    )]
    ManagedByFile(PolicyName),
    /// As above.
    #[error(
        "policy `{0}` is a rule of Envoy's rate limit service: change it in its file, in the folder \
         `envoy_ratelimit.config_dir`; it takes effect at once"
    )]
    ManagedByRules(PolicyName),
    /// A rule would be without a judge, and what passes a proxy unlimited.
    #[error(
        "policy `{policy}` judges the rule `{rule}` of Envoy's rate limit service, which would be an error then: \
         take it out of `envoy_ratelimit.domains` first; {}",
        config::envoy::ONLY_RATES
    )]
    Judges {
        /// The policy.
        policy: PolicyName,
        /// The rule.
        rule: String,
    },
    /// It has no buckets.
    #[error("policy `{0}` is a breaker: its circuits are told by InspectCircuit")]
    IsBreaker(PolicyName),
    /// It has no circuits.
    #[error("policy `{0}` is a limiter: its buckets are told by InspectBucket")]
    IsLimiter(PolicyName),
    /// The circuit has gone on.
    #[error(
        "the circuit has generation {}, not {}: look at it again, decide again", .found.0, .expected.0
    )]
    Moved {
        /// The generation that was to be there.
        expected: Generation,
        /// The generation that is there.
        found: Generation,
    },
    /// No room for another circuit.
    #[error(
        "policy `{0}` has as many circuits as it may, or the server has: raise its `max_cells`, or wait until some \
         are forgotten"
    )]
    TooManyCircuits(PolicyName),
    /// Somebody was faster.
    #[error(
        "policy `{name}` has version {found}, not {expected} (0 is none): read it again, decide again"
    )]
    Conflict {
        /// The policy.
        name: PolicyName,
        /// The version that was to be there.
        expected: u64,
        /// The version that is there.
        found: u64,
    },
    /// As many policies as there may be.
    #[error("the server holds {} policies, as many as it may", limits::POLICIES)]
    TooManyPolicies,
    /// As many limiters as there may be.
    #[error(
        "the server knows {} limits, with those that no policy has any more, as many as it may; \
         a restart forgets those that nothing is counted by",
        limits::LIMITERS
    )]
    TooManyLimiters,
    /// The storage cannot.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl Desk {
    pub(super) fn new(operations: Operations, boot: u64, now: Time) -> Self {
        let Operations { registry, events } = operations;
        Self {
            registry: RwLock::new(registry),
            changing: tokio::sync::Mutex::default(),
            events,
            clients: Clients::new(),
            boot,
            started: now,
            halved: Mutex::new(now),
            pruned: AtomicUsize::new(0),
        }
    }
}

impl App {
    /// Creates a policy, or replaces all settings of one. It is in force, and on disk, when this returns.
    ///
    /// # Errors
    /// If it may not be changed here, is not of the expected version, or cannot be written.
    pub async fn put_policy(
        &self,
        principal: Principal,
        put: PutPolicy,
    ) -> Result<PolicyPut, AdminError> {
        let PutPolicy { name, settings, expected, dry_run, reason } = put;
        let _alone = self.desk.changing.lock().await;
        let now = self.clock.now();
        let (before, change) = {
            let registry = self.desk.registry.read();
            let before = registry.policy(&name).cloned();
            may_change(&name, before.as_ref(), expected)?;
            may_judge(&self.catalogue.load(), &name, Some(&settings))?;
            if before.is_none() && registry.count() >= limits::POLICIES {
                return Err(AdminError::TooManyPolicies);
            }
            let change = registry.put(&self.catalogue.load(), &name, settings, now);
            if registry.limiters_after(&change) > limits::LIMITERS {
                return Err(AdminError::TooManyLimiters);
            }
            (before, change)
        };
        // None of a limiter's goes on under a breaker.
        let after = change.catalogue.policy(&name).filter(|policy| policy.breakers.is_none());
        let live_cells = after.map_or(0, |policy| policy.budget.live());
        let former = before.as_ref().map(|before| &*before.settings);
        let after = change.after.first().and_then(|(_, after)| after.clone());
        let differences = difference(former, after.as_ref().map(|after| &*after.settings));
        // All that a change of a change without effect would do is to count it.
        let same = before.as_ref().filter(|_| differences.is_empty()).cloned();
        let configured = match (same, after) {
            (Some(same), _) => return Ok(PolicyPut { configured: same, differences, live_cells }),
            (None, Some(after)) => after,
            (None, None) => return Err(AdminError::UnknownPolicy(name)),
        };
        if dry_run {
            // With what it has now of what the change itself would give it.
            let configured = match before {
                Some(before) => Configured { settings: configured.settings, ..before },
                None => configured,
            };
            return Ok(PolicyPut { configured, differences, live_cells });
        }
        let action = if before.is_none() { Action::PolicyCreated } else { Action::PolicyChanged };
        let event = events::Change {
            before: former.map(config::Policy::to_string).unwrap_or_default(),
            after: configured.settings.to_string(),
            ..about(principal, action, &name, reason)
        };
        self.make(change, Some(event), now).await?;
        Ok(PolicyPut { configured, differences, live_cells })
    }

    /// Ends a policy. Nobody can ask for it, also after a restart, when this returns.
    ///
    /// # Errors
    /// If there is none, it may not be changed here, is not of the expected version, or that cannot be
    /// written.
    pub async fn delete_policy(
        &self,
        principal: Principal,
        delete: DeletePolicy,
    ) -> Result<PolicyDeleted, AdminError> {
        let DeletePolicy { name, expected, dry_run, reason } = delete;
        let _alone = self.desk.changing.lock().await;
        let policy = Arc::clone(self.asked(&self.catalogue.load(), &name)?);
        let (before, change) = {
            let registry = self.desk.registry.read();
            let before = registry.policy(&name).cloned();
            may_change(&name, before.as_ref(), expected)?;
            may_judge(&self.catalogue.load(), &name, None)?;
            (before, registry.delete(&self.catalogue.load(), &name))
        };
        let Some(configured) = before else { return Err(AdminError::UnknownPolicy(name)) };
        let mut open_grants = 0;
        self.grants.visit(|_, grant| {
            open_grants += usize::from(grant.parts.iter().any(|part| part.limiter.name == name));
        });
        let live_cells = policy.budget.live();
        if !dry_run {
            let event = events::Change {
                before: configured.settings.to_string(),
                ..about(principal, Action::PolicyDeleted, &name, reason)
            };
            self.make(change, Some(event), self.clock.now()).await?;
        }
        Ok(PolicyDeleted { configured, live_cells, open_grants })
    }

    /// These rules of Envoy's rate limit service, and no others; how many are different. They are in force, and on
    /// disk, when this returns.
    ///
    /// # Errors
    /// If there are too many limiters, or they cannot be written.
    pub async fn reload_rules(&self, rules: &Ruleset) -> Result<usize, AdminError> {
        let _alone = self.desk.changing.lock().await;
        let now = self.clock.now();
        let (change, edits) = {
            let registry = self.desk.registry.read();
            let (change, edits) = registry.reload(&self.catalogue.load(), rules, now);
            if registry.limiters_after(&change) > limits::LIMITERS {
                return Err(AdminError::TooManyLimiters);
            }
            (change, edits)
        };
        self.make(change, events::Change::of_rules(&edits), now).await?;
        Ok(edits.len())
    }

    /// A policy as it is configured.
    ///
    /// # Errors
    /// If there is none.
    pub fn policy(&self, name: &PolicyName) -> Result<Configured, AdminError> {
        let registry = self.desk.registry.read();
        match registry.policy(name) {
            Some(configured) => Ok(configured.clone()),
            None => Err(self.unknown(&self.catalogue.load(), name)),
        }
    }

    /// Some policies, by namespace and name, of one namespace if one is given; only those after `after`.
    ///
    /// # Errors
    /// If there is no such namespace.
    pub fn policies(
        &self,
        namespace: Option<&str>,
        after: Option<&PolicyName>,
        count: usize,
    ) -> Result<Vec<(PolicyName, Configured)>, AdminError> {
        if let Some(name) = namespace {
            self.known_namespace(name)?;
        }
        let registry = self.desk.registry.read();
        let wanted = |name: &PolicyName| namespace.is_none_or(|wanted| *name.namespace == *wanted);
        let policies = registry.policies(after).filter(|(name, _)| wanted(name));
        Ok(policies.take(count).map(|(name, one)| (name.clone(), one.clone())).collect())
    }

    /// What is left in one bucket, without charging it.
    ///
    /// # Errors
    /// If there is no such policy, or it has no buckets.
    pub fn inspect(&self, name: &PolicyName, key: &str) -> Result<Bucket, AdminError> {
        let catalogue = self.catalogue.load();
        let policy = self.limiting(&catalogue, name)?;
        Ok(self.bucket(&catalogue, policy, key, self.clock.now()).1)
    }

    /// What is left in the buckets of a policy whose keys begin with `prefix`; only of those after `after`.
    ///
    /// # Errors
    /// If there is no such policy, or it has no buckets.
    pub fn buckets(
        &self,
        name: &PolicyName,
        prefix: &str,
        after: Option<&str>,
        count: usize,
    ) -> Result<Buckets, AdminError> {
        let catalogue = self.catalogue.load();
        let policy = self.limiting(&catalogue, name)?;
        let now = self.clock.now();
        let keys = policy.names.page(prefix, after, count);
        let next = keys.last().filter(|_| keys.len() == count).map(ToString::to_string);
        let buckets = keys.iter().map(|key| self.bucket(&catalogue, policy, key, now).1);
        let buckets = buckets.filter(|bucket| bucket.live && !bucket.overflow).collect();
        // A key has as many cells as limits.
        let own = policy.budget.live().saturating_sub(policy.budget.overflow_cells());
        let remembered = own.div_ceil(policy.rules.limiters.len().max(1));
        let unnamed = remembered.saturating_sub(policy.names.len());
        Ok(Buckets { buckets, next, unnamed })
    }

    /// The keys of a policy that are asked for most. Those of a breaker are not counted.
    ///
    /// # Errors
    /// If there is no such policy, or it is a breaker.
    pub fn top_keys(&self, name: &PolicyName, count: usize) -> Result<Ranking, AdminError> {
        Ok(self.limiting(&self.catalogue.load(), name)?.top_keys.top(count))
    }

    /// Forgets what one bucket has spent, but for what open grants hold; the bucket before and after.
    ///
    /// # Errors
    /// If there is no such policy, it has no buckets, or that cannot be written.
    pub async fn reset(
        &self,
        principal: Principal,
        name: &PolicyName,
        key: &str,
        reason: String,
    ) -> Result<(Bucket, Bucket), AdminError> {
        let _alone = self.desk.changing.lock().await;
        let now = self.clock.now();
        let catalogue = self.catalogue.load_full();
        let policy = self.limiting(&catalogue, name)?;
        let (cell, before) = self.bucket(&catalogue, policy, key, now);
        let mut answers = Vec::with_capacity(2 * limits::LIMITS);
        for (index, limiter) in policy.rules_of(key).limiters.iter().enumerate() {
            let judge = Judge { limiter, catalogue: &catalogue };
            let cell = cell.of_limit(index);
            let open = self.grants.held_of(cell, limiter);
            let held = |slice| open.get(&slice).copied().unwrap_or(0);
            let mut reset = |cell| Some(limiter.settings.reset(cell, held, now));
            answers.push(self.storage.change(cell, judge, &mut reset, now)?.map(drop));
            answers.push(self.storage.write_out(cell)?);
        }
        self.lines.wake(policy.cells.cell(key));
        let (_, after) = self.bucket(&catalogue, policy, key, now);
        let event = events::Change {
            key: key.to_owned(),
            before: before.spent(),
            after: after.spent(),
            ..about(principal, Action::BucketReset, name, reason)
        };
        let noted = self.note(Vec::new(), event, now)?;
        for answer in answers {
            answer.told().await?;
        }
        noted.told().await?;
        Ok((before, after))
    }

    /// Ends an open grant as if it had expired; what it held.
    ///
    /// # Errors
    /// If it is not open, or that cannot be written.
    pub async fn release_grant(
        &self,
        principal: Principal,
        name: GrantName,
        reason: String,
    ) -> Result<Holding, AdminError> {
        let _alone = self.desk.changing.lock().await;
        let now = self.clock.now();
        let unknown = || AdminError::UnknownGrant(name.to_string());
        let grant = self.grants.look(name.id).ok_or_else(unknown)?;
        let held = self.holding(name, &grant, now.time);
        let dues = self.grants.force_release(name.id).ok_or_else(unknown)?;
        let mut answers = Vec::with_capacity(dues.len());
        for due in dues {
            answers.push(self.settle(&due, now)?);
        }
        let event = events::Change {
            before: held.to_string(),
            ..about(principal, Action::GrantReleased, &held.policy, reason)
        };
        answers.push(self.note(Vec::new(), event, now)?);
        for answer in answers {
            answer.told().await?;
        }
        Ok(held)
    }

    /// Who called lately or holds something, by id.
    ///
    /// # Errors
    /// If there is no such namespace.
    pub fn clients(
        &self,
        filter: ClientFilter<'_>,
        count: usize,
    ) -> Result<BTreeMap<Box<str>, ClientStatus>, AdminError> {
        let ClientFilter { namespace, id, after } = filter;
        if let Some(name) = namespace {
            self.known_namespace(name)?;
        }
        let now = self.clock.time();
        let wanted = |other: &str| {
            id.is_none_or(|id| id == other) && after.is_none_or(|after| after < other)
        };
        let mut clients = BTreeMap::<Box<str>, ClientStatus>::new();
        // The last one leaves for good: what is left comes before it.
        let keep_first = |clients: &mut BTreeMap<_, _>| {
            if clients.len() > count {
                clients.pop_last();
            }
        };
        self.desk.clients.visit(namespace, |seen| {
            if wanted(&seen.id) {
                let status = clients.entry(seen.id.clone()).or_default();
                let ago = Duration::from_nanos(now.nanos_since(seen.last));
                if status.last_seen.is_none_or(|before| ago <= before) {
                    status.last_seen = Some(ago);
                    status.service = seen.service.to_string();
                    status.zone = seen.zone.to_string();
                }
                keep_first(&mut clients);
            }
        });
        self.grants.visit(|grant_id, grant| {
            let here = namespace.is_none_or(|wanted| *grant.owner.namespace == *wanted);
            if here && wanted(&grant.client) && grant.ends_at() > now {
                let status = clients.entry(grant.client.as_ref().into()).or_default();
                status.open_grants += 1;
                status.permits += grant.held(Holds::Permit);
                status.leased += grant.held(Holds::Lease);
                if id.is_some() {
                    let name = self.grants.name(grant_id, grant);
                    status.grants.push(self.holding(name, grant, now));
                }
                keep_first(&mut clients);
            }
        });
        for status in clients.values_mut() {
            status.grants.sort_by_key(|held| (held.expires_in, held.name.id));
            status.grants.truncate(limits::GRANTS_TOLD);
        }
        Ok(clients)
    }

    /// The latest events, newest first; only those with a number below `before`, if one is given.
    pub fn events(&self, before: Option<u64>, count: usize, filter: Filter<'_>) -> Vec<Arc<Event>> {
        self.desk.events.list(before, count, filter)
    }

    /// Events that are remembered.
    pub fn event_count(&self) -> usize {
        self.desk.events.len()
    }

    /// Names the state that it decides by, and the number of the start.
    pub(super) fn truth(&self) -> (String, u64) {
        (self.desk.registry.read().truth_id(), self.desk.boot)
    }

    /// What a crash may forget, where a policy does not say.
    pub(super) fn durability(&self) -> Durability {
        self.desk.registry.read().durability()
    }

    /// What the server is, and how much it holds.
    pub fn info(&self) -> Info {
        let registry = self.desk.registry.read();
        Info {
            boot: self.desk.boot,
            uptime: Duration::from_nanos(self.clock.time().nanos_since(self.desk.started)),
            keeps: registry.keeps(),
            durability: registry.durability(),
            live_cells: self.live_cells(),
            policies: registry.count(),
            rules: registry.rule_count(),
            open_grants: self.grants.open(),
            waiting: self.lines.standing(),
            circuits: self.circuits.live(),
            watchers: self.watchers(),
            sessions: self.sessions(),
            truth_id: registry.truth_id(),
        }
    }

    /// One bounded round of housekeeping of what operators look at.
    pub(super) fn tend_desk(&self, now: Moment) {
        self.desk.clients.tend(now.time);
        let catalogue = self.catalogue.load();
        let halves = {
            let mut halved = self.desk.halved.lock();
            let halves = halved.after(limits::TOP_KEYS_HALVED) <= now.time;
            if halves {
                *halved = now.time;
            }
            halves
        };
        if halves {
            catalogue.policies().for_each(|policy| policy.top_keys.halve());
        }
        self.prune_names(&catalogue, now);
    }

    /// Forgets some keys of cells that are gone.
    fn prune_names(&self, catalogue: &Catalogue, now: Moment) {
        let slices = limits::NAMES_PRUNED_PER_ROUND / limits::NAMES_PRUNED_AT_ONCE;
        let named = catalogue.policies().filter(|policy| !policy.names.is_empty());
        let named: Vec<_> = named.collect();
        if named.is_empty() {
            return;
        }
        for _ in 0..slices {
            let at = self.desk.pruned.fetch_add(1, Ordering::Relaxed);
            let policy = named[at / limits::NAME_SHARDS % named.len()];
            let Some(limiter) = policy.rules.limiters.first() else { continue };
            let judge = Judge { limiter, catalogue };
            policy.names.prune(at % limits::NAME_SHARDS, |first| {
                // Of several limits on a key the first may be full long before the others.
                let mut cells = (0..limits::LIMITS).map(|index| first.of_limit(index));
                cells.all(|cell| self.storage.look(cell, judge, now).is_none())
            });
        }
    }

    /// Has a change written, makes it, and has all written that it needs from then on.
    async fn make(
        &self,
        mut change: registry::Change,
        event: Option<events::Change>,
        now: Moment,
    ) -> Result<(), StorageError> {
        let slowed = std::mem::take(&mut change.slowed);
        let writes = std::mem::take(&mut change.writes);
        let noted = match event {
            Some(event) => self.note(writes, event, now)?,
            None => self.storage.note(writes)?,
        };
        noted.told().await?;
        let catalogue = self.desk.registry.write().make(change);
        let former = self.catalogue.swap(Arc::new(catalogue));
        self.lines.wake_all();
        if slowed.is_empty() {
            return Ok(());
        }
        if !is_let_go(&former).await {
            // Until the next start a crash makes these cells empty, which is safe.
            tracing::warn!(
                "policies from before a change are still in use; some cells stay unwritten"
            );
            return Ok(());
        }
        // Until all that was spent is on disk, a crash makes these cells empty.
        for part in 0..limits::CELL_SHARDS {
            self.storage.write_down(part, &slowed)?.told().await?;
        }
        let writes = self.desk.registry.write().written_down(&slowed);
        self.storage.note(writes)?.told().await
    }

    /// Remembers an event, and has it written with other records.
    fn note(
        &self,
        mut writes: Vec<Write>,
        change: events::Change,
        now: Moment,
    ) -> Result<Answer<()>, StorageError> {
        let at = Duration::from_nanos(now.wall.as_nanos());
        let Appended { event, evicted } = self.desk.events.append(at, change);
        tracing::info!(
            actor = event.change.actor,
            action = ?event.change.action,
            namespace = event.change.namespace,
            policy = event.change.policy,
            reason = event.change.reason,
            "changed by an operator"
        );
        writes.push(events::write(&event));
        writes.extend(evicted.map(events::deletion));
        self.storage.note(writes)
    }

    fn known_namespace(&self, name: &str) -> Result<(), AdminError> {
        let found = self.catalogue.load().namespace(name).map(|_| ());
        found.ok_or_else(|| AdminError::UnknownNamespace(name.to_owned()))
    }

    fn asked<'a>(
        &self,
        catalogue: &'a Catalogue,
        name: &PolicyName,
    ) -> Result<&'a Arc<Policy>, AdminError> {
        catalogue.policy(name).ok_or_else(|| self.unknown(catalogue, name))
    }

    /// As above, and it has buckets.
    fn limiting<'a>(
        &self,
        catalogue: &'a Catalogue,
        name: &PolicyName,
    ) -> Result<&'a Arc<Policy>, AdminError> {
        let policy = self.asked(catalogue, name)?;
        match policy.breakers {
            None => Ok(policy),
            Some(_) => Err(AdminError::IsBreaker(name.clone())),
        }
    }

    fn unknown(&self, catalogue: &Catalogue, name: &PolicyName) -> AdminError {
        match catalogue.namespace(&name.namespace) {
            Some(_) => AdminError::UnknownPolicy(name.clone()),
            None => AdminError::UnknownNamespace(name.namespace.to_string()),
        }
    }

    /// The bucket of a key, and its first cell.
    fn bucket(
        &self,
        catalogue: &Catalogue,
        policy: &Policy,
        key: &str,
        now: Moment,
    ) -> (CellId, Bucket) {
        let rules = policy.rules_of(key);
        let look = |first: CellId| {
            let cells = rules.limiters.iter().enumerate().map(|(index, limiter)| {
                self.storage.look(first.of_limit(index), Judge { limiter, catalogue }, now)
            });
            cells.collect::<ArrayVec<Option<Cell>, { limits::LIMITS }>>()
        };
        let lives = |cells: &[Option<Cell>]| cells.iter().any(Option::is_some);
        let mut first = policy.cells.cell(key);
        let mut cells = look(first);
        let mut overflow = false;
        if let Some(shared) = rules.overflow
            && !lives(&cells)
            && policy.budget.overflows()
        {
            let crowd = look(shared);
            if policy.budget.is_full() || lives(&crowd) {
                (first, cells, overflow) = (shared, crowd, true);
            }
        }
        // The line is the key's own, also where the cell is not.
        let waiting = self.lines.standing_at(policy.cells.cell(key));
        let mut bucket = Bucket { key: key.to_owned(), overflow, waiting, ..Bucket::default() };
        for (limiter, cell) in rules.limiters.iter().zip(&cells) {
            let (settings, limit) = (&limiter.settings, &limiter.settings.limit);
            let state = settings.state(*cell);
            let window = limiter.window(now);
            let peek = fusebox_core::Ask { window, ..fusebox_core::Ask::spend(0) };
            let plan = limit.plan(state, peek, now);
            let spent = state.map_or(0, |state| limit.spent(state, now));
            let fills = state.is_none_or(|state| limit.full_at(state, now).is_some());
            bucket.limits.push(BucketLimit {
                limit: plan.limit,
                remaining: plan.before.remaining,
                reset_after: fills.then_some(plan.before.reset_after),
                spent,
                out: state.map_or(0, |state| state.out()),
            });
            bucket.permits_held += if limiter.is_concurrency() { spent } else { 0 };
            bucket.live |= cell.is_some();
        }
        (first, bucket)
    }

    fn holding(&self, name: GrantName, grant: &Grant, now: Time) -> Holding {
        let policy = grant.parts.first().map(|part| part.limiter.name.clone());
        let nothing = || PolicyName::new(&grant.owner.namespace, "");
        Holding {
            name,
            policy: policy.unwrap_or_else(nothing),
            permits: grant.held(Holds::Permit),
            leased: grant.held(Holds::Lease),
            estimated: grant.held(Holds::Estimate),
            expires_in: Duration::from_nanos(grant.ends_at().nanos_since(now)),
        }
    }
}

/// Whether nobody decides by a snapshot of the policies any more, some time after it was replaced: who does writes
/// nothing down of what was fast in it.
async fn is_let_go(former: &Arc<Catalogue>) -> bool {
    let let_go = async {
        // Who loaded it has a count of it by now, since it was swapped.
        while Arc::strong_count(former) > 1 {
            tokio::time::sleep(limits::SNAPSHOT_LOOKS).await;
        }
    };
    tokio::time::timeout(limits::SNAPSHOT_IN_USE, let_go).await.is_ok()
}

/// Whether the Admin service may change a policy that is to be of that version.
fn may_change(
    name: &PolicyName,
    before: Option<&Configured>,
    expected: Option<u64>,
) -> Result<(), AdminError> {
    match before.map(|before| before.source) {
        Some(Source::File) => return Err(AdminError::ManagedByFile(name.clone())),
        Some(Source::Envoy) => return Err(AdminError::ManagedByRules(name.clone())),
        Some(Source::Admin) | None => {}
    }
    let found = before.map_or(0, |before| before.version);
    match expected {
        Some(expected) if expected != found => {
            Err(AdminError::Conflict { name: name.clone(), expected, found })
        }
        _ => Ok(()),
    }
}

/// Whether a policy may have these settings, or be no more, for all that rules of Envoy's need of it.
fn may_judge(
    catalogue: &Catalogue,
    name: &PolicyName,
    settings: Option<&config::Policy>,
) -> Result<(), AdminError> {
    let counts_hits = settings.is_some_and(|settings| has_no_hits(settings).is_none());
    let rule = catalogue.ratelimit.as_ref().and_then(|rules| rules.domains.judged_by(name));
    match rule {
        Some(rule) if !counts_hits => {
            Err(AdminError::Judges { policy: name.clone(), rule: rule.path.to_string() })
        }
        _ => Ok(()),
    }
}

/// An event of a policy.
fn about(
    principal: Principal,
    action: Action,
    name: &PolicyName,
    reason: String,
) -> events::Change {
    let Principal::Anonymous = principal;
    events::Change {
        actor: "anonymous".to_owned(),
        action,
        namespace: name.namespace.to_string(),
        policy: name.policy.to_string(),
        key: String::new(),
        reason,
        before: String::new(),
        after: String::new(),
    }
}

impl Bucket {
    /// Tokens spent of each limit, for an event.
    fn spent(&self) -> String {
        let spent: Vec<_> = self.limits.iter().map(|limit| limit.spent.to_string()).collect();
        spent.join(", ")
    }
}

impl fmt::Display for Holding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, permits, leased, estimated, .. } = self;
        write!(f, "grant {name}: {permits} permits, {leased} leased, {estimated} estimated")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::{
        Acquire, Ask, Entry, Priority,
        by_hand::{ByHand, app},
    };

    #[test]
    fn a_key_is_listed_until_the_last_of_its_limits_is_full() {
        let clock = Arc::<ByHand>::default();
        let (minute, hour) =
            ("{token_bucket: {limit: 5, per: 1m}}", "{token_bucket: {limit: 5, per: 1h}}");
        let (app, _) = app(&format!("policy: {{limits: [{minute}, {hour}]}}"), &clock);
        let ask = Ask { policy: "policy", key: "alice", cost: 1, estimated: false, lease: 0 };
        let entry = Entry { asks: [ask], priority: Priority::Normal, retry: false };
        let acquire = Acquire { namespace: "test", client: None, entry };
        assert!(app.acquire(app.caller(Principal::Anonymous), acquire, |_| ()).is_ok());

        let name = PolicyName::new("test", "policy");
        let listed_after = |seconds| {
            clock.advance(Duration::from_secs(seconds));
            for _ in 0..limits::CELL_SHARDS {
                app.tend().unwrap();
            }
            let Buckets { buckets, unnamed, .. } = app.buckets(&name, "", None, 10).unwrap();
            (buckets.len(), unnamed)
        };
        assert_eq!(listed_after(0), (1, 0));
        assert_eq!(listed_after(300), (1, 0), "one of the two is full");
        assert_eq!(listed_after(3_600), (0, 0));
    }
}
