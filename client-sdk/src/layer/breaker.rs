//! Spares a target that fails.

mod classify;
mod future;
mod layer;
mod service;

pub use self::{
    classify::{Classify, Errors, GrpcStatus, HttpStatus},
    future::ResponseFuture,
    layer::BreakerLayer,
    service::Breaker,
};
