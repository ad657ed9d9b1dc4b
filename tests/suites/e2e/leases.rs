//! Leases: tokens that a client has ahead.

use std::time::Duration;

use fusebox_proto::v1::{
    AcquireRequest, AcquireResponse, Ask, Decision, GrantOutcome, Priority, ReportResult,
};
use fusebox_tests::eventually;

use crate::{
    ask,
    caller::{Caller, duration, ended, seconds, serve},
    request,
};

const BUCKETS: &str = "fast: {token_bucket: {limit: 100, per: 1s}},
    slow: {token_bucket: {limit: 3, per: 1s}}";

/// So many tokens ahead, and `cost` now.
fn lease(policy: &str, lease: u64, cost: u64) -> AcquireRequest {
    request([Ask { lease, ..ask(policy, "a", cost) }])
}

fn leased(answer: &AcquireResponse) -> u64 {
    assert_eq!(answer.decision(), Decision::Allow);
    let leased = answer.verdicts[0].leased;
    assert_eq!(answer.grant_id.is_empty(), leased == 0, "{answer:?}");
    leased
}

fn returned(grant_id: &str, lease_returned: u64) -> GrantOutcome {
    GrantOutcome { lease_returned, ..ended(grant_id) }
}

#[tokio::test]
async fn as_many_clients_can_lease_as_much_again() {
    let server = serve(BUCKETS).await;
    let mut one = Caller::named(&server, "one").await;
    let mut two = Caller::named(&server, "two").await;
    let first = one.acquire(lease("fast", 1_000, 0)).await;
    assert_eq!(leased(&first), 50);
    assert_eq!(duration(first.verdicts[0].expires_in), Some(seconds(1)));
    assert_eq!(first.verdicts[0].remaining, Some(50));
    assert_eq!(leased(&two.acquire(lease("fast", 1_000, 0)).await), 12);
    assert_eq!(leased(&two.acquire(lease("fast", 5, 2)).await), 5, "no more than it wants");
    assert_eq!(one.left("fast", "a").await, 31);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn nothing_is_leased_where_it_would_be_too_little() {
    let server = serve(BUCKETS).await;
    let mut one = Caller::named(&server, "one").await;
    let mut two = Caller::named(&server, "two").await;
    // Three in a lease time do for one client, who could have two; not for two.
    assert_eq!(leased(&one.acquire(lease("slow", 10, 0)).await), 1);
    assert_eq!(leased(&two.acquire(lease("slow", 10, 1)).await), 0);
    assert_eq!(one.left("slow", "a").await, 1, "what it costs is charged");
    // Who has not asked for a while is not counted any more, which is looked at now and then.
    server.advance(seconds(10));
    eventually("there is enough for the one who asks", async || {
        leased(&two.acquire(lease("slow", 10, 0)).await) == 1
    })
    .await;
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_was_not_spent_is_returned_once() {
    let server = serve("slow: {token_bucket: {limit: 1000, per: 1000s}, lease_time: 60s}").await;
    let mut caller = Caller::named(&server, "one").await;
    let grant = caller.acquire(lease("slow", 100, 0)).await.grant_id;
    assert_eq!(caller.left("slow", "a").await, 900);
    assert_eq!(caller.report(returned(&grant, 30)).await, ReportResult::Applied);
    assert_eq!(caller.left("slow", "a").await, 930);
    assert_eq!(caller.report(returned(&grant, 30)).await, ReportResult::Duplicate);

    let grant = caller.acquire(lease("slow", 100, 0)).await.grant_id;
    assert_eq!(caller.report(returned(&grant, 1_000)).await, ReportResult::Applied);
    assert_eq!(caller.left("slow", "a").await, 930, "no more than there was");
    let grant = caller.acquire(lease("slow", 100, 0)).await.grant_id;
    assert_eq!(caller.report(ended(&grant)).await, ReportResult::Applied);
    assert_eq!(caller.left("slow", "a").await, 830, "nothing said is all spent");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_is_out_does_not_flow_in_again_until_the_lease_is_over() {
    let server = serve(BUCKETS).await;
    let mut caller = Caller::named(&server, "one").await;
    let grant = caller.acquire(lease("fast", 40, 0)).await.grant_id;
    server.advance(Duration::from_millis(999));
    assert_eq!(caller.left("fast", "a").await, 60);
    assert_eq!(caller.renew(&grant).await, seconds(0), "a lease is not renewed");
    server.advance(Duration::from_millis(1));
    assert_eq!(caller.report(returned(&grant, 40)).await, ReportResult::UnknownGrant);
    eventually("the lease expires", async || {
        server.http("/metrics").await.1.contains("fusebox_open_grants 0")
    })
    .await;
    assert_eq!(caller.left("fast", "a").await, 60, "and stands as spent");
    server.advance(Duration::from_millis(300));
    assert_eq!(caller.left("fast", "a").await, 90);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_lease_of_a_long_window_ends_with_it() {
    let server = serve(
        "hour: {fixed_window: {limit: 36000, per: 1h}},
        half: {fixed_window: {limit: 36000, per: 30m}},
        sliding: {sliding_window: {limit: 36000, per: 1h}},
        mixed: {limits: [{token_bucket: {limit: 100, per: 1s}}, {sliding_window: {limit: 9000, per: 1h}}]},
        calls: {concurrency: {limit: 100}}, shadow: {token_bucket: {limit: 100, per: 1s}, shadow: true}",
    )
    .await;
    let mut caller = Caller::named(&server, "one").await;
    for policy in ["half", "sliding", "mixed", "calls", "shadow"] {
        let answer = caller.acquire(lease(policy, 10, 0)).await;
        assert_eq!(leased(&answer), 0, "{policy}");
    }
    // 14:13:20, and then half a second before 15:00.
    let answer = caller.acquire(lease("hour", 10, 0)).await;
    assert_eq!((leased(&answer), duration(answer.verdicts[0].expires_in)), (10, Some(seconds(1))));
    server.advance(seconds(46 * 60 + 39) + Duration::from_millis(500));
    let half = Duration::from_millis(500);
    let answer = caller.acquire(lease("hour", 10, 0)).await;
    assert_eq!((leased(&answer), duration(answer.verdicts[0].expires_in)), (10, Some(half)));
    assert_eq!(caller.left("hour", "a").await, 36_000 - 20);
    server.advance(half);
    assert_eq!(caller.left("hour", "a").await, 36_000);
    let late = caller.report(returned(&answer.grant_id, 10)).await;
    assert_eq!(late, ReportResult::UnknownGrant);
    assert_eq!(caller.left("hour", "a").await, 36_000);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn of_several_limits_each_leases_what_the_smallest_can() {
    let server = serve(
        "api: {limits: [{fixed_window: {limit: 36000, per: 1h}}, {token_bucket: {limit: 100, per: 1s}}]}",
    )
    .await;
    let mut caller = Caller::named(&server, "one").await;
    // Half a second before 15:00.
    server.advance(seconds(46 * 60 + 39) + Duration::from_millis(500));
    let answer = caller.acquire(lease("api", 1_000, 10)).await;
    assert_eq!(leased(&answer), 45, "half of what 10 of 100 leave");
    let verdict = &answer.verdicts[0];
    assert_eq!(duration(verdict.expires_in), Some(Duration::from_millis(500)), "the earliest end");
    assert_eq!((verdict.limit, verdict.remaining), (Some(100), Some(45)));
    assert_eq!(caller.report(returned(&answer.grant_id, 20)).await, ReportResult::Applied);
    assert_eq!(caller.left("api", "a").await, 65);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn leases_leave_what_the_lowest_priority_does() {
    let server =
        serve("api: {token_bucket: {limit: 100, per: 1s}, reserves: {critical: 20%, normal: 10%}}")
            .await;
    let mut caller = Caller::named(&server, "one").await;
    let request = AcquireRequest { priority: Priority::Critical.into(), ..lease("api", 1_000, 10) };
    let answer = caller.acquire(request).await;
    assert_eq!(leased(&answer), 30, "half of what 10 of 100 leave above 30");
    let verdict = &answer.verdicts[0];
    assert_eq!((verdict.limit, verdict.remaining), (Some(100), Some(60)), "of a critical caller");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_denied_acquire_leases_nothing() {
    let server = serve(BUCKETS).await;
    let mut caller = Caller::named(&server, "one").await;
    assert!(caller.ask("slow", "a", 3).await.allowed);
    let both = [Ask { lease: 10, ..ask("fast", "a", 1) }, ask("slow", "a", 1)];
    let answer = caller.acquire(request(both)).await;
    assert_eq!((answer.decision(), answer.grant_id.as_str()), (Decision::Deny, ""));
    assert_eq!(answer.verdicts[0].leased, 0);
    assert_eq!(answer.verdicts[0].remaining, Some(100));
    assert_eq!(caller.left("fast", "a").await, 100);
    server.stop().await.unwrap();
}
