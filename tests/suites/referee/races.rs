//! Facts about many callers at once.

use std::{
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use fusebox_server::{
    app::{Acquired, App, Ask, Principal},
    storage::Answer,
};
use fusebox_tests::{
    Counting, ManualClock, Simulated,
    panel::{app_of, recover},
};

use crate::panel::{config, in_memory, one};

/// Callers that ask at the same moment, as often as each likes; how many were allowed.
fn race(callers: usize, calls: usize, call: impl Fn(usize) -> bool + Sync) -> usize {
    let start = Barrier::new(callers);
    thread::scope(|scope| {
        let callers = (0..callers).map(|caller| {
            let (start, call) = (&start, &call);
            scope.spawn(move || {
                start.wait();
                (0..calls).filter(|_| call(caller)).count()
            })
        });
        let callers: Vec<_> = callers.collect();
        callers.into_iter().map(|caller| caller.join().expect("a caller")).sum()
    })
}

/// Whether one ask of `test` is allowed, by a server that answers at once.
fn allowed(app: &App, client: &str, ask: Ask<'_>) -> bool {
    let caller = app.caller(Principal::Anonymous);
    let answer = app.acquire(caller, one(client, ask), |told| told.decided.decision.allowed);
    match answer.expect("a decision") {
        Answer::Now(allowed) => allowed,
        Answer::Later(..) => panic!("memory answers at once"),
    }
}

fn ask<'a>(policy: &'a str, key: &'a str, cost: u64) -> Ask<'a> {
    Ask { policy, key, cost, estimated: false, lease: 0 }
}

#[test]
fn concurrent_reserves_admit_no_more_than_fit() {
    let (app, _) = in_memory(
        "tokens: {token_bucket: {limit: 100, per: 1h}}, permits: {concurrency: {limit: 100}}",
    );
    for policy in ["tokens", "permits"] {
        for (amount, fit) in [(1, 100), (3, 33), (7, 14), (51, 1), (100, 1)] {
            let key = amount.to_string();
            let reserve = |_| {
                let estimated = policy == "tokens";
                allowed(&app, "", Ask { estimated, ..ask(policy, &key, amount) })
            };
            assert_eq!(race(32, 10, reserve), fit, "{policy}: {amount} of 100 each");
        }
    }
}

#[test]
fn instances_of_a_service_share_a_limit_exactly() {
    let (app, clock) = in_memory("api: {fixed_window: {limit: 50, per: 60s}}");
    for _ in 0..3 {
        let admitted = race(8, 20, |instance| {
            allowed(&app, &format!("instance-{instance}"), ask("api", "key", 1))
        });
        assert_eq!(admitted, 50);
        clock.advance(Duration::from_secs(60));
    }
}

#[test]
fn random_keys_neither_grow_memory_nor_push_live_ones_out() {
    const KEYS: u64 = 200_000;
    const CELLS: usize = 1_000;
    let (app, _) = in_memory("api: {token_bucket: {limit: 5, per: 1h}, max_cells: 1000}");
    for _ in 0..5 {
        assert!(allowed(&app, "", ask("api", "live", 1)));
    }
    let mut fresh = 0;
    for key in 0..KEYS {
        // Multiplied by an odd number: all of them are different.
        let key = format!("{:016x}", key.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        fresh += usize::from(allowed(&app, "", ask("api", &key, 5)));
        assert!(app.live_cells() <= CELLS + 1, "{} cells", app.live_cells());
    }
    assert!(!allowed(&app, "", ask("api", "live", 1)), "it was not dropped to make room");
    assert_eq!(fresh, CELLS, "the others have one bucket in all");
}

/// How many calls were admitted by a server that is killed under load, as often as it has lives.
fn killed_in_a_loop(durability: &str, lives: u64) -> u64 {
    let limit = format!("token_bucket: {{limit: 100, per: 1000s}}, durability: {durability}");
    let config = config(&format!("api: {{{limit}}}"));
    let (disk, entropy) = (Simulated::default(), Arc::<Counting>::default());
    let clock = Arc::<ManualClock>::default();
    let admitted = AtomicU64::new(0);
    for life in 0..lives {
        let recovered = recover(disk.open(), &config, &clock).expect("the disk recovers");
        let (app, mut writer) = app_of(recovered, Arc::clone(&entropy) as Arc<_>);
        let (killed, calling) = (AtomicBool::new(false), AtomicUsize::new(CALLERS));
        thread::scope(|scope| {
            for _ in 0..CALLERS {
                scope.spawn(|| {
                    while !killed.load(Ordering::Acquire)
                        && let Some(allowed) = call(&app)
                    {
                        admitted.fetch_add(u64::from(allowed), Ordering::Relaxed);
                    }
                    calling.fetch_sub(1, Ordering::Release);
                });
            }
            scope.spawn(|| {
                // To the last caller, so that each is told.
                while calling.load(Ordering::Acquire) > 0 {
                    writer.catch_up();
                    // Of a disk that is gone every round fails, and says so to those who wait.
                    let _ = writer.round();
                    thread::yield_now();
                }
            });
            // At another moment in each life.
            thread::sleep(Duration::from_micros(200 + 97 * (life % 13)));
            disk.kill();
            killed.store(true, Ordering::Release);
        });
        clock.advance(Duration::from_secs(10));
    }
    admitted.into_inner()
}

/// Callers at once of a server that is killed.
const CALLERS: usize = 4;

/// Whether a call was told that it is allowed; `None` once nothing is decided any more. Who is told nothing is
/// not admitted.
fn call(app: &App) -> Option<bool> {
    let acquire = one("", ask("api", "key", 1));
    let tell = |told: &Acquired| told.decided.decision.allowed;
    match app.acquire(app.caller(Principal::Anonymous), acquire, tell).ok()? {
        Answer::Now(allowed) => Some(allowed),
        Answer::Later(allowed, durable) => {
            durable.blocking_recv().ok()?.ok()?;
            Some(allowed)
        }
    }
}

#[test]
fn kills_in_a_loop_under_load_admit_no_more_than_the_limit() {
    let lives = 40;
    let admitted = killed_in_a_loop("strict", lives);
    // One token in ten seconds, which is how far the clock goes in each life.
    let most = 100 + lives;
    println!("{admitted} of {most}");
    assert!((1..=most).contains(&admitted), "{admitted} of {most}");
}

#[test]
fn kills_of_a_relaxed_server_admit_at_most_a_burst_in_each_life() {
    let lives = 10;
    let admitted = killed_in_a_loop("relaxed", lives);
    let most = 101 * lives;
    println!("{admitted} of {most}");
    assert!((1..=most).contains(&admitted), "{admitted} of {most}");
}
