//! Throughput, CPU and latency of each row, beside the rival's.

use std::time::Instant;

use crate::{
    Options, Part, Result,
    crowd::Crowd,
    load::{Failures, Latency, Load, Saturation},
    print,
    process::{Engine, Home, Server},
    table::{Table, beside, count, figure},
    traffic::{BREAKER, Keys, Shape, Traffic},
};

/// Rows of one group after which the rival is measured again: the machine changes over minutes.
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

    async fn traffic(self, server: &Server) -> Result<Traffic> {
        Traffic::of_server(server, (self.shape, self.policy(), self.keys)).await
    }
}

/// Rows, and what they are compared with.
struct Group {
    beside: Beside,
    rows: Vec<Row>,
}

/// What rows are compared with.
#[derive(Clone, Copy)]
enum Beside {
    /// The rival's answers to calls of that shape.
    Rival(Shape),
    /// Another row.
    Row(Row),
}

/// Policies of the other kinds, one that only watches, and one of three limits.
const OTHERS: [&str; 7] = ["fixed", "calendar", "sliding", "permits", "retries", "shadow", "three"];

/// All rows of limiters of one shape, with which they share the rival's.
fn of_shape(shape: Shape) -> Group {
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
        _ => vec![],
    };
    Group { beside: Beside::Rival(shape), rows: Engine::ALL.into_iter().flat_map(rows).collect() }
}

/// All rows of circuits. What is told of a closed one is not written, so one row tells what a disk costs.
fn of_circuits() -> Vec<Group> {
    let row = |shape, policy, engine| Row {
        shape,
        engine,
        judge: Judge::Policy(policy),
        keys: Keys::Thousand,
        crowd: Crowd::Nobody,
    };
    let of = |shape, policy| vec![row(shape, policy, Engine::Memory)];
    let with_disk = |shape, policy| {
        vec![row(shape, policy, Engine::Memory), row(shape, policy, Engine::Strict)]
    };
    let beside_rival = |shape, rows| Group { beside: Beside::Rival(shape), rows };
    let bare = row(Shape::Asks(1), "slow", Engine::Memory);
    let deltas = [1, 100, 10_000].map(|calls| row(Shape::Delta(calls), BREAKER, Engine::Memory));
    vec![
        beside_rival(Shape::Circuit, with_disk(Shape::Circuit, BREAKER)),
        beside_rival(Shape::Guarded, with_disk(Shape::Guarded, "slow")),
        Group { beside: Beside::Row(bare), rows: of(Shape::Guarded, "slow") },
        beside_rival(Shape::Outcomes(1), with_disk(Shape::Outcomes(1), BREAKER)),
        beside_rival(Shape::Outcomes(100), of(Shape::Outcomes(100), BREAKER)),
        // Their messages are of one length, but for a byte or two.
        beside_rival(Shape::Delta(1), deltas.to_vec()),
    ]
}

/// All rows of some parts.
fn of_parts(parts: &[Part]) -> Vec<Group> {
    let of = |part, groups: fn() -> Vec<Group>| {
        if parts.contains(&part) { groups() } else { Vec::new() }
    };
    let mut groups = of(Part::Rows, || SHAPES.map(of_shape).into());
    groups.extend(of(Part::Circuits, of_circuits));
    groups
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
    let groups = of_parts(&[Part::Rows, Part::Circuits]);
    let rows = groups.into_iter().flat_map(|group| group.rows);
    print(&rows.map(|row| row.name() + "\n").collect::<String>())
}

/// What was measured of a row, or why it was not.
struct Measured {
    name: String,
    shape: Shape,
    /// Whether others are compared with it.
    beside: bool,
    figures: Result<Figures, String>,
}

struct Figures {
    saturation: Saturation,
    rate: f64,
    /// Whether the rate is that of what it is compared with: latencies at another say nothing about each other.
    at_its_rate: bool,
    latency: Latency,
}

pub(crate) async fn measure(options: &Options) -> Result<()> {
    let wanted = |row: &Row| {
        let name = row.name();
        options.rows.is_empty() || options.rows.iter().any(|text| name.contains(text.as_str()))
    };
    let mut groups = of_parts(&options.parts);
    groups.iter_mut().for_each(|group| group.rows.retain(wanted));
    groups.retain(|group| !group.rows.is_empty());
    let runs = |group: &Group| group.rows.len() + 1 + group.rows.len().div_ceil(NEIGHBOURS);
    let mut progress = Progress::new(groups.iter().map(runs).sum());
    if groups.is_empty() {
        return Err("no row has such a name; --list shows them".into());
    }

    let rival = Server::rival()?;
    let mut table = Table::new("Beside a server that decides nothing", &COLUMNS);
    for Group { beside, rows } in groups {
        let mut group = vec![progress.of(measure_beside(options, &rival, beside).await?)];
        for neighbours in rows.chunks(NEIGHBOURS) {
            let rate = rate_of(options, &group)?;
            for row in neighbours {
                let figures = measure_row(options, *row, Some(rate)).await;
                let figures = figures.map_err(|error| error.to_string());
                let Row { shape, .. } = *row;
                let name = match beside {
                    Beside::Rival(_) => row.name(),
                    Beside::Row(_) => format!("beside it: {}", row.name()),
                };
                group.push(progress.of(Measured { name, shape, beside: false, figures }));
            }
            group.push(progress.of(measure_beside(options, &rival, beside).await?));
        }
        for (index, measured) in group.iter().enumerate() {
            table.row(fields(measured, &neighbours(&group, index)));
        }
        print(&table.take_text())?;
    }
    table.note(&format!(
        "In brackets: the ratio to the mean of the no-op rows above and below, or of the rows that it is told beside. \
         Throughput and CPU: {} calls in flight over {} connections for {} s, with a generator that shares the cores. \
         Latency: at a fixed rate, from when a call was due. Without a ratio it is at half of the row's own throughput, \
         because half of the no-op's was too much. Others' cores: what neither server nor generator had, during the \
         first and the second; where it is not near zero, measure again.",
        options.in_flight, options.connections, options.seconds,
    ));
    print(&table.take_text())
}

/// What rows are compared with.
async fn measure_beside(options: &Options, rival: &Server, beside: Beside) -> Result<Measured> {
    let (name, shape, figures) = match beside {
        Beside::Rival(shape) => {
            let name = format!("no-op, {}", shape.name());
            (name, shape, measure_rival(options, rival, shape).await?)
        }
        Beside::Row(row) => (row.name(), row.shape, measure_row(options, row, None).await?),
    };
    Ok(Measured { name, shape, beside: true, figures: Ok(figures) })
}

async fn measure_rival(options: &Options, rival: &Server, shape: Shape) -> Result<Figures> {
    let mut traffic = Traffic::of_server(rival, (shape, "slow", Keys::Thousand)).await?;
    let load = Load::connect(rival, options.connections, &mut traffic).await?;
    let saturation = load.saturate(traffic.clone(), options.in_flight, options.seconds).await?;
    let rate = options.rate.unwrap_or(saturation.rate() / 2.0);
    let latency = load.arrive(traffic, rate, options.seconds).await?;
    Ok(Figures { saturation, rate, at_its_rate: true, latency })
}

/// The rate for rows beside what they are compared with, as measured last.
fn rate_of(options: &Options, group: &[Measured]) -> Result<f64> {
    let beside = group.iter().rev().find(|one| one.beside);
    let beside = beside.and_then(|one| one.figures.as_ref().ok());
    Ok(options.rate.unwrap_or(beside.ok_or("nothing to compare with")?.saturation.rate() / 2.0))
}

/// A row, at that rate or at half of what it does at most.
async fn measure_row(options: &Options, row: Row, rate: Option<f64>) -> Result<Figures> {
    let home = Home::new(options, row.engine, row.rules())?;
    let server = home.start().await.map_err(|error| format!("not started: {error}"))?;
    let mut traffic = row.traffic(&server).await?;
    let load = Load::connect(&server, options.connections, &mut traffic).await?;
    if row.keys == Keys::Million {
        // All of them live, as they would after a day.
        let (traffic, batches) = Traffic::each_once(row.policy(), row.keys.count());
        load.each(traffic, batches).await?;
    }
    let _there = row.crowd.gather(&server, &load).await?;
    let saturation = load.saturate(traffic.clone(), options.in_flight, options.seconds).await?;
    let own = options.rate.unwrap_or(saturation.rate() / 2.0);
    let rate = rate.unwrap_or(own);
    let at_its_rate = saturation.rate() > rate * SUSTAINED || options.rate.is_some();
    let rate = if at_its_rate { rate } else { own };
    let latency = load.arrive(traffic, rate, options.seconds).await?;
    server.stop().await?;
    Ok(Figures { saturation, rate, at_its_rate, latency })
}

/// The figures that a row is compared with, nearest before it and after it.
fn neighbours(group: &[Measured], index: usize) -> Vec<&Figures> {
    let beside = |one: &&Measured| one.beside;
    let before = group[..index].iter().rev().find(beside);
    let after = group[index..].iter().find(beside);
    let figures = before.into_iter().chain(after).filter_map(|one| one.figures.as_ref().ok());
    if group[index].beside { Vec::new() } else { figures.collect() }
}

fn fields(measured: &Measured, others: &[&Figures]) -> Vec<String> {
    let figures = match &measured.figures {
        Ok(figures) => figures,
        Err(error) => {
            let mut fields = vec![String::from("–"); COLUMNS.len()];
            (fields[0], fields[1]) = (measured.name.clone(), error.clone());
            return fields;
        }
    };
    let mean = |of: &dyn Fn(&Figures) -> f64| {
        (!others.is_empty())
            .then(|| others.iter().map(|other| of(other)).sum::<f64>() / others.len() as f64)
    };
    let with_ratio = |of: &dyn Fn(&Figures) -> f64| beside(of(figures), mean(of));
    let latency = |quantile: f64| {
        let of = |figures: &Figures| figures.latency.nanos.value_at_quantile(quantile) as f64 / 1e3;
        if figures.at_its_rate { with_ratio(&of) } else { figure(of(figures)) }
    };
    let decisions = f64::from(measured.shape.decisions());
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
