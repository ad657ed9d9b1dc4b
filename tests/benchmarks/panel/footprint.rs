//! What a live key takes of memory and disk, and how long a restart with all of them takes.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::{
    Options, Result,
    load::Load,
    machine::{Memory, Meter},
    print,
    process::{Engine, Home, Server},
    table::{Table, count, figure},
    traffic::{Keys, Shape, Traffic},
};

/// A server is at rest when it takes less than this share of a core.
const IDLE: f64 = 0.05;

/// Longest wait for rest; then the figures are of a server that still works.
const PATIENCE: Duration = Duration::from_secs(60);

/// Batches before the first look: buffers and threads that any load makes are not the keys'.
const WARM_UP: u32 = 500;

const COLUMNS: [&str; 10] = [
    "engine",
    "RSS before",
    "RSS after",
    "peak",
    "RSS/key",
    "anonymous/key",
    "disk/key",
    "at rest after",
    "stop",
    "start to ready",
];

pub(crate) async fn measure(options: &Options) -> Result<()> {
    let mut table = Table::new(&format!("{} live keys", count(options.keys)), &COLUMNS);
    for engine in Engine::ALL {
        eprintln!("{}: charging {} keys", engine.name(), options.keys);
        let fields =
            measure_engine(options, engine).await.unwrap_or_else(|error| vec![error.to_string()]);
        eprintln!("{}: {}", engine.name(), fields.join(", "));
        let blank = COLUMNS.len() - 1 - fields.len();
        let name = engine.name().to_owned();
        table.row([name].into_iter().chain(fields).chain((0..blank).map(|_| "–".into())));
        print(&table.take_text())?;
    }
    table.note(
        "Sizes in MB (10^6 bytes), each key's in bytes. At rest: under a twentieth of a core, from the last charge on. \
         Start: from the command until `/readyz` says so, after a clean stop, with all keys on disk.",
    );
    print(&table.take_text())
}

async fn measure_engine(options: &Options, engine: Engine) -> Result<Vec<String>> {
    let home = Home::new(options, engine, 0)?;
    let server = home.start().await.map_err(|error| format!("not started: {error}"))?;
    let traffic = || Traffic::new(Shape::Batch(1_000), "slow", Keys::Thousand);
    let load = Load::connect(&server, 1, &mut traffic()).await?;
    load.each(traffic(), WARM_UP).await?;
    rest(&server).await?;

    let before = Memory::of(server.pid())?;
    let (traffic, batches) = Traffic::each_once("slowest", options.keys);
    load.each(traffic, batches).await?;
    let rest = rest(&server).await?;
    let after = Memory::of(server.pid())?;

    let per_key = |before: u64, after: u64| {
        figure(after.saturating_sub(before) as f64 / f64::from(options.keys))
    };
    let megabytes = |bytes: u64| figure(bytes as f64 / 1e6);
    let mut fields = vec![
        megabytes(before.resident),
        megabytes(after.resident),
        megabytes(after.peak),
        per_key(before.resident, after.resident),
        per_key(before.anonymous, after.anonymous),
    ];
    drop(load);
    let stop = server.stop().await?;
    fields.extend([per_key(0, home.disk()?), seconds(rest), seconds(stop)]);
    if engine != Engine::Memory {
        fields.push(seconds(home.start().await?.start));
    }
    Ok(fields)
}

/// Waits until the server has nothing left to do, and tells how long that took.
pub(crate) async fn rest(server: &Server) -> Result<Duration> {
    const LOOK: Duration = Duration::from_secs(1);
    let begin = Instant::now();
    loop {
        let before = begin.elapsed();
        let meter = Meter::start(server.pid())?;
        sleep(LOOK).await;
        if meter.stop()?.as_secs_f64() < IDLE * LOOK.as_secs_f64() || begin.elapsed() > PATIENCE {
            return Ok(before);
        }
    }
}

fn seconds(time: Duration) -> String {
    figure(time.as_secs_f64()) + " s"
}
