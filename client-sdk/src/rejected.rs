//! Why a call was not let through.

use std::{fmt, sync::Arc, time::Duration};

use fusebox_proto::v1;
use thiserror::Error;

use crate::binding::Binding;

/// A call that was not let through, and why. It reached no target, and charged nothing that is not given back.
///
/// Clones share what is long; making one does not allocate.
#[derive(Clone, Error)]
pub struct Rejected {
    /// Of what: both names behind one count, which threads that are rejected at the same time contend for.
    binding: Arc<Binding>,
    /// Why.
    pub reason: Reason,
    /// After which the same may be let through, if that is a matter of time and somebody knows: a lone caller would be
    /// then.
    pub retry_after: Option<Duration>,
    /// Who says so.
    pub decider: Decider,
    /// Of a circuit: why it is open.
    pub evidence: Option<Arc<Evidence>>,
}

impl Rejected {
    #[inline]
    pub(crate) fn new(
        binding: &Arc<Binding>,
        reason: Reason,
        retry_after: Option<Duration>,
        decider: Decider,
        evidence: Option<Arc<Evidence>>,
    ) -> Self {
        Self { binding: Arc::clone(binding), reason, retry_after, decider, evidence }
    }

    /// Name of the policy.
    #[must_use]
    pub fn policy(&self) -> &str {
        &self.binding.policy
    }

    /// Which key of it.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.binding.key
    }
}

#[cfg(test)]
impl Rejected {
    /// A rejection by a limit, out of memory.
    pub(crate) fn of_names(policy: &str, key: &str) -> Self {
        let binding = Arc::new(Binding::new(policy, key, 0));
        Self::new(&binding, Reason::RateLimited, None, Decider::Memory, None)
    }
}

impl fmt::Debug for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rejected")
            .field("policy", &self.policy())
            .field("key", &self.key())
            .field("reason", &self.reason)
            .field("retry_after", &self.retry_after)
            .field("decider", &self.decider)
            .field("evidence", &self.evidence)
            .finish()
    }
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { reason, retry_after, decider, evidence, .. } = self;
        let (policy, key) = (self.policy(), self.key());
        write!(f, "rejected by `{policy}`")?;
        if !key.is_empty() {
            write!(f, " for `{key}`")?;
        }
        write!(f, ": {reason}")?;
        if let Some(evidence) = evidence {
            write!(f, " ({evidence})")?;
        }
        match decider {
            Decider::Server | Decider::Memory => {}
            Decider::Local => write!(f, ", as this process sees it by itself")?,
            Decider::Fallback => write!(f, ", because the server cannot be reached")?,
        }
        if let Some(retry_after) = retry_after {
            write!(f, "; again in {retry_after:?}")?;
        }
        Ok(())
    }
}

/// Why a call was not let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum Reason {
    /// The rate is used up.
    #[error("the rate is used up")]
    RateLimited,
    /// All permits are held.
    #[error("all permits are held")]
    ConcurrencyLimited,
    /// The retry budget is spent.
    #[error("the retry budget is spent")]
    RetryBudgetExhausted,
    /// The circuit is open.
    #[error("the circuit is open")]
    CircuitOpen,
    /// An operator forced the circuit open.
    #[error("an operator forced the circuit open")]
    CircuitForcedOpen,
    /// The circuit is half-open, and all its probes are under way.
    #[error("the circuit is half-open, and all its probes are under way")]
    ProbesInUse,
    /// The circuit closed a moment ago, and lets a share of the calls through.
    #[error("the circuit closed a moment ago, and lets a share of the calls through")]
    Ramping,
    /// What is left is kept for callers of a higher priority.
    #[error("what is left is kept for a higher priority")]
    ReservedForPriority,
    /// Too many wait in line already.
    #[error("too many wait in line")]
    LineFull,
    /// The key shares a bucket with others, for want of room, and it is used up.
    #[error("the bucket that it shares with others is used up")]
    OverflowBucket,
    /// The policy denies all.
    #[error("the policy denies all")]
    Blocked,
    /// There is no decision in memory, and the caller did not wait for one.
    #[error("not decided yet")]
    Undecided,
    /// There is no decision: the server cannot be reached, and the policy says to deny then.
    #[error("there is no decision")]
    Unreachable,
    /// The server could not decide, for a mistake: no such policy, or a cost that could never be granted. An event
    /// tells which.
    #[error("the server could not decide")]
    Refused,
    /// The client is closed.
    #[error("the client is closed")]
    Closed,
}

impl Reason {
    /// The reason of a denial on the wire. One that this client does not know is a rate that is used up, as far as it
    /// can tell.
    pub(crate) fn of(reason: i32) -> Self {
        match v1::Reason::try_from(reason).unwrap_or_default() {
            v1::Reason::ConcurrencyLimited => Self::ConcurrencyLimited,
            v1::Reason::RetryBudgetExhausted => Self::RetryBudgetExhausted,
            v1::Reason::CircuitOpen => Self::CircuitOpen,
            v1::Reason::CircuitForcedOpen => Self::CircuitForcedOpen,
            v1::Reason::ProbesInUse => Self::ProbesInUse,
            v1::Reason::Ramping => Self::Ramping,
            v1::Reason::ReservedForPriority => Self::ReservedForPriority,
            v1::Reason::LineFull => Self::LineFull,
            v1::Reason::OverflowBucket => Self::OverflowBucket,
            v1::Reason::Blocked => Self::Blocked,
            v1::Reason::Unspecified | v1::Reason::RateLimited | v1::Reason::NotShared => {
                Self::RateLimited
            }
        }
    }
}

/// Who decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decider {
    /// The server, for this very call.
    Server,
    /// What the server told before: a lease, a denial that is remembered, a shared circuit.
    Memory,
    /// This process by what it sees itself: its own breaker, or its share of a limit while the server cannot be reached.
    Local,
    /// Nobody: the server cannot be reached, and this is what the policy, or
    /// [`Fallback`](crate::Fallback), says to do then.
    Fallback,
}

/// Why a circuit is open.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Evidence {
    /// Share of the calls that failed, from 0 to 1.
    pub failure_rate: f64,
    /// Share of the calls that were slow, from 0 to 1.
    pub slow_rate: f64,
    /// Calls that this is about.
    pub calls: u64,
    /// Processes that made them.
    pub reporters: u32,
    /// Of those, the ones that see the target failing themselves.
    pub unhealthy_reporters: u32,
    /// Zones of those.
    pub zones: Vec<String>,
    /// Kinds of failure, the most frequent first.
    pub error_kinds: Vec<String>,
    /// Why an operator forced it; empty if nobody did.
    pub forced_reason: String,
    /// How long the circuit had not been closed when this was told.
    pub open_since: Duration,
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.forced_reason.is_empty() {
            return write!(f, "{:?}", self.forced_reason);
        }
        let (failed, slow) = (self.failure_rate * 100.0, self.slow_rate * 100.0);
        write!(f, "{failed:.0}% of {} calls failed", self.calls)?;
        if slow > 0.0 {
            write!(f, ", {slow:.0}% were slow")?;
        }
        if self.reporters > 1 {
            write!(f, ", told by {} of {} processes", self.unhealthy_reporters, self.reporters)?;
        }
        match self.error_kinds.first() {
            Some(kind) => write!(f, ", most of them {kind:?}"),
            None => Ok(()),
        }
    }
}

impl From<v1::Evidence> for Evidence {
    fn from(evidence: v1::Evidence) -> Self {
        let share = |basis_points: u32| f64::from(basis_points) / 10_000.0;
        Self {
            failure_rate: share(evidence.failure_rate_basis_points),
            slow_rate: share(evidence.slow_rate_basis_points),
            calls: evidence.calls,
            reporters: evidence.reporters,
            unhealthy_reporters: evidence.unhealthy_reporters,
            zones: evidence.zones,
            error_kinds: evidence.error_kinds,
            forced_reason: evidence.forced_reason,
            open_since: crate::exchange::duration(evidence.open_since).unwrap_or_default(),
        }
    }
}
