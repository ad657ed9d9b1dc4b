//! A call that has to be let through first.

use std::{
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tower::{BoxError, Service};

use crate::Rejected;

/// A question that memory could not answer. It is off the hot path, and so may be boxed.
pub(super) type Asking<P> = Pin<Box<dyn Future<Output = Result<P, Rejected>> + Send>>;

/// What is known of a call when it is made.
pub(super) enum Admitted<P> {
    /// It may be made, and holds this until it is over.
    Now(P),
    /// Nobody knows yet.
    Asking(Asking<P>),
    /// It may not.
    No(Rejected),
}

pin_project! {
    /// A call that has to be let through first, and then holds a permit. Dropped, it gives up either.
    pub(super) struct Admission<S: Service<R>, R, P> {
        #[pin]
        stage: Stage<S, R, S::Future, P>,
    }
}

pin_project! {
    #[project = StageNow]
    enum Stage<S, R, F, P> {
        Asking { asking: Asking<P>, waiting: Option<(S, R)> },
        Calling { #[pin] call: F, permit: Option<P> },
        Over { rejected: Option<Rejected> },
    }
}

/// How a call ended that was let through with a permit, or that it was not.
pub(super) type Ended<P, T> = (Option<P>, Result<T, BoxError>);

impl<S, R, P> Admission<S, R, P>
where
    S: Service<R> + Clone,
    S::Error: Into<BoxError>,
{
    /// Makes a call of a service that is ready, as soon as it is let through.
    pub(super) fn new(admitted: Admitted<P>, service: &mut S, request: R) -> Self {
        let stage = match admitted {
            Admitted::Now(permit) => {
                Stage::Calling { call: service.call(request), permit: Some(permit) }
            }
            Admitted::Asking(asking) => {
                // The one that is ready makes the call; its clone need not be.
                let clone = service.clone();
                let ready = mem::replace(service, clone);
                Stage::Asking { asking, waiting: Some((ready, request)) }
            }
            Admitted::No(rejected) => Stage::Over { rejected: Some(rejected) },
        };
        Self { stage }
    }

    /// What the call holds; nothing before it is let through.
    pub(super) fn permit(self: Pin<&mut Self>) -> Option<&mut P> {
        match self.project().stage.project() {
            StageNow::Calling { permit, .. } => permit.as_mut(),
            _ => None,
        }
    }

    /// How the call ended.
    #[allow(clippy::expect_used)] // as of any future that is polled again after its end
    pub(super) fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Ended<P, S::Response>> {
        let mut stage = self.project().stage;
        loop {
            match stage.as_mut().project() {
                StageNow::Asking { asking, waiting } => match ready!(asking.as_mut().poll(cx)) {
                    Ok(permit) => {
                        let (mut service, request) = waiting.take().expect("polled after its end");
                        let call = service.call(request);
                        stage.set(Stage::Calling { call, permit: Some(permit) });
                    }
                    Err(rejected) => stage.set(Stage::Over { rejected: Some(rejected) }),
                },
                StageNow::Calling { call, permit } => {
                    let result = ready!(call.poll(cx)).map_err(Into::into);
                    return Poll::Ready((permit.take(), result));
                }
                StageNow::Over { rejected } => {
                    let rejected = rejected.take().expect("polled after its end");
                    return Poll::Ready((None, Err(Box::new(rejected))));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering},
        },
    };

    use super::*;
    use crate::{Reason, layer::rejection};

    /// A service of which only the one that was ready may be called.
    #[derive(Default)]
    struct Picky {
        is_ready: bool,
        calls: Arc<AtomicU32>,
    }

    impl Clone for Picky {
        fn clone(&self) -> Self {
            Self { is_ready: false, calls: Arc::clone(&self.calls) }
        }
    }

    impl Service<u32> for Picky {
        type Response = u32;
        type Error = BoxError;
        type Future = std::future::Ready<Result<u32, BoxError>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
            self.is_ready = true;
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: u32) -> Self::Future {
            assert!(mem::take(&mut self.is_ready), "called without being ready");
            self.calls.fetch_add(1, Ordering::Relaxed);
            std::future::ready(Ok(request + 1))
        }
    }

    fn rejected(reason: Reason) -> Rejected {
        let mut rejected = Rejected::of_names("api", "");
        rejected.reason = reason;
        rejected
    }

    async fn end(admitted: Admitted<&'static str>) -> (Picky, Ended<&'static str, u32>) {
        let mut service = Picky::default();
        poll_fn(|cx| service.poll_ready(cx)).await.unwrap();
        let mut call = Box::pin(Admission::new(admitted, &mut service, 1));
        let ended = poll_fn(|cx| call.as_mut().poll(cx)).await;
        (service, ended)
    }

    #[tokio::test]
    async fn the_service_that_was_ready_makes_the_call_also_after_asking() {
        let asking = Box::pin(async {
            tokio::task::yield_now().await;
            Ok("permit")
        });
        for admitted in [Admitted::Now("permit"), Admitted::Asking(asking)] {
            let (service, (permit, result)) = end(admitted).await;
            assert_eq!((permit, result.unwrap()), (Some("permit"), 2));
            assert!(!service.is_ready, "what is left must be made ready first");
        }
    }

    #[tokio::test]
    async fn a_call_that_is_rejected_is_not_made() {
        let no = rejected(Reason::RateLimited);
        let asking = Box::pin(async { Err(rejected(Reason::RateLimited)) });
        for admitted in [Admitted::No(no), Admitted::Asking(asking)] {
            let (service, (permit, result)) = end(admitted).await;
            assert_eq!(permit, None);
            let error = result.unwrap_err();
            assert_eq!(rejection(&error).unwrap().reason, Reason::RateLimited);
            assert_eq!(service.calls.load(Ordering::Relaxed), 0);
        }
    }
}
