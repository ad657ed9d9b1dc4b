//! What is asked, and what is answered.

use std::time::Duration;

use fusebox_proto::v1;

/// One thing to be charged: a policy, a key and a cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    policy: String,
    key: String,
    cost: u64,
    estimated: bool,
}

impl Ask {
    /// One token of `policy` for `key`; an empty key is one bucket for all.
    pub fn new(policy: impl Into<String>, key: impl Into<String>) -> Self {
        Self { policy: policy.into(), key: key.into(), cost: 1, estimated: false }
    }

    /// So many tokens; 0 is a peek, which charges nothing.
    #[must_use]
    pub fn cost(self, cost: u64) -> Self {
        Self { cost, ..self }
    }

    /// The cost is an estimate: report the true one with the grant of the answer.
    #[must_use]
    pub fn estimated(self) -> Self {
        Self { estimated: true, ..self }
    }
}

impl From<Ask> for v1::Ask {
    fn from(ask: Ask) -> Self {
        Self {
            policy: ask.policy,
            key: ask.key,
            cost: Some(ask.cost),
            estimated: ask.estimated,
            ..Default::default()
        }
    }
}

/// The answer to an Acquire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acquired {
    /// Every ask was charged; otherwise none was.
    pub allowed: bool,
    /// What to report with, if something is owed.
    pub grant_id: Option<String>,
    /// One for each ask, in their order.
    pub verdicts: Vec<Verdict>,
}

impl Acquired {
    /// The longest wait that any ask was told; `None` if nothing was denied, or no wait mends it.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        let denied = self.verdicts.iter().filter(|verdict| !verdict.allowed);
        denied.map(|verdict| verdict.retry_after).collect::<Option<Vec<_>>>()?.into_iter().max()
    }
}

/// The answer to one ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether this ask alone could be charged.
    pub allowed: bool,
    /// Why not, if it could not; or why it could not have been, if the policy only watches.
    pub reason: Option<Reason>,
    /// The policy only watches: it never denies.
    pub shadow: bool,
    /// Most tokens that could ever be granted at once.
    pub limit: Option<u64>,
    /// Tokens left now.
    pub remaining: Option<u64>,
    /// When denied: time after which a lone caller would be allowed.
    pub retry_after: Option<Duration>,
    /// Time until the bucket is full if nobody charges it.
    pub reset_after: Option<Duration>,
    /// Time to live of the grant that this ask opened.
    pub expires_in: Option<Duration>,
}

/// Why an ask was denied, or would have been.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// The rate is used up.
    RateLimited,
    /// All permits are held.
    ConcurrencyLimited,
    /// The retry budget is spent.
    RetryBudgetExhausted,
    /// What is left is kept for callers of a higher priority.
    ReservedForPriority,
    /// The key shares a bucket with others, for want of room, and it is used up.
    OverflowBucket,
    /// The policy denies all.
    Blocked,
    /// The circuit is open.
    CircuitOpen,
    /// An operator forced the circuit open.
    CircuitForcedOpen,
    /// The circuit is half-open, and all its probes are under way.
    ProbesInUse,
    /// The circuit closed a moment ago, and lets a share of the calls through.
    Ramping,
    /// There are too many circuits to share this one. Not a reason to deny.
    NotShared,
    /// One that this client does not know, by its number on the wire.
    Other(i32),
}

impl TryFrom<v1::AcquireResponse> for Acquired {
    type Error = &'static str;

    fn try_from(response: v1::AcquireResponse) -> Result<Self, &'static str> {
        Ok(Self {
            allowed: allowed(response.decision)?,
            grant_id: Some(response.grant_id).filter(|id| !id.is_empty()),
            verdicts: response
                .verdicts
                .into_iter()
                .map(Verdict::try_from)
                .collect::<Result<_, _>>()?,
        })
    }
}

impl TryFrom<v1::Verdict> for Verdict {
    type Error = &'static str;

    fn try_from(verdict: v1::Verdict) -> Result<Self, &'static str> {
        let reason = match v1::Reason::try_from(verdict.reason) {
            Ok(v1::Reason::Unspecified) => None,
            Ok(v1::Reason::RateLimited) => Some(Reason::RateLimited),
            Ok(v1::Reason::ConcurrencyLimited) => Some(Reason::ConcurrencyLimited),
            Ok(v1::Reason::RetryBudgetExhausted) => Some(Reason::RetryBudgetExhausted),
            Ok(v1::Reason::ReservedForPriority) => Some(Reason::ReservedForPriority),
            Ok(v1::Reason::OverflowBucket) => Some(Reason::OverflowBucket),
            Ok(v1::Reason::Blocked) => Some(Reason::Blocked),
            Ok(v1::Reason::CircuitOpen) => Some(Reason::CircuitOpen),
            Ok(v1::Reason::CircuitForcedOpen) => Some(Reason::CircuitForcedOpen),
            Ok(v1::Reason::ProbesInUse) => Some(Reason::ProbesInUse),
            Ok(v1::Reason::Ramping) => Some(Reason::Ramping),
            Ok(v1::Reason::NotShared) => Some(Reason::NotShared),
            _ => Some(Reason::Other(verdict.reason)),
        };
        Ok(Self {
            allowed: allowed(verdict.decision)?,
            reason,
            shadow: verdict.shadow,
            limit: verdict.limit,
            remaining: verdict.remaining,
            retry_after: duration(verdict.retry_after)?,
            reset_after: duration(verdict.reset_after)?,
            expires_in: duration(verdict.expires_in)?,
        })
    }
}

fn allowed(decision: i32) -> Result<bool, &'static str> {
    match v1::Decision::try_from(decision) {
        Ok(v1::Decision::Allow) => Ok(true),
        Ok(v1::Decision::Deny) => Ok(false),
        _ => Err("a decision that is neither allow nor deny"),
    }
}

fn duration(duration: Option<prost_types::Duration>) -> Result<Option<Duration>, &'static str> {
    duration.map(Duration::try_from).transpose().map_err(|_| "a negative duration")
}
