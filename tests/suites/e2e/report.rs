//! Telling.

use std::time::Duration;

use fusebox_client::unary::{Ask, Client, Outcome, Reported};
use fusebox_proto::v1::{GrantOutcome, ReportResult};
use fusebox_tests::{Server, eventually};
use tonic::Code;

use crate::{CONFIG, ask, caller::Caller, remaining};

/// The grant of an estimate of the policy `tokens`.
async fn estimate(client: &Client, key: &str, cost: u64) -> String {
    let acquired = client.acquire([Ask::new("tokens", key).cost(cost).estimated()]).await.unwrap();
    assert!(acquired.allowed);
    assert_eq!(acquired.verdicts[0].expires_in, Some(Duration::from_secs(600)));
    acquired.grant_id.expect("an estimate is owed a report")
}

#[tokio::test]
async fn what_an_estimate_did_not_cost_comes_back_once() {
    let server = Server::start(CONFIG).await;
    let client = server.client("test").await;
    let grant = estimate(&client, "a", 60).await;
    assert_eq!(remaining(&server, "tokens", "a").await, 40);

    let report = || client.report([Outcome::cost(&grant, 20)]);
    assert_eq!(report().await.unwrap(), [Reported::Applied]);
    assert_eq!(remaining(&server, "tokens", "a").await, 80);

    assert_eq!(report().await.unwrap(), [Reported::Duplicate]);
    assert_eq!(remaining(&server, "tokens", "a").await, 80);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_an_estimate_cost_more_is_owed_up_to_the_debt() {
    let server = Server::start(CONFIG).await;
    let client = server.client("test").await;
    let grant = estimate(&client, "a", 100).await;
    assert_eq!(client.report([Outcome::cost(grant, 1_000)]).await.unwrap(), [Reported::Applied]);

    // 50 tokens of debt and one more, at 10 a second.
    let denied = client.acquire([Ask::new("tokens", "a")]).await.unwrap();
    assert_eq!(denied.retry_after(), Some(Duration::from_millis(5_100)));
    let (_, metrics) = server.http("/metrics").await;
    let dropped = r#"fusebox_debt_dropped_tokens_total{namespace="test",policy="tokens"} 850"#;
    assert!(metrics.contains(dropped), "{metrics}");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn an_estimate_that_was_right_stands() {
    let server = Server::start(CONFIG).await;
    let client = server.client("test").await;
    let grant = estimate(&client, "a", 60).await;
    let reported = client.report([Outcome::as_estimated(grant)]).await.unwrap();
    assert_eq!(reported, [Reported::Applied]);
    assert_eq!(remaining(&server, "tokens", "a").await, 40);
    server.stop().await.unwrap();
}

/// A streamed answer tells what it has cost so far, and in the end what it cost.
#[tokio::test]
async fn an_estimate_is_told_in_parts() {
    let server = Server::start(CONFIG).await;
    let mut caller = Caller::of(&server).await;
    let estimated = fusebox_proto::v1::Ask { estimated: true, ..ask("tokens", "a", 60) };
    let grant = caller.grant(estimated).await;
    let told = |actual, partial| GrantOutcome {
        grant_id: grant.clone(),
        actual_cost: Some(actual),
        partial,
        ..Default::default()
    };
    for so_far in [20, 20, 10] {
        assert_eq!(caller.report(told(so_far, true)).await, ReportResult::Applied);
        assert_eq!(caller.left("tokens", "a").await, 40, "nothing comes back yet");
    }
    // What is known to be spent flows in again; what is out does not.
    server.advance(Duration::from_secs(5));
    assert_eq!(caller.left("tokens", "a").await, 60);
    assert_eq!(caller.report(told(80, true)).await, ReportResult::Applied);
    assert_eq!(caller.left("tokens", "a").await, 40, "what is more is charged at once");
    assert_eq!(caller.report(told(70, false)).await, ReportResult::Applied);
    assert_eq!(caller.left("tokens", "a").await, 40, "and is not unsaid");
    assert_eq!(caller.report(told(90, true)).await, ReportResult::Duplicate);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_a_part_told_stands_when_the_rest_never_comes() {
    let server = Server::start(CONFIG).await;
    let mut caller = Caller::of(&server).await;
    let estimated = fusebox_proto::v1::Ask { estimated: true, ..ask("tokens", "a", 60) };
    let grant = caller.grant(estimated).await;
    let part = GrantOutcome {
        grant_id: grant.clone(),
        actual_cost: Some(50),
        partial: true,
        ..Default::default()
    };
    assert_eq!(caller.report(part).await, ReportResult::Applied);
    server.advance(Duration::from_secs(600));
    assert_eq!(caller.left("tokens", "a").await, 90, "ten are still out");
    eventually("the grant expires", async || {
        server.http("/metrics").await.1.contains("fusebox_open_grants 0")
    })
    .await;
    server.advance(Duration::from_secs(1));
    assert_eq!(caller.left("tokens", "a").await, 100);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_grant_that_nobody_has_changes_nothing_and_is_no_error() {
    let server = Server::start(CONFIG).await;
    let client = server.client("test").await;
    let grant = estimate(&client, "a", 60).await;
    let guess = format!("{}0", &grant[..grant.len() - 1]);
    let spelled_otherwise = format!("0{grant}");

    let outcomes = ["nonsense", "1-2", &guess, &spelled_otherwise, &grant, &grant]
        .map(|grant| Outcome::cost(grant, 0));
    let unknown = Reported::UnknownGrant;
    assert_eq!(
        client.report(outcomes).await.unwrap(),
        [unknown, unknown, unknown, unknown, Reported::Applied, Reported::Duplicate]
    );
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_grant_of_another_namespace_is_nobodys() {
    let server = Server::start(CONFIG).await;
    let client = server.client("test").await;
    let grant = estimate(&client, "a", 60).await;
    let other = server.client("other").await;
    let outcome = || [Outcome::cost(&grant, 0)];
    assert_eq!(other.report(outcome()).await.unwrap(), [Reported::UnknownGrant]);
    assert_eq!(client.report(outcome()).await.unwrap(), [Reported::Applied]);
    assert_eq!(other.report(outcome()).await.unwrap(), [Reported::UnknownGrant]);

    let nowhere = server.client("nowhere").await.report(outcome()).await.unwrap_err();
    let fusebox_client::unary::Error::Status(status) = nowhere else { panic!("{nowhere}") };
    assert_eq!(status.code(), Code::NotFound);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn an_estimate_that_nobody_reports_stands_when_its_life_is_over() {
    let server = Server::start(CONFIG).await;
    let client = server.client("test").await;
    let grant = estimate(&client, "a", 60).await;

    // While it is open, what it may give back is not refilled as well.
    server.advance(Duration::from_secs(599));
    assert_eq!(remaining(&server, "tokens", "a").await, 40);
    server.advance(Duration::from_secs(1));
    let reported = client.report([Outcome::cost(&grant, 0)]).await.unwrap();
    assert_eq!(reported, [Reported::UnknownGrant]);

    // Housekeeping settles it as charged; from then on it refills like anything spent.
    eventually("the grant expires", async || {
        server.http("/metrics").await.1.contains("fusebox_open_grants 0")
    })
    .await;
    server.advance(Duration::from_secs(6));
    assert_eq!(remaining(&server, "tokens", "a").await, 100);
    server.stop().await.unwrap();
}

/// A known gateway let 663 through. What is admitted in all is the limit and what was estimated too low,
/// and of that nothing is lost: it is owed.
#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_callers_who_estimate_admit_no_more_than_there_is() {
    let server = Server::start(CONFIG).await;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let client = server.client("test").await;
        for _ in 0..50 {
            let client = client.clone();
            callers.spawn(async move {
                let ask = Ask::new("hundred", "a").cost(5).estimated();
                let Some(grant) = client.acquire([ask]).await.unwrap().grant_id else { return 0 };
                // Each call turns out to cost one more than it said.
                client.report([Outcome::cost(grant, 6)]).await.unwrap();
                1
            });
        }
    }
    let admitted: u64 = callers.join_all().await.into_iter().sum();
    assert!(admitted * 5 <= 100, "{admitted} calls that said 5, of 100 tokens");
    assert!(admitted * 6 > 95, "and nobody is turned away while 5 are left");
    let client = server.client("test").await;
    let peek = client.acquire([Ask::new("hundred", "a").cost(0)]).await.unwrap();
    let owed = Duration::from_millis(600) * u32::try_from(admitted * 6).unwrap();
    assert_eq!(peek.verdicts[0].reset_after, Some(owed));
    server.stop().await.unwrap();
}
