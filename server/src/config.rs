//! The configuration: parsed once, at the edge, into what cannot be wrong.

mod breaker;
mod difference;
pub mod envoy;
mod hundredths;
mod policy;

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_saphyr::{DefaultMessageFormatter, MessageFormatter};
use thiserror::Error;

pub(crate) use self::duration::shown as shown_duration;
pub(crate) use self::{
    breaker::{
        BackoffFields, BreakerFields, DEFAULT_SLOW_RATE, HalfOpenFields, RampFields, SlowCallFields,
    },
    hundredths::{Factor, Percent},
    policy::{
        Besides, DEFAULT_MIN_PER_SECOND, DEFAULT_RATIO_BASIS_POINTS, DEFAULT_TIME_ZONE, DEFAULT_TTL,
    },
};
pub use self::{
    difference::{Difference, difference},
    policy::{BreakerPolicy, Judge, Keys, LimitSettings, LimiterPolicy, Override, Policy},
};
use crate::limits;

/// Policies by namespace.
pub type Namespaces = BTreeMap<Name, Namespace>;

/// All settings of a server; what a file leaves out has its default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where gRPC is served.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Where `/metrics`, `/livez` and `/readyz` are served.
    #[serde(default = "default_ops_listen")]
    pub ops_listen: SocketAddr,
    /// How long calls in flight may take to finish after SIGTERM.
    #[serde(
        default = "default_drain_timeout",
        deserialize_with = "drain_timeout",
        serialize_with = "duration::serialize"
    )]
    pub drain_timeout: Duration,
    /// Where state is kept.
    #[serde(default)]
    pub storage: Storage,
    /// What is limited.
    #[serde(default, deserialize_with = "bounded")]
    pub namespaces: Namespaces,
    /// Rules of Envoy's rate limit service; without them it is not served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envoy_ratelimit: Option<envoy::EnvoyRatelimit>,
}

/// Where state is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Storage {
    /// What keeps it.
    pub engine: Engine,
    /// The data directory; not used by engine `memory`.
    pub path: PathBuf,
    /// What a crash may forget, where a policy does not say; not used by engine `memory`.
    pub durability: Durability,
}

/// What keeps state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// A sled database in the data directory.
    #[default]
    Sled,
    /// Nothing: a restart starts full.
    Memory,
}

/// What a crash may forget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Nothing that was admitted: it is on disk before anybody is told.
    #[default]
    Strict,
    /// What was charged since the last write to disk, [`limits::RELAXED_INTERVAL`] earlier: the whole burst
    /// of a key, if that is how long it took. In return nobody waits for a disk.
    Relaxed,
}

/// What a client does while it cannot reach the server, and no lease covers a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnUnreachable {
    /// It denies: the only one that keeps the limit.
    Deny,
    /// It counts by itself, by its share of the limit.
    Local,
    /// It allows, without a bound.
    Allow,
}

/// The policies of one tenant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Namespace {
    /// Policies by name.
    #[serde(default)]
    pub policies: BTreeMap<Name, Policy>,
}

/// Name of a namespace or a policy: `[a-z][a-z0-9_-]{0,62}`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Name(String);

/// Why a configuration is not one.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {cause}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        cause: io::Error,
    },
    /// The file is not a configuration.
    #[error("{path}{place}: {field}{message}")]
    Invalid {
        /// The file.
        path: String,
        /// Line and column, if known.
        place: Place,
        /// The field, if known, from the top: `namespaces.demo.policies`.
        field: Field,
        /// What is wrong, and the line that it is in.
        message: String,
    },
    /// An address that anyone can reach, without a word that this is meant.
    #[error(
        "`{setting}` is {address}, which others can reach, and there is no TLS or authentication yet: \
         anyone there could spend your quotas. Listen on 127.0.0.1, or say --insecure"
    )]
    Exposed {
        /// The setting.
        setting: &'static str,
        /// Its address.
        address: SocketAddr,
    },
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read or is not a configuration; the message names file, line and field.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let text = read(path).map_err(|cause| ConfigError::Read { path: shown.clone(), cause })?;
        Self::parse(&shown, &text)
    }

    /// Parses a file that is already read; `path` is what messages call it.
    ///
    /// # Errors
    /// If it is not a configuration.
    pub fn parse(path: &str, text: &str) -> Result<Self, ConfigError> {
        let mut field = String::new();
        let parsed = serde_saphyr::with_deserializer_from_str(text, |deserializer| {
            serde_path_to_error::deserialize(deserializer).map_err(|error| {
                field = error.path().to_string();
                error.into_inner()
            })
        });
        let config: Self = parsed.map_err(|error| {
            let place = Place(error.location().map(|place| (place.line(), place.column())));
            let message = format!("{}{}", what_is_wrong(&error), place.shown_in(text));
            let field = Field(Some(field).filter(|path| !path.is_empty() && path != "."));
            ConfigError::Invalid { path: path.to_owned(), place, field, message }
        })?;
        let rules = config.envoy_ratelimit.as_ref();
        if let Some((field, message)) = rules.and_then(|rules| rules.misjudged(&config.namespaces))
        {
            let (path, place, field) = (path.to_owned(), Place(None), Field(Some(field)));
            return Err(ConfigError::Invalid { path, place, field, message });
        }
        Ok(config)
    }

    /// What is probably not meant, though it is no mistake.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let rules = self.envoy_ratelimit.iter();
        rules.flat_map(|rules| rules.notes(&self.namespaces)).collect()
    }

    /// What is served when no file is named: the namespace `demo`.
    ///
    /// # Errors
    /// Never: a test parses it.
    pub fn demo() -> Result<Self, ConfigError> {
        Self::parse("demo.yaml", include_str!("demo.yaml"))
    }

    /// Refuses an address that others can reach, unless `insecure` says that this is meant.
    ///
    /// # Errors
    /// [`ConfigError::Exposed`].
    pub fn check_exposure(&self, insecure: bool) -> Result<(), ConfigError> {
        for (setting, address) in [("listen", self.listen), ("ops_listen", self.ops_listen)] {
            if !address.ip().is_loopback() && !insecure {
                return Err(ConfigError::Exposed { setting, address });
            }
        }
        Ok(())
    }
}

impl fmt::Display for Config {
    /// As YAML that parses to the same configuration.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_saphyr::to_string(self).map_err(|_| fmt::Error)?)
    }
}

impl Default for Storage {
    fn default() -> Self {
        Self {
            engine: Engine::default(),
            path: PathBuf::from("./fusebox-data"),
            durability: Durability::default(),
        }
    }
}

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let starts = name.starts_with(|first: char| first.is_ascii_lowercase());
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c);
        if starts && name.len() <= limits::NAME_BYTES && name.chars().all(allowed) {
            Ok(Self(name))
        } else {
            Err(format!(
                "`{name}` is not a name: a lower-case letter, then at most {} of a-z, 0-9, _ and -",
                limits::NAME_BYTES - 1
            ))
        }
    }
}

/// A place in a file, if known: line and column, from 1.
#[derive(Clone, Copy, Debug)]
pub struct Place(Option<(u64, u64)>);

/// The path of a field, if known.
#[derive(Clone, Debug)]
pub struct Field(Option<String>);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |(line, column)| write!(f, ":{line}:{column}"))
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |path| write!(f, "`{path}`: "))
    }
}

impl Place {
    /// The line, or the part of a long one that the column is in, with an arrow below it.
    fn shown_in(self, text: &str) -> String {
        let shown = self.0.and_then(|(number, column)| {
            let line = text.lines().nth(usize::try_from(number).ok()?.checked_sub(1)?)?;
            let column = usize::try_from(column).ok()?.checked_sub(1)?;
            let before = column.saturating_sub(limits::SHOWN_LETTERS / 2);
            let line: String = line.chars().skip(before).take(limits::SHOWN_LETTERS).collect();
            let indent = " ".repeat(column - before);
            let margin = " ".repeat(number.to_string().len());
            Some(format!("\n{number} | {line}\n{margin} | {indent}^"))
        });
        shown.unwrap_or_default()
    }
}

fn what_is_wrong(error: &serde_saphyr::Error) -> String {
    match error.without_snippet() {
        serde_saphyr::Error::InvalidScalar { ty: "u64", .. } => {
            "not a whole number of 0 or more".to_owned()
        }
        error => {
            let words = DefaultMessageFormatter.format_message(error);
            // Advice for those who write parsers, not configurations.
            let words = words.split(", set DuplicateKeyPolicy").next().unwrap_or_default();
            let words = words.split("; use from_str_multiple").next().unwrap_or_default();
            words.replace(
                "invalid socket address syntax",
                "not an IP address and a port, such as 127.0.0.1:3873",
            )
        }
    }
}

/// The text of a file that is not too large, also of one that does not know its size.
fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(limits::CONFIG_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > limits::CONFIG_BYTES {
        let message = format!("more than {} bytes", limits::CONFIG_BYTES);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(text)
}

/// A duration, and not too long a one.
fn drain_timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let timeout = duration::deserialize(deserializer)?;
    if timeout > limits::DRAIN {
        let most = humantime::format_duration(limits::DRAIN);
        return Err(D::Error::custom(format!("a drain lasts at most {most}")));
    }
    Ok(timeout)
}

/// Namespaces, and not too many policies in them.
fn bounded<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Namespaces, D::Error> {
    let namespaces = Namespaces::deserialize(deserializer)?;
    let policies: usize = namespaces.values().map(|namespace| namespace.policies.len()).sum();
    if policies > limits::POLICIES {
        return Err(D::Error::custom(format!(
            "{policies} policies, and a server holds at most {}",
            limits::POLICIES
        )));
    }
    Ok(namespaces)
}

const fn default_listen() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 3873)
}

const fn default_ops_listen() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 3874)
}

const fn default_drain_timeout() -> Duration {
    Duration::from_secs(10)
}

/// Durations as people write them: `250ms`, `10s`, `1h 30m`.
mod duration {
    use super::{Deserialize, Deserializer, Duration, Serializer};
    use serde::de::Error as _;

    const UNITS: [&str; 8] = ["ns", "us", "ms", "s", "m", "h", "d", "w"];

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(d)?;
        // Months and years have no one length, and a slip of the key makes a minute (m) a month (M).
        let known = |unit: &str| UNITS.contains(&unit) || unit.is_empty();
        let units = text.split(|c: char| c.is_ascii_digit() || c.is_whitespace());
        let parsed = humantime::parse_duration(&text).ok().filter(|_| units.clone().all(known));
        parsed.ok_or_else(|| {
            let units = UNITS.join(", ");
            D::Error::custom(format!(
                "`{text}` is not a duration such as 250ms, 10s or 1h 30m; units are {units}"
            ))
        })
    }

    /// In the units that are read: humantime itself writes months and years.
    pub(crate) fn shown(duration: Duration) -> String {
        const DAY: u64 = 24 * 60 * 60;
        let (days, seconds) = (duration.as_secs() / DAY, duration.as_secs() % DAY);
        let rest = Duration::new(seconds, duration.subsec_nanos());
        match (days, rest.is_zero()) {
            (0, _) => humantime::format_duration(rest).to_string(),
            (days, true) => format!("{days}d"),
            (days, false) => format!("{days}d {}", humantime::format_duration(rest)),
        }
    }

    pub(super) fn serialize<S: Serializer>(duration: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&shown(*duration))
    }

    /// One that may be left out.
    pub(super) mod optional {
        use super::{Deserializer, Duration, Serializer};

        pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
            d: D,
        ) -> Result<Option<Duration>, D::Error> {
            super::deserialize(d).map(Some)
        }

        pub(in crate::config) fn serialize<S: Serializer>(
            duration: &Option<Duration>,
            s: S,
        ) -> Result<S::Ok, S::Error> {
            match duration {
                Some(duration) => super::serialize(duration, s),
                None => s.serialize_none(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use fusebox_core::circuit::Settings;

    use super::*;

    fn policies(text: &str) -> String {
        format!("namespaces:\n  demo:\n    policies:\n      api: {text}\n")
    }

    #[test]
    fn the_demo_is_the_one_that_the_papers_show() {
        let demo = Config::demo().unwrap();
        let policies: Vec<_> = demo
            .namespaces
            .iter()
            .flat_map(|(namespace, policies)| {
                policies.policies.keys().map(move |name| (namespace.as_str(), name.as_str()))
            })
            .collect();
        let shown = ["api", "connections", "jobs", "payments", "retries", "signup"];
        assert_eq!(policies, shown.map(|name| ("demo", name)));
        assert_eq!((demo.listen, demo.ops_listen), (default_listen(), default_ops_listen()));
        demo.check_exposure(false).unwrap();
    }

    #[test]
    fn the_example_that_operators_copy_shows_the_defaults() {
        let example =
            Config::parse("fusebox.yaml", include_str!("../../deploy/fusebox.yaml")).unwrap();
        let defaults = Config::parse("empty.yaml", "namespaces: {}").unwrap();
        assert_eq!(example.namespaces.len(), 1);
        let namespaces = example.namespaces.clone();
        assert_eq!(example, Config { namespaces, ..defaults });
    }

    #[test]
    fn the_example_has_every_setting_of_a_policy_and_says_its_default() {
        let text = include_str!("../../deploy/fusebox.yaml");
        let example = Config::parse("fusebox.yaml", text).unwrap();
        let policies: Vec<_> =
            example.namespaces.values().flat_map(|namespace| namespace.policies.values()).collect();
        let limiters: Vec<_> = policies.iter().filter_map(|policy| policy.limiter()).collect();
        let kinds = limiters.iter().flat_map(|policy| &policy.limits).map(LimitSettings::kind);
        assert_eq!(kinds.collect::<std::collections::BTreeSet<_>>().len(), 6);
        // What an unknown field is told are all that there are.
        for unknown in [
            "{nothing: 0}",
            "{breaker: {nothing: 0}}",
            "{breaker: {backoff: {nothing: 0}}}",
            "{breaker: {half_open: {nothing: 0}}}",
        ] {
            let unknown = Config::parse("a.yaml", &self::policies(unknown)).unwrap_err();
            let unknown = unknown.to_string();
            let (_, expected) = unknown.split_once("expected one of ").unwrap();
            for setting in expected.lines().next().unwrap().split(", ") {
                let setting = setting.trim().trim_matches('`');
                assert!(text.contains(&format!(" {setting}:")), "{setting} of {expected}");
            }
        }
        let breaker = policies.iter().find_map(|policy| match policy {
            Policy::Breaker(policy) => Some(policy),
            Policy::Limiter(_) => None,
        });
        let BreakerPolicy { breaker, max_circuits, .. } = breaker.unwrap();
        assert_eq!(breaker.slow_call.unwrap().rate, DEFAULT_SLOW_RATE.into());
        let breaker = Settings { slow_call: None, ..(**breaker).clone() };
        assert_eq!((breaker, *max_circuits), (Settings::default(), limits::POLICY_CIRCUITS));
        let default = LimiterPolicy::new(limiters[0].limits.clone());
        for policy in limiters {
            assert_eq!(policy.shadow, default.shadow);
            assert_eq!(policy.max_cells, default.max_cells);
            assert_eq!(policy.lease_time, default.lease_time);
            assert_eq!(policy.max_waiting, default.max_waiting);
        }
    }

    #[test]
    fn what_is_printed_parses_to_the_same() {
        let text = "drain_timeout: 1m 30s\nstorage: {engine: memory}\n".to_owned()
            + &policies("{token_bucket: {limit: 7, per: 90s}, max_debt: 0}");
        let config = Config::parse("a.yaml", &text).unwrap();
        assert_eq!(Config::parse("b.yaml", &config.to_string()).unwrap(), config);
        assert!(config.to_string().contains("burst: 7"), "with its defaults: {config}");
    }

    #[test]
    fn every_setting_of_a_policy_is_printed_as_it_is_read() {
        for policy in [
            "{sliding_window: {limit: 20, per: 2s}, shadow: true}",
            "{fixed_window: {limit: 100, per: 30d}, max_cells: 5, max_waiting: 0}",
            "{calendar_window: {limit: 9, every: month, time_zone: Europe/Vienna}}",
            "{concurrency: {limit: 64}, durability: relaxed, lease_time: 250ms}",
            "{concurrency: {limit: 64}, on_unreachable: allow}",
            "{token_bucket: {limit: 1, per: 1d}, on_unreachable: local}",
            "{breaker: {}, on_unreachable: allow}",
            "{retry_budget: {}}",
            "{retry_budget: {ratio: 12.5%, min_per_second: 0, ttl: 1m}}",
            "{limits: [{token_bucket: {limit: 1, per: 1s}}, {fixed_window: {limit: 9, per: 1d}}], \
             reserves: {critical: 20%, normal: 0.01%}}",
            "{token_bucket: {limit: 1, per: 1s}, overrides: [{key: '', concurrency: {limit: 1}}, \
             {prefix: batch/, limits: [{sliding_window: {limit: 1, per: 1h}}]}]}",
        ] {
            let config = Config::parse("a.yaml", &policies(policy)).unwrap();
            let printed = config.to_string();
            assert_eq!(Config::parse("b.yaml", &printed).unwrap(), config, "{policy}: {printed}");
        }
    }

    #[test]
    fn what_clients_do_alone_is_by_default_as_their_limits_need_it() {
        use OnUnreachable::{Allow, Deny, Local};
        for (policy, key, does) in [
            ("{token_bucket: {limit: 1, per: 59m}}", "", Local),
            ("{token_bucket: {limit: 1, per: 1h}}", "", Deny),
            ("{sliding_window: {limit: 1, per: 1h}}", "", Deny),
            ("{fixed_window: {limit: 1, per: 1m}}", "", Local),
            ("{fixed_window: {limit: 1, per: 1d}}", "", Deny),
            ("{fixed_window: {limit: 1, per: 1d}, on_unreachable: local}", "", Local),
            ("{calendar_window: {limit: 1, every: day}}", "", Deny),
            ("{concurrency: {limit: 1}}", "", Deny),
            ("{retry_budget: {}}", "", Allow),
            (
                "{limits: [{token_bucket: {limit: 1, per: 1s}}, {fixed_window: {limit: 9, per: 1d}}]}",
                "",
                Deny,
            ),
            (
                "{limits: [{token_bucket: {limit: 1, per: 1s}}, {fixed_window: {limit: 9, per: 1m}}]}",
                "",
                Local,
            ),
            (
                "{token_bucket: {limit: 1, per: 1s}, overrides: [{key: a, concurrency: {limit: 1}}]}",
                "a",
                Deny,
            ),
            (
                "{token_bucket: {limit: 1, per: 1s}, overrides: [{key: a, concurrency: {limit: 1}}]}",
                "b",
                Local,
            ),
        ] {
            let policy: Policy = policy.parse().unwrap();
            let judging = policy.judging(key);
            assert_eq!(judging.limiter().unwrap().on_unreachable(), does, "{policy}, key `{key}`");
        }
    }

    #[test]
    fn a_key_is_judged_by_its_own_override_then_by_the_longest_prefix() {
        let policy: Policy = "{token_bucket: {limit: 1, per: 1s}, max_waiting: 5, overrides: [\
            {key: ab, token_bucket: {limit: 2, per: 1s}}, {prefix: a, token_bucket: {limit: 3, per: 1s}}, \
            {prefix: abc, token_bucket: {limit: 4, per: 1s}}]}"
            .parse()
            .unwrap();
        for (key, limit) in [("", 1), ("b", 1), ("ab", 2), ("aa", 3), ("abd", 3), ("abcd", 4)] {
            let alone = format!("{{token_bucket: {{limit: {limit}, per: 1s}}, max_waiting: 5}}");
            assert_eq!(policy.judging(key), alone.parse().unwrap(), "{key}");
        }
    }

    #[test]
    fn durations_are_written_in_the_units_that_are_read() {
        for per in ["1ns", "1us", "90s", "36h", "31d", "366d", "1d 1ns", "2w"] {
            let text = policies(&format!("{{token_bucket: {{limit: 1, per: {per}}}}}"));
            let config = Config::parse("a.yaml", &text).unwrap();
            assert_eq!(Config::parse("b.yaml", &config.to_string()).unwrap(), config, "{per}");
        }
    }

    #[test]
    fn a_mistake_is_told_by_file_line_and_field() {
        let api = |text| policies(text);
        let long = format!("{{ns{}: {{}}}}", "x".repeat(62));
        for (text, place, field, words) in [
            ("listen: here".into(), "1:9", "listen", "an IP address and a port"),
            ("lisen: 127.0.0.1:1".into(), "1:1", "lisen", "unknown field `lisen`"),
            ("drain_timeout: 11m".into(), "1:16", "drain_timeout", "at most 10m"),
            ("storage: {engine: redis}".into(), "1:19", "storage.engine", "redis"),
            ("storage: {durability: lax}".into(), "1:23", "storage.durability", "unknown variant"),
            ("namespaces: {Demo: {}}".into(), "1:14", "namespaces.Demo", "not a name"),
            (format!("namespaces: {long}"), "1:14", "namespaces.nsx", "not a name"),
            (api("{}"), "4:12", "api", "needs its limiter"),
            (api("{tokenbucket: {}}"), "4:13", "api", "unknown field `tokenbucket`"),
            (api("{token_bucket: {limit: 1}}"), "4:", "api.token_bucket", "missing field `per`"),
            (api("{token_bucket: {limit: -1, per: 1s}}"), "4:35", "limit", "not a whole number"),
            (api("{token_bucket: {limit: 1, per: 1x}}"), "4:43", "per", "`1x` is not a duration"),
            (api("{token_bucket: {limit: 1, per: 1M}}"), "4:43", "per", "`1M` is not a duration"),
            (api("{token_bucket: {limit: 1, per: 400d}}"), "4:", "api", "`per` is"),
            (api("{token_bucket: {limit: 1, per: 1s, burst: 0}}"), "4:", "api", "`burst` is 0"),
            (api("{token_bucket: {limit: 0, per: 1s, burst: 1}}"), "4:", "api", "denies all"),
            (
                api("{token_bucket: {limit: 1, per: 1s}, max_debt: 1000000000001}"),
                "4:",
                "api",
                "`max_debt`",
            ),
            (api("{token_bucket: {limit: 1, per: 1s}, dark: true}"), "4:48", "api.dark", "`dark`"),
            (api("{token_bucket: {limit: 1, per: 1s, limit: 2}}"), "4:", "limit", "duplicate"),
        ] {
            let error = Config::parse("some.yaml", &text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("some.yaml:{place}")), "{place}: {error}");
            let (first, _) = error.split_once('\n').unwrap();
            assert!(first.contains(field) && first.contains(words), "{field}, {words}: {error}");
        }
    }

    /// What is wrong with a policy, in a word of the message.
    fn assert_wrong(mistakes: &[(&str, &str)]) {
        for (policy, words) in mistakes {
            let error = Config::parse("some.yaml", &policies(policy)).unwrap_err().to_string();
            let (first, _) = error.split_once('\n').unwrap();
            assert!(first.starts_with("some.yaml:4:"), "{policy}: {error}");
            let field = first.split('`').nth(1).unwrap();
            assert!(field.starts_with("namespaces.demo.policies.api"), "{policy}: {error}");
            assert!(first.contains(words), "{policy}, {words}: {error}");
        }
    }

    #[test]
    fn a_mistake_in_a_kind_of_limiter_is_told() {
        assert_wrong(&[
            ("{sliding_window: {limit: 1}}", "missing field `per`"),
            ("{sliding_window: {limit: 1, per: 0s}}", "`sliding_window`: `per` is 0"),
            ("{sliding_window: {limit: 1, per: 367d}}", "`sliding_window`: `per` is"),
            ("{sliding_window: {limit: 4294967296, per: 1s}}", "above 4294967295"),
            ("{sliding_window: {limit: 1, per: 1s, burst: 1}}", "unknown field `burst`"),
            ("{fixed_window: {per: 1h}}", "missing field `limit`"),
            ("{fixed_window: {limit: 1, per: 0s}}", "`fixed_window`: `per` is 0"),
            ("{fixed_window: {limit: 1000000000001, per: 1h}}", "above 10^12"),
            ("{fixed_window: {limit: many, per: 1h}}", "not a whole number"),
            ("{calendar_window: {limit: 1}}", "missing field `every`"),
            ("{calendar_window: {limit: 1, every: hour}}", "`hour`"),
            ("{calendar_window: {limit: 1, every: day, time_zone: Mars/Base}}", "`Mars/Base`"),
            ("{calendar_window: {limit: 1000000000001, every: day}}", "above 10^12"),
            ("{concurrency: {ttl: 10s}}", "missing field `limit`"),
            ("{concurrency: {limit: 1, ttl: 99ms}}", "`concurrency`: `ttl` is 99ms"),
            ("{concurrency: {limit: 1, ttl: 25h}}", "`concurrency`: `ttl` is"),
            ("{concurrency: {limit: 1000000000001}}", "above 10^12"),
            ("{retry_budget: {ratio: 20}}", "is not a share of 0% to 100%"),
            ("{retry_budget: {ratio: 101%}}", "`101%` is not a share"),
            ("{retry_budget: {ratio: 0.05%}}", "tenths of a percent"),
            ("{retry_budget: {min_per_second: -1}}", "min_per_second"),
            ("{retry_budget: {ttl: 0s}}", "`retry_budget`: `ttl` is"),
        ]);
    }

    #[test]
    fn a_mistake_in_a_setting_of_a_policy_is_told() {
        let with = |setting: &str| format!("{{fixed_window: {{limit: 9, per: 1h}}, {setting}}}");
        for (setting, words) in [
            ("shadow: maybe", "shadow"),
            ("max_cells: 0", "`max_cells` is 0, outside 1 to 10000000"),
            ("max_cells: 10000001", "`max_cells` is 10000001, outside"),
            ("lease_time: 99ms", "`lease_time` is 99ms, outside 100ms to 60s"),
            ("lease_time: 61s", "`lease_time` is 61s"),
            ("lease_time: soon", "`soon` is not a duration"),
            ("max_waiting: 10001", "`max_waiting` is 10001, above 10000"),
            ("durability: lax", "unknown variant"),
            ("reserves: {critical: 60%, normal: 40.01%}", "above 100% together"),
            ("reserves: {critical: 20}", "`20` is not a share of 0% to 100%"),
            ("reserves: {bulk: 20%}", "unknown field `bulk`"),
            ("token_bucket: {limit: 1, per: 1s}", "several limiters: write them as a list"),
            ("limits: []", "`limits` beside a limiter"),
            ("overrides: {key: vip}", "overrides"),
            ("overrides: [{fixed_window: {limit: 1, per: 1h}}]", "a `key` or a `prefix`"),
            ("overrides: [{key: a, prefix: a, concurrency: {limit: 1}}]", "either a `key` or"),
            ("overrides: [{key: vip}]", "`overrides`: key `vip`: a policy needs its limiter"),
            ("overrides: [{prefix: b, concurrency: {limit: 1, ttl: 0s}}]", "prefix `b`: `conc"),
            ("overrides: [{key: a, shadow: true}]", "unknown field `shadow`"),
            ("on_unreachable: guess", "unknown variant `guess`"),
            (
                "on_unreachable: local, overrides: [{key: a, calendar_window: {limit: 1, every: day}}]",
                "`on_unreachable` is `local` beside a `calendar_window`: clients do not know time zones",
            ),
            (
                "on_unreachable: local, overrides: [{key: a, concurrency: {limit: 1}}]",
                "beside a `concurrency`: clients do not know which permits others hold",
            ),
            (
                "overrides: [{key: a, concurrency: {limit: 1}}, {key: a, concurrency: {limit: 2}}]",
                "`overrides`: key `a` is there twice",
            ),
        ] {
            assert_wrong(&[(&with(setting), words)]);
        }
        let long = format!("overrides: [{{key: {}, concurrency: {{limit: 1}}}}]", "k".repeat(257));
        assert_wrong(&[(&with(&long), "is longer than 256 bytes")]);
        let many = |count: usize, keys: &str| {
            let one = |index| format!("{{{keys}: k{index}, concurrency: {{limit: 1}}}}");
            let all: Vec<_> = (0..count).map(one).collect();
            with(&format!("overrides: [{}]", all.join(", ")))
        };
        let most = "`overrides`: at most 1000, and 32 of them by prefix";
        assert_wrong(&[(&many(1_001, "key"), most), (&many(33, "prefix"), most)]);
        for fits in [many(1_000, "key"), many(32, "prefix")] {
            Config::parse("a.yaml", &policies(&fits)).unwrap();
        }
    }

    #[test]
    fn a_mistake_in_a_list_of_limits_is_told() {
        let one = "{token_bucket: {limit: 1, per: 1s}}";
        assert_wrong(&[
            ("{limits: []}", "`limits` are 0; 1 to 4 are needed"),
            (&format!("{{limits: [{one}, {one}, {one}, {one}, {one}]}}"), "`limits` are 5"),
            (&format!("{{limits: [{one}, {{}}]}}"), "`limits`: an entry needs its limiter"),
            (
                &format!("{{limits: [{one}, {{concurrency: {{limit: 1}}}}]}}"),
                "`limits` are of rates and windows, not of `concurrency`",
            ),
            (&format!("{{limits: [{one}, {{retry_budget: {{}}}}]}}"), "not of `retry_budget`"),
            (&format!("{{limits: [{one}, {{breaker: {{}}}}]}}"), "unknown field `breaker`"),
        ]);
    }

    #[test]
    fn more_policies_than_a_server_holds_are_refused() {
        let policy = |index| format!("p{index}: {{token_bucket: {{limit: 1, per: 1s}}}}");
        let many = |count: usize| {
            let policies: Vec<_> = (0..count).map(policy).collect();
            format!("namespaces: {{demo: {{policies: {{\n{}\n}}}}}}", policies.join(",\n"))
        };
        Config::parse("a.yaml", &many(limits::POLICIES)).unwrap();
        let error = Config::parse("a.yaml", &many(limits::POLICIES + 1)).unwrap_err();
        assert!(error.to_string().contains("at most 10000"), "{error}");
    }

    const ENVOY: &str = "envoy_ratelimit: {config_dir: ./rules, durability: relaxed, shadow_mode: true, \
                         quota_mode: true, merge_domains: true, response_headers: {limit: X-Limit, \
                         remaining: x-remaining, reset: X-RESET}, response_dynamic_metadata: true, domains: \
                         {edge: {charge: all_or_nothing, algorithm: sliding_window, policies: \
                         {'path=/login|remote_address': partner/quota}}}}";

    #[test]
    fn where_envoys_rules_are_is_printed_as_it_is_read() {
        for text in [
            ENVOY,
            "envoy_ratelimit: {config_dir: /etc/rules}",
            "envoy_ratelimit: {config_dir: rules, response_headers: {}}",
            "envoy_ratelimit: {config_dir: rules, domains: {'a b': {algorithm: token_bucket}, '': {}}}",
        ] {
            let config = Config::parse("a.yaml", text).unwrap();
            assert!(config.envoy_ratelimit.is_some());
            let printed = config.to_string();
            assert_eq!(Config::parse("b.yaml", &printed).unwrap(), config, "{printed}");
        }
        let all = Config::parse("a.yaml", ENVOY).unwrap().envoy_ratelimit.unwrap();
        assert_eq!(all.config_dir, PathBuf::from("./rules"));
        assert_eq!(all.durability, Some(Durability::Relaxed));
        assert!(all.shadow_mode && all.quota_mode && all.merge_domains);
        assert!(all.response_dynamic_metadata);
        let headers = all.response_headers.unwrap();
        let headers = [headers.limit, headers.remaining, headers.reset];
        assert_eq!(headers, ["X-Limit", "x-remaining", "X-RESET"]);
        let edge = &all.domains["edge"];
        assert_eq!(edge.charge, envoy::Charge::AllOrNothing);
        assert_eq!(edge.algorithm, envoy::Algorithm::SlidingWindow);
        let native = &edge.policies["path=/login|remote_address"];
        assert_eq!((native.namespace.as_str(), native.policy.as_str()), ("partner", "quota"));
    }

    #[test]
    fn a_mistake_in_where_envoys_rules_are_is_told() {
        for (settings, field, words) in [
            ("{}", "envoy_ratelimit", "missing field `config_dir`"),
            ("{config_dir: a, shadow: true}", "envoy_ratelimit.shadow", "unknown field `shadow`"),
            ("{config_dir: a, durability: lax}", "envoy_ratelimit.durability", "unknown variant"),
            ("{config_dir: a, quota_mode: 5}", "envoy_ratelimit.quota_mode", "bool"),
            (
                "{config_dir: a, response_headers: {limit: 'X Limit'}}",
                "envoy_ratelimit.response_headers.limit",
                "`X Limit` is not the name of a header",
            ),
            (
                "{config_dir: a, response_headers: {reset: ''}}",
                "envoy_ratelimit.response_headers.reset",
                "`` is not the name of a header",
            ),
            (
                "{config_dir: a, response_headers: {remaining: ':path'}}",
                "envoy_ratelimit.response_headers.remaining",
                "`:path` is not the name of a header",
            ),
            (
                "{config_dir: a, response_headers: {left: X}}",
                "envoy_ratelimit.response_headers.left",
                "unknown field `left`",
            ),
            (
                "{config_dir: a, domains: {d: {charge: never}}}",
                "envoy_ratelimit.domains.d.charge",
                "unknown variant `never`",
            ),
            (
                "{config_dir: a, domains: {d: {algorithm: leaky_bucket}}}",
                "envoy_ratelimit.domains.d.algorithm",
                "unknown variant `leaky_bucket`",
            ),
            (
                "{config_dir: a, domains: {d: {policies: {a: quota}}}}",
                "envoy_ratelimit.domains.d.policies.a",
                "`quota` is not a policy such as `partner/quota`",
            ),
            (
                "{config_dir: a, domains: {d: {policies: {a: Partner/quota}}}}",
                "envoy_ratelimit.domains.d.policies.a",
                "`Partner` is not a name",
            ),
        ] {
            let text = format!("envoy_ratelimit: {settings}");
            let error = Config::parse("some.yaml", &text).unwrap_err().to_string();
            let (first, _) = error.split_once('\n').unwrap();
            assert!(first.starts_with("some.yaml:1:"), "{settings}: {error}");
            assert!(first.contains(&format!("`{field}`: ")), "{field}: {error}");
            assert!(first.contains(words), "{words}: {error}");
        }
    }

    #[test]
    fn a_policy_that_cannot_judge_a_rule_is_refused_and_one_that_is_not_there_is_noted() {
        let with = |judge: &str| {
            let policies = "quota: {token_bucket: {limit: 1, per: 1s}}, jobs: {concurrency: {limit: 4}}, \
                            circuits: {breaker: {}}, \
                            mixed: {token_bucket: {limit: 1, per: 1s}, overrides: [{key: a, retry_budget: {}}]}";
            let text = format!(
                "namespaces: {{partner: {{policies: {{{policies}}}}}}}\nenvoy_ratelimit: {{config_dir: rules, \
                 domains: {{edge: {{policies: {{path: {judge}}}}}}}}}"
            );
            Config::parse("some.yaml", &text)
        };
        assert_eq!(with("partner/quota").unwrap().notes(), Vec::<String>::new());
        for (judge, words) in [
            ("partner/jobs", "policy `partner/jobs` counts permits: only rates and windows"),
            ("partner/mixed", "policy `partner/mixed` counts retries: only rates and windows"),
            (
                "partner/circuits",
                "policy `partner/circuits` counts failures: only rates and windows",
            ),
        ] {
            let error = with(judge).unwrap_err().to_string();
            let field = "some.yaml: `envoy_ratelimit.domains.edge.policies.path`: ";
            assert!(error.starts_with(&format!("{field}{words}")), "{error}");
        }
        for judge in ["partner/quotas", "nobody/quota"] {
            let notes = with(judge).unwrap().notes();
            assert_eq!(notes.len(), 1);
            assert!(
                notes[0].contains(&format!("policy `{judge}` is not in this file")),
                "{notes:?}"
            );
        }
    }

    #[test]
    fn the_example_has_every_setting_of_envoys_rules_and_says_its_default() {
        let text = include_str!("../../deploy/fusebox.yaml");
        let commented: Vec<_> = text
            .lines()
            .filter_map(|line| line.strip_prefix('#'))
            .filter(|line| !line.is_empty() && !line.starts_with(' ') || line.starts_with("  "))
            .collect();
        let block = commented.join("\n");
        let example = Config::parse("fusebox.yaml", &block).unwrap().envoy_ratelimit.unwrap();
        let unknown = |settings: &str| {
            let text = format!("envoy_ratelimit: {{config_dir: a, {settings}}}");
            let error = Config::parse("a.yaml", &text).unwrap_err().to_string();
            let (_, expected) = error.split_once("expected one of ").unwrap();
            expected.lines().next().unwrap().to_owned()
        };
        for expected in [
            unknown("nothing: 0"),
            unknown("response_headers: {nothing: 0}"),
            unknown("domains: {d: {nothing: 0}}"),
        ] {
            for setting in expected.split(", ") {
                let setting = setting.trim().trim_matches('`');
                assert!(block.contains(&format!(" {setting}:")), "{setting} of {expected}");
            }
        }
        let defaults = "envoy_ratelimit: {config_dir: ./ratelimit}";
        let defaults = Config::parse("a.yaml", defaults).unwrap().envoy_ratelimit.unwrap();
        assert_eq!(example.durability, Some(Durability::default()));
        assert_eq!(example.response_headers, Some(envoy::ResponseHeaders::default()));
        let edge = &example.domains["edge"];
        assert!(!edge.policies.is_empty());
        let policies = edge.policies.clone();
        assert_eq!(*edge, envoy::DomainSettings { policies, ..envoy::DomainSettings::default() });
        let same = envoy::EnvoyRatelimit {
            durability: None,
            response_headers: None,
            domains: BTreeMap::new(),
            ..example
        };
        assert_eq!(same, defaults);
    }

    #[test]
    fn of_a_long_line_the_part_with_the_mistake_is_shown() {
        let text = format!("listen: {}here", " ".repeat(1_000));
        let error = Config::parse("a.yaml", &text).unwrap_err().to_string();
        let shown: Vec<_> = error.lines().collect();
        assert!(shown[0].starts_with("a.yaml:1:1009: `listen`: "), "{error}");
        assert_eq!(shown[1].find("here"), shown[2].find('^'), "{error}");
        assert!(shown[1].len() < 200, "{error}");
    }

    #[test]
    fn an_address_that_others_reach_wants_a_word() {
        for (text, setting) in
            [("listen: 0.0.0.0:1", "`listen`"), ("ops_listen: '[::]:1'", "`ops_listen`")]
        {
            let config = Config::parse("a.yaml", text).unwrap();
            let error = config.check_exposure(false).unwrap_err().to_string();
            assert!(error.starts_with(setting) && error.contains("--insecure"), "{error}");
            config.check_exposure(true).unwrap();
        }
    }
}
