//! A service with two more lines, and `kill -9` on the server in the middle.

use std::time::Duration;

use fusebox_tests::Proxy;
use tokio::time::sleep;

use crate::{
    client::Client,
    eventually, millis,
    observer::{Observer, Said},
    server::Server,
};

/// Limits that are never reached: what fails does for another reason.
const CONFIGURATION: &str = "
namespaces:
  test:
    policies:
      tokens: {token_bucket: {limit: 100000, per: 1s}, on_unreachable: allow}
      permits: {concurrency: {limit: 1000, ttl: 10s}, on_unreachable: allow}
      payments: {breaker: {window: 10s, failure_rate: 50%, min_calls: 20, open_for: 5s}}
";

/// What 99 of 100 calls take at most: the millisecond of the service itself, what a client waits for a decision
/// (`decide_within`, 50 ms), and as much again for a machine that has other things to do.
const P99: Duration = millis(101);

/// What a client has counted.
type Counted = (u64, u64, u64);

pub async fn run() {
    let (observer, mut server) = (Observer::new(), Server::of(CONFIGURATION));
    let proxy = Proxy::to(server.start().await).await;
    let _client = Client::start("survivor", 0, &observer.path(), &proxy.url());
    let counts = |is_such: &dyn Fn(Counted) -> bool| is_such(counted(&observer.book()));
    eventually("the server decides", || counts(&|(memory, _, _)| memory > 300)).await;

    server.kill().await;
    let (_, _, before) = counted(&observer.book());
    eventually("decided without it", || counts(&|(_, _, fallback)| fallback > before + 300)).await;
    // Leases are over by now.
    sleep(millis(1_500)).await;
    let events = events(&observer.book());
    for event in ["connected", "disconnected", "tokens degraded", "permits degraded"] {
        assert!(events.iter().any(|heard| heard == event), "no `{event}` in {events:?}");
    }

    proxy.redirect(server.start().await);
    let times = |event: &str| self::events(&observer.book()).iter().filter(|e| *e == event).count();
    eventually("it is connected again", || times("connected") == 2).await;
    eventually("it has recovered", || {
        times("tokens recovered") > 0 && times("permits recovered") > 0
    })
    .await;
    let (memory, server_s, _) = counted(&observer.book());
    eventually("the server decides again", || {
        counts(&|now| now.0 > memory + 300 && now.1 > server_s + 300)
    })
    .await;

    check(&observer.book());
}

fn check(book: &[(u64, Said)]) {
    let mut took: Vec<_> = book
        .iter()
        .filter_map(|(_, said)| match said {
            Said::Called { took } => Some(*took),
            Said::Failed { error } => panic!("a call failed: {error}"),
            _ => None,
        })
        .collect();
    took.sort_unstable();
    let p99 = took[took.len() * 99 / 100];
    println!(
        "{} calls, half of them within {:?}, 99 of 100 within {p99:?}, all within {:?}",
        took.len(),
        took[took.len() / 2],
        took[took.len() - 1],
    );
    assert!(p99 <= P99, "99 of 100 calls took up to {p99:?}");
}

/// What was counted last.
fn counted(book: &[(u64, Said)]) -> Counted {
    let last = book.iter().rev().find_map(|(_, said)| match said {
        Said::Counted { memory, server, fallback } => Some((*memory, *server, *fallback)),
        _ => None,
    });
    last.unwrap_or_default()
}

fn events(book: &[(u64, Said)]) -> Vec<String> {
    let events = book.iter().filter_map(|(_, said)| match said {
        Said::Event { name } => Some(name.clone()),
        _ => None,
    });
    events.collect()
}
