//! One call for each decision: a typed client of the unary calls, which remembers nothing.
//!
//! For scripts, tests and operators. A service links [`Client`](crate::Client), which answers nearly all calls from
//! memory.

mod acquire;
mod client;
mod report;

pub use self::{
    acquire::{Acquired, Ask, Reason, Verdict},
    client::{Client, Error},
    report::{Outcome, Reported},
};
