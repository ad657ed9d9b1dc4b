//! Bad input: a clear error that names the field, and nothing charged.

use fusebox_proto::v1::{
    AcquireBatchRequest, AcquireRequest, AcquireResponse, Ask, CircuitDelta, Client, GrantOutcome,
    ReportRequest,
};
use fusebox_tests::Server;
use http::uri::PathAndQuery;
use tonic::{Code, Request, Status, client::Grpc};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_prost::ProstCodec;
use tonic_types::StatusExt;

use crate::{CONFIG, ask, batch, remaining, request};

/// Checks the status, and that its details name the field.
fn assert_names(status: &Status, code: Code, field: &str) {
    assert_eq!(status.code(), code, "{field}: {status}");
    let details = status.get_error_details();
    let violations = details.bad_request().map(|bad| bad.field_violations.as_slice());
    let fields: Vec<_> =
        violations.unwrap_or_default().iter().map(|violation| violation.field.as_str()).collect();
    assert!(fields.contains(&field), "{field} is not among {fields:?}: {status}");
    assert!(status.message().starts_with(fields[0]), "the message says it too: {status}");
}

#[tokio::test]
async fn an_acquire_that_is_wrong_is_told_where() {
    let server = Server::start(CONFIG).await;
    let mut raw = server.raw().await;
    let three = || ask("three", "a", 1);
    let key = |key: String| request([Ask { key, ..three() }]);
    let estimated = |cost| Ask { estimated: true, ..ask("tokens", "a", cost) };
    let two_estimates = [estimated(1), Ask { key: "b".into(), ..estimated(1) }];
    let seventeen = (0..17).map(|key| ask("hundred", &key.to_string(), 1));
    let unnamed = AcquireRequest { namespace: String::new(), ..request([three()]) };
    let odd_priority = AcquireRequest { priority: 77, ..request([three()]) };

    for (wrong, field) in [
        (unnamed, "namespace"),
        (request([]), "asks"),
        (request(seventeen), "asks"),
        (request([three(), ask("", "a", 1)]), "asks[1].policy"),
        (key("k".repeat(257)), "asks[0].key"),
        (key("\u{e9}".repeat(129)), "asks[0].key"),
        (request([ask("three", "a", 4)]), "asks[0].cost"),
        (request([three(), ask("hundred", "a", u64::MAX)]), "asks[1].cost"),
        (request([three(), three()]), "asks[1]"),
        (request([estimated(0)]), "asks[0].cost"),
        (request(two_estimates), "asks[1].estimated"),
        (odd_priority, "priority"),
    ] {
        let refused = raw.acquire(wrong).await.unwrap_err();
        assert_names(&refused, Code::InvalidArgument, field);
    }
    assert_eq!(remaining(&server, "three", "a").await, 3);
    assert_eq!(remaining(&server, "hundred", "a").await, 100);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn every_violation_is_told_and_not_too_many() {
    let server = Server::start(CONFIG).await;
    let mut raw = server.raw().await;
    let two = AcquireRequest { asks: vec![Ask::default()], ..Default::default() };
    let refused = raw.acquire(two).await.unwrap_err();
    assert_names(&refused, Code::InvalidArgument, "namespace");
    assert_names(&refused, Code::InvalidArgument, "asks[0].policy");
    assert!(refused.message().ends_with("(and 1 more)"), "{refused}");

    let many = (0..1_000).map(|_| AcquireRequest::default()).collect();
    let many = AcquireBatchRequest { requests: many, ..Default::default() };
    let refused = raw.acquire_batch(many).await.unwrap_err();
    let details = refused.get_error_details();
    assert_eq!(details.bad_request().unwrap().field_violations.len(), 16);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_handle_is_refused_by_name_where_there_is_no_session() {
    let server = Server::start(CONFIG).await;
    let mut raw = server.raw().await;
    let three = || ask("three", "a", 1);
    let handle = request([Ask { handle: 1, ..three() }]);
    let refused = raw.acquire(handle).await.unwrap_err();
    assert_names(&refused, Code::InvalidArgument, "asks[0].handle");

    let handle = request([Ask { handle: 1, ..three() }]);
    let entry = AcquireRequest { namespace: String::new(), ..handle };
    let batch = batch(vec![entry]);
    let refused = raw.acquire_batch(batch).await.unwrap_err();
    assert_names(&refused, Code::InvalidArgument, "requests[0].asks[0].handle");

    let delta = CircuitDelta { handle: 1, policy: "three".into(), ..Default::default() };
    let report = ReportRequest {
        namespace: "test".into(),
        client: Some(Client { id: "1".into(), ..Default::default() }),
        deltas: vec![delta],
        ..Default::default()
    };
    let refused = raw.report(report).await.unwrap_err();
    assert_names(&refused, Code::InvalidArgument, "deltas[0].handle");
    assert_eq!(remaining(&server, "three", "a").await, 3);
    server.stop().await.unwrap();
}

/// Fields that say more than a plain Acquire, with more than they may say.
#[tokio::test]
async fn who_calls_and_what_is_leased_have_their_limits() {
    let server = Server::start(CONFIG).await;
    let mut raw = server.raw().await;
    let named = |id: &str| Client { id: id.into(), ..Default::default() };
    let long = || "c".repeat(129);
    let plain = || request([ask("three", "a", 1)]);
    let by = |client| AcquireRequest { client: Some(client), ..plain() };
    let lease = |lease, key: &str| Ask { lease, ..ask("hundred", key, 1) };
    let two_leases = request([lease(1, "a"), lease(1, "b")]);
    for (field, wrong) in [
        ("client.id", by(named(""))),
        ("client.id", by(named(&long()))),
        ("client.service", by(Client { service: long(), ..named("1") })),
        ("client.zone", by(Client { zone: long(), ..named("1") })),
        ("client.id", request([lease(1, "a")])),
        ("asks[1].lease", AcquireRequest { client: Some(named("1")), ..two_leases }),
        (
            "asks[0].lease",
            AcquireRequest { client: Some(named("1")), ..request([lease(1_000_000_000_001, "a")]) },
        ),
    ] {
        let refused = raw.acquire(wrong).await.unwrap_err();
        assert_names(&refused, Code::InvalidArgument, field);
    }

    let entry = |request| AcquireRequest { namespace: String::new(), ..request };
    for (field, client, wrong) in [
        ("client.id", Some(named("")), plain()),
        ("requests[0].client", Some(named("1")), by(named("1"))),
        ("client.id", None, request([lease(1, "a")])),
    ] {
        let batch = AcquireBatchRequest { client, ..batch(vec![entry(wrong)]) };
        let refused = raw.acquire_batch(batch).await.unwrap_err();
        assert_names(&refused, Code::InvalidArgument, field);
    }
    assert_eq!(remaining(&server, "three", "a").await, 3);
    assert_eq!(remaining(&server, "hundred", "a").await, 100);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_is_not_counted_in_tokens_is_not_estimated() {
    let config = "namespaces: {test: {policies: {
        calls: {concurrency: {limit: 3}}, retries: {retry_budget: {}}}}}";
    let server = Server::start(config).await;
    let mut raw = server.raw().await;
    for (policy, counts) in [("calls", "permits"), ("retries", "retries")] {
        let estimated = request([Ask { estimated: true, ..ask(policy, "a", 1) }]);
        let refused = raw.acquire(estimated).await.unwrap_err();
        assert_names(&refused, Code::InvalidArgument, "asks[0].estimated");
        assert!(refused.message().contains(counts), "{refused}");
    }
    assert_eq!(remaining(&server, "calls", "a").await, 3);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_report_that_is_wrong_is_told_where() {
    let server = Server::start(CONFIG).await;
    let mut raw = server.raw().await;
    let outcome = |grant_id: &str| GrantOutcome { grant_id: grant_id.into(), ..Default::default() };
    let costly = GrantOutcome { actual_cost: Some(1_000_000_000_001), ..outcome("1-1") };
    let returned_in_parts = GrantOutcome { lease_returned: 1, partial: true, ..outcome("1-1") };
    for (field, outcomes) in [
        ("outcomes", vec![]),
        ("outcomes", vec![outcome("1-1"); 1_001]),
        ("outcomes[0].grant_id", vec![outcome("")]),
        ("outcomes[0].grant_id", vec![outcome(&"1".repeat(129))]),
        ("outcomes[0].actual_cost", vec![costly]),
        ("outcomes[0].lease_returned", vec![returned_in_parts]),
    ] {
        let namespace = "test".into();
        let report = ReportRequest { namespace, outcomes, ..Default::default() };
        let refused = raw.report(report).await.unwrap_err();
        assert_names(&refused, Code::InvalidArgument, field);
    }
    let renew = |ids: Vec<String>| ReportRequest {
        namespace: "test".into(),
        renew_grant_ids: ids,
        ..Default::default()
    };
    for (field, report) in [
        ("renew_grant_ids", renew(vec!["1-1".into(); 1_001])),
        ("renew_grant_ids[0]", renew(vec![String::new()])),
        ("renew_grant_ids[1]", renew(vec!["1-1".into(), "1".repeat(129)])),
        ("client.id", ReportRequest { client: Some(Client::default()), ..renew(vec!["1".into()]) }),
    ] {
        let refused = raw.report(report).await.unwrap_err();
        assert_names(&refused, Code::InvalidArgument, field);
    }
    let refused = raw.report(renew(vec![])).await.unwrap_err();
    assert!(refused.message().contains("renew_grant_ids"), "renewals alone would do: {refused}");
    let nameless = ReportRequest { outcomes: vec![outcome("1-1")], ..Default::default() };
    let refused = raw.report(nameless).await.unwrap_err();
    assert_names(&refused, Code::InvalidArgument, "namespace");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_does_not_exist_is_named_and_a_long_name_is_not_repeated_whole() {
    let server = Server::start(CONFIG).await;
    let mut raw = server.raw().await;
    let refused = raw.acquire(request([ask("thrice", "a", 1)])).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    let message = "asks[0].policy: unknown policy `thrice`";
    assert_eq!(refused.message(), message);
    let details = refused.get_error_details();
    assert_eq!(details.resource_info().unwrap().resource_name, "thrice");

    let namespace = "\u{e9}".repeat(100_000);
    let elsewhere = AcquireRequest { namespace, ..request([ask("three", "a", 1)]) };
    let refused = raw.acquire(elsewhere).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert!(refused.message().len() < 100, "{refused}");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_message_that_is_too_large_is_the_servers_limit() {
    let server = Server::start(CONFIG).await;
    let large = request([Ask { key: "k".repeat(1024 * 1024), ..ask("three", "a", 1) }]);
    let refused = server.raw().await.acquire(large).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert_eq!(refused.message(), "the message is too large: at most 1048576 bytes");
    let request = HealthCheckRequest { service: "s".repeat(1024 * 1024) };
    let refused = HealthClient::new(server.channel().await).check(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    server.stop().await.unwrap();
}

/// Bytes in place of text: what a client of another language may well send as a key.
#[derive(Clone, PartialEq, prost::Message)]
struct Bytes {
    #[prost(bytes = "vec", tag = "1")]
    namespace: Vec<u8>,
}

#[tokio::test]
async fn a_message_that_is_not_one_is_the_callers_mistake() {
    let server = Server::start(CONFIG).await;
    let mut grpc = Grpc::new(server.channel().await);
    grpc.ready().await.unwrap();
    let path = PathAndQuery::from_static("/fusebox.v1.Resilience/Acquire");
    let codec = ProstCodec::<Bytes, AcquireResponse>::default();
    let request = Request::new(Bytes { namespace: vec![0xff, 0xfe] });
    let refused = grpc.unary(request, path, codec).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    assert!(refused.message().contains("namespace"), "{refused}");
    server.stop().await.unwrap();
}
