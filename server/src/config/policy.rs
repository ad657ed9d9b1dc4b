//! A policy as operators write it.

use std::{collections::HashSet, fmt, str::FromStr, time::Duration};

use fusebox_core::{
    Concurrency, Kind, Limit, RetryBudget, SlidingWindow, TokenBucket, WindowLimit, window::Period,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::{Durability, duration};
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
pub struct Policy {
    /// What judges keys that no override names: 1 to 4 limits.
    pub limits: Vec<LimitSettings>,
    /// What judges others.
    pub overrides: Vec<Override>,
    /// It only watches.
    pub shadow: bool,
    /// What is kept from callers of a lower priority.
    pub reserves: Reserves,
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

/// One limit, and the calendar that its windows are counted in, if they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitSettings {
    /// What decides.
    pub limit: Limit,
    /// The calendar of a calendar window.
    pub calendar: Option<Calendar>,
}

/// Limits of some keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    /// Which.
    pub keys: Keys,
    /// Their limits, 1 to 4.
    pub limits: Vec<LimitSettings>,
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
    /// A policy of these limits, and the defaults of all else.
    pub fn new(limits: Vec<LimitSettings>) -> Self {
        Self {
            limits,
            overrides: Vec::new(),
            shadow: false,
            reserves: Reserves::default(),
            durability: None,
            max_cells: limits::POLICY_CELLS,
            max_debt: None,
            lease_time: limits::LEASE_TIME,
            max_waiting: limits::WAITING_AT_KEY,
        }
    }

    /// Most that a cell of `limit` may owe.
    pub fn max_debt_of(&self, limit: &Limit) -> u64 {
        self.max_debt.unwrap_or_else(|| limit.capacity())
    }

    /// What is wrong with the settings together.
    ///
    /// # Errors
    /// If something is; the message names the field.
    pub fn check(&self) -> Result<(), String> {
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
        self.check_overrides()
    }

    fn check_overrides(&self) -> Result<(), String> {
        let overrides = &self.overrides;
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
        limits: Option<Vec<LimitFields>>,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        shadow: bool,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        overrides: Vec<OverrideFields>,
        #[serde(skip_serializing_if = "Option::is_none")]
        reserves: Option<ReservesFields>,
        #[serde(skip_serializing_if = "Option::is_none")]
        durability: Option<Durability>,
        max_cells: Option<usize>,
        #[serde(skip_serializing_if = "Option::is_none")]
        max_debt: Option<u64>,
        #[serde(default, with = "duration::optional")]
        lease_time: Option<Duration>,
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

/// A share, in basis points: 10,000 is all. Written as `20%` or `12.5%`.
#[derive(Clone, Copy, Default, PartialEq)]
struct Percent(u16);

impl Serialize for Percent {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match (self.0 / 100, self.0 % 100) {
            (whole, 0) => s.collect_str(&format_args!("{whole}%")),
            (whole, part) => s.collect_str(&format_args!("{whole}.{part:02}%")),
        }
    }
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let parse = || {
            let (whole, part) = text
                .strip_suffix('%')
                .map(|number| number.trim().split_once('.').unwrap_or((number.trim(), "")))?;
            let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
            if whole.is_empty() || !digits(whole) || !digits(part) || part.len() > 2 {
                return None;
            }
            let part = format!("{part:0<2}").parse::<u16>().ok()?;
            let basis_points = whole.parse::<u16>().ok()?.checked_mul(100)?.checked_add(part)?;
            (basis_points <= 10_000).then_some(Self(basis_points))
        };
        parse().ok_or_else(|| {
            D::Error::custom(format!("`{text}` is not a share of 0% to 100%, such as 20% or 12.5%"))
        })
    }
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

/// The limits of a policy or an override, written as one or as a list.
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
            return Err(format!("a policy needs its limiter, one of {KINDS}; or `limits`"));
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
        let limits = limits_of(fields.kinds().only()?, fields.limits)?;
        let mut policy = Self::new(limits);
        policy.shadow = fields.shadow;
        policy.durability = fields.durability;
        policy.max_debt = fields.max_debt;
        if let Some(reserves) = fields.reserves {
            policy.reserves = Reserves {
                critical_basis_points: reserves.critical.0,
                normal_basis_points: reserves.normal.0,
            };
        }
        policy.max_cells = fields.max_cells.unwrap_or(policy.max_cells);
        policy.lease_time = fields.lease_time.unwrap_or(policy.lease_time);
        policy.max_waiting = fields.max_waiting.unwrap_or(policy.max_waiting);
        for one in fields.overrides {
            policy.overrides.push(one.try_into()?);
        }
        policy.check()?;
        Ok(policy)
    }
}

impl TryFrom<OverrideFields> for Override {
    type Error = String;

    fn try_from(mut fields: OverrideFields) -> Result<Self, String> {
        let keys = match (fields.key.take(), fields.prefix.take()) {
            (Some(key), None) => Keys::Exactly(key),
            (None, Some(prefix)) => Keys::Prefixed(prefix),
            _ => return Err("`overrides`: an entry needs either a `key` or a `prefix`".into()),
        };
        let limits = fields.kinds().only().and_then(|one| limits_of(one, fields.limits));
        let limits = limits.map_err(|error| format!("`overrides`: {keys}: {error}"))?;
        Ok(Self { keys, limits })
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

impl From<&Override> for OverrideFields {
    fn from(one: &Override) -> Self {
        let (kinds, limits) = written(&one.limits);
        let (key, prefix) = match one.keys.clone() {
            Keys::Exactly(key) => (Some(key), None),
            Keys::Prefixed(prefix) => (None, Some(prefix)),
        };
        Self { key, prefix, limits, ..Self::default() }.with(kinds)
    }
}
