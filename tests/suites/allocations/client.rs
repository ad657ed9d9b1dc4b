//! What the client answers from memory allocates nothing either: handles and layers, with a whole server behind them.
//!
//! Now and then a call is the one that has the next lease asked for, or the first to tell a circuit that it is in use
//! again; that may allocate. So calls are made in rounds, of which one must be without.

use std::{
    future::{Ready, ready},
    pin::pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use fusebox_client::{
    Breaker, Client, Decider, Limiter, Rejected,
    breaker::Local,
    layer::{BreakerLayer, RateLimitLayer, ResilienceLayer},
};
use fusebox_tests::Server;
use tokio::runtime::{Builder, Runtime};
use tower::{BoxError, Layer, Service, service_fn};

use super::allocations;

const CONFIG: &str = "
namespaces:
  test:
    policies:
      many: {token_bucket: {limit: 1000000, per: 1m}}
      one: {token_bucket: {limit: 1, per: 1d}}
      target: {breaker: {}}
";

/// Rounds at most, and calls in each.
const ROUNDS: usize = 200;
const CALLS: usize = 50;

/// A client and its server, on threads of their own.
struct Site {
    runtime: Runtime,
    client: Client,
    _server: Server,
}

impl Site {
    fn new() -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (client, server) = runtime.block_on(async {
            let server = Server::start(CONFIG).await;
            let endpoint = format!("http://{}", server.grpc);
            let client = Client::connect(endpoint).namespace("test").build().unwrap();
            client.connected().await;
            (client, server)
        });
        Self { runtime, client, _server: server }
    }

    /// Asks the server, if it must be asked.
    fn acquire(&self, limiter: &Limiter) -> Result<(), Rejected> {
        self.runtime.block_on(limiter.acquire(1))
    }

    fn leased(&self) -> Limiter {
        self.client.limiter("many").max_wait(Duration::from_secs(5))
    }

    /// Whether there is a round of calls without an allocation, all of which went as they should; before each round it
    /// is made sure that memory can answer.
    fn is_free(&self, limiter: &Limiter, mut call: impl FnMut() -> bool) -> bool {
        (0..ROUNDS).any(|_| {
            let _ = self.acquire(limiter);
            let (count, all) = allocations(|| (0..CALLS).all(|_| call()));
            count == 0 && all
        })
    }
}

/// What a future says that is ready at once.
fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

#[test]
fn a_leased_decision_allocates_nothing() {
    let site = Site::new();
    let limiter = site.leased();
    assert!(site.is_free(&limiter, || limiter.try_acquire(1).is_ok()), "`try_acquire`");
    let acquired = || matches!(now(limiter.acquire(1)), Some(Ok(())));
    assert!(site.is_free(&limiter, acquired), "`acquire`");
    let alice = limiter.key("alice");
    assert!(site.is_free(&alice, || limiter.try_acquire_for("alice", 1).is_ok()), "of a key");
}

#[test]
fn a_denial_that_is_remembered_allocates_nothing() {
    let site = Site::new();
    let limiter = site.client.limiter("one");
    let of_memory =
        |denied: Option<Rejected>| denied.is_some_and(|denied| denied.decider == Decider::Memory);
    assert!(site.is_free(&limiter, || of_memory(limiter.try_acquire(1).err())), "`try_acquire`");
    let denied = || of_memory(now(limiter.acquire(1)).and_then(Result::err));
    assert!(site.is_free(&limiter, denied), "`acquire`");
}

fn admitted(breaker: &Breaker, went: bool) -> bool {
    match breaker.try_admit() {
        Ok(permit) if went => permit.success(),
        Ok(permit) => permit.failure("timeout"),
        Err(_) => return false,
    }
    true
}

#[test]
fn a_call_through_a_closed_circuit_allocates_nothing_however_it_went() {
    let site = Site::new();
    let (limiter, breaker) = (site.leased(), site.client.breaker("target"));
    assert!(site.is_free(&limiter, || admitted(&breaker, true)), "success");
    let mut calls = 0;
    let one_in_ten_fails = || {
        calls += 1;
        admitted(&breaker, calls % 10 != 0)
    };
    assert!(site.is_free(&limiter, one_in_ten_fails), "failure");
    let call = || matches!(now(breaker.call(ready(Ok::<(), ()>(())))), Some(Ok(())));
    assert!(site.is_free(&limiter, call), "`call`");
}

#[test]
fn a_call_that_a_circuit_refuses_allocates_nothing() {
    let site = Site::new();
    let local = Local::default().consecutive_failures(1).open_for(Duration::from_secs(3_600));
    let breaker = site.client.breaker("target").local(local).unwrap();
    assert!(admitted(&breaker, false), "it is closed at first");
    assert!(site.is_free(&site.leased(), || !admitted(&breaker, true)));
}

#[test]
fn layers_allocate_nothing_where_calls_are_let_through() {
    let site = Site::new();
    let limiter = site.leased();
    let limit = RateLimitLayer::new(limiter.clone());
    let breaker = BreakerLayer::new(site.client.breaker("target"));
    let both = ResilienceLayer::new().rate_limit(limit.clone()).breaker(breaker.clone());
    let inner = service_fn(succeed);
    assert!(site.is_free(&limiter, called(limit.layer(inner))), "rate limit");
    assert!(site.is_free(&limiter, called(breaker.layer(inner))), "breaker");
    assert!(site.is_free(&limiter, called(both.layer(inner))), "both");
}

fn succeed(request: u32) -> Ready<Result<u32, BoxError>> {
    ready(Ok(request))
}

fn called(mut service: impl Service<u32, Response = u32>) -> impl FnMut() -> bool {
    move || {
        let is_ready = service.poll_ready(&mut Context::from_waker(Waker::noop())).is_ready();
        is_ready && matches!(now(service.call(1)), Some(Ok(1)))
    }
}
