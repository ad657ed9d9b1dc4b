//! Permits: released, expired, renewed, and taken over after a crash.

use std::sync::Arc;

use fusebox_proto::v1::{Decision, GrantOutcome, Reason, ReportResult};
use fusebox_tests::{ManualClock, Server, Simulated, eventually};

use crate::{
    ask,
    caller::{Caller, config, duration, ended, seconds, serve},
    request,
};

const CALLS: &str = "calls: {concurrency: {limit: 3, ttl: 10s}},
    tokens: {token_bucket: {limit: 10, per: 1m}}";

#[tokio::test]
async fn a_permit_that_is_released_is_there_for_others() {
    let server = serve(CALLS).await;
    let mut caller = Caller::of(&server).await;
    let answer = caller.acquire(request([ask("calls", "a", 2)])).await;
    assert_eq!(duration(answer.verdicts[0].expires_in), Some(seconds(10)));
    assert_eq!(caller.left("calls", "a").await, 1);
    let progress = GrantOutcome { partial: true, ..ended(&answer.grant_id) };
    assert_eq!(caller.report(progress).await, ReportResult::Applied);
    assert_eq!(caller.left("calls", "a").await, 1, "more will follow");

    assert_eq!(caller.report(ended(&answer.grant_id)).await, ReportResult::Applied);
    assert_eq!(caller.left("calls", "a").await, 3);
    assert_eq!(caller.report(ended(&answer.grant_id)).await, ReportResult::Duplicate);
    assert_eq!(caller.renew(&answer.grant_id).await, seconds(0));
    assert_eq!(caller.left("calls", "a").await, 3);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_permit_that_nobody_renews_expires() {
    let server = serve(CALLS).await;
    let mut caller = Caller::of(&server).await;
    let kept = caller.grant(ask("calls", "a", 1)).await;
    let left = caller.grant(ask("calls", "a", 2)).await;
    server.advance(seconds(9));
    assert_eq!(caller.renew(&kept).await, seconds(10));
    server.advance(seconds(1));
    assert_eq!(caller.renew(&left).await, seconds(0), "its time is over");
    assert_eq!(caller.report(ended(&left)).await, ReportResult::UnknownGrant);
    eventually("two of three are there again", async || caller.left("calls", "a").await == 2).await;
    assert_eq!(caller.report(ended(&kept)).await, ReportResult::Applied);
    assert_eq!(caller.left("calls", "a").await, 3);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn permits_and_tokens_are_taken_together_or_not_at_all() {
    let server = serve(CALLS).await;
    let mut caller = Caller::of(&server).await;
    let both = || request([ask("calls", "a", 3), ask("tokens", "a", 4)]);
    let first = caller.acquire(both()).await;
    assert_eq!(first.decision(), Decision::Allow);
    let denied = caller.acquire(both()).await;
    assert_eq!((denied.decision(), denied.grant_id.as_str()), (Decision::Deny, ""));
    assert_eq!(caller.left("tokens", "a").await, 6);
    assert_eq!(caller.report(ended(&first.grant_id)).await, ReportResult::Applied);
    assert_eq!(caller.left("calls", "a").await, 3);
    assert_eq!(caller.left("tokens", "a").await, 6, "tokens are spent");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn one_grant_holds_permits_and_an_estimate_each_for_its_time() {
    let server = serve(CALLS).await;
    let mut caller = Caller::of(&server).await;
    let estimated = fusebox_proto::v1::Ask { estimated: true, ..ask("tokens", "a", 6) };
    let answer = caller.acquire(request([ask("calls", "a", 3), estimated])).await;
    let lives: Vec<_> = answer.verdicts.iter().map(|one| duration(one.expires_in)).collect();
    assert_eq!(lives, [Some(seconds(10)), Some(seconds(600))]);
    server.advance(seconds(10));
    eventually("the permits expire", async || caller.left("calls", "a").await == 3).await;
    let told = GrantOutcome { actual_cost: Some(2), ..ended(&answer.grant_id) };
    assert_eq!(caller.report(told).await, ReportResult::Applied);
    // Four of six come back. One and two thirds flow in ten seconds; what is out does not.
    assert_eq!(caller.left("tokens", "a").await, 8);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_crash_forgets_whose_the_permits_are_and_not_that_they_are_held() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let config = config("calls: {concurrency: {limit: 4, ttl: 10s}}");
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config).await;
    let mut caller = Caller::of(&server).await;
    let told = caller.grant(ask("calls", "a", 1)).await;
    let silent = caller.grant(ask("calls", "a", 2)).await;
    journal.kill();
    server.stop().await.unwrap_err();

    clock.advance(seconds(2));
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config).await;
    let mut caller = Caller::named(&server, "one").await;
    assert_eq!(caller.left("calls", "a").await, 1);
    let denied = caller.ask("calls", "a", 2).await;
    assert_eq!((denied.allowed, denied.reason), (false, Reason::ConcurrencyLimited));
    assert_eq!(denied.retry_after, Some(seconds(10)), "the last of them has expired then");

    // Nobody else's, and not more than it was.
    for forged in [forged(&told, 3, "2"), forged(&told, 4, "0000000000000000"), "1-2".into()] {
        assert_eq!(caller.renew(&forged).await, seconds(0), "{forged}");
        assert_eq!(caller.report(ended(&forged)).await, ReportResult::UnknownGrant);
    }
    assert_eq!(caller.report(ended(&silent)).await, ReportResult::UnknownGrant);
    assert_eq!(caller.left("calls", "a").await, 1);

    server.advance(seconds(5));
    assert_eq!(caller.renew(&told).await, seconds(10));
    assert_eq!(caller.renew(&told).await, seconds(10));
    assert_eq!(caller.left("calls", "a").await, 1, "it takes over what was held, and adds nothing");
    server.advance(seconds(5));
    assert_eq!(caller.left("calls", "a").await, 3, "who said nothing is gone");
    assert_eq!(caller.renew(&silent).await, seconds(0));
    assert_eq!(caller.report(ended(&told)).await, ReportResult::Applied);
    assert_eq!(caller.report(ended(&told)).await, ReportResult::Duplicate);
    assert_eq!(caller.renew(&told).await, seconds(0));
    assert_eq!(caller.left("calls", "a").await, 4);
    server.stop().await.unwrap();
}

/// The id with another text in that part.
fn forged(id: &str, part: usize, text: &str) -> String {
    let mut parts: Vec<_> = id.split('-').collect();
    parts[part + 1] = text;
    parts.join("-")
}

#[tokio::test]
async fn a_clean_stop_forgets_nobody() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let config = config(CALLS);
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config).await;
    let mut caller = Caller::of(&server).await;
    let first = caller.grant(ask("calls", "a", 1)).await;
    let second = caller.grant(ask("calls", "a", 1)).await;
    server.stop().await.unwrap();

    clock.advance(seconds(9));
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config).await;
    let mut caller = Caller::of(&server).await;
    assert_eq!(caller.left("calls", "a").await, 1);
    assert_eq!(caller.report(ended(&first)).await, ReportResult::Applied);
    assert_eq!(caller.report(ended(&first)).await, ReportResult::Duplicate);
    assert_eq!(caller.left("calls", "a").await, 2);
    server.advance(seconds(1));
    eventually("the other one expires", async || caller.left("calls", "a").await == 3).await;
    assert_eq!(caller.report(ended(&second)).await, ReportResult::UnknownGrant);
    server.stop().await.unwrap();
}
