//! Policies on the wire, and as a configuration file has them.

use std::{fmt, time::Duration};

use fusebox_core::{
    Concurrency, Limit, RetryBudget, SlidingWindow, TokenBucket, WindowLimit,
    circuit::{Breaker, Settings, Share, WindowSettings},
};
use fusebox_proto::v1::{self, CalendarUnit, limit, policy, policy_override};

use crate::{
    calendar::{Calendar, Every},
    catalogue::Reserves,
    config::{
        BackoffFields, Besides, BreakerFields, DEFAULT_MIN_PER_SECOND, DEFAULT_RATIO_BASIS_POINTS,
        DEFAULT_SLOW_RATE, DEFAULT_TIME_ZONE, DEFAULT_TTL, Durability, Factor, HalfOpenFields,
        Judge, Keys, LimitSettings, LimiterPolicy, OnUnreachable, Override, Percent, Policy,
        RampFields, SlowCallFields,
    },
    grpc::{respond::duration, status::Refusal},
    limits,
};

/// Every kind of judge that a message may have in one of its places.
#[allow(clippy::large_enum_variant)] // as the messages, one at a time
enum Kind {
    TokenBucket(v1::TokenBucket),
    SlidingWindow(v1::SlidingWindow),
    FixedWindow(v1::FixedWindow),
    CalendarWindow(v1::CalendarWindow),
    Concurrency(v1::Concurrency),
    RetryBudget(v1::RetryBudget),
    Limits(v1::Limits),
    Breaker(v1::Breaker),
}

/// The places, each with those kinds that may be there.
macro_rules! places {
    ($($place:path => $back:ident: $($kind:ident)*;)*) => {
        $(impl From<$place> for Kind {
            fn from(kind: $place) -> Self {
                use $place as Place;
                match kind { $(Place::$kind(settings) => Self::$kind(settings),)* }
            }
        })*

        impl Kind {
            $(fn $back(self) -> Option<$place> {
                use $place as Place;
                #[allow(unreachable_patterns)] // where every kind may be
                match self {
                    $(Self::$kind(settings) => Some(Place::$kind(settings)),)*
                    _ => None,
                }
            })*
        }
    };
}

places! {
    policy::Kind => of_policy: TokenBucket SlidingWindow FixedWindow CalendarWindow Concurrency RetryBudget Limits Breaker;
    policy_override::Kind => of_override: TokenBucket SlidingWindow FixedWindow CalendarWindow Concurrency RetryBudget Limits Breaker;
    limit::Kind => of_limit: TokenBucket SlidingWindow FixedWindow CalendarWindow;
}

/// The settings that a message says; `None` if there are none, and then something about them is refused.
pub(super) fn settings(refusal: &mut Refusal, message: &v1::Policy) -> Option<Policy> {
    let path = "policy";
    let own = judge_of(refusal, path, message.kind.clone().map(Kind::from));
    let durability = match v1::Durability::try_from(message.durability) {
        Ok(v1::Durability::Unspecified) => None,
        Ok(v1::Durability::Strict) => Some(Durability::Strict),
        Ok(v1::Durability::Relaxed) => Some(Durability::Relaxed),
        Err(_) => {
            refusal.violation(format!("{path}.durability"), "not a durability");
            None
        }
    };
    let on_unreachable = match v1::OnUnreachable::try_from(message.on_unreachable) {
        Ok(v1::OnUnreachable::Unspecified) => None,
        Ok(v1::OnUnreachable::Deny) => Some(OnUnreachable::Deny),
        Ok(v1::OnUnreachable::Local) => Some(OnUnreachable::Local),
        Ok(v1::OnUnreachable::Allow) => Some(OnUnreachable::Allow),
        Err(_) => {
            let message = "not what a client could do";
            refusal.violation(format!("{path}.on_unreachable"), message);
            None
        }
    };
    let lease_time = optional(refusal, || format!("{path}.lease_time"), message.lease_time);
    let mut overrides = Vec::new();
    for (index, message) in message.overrides.iter().enumerate() {
        if refusal.is_full() {
            break;
        }
        overrides.extend(override_of(refusal, &format!("{path}.overrides[{index}]"), message));
    }
    let count = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
    let share = |basis_points| u16::try_from(basis_points).unwrap_or(u16::MAX);
    let besides = Besides {
        shadow: message.shadow,
        reserves: message.reserves.map(|reserves| Reserves {
            critical_basis_points: share(reserves.critical_basis_points),
            normal_basis_points: share(reserves.normal_basis_points),
        }),
        on_unreachable,
        durability,
        max_cells: message.max_cells.map(count),
        max_debt: message.max_debt,
        lease_time,
        max_waiting: message.max_waiting.map(|most| count(most.into())),
    };
    let policy = Policy::new(own?, overrides, besides);
    policy.map_err(|message| wrong(refusal, path, &message)).ok()
}

/// The message that says those settings: put again, it changes nothing.
pub(super) fn message(policy: &Policy) -> v1::Policy {
    match policy {
        Policy::Limiter(policy) => limiter_message(policy),
        Policy::Breaker(policy) => v1::Policy {
            kind: breaker_message(&policy.breaker).of_policy(),
            overrides: override_messages(&policy.overrides, breaker_message),
            on_unreachable: match policy.allows_unreachable {
                true => v1::OnUnreachable::Allow.into(),
                false => v1::OnUnreachable::Unspecified.into(),
            },
            max_cells: Some(policy.max_circuits as u64),
            ..v1::Policy::default()
        },
    }
}

/// The same of what judges one key, with every default that it has filled in.
pub(in crate::grpc) fn all_of(policy: &Policy, durability: Durability) -> v1::Policy {
    let message = message(policy);
    let Policy::Limiter(limiter) = policy else {
        return v1::Policy { on_unreachable: v1::OnUnreachable::Allow.into(), ..message };
    };
    // Of several limits each may owe another amount.
    let debt = match limiter.limits.as_slice() {
        [one] => Some(limiter.max_debt_of(&one.limit)),
        _ => limiter.max_debt,
    };
    v1::Policy {
        reserves: message.reserves.or_else(|| Some(v1::Reserves::default())),
        on_unreachable: unreachable_message(limiter.on_unreachable()).into(),
        durability: durability_message(durability).into(),
        max_debt: debt,
        ..message
    }
}

fn limiter_message(policy: &LimiterPolicy) -> v1::Policy {
    let reserves = policy.reserves;
    v1::Policy {
        kind: kind_of(&policy.limits).of_policy(),
        shadow: policy.shadow,
        overrides: override_messages(&policy.overrides, |limits| kind_of(limits)),
        reserves: (reserves != Reserves::default()).then(|| v1::Reserves {
            critical_basis_points: reserves.critical_basis_points.into(),
            normal_basis_points: reserves.normal_basis_points.into(),
        }),
        on_unreachable: policy.on_unreachable.map(unreachable_message).unwrap_or_default().into(),
        durability: policy.durability.map(durability_message).unwrap_or_default().into(),
        max_cells: Some(policy.max_cells as u64),
        max_debt: policy.max_debt,
        lease_time: Some(duration(policy.lease_time)),
        max_waiting: u32::try_from(policy.max_waiting).ok(),
    }
}

/// What clients do while they are alone, on the wire.
fn unreachable_message(on_unreachable: OnUnreachable) -> v1::OnUnreachable {
    match on_unreachable {
        OnUnreachable::Deny => v1::OnUnreachable::Deny,
        OnUnreachable::Local => v1::OnUnreachable::Local,
        OnUnreachable::Allow => v1::OnUnreachable::Allow,
    }
}

/// What a crash may forget, on the wire.
pub(super) fn durability_message(durability: Durability) -> v1::Durability {
    match durability {
        Durability::Strict => v1::Durability::Strict,
        Durability::Relaxed => v1::Durability::Relaxed,
    }
}

fn override_of(
    refusal: &mut Refusal,
    path: &str,
    message: &v1::PolicyOverride,
) -> Option<Override<Judge>> {
    use policy_override::Selector;
    let judge = judge_of(refusal, path, message.kind.clone().map(Kind::from));
    let keys = match &message.selector {
        Some(Selector::Key(key)) => Keys::Exactly(key.clone()),
        Some(Selector::Prefix(prefix)) if prefix.is_empty() => {
            let message = "every key begins with nothing: that is the policy's own limiter";
            refusal.violation(format!("{path}.prefix"), message);
            return None;
        }
        Some(Selector::Prefix(prefix)) => Keys::Prefixed(prefix.clone()),
        None => {
            refusal.violation(path, "either a `key` or a `prefix` is needed");
            return None;
        }
    };
    Some(Override { keys, judge: judge? })
}

fn override_messages<J>(
    overrides: &[Override<J>],
    kind: impl Fn(&J) -> Kind,
) -> Vec<v1::PolicyOverride> {
    use policy_override::Selector;
    let message = |Override { keys, judge }: &Override<J>| {
        let selector = match keys {
            Keys::Exactly(key) => Selector::Key(key.clone()),
            Keys::Prefixed(prefix) => Selector::Prefix(prefix.clone()),
        };
        v1::PolicyOverride { selector: Some(selector), kind: kind(judge).of_override() }
    };
    overrides.iter().map(message).collect()
}

/// What judges the keys of a policy or an override.
fn judge_of(refusal: &mut Refusal, path: &str, kind: Option<Kind>) -> Option<Judge> {
    match kind {
        Some(Kind::Breaker(message)) => {
            breaker_of(refusal, &format!("{path}.breaker"), message).map(Judge::Breaker)
        }
        Some(Kind::Limits(v1::Limits { limits })) => {
            limits_of(refusal, path, limits).map(Judge::Limits)
        }
        Some(one) => Some(Judge::Limits(vec![limit_of(refusal, path, one)?])),
        None => {
            refusal.violation(path, "a limiter is needed, such as `token_bucket`, or a `breaker`");
            None
        }
    }
}

/// The limits of a list.
fn limits_of(
    refusal: &mut Refusal,
    path: &str,
    list: Vec<v1::Limit>,
) -> Option<Vec<LimitSettings>> {
    let path = format!("{path}.limits.limits");
    if list.is_empty() || list.len() > limits::LIMITS {
        let (count, most) = (list.len(), limits::LIMITS);
        refusal.violation(path, format!("{count} limits; 1 to {most} are needed"));
        return None;
    }
    let mut limits = Vec::new();
    for (index, v1::Limit { kind }) in list.into_iter().enumerate() {
        let path = format!("{path}[{index}]");
        match kind {
            Some(kind) => limits.push(limit_of(refusal, &path, kind.into())),
            None => {
                refusal.violation(path, "a limiter is needed, such as `token_bucket`");
                limits.push(None);
            }
        }
    }
    limits.into_iter().collect()
}

fn kind_of(limits: &[LimitSettings]) -> Kind {
    match limits {
        [one] => limit_message(one),
        several => Kind::Limits(v1::Limits {
            limits: several
                .iter()
                .map(|one| v1::Limit { kind: limit_message(one).of_limit() })
                .collect(),
        }),
    }
}

/// One limit, by the constructors that also a configuration file goes through.
fn limit_of(refusal: &mut Refusal, path: &str, kind: Kind) -> Option<LimitSettings> {
    let mut fields = Fields { refusal, path: String::new() };
    let mut at = |name: &str| fields.path = format!("{path}.{name}");
    let (limit, calendar) = match kind {
        Kind::TokenBucket(v1::TokenBucket { limit, per, burst }) => {
            at("token_bucket");
            let (limit, per) = (fields.limit(limit), fields.per(per));
            let (limit, per) = (limit?, per?);
            let bucket = TokenBucket::new(limit, per, burst.unwrap_or(limit));
            (fields.right(bucket.map(Limit::TokenBucket))?, None)
        }
        Kind::SlidingWindow(v1::SlidingWindow { limit, per }) => {
            at("sliding_window");
            let (limit, per) = (fields.limit(limit), fields.per(per));
            let window = SlidingWindow::new(limit?, per?);
            (fields.right(window.map(Limit::SlidingWindow))?, None)
        }
        Kind::FixedWindow(v1::FixedWindow { limit, per }) => {
            at("fixed_window");
            let (limit, per) = (fields.limit(limit), fields.per(per));
            let window = WindowLimit::fixed(limit?, per?);
            (fields.right(window.map(Limit::Window))?, None)
        }
        Kind::CalendarWindow(v1::CalendarWindow { limit, every, time_zone }) => {
            at("calendar_window");
            let (limit, every) = (fields.limit(limit), fields.every(every));
            let (limit, every) = (limit?, every?);
            let zone = if time_zone.is_empty() { DEFAULT_TIME_ZONE } else { time_zone.as_str() };
            let calendar = fields.zone(Calendar::new(every, zone))?;
            let window = WindowLimit::calendar(limit, every.longest());
            (fields.right(window.map(Limit::Window))?, Some(calendar))
        }
        Kind::Concurrency(v1::Concurrency { limit, ttl }) => {
            at("concurrency");
            let (limit, ttl) = (fields.limit(limit), fields.ttl(ttl));
            let permits = Concurrency::new(limit?, ttl?);
            (fields.right(permits.map(Limit::Concurrency))?, None)
        }
        Kind::RetryBudget(v1::RetryBudget { ratio_basis_points, min_per_second, ttl }) => {
            at("retry_budget");
            let (ratio, ttl) = (fields.per_mille(ratio_basis_points), fields.ttl(ttl));
            let budget =
                RetryBudget::new(ratio?, min_per_second.unwrap_or(DEFAULT_MIN_PER_SECOND), ttl?);
            (fields.right(budget.map(Limit::RetryBudget))?, None)
        }
        // Only in a list, and lists have no lists.
        Kind::Limits(_) | Kind::Breaker(_) => return None,
    };
    Some(LimitSettings { limit, calendar })
}

fn limit_message(LimitSettings { limit, calendar }: &LimitSettings) -> Kind {
    match (limit, calendar) {
        (Limit::TokenBucket(bucket), _) => Kind::TokenBucket(v1::TokenBucket {
            limit: Some(bucket.limit()),
            per: Some(duration(bucket.per())),
            burst: Some(bucket.burst()),
        }),
        (Limit::SlidingWindow(window), _) => Kind::SlidingWindow(v1::SlidingWindow {
            limit: Some(window.limit()),
            per: Some(duration(window.per())),
        }),
        (Limit::Window(window), None) => Kind::FixedWindow(v1::FixedWindow {
            limit: Some(window.limit()),
            per: Some(duration(window.longest())),
        }),
        (Limit::Window(window), Some(calendar)) => {
            let every = match calendar.every() {
                Every::Day => CalendarUnit::Day,
                Every::Week => CalendarUnit::Week,
                Every::Month => CalendarUnit::Month,
                Every::Year => CalendarUnit::Year,
            };
            Kind::CalendarWindow(v1::CalendarWindow {
                limit: Some(window.limit()),
                every: every.into(),
                time_zone: calendar.time_zone().to_owned(),
            })
        }
        (Limit::Concurrency(permits), _) => Kind::Concurrency(v1::Concurrency {
            limit: Some(permits.limit()),
            ttl: Some(duration(permits.ttl())),
        }),
        (Limit::RetryBudget(budget), _) => Kind::RetryBudget(v1::RetryBudget {
            ratio_basis_points: Some(u32::from(budget.ratio_per_mille()) * 10),
            min_per_second: Some(budget.min_per_second()),
            ttl: Some(duration(budget.ttl())),
        }),
    }
}

/// A breaker, by way of what a configuration file says of one.
fn breaker_of(refusal: &mut Refusal, path: &str, message: v1::Breaker) -> Option<Breaker> {
    let mut fields = Fields { refusal, path: path.to_owned() };
    let backoff = message.backoff.unwrap_or_default();
    let half_open = message.half_open.unwrap_or_default();
    let said = BreakerFields {
        window: fields.time("window", message.window),
        count: message.count,
        consecutive_failures: message.consecutive_failures,
        failure_rate: fields.share("failure_rate_basis_points", message.failure_rate_basis_points),
        slow_call: message.slow_call.and_then(|slow| fields.slow_call(slow)),
        min_calls: message.min_calls,
        open_for: fields.time("open_for", message.open_for),
        backoff: BackoffFields {
            // What is above is out of its range, too.
            factor: backoff
                .factor_hundredths
                .map(|factor| Factor(u16::try_from(factor).unwrap_or(u16::MAX))),
            max: fields.time("backoff.max", backoff.max),
            jitter: fields.share("backoff.jitter_basis_points", backoff.jitter_basis_points),
        },
        half_open: HalfOpenFields {
            probes: half_open.probes,
            max_in_flight: half_open.max_in_flight,
            probe_timeout: fields.time("half_open.probe_timeout", half_open.probe_timeout),
            max_duration: fields.time("half_open.max_duration", half_open.max_duration),
        },
        ramp: message.ramp.map(|ramp| fields.ramp(ramp)).unwrap_or_default(),
        min_reporters: message.min_reporters,
    };
    let breaker = said.breaker();
    breaker.map_err(|message| wrong(fields.refusal, path, &message)).ok()
}

fn breaker_message(breaker: &Breaker) -> Kind {
    let Settings { window, slow_call, open_for, half_open, ramp, .. } = &**breaker;
    let (window, count, consecutive_failures) = match *window {
        WindowSettings::Time(time) => (Some(duration(time)), None, None),
        WindowSettings::Calls(count) => (None, Some(count), None),
        WindowSettings::Consecutive(count) => (None, None, Some(count)),
    };
    let basis_points = |share: Share| Some(u32::from(share.basis_points()));
    Kind::Breaker(v1::Breaker {
        window,
        count,
        consecutive_failures,
        failure_rate_basis_points: basis_points(breaker.failure_rate),
        slow_call: slow_call.map(|slow| v1::SlowCall {
            over: Some(duration(slow.over)),
            rate_basis_points: basis_points(slow.rate),
        }),
        min_calls: Some(breaker.min_calls),
        open_for: Some(duration(open_for.first)),
        backoff: Some(v1::Backoff {
            factor_hundredths: Some(open_for.factor_hundredths.into()),
            max: Some(duration(open_for.max)),
            jitter_basis_points: basis_points(open_for.jitter),
        }),
        half_open: Some(v1::HalfOpen {
            probes: Some(half_open.probes),
            max_in_flight: Some(half_open.max_in_flight),
            probe_timeout: Some(duration(half_open.probe_timeout)),
            max_duration: Some(duration(half_open.max_duration)),
        }),
        ramp: Some(v1::Ramp {
            steps_basis_points: ramp.steps.iter().map(|step| step.basis_points().into()).collect(),
            each: Some(duration(ramp.each)),
        }),
        min_reporters: Some(breaker.min_reporters),
    })
}

/// The fields of one limiter or breaker, and what is wrong with them.
struct Fields<'a> {
    refusal: &'a mut Refusal,
    path: String,
}

impl Fields<'_> {
    fn limit(&mut self, limit: Option<u64>) -> Option<u64> {
        if limit.is_none() {
            self.wrong("limit", "required; an explicit 0 denies all");
        }
        limit
    }

    fn per(&mut self, per: Option<prost_types::Duration>) -> Option<Duration> {
        if per.is_none() {
            self.wrong("per", "required: the period, such as `60s`");
        }
        self.time("per", per)
    }

    fn ttl(&mut self, ttl: Option<prost_types::Duration>) -> Option<Duration> {
        if ttl.is_none() {
            return Some(DEFAULT_TTL);
        }
        self.time("ttl", ttl)
    }

    /// A length of time that may be left out.
    fn time(&mut self, field: &str, time: Option<prost_types::Duration>) -> Option<Duration> {
        let path = &self.path;
        optional(self.refusal, || format!("{path}.{field}"), time)
    }

    /// A share that may be left out.
    fn share(&mut self, field: &str, basis_points: Option<u32>) -> Option<Percent> {
        let basis_points = basis_points?;
        let share = u16::try_from(basis_points).ok().and_then(Share::new);
        if share.is_none() {
            let message = format!("{basis_points} basis points; at most 10,000, which are all");
            self.wrong(field, message);
        }
        share.map(Percent::from)
    }

    fn slow_call(&mut self, slow_call: v1::SlowCall) -> Option<SlowCallFields> {
        let v1::SlowCall { over, rate_basis_points } = slow_call;
        if over.is_none() {
            self.wrong("slow_call.over", "required: how long a call may take, such as `2s`");
        }
        let over = self.time("slow_call.over", over);
        let rate = self.share("slow_call.rate_basis_points", rate_basis_points);
        Some(SlowCallFields { over: over?, rate: rate.unwrap_or(DEFAULT_SLOW_RATE) })
    }

    fn ramp(&mut self, v1::Ramp { steps_basis_points, each }: v1::Ramp) -> RampFields {
        let steps = steps_basis_points.into_iter().enumerate().filter_map(|(index, step)| {
            self.share(&format!("ramp.steps_basis_points[{index}]"), Some(step))
        });
        RampFields { steps: Some(steps.collect()), each: self.time("ramp.each", each) }
    }

    fn every(&mut self, every: i32) -> Option<Every> {
        match CalendarUnit::try_from(every) {
            Ok(CalendarUnit::Day) => Some(Every::Day),
            Ok(CalendarUnit::Week) => Some(Every::Week),
            Ok(CalendarUnit::Month) => Some(Every::Month),
            Ok(CalendarUnit::Year) => Some(Every::Year),
            Ok(CalendarUnit::Unspecified) | Err(_) => {
                self.wrong("every", "required: a day, a week, a month or a year");
                None
            }
        }
    }

    fn zone<E: fmt::Display>(&mut self, calendar: Result<Calendar, E>) -> Option<Calendar> {
        calendar.map_err(|error| self.wrong("time_zone", error.to_string())).ok()
    }

    fn per_mille(&mut self, basis_points: Option<u32>) -> Option<u16> {
        let ratio = basis_points.unwrap_or(DEFAULT_RATIO_BASIS_POINTS.into());
        if ratio > 10_000 || !ratio.is_multiple_of(10) {
            let message = format!("{ratio} basis points; 0 to 10,000 are needed, in tens");
            self.wrong("ratio_basis_points", message);
            return None;
        }
        u16::try_from(ratio / 10).ok()
    }

    /// What a constructor makes of them, or why it does not.
    fn right<E: fmt::Display>(&mut self, limit: Result<Limit, E>) -> Option<Limit> {
        limit.map_err(|error| wrong(self.refusal, &self.path, &error.to_string())).ok()
    }

    fn wrong(&mut self, field: &str, message: impl Into<String>) {
        self.refusal.violation(format!("{}.{field}", self.path), message);
    }
}

/// A length of time that may be left out.
fn optional(
    refusal: &mut Refusal,
    field: impl FnOnce() -> String,
    time: Option<prost_types::Duration>,
) -> Option<Duration> {
    let parsed = Duration::try_from(time?);
    parsed.map_err(|_| refusal.violation(field(), "a length of time is not negative")).ok()
}

/// Notes what validation said; it names the field first, in backticks, as a configuration file does.
fn wrong(refusal: &mut Refusal, path: &str, message: &str) {
    let field = message.strip_prefix('`').and_then(|rest| rest.split_once('`'));
    let path = field.map_or_else(
        || path.to_owned(),
        |(field, _)| {
            let unit = match field {
                "failure_rate" | "slow_call.rate" | "ramp.steps" => "_basis_points",
                "backoff.factor" => "_hundredths",
                _ => "",
            };
            format!("{path}.{field}{unit}")
        },
    );
    refusal.violation(path, message);
}

#[cfg(test)]
mod tests {
    use tonic::{Code, Status};

    use super::*;

    const EVERY_KIND: [&str; 14] = [
        "{token_bucket: {limit: 5, per: 60s}}",
        "{token_bucket: {limit: 5, per: 1ns, burst: 9}, max_debt: 0, shadow: true}",
        "{sliding_window: {limit: 5, per: 2s}, durability: relaxed, max_cells: 7}",
        "{fixed_window: {limit: 5, per: 365d}, lease_time: 100ms}",
        "{calendar_window: {limit: 5, every: month, time_zone: Europe/Berlin}}",
        "{concurrency: {limit: 5, ttl: 1m}, max_waiting: 0}",
        "{retry_budget: {ratio: 12.5%, min_per_second: 0, ttl: 1s}}",
        "{limits: [{token_bucket: {limit: 5, per: 1s}}, {calendar_window: {limit: 9, every: day}}]}",
        "{token_bucket: {limit: 0, per: 1s}, reserves: {critical: 20%, normal: 0.5%}}",
        "{token_bucket: {limit: 1, per: 1s}, overrides: [{key: '', fixed_window: {limit: 1, per: 1h}},
          {prefix: b/, limits: [{token_bucket: {limit: 1, per: 1s}}, {sliding_window: {limit: 1, per: 1s}}]}]}",
        "{breaker: {}}",
        "{breaker: {window: 100ms, failure_rate: 0.01%, slow_call: {over: 1ms, rate: 99.99%}, min_calls: 1,
          open_for: 90s, backoff: {factor: 1.01, max: 24h, jitter: 0%}, half_open: {probes: 9, max_in_flight: 2,
          probe_timeout: 70s, max_duration: 71s}, ramp: {steps: [1%], each: 1ms}, min_reporters: 32}}",
        "{breaker: {count: 1000, ramp: {steps: [], each: 9s}}, max_cells: 100000}",
        "{breaker: {consecutive_failures: 1}, overrides: [{key: '', breaker: {}},
          {prefix: b/, breaker: {count: 7}}]}",
    ];

    #[test]
    fn what_is_told_of_a_policy_puts_the_same() {
        for text in EVERY_KIND {
            let policy: Policy = text.parse().unwrap();
            let mut refusal = Refusal::default();
            let put = settings(&mut refusal, &message(&policy));
            assert_eq!(put.as_ref(), Some(&policy), "{text}: {refusal:?}");
            assert_eq!(policy.to_string().parse(), Ok(policy), "{text}");
        }
    }

    #[test]
    fn what_is_left_out_has_the_default_of_a_file() {
        let message = |kind| v1::Policy { kind: Some(kind), ..Default::default() };
        let minute = Some(duration(Duration::from_secs(60)));
        for (kind, text) in [
            (
                policy::Kind::TokenBucket(v1::TokenBucket {
                    limit: Some(5),
                    per: minute,
                    burst: None,
                }),
                "{token_bucket: {limit: 5, per: 60s}}",
            ),
            (
                policy::Kind::Concurrency(v1::Concurrency { limit: Some(5), ttl: None }),
                "{concurrency: {limit: 5}}",
            ),
            (policy::Kind::RetryBudget(v1::RetryBudget::default()), "{retry_budget: {}}"),
            (
                policy::Kind::CalendarWindow(v1::CalendarWindow {
                    limit: Some(5),
                    every: 1,
                    time_zone: String::new(),
                }),
                "{calendar_window: {limit: 5, every: day}}",
            ),
        ] {
            let put = settings(&mut Refusal::default(), &message(kind));
            assert_eq!(put, Some(text.parse().unwrap()), "{text}");
        }
        let breaker = |breaker| policy::Kind::Breaker(breaker);
        for (kind, text) in [
            (v1::Breaker::default(), "{breaker: {}}"),
            (v1::Breaker { count: Some(7), ..Default::default() }, "{breaker: {count: 7}}"),
            (
                v1::Breaker {
                    slow_call: Some(v1::SlowCall { over: minute, rate_basis_points: None }),
                    open_for: minute,
                    backoff: Some(v1::Backoff::default()),
                    half_open: Some(v1::HalfOpen { probes: Some(1), ..Default::default() }),
                    ramp: Some(v1::Ramp::default()),
                    ..Default::default()
                },
                "{breaker: {slow_call: {over: 1m}, open_for: 1m, half_open: {probes: 1}, ramp: {steps: []}}}",
            ),
        ] {
            let put = settings(&mut Refusal::default(), &message(breaker(kind)));
            assert_eq!(put, Some(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn a_mistake_in_a_breaker_is_told_by_field() {
        let refused = |policy: v1::Policy| {
            let mut refusal = Refusal::default();
            settings(&mut refusal, &policy);
            let status = Status::from(refusal);
            assert_eq!(status.code(), Code::InvalidArgument);
            status.message().to_owned()
        };
        let time = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
        let slow = |over, rate_basis_points| Some(v1::SlowCall { over, rate_basis_points });
        let ramp = |steps: &[u32]| Some(v1::Ramp { steps_basis_points: steps.into(), each: None });
        type Change = fn(&mut v1::Breaker);
        let wrong: [(Change, &str); 8] = [
            (|breaker| breaker.count = Some(0), "count: `count` is 0, outside 1 to 1000"),
            (|breaker| breaker.min_calls = Some(0), "min_calls: `min_calls` is 0"),
            (|breaker| breaker.min_reporters = Some(33), "min_reporters: "),
            (|breaker| breaker.failure_rate_basis_points = Some(0), "failure_rate_basis_points: "),
            (
                |breaker| breaker.failure_rate_basis_points = Some(10_001),
                "failure_rate_basis_points: 10001 basis points; at most 10,000",
            ),
            (
                |breaker| (breaker.count, breaker.consecutive_failures) = (Some(5), Some(5)),
                "window: `window`, `count`, `consecutive_failures`: a circuit is judged by one",
            ),
            (
                |breaker| {
                    let probes = Some(0);
                    breaker.half_open = Some(v1::HalfOpen { probes, ..Default::default() });
                },
                "half_open.probes: `half_open.probes` is 0, outside 1 to 1000",
            ),
            (
                |breaker| {
                    let factor_hundredths = Some(u32::MAX);
                    breaker.backoff = Some(v1::Backoff { factor_hundredths, ..Default::default() });
                },
                "backoff.factor_hundredths: ",
            ),
        ];
        let mut wrong: Vec<_> = wrong
            .map(|(change, words)| {
                let mut breaker = v1::Breaker::default();
                change(&mut breaker);
                (breaker, words)
            })
            .into();
        let default = v1::Breaker::default;
        wrong.extend([
            (v1::Breaker { window: time(-1), ..default() }, "window: a length of time is not"),
            (v1::Breaker { open_for: time(0), ..default() }, "open_for: `open_for` is 0ns"),
            (v1::Breaker { slow_call: slow(None, None), ..default() }, "slow_call.over: required"),
            (
                v1::Breaker { slow_call: slow(time(1), Some(0)), ..default() },
                "slow_call.rate_basis_points: `slow_call.rate` is 0%",
            ),
            (v1::Breaker { ramp: ramp(&[2, 2]), ..default() }, "ramp.steps_basis_points: `ramp.st"),
            (v1::Breaker { ramp: ramp(&[1; 9]), ..default() }, "ramp.steps_basis_points: `ramp.st"),
            (
                v1::Breaker { ramp: ramp(&[1, 10_001]), ..default() },
                "ramp.steps_basis_points[1]: 10001 basis points",
            ),
        ]);
        for (breaker, words) in wrong {
            let kind = Some(policy::Kind::Breaker(breaker.clone()));
            let told = refused(v1::Policy { kind, ..Default::default() });
            assert!(told.starts_with(&format!("policy.breaker.{words}")), "{words}: {told}");
            let kind = Some(policy_override::Kind::Breaker(breaker));
            let selector = Some(policy_override::Selector::Key("vip".into()));
            let kinds = Some(policy::Kind::Breaker(default()));
            let overrides = vec![v1::PolicyOverride { selector, kind }];
            let told = refused(v1::Policy { kind: kinds, overrides, ..Default::default() });
            let words = format!("policy.overrides[0].breaker.{words}");
            assert!(told.starts_with(&words), "{words}: {told}");
        }
    }

    #[test]
    fn what_only_limiters_have_is_refused_of_a_breaker_by_field() {
        type Change = fn(&mut v1::Policy);
        let wrong: [(Change, &str); 9] = [
            (|policy| policy.on_unreachable = 2, "policy.on_unreachable: `on_unreachable` beside"),
            (
                |policy| policy.shadow = true,
                "policy.shadow: `shadow` beside a breaker: circuits have",
            ),
            (|policy| policy.reserves = Some(v1::Reserves::default()), "policy.reserves: "),
            (|policy| policy.durability = 1, "policy.durability: "),
            (|policy| policy.max_debt = Some(0), "policy.max_debt: "),
            (|policy| policy.lease_time = Some(duration(Duration::ZERO)), "policy.lease_time: "),
            (|policy| policy.max_waiting = Some(0), "policy.max_waiting: "),
            (|policy| policy.max_cells = Some(100_001), "policy.max_cells: `max_cells` is 100001"),
            (
                |policy| {
                    let limiter: Policy =
                        "{retry_budget: {}, overrides: [{key: a, retry_budget: {}}]}"
                            .parse()
                            .unwrap();
                    policy.overrides = message(&limiter).overrides;
                },
                "policy.overrides: `overrides`: key `a`: a limiter, and the policy is a breaker",
            ),
        ];
        for (change, words) in wrong {
            let mut message = message(&"{breaker: {}}".parse().unwrap());
            change(&mut message);
            let mut refusal = Refusal::default();
            assert_eq!(settings(&mut refusal, &message), None);
            let status = Status::from(refusal);
            assert_eq!(status.code(), Code::InvalidArgument);
            assert!(status.message().starts_with(words), "{words}: {}", status.message());
        }
    }

    #[test]
    fn a_mistake_is_told_by_field() {
        let good: Policy = "{token_bucket: {limit: 5, per: 60s}}".parse().unwrap();
        type Change = fn(&mut v1::Policy);
        let with = |change: Change| {
            let mut message = message(&good);
            change(&mut message);
            let mut refusal = Refusal::default();
            settings(&mut refusal, &message);
            Status::from(refusal.or_else(|| ()).unwrap_err())
        };
        fn bucket(limit: Option<u64>, seconds: i64, burst: Option<u64>) -> Option<policy::Kind> {
            let per = Some(prost_types::Duration { seconds, nanos: 0 });
            Some(policy::Kind::TokenBucket(v1::TokenBucket { limit, per, burst }))
        }
        let wrong: [(Change, &str); 13] = [
            (|policy| policy.kind = None, "policy: a limiter"),
            (|policy| policy.kind = bucket(None, 1, None), "policy.token_bucket.limit: required"),
            (|policy| policy.kind = bucket(Some(1), -1, None), "policy.token_bucket.per: "),
            (
                |policy| policy.kind = bucket(Some(1), 400 * 86_400, None),
                "policy.token_bucket.per: ",
            ),
            (|policy| policy.kind = bucket(Some(1), 1, Some(0)), "policy.token_bucket.burst: "),
            (|policy| policy.max_cells = Some(0), "policy.max_cells: "),
            (|policy| policy.max_debt = Some(u64::MAX), "policy.max_debt: "),
            (|policy| policy.max_waiting = Some(10_001), "policy.max_waiting: "),
            (|policy| policy.lease_time = Some(duration(Duration::ZERO)), "policy.lease_time: "),
            (|policy| policy.durability = 7, "policy.durability: "),
            (|policy| policy.on_unreachable = 7, "policy.on_unreachable: "),
            (
                |policy| {
                    let share =
                        v1::Reserves { critical_basis_points: 70_000, normal_basis_points: 0 };
                    policy.reserves = Some(share);
                },
                "policy.reserves: ",
            ),
            (
                |policy| policy.overrides = vec![v1::PolicyOverride::default()],
                "policy.overrides[0]: ",
            ),
        ];
        for (change, message) in wrong {
            let status = with(change);
            assert_eq!(status.code(), Code::InvalidArgument);
            assert!(status.message().starts_with(message), "{message}: {}", status.message());
        }
    }
}
