//! From decisions to messages.

use std::time::Duration;

use fusebox_core::{Admission, Reason};
use fusebox_proto::v1::{
    self, AcquireResponse, Decision, Renewal, ReportResponse, ReportResult, Verdict,
};

use crate::app::{Acquired, GrantId, Renewed, Reported};

/// The answer to an Acquire, and what has to be known of it beside.
pub(super) struct Reply {
    /// The answer.
    pub(super) response: AcquireResponse,
    /// Whether it allows.
    pub(super) allowed: bool,
    /// How long what was granted lives, by ask.
    pub(super) lives: Vec<(usize, Duration)>,
    /// The grant, if there are permits in it.
    pub(super) permits: Option<GrantId>,
}

impl Reply {
    /// How long all that was granted lives; for ever if nothing was.
    pub(super) fn lives(&self) -> Duration {
        self.lives.iter().map(|(_, life)| *life).min().unwrap_or(Duration::MAX)
    }
}

/// The answer to an Acquire, which stood in line for so long.
pub(super) fn acquired(acquired: &Acquired, waited: Option<Duration>) -> Reply {
    let Acquired { decided, grant, held } = acquired;
    let decision = &decided.decision;
    let mut verdicts: Vec<_> = decision.verdicts.iter().map(verdict).collect();
    for held in held {
        verdicts[held.ask].leased = held.leased;
        verdicts[held.ask].expires_in = Some(duration(held.expires_in));
    }
    let response = AcquireResponse {
        decision: if decision.allowed { Decision::Allow } else { Decision::Deny }.into(),
        grant_id: grant.map(|grant| grant.to_string()).unwrap_or_default(),
        waited: waited.map(duration),
        verdicts,
    };
    Reply {
        response,
        allowed: decision.allowed,
        lives: held.iter().map(|held| (held.ask, held.expires_in)).collect(),
        permits: grant.filter(|_| held.iter().any(|held| held.permits)).map(|grant| grant.id),
    }
}

/// The answer to a Report that renews the grants of these ids.
pub(super) fn reported(
    results: &[Reported],
    renewed: &[Renewed],
    ids: Vec<String>,
) -> ReportResponse {
    let result = |reported: &Reported| match reported {
        Reported::Applied => ReportResult::Applied.into(),
        Reported::Duplicate => ReportResult::Duplicate.into(),
        Reported::UnknownGrant => ReportResult::UnknownGrant.into(),
    };
    let renewal = |(grant_id, renewed): (String, &Renewed)| Renewal {
        grant_id,
        expires_in: Some(duration(*renewed)),
    };
    ReportResponse {
        results: results.iter().map(result).collect(),
        renewals: ids.into_iter().zip(renewed).map(renewal).collect(),
        ..Default::default()
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
