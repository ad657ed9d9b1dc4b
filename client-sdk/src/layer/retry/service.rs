use std::{
    fmt, mem,
    task::{Context, Poll},
};

use tower::{BoxError, Service};

use super::{Policy, ResponseFuture};
use crate::{layer::KeyOf, retry};

/// A service whose calls are made again.
#[derive(Clone)]
pub struct Retry<S, P, K> {
    inner: S,
    retry: retry::Retry,
    policy: P,
    key: K,
}

impl<S, P, K> Retry<S, P, K> {
    pub(super) fn new(inner: S, retry: retry::Retry, policy: P, key: K) -> Self {
        Self { inner, retry, policy, key }
    }
}

impl<S, P, K, Request> Service<Request> for Retry<S, P, K>
where
    S: Service<Request> + Clone,
    S::Error: Into<BoxError>,
    P: Policy<Request, S::Response> + Clone,
    K: KeyOf<Request>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ResponseFuture<S, Request, P>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let attempts = match self.key.key_of(&request) {
            None => self.retry.attempts(),
            Some(key) => self.retry.key(&key).attempts(),
        };
        // The one that is ready makes the first try, and goes on to make the others.
        let clone = self.inner.clone();
        let ready = mem::replace(&mut self.inner, clone);
        ResponseFuture::new(ready, request, attempts, self.policy.clone())
    }
}

impl<S: fmt::Debug, P, K> fmt::Debug for Retry<S, P, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retry")
            .field("inner", &self.inner)
            .field("retry", &self.retry)
            .finish_non_exhaustive()
    }
}
