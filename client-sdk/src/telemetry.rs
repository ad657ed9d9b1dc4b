//! What a client tells of itself: counters, events of `tracing`, and an observer for your own.

use std::{
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{Decider, Reason};

/// Hears what happens to a client. Called from its tasks and, of decisions that are not [`Decider::Memory`], from the
/// calls themselves: it must not block. If it panics, that is logged and goes no further.
pub trait Observer: Send + Sync + 'static {
    /// Something happened.
    fn observe(&self, event: &Event<'_>);
}

impl<F: Fn(&Event<'_>) + Send + Sync + 'static> Observer for F {
    fn observe(&self, event: &Event<'_>) {
        self(event);
    }
}

/// Something that happens to a client.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A session is up.
    Connected {
        /// Of which endpoint.
        endpoint: &'a str,
        /// The state that the server decides by.
        truth_id: &'a str,
        /// The server's start.
        boot: u64,
    },
    /// No session is up any more, or still none: calls are decided by leases, then by what the policies say.
    Disconnected {
        /// Of which endpoint.
        endpoint: &'a str,
        /// Why.
        cause: &'a str,
        /// When the next is tried.
        again_in: Duration,
    },
    /// The server answers with another state than before: all that was held of the other is dropped.
    Replaced {
        /// The state of before.
        former: &'a str,
        /// The state from now on.
        truth_id: &'a str,
    },
    /// A key is decided without the server from now on, or by it again.
    Degraded {
        /// Name of the policy.
        policy: &'a str,
        /// Which key of it.
        key: &'a str,
        /// How it is decided.
        decider: Decider,
        /// Whether it begins; else it ends.
        begins: bool,
    },
    /// A circuit changed, as this process sees it.
    Circuit {
        /// Name of the breaker.
        policy: &'a str,
        /// Which circuit of it.
        key: &'a str,
        /// Whose change: the fleet's, told by the server, or this process's own breaker.
        decider: Decider,
        /// Whether calls go through from now on.
        closed: bool,
    },
    /// A permit outlived its time to live without a renewal: its holder is over the limit by itself.
    PermitExpired {
        /// Name of the policy.
        policy: &'a str,
        /// Which key of it.
        key: &'a str,
    },
    /// The server could not decide, for a mistake of this client or its configuration.
    Refused {
        /// Name of the policy; empty if it is not of one.
        policy: &'a str,
        /// Which key of it.
        key: &'a str,
        /// The code of gRPC.
        code: tonic::Code,
        /// What is wrong.
        message: &'a str,
    },
    /// Something was dropped because there was no room for it: it is lost, and counts as the name says.
    Dropped {
        /// What.
        what: &'static str,
        /// How many.
        count: u64,
    },
}

/// What a client counted since it was built. Decisions that are made by memory are counted by the handles, and added
/// up here when asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Decisions by leases, remembered denials and shared circuits: no round trip.
    pub memory: u64,
    /// Decisions by the server, for the very call.
    pub server: u64,
    /// Decisions of this process by itself, while it could not reach the server or because its own breaker was open.
    pub local: u64,
    /// Decisions by nobody, as the policy or the fallback says.
    pub fallback: u64,
    /// Calls that were rejected, by whomever.
    pub rejected: u64,
    /// Messages that were sent to the server, heartbeats not among them.
    pub messages_sent: u64,
    /// Sessions that came up.
    pub connects: u64,
    /// Sessions that ended otherwise than by `close`.
    pub disconnects: u64,
    /// Permits that expired while they were held.
    pub permits_expired: u64,
}

/// The counters behind [`Counts`], and who hears events.
#[derive(Default)]
pub(crate) struct Telemetry {
    pub(crate) memory: AtomicU64,
    pub(crate) server: AtomicU64,
    pub(crate) local: AtomicU64,
    pub(crate) fallback: AtomicU64,
    pub(crate) rejected: AtomicU64,
    pub(crate) messages_sent: AtomicU64,
    pub(crate) connects: AtomicU64,
    pub(crate) disconnects: AtomicU64,
    pub(crate) permits_expired: AtomicU64,
    pub(crate) observer: Option<Arc<dyn Observer>>,
}

impl Telemetry {
    /// Tells who observes, and `tracing`.
    pub(crate) fn tell(&self, event: &Event<'_>) {
        match event {
            Event::Connected { endpoint, truth_id, boot } => {
                tracing::info!(endpoint, truth_id, boot, "connected");
            }
            Event::Disconnected { endpoint, cause, again_in } => {
                tracing::warn!(endpoint, cause, ?again_in, "disconnected");
            }
            Event::Replaced { former, truth_id } => {
                tracing::warn!(former, truth_id, "the server has another state than before");
            }
            Event::Degraded { policy, key, decider, begins: true } => {
                tracing::warn!(policy, key, ?decider, "decided without the server");
            }
            Event::Degraded { policy, key, begins: false, .. } => {
                tracing::info!(policy, key, "decided with the server again");
            }
            Event::Circuit { policy, key, decider, closed } => {
                tracing::info!(policy, key, ?decider, closed, "a circuit changed");
            }
            Event::PermitExpired { policy, key } => {
                tracing::warn!(policy, key, "a permit expired while it was held");
            }
            Event::Refused { policy, key, code, message } => {
                tracing::error!(policy, key, ?code, message, "the server could not decide");
            }
            Event::Dropped { what, count } => tracing::warn!(what, count, "dropped"),
        }
        let Some(observer) = &self.observer else { return };
        // What it does is the user's: a client must not end by it.
        let observed = panic::catch_unwind(AssertUnwindSafe(|| observer.observe(event)));
        if observed.is_err() {
            tracing::error!(?event, "the observer panicked");
        }
    }

    /// Counts one decision of somebody else than memory, whose decisions the handles count themselves.
    pub(crate) fn decided(&self, decider: Decider) {
        let counter = match decider {
            Decider::Memory => &self.memory,
            Decider::Server => &self.server,
            Decider::Local => &self.local,
            Decider::Fallback => &self.fallback,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one rejection.
    pub(crate) fn rejected(&self, decider: Decider, _reason: Reason) {
        self.decided(decider);
        self.rejected.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_observer_that_panics_takes_nobody_along() {
        let observer = |_: &Event<'_>| panic!("as observers do");
        let telemetry = Telemetry { observer: Some(Arc::new(observer)), ..Telemetry::default() };
        telemetry.tell(&Event::Dropped { what: "nothing", count: 0 });
    }
}
