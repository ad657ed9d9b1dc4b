//! Retries, paid for by the calls of the whole fleet.

use std::sync::Arc;

use fusebox_core::Time;
use fusebox_proto::v1;

use crate::{
    context::Context,
    part::{Draft, Link, Part},
};

/// All retry budgets of a client.
pub(crate) struct Retries {
    _context: Arc<Context>,
}

impl Retries {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self { _context: context }
    }

    pub(crate) fn of(self: &Arc<Self>, _policy: &str) -> Retry {
        unimplemented!()
    }
}

impl Part for Retries {
    fn tend(&self, _now: Time) {}
    fn report(&self, _draft: &mut Draft, _now: Time) {}
    fn reported(&self, _response: &v1::ReportResponse, _sent: Time) {}
    fn linked(&self, _link: Link, _now: Time) {}
    fn close(&self, _draft: &mut Draft, _now: Time) {}
}

/// The retries of one key.
#[derive(Clone)]
pub struct Retry {}
