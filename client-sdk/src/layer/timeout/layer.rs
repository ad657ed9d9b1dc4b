use tower::Layer;

use super::Timeout;
use crate::timeout;

/// Ends calls that take too long, with [`TimedOut`](crate::TimedOut).
///
/// Counted from `call`, not from when the service became ready.
#[derive(Clone, Copy, Debug)]
pub struct TimeoutLayer {
    timeout: timeout::Timeout,
}

impl TimeoutLayer {
    /// Calls may take so long.
    #[must_use]
    pub const fn new(timeout: timeout::Timeout) -> Self {
        Self { timeout }
    }
}

impl<S> Layer<S> for TimeoutLayer {
    type Service = Timeout<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Timeout::new(inner, self.timeout)
    }
}
