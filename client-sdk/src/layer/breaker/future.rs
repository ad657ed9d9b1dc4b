use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tower::{BoxError, Service};

use super::Classify;
use crate::{
    breaker::{Permit, Verdict},
    bulkhead::CallError,
    layer::{admission::Admission, rejection, source_of},
};

pin_project! {
    /// A call that goes through a circuit. Dropped, it is abandoned.
    pub struct ResponseFuture<S: Service<Request>, Request, C> {
        #[pin]
        admission: Admission<S, Request, Permit>,
        classify: C,
    }
}

impl<S: Service<Request>, Request, C> ResponseFuture<S, Request, C> {
    pub(super) fn new(admission: Admission<S, Request, Permit>, classify: C) -> Self {
        Self { admission, classify }
    }
}

impl<S, Request, C> Future for ResponseFuture<S, Request, C>
where
    S: Service<Request> + Clone,
    S::Error: Into<BoxError>,
    C: Classify<S::Response>,
{
    type Output = Result<S::Response, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let (permit, result) = ready!(this.admission.poll(cx));
        if let Some(permit) = permit {
            permit.record(verdict(this.classify, result.as_ref()));
        }
        Poll::Ready(result)
    }
}

/// How a call went. What ended within this process says nothing about the target.
fn verdict<T>(classify: &impl Classify<T>, result: Result<&T, &BoxError>) -> Verdict {
    match result {
        Err(error) if rejection(error).is_some() => Verdict::Ignored,
        Err(error) if source_of::<CallError>(&**error).is_some() => Verdict::Ignored,
        result => classify.classify(result),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rejected, layer::breaker::Errors};

    #[test]
    fn a_rejection_by_a_layer_within_says_nothing_about_the_target() {
        let rejected = Rejected::of_names("api", "");
        let inner: [BoxError; 2] = [Box::new(rejected), Box::new(CallError::Expired)];
        for error in &inner {
            assert_eq!(verdict::<()>(&Errors, Err(error)), Verdict::Ignored, "{error}");
        }
        assert_eq!(verdict::<()>(&Errors, Err(&"broken".into())), Verdict::Failure("error"));
        assert_eq!(verdict(&Errors, Ok(&())), Verdict::Success);
    }
}
