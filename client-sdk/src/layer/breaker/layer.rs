use std::{borrow::Cow, fmt};

use tower::{BoxError, Layer};

use super::{Breaker, Errors};
use crate::{breaker, layer::OneKey};

/// Rejects calls while the circuit is open, and tells it how the others went.
///
/// A call that a layer within rejects says nothing about the target; one that is dropped is abandoned. A call is over
/// when its response is there, also if a body follows.
#[derive(Clone)]
pub struct BreakerLayer<K = OneKey, C = Errors> {
    breaker: breaker::Breaker,
    key: K,
    classify: C,
}

impl BreakerLayer {
    /// By the circuit of the breaker's key; each error is a failure.
    #[must_use]
    pub fn new(breaker: breaker::Breaker) -> Self {
        Self { breaker, key: OneKey, classify: Errors }
    }
}

impl<K, C> BreakerLayer<K, C> {
    /// Which circuit a request goes through: such as `|request: &Request| Cow::from(request.host())`.
    pub fn key_by<Request, F: Fn(&Request) -> Cow<'_, str>>(self, key: F) -> BreakerLayer<F, C> {
        BreakerLayer { breaker: self.breaker, key, classify: self.classify }
    }

    /// How to tell failures from successes: [`HttpStatus`](super::HttpStatus), [`GrpcStatus`](super::GrpcStatus), or
    /// a function.
    pub fn classify<D>(self, classify: D) -> BreakerLayer<K, D> {
        BreakerLayer { breaker: self.breaker, key: self.key, classify }
    }

    /// How to tell failures from successes, by a function of the result.
    pub fn classify_by<Response, F>(self, classify: F) -> BreakerLayer<K, F>
    where
        F: Fn(Result<&Response, &BoxError>) -> breaker::Verdict,
    {
        self.classify(classify)
    }
}

impl<S, K: Clone, C: Clone> Layer<S> for BreakerLayer<K, C> {
    type Service = Breaker<S, K, C>;

    fn layer(&self, inner: S) -> Self::Service {
        Breaker::new(inner, self.breaker.clone(), self.key.clone(), self.classify.clone())
    }
}

impl<K, C> fmt::Debug for BreakerLayer<K, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BreakerLayer").field("breaker", &self.breaker).finish_non_exhaustive()
    }
}
