//! Callers, operators and a writer that meet at the same circuits, each in a thread of its own.

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};

use fusebox_core::circuit::{Passage, Refusal};
use tokio::runtime;

use super::*;

/// Two probes, which nobody forgets. A circuit opens by two calls that fail, and for a moment.
const SETTINGS: &str = "min_calls: 2, min_reporters: 1, open_for: 1ms, \
    backoff: {factor: 1, jitter: 0%, max: 1ms}, ramp: {steps: []}, \
    half_open: {probes: 2, probe_timeout: 1h, max_duration: 1h}";

const CALLERS: usize = 6;
const CALLS: usize = 400;

/// Numbers that look random (Steele et al., "Fast splittable pseudorandom number generators", 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) as usize % end
    }
}

/// What callers have in their hands.
#[derive(Default)]
struct Hands {
    /// Probes of each circuit that are out.
    out: [AtomicUsize; 2],
    /// Those that were ever told of.
    probes: AtomicUsize,
    refused: AtomicUsize,
    both: AtomicUsize,
    /// The latest generation of each circuit that anybody was told of.
    latest: [Mutex<Generation>; 2],
}

fn call(app: &App, hands: &Hands, clock: &ManualClock, seed: usize) {
    let runtime = runtime::Builder::new_current_thread().build().unwrap();
    let mut random = Random(seed as u64);
    for _ in 0..CALLS {
        let orders: [&[usize]; 4] = [&[0], &[1], &[0, 1], &[1, 0]];
        let circuits = orders[random.below(4)];
        let mut asks: Vec<_> = circuits.iter().map(|one| (["one", "two"][*one], "", 1)).collect();
        if random.below(3) == 0 {
            asks.insert(random.below(2), ("permits", "", 1));
        }
        let floor: Vec<_> = circuits.iter().map(|one| *hands.latest[*one].lock()).collect();
        let answered = match acquire(app, &asks).unwrap() {
            Answer::Now(answered) => answered,
            Answer::Later(answered, durable) => {
                durable.blocking_recv().unwrap().unwrap();
                answered
            }
        };
        let mut probed = Vec::new();
        for ((circuit, crossed), floor) in circuits.iter().zip(&answered.circuits).zip(floor) {
            let view = crossed.view.as_ref().unwrap();
            assert!(view.generation >= floor, "{view:?} after {floor:?}");
            let mut latest = hands.latest[*circuit].lock();
            *latest = view.generation.max(*latest);
            if crossed.admitted.is_some_and(|admitted| admitted.probe.is_some()) {
                probed.push(*circuit);
            }
            let in_use =
                matches!(crossed.passage, Passage::Refused { refusal: Refusal::ProbesInUse, .. });
            hands.refused.fetch_add(usize::from(in_use), Ordering::Relaxed);
        }
        for circuit in &probed {
            let before = hands.out[*circuit].fetch_add(1, Ordering::SeqCst);
            assert!(before < 2, "{before} probes are out, and another one");
        }
        hands.probes.fetch_add(probed.len(), Ordering::Relaxed);
        hands.both.fetch_add(usize::from(probed.len() == 2), Ordering::Relaxed);
        thread::yield_now();
        for circuit in &probed {
            hands.out[*circuit].fetch_sub(1, Ordering::SeqCst);
        }
        let Some(grant) = answered.grant else {
            clock.advance(Duration::from_millis(1));
            continue;
        };
        let outcomes = [Outcome::Success, Outcome::Failure, Outcome::Failure, Outcome::Ignored];
        let outcome = outcomes[random.below(4)];
        let report = Report { outcomes: vec![(Some(grant), went(outcome))], ..report("caller") };
        let report = app.report(app.caller(Principal::Anonymous), &report);
        runtime.block_on(report).unwrap();
    }
}

/// Circuits of another key come and go, settings change, and housekeeping looks at all of it.
fn operate(app: &App, is_over: &AtomicBool) {
    let runtime = runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let mut turn = 0;
    while !is_over.load(Ordering::SeqCst) {
        turn += 1;
        let name = || PolicyName::new("test", ["one", "two"][turn % 2]);
        let settings = format!("window: {}s, {SETTINGS}", 10 + turn / 2 % 2);
        let put = PutPolicy {
            name: name(),
            settings: settings_of(&settings),
            expected: None,
            dry_run: false,
            reason: String::new(),
        };
        runtime.block_on(app.put_policy(Principal::Anonymous, put)).unwrap();
        let set = SetMode {
            name: name(),
            key: "another".into(),
            mode: [Mode::Normal, Mode::ForcedOpen][turn / 2 % 2],
            ttl: Duration::from_secs(60),
            reason: String::new(),
            expected: None,
        };
        runtime.block_on(app.set_circuit_mode(Principal::Anonymous, set)).unwrap();
        app.tend().unwrap();
    }
}

#[test]
fn callers_that_meet_at_two_circuits_never_have_more_probes_than_there_are() {
    let mut panel = Panel::with(&["one", "two"], SETTINGS);
    let hands = Hands::default();
    let [is_over, is_written] = [(); 2].map(|()| AtomicBool::new(false));
    let Panel { app, writer, clock, .. } = &mut panel;
    let (app, clock, hands) = (&**app, &**clock, &hands);
    thread::scope(|scope| {
        let (is_over, is_written) = (&is_over, &is_written);
        scope.spawn(move || {
            while !is_written.load(Ordering::SeqCst) {
                writer.wait();
                writer.round().unwrap();
            }
        });
        let operator = scope.spawn(move || operate(app, is_over));
        let callers: Vec<_> =
            (0..CALLERS).map(|seed| scope.spawn(move || call(app, hands, clock, seed))).collect();
        let ended: Vec<_> = callers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        is_over.store(true, Ordering::SeqCst);
        let operator = operator.join();
        // Nobody waits any more, whatever became of them.
        is_written.store(true, Ordering::SeqCst);
        ended.into_iter().chain([operator]).for_each(|thread| thread.unwrap());
    });
    let [probes, refused, both] =
        [&hands.probes, &hands.refused, &hands.both].map(|count| count.load(Ordering::SeqCst));
    println!("{probes} probes, {both} of both circuits, {refused} refused for others'");
    assert!(probes > CALLERS && refused > 0, "nobody met anybody: nothing was tested");
}
