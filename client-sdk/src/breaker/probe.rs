//! Probes that the server granted.

use std::{mem, sync::Arc, time::Duration};

use fusebox_core::{Time, circuit::Outcome};
use fusebox_proto::v1;

use super::{circuit::Circuit, news::cut};
use crate::{Evidence, Reason};

/// The longest latency that may be told.
const LATENCY_MOST: Duration = Duration::from_secs(24 * 60 * 60);

/// A probe, to be told of by its grant.
#[derive(Debug)]
pub(super) struct Grant {
    pub(super) id: String,
    /// The server takes it to have failed soon after.
    pub(super) until: Time,
}

impl Grant {
    /// Whether it has more than `least` to live.
    pub(super) fn lives(&self, now: Time, least: Duration) -> bool {
        now.after(least) < self.until
    }

    /// It was not made use of.
    pub(super) fn given_back(self) -> v1::GrantOutcome {
        let outcome = v1::Outcome::Abandoned.into();
        v1::GrantOutcome { grant_id: self.id, outcome, ..v1::GrantOutcome::default() }
    }

    /// It ended so.
    pub(super) fn outcome(
        self,
        outcome: Outcome,
        latency: Duration,
        kind: &str,
    ) -> v1::GrantOutcome {
        let outcome = match outcome {
            Outcome::Success => v1::Outcome::Success,
            Outcome::Failure => v1::Outcome::Failure,
            Outcome::LocalFailure => v1::Outcome::LocalFailure,
            Outcome::Ignored => v1::Outcome::Ignored,
            Outcome::Abandoned => return self.given_back(),
        };
        v1::GrantOutcome {
            grant_id: self.id,
            outcome: outcome.into(),
            latency: latency.min(LATENCY_MOST).try_into().ok(),
            error_kind: cut(kind).to_owned(),
            ..v1::GrantOutcome::default()
        }
    }
}

/// What the server says to a call that waits for it.
#[derive(Debug)]
pub(super) enum Offer {
    /// It is a probe.
    Probe(Held),
    /// The circuit is not half-open: what was told says what becomes of the call.
    Again,
    /// It is refused.
    Denied { reason: Reason, retry_after: Option<Duration>, evidence: Option<Arc<Evidence>> },
}

/// A probe on its way to its caller. If that has left, the next one has it.
pub(super) struct Held {
    circuit: Arc<Circuit>,
    grant: Option<Grant>,
}

impl Held {
    pub(super) fn new(circuit: &Arc<Circuit>, grant: Grant) -> Self {
        Self { circuit: Arc::clone(circuit), grant: Some(grant) }
    }

    /// The probe, unless its time is over.
    pub(super) fn take(mut self, now: Time) -> Option<Grant> {
        self.grant.take_if(|grant| grant.lives(now, Duration::ZERO))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(grant) = mem::take(&mut self.grant) {
            self.circuit.pocket(grant);
        }
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.grant.fmt(f)
    }
}
