//! Clocks that are wrong: what they do to a bucket, and no more than that.

use std::{sync::Arc, time::Duration};

use fusebox_core::Ask;
use fusebox_server::{config::Config, storage::Recovered};
use fusebox_tests::{
    ManualClock, Simulated,
    panel::{acquire, recover, told},
};

use crate::CONFIG;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A panel on one disk, through crashes. Its bucket is three tokens, one every twenty seconds.
struct Panel {
    journal: Simulated,
    clock: Arc<ManualClock>,
    running: Recovered,
}

impl Panel {
    fn start() -> Self {
        let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
        let running = recover(journal.open(), &config(), &clock).unwrap();
        Self { journal, clock, running }
    }

    fn crash(&mut self) {
        self.journal.kill();
        self.running = recover(self.journal.open(), &config(), &self.clock).unwrap();
    }

    /// Tokens of three that are there at once.
    fn spend_all(&mut self) -> u64 {
        let one = Ask::spend(1);
        let mut spend = || {
            let answer = acquire(&self.running, "three", "a", one).unwrap();
            told(answer, &mut self.running.writer).decision.allowed
        };
        (0..10).take_while(|_| spend()).count() as u64
    }
}

fn config() -> Config {
    Config::parse("test.yaml", CONFIG).unwrap()
}

#[test]
fn a_wall_clock_that_went_forward_while_we_were_away_refills_once() {
    let mut panel = Panel::start();
    assert_eq!(panel.spend_all(), 3);
    panel.clock.turn_wall_on(DAY);
    panel.crash();
    assert_eq!(panel.spend_all(), 3, "one burst for one jump");
    panel.crash();
    assert_eq!(panel.spend_all(), 0, "and not another for another start");

    // Put right again: server time waits for it, and so does nobody for longer than for the burst.
    panel.clock.turn_wall_back(DAY);
    panel.crash();
    assert_eq!(panel.spend_all(), 0);
    panel.clock.advance(Duration::from_secs(60));
    assert_eq!(panel.spend_all(), 3);
}

#[test]
fn a_wall_clock_that_steps_while_we_run_does_nothing() {
    let mut panel = Panel::start();
    assert_eq!(panel.spend_all(), 3);
    panel.clock.turn_wall_on(DAY);
    assert_eq!(panel.spend_all(), 0);
    panel.clock.turn_wall_back(2 * DAY);
    assert_eq!(panel.spend_all(), 0);
    panel.clock.advance(Duration::from_secs(20));
    assert_eq!(panel.spend_all(), 1);
}

#[test]
fn a_monotonic_clock_that_is_slow_or_fast_counts_until_the_last_commit_and_the_wall_from_there() {
    for (monotonic_seconds, tokens) in [(10, 0), (40, 2)] {
        let mut panel = Panel::start();
        assert_eq!(panel.spend_all(), 3);
        // Twenty seconds by the wall; the machine's own clock says something else.
        let own = Duration::from_secs(monotonic_seconds);
        panel.clock.advance_each(own, Duration::from_secs(20));
        assert_eq!(panel.spend_all(), tokens, "what runs is judged by its own clock");
        let written = tokens > 0;
        panel.crash();
        // Since the last commit by the wall: all twenty seconds if there was none, nothing otherwise.
        assert_eq!(panel.spend_all(), u64::from(!written));
    }
}

#[test]
fn no_key_waits_for_longer_than_its_own_burst_whatever_the_clocks_did() {
    for (on, back) in [(DAY, Duration::ZERO), (Duration::ZERO, DAY), (DAY, 3 * DAY)] {
        let mut panel = Panel::start();
        panel.spend_all();
        panel.clock.turn_wall_on(on);
        panel.crash();
        panel.spend_all();
        panel.clock.turn_wall_back(back);
        panel.crash();
        panel.spend_all();
        panel.clock.advance(Duration::from_secs(60));
        assert_eq!(panel.spend_all(), 3);
    }
}
