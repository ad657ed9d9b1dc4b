//! Calls at the same time, in this process and in the fleet.

use std::{sync::Arc, time::Duration};

use fusebox_core::Time;
use fusebox_proto::v1;

use crate::{
    Rejected,
    context::Context,
    part::{Draft, Link, Part},
};

/// All bulkheads of a client.
pub(crate) struct Bulkheads {
    _context: Arc<Context>,
}

impl Bulkheads {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self { _context: context }
    }

    pub(crate) fn of(self: &Arc<Self>, _policy: &str) -> Bulkhead {
        unimplemented!()
    }
}

impl Part for Bulkheads {
    fn tend(&self, _now: Time) {}
    fn report(&self, _draft: &mut Draft, _now: Time) {}
    fn reported(&self, _response: &v1::ReportResponse, _sent: Time) {}
    fn linked(&self, _link: Link, _now: Time) {}
    fn close(&self, _draft: &mut Draft, _now: Time) {}
}

/// The permits of one key.
#[derive(Clone)]
pub struct Bulkhead {}

impl Bulkhead {
    /// The same policy for another key.
    #[must_use]
    pub fn key(&self, _key: &str) -> Self {
        unimplemented!()
    }

    /// How long [`acquire`](Self::acquire) may wait for a permit.
    #[must_use]
    pub fn max_wait(self, _max_wait: Duration) -> Self {
        unimplemented!()
    }

    /// Takes a permit.
    ///
    /// # Errors
    /// If it is denied.
    pub async fn acquire(&self) -> Result<Permit, Rejected> {
        unimplemented!()
    }

    /// Whether a call that outlives its permit is to be cancelled.
    pub fn cancels_on_expiry(&self) -> bool {
        unimplemented!()
    }
}

/// A permit, given back when dropped.
#[derive(Debug)]
pub struct Permit {}

impl Permit {
    /// Returns when it has expired; never if it is renewed all along.
    pub async fn expired(&self) {
        unimplemented!()
    }
}
