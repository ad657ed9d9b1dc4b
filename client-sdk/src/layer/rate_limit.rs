//! Limits the rate of calls.

mod future;
mod layer;
mod service;

pub use self::{future::ResponseFuture, layer::RateLimitLayer, service::RateLimit};
