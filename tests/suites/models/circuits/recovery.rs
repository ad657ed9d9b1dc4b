//! Few calls: how a circuit of a target that is well closes again, however long its callers pause.
//!
//! The circuit has opened at a time of no call, perhaps for the longest time that it may. Times are in
//! seconds; a call is over before the next one comes.

use super::rules::{Broken, Circuit, Outcome, Settings, State};

const MINUTE: u16 = 60;
/// Calls after which it is taken to never close.
const NEVER: u16 = 50;

/// The calls that come.
#[derive(Clone, Copy, Debug)]
struct Calls {
    /// When the first one comes, after the circuit opened.
    first: u16,
    every: u16,
    take: u16,
    /// How many of those let through are never reported.
    lost: u16,
    /// One in so many succeeds. The others tell nothing: they are ignored.
    one_in: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Recovery {
    /// Calls that were not let through, after those that came while it had to be open.
    refused: u16,
    /// Calls that were let through until it was closed: that one, too, that found it closed.
    let_through: u16,
}

fn recovery(broken: Broken, settings: Settings, calls: Calls) -> Option<Recovery> {
    let mut circuit = Circuit::open(broken, settings);
    let mut recovery = Recovery { refused: 0, let_through: 0 };
    let mut lost = 0;
    circuit.pass(calls.first);
    for call in 0..NEVER {
        let had_to_be_open = calls.first + call * calls.every < settings.open_for;
        let passed = circuit.ask();
        recovery.refused += u16::from(passed.is_none() && !had_to_be_open);
        recovery.let_through += u16::from(passed.is_some());
        let generation = circuit.generation;
        circuit.pass(calls.take);
        if passed == Some(State::HalfOpen) {
            lost += 1;
            let tells = (call + 1) % calls.one_in == 0;
            let outcome = if tells { Outcome::Success } else { Outcome::GivenBack };
            if lost > calls.lost {
                circuit.report(generation, calls.take, outcome);
            }
        }
        if circuit.state == State::Closed {
            return Some(recovery);
        }
        circuit.pass(calls.every - calls.take);
    }
    None
}

/// What an operator might choose.
fn all_settings() -> impl Iterator<Item = Settings> {
    let times = [5, 10, 59, 60, 61, 150];
    let waits = [(1, 1), (5, 60), (50, 50), (60, 60)];
    (1..=4).flat_map(move |probes| {
        (1..=probes).flat_map(move |enough| {
            times.into_iter().flat_map(move |probe_timeout| {
                times.into_iter().flat_map(move |max_duration| {
                    waits.into_iter().map(move |(open_for, open_for_max)| Settings {
                        probes,
                        enough,
                        probe_timeout,
                        max_duration,
                        open_for,
                        open_for_max,
                    })
                })
            })
        })
    })
}

/// Calls once a minute, fast ones and slow ones, at any offset to the circuit's own times.
fn once_a_minute() -> impl Iterator<Item = Calls> {
    (0..MINUTE).step_by(7).flat_map(|first| {
        [0, 4, 5, 9, 10, 59].map(|take| Calls { first, every: MINUTE, take, lost: 0, one_in: 1 })
    })
}

/// Those that came while it had to be open aside, no call is refused, and it is closed by the last that it
/// takes: when enough were let through, or when it has been half-open for too long.
#[test]
fn a_target_with_one_call_a_minute_recovers_if_a_call_is_over_in_time() {
    for settings in all_settings() {
        for calls in once_a_minute() {
            let in_time = calls.take < settings.probe_timeout.min(settings.max_duration);
            let expected = in_time.then(|| {
                let by_time = 1 + (settings.max_duration - calls.take).div_ceil(calls.every);
                Recovery { refused: 0, let_through: by_time.min(settings.enough.into()) }
            });
            let found = recovery(Broken::Nothing, settings, calls);
            assert_eq!(found, expected, "{settings:?} {calls:?}");
        }
    }
}

/// A minute after a call that was never reported, the next one is let through.
#[test]
fn a_call_that_is_lost_costs_no_call_after_it() {
    let settings = Settings {
        probes: 1,
        enough: 1,
        probe_timeout: 10,
        max_duration: MINUTE,
        open_for: 5,
        open_for_max: MINUTE - 10,
    };
    let calls = Calls { first: MINUTE, every: MINUTE, take: 1, lost: 5, one_in: 1 };
    let expected = Some(Recovery { refused: 0, let_through: 6 });
    assert_eq!(recovery(Broken::Nothing, settings, calls), expected);
    assert_ne!(recovery(Broken::OpensWhenNoticed, settings, calls), expected);
}

/// Enough results need not come before too many calls told nothing.
#[test]
fn to_open_when_probes_are_given_back_would_keep_it_open_for_ever() {
    let settings = Settings {
        probes: 3,
        enough: 3,
        probe_timeout: 10,
        max_duration: 10 * MINUTE,
        open_for: 5,
        open_for_max: 5,
    };
    let calls = Calls { first: MINUTE, every: MINUTE, take: 1, lost: 0, one_in: 3 };
    assert_eq!(recovery(Broken::OpensWhenGivenBack, settings, calls), None);
    let expected = Some(Recovery { refused: 0, let_through: 5 });
    assert_eq!(recovery(Broken::Nothing, settings, calls), expected);
}

/// Were all probes needed, a circuit would never close whose callers are too slow to fetch them.
#[test]
fn to_open_with_too_few_results_would_keep_it_open_for_ever() {
    for settings in all_settings() {
        for calls in once_a_minute() {
            let in_time = calls.take < settings.probe_timeout.min(settings.max_duration);
            let last = (u16::from(settings.enough) - 1) * calls.every + calls.take;
            let found = recovery(Broken::TooFewOpen, settings, calls);
            assert_eq!(found.is_some(), in_time && last < settings.max_duration, "{settings:?}");
        }
    }
}

/// Were it half-open by time, its few callers might come while it is open, again and again.
#[test]
fn to_be_half_open_by_time_would_keep_it_open_for_ever() {
    let settings = Settings {
        probes: 3,
        enough: 3,
        probe_timeout: 5,
        max_duration: 10,
        open_for: 50,
        open_for_max: 50,
    };
    let calls = Calls { first: 40, every: MINUTE, take: 1, lost: 0, one_in: 1 };
    assert_eq!(recovery(Broken::HalfOpenByTime, settings, calls), None);
    let expected = Some(Recovery { refused: 0, let_through: 2 });
    assert_eq!(recovery(Broken::Nothing, settings, calls), expected);
}
