//! The Fusebox server: one breaker panel for a whole fleet.
//!
//! [`run`](run::run) is one life of it, from its parts (sockets, clock, randomness, journal, shutdown) to
//! a clean end; `main` only gathers the parts. Requests come in by [`grpc`], are decided by [`app`] against
//! the policies of a [`catalogue`] and the cells of a [`storage`], and every decision is the core's.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod accept;
pub mod app;
pub mod calendar;
pub mod catalogue;
pub mod cli;
pub mod clock;
pub mod config;
pub mod counters;
pub mod digest;
pub mod entropy;
pub mod grpc;
pub mod lifecycle;
pub mod limits;
pub mod metrics;
mod ops;
mod reservation;
pub mod rule_files;
pub mod run;
pub mod storage;
