//! How soon a whole fleet knows of a transition of a circuit.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use fusebox_proto::v1::{
    CircuitDelta, CircuitMode, CircuitState, Client, ReportRequest, SetCircuitModeRequest,
    WatchRequest, admin_client::AdminClient, resilience_client::ResilienceClient,
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
    circuits::{CALLS, FLEET},
    print,
    process::{Engine, Home, Server},
    table::{Table, beside, count, figure},
};

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
    let columns = [
        "transition",
        "p50",
        "p99",
        "max",
        "after the answer: p50 / p99 / max",
        "answer: p50 / max",
        "p99 <= 50 ms, after the answer",
    ];
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
    table.row(fsync_fields(&fsyncs(options).await?));
    table.note(&format!(
        "In ms, over all watchers of {TRANSITIONS} transitions: from the request that makes it until a watcher has read \
         the message. After the answer: from when the asker knows that it is durable, which is 0 where a watcher knew \
         before. The last column says whether 50 ms are kept from the request, and after the answer. In brackets the ratio to a server \
         (tonic) that tells all watchers one constant when a report comes. {} streams over {} connections, all read by \
         one thread of this program, which shares {} cores with the server: of a fleet each member reads its own.",
        count(WATCHERS as u32),
        options.connections,
        std::thread::available_parallelism()?,
    ));
    print(&table.take_text())
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
        let is_wanted = |of: &Histogram<u64>| {
            let p99 = Duration::from_nanos(of.value_at_quantile(0.99));
            if p99 <= WANTED { "yes" } else { "**no**" }
        };
        let after = |quantile| figure(millis(&self.answered, quantile));
        [
            name.to_owned(),
            told(|known| &known.asked, 0.5),
            told(|known| &known.asked, 0.99),
            told(|known| &known.asked, 1.0),
            [0.5, 0.99, 1.0].map(after).join(" / "),
            [0.5, 1.0].map(|quantile| figure(millis(&self.answer, quantile))).join(" / "),
            format!("{}, {}", is_wanted(&self.asked), is_wanted(&self.answered)),
        ]
    }
}

/// Nanoseconds that the disk takes to keep a block, as often as there are transitions of a kind.
async fn fsyncs(options: &Options) -> Result<Histogram<u64>> {
    let mut file = match &options.data {
        Some(place) => tempfile::tempfile_in(place)?,
        None => tempfile::tempfile()?,
    };
    let mut taken = Histogram::new_with_max(PATIENCE.as_nanos() as u64, 3)?;
    for _ in 0..TRANSITIONS {
        sleep(PAUSE).await;
        let begin = Instant::now();
        file.write_all(&[0; 4_096])?;
        file.sync_data()?;
        taken.saturating_record(begin.elapsed().as_nanos() as u64);
    }
    Ok(taken)
}

fn fsync_fields(taken: &Histogram<u64>) -> [String; 7] {
    let millis = |quantile| figure(taken.value_at_quantile(quantile) as f64 / 1e6);
    let [p50, p99, max] = [0.5, 0.99, 1.0].map(millis);
    let none = || String::from("–");
    ["the disk alone: an fsync of 4 kB".into(), p50, p99, max, none(), none(), none()]
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
    let (namespace, policy, key) = ("bench".into(), FLEET.into(), "payments".into());
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
