use std::{borrow::Cow, fmt};

use tower::Layer;

use super::Bulkhead;
use crate::{bulkhead, layer::OneKey};

/// Holds a permit for as long as a call takes, and rejects those that get none.
///
/// A call that outlives its permit goes on, or ends with [`CallError::Expired`](crate::bulkhead::CallError::Expired), as
/// [`on_expiry`](crate::Bulkhead::on_expiry) says. It is over when its response is there, also if a body follows; or when it is dropped.
#[derive(Clone)]
pub struct BulkheadLayer<K = OneKey> {
    bulkhead: bulkhead::Bulkhead,
    key: K,
}

impl BulkheadLayer {
    /// Permits of the bulkhead's key.
    #[must_use]
    pub fn new(bulkhead: bulkhead::Bulkhead) -> Self {
        Self { bulkhead, key: OneKey }
    }
}

impl<K> BulkheadLayer<K> {
    /// Which key a request is for: such as `|request: &Request| Cow::from(request.shard())`.
    pub fn key_by<Request, F: Fn(&Request) -> Cow<'_, str>>(self, key: F) -> BulkheadLayer<F> {
        BulkheadLayer { bulkhead: self.bulkhead, key }
    }
}

impl<S, K: Clone> Layer<S> for BulkheadLayer<K> {
    type Service = Bulkhead<S, K>;

    fn layer(&self, inner: S) -> Self::Service {
        Bulkhead::new(inner, self.bulkhead.clone(), self.key.clone())
    }
}

impl<K> fmt::Debug for BulkheadLayer<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BulkheadLayer").field("bulkhead", &self.bulkhead).finish_non_exhaustive()
    }
}
