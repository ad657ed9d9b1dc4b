use std::{
    fmt,
    task::{Context, Poll},
};

use tower::{BoxError, Service};

use super::{ResponseFuture, future::Held};
use crate::{
    bulkhead,
    layer::{
        KeyOf,
        admission::{Admission, Admitted},
    },
};

/// A service of which so many calls are under way at most.
#[derive(Clone)]
pub struct Bulkhead<S, K> {
    inner: S,
    bulkhead: bulkhead::Bulkhead,
    key: K,
}

impl<S, K> Bulkhead<S, K> {
    pub(super) fn new(inner: S, bulkhead: bulkhead::Bulkhead, key: K) -> Self {
        Self { inner, bulkhead, key }
    }
}

impl<S, K, Request> Service<Request> for Bulkhead<S, K>
where
    S: Service<Request> + Clone,
    S::Error: Into<BoxError>,
    K: KeyOf<Request>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ResponseFuture<S, Request>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let bulkhead = match self.key.key_of(&request) {
            None => self.bulkhead.clone(),
            Some(key) => self.bulkhead.key(&key),
        };
        // A fleet's permit is the server's to give, so there is nothing to be saved here.
        let asking = Box::pin(async move {
            let permit = bulkhead.acquire().await?;
            Ok(Held::new(permit, bulkhead.cancels_on_expiry()))
        });
        let admitted = Admitted::Asking(asking);
        ResponseFuture::new(Admission::new(admitted, &mut self.inner, request))
    }
}

impl<S: fmt::Debug, K> fmt::Debug for Bulkhead<S, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bulkhead")
            .field("inner", &self.inner)
            .field("bulkhead", &self.bulkhead)
            .finish_non_exhaustive()
    }
}
