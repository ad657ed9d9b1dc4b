//! Kills: a server that is killed two hundred times, at any moment, against a ledger of its own.
//!
//! Every history has a seed, which is printed; `FUSEBOX_CRASH_SEED` sets the first one, so that a history
//! that failed can be had again: its choices, that is; when the machine gets to them nobody can repeat.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod chance;
mod circuits;
mod clients;
mod history;
mod ledger;
mod policies;
mod process;

use std::{
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use history::{Ends, Plan};

/// The first seed, so that a run can be had again.
const SEED: &str = "FUSEBOX_CRASH_SEED";

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// The seed of the first history, which is told.
fn first_seed() -> u64 {
    let first = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() % 1_000_000
    });
    println!("{SEED}={first}");
    first
}

/// Runs so many histories of a plan at once.
fn histories(count: u64, plan: &Plan) {
    let first = first_seed();
    thread::scope(|scope| {
        for seed in first..first + count {
            // The name is what a panic tells.
            let named = thread::Builder::new().name(format!("history of {SEED}={seed}"));
            let history = move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                runtime.unwrap().block_on(history::run(seed, plan));
            };
            named.spawn_scoped(scope, history).unwrap();
        }
    });
}

#[test]
fn whenever_it_is_killed_nothing_is_spent_twice_and_little_is_lost() {
    let ends = Ends { open: 7, serving: 25, drain: 7, clean: 3, rotation: 0 };
    assert_eq!(4 * ends.kills(), 156);
    histories(4, &Plan { ends, life: millis(50)..millis(300), keys: 3, ballast: 0 });
}

#[test]
fn a_move_to_a_fresh_store_that_is_killed_loses_nothing() {
    let ends = Ends { open: 3, serving: 0, drain: 2, clean: 1, rotation: 12 };
    assert_eq!(2 * ends.kills(), 34);
    histories(2, &Plan { ends, life: millis(50)..millis(300), keys: 2, ballast: 5_000 });
}

#[test]
fn what_is_relaxed_is_admitted_again_for_no_more_than_the_last_second() {
    let ends = Ends { open: 0, serving: 10, drain: 0, clean: 1, rotation: 0 };
    assert_eq!(ends.kills(), 10);
    histories(1, &Plan { ends, life: millis(1_200)..millis(2_500), keys: 2, ballast: 0 });
}

#[test]
fn what_was_told_of_circuits_holds_whenever_it_is_killed() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(circuits::run(first_seed()));
}
