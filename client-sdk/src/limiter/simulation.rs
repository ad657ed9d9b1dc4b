//! Fleets of clients on one bucket of the core, under virtual time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time;

use super::{Limiter, Limiters};
use crate::{
    fake::{Events, Lane, Server, bucket, millis_since},
    settings::OnUnreachable,
};

struct Client {
    lane: Arc<Lane>,
    limiter: Limiter,
    spent: Arc<AtomicU64>,
}

impl Client {
    fn of(server: &Arc<Server>, number: usize, latency: (u64, u64)) -> Self {
        let lane = Lane::to(server, number, latency);
        let limiters = Arc::new(Limiters::new(lane.context(&Events::default())));
        lane.carry(&limiters);
        let limiter = limiters.of("api");
        Self { lane, limiter, spent: Arc::default() }
    }

    /// Calls at a steady rate, each of which takes a token or is turned away.
    fn demand(&self, per_second: u64, max_wait: Duration) {
        let (limiter, spent) = (self.limiter.clone().max_wait(max_wait), Arc::clone(&self.spent));
        tokio::spawn(async move {
            let mut beats = time::interval(Duration::from_millis(5));
            let (mut calls, mut beat) = (0, 0);
            loop {
                beats.tick().await;
                beat += 1;
                while calls < beat * per_second / 200 {
                    calls += 1;
                    let (limiter, spent) = (limiter.clone(), Arc::clone(&spent));
                    tokio::spawn(async move {
                        if limiter.acquire(1).await.is_ok() {
                            spent.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
            }
        });
    }

    fn spent(&self) -> u64 {
        self.spent.load(Ordering::Relaxed)
    }
}

/// Basis points of the limit that a fleet spends in ten seconds, each client demanding that much of its share; the
/// burst that is there at first is spent before.
async fn used(clients: u64, demand_percent: u64, max_wait: Duration, latency: (u64, u64)) -> u64 {
    let rate = 100 * clients;
    let server = Server::of(bucket(rate), OnUnreachable::Deny);
    let fleet: Vec<_> = (0..usize::try_from(clients).unwrap())
        .map(|number| Client::of(&server, number, latency))
        .collect();
    fleet.iter().for_each(|client| client.demand(demand_percent, max_wait));
    time::sleep(Duration::from_secs(4)).await;
    let spent = || fleet.iter().map(Client::spent).sum::<u64>();
    let before = spent();
    time::sleep(Duration::from_secs(10)).await;
    assert!(spent() <= server.charged());
    let most = fleet.iter().map(|one| one.lane.under_way_most.load(Ordering::Relaxed)).max();
    assert_eq!(most, Some(1), "one message at a time");
    (spent() - before) * 10_000 / (rate * 10)
}

#[tokio::test(start_paused = true)]
async fn fleets_that_demand_more_than_the_limit_use_99_percent_of_it() {
    for (clients, demand, max_wait, latency) in [
        (1, 150, 0, (1, 1)),
        (2, 200, 200, (1, 10)),
        (5, 150, 0, (10, 10)),
        (10, 200, 0, (1, 10)),
        (10, 150, 200, (1, 1)),
    ] {
        let used = used(clients, demand, Duration::from_millis(max_wait), latency).await;
        assert!((9_900..=10_200).contains(&used), "{used} basis points");
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_comer_is_served_within_a_lease_time() {
    for (latency, late) in [((1, 1), (10, 10)), ((1, 10), (1, 1))] {
        for wait in [Duration::ZERO, Duration::from_millis(500)] {
            let server = Server::of(bucket(1_000), OnUnreachable::Deny);
            let fleet: Vec<_> = (0..9).map(|number| Client::of(&server, number, latency)).collect();
            fleet.iter().for_each(|client| client.demand(200, wait));
            time::sleep(Duration::from_secs(5)).await;
            let came = server.now_there();
            let late_comer = Client::of(&server, 9, late);
            late_comer.demand(200, wait);
            while late_comer.spent() == 0 {
                time::sleep(Duration::from_millis(1)).await;
                let after = millis_since(came, server.now_there());
                assert!(after <= 1_000, "not after {after} ms");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn under_overload_no_client_has_less_than_a_half_of_its_share() {
    // Where messages take a little more or less time, as they do: in step, the same ones would be first each time.
    let latency = (1, 3);
    for (clients, demand, max_wait) in [(2, 200, 200), (5, 150, 0), (10, 200, 0), (10, 150, 200)] {
        let server = Server::of(bucket(100 * clients), OnUnreachable::Deny);
        let fleet: Vec<_> = (0..usize::try_from(clients).unwrap())
            .map(|number| Client::of(&server, number, latency))
            .collect();
        fleet.iter().for_each(|client| client.demand(demand, Duration::from_millis(max_wait)));
        time::sleep(Duration::from_secs(14)).await;
        let spent: Vec<_> = fleet.iter().map(Client::spent).collect();
        assert!(spent.iter().all(|spent| spent * 2 >= 14 * 100), "{spent:?}");
    }
}
