//! A policy and key that the client uses, and what the server told of them.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
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
    /// A number that spreads keys over connections, the same for the same names.
    pub(crate) spread: u64,
    settings: ArcSwapOption<Settings>,
    /// Clients that have it bound; at least 1.
    clients: AtomicU32,
    /// The server refused to tell, and that has been said.
    refused: AtomicBool,
}

impl Binding {
    pub(crate) fn new(policy: &str, key: &str, handle: u32) -> Self {
        Self {
            policy: policy.into(),
            key: key.into(),
            handle,
            spread: spread(policy, key),
            settings: ArcSwapOption::empty(),
            clients: AtomicU32::new(1),
            refused: AtomicBool::new(false),
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

    /// The server refuses to tell: whether that is news.
    pub(crate) fn is_refused(&self) -> bool {
        !self.refused.swap(true, Ordering::Relaxed)
    }

    /// The server does not refuse any more.
    pub(crate) fn is_accepted(&self) {
        self.refused.store(false, Ordering::Relaxed);
    }
}

fn spread(policy: &str, key: &str) -> u64 {
    // Its keys are zeros, so it is the same in each process.
    let mut hasher = DefaultHasher::new();
    (policy, key).hash(&mut hasher);
    hasher.finish()
}
