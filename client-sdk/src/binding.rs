//! A policy and key that the client uses, and what the server told of them.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use arc_swap::ArcSwapOption;

use crate::settings::Settings;

/// One policy and key.
///
/// Every handle of the same policy and key has the same binding; the session tells the server of it, and writes what
/// the server says into it, over all reconnects.
#[derive(Debug)]
pub(crate) struct Binding {
    /// Name of the policy.
    pub(crate) policy: Arc<str>,
    /// Which key of it.
    pub(crate) key: Arc<str>,
    /// The short number that sessions use; 0 if there is none left, and then both names are sent.
    pub(crate) handle: u32,
    settings: ArcSwapOption<Settings>,
    /// Clients that have it bound; at least 1.
    clients: AtomicU32,
}

impl Binding {
    pub(crate) fn new(policy: &str, key: &str, handle: u32) -> Self {
        Self {
            policy: policy.into(),
            key: key.into(),
            handle,
            settings: ArcSwapOption::empty(),
            clients: AtomicU32::new(1),
        }
    }

    /// What the server told last; `None` until it has. It outlives the session that told it.
    pub(crate) fn settings(&self) -> Option<Arc<Settings>> {
        self.settings.load_full()
    }

    /// Clients that share it, this one among them.
    pub(crate) fn clients(&self) -> u32 {
        self.clients.load(Ordering::Relaxed)
    }

    /// What the server tells now. `None` of settings: there is no such policy any more.
    pub(crate) fn is_told(&self, settings: Option<Arc<Settings>>, clients: u32) {
        self.settings.store(settings);
        self.clients.store(clients.max(1), Ordering::Relaxed);
    }
}
