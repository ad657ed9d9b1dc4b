//! What is refused, in which words, and that nothing is charged for it.

use std::sync::{Arc, mpsc};

use fusebox_proto::envoy::{
    extensions::common::ratelimit::v3::{
        RateLimitDescriptor, rate_limit_descriptor::RateLimitOverride,
    },
    service::ratelimit::v3::RateLimitRequest,
    r#type::v3::RateLimitUnit,
};
use fusebox_server::storage::journal::Nothing;
use fusebox_tests::{ManualClock, PATIENCE, Server, eventually};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt;

use super::{Files, Proxy, Told, descriptor, hits, limited, peek, request, rl, rule};

fn files() -> Files {
    Files::of(&[("rl.yaml", &rl(&[rule("user", 9, "minute")]))])
}

/// The hits that a refusal must not count.
fn counted() -> RateLimitDescriptor {
    hits("user", "a", 5)
}

fn of_unit(unit: i32) -> RateLimitDescriptor {
    let limit = RateLimitOverride { requests_per_unit: 1, unit };
    RateLimitDescriptor { limit: Some(limit), ..counted() }
}

#[tokio::test]
async fn what_is_wrong_is_refused_in_words_and_charges_nothing() {
    let server = files().serve().await;
    let mut proxy = Proxy::of(&server).await;
    let entries = |count| descriptor((0..count).map(|_| ("user", "a")));
    let unit = "required: SECOND, MINUTE, HOUR, DAY, MONTH or YEAR";
    for (wrong, message) in [
        (
            RateLimitRequest { domain: String::new(), ..request([counted()]) },
            "rate limit domain must not be empty".to_owned(),
        ),
        (
            RateLimitRequest { domain: String::new(), ..request([]) },
            "rate limit domain must not be empty".to_owned(),
        ),
        (request([]), "rate limit descriptor list must not be empty".to_owned()),
        (request((0..65).map(|_| counted())), "descriptors: 65 descriptors; at most 64".to_owned()),
        (
            request([counted(), entries(33)]),
            "descriptors[1].entries: 33 entries; at most 32".to_owned(),
        ),
        (
            request([counted(), limited(counted(), 1, RateLimitUnit::Unknown)]),
            format!("descriptors[1].limit.unit: {unit}"),
        ),
        (request([counted(), of_unit(7)]), format!("descriptors[1].limit.unit: {unit}")),
        (request([counted(), of_unit(-1)]), format!("descriptors[1].limit.unit: {unit}")),
    ] {
        let refused = proxy.try_send(wrong).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::InvalidArgument, &*message));
    }
    assert_eq!(proxy.one(peek("user", "a")).await, Told::Ok(9));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn as_much_as_there_may_be_is_taken() {
    let server = files().serve().await;
    let mut proxy = Proxy::of(&server).await;
    // Values are those of headers: one that is refused may pass the proxy uncounted.
    let long = "é".repeat(30 * 1024);
    assert_eq!(proxy.hit("user", &long).await, Told::Ok(8));
    assert_eq!(proxy.hit("user", &format!("{long}!")).await, Told::Ok(8), "another one");
    assert_eq!(proxy.hit("user", &long).await, Told::Ok(7));
    assert_eq!(proxy.one(descriptor((0..32).map(|_| ("user", "a")))).await, Told::Free);
    let (over, told) = proxy.ask((0..64).map(|_| hits("user", "a", 1))).await;
    assert_eq!((over, told.len()), (true, 64));
    assert_eq!(proxy.one(descriptor([])).await, Told::Free);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn several_mistakes_are_told_at_once_up_to_a_number() {
    let server = files().serve().await;
    let mut proxy = Proxy::of(&server).await;
    let many = descriptor((0..33).map(|_| ("user", "a")));
    let wrong = limited(many, 1, RateLimitUnit::Unknown);
    let refused = proxy.try_send(request([wrong])).await.unwrap_err();
    let message = "descriptors[0].entries: 33 entries; at most 32 (and 1 more)";
    assert_eq!(refused.message(), message);
    let details = refused.get_error_details();
    let violations = &details.bad_request().unwrap().field_violations;
    let fields: Vec<_> = violations.iter().map(|one| one.field.as_str()).collect();
    assert_eq!(fields, ["descriptors[0].entries", "descriptors[0].limit.unit"]);

    let refused = proxy.try_send(request((0..500).map(|_| of_unit(0)))).await.unwrap_err();
    assert_eq!(refused.message(), "descriptors: 500 descriptors; at most 64 (and 15 more)");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused_with_the_limit() {
    let server = files().serve().await;
    let mut proxy = Proxy::of(&server).await;
    // All headers that a proxy takes, in each of as many descriptors.
    let value = "x".repeat(60 * 1024);
    let of = |count| request((0..count).map(|_| descriptor([("other", &*value)])));
    assert!(proxy.try_send(of(16)).await.is_ok());
    let refused = proxy.try_send(of(18)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(refused.message(), "the message is too large: at most 1048576 bytes");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn without_rules_the_service_says_so_and_others_go_on() {
    let server = Server::start(crate::CONFIG).await;
    let mut proxy = Proxy::of(&server).await;
    let refused = proxy.try_send(request([counted()])).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(refused.message(), "no rate limit configuration loaded");
    // What is wrong is told first: it stays wrong.
    let refused = proxy.try_send(request([])).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(crate::remaining(&server, "three", "a").await, 3);
    let (_, metrics) = server.http("/metrics").await;
    assert!(!metrics.contains("fusebox_ratelimit_config_loads"), "{metrics}");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_folder_without_files_is_no_mistake_and_limits_nothing() {
    let server = Files::of(&[]).serve().await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(counted()).await, Told::Free);
    assert_eq!(super::metric(&server, "fusebox_ratelimit_unknown_domain_total").await, Some(1));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_server_that_starts_says_so_and_is_away_after_its_end() {
    let (recover, recovering) = mpsc::channel::<()>();
    let journal = Box::new(move || {
        recovering.recv().expect("the test says when");
        Ok(Box::new(Nothing) as Box<_>)
    });
    let files = files();
    let server = Server::begin(journal, Arc::<ManualClock>::default(), &files.config("", "")).await;
    let mut proxy = Proxy::of(&server).await;
    let mut health = HealthClient::new(server.channel().await);
    let mut status = async || {
        let service = "envoy.service.ratelimit.v3.RateLimitService".into();
        let status = health.check(HealthCheckRequest { service }).await.expect("it is told");
        status.into_inner().status()
    };
    let refused = proxy.try_send(request([counted()])).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().starts_with("starting"), "{refused}");
    assert_eq!(status().await, ServingStatus::NotServing);
    recover.send(()).unwrap();
    eventually("it serves", async || status().await == ServingStatus::Serving).await;
    assert_eq!(proxy.one(counted()).await, Told::Ok(4));

    server.ask_to_stop();
    tokio::time::timeout(PATIENCE, server.ended()).await.expect("it ends").unwrap();
    let refused = proxy.try_send(request([counted()])).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
}
