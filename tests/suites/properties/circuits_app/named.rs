//! Histories that broke a promise once.

use std::thread;

use fusebox_server::{app::Reported, storage::journal::Keyspace};

use super::*;

const DAY: Duration = limits::CIRCUIT_REMEMBERED;

#[test]
fn a_circuit_is_gone_for_nobody_before_it_is_gone_from_the_disk() {
    let mut panel = Panel::with(&["one"], BREAKER);
    panel.set("one", "", Mode::ForcedOpen);
    panel.set("one", "", Mode::Normal);
    let before = panel.inspect("one", "").unwrap().circuit.view.generation;
    panel.clock.advance(DAY);
    panel.tend();
    // Nothing is written of its leaving.
    assert!(panel.inspect("one", "").unwrap().circuit.live);
    assert_eq!(
        panel.app.circuits().absent(),
        panel.inspect("one", "other").unwrap().circuit.view.generation
    );
    let Answer::Later(..) = acquire(&panel.app, &[("one", "", 1)]).unwrap() else {
        panic!("told of a circuit whose record is on its way");
    };
    panel.tend();
    panel.kill();
    assert_eq!(panel.inspect("one", "").unwrap().circuit.view.generation, before);

    panel.clock.advance(DAY);
    panel.tend();
    panel.write();
    assert_eq!((panel.app.circuits().live(), panel.disk.records(Keyspace::Circuits)), (0, 0));
    let gone = panel.inspect("one", "").unwrap().circuit;
    assert!(!gone.live && gone.view.generation > before);
    panel.kill();
    assert!(panel.inspect("one", "").unwrap().circuit.view.generation > gone.view.generation);
}

#[test]
fn who_comes_back_to_a_circuit_that_leaves_finds_it_as_it_was() {
    let mut panel = Panel::with(&["one"], BREAKER);
    panel.set("one", "", Mode::ForcedOpen);
    let before = panel.set("one", "", Mode::Normal).unwrap().generation;
    panel.clock.advance(DAY);
    panel.tend();
    panel.disk.hang();
    let Panel { disk, app, writer, .. } = &mut panel;
    thread::scope(|scope| {
        let round = scope.spawn(|| writer.round().unwrap());
        // Its record is on its way out of the disk.
        while !disk.hangs() {
            thread::yield_now();
        }
        let answer = acquire(app, &[("one", "", 1)]);
        disk.go_on();
        round.join().unwrap();
        assert!(matches!(answer, Ok(Answer::Later(..))));
    });
    assert_eq!(panel.disk.records(Keyspace::Circuits), 0);
    let answer = panel.ask(&[("one", "", 1)]);
    assert_eq!(answer.circuits[0].view.as_ref().unwrap().generation, before);
    assert_eq!(panel.disk.records(Keyspace::Circuits), 1);
    panel.kill();
    assert_eq!(panel.inspect("one", "").unwrap().circuit.view.generation, before);
}

#[test]
fn an_open_circuit_that_nobody_asks_for_leaves_like_any_other() {
    let mut panel = Panel::with(&["one"], BREAKER);
    panel.fails("one", "host that is gone", 2);
    panel.fails("one", "host that is asked for", 2);
    let before = panel.inspect("one", "host that is gone").unwrap().circuit.view;
    assert_eq!(before.phase, Phase::Open);
    panel.clock.advance(DAY - Duration::from_secs(1));
    panel.tend();
    panel.write();
    assert_eq!(panel.app.circuits().live(), 2, "it is remembered for a day");
    panel.ask(&[("one", "host that is asked for", 1)]);
    panel.clock.advance(Duration::from_secs(1));
    panel.tend();
    panel.write();
    assert_eq!((panel.app.circuits().live(), panel.disk.records(Keyspace::Circuits)), (1, 1));
    let after = panel.inspect("one", "host that is gone").unwrap().circuit;
    assert!(!after.live && after.view.generation > before.generation);
    assert_eq!(after.view.phase, Phase::Closed);
}

#[test]
fn that_a_ramp_is_over_is_told_also_if_it_ends_before_its_circuit_is_written() {
    let mut panel = Panel::with(&["one"], &format!("{BREAKER}, {}", RAMPS[1]));
    panel.set("one", "", Mode::ForcedOpen);
    let app = Arc::clone(&panel.app);
    let set = SetMode {
        name: PolicyName::new("test", "one"),
        key: String::new(),
        mode: Mode::Normal,
        ttl: Duration::ZERO,
        reason: String::new(),
        expected: None,
    };
    let mut order = Box::pin(app.set_circuit_mode(Principal::Anonymous, set));
    assert!(poll(order.as_mut()).is_none(), "it is to be written");
    // The disk takes its time.
    panel.clock.advance(Duration::from_secs(2));
    panel.tend();
    let view = panel.operate(order).unwrap().circuit.view;
    assert!(view.ramp.is_some(), "as it was when it was closed");
    panel.tend();
    assert_eq!(panel.inspect("one", "").unwrap().circuit.view.ramp, None);
}

#[test]
fn a_probe_is_told_of_while_it_lives_also_if_its_permit_has_expired() {
    let mut panel = Panel::with(&["one"], &format!("{BREAKER}, {}", RAMPS[0]));
    panel.fails("one", "", 2);
    panel.clock.advance(Duration::from_secs(5));
    let asks = [("permits", "", 1), ("one", "", 1)];
    let [first, second] = [(); 2].map(|()| panel.ask(&asks).grant.unwrap());
    // A permit lives for a second, and a probe for four.
    panel.clock.advance(Duration::from_secs(2));
    assert_eq!(panel.tell(&first, Outcome::Success), Reported::Applied);
    panel.tend();
    assert_eq!(panel.tell(&second, Outcome::Success), Reported::Applied);
    assert_eq!(panel.inspect("one", "").unwrap().circuit.view.phase, Phase::Closed);
    assert_eq!(panel.tell(&second, Outcome::Success), Reported::Duplicate);
    assert_eq!(panel.app.grants().open(), 0);
}
