use std::task::{Context, Poll};

use tower::{BoxError, Service};

use super::ResponseFuture;
use crate::timeout;

/// A service whose calls end in time.
#[derive(Clone, Copy, Debug)]
pub struct Timeout<S> {
    inner: S,
    timeout: timeout::Timeout,
}

impl<S> Timeout<S> {
    pub(super) const fn new(inner: S, timeout: timeout::Timeout) -> Self {
        Self { inner, timeout }
    }
}

impl<S, Request> Service<Request> for Timeout<S>
where
    S: Service<Request>,
    S::Error: Into<BoxError>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        ResponseFuture::new(self.inner.call(request), self.timeout)
    }
}
