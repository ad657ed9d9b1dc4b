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

    /// A rule that the policy of that name judges instead of its own.
    pub fn judged_by(&self, name: &PolicyName) -> Option<&Rule> {
        let mut rules = self.by_name.values().flat_map(|domain| &domain.rules);
        rules.find(|rule| matches!(&rule.judge, Judge::Native(judge) if judge == name))
    }

    /// Where limits that requests carry are counted.
    pub fn of_requests(&self, unit: Unit) -> Option<&Arc<Policy>> {
        self.of_requests[unit as usize].as_ref()
    }

    /// Visits every series that hits were counted in: its domain, its key as envoyproxy has it, and its counts. Rules
    /// that have the same key are one series. The key of limits that requests carry is empty where there was no room
    /// for one.
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
        // There may be many rules, and few are ever met.
        let mut add = |key: &str, hits: &Hits| match sums.get(key) {
            _ if !hits.is_counted() => {}
            Some(sum) => sum.add_all(hits),
            None => sums.entry(key.into()).or_default().add_all(hits),
        };
        for rule in &self.rules {
            add(&rule.series_key, &rule.hits);
            if let Some(series) = &rule.series {
                series.visit(&mut add);
            }
        }
        self.of_requests.series.visit(&mut add);
        add("", &self.of_requests.others);
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
    use std::{cell::Cell, collections::BTreeSet, sync::atomic::Ordering, time::Duration};

    use arrayvec::ArrayVec;

    use super::*;
    use crate::{
        app::top_keys::TopKeys,
        catalogue::{Budget, Names, Overrides, Reserves},
        config::envoy::NativePolicy,
        counters::Decisions,
        limits,
    };

    thread_local! {
        /// Lookups of this thread.
        pub static PROBES: Cell<usize> = const { Cell::new(0) };
    }

    /// The nodes of a script. Each line is a rule: its levels between `>`, each as `key` or `key=value` and its
    /// flags, then what it allows in a minute and the flags of the rule.
    fn nodes(script: &str) -> Vec<Node> {
        let mut nodes = Vec::new();
        for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (levels, rule) = line.rsplit_once(" : ").unwrap();
            let (above, last) = levels.rsplit_once(" > ").unwrap_or(("", levels));
            let mut below = &mut nodes;
            for level in above.split(" > ").filter(|level| !level.is_empty()) {
                below = &mut planted(below, level).nodes;
            }
            let node = planted(below, last);
            let mut flags = rule.split(' ');
            let amount = match flags.next().unwrap() {
                "nothing" => continue,
                "unlimited" => Amount::Unlimited,
                limit => Amount::Requests { per_unit: limit.parse().unwrap(), unit: Unit::Minute },
            };
            let (name, replaces) = (String::new(), Vec::new());
            node.rate_limit = Some(RateLimit { amount, name, replaces });
            for flag in flags {
                match flag {
                    "detailed" => node.detailed_metric = true,
                    "shadow" => node.shadow_mode = true,
                    "quota" => node.quota_mode = true,
                    name => node.rate_limit.as_mut().unwrap().name = name.to_owned(),
                }
            }
        }
        nodes
    }

    fn planted<'n>(nodes: &'n mut Vec<Node>, level: &str) -> &'n mut Node {
        let mut words = level.split(' ');
        let entry = words.next().unwrap();
        let (key, value) = match entry.split_once('=') {
            None => (entry, Value::Any),
            Some((key, value)) if value.contains('*') => (key, Value::Pattern(value.to_owned())),
            Some((key, value)) => (key, Value::Exactly(value.to_owned())),
        };
        let known = nodes.iter().position(|node| node.key == key && node.value == value);
        let index = known.unwrap_or_else(|| {
            nodes.push(Node {
                key: key.to_owned(),
                value,
                rate_limit: None,
                shadow_mode: false,
                quota_mode: false,
                detailed_metric: false,
                value_to_metric: false,
                share_threshold: false,
                metadata: BTreeMap::new(),
                nodes: Vec::new(),
            });
            nodes.len() - 1
        });
        for flag in words {
            match flag {
                "share" => nodes[index].share_threshold = true,
                "metric" => nodes[index].value_to_metric = true,
                other => panic!("{other}"),
            }
        }
        &mut nodes[index]
    }

    fn settings() -> EnvoyRatelimit {
        EnvoyRatelimit {
            config_dir: "rules".into(),
            durability: None,
            shadow_mode: false,
            quota_mode: false,
            merge_domains: false,
            response_headers: None,
            response_dynamic_metadata: false,
            domains: BTreeMap::new(),
        }
    }

    /// What follows `former`: one domain, `domain`, of those rules.
    fn of_nodes(former: &Domains, nodes: Vec<Node>) -> Domains {
        let rules = Rules { domains: [("domain".to_owned(), nodes)].into() };
        Domains::new(&settings(), &rules, |_| None, former)
    }

    fn after(former: &Domains, script: &str) -> Domains {
        of_nodes(former, nodes(script))
    }

    fn domains(script: &str) -> Domains {
        after(&Domains::default(), script)
    }

    fn entries(descriptor: &str) -> impl Iterator<Item = (&str, &str)> + Clone {
        descriptor.split(" > ").map(|entry| entry.split_once('=').unwrap())
    }

    fn rule<'d>(domains: &'d Domains, descriptor: &str) -> Option<&'d Rule> {
        domains.domain("domain").unwrap().rule(entries(descriptor))
    }

    /// What the rule of a descriptor allows in a minute.
    fn limit(domains: &Domains, descriptor: &str) -> Option<u32> {
        match rule(domains, descriptor)?.amount {
            Amount::Requests { per_unit, .. } => Some(per_unit),
            Amount::Unlimited => Some(u32::MAX),
        }
    }

    /// The bucket of a descriptor: that of two is the same if this is.
    fn bucket(domains: &Domains, descriptor: &str) -> String {
        let rule = rule(domains, descriptor).unwrap();
        format!("{} {}", rule.path, &*rule.key(entries(descriptor)))
    }

    const BASIC: &str = "
        key1=value1 > subkey1 : 5
        key1=value1 > subkey1=subvalue1 : 10
        key2 : 20
        key2=value2 : 30
        key2=value3 : nothing
        key3 : 1
        key4 : 1 key4_rate_limit
        key5=value5 : 15
        key5=value5 > subkey5=subvalue5 : 25
        key5=value5 > unlisted : nothing
        key6 : unlimited
        key7 : 70 detailed
    ";

    #[test]
    fn a_rule_is_found_exactly_at_the_last_entry() {
        let domains = domains(BASIC);
        for (descriptor, limited) in [
            ("key1=", None),
            ("key1=value1", None),
            ("key1=value1 > subkey1=", Some(5)),
            ("key1=value1 > subkey1=something", Some(5)),
            ("key1=value1 > subkey1=subvalue1", Some(10)),
            ("key1=value1 > subkey1=subvalue1 > extra=depth", None),
            ("key1=value2 > subkey1=subvalue1", None),
            ("subkey1=subvalue1 > key1=value1", None),
            ("key2=", Some(20)),
            ("key2=anything", Some(20)),
            ("key2=value2", Some(30)),
            ("key2=value3", None),
            ("key3=foo", Some(1)),
            ("key3=foo > more=", None),
            ("key4=foo", Some(1)),
            ("key5=value5", Some(15)),
            ("key5=value5 > subkey5=subvalue5", Some(25)),
            ("key5=value5 > subkey5=other", None),
            ("key5=value5 > unlisted=foo", None),
            ("key6=foo", Some(u32::MAX)),
            ("key7=foo", Some(70)),
            ("KEY3=foo", None),
            ("key=foo", None),
        ] {
            assert_eq!(limit(&domains, descriptor), limited, "{descriptor}");
        }
        let domain = domains.domain("domain").unwrap();
        assert!(domain.rule(std::iter::empty()).is_none());
        assert_eq!(&*rule(&domains, "key4=foo").unwrap().name, "key4_rate_limit");
        assert!(domains.domain("Domain").is_none());
    }

    #[test]
    fn a_value_without_a_rule_below_is_not_tried_as_any() {
        let domains = domains("a=1 > b=1 : 1\na > c : 2\na=1* > d : 3");
        assert_eq!(limit(&domains, "a=1 > b=1"), Some(1));
        assert_eq!(limit(&domains, "a=1 > c=1"), None);
        assert_eq!(limit(&domains, "a=1 > d=1"), None);
        assert_eq!(limit(&domains, "a=11 > d=1"), Some(3));
        assert_eq!(limit(&domains, "a=2 > c=1"), Some(2));
    }

    #[test]
    fn keys_and_values_that_join_to_the_same_text_are_different() {
        let domains = domains("a_b=c : 1\na=b_c : 2\na_b : 3");
        assert_eq!(limit(&domains, "a_b=c"), Some(1));
        assert_eq!(limit(&domains, "a=b_c"), Some(2));
        assert_eq!(limit(&domains, "a_b=d"), Some(3));
        assert_eq!(limit(&domains, "a_b_c="), None);
        assert_eq!(limit(&domains, "a=b"), None);
    }

    #[test]
    fn an_exact_value_goes_before_patterns_and_they_before_any() {
        let domains = domains("key : 1\nkey=f* : 2\nkey=foo* : 3\nkey=foo1 : 4\nother=* : 5");
        for (descriptor, limited) in [
            ("key=foo1", 4),
            ("key=foo2", 2),
            ("key=f", 2),
            ("key=", 1),
            ("key=bar", 1),
            ("other=", 5),
            ("other=any", 5),
        ] {
            assert_eq!(limit(&domains, descriptor), Some(limited), "{descriptor}");
        }
    }

    #[test]
    fn patterns_match_on_every_level() {
        let domains = domains(
            "
            key=foo* : 1
            literal=foo : 2
            mid=bar*b : 3
            many=foo*bar*baz : 4
            nest=val1 > sub=goo* : 5
            nest=w*d > sub=goo* : 6
            ",
        );
        for (descriptor, limited) in [
            ("key=foo1", Some(1)),
            ("key=foo2", Some(1)),
            ("key=bar", None),
            ("literal=foo", Some(2)),
            ("literal=foo1", None),
            ("mid=barab", Some(3)),
            ("mid=bar123b", Some(3)),
            ("mid=barb", Some(3)),
            ("mid=bara", None),
            ("mid=xbarb", None),
            ("many=foo123bar456baz", Some(4)),
            ("many=foobarbaz", Some(4)),
            ("many=foo123baz", None),
            ("many=bar456baz", None),
            ("nest=val1 > sub=google", Some(5)),
            ("nest=val2 > sub=google", None),
            ("nest=val1 > sub=g", None),
            ("nest=wild > sub=goo", Some(6)),
        ] {
            assert_eq!(limit(&domains, descriptor), limited, "{descriptor}");
        }
    }

    #[test]
    fn what_a_rule_leaves_open_is_its_key() {
        let domains = domains("a=1 > b=1 : 1\na=1 > b : 2\na > b=x* > c : 3\nd=*share share : 4");
        let key =
            |descriptor| rule(&domains, descriptor).unwrap().key(entries(descriptor)).to_string();
        assert_eq!(key("a=1 > b=1"), "");
        assert_eq!(key("a=1 > b=alice"), "alice");
        assert_eq!(key("a=2 > b=x|y > c="), "2|x%7Cy|");
        assert_eq!(key("d=to share"), "");
    }

    #[test]
    fn values_share_a_bucket_only_where_a_shared_pattern_matched() {
        // As envoyproxy's groups of tests have it: each row tells descriptors of one bucket, or of several.
        for (group, script, together, apart) in [
            (
                "basic",
                "files=files/* share : 10",
                &["files=files/a.pdf", "files=files/b.csv"][..],
                &[][..],
            ),
            ("without it", "files=files/* : 10", &[], &["files=files/a.pdf", "files=files/b.csv"]),
            ("metrics", "path=/a* share metric : 10 detailed", &["path=/a1", "path=/a2"], &[]),
            (
                "nested",
                "user > files=files/* share > op : 10",
                &["user=a > files=files/1 > op=r", "user=a > files=files/2 > op=r"],
                &[
                    "user=a > files=files/1 > op=r",
                    "user=b > files=files/1 > op=r",
                    "user=a > files=files/1 > op=w",
                ],
            ),
            (
                "mixed",
                "a=x* share > b=y* : 10",
                &["a=x1 > b=y1", "a=x2 > b=y1"],
                &["a=x1 > b=y1", "a=x1 > b=y2"],
            ),
            ("both", "a=x* share > b=y* share : 10", &["a=x1 > b=y1", "a=x2 > b=y2"], &[]),
            (
                "explicit",
                "path=/a* share : 100\npath=/a1 : 50",
                &["path=/a2", "path=/a3"],
                &["path=/a1", "path=/a2"],
            ),
            ("middle", "path=/api*v1 share : 10", &["path=/api/a/v1", "path=/apiv1"], &[]),
            ("multi", "rpc=svc*ep*rpc share : 10", &["rpc=svc1ep1rpc", "rpc=svceprpc"], &[]),
            (
                "nested patterns",
                "env=t*prod share > res=res*v2 share : 10",
                &["env=tprod > res=resv2", "env=t1prod > res=res/1/v2"],
                &[],
            ),
        ] {
            let domains = domains(script);
            let buckets = |descriptors: &[&str]| -> BTreeSet<_> {
                descriptors.iter().map(|descriptor| bucket(&domains, descriptor)).collect()
            };
            assert_eq!(buckets(together).len(), usize::from(!together.is_empty()), "{group}");
            assert_eq!(buckets(apart).len(), apart.len(), "{group}");
        }
        let domains = domains("path=/a* share : 100\npath=/a1 : 50");
        assert_eq!(limit(&domains, "path=/a1"), Some(50));
        assert_eq!(limit(&domains, "path=/a2"), Some(100));
    }

    const HIT: Hit =
        Hit { hits: 1, spent_before: 0, limit: 9, over: false, shadow: false, negative: false };

    fn count(domains: &Domains, descriptor: &str) {
        rule(domains, descriptor).unwrap().count(entries(descriptor), HIT);
    }

    /// Every series that has counted something, as its key and total.
    fn series(domains: &Domains) -> Vec<(String, u64)> {
        let mut series = Vec::new();
        domains.visit_hits(|domain, key, hits| {
            assert_eq!(domain, "domain");
            let total = hits.total.load(Ordering::Relaxed);
            series.extend((total > 0).then(|| (key.to_owned(), total)));
        });
        series
    }

    fn told(series: &[(&str, u64)]) -> Vec<(String, u64)> {
        series.iter().map(|(key, total)| ((*key).to_owned(), *total)).collect()
    }

    #[test]
    fn hits_are_told_by_the_keys_that_envoyproxy_gives_them() {
        for (script, descriptor, key) in [
            ("a : 1", "a=1", "a"),
            ("a=1 : 1", "a=1", "a_1"),
            ("a > b=1 > c : 1", "a=x > b=1 > c=y", "a.b_1.c"),
            ("a=foo* : 1", "a=foo1", "a_foo*"),
            ("a : 1 detailed", "a=1", "a_1"),
            ("a : 1 detailed", "a=", "a"),
            ("a > b=1 > c=x* : 1 detailed", "a=1 > b=1 > c=xy", "a_1.b_1.c_xy"),
            ("a=x* share > b : 1 detailed", "a=x1 > b=2", "a_x*.b_2"),
            (
                "route metric > http_method metric > subject_id : 60",
                "route=api > http_method=GET > subject_id=123",
                "route_api.http_method_GET.subject_id",
            ),
            ("a > b > c : 1", "a=1 > b=2 > c=3", "a.b.c"),
            ("a > b metric > c : 1", "a=1 > b=2 > c=3", "a.b_2.c"),
            ("a > b > c metric : 1", "a=1 > b=2 > c=3", "a.b.c_3"),
            ("a metric > b : 1", "a= > b=1", "a.b"),
            ("a=1 metric > b : 1", "a=1 > b=2", "a_1.b"),
            ("a=foo* metric > b : 1", "a=foo1 > b=2", "a_foo1.b"),
            ("a=foo* > b metric : 1", "a=foo1 > b=2", "a_foo*.b_2"),
            ("a=foo* share metric > b metric : 1", "a=foo1 > b=2", "a_foo*.b_2"),
            ("a metric > b : 1 detailed", "a=1 > b=2", "a_1.b_2"),
        ] {
            let domains = domains(script);
            count(&domains, descriptor);
            assert_eq!(series(&domains), told(&[(key, 1)]), "{script}");
        }
    }

    #[test]
    fn a_rule_is_a_series_from_its_first_hit_on() {
        let domains = domains("a : 1\na=1 > b : 1 detailed\nc : nothing\nd : unlimited");
        assert_eq!(series(&domains), told(&[]));
        count(&domains, "a=2");
        assert_eq!(series(&domains), told(&[("a", 1)]));
    }

    #[test]
    fn series_of_one_key_are_one() {
        let domains = domains("a_b=c : 1\na=b_c : 2\na=b* : 3 detailed");
        for descriptor in ["a_b=c", "a=b_c", "a=b_d", "a=b_d"] {
            count(&domains, descriptor);
        }
        let domain = domains.domain("domain").unwrap();
        domain.count_request_limit(entries("a=b_d > x="), HIT);
        domain.count_request_limit(entries("a=b_d"), HIT);
        assert_eq!(series(&domains), told(&[("a_b_c", 2), ("a_b_d", 3), ("a_b_d.x", 1)]));
    }

    #[test]
    fn hits_past_the_last_series_are_counted_by_their_rule() {
        let domains = domains("a : 1 detailed");
        domains.taken.store(limits::DETAILED_METRICS, Ordering::Relaxed);
        count(&domains, "a=1");
        domains.domain("domain").unwrap().count_request_limit(entries("x=y"), HIT);
        assert_eq!(series(&domains), told(&[("", 1), ("a", 1)]));
    }

    #[test]
    fn hits_go_on_over_reloads_as_long_as_the_rule_is_there() {
        let first = domains("a : 1 detailed\nb : 1\nc : 1 detailed");
        for descriptor in ["a=1", "b=1", "c=1"] {
            count(&first, descriptor);
        }
        first.domain("domain").unwrap().count_request_limit(entries("x=y"), HIT);
        first.unknown_domains().fetch_add(1, Ordering::Relaxed);

        let second = after(&first, "a : 2 detailed\nb : 1 detailed");
        // One that is under way knows the former rules only.
        count(&first, "a=2");
        count(&second, "a=1");
        count(&second, "b=2");
        let all = [("a_1", 2), ("a_2", 1), ("b", 1), ("b_2", 1), ("x_y", 1)];
        assert_eq!(series(&second), told(&all));
        assert_eq!(second.unknown_domains().load(Ordering::Relaxed), 1);

        drop(first);
        assert_eq!(second.taken.load(Ordering::Relaxed), 4, "that of `c` is free again");
        let third = after(&second, "a : 2");
        drop(second);
        assert_eq!(third.taken.load(Ordering::Relaxed), 1);
        count(&third, "a=1");
        assert_eq!(series(&third), told(&[("a", 1), ("x_y", 1)]));
    }

    #[test]
    fn ten_thousand_rules_are_looked_up_as_ten_are() {
        let probes = |count: u32| {
            let (mut all, mut deep) = (Vec::new(), nodes("deep : nothing"));
            for index in 0..count {
                let v = format!("v{index:05}");
                for level in [
                    &*format!("value={v}"),
                    &format!("key-{v}"),
                    &format!("begins={v}*/x*"),
                    &format!("ends=*{v}"),
                    &format!("both={v}*end"),
                ] {
                    all.extend(nodes(&format!("{level} : 1")));
                }
                deep[0].nodes.extend(nodes(&format!("below={v} : 1")));
            }
            all.extend(deep);
            let domains = of_nodes(&Domains::default(), all);
            ["value=v00007", "key-v00007=", "begins=v00007/x/y", "ends=xv00007", "both=v00007end"]
                .into_iter()
                .chain(["deep=x > below=v00007", "begins=w", "ends=v00007w", "both=v99999end"])
                .map(|descriptor| {
                    PROBES.set(0);
                    let _ = rule(&domains, descriptor);
                    PROBES.get()
                })
                .collect::<Vec<_>>()
        };
        let of_ten = probes(10);
        assert!(of_ten.iter().all(|probes| (2..=5).contains(probes)), "{of_ten:?}");
        assert_eq!(probes(10_000), of_ten);
    }

    fn policy(name: &Path) -> Arc<Policy> {
        Arc::new(Policy {
            namespace: "envoy".into(),
            name: name.as_str().into(),
            settings: Arc::new("{fixed_window: {limit: 1, per: 1s}}".parse().unwrap()),
            rules: super::super::Rules { limiters: ArrayVec::new(), overflow: None },
            overrides: Overrides::default(),
            breakers: None,
            shadow: false,
            reserves: Reserves::default(),
            max_waiting: 0,
            lease_time: Duration::ZERO,
            no_hits: None,
            cells: CellHasher::new(&[7; 16], "envoy", name.as_str()),
            budget: Arc::new(Budget::new(0)),
            decisions: Arc::new(Decisions::default()),
            top_keys: Arc::new(TopKeys::new(0)),
            names: Arc::new(Names::new(Arc::default())),
        })
    }

    #[test]
    fn a_rule_is_judged_by_its_own_policy_or_by_a_native_one() {
        let native = NativePolicy::try_from("partner/quota".to_owned()).unwrap();
        let policies = [("a|b=1".to_owned(), native)].into();
        let own = DomainSettings { charge: Charge::AllOrNothing, policies, ..Default::default() };
        let settings = EnvoyRatelimit {
            domains: [("first".to_owned(), own)].into(),
            quota_mode: true,
            ..settings()
        };
        let script = "a > b=1 : 1\na > b : 2 shadow\nc : unlimited";
        let of = |name: &str| (name.to_owned(), nodes(script));
        let rules = Rules { domains: [of("first"), of("second")].into() };
        let domains =
            Domains::new(&settings, &rules, |path| Some(policy(path)), &Domains::default());

        let judge = |domain, descriptor| {
            let rule = domains.domain(domain).unwrap().rule(entries(descriptor)).unwrap();
            match &rule.judge {
                Judge::Nobody => "nobody".to_owned(),
                Judge::Own(policy) => policy.name.to_string(),
                Judge::Native(name) => format!("{}/{}", name.namespace, name.policy),
            }
        };
        assert_eq!(judge("first", "a=x > b=1"), "partner/quota");
        assert_eq!(judge("first", "a=x > b=2"), "first|a|b");
        assert_eq!(judge("second", "a=x > b=1"), "second|a|b=1");
        assert_eq!(judge("first", "c=x"), "nobody");

        let charging = |domain| domains.domain(domain).unwrap().charging;
        assert_eq!(charging("first"), Charging::AllOrNothing);
        assert_eq!(charging("second"), Charging::Always);
        for unit in Unit::ALL {
            let name = format!("|per={}", unit.name());
            assert_eq!(*domains.of_requests(unit).unwrap().name, *name);
        }
        let rule = domains.domain("first").unwrap().rule(entries("a=x > b=2")).unwrap();
        assert!(rule.shadow_mode && rule.quota_mode);
    }
}
