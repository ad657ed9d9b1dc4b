//! Where the server is in its life.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU8, Ordering},
};

use crate::app::App;

/// Where the server is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It recovers its state, and decides nothing yet.
    Starting,
    /// It decides.
    Ready,
    /// It finishes what is in flight, and takes no new connections.
    Draining,
    /// The storage failed: nothing is admitted until a restart.
    Failed,
}

/// The phase, and from `Ready` on the app.
#[derive(Default)]
pub struct Lifecycle {
    phase: AtomicU8,
    app: OnceLock<Arc<App>>,
}

impl Lifecycle {
    /// The phase now.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Starting,
            1 => Phase::Ready,
            2 => Phase::Draining,
            _ => Phase::Failed,
        }
    }

    /// What decides, once there is one.
    pub fn app(&self) -> Option<&Arc<App>> {
        self.app.get()
    }

    /// State is recovered: `app` decides from now on.
    pub fn ready(&self, app: Arc<App>) {
        if self.app.set(app).is_ok() {
            self.phase.store(1, Ordering::Release);
        }
    }

    /// The end begins.
    pub(crate) fn drain(&self) {
        self.phase.store(2, Ordering::Release);
    }

    /// The storage failed.
    pub(crate) fn fail(&self) {
        self.phase.store(3, Ordering::Release);
    }
}
