//! Circuits beside what a call through one costs: their memory, and how soon a whole fleet knows of a transition.

use std::time::{Duration, Instant};

use fusebox_proto::v1::{
    CircuitDelta, CircuitMode, CircuitState, Client, ReportRequest, ReportResponse, ReportResult,
    SetCircuitModeRequest, WatchRequest, admin_client::AdminClient,
    resilience_client::ResilienceClient,
};
use hdrhistogram::Histogram;
use tokio::{
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::transport::Channel;

use crate::{
    Options, Result,
    footprint::rest,
    load::Load,
    machine::Memory,
    print,
    process::{Engine, Home, Server},
    table::{Table, beside, count, figure},
    traffic::{BREAKER, Keys, Shape, Traffic},
};

/// Circuits of each kind, and keys of a limiter beside them.
const CIRCUITS: u32 = 20_000;

/// Reporters of a circuit that is told of by as many as are told apart.
const REPORTERS: u32 = 32;

/// Calls of one delta: as many failures open a circuit.
const CALLS: u32 = 20;

/// Deltas in one report.
const DELTAS: u32 = 1_000;

/// Reports before the first look, of the same circuits again and again: buffers that any load makes are not theirs.
const WARM_UP: u32 = 100;

/// Streams that watch.
const WATCHERS: usize = 1_000;

/// Transitions of each kind.
const TRANSITIONS: u32 = 30;

/// The longest that a transition may take until nearly every watcher knows of it.
const WANTED: Duration = Duration::from_millis(50);

/// Between two transitions: all is quiet but for heartbeats.
const PAUSE: Duration = Duration::from_millis(150);

/// Longer than any watcher waits.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn measure(options: &Options) -> Result<()> {
    measure_memory(options).await?;
    measure_fleet(options).await
}

/// What memory is taken by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A key of a token bucket.
    Bucket,
    /// A closed circuit that so many reporters tell of.
    Closed(u32),
    /// One that a reporter has opened.
    Open,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Bucket, Self::Closed(1), Self::Closed(REPORTERS), Self::Open];

    fn name(self) -> String {
        match self {
            Self::Bucket => "key of a token bucket".into(),
            Self::Closed(1) => "closed circuit, 1 reporter".into(),
            Self::Closed(reporters) => format!("closed circuit, {reporters} reporters"),
            Self::Open => "open circuit, with its evidence".into(),
        }
    }

    /// Makes all of them.
    async fn charge(self, server: &Server) -> Result<()> {
        let (reporters, failed, state) = match self {
            Self::Bucket => {
                let (traffic, batches) = Traffic::each_once("slowest", CIRCUITS);
                let load = Load::connect(server, 1, &mut traffic.clone()).await?;
                return load.each(traffic, batches).await;
            }
            Self::Closed(reporters) => (reporters, false, CircuitState::Closed),
            Self::Open => (1, true, CircuitState::Open),
        };
        let mut reporter = Reporter::connect(server).await?;
        for id in 0..reporters {
            for from in (0..CIRCUITS).step_by(DELTAS as usize) {
                let keys = (from..from + DELTAS).map(|key| format!("tenant-{key:07}"));
                let told = reporter.tell(id, keys, failed).await?;
                let is_so = told.circuits.iter().all(|circuit| circuit.state() == state);
                if !is_so || told.circuits.len() != DELTAS as usize {
                    return Err(format!("not {DELTAS} circuits that are {state:?}").into());
                }
            }
        }
        Ok(())
    }
}

/// Who tells circuits of calls.
struct Reporter {
    client: ResilienceClient<Channel>,
    /// That of circuits that nobody has asked for.
    generation: u64,
}

impl Reporter {
    async fn connect(server: &Server) -> Result<Self> {
        let mut client = ResilienceClient::new(server.channel().await?);
        let watch = WatchRequest { namespace: "bench".into(), ..WatchRequest::default() };
        let mut watch = client.watch(watch).await?.into_inner();
        let generation = watch.message().await?.ok_or("nothing to watch")?.generation;
        Ok(Self { client, generation })
    }

    /// Tells circuits of that many calls each, as the reporter of that number.
    async fn tell(
        &mut self,
        id: u32,
        keys: impl Iterator<Item = String>,
        failed: bool,
    ) -> Result<ReportResponse> {
        let mut latency_counts = vec![0; 14];
        latency_counts[13] = CALLS.into();
        let (failures, successes) = if failed { (CALLS, 0) } else { (0, CALLS) };
        let delta = |key| CircuitDelta {
            policy: BREAKER.into(),
            key,
            generation: self.generation,
            successes: successes.into(),
            failures: failures.into(),
            latency_counts: latency_counts.clone(),
            error_kinds: if failed { vec!["timeout".into()] } else { Vec::new() },
            ..CircuitDelta::default()
        };
        let client = Client {
            // As long as a UUID.
            id: format!("{id:08x}-6f0c-4c7e-9d3a-1f2e3d4c5b6a"),
            service: "checkout".into(),
            zone: format!("eu-west-1{}", if id.is_multiple_of(2) { "a" } else { "b" }),
        };
        let report = ReportRequest {
            namespace: "bench".into(),
            client: Some(client),
            deltas: keys.map(delta).collect(),
            ..ReportRequest::default()
        };
        let told = self.client.report(report).await?.into_inner();
        let applied = i32::from(ReportResult::Applied);
        match told.delta_results.iter().all(|result| *result == applied) {
            true => Ok(told),
            false => Err("a delta was not applied".into()),
        }
    }
}

async fn measure_memory(options: &Options) -> Result<()> {
    let columns = ["of each", "RSS before", "RSS after", "bytes", "in a megabyte"];
    let mut table = Table::new(&format!("Memory of {} circuits", count(CIRCUITS)), &columns);
    let mut bucket = None;
    for kind in Kind::ALL {
        eprintln!("memory: {}", kind.name());
        let (before, after) = measure_kind(options, kind).await?;
        let bytes = after.saturating_sub(before) as f64 / f64::from(CIRCUITS);
        let megabytes = |bytes: u64| figure(bytes as f64 / 1e6);
        table.row([
            kind.name(),
            megabytes(before),
            megabytes(after),
            beside(bytes, bucket),
            figure(1e6 / bytes),
        ]);
        bucket.get_or_insert(bytes);
        print(&table.take_text())?;
    }
    table.note(
        "RSS in MB (10^6 bytes), at rest; in brackets the ratio to a key of a token bucket. In memory. A reporter's name is \
         as long as a UUID, its zone has 10 bytes, and latencies are told.",
    );
    print(&table.take_text())
}

/// Resident memory before and after all of them were made.
async fn measure_kind(options: &Options, kind: Kind) -> Result<(u64, u64)> {
    let home = Home::new(options, Engine::Memory, 0)?;
    let server = home.start().await.map_err(|error| format!("not started: {error}"))?;
    let traffic = Traffic::new(Shape::Batch(1_000), "slow", Keys::Thousand);
    let load = Load::connect(&server, 1, &mut traffic.clone()).await?;
    load.each(traffic, WARM_UP).await?;
    let mut reporter = Reporter::connect(&server).await?;
    for _ in 0..WARM_UP {
        reporter.tell(0, (0..DELTAS).map(|key| format!("warm-{key}")), false).await?;
    }
    rest(&server).await?;
    let before = Memory::of(server.pid())?.resident;
    kind.charge(&server).await?;
    rest(&server).await?;
    Ok((before, Memory::of(server.pid())?.resident))
}

/// What makes a circuit pass from one state to another.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// A report of calls that failed: it opens.
    Report,
    /// An operator's order: it closes.
    Order,
}

/// How long it took until every watcher knew of each transition of a kind.
struct Known {
    /// Nanoseconds since the transition was asked for, of each watcher.
    asked: Histogram<u64>,
    /// Since the answer, that it is durable.
    answered: Histogram<u64>,
    /// From the request to the answer.
    answer: Histogram<u64>,
}

impl Known {
    fn new() -> Result<Self> {
        let histogram = || Histogram::new_with_max(PATIENCE.as_nanos() as u64, 3);
        Ok(Self { asked: histogram()?, answered: histogram()?, answer: histogram()? })
    }

    fn fields(&self, name: &str, rival: Option<&Self>) -> [String; 7] {
        let millis = |of: &Histogram<u64>, quantile| of.value_at_quantile(quantile) as f64 / 1e6;
        let told = |of: fn(&Self) -> &Histogram<u64>, quantile| {
            beside(millis(of(self), quantile), rival.map(|rival| millis(of(rival), quantile)))
        };
        let p99 = Duration::from_nanos(self.asked.value_at_quantile(0.99));
        [
            name.to_owned(),
            told(|known| &known.asked, 0.5),
            told(|known| &known.asked, 0.99),
            told(|known| &known.asked, 1.0),
            if p99 <= WANTED { "yes" } else { "**no**" }.into(),
            figure(millis(&self.answered, 0.99)),
            told(|known| &known.answer, 0.5),
        ]
    }
}

async fn measure_fleet(options: &Options) -> Result<()> {
    let columns =
        ["transition", "p50", "p99", "max", "p99 <= 50 ms", "p99 after the answer", "answer, p50"];
    let title = format!("From a transition to {} watchers", count(WATCHERS as u32));
    let mut table = Table::new(&title, &columns);
    eprintln!("fleet: no-op");
    let (rival, _) = Fleet::gather(&Server::rival()?, options).await?.change(false).await?;
    table.row(rival.fields("no-op, opened by a report", None));
    print(&table.take_text())?;
    for engine in [Engine::Memory, Engine::Strict] {
        eprintln!("fleet: {}", engine.name());
        let home = Home::new(options, engine, 0)?;
        let server = home.start().await.map_err(|error| format!("not started: {error}"))?;
        let mut fleet = Fleet::gather(&server, options).await?;
        let (opened, closed) = fleet.change(true).await?;
        let name = |what| format!("{}, {what}", engine.name());
        table.row(opened.fields(&name("opened by a report"), Some(&rival)));
        table.row(closed.fields(&name("closed by an order"), Some(&rival)));
        print(&table.take_text())?;
    }
    table.note(&format!(
        "In ms, over all watchers of {TRANSITIONS} transitions: from the request that makes it until a watcher has read \
         the message; `after the answer` from when the asker knows that it is durable. In brackets the ratio to a server \
         (tonic) that tells all watchers one constant when a report comes. {} streams over {} connections, all read by \
         one thread of this program, which shares {} cores with the server: of a fleet each member reads its own.",
        count(WATCHERS as u32),
        options.connections,
        std::thread::available_parallelism()?,
    ));
    print(&table.take_text())
}

/// Those who watch, and who makes them something to see.
struct Fleet {
    watching: JoinSet<Result<(), String>>,
    /// What each was told, and when.
    seen: UnboundedReceiver<(CircuitState, Instant)>,
    client: ResilienceClient<Channel>,
    admin: AdminClient<Channel>,
    generation: u64,
}

impl Fleet {
    /// All of them, and each knows all that there is.
    async fn gather(server: &Server, options: &Options) -> Result<Self> {
        let mut channels = Vec::new();
        for _ in 0..options.connections {
            channels.push(server.channel().await?);
        }
        // Unbounded, but told a bounded number of times for each transition.
        let (tell, seen) = mpsc::unbounded_channel();
        let mut watching = JoinSet::new();
        let (ready, mut all_ready) = mpsc::unbounded_channel();
        for (number, channel) in channels.iter().cycle().take(WATCHERS).enumerate() {
            let (channel, tell, ready) = (channel.clone(), tell.clone(), ready.clone());
            watching.spawn_local(async move {
                watch(channel, number, &ready, &tell).await.map_err(|error| error.to_string())
            });
        }
        drop(ready);
        let mut generation = 0;
        for _ in 0..WATCHERS {
            let told = timeout(PATIENCE, all_ready.recv()).await?;
            generation = told.ok_or("a watcher was refused")?;
        }
        let channel = server.channel().await?;
        let (client, admin) =
            (ResilienceClient::new(channel.clone()), AdminClient::new(channel.clone()));
        Ok(Self { watching, seen, client, admin, generation })
    }

    /// Opens the circuit again and again, and closes it if it can be.
    async fn change(&mut self, closes: bool) -> Result<(Known, Known)> {
        let (mut opened, mut closed) = (Known::new()?, Known::new()?);
        for _ in 0..TRANSITIONS {
            self.transit(Cause::Report, &mut opened).await?;
            if closes {
                self.transit(Cause::Order, &mut closed).await?;
            }
        }
        Ok((opened, closed))
    }

    /// One transition, until all have seen it.
    async fn transit(&mut self, cause: Cause, known: &mut Known) -> Result<()> {
        sleep(PAUSE).await;
        let state = match cause {
            Cause::Report => CircuitState::Open,
            Cause::Order => CircuitState::Closed,
        };
        let asked = Instant::now();
        let (client, admin, generation) =
            (self.client.clone(), self.admin.clone(), self.generation);
        let answer = tokio::task::spawn_local(async move {
            let generation = ask(cause, generation, client, admin).await;
            (generation.map_err(|error| error.to_string()), Instant::now())
        });
        let mut seen = Vec::with_capacity(WATCHERS);
        while seen.len() < WATCHERS {
            let told = timeout(PATIENCE, self.seen.recv()).await;
            let told = told.map_err(|_| format!("{} watchers were told", seen.len()))?;
            let (told, at) = told.ok_or("nobody watches any more")?;
            if told == state {
                seen.push(at);
            }
            if let Some(ended) = self.watching.try_join_next() {
                return Err(format!("a watcher ended: {:?}", ended?).into());
            }
        }
        let (generation, answered) = answer.await?;
        self.generation = generation?;
        let nanos =
            |from: Instant, to: Instant| to.saturating_duration_since(from).as_nanos() as u64;
        for at in seen {
            known.asked.saturating_record(nanos(asked, at));
            known.answered.saturating_record(nanos(answered, at));
        }
        known.answer.saturating_record(nanos(asked, answered));
        Ok(())
    }
}

/// Asks for a transition of the circuit in that generation, and gives the one that it has then.
async fn ask(
    cause: Cause,
    generation: u64,
    mut client: ResilienceClient<Channel>,
    mut admin: AdminClient<Channel>,
) -> Result<u64> {
    let (namespace, policy, key) = ("bench".into(), "fleet".into(), "payments".into());
    match cause {
        Cause::Report => {
            let delta = CircuitDelta {
                policy,
                key,
                generation,
                failures: CALLS.into(),
                ..CircuitDelta::default()
            };
            let client_id = Some(Client { id: "bench".into(), ..Client::default() });
            let report = ReportRequest {
                namespace,
                client: client_id,
                deltas: vec![delta],
                ..ReportRequest::default()
            };
            let told = client.report(report).await?.into_inner();
            Ok(told.circuits.first().ok_or("no circuit was told of")?.generation)
        }
        Cause::Order => {
            let order = SetCircuitModeRequest {
                namespace,
                policy,
                key,
                mode: CircuitMode::Normal.into(),
                reason: "the benchmark goes on".into(),
                ..SetCircuitModeRequest::default()
            };
            let told = admin.set_circuit_mode(order).await?.into_inner();
            Ok(told.circuit.ok_or("no circuit was told of")?.generation)
        }
    }
}

/// Watches, and tells of each circuit when it was told of it; and once it knows all, the generation of others.
async fn watch(
    channel: Channel,
    number: usize,
    ready: &UnboundedSender<u64>,
    tell: &UnboundedSender<(CircuitState, Instant)>,
) -> Result<()> {
    let client = Client { id: format!("watcher-{number}"), ..Client::default() };
    let request =
        WatchRequest { namespace: "bench".into(), client: Some(client), ..WatchRequest::default() };
    let mut stream = ResilienceClient::new(channel).watch(request).await?.into_inner();
    let first = stream.message().await?.ok_or("nothing to watch")?;
    // Who waits is gone only if all is over.
    let _ = ready.send(first.generation);
    while let Some(news) = stream.message().await? {
        let now = Instant::now();
        for circuit in news.circuits {
            let _ = tell.send((circuit.state(), now));
        }
    }
    Err("the stream ended".into())
}
