//! What is told, and what becomes of it.

use fusebox_proto::v1;

/// How a granted call went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    grant_id: String,
    actual_cost: Option<u64>,
}

impl Outcome {
    /// The call of this grant cost so many tokens in all.
    pub fn cost(grant_id: impl Into<String>, actual_cost: u64) -> Self {
        Self { grant_id: grant_id.into(), actual_cost: Some(actual_cost) }
    }

    /// The call of this grant is over: it gives its permits back, and cost what was estimated.
    pub fn as_estimated(grant_id: impl Into<String>) -> Self {
        Self { grant_id: grant_id.into(), actual_cost: None }
    }
}

impl From<Outcome> for v1::GrantOutcome {
    fn from(outcome: Outcome) -> Self {
        Self { grant_id: outcome.grant_id, actual_cost: outcome.actual_cost, ..Default::default() }
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
}

impl TryFrom<i32> for Reported {
    type Error = &'static str;

    fn try_from(result: i32) -> Result<Self, &'static str> {
        match v1::ReportResult::try_from(result) {
            Ok(v1::ReportResult::Applied) => Ok(Self::Applied),
            Ok(v1::ReportResult::Duplicate) => Ok(Self::Duplicate),
            Ok(v1::ReportResult::UnknownGrant) => Ok(Self::UnknownGrant),
            _ => Err("a result that this client does not know"),
        }
    }
}
