//! A fleet: processes that link the client, the server's own program, and an observer that knows nothing of either.
//!
//! Whatever is drawn follows from one seed, which is printed; `FUSEBOX_FLEET_SEED` sets it, so that the faults of a
//! history that failed can be had again: when the machine gets to them nobody can repeat. The clocks of processes cannot
//! be set for them alone, so steps of the wall clock are tried elsewhere (`sdk::clocks` of the end-to-end tests).
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../crash/chance.rs"]
mod chance;
mod client;
mod faults;
mod ledger;
mod observer;
mod roles;
mod server;
mod steady;
mod survival;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};
use tokio::sync::RwLock;

/// The seed, so that a run can be had again.
const SEED: &str = "FUSEBOX_FLEET_SEED";

/// Longer than anything takes; only a test that fails ever waits for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// One of the tests measures how well a limit is used, and has the machine for itself.
static MACHINE: RwLock<()> = RwLock::const_new(());

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// The machine's clock that never steps, in nanoseconds: all processes read the same one.
fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap()
}

/// The seed of what is drawn, which is told.
fn seed() -> u64 {
    let seed = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() % 1_000_000
    });
    println!("{SEED}={seed}");
    seed
}

/// Returns once `holds` does; what other processes do to it can only be looked at again and again.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let held = async {
        while !holds() {
            tokio::time::sleep(millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, held).await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_befalls_a_fleet_it_spends_and_holds_no_more_than_the_limit() {
    let _shared = MACHINE.read().await;
    faults::run(seed()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_is_used_up_and_a_late_comer_has_its_share_within_one_lease_time() {
    let _alone = MACHINE.write().await;
    steady::run().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_lines_around_a_service_survive_kill_9_on_the_server_without_one_call_lost() {
    let _shared = MACHINE.read().await;
    survival::run().await;
}

/// What a process of a client does, if this is one.
#[test]
#[ignore = "the process of a client, which the other tests start"]
fn a_process() {
    roles::play();
}
