//! Several limits on one key, asked as one.

use std::sync::Arc;

use fusebox_proto::v1::{Ask, Decision, GrantOutcome, Reason, ReportResult};
use fusebox_tests::{ManualClock, Server, Simulated};

use crate::{
    ask,
    caller::{Caller, config, ended, seconds, serve},
    request,
};

/// Ten a second; of them 15 an hour and 40 a day.
const API: &str = "api: {max_debt: 5, limits: [
    {token_bucket: {limit: 10, per: 1s}},
    {fixed_window: {limit: 15, per: 1h}},
    {calendar_window: {limit: 40, every: day}}]}";

/// 14:13:20 until 15:00.
const UNTIL_THE_HOUR: u64 = 2_800;
const UNTIL_MIDNIGHT: u64 = UNTIL_THE_HOUR + 9 * 3_600;

#[tokio::test]
async fn the_verdict_is_that_of_the_tightest_limit_and_all_are_charged_or_none() {
    let server = serve(API).await;
    let mut caller = Caller::of(&server).await;
    let peek = caller.ask("api", "a", 0).await;
    assert_eq!((peek.limit, peek.remaining), (10, 10));
    let first = caller.ask("api", "a", 8).await;
    assert_eq!((first.allowed, first.limit, first.remaining), (true, 10, 2));

    // The second is up sooner than the hour is over, so it is the hour's denial that counts.
    let denied = caller.ask("api", "a", 8).await;
    assert_eq!((denied.allowed, denied.reason), (false, Reason::RateLimited));
    assert_eq!((denied.limit, denied.remaining), (15, 7));
    assert_eq!(denied.retry_after, Some(seconds(UNTIL_THE_HOUR)));
    let denied = caller.ask("api", "a", 3).await;
    assert_eq!((denied.remaining, denied.retry_after), (2, Some(seconds(1) / 10)));

    server.advance(seconds(1));
    let second = caller.ask("api", "a", 7).await;
    assert_eq!((second.allowed, second.limit, second.remaining), (true, 15, 0));
    server.advance(seconds(1));
    let denied = caller.acquire(request([ask("api", "a", 10), ask("api", "b", 1)])).await;
    assert_eq!(denied.decision(), Decision::Deny);
    assert_eq!(denied.verdicts[1].remaining, Some(10), "and nothing is charged elsewhere");
    server.advance(seconds(UNTIL_THE_HOUR));
    for _ in 0..15 {
        assert!(caller.ask("api", "a", 1).await.allowed);
        server.advance(seconds(1));
    }
    server.advance(seconds(3_600));
    let denied = caller.ask("api", "a", 10).await;
    assert!(denied.allowed, "30 of 40: {denied:?}");
    server.advance(seconds(3_600));
    let denied = caller.ask("api", "a", 1).await;
    assert_eq!((denied.limit, denied.remaining, denied.allowed), (40, 0, false));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_report_settles_each_limit() {
    let server = serve(API).await;
    let mut caller = Caller::of(&server).await;
    let estimate = |key, cost| Ask { estimated: true, ..ask("api", key, cost) };
    let grant = caller.grant(estimate("a", 10)).await;
    assert_eq!(caller.left("api", "a").await, 0);
    let told = |actual, grant: &str| GrantOutcome { actual_cost: Some(actual), ..ended(grant) };
    assert_eq!(caller.report(told(4, &grant)).await, ReportResult::Applied);
    assert_eq!(caller.left("api", "a").await, 6);
    server.advance(seconds(1));
    // The hour has eleven left, and would have five if nothing had come back.
    assert!(caller.ask("api", "a", 10).await.allowed);
    assert!(!caller.ask("api", "a", 2).await.allowed);

    let grant = caller.grant(estimate("b", 10)).await;
    assert_eq!(caller.report(told(1_000, &grant)).await, ReportResult::Applied);
    // Each owes all it has and the debt on top, so the day is what takes longest.
    let denied = caller.ask("api", "b", 1).await;
    assert_eq!((denied.limit, denied.retry_after), (40, Some(seconds(UNTIL_MIDNIGHT - 1))));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_cost_above_the_smallest_is_never_possible() {
    let server = serve(API).await;
    let mut caller = Caller::of(&server).await;
    let refused = caller.refused(request([ask("api", "a", 11)])).await;
    assert!(refused.ends_with("grants at most 10 at once"), "{refused}");
    assert_eq!(caller.left("api", "a").await, 10);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn each_limit_outlives_a_crash() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config(API)).await;
    assert!(Caller::of(&server).await.ask("api", "a", 10).await.allowed);
    journal.lose_power();
    server.stop().await.unwrap_err();
    clock.advance(seconds(10));
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config(API)).await;
    let mut caller = Caller::of(&server).await;
    // Also the bucket, which fills in a second: it is kept beside a slow one, and so it does not start empty.
    let left = caller.ask("api", "a", 0).await;
    assert_eq!((left.limit, left.remaining), (15, 5));
    server.stop().await.unwrap();
}
