//! More keys than a policy has cells for.

use std::sync::Arc;

use fusebox_proto::v1::{Reason, ReportResult};
use fusebox_tests::{ManualClock, Server, Simulated};

use crate::{
    ask,
    caller::{Caller, config, ended, seconds, serve},
};

const SMALL: &str = "api: {token_bucket: {limit: 3, per: 1m}, max_cells: 2, overrides: [
        {key: vip, token_bucket: {limit: 50, per: 1m}},
        {prefix: batch/, token_bucket: {limit: 5, per: 1m}}]},
    calls: {concurrency: {limit: 3, ttl: 10s}, max_cells: 1}";

#[tokio::test]
async fn keys_past_the_budget_share_one_bucket_and_say_so() {
    let server = serve(SMALL).await;
    let mut caller = Caller::of(&server).await;
    for key in ["a", "b"] {
        assert!(caller.ask("api", key, 1).await.allowed);
    }
    assert_eq!(caller.ask("api", "c", 2).await.remaining, 1);
    let denied = caller.ask("api", "d", 2).await;
    assert_eq!((denied.allowed, denied.reason), (false, Reason::OverflowBucket));
    assert_eq!((denied.limit, denied.remaining), (3, 1));
    assert_eq!(denied.retry_after, Some(seconds(20)));
    assert_eq!(caller.ask("api", "d", 1).await.remaining, 0);

    // Those that have their own keep it, and are denied for what they did themselves.
    assert_eq!(caller.ask("api", "a", 2).await.remaining, 0);
    assert_eq!(caller.ask("api", "a", 1).await.reason, Reason::RateLimited);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn overridden_keys_do_not_share_with_the_crowd() {
    let server = serve(SMALL).await;
    let mut caller = Caller::of(&server).await;
    for key in ["a", "b", "c"] {
        assert!(caller.ask("api", key, 3).await.allowed);
    }
    assert_eq!(caller.ask("api", "vip", 10).await.remaining, 40);
    assert_eq!(caller.ask("api", "batch/a", 3).await.remaining, 2);
    let denied = caller.ask("api", "batch/b", 3).await;
    assert_eq!((denied.reason, denied.remaining), (Reason::OverflowBucket, 2));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn permits_of_the_crowd_are_released_and_nobody_has_them_twice() {
    let server = serve(SMALL).await;
    let mut caller = Caller::of(&server).await;
    let own = caller.grant(ask("calls", "a", 1)).await;
    let shared = caller.grant(ask("calls", "b", 2)).await;
    let denied = caller.ask("calls", "c", 2).await;
    assert_eq!((denied.allowed, denied.reason), (false, Reason::OverflowBucket));
    assert_eq!(caller.report(ended(&own)).await, ReportResult::Applied);
    assert_eq!(caller.left("calls", "b").await, 1, "as long as the crowd holds some");
    assert_eq!(caller.report(ended(&shared)).await, ReportResult::Applied);
    assert_eq!(caller.left("calls", "b").await, 3);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_crash_gives_nobody_a_fresh_bucket() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let config = config(SMALL);
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config).await;
    let mut caller = Caller::of(&server).await;
    for key in ["a", "b", "c"] {
        assert!(caller.ask("api", key, 3).await.allowed);
    }
    journal.lose_power();
    server.stop().await.unwrap_err();
    let server = Server::start_on(journal.open(), clock, &config).await;
    let mut caller = Caller::of(&server).await;
    for key in ["c", "d"] {
        let denied = caller.ask("api", key, 1).await;
        assert_eq!((denied.allowed, denied.reason), (false, Reason::OverflowBucket), "{key}");
    }
    server.stop().await.unwrap();
}
