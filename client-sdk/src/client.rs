//! A client: endpoints, options, handles, and its end.

use std::sync::Arc;

use crate::{
    breaker::{Breaker, Breakers},
    bulkhead::{Bulkhead, Bulkheads},
    limiter::{Limiter, Limiters},
    retry::{Retries, Retry},
};

/// A client of one namespace. Clones are the same client.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    limiters: Arc<Limiters>,
    bulkheads: Arc<Bulkheads>,
    breakers: Arc<Breakers>,
    retries: Arc<Retries>,
}

impl Client {
    /// The rate or window of a policy.
    #[must_use]
    pub fn limiter(&self, policy: &str) -> Limiter {
        self.inner.limiters.of(policy)
    }

    /// The permits of a policy.
    #[must_use]
    pub fn bulkhead(&self, policy: &str) -> Bulkhead {
        self.inner.bulkheads.of(policy)
    }

    /// The circuits of a breaker.
    #[must_use]
    pub fn breaker(&self, policy: &str) -> Breaker {
        self.inner.breakers.of(policy)
    }

    /// Retries, paid for by a retry budget.
    #[must_use]
    pub fn retry(&self, policy: &str) -> Retry {
        self.inner.retries.of(policy)
    }
}
