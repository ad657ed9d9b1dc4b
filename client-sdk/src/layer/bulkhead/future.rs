use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;
use tower::{BoxError, Service};

use crate::{
    bulkhead::{CallError, Permit},
    layer::admission::Admission,
};

/// What a call holds.
pub(super) struct Held {
    _permit: Arc<Permit>,
    /// Where a call that outlives its permit is to be ended.
    expired: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Held {
    pub(super) fn new(permit: Permit, cancels_on_expiry: bool) -> Self {
        let permit = Arc::new(permit);
        let expired = cancels_on_expiry.then(|| {
            let permit = Arc::clone(&permit);
            Box::pin(async move { permit.expired().await }) as Pin<Box<_>>
        });
        Self { _permit: permit, expired }
    }

    fn poll_expired(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.expired {
            Some(expired) => expired.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }
}

pin_project! {
    /// A call that holds a permit.
    pub struct ResponseFuture<S: Service<Request>, Request> {
        #[pin]
        admission: Admission<S, Request, Held>,
    }
}

impl<S: Service<Request>, Request> ResponseFuture<S, Request> {
    pub(super) fn new(admission: Admission<S, Request, Held>) -> Self {
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
        let mut admission = self.project().admission;
        if let Poll::Ready((_, result)) = admission.as_mut().poll(cx) {
            return Poll::Ready(result);
        }
        match admission.permit().map(|held| held.poll_expired(cx)) {
            Some(Poll::Ready(())) => Poll::Ready(Err(Box::new(CallError::Expired))),
            _ => Poll::Pending,
        }
    }
}
