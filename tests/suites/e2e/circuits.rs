//! Circuits, as callers meet them: ask before a call, tell after it.

use std::{sync::Arc, time::Duration};

use fusebox_proto::v1::{
    AcquireBatchRequest, AcquireRequest, AcquireResponse, Ask, CircuitState, CircuitStatus, Client,
    Decision, GrantOutcome, Outcome, Reason, ReportRequest, ReportResponse, ReportResult,
    resilience_client::ResilienceClient,
};
use fusebox_tests::{Server, Simulated, eventually};
use tonic::{Code, transport::Channel};

use crate::{
    ask,
    caller::{config, duration, seconds, serve},
    request,
};

/// Opens by four calls of which two fail, if one reporter sees it; three probes, and no ramp.
const BREAKER: &str = "window: 10s, min_calls: 4, open_for: 5s, backoff: {jitter: 0%}, \
                       half_open: {probes: 3, probe_timeout: 4s, max_duration: 20s}, ramp: {steps: []}";

fn policies() -> String {
    format!(
        "payments: {{breaker: {{{BREAKER}}}}}, host: {{breaker: {{{BREAKER}}}}}, \
         third: {{breaker: {{{BREAKER}}}}}, few: {{breaker: {{{BREAKER}}}, max_cells: 1}}, \
         ramped: {{breaker: {{{}}}}}, slow: {{breaker: {{{BREAKER}, slow_call: {{over: 1s, rate: 50%}}}}}}, \
         quota: {{token_bucket: {{limit: 10, per: 1h}}}}, permits: {{concurrency: {{limit: 2}}}}",
        BREAKER.replace("steps: []", "steps: [25%, 50%], each: 5s")
    )
}

/// One process of the fleet.
struct Member {
    raw: ResilienceClient<Channel>,
    client: Client,
}

impl Member {
    async fn of(server: &Server, id: &str) -> Self {
        let (id, zone) = (id.to_owned(), format!("zone-of-{id}"));
        Self { raw: server.raw().await, client: Client { id, service: "shop".into(), zone } }
    }

    async fn acquire(&mut self, asks: impl IntoIterator<Item = Ask>) -> AcquireResponse {
        let request = AcquireRequest { client: Some(self.client.clone()), ..request(asks) };
        self.raw.acquire(request).await.expect("an answer").into_inner()
    }

    /// The grant of a call that is let through.
    async fn pass(&mut self, policy: &str) -> String {
        let answer = self.acquire([ask(policy, "", 1)]).await;
        assert_eq!(answer.decision(), Decision::Allow, "{answer:?}");
        assert!(!answer.grant_id.is_empty());
        answer.grant_id
    }

    async fn tell_all(&mut self, outcomes: Vec<GrantOutcome>) -> ReportResponse {
        let report = ReportRequest {
            namespace: "test".into(),
            client: Some(self.client.clone()),
            outcomes,
            ..Default::default()
        };
        self.raw.report(report).await.expect("an answer").into_inner()
    }

    async fn tell(&mut self, grant: &str, outcome: Outcome) -> ReportResult {
        self.tell_all(vec![told(grant, outcome)]).await.results().next().unwrap()
    }

    /// Calls, each let through and told of; what the circuit is after that.
    async fn call(&mut self, policy: &str, outcome: Outcome, times: usize) -> CircuitStatus {
        let mut last = None;
        for _ in 0..times {
            let grant = self.pass(policy).await;
            last = self.tell_all(vec![told(&grant, outcome)]).await.circuits.pop();
        }
        last.expect("a circuit was told of")
    }

    /// What becomes of a call, and why.
    async fn is_denied(&mut self, policy: &str) -> (Reason, Option<Duration>) {
        let answer = self.acquire([ask(policy, "", 1)]).await;
        assert_eq!(answer.decision(), Decision::Deny, "{answer:?}");
        assert!(answer.grant_id.is_empty());
        let verdict = &answer.verdicts[0];
        (verdict.reason(), duration(verdict.retry_after))
    }
}

fn told(grant: &str, outcome: Outcome) -> GrantOutcome {
    GrantOutcome { grant_id: grant.into(), outcome: outcome.into(), ..Default::default() }
}

/// Two members of which each sees four calls fail.
async fn opened(server: &Server, policy: &str) -> (Member, Member) {
    let (mut one, mut two) = (Member::of(server, "one").await, Member::of(server, "two").await);
    // Together they make the calls that it takes.
    let status = one.call(policy, Outcome::Failure, 2).await;
    assert_eq!(status.state(), CircuitState::Closed);
    let status = two.call(policy, Outcome::Failure, 2).await;
    assert_eq!(status.state(), CircuitState::Open, "{status:?}");
    (one, two)
}

#[tokio::test]
async fn a_fleet_opens_a_circuit_together_and_closes_it_by_few_probes() {
    let server = serve(&policies()).await;
    let (mut one, mut two) = opened(&server, "payments").await;
    let mut three = Member::of(&server, "three").await;
    assert_eq!(three.is_denied("payments").await, (Reason::CircuitOpen, Some(seconds(5))));

    server.advance(seconds(5));
    let mut probes = Vec::new();
    for member in [&mut one, &mut two, &mut three] {
        let answer = member.acquire([ask("payments", "", 1)]).await;
        let verdict = &answer.verdicts[0];
        assert!(verdict.probe, "{verdict:?}");
        assert_eq!(verdict.circuit_state(), CircuitState::HalfOpen);
        assert_eq!(duration(verdict.expires_in), Some(seconds(4)));
        probes.push(answer.grant_id);
    }
    assert_eq!(one.is_denied("payments").await, (Reason::ProbesInUse, Some(seconds(4))));

    for (index, (member, grant)) in
        [&mut one, &mut two, &mut three].into_iter().zip(&probes).enumerate()
    {
        let status = member.tell_all(vec![told(grant, Outcome::Success)]).await;
        let state = if index == 2 { CircuitState::Closed } else { CircuitState::HalfOpen };
        assert_eq!(status.circuits[0].state(), state);
    }
    one.pass("payments").await;
    server.stop().await.unwrap();
}

#[tokio::test]
async fn clients_of_the_sdk_are_told_apart_by_their_names() {
    let server = serve(&policies()).await;
    let client = server.client("test").await;
    let is_refused_after = async |clients: [fusebox_client::unary::Client; 2], key: &str| {
        for client in clients.into_iter().cycle().take(4) {
            let acquired = client.acquire([fusebox_client::unary::Ask::new("payments", key)]).await;
            let grant = acquired.unwrap().grant_id.expect("it is let through");
            let outcome = fusebox_client::unary::Outcome::failure(grant, seconds(1));
            assert_eq!(
                client.report([outcome]).await.unwrap(),
                [fusebox_client::unary::Reported::Applied]
            );
        }
        !client.acquire([fusebox_client::unary::Ask::new("payments", key)]).await.unwrap().allowed
    };
    let two = ["one", "two"].map(|name| client.clone().named(name));
    assert!(is_refused_after(two, "named").await);
    let unnamed = [client.clone(), client.clone()];
    assert!(!is_refused_after(unnamed, "not named").await, "they are one, as far as anybody knows");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn probes_that_fail_open_it_again_for_longer() {
    let server = serve(&policies()).await;
    let (mut one, mut two) = opened(&server, "payments").await;
    server.advance(seconds(5));
    let probes =
        [one.pass("payments").await, two.pass("payments").await, two.pass("payments").await];
    assert_eq!(one.tell(&probes[0], Outcome::Success).await, ReportResult::Applied);
    assert_eq!(two.tell(&probes[1], Outcome::Failure).await, ReportResult::Applied);
    assert_eq!(two.tell(&probes[1], Outcome::Failure).await, ReportResult::UnknownGrant, "again");
    assert_eq!(two.tell(&probes[2], Outcome::Failure).await, ReportResult::Applied);
    assert_eq!(one.is_denied("payments").await, (Reason::CircuitOpen, Some(seconds(10))));
    assert_eq!(two.tell(&probes[2], Outcome::Success).await, ReportResult::StaleGeneration);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn why_it_is_open_is_told_to_who_is_refused() {
    let server = serve(&policies()).await;
    let (mut one, mut two) = (Member::of(&server, "one").await, Member::of(&server, "two").await);
    for kind in ["timeout", "reset"] {
        for (member, kind) in [(&mut one, "timeout"), (&mut two, kind)] {
            let grant = member.pass("payments").await;
            let failed = GrantOutcome { error_kind: kind.into(), ..told(&grant, Outcome::Failure) };
            member.tell_all(vec![failed]).await;
        }
    }
    server.advance(seconds(2));
    let answer = one.acquire([ask("payments", "", 1)]).await;
    let evidence = answer.verdicts[0].evidence.clone().expect("why it is open");
    assert_eq!(evidence.failure_rate_basis_points, 10_000);
    assert_eq!(evidence.calls, 4);
    assert_eq!((evidence.reporters, evidence.unhealthy_reporters), (2, 2));
    assert_eq!(evidence.zones, ["zone-of-one", "zone-of-two"]);
    assert_eq!(evidence.error_kinds, ["timeout", "reset"]);
    assert_eq!(duration(evidence.open_since), Some(seconds(2)));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_circuit_and_limits_are_one_decision() {
    let server = serve(&policies()).await;
    let (mut one, _) = opened(&server, "payments").await;
    let both = || [ask("quota", "", 4), ask("payments", "", 1)];
    let denied = one.acquire(both()).await;
    assert_eq!(denied.decision(), Decision::Deny);
    assert_eq!(denied.verdicts[0].decision(), Decision::Allow, "of itself");
    assert_eq!(denied.verdicts[0].remaining, Some(10), "and uncharged");
    assert_eq!(denied.verdicts[1].reason(), Reason::CircuitOpen);

    server.advance(seconds(5));
    let spent = one.acquire([ask("payments", "", 1), ask("quota", "", 8)]).await;
    assert!(spent.verdicts[0].probe);
    assert_eq!(spent.verdicts[1].remaining, Some(2));
    // A limit that denies leaves the probes to others.
    for _ in 0..5 {
        let denied = one.acquire(both()).await;
        assert_eq!(denied.verdicts[0].reason(), Reason::RateLimited);
        assert_eq!(denied.verdicts[1].decision(), Decision::Allow);
        assert!(!denied.verdicts[1].probe, "none was taken");
    }
    one.pass("payments").await;
    one.pass("payments").await;
    assert_eq!(one.is_denied("payments").await.0, Reason::ProbesInUse);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_probe_beside_a_permit_ends_with_it() {
    let server = serve(&policies()).await;
    let (mut one, _) = opened(&server, "payments").await;
    server.advance(seconds(5));
    let answer = one.acquire([ask("permits", "", 2), ask("payments", "", 1)]).await;
    assert_eq!(answer.decision(), Decision::Allow);
    assert!(answer.verdicts[1].probe);
    assert_eq!(one.acquire([ask("permits", "", 1)]).await.decision(), Decision::Deny);
    let told = one.tell_all(vec![told(&answer.grant_id, Outcome::Success)]).await;
    assert_eq!(told.results, [i32::from(ReportResult::Applied)]);
    assert_eq!(told.circuits[0].state(), CircuitState::HalfOpen);
    assert_eq!(one.acquire([ask("permits", "", 2)]).await.decision(), Decision::Allow);
    // One result is counted and two are to come.
    one.pass("payments").await;
    one.pass("payments").await;
    assert_eq!(one.is_denied("payments").await.0, Reason::ProbesInUse);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn two_circuits_let_a_call_through_together_or_not_at_all() {
    let server = serve(&policies()).await;
    let (mut one, _) = opened(&server, "payments").await;
    server.advance(seconds(5));
    let both = || [ask("host", "h1", 1), ask("payments", "", 1)];
    let mut grants = Vec::new();
    for _ in 0..3 {
        let answer = one.acquire(both()).await;
        assert_eq!(answer.decision(), Decision::Allow);
        assert!(answer.grant_id.len() <= 128);
        assert!(!answer.verdicts[0].probe && answer.verdicts[1].probe);
        grants.push(answer.grant_id);
    }
    let denied = one.acquire(both()).await;
    assert_eq!(denied.verdicts[0].decision(), Decision::Allow);
    assert_eq!(denied.verdicts[1].reason(), Reason::ProbesInUse);
    let answer = one.tell_all(vec![told(&grants[0], Outcome::Success)]).await;
    assert_eq!(answer.circuits.len(), 2, "one report tells both");

    let third = [ask("host", "h1", 1), ask("payments", "", 1), ask("third", "", 1)];
    let refused = one.raw.acquire(request(third)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("asks[2].policy"), "{refused}");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_says_nothing_about_the_target_counts_for_nothing() {
    let server = serve(&policies()).await;
    let mut one = Member::of(&server, "one").await;
    for outcome in [Outcome::LocalFailure, Outcome::Ignored, Outcome::Abandoned] {
        let status = one.call("payments", outcome, 10).await;
        assert_eq!(status.state(), CircuitState::Closed, "{outcome:?}");
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn slow_calls_open_it_although_they_succeed() {
    let server = serve(&policies()).await;
    let (mut one, mut two) = (Member::of(&server, "one").await, Member::of(&server, "two").await);
    let mut state = CircuitState::Closed;
    for millis in [1_000, 1_000, 1_001, 1_001] {
        for member in [&mut one, &mut two] {
            assert_eq!(state, CircuitState::Closed, "{millis}");
            let grant = member.pass("slow").await;
            let latency = Some(Duration::from_millis(millis).try_into().unwrap());
            let slow = GrantOutcome { latency, ..told(&grant, Outcome::Success) };
            state = member.tell_all(vec![slow]).await.circuits[0].state();
        }
    }
    assert_eq!(state, CircuitState::Open);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_circuit_that_closed_lets_a_growing_share_through() {
    let server = serve(&policies()).await;
    let (mut one, _) = opened(&server, "ramped").await;
    server.advance(seconds(5));
    for _ in 0..3 {
        let probe = one.pass("ramped").await;
        one.tell(&probe, Outcome::Success).await;
    }
    for (through, of) in [(2, 8), (4, 8), (8, 8)] {
        let mut passed = 0;
        for _ in 0..of {
            let answer = one.acquire([ask("ramped", "", 1)]).await;
            let verdict = &answer.verdicts[0];
            assert_eq!(verdict.circuit_state(), CircuitState::Closed);
            match answer.decision() {
                Decision::Allow => passed += 1,
                _ => assert_eq!(verdict.reason(), Reason::Ramping),
            }
        }
        assert_eq!(passed, through);
        server.advance(seconds(5));
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_look_changes_nothing() {
    let server = serve(&policies()).await;
    let mut one = Member::of(&server, "one").await;
    let peek = one.acquire([ask("payments", "", 0)]).await;
    assert_eq!(peek.verdicts[0].circuit_state(), CircuitState::Closed);
    assert!(peek.grant_id.is_empty());
    opened(&server, "payments").await;
    server.advance(seconds(5));
    for _ in 0..5 {
        let peek = one.acquire([ask("payments", "", 0)]).await;
        assert_eq!(peek.decision(), Decision::Allow, "a probe would be let through");
        assert!(!peek.verdicts[0].probe);
        assert_eq!(peek.verdicts[0].circuit_state(), CircuitState::Open);
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn past_the_budget_a_circuit_is_not_shared_and_calls_go_through() {
    let server = serve(&policies()).await;
    let mut one = Member::of(&server, "one").await;
    assert!(!one.acquire([ask("few", "a", 1)]).await.grant_id.is_empty());
    let other = one.acquire([ask("few", "b", 1)]).await;
    assert_eq!(other.decision(), Decision::Allow);
    assert_eq!(other.verdicts[0].reason(), Reason::NotShared);
    assert!(other.grant_id.is_empty(), "there is nothing to tell");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_probe_whose_caller_is_gone_is_given_to_another() {
    let journal = Simulated::default();
    let server = Server::start_on(journal.open(), Arc::default(), &config(&policies())).await;
    let (mut one, mut two) = opened(&server, "payments").await;
    server.advance(seconds(5));
    // The first probe's answer waits for the disk, and its caller does not.
    journal.hang();
    let call = tokio::spawn(async move { one.pass("payments").await });
    eventually("the first probe is out", async || journal.hangs()).await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    journal.go_on();
    let mut taken = 0;
    eventually("it is there again", async || {
        let answer = two.acquire([ask("payments", "", 1)]).await;
        taken += usize::from(answer.decision() == Decision::Allow);
        taken == 3
    })
    .await;
    assert_eq!(two.is_denied("payments").await.0, Reason::ProbesInUse);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_repeated_request_has_the_same_probe() {
    let server = serve(&policies()).await;
    let (mut one, _) = opened(&server, "payments").await;
    server.advance(seconds(5));
    let once = || AcquireRequest {
        client: Some(Client { id: "one".into(), ..Default::default() }),
        request_id: "r1".into(),
        ..request([ask("payments", "", 1)])
    };
    let first = one.raw.acquire(once()).await.unwrap().into_inner();
    server.advance(seconds(1));
    let again = one.raw.acquire(once()).await.unwrap().into_inner();
    assert_eq!(first.grant_id, again.grant_id);
    assert_eq!(duration(again.verdicts[0].expires_in), Some(seconds(3)), "what is left of it");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn entries_of_a_batch_take_the_probes_in_order() {
    let server = serve(&policies()).await;
    let (mut one, _) = opened(&server, "payments").await;
    server.advance(seconds(5));
    let entry = || AcquireRequest { asks: vec![ask("payments", "", 1)], ..Default::default() };
    let batch = AcquireBatchRequest {
        namespace: "test".into(),
        requests: (0..5).map(|_| entry()).collect(),
        ..Default::default()
    };
    let answers = one.raw.acquire_batch(batch).await.unwrap().into_inner().responses;
    let allowed: Vec<_> = answers.iter().map(|one| one.decision() == Decision::Allow).collect();
    assert_eq!(allowed, [true, true, true, false, false]);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_a_circuit_is_not_asked_is_refused() {
    let server = serve(&policies()).await;
    let mut one = Member::of(&server, "one").await;
    let wait = Some(Duration::from_secs(1).try_into().unwrap());
    for (asked, field) in [
        (request([ask("payments", "", 2)]), "asks[0].cost"),
        (request([Ask { estimated: true, ..ask("payments", "", 1) }]), "asks[0].estimated"),
        (AcquireRequest { max_wait: wait, ..request([ask("payments", "", 1)]) }, "max_wait"),
    ] {
        let refused = one.raw.acquire(asked).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().starts_with(field), "{refused}");
    }
    server.stop().await.unwrap();
}
