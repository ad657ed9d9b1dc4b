//! The gate, cell by cell, as the model has it.

use super::*;
use fusebox_proto::v1::{CircuitMode, CircuitState, CircuitStatus};

const SECOND: Duration = Duration::from_secs(1);

fn at(seconds: u64) -> Time {
    Time::from_nanos(seconds * 1_000_000_000)
}

fn wire(duration: Duration) -> Option<prost_types::Duration> {
    Some(duration.try_into().unwrap())
}

fn told(state: State, generation: u64) -> Told {
    let (ask_at, until) = (at(110), at(120));
    Told { state, generation, ask_at, until, absent: false, ..Told::closed(generation, at(100)) }
}

fn shared(told: Told) -> Shared {
    let mut shared = Shared::default();
    shared.is_told(told);
    shared
}

#[test]
fn every_state_and_age_has_its_gate() {
    let ramps = Told { ramp: Some(2_500), ..told(State::Closed, 1) };
    let never = Time::ZERO;
    let waits = Gate::RefusedByShared { until: at(110) };
    #[rustfmt::skip]
    let table = [
        // told, (fresh and waiting, fresh and may be probed, stale)
        (None,                            [Gate::Local, Gate::Local, Gate::Local]),
        (Some(told(State::Closed, 1)),    [Gate::Local, Gate::Local, Gate::Local]),
        (Some(ramps),                     [Gate::Ramp(2_500), Gate::Ramp(2_500), Gate::Local]),
        (Some(told(State::Open, 1)),      [waits, Gate::Ask, Gate::Local]),
        (Some(told(State::HalfOpen, 1)),  [waits, Gate::Ask, Gate::Local]),
    ];
    for (told, gates) in table {
        let name = format!("{told:?}");
        let shared = told.map(shared).unwrap_or_default();
        let seen = [105, 110, 120].map(|now| shared.gate(never, at(now)));
        assert_eq!(seen, gates, "{name}");
        assert_eq!(shared.is_fresh(never, at(119)), name != "None");
    }
    // A Watch that tells of changes keeps it fresh.
    assert_eq!(shared(told(State::Open, 1)).gate(at(200), at(199)), Gate::Ask);
    // And a refusal is never past validity.
    let short = Told { until: at(107), ..told(State::Open, 1) };
    assert_eq!(shared(short).gate(never, at(105)), Gate::RefusedByShared { until: at(107) });
}

#[test]
fn a_force_binds_for_its_own_time_whatever_else_is_stale() {
    let forced = |mode, state| {
        let told = told(state, 1);
        shared(Told { forced: Some((mode, at(150))), until: at(101), ..told })
    };
    let refuses = forced(Forced::Open, State::Open);
    let disabled = forced(Forced::Disabled, State::Closed);
    let watches = forced(Forced::MetricsOnly, State::Closed);
    for now in [100, 101, 149] {
        let gates = [&refuses, &disabled, &watches].map(|one| one.gate(Time::ZERO, at(now)));
        let until = at(150);
        let [silent, counted] = [false, true].map(|counted| Gate::LetThrough { counted });
        assert_eq!(gates, [Gate::RefusedByForce { until }, silent, counted], "{now}");
    }
    for one in [refuses, disabled, watches] {
        // Past it nobody knows what the circuit is, however fresh what was told is.
        assert_eq!(one.gate(at(200), at(150)), Gate::Local);
        assert!(one.leaves_all_to_local());
    }
}

#[test]
fn only_what_was_seen_open_and_closes_is_a_reason_to_begin_anew() {
    let change = |from: Option<State>, to: State, generation| {
        let mut shared = from.map(|state| shared(told(state, 1))).unwrap_or_default();
        let change = shared.is_told(told(to, generation));
        (change.closed, change.opened, change.generation)
    };
    use State::{Closed, HalfOpen, Open};
    assert_eq!(change(None, Closed, 1), (false, false, true));
    assert_eq!(change(None, Open, 1), (false, true, true));
    assert_eq!(change(Some(Closed), Closed, 1), (false, false, false));
    assert_eq!(change(Some(Closed), Closed, 2), (false, false, true));
    assert_eq!(change(Some(Closed), Open, 2), (false, true, true));
    assert_eq!(change(Some(Open), HalfOpen, 2), (false, false, true));
    assert_eq!(change(Some(HalfOpen), Open, 2), (false, false, true));
    assert_eq!(change(Some(Open), Closed, 2), (true, false, true));
    assert_eq!(change(Some(HalfOpen), Closed, 2), (true, false, true));
    // Also if it was stale meanwhile.
    let mut stale = shared(told(Open, 1));
    stale.is_stale();
    assert_eq!(stale.gate(Time::ZERO, at(105)), Gate::Local);
    assert!(stale.is_told(told(Closed, 2)).closed);
}

#[test]
fn what_is_told_late_changes_nothing() {
    let mut shared = shared(told(State::Closed, 5));
    for late in [told(State::Open, 4), Told { at: at(99), ..told(State::Open, 5) }] {
        assert_eq!(shared.is_told(late), Change::default());
        assert_eq!(shared.told().unwrap().state, State::Closed);
    }
    // An answer that is older, of a later generation, is news.
    assert!(shared.is_told(Told { at: at(99), ..told(State::Open, 6) }).opened);
    // Of the same generation, it is believed as long as either says.
    let longer = Told { until: at(200), ..told(State::Open, 6) };
    shared.is_told(longer);
    shared.is_told(Told { until: at(130), ..told(State::Open, 6) });
    assert_eq!(shared.told().unwrap().until, at(200));
}

#[test]
fn lifetimes_count_from_when_it_was_told_and_the_wait_from_its_arrival() {
    let status = CircuitStatus {
        state: CircuitState::Open.into(),
        mode: CircuitMode::ForcedOpen.into(),
        open_for: wire(SECOND * 2),
        valid_for: wire(SECOND * 5),
        mode_expires_in: wire(SECOND * 50),
        ..CircuitStatus::default()
    };
    let told = Told::of(&status, at(100), at(103)).unwrap();
    assert_eq!(told.ask_at, at(105));
    assert_eq!(told.until, at(100).after(Duration::from_millis(4_940)));
    assert_eq!(told.forced, Some((Forced::Open, at(100).after(Duration::from_millis(49_490)))));
    assert!(Told::of(&CircuitStatus::default(), at(1), at(1)).is_none());
    // A Watch is no older than its own time, less what the server counted; nor from the future.
    assert_eq!(told_at(at(100), wire(SECOND * 20), at(130)), at(120));
    assert_eq!(told_at(at(100), wire(SECOND * 90), at(130)), at(130));
    assert_eq!(told_at(at(100), None, at(130)), at(100));
}

#[test]
fn those_that_nothing_is_told_of_grow_together() {
    let mut absent = shared(Told::closed(3, at(100)));
    absent.grows(5, at(101));
    assert_eq!(absent.generation(), 5);
    // What was told by its name stays what it is.
    let mut named = shared(told(State::Closed, 3));
    named.grows(5, at(101));
    assert_eq!(named.generation(), 3);
    // An answer to a report, of the generation that it has anyway, gives it no name.
    absent.is_told(Told { at: at(102), ..told(State::Closed, 5) });
    absent.grows(6, at(103));
    assert_eq!(absent.generation(), 6);
    absent.is_told(told(State::Open, 7));
    absent.grows(8, at(104));
    assert_eq!(absent.generation(), 7);
}

#[test]
fn a_ramp_lets_its_share_through_and_the_first_call() {
    for (share, passes) in [(2_500, "1000100010"), (5_000, "1010101010"), (7_500, "1011101110")] {
        let mut shared = shared(Told { ramp: Some(share), ..told(State::Closed, 1) });
        let seen: String =
            (0..10).map(|_| if shared.passes_ramp(share) { '1' } else { '0' }).collect();
        assert_eq!(seen, passes);
    }
    // A later step goes on where the one before was.
    let mut shared = shared(Told { ramp: Some(2_500), ..told(State::Closed, 1) });
    assert!(shared.passes_ramp(2_500));
    shared.is_told(Told { ramp: Some(5_000), ..told(State::Closed, 1) });
    assert!(!shared.passes_ramp(5_000) && shared.passes_ramp(5_000));
}
