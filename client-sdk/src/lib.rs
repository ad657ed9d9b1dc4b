//! A typed client for Fusebox: connect, acquire, report.
//!
//! ```no_run
//! # async fn example() -> Result<(), fusebox_client::Error> {
//! use fusebox_client::{Ask, Client};
//!
//! let client = Client::connect("http://127.0.0.1:3873", "demo").await?;
//! let acquired = client.acquire([Ask::new("signup", "alice").cost(2)]).await?;
//! if !acquired.allowed {
//!     println!("again in {:?}", acquired.retry_after());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Every [`acquire`](Client::acquire) is one round trip to the server.

mod acquire;
mod client;
mod report;

pub use self::{
    acquire::{Acquired, Ask, Reason, Verdict},
    client::{Client, Error},
    report::{Outcome, Reported},
};
