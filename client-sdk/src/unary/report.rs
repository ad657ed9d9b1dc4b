//! What is told, and what becomes of it.

use std::time::Duration;

use fusebox_proto::v1;

/// How a granted call went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    grant_id: String,
    actual_cost: Option<u64>,
    outcome: v1::Outcome,
    latency: Option<Duration>,
}

impl Outcome {
    /// The call of this grant cost so many tokens in all.
    pub fn cost(grant_id: impl Into<String>, actual_cost: u64) -> Self {
        Self { actual_cost: Some(actual_cost), ..Self::as_estimated(grant_id) }
    }

    /// The call of this grant is over: it gives its permits back, and cost what was estimated.
    pub fn as_estimated(grant_id: impl Into<String>) -> Self {
        let outcome = v1::Outcome::Unspecified;
        Self { grant_id: grant_id.into(), actual_cost: None, outcome, latency: None }
    }

    /// The call of this grant went through a circuit and did what it should, in so much time.
    pub fn success(grant_id: impl Into<String>, latency: Duration) -> Self {
        let outcome = v1::Outcome::Success;
        Self { outcome, latency: Some(latency), ..Self::as_estimated(grant_id) }
    }

    /// The call of this grant went through a circuit, and its target failed, in so much time.
    pub fn failure(grant_id: impl Into<String>, latency: Duration) -> Self {
        Self { outcome: v1::Outcome::Failure, ..Self::success(grant_id, latency) }
    }
}

impl From<Outcome> for v1::GrantOutcome {
    fn from(outcome: Outcome) -> Self {
        // Of years, which the server refuses, what a message can hold.
        let latency = outcome.latency.map(|latency| latency.try_into().unwrap_or_default());
        Self {
            grant_id: outcome.grant_id,
            actual_cost: outcome.actual_cost,
            outcome: outcome.outcome.into(),
            latency,
            ..Default::default()
        }
    }
}

/// What became of an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reported {
    /// The grant is settled.
    Applied,
    /// It had been settled before; nothing changed.
    Duplicate,
    /// There is no such grant, or no longer; nothing changed.
    UnknownGrant,
    /// The circuit has moved on since the call was let through; nothing changed.
    StaleGeneration,
}

impl TryFrom<i32> for Reported {
    type Error = &'static str;

    fn try_from(result: i32) -> Result<Self, &'static str> {
        match v1::ReportResult::try_from(result) {
            Ok(v1::ReportResult::Applied) => Ok(Self::Applied),
            Ok(v1::ReportResult::Duplicate) => Ok(Self::Duplicate),
            Ok(v1::ReportResult::UnknownGrant) => Ok(Self::UnknownGrant),
            Ok(v1::ReportResult::StaleGeneration) => Ok(Self::StaleGeneration),
            _ => Err("a result that this client does not know"),
        }
    }
}
