use std::fmt;

use tower::Layer;

use super::RateLimit;
use crate::{
    Limiter,
    layer::{OneKey, OneToken},
};

/// Takes tokens for each call, and rejects those that get none.
///
/// What a lease covers is neither asked for nor allocated. Tokens of a call that fails, or is dropped, stay spent.
#[derive(Clone)]
pub struct RateLimitLayer<K = OneKey, C = OneToken> {
    limiter: Limiter,
    key: K,
    cost: C,
}

impl RateLimitLayer {
    /// One token of the limiter's key for each call.
    #[must_use]
    pub fn new(limiter: Limiter) -> Self {
        Self { limiter, key: OneKey, cost: OneToken }
    }
}

impl<K, C> RateLimitLayer<K, C> {
    /// Which key a request is for: such as `|request: &Request| Cow::from(request.tenant.as_str())`.
    pub fn key_by<Request, F: Fn(&Request) -> std::borrow::Cow<'_, str>>(
        self,
        key: F,
    ) -> RateLimitLayer<F, C> {
        RateLimitLayer { limiter: self.limiter, key, cost: self.cost }
    }

    /// How many tokens a request costs.
    pub fn cost_by<Request, F: Fn(&Request) -> u64>(self, cost: F) -> RateLimitLayer<K, F> {
        RateLimitLayer { limiter: self.limiter, key: self.key, cost }
    }
}

impl<S, K: Clone, C: Clone> Layer<S> for RateLimitLayer<K, C> {
    type Service = RateLimit<S, K, C>;

    fn layer(&self, inner: S) -> Self::Service {
        RateLimit::new(inner, self.limiter.clone(), self.key.clone(), self.cost.clone())
    }
}

impl<K, C> fmt::Debug for RateLimitLayer<K, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimitLayer").field("limiter", &self.limiter).finish_non_exhaustive()
    }
}
