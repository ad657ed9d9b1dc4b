//! From decisions to messages.

use std::time::Duration;

use fusebox_core::{Admission, Reason};
use fusebox_proto::v1::{self, AcquireResponse, Decision, ReportResponse, ReportResult, Verdict};

use crate::{
    app::{Acquired, Reported},
    limits,
};

/// The answer to an Acquire.
pub(super) fn acquired(Acquired { decision, grant }: &Acquired) -> AcquireResponse {
    let mut verdicts: Vec<_> = decision.verdicts.iter().map(verdict).collect();
    let mut grant_id = String::new();
    if let Some((ask, grant)) = grant {
        grant_id = grant.to_string();
        verdicts[*ask].expires_in = Some(duration(limits::ESTIMATE_LIFE));
    }
    AcquireResponse {
        decision: if decision.allowed { Decision::Allow } else { Decision::Deny }.into(),
        grant_id,
        waited: None,
        verdicts,
    }
}

/// The answer to a Report.
pub(super) fn reported(results: &[Reported]) -> ReportResponse {
    let result = |reported: &Reported| match reported {
        Reported::Applied => ReportResult::Applied.into(),
        Reported::Duplicate => ReportResult::Duplicate.into(),
        Reported::UnknownGrant => ReportResult::UnknownGrant.into(),
    };
    ReportResponse { results: results.iter().map(result).collect(), ..Default::default() }
}

fn verdict(verdict: &fusebox_core::Verdict) -> Verdict {
    let (decision, reason, retry_after) = match verdict.admission {
        Admission::Allow => (Decision::Allow, v1::Reason::Unspecified, None),
        Admission::Deny { reason: Reason::RateLimited, retry_after } => {
            (Decision::Deny, v1::Reason::RateLimited, retry_after)
        }
        Admission::Deny { reason: Reason::Blocked, retry_after } => {
            (Decision::Deny, v1::Reason::Blocked, retry_after)
        }
    };
    Verdict {
        decision: decision.into(),
        reason: reason.into(),
        limit: Some(verdict.limit),
        remaining: Some(verdict.remaining),
        retry_after: retry_after.map(duration),
        reset_after: Some(duration(verdict.reset_after)),
        ..Default::default()
    }
}

#[allow(clippy::cast_possible_wrap)]
fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        // At most 584 years: the core counts nanoseconds in 64 bits.
        seconds: duration.as_secs() as i64,
        nanos: duration.subsec_nanos() as i32,
    }
}
