//! What a circuit is told, and what becomes of it.

#![allow(clippy::unwrap_used)]

use alloc::{format, vec};
use core::cell::Cell;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const MILLI: Duration = Duration::from_millis(1);

/// One reporter is enough, no chance, no ramp.
fn plain() -> Settings {
    let mut settings = Settings { min_reporters: 1, ..Settings::default() };
    settings.open_for.jitter = Share::NONE;
    settings.ramp.steps.clear();
    settings
}

fn share(basis_points: u16) -> Share {
    Share::new(basis_points).unwrap()
}

fn counts(calls: u32, failures: u32) -> Counts {
    Counts { calls, failures, slow: 0 }
}

/// A circuit, and what each turn of it is taken in.
struct Scene {
    circuit: Circuit,
    breaker: Breaker,
    now: Time,
    draw: u32,
    last: Cell<u64>,
}

impl Scene {
    fn new(settings: Settings) -> Self {
        let (breaker, now) = (Breaker::new(settings).unwrap(), Time::ZERO.after(SECOND * 1_000));
        let circuit = Circuit::new(Generation(0), &breaker, now);
        Self { circuit, breaker, now, draw: 0, last: Cell::new(0) }
    }

    /// One that has just opened.
    fn open(settings: Settings) -> Self {
        let mut scene = Self::new(settings);
        let enough = scene.breaker.min_calls.max(2);
        scene.tell("a", counts(enough, enough));
        assert_eq!(scene.circuit.phase(), Phase::Open);
        scene
    }

    /// One whose first probe is out.
    fn half_open(settings: Settings) -> (Self, Admitted) {
        let mut scene = Self::open(settings);
        scene.pass(scene.breaker.open_for.first);
        let probe = scene.call().unwrap();
        assert_eq!(scene.circuit.phase(), Phase::HalfOpen);
        (scene, probe)
    }

    fn turn<T>(&mut self, act: impl FnOnce(&mut Circuit, Turn<'_>) -> T) -> T {
        let Self { circuit, breaker, now, draw, last } = self;
        let generations = || {
            last.set(last.get() + 1);
            Generation(last.get())
        };
        act(circuit, Turn { breaker, now: *now, draw: *draw, generations: &generations })
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now.after(time);
    }

    fn phase(&mut self) -> Phase {
        self.turn(Circuit::touch);
        self.circuit.phase()
    }

    fn ask(&mut self) -> Passage {
        self.turn(Circuit::ask)
    }

    fn call(&mut self) -> Result<Admitted, (Refusal, Option<Duration>)> {
        self.turn(|circuit, turn| match circuit.ask(turn) {
            Passage::Refused { refusal, retry_after } => {
                circuit.refuse(Passage::Refused { refusal, retry_after }, turn);
                Err((refusal, retry_after))
            }
            passage => Ok(circuit.admit(passage, turn)),
        })
    }

    fn probe_of(&mut self, admitted: Admitted, call: Call<'_>, by: Reporter<'_>) -> Reported {
        let (id, _) = admitted.probe.unwrap();
        self.turn(|circuit, turn| circuit.report_probe((admitted.generation, id), call, by, turn))
    }

    fn probe(&mut self, admitted: Admitted, outcome: Outcome) -> Reported {
        self.probe_of(admitted, Call { outcome, latency: None, kind: "" }, by("a"))
    }

    fn tell_of(&mut self, call: Call<'_>, by: Reporter<'_>) -> Reported {
        let generation = self.circuit.generation();
        self.turn(|circuit, turn| circuit.report_call(generation, call, by, turn))
    }

    fn one(&mut self, outcome: Outcome) {
        self.tell_of(Call { outcome, latency: None, kind: "" }, by("a"));
    }

    fn slow(&mut self, latency: Duration) {
        let outcome = Outcome::Success;
        self.tell_of(Call { outcome, latency: Some(latency), kind: "" }, by("a"));
    }

    fn tell(&mut self, reporter: &str, counts: Counts) -> Reported {
        let generation = self.circuit.generation();
        let delta = Delta { counts, ..Delta::default() };
        self.turn(|circuit, turn| circuit.report(generation, delta, by(reporter), turn))
    }

    fn set(&mut self, mode: Mode, ttl: Duration) -> bool {
        let order = Order { mode, ttl, reason: "drill".into(), actor: "eva".into() };
        self.turn(|circuit, turn| circuit.set(&order, turn))
    }

    fn restart(&mut self) {
        let kept = self.circuit.kept();
        self.circuit = self.turn(|_, turn| Circuit::recovered(kept, turn));
    }
}

fn by(id: &str) -> Reporter<'_> {
    Reporter { id, zone: "" }
}

#[test]
fn a_rate_opens_at_its_threshold() {
    for (failures, phase) in [(9, Phase::Closed), (10, Phase::Open), (11, Phase::Open)] {
        let mut scene = Scene::new(plain());
        scene.tell("a", counts(20, failures));
        assert_eq!(scene.circuit.phase(), phase, "{failures} of 20");
    }
}

#[test]
fn no_rate_opens_below_the_least_calls() {
    let mut scene = Scene::new(plain());
    scene.tell("a", counts(19, 19));
    assert_eq!(scene.circuit.phase(), Phase::Closed);
}

#[test]
fn a_call_is_slow_above_its_limit_and_not_at_it() {
    let slow_call = Some(SlowCall { over: SECOND, rate: share(10_000) });
    for (latency, phase) in [(SECOND, Phase::Closed), (SECOND + MILLI, Phase::Open)] {
        let mut scene = Scene::new(Settings { slow_call, min_calls: 2, ..plain() });
        scene.slow(latency);
        scene.slow(latency);
        assert_eq!(scene.circuit.phase(), phase, "{latency:?}");
    }
}

#[test]
fn a_success_can_open_it() {
    let mut scene = Scene::new(Settings { min_calls: 4, ..plain() });
    for outcome in [Outcome::Failure, Outcome::Success, Outcome::Failure] {
        scene.one(outcome);
    }
    assert_eq!(scene.circuit.phase(), Phase::Closed);
    scene.one(Outcome::Success);
    assert_eq!(scene.circuit.phase(), Phase::Open);
}

#[test]
fn a_wait_is_over_when_it_has_passed() {
    let mut scene = Scene::open(plain());
    scene.pass(SECOND * 5 - Duration::from_nanos(1));
    assert_eq!(scene.call(), Err((Refusal::Open, Some(Duration::from_nanos(1)))));
    scene.pass(Duration::from_nanos(1));
    assert_eq!(scene.ask(), Passage::Probe);
    // Asked for, and refused by others: nothing has happened.
    scene.turn(|circuit, turn| circuit.refuse(Passage::Probe, turn));
    assert_eq!(scene.circuit.phase(), Phase::Open);
    assert_eq!(scene.call().unwrap().generation, scene.circuit.generation());
    assert_eq!(scene.circuit.phase(), Phase::HalfOpen);
}

#[test]
fn after_recovery_one_call_in_four_passes_and_the_first_does() {
    let ramp = Settings::default().ramp;
    let (mut scene, probe) = Scene::half_open(Settings { ramp, min_calls: 1, ..plain() });
    scene.probe(probe, Outcome::Success);
    assert_eq!(scene.circuit.phase(), Phase::Closed);
    for of_eight in [2, 4, 6, 8, 8] {
        let passed = [(); 8].map(|()| scene.call().is_ok());
        assert!(passed[0] || of_eight > 2, "the first call");
        assert_eq!(passed.iter().filter(|passed| **passed).count(), of_eight);
        scene.pass(SECOND * 5);
    }
    assert_eq!(scene.turn(|circuit, turn| circuit.view(turn)).ramp, None);
}

#[test]
fn a_call_that_others_refuse_keeps_its_place_in_the_ramp() {
    let ramp = Settings::default().ramp;
    let (mut scene, probe) = Scene::half_open(Settings { ramp, min_calls: 1, ..plain() });
    scene.probe(probe, Outcome::Success);
    for _ in 0..3 {
        assert_eq!(scene.ask(), Passage::Free);
        scene.turn(|circuit, turn| circuit.refuse(Passage::Free, turn));
    }
    assert!(scene.call().is_ok());
    assert_eq!(scene.call(), Err((Refusal::Ramping, None)));
}

#[test]
fn a_circuit_that_ramps_up_can_open() {
    let ramp = Settings::default().ramp;
    let (mut scene, probe) = Scene::half_open(Settings { ramp, min_calls: 2, ..plain() });
    scene.probe(probe, Outcome::Success);
    let second = scene.call().unwrap();
    scene.probe(second, Outcome::Success);
    assert!(scene.circuit.kept().ramps && scene.circuit.is_timed());
    scene.tell("a", counts(2, 2));
    assert_eq!(scene.circuit.phase(), Phase::Open);
    assert!(!scene.circuit.kept().ramps && !scene.circuit.is_timed());
}

#[test]
fn each_wait_in_vain_is_longer_and_closing_begins_again() {
    let mut scene = Scene::open(Settings { min_calls: 1, ..plain() });
    for wait in [5, 10, 20, 40, 60, 60] {
        scene.pass(SECOND * wait - MILLI);
        assert_eq!(scene.call(), Err((Refusal::Open, Some(MILLI))), "{wait} s");
        scene.pass(MILLI);
        let probe = scene.call().unwrap();
        scene.probe(probe, Outcome::Failure);
    }
    scene.pass(SECOND * 60);
    let probe = scene.call().unwrap();
    scene.probe(probe, Outcome::Success);
    scene.tell("a", counts(2, 2));
    assert_eq!(scene.call(), Err((Refusal::Open, Some(SECOND * 5))));
}

#[test]
fn no_more_probes_run_at_a_time_than_may() {
    let mut settings = plain();
    settings.half_open.max_in_flight = 2;
    settings.half_open.probes = 3;
    let (mut scene, first) = Scene::half_open(settings);
    let second = scene.call().unwrap();
    scene.pass(SECOND);
    // The first is known of by its time to live.
    assert_eq!(scene.call(), Err((Refusal::ProbesInUse, Some(SECOND * 9))));
    scene.probe(first, Outcome::Success);
    let third = scene.call().unwrap();
    scene.probe(second, Outcome::Success);
    assert_eq!(scene.call().map(|_| ()), Err((Refusal::ProbesInUse, Some(SECOND * 10))));
    scene.probe(third, Outcome::Success);
    assert_eq!(scene.circuit.phase(), Phase::Closed);
}

#[test]
fn half_open_ends_by_time_as_of_when_it_was_due() {
    // One success is counted: closed. Nothing is: open.
    for (told, phase) in [(Some(Outcome::Success), Phase::Closed), (None, Phase::Open)] {
        let (mut scene, probe) = Scene::half_open(plain());
        let began = scene.now;
        scene.probe(probe, told.unwrap_or(Outcome::Ignored));
        scene.pass(SECOND * 60 - MILLI);
        assert_eq!(scene.phase(), Phase::HalfOpen);
        scene.pass(SECOND * 1_000);
        assert_eq!(scene.phase(), phase);
        assert_eq!(scene.circuit.kept().since, began.after(SECOND * 60));
    }
}

#[test]
fn a_probe_that_is_not_told_of_fails_when_it_expires_and_before_the_circuit_is_judged() {
    let mut settings = plain();
    settings.half_open.max_duration = settings.half_open.probe_timeout;
    let (mut scene, _) = Scene::half_open(settings);
    let began = scene.now;
    scene.pass(SECOND * 3_600);
    assert_eq!(scene.phase(), Phase::Open);
    let Transition { at, evidence, .. } = scene.circuit.history().last().unwrap();
    let evidence = evidence.as_deref().unwrap();
    assert_eq!((*at, evidence.calls), (began.after(SECOND * 10), 1));
    assert_eq!(evidence.failure_rate, Share::ALL);
}

#[test]
fn a_late_report_of_a_probe_changes_nothing() {
    let (mut scene, probe) = Scene::half_open(plain());
    scene.pass(SECOND * 10);
    assert_eq!(scene.probe(probe, Outcome::Success), Reported::Stale);
    assert_eq!(scene.circuit.phase(), Phase::HalfOpen, "one of three has failed");
    let second = scene.call().unwrap();
    assert_eq!(scene.probe(second, Outcome::Success), Reported::Applied);
    assert_eq!(scene.probe(second, Outcome::Success), Reported::Stale, "told twice");
}

#[test]
fn probes_are_given_back_so_often_and_then_it_opens() {
    for outcome in [Outcome::Ignored, Outcome::Abandoned, Outcome::LocalFailure] {
        let (mut scene, probe) = Scene::half_open(plain());
        scene.probe(probe, outcome);
        for _ in 0..2 {
            let probe = scene.call().unwrap();
            scene.probe(probe, outcome);
        }
        assert_eq!(scene.circuit.phase(), Phase::HalfOpen);
        let probe = scene.call().unwrap();
        assert_eq!(scene.probe(probe, outcome), Reported::Applied);
        assert_eq!(scene.circuit.phase(), Phase::Open, "{outcome:?}");
    }
}

#[test]
fn no_probe_is_let_through_while_one_from_before_may_run() {
    let (mut scene, _) = Scene::half_open(Settings { min_calls: 1, ..plain() });
    let second = scene.call().unwrap();
    scene.probe(second, Outcome::Success);
    assert_eq!(scene.circuit.phase(), Phase::Closed);
    scene.tell("a", counts(2, 2));
    // It waits for five seconds, and the first probe runs for ten.
    assert_eq!(scene.call(), Err((Refusal::Open, Some(SECOND * 10))));
}

#[test]
fn reports_of_another_generation_change_nothing() {
    let mut scene = Scene::open(plain());
    let delta = Delta { counts: counts(100, 100), ..Delta::default() };
    for generation in [0, 1, 2].map(Generation) {
        let reported = scene.turn(|circuit, turn| circuit.report(generation, delta, by("a"), turn));
        assert_eq!(reported, Reported::Stale, "{generation:?}");
    }
    assert_eq!(scene.circuit.generation(), Generation(1));
}

#[test]
fn calls_of_a_window_of_calls_push_each_other_out() {
    let window = WindowSettings::Calls(4);
    let mut scene = Scene::new(Settings { window, min_calls: 100, ..plain() });
    scene.tell("a", counts(2, 2));
    scene.tell("b", counts(2, 0));
    assert_eq!(scene.circuit.phase(), Phase::Open, "min_calls is at most the window");

    let mut scene = Scene::new(Settings { window, min_calls: 4, ..plain() });
    scene.tell("a", counts(3, 1));
    scene.tell("a", counts(4, 0));
    scene.tell("a", counts(1, 1));
    assert_eq!(scene.circuit.phase(), Phase::Closed);
    // What fails is taken to be last of what is told together.
    scene.tell("a", counts(1_000_000, 1));
    assert_eq!(scene.circuit.phase(), Phase::Closed);
    scene.tell("a", counts(1, 1));
    assert_eq!(scene.circuit.phase(), Phase::Open);
}

#[test]
fn failures_in_a_row_open_it_and_a_success_between_them_does_not() {
    let window = WindowSettings::Consecutive(3);
    let mut scene = Scene::new(Settings { window, ..plain() });
    for _ in 0..20 {
        scene.tell("a", counts(2, 2));
        scene.one(Outcome::Success);
    }
    scene.tell("a", counts(5, 2));
    assert_eq!(scene.circuit.phase(), Phase::Closed);
    scene.one(Outcome::Ignored);
    scene.one(Outcome::Failure);
    assert_eq!(scene.circuit.phase(), Phase::Open);
}

#[test]
fn what_was_counted_in_order_is_not_idle_for_an_hour() {
    for window in [WindowSettings::Calls(4), WindowSettings::Consecutive(3)] {
        let mut scene = Scene::new(Settings { window, ..plain() });
        assert!(scene.circuit.is_idle(scene.now));
        scene.tell("a", counts(1, 1));
        scene.pass(SECOND * 3_599);
        assert!(!scene.circuit.is_idle(scene.now), "{window:?}");
        scene.pass(SECOND);
        assert!(scene.circuit.is_idle(scene.now), "{window:?}");
    }
}

#[test]
fn one_of_three_does_not_open_it_and_is_told_that_it_fails_alone() {
    let mut scene = Scene::new(plain());
    scene.tell("b", counts(1, 0));
    scene.one(Outcome::Ignored);
    scene.tell("c", counts(20, 20));
    assert_eq!(scene.circuit.phase(), Phase::Closed, "one who is ignored is there, too");
    let outlier =
        ["a", "b", "c"].map(|one| scene.turn(|circuit, turn| circuit.is_outlier(one, turn)));
    assert_eq!(outlier, [false, false, true]);
    let mut seen = vec![];
    scene.turn(|circuit, turn| {
        circuit.visit_reporters(turn, |one, counts, unhealthy| {
            seen.push(format!("{} {} {unhealthy}", one.id, counts.calls));
        });
    });
    assert_eq!(seen, ["b 1 false", "a 0 false", "c 20 true"]);
    // Two of them are a quorum.
    scene.tell("b", counts(19, 19));
    assert_eq!(scene.circuit.phase(), Phase::Open);
}

#[test]
fn who_is_first_after_a_restart_does_not_open_it_alone() {
    let settings = || Settings { min_reporters: 2, ..plain() };
    let failing = counts(20, 20);
    let mut scene = Scene::new(settings());
    for reporter in ["well", "also well"] {
        scene.tell(reporter, counts(20, 0));
    }
    scene.pass(SECOND * 60);
    scene.restart();
    scene.tell("failing", failing);
    assert_eq!(scene.phase(), Phase::Closed, "the others have yet to tell");
    scene.pass(SECOND * 9);
    scene.tell("failing", failing);
    assert_eq!(scene.phase(), Phase::Closed);
    scene.pass(SECOND);
    scene.tell("failing", failing);
    assert_eq!(scene.phase(), Phase::Open, "by now they would have");

    let mut two = Scene::new(settings());
    two.tell("one", failing);
    two.tell("two", failing);
    assert_eq!(two.phase(), Phase::Open, "two need not wait");
}

#[test]
fn who_says_goodbye_takes_its_calls_along() {
    let mut scene = Scene::new(plain());
    scene.tell("a", counts(100, 0));
    scene.tell("b", counts(20, 19));
    scene.turn(|circuit, turn| circuit.leave("b", turn));
    scene.tell("a", counts(20, 0));
    let evidence = scene.turn(|circuit, turn| circuit.evidence(turn));
    assert_eq!((evidence.calls, evidence.reporters, evidence.failure_rate), (120, 1, Share::NONE));
}

#[test]
fn a_clock_that_was_read_earlier_does_no_harm() {
    let mut settings = Settings { min_calls: 4, ..plain() };
    settings.half_open.probes = 4;
    settings.half_open.max_in_flight = 4;
    let mut scene = Scene::new(settings);
    scene.tell("a", counts(2, 2));
    scene.now = Time::ZERO;
    scene.tell("a", counts(2, 2));
    assert_eq!(scene.circuit.phase(), Phase::Open, "both count");

    scene.now = Time::ZERO.after(SECOND * 2_000);
    let first = scene.call().unwrap();
    scene.now = Time::ZERO.after(SECOND * 1_999);
    scene.call().unwrap();
    let out: vec::Vec<_> = scene.circuit.probes().map(|(_, at)| at).collect();
    assert!(out.is_sorted(), "{out:?}");
    scene.probe(first, Outcome::Success);
    scene.now = Time::ZERO;
    assert_eq!(scene.phase(), Phase::HalfOpen);
}

#[test]
fn changed_settings_forget_calls_but_not_who_is_there() {
    let mut scene = Scene::new(plain());
    for reporter in ["a", "b", "c"] {
        scene.tell(reporter, counts(1, 0));
    }
    let window = WindowSettings::Time(SECOND * 20);
    scene.breaker = Breaker::new(Settings { window, ..plain() }).unwrap();
    scene.tell("c", counts(20, 20));
    let evidence = scene.turn(|circuit, turn| circuit.evidence(turn));
    assert_eq!(evidence.calls, 20);
    assert_eq!(scene.circuit.phase(), Phase::Closed, "alone among three");

    let window = WindowSettings::Consecutive(2);
    scene.breaker = Breaker::new(Settings { window, ..plain() }).unwrap();
    scene.one(Outcome::Failure);
    assert_eq!(scene.circuit.phase(), Phase::Closed);
    scene.one(Outcome::Failure);
    assert_eq!(scene.circuit.phase(), Phase::Open);
}

#[test]
fn who_is_first_after_other_calls_are_counted_does_not_open_it_alone() {
    let mut scene = Scene::new(Settings { window: WindowSettings::Calls(20), ..plain() });
    scene.pass(SECOND * 60);
    for reporter in ["well", "also well"] {
        scene.tell(reporter, counts(20, 0));
    }
    // Reporters are told apart from now on.
    scene.breaker = Breaker::new(Settings { min_reporters: 2, ..plain() }).unwrap();
    scene.tell("failing", counts(20, 20));
    assert_eq!(scene.phase(), Phase::Closed, "the others have yet to tell");
    scene.pass(SECOND * 10);
    scene.tell("failing", counts(20, 20));
    assert_eq!(scene.phase(), Phase::Open, "by now they would have");
}

#[test]
fn one_that_is_open_is_idle_once_a_call_would_be_a_probe() {
    let mut scene = Scene::open(plain());
    let wait = scene.breaker.open_for.first;
    scene.pass(wait - MILLI);
    assert!(!scene.circuit.is_idle(scene.now));
    scene.pass(MILLI);
    assert!(scene.circuit.is_idle(scene.now));
    scene.call().unwrap();
    assert!(!scene.circuit.is_idle(scene.now), "it has a probe");
}

#[test]
fn settings_that_ask_for_less_end_a_half_open_circuit_by_time() {
    let (mut scene, probe) = Scene::half_open(plain());
    scene.probe(probe, Outcome::Success);
    let mut settings = plain();
    settings.half_open.probes = 1;
    settings.half_open.max_in_flight = 1;
    scene.breaker = Breaker::new(settings).unwrap();
    assert_eq!(scene.call(), Err((Refusal::ProbesInUse, Some(SECOND * 60))));
    scene.pass(SECOND * 60);
    assert_eq!(scene.phase(), Phase::Closed);
}

#[test]
fn an_open_circuit_says_why() {
    let slow_call = Some(SlowCall { over: SECOND, rate: share(9_000) });
    let mut scene = Scene::new(Settings { slow_call, min_reporters: 2, ..plain() });
    for (id, zone, kind) in
        [("a", "west", "timeout"), ("b", "east", "timeout"), ("c", "east", "reset")]
    {
        let counts = Counts { calls: 10, failures: 6, slow: 1 };
        let delta = Delta { counts, kinds: &[kind], ..Delta::default() };
        let reporter = Reporter { id, zone };
        scene.turn(|circuit, turn| circuit.report(Generation(0), delta, reporter, turn));
    }
    let opened = scene.now;
    let view = scene.turn(|circuit, turn| circuit.view(turn));
    let evidence = view.evidence.clone().unwrap();
    // The second opened it: what the third told was of a generation before.
    assert_eq!((evidence.calls, evidence.reporters, evidence.unhealthy), (20, 2, 2));
    assert_eq!((evidence.failure_rate, evidence.slow_rate), (share(6_000), share(1_000)));
    assert_eq!(evidence.zones, ["west".into(), "east".into()]);
    assert_eq!(evidence.kinds, ["timeout".into()]);
    assert_eq!(view.half_open_at, Some(opened.after(SECOND * 5)));

    // Since it has opened, it has not closed: that it was half-open is no other time.
    scene.pass(SECOND * 5);
    let (west, kind) = (Reporter { id: "a", zone: "west" }, "refused");
    let admitted = [(); 3].map(|()| scene.call().unwrap());
    let view = scene.turn(|circuit, turn| circuit.view(turn));
    assert_eq!((view.evidence, view.opened_at), (Some(evidence), Some(opened)));
    for probe in admitted {
        let call = Call { outcome: Outcome::Failure, latency: Some(SECOND), kind };
        scene.probe_of(probe, call, west);
    }
    let view = scene.turn(|circuit, turn| circuit.view(turn));
    let evidence = view.evidence.unwrap();
    assert_eq!((evidence.calls, evidence.reporters), (3, 1));
    assert_eq!((&*evidence.zones, &*evidence.kinds), (&["west".into()][..], &[kind.into()][..]));
    assert_eq!((view.phase, view.opened_at), (Phase::Open, Some(opened)));
}

#[test]
fn evidence_of_probes_counts_more_reporters_than_it_names_zones() {
    let mut settings = plain();
    settings.half_open.probes = 20;
    settings.half_open.max_in_flight = 20;
    let (mut scene, first) = Scene::half_open(settings);
    let others = [(); 19].map(|()| scene.call().unwrap());
    for (number, probe) in [first].into_iter().chain(others).enumerate() {
        let name = format!("{number}");
        let call = Call { outcome: Outcome::Failure, latency: None, kind: "" };
        scene.probe_of(probe, call, Reporter { id: &name, zone: &name });
    }
    let evidence = scene.circuit.history().last().unwrap().evidence.clone().unwrap();
    assert_eq!((evidence.reporters, evidence.zones.len()), (20, MAX_KINDS));
}

#[test]
fn kinds_of_long_ago_are_no_evidence() {
    let mut scene = Scene::new(plain());
    let call = Call { outcome: Outcome::Failure, latency: Some(SECOND), kind: "timeout" };
    scene.tell_of(call, by("a"));
    assert!(scene.circuit.latency(Share::ALL).is_some());
    scene.pass(SECOND * 3_600);
    scene.tell("a", counts(20, 20));
    let evidence = scene.circuit.history().last().unwrap().evidence.clone().unwrap();
    assert_eq!((evidence.calls, evidence.kinds.len()), (20, 0));
}

#[test]
fn calls_that_say_nothing_are_counted_aside() {
    let mut scene = Scene::new(plain());
    for outcome in [Outcome::Ignored, Outcome::Abandoned, Outcome::LocalFailure] {
        scene.one(outcome);
    }
    let delta = Delta { ignored: u64::MAX, local_failures: 4, ..Delta::default() };
    scene.turn(|circuit, turn| circuit.report(Generation(0), delta, by("a"), turn));
    assert_eq!(scene.circuit.aside(), Aside { ignored: u64::MAX, local_failures: 5 });
}

#[test]
fn a_restart_keeps_an_open_circuit_open_in_a_new_generation() {
    let mut scene = Scene::open(plain());
    let before = scene.circuit.kept();
    scene.pass(SECOND);
    scene.restart();
    let after = scene.circuit.kept();
    assert_eq!(after, Kept { generation: Generation(2), ..before });
    // Probes of before may still run for ten seconds.
    assert_eq!(scene.call(), Err((Refusal::Open, Some(SECOND * 10))));

    let (mut scene, probe) = Scene::half_open(plain());
    scene.restart();
    assert_eq!(scene.circuit.phase(), Phase::Open);
    assert_eq!(scene.probe(probe, Outcome::Success), Reported::Stale);

    let mut scene = Scene::new(plain());
    scene.restart();
    assert_eq!((scene.phase(), scene.circuit.generation()), (Phase::Closed, Generation(0)));
}

#[test]
fn a_restart_goes_on_with_the_ramp_and_the_order() {
    let ramp = Settings::default().ramp;
    let (mut scene, probe) = Scene::half_open(Settings { ramp, min_calls: 1, ..plain() });
    scene.probe(probe, Outcome::Success);
    scene.restart();
    let passed = (0..40).filter(|_| scene.call().is_ok()).count();
    assert_eq!(passed, 10);
    scene.set(Mode::Disabled, SECOND);
    scene.restart();
    assert_eq!(scene.phase(), Phase::Disabled);
    scene.pass(SECOND);
    scene.restart();
    assert_eq!(scene.circuit.phase(), Phase::Closed);
}

#[test]
fn an_order_ends_by_itself_as_of_its_end() {
    for mode in [Mode::ForcedOpen, Mode::Disabled, Mode::MetricsOnly] {
        let mut scene = Scene::new(plain());
        let began = scene.now;
        assert!(scene.set(mode, SECOND));
        assert!(!scene.set(mode, SECOND), "it is already");
        assert!(scene.set(mode, SECOND * 2), "for longer");
        assert!(scene.circuit.is_timed());
        let refused = scene.call().is_err();
        assert_eq!(refused, mode == Mode::ForcedOpen);
        scene.pass(SECOND * 100);
        assert_eq!(scene.phase(), Phase::Closed);
        let Kept { since, generation, forced, history, .. } = scene.circuit.kept();
        assert_eq!((since, generation, forced), (began.after(SECOND * 2), Generation(2), None));
        let orders: vec::Vec<_> = history.into_iter().map(|one| one.order).collect();
        assert_eq!(orders, [Some(("drill".into(), "eva".into())), None]);
    }
}

#[test]
fn a_disabled_circuit_counts_nothing() {
    let mut scene = Scene::new(plain());
    scene.set(Mode::Disabled, SECOND);
    assert_eq!(scene.tell("a", counts(100, 100)), Reported::Applied);
    assert_eq!(scene.turn(|circuit, turn| circuit.evidence(turn)), Evidence::default());
    assert_eq!(scene.circuit.phase(), Phase::Disabled);
}

#[test]
fn a_circuit_that_only_counts_notes_what_would_open_it() {
    let slow_call = Some(SlowCall { over: SECOND, rate: share(5_000) });
    let mut scene = Scene::new(Settings { slow_call, ..plain() });
    scene.set(Mode::MetricsOnly, SECOND * 3_600);
    scene.tell("a", counts(20, 20));
    assert_eq!(scene.circuit.exceeded(), Exceeded { failures: true, slow: false });
    scene.pass(SECOND * 100);
    scene.tell("a", Counts { calls: 20, failures: 0, slow: 20 });
    assert_eq!(scene.circuit.exceeded(), Exceeded { failures: true, slow: true });
    assert!(scene.call().is_ok());
    assert_eq!(scene.circuit.history().len(), 1);
}

#[test]
fn an_operator_closes_an_open_circuit() {
    let mut scene = Scene::open(plain());
    assert!(scene.set(Mode::Normal, Duration::ZERO));
    assert_eq!(scene.circuit.phase(), Phase::Closed);
    assert!(!scene.set(Mode::Normal, Duration::ZERO));
    assert_eq!(scene.turn(|circuit, turn| circuit.evidence(turn)), Evidence::default());
}

#[test]
fn no_more_transitions_are_remembered_than_there_is_room_for() {
    let mut scene = Scene::new(plain());
    for _ in 0..HISTORY {
        scene.set(Mode::Disabled, SECOND);
        scene.set(Mode::Normal, SECOND);
    }
    let kept = scene.circuit.kept();
    assert_eq!(kept.history.len(), HISTORY);
    assert_eq!(kept.history[HISTORY - 1].generation, kept.generation);
    // Also those of a version that remembered more.
    let longer = Kept { history: [&kept.history[..], &kept.history[..]].concat(), ..kept.clone() };
    scene.circuit = scene.turn(|_, turn| Circuit::recovered(longer, turn));
    assert_eq!(scene.circuit.kept(), kept);
}

#[test]
fn sums_stop_where_they_cannot_grow() {
    let all = Counts { calls: u32::MAX, failures: u32::MAX, slow: u32::MAX };
    let count = WindowSettings::Calls(1_000);
    let row = WindowSettings::Consecutive(1_000);
    for window in [plain().window, count, row] {
        let mut scene = Scene::new(Settings { window, ..plain() });
        scene.set(Mode::MetricsOnly, SECOND * 3_600);
        let latencies = [u64::MAX; LATENCIES + 1];
        let delta = Delta { counts: all, latencies: &latencies, kinds: &["x"], ..Delta::default() };
        for reporter in (0..40).flat_map(|number| [number; 3]) {
            let reporter = format!("{reporter}");
            let generation = scene.circuit.generation();
            scene.turn(|circuit, turn| circuit.report(generation, delta, by(&reporter), turn));
        }
        let evidence = scene.turn(|circuit, turn| circuit.evidence(turn));
        assert_eq!(evidence.failure_rate, Share::ALL, "{window:?}");
        assert!(scene.circuit.exceeded().failures);
    }
}

#[test]
fn the_largest_settings_do_no_harm() {
    let hour = SECOND * 3_600;
    let mut settings = plain();
    settings.min_calls = breaker::MAX_MIN_CALLS;
    settings.slow_call = Some(SlowCall { over: hour * 24, rate: Share::ALL });
    settings.open_for =
        OpenFor { first: hour * 24, factor_hundredths: 1_000, max: hour * 24, jitter: Share::ALL };
    settings.half_open = HalfOpen {
        probes: breaker::MAX_PROBES,
        max_in_flight: breaker::MAX_PROBES,
        probe_timeout: hour * 24,
        max_duration: hour * 24,
    };
    let count = WindowSettings::Calls(breaker::MAX_COUNT);
    let row = WindowSettings::Consecutive(breaker::MAX_COUNT);
    for window in [WindowSettings::Time(hour), count, row] {
        let slow_call = settings.slow_call.filter(|_| window != row);
        let mut scene = Scene::new(Settings { window, slow_call, ..settings.clone() });
        scene.draw = u32::MAX;
        scene.tell("a", counts(u32::MAX, u32::MAX));
        assert_eq!(scene.circuit.phase(), Phase::Open);
        scene.pass(hour * 48);
        let admitted = [(); breaker::MAX_PROBES as usize].map(|()| scene.call().unwrap());
        assert!(scene.call().is_err());
        for probe in admitted {
            assert_eq!(scene.probe(probe, Outcome::Success), Reported::Applied);
        }
        assert_eq!(scene.circuit.phase(), Phase::Closed);
        // At the end of time, nothing is later.
        scene.now = Time::from_nanos(u64::MAX);
        scene.tell("a", counts(u32::MAX, u32::MAX));
        assert!(scene.call().is_ok(), "a wait that does not end is none");
        scene.set(Mode::ForcedOpen, Duration::MAX);
        assert_eq!(scene.phase(), Phase::Closed);
    }
}

#[test]
fn while_a_circuit_is_quiet_good_calls_that_are_told_together_do_what_each_does() {
    let good = |calls| counts(calls, 0);
    let time = Settings { window: WindowSettings::Time(SECOND * 10), ..plain() };
    let mut scene = Scene::new(time.clone());
    let until = |scene: &mut Scene| scene.turn(|circuit, turn| circuit.quiet_until(turn));
    // Nothing failed: until the slice ends.
    let end = Some(Time::ZERO.after(SECOND * 1_001));
    assert_eq!(until(&mut scene), end);
    // 10 of 10 failed, and 20 calls say something: the tenth good one opens it.
    scene.tell("a", counts(10, 10));
    assert_eq!(until(&mut scene), None);
    scene.tell("a", good(9));
    assert_eq!(scene.circuit.phase(), Phase::Closed);
    assert_eq!(until(&mut scene), None);
    scene.tell("a", good(1));
    assert_eq!(scene.circuit.phase(), Phase::Open);
    assert_eq!(until(&mut scene), None, "it counts none");

    // Enough calls below the rate: more only lower it, till the good ones leave the window.
    let mut scene = Scene::new(time);
    scene.tell("a", good(10));
    scene.pass(SECOND);
    scene.tell("a", counts(10, 9));
    assert_eq!(until(&mut scene), Some(Time::ZERO.after(SECOND * 1_002)));
    scene.tell("a", good(u32::MAX / 2));
    assert_eq!(scene.circuit.phase(), Phase::Closed);
    // What several reporters tell, each may weigh otherwise.
    scene.tell("b", good(1));
    assert_eq!(until(&mut scene), None);

    let no_end = Some(Time::from_nanos(u64::MAX));
    let mut row = Scene::new(Settings { window: WindowSettings::Consecutive(3), ..plain() });
    row.tell("a", counts(2, 2));
    assert_eq!(until(&mut row), no_end);
    let mut count = Scene::new(Settings { window: WindowSettings::Calls(10), ..plain() });
    assert_eq!(until(&mut count), no_end);
    count.tell("a", counts(4, 4));
    assert_eq!(until(&mut count), None);
    count.tell("a", good(6));
    assert_eq!(until(&mut count), no_end);
    // Settings that would open it by what is known already.
    count.breaker = Breaker::new(Settings {
        window: WindowSettings::Calls(10),
        failure_rate: share(4_000),
        ..plain()
    })
    .unwrap();
    assert_eq!(until(&mut count), None);
}
