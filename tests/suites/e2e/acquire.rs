//! Asking.

use std::time::Duration;

use fusebox_client::unary::{Ask, Client, Reason};
use fusebox_proto::v1::{AcquireRequest, AcquireResponse, Decision};
use fusebox_tests::Server;
use tonic::Code;

use crate::{CONFIG, ask, batch, remaining, request};

#[tokio::test]
async fn a_denied_call_is_allowed_at_the_time_it_was_told_and_not_before() {
    let server = Server::start(CONFIG).await;
    let client = server.client("test").await;
    let two = || [Ask::new("three", "alice").cost(2)];

    let first = client.acquire(two()).await.unwrap();
    assert!(first.allowed);
    assert_eq!(first.grant_id, None, "a plain allow owes nothing");
    assert_eq!(first.verdicts[0].remaining, Some(1));
    assert_eq!(first.verdicts[0].limit, Some(3));
    assert_eq!(first.verdicts[0].reset_after, Some(Duration::from_secs(40)));

    let second = client.acquire(two()).await.unwrap();
    assert!(!second.allowed);
    assert_eq!(second.verdicts[0].reason, Some(Reason::RateLimited));
    let wait = second.retry_after().unwrap();
    assert_eq!(wait, Duration::from_secs(20));

    server.advance(wait - Duration::from_nanos(1));
    assert!(!client.acquire(two()).await.unwrap().allowed);
    server.advance(Duration::from_nanos(1));
    assert!(client.acquire(two()).await.unwrap().allowed);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn one_denial_charges_nothing_anywhere() {
    let server = Server::start(CONFIG).await;
    let client = server.client("test").await;
    let both = || [Ask::new("hundred", "a").cost(10), Ask::new("three", "a").cost(3)];

    assert!(client.acquire(both()).await.unwrap().allowed);
    let denied = client.acquire(both()).await.unwrap();
    assert!(!denied.allowed);
    assert!(denied.verdicts[0].allowed, "each verdict answers for its own ask");
    assert_eq!(denied.verdicts[0].remaining, Some(90), "and tells what is left uncharged");
    assert_eq!(remaining(&server, "hundred", "a").await, 90);
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_are_admitted_than_there_are_tokens_however_many_ask() {
    let server = Server::start(CONFIG).await;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let client = server.client("test").await;
        for _ in 0..25 {
            let client = client.clone();
            callers.spawn(async move {
                let asks = [Ask::new("hundred", "a"), Ask::new("hundred", "b")];
                client.acquire(asks).await.unwrap().allowed
            });
        }
    }
    let admitted = callers.join_all().await.into_iter().filter(|allowed| *allowed).count();
    assert_eq!(admitted, 100);
    assert_eq!(remaining(&server, "hundred", "a").await, 0);
    assert_eq!(remaining(&server, "hundred", "b").await, 0);
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_callers_at_once_charge_nothing_where_one_ask_is_denied() {
    let server = Server::start(CONFIG).await;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let client = server.client("test").await;
        callers.spawn(async move {
            let asks = [Ask::new("hundred", "a"), Ask::new("three", "a")];
            client.acquire(asks).await.unwrap().allowed
        });
    }
    let admitted = callers.join_all().await.into_iter().filter(|allowed| *allowed).count();
    assert_eq!(admitted, 3);
    assert_eq!(remaining(&server, "hundred", "a").await, 97);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn keys_that_look_alike_are_different_buckets() {
    let server = Server::start(CONFIG).await;
    let client = server.client("test").await;
    let long = "k".repeat(256);
    for key in ["", "a", "A", "a ", "a\0", "\0a", "\u{e9}", "e\u{301}", "a/b", "a.b", &long] {
        let acquired = client.acquire([Ask::new("three", key).cost(3)]).await.unwrap();
        assert!(acquired.allowed, "{key:?}");
    }
    let other = server.client("other").await;
    assert!(other.acquire([Ask::new("three", "a").cost(3)]).await.unwrap().allowed);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_limit_of_zero_denies_and_no_wait_mends_it() {
    let server = Server::start(CONFIG).await;
    let client = server.client("test").await;
    let denied = client.acquire([Ask::new("closed", "a")]).await.unwrap();
    assert!(!denied.allowed);
    assert_eq!(denied.verdicts[0].reason, Some(Reason::Blocked));
    assert_eq!(denied.retry_after(), None);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_zero_is_seen() {
    let server = Server::start(CONFIG).await;
    let mut raw = server.raw().await;
    let answer = raw.acquire(request([ask("three", "a", 3)])).await.unwrap().into_inner();
    assert_eq!(answer.verdicts[0].remaining, Some(0));
    // Unset is one token.
    let mut unset = ask("three", "b", 0);
    unset.cost = None;
    let answer = raw.acquire(request([unset])).await.unwrap().into_inner();
    assert_eq!(answer.verdicts[0].remaining, Some(2));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_client_says_where_nobody_answers() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (endpoint, cause) in
        [(format!("http://{nobody}"), "refused"), ("not an address".to_owned(), "invalid uri")]
    {
        let error = Client::connect(&endpoint, "test").await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot connect to {endpoint}: ")), "{error}");
        assert!(error.to_lowercase().contains(cause), "{error}");
    }
}

fn entry(asks: impl IntoIterator<Item = fusebox_proto::v1::Ask>) -> AcquireRequest {
    AcquireRequest { namespace: String::new(), ..request(asks) }
}

#[tokio::test]
async fn entries_of_a_batch_are_decided_in_order() {
    let server = Server::start(CONFIG).await;
    let requests = vec![
        entry([ask("three", "a", 2)]),
        entry([ask("three", "a", 2)]),
        entry([ask("three", "a", 1), ask("hundred", "a", 100)]),
        entry([ask("hundred", "a", 1)]),
    ];
    let answer = server.raw().await.acquire_batch(batch(requests)).await.unwrap().into_inner();
    let decisions: Vec<_> = answer.responses.iter().map(AcquireResponse::decision).collect();
    let (allow, deny) = (Decision::Allow, Decision::Deny);
    assert_eq!(decisions, [allow, deny, allow, deny]);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn one_wrong_entry_fails_the_batch_before_anything_is_charged() {
    let server = Server::start(CONFIG).await;
    let mut raw = server.raw().await;
    let fine = || entry([ask("three", "a", 1)]);
    for (wrong, code, field) in [
        (entry([]), Code::InvalidArgument, "requests[1].asks"),
        (request([ask("three", "a", 1)]), Code::InvalidArgument, "requests[1].namespace"),
        (entry([ask("three", "a", 4)]), Code::InvalidArgument, "requests[1].asks[0].cost"),
        (entry([ask("none", "a", 4)]), Code::NotFound, "unknown policy `none`"),
    ] {
        let refused = raw.acquire_batch(batch(vec![fine(), wrong])).await.unwrap_err();
        assert_eq!(refused.code(), code, "{refused}");
        assert!(refused.message().contains(field), "{refused}");
    }
    assert_eq!(remaining(&server, "three", "a").await, 3);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_batch_has_an_end() {
    let server = Server::start(CONFIG).await;
    let mut raw = server.raw().await;
    let many = |entries: usize, asks: usize| {
        let asks = || (0..asks).map(|key| ask("hundred", &key.to_string(), 1));
        batch((0..entries).map(|_| entry(asks())).collect())
    };
    for (entries, asks) in [(0, 1), (1_001, 1), (257, 16)] {
        let refused = raw.acquire_batch(many(entries, asks)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().starts_with("requests:"), "{refused}");
    }
    let answer = raw.acquire_batch(many(1_000, 4)).await.unwrap().into_inner();
    assert_eq!(answer.responses.len(), 1_000);
    let allowed = answer.responses.iter().filter(|one| one.decision() == Decision::Allow).count();
    assert_eq!(allowed, 100);
    server.stop().await.unwrap();
}
