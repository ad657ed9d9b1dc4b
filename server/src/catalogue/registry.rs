//! What operators wrote, and which limiters stand for it: the way from policies to a [`Catalogue`].

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

use arrayvec::ArrayVec;
use fusebox_core::{Kind, Limit, Moment, saturating_nanos};
use prost::Message;

use super::{
    Almanac, Breakers, Budget, Catalogue, CellHasher, Limiter, LimiterNumber, Names, Overrides,
    Policy, PolicyName, Ratelimit, Reserves, Rules,
};
use crate::{
    app::top_keys::TopKeys,
    config::{
        self, BreakerPolicy, Durability, Keys, LimitSettings, LimiterPolicy, Namespaces, Override,
        envoy::{self, RulePolicy, Ruleset},
    },
    limits,
    storage::{
        Keeping,
        journal::{Keyspace, Write},
        record::{Directory, LimiterRecord, PolicyRecord},
    },
};

/// Key of the record of the directory itself.
pub(crate) const DIRECTORY: &[u8] = b"directory";

/// Every policy as an operator wrote it, and every limiter that cells know. It computes changes; who makes one
/// sees to it that it is on disk first.
#[derive(Debug)]
pub struct Registry {
    policies: BTreeMap<PolicyName, Configured>,
    limiters: Limiters,
    /// Of every policy that has limiters, also if it is deleted: its cells are still counted.
    budgets: HashMap<PolicyName, Arc<Budget>>,
    directory: Directory,
    secret: [u8; 16],
    /// What a crash may forget, where a policy does not say.
    durability: Durability,
    /// Whether what is written can be read again.
    keeps: bool,
    /// Keys of all policies that are known as text.
    named: Arc<AtomicUsize>,
}

/// A policy as an operator wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configured {
    /// What was written.
    pub settings: Arc<config::Policy>,
    /// Who manages it.
    pub source: Source,
    /// Grows with each change of the settings, and is never given twice in a data directory.
    pub version: u64,
    /// When it was created: time since the Unix epoch.
    pub created: Duration,
    /// When the settings last changed.
    pub updated: Duration,
}

/// Who manages a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The configuration file.
    File,
    /// The Admin service.
    Admin,
    /// A file of Envoy's rate limit service.
    Envoy,
}

/// A change of policies that is not made yet.
#[derive(Debug)]
pub struct Change {
    /// The policies in force once it is made.
    pub catalogue: Catalogue,
    /// What must be on disk before.
    pub writes: Vec<Write>,
    /// Limiters whose cells are kept on disk from then on, and were not before.
    pub slowed: HashSet<LimiterNumber>,
    /// The policies that change, as they are after it; `None` if one ends.
    pub after: Vec<(PolicyName, Option<Configured>)>,
    limiters: Limiters,
    directory: Directory,
}

/// What somebody wrote differently in a file.
#[derive(Debug, PartialEq, Eq)]
pub struct Edit {
    /// The policy.
    pub name: PolicyName,
    /// Which file.
    pub source: Source,
    /// What it was; `None` if it is new.
    pub before: Option<Arc<config::Policy>>,
    /// What it is; `None` if it is there no more.
    pub after: Option<Arc<config::Policy>>,
}

/// Why a configuration file does not fit what the data directory knows.
#[derive(Debug, PartialEq, Eq)]
pub enum Misfit {
    /// A policy of the file was also made by the Admin service.
    MadeToo {
        /// The policy.
        name: PolicyName,
        /// The version of the one that was made.
        version: u64,
    },
    /// More policies than a server holds, with those that the Admin service made.
    TooMany {
        /// How many.
        count: usize,
    },
}

/// Names a limiter.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LimiterId {
    namespace: String,
    policy: String,
    /// As [`LimiterRecord::keys`].
    keys: String,
    index: u32,
}

/// A limiter that the configuration or the data directory knows.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) number: LimiterNumber,
    settings: fusebox_core::Policy,
    /// In the last life its cells were not written until a clean stop.
    was_fast: bool,
    /// Its cells are not written until a clean stop.
    is_fast: bool,
    /// Its cells are written from now on, but maybe not all of them are yet: a crash would make them empty.
    is_turning_slow: bool,
    /// Its cells are not written only because the policy watches.
    watches: bool,
    /// What the configuration says of its durability; `None` if it does not name the limiter.
    configured: Option<Durability>,
}

/// Limiters by name.
pub(crate) type Limiters = BTreeMap<LimiterId, Known>;

impl Registry {
    /// What a data directory knows of limiters, without a policy.
    pub(crate) fn new(
        directory: Directory,
        secret: [u8; 16],
        limiters: Limiters,
        durability: Durability,
        keeps: bool,
    ) -> Self {
        let mut registry = Self {
            policies: BTreeMap::new(),
            limiters,
            budgets: HashMap::new(),
            directory,
            secret,
            durability,
            keeps,
            named: Arc::default(),
        };
        let highest = registry.limiters.values().map(|known| known.number.0).max();
        let directory = &mut registry.directory;
        directory.next_limiter = directory.next_limiter.max(highest.map_or(0, |number| number + 1));
        directory.next_version = directory.next_version.max(1);
        registry
    }

    /// Takes up the policies of files, and those that the data directory has of an earlier life. What is to be
    /// written for that, and what the files say differently now.
    ///
    /// # Errors
    /// If the configuration file does not fit what was made without it.
    pub(crate) fn open(
        &mut self,
        namespaces: &Namespaces,
        rules: &[RulePolicy],
        mut stored: BTreeMap<PolicyName, Configured>,
        now: Moment,
    ) -> Result<(Vec<Write>, Vec<Edit>), Misfit> {
        let mut edits = Vec::new();
        let of_namespaces = namespaces.iter().flat_map(|(namespace, configured)| {
            configured.policies.iter().map(move |(name, settings)| {
                let name = PolicyName::new(namespace.as_str(), name.as_str());
                (name, settings, Source::File)
            })
        });
        for (name, settings, source) in of_namespaces.chain(rules.iter().map(of_rule)) {
            let before = stored.remove(&name);
            if let Some(Configured { source: Source::Admin, version, .. }) = before {
                return Err(Misfit::MadeToo { name, version });
            }
            let configured = match before {
                Some(before) if before.says(settings, source) => before,
                before => {
                    let settings = Arc::new(settings.clone());
                    let directory = &mut self.directory;
                    let next = Configured::next(before.as_ref(), settings, source, directory, now);
                    edits.push(Edit::of(&name, before.as_ref(), Some(&next)));
                    next
                }
            };
            self.policies.insert(name, configured);
        }
        let mut writes = Vec::new();
        for (name, configured) in stored {
            match configured.source {
                Source::Admin => drop(self.policies.insert(name, configured)),
                Source::File | Source::Envoy => {
                    writes.push(deleted(&name));
                    edits.push(Edit::of(&name, Some(&configured), None));
                }
            }
        }
        let count = self.count();
        if count > limits::POLICIES {
            return Err(Misfit::TooMany { count });
        }
        for (name, configured) in &self.policies {
            let settings = &configured.settings;
            let known = |id: &LimiterId| self.limiters.get(id).cloned();
            let next = &mut self.directory.next_limiter;
            let limiters = limiters_of(name, settings, self.durability, known, next, now);
            self.limiters.extend(limiters);
            writes.push(written(name, configured));
        }
        writes.extend(self.limiters.iter().map(|(id, known)| known.written(id)));
        writes.push(Write::put(Keyspace::Meta, DIRECTORY, self.directory.encode_to_vec()));
        Ok((writes, edits))
    }

    /// All of it, ready to be asked.
    pub(crate) fn catalogue(&mut self, rules: Option<&Ruleset>) -> Catalogue {
        for id in self.limiters.keys() {
            self.budgets.entry(id.policy_name()).or_default();
        }
        for (name, configured) in &self.policies {
            self.set_budget(name, &configured.settings);
        }
        let mut limiters = self.limiters.clone();
        let policies = self.policies.iter().map(|(name, configured)| {
            named_policy(self, name, &configured.settings, &mut limiters, None)
        });
        let policies: Vec<_> = policies.collect();
        let retired = limiters.into_iter().map(|(id, known)| {
            let name = id.policy_name();
            let budget = self.budgets.get(&name).cloned().unwrap_or_default();
            Arc::new(limiter(&name, known, None, &budget, self.keeps))
        });
        let mut catalogue = Catalogue::new(1, policies, retired);
        catalogue.ratelimit = rules.map(|rules| Arc::new(Ratelimit::new(rules, &catalogue)));
        catalogue
    }

    /// A policy as it is configured.
    pub fn policy(&self, name: &PolicyName) -> Option<&Configured> {
        self.policies.get(name)
    }

    /// Every policy, by namespace and name; only those after `after`, if one is given.
    pub fn policies<'a>(
        &'a self,
        after: Option<&'a PolicyName>,
    ) -> impl Iterator<Item = (&'a PolicyName, &'a Configured)> {
        use std::ops::Bound;
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.policies.range((start, Bound::Unbounded))
    }

    /// How many policies there are, without those that are rules of Envoy's.
    pub fn count(&self) -> usize {
        let all = self.policies.values();
        all.filter(|configured| configured.source != Source::Envoy).count()
    }

    /// How many rules of Envoy's there are, without what counts by limits that requests carry.
    pub fn rule_count(&self) -> usize {
        let of_files = |(name, configured): &(&PolicyName, &Configured)| {
            configured.source == Source::Envoy && !name.policy.starts_with('|')
        };
        self.policies.iter().filter(of_files).count()
    }

    /// How many limiters there are once a change is made.
    pub fn limiters_after(&self, change: &Change) -> usize {
        let new = change.limiters.keys().filter(|id| !self.limiters.contains_key(id));
        self.limiters.len() + new.count()
    }

    /// Whether what is written can be read again.
    pub fn keeps(&self) -> bool {
        self.keeps
    }

    /// What a crash may forget, where a policy does not say.
    pub fn durability(&self) -> Durability {
        self.durability
    }

    /// Names this data directory; does not tell its secret.
    pub fn truth_id(&self) -> String {
        format!("{:?}", CellHasher::new(&self.secret, "", "").overflow(Some("truth")))
    }

    /// A policy of that name and these settings, managed by the Admin service. It goes on with what cells of
    /// that name had spent.
    pub fn put(
        &self,
        catalogue: &Catalogue,
        name: &PolicyName,
        settings: config::Policy,
        now: Moment,
    ) -> Change {
        let mut change = self.no_change(catalogue);
        change.put(self, name, Arc::new(settings), Source::Admin, now);
        change.finish()
    }

    /// That policy no more. Its limiters stay, for the cells that they count.
    pub fn delete(&self, catalogue: &Catalogue, name: &PolicyName) -> Change {
        let mut change = self.no_change(catalogue);
        change.delete(name);
        change.finish()
    }

    /// These rules of Envoy's rate limit service, and no others; what is different. Rules that are there already
    /// go on with what they had counted.
    pub fn reload(
        &self,
        catalogue: &Catalogue,
        rules: &Ruleset,
        now: Moment,
    ) -> (Change, Vec<Edit>) {
        let (mut change, mut edits) = (self.no_change(catalogue), Vec::new());
        let of_rules = self.policies.iter().filter(|(_, known)| known.source == Source::Envoy);
        let mut gone: BTreeMap<_, _> = of_rules.collect();
        for (name, settings, source) in rules.policies().iter().map(of_rule) {
            let before = gone.remove(&name);
            if !before.is_some_and(|before| before.says(settings, source)) {
                let next = change.put(self, &name, Arc::new(settings.clone()), source, now);
                edits.push(Edit::of(&name, before, Some(next)));
            }
        }
        for (name, before) in gone {
            change.delete(name);
            edits.push(Edit::of(name, Some(before), None));
        }
        let ratelimit = Ratelimit::new(rules, &change.catalogue);
        change.catalogue.ratelimit = Some(Arc::new(ratelimit));
        (change.finish(), edits)
    }

    fn no_change(&self, catalogue: &Catalogue) -> Change {
        Change {
            catalogue: catalogue.next(),
            writes: Vec::new(),
            slowed: HashSet::new(),
            after: Vec::new(),
            limiters: Limiters::new(),
            directory: self.directory.clone(),
        }
    }

    /// Makes a change that is on disk; the policies in force from here on.
    pub fn make(&mut self, change: Change) -> Catalogue {
        let Change { catalogue, after, limiters, directory, .. } = change;
        for (name, after) in after {
            if let Some(policy) = catalogue.policy(&name) {
                self.budgets.insert(name.clone(), Arc::clone(&policy.budget));
            }
            match after {
                Some(configured) => {
                    self.set_budget(&name, &configured.settings);
                    self.policies.insert(name, configured);
                }
                None => drop(self.policies.remove(&name)),
            }
        }
        self.limiters.extend(limiters);
        self.directory = directory;
        catalogue
    }

    /// Gives a policy room for so many cells as it says; a breaker has none, and needs none.
    fn set_budget(&self, name: &PolicyName, settings: &config::Policy) {
        if let (Some(budget), Some(policy)) = (self.budgets.get(name), settings.limiter()) {
            budget.set_most(policy.max_cells);
        }
    }

    /// All cells of these limiters are on disk; what is to be written to say so.
    pub fn written_down(&mut self, slowed: &HashSet<LimiterNumber>) -> Vec<Write> {
        let known = self.limiters.iter_mut().filter(|(_, known)| slowed.contains(&known.number));
        known
            .map(|(id, known)| {
                known.is_turning_slow = false;
                known.written(id)
            })
            .collect()
    }

    /// Limiters whose cells are written from now on, but maybe not all of them are yet.
    pub(crate) fn turning_slow(&self) -> HashSet<LimiterNumber> {
        let turning = self.limiters.values().filter(|known| known.is_turning_slow);
        turning.map(|known| known.number).collect()
    }

    /// Limiters that no policy has.
    pub(crate) fn retired(&self) -> impl Iterator<Item = (&LimiterId, LimiterNumber)> {
        let retired = self.limiters.iter().filter(|(_, known)| known.configured.is_none());
        retired.map(|(id, known)| (id, known.number))
    }

    /// Limiters whose cells were not written in the last life until its clean stop.
    pub(crate) fn were_fast(&self) -> HashSet<LimiterNumber> {
        let fast = self.limiters.values().filter(|known| known.was_fast);
        fast.map(|known| known.number).collect()
    }

    /// Limiters whose cells are not written only because their policy watches.
    pub(crate) fn watching(&self) -> HashSet<LimiterNumber> {
        let watching = self.limiters.values().filter(|known| known.watches);
        watching.map(|known| known.number).collect()
    }

    /// Forgets limiters that nothing is counted by.
    pub(crate) fn forget(&mut self, done: &[LimiterId]) {
        for id in done {
            self.limiters.remove(id);
        }
    }
}

impl Change {
    /// A policy of that name and these settings; how it is configured then.
    fn put(
        &mut self,
        registry: &Registry,
        name: &PolicyName,
        settings: Arc<config::Policy>,
        source: Source,
        now: Moment,
    ) -> &Configured {
        let before = registry.policies.get(name);
        let configured = Configured::next(before, settings, source, &mut self.directory, now);
        let known = |id: &LimiterId| registry.limiters.get(id).cloned();
        let (settings, next) = (&configured.settings, &mut self.directory.next_limiter);
        let mut limiters = limiters_of(name, settings, registry.durability, known, next, now);
        let slowed = limiters.values().filter(|known| registry.keeps && known.is_turning_slow);
        self.slowed.extend(slowed.map(|known| known.number));
        self.writes.push(written(name, &configured));
        self.writes.extend(limiters.iter().map(|(id, known)| known.written(id)));
        self.limiters.extend(limiters.iter().map(|(id, known)| (id.clone(), known.clone())));
        let former = self.catalogue.policy(name).map(|policy| &**policy);
        let policy = named_policy(registry, name, settings, &mut limiters, former);
        self.catalogue.insert(Arc::new(policy));
        self.after.push((name.clone(), None));
        // Just pushed.
        let last = self.after.len() - 1;
        self.after[last].1.insert(configured)
    }

    /// That policy no more.
    fn delete(&mut self, name: &PolicyName) {
        self.catalogue.remove(name);
        self.writes.push(deleted(name));
        self.after.push((name.clone(), None));
    }

    fn finish(mut self) -> Self {
        self.writes.push(Write::put(Keyspace::Meta, DIRECTORY, self.directory.encode_to_vec()));
        self
    }
}

impl Edit {
    fn of(name: &PolicyName, before: Option<&Configured>, after: Option<&Configured>) -> Self {
        let settings = |configured: &Configured| Arc::clone(&configured.settings);
        let source = after.or(before).map_or(Source::File, |configured| configured.source);
        Self {
            name: name.clone(),
            source,
            before: before.map(settings),
            after: after.map(settings),
        }
    }
}

/// The policy that a rule is.
fn of_rule(rule: &RulePolicy) -> (PolicyName, &config::Policy, Source) {
    (PolicyName::new(envoy::NAMESPACE, rule.path.as_str()), &rule.policy, Source::Envoy)
}

impl PolicyName {
    /// A policy of a namespace.
    pub fn new(namespace: &str, policy: &str) -> Self {
        Self { namespace: namespace.into(), policy: policy.into() }
    }

    /// Namespaces have no dots, so it is unambiguous.
    fn to_key(&self) -> Vec<u8> {
        format!("{}.{}", self.namespace, self.policy).into_bytes()
    }
}

impl Configured {
    /// Whether that is what it says already.
    fn says(&self, settings: &config::Policy, source: Source) -> bool {
        self.source == source && *self.settings == *settings
    }

    /// The next version of a policy, or its first.
    fn next(
        before: Option<&Self>,
        settings: Arc<config::Policy>,
        source: Source,
        directory: &mut Directory,
        now: Moment,
    ) -> Self {
        let updated = Duration::from_nanos(now.wall.as_nanos());
        let created = before.map_or(updated, |before| before.created);
        let version = directory.next_version;
        directory.next_version += 1;
        Self { settings, source, version, created, updated }
    }

    /// What was written of a policy; `None` if the record makes no sense.
    pub(crate) fn of(record: &PolicyRecord) -> Option<(PolicyName, Self)> {
        let configured = Self {
            settings: Arc::new(record.settings.parse().ok()?),
            source: match (record.made, record.rule) {
                (true, _) => Source::Admin,
                (false, true) => Source::Envoy,
                (false, false) => Source::File,
            },
            version: record.version,
            created: Duration::from_nanos(record.created_nanos),
            updated: Duration::from_nanos(record.updated_nanos),
        };
        Some((PolicyName::new(&record.namespace, &record.name), configured))
    }
}

fn written(name: &PolicyName, configured: &Configured) -> Write {
    let record = PolicyRecord {
        namespace: name.namespace.to_string(),
        name: name.policy.to_string(),
        settings: configured.settings.to_string(),
        version: configured.version,
        created_nanos: saturating_nanos(configured.created),
        updated_nanos: saturating_nanos(configured.updated),
        made: configured.source == Source::Admin,
        rule: configured.source == Source::Envoy,
    };
    Write::put(Keyspace::Made, name.to_key(), record.encode_to_vec())
}

fn deleted(name: &PolicyName) -> Write {
    Write::delete(Keyspace::Made, name.to_key())
}

impl LimiterId {
    /// Names have no dots, and only keys have what ends them, so this one is unambiguous. Paths of rules have
    /// bars, and may have dots: they follow a bar.
    pub(crate) fn to_key(&self) -> Vec<u8> {
        let Self { namespace, policy, keys, index } = self;
        let end = if policy.contains('|') { '|' } else { '.' };
        let rest = if (keys.as_str(), *index) == ("", 0) {
            String::new()
        } else {
            format!(".{index}.{keys}")
        };
        format!("{namespace}{end}{policy}{rest}").into_bytes()
    }

    fn of(name: &PolicyName, keys: Option<&Keys>, index: usize) -> Self {
        let keys = match keys {
            None => String::new(),
            Some(Keys::Exactly(key)) => format!("={key}"),
            Some(Keys::Prefixed(prefix)) => format!("^{prefix}"),
        };
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        let (namespace, policy) = (name.namespace.to_string(), name.policy.to_string());
        Self { namespace, policy, keys, index }
    }

    fn policy_name(&self) -> PolicyName {
        PolicyName::new(&self.namespace, &self.policy)
    }
}

impl Known {
    /// A limiter as the last life had it; `None` if the record makes no sense. Where it was killed, nobody
    /// knows what cells that are not written while they live had spent: all of it.
    pub(crate) fn of(record: LimiterRecord, clean: bool, now: Moment) -> Option<(LimiterId, Self)> {
        let mut settings = record.policy()?;
        // What only watched had admitted nothing by its limits: its cells are as they were written before.
        let was_fast = record.fast && !record.watches;
        if was_fast && !clean {
            settings = settings.emptied(now);
        } else if settings.absent_full_at(now).is_some_and(|full_at| full_at <= now.time) {
            settings.absent = None;
        }
        let LimiterRecord { namespace, name: policy, keys, index, number, fast, watches, .. } =
            record;
        let known = Self {
            number: LimiterNumber(number),
            settings,
            was_fast,
            is_fast: fast,
            is_turning_slow: false,
            watches,
            configured: None,
        };
        Some((LimiterId { namespace, policy, keys, index }, known))
    }

    fn written(&self, id: &LimiterId) -> Write {
        let names = (id.namespace.as_str(), id.policy.as_str());
        let keys = (id.keys.as_str(), id.index);
        let fast = self.is_fast || self.is_turning_slow;
        let fast = (fast, self.watches);
        let record = LimiterRecord::of(names, keys, self.number, &self.settings, fast);
        Write::put(Keyspace::Policies, id.to_key(), record.encode_to_vec())
    }
}

/// Whether the cells of a limiter need not be written: a crash empties them, and soon they are full again.
/// Permits are not: nobody else would know that they are held. A policy is fast only if all its limits are: else
/// a crash that comes with a change of overrides would take a cell that was not written for a full one.
fn is_fast(limit: &Limit) -> bool {
    match limit {
        Limit::RetryBudget(_) => true,
        limit => limit.fills_in().is_some_and(|fills_in| fills_in <= limits::FAST_FILL),
    }
}

/// The limiters of a policy under the numbers that their cells know, or the next ones.
fn limiters_of(
    name: &PolicyName,
    policy: &config::Policy,
    durability: Durability,
    known: impl Fn(&LimiterId) -> Option<Known>,
    next: &mut u32,
    now: Moment,
) -> Limiters {
    let mut limiters = Limiters::new();
    let Some(policy) = policy.limiter() else { return limiters };
    let all_fast = all_limits(policy).all(|(_, _, settings)| is_fast(&settings.limit));
    for (keys, index, LimitSettings { limit, .. }) in all_limits(policy) {
        let max_debt = policy.max_debt_of(limit);
        let id = LimiterId::of(name, keys, index);
        // What only watches is not worth a write either.
        let by_kind = all_fast || matches!(limit, Limit::RetryBudget(_));
        let fast = policy.shadow || by_kind;
        let mut one = known(&id).unwrap_or_else(|| {
            let number = LimiterNumber(*next);
            *next += 1;
            Known {
                number,
                settings: fusebox_core::Policy::new(*limit, max_debt),
                was_fast: false,
                is_fast: fast,
                is_turning_slow: false,
                watches: false,
                configured: None,
            }
        });
        one.configured = Some(policy.durability.unwrap_or(durability));
        if one.settings.limit != *limit {
            one.settings = one.settings.changed(*limit, now);
        }
        one.settings.max_debt = max_debt;
        one.is_turning_slow = (one.is_turning_slow || one.is_fast) && !fast;
        one.is_fast = fast;
        one.watches = policy.shadow && !by_kind;
        limiters.insert(id, one);
    }
    limiters
}

/// Every limit of a policy, and whose it is.
fn all_limits(
    policy: &LimiterPolicy,
) -> impl Iterator<Item = (Option<&Keys>, usize, &LimitSettings)> {
    let own = policy.limits.iter().enumerate().map(|(index, limit)| (None, index, limit));
    let others = policy.overrides.iter().flat_map(|one| {
        one.judge.iter().enumerate().map(move |(index, limit)| (Some(&one.keys), index, limit))
    });
    own.chain(others)
}

/// A policy of the limiters that are its own, or of circuits, which goes on counting what `former` does.
fn named_policy(
    registry: &Registry,
    name: &PolicyName,
    settings: &Arc<config::Policy>,
    limiters: &mut Limiters,
    former: Option<&Policy>,
) -> Policy {
    let most = settings.limiter().map(|settings| settings.max_cells);
    let budget = registry.budgets.get(name).cloned();
    let named = || Arc::new(Names::new(Arc::clone(&registry.named)));
    // Keys that a policy of the other kind remembered go with it: nobody would look whether they are still needed.
    let alike = former.filter(|former| former.breakers.is_none() == most.is_some());
    let policy = Policy {
        namespace: Arc::clone(&name.namespace),
        name: Arc::clone(&name.policy),
        settings: Arc::clone(settings),
        rules: Rules::default(),
        overrides: Overrides::default(),
        breakers: None,
        shadow: false,
        reserves: Reserves::default(),
        max_waiting: 0,
        lease_time: limits::LEASE_TIME,
        no_hits: envoy::has_no_hits(settings),
        cells: CellHasher::new(&registry.secret, &name.namespace, &name.policy),
        budget: budget.unwrap_or_else(|| Arc::new(Budget::new(most.unwrap_or(0)))),
        decisions: former.map(|former| Arc::clone(&former.decisions)).unwrap_or_default(),
        top_keys: former.map_or_else(
            || Arc::new(TopKeys::new(limits::TOP_KEYS)),
            |former| Arc::clone(&former.top_keys),
        ),
        names: alike.map_or_else(named, |former| Arc::clone(&former.names)),
    };
    match &**settings {
        config::Policy::Limiter(settings) => {
            let (rules, overrides) = rules(registry, name, settings, limiters, &policy);
            Policy {
                rules,
                overrides,
                shadow: settings.shadow,
                reserves: settings.reserves,
                max_waiting: settings.max_waiting,
                lease_time: settings.lease_time,
                ..policy
            }
        }
        config::Policy::Breaker(settings) => {
            Policy { breakers: Some(breakers(settings)), ..policy }
        }
    }
}

/// What judges the keys of a policy by limits, which are counted in cells of `policy`.
fn rules(
    registry: &Registry,
    name: &PolicyName,
    settings: &LimiterPolicy,
    limiters: &mut Limiters,
    Policy { cells, budget, .. }: &Policy,
) -> (Rules, Overrides) {
    let mut rules = |keys: Option<&Keys>, limits: &[LimitSettings], overflow| {
        let limiters = limits.iter().enumerate().filter_map(|(index, settings)| {
            let known = limiters.remove(&LimiterId::of(name, keys, index))?;
            let almanac = settings.calendar.clone().map(Almanac::new);
            Some(Arc::new(limiter(name, known, almanac, budget, registry.keeps)))
        });
        Rules { limiters: limiters.collect::<ArrayVec<_, { limits::LIMITS }>>(), overflow }
    };
    let own = rules(None, &settings.limits, Some(cells.overflow(None)));
    let mut overrides = Overrides::default();
    for one in &settings.overrides {
        match &one.keys {
            Keys::Exactly(key) => {
                let rules = rules(Some(&one.keys), &one.judge, None);
                overrides.exact.insert(key.as_str().into(), rules);
            }
            Keys::Prefixed(prefix) => {
                let overflow = cells.overflow(Some(prefix));
                let rules = rules(Some(&one.keys), &one.judge, Some(overflow));
                overrides.prefixes.push((prefix.as_str().into(), rules));
            }
        }
    }
    longest_first(&mut overrides.prefixes);
    (own, overrides)
}

/// When the circuits of a policy open.
fn breakers(settings: &BreakerPolicy) -> Breakers {
    let mut breakers = Breakers {
        own: Arc::new(settings.breaker.clone()),
        exact: hashbrown::HashMap::new(),
        prefixes: Vec::new(),
        most: settings.max_circuits,
    };
    for Override { keys, judge } in &settings.overrides {
        let breaker = Arc::new(judge.clone());
        match keys {
            Keys::Exactly(key) => drop(breakers.exact.insert(key.as_str().into(), breaker)),
            Keys::Prefixed(prefix) => breakers.prefixes.push((prefix.as_str().into(), breaker)),
        }
    }
    longest_first(&mut breakers.prefixes);
    breakers
}

fn longest_first<T>(prefixes: &mut [(Box<str>, T)]) {
    prefixes.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
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

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_its_own_breaker_or_that_of_its_longest_prefix() {
        let policy = "{breaker: {}, max_cells: 7, overrides: [{prefix: a, breaker: {min_calls: 1}}, \
                      {prefix: a/b, breaker: {min_calls: 2}}, {key: a/b/c, breaker: {min_calls: 3}}]}";
        let Ok(config::Policy::Breaker(policy)) = policy.parse() else { panic!("{policy}") };
        let breakers = breakers(&policy);
        let keys = ["", "b", "a", "a/c", "a/b", "a/b/c/d", "a/b/c"];
        let min_calls = keys.map(|key| breakers.of(key).min_calls);
        assert_eq!(min_calls, [20, 20, 1, 1, 2, 2, 3]);
        assert_eq!(breakers.most, 7);
    }
}
