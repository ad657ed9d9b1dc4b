//! Counters of many calls: what a fleet tells of its circuits and retry budgets, and is told back.

use std::time::Duration;

use fusebox_proto::v1::{
    AcquireRequest, Ask, CircuitDelta, CircuitState, CircuitStatus, Client, Decision, GrantOutcome,
    InspectCircuitRequest, Outcome, Reason, ReportRequest, ReportResponse, ReportResult,
    admin_client::AdminClient, resilience_client::ResilienceClient,
};
use fusebox_tests::Server;
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

use crate::{
    ask,
    caller::{duration, seconds},
    request,
};

const CONFIG: &str = "
namespaces:
  test:
    policies:
      payments: {breaker: {window: 10s, min_calls: 4, open_for: 5s, backoff: {jitter: 0%}, ramp: {steps: []},
                           min_reporters: 1}}
      fleet: {breaker: {window: 10s, min_calls: 10}}
      quorum: {breaker: {window: 10s, min_calls: 10, min_reporters: 3}}
      few: {breaker: {}, max_cells: 1}
      retries: {retry_budget: {ratio: 20%, min_per_second: 1, ttl: 10s}}
      rate: {token_bucket: {limit: 100, per: 1m}}
      jobs: {concurrency: {limit: 2}}
  other:
    policies:
      payments: {breaker: {}}
";

/// One process that reports.
struct Reporter {
    raw: ResilienceClient<Channel>,
    client: Client,
}

impl Reporter {
    async fn of(server: &Server, id: impl ToString) -> Self {
        let id = id.to_string();
        let client = Client { zone: format!("zone-of-{id}"), id, ..Default::default() };
        Self { raw: server.raw().await, client }
    }

    fn with(&self, report: ReportRequest) -> ReportRequest {
        let client = Some(self.client.clone());
        ReportRequest { namespace: "test".into(), client, ..report }
    }

    async fn tell(&mut self, report: ReportRequest) -> ReportResponse {
        let report = self.with(report);
        self.raw.report(report).await.expect("an answer").into_inner()
    }

    async fn tell_all(&mut self, deltas: impl Into<Vec<CircuitDelta>>) -> ReportResponse {
        self.tell(ReportRequest { deltas: deltas.into(), ..Default::default() }).await
    }

    /// The circuit after these calls of its generation.
    async fn saw(&mut self, policy: &str, successes: u64, failures: u64) -> CircuitStatus {
        let generation = self.generation(policy).await;
        let delta = CircuitDelta { generation, successes, failures, ..delta(policy) };
        let mut answer = self.tell_all([delta]).await;
        assert_eq!(answer.delta_results, [ReportResult::Applied as i32], "{answer:?}");
        answer.circuits.pop().expect("a circuit")
    }

    /// What a circuit's generation is now, as the answer to another one tells.
    async fn generation(&mut self, policy: &str) -> u64 {
        let answer = self.tell_all([delta(policy)]).await;
        assert_eq!(answer.delta_results, [ReportResult::StaleGeneration as i32]);
        answer.circuits[0].generation
    }

    async fn refused(&mut self, report: ReportRequest) -> Status {
        let report = self.with(report);
        self.raw.report(report).await.expect_err("it is refused")
    }

    async fn grant(&mut self, asks: impl IntoIterator<Item = Ask>) -> String {
        let request = AcquireRequest { client: Some(self.client.clone()), ..request(asks) };
        let answer = self.raw.acquire(request).await.unwrap().into_inner();
        assert_eq!(answer.decision(), Decision::Allow, "{answer:?}");
        answer.grant_id
    }

    /// Retries that are left.
    async fn retries(&mut self) -> u64 {
        let peek = AcquireRequest { attempt: 1, ..request([ask("retries", "", 0)]) };
        let answer = self.raw.acquire(peek).await.unwrap().into_inner();
        assert_eq!(answer.decision(), Decision::Allow, "a look is never refused: {answer:?}");
        answer.verdicts[0].remaining.unwrap()
    }
}

fn delta(policy: &str) -> CircuitDelta {
    CircuitDelta { policy: policy.into(), ..Default::default() }
}

fn outcome(grant_id: &str, outcome: Outcome) -> GrantOutcome {
    GrantOutcome { grant_id: grant_id.into(), outcome: outcome.into(), ..Default::default() }
}

fn outcomes(outcomes: impl Into<Vec<GrantOutcome>>) -> ReportRequest {
    ReportRequest { outcomes: outcomes.into(), ..Default::default() }
}

#[tokio::test]
async fn what_two_reporters_count_opens_a_circuit() {
    let server = Server::start(CONFIG).await;
    let (mut one, mut two) = (Reporter::of(&server, 1).await, Reporter::of(&server, 2).await);
    let before = one.saw("payments", 0, 2).await;
    assert_eq!(before.state(), CircuitState::Closed);
    assert_eq!((before.policy.as_str(), before.key.as_str()), ("payments", ""));
    assert_eq!(duration(before.valid_for), Some(seconds(5)));

    let failures = CircuitDelta {
        generation: before.generation,
        failures: 2,
        error_kinds: vec!["timeout".into()],
        ..delta("payments")
    };
    let after = two.tell_all([failures.clone()]).await;
    let [status] = after.circuits.as_slice() else { panic!("{after:?}") };
    assert_eq!(status.state(), CircuitState::Open);
    assert!(status.generation > before.generation);
    assert_eq!(duration(status.open_for), Some(seconds(5)));
    let evidence = status.evidence.as_ref().unwrap();
    assert_eq!((evidence.calls, evidence.reporters, evidence.unhealthy_reporters), (4, 2, 2));
    assert_eq!(evidence.zones, ["zone-of-1", "zone-of-2"]);
    assert_eq!(evidence.error_kinds, ["timeout"]);

    // What was let through before it opened changes nothing more, and is told what is.
    let late = one.tell_all([failures]).await;
    assert_eq!(late.delta_results, [ReportResult::StaleGeneration as i32]);
    assert_eq!(late.circuits[0].generation, status.generation);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn one_that_fails_alone_is_told_so_and_never_opens_the_circuit() {
    let server = Server::start(CONFIG).await;
    let (mut one, mut two) = (Reporter::of(&server, 1).await, Reporter::of(&server, 2).await);
    let mut lonely = Reporter::of(&server, 3).await;
    for _ in 0..20 {
        for healthy in [&mut one, &mut two] {
            let status = healthy.saw("payments", 5, 0).await;
            assert_eq!((status.state(), status.outlier), (CircuitState::Closed, false));
        }
        let status = lonely.saw("payments", 0, 1_000).await;
        assert_eq!((status.state(), status.outlier), (CircuitState::Closed, true));
        server.advance(seconds(1));
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn ten_with_one_failed_call_each_open_it_together() {
    let server = Server::start(CONFIG).await;
    for id in 1..=10 {
        let status = Reporter::of(&server, id).await.saw("fleet", 0, 1).await;
        let open = if id == 10 { CircuitState::Open } else { CircuitState::Closed };
        assert_eq!(status.state(), open, "{id}");
        assert!(!status.outlier);
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn it_takes_as_many_as_the_policy_says() {
    let server = Server::start(CONFIG).await;
    for id in 0..7 {
        Reporter::of(&server, id).await.saw("quorum", 2, 0).await;
    }
    let mut last = Reporter::of(&server, 7).await;
    last.saw("quorum", 2, 0).await;
    // By calls these two outvote the eight.
    for id in ["hard", "harder"] {
        let status = Reporter::of(&server, id).await.saw("quorum", 0, 100).await;
        assert_eq!((status.state(), status.outlier), (CircuitState::Closed, true));
    }
    let status = last.saw("quorum", 0, 8).await;
    assert_eq!(status.state(), CircuitState::Open, "three agree");
    server.stop().await.unwrap();
}

/// Processes that end see their last calls fail, and say goodbye.
#[tokio::test]
async fn a_deploy_that_rolls_through_the_fleet_leaves_the_circuit_closed() {
    for goodbye in [true, false] {
        let server = Server::start(CONFIG).await;
        let mut fleet = Vec::new();
        for id in 0..4 {
            let mut reporter = Reporter::of(&server, id).await;
            reporter.saw("payments", 2, 0).await;
            fleet.push(reporter);
        }
        let mut states = Vec::new();
        for (id, mut leaving) in (10..).zip(fleet) {
            let generation = leaving.generation("payments").await;
            let deltas = vec![CircuitDelta { generation, failures: 8, ..delta("payments") }];
            let last = ReportRequest { deltas, goodbye, ..Default::default() };
            states.push(leaving.tell(last).await.circuits[0].state());
            if states.last() == Some(&CircuitState::Open) {
                break;
            }
            Reporter::of(&server, id).await.saw("payments", 2, 0).await;
        }
        assert_eq!(states.contains(&CircuitState::Open), !goodbye, "{states:?}");
        server.stop().await.unwrap();
    }
}

#[tokio::test]
async fn a_report_that_arrives_twice_counts_once() {
    let server = Server::start(CONFIG).await;
    let mut one = Reporter::of(&server, 1).await;
    let generation = one.generation("payments").await;
    let estimate = Ask { estimated: true, ..ask("rate", "", 10) };
    let passed = one.grant([ask("payments", "", 1)]).await;
    let kept = one.grant([estimate.clone(), ask("payments", "", 1)]).await;
    let report = |sequence, kept: &str| ReportRequest {
        sequence,
        outcomes: vec![
            outcome(&passed, Outcome::Failure),
            outcome(kept, Outcome::Success),
            outcome("1-1", Outcome::Success),
        ],
        deltas: vec![
            CircuitDelta { generation, failures: 1, ..delta("payments") },
            CircuitDelta { requests: 50, retries: 3, ..delta("retries") },
        ],
        ..Default::default()
    };
    let results = |answer: &ReportResponse| {
        let all = answer.results().chain(answer.delta_results()).collect::<Vec<_>>();
        (answer.duplicate, all)
    };
    let first = one.tell(report(7, &kept)).await;
    let (applied, duplicate) = (ReportResult::Applied, ReportResult::Duplicate);
    let unknown = ReportResult::UnknownGrant;
    assert_eq!(results(&first), (false, vec![applied, applied, unknown, applied, applied]));
    assert_eq!(one.retries().await, 10 + 10 - 3);

    for _ in 0..3 {
        let again = one.tell(report(7, &kept)).await;
        assert_eq!(
            results(&again),
            (true, vec![duplicate, duplicate, unknown, duplicate, duplicate])
        );
        assert_eq!(again.circuits, first.circuits, "it is told as it is");
    }
    assert_eq!(one.retries().await, 17);
    // A grant is settled once whatever the report is.
    let other = one.grant([estimate]).await;
    let again = one.tell(report(7, &other)).await;
    assert_eq!(results(&again).1[1], applied);

    // Of three calls so far two failed; the next one is the fourth.
    let older = ReportRequest { outcomes: Vec::new(), ..report(6, "") };
    let answer = one.tell(older).await;
    assert_eq!(
        results(&answer),
        (false, vec![applied, applied]),
        "it came late, but for the first time"
    );
    assert_eq!(answer.circuits[0].state(), CircuitState::Open);
    let far = ReportRequest { sequence: 1_000, goodbye: true, ..Default::default() };
    assert!(!one.tell(far.clone()).await.duplicate);
    assert!(one.tell(ReportRequest { sequence: 936, ..far.clone() }).await.duplicate, "too old");
    assert!(!one.tell(ReportRequest { sequence: 937, ..far.clone() }).await.duplicate);
    assert!(!Reporter::of(&server, 2).await.tell(far).await.duplicate, "its own");
    server.stop().await.unwrap();
}

/// A probe is told of once by itself, so a number that was used already does not keep it from that.
#[tokio::test]
async fn a_probe_is_settled_whatever_the_report_is() {
    let server = Server::start(CONFIG).await;
    let mut one = Reporter::of(&server, 1).await;
    one.saw("payments", 0, 4).await;
    server.advance(seconds(5));
    let probe = one.grant([ask("payments", "", 1)]).await;
    let numbered = |outcomes| ReportRequest { sequence: 1, outcomes, ..Default::default() };
    assert!(!one.tell(numbered(vec![outcome("1-1", Outcome::Success)])).await.duplicate);
    let report = || numbered(vec![outcome(&probe, Outcome::Success)]);
    let answer = one.tell(report()).await;
    assert!(answer.duplicate);
    assert_eq!(answer.results, [ReportResult::Applied as i32]);
    assert_eq!(one.tell(report()).await.results, [ReportResult::Duplicate as i32]);
    let unnumbered = outcomes([outcome(&probe, Outcome::Success)]);
    assert_eq!(one.tell(unnumbered).await.results, [ReportResult::UnknownGrant as i32]);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_circuit_is_told_once_as_it_is_after_the_report() {
    let server = Server::start(CONFIG).await;
    let mut one = Reporter::of(&server, 1).await;
    let grant = one.grant([ask("payments", "", 1), ask("fleet", "a", 1)]).await;
    let generation = one.generation("payments").await;
    let answer = one
        .tell(ReportRequest {
            deltas: vec![
                CircuitDelta { generation, failures: 2, ..delta("payments") },
                CircuitDelta { generation, key: "b".into(), failures: 9, ..delta("payments") },
            ],
            ..outcomes([outcome(&grant, Outcome::Failure), outcome(&grant, Outcome::Failure)])
        })
        .await;
    let told: Vec<_> =
        answer.circuits.iter().map(|one| (&*one.policy, &*one.key, one.state())).collect();
    let (open, closed) = (CircuitState::Open, CircuitState::Closed);
    assert_eq!(told, [("payments", "", open), ("fleet", "a", closed), ("payments", "b", open)]);

    // All that failed before it opened counts, and what failed after does not.
    let late = one.tell(outcomes([outcome(&grant, Outcome::Failure)])).await;
    assert_eq!(late.results, [ReportResult::Applied as i32], "one of the two circuits counts it");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_call_that_goes_on_says_nothing_yet_and_a_forged_id_never_does() {
    let server = Server::start(CONFIG).await;
    let mut one = Reporter::of(&server, 1).await;
    let grant = one.grant([ask("payments", "", 1)]).await;
    let part = GrantOutcome { grant_id: grant.clone(), partial: true, ..Default::default() };
    for _ in 0..4 {
        let answer = one.tell(outcomes([part.clone()])).await;
        assert_eq!(answer.results, [ReportResult::Applied as i32]);
        assert_eq!(answer.circuits, [], "nothing is told of it");
    }
    let (front, seal) = grant.rsplit_once('-').unwrap();
    let other = if seal.starts_with('0') { "1" } else { "0" };
    let forged = format!("{front}-{other}{}", &seal[1..]);
    let elsewhere = ReportRequest {
        namespace: "other".into(),
        ..one.with(outcomes([outcome(&grant, Outcome::Failure)]))
    };
    let elsewhere = one.raw.report(elsewhere).await.unwrap().into_inner();
    let here = one.tell(outcomes([outcome(&forged, Outcome::Failure)])).await;
    for answer in [elsewhere, here] {
        assert_eq!(answer.results, [ReportResult::UnknownGrant as i32]);
        assert_eq!(answer.circuits, []);
    }
    // Had any of it counted, this would open it.
    let status = one.saw("payments", 0, 3).await;
    assert_eq!(status.state(), CircuitState::Closed);
    let last = one.tell(outcomes([outcome(&grant, Outcome::Failure)])).await;
    assert_eq!(last.circuits[0].state(), CircuitState::Open);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_permit_beside_a_circuit_ends_once_and_tells_once() {
    let server = Server::start(CONFIG).await;
    let mut one = Reporter::of(&server, 1).await;
    let grant = one.grant([ask("jobs", "", 2), ask("payments", "", 1)]).await;
    for result in [ReportResult::Applied, ReportResult::Duplicate, ReportResult::Duplicate] {
        let answer = one.tell(outcomes([outcome(&grant, Outcome::Failure)])).await;
        assert_eq!(answer.results, [result as i32]);
    }
    assert_eq!(one.saw("payments", 0, 2).await.state(), CircuitState::Closed);
    assert_eq!(one.saw("payments", 0, 1).await.state(), CircuitState::Open);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn past_the_budget_a_delta_is_not_shared() {
    let server = Server::start(CONFIG).await;
    let mut one = Reporter::of(&server, 1).await;
    one.saw("few", 1, 0).await;
    let other = CircuitDelta { key: "b".into(), failures: 1_000, ..delta("few") };
    let answer = one.tell_all([other]).await;
    assert_eq!(answer.delta_results, [ReportResult::NotShared as i32]);
    assert_eq!(answer.circuits, []);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_was_counted_beside_is_shown_to_operators() {
    let server = Server::start(CONFIG).await;
    let mut one = Reporter::of(&server, 1).await;
    let generation = one.generation("fleet").await;
    let told = CircuitDelta {
        generation,
        successes: 98,
        failures: 2,
        slow: 3,
        ignored: 4,
        local_failures: 5,
        // 98 of 512 to 1,024 microseconds, and two of twice that.
        latency_counts: [vec![0; 9], vec![98, 2]].concat(),
        error_kinds: vec!["timeout".into()],
        ..delta("fleet")
    };
    one.tell_all([told]).await;
    let inspect = InspectCircuitRequest {
        namespace: "test".into(),
        policy: "fleet".into(),
        key: String::new(),
    };
    let mut admin = AdminClient::new(server.channel().await);
    let inspected = admin.inspect_circuit(inspect).await.unwrap().into_inner();
    let calls = inspected.calls.unwrap();
    assert_eq!((calls.calls, calls.ignored, calls.local_failures), (100, 4, 5));
    assert_eq!((calls.failure_rate_basis_points, calls.slow_rate_basis_points), (200, 300));
    assert_eq!(duration(calls.latency_p50), Some(Duration::from_micros(1_024)));
    assert_eq!(duration(calls.latency_p99), Some(Duration::from_micros(2_048)));
    let [reporter] = inspected.reporters.as_slice() else { panic!("{:?}", inspected.reporters) };
    assert_eq!((&*reporter.client_id, &*reporter.zone), ("1", "zone-of-1"));
    server.stop().await.unwrap();
}

/// Those that race for one number are as those that come one after the other.
#[tokio::test(flavor = "multi_thread")]
async fn of_reports_that_race_for_a_number_one_counts() {
    let server = Server::start(CONFIG).await;
    let mut one = Reporter::of(&server, 1).await;
    let mut races = tokio::task::JoinSet::new();
    for sequence in (1..=10).flat_map(|sequence| [sequence; 8]) {
        let deltas = vec![CircuitDelta { requests: 5, ..delta("retries") }];
        let report = one.with(ReportRequest { sequence, deltas, ..Default::default() });
        let mut raw = one.raw.clone();
        races.spawn(async move { raw.report(report).await.unwrap().into_inner().duplicate });
    }
    let answers = races.join_all().await;
    assert_eq!(answers.iter().filter(|duplicate| !**duplicate).count(), 10);
    assert_eq!(one.retries().await, 10 + 10);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn retries_that_were_made_are_owed_to_the_budget() {
    let server = Server::start(CONFIG).await;
    let mut one = Reporter::of(&server, 1).await;
    let told = |requests, retries| CircuitDelta { requests, retries, ..delta("retries") };
    for (requests, retries, left) in [(0, 0, 10), (50, 4, 16), (0, 20, 0), (20, 0, 0), (5, 0, 1)] {
        let answer = one.tell_all([told(requests, retries)]).await;
        assert_eq!(answer.delta_results, [ReportResult::Applied as i32]);
        assert_eq!(answer.circuits, []);
        assert_eq!(one.retries().await, left, "{requests} and {retries}");
    }
    one.tell_all([told(0, 2)]).await;
    let retry = AcquireRequest { attempt: 1, ..request([ask("retries", "", 1)]) };
    let denied = one.raw.acquire(retry).await.unwrap().into_inner();
    assert_eq!(denied.verdicts[0].reason(), Reason::RetryBudgetExhausted);
    server.advance(seconds(12));
    assert_eq!(one.retries().await, 10);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_report_that_is_wrong_counts_for_nothing_and_says_where() {
    let server = Server::start(CONFIG).await;
    let mut one = Reporter::of(&server, 1).await;
    let generation = one.generation("payments").await;
    let right = || CircuitDelta { generation, failures: 9, ..delta("payments") };
    let beside = |wrong| ReportRequest { deltas: vec![right(), wrong], ..Default::default() };
    let of = |change: fn(&mut CircuitDelta)| {
        let mut wrong = CircuitDelta { key: "wrong".into(), ..delta("payments") };
        change(&mut wrong);
        beside(wrong)
    };
    let told = |change: fn(&mut GrantOutcome)| {
        let mut wrong = outcome("1-1", Outcome::Failure);
        change(&mut wrong);
        outcomes([outcome("1-1", Outcome::Failure), wrong])
    };
    let many = |count| ReportRequest {
        deltas: (0..count)
            .map(|key: u32| CircuitDelta { key: key.to_string(), ..delta("payments") })
            .collect(),
        ..Default::default()
    };
    const MOST: u64 = 1_000_000_000;
    for (report, field) in [
        (ReportRequest::default(), "outcomes"),
        (ReportRequest { sequence: 1, ..Default::default() }, "outcomes"),
        (told(|one| one.outcome = 6), "outcomes[1].outcome"),
        (told(|one| one.partial = true), "outcomes[1].outcome"),
        (
            told(|one| (one.outcome, one.latency) = (0, Some(seconds(1).try_into().unwrap()))),
            "outcomes[1].latency",
        ),
        (told(|one| (one.outcome, one.error_kind) = (0, "x".into())), "outcomes[1].error_kind"),
        (
            told(|one| one.latency = Some(seconds(86_401).try_into().unwrap())),
            "outcomes[1].latency",
        ),
        (
            told(|one| one.latency = Some(prost_types::Duration { seconds: -1, nanos: 0 })),
            "outcomes[1].latency",
        ),
        (told(|one| one.error_kind = "k".repeat(65)), "outcomes[1].error_kind"),
        (many(1_001), "deltas"),
        (of(|one| one.policy.clear()), "deltas[1].policy"),
        (of(|one| one.key = "k".repeat(257)), "deltas[1].key"),
        (of(|one| one.key.clear()), "deltas[1]"),
        (of(|one| one.successes = MOST + 1), "deltas[1].successes"),
        (of(|one| one.failures = MOST + 1), "deltas[1].failures"),
        (of(|one| (one.slow, one.failures, one.successes) = (MOST + 1, MOST, 1)), "deltas[1].slow"),
        (of(|one| one.ignored = MOST + 1), "deltas[1].ignored"),
        (of(|one| one.local_failures = MOST + 1), "deltas[1].local_failures"),
        (of(|one| (one.slow, one.failures, one.successes) = (3, 1, 1)), "deltas[1].slow"),
        (of(|one| one.latency_counts = vec![0; 41]), "deltas[1].latency_counts"),
        (
            of(|one| (one.latency_counts, one.failures) = (vec![1, 1], 1)),
            "deltas[1].latency_counts",
        ),
        (of(|one| one.latency_counts = vec![u64::MAX; 2]), "deltas[1].latency_counts"),
        (of(|one| one.error_kinds = vec!["x".into(); 9]), "deltas[1].error_kinds"),
        (of(|one| one.error_kinds = vec!["x".repeat(65)]), "deltas[1].error_kinds[0]"),
        (of(|one| one.error_kinds = vec!["x".into(), String::new()]), "deltas[1].error_kinds[1]"),
        (of(|one| one.requests = 1), "deltas[1].requests"),
        (of(|one| one.retries = 1), "deltas[1].retries"),
        (of(|one| one.retries = MOST + 1), "deltas[1].retries"),
        (of(|one| one.policy = "rate".into()), "deltas[1].policy"),
        (of(|one| one.policy = "jobs".into()), "deltas[1].policy"),
        (beside(CircuitDelta { generation: 1, ..delta("retries") }), "deltas[1].generation"),
        (beside(CircuitDelta { successes: 1, ..delta("retries") }), "deltas[1].successes"),
        (beside(CircuitDelta { failures: 1, ..delta("retries") }), "deltas[1].failures"),
        (beside(CircuitDelta { ignored: 1, ..delta("retries") }), "deltas[1].ignored"),
        (
            beside(CircuitDelta { local_failures: 1, ..delta("retries") }),
            "deltas[1].local_failures",
        ),
        (
            beside(CircuitDelta { latency_counts: vec![0], ..delta("retries") }),
            "deltas[1].latency_counts",
        ),
        (
            beside(CircuitDelta { error_kinds: vec!["x".into()], ..delta("retries") }),
            "deltas[1].error_kinds",
        ),
        (beside(CircuitDelta { requests: MOST + 1, ..delta("retries") }), "deltas[1].requests"),
    ] {
        let sequence = if report.outcomes.is_empty() { 5 } else { 0 };
        let refused = one.refused(ReportRequest { sequence, ..report }).await;
        assert_eq!(refused.code(), Code::InvalidArgument, "{field}: {refused}");
        let details = refused.get_error_details();
        let fields = &details.bad_request().unwrap().field_violations;
        assert_eq!(fields[0].field, field, "{refused}");
        assert!(refused.message().starts_with(field), "{refused}");
    }
    let unknown = one.refused(ReportRequest { sequence: 5, ..beside(delta("nothing")) }).await;
    assert_eq!(unknown.code(), Code::NotFound);
    assert!(unknown.message().starts_with("deltas[1].policy"), "{unknown}");
    assert_eq!(unknown.get_error_details().resource_info().unwrap().resource_name, "nothing");

    let nobody = ReportRequest { namespace: "test".into(), ..Default::default() };
    for nameless in [
        ReportRequest { deltas: vec![right()], ..nobody.clone() },
        ReportRequest { sequence: 1, renew_grant_ids: vec!["1-1".into()], ..nobody.clone() },
        ReportRequest { goodbye: true, ..nobody },
    ] {
        let refused = one.raw.report(nameless).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().starts_with("client.id"), "{refused}");
    }

    // Nothing of all this counted, and its number was not taken.
    assert_eq!(one.saw("payments", 0, 3).await.state(), CircuitState::Closed);
    let failure = CircuitDelta { failures: 1, ..right() };
    let fifth = ReportRequest { sequence: 5, deltas: vec![failure], ..Default::default() };
    let answer = one.tell(fifth).await;
    assert!(!answer.duplicate);
    assert_eq!(answer.circuits[0].state(), CircuitState::Open);
    server.stop().await.unwrap();
}
