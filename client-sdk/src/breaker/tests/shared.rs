//! What a shared circuit makes of calls, and what it is told of them.

use std::{
    sync::atomic::Ordering,
    task::{Context, Poll, Waker},
    time::Duration,
};

use fusebox_core::circuit::{Phase, Settings, WindowSettings};
use fusebox_proto::v1::{self, CircuitMode, CircuitState, Outcome};

use super::super::{fake::*, *};
use crate::{
    Decider, Reason,
    part::{Link, Part},
};

/// Two failures in a row open the local breaker for ten minutes.
fn row() -> Settings {
    let mut settings = Settings { window: WindowSettings::Consecutive(2), ..plain() };
    (settings.open_for.first, settings.open_for.max) = (SECOND * 600, SECOND * 600);
    settings
}

fn fail(breaker: &Breaker) {
    breaker.try_admit().unwrap().failure("late");
}

fn open_locally(breaker: &Breaker) {
    (0..2).for_each(|_| fail(breaker));
    let rejected = breaker.try_admit().unwrap_err();
    assert_eq!((rejected.reason, rejected.decider), (Reason::CircuitOpen, Decider::Local));
}

fn refusal(breaker: &Breaker) -> (Reason, Decider) {
    let rejected = breaker.try_admit().unwrap_err();
    (rejected.reason, rejected.decider)
}

const BY_SHARED: (Reason, Decider) = (Reason::CircuitOpen, Decider::Memory);

impl Scene {
    /// One whose shared circuit is open, with the wait over.
    fn asks() -> (Self, Breaker) {
        let scene = Self::new();
        let breaker = scene.breaker(row());
        scene.watch(true, vec![open(7, Duration::ZERO)], 3);
        (scene, breaker)
    }

    /// A call that waits for the server.
    fn admit(&self, breaker: &Breaker) -> tokio::task::JoinHandle<Result<Permit, Rejected>> {
        let breaker = breaker.clone();
        let call = self.runtime.spawn(async move { breaker.admit().await });
        self.settle();
        call
    }

    fn joined(
        &self,
        call: tokio::task::JoinHandle<Result<Permit, Rejected>>,
    ) -> Result<Permit, Rejected> {
        self.runtime.block_on(call).unwrap()
    }

    fn asked(&self) -> usize {
        self.server.asks.load(Ordering::Relaxed)
    }
}

#[test]
fn without_a_server_a_full_local_breaker_acts() {
    let scene = Scene::new();
    scene.server.is_down.store(true, Ordering::Relaxed);
    let breaker = scene.breakers.of("unknown").local(Local::default().consecutive_failures(2));
    let breaker = breaker.unwrap();
    open_locally(&breaker);
    let rejected = breaker.try_admit().unwrap_err();
    // Half a second of it by chance, at most.
    let waits = SECOND * 5..SECOND * 5 + MILLI * 500;
    assert!(waits.contains(&rejected.retry_after.unwrap()));
    let evidence = rejected.evidence.unwrap();
    assert_eq!((evidence.calls, &*evidence.error_kinds), (2, &["late".to_owned()][..]));
    assert_eq!(scene.heard(), [(Decider::Local, false)]);
    let counts = scene.counts();
    assert_eq!((counts.memory, counts.local, counts.rejected), (0, 4, 2));
    assert!(scene.report().is_empty(), "who was never told of is not a breaker");
}

// StaleBinds, CountsFromArrival
#[test]
fn a_stale_status_leaves_the_local_breaker_alone() {
    let scene = Scene::new();
    let breaker = scene.breaker(row());
    scene.watch(true, vec![open(7, SECOND * 60)], 3);
    assert_eq!(refusal(&breaker), BY_SHARED);
    // It is 5 s less 1% and 10 ms, however late it comes.
    scene.pass(MILLI * 4_939);
    assert_eq!(refusal(&breaker), BY_SHARED);
    scene.pass(MILLI);
    breaker.try_admit().unwrap().success();
    // Told late, it is believed for what is left.
    let sent = scene.now();
    scene.pass(SECOND * 3);
    scene.breakers.watched(&news(true, vec![open(8, SECOND * 60)], 3), sent);
    assert_eq!(refusal(&breaker), BY_SHARED);
    scene.pass(MILLI * 1_940);
    breaker.try_admit().unwrap().success();
}

// WaitsForHalfOpen
#[test]
fn once_the_wait_is_over_a_call_asks_though_nobody_told_of_half_open() {
    let scene = Scene::new();
    let breaker = scene.breaker(row());
    scene.watch(true, vec![open(7, SECOND)], 3);
    assert_eq!(breaker.try_admit().unwrap_err().retry_after, Some(SECOND));
    assert_eq!(scene.asked(), 0);
    scene.pass(SECOND);
    let call = scene.admit(&breaker);
    assert_eq!(scene.asked(), 1);
    let question = scene.answer(probe(8));
    assert_eq!((question.cost, question.lease), (1, 0));
    assert!(!question.request_id.is_empty());
    assert!(scene.joined(call).unwrap().is_probe());
}

// LocalBarsProbes
#[test]
fn a_probe_passes_whatever_the_local_breaker_says_and_is_told_at_once() {
    let (scene, breaker) = Scene::asks();
    // Its own breaker opened before.
    scene.watch(true, vec![], 8);
    open_locally(&breaker);
    scene.watch(false, vec![open(9, Duration::ZERO)], 8);
    let call = scene.admit(&breaker);
    scene.answer(probe(10));
    let permit = scene.joined(call).unwrap();
    scene.report();
    let hurries = scene.server.hurries.load(Ordering::Relaxed);
    scene.pass(MILLI * 30);
    permit.failure("reset");
    assert_eq!(scene.server.hurries.load(Ordering::Relaxed), hurries + 1);
    let draft = scene.report();
    let [outcome] = &draft.outcomes[..] else { panic!("{draft:?}") };
    assert_eq!((&*outcome.grant_id, outcome.outcome()), ("grant", Outcome::Failure));
    assert_eq!((outcome.latency, &*outcome.error_kind), (wire(MILLI * 30), "reset"));
    assert!(draft.deltas.is_empty(), "a probe is told of by its grant alone");
    assert_eq!(breaker.circuit.own().0, Phase::Open);
}

// LocalIsAskedFirst
#[test]
fn what_the_shared_circuit_refuses_takes_no_place_of_a_local_probe() {
    let scene = Scene::new();
    let mut settings = row();
    settings.open_for.first = SECOND;
    settings.half_open =
        fusebox_core::circuit::HalfOpen { probes: 1, max_in_flight: 1, ..settings.half_open };
    let breaker = scene.breaker(settings);
    scene.watch(true, vec![], 3);
    open_locally(&breaker);
    scene.pass(SECOND);
    // Refused by the shared circuit, by the ramp, and for want of an answer.
    scene.watch(false, vec![open(7, SECOND * 60)], 3);
    assert_eq!(refusal(&breaker), BY_SHARED);
    scene.watch(false, vec![open(8, Duration::ZERO)], 3);
    assert_eq!(refusal(&breaker), BY_SHARED);
    assert_eq!(breaker.circuit.own().0, Phase::Open);
    scene.breakers.linked(Link::Restarted, scene.now());
    assert!(breaker.try_admit().unwrap().is_probe());
}

// UnansweredIsStale, UnreachableIsFailure
#[test]
fn an_ask_without_an_answer_is_a_refusal_and_no_failure() {
    let (scene, breaker) = Scene::asks();
    scene.server.is_down.store(true, Ordering::Relaxed);
    for _ in 0..10 {
        let rejected = scene.joined(scene.admit(&breaker)).unwrap_err();
        assert_eq!((rejected.reason, rejected.decider), BY_SHARED);
        assert_eq!(rejected.evidence.unwrap().calls, 42);
        scene.pass(MILLI * 50);
    }
    assert_eq!(breaker.circuit.own(), (Phase::Closed, 1));
    // One that never comes: the caller waits for 50 ms.
    scene.server.is_down.store(false, Ordering::Relaxed);
    let mut call = scene.admit(&breaker);
    scene.runtime.block_on(async {
        let soon = tokio::time::timeout(MILLI * 49, &mut call).await;
        assert!(soon.is_err(), "it waits for all of its time");
        let rejected = tokio::time::timeout(MILLI * 5, call).await.unwrap().unwrap().unwrap_err();
        assert_eq!((rejected.reason, rejected.decider), BY_SHARED);
    });
    assert_eq!(breaker.circuit.own(), (Phase::Closed, 1));
}

// NoReset, AlwaysReset
#[test]
fn the_local_breaker_begins_anew_only_when_the_shared_one_is_seen_to_close() {
    let scene = Scene::new();
    let breaker = scene.breaker(row());
    scene.watch(true, vec![], 3);
    open_locally(&breaker);
    // Told again that it is closed, also of another generation, it stays open.
    scene.watch(false, vec![], 3);
    scene.watch(true, vec![], 4);
    scene.watch(false, vec![status(CircuitState::Closed, 6)], 4);
    assert_eq!(refusal(&breaker), (Reason::CircuitOpen, Decider::Local));
    scene.heard();
    scene.watch(false, vec![open(7, SECOND)], 4);
    scene.watch(false, vec![status(CircuitState::HalfOpen, 8)], 4);
    scene.watch(false, vec![status(CircuitState::Closed, 9)], 4);
    breaker.try_admit().unwrap().success();
    let (local, server) = (Decider::Local, Decider::Server);
    assert_eq!(scene.heard(), [(server, false), (local, true), (server, true)]);
}

// LocalIsEnough
#[test]
fn what_the_local_breaker_lets_through_an_open_shared_circuit_refuses() {
    let (scene, breaker) = Scene::asks();
    assert_eq!(refusal(&breaker), BY_SHARED);
    assert_eq!(breaker.circuit.own().0, Phase::Closed);
    drop(scene);
}

// SharedIsEnough
#[test]
fn what_the_shared_circuit_lets_through_an_open_local_breaker_refuses() {
    let scene = Scene::new();
    let breaker = scene.breaker(row());
    scene.watch(true, vec![], 3);
    open_locally(&breaker);
    assert_eq!(refusal(&breaker), (Reason::CircuitOpen, Decider::Local));
}

// RefusedIsFailure
#[test]
fn refused_calls_are_told_to_nobody() {
    let scene = Scene::new();
    let breaker = scene.breaker(row());
    scene.watch(true, vec![], 3);
    open_locally(&breaker);
    let delta = scene.delta().unwrap();
    assert_eq!((delta.failures, delta.successes), (2, 0));
    for _ in 0..10 {
        breaker.try_admit().unwrap_err();
    }
    assert_eq!(scene.delta(), None);
}

// ForcedIsStale, ForcedForEver
#[test]
fn a_force_binds_for_its_own_time_also_without_the_server_and_no_longer() {
    let scene = Scene::new();
    let breaker = scene.breaker(row());
    let forced = |mode: CircuitMode, state, generation| v1::CircuitStatus {
        mode: mode.into(),
        mode_expires_in: wire(SECOND * 100),
        evidence: Some(v1::Evidence { forced_reason: "drill".to_owned(), ..Default::default() }),
        ..status(state, generation)
    };
    scene.watch(true, vec![forced(CircuitMode::ForcedOpen, CircuitState::Open, 7)], 3);
    scene.breakers.linked(Link::Down, scene.now());
    for left in [SECOND * 98, SECOND] {
        let rejected = breaker.try_admit().unwrap_err();
        assert_eq!(
            (rejected.reason, rejected.decider),
            (Reason::CircuitForcedOpen, Decider::Memory)
        );
        assert_eq!(rejected.evidence.unwrap().forced_reason, "drill");
        scene.pass(left - MILLI * 5);
    }
    breaker.try_admit().unwrap().success();
    // Disabled, and metrics only, let through what the local breaker would not.
    scene.watch(true, vec![], 8);
    open_locally(&breaker);
    for (generation, mode) in [(9, CircuitMode::Disabled), (10, CircuitMode::MetricsOnly)] {
        scene.watch(false, vec![forced(mode, CircuitState::Closed, generation)], 8);
        scene.pass(SECOND * 10);
        scene.report();
        for _ in 0..5 {
            fail(&breaker);
        }
        let told = scene.delta().map(|delta| (delta.generation, delta.failures));
        assert_eq!(told, (mode == CircuitMode::MetricsOnly).then_some((generation, 5)));
    }
    scene.pass(SECOND * 100);
    assert_eq!(refusal(&breaker), (Reason::CircuitOpen, Decider::Local));
}

#[test]
fn while_one_asks_others_are_refused() {
    let (scene, breaker) = Scene::asks();
    let call = scene.admit(&breaker);
    for _ in 0..100 {
        assert_eq!(refusal(&breaker), BY_SHARED);
        assert!(scene.joined(scene.admit(&breaker)).is_err());
    }
    assert_eq!(scene.asked(), 1);
    scene.answer(probe(8));
    scene.joined(call).unwrap().success();
}

#[test]
fn a_denial_is_a_refusal_with_the_reason_of_the_server() {
    let (scene, breaker) = Scene::asks();
    let call = scene.admit(&breaker);
    let reason = v1::Reason::ProbesInUse;
    scene.answer(denied(CircuitState::HalfOpen, reason, 8, SECOND * 9));
    let rejected = scene.joined(call).unwrap_err();
    assert_eq!((rejected.reason, rejected.decider), (Reason::ProbesInUse, Decider::Server));
    assert_eq!(rejected.retry_after, Some(SECOND * 9));
    // A probe may be given back at any time: it asks again soon, and not at once.
    assert_eq!(refusal(&breaker), (Reason::ProbesInUse, Decider::Memory));
    assert_eq!(scene.asked(), 1);
    scene.pass(MILLI * 50);
    let call = scene.admit(&breaker);
    scene.answer(denied(CircuitState::Open, v1::Reason::CircuitOpen, 9, SECOND * 2));
    assert_eq!(scene.joined(call).unwrap_err().reason, Reason::CircuitOpen);
    scene.pass(MILLI * 1_999);
    assert_eq!(refusal(&breaker), BY_SHARED);
    assert_eq!(scene.asked(), 2);
}

#[test]
fn a_circuit_that_has_closed_meanwhile_leaves_the_call_to_the_local_breaker() {
    let (scene, breaker) = Scene::asks();
    let call = scene.admit(&breaker);
    scene.answer(allowed(CircuitState::Closed, v1::Reason::Unspecified, 9));
    let permit = scene.joined(call).unwrap();
    assert!(!permit.is_probe());
    permit.success();
    let delta = scene.delta().unwrap();
    assert_eq!((delta.generation, delta.successes), (9, 1));
}

#[test]
fn a_circuit_that_is_not_shared_has_its_local_breaker_alone() {
    let (scene, breaker) = Scene::asks();
    let call = scene.admit(&breaker);
    scene.answer(allowed(CircuitState::Unspecified, v1::Reason::NotShared, 0));
    scene.joined(call).unwrap().success();
    open_locally(&breaker);
    assert_eq!(scene.delta(), None);
}

#[test]
fn a_delta_that_there_is_no_room_for_is_not_told_again_soon() {
    let scene = Scene::new();
    let breaker = scene.breaker(plain());
    scene.watch(true, vec![], 3);
    fail(&breaker);
    assert!(scene.delta().is_some());
    let result = v1::ReportResult::NotShared.into();
    let response = v1::ReportResponse { delta_results: vec![result], ..Default::default() };
    scene.breakers.reported(&response, scene.now());
    fail(&breaker);
    assert_eq!(scene.delta(), None);
}

#[test]
fn a_probe_whose_caller_has_left_waits_for_the_next() {
    let (scene, breaker) = Scene::asks();
    let call = scene.admit(&breaker);
    call.abort();
    scene.answer(probe(8));
    assert!(breaker.circuit.has_pocket());
    let permit = breaker.try_admit().unwrap();
    assert!(permit.is_probe() && !breaker.circuit.has_pocket());
    permit.success();
    assert_eq!(scene.report().outcomes[0].outcome(), Outcome::Success);
}

#[test]
fn a_call_that_does_not_wait_asks_for_the_next_one() {
    let (scene, breaker) = Scene::asks();
    assert_eq!(refusal(&breaker), BY_SHARED);
    scene.answer(probe(8));
    assert!(breaker.try_admit().unwrap().is_probe());
}

#[test]
fn a_probe_that_nobody_comes_for_is_given_back_before_its_time_is_over() {
    let (scene, breaker) = Scene::asks();
    assert_eq!(refusal(&breaker), BY_SHARED);
    scene.answer(probe(8));
    scene.pass(MILLI * 9_700);
    scene.breakers.tend(scene.now());
    assert!(breaker.circuit.has_pocket());
    scene.pass(MILLI * 100);
    scene.breakers.tend(scene.now());
    assert!(!breaker.circuit.has_pocket());
    assert_eq!(scene.report().outcomes[0].outcome(), Outcome::Abandoned);
}

#[test]
fn a_call_that_is_dropped_is_abandoned_and_gives_its_probe_back() {
    let (scene, breaker) = Scene::asks();
    assert_eq!(refusal(&breaker), BY_SHARED);
    scene.answer(probe(8));
    let mut call = Box::pin(breaker.call(std::future::pending::<Result<(), ()>>()));
    let polled = call.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(polled, Poll::Pending));
    drop(call);
    assert_eq!(scene.report().outcomes[0].outcome(), Outcome::Abandoned);
}

#[test]
fn a_ramp_lets_its_share_through() {
    let scene = Scene::new();
    let breaker = scene.breaker(row());
    let ramps =
        |share| v1::CircuitStatus { ramp_basis_points: share, ..status(CircuitState::Closed, 7) };
    scene.watch(true, vec![ramps(Some(5_000))], 3);
    let passed: Vec<_> = (0..6).map(|_| breaker.try_admit().map(Permit::success)).collect();
    let refused: Vec<_> = passed.iter().map(|one| one.as_ref().err().map(|no| no.reason)).collect();
    let ramping = Some(Reason::Ramping);
    assert_eq!(refused, [None, ramping, None, ramping, None, ramping]);
    scene.watch(false, vec![ramps(None)], 3);
    assert!((0..6).all(|_| breaker.try_admit().map(Permit::success).is_ok()));
    assert_eq!(scene.delta().unwrap().successes, 9);
}

#[test]
fn calls_of_a_generation_that_has_passed_are_told_to_nobody() {
    let scene = Scene::new();
    let breaker = scene.breaker(plain());
    scene.watch(true, vec![], 3);
    let (good, bad) = (breaker.try_admit().unwrap(), breaker.try_admit().unwrap());
    breaker.try_admit().unwrap().success();
    scene.watch(false, vec![status(CircuitState::Closed, 7)], 3);
    good.success();
    bad.failure("");
    assert_eq!(scene.delta(), None);
    breaker.try_admit().unwrap().success();
    assert_eq!(scene.delta().unwrap().generation, 7);
}

#[test]
fn the_local_breaker_counts_calls_of_a_shared_generation_that_has_passed() {
    let scene = Scene::new();
    let breaker = scene.breaker(row());
    scene.watch(true, vec![], 3);
    let calls = [breaker.try_admit().unwrap(), breaker.try_admit().unwrap()];
    scene.watch(false, vec![status(CircuitState::Closed, 7)], 3);
    calls.into_iter().for_each(|call| call.failure(""));
    assert_eq!(breaker.circuit.own().0, Phase::Open);
}

#[test]
fn what_could_not_be_sent_adds_up_while_its_generation_holds() {
    let scene = Scene::new();
    let breaker = scene.breaker(plain());
    scene.watch(true, vec![], 3);
    for _ in 0..1_000 {
        breaker.try_admit().unwrap().success();
        scene.pass(MILLI);
        scene.breakers.tend(scene.now());
    }
    scene.watch(false, vec![], 5);
    let delta = scene.delta().unwrap();
    assert_eq!((delta.generation, delta.successes), (5, 1_000));
    assert_eq!(delta.latency_counts.iter().sum::<u64>(), 1_000);
    breaker.try_admit().unwrap().success();
    scene.breakers.linked(Link::Replaced, scene.now());
    scene.watch(true, vec![], 2);
    assert_eq!(scene.delta(), None);
    breaker.try_admit().unwrap().success();
    assert_eq!(scene.delta().unwrap().generation, 2);
}

#[test]
fn many_failures_are_told_at_once() {
    let scene = Scene::new();
    let mut settings = plain();
    settings.failure_rate = fusebox_core::circuit::Share::ALL;
    let breaker = scene.breaker(settings);
    scene.watch(true, vec![], 3);
    let hurries = || scene.server.hurries.load(Ordering::Relaxed);
    breaker.try_admit().unwrap().success();
    (0..19).for_each(|_| fail(&breaker));
    assert_eq!(hurries(), 0);
    (0..30).for_each(|_| fail(&breaker));
    assert_eq!(hurries(), 1);
    scene.report();
    (0..20).for_each(|_| fail(&breaker));
    assert_eq!(hurries(), 2);
}

#[test]
fn a_snapshot_tells_also_of_those_that_it_does_not_name() {
    let scene = Scene::new();
    let breaker = scene.breaker(plain());
    scene.watch(true, vec![open(7, SECOND * 60)], 3);
    assert_eq!(refusal(&breaker), BY_SHARED);
    // In parts: what was told before goes on until all of it is told.
    let part = |snapshot, complete| v1::WatchResponse { complete, ..news(snapshot, vec![], 9) };
    scene.breakers.watched(&part(true, false), scene.now());
    assert_eq!(refusal(&breaker), BY_SHARED);
    scene.breakers.watched(&part(false, true), scene.now());
    breaker.try_admit().unwrap().success();
    assert_eq!(scene.delta().unwrap().generation, 9);
}

#[test]
fn a_circuit_that_comes_in_use_later_knows_what_was_told() {
    let scene = Scene::new();
    let breaker = scene.breaker(plain());
    let other = |key: &str| v1::CircuitStatus { key: key.to_owned(), ..open(7, SECOND * 60) };
    scene.watch(true, vec![other("a"), other("b")], 3);
    scene.watch(
        false,
        vec![v1::CircuitStatus { key: "b".to_owned(), ..status(CircuitState::Closed, 4) }],
        4,
    );
    assert_eq!(refusal(&breaker.key("a")), BY_SHARED);
    for key in ["b", "c"] {
        scene.bind("payments", key, plain(), false);
        breaker.key(key).try_admit().unwrap().success();
        assert_eq!(scene.delta().unwrap().generation, 4, "{key}");
    }
}

#[test]
fn a_restart_makes_all_stale_at_once() {
    let scene = Scene::new();
    let breaker = scene.breaker(plain());
    scene.watch(true, vec![open(7, SECOND * 60)], 3);
    scene.breakers.linked(Link::Resumed, scene.now());
    assert_eq!(refusal(&breaker), BY_SHARED);
    scene.breakers.linked(Link::Restarted, scene.now());
    breaker.try_admit().unwrap().success();
}

#[test]
fn the_answer_to_a_report_tells_where_no_watch_does() {
    let scene = Scene::new();
    let breaker = scene.breaker(plain());
    breaker.try_admit().unwrap().failure("");
    // Which generation it is nobody told: the report asks, and tells nothing.
    let delta = scene.delta().unwrap();
    assert_eq!((delta.generation, delta.failures), (0, 0));
    assert_eq!(scene.delta(), None);
    let sent = scene.now();
    scene.pass(MILLI * 10);
    let status = v1::CircuitStatus { valid_for: wire(SECOND * 5), ..open(7, SECOND * 60) };
    let response = v1::ReportResponse { circuits: vec![status], ..Default::default() };
    scene.breakers.reported(&response, sent);
    assert_eq!(refusal(&breaker), BY_SHARED);
    scene.pass(SECOND * 5);
    breaker.try_admit().unwrap().success();
}

#[test]
fn a_policy_that_only_watches_refuses_nothing_and_is_told() {
    let scene = Scene::new();
    scene.bind("payments", "", row(), true);
    let breaker = scene.breakers.of("payments");
    scene.watch(true, vec![], 3);
    (0..10).for_each(|_| fail(&breaker));
    assert_eq!(scene.delta().unwrap().failures, 10);
    scene.watch(false, vec![open(7, SECOND * 60)], 3);
    breaker.try_admit().unwrap().success();
}

#[test]
fn idle_circuits_leave_and_those_that_are_held_stay() {
    let scene = Scene::new();
    let breaker = scene.breaker(plain());
    let held = breaker.key("held");
    for number in 0..100 {
        breaker.try_admit_for(&number.to_string()).unwrap().success();
    }
    let all = || scene.breakers.in_use();
    assert_eq!(all(), 102);
    for _ in 0..10 {
        scene.breakers.tend(scene.now());
        scene.pass(SECOND * 60);
    }
    scene.breakers.tend(scene.now());
    assert_eq!(all(), 2);
    assert_eq!(scene.counts().local, 100);
    assert!(Arc::ptr_eq(&held.circuit, &breaker.key("held").circuit));
}

#[test]
fn past_the_bound_a_circuit_has_its_local_breaker_alone_with_the_settings_of_the_policy() {
    let scene = Scene::new();
    let breaker = scene.breaker(row());
    scene.watch(true, vec![], 3);
    let keys: Vec<_> = (0..10_000).map(|number| number.to_string()).collect();
    let held: Vec<_> = keys.iter().map(|key| breaker.key(key)).collect();
    let past = held.last().unwrap();
    open_locally(past);
    assert!(past.key("9999").try_admit().is_err(), "it is the same for all");
    assert_eq!(scene.delta(), None);
    fail(&breaker);
    assert_eq!(scene.delta().unwrap().failures, 1);
}

#[test]
fn only_policies_that_are_breakers_are_watched() {
    let scene = Scene::new();
    scene.breakers.of("unknown");
    assert!(scene.breakers.watches().is_empty());
    let breaker = scene.breaker(plain());
    assert_eq!(scene.breakers.watches(), ["payments".into()]);
    drop(breaker);
}

#[test]
fn at_its_end_a_client_tells_all_and_asks_nothing_more() {
    let (scene, breaker) = Scene::asks();
    let closed = breaker.key("closed");
    scene.bind("payments", "closed", plain(), false);
    closed.try_admit().unwrap().success();
    assert_eq!(refusal(&breaker), BY_SHARED);
    scene.answer(probe(8));
    let mut draft = crate::part::Draft::default();
    scene.breakers.close(&mut draft, scene.now());
    assert_eq!((draft.outcomes.len(), draft.deltas.len()), (1, 1));
    assert!(scene.joined(scene.admit(&breaker)).is_err());
    assert_eq!(scene.asked(), 1);
}

#[test]
fn threads_that_share_a_circuit_lose_no_call() {
    let scene = Scene::new();
    let breaker = scene.breaker(plain());
    scene.watch(true, vec![], 3);
    let each = 20_000;
    let told = std::sync::atomic::AtomicU64::new(0);
    let tell = || {
        let draft = scene.report();
        let calls = draft.deltas.iter().map(|delta| delta.successes + delta.failures);
        told.fetch_add(calls.sum(), Ordering::Relaxed);
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let (breaker, scene) = (&breaker, &scene);
                scope.spawn(move || {
                    for call in 0..each {
                        let permit = breaker.try_admit().unwrap();
                        if thread == 0 && call % 100 == 0 {
                            scene.pass(MILLI);
                            permit.failure("x");
                        } else {
                            permit.success();
                        }
                    }
                })
            })
            .collect();
        while threads.iter().any(|thread| !thread.is_finished()) {
            tell();
            scene.breakers.tend(scene.now());
        }
    });
    tell();
    assert_eq!(told.load(Ordering::Relaxed), 4 * each);
    assert_eq!(scene.counts().memory, 4 * each);
}
