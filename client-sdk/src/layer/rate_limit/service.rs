use std::{
    fmt,
    task::{Context, Poll},
};

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
        let key = self.key.key_of(&request);
        let admitted = admit(&self.limiter, key.as_deref(), cost);
        ResponseFuture::new(Admission::new(admitted, &mut self.inner, request))
    }
}

fn admit(limiter: &Limiter, key: Option<&str>, cost: u64) -> Admitted<()> {
    match limiter.acquire_now(key, cost) {
        Some(Ok(())) => Admitted::Now(()),
        Some(Err(rejected)) => Admitted::No(rejected),
        None => {
            let limiter = key.map_or_else(|| limiter.clone(), |key| limiter.key(key));
            Admitted::Asking(Box::pin(async move { limiter.acquire(cost).await }))
        }
    }
}

impl<S: fmt::Debug, K, C> fmt::Debug for RateLimit<S, K, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimit")
            .field("inner", &self.inner)
            .field("limiter", &self.limiter)
            .finish_non_exhaustive()
    }
}
