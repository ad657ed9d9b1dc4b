//! Rules that a policy of this server judges.

use fusebox_proto::{
    envoy::service::ratelimit::v3::rate_limit_response::{RateLimit, rate_limit::Unit},
    v1::{
        Breaker, Concurrency, DeletePolicyRequest, FixedWindow, Policy, PutPolicyRequest,
        RetryBudget, admin_client::AdminClient, policy::Kind,
    },
};
use tonic::{Code, Status};

use super::{Files, Proxy, Served, Told, back, hits, peek, request, rl, rule};
use crate::{caller::seconds, remaining};

/// A server of rules, each judged by the policy of its key.
async fn serve(keys: &[&str], policies: &str) -> Served {
    let rules: Vec<_> = keys.iter().map(|key| rule(key, 1, "minute")).collect();
    let files = Files::of(&[("rl.yaml", &rl(&rules))]);
    let native: Vec<_> = keys.iter().map(|key| format!("{key}: test/{key}")).collect();
    let settings = format!("domains: {{rl: {{policies: {{{}}}}}}}", native.join(", "));
    let namespaces = format!("namespaces: {{test: {{policies: {{{policies}}}}}}}");
    files.serve_with(&settings, &namespaces).await
}

/// What is told as the limit, and in how many seconds all of it is left.
async fn limit(proxy: &mut Proxy, key: &str, value: &str) -> (RateLimit, i64) {
    let answer = proxy.send(request([peek(key, value)])).await;
    let status = &answer.statuses[0];
    let reset = status.duration_until_reset.unwrap().seconds;
    (status.current_limit.clone().expect("a limit"), reset)
}

/// Puts a policy as operators do.
async fn put(server: &Served, name: &str, kind: Kind) -> Result<(), Status> {
    let policy = Policy { kind: Some(kind), ..Default::default() };
    let request = PutPolicyRequest {
        namespace: "test".into(),
        name: name.into(),
        policy: Some(policy),
        ..Default::default()
    };
    let mut operator = AdminClient::new(server.channel().await);
    operator.put_policy(request).await.map(drop)
}

fn of(requests_per_unit: u32, unit: Unit) -> RateLimit {
    RateLimit { requests_per_unit, unit: unit.into(), name: String::new() }
}

#[tokio::test]
async fn a_policy_judges_with_its_overrides_and_reserves() {
    let policy = "plan: {fixed_window: {limit: 10, per: 1m}, reserves: {critical: 20%}, overrides: [
        {key: vip, fixed_window: {limit: 100, per: 1h}}, {prefix: bot-, token_bucket: {limit: 2, per: 1s}}]}";
    let server = serve(&["plan"], policy).await;
    let mut proxy = Proxy::of(&server).await;
    // Two of ten are kept for callers that are critical.
    assert_eq!(proxy.one(hits("plan", "a", 3)).await, Told::Ok(5));
    assert_eq!(remaining(&server, "plan", "a").await, 5, "it is the policy's own bucket");
    assert_eq!(proxy.one(hits("plan", "a", 6)).await, Told::Over(0));
    assert_eq!(proxy.one(hits("plan", "vip", 30)).await, Told::Ok(50));
    assert_eq!(proxy.one(hits("plan", "bot-7", 1)).await, Told::Ok(0));

    assert_eq!(limit(&mut proxy, "plan", "b").await, (of(10, Unit::Minute), 40));
    assert_eq!(limit(&mut proxy, "plan", "vip").await, (of(100, Unit::Hour), 2_800));
    assert_eq!(limit(&mut proxy, "plan", "bot-8").await, (of(2, Unit::Second), 0));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn of_several_limits_the_tightest_is_told() {
    let policy = "plan: {limits: [{fixed_window: {limit: 3, per: 1m}}, {fixed_window: {limit: 5, per: 1h}}]}";
    let server = serve(&["plan"], policy).await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(hits("plan", "a", 2)).await, Told::Ok(1));
    assert_eq!(limit(&mut proxy, "plan", "a").await, (of(3, Unit::Unknown), 40));
    server.advance(seconds(40));
    assert_eq!(proxy.one(hits("plan", "a", 1)).await, Told::Ok(2));
    assert_eq!(proxy.one(hits("plan", "a", 2)).await, Told::Ok(0));
    server.advance(seconds(60));
    // The hour's is spent, and so says the answer.
    assert_eq!(proxy.hit("plan", "a").await, Told::Over(0));
    assert_eq!(limit(&mut proxy, "plan", "a").await, (of(5, Unit::Unknown), 2_700));
    assert_eq!(proxy.one(back("plan", "a", 2)).await, Told::Ok(1));
    assert_eq!(proxy.one(peek("plan", "b")).await, Told::Ok(3));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_policy_that_only_watches_denies_nothing_and_takes_back_what_comes_back() {
    let policy = "plan: {fixed_window: {limit: 3, per: 1m}, shadow: true}";
    let server = serve(&["plan"], policy).await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(hits("plan", "a", 2)).await, Told::Ok(1));
    assert_eq!(proxy.one(back("plan", "a", 1)).await, Told::Ok(2));
    assert_eq!(proxy.one(hits("plan", "a", 9)).await, Told::Ok(0));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_policy_that_cannot_judge_is_refused_and_one_that_is_not_there_fails_its_rule_alone() {
    let policy = "plan: {fixed_window: {limit: 3, per: 1m}}";
    let server = serve(&["calls", "retries", "circuits", "plan"], policy).await;
    for (name, kind) in [
        ("calls", Kind::Concurrency(Concurrency { limit: Some(4), ttl: None })),
        ("retries", Kind::RetryBudget(RetryBudget::default())),
        ("circuits", Kind::Breaker(Breaker::default())),
    ] {
        let refused = put(&server, name, kind).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        let message = format!("policy `test/{name}` judges the rule `rl|{name}`");
        assert!(refused.message().starts_with(&message), "{refused}");
        assert!(refused.message().contains("only rates and windows can judge"), "{refused}");
    }
    let mut proxy = Proxy::of(&server).await;
    let refused = proxy.try_send(request([hits("plan", "a", 1), hits("calls", "a", 1)])).await;
    let refused = refused.unwrap_err();
    let message =
        "rule `rl|calls` is to be judged by policy `test/calls`, and there is none of that name";
    assert_eq!((refused.code(), refused.message()), (Code::FailedPrecondition, message));
    assert_eq!(proxy.one(peek("plan", "a")).await, Told::Ok(3), "nothing was charged");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_policy_that_operators_change_judges_at_once() {
    let server = serve(&["made"], "other: {fixed_window: {limit: 1, per: 1m}}").await;
    let mut proxy = Proxy::of(&server).await;
    let put = async |limit, seconds| {
        let per = Some(prost_types::Duration { seconds, nanos: 0 });
        let window = Kind::FixedWindow(FixedWindow { limit: Some(limit), per });
        put(&server, "made", window).await.expect("it is put");
    };
    assert!(proxy.try_send(request([hits("made", "a", 1)])).await.is_err());
    put(5, 60).await;
    assert_eq!(proxy.one(hits("made", "a", 2)).await, Told::Ok(3));
    put(10, 3_600).await;
    assert_eq!(proxy.one(hits("made", "a", 1)).await, Told::Ok(7));
    assert_eq!(limit(&mut proxy, "made", "b").await, (of(10, Unit::Hour), 2_800));
    let end = DeletePolicyRequest {
        namespace: "test".into(),
        name: "made".into(),
        reason: "over".into(),
        ..Default::default()
    };
    let refused = AdminClient::new(server.channel().await).delete_policy(end).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("judges the rule `rl|made`"), "{refused}");
    assert_eq!(proxy.one(peek("made", "a")).await, Told::Ok(7), "it is there as before");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn more_limits_than_are_decided_together_are_refused_and_charge_nothing() {
    let policy = "plan: {limits: [{fixed_window: {limit: 90, per: 1m}}, {fixed_window: {limit: 90, per: 1h}}]}";
    let server = serve(&["plan"], policy).await;
    let mut proxy = Proxy::of(&server).await;
    let ask = |count| request((0..count).map(|_| hits("plan", "a", 1)));
    for count in [33, 64] {
        let refused = proxy.try_send(ask(count)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        let message = "descriptors: the descriptors meet more than 64 limits, as many as are decided together";
        assert_eq!(refused.message(), message);
    }
    assert_eq!(proxy.one(peek("plan", "a")).await, Told::Ok(90));
    let answer = proxy.send(ask(32)).await;
    assert_eq!(super::told(&answer.statuses[31]), Told::Ok(58));
    server.stop().await.unwrap();
}
