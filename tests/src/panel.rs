//! A server without its transport: cells, a journal, and a writer whose rounds the test makes.

use std::sync::Arc;

use fusebox_core::{Ask, Charging};
use fusebox_server::{
    app::{App, Life, Priority},
    config::{
        Config, Durability,
        envoy::{self, Ruleset, files::Loaded},
    },
    entropy::Entropy,
    lifecycle::Lifecycle,
    storage::{
        self, Answer, CellAsk, Charge, Decided, Durable, Left, Recovered, RecoveryError, Start,
        Storage, StorageError, Writer,
        journal::{Nothing, OpenJournal},
    },
};
use tokio_util::sync::CancellationToken;

use crate::{Counting, ManualClock};

/// Starts on a journal, with the rules of the folder that the configuration names, if it does.
///
/// # Errors
/// As [`storage::recover`].
///
/// # Panics
/// If the rules are wrong.
pub fn recover(
    journal: OpenJournal,
    config: &Config,
    clock: &Arc<ManualClock>,
) -> Result<Recovered, RecoveryError> {
    let rules = config
        .envoy_ratelimit
        .clone()
        .map(|settings| envoy::read(Arc::new(settings)).unwrap_or_else(|error| panic!("{error}")));
    storage::recover(Start {
        journal,
        accept_loss: false,
        namespaces: &config.namespaces,
        rules: rules.as_ref(),
        durability: config.storage.durability,
        clock: Arc::clone(clock) as Arc<_>,
        entropy: &Counting::default(),
    })
}

/// What a file of Envoy's rules says, and a configuration of them.
///
/// # Panics
/// If it says nothing.
pub fn ruleset(settings: &str, file: &str) -> Ruleset {
    let config = format!("envoy_ratelimit: {{config_dir: nowhere, {settings}}}");
    let config = Config::parse("test.yaml", &config).expect("a configuration");
    let settings = Arc::new(config.envoy_ratelimit.expect("settings"));
    let files = [("rl.yaml".to_owned(), file.to_owned())];
    let loaded = envoy::files::parse(&files, &settings);
    let Loaded { rules, notes } = loaded.unwrap_or_else(|error| panic!("{error}"));
    Ruleset { settings, rules, notes }
}

/// What decides by these rules alone, and what writes for it.
///
/// # Errors
/// As [`storage::recover`].
pub fn app_of_rules(
    journal: OpenJournal,
    rules: &Ruleset,
    clock: &Arc<ManualClock>,
) -> Result<(App, Writer), RecoveryError> {
    let recovered = storage::recover(Start {
        journal,
        accept_loss: false,
        namespaces: &Default::default(),
        rules: Some(rules),
        durability: Durability::Strict,
        clock: Arc::clone(clock) as Arc<_>,
        entropy: &Counting::default(),
    })?;
    Ok(app_of(recovered, Arc::<Counting>::default()))
}

/// What callers can do with a server that keeps nothing, which is ready from here on.
///
/// # Panics
/// If the configuration is wrong.
pub fn app(lifecycle: &Lifecycle, config: &str) -> Arc<App> {
    let config = Config::parse("test.yaml", config).expect("a configuration");
    let recovered = recover(Nothing::open(), &config, &Arc::default()).expect("nothing recovers");
    let disk = recovered.writer.disk();
    let (app, _) = app_of(recovered, Arc::<Counting>::default());
    let app = Arc::new(app);
    lifecycle.recovered(Arc::clone(&app), disk);
    app
}

/// What decides by this configuration on a journal, and what writes for it.
///
/// # Errors
/// As [`storage::recover`].
pub fn app_on(
    journal: OpenJournal,
    config: &Config,
    clock: &Arc<ManualClock>,
) -> Result<(App, Writer), RecoveryError> {
    recover(journal, config, clock).map(|recovered| app_of(recovered, Arc::<Counting>::default()))
}

/// What decides by what a start found, and what writes for it.
pub fn app_of(recovered: Recovered, entropy: Arc<dyn Entropy>) -> (App, Writer) {
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
    } = recovered;
    let life = Life {
        boot,
        secret,
        circuits,
        open: grants,
        draining: CancellationToken::new(),
        operations,
    };
    (App::new(catalogue, cells, clock, entropy, life), writer)
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
