//! Limits of some keys, and policies that only watch.

use std::sync::Arc;

use fusebox_proto::v1::{Ask, Decision, Reason};
use fusebox_server::storage::journal::Keyspace;
use fusebox_tests::{ManualClock, Server, Simulated};

use crate::{
    ask,
    caller::{Caller, config, seconds, serve},
    request,
};

#[tokio::test]
async fn the_key_itself_comes_before_the_longest_prefix() {
    let server = serve(
        "api: {fixed_window: {limit: 3, per: 1h}, overrides: [
            {prefix: batch/, fixed_window: {limit: 10, per: 1h}},
            {prefix: batch/slow/, token_bucket: {limit: 1, per: 1m}},
            {key: batch/slow/vip, fixed_window: {limit: 50, per: 1h}},
            {key: '', concurrency: {limit: 7}},
            {key: closed, fixed_window: {limit: 0, per: 1h}}]}",
    )
    .await;
    let mut caller = Caller::of(&server).await;
    for (key, limit) in [
        ("a", 3),
        ("batch", 3),
        ("batch/", 10),
        ("batch/a", 10),
        ("batch/slow", 10),
        ("batch/slow/", 1),
        ("batch/slow/a", 1),
        ("batch/slow/vip", 50),
        ("batch/slow/vip2", 1),
        ("", 7),
        ("closed", 0),
    ] {
        let peek = caller.ask("api", key, 0).await;
        assert_eq!((peek.limit, peek.remaining), (limit, limit), "{key}");
    }
    assert!(caller.ask("api", "batch/a", 10).await.allowed);
    assert!(caller.ask("api", "batch/b", 10).await.allowed, "each key has its own");
    assert!(!caller.ask("api", "batch/a", 1).await.allowed);
    assert_eq!(caller.ask("api", "closed", 1).await.reason, Reason::Blocked);
    let refused = caller.refused(request([ask("api", "batch/slow/a", 2)])).await;
    assert!(refused.starts_with("asks[0].cost: "), "{refused}");
    caller.grant(ask("api", "", 7)).await;
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_key_that_is_not_written_any_more_starts_empty_after_a_crash() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let start = async |overrides: &str| {
        let policy = format!("api: {{token_bucket: {{limit: 10, per: 1h}}{overrides}}}");
        Server::start_on(journal.open(), Arc::clone(&clock), &config(&policy)).await
    };
    let server = start("").await;
    assert!(Caller::of(&server).await.ask("api", "vip", 3).await.allowed);
    server.stop().await.unwrap();
    let fast = ", overrides: [{key: vip, token_bucket: {limit: 100, per: 1s}}]";
    let server = start(fast).await;
    for cost in [1, 96] {
        assert!(Caller::of(&server).await.ask("api", "vip", cost).await.allowed);
    }
    journal.kill();
    server.stop().await.unwrap_err();
    // Not with what the slow one had written of it.
    let server = start(fast).await;
    assert_eq!(Caller::of(&server).await.left("api", "vip").await, 0);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_key_that_is_overridden_keeps_what_it_has_spent() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let start = async |overrides: &str| {
        let policy = format!("api: {{fixed_window: {{limit: 10, per: 1h}}{overrides}}}");
        Server::start_on(journal.open(), Arc::clone(&clock), &config(&policy)).await
    };
    let server = start("").await;
    assert!(Caller::of(&server).await.ask("api", "vip", 8).await.allowed);
    server.stop().await.unwrap();
    let raised = ", overrides: [{key: vip, fixed_window: {limit: 100, per: 1h}}]";
    for (overrides, left) in [(raised, 92), ("", 2)] {
        let server = start(overrides).await;
        assert_eq!(Caller::of(&server).await.left("api", "vip").await, left, "{overrides}");
        server.stop().await.unwrap();
    }
}

const WATCHING: &str = "api: {token_bucket: {limit: 3, per: 1m}, shadow: true},
    calls: {concurrency: {limit: 3}, shadow: true},
    real: {fixed_window: {limit: 5, per: 1h}}";

#[tokio::test]
async fn what_only_watches_allows_and_says_why_it_would_not_have() {
    let server = serve(WATCHING).await;
    let mut caller = Caller::of(&server).await;
    let first = caller.acquire(request([ask("api", "a", 3)])).await;
    assert_eq!((first.verdicts[0].reason(), first.verdicts[0].shadow), (Reason::Unspecified, true));
    let both = caller.acquire(request([ask("api", "a", 1), ask("real", "a", 4)])).await;
    assert_eq!(both.decision(), Decision::Allow);
    let watched = &both.verdicts[0];
    assert_eq!((watched.decision(), watched.reason()), (Decision::Allow, Reason::RateLimited));
    assert!(watched.shadow && !both.verdicts[1].shadow);
    // It is no error either, and what denies still does.
    let never = caller.acquire(request([ask("api", "a", 1_000), ask("real", "a", 2)])).await;
    assert_eq!(never.decision(), Decision::Deny);
    assert_eq!(never.verdicts[0].decision(), Decision::Allow);
    assert_eq!(caller.left("real", "a").await, 1);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_only_watches_takes_no_permit_and_owes_nothing() {
    let server = serve(WATCHING).await;
    let mut caller = Caller::of(&server).await;
    let estimated = Ask { estimated: true, ..ask("api", "a", 1) };
    for ask in [ask("calls", "a", 2), ask("calls", "a", 2), estimated] {
        let answer = caller.acquire(request([ask])).await;
        assert_eq!((answer.decision(), answer.grant_id.as_str()), (Decision::Allow, ""));
        assert_eq!(answer.verdicts[0].expires_in, None);
    }
    assert_eq!(caller.left("calls", "a").await, 3);
    assert_eq!(caller.left("api", "a").await, 2);
    server.advance(seconds(20));
    assert_eq!(caller.left("api", "a").await, 3, "nothing is out");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_only_watches_is_not_written() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), clock, &config(WATCHING)).await;
    let mut caller = Caller::of(&server).await;
    assert!(caller.ask("api", "a", 3).await.allowed);
    assert!(caller.ask("real", "a", 3).await.allowed);
    assert_eq!(journal.records(Keyspace::Cells), 1);
    server.stop().await.unwrap();
}
