//! Rate limits, circuits, permits and retry budgets that a whole fleet shares, decided in memory.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod binding;
pub mod breaker;
pub mod bulkhead;
mod client;
mod clock;
mod context;
mod exchange;
#[cfg(test)]
mod fake;
pub mod layer;
pub mod limiter;
mod owed;
mod part;
mod rejected;
pub mod retry;
mod session;
mod settings;
pub mod telemetry;
mod timeout;
pub mod unary;

#[cfg(feature = "tls")]
pub use self::client::Tls;
pub use self::{
    breaker::Breaker,
    bulkhead::Bulkhead,
    client::{BuildError, Client, ClientBuilder, Endpoints},
    clock::Clock,
    limiter::Limiter,
    rejected::{Decider, Evidence, Reason, Rejected},
    retry::Retry,
    settings::Fallback,
    timeout::{TimedOut, Timeout},
};
