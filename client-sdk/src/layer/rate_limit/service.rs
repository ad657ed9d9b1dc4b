use std::task::{Context, Poll};

use tower::{BoxError, Service};

use super::ResponseFuture;
use crate::{
    Limiter,
    layer::{
        CostOf, KeyOf,
        admission::{Admission, Admitted},
    },
};

/// A service whose calls are limited in rate.
#[derive(Clone)]
pub struct RateLimit<S, K, C> {
    inner: S,
    limiter: Limiter,
    key: K,
    cost: C,
}

impl<S, K, C> RateLimit<S, K, C> {
    pub(super) fn new(inner: S, limiter: Limiter, key: K, cost: C) -> Self {
        Self { inner, limiter, key, cost }
    }
}

impl<S, K, C, Request> Service<Request> for RateLimit<S, K, C>
where
    S: Service<Request> + Clone,
    S::Error: Into<BoxError>,
    K: KeyOf<Request>,
    C: CostOf<Request>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ResponseFuture<S, Request>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let cost = self.cost.cost_of(&request);
        let admitted = match self.key.key_of(&request) {
            None => admit(&self.limiter, cost),
            Some(key) => admit(&self.limiter.key(&key), cost),
        };
        ResponseFuture::new(Admission::new(admitted, &mut self.inner, request))
    }
}

fn admit(limiter: &Limiter, cost: u64) -> Admitted<()> {
    Admitted::by_memory(limiter.try_acquire(cost), || {
        let limiter = limiter.clone();
        Box::pin(async move { limiter.acquire(cost).await })
    })
}
