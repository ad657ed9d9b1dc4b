//! Rates and windows, spent from leases.

use std::{sync::Arc, time::Duration};

use fusebox_core::Time;
use fusebox_proto::v1;

use crate::{
    Rejected,
    context::Context,
    part::{Draft, Link, Part},
};

/// All limiters of a client.
pub(crate) struct Limiters {
    _context: Arc<Context>,
}

impl Limiters {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self { _context: context }
    }

    pub(crate) fn of(self: &Arc<Self>, _policy: &str) -> Limiter {
        unimplemented!()
    }
}

impl Part for Limiters {
    fn tend(&self, _now: Time) {}
    fn report(&self, _draft: &mut Draft, _now: Time) {}
    fn reported(&self, _response: &v1::ReportResponse, _sent: Time) {}
    fn linked(&self, _link: Link, _now: Time) {}
    fn close(&self, _draft: &mut Draft, _now: Time) {}
}

/// A rate or window of one key.
#[derive(Clone)]
pub struct Limiter {}

impl Limiter {
    /// The same policy for another key.
    #[must_use]
    pub fn key(&self, _key: &str) -> Self {
        unimplemented!()
    }

    /// How long [`acquire`](Self::acquire) may wait for tokens.
    #[must_use]
    pub fn max_wait(self, _max_wait: Duration) -> Self {
        unimplemented!()
    }

    /// Takes tokens, in memory where the lease covers them.
    ///
    /// # Errors
    /// If they are denied.
    pub async fn acquire(&self, _cost: u64) -> Result<(), Rejected> {
        unimplemented!()
    }

    /// Takes tokens from memory.
    ///
    /// # Errors
    /// If they are not there.
    pub fn try_acquire(&self, _cost: u64) -> Result<(), Rejected> {
        unimplemented!()
    }
}
