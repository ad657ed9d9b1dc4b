//! Policies that are breakers: how they are written, put, changed and told.

use std::sync::Arc;

use fusebox_proto::v1::{
    Breaker, Event, EventAction, HalfOpen, InspectBucketRequest, ListBucketsRequest, Policy,
    PolicyOverride, PolicySource, PutPolicyRequest, Ramp, ResetBucketRequest, TopKeysRequest,
    policy::Kind, policy_override,
};
use fusebox_tests::{ManualClock, Server, Simulated};
use tonic::{Code, Status};

use crate::{
    admin::{Operator, bucket, put},
    caller::{Caller, config},
};

const FILE: &str = "payments: {breaker: {half_open: {probes: 5}}, max_cells: 7,
        overrides: [{key: vip, breaker: {open_for: 1s}}, {prefix: batch/, breaker: {count: 9}}]},
    few: {token_bucket: {limit: 3, per: 1m}}";

fn probes(probes: u32) -> Breaker {
    let half_open = HalfOpen { probes: Some(probes), ..Default::default() };
    Breaker { half_open: Some(half_open), ..Default::default() }
}

fn breaker(policy: &Policy) -> &Breaker {
    match &policy.kind {
        Some(Kind::Breaker(breaker)) => breaker,
        other => panic!("{other:?}"),
    }
}

fn probes_of(breaker: &Breaker) -> Option<u32> {
    breaker.half_open.and_then(|half_open| half_open.probes)
}

/// A policy put with all that it says.
fn put_all(name: &str, policy: Policy) -> PutPolicyRequest {
    PutPolicyRequest { policy: Some(policy), ..put(name, Kind::Breaker(Breaker::default())) }
}

fn refused(status: &Status, words: &str) {
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().starts_with(words), "{words}: {status}");
}

#[tokio::test]
async fn a_breaker_of_the_file_is_told_with_its_defaults_and_overrides() {
    let server = Server::start(&config(FILE)).await;
    let mut operator = Operator::of(&server).await;
    let told = operator.get("payments").await.unwrap();
    assert_eq!(told.source(), PolicySource::File);
    let policy = told.policy.unwrap();
    assert_eq!((policy.max_cells, policy.lease_time, policy.max_waiting), (Some(7), None, None));
    let own = breaker(&policy);
    assert_eq!((probes_of(own), own.min_calls, own.min_reporters), (Some(5), Some(20), Some(2)));
    assert_eq!(own.half_open.unwrap().max_in_flight, Some(5));
    assert_eq!(own.backoff.unwrap().factor_hundredths, Some(200));
    assert_eq!(own.ramp.as_ref().unwrap().steps_basis_points, [2_500, 5_000, 7_500, 10_000]);
    let [vip, batch] = &policy.overrides[..] else { panic!("{policy:?}") };
    let Some(policy_override::Kind::Breaker(vip)) = &vip.kind else { panic!("{vip:?}") };
    let Some(policy_override::Kind::Breaker(batch)) = &batch.kind else { panic!("{batch:?}") };
    assert_eq!(vip.open_for.unwrap().seconds, 1);
    assert_eq!((batch.window, batch.count, batch.min_reporters), (None, Some(9), Some(1)));
    let refused = operator.try_put(put("payments", Kind::Breaker(probes(1)))).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_is_told_of_a_breaker_puts_the_same() {
    let server = Server::start(&config(FILE)).await;
    let mut operator = Operator::of(&server).await;
    let of_file = operator.get("payments").await.unwrap().policy.unwrap();
    let ramp = Some(Ramp { steps_basis_points: vec![], each: None });
    let without_ramp = Policy {
        kind: Some(Kind::Breaker(Breaker { ramp, consecutive_failures: Some(5), ..probes(2) })),
        ..Default::default()
    };
    for policy in [of_file, without_ramp] {
        let made = operator.try_put(put_all("made", policy)).await.unwrap().policy.unwrap();
        assert_eq!(operator.get("made").await.unwrap(), made);
        let again = put_all("made", made.policy.clone().unwrap());
        let again = operator.try_put(again).await.unwrap();
        assert_eq!((again.policy.unwrap(), again.changes), (made, vec![]));
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_dry_run_of_a_breaker_tells_what_would_be_different() {
    let server = Server::start(&config(FILE)).await;
    let mut operator = Operator::of(&server).await;
    let made = operator.put("made", Kind::Breaker(probes(3))).await;
    assert!(made.changes.iter().all(|one| one.before.is_empty() && !one.after.is_empty()));
    let overrides = vec![PolicyOverride {
        selector: Some(policy_override::Selector::Key("vip".into())),
        kind: Some(policy_override::Kind::Breaker(probes(3))),
    }];
    let kind = Some(Kind::Breaker(probes(4)));
    let changed = put_all("made", Policy { kind, overrides, ..Default::default() });
    let dry = PutPolicyRequest { dry_run: true, ..changed.clone() };
    let would = operator.try_put(dry).await.unwrap();
    let change = |field: &str| {
        let found = would.changes.iter().find(|one| one.field == field);
        found.map(|one| (one.before.as_str(), one.after.as_str()))
    };
    assert_eq!(change("breaker.half_open.probes"), Some(("3", "4")));
    assert_eq!(change("breaker.half_open.max_in_flight"), Some(("3", "4")));
    assert_eq!(change("overrides[0].key"), Some(("", "vip")));
    assert_eq!(change("overrides[0].breaker.window"), Some(("", "10s")));
    assert_eq!(change("breaker.window"), None);
    assert_eq!(operator.get("made").await.unwrap(), made.policy.unwrap());
    let put = operator.try_put(changed).await.unwrap();
    assert_eq!(put.changes, would.changes);
    assert_eq!(probes_of(breaker(&put.policy.unwrap().policy.unwrap())), Some(4));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_mistake_in_a_breaker_is_told_by_field() {
    let server = Server::start(&config(FILE)).await;
    let mut operator = Operator::of(&server).await;
    let default = Policy { kind: Some(Kind::Breaker(Breaker::default())), ..Default::default() };
    let limits = Some(policy_override::Kind::RetryBudget(Default::default()));
    let selector = Some(policy_override::Selector::Key("vip".into()));
    for (policy, words) in [
        (
            Policy { kind: Some(Kind::Breaker(probes(0))), ..Default::default() },
            "policy.breaker.half_open.probes: ",
        ),
        (Policy { shadow: true, ..default.clone() }, "policy.shadow: `shadow` beside a breaker: "),
        (Policy { max_cells: Some(100_001), ..default.clone() }, "policy.max_cells: "),
        (
            Policy { overrides: vec![PolicyOverride { selector, kind: limits }], ..default },
            "policy.overrides: `overrides`: key `vip`: a limiter, and the policy is a breaker",
        ),
    ] {
        refused(&operator.try_put(put_all("made", policy)).await.unwrap_err(), words);
    }
    assert_eq!(operator.get("made").await.unwrap_err().code(), Code::NotFound);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_breaker_that_was_put_outlives_the_server_however_it_ends() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config(FILE)).await;
    let mut operator = Operator::of(&server).await;
    let of_file = operator.get("payments").await.unwrap();
    let made = operator.put("made", Kind::Breaker(probes(9))).await.policy.unwrap();
    operator.put("gone", Kind::Breaker(probes(1))).await;
    operator.try_delete("gone", None, false).await.unwrap();
    let events = operator.all_events().await;
    let actions: Vec<_> = events.iter().map(Event::action).collect();
    let (created, deleted) = (EventAction::PolicyCreated, EventAction::PolicyDeleted);
    assert_eq!(actions, [deleted, created, created]);
    assert!(events[2].after.contains("probes: 9"), "{:?}", events[2]);
    // The answer came, so it is on the disk.
    journal.lose_power();
    server.stop().await.unwrap_err();

    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config(FILE)).await;
    let mut operator = Operator::of(&server).await;
    assert_eq!(operator.get("made").await.unwrap(), made);
    assert_eq!(operator.get("payments").await.unwrap(), of_file);
    assert_eq!(operator.get("gone").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(operator.all_events().await, events);
    server.stop().await.unwrap();

    // The file says something else now, of another kind.
    let file = "payments: {token_bucket: {limit: 3, per: 1m}}, few: {breaker: {}}";
    let server = Server::start_on(journal.open(), clock, &config(file)).await;
    let mut operator = Operator::of(&server).await;
    assert!(operator.get("payments").await.unwrap().version > of_file.version);
    assert_eq!(Caller::of(&server).await.left("payments", "a").await, 3);
    let events = operator.all_events().await;
    assert_eq!(events[0].action(), EventAction::PolicyChanged);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_policy_may_become_a_breaker_and_a_limiter_again() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config(FILE)).await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    operator.put("made", bucket(100, 3_600)).await;
    assert!(caller.ask("made", "a", 30).await.allowed);

    let put = operator.put("made", Kind::Breaker(probes(3))).await;
    assert_eq!(put.live_cells, 0, "none goes on under a breaker");
    let changes: Vec<_> = put.changes.iter().map(|one| one.field.as_str()).collect();
    assert!(changes.contains(&"token_bucket.limit") && changes.contains(&"breaker.window"));

    // As after a deletion, what was spent is not forgotten.
    operator.put("made", bucket(100, 3_600)).await;
    assert_eq!(caller.left("made", "a").await, 70);
    assert!(caller.ask("made", "b", 1).await.allowed);
    assert_eq!(operator.buckets("made", "", "").await.buckets.len(), 1);

    operator.put("made", Kind::Breaker(probes(3))).await;
    journal.lose_power();
    server.stop().await.unwrap_err();
    let server = Server::start_on(journal.open(), clock, &config(FILE)).await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    let told = operator.get("made").await.unwrap().policy.unwrap();
    assert_eq!(probes_of(breaker(&told)), Some(3));
    operator.put("made", bucket(100, 3_600)).await;
    assert_eq!(caller.left("made", "a").await, 70);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_breaker_has_circuits_and_no_buckets() {
    let server = Server::start(&config(FILE)).await;
    let mut operator = Operator::of(&server).await;
    let (namespace, policy, key) = ("test".to_owned(), "payments".to_owned(), "a".to_owned());
    let words =
        "policy: policy `test/payments` is a breaker: its circuits are told by InspectCircuit";
    let inspect = InspectBucketRequest {
        namespace: namespace.clone(),
        policy: policy.clone(),
        key: key.clone(),
    };
    refused(&operator.0.inspect_bucket(inspect).await.unwrap_err(), words);
    let list = ListBucketsRequest {
        namespace: namespace.clone(),
        policy: policy.clone(),
        ..Default::default()
    };
    refused(&operator.0.list_buckets(list).await.unwrap_err(), words);
    let reset = ResetBucketRequest {
        namespace: namespace.clone(),
        policy: policy.clone(),
        key,
        reason: "a mistake".into(),
    };
    refused(&operator.0.reset_bucket(reset).await.unwrap_err(), words);
    let top = TopKeysRequest { namespace, policy, count: 0 };
    refused(&operator.0.top_keys(top).await.unwrap_err(), words);
    server.stop().await.unwrap();
}
