//! Where the server is in its life.

use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;

use crate::{app::App, counters::Disk};

/// Where the server is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// It recovers its state, and decides nothing yet.
    #[default]
    Starting,
    /// It decides.
    Ready,
    /// It finishes what is in flight, and takes no new connections.
    Draining,
    /// The storage failed: nothing is admitted until a restart.
    Failed,
}

/// What happens in a life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Recovered,
    ShutDown,
    StorageFailed,
}

impl Phase {
    fn next(self, event: Event) -> Self {
        match (self, event) {
            (Self::Starting, Event::Recovered) => Self::Ready,
            (Self::Starting | Self::Ready | Self::Draining, Event::ShutDown) => Self::Draining,
            // A failure is told until the end, also while draining.
            (_, Event::StorageFailed) | (Self::Failed, _) => Self::Failed,
            (Self::Ready | Self::Draining, Event::Recovered) => self,
        }
    }
}

/// The phase, and what decides once state is recovered.
#[derive(Default)]
pub struct Lifecycle {
    phase: RwLock<Phase>,
    app: OnceLock<Arc<App>>,
    disk: OnceLock<Arc<Disk>>,
}

impl Lifecycle {
    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.read()
    }

    /// What decides, once state is recovered.
    pub fn app(&self) -> Option<&Arc<App>> {
        self.app.get()
    }

    /// What the writer does, once state is recovered.
    pub fn disk(&self) -> Option<&Arc<Disk>> {
        self.disk.get()
    }

    /// State is recovered: `app` decides from now on, and a writer follows it that counts in `disk`.
    pub fn recovered(&self, app: Arc<App>, disk: Arc<Disk>) {
        // There is one recovery in a life.
        let _ = self.disk.set(disk);
        let _ = self.app.set(app);
        self.happens(Event::Recovered);
    }

    /// The end begins.
    pub(crate) fn shut_down(&self) {
        self.happens(Event::ShutDown);
    }

    /// The storage failed.
    pub(crate) fn storage_failed(&self) {
        self.happens(Event::StorageFailed);
    }

    fn happens(&self, event: Event) {
        let mut phase = self.phase.write();
        *phase = phase.next(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_knows_every_event() {
        use Event::{Recovered, ShutDown, StorageFailed};
        use Phase::{Draining, Failed, Ready, Starting};
        for (phase, [recovered, shut_down, storage_failed]) in [
            (Starting, [Ready, Draining, Failed]),
            (Ready, [Ready, Draining, Failed]),
            (Draining, [Draining, Draining, Failed]),
            (Failed, [Failed, Failed, Failed]),
        ] {
            assert_eq!(phase.next(Recovered), recovered);
            assert_eq!(phase.next(ShutDown), shut_down);
            assert_eq!(phase.next(StorageFailed), storage_failed);
        }
    }
}
