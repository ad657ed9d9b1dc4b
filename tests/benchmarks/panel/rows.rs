//! Throughput, CPU and latency of each row, beside the rival's.

use std::time::Instant;

use crate::{
    Options, Result,
    crowd::Crowd,
    load::{Failures, Latency, Load, Saturation},
    print,
    process::{Engine, Home, Server},
    table::{Table, beside, count, figure},
    traffic::{Keys, Shape, Traffic},
};

/// Rows of one shape after which the rival is measured again: the machine changes over minutes.
const NEIGHBOURS: usize = 4;

/// A server that does less than this many times the rate is measured at half of what it does instead: near its
/// most, what is told is the length of a queue, and of nothing else.
const SUSTAINED: f64 = 1.5;

const COLUMNS: [&str; 11] = [
    "row",
    "calls/s",
    "decisions/s",
    "CPU µs/call",
    "CPU µs/decision",
    "others' cores",
    "at calls/s",
    "p50 µs",
    "p99 µs",
    "p99.9 µs",
    "errors",
];

#[derive(Clone, Copy)]
struct Row {
    shape: Shape,
    engine: Engine,
    judge: Judge,
    keys: Keys,
    crowd: Crowd,
}

/// What decides.
#[derive(Clone, Copy)]
enum Judge {
    /// The policy of that name.
    Policy(&'static str),
    /// Rules of Envoy's rate limit service, so many.
    Rules(u32),
}

impl Row {
    fn name(self) -> String {
        let Self { shape, engine, judge, keys, crowd } = self;
        let (engine, shape, keys) = (engine.name(), shape.name(), keys.name());
        let judge = match judge {
            Judge::Policy(policy) => format!("{policy} policy"),
            Judge::Rules(rules) => format!("{} rules", count(rules)),
        };
        format!("{engine}, {shape}, {keys}, {judge}{}", crowd.name())
    }

    /// The policy; none of rules, which descriptors name by themselves.
    fn policy(self) -> &'static str {
        match self.judge {
            Judge::Policy(policy) => policy,
            Judge::Rules(_) => "",
        }
    }

    fn rules(self) -> u32 {
        match self.judge {
            Judge::Policy(_) => 0,
            Judge::Rules(rules) => rules,
        }
    }

    fn traffic(self) -> Traffic {
        Traffic::new(self.shape, self.policy(), self.keys)
    }
}

/// Policies of the other kinds, one that only watches, and one of three limits.
const OTHERS: [&str; 7] = ["fixed", "calendar", "sliding", "permits", "retries", "shadow", "three"];

/// All rows of one shape, with which they share the rival's.
fn of_shape(shape: Shape) -> Vec<Row> {
    let of = |engine, judge, keys| Row { shape, engine, judge, keys, crowd: Crowd::Nobody };
    let row = |engine, policy, keys| of(engine, Judge::Policy(policy), keys);
    let ruled = |engine, rules| of(engine, Judge::Rules(rules), Keys::Thousand);
    let rows = |engine| match shape {
        Shape::Asks(1) => {
            let mut rows = vec![
                row(engine, "slow", Keys::Hot),
                row(engine, "slow", Keys::Thousand),
                row(engine, "slow", Keys::Million),
                row(engine, "fast", Keys::Hot),
            ];
            // What others notice of them is seen without a disk.
            if engine == Engine::Memory {
                let beside = |crowd| Row { crowd, ..row(engine, "slow", Keys::Hot) };
                rows.extend([Crowd::Line, Crowd::Remembered].map(beside));
            }
            // What a kind costs is seen without a disk, and with one that is waited for.
            if engine != Engine::Relaxed {
                rows.extend(OTHERS.map(|policy| row(engine, policy, Keys::Thousand)));
            }
            rows
        }
        Shape::Asks(_) | Shape::Batch(_) => vec![row(engine, "slow", Keys::Thousand)],
        // What is written is so as an ask's is: one row tells it.
        Shape::Descriptors(1) => match engine {
            Engine::Memory => vec![ruled(engine, 10), ruled(engine, 10_000)],
            Engine::Relaxed => vec![],
            Engine::Strict => vec![ruled(engine, 10)],
        },
        Shape::Descriptors(_) if engine == Engine::Memory => vec![ruled(engine, 10)],
        Shape::Descriptors(_) => vec![],
    };
    Engine::ALL.into_iter().flat_map(rows).collect()
}

const SHAPES: [Shape; 9] = [
    Shape::Asks(1),
    Shape::Asks(3),
    Shape::Asks(16),
    Shape::Batch(1),
    Shape::Batch(100),
    Shape::Batch(1_000),
    Shape::Descriptors(1),
    Shape::Descriptors(3),
    Shape::Descriptors(8),
];

pub(crate) fn list() -> Result<()> {
    let rows = SHAPES.into_iter().flat_map(of_shape);
    print(&rows.map(|row| row.name() + "\n").collect::<String>())
}

/// What was measured of a row, or why it was not.
struct Measured {
    name: String,
    /// Whether it is the rival's.
    rival: bool,
    figures: Result<Figures, String>,
}

struct Figures {
    saturation: Saturation,
    rate: f64,
    /// Whether the rate is the rival's: latencies at another say nothing about each other.
    at_its_rate: bool,
    latency: Latency,
}

pub(crate) async fn measure(options: &Options) -> Result<()> {
    let wanted = |row: &Row| {
        let name = row.name();
        options.rows.is_empty() || options.rows.iter().any(|text| name.contains(text.as_str()))
    };
    let groups: Vec<(Shape, Vec<Row>)> = SHAPES
        .into_iter()
        .map(|shape| (shape, of_shape(shape).into_iter().filter(wanted).collect::<Vec<_>>()))
        .filter(|(_, rows)| !rows.is_empty())
        .collect();
    let runs = |rows: &Vec<Row>| rows.len() + 1 + rows.len().div_ceil(NEIGHBOURS);
    let mut progress = Progress::new(groups.iter().map(|(_, rows)| runs(rows)).sum());
    if groups.is_empty() {
        return Err("no row has such a name; --list shows them".into());
    }

    let rival = Server::rival()?;
    let mut table = Table::new("Beside a server that decides nothing", &COLUMNS);
    for (shape, rows) in groups {
        let mut group = vec![progress.of(measure_rival(options, &rival, shape).await?)];
        for neighbours in rows.chunks(NEIGHBOURS) {
            let rate = rate_of(options, &group)?;
            for row in neighbours {
                let figures =
                    measure_row(options, *row, rate).await.map_err(|error| error.to_string());
                group.push(progress.of(Measured { name: row.name(), rival: false, figures }));
            }
            group.push(progress.of(measure_rival(options, &rival, shape).await?));
        }
        for (index, measured) in group.iter().enumerate() {
            table.row(fields(measured, shape, &neighbours(&group, index)));
        }
        print(&table.take_text())?;
    }
    table.note(&format!(
        "In brackets: the ratio to the mean of the no-op rows above and below. Throughput and CPU: {} calls in flight \
         over {} connections for {} s, with a generator that shares the cores. Latency: at a fixed rate, from when a call \
         was due. Without a ratio it is at half of the row's own throughput, because half of the no-op's was too much. \
         Others' cores: what neither server nor generator had, during the first and the second; where it is not near \
         zero, measure again.",
        options.in_flight, options.connections, options.seconds,
    ));
    print(&table.take_text())
}

async fn measure_rival(options: &Options, rival: &Server, shape: Shape) -> Result<Measured> {
    let traffic = || Traffic::new(shape, "slow", Keys::Thousand);
    let load = Load::connect(rival, options.connections, &mut traffic()).await?;
    let saturation = load.saturate(traffic(), options.in_flight, options.seconds).await?;
    let rate = options.rate.unwrap_or(saturation.rate() / 2.0);
    let latency = load.arrive(traffic(), rate, options.seconds).await?;
    let figures = Ok(Figures { saturation, rate, at_its_rate: true, latency });
    Ok(Measured { name: format!("no-op, {}", shape.name()), rival: true, figures })
}

/// The rate for rows beside the rival measured last.
fn rate_of(options: &Options, group: &[Measured]) -> Result<f64> {
    let rival = group.iter().rev().find(|one| one.rival).and_then(|one| one.figures.as_ref().ok());
    Ok(options.rate.unwrap_or(rival.ok_or("no rival")?.saturation.rate() / 2.0))
}

async fn measure_row(options: &Options, row: Row, rate: f64) -> Result<Figures> {
    let home = Home::new(options, row.engine, row.rules())?;
    let server = home.start().await.map_err(|error| format!("not started: {error}"))?;
    let load = Load::connect(&server, options.connections, &mut row.traffic()).await?;
    if row.keys == Keys::Million {
        // All of them live, as they would after a day.
        let (traffic, batches) = Traffic::each_once(row.policy(), row.keys.count());
        load.each(traffic, batches).await?;
    }
    let _there = row.crowd.gather(&server, &load).await?;
    let saturation = load.saturate(row.traffic(), options.in_flight, options.seconds).await?;
    let at_its_rate = saturation.rate() > rate * SUSTAINED || options.rate.is_some();
    let rate = if at_its_rate { rate } else { saturation.rate() / 2.0 };
    let latency = load.arrive(row.traffic(), rate, options.seconds).await?;
    server.stop().await?;
    Ok(Figures { saturation, rate, at_its_rate, latency })
}

/// The rival's figures nearest to a row, before it and after it.
fn neighbours(group: &[Measured], index: usize) -> Vec<&Figures> {
    let rival = |one: &&Measured| one.rival;
    let before = group[..index].iter().rev().find(rival);
    let after = group[index..].iter().find(rival);
    let figures = before.into_iter().chain(after).filter_map(|one| one.figures.as_ref().ok());
    if group[index].rival { Vec::new() } else { figures.collect() }
}

fn fields(measured: &Measured, shape: Shape, rivals: &[&Figures]) -> Vec<String> {
    let figures = match &measured.figures {
        Ok(figures) => figures,
        Err(error) => {
            let mut fields = vec![String::from("–"); COLUMNS.len()];
            (fields[0], fields[1]) = (measured.name.clone(), error.clone());
            return fields;
        }
    };
    let mean = |of: &dyn Fn(&Figures) -> f64| {
        (!rivals.is_empty())
            .then(|| rivals.iter().map(|rival| of(rival)).sum::<f64>() / rivals.len() as f64)
    };
    let with_ratio = |of: &dyn Fn(&Figures) -> f64| beside(of(figures), mean(of));
    let latency = |quantile: f64| {
        let of = |figures: &Figures| figures.latency.nanos.value_at_quantile(quantile) as f64 / 1e3;
        if figures.at_its_rate { with_ratio(&of) } else { figure(of(figures)) }
    };
    let decisions = f64::from(shape.decisions());
    let cpu = |figures: &Figures| {
        figures.saturation.cpu.as_secs_f64() * 1e6 / figures.saturation.calls as f64
    };
    let mut failures = figures.saturation.failures.clone();
    failures.join(figures.latency.failures.clone());
    vec![
        measured.name.clone(),
        with_ratio(&|figures| figures.saturation.rate()),
        figure(figures.saturation.rate() * decisions),
        with_ratio(&cpu),
        figure(cpu(figures) / decisions),
        format!("{:.2}, {:.2}", figures.saturation.others, figures.latency.others),
        figure(figures.rate),
        latency(0.5),
        latency(0.99),
        latency(0.999),
        errors(&failures),
    ]
}

fn errors(failures: &Failures) -> String {
    match &failures.first {
        None => "0".into(),
        Some(first) => format!("**{}**: {first}", failures.count),
    }
}

/// Tells people what was measured, and how long the rest takes.
struct Progress {
    begin: Instant,
    done: usize,
    all: usize,
}

impl Progress {
    fn new(all: usize) -> Self {
        Self { begin: Instant::now(), done: 0, all }
    }

    fn of(&mut self, measured: Measured) -> Measured {
        self.done += 1;
        let told = match &measured.figures {
            Ok(Figures { saturation, latency, .. }) => format!(
                "{} calls/s, p50 {} µs; the generator took {} µs of CPU a call, and was {} µs late (p99 {})",
                figure(saturation.rate()),
                figure(latency.nanos.value_at_quantile(0.5) as f64 / 1e3),
                figure(saturation.generator.as_secs_f64() * 1e6 / saturation.calls as f64),
                figure(latency.late.value_at_quantile(0.5) as f64 / 1e3),
                figure(latency.late.value_at_quantile(0.99) as f64 / 1e3),
            ),
            Err(error) => error.clone(),
        };
        let left = self.begin.elapsed() / self.done as u32 * (self.all - self.done) as u32;
        eprintln!(
            "[{}/{}, {} s left] {}: {told}",
            self.done,
            self.all,
            left.as_secs(),
            measured.name
        );
        measured
    }
}
