//! Domains of Envoy's rate limit service: which rule limits a descriptor, in which bucket, and counted where.

mod hits;
mod key;
mod pattern;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize},
    },
};

use fusebox_core::Charging;
use hashbrown::HashMap;

pub use self::{
    hits::{Hit, Hits},
    key::Key,
};
use self::{
    hits::{Series, series_key},
    pattern::Patterns,
};
use super::{CellHasher, Policy, PolicyName};
use crate::config::envoy::{
    Amount, Charge, DomainSettings, EnvoyRatelimit, Metadata, Node, Path, RateLimit, Rules, Unit,
    Value,
};

/// Every domain, by name: an immutable snapshot, part of the catalogue's.
#[derive(Debug, Default)]
pub struct Domains {
    by_name: HashMap<Box<str>, Domain>,
    of_requests: [Option<Arc<Policy>>; Unit::ALL.len()],
    unknown: Arc<AtomicU64>,
    /// Series that callers made, of all domains.
    taken: Arc<AtomicUsize>,
}

/// The rules of one domain.
#[derive(Debug)]
pub struct Domain {
    /// Its name.
    pub name: Box<str>,
    /// What a request that is over a limit is charged for.
    pub charging: Charging,
    rules: Vec<Rule>,
    level: Level,
    of_requests: Arc<OfRequests>,
}

/// Hits of limits that requests carry.
#[derive(Debug)]
struct OfRequests {
    series: Series,
    /// Those that no series had room for.
    others: Hits,
}

/// What limits descriptors.
#[derive(Debug)]
pub struct Rule {
    /// Where it is.
    pub path: Path,
    /// Who decides.
    pub judge: Judge,
    /// What is told as the limit.
    pub amount: Amount,
    /// What others call it that replace it; empty if it has no name.
    pub name: Box<str>,
    /// Names of those that do not count where this one does.
    pub replaces: Box<[Box<str>]>,
    /// It counts, and its status is OK.
    pub shadow_mode: bool,
    /// A request is over the limit only if all rules that it matches of this kind are.
    pub quota_mode: bool,
    /// What an answer tells where it is not over its limit.
    pub metadata: BTreeMap<String, Metadata>,
    steps: Box<[Step]>,
    cells: Arc<CellHasher>,
    hits: Arc<Hits>,
    series_key: Box<str>,
    /// Those of what descriptors say, if metrics tell it.
    series: Option<Arc<Series>>,
}

/// Who decides for a rule.
#[derive(Clone, Debug)]
pub enum Judge {
    /// Nobody: it has no limit.
    Nobody,
    /// The policy that the rule is.
    Own(Arc<Policy>),
    /// A policy of that name, which may not be there.
    Native(PolicyName),
}

/// One level of a rule's path.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Step {
    /// Each value has a bucket of its own.
    is_open: bool,
    /// Metrics tell each value.
    is_told: bool,
    /// What they tell else: the value or pattern of the file.
    value: Option<Box<str>>,
}

/// One level of the tree: a lookup by key, then by value, however many there are.
#[derive(Debug, Default)]
struct Level {
    keys: HashMap<Box<str>, Choices>,
}

/// What the values of one key lead to.
#[derive(Debug, Default)]
struct Choices {
    exact: HashMap<Box<str>, Branch>,
    patterns: Patterns<Branch>,
    any: Option<Box<Branch>>,
}

#[derive(Debug)]
struct Branch {
    /// Where the rule is among those of the domain.
    rule: Option<usize>,
    below: Level,
}

impl Domains {
    /// `policy_of` finds the policy of a rule by its path; `former` is what goes on counting. A rule without a
    /// policy limits nobody.
    pub fn new(
        settings: &EnvoyRatelimit,
        rules: &Rules,
        policy_of: impl Fn(&Path) -> Option<Arc<Policy>>,
        former: &Self,
    ) -> Self {
        let of_requests = Unit::ALL.map(|unit| policy_of(&Path::of_requests(unit)));
        // Each has the secret of the data directory, and in a server they are always there.
        let cells = of_requests[0].as_ref().map(|policy| policy.cells.clone());
        let cells = Arc::new(cells.unwrap_or_else(|| CellHasher::new(&[0; 16], "", "")));
        let by_name = rules.domains.iter().map(|(name, nodes)| {
            let own = settings.domains.get(name).cloned().unwrap_or_default();
            let charging = match own.charge {
                Charge::AllOrNothing => Charging::AllOrNothing,
                Charge::Always => Charging::Always,
            };
            let taken = &former.taken;
            let (former, of_requests) = match former.domain(name) {
                Some(domain) => (domain.by_path(), Arc::clone(&domain.of_requests)),
                None => (HashMap::new(), Arc::new(OfRequests::new(Arc::clone(taken)))),
            };
            let (policy_of, rules) = (&policy_of, Vec::new());
            let mut builder =
                Builder { settings, own, policy_of, cells: &cells, taken, former, rules };
            let level = builder.level(&Path::of_domain(name), &mut Vec::new(), nodes);
            let (name, rules) = (Box::<str>::from(name.as_str()), builder.rules);
            (name.clone(), Domain { name, charging, rules, level, of_requests })
        });
        Self {
            by_name: by_name.collect(),
            of_requests,
            unknown: Arc::clone(&former.unknown),
            taken: Arc::clone(&former.taken),
        }
    }

    /// The domain of that name.
    pub fn domain(&self, name: &str) -> Option<&Domain> {
        self.by_name.get(name)
    }

    /// Where limits that requests carry are counted.
    pub fn of_requests(&self, unit: Unit) -> Option<&Arc<Policy>> {
        self.of_requests[unit as usize].as_ref()
    }

    /// Visits every series of hits: its domain, its key as envoyproxy has it, and its counts. Rules that have the
    /// same key are one series. The key of limits that requests carry is empty where there was no room for one.
    pub fn visit_hits(&self, mut visit: impl FnMut(&str, &str, &Hits)) {
        for domain in self.by_name.values() {
            for (key, hits) in &domain.sums() {
                visit(&domain.name, key, hits);
            }
        }
    }

    /// Requests that named no domain of these.
    pub fn unknown_domains(&self) -> &AtomicU64 {
        &self.unknown
    }
}

impl Domain {
    /// The rule of just these levels.
    pub fn rule<'e>(&self, entries: impl Iterator<Item = (&'e str, &'e str)>) -> Option<&Rule> {
        let (mut level, mut rule) = (&self.level, None);
        for (key, value) in entries {
            let branch = level.find(key, value)?;
            (level, rule) = (&branch.below, branch.rule);
        }
        rule.map(|index| &self.rules[index])
    }

    /// Counts hits of a limit that a request carries.
    pub fn count_request_limit<'e>(
        &self,
        entries: impl Iterator<Item = (&'e str, &'e str)>,
        hit: Hit,
    ) {
        let OfRequests { series, others } = &*self.of_requests;
        series.count_or(&series_key(entries.map(|(key, value)| (key, sent(value)))), hit, others);
    }

    fn by_path(&self) -> HashMap<&Path, &Rule> {
        self.rules.iter().map(|rule| (&rule.path, rule)).collect()
    }

    /// Every series by its key.
    fn sums(&self) -> BTreeMap<Box<str>, Hits> {
        let mut sums = BTreeMap::<Box<str>, Hits>::new();
        let mut add = |key: &str, hits: &Hits| match sums.get(key) {
            Some(sum) => sum.add_all(hits),
            None => sums.entry(key.into()).or_default().add_all(hits),
        };
        for rule in &self.rules {
            add(&rule.series_key, &rule.hits);
            rule.series.iter().for_each(|series| series.visit(&mut add));
        }
        self.of_requests.series.visit(&mut add);
        if self.of_requests.others.is_counted() {
            add("", &self.of_requests.others);
        }
        sums
    }
}

impl OfRequests {
    fn new(taken: Arc<AtomicUsize>) -> Self {
        Self { series: Series::new(taken), others: Hits::default() }
    }
}

impl Rule {
    /// The bucket's key: the values that the rule leaves open.
    pub fn key<'e>(&self, entries: impl Iterator<Item = (&'e str, &'e str)> + Clone) -> Key<'e> {
        let open = self.steps.iter().zip(entries).filter(|(step, _)| step.is_open);
        Key::new(open.map(|(_, (_, value))| value), &self.cells)
    }

    /// Counts hits, in a series of the descriptor's own where the rule tells values of it.
    pub fn count<'e>(&self, entries: impl Iterator<Item = (&'e str, &'e str)> + Clone, hit: Hit) {
        let Some(series) = &self.series else { return self.hits.count(hit) };
        let levels = self.steps.iter().zip(entries).map(|(step, (key, value))| {
            (key, if step.is_told { sent(value) } else { step.value.as_deref() })
        });
        series.count_or(&series_key(levels), hit, &self.hits);
    }
}

/// A value as metrics tell it: an empty one is left out.
fn sent(value: &str) -> Option<&str> {
    Some(value).filter(|value| !value.is_empty())
}

impl Level {
    fn find(&self, key: &str, value: &str) -> Option<&Branch> {
        probed();
        let choices = self.keys.get(key)?;
        probed();
        let exact = choices.exact.get(value);
        exact.or_else(|| choices.patterns.find(value)).or(choices.any.as_deref())
    }
}

/// Turns nodes into levels and rules.
struct Builder<'a, P> {
    settings: &'a EnvoyRatelimit,
    own: DomainSettings,
    policy_of: &'a P,
    cells: &'a Arc<CellHasher>,
    taken: &'a Arc<AtomicUsize>,
    former: HashMap<&'a Path, &'a Rule>,
    rules: Vec<Rule>,
}

impl<P: Fn(&Path) -> Option<Arc<Policy>>> Builder<'_, P> {
    /// The level of those nodes, which are below `path`; `line` are the nodes that lead there.
    fn level<'n>(&mut self, path: &Path, line: &mut Vec<&'n Node>, nodes: &'n [Node]) -> Level {
        let mut level = Level::default();
        for node in nodes {
            let path = path.then(node);
            line.push(node);
            let rule = node.rate_limit.as_ref().map(|limit| {
                let rule = self.rule(path.clone(), line, node, limit);
                self.rules.push(rule);
                self.rules.len() - 1
            });
            let branch = Branch { rule, below: self.level(&path, line, &node.nodes) };
            line.pop();

            let choices = level.keys.entry(node.key.as_str().into()).or_default();
            match &node.value {
                Value::Any => choices.any = Some(Box::new(branch)),
                Value::Exactly(value) => {
                    choices.exact.insert(value.as_str().into(), branch);
                }
                Value::Pattern(pattern) => choices.patterns.add(pattern, branch),
            }
        }
        level
    }

    fn rule(&self, path: Path, line: &[&Node], node: &Node, limit: &RateLimit) -> Rule {
        let judge = match (self.own.native(&path), limit.amount) {
            (Some(native), _) => Judge::Native(PolicyName {
                namespace: native.namespace.as_str().into(),
                policy: native.policy.as_str().into(),
            }),
            (None, Amount::Unlimited) => Judge::Nobody,
            (None, Amount::Requests { .. }) => {
                (self.policy_of)(&path).map_or(Judge::Nobody, Judge::Own)
            }
        };
        let steps: Box<[_]> =
            line.iter().map(|level| Step::new(level, node.detailed_metric)).collect();
        let former = self.former.get(&path);
        let hits = former.map_or_else(Arc::default, |former| Arc::clone(&former.hits));
        let series = steps.iter().any(|step| step.is_told).then(|| {
            // Of other steps it would have other keys.
            let former = former.filter(|former| former.steps == steps);
            let series = former.and_then(|former| former.series.clone());
            series.unwrap_or_else(|| Arc::new(Series::new(Arc::clone(self.taken))))
        });
        let levels = line.iter().zip(&steps);
        let levels = levels.map(|(level, step)| (level.key.as_str(), step.value.as_deref()));
        Rule {
            judge,
            amount: limit.amount,
            name: limit.name.as_str().into(),
            replaces: limit.replaces.iter().map(|name| name.as_str().into()).collect(),
            shadow_mode: node.shadow_mode,
            quota_mode: node.quota_mode || self.settings.quota_mode,
            metadata: node.metadata.clone(),
            cells: Arc::clone(self.cells),
            series_key: series_key(levels).as_str().into(),
            path,
            steps,
            hits,
            series,
        }
    }
}

impl Step {
    /// `detailed` is what the last node of the path says.
    fn new(node: &Node, detailed: bool) -> Self {
        let value = match &node.value {
            Value::Any => None,
            Value::Exactly(value) | Value::Pattern(value) => Some(value.as_str().into()),
        };
        let is_open = match node.value {
            Value::Any => true,
            Value::Exactly(_) => false,
            Value::Pattern(_) => !node.share_threshold,
        };
        Self { is_open, is_told: is_open && (detailed || node.value_to_metric), value }
    }
}

/// A place where something is looked up; tests count them.
fn probed() {
    #[cfg(test)]
    tests::PROBES.set(tests::PROBES.get() + 1);
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    thread_local! {
        /// Lookups of this thread.
        pub static PROBES: Cell<usize> = const { Cell::new(0) };
    }
}
