use std::{
    fmt,
    task::{Context, Poll},
};

use tower::{BoxError, Service};

use super::{Classify, ResponseFuture};
use crate::{
    breaker,
    layer::{
        KeyOf,
        admission::{Admission, Admitted},
    },
};

/// A service whose calls go through a circuit.
#[derive(Clone)]
pub struct Breaker<S, K, C> {
    inner: S,
    breaker: breaker::Breaker,
    key: K,
    classify: C,
}

impl<S, K, C> Breaker<S, K, C> {
    pub(super) fn new(inner: S, breaker: breaker::Breaker, key: K, classify: C) -> Self {
        Self { inner, breaker, key, classify }
    }
}

impl<S, K, C, Request> Service<Request> for Breaker<S, K, C>
where
    S: Service<Request> + Clone,
    S::Error: Into<BoxError>,
    K: KeyOf<Request>,
    C: Classify<S::Response> + Clone,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ResponseFuture<S, Request, C>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let admitted = match self.breaker.admit_now(self.key.key_of(&request).as_deref()) {
            Ok(Ok(permit)) => Admitted::Now(permit),
            Ok(Err(rejected)) => Admitted::No(rejected),
            Err(asking) => Admitted::Asking(asking),
        };
        let admission = Admission::new(admitted, &mut self.inner, request);
        ResponseFuture::new(admission, self.classify.clone())
    }
}

impl<S: fmt::Debug, K, C> fmt::Debug for Breaker<S, K, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Breaker")
            .field("inner", &self.inner)
            .field("breaker", &self.breaker)
            .finish_non_exhaustive()
    }
}
