//! Layers for tower: each guards the calls of a service by a handle.
//!
//! All of them reject in `call`, with an error of [`BoxError`] in which [`rejection`] finds the
//! [`Rejected`]; their `poll_ready` is that of the service within. What they know is in the handles: layers and
//! services of one handle, and their clones, share it.
//!
//! The service within is to be `Clone`, since a call that has to wait takes along the one that was ready, and its errors
//! are to be errors. How long a call may wait for what it asks is said to the handle, as by
//! [`Limiter::max_wait`](crate::Limiter::max_wait). A call that is dropped leaves the line, or gives back what it holds; tokens
//! that it was given stay spent, and what the target does with it is the target's.
//!
//! [`ResilienceLayer`] puts any of them around a service in the order that makes sense:
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use fusebox_client::{
//!     Client, Timeout,
//!     layer::{BreakerLayer, RateLimitLayer, ResilienceLayer, TimeoutLayer},
//! };
//! # use tower::{Service, ServiceBuilder, ServiceExt};
//!
//! # async fn example(client: Client) -> Result<(), tower::BoxError> {
//! let resilience = ResilienceLayer::new()
//!     .breaker(BreakerLayer::new(client.breaker("payments")))
//!     .rate_limit(RateLimitLayer::new(client.limiter("api")))
//!     .timeout(TimeoutLayer::new(Timeout::new(Duration::from_secs(2))));
//! let mut service = ServiceBuilder::new()
//!     .layer(resilience)
//!     .service_fn(async |request: u32| Ok::<_, tower::BoxError>(request + 1));
//! service.ready().await?.call(1).await?;
//! # Ok(())
//! # }
//! ```

mod admission;
pub mod breaker;
pub mod bulkhead;
pub mod grpc;
mod key;
pub mod rate_limit;
mod resilience;
pub mod retry;
pub mod timeout;

use std::error::Error;

pub use tower::BoxError;

pub use self::{
    breaker::BreakerLayer,
    bulkhead::BulkheadLayer,
    key::{CostOf, KeyOf, OneKey, OneToken},
    rate_limit::RateLimitLayer,
    resilience::ResilienceLayer,
    retry::RetryLayer,
    timeout::TimeoutLayer,
};
use crate::Rejected;

/// Links of a chain of sources that are looked at. A longer one is a mistake, and may have no end.
const SOURCES_MOST: usize = 64;

/// The rejection that an error is, or comes of.
#[must_use]
pub fn rejection(error: &BoxError) -> Option<&Rejected> {
    rejected_in(&**error)
}

/// As [`rejection`], of any error.
pub(crate) fn rejected_in<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Rejected> {
    source_of(error)
}

/// The error itself if it is of that type, or the first of its sources that is.
fn source_of<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    for _ in 0..SOURCES_MOST {
        let error = next?;
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}
