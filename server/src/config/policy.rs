//! A policy as operators write it.

use std::{collections::HashSet, fmt, str::FromStr, time::Duration};

use fusebox_core::{
    Concurrency, Kind, Limit, RetryBudget, SlidingWindow, TokenBucket, WindowLimit,
    circuit::Breaker, window::Period,
};
use serde::{Deserialize, Serialize};

use super::{Durability, OnUnreachable, breaker::BreakerFields, duration, hundredths::Percent};
use crate::{
    calendar::{Calendar, Every},
    catalogue::Reserves,
    limits,
};

/// Where the midnights of a calendar window are, if nobody says.
pub(crate) const DEFAULT_TIME_ZONE: &str = "UTC";
/// How long permits live, and requests pay for retries, if nobody says.
pub(crate) const DEFAULT_TTL: Duration = Duration::from_secs(10);
/// Retries for each request, if nobody says: 10,000 is one.
pub(crate) const DEFAULT_RATIO_BASIS_POINTS: u16 = 2_000;
/// Retries that need no requests, if nobody says.
pub(crate) const DEFAULT_MIN_PER_SECOND: u32 = 10;

/// A policy as an operator writes it, its defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PolicyFields", into = "PolicyFields")]
pub enum Policy {
    /// It limits calls.
    Limiter(LimiterPolicy),
    /// It has circuits, which calls go through.
    Breaker(BreakerPolicy),
}

/// A policy that limits calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimiterPolicy {
    /// What judges keys that no override names: 1 to 4 limits.
    pub limits: Vec<LimitSettings>,
    /// What judges others: as many.
    pub overrides: Vec<Override<Vec<LimitSettings>>>,
    /// It only watches.
    pub shadow: bool,
    /// What is kept from callers of a lower priority.
    pub reserves: Reserves,
    /// What clients do while they are alone, if it says so itself.
    pub on_unreachable: Option<OnUnreachable>,
    /// What a crash may forget, if it says so itself.
    pub durability: Option<Durability>,
    /// Most cells.
    pub max_cells: usize,
    /// Tokens that a cell may owe when estimates turn out low; one burst if `None`.
    pub max_debt: Option<u64>,
    /// How long a lease lives.
    pub lease_time: Duration,
    /// Most callers that stand in line at one key.
    pub max_waiting: usize,
}

/// A policy that has circuits, one for each key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BreakerPolicy {
    /// What judges keys that no override names.
    pub breaker: Breaker,
    /// What judges others.
    pub overrides: Vec<Override<Breaker>>,
    /// It says itself that clients allow calls while they are alone, as they do anyway.
    pub allows_unreachable: bool,
    /// Most circuits.
    pub max_circuits: usize,
}

/// What judges some keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judge {
    /// Limits, 1 to 4.
    Limits(Vec<LimitSettings>),
    /// A breaker.
    Breaker(Breaker),
}

/// What an operator says of a policy besides its judges; what is left out has its default.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Besides {
    pub(crate) shadow: bool,
    pub(crate) reserves: Option<Reserves>,
    pub(crate) on_unreachable: Option<OnUnreachable>,
    pub(crate) durability: Option<Durability>,
    pub(crate) max_cells: Option<usize>,
    pub(crate) max_debt: Option<u64>,
    pub(crate) lease_time: Option<Duration>,
    pub(crate) max_waiting: Option<usize>,
}

/// One limit, and the calendar that its windows are counted in, if they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitSettings {
    /// What decides.
    pub limit: Limit,
    /// The calendar of a calendar window.
    pub calendar: Option<Calendar>,
}

/// Another judge of some keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override<J> {
    /// Which.
    pub keys: Keys,
    /// What judges them.
    pub judge: J,
}

/// Which keys something is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Keys {
    /// This one.
    Exactly(String),
    /// Those that begin so.
    Prefixed(String),
}

impl Policy {
    /// A policy of these judges, and of what is said besides.
    ///
    /// # Errors
    /// If something is out of its range, or does not go together; the message names the field.
    pub(crate) fn new(
        own: Judge,
        overrides: Vec<Override<Judge>>,
        besides: Besides,
    ) -> Result<Self, String> {
        match own {
            Judge::Limits(limits) => {
                let overrides = alike(overrides, Judge::limits)?;
                let policy = LimiterPolicy { overrides, ..LimiterPolicy::of(limits, besides) };
                policy.check()?;
                Ok(Self::Limiter(policy))
            }
            Judge::Breaker(breaker) => {
                besides.check_of_breaker()?;
                let overrides = alike(overrides, Judge::breaker)?;
                let max_circuits = besides.max_cells.unwrap_or(limits::POLICY_CIRCUITS);
                let allows_unreachable = besides.on_unreachable.is_some();
                let policy = BreakerPolicy { breaker, overrides, allows_unreachable, max_circuits };
                policy.check()?;
                Ok(Self::Breaker(policy))
            }
        }
    }

    /// The settings that judge a key: those of its own override, else of the longest prefix, else the policy's; no
    /// overrides.
    #[must_use]
    pub fn judging(&self, key: &str) -> Self {
        match self {
            Self::Limiter(policy) => Self::Limiter(LimiterPolicy {
                limits: judge(&policy.overrides, key).unwrap_or(&policy.limits).clone(),
                overrides: Vec::new(),
                ..*policy
            }),
            Self::Breaker(policy) => Self::Breaker(BreakerPolicy {
                breaker: judge(&policy.overrides, key).unwrap_or(&policy.breaker).clone(),
                overrides: Vec::new(),
                ..*policy
            }),
        }
    }

    /// What it limits by; `None` of a breaker.
    #[must_use]
    pub fn limiter(&self) -> Option<&LimiterPolicy> {
        match self {
            Self::Limiter(policy) => Some(policy),
            Self::Breaker(_) => None,
        }
    }
}

impl LimiterPolicy {
    /// A policy of these limits, and the defaults of all else.
    #[must_use]
    pub fn new(limits: Vec<LimitSettings>) -> Self {
        Self::of(limits, Besides::default())
    }

    /// A policy of these limits without overrides.
    fn of(limits: Vec<LimitSettings>, besides: Besides) -> Self {
        let Besides {
            shadow,
            reserves,
            on_unreachable,
            durability,
            max_cells,
            max_debt,
            lease_time,
            max_waiting,
        } = besides;
        Self {
            limits,
            overrides: Vec::new(),
            shadow,
            reserves: reserves.unwrap_or_default(),
            on_unreachable,
            durability,
            max_cells: max_cells.unwrap_or(limits::POLICY_CELLS),
            max_debt,
            lease_time: lease_time.unwrap_or(limits::LEASE_TIME),
            max_waiting: max_waiting.unwrap_or(limits::WAITING_AT_KEY),
        }
    }

    /// Most that a cell of `limit` may owe.
    pub fn max_debt_of(&self, limit: &Limit) -> u64 {
        self.max_debt.unwrap_or_else(|| limit.capacity())
    }

    /// What clients do with keys of its own limits while they are alone. If it does not say: as the strictest of the
    /// limits, which is to deny where a period is an hour or more, or nobody knows how many permits are held.
    pub fn on_unreachable(&self) -> OnUnreachable {
        let default_of = |settings: &LimitSettings| match &settings.limit {
            Limit::RetryBudget(_) => OnUnreachable::Allow,
            Limit::Concurrency(_) => OnUnreachable::Deny,
            _ if settings.calendar.is_some() => OnUnreachable::Deny,
            Limit::TokenBucket(bucket) => default_of_period(bucket.per()),
            Limit::SlidingWindow(window) => default_of_period(window.per()),
            Limit::Window(window) => default_of_period(window.longest()),
        };
        // A retry budget stands alone.
        let denies = |settings| default_of(settings) == OnUnreachable::Deny;
        self.on_unreachable.unwrap_or_else(|| match self.limits.as_slice() {
            [one] => default_of(one),
            several if several.iter().any(denies) => OnUnreachable::Deny,
            _ => OnUnreachable::Local,
        })
    }

    /// Refuses that clients count by themselves what they cannot.
    fn check_on_unreachable(&self) -> Result<(), String> {
        let overrides = self.overrides.iter().flat_map(|one| &one.judge);
        let mut limits = self.limits.iter().chain(overrides);
        let why = |settings: &LimitSettings| match &settings.limit {
            Limit::Concurrency(_) => Some("clients do not know which permits others hold"),
            _ if settings.calendar.is_some() => Some("clients do not know time zones"),
            _ => None,
        };
        match limits.find_map(|limit| Some((limit.kind(), why(limit)?))) {
            Some((kind, why)) if self.on_unreachable == Some(OnUnreachable::Local) => {
                Err(format!("`on_unreachable` is `local` beside a `{kind}`: {why}; deny or allow"))
            }
            _ => Ok(()),
        }
    }

    /// What is wrong with the settings together.
    fn check(&self) -> Result<(), String> {
        self.check_on_unreachable()?;
        if self.max_debt.is_some_and(|debt| debt > limits::TOKENS) {
            return Err("`max_debt` is above 10^12".into());
        }
        if !(1..=limits::CELLS).contains(&self.max_cells) {
            return Err(format!(
                "`max_cells` is {}, outside 1 to {}",
                self.max_cells,
                limits::CELLS
            ));
        }
        if !limits::LEASE_TIMES.contains(&self.lease_time) {
            return Err(format!("`lease_time` is {:?}, outside 100ms to 60s", self.lease_time));
        }
        if self.max_waiting > limits::WAITING_AT_KEY_MOST {
            let most = limits::WAITING_AT_KEY_MOST;
            return Err(format!("`max_waiting` is {}, above {most}", self.max_waiting));
        }
        let Reserves { critical_basis_points, normal_basis_points } = self.reserves;
        if u32::from(critical_basis_points) + u32::from(normal_basis_points) > 10_000 {
            return Err("`reserves` are above 100% together".into());
        }
        check_keys(&self.overrides)
    }
}

/// What clients do while they are alone where a limit counts for so long: what is spent in an hour or more is not
/// back before the server is.
fn default_of_period(period: Duration) -> OnUnreachable {
    if period < limits::UNREACHABLE_LONG { OnUnreachable::Local } else { OnUnreachable::Deny }
}

impl BreakerPolicy {
    /// What is wrong with the settings together.
    fn check(&self) -> Result<(), String> {
        if !(1..=limits::CIRCUITS).contains(&self.max_circuits) {
            let (count, most) = (self.max_circuits, limits::CIRCUITS);
            return Err(format!("`max_cells` is {count}, outside 1 to {most} of a breaker"));
        }
        check_keys(&self.overrides)
    }
}

impl Besides {
    /// Refuses what only limiters have, and says why breakers do not.
    fn check_of_breaker(&self) -> Result<(), String> {
        let refused = [
            (
                self.shadow,
                "shadow",
                "circuits have CIRCUIT_MODE_METRICS_ONLY for that, set by SetCircuitMode",
            ),
            (
                self.reserves.is_some(),
                "reserves",
                "a circuit has nothing that callers could use up, so nothing is kept for any",
            ),
            (
                self.on_unreachable.is_some_and(|does| does != OnUnreachable::Allow),
                "on_unreachable",
                "only `allow`: a client that is alone has a breaker of its own, which acts",
            ),
            (self.durability.is_some(), "durability", "transitions are always durable"),
            (self.max_debt.is_some(), "max_debt", "a circuit charges nothing, so nobody owes it"),
            (
                self.lease_time.is_some(),
                "lease_time",
                "a circuit is not leased: each client has a breaker of its own",
            ),
            (
                self.max_waiting.is_some(),
                "max_waiting",
                "nobody waits for a circuit: who is refused is told so at once",
            ),
        ];
        match refused.into_iter().find(|(said, ..)| *said) {
            Some((_, field, why)) => Err(format!("`{field}` beside a breaker: {why}")),
            None => Ok(()),
        }
    }
}

impl Judge {
    fn limits(self) -> Result<Vec<LimitSettings>, &'static str> {
        match self {
            Self::Limits(limits) => Ok(limits),
            Self::Breaker(_) => Err("a breaker, and the policy is a limiter"),
        }
    }

    fn breaker(self) -> Result<Breaker, &'static str> {
        match self {
            Self::Breaker(breaker) => Ok(breaker),
            Self::Limits(_) => Err("a limiter, and the policy is a breaker"),
        }
    }
}

/// What judges a key instead of the policy's own, if something does.
fn judge<'a, J>(overrides: &'a [Override<J>], key: &str) -> Option<&'a J> {
    let exact = |one: &&Override<J>| matches!(&one.keys, Keys::Exactly(exact) if exact == key);
    let prefix = |one: &'a Override<J>| match &one.keys {
        Keys::Prefixed(prefix) => key.starts_with(prefix.as_str()).then_some((prefix.len(), one)),
        Keys::Exactly(_) => None,
    };
    let longest = || overrides.iter().filter_map(prefix).max_by_key(|(length, _)| *length);
    let found = overrides.iter().find(exact).or_else(|| longest().map(|(_, one)| one));
    found.map(|one| &one.judge)
}

/// Overrides whose judges are all of one kind, which `of` takes.
fn alike<J>(
    overrides: Vec<Override<Judge>>,
    of: impl Fn(Judge) -> Result<J, &'static str>,
) -> Result<Vec<Override<J>>, String> {
    let alike = overrides.into_iter().map(|Override { keys, judge }| match of(judge) {
        Ok(judge) => Ok(Override { keys, judge }),
        Err(other) => Err(format!("`overrides`: {keys}: {other}; both must be the same")),
    });
    alike.collect()
}

/// Refuses overrides that are too many, or whose keys are no keys or not their own.
fn check_keys<J>(overrides: &[Override<J>]) -> Result<(), String> {
    let prefixes = overrides.iter().filter(|one| matches!(one.keys, Keys::Prefixed(_))).count();
    if overrides.len() > limits::OVERRIDES || prefixes > limits::PREFIXES {
        let (most, of_those) = (limits::OVERRIDES, limits::PREFIXES);
        return Err(format!("`overrides`: at most {most}, and {of_those} of them by prefix"));
    }
    let mut seen = HashSet::new();
    for one in overrides {
        let (Keys::Exactly(text) | Keys::Prefixed(text)) = &one.keys;
        if text.len() > limits::KEY_BYTES {
            let most = limits::KEY_BYTES;
            return Err(format!("`overrides`: {} is longer than {most} bytes", one.keys));
        }
        if !seen.insert(&one.keys) {
            return Err(format!("`overrides`: {} is there twice", one.keys));
        }
    }
    Ok(())
}

impl fmt::Display for Policy {
    /// As YAML that parses to the same policy.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_saphyr::to_string(self).map_err(|_| fmt::Error)?)
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        serde_saphyr::from_str(text).map_err(|error| error.to_string())
    }
}

impl fmt::Display for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(key) => write!(f, "key `{key}`"),
            Self::Prefixed(prefix) => write!(f, "prefix `{prefix}`"),
        }
    }
}

impl LimitSettings {
    /// Its name in a configuration.
    pub fn kind(&self) -> &'static str {
        match &self.limit {
            Limit::TokenBucket(_) => "token_bucket",
            Limit::Window(window) => match window.period() {
                Period::Fixed(_) => "fixed_window",
                Period::Calendar(_) => "calendar_window",
            },
            Limit::SlidingWindow(_) => "sliding_window",
            Limit::Concurrency(_) => "concurrency",
            Limit::RetryBudget(_) => "retry_budget",
        }
    }

    /// Whether it may stand beside others: it counts what passes.
    fn is_rate(&self) -> bool {
        !matches!(self.limit, Limit::Concurrency(_) | Limit::RetryBudget(_))
    }
}

/// The same fields, one for each kind of limiter, in several places of a configuration; in the order that they
/// are printed in.
macro_rules! with_kinds {
    (
        struct $name:ident
        { $($(#[$first_attr:meta])* $first:ident: $first_type:ty,)* }
        and { $($(#[$attr:meta])* $field:ident: $type:ty,)* }
    ) => {
        #[derive(Default, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct $name {
            $($(#[$first_attr])* $first: $first_type,)*
            #[serde(skip_serializing_if = "Option::is_none")]
            token_bucket: Option<TokenBucketFields>,
            #[serde(skip_serializing_if = "Option::is_none")]
            sliding_window: Option<PerFields>,
            #[serde(skip_serializing_if = "Option::is_none")]
            fixed_window: Option<PerFields>,
            #[serde(skip_serializing_if = "Option::is_none")]
            calendar_window: Option<CalendarFields>,
            #[serde(skip_serializing_if = "Option::is_none")]
            concurrency: Option<ConcurrencyFields>,
            #[serde(skip_serializing_if = "Option::is_none")]
            retry_budget: Option<RetryBudgetFields>,
            $($(#[$attr])* $field: $type,)*
        }

        impl $name {
            fn kinds(&mut self) -> Kinds {
                Kinds {
                    token_bucket: self.token_bucket.take(),
                    sliding_window: self.sliding_window.take(),
                    fixed_window: self.fixed_window.take(),
                    calendar_window: self.calendar_window.take(),
                    concurrency: self.concurrency.take(),
                    retry_budget: self.retry_budget.take(),
                }
            }

            fn with(mut self, kinds: Kinds) -> Self {
                self.token_bucket = kinds.token_bucket;
                self.sliding_window = kinds.sliding_window;
                self.fixed_window = kinds.fixed_window;
                self.calendar_window = kinds.calendar_window;
                self.concurrency = kinds.concurrency;
                self.retry_budget = kinds.retry_budget;
                self
            }
        }
    };
}

#[derive(Default)]
struct Kinds {
    token_bucket: Option<TokenBucketFields>,
    sliding_window: Option<PerFields>,
    fixed_window: Option<PerFields>,
    calendar_window: Option<CalendarFields>,
    concurrency: Option<ConcurrencyFields>,
    retry_budget: Option<RetryBudgetFields>,
}

with_kinds! {
    struct PolicyFields {} and {
        #[serde(skip_serializing_if = "Option::is_none")]
        breaker: Option<BreakerFields>,
        #[serde(skip_serializing_if = "Option::is_none")]
        limits: Option<Vec<LimitFields>>,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        shadow: bool,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        overrides: Vec<OverrideFields>,
        #[serde(skip_serializing_if = "Option::is_none")]
        reserves: Option<ReservesFields>,
        #[serde(skip_serializing_if = "Option::is_none")]
        on_unreachable: Option<OnUnreachable>,
        #[serde(skip_serializing_if = "Option::is_none")]
        durability: Option<Durability>,
        max_cells: Option<usize>,
        #[serde(skip_serializing_if = "Option::is_none")]
        max_debt: Option<u64>,
        #[serde(default, with = "duration::optional", skip_serializing_if = "Option::is_none")]
        lease_time: Option<Duration>,
        #[serde(skip_serializing_if = "Option::is_none")]
        max_waiting: Option<usize>,
    }
}

with_kinds! {
    struct LimitFields {} and {}
}

with_kinds! {
    struct OverrideFields {
        #[serde(skip_serializing_if = "Option::is_none")]
        key: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        prefix: Option<String>,
    } and {
        #[serde(skip_serializing_if = "Option::is_none")]
        breaker: Option<BreakerFields>,
        #[serde(skip_serializing_if = "Option::is_none")]
        limits: Option<Vec<LimitFields>>,
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenBucketFields {
    limit: u64,
    #[serde(with = "duration")]
    per: Duration,
    burst: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PerFields {
    limit: u64,
    #[serde(with = "duration")]
    per: Duration,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CalendarFields {
    limit: u64,
    every: Every,
    #[serde(default = "default_time_zone")]
    time_zone: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConcurrencyFields {
    limit: u64,
    #[serde(with = "duration", default = "default_ttl")]
    ttl: Duration,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RetryBudgetFields {
    #[serde(default = "default_ratio")]
    ratio: Percent,
    #[serde(default = "default_min_per_second")]
    min_per_second: u32,
    #[serde(with = "duration", default = "default_ttl")]
    ttl: Duration,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReservesFields {
    #[serde(default)]
    critical: Percent,
    #[serde(default)]
    normal: Percent,
}

fn default_time_zone() -> String {
    DEFAULT_TIME_ZONE.into()
}

const fn default_ttl() -> Duration {
    DEFAULT_TTL
}

const fn default_ratio() -> Percent {
    Percent(DEFAULT_RATIO_BASIS_POINTS)
}

const fn default_min_per_second() -> u32 {
    DEFAULT_MIN_PER_SECOND
}

impl Kinds {
    /// The one limit that is there, and why it is none if it is not.
    fn only(self) -> Result<Option<LimitSettings>, String> {
        let Self {
            token_bucket,
            sliding_window,
            fixed_window,
            calendar_window,
            concurrency,
            retry_budget,
        } = self;
        let found = [
            token_bucket.map(TokenBucketFields::limit),
            sliding_window.map(|fields| {
                let window = SlidingWindow::new(fields.limit, fields.per);
                named("sliding_window", window.map(Limit::SlidingWindow))
            }),
            fixed_window.map(|fields| {
                let window = WindowLimit::fixed(fields.limit, fields.per);
                named("fixed_window", window.map(Limit::Window))
            }),
            calendar_window.map(CalendarFields::limit),
            concurrency.map(|fields| {
                let permits = Concurrency::new(fields.limit, fields.ttl);
                named("concurrency", permits.map(Limit::Concurrency))
            }),
            retry_budget.map(RetryBudgetFields::limit),
        ];
        let mut found = found.into_iter().flatten();
        let one = found.next().transpose()?;
        if found.next().is_some() {
            return Err("several limiters: write them as a list, `limits: [{...}, {...}]`".into());
        }
        Ok(one)
    }
}

fn named<E: fmt::Display>(kind: &str, limit: Result<Limit, E>) -> Result<LimitSettings, String> {
    let limit = limit.map_err(|error| format!("`{kind}`: {error}"))?;
    Ok(LimitSettings { limit, calendar: None })
}

impl TokenBucketFields {
    fn limit(self) -> Result<LimitSettings, String> {
        let Self { limit, per, burst } = self;
        let bucket = TokenBucket::new(limit, per, burst.unwrap_or(limit));
        named("token_bucket", bucket.map(Limit::TokenBucket))
    }
}

impl CalendarFields {
    fn limit(self) -> Result<LimitSettings, String> {
        let Self { limit, every, time_zone } = self;
        let calendar = Calendar::new(every, &time_zone);
        let calendar = calendar.map_err(|error| format!("`calendar_window`: {error}"))?;
        let window = WindowLimit::calendar(limit, every.longest());
        let settings = named("calendar_window", window.map(Limit::Window))?;
        Ok(LimitSettings { calendar: Some(calendar), ..settings })
    }
}

impl RetryBudgetFields {
    fn limit(self) -> Result<LimitSettings, String> {
        let Self { ratio: Percent(basis_points), min_per_second, ttl } = self;
        if basis_points % 10 != 0 {
            return Err("`retry_budget`: `ratio` is counted in tenths of a percent".into());
        }
        let budget = RetryBudget::new(basis_points / 10, min_per_second, ttl);
        named("retry_budget", budget.map(Limit::RetryBudget))
    }
}

/// What judges the keys of a policy or an override: a breaker, or limits, written as one or as a list.
fn judge_of(
    one: Option<LimitSettings>,
    list: Option<Vec<LimitFields>>,
    breaker: Option<BreakerFields>,
) -> Result<Judge, String> {
    match breaker {
        None => limits_of(one, list).map(Judge::Limits),
        Some(_) if one.is_some() || list.is_some() => {
            Err("`breaker` beside a limiter: a policy is one of both".into())
        }
        Some(fields) => {
            let breaker = fields.breaker().map_err(|error| format!("`breaker`: {error}"))?;
            Ok(Judge::Breaker(breaker))
        }
    }
}

/// Limits, written as one or as a list.
fn limits_of(
    one: Option<LimitSettings>,
    list: Option<Vec<LimitFields>>,
) -> Result<Vec<LimitSettings>, String> {
    const KINDS: &str =
        "token_bucket, sliding_window, fixed_window, calendar_window, concurrency, retry_budget";
    let limits = match (one, list) {
        (Some(one), None) => return Ok(vec![one]),
        (None, Some(list)) => list,
        (Some(_), Some(_)) => return Err("`limits` beside a limiter: write one of both".into()),
        (None, None) => {
            return Err(format!(
                "a policy needs its limiter, one of {KINDS}; or `limits`, or `breaker`"
            ));
        }
    };
    if limits.is_empty() || limits.len() > limits::LIMITS {
        return Err(format!("`limits` are {}; 1 to {} are needed", limits.len(), limits::LIMITS));
    }
    let read = |mut fields: LimitFields| {
        let limit = fields.kinds().only()?;
        limit.ok_or_else(|| format!("`limits`: an entry needs its limiter, one of {KINDS}"))
    };
    let limits = limits.into_iter().map(read).collect::<Result<Vec<_>, _>>()?;
    match limits.iter().find(|limit| limits.len() > 1 && !limit.is_rate()) {
        Some(limit) => Err(format!("`limits` are of rates and windows, not of `{}`", limit.kind())),
        None => Ok(limits),
    }
}

impl TryFrom<PolicyFields> for Policy {
    type Error = String;

    fn try_from(mut fields: PolicyFields) -> Result<Self, String> {
        let own = judge_of(fields.kinds().only()?, fields.limits, fields.breaker)?;
        let overrides = fields.overrides.into_iter().map(Override::try_from);
        let besides = Besides {
            shadow: fields.shadow,
            reserves: fields.reserves.map(|reserves| Reserves {
                critical_basis_points: reserves.critical.0,
                normal_basis_points: reserves.normal.0,
            }),
            on_unreachable: fields.on_unreachable,
            durability: fields.durability,
            max_cells: fields.max_cells,
            max_debt: fields.max_debt,
            lease_time: fields.lease_time,
            max_waiting: fields.max_waiting,
        };
        Self::new(own, overrides.collect::<Result<_, _>>()?, besides)
    }
}

impl TryFrom<OverrideFields> for Override<Judge> {
    type Error = String;

    fn try_from(mut fields: OverrideFields) -> Result<Self, String> {
        let keys = match (fields.key.take(), fields.prefix.take()) {
            (Some(key), None) => Keys::Exactly(key),
            (None, Some(prefix)) => Keys::Prefixed(prefix),
            _ => return Err("`overrides`: an entry needs either a `key` or a `prefix`".into()),
        };
        let one = fields.kinds().only();
        let judge = one.and_then(|one| judge_of(one, fields.limits, fields.breaker));
        let judge = judge.map_err(|error| format!("`overrides`: {keys}: {error}"))?;
        Ok(Self { keys, judge })
    }
}

impl From<&LimitSettings> for Kinds {
    fn from(settings: &LimitSettings) -> Self {
        let mut kinds = Self::default();
        match (&settings.limit, &settings.calendar) {
            (Limit::TokenBucket(bucket), _) => {
                kinds.token_bucket = Some(TokenBucketFields {
                    limit: bucket.limit(),
                    per: bucket.per(),
                    burst: Some(bucket.burst()),
                });
            }
            (Limit::Window(window), Some(calendar)) => {
                kinds.calendar_window = Some(CalendarFields {
                    limit: window.limit(),
                    every: calendar.every(),
                    time_zone: calendar.time_zone().to_owned(),
                });
            }
            (Limit::Window(window), None) => {
                kinds.fixed_window =
                    Some(PerFields { limit: window.limit(), per: window.longest() });
            }
            (Limit::SlidingWindow(window), _) => {
                kinds.sliding_window = Some(PerFields { limit: window.limit(), per: window.per() });
            }
            (Limit::Concurrency(permits), _) => {
                kinds.concurrency =
                    Some(ConcurrencyFields { limit: permits.limit(), ttl: permits.ttl() });
            }
            (Limit::RetryBudget(budget), _) => {
                kinds.retry_budget = Some(RetryBudgetFields {
                    ratio: Percent(budget.ratio_per_mille() * 10),
                    min_per_second: budget.min_per_second(),
                    ttl: budget.ttl(),
                });
            }
        }
        kinds
    }
}

/// As one limiter if there is one, else as a list.
fn written(limits: &[LimitSettings]) -> (Kinds, Option<Vec<LimitFields>>) {
    match limits {
        [one] => (one.into(), None),
        several => {
            let list = several.iter().map(|one| LimitFields::default().with(one.into())).collect();
            (Kinds::default(), Some(list))
        }
    }
}

impl From<Policy> for PolicyFields {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::Limiter(policy) => (&policy).into(),
            Policy::Breaker(policy) => Self {
                breaker: Some((&policy.breaker).into()),
                overrides: policy.overrides.iter().map(OverrideFields::from).collect(),
                on_unreachable: policy.allows_unreachable.then_some(OnUnreachable::Allow),
                max_cells: Some(policy.max_circuits),
                ..Self::default()
            },
        }
    }
}

impl From<&LimiterPolicy> for PolicyFields {
    fn from(policy: &LimiterPolicy) -> Self {
        let (kinds, limits) = written(&policy.limits);
        let reserves = ReservesFields {
            critical: Percent(policy.reserves.critical_basis_points),
            normal: Percent(policy.reserves.normal_basis_points),
        };
        let fields = Self {
            limits,
            shadow: policy.shadow,
            overrides: policy.overrides.iter().map(OverrideFields::from).collect(),
            reserves: (policy.reserves != Reserves::default()).then_some(reserves),
            on_unreachable: policy.on_unreachable,
            durability: policy.durability,
            max_cells: Some(policy.max_cells),
            max_debt: policy.max_debt,
            lease_time: Some(policy.lease_time),
            max_waiting: Some(policy.max_waiting),
            ..Self::default()
        };
        fields.with(kinds)
    }
}

impl From<&Override<Vec<LimitSettings>>> for OverrideFields {
    fn from(one: &Override<Vec<LimitSettings>>) -> Self {
        let (kinds, limits) = written(&one.judge);
        Self { limits, ..Self::of(&one.keys) }.with(kinds)
    }
}

impl From<&Override<Breaker>> for OverrideFields {
    fn from(one: &Override<Breaker>) -> Self {
        Self { breaker: Some((&one.judge).into()), ..Self::of(&one.keys) }
    }
}

impl OverrideFields {
    /// Of these keys, without a judge.
    fn of(keys: &Keys) -> Self {
        let (key, prefix) = match keys.clone() {
            Keys::Exactly(key) => (Some(key), None),
            Keys::Prefixed(prefix) => (None, Some(prefix)),
        };
        Self { key, prefix, ..Self::default() }
    }
}
