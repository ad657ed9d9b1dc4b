//! An app in a test, whose time and writer move by hand.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::{App, Life};
use crate::{
    clock::Clock,
    config::{Config, Durability},
    entropy::SystemEntropy,
    storage::{self, Recovered, Start, Writer, journal::Nothing},
};

/// Both clocks, which a test moves on.
#[derive(Debug)]
pub(super) struct ByHand(Mutex<Duration>);

impl Default for ByHand {
    /// On a day in 2026.
    fn default() -> Self {
        Self(Mutex::new(Duration::from_secs(1_790_000_000)))
    }
}

impl ByHand {
    pub(super) fn advance(&self, by: Duration) {
        *self.0.lock() += by;
    }
}

impl Clock for ByHand {
    fn monotonic(&self) -> Duration {
        *self.0.lock()
    }

    fn wall(&self) -> Duration {
        *self.0.lock()
    }
}

/// An app of these policies in the namespace `test`, which keeps nothing, and what would write for it.
pub(super) fn app(policies: &str, clock: &Arc<ByHand>) -> (App, Writer) {
    let config = format!("namespaces: {{test: {{policies: {{{policies}}}}}}}");
    let config = Config::parse("test.yaml", &config).unwrap();
    let recovered = storage::recover(Start {
        journal: Nothing::open(),
        accept_loss: false,
        namespaces: &config.namespaces,
        rules: None,
        durability: Durability::Strict,
        clock: Arc::clone(clock) as Arc<_>,
        entropy: &SystemEntropy,
    });
    let Recovered {
        catalogue,
        cells,
        circuits,
        grants,
        operations,
        writer,
        clock,
        boot,
        secret,
        ..
    } = recovered.unwrap();
    let draining = CancellationToken::new();
    let life = Life { boot, secret, circuits, open: grants, draining, operations };
    (App::new(catalogue, cells, clock, Arc::new(SystemEntropy), life), writer)
}
