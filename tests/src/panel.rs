//! A server without its transport: cells, a journal, and a writer whose rounds the test makes.

use std::sync::Arc;

use fusebox_core::{Ask, Charging};
use fusebox_server::{
    app::Priority,
    config::Config,
    storage::{
        self, Answer, CellAsk, Charge, Decided, Durable, Left, Recovered, RecoveryError, Start,
        Storage, StorageError, Writer, journal::OpenJournal,
    },
};

use crate::{Counting, ManualClock};

/// Starts on a journal.
///
/// # Errors
/// As [`storage::recover`].
pub fn recover(
    journal: OpenJournal,
    config: &Config,
    clock: &Arc<ManualClock>,
) -> Result<Recovered, RecoveryError> {
    storage::recover(Start {
        journal,
        accept_loss: false,
        namespaces: &config.namespaces,
        rules: None,
        durability: config.storage.durability,
        clock: Arc::clone(clock) as Arc<_>,
        entropy: &Counting::default(),
    })
}

/// Writes until nothing is left to write.
///
/// # Errors
/// If the journal fails.
pub fn write_all(writer: &mut Writer) -> Result<(), storage::journal::JournalError> {
    while writer.round()? == Left::More {}
    Ok(())
}

/// What is told, once what it waits for is written.
pub fn told<T>(answer: Answer<T>, writer: &mut Writer) -> T {
    match answer {
        Answer::Now(value) => value,
        Answer::Later(value, durable) => {
            write_all(writer).expect("the journal writes");
            durable.blocking_recv().expect("an answer").expect("what was charged is durable");
            value
        }
    }
}

/// Whether what is waited for has come, and how it went.
pub fn settled(durable: &mut Durable) -> Option<Result<(), StorageError>> {
    durable.try_recv().ok()
}

/// One ask of a policy of the namespace `test`.
///
/// # Errors
/// As [`Storage::apply`].
pub fn acquire(
    panel: &Recovered,
    policy: &str,
    key: &str,
    ask: Ask,
) -> Result<Answer<Decided>, StorageError> {
    let now = panel.clock.now();
    let namespace = panel.catalogue.namespace("test").expect("the namespace `test`");
    let policy = namespace.policy(policy).expect("a known policy");
    let asks: Vec<CellAsk<'_>> = policy.asks(key, ask, Priority::Normal, now).collect();
    let charge =
        Charge { charging: Charging::AllOrNothing, asks: &asks, catalogue: &panel.catalogue };
    let mut decided = Decided::default();
    let answer = panel.cells.apply(&charge, None, now, &mut decided)?;
    decided.decision.merge(&[asks.len()]);
    Ok(answer.map(|()| decided))
}
