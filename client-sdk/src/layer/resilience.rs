//! Several layers in the order that makes sense.

use tower::{Layer, layer::util::Identity};

use super::{BreakerLayer, BulkheadLayer, RateLimitLayer, RetryLayer, TimeoutLayer};

/// Layers around one service, whichever of them there are, in whatever order they are named: a retry is outermost, then
/// come breaker, rate limit and bulkhead, and a timeout is innermost.
///
/// So each try is admitted by itself; a circuit hears how it went, but nothing of calls that a limit has rejected; no
/// permit is held while a call waits for tokens; and no time is lost to waiting before it is sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResilienceLayer<R = Identity, B = Identity, L = Identity, H = Identity, T = Identity> {
    retry: R,
    breaker: B,
    rate_limit: L,
    bulkhead: H,
    timeout: T,
}

impl ResilienceLayer {
    /// None of them yet: then it does nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl<R, B, L, H, T> ResilienceLayer<R, B, L, H, T> {
    /// Makes calls that fail again.
    pub fn retry<P, K>(
        self,
        retry: RetryLayer<P, K>,
    ) -> ResilienceLayer<RetryLayer<P, K>, B, L, H, T> {
        let Self { breaker, rate_limit, bulkhead, timeout, .. } = self;
        ResilienceLayer { retry, breaker, rate_limit, bulkhead, timeout }
    }

    /// Spares a target that fails.
    pub fn breaker<K, C>(
        self,
        breaker: BreakerLayer<K, C>,
    ) -> ResilienceLayer<R, BreakerLayer<K, C>, L, H, T> {
        let Self { retry, rate_limit, bulkhead, timeout, .. } = self;
        ResilienceLayer { retry, breaker, rate_limit, bulkhead, timeout }
    }

    /// Limits the rate of calls.
    pub fn rate_limit<K, C>(
        self,
        rate_limit: RateLimitLayer<K, C>,
    ) -> ResilienceLayer<R, B, RateLimitLayer<K, C>, H, T> {
        let Self { retry, breaker, bulkhead, timeout, .. } = self;
        ResilienceLayer { retry, breaker, rate_limit, bulkhead, timeout }
    }

    /// Limits how many calls are under way.
    pub fn bulkhead<K>(
        self,
        bulkhead: BulkheadLayer<K>,
    ) -> ResilienceLayer<R, B, L, BulkheadLayer<K>, T> {
        let Self { retry, breaker, rate_limit, timeout, .. } = self;
        ResilienceLayer { retry, breaker, rate_limit, bulkhead, timeout }
    }

    /// Ends calls that take too long: each try by itself.
    pub fn timeout(self, timeout: TimeoutLayer) -> ResilienceLayer<R, B, L, H, TimeoutLayer> {
        let Self { retry, breaker, rate_limit, bulkhead, .. } = self;
        ResilienceLayer { retry, breaker, rate_limit, bulkhead, timeout }
    }
}

impl<S, R, B, L, H, T> Layer<S> for ResilienceLayer<R, B, L, H, T>
where
    T: Layer<S>,
    H: Layer<T::Service>,
    L: Layer<H::Service>,
    B: Layer<L::Service>,
    R: Layer<B::Service>,
{
    type Service = R::Service;

    fn layer(&self, inner: S) -> Self::Service {
        let timed = self.timeout.layer(inner);
        let held = self.bulkhead.layer(timed);
        let limited = self.rate_limit.layer(held);
        self.retry.layer(self.breaker.layer(limited))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU32, Ordering},
        time::Duration,
    };

    use tower::{BoxError, ServiceBuilder, ServiceExt};

    use super::*;
    use crate::{
        Clock, Timeout,
        retry::{Again, Retry},
    };

    fn seconds(clock: &Clock) -> u64 {
        clock.now().as_nanos() / 1_000_000_000
    }

    #[tokio::test(start_paused = true)]
    async fn each_try_has_a_timeout_of_its_own_in_whatever_order_they_are_named() {
        let clock = Clock::of_the_runtime();
        let retry = Retry::local_with(clock.clone(), 1);
        let policy = (
            |request: &u32| Some(*request),
            |result: Result<&u32, &BoxError>| {
                if result.is_err() { Again::After(Duration::ZERO) } else { Again::No }
            },
        );
        let timeout = TimeoutLayer::new(Timeout::new(Duration::from_secs(1)));
        let retry = RetryLayer::new(retry, policy);
        let tries = AtomicU32::new(0);
        let slow = |_: u32| async {
            tries.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(2)).await;
            Ok::<_, BoxError>(0)
        };

        let one = ResilienceLayer::new().timeout(timeout).retry(retry.clone());
        ServiceBuilder::new().layer(one).service_fn(slow).oneshot(1).await.unwrap_err();
        assert_eq!((seconds(&clock), tries.swap(0, Ordering::Relaxed)), (3, 3));

        let other = ResilienceLayer::new().retry(retry).timeout(timeout);
        ServiceBuilder::new().layer(other).service_fn(slow).oneshot(1).await.unwrap_err();
        assert_eq!((seconds(&clock), tries.load(Ordering::Relaxed)), (6, 3));
    }

    #[tokio::test]
    async fn without_layers_it_does_nothing() {
        let service = ResilienceLayer::new()
            .layer(tower::service_fn(async |request: u32| Err::<(), u32>(request + 1)));
        assert_eq!(service.oneshot(1).await, Err(2));
    }
}
