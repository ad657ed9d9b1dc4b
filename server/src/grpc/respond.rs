//! From decisions to messages.

use std::time::Duration;

use fusebox_core::{
    Admission, Reason, Time,
    circuit::{self, Generation, Mode, Passage, Refusal, State, View},
};
use fusebox_proto::v1::{
    self, AcquireResponse, CircuitMode, CircuitState, CircuitStatus, Decision, Renewal,
    ReportResponse, ReportResult, Verdict, WatchResponse,
};

use super::admin::policy;
use crate::{
    app::{Acquired, Crossed, Granted, News, Receipt, Renewed, Reported, Seen, sessions::Terms},
    limits,
    storage::CircuitName,
};

/// The answer to an Acquire, and what has to be known of it beside.
pub(super) struct Reply {
    /// The answer.
    pub(super) response: AcquireResponse,
    /// Whether it allows.
    pub(super) allowed: bool,
    /// How long what was granted lives, by ask.
    pub(super) lives: Vec<(usize, Duration)>,
    /// The grant, if there are permits or probes in it: they come back if nobody is told of it.
    pub(super) to_give_back: Option<Granted>,
}

impl Reply {
    /// How long all that was granted lives; for ever if nothing was.
    pub(super) fn lives(&self) -> Duration {
        self.lives.iter().map(|(_, life)| *life).min().unwrap_or(Duration::MAX)
    }
}

/// The answer to an Acquire, which stood in line for so long.
pub(super) fn acquired(acquired: &Acquired, waited: Option<Duration>) -> Reply {
    let Acquired { decided, circuits, at, grant, held } = acquired;
    let decision = &decided.decision;
    let mut verdicts = Vec::with_capacity(decision.verdicts.len() + circuits.len());
    verdicts.extend(decision.verdicts.iter().map(verdict));
    // In the order of the asks.
    for crossed in circuits {
        verdicts.insert(crossed.ask, crossing(crossed, *at));
    }
    for held in held {
        verdicts[held.ask].leased = held.leased;
        verdicts[held.ask].expires_in = Some(duration(held.expires_in));
    }
    let response = AcquireResponse {
        decision: if decision.allowed { Decision::Allow } else { Decision::Deny }.into(),
        grant_id: grant.as_ref().map(Granted::to_string).unwrap_or_default(),
        waited: waited.map(duration),
        verdicts,
    };
    Reply {
        response,
        allowed: decision.allowed,
        lives: held.iter().map(|held| (held.ask, held.expires_in)).collect(),
        to_give_back: grant.clone().filter(|_| held.iter().any(|held| held.permits)),
    }
}

/// The answer to a Report that renews the grants of these ids.
pub(super) fn reported(receipt: &Receipt, ids: Vec<String>, now: Time) -> ReportResponse {
    let result = |reported: &Reported| match reported {
        Reported::Applied => ReportResult::Applied.into(),
        Reported::Duplicate => ReportResult::Duplicate.into(),
        Reported::UnknownGrant => ReportResult::UnknownGrant.into(),
        Reported::StaleGeneration => ReportResult::StaleGeneration.into(),
        Reported::NotShared => ReportResult::NotShared.into(),
    };
    let renewal = |(grant_id, renewed): (String, &Renewed)| Renewal {
        grant_id,
        expires_in: Some(duration(*renewed)),
    };
    let circuit = |seen: &Seen| CircuitStatus {
        outlier: seen.outlier,
        valid_for: Some(duration(limits::STATUS_VALID)),
        ..circuit_status(&seen.name, &seen.view, now)
    };
    ReportResponse {
        results: receipt.results.iter().map(result).collect(),
        renewals: ids.into_iter().zip(&receipt.renewals).map(renewal).collect(),
        circuits: receipt.circuits.iter().map(circuit).collect(),
        duplicate: receipt.duplicate,
        delta_results: receipt.delta_results.iter().map(result).collect(),
    }
}

/// What holds for what a handle stands for.
pub(super) fn bound(handle: u32, Terms { settings, durability, clients }: Terms) -> v1::Bound {
    let policy = Some(policy::all_of(&settings, durability));
    v1::Bound { handle, policy, clients }
}

/// The verdict of an ask of a breaker.
fn crossing(crossed: &Crossed, now: Time) -> Verdict {
    let Crossed { passage, view, admitted, .. } = crossed;
    let (decision, reason, retry_after) = match *passage {
        Passage::Refused { refusal, retry_after } => {
            (Decision::Deny, refusal_reason(refusal), retry_after)
        }
        Passage::Free if view.is_none() => (Decision::Allow, v1::Reason::NotShared, None),
        Passage::Free | Passage::Probe => (Decision::Allow, v1::Reason::Unspecified, None),
    };
    let state = view.as_ref().map(|view| circuit_state(view.phase.state()));
    Verdict {
        decision: decision.into(),
        reason: reason.into(),
        retry_after: retry_after.map(duration),
        circuit_state: state.unwrap_or(CircuitState::Unspecified).into(),
        generation: view.as_ref().map_or(0, |view| view.generation.0),
        probe: admitted.is_some_and(|admitted| admitted.probe.is_some()),
        evidence: view.as_ref().and_then(|view| circuit_evidence(view, now)),
        ..Verdict::default()
    }
}

const fn refusal_reason(refusal: Refusal) -> v1::Reason {
    match refusal {
        Refusal::Open => v1::Reason::CircuitOpen,
        Refusal::ForcedOpen => v1::Reason::CircuitForcedOpen,
        Refusal::ProbesInUse => v1::Reason::ProbesInUse,
        Refusal::Ramping => v1::Reason::Ramping,
    }
}

/// What a watcher is told at once.
pub(super) fn news(news: News) -> WatchResponse {
    let News { epoch, version, snapshot, complete, circuits, absent, elapsed, now } = news;
    let circuits = circuits.iter().map(|(name, view)| match view {
        Some(view) => circuit_status(name, view, now),
        None => absent_status(name, absent),
    });
    WatchResponse {
        epoch,
        version,
        snapshot,
        complete,
        circuits: circuits.collect(),
        generation: absent.0,
        elapsed: Some(duration(elapsed)),
        valid_for: Some(duration(limits::WATCH_VALID)),
    }
}

/// A circuit that is not there.
fn absent_status(name: &CircuitName, absent: Generation) -> CircuitStatus {
    CircuitStatus {
        policy: name.breaker.policy.to_string(),
        key: name.key.to_string(),
        state: CircuitState::Closed.into(),
        mode: CircuitMode::Normal.into(),
        generation: absent.0,
        ..CircuitStatus::default()
    }
}

/// A circuit as it is told of, at this moment.
pub(super) fn circuit_status(name: &CircuitName, view: &View, now: Time) -> CircuitStatus {
    let left = |until: Time| duration(Duration::from_nanos(until.nanos_since(now)));
    CircuitStatus {
        policy: name.breaker.policy.to_string(),
        key: name.key.to_string(),
        state: circuit_state(view.phase.state()).into(),
        mode: circuit_mode(view.phase.mode()).into(),
        generation: view.generation.0,
        outlier: false,
        ramp_basis_points: view.ramp.map(|share| share.basis_points().into()),
        open_for: view.half_open_at.map(left),
        valid_for: None,
        evidence: circuit_evidence(view, now),
        mode_expires_in: view.forced.as_ref().map(|forced| left(forced.until)),
    }
}

/// Why a circuit is as it is, if it is not closed or somebody forced it.
pub(super) fn circuit_evidence(view: &View, now: Time) -> Option<v1::Evidence> {
    let mut told = view.evidence.as_deref().map(evidence);
    if let Some(forced) = &view.forced {
        told.get_or_insert_default().forced_reason = forced.reason.to_string();
    }
    if let Some(opened_at) = view.opened_at {
        let open_for = Duration::from_nanos(now.nanos_since(opened_at));
        told.get_or_insert_default().open_since = Some(duration(open_for));
    }
    told
}

/// What a circuit was opened by, or would be.
pub(super) fn evidence(evidence: &circuit::Evidence) -> v1::Evidence {
    v1::Evidence {
        failure_rate_basis_points: evidence.failure_rate.basis_points().into(),
        slow_rate_basis_points: evidence.slow_rate.basis_points().into(),
        calls: evidence.calls,
        reporters: evidence.reporters,
        unhealthy_reporters: evidence.unhealthy,
        zones: evidence.zones.iter().map(ToString::to_string).collect(),
        error_kinds: evidence.kinds.iter().map(ToString::to_string).collect(),
        forced_reason: String::new(),
        open_since: None,
    }
}

pub(super) const fn circuit_state(state: State) -> CircuitState {
    match state {
        State::Closed => CircuitState::Closed,
        State::Open => CircuitState::Open,
        State::HalfOpen => CircuitState::HalfOpen,
    }
}

pub(super) const fn circuit_mode(mode: Mode) -> CircuitMode {
    match mode {
        Mode::Normal => CircuitMode::Normal,
        Mode::ForcedOpen => CircuitMode::ForcedOpen,
        Mode::Disabled => CircuitMode::Disabled,
        Mode::MetricsOnly => CircuitMode::MetricsOnly,
    }
}

fn verdict(verdict: &fusebox_core::Verdict) -> Verdict {
    let (reason, retry_after) = match verdict.admission {
        Admission::Allow => (v1::Reason::Unspecified, None),
        Admission::Deny { reason, retry_after } => (self::reason(reason), retry_after),
    };
    // What only watches never denies; its reason says that it would have.
    let denies = verdict.admission != Admission::Allow && !verdict.shadow;
    let decision = if denies { Decision::Deny } else { Decision::Allow };
    Verdict {
        decision: decision.into(),
        reason: reason.into(),
        limit: Some(verdict.limit),
        remaining: Some(verdict.remaining),
        retry_after: retry_after.map(duration),
        reset_after: Some(duration(verdict.reset_after)),
        shadow: verdict.shadow,
        ..Default::default()
    }
}

fn reason(reason: Reason) -> v1::Reason {
    match reason {
        Reason::RateLimited => v1::Reason::RateLimited,
        Reason::ConcurrencyLimited => v1::Reason::ConcurrencyLimited,
        Reason::RetryBudgetExhausted => v1::Reason::RetryBudgetExhausted,
        Reason::ReservedForPriority => v1::Reason::ReservedForPriority,
        Reason::OverflowBucket => v1::Reason::OverflowBucket,
        Reason::LineFull => v1::Reason::LineFull,
        Reason::Blocked => v1::Reason::Blocked,
    }
}

/// A length of time.
#[allow(clippy::cast_possible_wrap)]
pub(super) fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        // At most 584 years: the core counts nanoseconds in 64 bits.
        seconds: duration.as_secs() as i64,
        nanos: duration.subsec_nanos() as i32,
    }
}
