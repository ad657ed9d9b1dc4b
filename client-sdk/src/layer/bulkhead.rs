//! Limits how many calls are under way.

mod future;
mod layer;
mod service;

pub use self::{future::ResponseFuture, layer::BulkheadLayer, service::Bulkhead};
