//! A client: handles, its state, and its end.

mod builder;
mod endpoint;
#[cfg(feature = "tls")]
mod tls;

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
};

#[cfg(feature = "tls")]
pub use self::tls::Tls;
pub use self::{
    builder::{BuildError, ClientBuilder},
    endpoint::Endpoints,
};
use crate::{
    breaker::{Breaker, Breakers},
    bulkhead::{Bulkhead, Bulkheads},
    context::Context,
    limiter::{Limiter, Limiters},
    part::Part,
    retry::{Retries, Retry},
    session::Wire,
    telemetry::Counts,
};

/// A client of one namespace. Clones are the same client.
///
/// It lives as long as a clone of it does, or a handle. When the last of them is dropped its tasks end, and nothing is
/// said to the server: what the client held there lives until it expires. [`close`](Self::close) gives it back.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    wire: Arc<Wire>,
    context: Arc<Context>,
    limiters: Arc<Limiters>,
    bulkheads: Arc<Bulkheads>,
    breakers: Arc<Breakers>,
    retries: Arc<Retries>,
}

impl Inner {
    fn parts(&self) -> [Arc<dyn Part>; 4] {
        [
            Arc::clone(&self.limiters) as _,
            Arc::clone(&self.bulkheads) as _,
            Arc::clone(&self.breakers) as _,
            Arc::clone(&self.retries) as _,
        ]
    }
}

impl Client {
    /// A client of the server that answers at these endpoints: 1 to 16 of them, such as `http://127.0.0.1:3873`, all
    /// of one state. One of them is used at a time by each connection, and another one when it fails.
    pub fn connect(endpoints: impl Endpoints) -> ClientBuilder {
        ClientBuilder::new(endpoints.into_endpoints())
    }

    /// The rate or window of a policy, by its name: a token bucket, a window, or several of them.
    ///
    /// As all handles it is had at once, and asks nobody. That there is no such policy, or it is of another kind, shows
    /// at the first call, and as [`Event::Refused`](crate::telemetry::Event::Refused).
    #[must_use]
    pub fn limiter(&self, policy: &str) -> Limiter {
        self.inner.limiters.of(policy)
    }

    /// The permits of a policy of kind `concurrency`.
    #[must_use]
    pub fn bulkhead(&self, policy: &str) -> Bulkhead {
        self.inner.bulkheads.of(policy)
    }

    /// The circuits of a policy of kind `breaker`. Of a name that the server does not know each process has its own
    /// breakers all the same.
    #[must_use]
    pub fn breaker(&self, policy: &str) -> Breaker {
        self.inner.breakers.of(policy)
    }

    /// Retries, paid for by a policy of kind `retry_budget`. Without one, see [`Retry::local`].
    #[must_use]
    pub fn retry(&self, policy: &str) -> Retry {
        self.inner.retries.of(policy)
    }

    /// Whether a session is up.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.inner.context.exchange.is_up()
    }

    /// Returns when a session is up; at once if one is. Never, if none comes up: who waits decides for how long.
    ///
    /// Nothing needs it: handles answer before. It is for readiness checks and tests. Dropping the future changes
    /// nothing.
    pub async fn connected(&self) {
        self.inner.wire.is_connected().await;
    }

    /// What was counted since the client was built.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let telemetry = &self.inner.context.telemetry;
        let mut counts = Counts {
            memory: telemetry.memory.load(Ordering::Relaxed),
            server: telemetry.server.load(Ordering::Relaxed),
            local: telemetry.local.load(Ordering::Relaxed),
            fallback: telemetry.fallback.load(Ordering::Relaxed),
            rejected: telemetry.rejected.load(Ordering::Relaxed),
            messages_sent: telemetry.messages_sent.load(Ordering::Relaxed),
            connects: telemetry.connects.load(Ordering::Relaxed),
            disconnects: telemetry.disconnects.load(Ordering::Relaxed),
            permits_expired: telemetry.permits_expired.load(Ordering::Relaxed),
        };
        for part in self.inner.parts() {
            part.count(&mut counts);
        }
        counts
    }

    /// Ends the client, for all clones and handles: returns unused tokens and permits, sends the last reports, and
    /// has the server end all that is left of it.
    ///
    /// It takes as long as the server needs to answer, and at most four seconds: half a second of that to wait for
    /// a session if none is up. Afterwards nothing is asked any more, and handles decide as without a server. It
    /// goes on if the future is dropped; calling it again waits for the same end.
    pub async fn close(&self) {
        self.inner.wire.close().await;
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("is_connected", &self.is_connected()).finish_non_exhaustive()
    }
}
