use std::task::{Context, Poll};

use tower::{BoxError, Service};

use super::{Classify, ResponseFuture};
use crate::{
    breaker::{self, Permit},
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
        let admitted = match self.key.key_of(&request) {
            None => admit(&self.breaker),
            Some(key) => admit(&self.breaker.key(&key)),
        };
        let admission = Admission::new(admitted, &mut self.inner, request);
        ResponseFuture::new(admission, self.classify.clone())
    }
}

fn admit(breaker: &breaker::Breaker) -> Admitted<Permit> {
    Admitted::by_memory(breaker.try_admit(), || {
        let breaker = breaker.clone();
        Box::pin(async move { breaker.admit().await })
    })
}
