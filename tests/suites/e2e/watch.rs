//! What those are told who watch circuits.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use fusebox_proto::v1::{
    CircuitDelta, CircuitMode, CircuitState, CircuitStatus, Client, ReportRequest, ReportResult,
    ServerInfoRequest, WatchRequest, WatchResponse, resilience_client::ResilienceClient,
};
use fusebox_server::limits;
use fusebox_tests::{ManualClock, PATIENCE, Server, Simulated, eventually};
use tonic::{Code, Status, Streaming, transport::Endpoint};
use tonic_types::StatusExt;

use crate::{
    ask,
    caller::{config, duration, seconds, serve},
    circuits_admin::{BREAKERS, Operator, order},
    request,
};

/// One who watches, and what it knows.
struct Watcher {
    messages: Streaming<WatchResponse>,
    /// The one that came last.
    last: WatchResponse,
    circuits: BTreeMap<(String, String), CircuitStatus>,
    snapshots: usize,
}

impl Watcher {
    async fn of(server: &Server) -> Self {
        Self::begin(server, watch()).await
    }

    /// One that has read the first message.
    async fn begin(server: &Server, request: WatchRequest) -> Self {
        let messages = server.raw().await.watch(request).await.expect("a stream").into_inner();
        Self::reading(messages).await
    }

    async fn reading(messages: Streaming<WatchResponse>) -> Self {
        let (last, circuits) = (WatchResponse::default(), BTreeMap::new());
        let mut watcher = Self { messages, last, circuits, snapshots: 0 };
        watcher.read().await;
        watcher
    }

    async fn try_read(&mut self) -> Result<&WatchResponse, Status> {
        let message = tokio::time::timeout(PATIENCE, self.messages.message()).await;
        let message = message.expect("it says something")?.expect("it does not end");
        if message.snapshot {
            self.snapshots += 1;
            self.circuits.clear();
        }
        for circuit in &message.circuits {
            let name = (circuit.policy.clone(), circuit.key.clone());
            self.circuits.insert(name, circuit.clone());
        }
        self.last = message;
        Ok(&self.last)
    }

    async fn read(&mut self) -> &WatchResponse {
        self.try_read().await.expect("a message")
    }

    /// Reads on until it is told of something.
    async fn news(&mut self) -> &[CircuitStatus] {
        while self.read().await.circuits.is_empty() {}
        &self.last.circuits
    }

    /// What it knows of modes, by key.
    fn modes(&self) -> Vec<(&str, CircuitMode)> {
        self.circuits.values().map(|one| (one.key.as_str(), one.mode())).collect()
    }

    /// Asks to go on from here.
    fn goes_on(&self) -> WatchRequest {
        WatchRequest { epoch: self.last.epoch, version: self.last.version, ..watch() }
    }
}

fn watch() -> WatchRequest {
    let client = Some(Client { id: "w".into(), ..Default::default() });
    WatchRequest { namespace: "test".into(), client, ..Default::default() }
}

#[tokio::test]
async fn a_watcher_is_told_what_is_there_and_then_what_changes() {
    let server = serve(BREAKERS).await;
    let mut operator = Operator::of(&server).await;
    operator.set(order("payments", "a", CircuitMode::ForcedOpen)).await;
    let mut watcher = Watcher::of(&server).await;
    assert!(watcher.last.snapshot && watcher.last.complete && watcher.last.epoch > 0);
    assert_eq!(duration(watcher.last.valid_for), Some(limits::WATCH_VALID));
    let [circuit] = &watcher.last.circuits[..] else { panic!("{:?}", watcher.last) };
    assert_eq!((circuit.policy.as_str(), circuit.key.as_str()), ("payments", "a"));
    assert_eq!((circuit.state(), circuit.mode()), (CircuitState::Open, CircuitMode::ForcedOpen));
    assert_eq!(duration(circuit.mode_expires_in), Some(seconds(1_800)));
    assert_eq!(circuit.evidence.as_ref().unwrap().forced_reason, "INC-4711");
    assert!(circuit.generation > watcher.last.generation);

    let (disabled, _) = operator.set(order("search", "b", CircuitMode::Disabled)).await;
    let [circuit] = watcher.news().await else { panic!("one") };
    assert_eq!((circuit.mode(), circuit.generation), (CircuitMode::Disabled, disabled.generation));
    assert!(watcher.last.complete && !watcher.last.snapshot);
    let info = operator.0.server_info(ServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.watchers, 1);

    // Only of what is wanted.
    let search = WatchRequest { policies: vec!["search".into()], ..watch() };
    let mut search = Watcher::begin(&server, search).await;
    assert_eq!(search.modes(), [("b", CircuitMode::Disabled)]);
    operator.set(order("payments", "c", CircuitMode::ForcedOpen)).await;
    operator.set(order("search", "d", CircuitMode::ForcedOpen)).await;
    let [circuit] = search.news().await else { panic!("one") };
    assert_eq!(circuit.key, "d");
    drop((watcher, search));
    eventually("nobody watches", async || {
        let (_, metrics) = server.http("/metrics").await;
        metrics.contains("fusebox_circuit_watchers 0\n")
    })
    .await;
    server.stop().await.unwrap();
}

#[tokio::test]
async fn an_order_that_ends_by_itself_is_told() {
    let server = serve(BREAKERS).await;
    let mut watcher = Watcher::of(&server).await;
    assert!(watcher.last.snapshot && watcher.last.circuits.is_empty());
    let mut operator = Operator::of(&server).await;
    let (forced, _) = operator.set(order("payments", "", CircuitMode::ForcedOpen)).await;
    watcher.news().await;
    server.advance(seconds(1_800));
    let [normal] = watcher.news().await else { panic!("one") };
    assert_eq!((normal.state(), normal.mode()), (CircuitState::Closed, CircuitMode::Normal));
    assert!(normal.generation > forced.generation && normal.mode_expires_in.is_none());
    server.stop().await.unwrap();
}

#[tokio::test]
async fn who_comes_back_goes_on_where_it_stopped() {
    let server = serve(BREAKERS).await;
    let mut operator = Operator::of(&server).await;
    operator.set(order("payments", "a", CircuitMode::ForcedOpen)).await;
    let first = Watcher::of(&server).await;
    let back = first.goes_on();
    drop(first);
    operator.set(order("payments", "b", CircuitMode::ForcedOpen)).await;
    operator.set(order("payments", "b", CircuitMode::Disabled)).await;
    let missed = Watcher::begin(&server, back.clone()).await;
    assert!(!missed.last.snapshot && missed.last.complete);
    assert_eq!(missed.modes(), [("b", CircuitMode::Disabled)]);
    assert_eq!(missed.last.version, back.version + 2);

    // What another life of the server said says nothing, nor does a time to come.
    let foreign = WatchRequest { epoch: back.epoch - 1, ..back.clone() };
    let ahead = WatchRequest { version: back.version + 100, ..back };
    for request in [foreign, ahead] {
        let all = Watcher::begin(&server, request).await;
        assert!(all.last.snapshot);
        assert_eq!(all.modes(), [("a", CircuitMode::ForcedOpen), ("b", CircuitMode::Disabled)]);
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn while_nothing_changes_that_is_told() {
    let server = serve(BREAKERS).await;
    let mut watcher = Watcher::of(&server).await;
    let first = watcher.last.clone();
    assert_eq!(duration(first.elapsed), Some(Duration::ZERO));
    server.advance(seconds(3));
    let silence = watcher.read().await;
    assert!(silence.complete && !silence.snapshot && silence.circuits.is_empty());
    assert_eq!((silence.epoch, silence.version), (first.epoch, first.version));
    assert_eq!(silence.generation, first.generation);
    assert_eq!(duration(silence.elapsed), Some(seconds(3)));
    assert_eq!(duration(silence.valid_for), Some(limits::WATCH_VALID));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn who_reads_too_slowly_is_told_all_anew() {
    let server = serve(BREAKERS).await;
    // Little is on its way to who does not read.
    let narrow = Endpoint::from_shared(format!("http://{}", server.grpc)).unwrap();
    let narrow = narrow.initial_stream_window_size(1_024).connect().await.unwrap();
    let messages = ResilienceClient::new(narrow).watch(watch()).await.unwrap().into_inner();
    let mut watcher = Watcher::reading(messages).await;
    assert_eq!(watcher.snapshots, 1);

    const KEYS: usize = 50;
    let mut operator = Operator::of(&server).await;
    // Twice as many as are known: what is on its way takes some as well.
    let modes = [CircuitMode::ForcedOpen, CircuitMode::Disabled].into_iter().cycle();
    let modes = modes.take(2 * limits::WATCH_LOG / KEYS).chain([CircuitMode::MetricsOnly]);
    for mode in modes {
        for key in 0..KEYS {
            let (_, changed) = operator.set(order("payments", &key.to_string(), mode)).await;
            assert!(changed);
        }
    }
    while watcher.modes() != all_of(KEYS, CircuitMode::MetricsOnly) || !watcher.last.complete {
        watcher.read().await;
    }
    assert_eq!(watcher.snapshots, 2);
    server.stop().await.unwrap();
}

/// Keys up to there, in the order of their text, all in that mode.
fn all_of(keys: usize, mode: CircuitMode) -> Vec<(&'static str, CircuitMode)> {
    let mut names: Vec<_> = (0..keys).map(|key| key.to_string()).collect();
    names.sort();
    names.into_iter().map(|name| (&*name.leak(), mode)).collect()
}

#[tokio::test]
async fn after_a_crash_all_is_told_anew_as_it_was() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let config = config(BREAKERS);
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config).await;
    let mut operator = Operator::of(&server).await;
    let (forced, _) = operator.set(order("payments", "a", CircuitMode::ForcedOpen)).await;
    let before = Watcher::of(&server).await;
    journal.lose_power();
    server.stop().await.unwrap_err();

    clock.advance(seconds(60));
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config).await;
    let after = Watcher::begin(&server, before.goes_on()).await;
    assert!(after.last.snapshot && after.last.epoch > before.last.epoch);
    let [circuit] = &after.last.circuits[..] else { panic!("{:?}", after.last) };
    assert_eq!((circuit.mode(), circuit.generation), (CircuitMode::ForcedOpen, forced.generation));
    assert_eq!(duration(circuit.mode_expires_in), Some(seconds(1_740)));
    assert!(after.last.generation > forced.generation, "above all of earlier lives");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn those_who_watch_do_not_keep_a_server_from_its_end() {
    let patient = format!("drain_timeout: 10m\n{}", config(BREAKERS));
    let server = Server::start(&patient).await;
    let mut watchers = Vec::new();
    for _ in 0..5 {
        watchers.push(Watcher::of(&server).await);
    }
    server.ask_to_stop();
    for watcher in &mut watchers {
        let ended = loop {
            if let Err(ended) = watcher.try_read().await {
                break ended;
            }
        };
        assert_eq!(ended.code(), Code::Unavailable);
        assert_eq!(ended.message(), "draining: connect again");
    }
    tokio::time::timeout(PATIENCE, server.ended()).await.expect("no wait for 10m").unwrap();
}

#[tokio::test]
async fn when_the_storage_fails_nobody_is_left_to_believe_what_was_told() {
    let journal = Simulated::default();
    let server = Server::start_on(journal.open(), Arc::default(), &config(BREAKERS)).await;
    let mut watcher = Watcher::of(&server).await;
    journal.fail();
    let mut operator = Operator::of(&server).await;
    let refused = operator.try_set(order("payments", "", CircuitMode::ForcedOpen)).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unavailable);
    let ended = loop {
        match watcher.try_read().await {
            Ok(message) => assert!(message.circuits.is_empty(), "it is not on disk"),
            Err(ended) => break ended,
        }
    };
    assert_eq!(ended.code(), Code::Unavailable);
    let again = server.raw().await.watch(watch()).await.unwrap_err();
    assert_eq!(again.code(), Code::Unavailable);
    server.stop().await.unwrap_err();
}

#[tokio::test]
async fn what_cannot_be_watched_is_refused_by_field() {
    let server = serve(BREAKERS).await;
    let mut raw = server.raw().await;
    let policies = |names: &[&str]| WatchRequest {
        policies: names.iter().map(ToString::to_string).collect(),
        ..watch()
    };
    let client = Some(Client { service: "s".repeat(129), ..Default::default() });
    for (wrong, fields) in [
        (WatchRequest::default(), vec!["namespace"]),
        (WatchRequest { client, ..watch() }, vec!["client.id", "client.service"]),
        (policies(&["payments", ""]), vec!["policies[1]"]),
        (policies(&["payments", "rate"]), vec!["policies[1]"]),
        (policies(&["payments"; 65]), vec!["policies"]),
    ] {
        let refused = raw.watch(wrong).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        let details = refused.get_error_details();
        let violations = &details.bad_request().expect("which fields").field_violations;
        let named: Vec<_> = violations.iter().map(|one| one.field.as_str()).collect();
        assert_eq!(named, fields, "{refused}");
    }
    for (unknown, message) in [
        (policies(&["payments", "none"]), "policies[1]: unknown policy `none`"),
        (WatchRequest { namespace: "none".into(), ..watch() }, "unknown namespace `none`"),
    ] {
        let refused = raw.watch(unknown).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::NotFound, message));
    }
    // None of them is counted.
    let mut operator = Operator::of(&server).await;
    let info = operator.0.server_info(ServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.watchers, 0);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_circuit_that_nobody_was_told_of_is_reported_in_the_generation_of_those_that_are_not_there()
 {
    let server = serve(BREAKERS).await;
    let mut operator = Operator::of(&server).await;
    operator.set(order("payments", "gone", CircuitMode::ForcedOpen)).await;
    operator.set(order("payments", "gone", CircuitMode::Normal)).await;
    let mut watcher = Watcher::of(&server).await;
    let before = watcher.last.generation;
    // One that nobody has forced or opened is there when the other one is forgotten.
    server.advance(limits::CIRCUIT_REMEMBERED - seconds(60));
    let mut raw = server.raw().await;
    let answer = raw.acquire(request([ask("payments", "there", 1)])).await.unwrap().into_inner();
    assert_eq!(answer.verdicts[0].generation, before);
    server.advance(seconds(120));
    let gone = loop {
        let gone = watcher.news().await.last().expect("news").clone();
        if gone.generation == watcher.last.generation {
            break gone;
        }
    };
    assert_eq!((gone.key.as_str(), gone.state()), ("gone", CircuitState::Closed));
    assert!(gone.generation > before, "what was told of its life counts no more");

    for (generation, result) in [
        (gone.generation, ReportResult::Applied),
        (before, ReportResult::Applied),
        (before - 1, ReportResult::StaleGeneration),
        (gone.generation + 1, ReportResult::StaleGeneration),
    ] {
        let (policy, key) = ("payments".into(), "there".into());
        let delta = CircuitDelta { policy, key, generation, successes: 1, ..Default::default() };
        let WatchRequest { namespace, client, .. } = watch();
        let report = ReportRequest { namespace, client, deltas: vec![delta], ..Default::default() };
        let answer = raw.report(report).await.unwrap().into_inner();
        assert_eq!(answer.delta_results, [i32::from(result)], "{generation}");
    }
    server.stop().await.unwrap();
}
