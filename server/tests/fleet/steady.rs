//! How well a bucket is used, and how soon a late-comer is served.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    client::Client,
    eventually, ledger, millis, now,
    observer::{Observer, Said},
    server::Server,
};

/// Tokens a second: 100 for each of five clients.
const RATE: u64 = 500;

const CONFIGURATION: &str = "
namespaces:
  test:
    policies:
      tokens:
        token_bucket: {limit: 500, per: 1s, burst: 100}
        lease_time: 1s
        on_unreachable: deny
";

const LEASE_TIME: Duration = millis(1_000);

pub async fn run() {
    let (observer, mut server) = (Observer::new(), Server::of(CONFIGURATION));
    let url = format!("http://{}", server.start().await);
    let start = |number| Client::start("steady", number, &observer.path(), &url);
    let spent = |number| observer.has(move |by, said| by == number && is_spend(said));

    // Each wants 200 a second, and 125 are its share.
    let _clients: Vec<_> = (0..4).map(start).collect();
    eventually("all spend", || (0..4).all(spent)).await;
    // What there was at first is spent.
    sleep(millis(2_000)).await;
    let from = now();
    sleep(millis(6_000)).await;
    let _late_comer = start(4);
    eventually("the late-comer spends", || spent(4)).await;
    sleep(millis(4_000)).await;
    let to = now();

    let book = observer.book();
    let spends = ledger::spends(&book);
    let flowed = u64::try_from(u128::from(to - from) * u128::from(RATE) / 1_000_000_000).unwrap();
    let used = ledger::spent_within(&spends, from, to);
    let began = book.iter().find_map(|said| match said {
        (4, Said::Began { at }) => Some(*at),
        _ => None,
    });
    let first = spends.iter().find(|spend| spend.number == 4).unwrap().to;
    let waited = Duration::from_nanos(first - began.unwrap());
    println!("{used} of {flowed} tokens; the late-comer had its first after {waited:?}");

    assert!(used * 100 >= flowed * 99, "{used} of {flowed} tokens were used");
    assert!(waited <= LEASE_TIME, "the late-comer had its first token after {waited:?}");
    let beyond = ledger::most_beyond(&spends, RATE);
    assert!(beyond <= 100 + RATE, "{beyond} tokens beyond the rate");
}

fn is_spend(said: &Said) -> bool {
    matches!(said, Said::Spent { .. })
}
