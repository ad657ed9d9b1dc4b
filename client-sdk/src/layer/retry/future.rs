use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep};
use tower::{BoxError, Service};

use super::Policy;
use crate::{
    TimedOut,
    layer::rejection,
    retry::{Again, Attempts, GaveUp},
};

/// A pause, from which the tries come back. It comes after a failure, and so may be boxed.
type Pausing = Pin<Box<dyn Future<Output = (Attempts, Result<(), GaveUp>)> + Send>>;

pin_project! {
    /// A call that is made again.
    pub struct ResponseFuture<S: Service<Request>, Request, P> {
        #[pin]
        stage: Stage<S::Future, Result<S::Response, BoxError>>,
        tries: Tries<S, Request>,
        policy: P,
        deadline: Option<Deadline>,
    }
}

pin_project! {
    #[project = StageNow]
    enum Stage<F, T> {
        Calling { #[pin] call: F },
        Pausing { pausing: Pausing, last: Option<T> },
        Readying,
    }
}

/// What the next try is made of.
struct Tries<S, Request> {
    service: S,
    /// The request, if it may be sent again.
    kept: Option<Request>,
    /// Taken while they pause.
    attempts: Option<Attempts>,
}

/// When all tries have to be over, and how long that is from the first.
struct Deadline {
    over: Pin<Box<Sleep>>,
    after: Duration,
}

impl<S: Service<Request>, Request, P: Policy<Request, S::Response>> ResponseFuture<S, Request, P> {
    /// Makes the first try, of a service that is ready.
    pub(super) fn new(mut service: S, request: Request, attempts: Attempts, policy: P) -> Self {
        let deadline =
            attempts.left().map(|after| Deadline { over: Box::pin(sleep(after)), after });
        let (request, kept) = policy.keep(request);
        let call = service.call(request);
        let tries = Tries { service, kept, attempts: Some(attempts) };
        Self { stage: Stage::Calling { call }, tries, policy, deadline }
    }
}

impl<S, Request, P> Future for ResponseFuture<S, Request, P>
where
    S: Service<Request>,
    S::Error: Into<BoxError>,
    P: Policy<Request, S::Response>,
{
    type Output = Result<S::Response, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(result) = self.as_mut().poll_tries(cx) {
            return Poll::Ready(result);
        }
        match self.project().deadline {
            Some(deadline) => {
                ready!(deadline.over.as_mut().poll(cx));
                Poll::Ready(Err(Box::new(TimedOut { after: deadline.after })))
            }
            None => Poll::Pending,
        }
    }
}

impl<S, Request, P> ResponseFuture<S, Request, P>
where
    S: Service<Request>,
    S::Error: Into<BoxError>,
    P: Policy<Request, S::Response>,
{
    #[allow(clippy::expect_used)] // as of any future that is polled again after its end
    fn poll_tries(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<S::Response, BoxError>> {
        let mut this = self.project();
        loop {
            match this.stage.as_mut().project() {
                StageNow::Calling { call } => {
                    let result = ready!(call.poll(cx)).map_err(Into::into);
                    let again = match &this.tries.kept {
                        Some(_) => again(this.policy, result.as_ref()),
                        None => Again::No,
                    };
                    match (again, this.tries.attempts.take()) {
                        (Again::No, _) | (_, None) => return Poll::Ready(result),
                        (again, Some(attempts)) => {
                            let pausing = pause(attempts, again);
                            this.stage.set(Stage::Pausing { pausing, last: Some(result) });
                        }
                    }
                }
                StageNow::Pausing { pausing, last } => {
                    let (attempts, may) = ready!(pausing.as_mut().poll(cx));
                    if may.is_err() {
                        return Poll::Ready(last.take().expect("polled after its end"));
                    }
                    this.tries.attempts = Some(attempts);
                    this.stage.set(Stage::Readying);
                }
                StageNow::Readying => {
                    ready!(this.tries.service.poll_ready(cx)).map_err(Into::into)?;
                    let request = this.tries.kept.take().expect("polled after its end");
                    let (request, kept) = this.policy.keep(request);
                    this.tries.kept = kept;
                    let call = this.tries.service.call(request);
                    this.stage.set(Stage::Calling { call });
                }
            }
        }
    }
}

/// Whether a call that ended so is to be made again. One that was rejected never is.
fn again<Request, T>(policy: &impl Policy<Request, T>, result: Result<&T, &BoxError>) -> Again {
    match result {
        Err(error) if rejection(error).is_some() => Again::No,
        result => policy.again(result),
    }
}

fn pause(mut attempts: Attempts, again: Again) -> Pausing {
    Box::pin(async move {
        let may = attempts.again(again).await;
        (attempts, may)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use tower::{ServiceBuilder, ServiceExt};

    use super::*;
    use crate::{Clock, Rejected, layer::RetryLayer, retry::Retry};

    /// A service whose tries end as `end` says of their number, and how many there were.
    async fn tries<T: 'static>(
        retry: Retry,
        end: impl Fn(u32) -> Result<T, BoxError>,
    ) -> (u32, Result<T, BoxError>) {
        let tries = Arc::new(AtomicU32::new(0));
        let clone = |request: &u32| Some(*request);
        let errors = |result: Result<&T, &BoxError>| match result {
            Err(_) => Again::Yes,
            Ok(_) => Again::No,
        };
        let service = ServiceBuilder::new()
            .layer(RetryLayer::new(retry, (clone, errors)))
            .service_fn(|_| std::future::ready(end(tries.fetch_add(1, Ordering::Relaxed))));
        let result = service.oneshot(0).await;
        (tries.load(Ordering::Relaxed), result)
    }

    fn local() -> Retry {
        Retry::local_with(Clock::of_the_runtime(), 1)
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_is_made_again_until_it_succeeds() {
        let end = |n| if n < 2 { Err(format!("{n}").into()) } else { Ok(n) };
        let (tries, result) = tries(local(), end).await;
        assert_eq!((tries, result.unwrap()), (3, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_error_is_the_callers() {
        let (tries, result) = tries::<()>(local(), |n| Err(format!("{n}").into())).await;
        assert_eq!((tries, result.unwrap_err().to_string()), (3, "2".to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_rejection_is_not_tried_again() {
        let rejected = Rejected::of_names("api", "");
        let (tries, result) = tries::<()>(local(), |_| Err(Box::new(rejected.clone()))).await;
        assert_eq!(tries, 1);
        assert!(rejection(&result.unwrap_err()).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_cannot_be_sent_twice_is_tried_once() {
        let tries = AtomicU32::new(0);
        let policy = (|_: &u32| None, |_: Result<&(), &BoxError>| Again::Yes);
        let service =
            ServiceBuilder::new().layer(RetryLayer::new(local(), policy)).service_fn(|_: u32| {
                tries.fetch_add(1, Ordering::Relaxed);
                std::future::ready(Err::<(), BoxError>("down".into()))
            });
        service.oneshot(0).await.unwrap_err();
        assert_eq!(tries.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_ends_a_try_that_is_under_way() {
        let clock = Clock::of_the_runtime();
        let after = Duration::from_secs(1);
        let policy = (|request: &u32| Some(*request), |_: Result<&(), &BoxError>| Again::Yes);
        let service = ServiceBuilder::new()
            .layer(RetryLayer::new(local().deadline(after), policy))
            .service_fn(|_: u32| std::future::pending::<Result<(), BoxError>>());
        let error = service.oneshot(0).await.unwrap_err();
        assert_eq!(error.downcast_ref(), Some(&TimedOut { after }));
        assert_eq!(clock.now(), fusebox_core::Time::ZERO.after(after));
    }
}
