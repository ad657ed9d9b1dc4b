//! `fusebox`: gathers the parts of a server, and runs it.

use std::{
    io::{self, IsTerminal, Write},
    net::SocketAddr,
    path::Path,
    process::{self, ExitCode},
    sync::Arc,
};

use clap::Parser;
use fusebox_server::{
    cli::{Cli, Command, Serve},
    clock::SystemClock,
    config::{
        Config, Engine, Storage,
        envoy::{self, EnvoyRatelimit, Rules, Ruleset},
    },
    entropy::SystemEntropy,
    limits,
    run::{self, Listeners, Parts},
    storage::journal::{Nothing, OpenJournal, Sled},
};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// A call makes many small and short-lived allocations: this allocator takes less CPU for them than the C library's,
/// and holds some fifty megabytes from the start for it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The configuration or the command line is wrong.
const MISUSE: u8 = 2;

/// The server could not start, or not end well.
const FAILURE: u8 = 1;

/// As shells say it of a program that SIGINT ended.
const INTERRUPTED: i32 = 130;

const NOTHING_SERVED: &str = "the configuration has no namespaces: every Acquire will be NOT_FOUND";

fn main() -> ExitCode {
    match Cli::parse().command() {
        Command::Check { file } => check(&file),
        Command::Serve(serve) => start(&serve),
    }
}

fn check(file: &Path) -> ExitCode {
    let config = match Config::read(file) {
        Ok(config) => config,
        Err(error) => return fail(MISUSE, &error.to_string()),
    };
    if let Err(note) = config.check_exposure(false) {
        note_to_people(&note.to_string());
    }
    config.notes().iter().for_each(|note| note_to_people(note));
    match &config.envoy_ratelimit {
        Some(settings) => match read_rules(settings) {
            Ok(Ruleset { rules, notes, .. }) => {
                notes.iter().for_each(|note| note_to_people(note));
                note_to_people(&found(&rules, settings));
                if config.namespaces.is_empty() && rules.domains.is_empty() {
                    note_to_people(NOTHING_SERVED);
                }
            }
            Err(code) => return code,
        },
        None if config.namespaces.is_empty() => note_to_people(NOTHING_SERVED),
        None => {}
    }
    print(&config.to_string());
    ExitCode::SUCCESS
}

/// The rules of Envoy's rate limit service; each mistake in them is told.
fn read_rules(settings: &EnvoyRatelimit) -> Result<Ruleset, ExitCode> {
    envoy::read(Arc::new(settings.clone())).map_err(|error| {
        error.mistakes.iter().for_each(|mistake| _ = fail(MISUSE, mistake));
        ExitCode::from(MISUSE)
    })
}

fn found(rules: &Rules, settings: &EnvoyRatelimit) -> String {
    let counted = |count: usize, what: &str| match count {
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    };
    format!(
        "{} with {} of Envoy's rate limit service in {}",
        counted(rules.domains.len(), "domain"),
        counted(rules.count(), "rule"),
        settings.config_dir.display()
    )
}

fn start(options: &Serve) -> ExitCode {
    if let Err(error) = log_to_stderr(options.log()) {
        return fail(MISUSE, &error);
    }
    let config = match options.config() {
        Ok(config) => config,
        Err(error) => return fail(MISUSE, &error.to_string()),
    };
    let rules = match config.envoy_ratelimit.as_ref().map(read_rules).transpose() {
        Ok(rules) => rules,
        Err(code) => return code,
    };
    let of_rules = rules.iter().flat_map(|rules| &rules.notes);
    config.notes().iter().chain(of_rules).for_each(|note| tracing::warn!("{note}"));
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(FAILURE, &format!("cannot start threads: {error}")),
    };
    let ended = runtime.block_on(serve(options, config, rules));
    runtime.shutdown_timeout(limits::EXIT);
    ended.err().unwrap_or(ExitCode::SUCCESS)
}

async fn serve(options: &Serve, config: Config, rules: Option<Ruleset>) -> Result<(), ExitCode> {
    let listeners = Listeners {
        grpc: bind("listen", config.listen).await?,
        ops: bind("ops_listen", config.ops_listen).await?,
    };
    if options.insecure() {
        tracing::warn!("--insecure: whoever reaches these addresses can spend every quota");
    }
    if config.namespaces.is_empty() && config.envoy_ratelimit.is_none() {
        tracing::warn!(NOTHING_SERVED);
    }
    print(
        &welcome(&listeners, options.is_demo())
            .map_err(|error| fail(FAILURE, &error.to_string()))?,
    );
    let parts = Parts {
        namespaces: config.namespaces,
        rules,
        durability: config.storage.durability,
        accept_loss: options.accept_loss(),
        drain_timeout: config.drain_timeout,
        listeners,
        clock: Arc::new(SystemClock::default()),
        entropy: Arc::new(SystemEntropy),
        journal: journal(config.storage, options.accept_loss()),
        shutdown: shutdown_on_signal().map_err(|error| fail(FAILURE, &error.to_string()))?,
    };
    run::run(parts).await.map_err(|error| fail(FAILURE, &error.to_string()))
}

fn journal(storage: Storage, accept_loss: bool) -> OpenJournal {
    match storage.engine {
        Engine::Sled => Box::new(move || Ok(Box::new(Sled::open(&storage.path, accept_loss)?))),
        Engine::Memory => Nothing::open(),
    }
}

async fn bind(setting: &str, address: SocketAddr) -> Result<TcpListener, ExitCode> {
    TcpListener::bind(address).await.map_err(|error| {
        fail(
            1,
            &format!("cannot listen on {address} (`{setting}`): {error}; choose another address"),
        )
    })
}

/// SIGTERM, as orchestrators send it, SIGINT, as people do, or SIGHUP, as a terminal does that is closed; a
/// second one does not wait for the drain.
fn shutdown_on_signal() -> io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let shutdown = CancellationToken::new();
    let told = shutdown.clone();
    tokio::spawn(async move {
        for patience in [true, false] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hang_up.recv() => {}
            }
            if patience {
                told.cancel();
            } else {
                fail(FAILURE, "ended by a second signal, before the drain was over");
                process::exit(INTERRUPTED);
            }
        }
    });
    Ok(shutdown)
}

/// For people on a terminal, as JSON for everything else.
fn log_to_stderr(filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| format!("--log `{filter}` is not a filter such as `info`: {error}"))?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    if io::stderr().is_terminal() {
        logs.with_target(false).init();
    } else {
        logs.json().flatten_event(true).init();
    }
    Ok(())
}

fn welcome(listeners: &Listeners, demo: bool) -> io::Result<String> {
    let (grpc, ops) = (listeners.grpc.local_addr()?, listeners.ops.local_addr()?);
    let mut text = format!(
        "fusebox {}\n  gRPC        {grpc}\n  operations  http://{ops}\n",
        env!("CARGO_PKG_VERSION")
    );
    if demo {
        text += &format!(
            r#"
Serving the namespace `demo`. Try, in another terminal:

  # Three signups a minute for each key: say it twice, and the second is denied.
  grpcurl -plaintext -d '{{"namespace":"demo","asks":[{{"policy":"signup","key":"alice","cost":2}}]}}' \
    {grpc} fusebox.v1.Resilience/Acquire

  # Every message and field, with its meaning.
  grpcurl -plaintext {grpc} describe fusebox.v1.AcquireRequest

  # What was decided so far.
  curl -s http://{ops}/metrics | grep fusebox_decisions

"#
        );
    }
    Ok(text)
}

/// A reader that went away is not our failure.
fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

fn note_to_people(note: &str) {
    let _ = writeln!(io::stderr(), "note: {note}");
}

fn fail(code: u8, message: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "fusebox: {message}");
    ExitCode::from(code)
}
