//! Every kind of limiter: what it allows, and what it tells of a denial.

use fusebox_proto::v1::{AcquireRequest, Reason};

use crate::{
    ask,
    caller::{Caller, Said, said, seconds, serve},
    request,
};

/// 14:13:20 UTC on a Monday in September, at which the clock of the tests starts.
const SINCE_THE_HOUR: u64 = 800;
const SINCE_MIDNIGHT: u64 = 14 * 3_600 + SINCE_THE_HOUR;
const DAY: u64 = 24 * 3_600;

/// A denial of a rate that is told to be over after so many seconds.
fn limited(limit: u64, remaining: u64, retry_after: u64, reset_after: u64) -> Said {
    Said {
        allowed: false,
        reason: Reason::RateLimited,
        limit,
        remaining,
        retry_after: Some(seconds(retry_after)),
        reset_after: seconds(reset_after),
    }
}

fn allowed(limit: u64, remaining: u64, reset_after: u64) -> Said {
    let reason = Reason::Unspecified;
    let reset_after = seconds(reset_after);
    Said { allowed: true, reason, limit, remaining, retry_after: None, reset_after }
}

#[tokio::test]
async fn a_token_bucket_fills_by_its_rate() {
    let server = serve("api: {token_bucket: {limit: 1, per: 2s, burst: 5}}").await;
    let mut caller = Caller::of(&server).await;
    assert_eq!(caller.ask("api", "a", 4).await, allowed(5, 1, 8));
    assert_eq!(caller.ask("api", "a", 3).await, limited(5, 1, 4, 8));
    server.advance(seconds(4));
    assert_eq!(caller.ask("api", "a", 3).await, allowed(5, 0, 10));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_sliding_window_counts_any_stretch_of_time() {
    let server = serve("api: {sliding_window: {limit: 6, per: 6s}}").await;
    let mut caller = Caller::of(&server).await;
    assert_eq!(caller.ask("api", "a", 4).await, allowed(6, 2, 7));
    server.advance(seconds(3));
    assert_eq!(caller.ask("api", "a", 2).await, allowed(6, 0, 7));
    // The four leave with the slice that they are in: one second after the stretch that they began.
    assert_eq!(caller.ask("api", "a", 1).await, limited(6, 0, 4, 7));
    assert_eq!(caller.ask("api", "a", 5).await, limited(6, 0, 7, 7));
    server.advance(seconds(4) - std::time::Duration::from_nanos(1));
    assert!(!caller.ask("api", "a", 1).await.allowed);
    server.advance(std::time::Duration::from_nanos(1));
    assert_eq!(caller.ask("api", "a", 4).await, allowed(6, 0, 7));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_fixed_window_begins_anew_by_the_clock() {
    let server = serve("api: {fixed_window: {limit: 10, per: 1h}}").await;
    let mut caller = Caller::of(&server).await;
    let left = 3_600 - SINCE_THE_HOUR;
    assert_eq!(caller.ask("api", "a", 7).await, allowed(10, 3, left));
    assert_eq!(caller.ask("api", "a", 4).await, limited(10, 3, left, left));
    server.advance(seconds(left - 1));
    assert_eq!(caller.ask("api", "a", 4).await, limited(10, 3, 1, 1));
    server.advance(seconds(1));
    assert_eq!(caller.ask("api", "a", 4).await, allowed(10, 6, 3_600));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_calendar_window_begins_where_the_people_are() {
    let server = serve(
        "day: {calendar_window: {limit: 10, every: day}},
        here: {calendar_window: {limit: 10, every: day, time_zone: Europe/Vienna}},
        week: {calendar_window: {limit: 10, every: week}},
        month: {calendar_window: {limit: 10, every: month}},
        year: {calendar_window: {limit: 10, every: year}}",
    )
    .await;
    let mut caller = Caller::of(&server).await;
    // The 21st of September, a Monday; in Vienna it is two hours later.
    let midnight = DAY - SINCE_MIDNIGHT;
    let (week, month) = (midnight + 6 * DAY, midnight + 9 * DAY);
    let ends = [
        ("day", midnight),
        ("here", midnight - 2 * 3_600),
        ("week", week),
        ("month", month),
        ("year", month + (31 + 30 + 31) * DAY),
    ];
    for (policy, left) in ends {
        assert_eq!(caller.ask(policy, "a", 9).await, allowed(10, 1, left), "{policy}");
        assert_eq!(caller.ask(policy, "a", 2).await, limited(10, 1, left, left), "{policy}");
    }
    server.advance(seconds(midnight));
    assert_eq!(caller.ask("day", "a", 2).await, allowed(10, 8, DAY));
    assert_eq!(caller.ask("here", "a", 2).await, allowed(10, 8, DAY - 2 * 3_600));
    assert!(!caller.ask("week", "a", 2).await.allowed);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn permits_are_held_by_so_many_at_once() {
    let server = serve("calls: {concurrency: {limit: 3, ttl: 10s}}").await;
    let mut caller = Caller::of(&server).await;
    assert_eq!(caller.ask("calls", "a", 2).await, allowed(3, 1, 10));
    let full = Said {
        allowed: false,
        reason: Reason::ConcurrencyLimited,
        limit: 3,
        remaining: 1,
        retry_after: None,
        reset_after: seconds(10),
    };
    assert_eq!(caller.ask("calls", "a", 2).await, full, "nobody knows when a call ends");
    assert_eq!(caller.ask("calls", "b", 3).await, allowed(3, 0, 10));
    server.stop().await.unwrap();
}

/// The attempt of a call, `0` the first.
fn attempt(policy: &str, attempt: u32) -> AcquireRequest {
    AcquireRequest { attempt, ..request([ask(policy, "a", 1)]) }
}

#[tokio::test]
async fn retries_are_a_share_of_the_requests_and_a_few_besides() {
    let server = serve(
        "share: {retry_budget: {ratio: 20%, min_per_second: 0, ttl: 6s}},
        few: {retry_budget: {ratio: 0%, min_per_second: 1, ttl: 6s}}",
    )
    .await;
    let mut caller = Caller::of(&server).await;
    let mut tries = async |policy, number| {
        let answer = caller.acquire(attempt(policy, number)).await;
        assert_eq!(answer.grant_id, "", "nothing is owed");
        said(&answer.verdicts[0])
    };
    let refused = tries("share", 1).await;
    assert_eq!((refused.allowed, refused.reason), (false, Reason::RetryBudgetExhausted));
    assert_eq!(refused.retry_after, None, "waiting earns nothing");
    for first in 0..10 {
        let said = tries("share", 0).await;
        assert!(said.allowed, "a first attempt is never refused");
        assert_eq!(said.remaining, (first + 1) / 5);
    }
    let retries = [tries("share", 1).await, tries("share", 2).await, tries("share", 1).await];
    assert_eq!(
        retries.map(|said| (said.allowed, said.remaining)),
        [(true, 1), (true, 0), (false, 0)]
    );

    for _ in 0..6 {
        assert!(tries("few", 1).await.allowed);
    }
    let refused = tries("few", 1).await;
    assert_eq!((refused.reason, refused.remaining), (Reason::RetryBudgetExhausted, 0));
    assert_eq!(refused.retry_after, Some(seconds(7)), "when those of now are forgotten");
    server.advance(seconds(7));
    assert!(tries("few", 1).await.allowed);
    assert!(!tries("share", 1).await.allowed, "requests are forgotten as well");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_limit_of_zero_denies_all_of_any_kind() {
    let server = serve(
        "bucket: {token_bucket: {limit: 0, per: 1s}},
        sliding: {sliding_window: {limit: 0, per: 1s}},
        fixed: {fixed_window: {limit: 0, per: 1h}},
        calendar: {calendar_window: {limit: 0, every: day}},
        permits: {concurrency: {limit: 0}}",
    )
    .await;
    let mut caller = Caller::of(&server).await;
    for policy in ["bucket", "sliding", "fixed", "calendar", "permits"] {
        let said = caller.ask(policy, "a", 1).await;
        assert_eq!((said.allowed, said.reason), (false, Reason::Blocked), "{policy}");
        assert_eq!((said.limit, said.remaining, said.retry_after), (0, 0, None), "{policy}");
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_cost_above_any_kind_of_limit_is_never_possible_and_charges_nothing() {
    let server = serve(
        "bucket: {token_bucket: {limit: 9, per: 1s, burst: 3}},
        sliding: {sliding_window: {limit: 3, per: 1s}},
        fixed: {fixed_window: {limit: 3, per: 1h}},
        calendar: {calendar_window: {limit: 3, every: day}},
        permits: {concurrency: {limit: 3}}",
    )
    .await;
    let mut caller = Caller::of(&server).await;
    for policy in ["bucket", "sliding", "fixed", "calendar", "permits"] {
        let refused = caller.refused(request([ask(policy, "a", 4)])).await;
        let words = format!("policy `{policy}` grants at most 3 at once");
        assert!(refused.starts_with("asks[0].cost: ") && refused.contains(&words), "{refused}");
        assert_eq!(caller.left(policy, "a").await, 3);
    }
    server.stop().await.unwrap();
}
