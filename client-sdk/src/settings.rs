//! What the server told of a policy: all that a client must know to decide alone.

use std::time::Duration;

use fusebox_core::{
    Concurrency, Limit, RetryBudget, SlidingWindow, TokenBucket, WindowLimit,
    circuit::{self, Breaker, InvalidBreaker, Share},
};
use fusebox_proto::v1::{self, limit, policy};
use thiserror::Error;

use crate::exchange::duration;

/// What is done of a policy that the server has never told of, while it cannot be reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fallback {
    /// Calls go through. Each first one is told as an event.
    #[default]
    Allow,
    /// Calls are rejected.
    Deny,
}

/// What is done while the server cannot be reached, and no lease covers a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnUnreachable {
    Deny,
    Local,
    Allow,
}

/// The settings that judge one key of a policy.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Settings {
    pub(crate) kind: Kind,
    pub(crate) on_unreachable: OnUnreachable,
    /// How long leases live at most, and denials are remembered.
    pub(crate) lease_time: Duration,
    /// It only watches: nothing is denied, leased or held.
    pub(crate) shadow: bool,
}

/// What a policy limits.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    /// Rates and windows; of several each call is charged to all.
    Rate(Vec<Limit>),
    /// Rates and windows, of which some the client cannot count itself: they begin where people's do, in a time zone.
    Calendar,
    Concurrency(Concurrency),
    RetryBudget(RetryBudget),
    Breaker(Box<Breaker>),
}

/// Settings that this client cannot use: those of a later version, or of a server that is out of its mind.
#[derive(Debug, Error)]
#[error("{0}")]
pub(crate) struct InvalidSettings(String);

impl From<InvalidBreaker> for InvalidSettings {
    fn from(error: InvalidBreaker) -> Self {
        Self(error.to_string())
    }
}

#[allow(clippy::needless_pass_by_value)] // so that `map_err` takes it as it is
fn invalid(error: impl ToString) -> InvalidSettings {
    InvalidSettings(error.to_string())
}

impl TryFrom<v1::Policy> for Settings {
    type Error = InvalidSettings;

    fn try_from(policy: v1::Policy) -> Result<Self, InvalidSettings> {
        let on_unreachable = match policy.on_unreachable() {
            v1::OnUnreachable::Deny => OnUnreachable::Deny,
            v1::OnUnreachable::Local => OnUnreachable::Local,
            v1::OnUnreachable::Allow => OnUnreachable::Allow,
            v1::OnUnreachable::Unspecified => {
                return Err(invalid("a policy without `on_unreachable`"));
            }
        };
        let kind = match policy.kind.ok_or_else(|| invalid("a policy of no kind"))? {
            policy::Kind::TokenBucket(bucket) => Kind::Rate(vec![token_bucket(&bucket)?]),
            policy::Kind::SlidingWindow(window) => Kind::Rate(vec![sliding_window(&window)?]),
            policy::Kind::FixedWindow(window) => Kind::Rate(vec![fixed_window(&window)?]),
            policy::Kind::CalendarWindow(_) => Kind::Calendar,
            policy::Kind::Concurrency(permits) => {
                let ttl = duration(permits.ttl).unwrap_or_default();
                let limit = permits.limit.unwrap_or_default();
                Kind::Concurrency(Concurrency::new(limit, ttl).map_err(invalid)?)
            }
            policy::Kind::RetryBudget(budget) => Kind::RetryBudget(retry_budget(&budget)?),
            policy::Kind::Limits(limits) => several(limits)?,
            policy::Kind::Breaker(breaker) => Kind::Breaker(Box::new(self::breaker(breaker)?)),
        };
        let lease_time = duration(policy.lease_time).unwrap_or_default();
        Ok(Self { kind, on_unreachable, lease_time, shadow: policy.shadow })
    }
}

fn token_bucket(bucket: &v1::TokenBucket) -> Result<Limit, InvalidSettings> {
    let limit = bucket.limit.unwrap_or_default();
    let per = duration(bucket.per).unwrap_or_default();
    let burst = bucket.burst.unwrap_or(limit);
    TokenBucket::new(limit, per, burst).map(Limit::TokenBucket).map_err(invalid)
}

fn sliding_window(window: &v1::SlidingWindow) -> Result<Limit, InvalidSettings> {
    let per = duration(window.per).unwrap_or_default();
    let window = SlidingWindow::new(window.limit.unwrap_or_default(), per);
    window.map(Limit::SlidingWindow).map_err(invalid)
}

fn fixed_window(window: &v1::FixedWindow) -> Result<Limit, InvalidSettings> {
    let per = duration(window.per).unwrap_or_default();
    let window = WindowLimit::fixed(window.limit.unwrap_or_default(), per);
    window.map(Limit::Window).map_err(invalid)
}

fn retry_budget(budget: &v1::RetryBudget) -> Result<RetryBudget, InvalidSettings> {
    let per_mille = budget.ratio_basis_points.unwrap_or_default() / 10;
    let per_mille = u16::try_from(per_mille).map_err(invalid)?;
    let ttl = duration(budget.ttl).unwrap_or_default();
    RetryBudget::new(per_mille, budget.min_per_second.unwrap_or_default(), ttl).map_err(invalid)
}

fn several(limits: v1::Limits) -> Result<Kind, InvalidSettings> {
    let mut parsed = Vec::with_capacity(limits.limits.len());
    for limit in limits.limits {
        parsed.push(match limit.kind.ok_or_else(|| invalid("a limit of no kind"))? {
            limit::Kind::TokenBucket(bucket) => token_bucket(&bucket)?,
            limit::Kind::SlidingWindow(window) => sliding_window(&window)?,
            limit::Kind::FixedWindow(window) => fixed_window(&window)?,
            limit::Kind::CalendarWindow(_) => return Ok(Kind::Calendar),
        });
    }
    Ok(Kind::Rate(parsed))
}

fn share(basis_points: u32) -> Result<Share, InvalidSettings> {
    let share = u16::try_from(basis_points).ok().and_then(Share::new);
    share.ok_or_else(|| invalid("a share above all"))
}

fn breaker(breaker: v1::Breaker) -> Result<Breaker, InvalidSettings> {
    let length = |wire| duration(wire).unwrap_or_default();
    let window = match (breaker.count, breaker.consecutive_failures) {
        (Some(count), _) => circuit::WindowSettings::Calls(count),
        (_, Some(failures)) => circuit::WindowSettings::Consecutive(failures),
        _ => circuit::WindowSettings::Time(length(breaker.window)),
    };
    let backoff = breaker.backoff.unwrap_or_default();
    let half_open = breaker.half_open.unwrap_or_default();
    let ramp = breaker.ramp.unwrap_or_default();
    let steps = ramp.steps_basis_points.into_iter().map(share);
    let steps = steps.take(circuit::MAX_STEPS).collect::<Result<_, _>>()?;
    let slow_call = breaker.slow_call.map(|slow| {
        let rate = share(slow.rate_basis_points.unwrap_or_default())?;
        Ok::<_, InvalidSettings>(circuit::SlowCall { over: length(slow.over), rate })
    });
    Ok(Breaker::new(circuit::Settings {
        window,
        failure_rate: share(breaker.failure_rate_basis_points.unwrap_or_default())?,
        slow_call: slow_call.transpose()?,
        min_calls: breaker.min_calls.unwrap_or_default(),
        open_for: circuit::OpenFor {
            first: length(breaker.open_for),
            factor_hundredths: u16::try_from(backoff.factor_hundredths.unwrap_or_default())
                .map_err(invalid)?,
            max: length(backoff.max),
            jitter: share(backoff.jitter_basis_points.unwrap_or_default())?,
        },
        half_open: circuit::HalfOpen {
            probes: half_open.probes.unwrap_or_default(),
            max_in_flight: half_open.max_in_flight.unwrap_or_default(),
            probe_timeout: length(half_open.probe_timeout),
            max_duration: length(half_open.max_duration),
        },
        ramp: circuit::Ramp { steps, each: length(ramp.each) },
        min_reporters: breaker.min_reporters.unwrap_or_default(),
    })?)
}
