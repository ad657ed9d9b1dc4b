//! Circuits: the fleet's, and this process's own.

use std::{sync::Arc, time::Duration};

use fusebox_core::Time;
use fusebox_proto::v1;

use crate::{
    Rejected,
    context::Context,
    part::{Draft, Link, Part},
};

/// All breakers of a client.
pub(crate) struct Breakers {
    _context: Arc<Context>,
}

impl Breakers {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self { _context: context }
    }

    pub(crate) fn of(self: &Arc<Self>, _policy: &str) -> Breaker {
        unimplemented!()
    }
}

impl Part for Breakers {
    fn tend(&self, _now: Time) {}
    fn report(&self, _draft: &mut Draft, _now: Time) {}
    fn reported(&self, _response: &v1::ReportResponse, _sent: Time) {}
    fn linked(&self, _link: Link, _now: Time) {}
    fn close(&self, _draft: &mut Draft, _now: Time) {}
}

/// How a call went, as a classifier says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// The target did what it was asked.
    Success,
    /// The target failed; the kind of failure, at most 64 bytes, may be empty.
    Failure(&'static str),
    /// The call failed before it reached the target.
    LocalFailure,
    /// It says nothing about the target.
    Ignored,
}

/// The circuit of one key.
#[derive(Clone)]
pub struct Breaker {}

impl Breaker {
    /// The same policy for another key.
    #[must_use]
    pub fn key(&self, _key: &str) -> Self {
        unimplemented!()
    }

    /// Lets a call through, or does not; asks the server where the circuit may be half-open.
    ///
    /// # Errors
    /// If the circuit is open.
    pub async fn admit(&self) -> Result<Permit, Rejected> {
        unimplemented!()
    }

    /// As [`admit`](Self::admit), from memory alone.
    ///
    /// # Errors
    /// If the circuit is open.
    pub fn try_admit(&self) -> Result<Permit, Rejected> {
        unimplemented!()
    }
}

/// A call that was let through; dropped without a word it is abandoned.
#[derive(Debug)]
pub struct Permit {}

impl Permit {
    /// The call is over; how long it took is measured from when it was let through.
    pub fn record(self, _verdict: Verdict) {
        unimplemented!()
    }

    /// How long the call has been under way.
    pub fn elapsed(&self) -> Duration {
        unimplemented!()
    }
}
