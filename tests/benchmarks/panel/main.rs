//! The benchmark: what a decision costs, beside a server that decides nothing.
//!
//! The machine it runs on is noisy and shared with the servers it measures, so no figure stands alone: each is
//! told as a ratio to that of a [rival] measured just before and just after, in the same run. The
//! servers are processes of their own, so that their CPU can be told from the generator's.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // figures for people, of a known range

mod circuits;
mod crowd;
mod decide;
mod fleet;
mod flood;
mod footprint;
mod load;
mod machine;
mod process;
mod rival;
mod rows;
mod rules;
mod sdk;
mod table;
mod traffic;

use std::{
    error::Error,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    task::LocalSet,
};

/// What goes wrong here ends the run, and is told to whoever started it.
type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Measures Fusebox beside a gRPC server that decides nothing, and prints Markdown tables on stdout.
///
/// Each row is measured twice: with a fixed number of calls in flight, for throughput and the server's CPU, and
/// with calls that arrive at a fixed rate, for latency, which counts from the moment a call was due. Every
/// figure is followed by its ratio to that of the no-op rows next to it. Progress is told on stderr.
#[derive(Parser)]
#[command(name = "bench", bin_name = ".ci/bench", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    part: Option<Inner>,
}

#[derive(Args)]
struct Options {
    /// Length of each measurement; a row has two.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = positive)]
    seconds: f64,
    /// Measure only rows whose name contains this; may be repeated. `--list` shows the names.
    #[arg(long, value_name = "TEXT")]
    rows: Vec<String>,
    /// What to measure.
    #[arg(long, value_delimiter = ',', default_values = ["rows", "circuits", "fleet", "footprint", "rules", "instructions", "sdk"])]
    parts: Vec<Part>,
    /// Connections to a server, shared by its calls.
    #[arg(long, value_name = "COUNT", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// Calls in flight for throughput and CPU.
    #[arg(long, value_name = "COUNT", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    in_flight: u16,
    /// Calls a second for latency [default: half of what the no-op server does at most].
    #[arg(long, value_name = "CALLS", value_parser = positive)]
    rate: Option<f64>,
    /// Keys that the part `footprint` charges.
    #[arg(long, value_name = "COUNT", default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..=5_000_000))]
    keys: u32,
    /// Where data directories are made, and deleted [default: the system's place for temporary files].
    #[arg(long, value_name = "DIRECTORY")]
    data: Option<PathBuf>,
    /// The server to measure: another than the one built just now.
    #[arg(long, value_name = "FILE", overrides_with = "server")]
    server: Option<PathBuf>,
    /// Say which rows there are, and measure none.
    #[arg(long)]
    list: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Throughput, CPU and latency.
    Rows,
    /// The same of circuits, and their memory.
    Circuits,
    /// Time from a transition of a circuit until all who watch know of it.
    Fleet,
    /// Memory and disk for each live key, and the time that a restart takes.
    Footprint,
    /// Start, reload and memory with many rules of Envoy's rate limit service.
    Rules,
    /// Instructions of one decision, beside the crate `governor`; wants valgrind.
    Instructions,
    /// What a decision costs the process that asks, beside crates that decide for one process alone.
    Sdk,
    /// Ten million made-up names: memory, and what others notice of them.
    Flood,
}

/// What this program runs of itself.
#[derive(Subcommand)]
enum Inner {
    /// Serves the rival.
    #[command(hide = true)]
    Rival,
    /// Decides some number of times, to be counted from outside.
    #[command(hide = true)]
    Decide { what: decide::What, times: usize },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.part {
        Some(Inner::Rival) => rival::serve(),
        Some(Inner::Decide { what, times }) => decide::run(what, times),
        None if cli.options.list => rows::list(),
        None => measure(&cli.options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// One thread generates all load: two would only contend with the server for the cores.
fn measure(options: &Options) -> Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            done = all(options) => done,
            // What runs is dropped, and with it servers and data directories.
            _ = terminate.recv() => Err("ended by SIGTERM".into()),
            _ = interrupt.recv() => Err("interrupted".into()),
        }
    })
}

async fn all(options: &Options) -> Result<()> {
    print(&machine::described()?)?;
    if options.parts.contains(&Part::Rows) || options.parts.contains(&Part::Circuits) {
        rows::measure(options).await?;
    }
    if options.parts.contains(&Part::Circuits) {
        circuits::measure(options).await?;
    }
    if options.parts.contains(&Part::Fleet) {
        fleet::measure(options).await?;
    }
    if options.parts.contains(&Part::Footprint) {
        footprint::measure(options).await?;
    }
    if options.parts.contains(&Part::Rules) {
        rules::measure(options).await?;
    }
    if options.parts.contains(&Part::Instructions) {
        decide::measure()?;
    }
    if options.parts.contains(&Part::Sdk) {
        sdk::measure(options).await?;
    }
    if options.parts.contains(&Part::Flood) {
        flood::measure(options).await?;
    }
    Ok(())
}

/// Prints what is known so far: a run that is interrupted keeps it.
fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

fn positive(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|number| *number > 0.0 && f64::is_finite(*number))
        .ok_or_else(|| "not a number above 0".into())
}
