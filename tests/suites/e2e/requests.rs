//! Asking twice under one id.

use std::time::Duration;

use fusebox_proto::v1::{
    AcquireBatchRequest, AcquireRequest, AcquireResponse, Ask, Client, Decision,
};
use fusebox_tests::{Server, eventually};
use tonic::Code;

use crate::{ask, remaining, request};

const CONFIG: &str = "
namespaces:
  test:
    policies:
      hundred: {token_bucket: {limit: 100, per: 1h}}
      one: {concurrency: {limit: 1, ttl: 10s}}
      leased: {token_bucket: {limit: 1000, per: 1s}, lease_time: 4s}
";

fn named(id: &str, asks: impl IntoIterator<Item = Ask>) -> AcquireRequest {
    let client = Some(Client { id: "client".into(), ..Default::default() });
    AcquireRequest { client, request_id: id.into(), ..request(asks) }
}

async fn acquire(server: &Server, request: AcquireRequest) -> AcquireResponse {
    server.raw().await.acquire(request).await.unwrap().into_inner()
}

#[tokio::test]
async fn a_repeated_request_is_charged_once_and_told_the_same() {
    let server = Server::start(CONFIG).await;
    let once = acquire(&server, named("a", [ask("hundred", "k", 30)])).await;
    let again = acquire(&server, named("a", [ask("hundred", "k", 30)])).await;
    assert_eq!(once, again);
    assert_eq!(remaining(&server, "hundred", "k").await, 70);
    acquire(&server, named("b", [ask("hundred", "k", 30)])).await;
    assert_eq!(remaining(&server, "hundred", "k").await, 40, "another id is another request");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_denial_is_not_remembered() {
    let server = Server::start(CONFIG).await;
    acquire(&server, named("a", [ask("hundred", "k", 100)])).await;
    let wanted = || named("b", [ask("hundred", "k", 1)]);
    assert_eq!(acquire(&server, wanted()).await.decision(), Decision::Deny);
    server.advance(Duration::from_secs(3_600));
    assert_eq!(acquire(&server, wanted()).await.decision(), Decision::Allow);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_repeated_answer_tells_what_is_left_of_its_lifetime() {
    let server = Server::start(CONFIG).await;
    let wanted = || named("a", [Ask { lease: 10, ..ask("leased", "k", 1) }]);
    let first = acquire(&server, wanted()).await;
    assert_eq!(first.verdicts[0].leased, 10);
    assert_eq!(first.verdicts[0].expires_in.unwrap().seconds, 4);
    server.advance(Duration::from_secs(1));
    let again = acquire(&server, wanted()).await;
    assert_eq!(again.grant_id, first.grant_id);
    assert_eq!(again.verdicts[0].expires_in.unwrap().seconds, 3);
    server.advance(Duration::from_secs(3));
    let later = acquire(&server, wanted()).await;
    assert_ne!(later.grant_id, first.grant_id, "what is over is forgotten, and asked for anew");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn another_request_under_the_same_id_is_refused_and_charges_nothing() {
    let server = Server::start(CONFIG).await;
    acquire(&server, named("a", [ask("hundred", "k", 30)])).await;
    let mut client = server.raw().await;
    for other in [
        named("a", [ask("hundred", "k", 31)]),
        named("a", [ask("hundred", "other", 30)]),
        AcquireRequest { attempt: 1, ..named("a", [ask("hundred", "k", 30)]) },
    ] {
        let status = client.acquire(other).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with("request_id: "), "{}", status.message());
    }
    assert_eq!(remaining(&server, "hundred", "k").await, 70);
    assert_eq!(remaining(&server, "hundred", "other").await, 100);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn an_id_is_a_clients_own() {
    let server = Server::start(CONFIG).await;
    let other = Some(Client { id: "other".into(), ..Default::default() });
    acquire(&server, named("a", [ask("hundred", "k", 30)])).await;
    let theirs = AcquireRequest { client: other, ..named("a", [ask("hundred", "k", 30)]) };
    acquire(&server, theirs).await;
    assert_eq!(remaining(&server, "hundred", "k").await, 40);

    let nobody = AcquireRequest { client: None, ..named("a", [ask("hundred", "k", 30)]) };
    let status = server.raw().await.acquire(nobody).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("client.id: "), "{}", status.message());
    server.stop().await.unwrap();
}

#[tokio::test]
async fn those_that_join_a_waiting_request_are_told_with_it_and_hold_one_permit() {
    let server = Server::start(CONFIG).await;
    let held = acquire(&server, named("held", [ask("one", "", 1)])).await;
    assert_eq!(held.decision(), Decision::Allow);
    let wanted = || AcquireRequest {
        max_wait: Some(prost_types::Duration { seconds: 50, nanos: 0 }),
        ..named("a", [ask("one", "", 1)])
    };
    let mut calls = Vec::new();
    for _ in 0..3 {
        let mut client = server.raw().await;
        calls.push(tokio::spawn(async move { client.acquire(wanted()).await }));
    }
    let line = "fusebox_waiting 1\n";
    eventually(line, async || server.http("/metrics").await.1.contains(line)).await;
    // The one that stands in line goes away; another one takes its place.
    server.advance(Duration::from_secs(10));
    let mut grants = Vec::new();
    for call in calls {
        grants.push(call.await.unwrap().unwrap().into_inner().grant_id);
    }
    assert!(!grants[0].is_empty());
    assert!(grants.iter().all(|grant| *grant == grants[0]), "{grants:?}");
    server.stop().await.unwrap();
}

fn batch(entries: Vec<AcquireRequest>) -> AcquireBatchRequest {
    let requests = entries
        .into_iter()
        .map(|entry| AcquireRequest { namespace: String::new(), client: None, ..entry })
        .collect();
    let client = Some(Client { id: "client".into(), ..Default::default() });
    AcquireBatchRequest { namespace: "test".into(), client, requests }
}

#[tokio::test]
async fn in_a_batch_each_entry_may_be_repeated() {
    let server = Server::start(CONFIG).await;
    let mut client = server.raw().await;
    let known = acquire(&server, named("known", [ask("hundred", "k", 10)])).await;
    let entries = || {
        vec![
            named("new", [ask("hundred", "k", 20)]),
            named("known", [ask("hundred", "k", 10)]),
            request([ask("hundred", "k", 1)]),
        ]
    };
    let first = client.acquire_batch(batch(entries())).await.unwrap().into_inner();
    assert_eq!(remaining(&server, "hundred", "k").await, 69);
    assert_eq!(first.responses[1], known);
    let again = client.acquire_batch(batch(entries())).await.unwrap().into_inner();
    assert_eq!(remaining(&server, "hundred", "k").await, 68, "but for the one without an id");
    assert_eq!(again.responses[..2], first.responses[..2]);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn an_entry_under_the_id_of_another_request_fails_its_batch() {
    let server = Server::start(CONFIG).await;
    acquire(&server, named("a", [ask("hundred", "k", 1)])).await;
    let other = vec![request([ask("hundred", "k", 5)]), named("a", [ask("hundred", "k", 2)])];
    let refused = server.raw().await.acquire_batch(batch(other)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().starts_with("requests[1].request_id: "), "{}", refused.message());
    assert_eq!(remaining(&server, "hundred", "k").await, 99);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn an_id_that_is_twice_in_a_batch_is_refused() {
    let server = Server::start(CONFIG).await;
    let twice = vec![named("a", [ask("hundred", "k", 1)]), named("a", [ask("hundred", "k", 1)])];
    let status = server.raw().await.acquire_batch(batch(twice)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("requests[1].request_id: "), "{}", status.message());
    assert_eq!(remaining(&server, "hundred", "k").await, 100);
    server.stop().await.unwrap();
}
