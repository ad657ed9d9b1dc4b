//! Makes calls that fail again.

mod future;
mod layer;
mod policy;
mod service;
mod unary;

pub use self::{
    future::ResponseFuture,
    layer::RetryLayer,
    policy::{Idempotent, Policy},
    service::Retry,
    unary::Unary,
};
