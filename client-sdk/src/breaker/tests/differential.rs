//! The local breaker, and a circuit of the core that is told of each call by itself: they are the same.

use std::{cell::Cell, time::Duration};

use fusebox_core::circuit::{
    Call, Circuit, Generation, HalfOpen, Outcome, Passage, Phase, ProbeId, Reporter, Settings,
    Share, SlowCall, Turn, WindowSettings,
};

use super::super::{fake::*, *};
use crate::{context::Random, part::Part};

/// A circuit that is told of each call.
struct Plain {
    circuit: Circuit,
    breaker: fusebox_core::circuit::Breaker,
    last: Cell<u64>,
}

type PlainPermit = (Generation, Option<ProbeId>, fusebox_core::Time);

impl Plain {
    fn new(settings: Settings, scene: &Scene) -> Self {
        let breaker = fusebox_core::circuit::Breaker::new(settings).unwrap();
        let circuit = Circuit::new(Generation(1), &breaker, scene.now());
        Self { circuit, breaker, last: Cell::new(1) }
    }

    fn turn<T>(&mut self, scene: &Scene, act: impl FnOnce(&mut Circuit, Turn<'_>) -> T) -> T {
        let Self { circuit, breaker, last } = self;
        let generations = || {
            last.set(last.get() + 1);
            Generation(last.get())
        };
        act(circuit, Turn { breaker, now: scene.now(), draw: 0, generations: &generations })
    }

    fn admit(&mut self, scene: &Scene) -> Option<PlainPermit> {
        self.turn(scene, |circuit, turn| {
            let passage = circuit.ask(turn);
            if matches!(passage, Passage::Refused { .. }) {
                circuit.refuse(passage, turn);
                return None;
            }
            let admitted = circuit.admit(passage, turn);
            Some((admitted.generation, admitted.probe.map(|(probe, _)| probe), turn.now))
        })
    }

    fn end(&mut self, (generation, probe, began): PlainPermit, outcome: Outcome, scene: &Scene) {
        let latency = Duration::from_nanos(scene.now().nanos_since(began));
        let call = Call { outcome, latency: Some(latency), kind: "" };
        let by = Reporter { id: "a", zone: "" };
        self.turn(scene, |circuit, turn| match probe {
            Some(probe) => circuit.report_probe((generation, probe), call, by, turn),
            None => circuit.report_call(generation, call, by, turn),
        });
    }
}

fn windows() -> [Settings; 5] {
    let half_open =
        HalfOpen { probes: 3, max_in_flight: 2, probe_timeout: SECOND, max_duration: SECOND * 3 };
    let mut base = Settings { min_calls: 6, half_open, ..plain() };
    base.open_for.first = SECOND;
    let slow_call = Some(SlowCall { over: MILLI * 30, rate: Share::new(6_000).unwrap() });
    let window = WindowSettings::Time(SECOND);
    let time = Settings { window, ..base.clone() };
    let slow = Settings { window, slow_call, ..base.clone() };
    let count = Settings { window: WindowSettings::Calls(10), slow_call, ..base.clone() };
    let row = Settings { window: WindowSettings::Consecutive(3), ..base.clone() };
    let mut ramps = time.clone();
    ramps.ramp.steps.extend([2_500, 7_500].map(|share| Share::new(share).unwrap()));
    ramps.ramp.each = SECOND;
    [time, slow, count, row, ramps]
}

/// A history of calls, of which `mood` says how many fail of a hundred.
fn compare(settings: &Settings, seed: u64) -> u64 {
    let scene = Scene::new();
    let breaker = scene.breaker(settings.clone());
    let mut plain = Plain::new(settings.clone(), &scene);
    let random = Random::of(seed);
    let below = |most: u64| random.next() % most;
    let mut held: Vec<(Permit, PlainPermit)> = Vec::new();
    let mut mood = 0;
    for step in 0..400 {
        match below(20) {
            0..8 => {
                let (ours, theirs) = (breaker.try_admit(), plain.admit(&scene));
                assert_eq!(ours.is_ok(), theirs.is_some(), "seed {seed}, step {step}: {ours:?}");
                held.extend(ours.ok().zip(theirs));
            }
            8..15 if !held.is_empty() => {
                let at = usize::try_from(below(held.len() as u64)).unwrap();
                let (ours, theirs) = held.swap_remove(at);
                let (verdict, outcome) = match below(100) {
                    fate if fate < mood => (Some(Verdict::Failure("")), Outcome::Failure),
                    98 => (Some(Verdict::Ignored), Outcome::Ignored),
                    99 => (Some(Verdict::LocalFailure), Outcome::LocalFailure),
                    97 => (None, Outcome::Abandoned),
                    _ => (Some(Verdict::Success), Outcome::Success),
                };
                match verdict {
                    Some(verdict) => ours.record(verdict),
                    None => drop(ours),
                }
                plain.end(theirs, outcome, &scene);
            }
            15 => mood = [0, 0, 30, 55, 90][usize::try_from(below(5)).unwrap()],
            16 if below(10) == 0 => scene.pass(SECOND * 2),
            17 => scene.breakers.tend(scene.now()),
            18 => drop(scene.report()),
            _ => scene.pass(Duration::from_micros(below(20_000))),
        }
        if seed.is_multiple_of(2) {
            plain.turn(&scene, Circuit::touch);
            let theirs = (plain.circuit.phase(), plain.circuit.generation().0);
            assert_eq!(
                breaker.circuit.own(),
                theirs,
                "seed {seed}, step {step} {:?}",
                settings.window
            );
        }
    }
    plain.turn(&scene, Circuit::touch);
    let theirs = (plain.circuit.phase(), plain.circuit.generation().0);
    assert_eq!(breaker.circuit.own(), theirs, "seed {seed}");
    plain.last.get() + u64::from(plain.circuit.phase() != Phase::Closed)
}

#[test]
fn a_breaker_does_what_one_does_that_is_told_of_each_call() {
    for settings in windows() {
        let transitions: u64 = (0..400).map(|seed| compare(&settings, seed)).sum();
        // It is no use to compare what never opens.
        assert!(transitions > 1_200, "{transitions} transitions of {:?}", settings.window);
    }
}
