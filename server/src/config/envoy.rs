//! Rules of Envoy's rate limit service: where they are, and what they say.
//!
//! They are files of envoyproxy/ratelimit, unchanged: trees of descriptors, one domain each. What those files
//! cannot say is in our own file, under `envoy_ratelimit`.

pub mod files;

use std::{collections::BTreeMap, fmt, path::PathBuf, sync::Arc, time::Duration};

use fusebox_core::{Limit, SlidingWindow, TokenBucket, WindowLimit};
use http::HeaderName;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

pub use self::files::RulesError;
use super::{Durability, LimitSettings, LimiterPolicy, Name, Namespaces, Policy};

/// The namespace of the policies that rules are.
pub const NAMESPACE: &str = "envoy";

/// Where the rules are, and what their files cannot say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnvoyRatelimit {
    /// The folder of the files.
    pub config_dir: PathBuf,
    /// What a crash may forget; as `storage.durability` if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub durability: Option<Durability>,
    /// Nothing is over its limit overall; each status says what it is.
    #[serde(default)]
    pub shadow_mode: bool,
    /// Every rule is as if it had `quota_mode`.
    #[serde(default)]
    pub quota_mode: bool,
    /// Files of one domain add up; without it they are refused.
    #[serde(default)]
    pub merge_domains: bool,
    /// Headers that tell what is left; none if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_headers: Option<ResponseHeaders>,
    /// Answers carry `dynamic_metadata`.
    #[serde(default)]
    pub response_dynamic_metadata: bool,
    /// What is different in some domains.
    #[serde(default)]
    pub domains: BTreeMap<String, DomainSettings>,
}

/// Names of the headers that tell what is left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResponseHeaders {
    /// Tells the limit.
    #[serde(deserialize_with = "header_name")]
    pub limit: String,
    /// Tells what is left of it.
    #[serde(deserialize_with = "header_name")]
    pub remaining: String,
    /// Tells in how many seconds all of it is left again.
    #[serde(deserialize_with = "header_name")]
    pub reset: String,
}

/// What is different in a domain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DomainSettings {
    /// What a request that is over a limit is charged for.
    pub charge: Charge,
    /// What counts.
    pub algorithm: Algorithm,
    /// Policies of this server that judge instead of a rule, by the rule's [path](Path) without its domain.
    pub policies: BTreeMap<String, NativePolicy>,
}

/// What a request that is over a limit is charged for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Charge {
    /// All that it matches, as envoyproxy/ratelimit does.
    #[default]
    Always,
    /// Nothing.
    AllOrNothing,
}

/// What counts the hits of a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// Windows that begin at multiples of the unit, as envoyproxy/ratelimit has them.
    #[default]
    FixedWindow,
    /// A bucket that fills at the rate, and holds one unit of it.
    TokenBucket,
    /// Never more than the limit in any unit of time.
    SlidingWindow,
}

/// A policy of this server: `namespace/policy`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NativePolicy {
    /// Its namespace.
    pub namespace: Name,
    /// Its name.
    pub policy: Name,
}

/// The rules of all domains.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules {
    /// By name.
    pub domains: BTreeMap<String, Vec<Node>>,
}

/// One level of a domain: what an entry of a descriptor is held against, in the order of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// The entry's key.
    pub key: String,
    /// The entry's value.
    pub value: Value,
    /// What limits descriptors that end here; without it nothing does.
    pub rate_limit: Option<RateLimit>,
    /// It counts, and its status is OK.
    pub shadow_mode: bool,
    /// A request is over the limit only if all rules that it matches of this kind are.
    pub quota_mode: bool,
    /// Its metrics are those of each descriptor, values and all.
    pub detailed_metric: bool,
    /// Its metrics, and those of levels below, are those of each value.
    pub value_to_metric: bool,
    /// Values that match the pattern share one count.
    pub share_threshold: bool,
    /// What an answer tells where the rule is not over its limit.
    pub metadata: BTreeMap<String, Metadata>,
    /// The level below.
    pub nodes: Vec<Node>,
}

/// What a value is held against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Any, where no other node of the key matches.
    Any,
    /// This one.
    Exactly(String),
    /// With a `*` for any text, also none; the first in the file counts.
    Pattern(String),
}

/// What limits a descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// How much.
    pub amount: Amount,
    /// What others call it that replace it; empty if it has no name.
    pub name: String,
    /// Names of those that do not count where this one does.
    pub replaces: Vec<String>,
}

/// How much may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// Everything.
    Unlimited,
    /// So many hits a unit; 0 denies all.
    Requests {
        /// How many.
        per_unit: u32,
        /// In which time.
        unit: Unit,
    },
}

/// A unit of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unit {
    /// A second.
    Second,
    /// 60 seconds.
    Minute,
    /// 60 minutes.
    Hour,
    /// 24 hours.
    Day,
    /// 7 days, from a Thursday.
    Week,
    /// 30 days.
    Month,
    /// 365 days.
    Year,
}

/// What the `metadata` of a rule holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Metadata {
    /// Nothing.
    Null,
    /// Yes or no.
    Bool(bool),
    /// A number.
    Number(f64),
    /// Text.
    Text(String),
    /// Several.
    List(Vec<Metadata>),
    /// By name.
    Map(BTreeMap<String, Metadata>),
}

/// Where a rule is: its domain, then each level as `key` or `key=value`, between bars, as in
/// `basic|path=/login|remote_address`. It is what the rule's policy is called.
///
/// Texts that hold a `%` or a `|`, and keys that hold a `=`, have it as `%25`, `%7C` and `%3D`: no two rules
/// have one path, and none is the name of a policy that somebody wrote.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path(String);

/// Rules as they were read, and what our own file says of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Ruleset {
    /// What our own file says.
    pub settings: Arc<EnvoyRatelimit>,
    /// What the others say.
    pub rules: Rules,
    /// What is probably not meant, though it is no mistake.
    pub notes: Vec<String>,
}

/// The rules as their files say now.
///
/// # Errors
/// If a file cannot be read, or is wrong; all that are wrong are told.
pub fn read(settings: Arc<EnvoyRatelimit>) -> Result<Ruleset, RulesError> {
    let files::Loaded { rules, notes } = files::read(&settings)?;
    Ok(Ruleset { settings, rules, notes })
}

impl Ruleset {
    /// The policies that the rules are; first those that judge by limits which requests carry.
    #[must_use]
    pub fn policies(&self) -> Vec<RulePolicy> {
        self.settings.policies(&self.rules)
    }
}

/// A policy that rules need, and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RulePolicy {
    /// Its name.
    pub path: Path,
    /// Its settings.
    pub policy: Policy,
}

impl EnvoyRatelimit {
    /// The first policy that is to judge instead of a rule and cannot: the field that names it, and why not.
    pub(super) fn misjudged(&self, namespaces: &Namespaces) -> Option<(String, String)> {
        self.judges(namespaces).find_map(|(field, native, policy)| {
            let counts = has_no_hits(policy?)?;
            let name = String::from(native.clone());
            Some((field, format!("policy `{name}` counts {counts}: {ONLY_RATES}")))
        })
    }

    /// What is probably not meant, though it is no mistake: policies that are to judge and are not among these.
    #[must_use]
    pub fn notes(&self, namespaces: &Namespaces) -> Vec<String> {
        let missing = self.judges(namespaces).filter(|(_, _, policy)| policy.is_none());
        let note = |(field, native, _): (String, &NativePolicy, _)| {
            let name = String::from(native.clone());
            format!(
                "`{field}`: policy `{name}` is not in this file; until it is put by the Admin service, requests \
                 that meet the rule are errors, which Envoy lets pass unless `failure_mode_deny` is set"
            )
        };
        missing.map(note).collect()
    }

    /// Policies that are to judge instead of rules: the field that names each, and the policy, if it is among these.
    fn judges<'s>(
        &'s self,
        namespaces: &'s Namespaces,
    ) -> impl Iterator<Item = (String, &'s NativePolicy, Option<&'s Policy>)> {
        let domains = self.domains.iter();
        let named = domains.flat_map(|(domain, settings)| {
            settings.policies.iter().map(move |(rule, native)| {
                (format!("envoy_ratelimit.domains.{domain}.policies.{rule}"), native)
            })
        });
        named.map(|(field, native)| {
            let namespace = namespaces.get(&native.namespace);
            (field, native, namespace.and_then(|found| found.policies.get(&native.policy)))
        })
    }

    fn policies(&self, rules: &Rules) -> Vec<RulePolicy> {
        let mut policies = Vec::new();
        for unit in Unit::ALL {
            let most = Amount::Requests { per_unit: u32::MAX, unit };
            let policy = self.policy(most, Algorithm::FixedWindow, false);
            policies
                .extend(policy.map(|policy| RulePolicy { path: Path::of_requests(unit), policy }));
        }
        for (domain, nodes) in &rules.domains {
            let settings = self.domains.get(domain).cloned().unwrap_or_default();
            self.add_policies(&Path::of_domain(domain), nodes, &settings, &mut policies);
        }
        policies
    }

    fn add_policies(
        &self,
        path: &Path,
        nodes: &[Node],
        settings: &DomainSettings,
        policies: &mut Vec<RulePolicy>,
    ) {
        for node in nodes {
            let path = path.then(node);
            if let Some(limit) =
                node.rate_limit.as_ref().filter(|_| settings.native(&path).is_none())
            {
                let policy = self.policy(limit.amount, settings.algorithm, node.shadow_mode);
                policies.extend(policy.map(|policy| RulePolicy { path: path.clone(), policy }));
            }
            self.add_policies(&path, &node.nodes, settings, policies);
        }
    }

    /// What counts by that; `None` if there is nothing to count.
    fn policy(&self, amount: Amount, algorithm: Algorithm, shadow: bool) -> Option<Policy> {
        let Amount::Requests { per_unit, unit } = amount else { return None };
        let (limit, per) = (u64::from(per_unit), unit.per());
        // In the range of each of them, whatever the file says.
        let limit = match algorithm {
            Algorithm::FixedWindow => Limit::Window(WindowLimit::fixed(limit, per).ok()?),
            Algorithm::TokenBucket => Limit::TokenBucket(TokenBucket::new(limit, per, limit).ok()?),
            Algorithm::SlidingWindow => Limit::SlidingWindow(SlidingWindow::new(limit, per).ok()?),
        };
        let policy = LimiterPolicy::new(vec![LimitSettings { limit, calendar: None }]);
        Some(Policy::Limiter(LimiterPolicy { durability: self.durability, shadow, ..policy }))
    }
}

/// Why others cannot judge instead of a rule.
pub const ONLY_RATES: &str = "only rates and windows can judge what passes a proxy";

/// What a policy counts that is no hits.
#[must_use]
pub fn has_no_hits(policy: &Policy) -> Option<&'static str> {
    let Policy::Limiter(policy) = policy else { return Some("failures") };
    let of_overrides = policy.overrides.iter().flat_map(|other| &other.judge);
    let mut limits = policy.limits.iter().chain(of_overrides);
    limits.find_map(|settings| counts_no_hits(&settings.limit))
}

/// What a limit counts that is no hits: nobody would give it back.
const fn counts_no_hits(limit: &Limit) -> Option<&'static str> {
    match limit {
        Limit::Concurrency(_) => Some("permits"),
        Limit::RetryBudget(_) => Some("retries"),
        Limit::TokenBucket(_) | Limit::Window(_) | Limit::SlidingWindow(_) => None,
    }
}

impl DomainSettings {
    /// The policy that judges instead of the rule at that path.
    pub fn native(&self, path: &Path) -> Option<&NativePolicy> {
        let (_, rule) = path.as_str().split_once('|')?;
        self.policies.get(rule)
    }
}

impl Path {
    /// The path of what counts by limits that requests carry, of all domains; no domain has an empty name.
    #[must_use]
    pub fn of_requests(unit: Unit) -> Self {
        Self(format!("|per={}", unit.name()))
    }

    /// The path of a domain itself.
    #[must_use]
    pub fn of_domain(domain: &str) -> Self {
        Self(escaped(domain, &[]))
    }

    /// The path of a node below this one.
    #[must_use]
    pub fn then(&self, node: &Node) -> Self {
        let key = escaped(&node.key, &['=']);
        Self(match &node.value {
            Value::Any => format!("{self}|{key}"),
            Value::Exactly(value) | Value::Pattern(value) => {
                format!("{self}|{key}={}", escaped(value, &[]))
            }
        })
    }

    /// The path as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// `text` without bars, percent signs and what else is given, which are told by their numbers.
fn escaped(text: &str, others: &[char]) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter == '|' || letter == '%' || others.contains(&letter) {
            escaped.push_str(&format!("%{:02X}", u32::from(letter)));
        } else {
            escaped.push(letter);
        }
    }
    escaped
}

/// The name of a header, in the capitals that it is written in.
fn header_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    match HeaderName::from_bytes(name.as_bytes()) {
        Ok(_) => Ok(name),
        Err(_) => Err(D::Error::custom(format!("`{name}` is not the name of a header"))),
    }
}

impl TryFrom<String> for NativePolicy {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (namespace, policy) = text
            .split_once('/')
            .ok_or_else(|| format!("`{text}` is not a policy such as `partner/quota`"))?;
        Ok(Self {
            namespace: Name::try_from(namespace.to_owned())?,
            policy: Name::try_from(policy.to_owned())?,
        })
    }
}

impl From<NativePolicy> for String {
    fn from(NativePolicy { namespace, policy }: NativePolicy) -> Self {
        format!("{}/{}", namespace.as_str(), policy.as_str())
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Default for ResponseHeaders {
    fn default() -> Self {
        let [limit, remaining, reset] =
            ["Limit", "Remaining", "Reset"].map(|what| format!("RateLimit-{what}"));
        Self { limit, remaining, reset }
    }
}

impl Rules {
    /// How many rules there are: nodes that have a limit, or say that they have none.
    #[must_use]
    pub fn count(&self) -> usize {
        fn of(nodes: &[Node]) -> usize {
            nodes.iter().map(|node| usize::from(node.rate_limit.is_some()) + of(&node.nodes)).sum()
        }
        self.domains.values().map(|nodes| of(nodes)).sum()
    }
}

impl Unit {
    /// Every unit.
    pub const ALL: [Self; 7] =
        [Self::Second, Self::Minute, Self::Hour, Self::Day, Self::Week, Self::Month, Self::Year];

    /// How long it is: a month 30 days, a year 365.
    #[must_use]
    pub const fn per(self) -> Duration {
        const HOUR: u64 = 60 * 60;
        Duration::from_secs(match self {
            Self::Second => 1,
            Self::Minute => 60,
            Self::Hour => HOUR,
            Self::Day => 24 * HOUR,
            Self::Week => 7 * 24 * HOUR,
            Self::Month => 30 * 24 * HOUR,
            Self::Year => 365 * 24 * HOUR,
        })
    }

    /// The unit of that name, in any capitals.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|unit| unit.name().eq_ignore_ascii_case(name))
    }

    /// The unit that is so long.
    #[must_use]
    pub fn of(per: Duration) -> Option<Self> {
        Self::ALL.into_iter().find(|unit| unit.per() == per)
    }

    /// Its name, in lower case.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Second => "second",
            Self::Minute => "minute",
            Self::Hour => "hour",
            Self::Day => "day",
            Self::Week => "week",
            Self::Month => "month",
            Self::Year => "year",
        }
    }
}
