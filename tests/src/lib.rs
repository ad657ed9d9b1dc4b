//! Fusebox from outside: what the suites need to run a whole server in a test.
//!
//! Time in it stands still until a test [advances](ManualClock::advance) it, ports are free ones, and the
//! journal is real sled, nothing, or one that [forgets and fails](Simulated) on command.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]

mod clock;
mod journal;
pub mod panel;
mod proxy;
mod server;

pub use self::{
    clock::{Counting, ManualClock},
    journal::Simulated,
    proxy::{Fault, Proxy},
    server::{PATIENCE, Server, eventually},
};
