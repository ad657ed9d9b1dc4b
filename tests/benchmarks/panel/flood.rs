//! What names that nobody has asked for before cost everybody else: ten million of them, on a policy with room
//! for one million.

use fusebox_client::unary::{Ask, Client};

use crate::{
    Options, Result,
    load::Load,
    machine::Memory,
    print,
    process::{Engine, Home, Server},
    table::{Table, count, figure},
    traffic::{Keys, Shape, Traffic},
};

/// Names made up, in all.
const NAMES: u32 = 10_000_000;

/// Names between two looks.
const SLICE: u32 = 1_000_000;

/// Calls a second for a key that lives, and how long they are watched: few, so that what is seen is the server.
const RATE: f64 = 2_000.0;
const SECONDS: f64 = 3.0;

const COLUMNS: [&str; 5] = ["names so far", "RSS", "p50, ms", "p99, ms", "p99.9, ms"];

pub(crate) async fn measure(options: &Options) -> Result<()> {
    let home = Home::new(options, Engine::Memory, 0)?;
    let server = home.start().await?;
    let client = Client::connect(format!("http://{}", server.grpc()), "bench").await?;
    // Spent before the flood: a bucket that was dropped to make room would be full again.
    let witness = |cost| [Ask::new("slowest", "witness").cost(cost)];
    if !client.acquire(witness(1_000)).await?.allowed {
        return Err("the witness is not full at the start".into());
    }

    let title = format!("{} made-up names, on a policy with room for a tenth", count(NAMES));
    let mut table = Table::new(&title, &COLUMNS);
    let load = Load::connect(&server, 1, &mut hot()).await?;
    for from in (0..=NAMES).step_by(SLICE as usize) {
        if from > 0 {
            eprintln!("flood: {from} names");
            let (traffic, batches) = Traffic::each_between("flooded", from - SLICE..from);
            load.each(traffic, batches).await?;
        }
        table.row(row(&server, &load, from).await?);
        print(&table.take_text())?;
    }
    let dropped = client.acquire(witness(1)).await?.allowed;
    table.note(&format!(
        "In memory. Latencies are those of one live key of another policy, at {} calls a second, while nothing else \
         but housekeeping runs. A key that was spent before the flood is {} after it. RSS in MB.",
        figure(RATE),
        if dropped { "FULL AGAIN" } else { "still spent" },
    ));
    print(&table.take_text())
}

fn hot() -> Traffic {
    Traffic::new(Shape::Asks(1), "slow", Keys::Hot)
}

async fn row(server: &Server, load: &Load, names: u32) -> Result<Vec<String>> {
    let latency = load.arrive(hot(), RATE, SECONDS).await?;
    let memory = Memory::of(server.pid())?;
    let millis = |quantile| figure(latency.nanos.value_at_quantile(quantile) as f64 / 1e6);
    let megabytes = figure(memory.resident as f64 / 1e6);
    Ok(vec![count(names), megabytes, millis(0.5), millis(0.99), millis(0.999)])
}
