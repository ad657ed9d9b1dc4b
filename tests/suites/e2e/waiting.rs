//! Standing in line.

use std::time::Duration;

use fusebox_proto::v1::{
    AcquireRequest, AcquireResponse, Decision, GrantOutcome, Priority, Reason, ReportRequest,
    resilience_client::ResilienceClient,
};
use fusebox_tests::{Server, eventually};
use tokio::task::JoinHandle;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use crate::{ask, remaining, request};

const CONFIG: &str = "
namespaces:
  test:
    policies:
      one: {concurrency: {limit: 1, ttl: 1h}}
      short: {concurrency: {limit: 1, ttl: 1h}, max_waiting: 1}
      rate: {token_bucket: {limit: 1, per: 1s}}
      closed: {token_bucket: {limit: 0, per: 1s}}
";

/// Longer than any test runs.
const LONG: Duration = Duration::from_secs(50);

fn waiting(policy: &str, max_wait: Duration) -> AcquireRequest {
    let max_wait = Some(max_wait.try_into().unwrap());
    AcquireRequest { max_wait, ..request([ask(policy, "", 1)]) }
}

/// Asks in a task of its own, and returns once so many stand in line.
async fn stand(
    server: &Server,
    request: AcquireRequest,
    standing: usize,
) -> JoinHandle<Result<AcquireResponse, Status>> {
    let mut client = server.raw().await;
    let answer =
        tokio::spawn(async move { client.acquire(request).await.map(tonic::Response::into_inner) });
    stands(server, standing).await;
    answer
}

/// Returns once so many stand in line.
async fn stands(server: &Server, standing: usize) {
    let line = format!("fusebox_waiting {standing}\n");
    eventually(&line, async || server.http("/metrics").await.1.contains(&line)).await;
}

async fn acquire(server: &Server, policy: &str) -> AcquireResponse {
    let request = request([ask(policy, "", 1)]);
    server.raw().await.acquire(request).await.unwrap().into_inner()
}

async fn release(server: &Server, grant_id: &str) {
    let outcome = GrantOutcome { grant_id: grant_id.into(), ..Default::default() };
    let report =
        ReportRequest { namespace: "test".into(), outcomes: vec![outcome], ..Default::default() };
    server.raw().await.report(report).await.unwrap();
}

#[tokio::test]
async fn those_that_wait_are_admitted_in_order_as_permits_come_back() {
    let server = Server::start(CONFIG).await;
    let first = acquire(&server, "one").await;
    let second = stand(&server, waiting("one", LONG), 1).await;
    let third = stand(&server, waiting("one", LONG), 2).await;

    release(&server, &first.grant_id).await;
    let second = second.await.unwrap().unwrap();
    assert_eq!(second.decision(), Decision::Allow);
    assert!(second.waited.is_some(), "it says how long it stood");
    assert!(!third.is_finished());
    release(&server, &second.grant_id).await;
    assert_eq!(third.await.unwrap().unwrap().decision(), Decision::Allow);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn who_does_not_wait_has_to_wait_for_those_who_do() {
    let server = Server::start(CONFIG).await;
    assert_eq!(acquire(&server, "rate").await.decision(), Decision::Allow);
    let waiter = stand(&server, waiting("rate", LONG), 1).await;
    // The token is there again, and the head has not looked yet.
    server.advance(Duration::from_secs(1));
    let denied = acquire(&server, "rate").await;
    assert_eq!(denied.decision(), Decision::Deny, "it is the head's, or was");
    assert_eq!(denied.verdicts[0].reason(), Reason::RateLimited);
    assert_eq!(waiter.await.unwrap().unwrap().decision(), Decision::Allow);
    assert_eq!(remaining(&server, "rate", "").await, 0, "charged once");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn the_more_important_goes_first() {
    let server = Server::start(CONFIG).await;
    let first = acquire(&server, "one").await;
    let prioritised =
        |priority: Priority| AcquireRequest { priority: priority.into(), ..waiting("one", LONG) };
    let bulk = stand(&server, prioritised(Priority::Bulk), 1).await;
    let normal = stand(&server, prioritised(Priority::Normal), 2).await;
    let critical = stand(&server, prioritised(Priority::Critical), 3).await;
    let mut grant = first.grant_id;
    for next in [critical, normal, bulk] {
        release(&server, &grant).await;
        grant = next.await.unwrap().unwrap().grant_id;
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn who_goes_away_has_left_the_line_and_is_charged_nothing() {
    let server = Server::start(CONFIG).await;
    let first = acquire(&server, "one").await;
    let gone = stand(&server, waiting("one", LONG), 1).await;
    let next = stand(&server, waiting("one", LONG), 2).await;
    gone.abort();
    stands(&server, 1).await;
    release(&server, &first.grant_id).await;
    let next = next.await.unwrap().unwrap();
    assert_eq!(next.decision(), Decision::Allow);
    release(&server, &next.grant_id).await;
    assert_eq!(remaining(&server, "one", "").await, 1);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_wait_ends_with_a_denial_when_its_time_is_over() {
    let server = Server::start(CONFIG).await;
    acquire(&server, "one").await;
    let answer = server.raw().await.acquire(waiting("one", Duration::from_millis(5))).await;
    let answer = answer.unwrap().into_inner();
    assert_eq!(answer.decision(), Decision::Deny);
    assert_eq!(answer.verdicts[0].reason(), Reason::ConcurrencyLimited);
    assert!(answer.waited.is_some());
    stands(&server, 0).await;
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_full_line_says_so_at_once() {
    let server = Server::start(CONFIG).await;
    acquire(&server, "short").await;
    let waiter = stand(&server, waiting("short", LONG), 1).await;
    let answer = server.raw().await.acquire(waiting("short", LONG)).await.unwrap().into_inner();
    assert_eq!(answer.verdicts[0].reason(), Reason::LineFull);
    let metrics = server.http("/metrics").await.1;
    let counted = "policy=\"short\",reason=\"line_full\"} 1\n";
    assert!(metrics.contains(counted), "{metrics}");
    waiter.abort();
    server.stop().await.unwrap();
}

#[tokio::test]
async fn nobody_waits_for_what_never_comes() {
    let server = Server::start(CONFIG).await;
    let answer = server.raw().await.acquire(waiting("closed", LONG)).await.unwrap().into_inner();
    assert_eq!(answer.verdicts[0].reason(), Reason::Blocked);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_drain_empties_the_line() {
    let server = Server::start(CONFIG).await;
    acquire(&server, "one").await;
    let waiter = stand(&server, waiting("one", LONG), 1).await;
    server.ask_to_stop();
    assert_eq!(waiter.await.unwrap().unwrap_err().code(), Code::Unavailable);
    server.ended().await.unwrap();
}

#[tokio::test]
async fn only_one_ask_waits_and_not_for_ever() {
    let server = Server::start(CONFIG).await;
    let mut client = server.raw().await;
    let two = AcquireRequest {
        asks: vec![ask("one", "", 1), ask("rate", "", 1)],
        ..waiting("one", LONG)
    };
    let hour = waiting("one", Duration::from_secs(3_600));
    let negative = AcquireRequest {
        max_wait: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
        ..waiting("one", LONG)
    };
    for wrong in [two, hour, negative] {
        let status = client.acquire(wrong).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with("max_wait: "), "{}", status.message());
    }
    assert_eq!(remaining(&server, "one", "").await, 1);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_permit_whose_answer_cannot_be_delivered_is_back_at_once() {
    let server = Server::start(CONFIG).await;
    // A client that has no room for an answer.
    let endpoint = Endpoint::from_shared(format!("http://{}", server.grpc)).unwrap();
    let channel: Channel = endpoint.initial_stream_window_size(0).connect().await.unwrap();
    let mut deaf = ResilienceClient::new(channel);
    let call = tokio::spawn(async move { deaf.acquire(request([ask("one", "", 1)])).await });
    eventually("it is held", async || remaining(&server, "one", "").await == 0).await;
    call.abort();
    eventually("it is back", async || remaining(&server, "one", "").await == 1).await;
    server.stop().await.unwrap();
}
