use std::{borrow::Cow, fmt};

use tower::Layer;

use super::Retry;
use crate::{layer::OneKey, retry};

/// Makes calls that fail again, as often as the retry budget allows.
///
/// A rejection by a layer within is never tried again. Where the retries have a deadline, a try that is under way then
/// ends with [`TimedOut`](crate::TimedOut).
#[derive(Clone)]
pub struct RetryLayer<P, K = OneKey> {
    retry: retry::Retry,
    policy: P,
    key: K,
}

impl<P> RetryLayer<P> {
    /// Makes those calls again that `policy` says.
    #[must_use]
    pub fn new(retry: retry::Retry, policy: P) -> Self {
        Self { retry, policy, key: OneKey }
    }
}

impl<P, K> RetryLayer<P, K> {
    /// By which key a request pays for retries: such as `|request: &Request| Cow::from(request.host())`.
    pub fn key_by<Request, F: Fn(&Request) -> Cow<'_, str>>(self, key: F) -> RetryLayer<P, F> {
        RetryLayer { retry: self.retry, policy: self.policy, key }
    }
}

impl<S, P: Clone, K: Clone> Layer<S> for RetryLayer<P, K> {
    type Service = Retry<S, P, K>;

    fn layer(&self, inner: S) -> Self::Service {
        Retry::new(inner, self.retry.clone(), self.policy.clone(), self.key.clone())
    }
}

impl<P, K> fmt::Debug for RetryLayer<P, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryLayer").field("retry", &self.retry).finish_non_exhaustive()
    }
}
