//! Limits how many calls are under way.

mod future;
mod layer;
mod service;

pub use self::{
    future::{Outlived, ResponseFuture},
    layer::BulkheadLayer,
    service::Bulkhead,
};
