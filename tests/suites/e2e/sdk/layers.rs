//! Layers for tower, and the examples that show them.

use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use fusebox_client::{
    Bulkhead, Client, Reason, Timeout,
    layer::{
        BoxError, BreakerLayer, BulkheadLayer, RateLimitLayer, ResilienceLayer, RetryLayer,
        TimeoutLayer, rejection,
    },
    retry::{Again, Backoff, Counts},
};
use fusebox_proto::v1;
use fusebox_tests::{Server, eventually};
use tower::{Layer, Service, ServiceExt};

#[path = "../../../../client-sdk/examples/http_client.rs"]
#[expect(dead_code, reason = "its `main` is for readers")]
mod http_client;
#[path = "../../../../client-sdk/examples/pool.rs"]
#[expect(dead_code, reason = "its `main` is for readers")]
mod pool;
#[path = "../../../../client-sdk/examples/tonic_client.rs"]
#[expect(dead_code, reason = "its `main` is for readers")]
mod tonic_client;

const CONFIG: &str = "
drain_timeout: 1s
namespaces:
  demo:
    policies:
      retries: {retry_budget: {ratio: 10%, min_per_second: 0, ttl: 10s}}
      api: {token_bucket: {limit: 5, per: 1h}}
      fast: {token_bucket: {limit: 100000, per: 1s}, on_unreachable: allow}
      connections: {concurrency: {limit: 3, ttl: 60s}}
      payments: {breaker: {window: 1m, min_calls: 3, open_for: 10m, ramp: {steps: []}}}
";

/// A client with all the time that a busy machine may need.
async fn client(server: &Server) -> Client {
    let client = Client::connect(format!("http://{}", server.grpc))
        .namespace("demo")
        .decide_within(Duration::from_secs(10))
        .build()
        .unwrap();
    client.connected().await;
    client
}

type Clones = fn(&u32) -> Option<u32>;
type Decides = fn(Result<&u32, &BoxError>) -> Again;

/// Retries at once, three tries in all.
fn retry(client: &Client) -> RetryLayer<(Clones, Decides)> {
    let backoff = Backoff { first: Duration::ZERO, ..Backoff::default() };
    let clone: Clones = |request| Some(*request);
    let errors: Decides = |result| if result.is_err() { Again::Yes } else { Again::No };
    RetryLayer::new(client.retry("retries").backoff(backoff), (clone, errors))
}

/// A target that counts its calls, and fails all that are odd.
fn target(
    calls: &Arc<AtomicU32>,
) -> impl Service<u32, Response = u32, Error = BoxError, Future: Send> + Clone {
    let calls = Arc::clone(calls);
    tower::service_fn(move |request: u32| {
        calls.fetch_add(1, Ordering::Relaxed);
        let result = if request % 2 == 1 { Err("odd".into()) } else { Ok(request) };
        std::future::ready(result)
    })
}

/// Retries that the fleet has left.
async fn retries_left(server: &Server) -> u64 {
    let ask = v1::Ask { policy: "retries".into(), cost: Some(0), ..Default::default() };
    let request = v1::AcquireRequest {
        namespace: "demo".into(),
        asks: vec![ask],
        attempt: 1,
        ..Default::default()
    };
    let response = server.raw().await.acquire(request).await.unwrap().into_inner();
    response.verdicts[0].remaining.unwrap()
}

#[tokio::test]
async fn the_calls_of_one_process_pay_for_the_retries_of_another() {
    let server = Server::start(CONFIG).await;
    let (payer, spender) = (client(&server).await, client(&server).await);

    let calls = Arc::new(AtomicU32::new(0));
    let service = retry(&payer).layer(target(&calls));
    for _ in 0..21 {
        assert_eq!(service.clone().oneshot(2).await.unwrap(), 2);
    }
    eventually("the calls are told", async || retries_left(&server).await == 2).await;

    let service = ResilienceLayer::new().retry(retry(&spender)).layer(target(&calls));
    calls.store(0, Ordering::Relaxed);
    for tries in [3, 1, 1] {
        let error = service.clone().oneshot(1).await.unwrap_err();
        assert_eq!(error.to_string(), "odd", "the last error, also where the budget denies");
        assert_eq!(calls.swap(0, Ordering::Relaxed), tries);
    }
    let mut spent = Counts::default();
    (spent.calls, spent.retries, spent.denied, spent.exhausted) = (3, 2, 2, 1);
    assert_eq!(spender.retry("retries").counts(), spent);
}

#[tokio::test]
async fn retries_go_on_when_the_server_is_gone() {
    let server = Server::start(CONFIG).await;
    let client = client(&server).await;
    let calls = Arc::new(AtomicU32::new(0));
    let service = retry(&client).layer(target(&calls));
    assert_eq!(service.clone().oneshot(2).await.unwrap(), 2);

    server.stop().await.unwrap();
    calls.store(0, Ordering::Relaxed);
    service.oneshot(1).await.unwrap_err();
    assert_eq!(calls.load(Ordering::Relaxed), 3, "as the budget says by default");
}

#[tokio::test]
async fn each_key_of_a_request_has_a_rate_of_its_own_and_each_request_its_cost() {
    let server = Server::start(CONFIG).await;
    let client = client(&server).await;
    let limit = RateLimitLayer::new(client.limiter("api"))
        .key_by(|request: &u32| Cow::from(if *request < 100 { "small" } else { "large" }))
        .cost_by(|request: &u32| if *request < 100 { 1 } else { 4 });
    let calls = Arc::new(AtomicU32::new(0));
    let service = limit.layer(target(&calls));
    for _ in 0..5 {
        service.clone().oneshot(2).await.unwrap();
    }
    service.clone().oneshot(100).await.unwrap();
    for request in [2, 100] {
        let error = service.clone().oneshot(request).await.unwrap_err();
        assert_eq!(rejection(&error).unwrap().reason, Reason::RateLimited);
    }
    assert_eq!(calls.load(Ordering::Relaxed), 6);
}

#[tokio::test]
async fn a_circuit_opens_by_failures_and_not_by_what_a_limit_within_rejects() {
    let server = Server::start(CONFIG).await;
    let client = client(&server).await;
    let calls = Arc::new(AtomicU32::new(0));
    let guarded = |key: &'static str| {
        ResilienceLayer::new()
            .rate_limit(RateLimitLayer::new(client.limiter("api").key(key)))
            .breaker(BreakerLayer::new(client.breaker("payments").key(key)))
            .layer(target(&calls))
    };
    let limited = guarded("limited");
    for _ in 0..40 {
        let called = limited.clone().oneshot(2).await;
        let reason = called.err().map(|error| rejection(&error).unwrap().reason);
        assert!(matches!(reason, None | Some(Reason::RateLimited)), "{reason:?}");
    }
    assert_eq!(calls.swap(0, Ordering::Relaxed), 5);

    let failing = ResilienceLayer::new()
        .breaker(BreakerLayer::new(client.breaker("payments").key("failing")))
        .layer(target(&calls));
    let mut opened = None;
    eventually("the circuit opens", async || {
        let error = failing.clone().oneshot(1).await.unwrap_err();
        opened = rejection(&error).map(|rejected| rejected.reason);
        opened.is_some()
    })
    .await;
    assert_eq!(opened, Some(Reason::CircuitOpen));
}

#[tokio::test]
async fn not_one_call_fails_when_the_server_ends_in_the_middle() {
    let server = Server::start(CONFIG).await;
    let client = client(&server).await;
    let calls = Arc::new(AtomicU32::new(0));
    let service = ResilienceLayer::new()
        .retry(retry(&client))
        .breaker(BreakerLayer::new(client.breaker("payments")))
        .rate_limit(RateLimitLayer::new(client.limiter("fast")))
        .timeout(TimeoutLayer::new(Timeout::new(Duration::from_secs(10))))
        .layer(target(&calls));
    let call = async |_| assert_eq!(service.clone().oneshot(2).await.unwrap(), 2);
    for n in 0..500 {
        call(n).await;
    }
    server.ask_to_stop();
    eventually("the session ends", async || {
        call(0).await;
        !client.is_connected()
    })
    .await;
    for n in 0..500 {
        call(n).await;
    }
}

#[tokio::test]
async fn a_client_of_tonic_sees_a_rejection_as_a_status() {
    let server = Server::start(CONFIG).await;
    let client = client(&server).await;
    let (served, failed) = tonic_client::run(&client, server.channel().await, 8).await;
    assert_eq!((served, failed.len()), (5, 3));
    for status in failed {
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert!(status.message().starts_with("rejected by `api`: the rate is used up"), "{status}");
    }
}

#[tokio::test]
async fn a_client_of_http_spares_a_service_that_fails() {
    let server = Server::start(CONFIG).await;
    let client = client(&server).await;
    let called = http_client::run(&client, 2_000).await.unwrap();
    let answered = called.partition_point(|called| {
        *called == http_client::Called::Answered(http::StatusCode::INTERNAL_SERVER_ERROR)
    });
    assert!((3..1_000).contains(&answered), "{answered}");
    for spared in &called[answered..] {
        let http_client::Called::Rejected(why) = spared else { panic!("{spared:?}") };
        assert!(why.contains("the circuit is open"), "{why}");
    }
}

/// Returns once the permit of a call that was dropped, or has ended, can be had again.
async fn is_free_again(permits: &Bulkhead) {
    eventually("the permit is given back", async || permits.acquire().await.is_ok()).await;
}

#[tokio::test]
async fn a_call_holds_a_permit_until_it_is_over_or_dropped() {
    let server = Server::start(CONFIG).await;
    let client = client(&server).await;
    let permits = client.bulkhead("connections").key("one").local_limit(1);
    let finish = Arc::new(tokio::sync::Notify::new());
    let service = BulkheadLayer::new(permits.clone()).layer(tower::service_fn(|request: u32| {
        let finish = Arc::clone(&finish);
        async move {
            finish.notified().await;
            Ok::<_, BoxError>(request)
        }
    }));

    let (mut first, second) = (Box::pin(service.clone().oneshot(1)), service.clone().oneshot(2));
    let error = tokio::select! {
        biased;
        _ = &mut first => panic!("nobody let it end"),
        // Only when the first holds its permit is there none for the second.
        error = async {
            while permits.acquire().await.is_ok() {
                tokio::task::yield_now().await;
            }
            second.await.unwrap_err()
        } => error,
    };
    assert_eq!(rejection(&error).unwrap().reason, Reason::ConcurrencyLimited);

    finish.notify_one();
    assert_eq!(first.await.unwrap(), 1);
    is_free_again(&permits).await;

    let third = tokio::time::timeout(Duration::from_millis(50), service.oneshot(3)).await;
    assert!(third.is_err(), "nobody let it end");
    is_free_again(&permits).await;
}

#[tokio::test]
async fn two_pools_have_no_more_connections_than_the_fleet_may() {
    let server = Server::start(CONFIG).await;
    let client = client(&server).await;
    let (connections, rejected) = pool::run(&client, &server.grpc.to_string()).await.unwrap();
    assert_eq!((connections, rejected.reason), (3, Reason::ConcurrencyLimited));
    is_free_again(&client.bulkhead("connections")).await;
}
