//! Whether an answer reaches its caller: permits that nobody is told of are back at once.

use std::sync::Arc;

use parking_lot::Mutex;

/// How the way of an answer to its caller ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// There, as far as can be known.
    Arrived,
    /// Somewhere else.
    Lost,
}

/// An answer on its way: lost once the last copy is dropped, unless it has [arrived](Self::arrived) before. It
/// travels in the extensions of a response, which can be cloned.
#[derive(Clone)]
pub(super) struct Delivery(Arc<Guard>);

struct Guard(Mutex<Option<End>>);

/// Is told how it ended.
type End = Box<dyn FnOnce(Ended) + Send>;

impl Delivery {
    /// Has `end` told how it ended.
    pub(super) fn new(end: impl FnOnce(Ended) + Send + 'static) -> Self {
        Self(Arc::new(Guard(Mutex::new(Some(Box::new(end))))))
    }

    /// The caller has the answer.
    pub(super) fn arrived(&self) {
        let end = self.0.0.lock().take();
        if let Some(end) = end {
            end(Ended::Arrived);
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(end) = self.0.get_mut().take() {
            end(Ended::Lost);
        }
    }
}
