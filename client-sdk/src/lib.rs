//! Rate limits, circuits, permits and retry budgets that a whole fleet shares, decided in memory.
//!
//! Two lines, one that connects and one that guards:
//!
//! ```
//! use std::time::Duration;
//!
//! use fusebox_client::{
//!     Client, Timeout,
//!     layer::{BoxError, BreakerLayer, RateLimitLayer, ResilienceLayer, TimeoutLayer},
//! };
//! use tower::{Service, ServiceBuilder, ServiceExt};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), BoxError> {
//! // Connects in the background: whether anybody is there, `build` returns at once.
//! let client = Client::connect("http://127.0.0.1:3873").namespace("demo").build()?;
//!
//! // Named in any order; what is outermost is not a matter of taste.
//! let resilience = ResilienceLayer::new()
//!     .rate_limit(RateLimitLayer::new(client.limiter("api")))
//!     .breaker(BreakerLayer::new(client.breaker("payments")))
//!     .timeout(TimeoutLayer::new(Timeout::new(Duration::from_secs(2))));
//!
//! let mut service = ServiceBuilder::new()
//!     .layer(resilience)
//!     .service_fn(async |name: &'static str| Ok::<_, BoxError>(format!("hello {name}")));
//! assert_eq!(service.ready().await?.call("world").await?, "hello world");
//!
//! // With a server or without: nobody was kept waiting, and nobody was rejected.
//! assert_eq!(client.counts().rejected, 0);
//! # Ok(())
//! # }
//! ```
//!
//! Without tower the same handles are called directly:
//!
//! ```no_run
//! # use fusebox_client::{Client, Rejected, breaker::CallError};
//! # async fn charge() -> Result<(), std::io::Error> { Ok(()) }
//! # async fn example(client: Client) -> Result<(), Rejected> {
//! let tenant = client.limiter("api").key("acme"); // once; clones are cheap, and the same
//! tenant.acquire(1).await?; // 1 token; or a `Rejected`, which says why and until when
//!
//! match client.breaker("payments").call(charge()).await {
//!     Ok(()) => {}
//!     Err(CallError::Rejected(why)) => println!("not called: {why}, {:?}", why.retry_after),
//!     Err(CallError::Call(error)) => println!("called: {error}"),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Handles
//!
//! | handle | of a policy that is | a call asks the server | and without one |
//! |---|---|---|---|
//! | [`Limiter`] | a rate or window | where no lease covers it; always, if the policy is not leased | spends what is leased, then as the policy says |
//! | [`Breaker`] | a `breaker` | while it is half-open, for a probe | goes by this process's own breaker |
//! | [`Bulkhead`] | `concurrency` | always: a permit is the fleet's | as the policy says |
//! | [`Retry`] | a `retry_budget` | before each retry, never before a first try | as the policy says |
//! | [`Timeout`] | none: it is this process's | never | is the same |
//!
//! A handle is made once and cloned: [`Client::limiter`] and its like look the policy up by name, which needs no answer
//! and cannot fail. `.key("acme")` is the same policy for another tenant, host or route, each with a bucket, circuit or
//! permits of its own; a layer takes it from the request (`key_by`). A name that the server does not know shows at the
//! first call: as [`Reason::Refused`] where a limiter or bulkhead asked, and as [`telemetry::Event::Refused`] always.
//!
//! # Who decides
//!
//! Each decision has a [`Decider`], and is counted by it ([`telemetry::Counts`]):
//!
//! - **memory**: a lease that the server debited before, a denial that it said would hold, a circuit that it told of. No
//!   round trip, and nothing allocated for what is let through.
//! - **server**: this very call was asked for. Of each key one message is under way, however many calls wait for it; a
//!   call waits for [`decide_within`](ClientBuilder::decide_within) at most, 50 ms if nothing is said, beside the
//!   `max_wait` that its handle allows.
//! - **local**: what this process sees by itself. Its own breaker, or its share of a limit while the server is away.
//! - **fallback**: nobody. The server is away, and this is what the policy says to do then.
//!
//! # Without a server
//!
//! Nothing blocks, and start-up waits for nothing. Leases are spent until they expire, within the policy's `lease_time`.
//! Then a policy's `on_unreachable` decides, which travelled here with the policy: `deny` keeps the limit, `local` lets
//! this process have its share of it, `allow` has no bound. Of a policy that the server never told of,
//! [`ClientBuilder::fallback`] decides: [`Fallback::Allow`] unless you say otherwise. Circuits go by the breaker that
//! each process has anyway; that the server is away is never held against a target.
//!
//! Sessions come back by themselves, with jitter, at the next of the endpoints. Permits that are held are renewed then,
//! what was not told yet is told once, and nothing is spent twice. A server with *another* state behind the same address
//! is noticed: what is held of the former is dropped.
//!
//! # Telemetry
//!
//! Events of `tracing`, [`Client::counts`], and an observer of your own, who hears every
//! [`Event`](telemetry::Event):
//!
//! ```no_run
//! use fusebox_client::{Client, telemetry::Event};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), fusebox_client::BuildError> {
//! let client = Client::connect(["http://fusebox-a:3873", "http://fusebox-b:3873"])
//!     .namespace("demo")
//!     .service("checkout")
//!     .observer(|event: &Event<'_>| match event {
//!         Event::Degraded { policy, begins: true, .. } => println!("{policy} goes on without a server"),
//!         Event::Disconnected { cause, .. } => println!("{cause}"),
//!         _ => {}
//!     })
//!     .build()?;
//! # Ok(())
//! # }
//! ```
//!
//! # Units
//!
//! Costs are whole tokens, times are [`Duration`](std::time::Duration), shares run from 0 to 1. A key is at most 256
//! bytes of UTF-8, and empty unless you say one.
//!
//! # Cancellation
//!
//! Any future of this crate may be dropped at any moment. Who leaves a line costs nothing; what is granted to somebody who
//! has left serves the next in line, is given back, or is lost, but is never spent twice. A guard that is dropped gives
//! back what it holds: a [permit](bulkhead::Permit) its place, a [call](breaker::Permit) its probe; an
//! [estimate](limiter::Estimate) stands as it was. [`Client::close`] gives back the rest, within four seconds.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]
#![warn(missing_debug_implementations)]

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
