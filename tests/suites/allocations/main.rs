//! Between decoder and encoder nothing is allocated: counted by the allocator itself.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(unsafe_code)] // an allocator cannot be counted without

mod client;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    fs,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use fusebox_core::{
    Admission, Reason, Verdict,
    circuit::{Call, Outcome},
};
use fusebox_proto::v1::{AcquireRequest, Ask, resilience_server::Resilience};
use fusebox_server::{
    app::{
        self, Acquire, App, Client, Delta, Descriptor, Entry, Granted, Principal, Priority,
        RatelimitRequest, Ratelimited, Report, Reported, Told,
    },
    counters::Decisions,
    grpc::{Answers, Service},
    lifecycle::Lifecycle,
    metrics::Metrics,
    storage::Answer,
};
use fusebox_tests::panel::app;
use tonic::Code;

struct Counted;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: as our caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as our caller promised.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// Allocations of this thread while `work` runs.
fn allocations<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let before = ALLOCATIONS.with(Cell::get);
    let done = work();
    (ALLOCATIONS.with(Cell::get) - before, done)
}

const CONFIG: &str = "
namespaces:
  test:
    policies:
      some: {token_bucket: {limit: 3, per: 1m}}
      many: {token_bucket: {limit: 1000000, per: 1m}}
      target: {breaker: {}}
      host: {breaker: {}}
";

fn decide(app: &Arc<App>, policies: &[&str], cost: u64) -> bool {
    granted(app, policies, cost).0
}

/// Whether it is allowed, and the grant.
fn granted(app: &Arc<App>, policies: &[&str], cost: u64) -> (bool, Option<Granted>) {
    let ask = |policy| app::Ask { policy, key: "key", cost, estimated: false, lease: 0 };
    let asks = policies.iter().copied().map(ask);
    let caller = app.caller(Principal::Anonymous);
    let entry = Entry { asks, priority: Priority::Normal, retry: false };
    let acquire = Acquire { namespace: "test", client: None, entry };
    let answer = app.acquire(caller, acquire, |acquired| {
        (acquired.decided.decision.allowed, acquired.grant.clone())
    });
    match answer.unwrap() {
        Answer::Now(granted) => granted,
        Answer::Later(..) => panic!("memory answers at once"),
    }
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| Box::new(1)).0, 1);
}

#[test]
fn a_decision_on_live_cells_allocates_nothing() {
    let app = app(&Lifecycle::default(), CONFIG);
    for policies in [&["some"][..], &["many"], &["some", "many"]] {
        decide(&app, policies, 1); // the cells are born
        for cost in [0, 1, 1, 1, 1] {
            assert_eq!(allocations(|| decide(&app, policies, cost)).0, 0, "{policies:?} {cost}");
        }
    }
}

#[test]
fn a_call_through_closed_circuits_allocates_nothing() {
    let app = app(&Lifecycle::default(), CONFIG);
    for policies in [&["target"][..], &["target", "host"], &["many", "target"], &["some", "host"]] {
        decide(&app, policies, 1); // the circuits are there
        for cost in [0, 1, 1, 1, 1] {
            let (count, (_, grant)) = allocations(|| granted(&app, policies, cost));
            assert_eq!(count, 0, "{policies:?} {cost}");
            assert!(cost == 0 || grant.is_some() || policies[0] == "some", "{policies:?}");
        }
    }
}

/// What the app allocates for a report that says something for the second time.
fn allocations_of(app: &Arc<App>, report: &Report<'_>) -> usize {
    let tell = || {
        let told = app.report(app.caller(Principal::Anonymous), report);
        match pin!(told).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(receipt) => receipt.unwrap(),
            Poll::Pending => panic!("memory answers at once"),
        }
    };
    tell(); // the reporter is there
    let (count, receipt) = allocations(tell);
    let mut results = receipt.results.iter().chain(&receipt.delta_results);
    assert!(results.all(|result| *result == Reported::Applied));
    count
}

#[test]
fn a_report_allocates_what_it_is_told_by_however_many_calls_it_tells_of() {
    let app = app(&Lifecycle::default(), CONFIG);
    let (_, grant) = granted(&app, &["target"], 1);
    let client = Some(Client { id: "one", service: "checkout", zone: "a" });
    let latency = Some(Duration::from_millis(10));
    for (outcome, kind) in [(Outcome::Success, ""), (Outcome::Failure, "timeout")] {
        let told = Told { call: Call { outcome, latency, kind }, ..Told::default() };
        for count in [1, 100] {
            // Nobody knows of the others how they went: so the circuit stays closed.
            let mut outcomes = vec![(grant.clone(), Told::default()); count];
            outcomes[0] = (grant.clone(), told);
            let report = Report { namespace: "test", client, outcomes, ..Report::default() };
            let what = "the owner, the results, the circuits, and where each of them is";
            assert_eq!(allocations_of(&app, &report), 4, "{count} {outcome:?}: {what}");
        }
    }
    let (policy, key, generation) = ("target", "key", app.circuits().absent());
    for successes in [1, 100, 10_000] {
        let latencies = &[0, 0, 1];
        let delta = Delta { policy, key, generation, successes, latencies, ..Delta::default() };
        let report = Report { namespace: "test", client, deltas: vec![delta], ..Report::default() };
        assert_eq!(allocations_of(&app, &report), 5, "{successes}: the same, and who is told");
    }
}

const RULES: &str = "
domain: edge
descriptors:
  - {key: remote_address, rate_limit: {unit: minute, requests_per_unit: 3}}
  - key: path
    value: /api/*
    descriptors:
      - {key: user, rate_limit: {unit: hour, requests_per_unit: 1000}}
  - {key: user, detailed_metric: true, rate_limit: {name: each, unit: hour, requests_per_unit: 1000}}
  - {key: method, value: POST, shadow_mode: true, rate_limit: {unit: minute, requests_per_unit: 1}}
  - {key: tenant, rate_limit: {replaces: [{name: each}], unit: hour, requests_per_unit: 1000}}
  - {key: host, rate_limit: {unlimited: true}}
";

/// What a proxy asks: the first so many of these.
const DESCRIPTORS: [&[(&str, &str)]; 8] = [
    &[("remote_address", "10.0.0.1")],
    &[("path", "/api/orders"), ("user", "alice")],
    &[("user", "alice")],
    &[("method", "POST")],
    &[("tenant", "acme")],
    &[("host", "example.org")],
    &[("path", "/")],
    &[("remote_address", "10.0.0.2")],
];

#[test]
fn what_a_proxy_asks_of_live_cells_allocates_nothing() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("edge.yaml"), RULES).unwrap();
    let config = format!("envoy_ratelimit: {{config_dir: {:?}}}", folder.path());
    let app = app(&Lifecycle::default(), &config);
    let ask = |count| {
        let descriptors = DESCRIPTORS[..count].iter().map(|entries| {
            let entries = entries.iter().copied();
            Descriptor { entries, limit: None, hits: 1, negative: false }
        });
        let request = RatelimitRequest { domain: "edge", descriptors };
        let caller = app.caller(Principal::Anonymous);
        let over = |limited: &Ratelimited<'_>| limited.over;
        match app.should_rate_limit(caller, request, over).unwrap() {
            Answer::Now(over) => over,
            Answer::Later(..) => panic!("memory answers at once"),
        }
    };
    for count in [1, 3, 8] {
        ask(count); // the buckets are born
        for _ in 0..5 {
            assert_eq!(allocations(|| ask(count)).0, 0, "{count} descriptors");
        }
    }
    assert!(ask(1), "what is over a limit was among them");
}

#[test]
fn counting_allocates_nothing() {
    let lifecycle = Arc::new(Lifecycle::default());
    let metrics = Metrics::new(&lifecycle, &[]).unwrap();
    let method = metrics.method("fusebox.v1.Resilience/Acquire");
    assert_eq!(allocations(|| method.record(Duration::from_micros(30), Code::Ok)).0, 0);

    let decisions = Decisions::default();
    let denied = Admission::Deny { reason: Reason::RateLimited, retry_after: None };
    let verdict = Verdict {
        cost: 1,
        admission: denied,
        shadow: false,
        spent: 0,
        limit: 1,
        remaining: 0,
        reset_after: Duration::ZERO,
        granted: 1,
        slice: 0,
    };
    let counted = allocations(|| {
        for (allowed, admission) in
            [(true, Admission::Allow), (false, Admission::Allow), (false, denied)]
        {
            decisions.count(allowed, &Verdict { admission, ..verdict });
        }
    });
    assert_eq!(counted.0, 0);
}

#[test]
fn the_service_allocates_its_future_and_its_verdicts() {
    let lifecycle = Arc::new(Lifecycle::default());
    app(&lifecycle, CONFIG);
    let service = Service::new(lifecycle, Arc::new(Answers::new([0; 16])));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let request = || {
        let ask = Ask { policy: "many".into(), key: "key".into(), ..Default::default() };
        tonic::Request::new(AcquireRequest {
            namespace: "test".into(),
            asks: vec![ask],
            ..Default::default()
        })
    };
    runtime.block_on(async {
        service.acquire(request()).await.unwrap();
        let request = request();
        let before = ALLOCATIONS.with(Cell::get);
        let answer = service.acquire(request).await;
        let allocated = ALLOCATIONS.with(Cell::get) - before;
        assert_eq!(answer.unwrap().get_ref().verdicts.len(), 1);
        assert_eq!(allocated, 2, "the boxed future and the vector of verdicts");
    });
}
