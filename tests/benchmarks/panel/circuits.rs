//! What a circuit takes of memory.

use fusebox_proto::v1::{
    CircuitDelta, CircuitState, Client, ReportRequest, ReportResponse, ReportResult, WatchRequest,
    resilience_client::ResilienceClient,
};
use tonic::transport::Channel;

use crate::{
    Options, Result,
    footprint::rest,
    machine::Memory,
    print,
    process::{Engine, Home, Server},
    table::{Table, beside, count, figure},
    traffic::BREAKER,
};

/// The breaker whose circuits are opened.
pub(crate) const FLEET: &str = "fleet";

/// Circuits of each kind.
const CIRCUITS: u32 = 50_000;

/// Reporters of a circuit that is told of by as many as are told apart.
const REPORTERS: u32 = 32;

/// Calls of one delta: as many failures open a circuit.
pub(crate) const CALLS: u32 = 20;

/// Deltas in one report: few, so that buffers are not what is measured.
const DELTAS: u32 = 100;

/// Reports before the first look, of the same circuits again and again: buffers that any load makes are not theirs.
const WARM_UP: u32 = 500;

/// What memory is taken by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A closed circuit that so many reporters tell of.
    Closed(u32),
    /// One that a reporter has opened.
    Open,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Closed(1), Self::Closed(REPORTERS), Self::Open];

    fn name(self) -> String {
        match self {
            Self::Closed(1) => "closed circuit, 1 reporter".into(),
            Self::Closed(reporters) => format!("closed circuit, {reporters} reporters"),
            Self::Open => "open circuit, with its evidence".into(),
        }
    }

    /// Makes all of them.
    async fn charge(self, server: &Server) -> Result<()> {
        let (reporters, failed, state) = match self {
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
            policy: if failed { FLEET } else { BREAKER }.into(),
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

pub(crate) async fn measure(options: &Options) -> Result<()> {
    let columns = ["of each", "RSS before", "RSS after", "bytes", "in a megabyte"];
    let mut table = Table::new(&format!("Memory of {} circuits", count(CIRCUITS)), &columns);
    let mut first = None;
    for kind in Kind::ALL {
        eprintln!("memory: {}", kind.name());
        let (before, after) = measure_kind(options, kind).await?;
        let bytes = after.saturating_sub(before) as f64 / f64::from(CIRCUITS);
        let megabytes = |bytes: u64| figure(bytes as f64 / 1e6);
        table.row([
            kind.name(),
            megabytes(before),
            megabytes(after),
            beside(bytes, first),
            figure(1e6 / bytes),
        ]);
        first.get_or_insert(bytes);
        print(&table.take_text())?;
    }
    table.note(
        "RSS in MB (10^6 bytes), at rest, in memory; in brackets the ratio to the first. A reporter's name is as long as \
         a UUID, its zone has 10 bytes, and latencies are told.",
    );
    print(&table.take_text())
}

/// Resident memory before and after all of them were made.
async fn measure_kind(options: &Options, kind: Kind) -> Result<(u64, u64)> {
    let home = Home::new(options, Engine::Memory, 0)?;
    let server = home.start().await.map_err(|error| format!("not started: {error}"))?;
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
