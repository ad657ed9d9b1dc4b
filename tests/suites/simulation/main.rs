//! The simulation: the server and the clients as they are, in virtual time, over a network and a disk that a seed
//! decides.
//!
//! Servers lose power, processes die, ways are cut in one direction or both and messages are held back, all the
//! time; a ledger that nothing of it can bend is judged in the end. A seed that fails is printed, and had again by
//! `FUSEBOX_SIMULATION_SEED=<seed>`; `SEEDS=5000` tries so many instead of as many as fit two minutes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod chance;
mod client;
mod ledger;
mod server;
mod world;

use std::{
    env,
    io::{self, Write},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    time::{Duration, Instant},
};

/// One seed, and no other.
const SEED: &str = "FUSEBOX_SIMULATION_SEED";

/// So many seeds, however long they take.
const SEEDS: &str = "SEEDS";

/// How long seeds are tried where nobody says how many.
const PATIENCE: Duration = Duration::from_secs(120);

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|text| text.parse().expect("a number"))
}

fn attempt(seed: u64) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| world::live(seed))) {
        eprintln!("the world of {SEED}={seed} broke a promise; to have it again:");
        eprintln!(
            "    {SEED}={seed} cargo test --package fusebox-tests --test simulation no_world"
        );
        resume_unwind(panic);
    }
}

#[test]
fn no_world_breaks_a_promise() {
    if let Some(seed) = number(SEED) {
        return attempt(seed);
    }
    let (began, count) = (Instant::now(), number(SEEDS));
    let mut tried = 0;
    while count.map_or(began.elapsed() < PATIENCE, |count| tried < count) {
        attempt(tried);
        tried += 1;
    }
    // Past what captures the output of tests: how much was tried belongs to the result.
    let _ = writeln!(io::stderr(), "{tried} worlds in {:?}", began.elapsed());
    // A world takes seconds: of a machine on which none fits, nothing is known.
    assert!(tried > 0);
}

#[test]
fn a_seed_decides_all_that_happens() {
    let (once, again) = (world::live(7), world::live(7));
    for (number, (once, again)) in once.iter().zip(&again).enumerate() {
        assert_eq!(once, again, "entry {number} of the ledger");
    }
    assert_eq!(once.len(), again.len());
}
