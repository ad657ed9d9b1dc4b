//! Circuits, as operators look at them and force them.

use std::{sync::Arc, time::Duration};

use fusebox_proto::v1::{
    AcquireResponse, Circuit, CircuitCause, CircuitDelta, CircuitMode, CircuitState, Client,
    Decision, EventAction, InspectCircuitRequest, InspectCircuitResponse, ListCircuitsRequest,
    ListEventsRequest, Reason, ReportRequest, ServerInfoRequest, SetCircuitModeRequest,
    SetCircuitModeResponse, admin_client::AdminClient,
};
use fusebox_tests::{ManualClock, Server, Simulated, eventually};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

use crate::{
    ask,
    caller::{config, duration, seconds, serve},
    request,
};

/// Opens by four calls of which two fail; as soon as one reporter sees it.
pub(crate) const BREAKERS: &str = "
    payments: {breaker: {min_calls: 4, open_for: 5s, backoff: {jitter: 0%}, min_reporters: 1}},
    search: {breaker: {}},
    few: {breaker: {}, max_cells: 1},
    rate: {token_bucket: {limit: 3, per: 1m}}";

/// An operator of the namespace `test`.
pub(crate) struct Operator(pub(crate) AdminClient<Channel>);

impl Operator {
    pub(crate) async fn of(server: &Server) -> Self {
        Self(AdminClient::new(server.channel().await))
    }

    pub(crate) async fn try_set(
        &mut self,
        set: SetCircuitModeRequest,
    ) -> Result<SetCircuitModeResponse, Status> {
        self.0.set_circuit_mode(set).await.map(tonic::Response::into_inner)
    }

    /// The circuit as it is then, and whether that is a change.
    pub(crate) async fn set(&mut self, set: SetCircuitModeRequest) -> (Circuit, bool) {
        let set = self.try_set(set).await.expect("it is set");
        (set.circuit.expect("a circuit"), set.changed)
    }

    pub(crate) async fn inspect(&mut self, policy: &str, key: &str) -> InspectCircuitResponse {
        self.0.inspect_circuit(named(policy, key)).await.expect("it is told").into_inner()
    }

    async fn circuit(&mut self, policy: &str, key: &str) -> Circuit {
        self.inspect(policy, key).await.circuit.expect("a circuit")
    }

    /// All pages, as names.
    async fn list(&mut self, mut request: ListCircuitsRequest) -> Vec<String> {
        let mut names = Vec::new();
        loop {
            let page = self.0.list_circuits(request.clone()).await.expect("a page").into_inner();
            let most = if request.page_size == 0 { 100 } else { request.page_size as usize };
            assert!(page.circuits.len() <= most);
            names.extend(page.circuits.iter().map(|one| format!("{}/{}", one.policy, one.key)));
            if page.next_page_token.is_empty() {
                return names;
            }
            request.page_token = page.next_page_token;
        }
    }

    /// What was there and what is, of each event of circuits, the newest first.
    async fn events(&mut self) -> Vec<(String, String)> {
        let request = ListEventsRequest { namespace: "test".into(), ..Default::default() };
        let events = self.0.list_events(request).await.unwrap().into_inner().events;
        let circuits = events.into_iter().inspect(|event| {
            assert_eq!(event.action(), EventAction::CircuitModeSet);
            assert_eq!((event.actor.as_str(), event.reason.as_str()), ("anonymous", "INC-4711"));
        });
        circuits.map(|event| (event.before, event.after)).collect()
    }
}

fn named(policy: &str, key: &str) -> InspectCircuitRequest {
    InspectCircuitRequest { namespace: "test".into(), policy: policy.into(), key: key.into() }
}

/// An order, which holds for half an hour where it is not to be normal again.
pub(crate) fn order(policy: &str, key: &str, mode: CircuitMode) -> SetCircuitModeRequest {
    let ttl = prost_types::Duration { seconds: 1_800, nanos: 0 };
    SetCircuitModeRequest {
        namespace: "test".into(),
        policy: policy.into(),
        key: key.into(),
        mode: mode.into(),
        reason: "INC-4711".into(),
        ttl: Some(ttl).filter(|_| mode != CircuitMode::Normal),
        expected_generation: None,
    }
}

/// What becomes of a call.
async fn call(server: &Server, policy: &str, key: &str) -> AcquireResponse {
    let mut raw = server.raw().await;
    raw.acquire(request([ask(policy, key, 1)])).await.expect("an answer").into_inner()
}

/// One reporter tells how calls went.
async fn tell(server: &Server, id: &str, delta: CircuitDelta) {
    let (id, zone) = (id.to_owned(), "eu-1".into());
    let report = ReportRequest {
        namespace: "test".into(),
        client: Some(Client { id, service: "shop".into(), zone }),
        deltas: vec![delta],
        ..Default::default()
    };
    let answer = server.raw().await.report(report).await.expect("an answer").into_inner();
    assert_eq!(answer.delta_results, [1], "applied");
}

#[tokio::test]
async fn a_circuit_that_is_forced_open_refuses_calls_until_it_is_normal_again() {
    let server = serve(BREAKERS).await;
    let mut operator = Operator::of(&server).await;
    let absent = operator.circuit("payments", "eu").await;
    assert_eq!((absent.state(), absent.mode()), (CircuitState::Closed, CircuitMode::Normal));
    assert_eq!((absent.since, &absent.evidence), (None, &None), "it is not there");

    let (forced, changed) = operator.set(order("payments", "eu", CircuitMode::ForcedOpen)).await;
    assert!(changed && forced.generation > absent.generation);
    assert_eq!((forced.state(), forced.mode()), (CircuitState::Open, CircuitMode::ForcedOpen));
    assert_eq!(forced.forced_by, "anonymous");
    assert_eq!(duration(forced.mode_expires_in), Some(seconds(1_800)));
    assert_eq!(operator.circuit("payments", "eu").await, forced);
    let answer = call(&server, "payments", "eu").await;
    let verdict = &answer.verdicts[0];
    assert_eq!((answer.decision(), verdict.reason()), (Decision::Deny, Reason::CircuitForcedOpen));
    assert_eq!(verdict.evidence.as_ref().unwrap().forced_reason, "INC-4711");
    assert_eq!(call(&server, "payments", "us").await.decision(), Decision::Allow);

    // The same again is renewed, if that is any later.
    let (same, changed) = operator.set(order("payments", "eu", CircuitMode::ForcedOpen)).await;
    assert_eq!((same, changed), (forced.clone(), false));
    server.advance(seconds(600));
    let (renewed, changed) = operator.set(order("payments", "eu", CircuitMode::ForcedOpen)).await;
    assert!(changed);
    assert_eq!(renewed.generation, forced.generation, "it is what it was");
    assert_eq!(duration(renewed.mode_expires_in), Some(seconds(1_800)));

    let (normal, changed) = operator.set(order("payments", "eu", CircuitMode::Normal)).await;
    assert!(changed);
    assert_eq!((normal.state(), normal.mode()), (CircuitState::Closed, CircuitMode::Normal));
    let (_, changed) = operator.set(order("payments", "eu", CircuitMode::Normal)).await;
    assert!(!changed);
    let (_, changed) = operator.set(order("payments", "never there", CircuitMode::Normal)).await;
    assert!(!changed);
    let names =
        operator.list(ListCircuitsRequest { namespace: "test".into(), ..Default::default() });
    assert_eq!(names.await, ["payments/eu", "payments/us"]);

    let event = |before: &str, after: &str| (before.to_owned(), after.to_owned());
    assert_eq!(
        operator.events().await,
        [
            event("open, forced_open for 30m", "closed, normal"),
            event("open, forced_open for 20m", "open, forced_open for 30m"),
            event("closed, normal", "open, forced_open for 30m"),
        ]
    );
    server.stop().await.unwrap();
}

#[tokio::test]
async fn an_order_ends_by_itself_and_says_so() {
    let server = serve(BREAKERS).await;
    let mut operator = Operator::of(&server).await;
    let (forced, _) = operator.set(order("payments", "", CircuitMode::Disabled)).await;
    assert_eq!((forced.state(), forced.mode()), (CircuitState::Closed, CircuitMode::Disabled));
    server.advance(seconds(1_800));
    eventually("it is normal", async || {
        operator.circuit("payments", "").await.mode() == CircuitMode::Normal
    })
    .await;
    let history = operator.inspect("payments", "").await.history;
    let told: Vec<_> = history.iter().map(|one| (one.cause(), one.mode())).collect();
    assert_eq!(
        told,
        [
            (CircuitCause::ModeExpired, CircuitMode::Normal),
            (CircuitCause::Operator, CircuitMode::Disabled)
        ]
    );
    assert_eq!((history[1].actor.as_str(), history[1].reason.as_str()), ("anonymous", "INC-4711"));
    assert!(history[0].actor.is_empty() && history[0].reason.is_empty());
    let at = |index: usize| history[index].time.unwrap().seconds;
    // The clock of tests begins there.
    assert_eq!((at(1), at(0)), (1_790_000_000, 1_790_001_800));
    assert_eq!(operator.events().await.len(), 1, "nobody did it");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn an_order_for_what_has_gone_on_is_not_followed() {
    let server = serve(BREAKERS).await;
    let mut operator = Operator::of(&server).await;
    let absent = operator.circuit("payments", "").await.generation;
    let expecting = |mode, generation| SetCircuitModeRequest {
        expected_generation: Some(generation),
        ..order("payments", "", mode)
    };
    let (forced, changed) = operator.set(expecting(CircuitMode::ForcedOpen, absent)).await;
    assert!(changed);
    for mode in [CircuitMode::Disabled, CircuitMode::Normal] {
        let refused = operator.try_set(expecting(mode, absent)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Aborted);
        assert!(refused.message().contains(&forced.generation.to_string()), "{refused}");
    }
    let (_, changed) = operator.set(expecting(CircuitMode::Normal, forced.generation)).await;
    assert!(changed);
    // Also of one that is not there.
    let other = SetCircuitModeRequest {
        expected_generation: Some(7),
        ..order("payments", "no", CircuitMode::Normal)
    };
    assert_eq!(operator.try_set(other).await.unwrap_err().code(), Code::Aborted);
    assert_eq!(operator.events().await.len(), 2);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn an_order_that_is_wrong_is_refused_by_field() {
    let server = serve(BREAKERS).await;
    let mut operator = Operator::of(&server).await;
    let good = || order("payments", "", CircuitMode::ForcedOpen);
    let time = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
    for (wrong, fields) in [
        (SetCircuitModeRequest::default(), vec!["namespace", "policy", "reason", "ttl", "mode"]),
        (SetCircuitModeRequest { mode: 9, ..good() }, vec!["mode"]),
        (SetCircuitModeRequest { reason: "x".repeat(257), ..good() }, vec!["reason"]),
        (SetCircuitModeRequest { key: "x".repeat(257), ..good() }, vec!["key"]),
        (SetCircuitModeRequest { ttl: None, ..good() }, vec!["ttl"]),
        (SetCircuitModeRequest { ttl: time(0, 999_999_999), ..good() }, vec!["ttl"]),
        (SetCircuitModeRequest { ttl: time(2_592_000, 1), ..good() }, vec!["ttl"]),
        (SetCircuitModeRequest { ttl: time(-1, 0), ..good() }, vec!["ttl"]),
        (
            SetCircuitModeRequest {
                ttl: time(60, 0),
                ..order("payments", "", CircuitMode::Normal)
            },
            vec!["ttl"],
        ),
        (SetCircuitModeRequest { policy: "rate".into(), ..good() }, vec!["policy"]),
    ] {
        let refused = operator.try_set(wrong).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        let details = refused.get_error_details();
        let violations = &details.bad_request().expect("which fields").field_violations;
        let named: Vec<_> = violations.iter().map(|one| one.field.as_str()).collect();
        assert_eq!(named, fields, "{refused}");
    }
    let limiter = operator.0.inspect_circuit(named("rate", "")).await.unwrap_err();
    assert_eq!(limiter.code(), Code::InvalidArgument);
    assert!(limiter.message().contains("policy `test/rate` is a limiter"), "{limiter}");
    for unknown in [
        SetCircuitModeRequest { policy: "none".into(), ..good() },
        SetCircuitModeRequest { namespace: "none".into(), ..good() },
    ] {
        assert_eq!(operator.try_set(unknown).await.unwrap_err().code(), Code::NotFound);
    }
    for unknown in [
        ListCircuitsRequest { namespace: "none".into(), ..Default::default() },
        ListCircuitsRequest { policy: "none".into(), ..circuits() },
    ] {
        assert_eq!(operator.0.list_circuits(unknown).await.unwrap_err().code(), Code::NotFound);
    }
    for wrong in [
        ListCircuitsRequest::default(),
        ListCircuitsRequest { policy: "rate".into(), ..circuits() },
        ListCircuitsRequest { state: 9, ..circuits() },
        ListCircuitsRequest { mode: 9, ..circuits() },
        ListCircuitsRequest { page_token: "nonsense".into(), ..circuits() },
    ] {
        let refused = operator.0.list_circuits(wrong).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    // The breaker has one circuit, and may not have another.
    operator.set(order("few", "first", CircuitMode::ForcedOpen)).await;
    let full = operator.try_set(order("few", "second", CircuitMode::ForcedOpen)).await.unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted);
    server.stop().await.unwrap();
}

fn circuits() -> ListCircuitsRequest {
    ListCircuitsRequest { namespace: "test".into(), ..Default::default() }
}

#[tokio::test]
async fn circuits_are_listed_by_page_and_by_what_they_are() {
    let server = serve(BREAKERS).await;
    let mut operator = Operator::of(&server).await;
    assert_eq!(operator.list(circuits()).await, [""; 0]);
    for key in ["", "a/b", "b"] {
        operator.set(order("search", key, CircuitMode::ForcedOpen)).await;
    }
    operator.set(order("payments", "z", CircuitMode::MetricsOnly)).await;
    call(&server, "payments", "closed").await;
    let all = ["payments/closed", "payments/z", "search/", "search/a/b", "search/b"];
    for page_size in [0, 1, 2, 5] {
        assert_eq!(operator.list(ListCircuitsRequest { page_size, ..circuits() }).await, all);
    }
    let payments = ListCircuitsRequest { policy: "payments".into(), ..circuits() };
    assert_eq!(operator.list(payments).await, all[..2]);
    let state = |state: CircuitState| ListCircuitsRequest { state: state.into(), ..circuits() };
    assert_eq!(operator.list(state(CircuitState::Closed)).await, all[..2]);
    let open = ListCircuitsRequest { page_size: 1, ..state(CircuitState::Open) };
    assert_eq!(operator.list(open).await, all[2..]);
    assert_eq!(operator.list(state(CircuitState::HalfOpen)).await, [""; 0]);
    let mode = |mode: CircuitMode| ListCircuitsRequest { mode: mode.into(), ..circuits() };
    assert_eq!(operator.list(mode(CircuitMode::MetricsOnly)).await, all[1..2]);
    assert_eq!(operator.list(mode(CircuitMode::Normal)).await, all[..1]);
    // A page of one list is none of another.
    let first = ListCircuitsRequest { page_size: 1, ..circuits() };
    let first = operator.0.list_circuits(first).await.unwrap().into_inner();
    let mixed =
        ListCircuitsRequest { page_token: first.next_page_token, ..state(CircuitState::Closed) };
    let refused = operator.0.list_circuits(mixed).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);

    let info = operator.0.server_info(ServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.circuits, info.watchers), (5, 0));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn all_about_a_circuit_is_told() {
    let server = serve(BREAKERS).await;
    let mut operator = Operator::of(&server).await;
    let generation = call(&server, "payments", "").await.verdicts[0].generation;
    let delta = CircuitDelta { policy: "payments".into(), generation, ..Default::default() };
    let seen = CircuitDelta {
        successes: 2,
        failures: 1,
        ignored: 5,
        local_failures: 6,
        latency_counts: [vec![0; 9], vec![2, 1]].concat(),
        ..delta.clone()
    };
    tell(&server, "one", seen).await;
    let told = operator.inspect("payments", "").await;
    let calls = told.calls.unwrap();
    assert_eq!((calls.calls, calls.failure_rate_basis_points), (3, 3_333));
    assert_eq!((calls.ignored, calls.local_failures), (5, 6));
    assert_eq!(duration(calls.latency_p50), Some(Duration::from_micros(1_024)));
    assert_eq!(duration(calls.latency_p99), Some(Duration::from_micros(2_048)));
    let [reporter] = &told.reporters[..] else { panic!("{told:?}") };
    assert_eq!((reporter.client_id.as_str(), reporter.zone.as_str()), ("one", "eu-1"));
    assert_eq!((reporter.calls, reporter.failures), (3, 1));
    let circuit = told.circuit.unwrap();
    let evidence = circuit.evidence.as_ref().expect("what its calls say now");
    assert_eq!((evidence.calls, evidence.failure_rate_basis_points), (3, 3_333));
    assert!(circuit.since.is_some() && told.history.is_empty() && told.probes.is_empty());

    server.advance(seconds(1));
    tell(&server, "one", CircuitDelta { failures: 1, ..delta }).await;
    server.advance(seconds(2));
    let told = operator.inspect("payments", "").await;
    let circuit = told.circuit.unwrap();
    assert_eq!(circuit.state(), CircuitState::Open);
    assert_eq!(circuit.since.unwrap().seconds, 1_790_000_001);
    assert_eq!(duration(circuit.open_for), Some(seconds(3)));
    let evidence = circuit.evidence.unwrap();
    assert_eq!((evidence.calls, evidence.failure_rate_basis_points), (4, 5_000));
    assert_eq!(duration(evidence.open_since), Some(seconds(2)));
    let [tripped] = &told.history[..] else { panic!("{:?}", told.history) };
    assert_eq!((tripped.cause(), tripped.state()), (CircuitCause::Tripped, CircuitState::Open));
    assert_eq!(tripped.generation, circuit.generation);
    assert_eq!(tripped.evidence.as_ref().unwrap().calls, 4);
    assert_eq!(told.calls.unwrap().calls, 0, "nothing is counted");

    server.advance(seconds(3));
    let probe = call(&server, "payments", "").await;
    assert!(probe.verdicts[0].probe);
    server.advance(seconds(4));
    let told = operator.inspect("payments", "").await;
    assert_eq!(told.circuit.unwrap().state(), CircuitState::HalfOpen);
    let [probe] = &told.probes[..] else { panic!("{:?}", told.probes) };
    assert_eq!(
        (duration(probe.age), duration(probe.expires_in)),
        (Some(seconds(4)), Some(seconds(6)))
    );
    assert_eq!(told.history[0].cause(), CircuitCause::Asked);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn one_that_only_counts_says_what_would_have_opened_it() {
    let server = serve(BREAKERS).await;
    let mut operator = Operator::of(&server).await;
    let (counting, _) = operator.set(order("payments", "", CircuitMode::MetricsOnly)).await;
    let generation = counting.generation;
    let delta = CircuitDelta { policy: "payments".into(), generation, ..Default::default() };
    tell(&server, "one", CircuitDelta { failures: 9, ..delta }).await;
    let told = operator.inspect("payments", "").await;
    let (circuit, calls) = (told.circuit.unwrap(), told.calls.unwrap());
    assert_eq!((circuit.state(), circuit.mode()), (CircuitState::Closed, CircuitMode::MetricsOnly));
    assert_eq!((calls.would_open_by_failures, calls.would_open_by_slow_calls), (true, false));
    let evidence = circuit.evidence.unwrap();
    assert_eq!((evidence.forced_reason.as_str(), evidence.calls), ("INC-4711", 9));
    assert_eq!(call(&server, "payments", "").await.decision(), Decision::Allow);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn circuits_are_counted_by_what_they_are_and_became() {
    let server = serve(BREAKERS).await;
    let mut operator = Operator::of(&server).await;
    operator.set(order("search", "a", CircuitMode::ForcedOpen)).await;
    operator.set(order("search", "b", CircuitMode::ForcedOpen)).await;
    operator.set(order("search", "b", CircuitMode::Normal)).await;
    let (_, metrics) = server.http("/metrics").await;
    for (state, mode, count) in [
        ("closed", "normal", 1),
        ("open", "forced_open", 1),
        ("open", "normal", 0),
        ("half_open", "normal", 0),
        ("closed", "disabled", 0),
        ("closed", "metrics_only", 0),
    ] {
        let line = format!(
            r#"fusebox_circuits{{mode="{mode}",namespace="test",policy="search",state="{state}"}} {count}"#
        );
        assert!(metrics.contains(&line), "{line} is not in {metrics}");
    }
    for (to, count) in [("closed", 1), ("open", 0), ("half_open", 0), ("forced_open", 2)] {
        let line = format!(
            r#"fusebox_circuit_transitions_total{{namespace="test",policy="search",to="{to}"}} {count}"#
        );
        assert!(metrics.contains(&line), "{line} is not in {metrics}");
    }
    assert!(!metrics.contains(r#"policy="rate",state"#), "it has no circuits");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn an_order_and_its_event_outlive_a_crash() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let config = config(BREAKERS);
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config).await;
    let (forced, _) =
        Operator::of(&server).await.set(order("payments", "eu", CircuitMode::ForcedOpen)).await;
    journal.lose_power();
    server.stop().await.unwrap_err();

    clock.advance(seconds(60));
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config).await;
    let mut operator = Operator::of(&server).await;
    let told = operator.inspect("payments", "eu").await;
    let kept = told.circuit.unwrap();
    assert_eq!((kept.mode(), kept.generation), (CircuitMode::ForcedOpen, forced.generation));
    assert_eq!((kept.since, &kept.forced_by), (forced.since, &forced.forced_by));
    assert_eq!(duration(kept.mode_expires_in), Some(seconds(1_740)));
    assert_eq!(told.history.len(), 1);
    assert_eq!(operator.events().await.len(), 1);
    let answer = call(&server, "payments", "eu").await;
    assert_eq!(answer.verdicts[0].reason(), Reason::CircuitForcedOpen);

    // And it ends when it would have, also while nobody is there.
    journal.kill();
    server.stop().await.unwrap_err();
    clock.advance(seconds(1_740));
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config).await;
    let ended = Operator::of(&server).await.circuit("payments", "eu").await;
    assert_eq!((ended.state(), ended.mode()), (CircuitState::Closed, CircuitMode::Normal));
    assert!(ended.generation > forced.generation);
    server.stop().await.unwrap();
}
