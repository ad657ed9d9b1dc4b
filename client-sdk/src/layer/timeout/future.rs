use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep};
use tower::BoxError;

use crate::{TimedOut, Timeout};

pin_project! {
    /// A call that ends in time.
    #[derive(Debug)]
    pub struct ResponseFuture<F> {
        #[pin]
        call: F,
        #[pin]
        over: Sleep,
        after: Duration,
    }
}

impl<F> ResponseFuture<F> {
    pub(super) fn new(call: F, timeout: Timeout) -> Self {
        let after = timeout.after();
        Self { call, over: sleep(after), after }
    }
}

impl<F, T, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<T, E>>,
    E: Into<BoxError>,
{
    type Output = Result<T, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        // First the call: one that is done at that moment is in time.
        if let Poll::Ready(result) = this.call.poll(cx) {
            return Poll::Ready(result.map_err(Into::into));
        }
        match this.over.poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(Box::new(TimedOut { after: *this.after }))),
            Poll::Pending => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use tower::{ServiceBuilder, ServiceExt};

    use super::*;
    use crate::layer::TimeoutLayer;

    #[tokio::test(start_paused = true)]
    async fn calls_end_in_time() {
        let service = ServiceBuilder::new()
            .layer(TimeoutLayer::new(Timeout::new(Duration::from_millis(100))))
            .service_fn(async |millis| {
                sleep(Duration::from_millis(millis)).await;
                Ok::<_, BoxError>(millis)
            });
        assert_eq!(service.oneshot(99).await.unwrap(), 99);
        let error = service.oneshot(101).await.unwrap_err();
        let timed_out = error.downcast_ref::<TimedOut>().unwrap();
        assert_eq!(timed_out.after, Duration::from_millis(100));
    }
}
