use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tower::{BoxError, Service};

use crate::layer::admission::Admission;

pin_project! {
    /// A call that is limited in rate.
    pub struct ResponseFuture<S: Service<Request>, Request> {
        #[pin]
        admission: Admission<S, Request, ()>,
    }
}

impl<S: Service<Request>, Request> ResponseFuture<S, Request> {
    pub(super) fn new(admission: Admission<S, Request, ()>) -> Self {
        Self { admission }
    }
}

impl<S, Request> Future for ResponseFuture<S, Request>
where
    S: Service<Request> + Clone,
    S::Error: Into<BoxError>,
{
    type Output = Result<S::Response, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (_, result) = ready!(self.project().admission.poll(cx));
        Poll::Ready(result)
    }
}
