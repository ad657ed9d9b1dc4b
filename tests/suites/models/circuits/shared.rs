//! The shared circuit alone: probes that are reported late, twice or never, clients that die, and restarts
//! anywhere.
//!
//! It begins open. Judged by a ledger of which probes may be running and how they ended, which looks at the
//! circuit after each event only by reading it, and by asking whether it would recover from here.

use super::ledger::Ledger;
use super::rules::{Broken, Circuit, Generation, Outcome, Settings, State};
use crate::search::{World, expect_harm, expect_nothing};

const SETTINGS: Settings = Settings {
    probes: 2,
    enough: 2,
    probe_timeout: 2,
    max_duration: 3,
    open_for: 1,
    open_for_max: 2,
};
/// One result decides, and a probe that is out then outlives the wait.
const ONE_DECIDES: Settings = Settings { enough: 1, ..SETTINGS };
/// Some may be out, or given back, when enough is counted.
const TWO_OF_THREE: Settings = Settings { probes: 3, ..SETTINGS };

const RESTARTS: u8 = 2;
/// Where the world ends: it has been half-open twice, or three times with a restart.
const GENERATIONS: u16 = 6;

/// A call that was let through as a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Probe {
    generation: Generation,
    age: u16,
    /// Its answer has left: it may be running.
    left: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Server {
    circuit: Circuit,
    /// As it is on disk.
    record: Circuit,
    written: bool,
    /// Whether it is written that a circuit is half-open, before the first probe leaves.
    half_open_is_written: bool,
    restarts: u8,
    probes: Vec<Probe>,
    ledger: Ledger,
}

#[derive(Clone, Debug)]
#[allow(dead_code)] // they are told by `Debug`
enum Event {
    Tick,
    Ask,
    Report { probe: Probe, outcome: &'static str },
    Repeat,
    CallsFailed { generation: Generation },
    Touch,
    Write,
    Restart,
}

impl Server {
    fn new(broken: Broken, settings: Settings, half_open_is_written: bool) -> Self {
        let circuit = Circuit::open(broken, settings);
        let ledger = Ledger::new(circuit.read());
        Self {
            record: circuit.record(),
            circuit,
            written: true,
            half_open_is_written,
            restarts: 0,
            probes: Vec::new(),
            ledger,
        }
    }

    fn broken(&self) -> Broken {
        self.circuit.broken
    }

    fn tick(&self) -> Self {
        let mut next = self.clone();
        next.circuit.pass(1);
        next.record.pass(1);
        next.ledger.tick();
        for probe in &mut next.probes {
            probe.age += 1;
            if probe.age == self.circuit.settings.probe_timeout {
                next.ledger.end(probe.generation, Outcome::Failure);
            }
        }
        next.probes.retain(|probe| probe.age <= self.circuit.settings.probe_timeout);
        next.observed()
    }

    fn ask(&self) -> Option<Self> {
        let mut next = self.clone();
        if next.circuit.ask()? != State::HalfOpen {
            return None;
        }
        let generation = next.circuit.generation;
        let mut next = next.transited(self.circuit.generation);
        next.ledger.admitted += 1;
        next.probes.push(Probe { generation, age: 0, left: next.written });
        next.probes.sort_unstable();
        Some(next.observed())
    }

    fn report(&self, probe: Probe, outcome: Outcome) -> Option<Self> {
        // Before its answer has left, all that can be reported of it is that it never will.
        if !probe.left && outcome != Outcome::GivenBack {
            return None;
        }
        let mut next = self.clone();
        let index = self.probes.iter().position(|one| *one == probe)?;
        next.probes.remove(index);
        if probe.age < self.circuit.settings.probe_timeout {
            next.ledger.end(probe.generation, outcome);
        }
        next.circuit.report(probe.generation, probe.age, outcome);
        let next = next.transited(self.circuit.generation).observed();
        Some(next.unmoved_by(probe.generation, self))
    }

    /// A success that was reported before is reported again.
    fn repeat(&self) -> Option<Self> {
        let mut next = self.clone();
        next.circuit.report(self.ledger.seen.1, u16::MAX, Outcome::Success);
        (self.ledger.successes > 0).then(|| next.transited(self.circuit.generation).observed())
    }

    /// Clients tell of calls that were no probes, as of a generation that they were told.
    fn calls_failed(&self, generation: Generation) -> Self {
        let mut next = self.clone();
        next.circuit.report_failures(generation);
        let next = next.transited(self.circuit.generation).observed();
        next.unmoved_by(generation, self)
    }

    fn touch(&self) -> Self {
        let mut next = self.clone();
        next.circuit.settle();
        next.transited(self.circuit.generation).observed()
    }

    fn write(&self) -> Option<Self> {
        let mut next = self.clone();
        next.record = self.circuit.record();
        next.written = true;
        next.probes.iter_mut().for_each(|probe| probe.left = true);
        next.probes.sort_unstable();
        (!self.written).then(|| next.told())
    }

    fn restart(&self) -> Option<Self> {
        if self.restarts == RESTARTS {
            return None;
        }
        let mut next = self.clone();
        next.restarts += 1;
        next.probes.retain(|probe| probe.left);
        next.circuit = self.record.clone().recovered(2 + self.restarts, self.half_open_is_written);
        next.written = next.circuit.generation == self.record.generation;
        next.ledger.restart(next.circuit.state, next.circuit.read());
        Some(if next.written { next.told() } else { next })
    }

    /// What follows if the circuit changed.
    fn transited(mut self, before: Generation) -> Self {
        if self.circuit.generation == before {
            return self;
        }
        let told_at_once = self.circuit.state == State::HalfOpen && !self.half_open_is_written;
        if !(told_at_once && self.written) {
            self.written = false;
        }
        if self.written || self.broken() == Broken::ToldBeforeWritten { self.told() } else { self }
    }

    fn told(mut self) -> Self {
        self.ledger.tell((self.circuit.state, self.circuit.generation));
        self
    }

    fn observed(mut self) -> Self {
        self.ledger.see(self.circuit.read(), self.circuit.settings);
        self
    }

    /// A report of another generation may find what was due, but cause nothing.
    fn unmoved_by(mut self, generation: Generation, before: &Self) -> Self {
        if generation != before.ledger.seen.1 && self.ledger.seen != before.ledger.seen {
            self.ledger.wrong = Some("a report of another generation moved it");
        }
        self
    }

    /// The target is well from now on, and there is a call in each tick. Once what is out has expired and it
    /// has been open for the longest time, it takes as many calls as are enough.
    fn recovers(&self) -> bool {
        let Settings { enough, max_duration, probe_timeout, open_for_max, .. } =
            self.circuit.settings;
        let half_open = max_duration.min(probe_timeout);
        let bound = half_open + open_for_max.max(probe_timeout) + u16::from(enough) - 1;
        let mut circuit = self.circuit.clone();
        for _ in 0..=bound {
            match circuit.ask() {
                Some(State::Closed) => return true,
                Some(_) => circuit.report(circuit.generation, 0, Outcome::Success),
                None => {}
            }
            if circuit.state == State::Closed {
                return true;
            }
            circuit.pass(1);
        }
        false
    }
}

impl World for Server {
    type Event = Event;

    fn next(&self) -> Vec<(Event, Self)> {
        let (boot, count) = self.circuit.generation;
        if u16::from(boot) + count > GENERATIONS + 1 {
            return Vec::new();
        }
        let mut next = Vec::new();
        let mut add = |event, server: Option<Self>| next.extend(server.map(|one| (event, one)));
        add(Event::Tick, Some(self.tick()));
        add(Event::Ask, self.ask());
        for &probe in &self.probes {
            for outcome in [Outcome::Success, Outcome::Failure, Outcome::GivenBack] {
                let name = match outcome {
                    Outcome::Success => "success",
                    Outcome::Failure => "failure",
                    Outcome::GivenBack => "given back",
                };
                add(Event::Report { probe, outcome: name }, self.report(probe, outcome));
            }
        }
        add(Event::Repeat, self.repeat());
        for generation in [(1, 0), self.ledger.told.1] {
            add(Event::CallsFailed { generation }, Some(self.calls_failed(generation)));
        }
        add(Event::Touch, Some(self.touch()));
        add(Event::Write, self.write());
        add(Event::Restart, self.restart());
        next
    }

    fn wrong(&self) -> Option<String> {
        let Settings { probes, probe_timeout, max_duration, .. } = self.circuit.settings;
        let Ledger { seen: (state, _), half_open_for, admitted, successes, failures, .. } =
            self.ledger;
        let running = self.probes.iter().filter(|probe| probe.age < probe_timeout).count();
        let counted = usize::from(successes + failures);
        let half_open = state == State::HalfOpen;
        if half_open && running + counted > usize::from(probes) {
            return Some(format!("{running} probes run and {counted} are counted of {probes}"));
        }
        if admitted > 2 * probes {
            return Some(format!("{admitted} probes in one generation"));
        }
        if half_open && half_open_for >= max_duration {
            return Some("it is half-open for too long".to_owned());
        }
        let ledger = self.ledger.wrong.map(str::to_owned);
        ledger.or_else(|| (!self.recovers()).then(|| "it does not recover in time".to_owned()))
    }
}

#[test]
fn no_history_breaks_a_promise_of_the_shared_circuit() {
    for half_open_is_written in [true, false] {
        for settings in [SETTINGS, ONE_DECIDES] {
            expect_nothing(Server::new(Broken::Nothing, settings, half_open_is_written), 10_000);
        }
    }
    expect_nothing(Server::new(Broken::Nothing, TWO_OF_THREE, true), 100_000);
}

#[test]
fn every_rule_is_needed() {
    use Broken::*;
    for broken in [
        NoBudget,
        ResultsMakeRoom,
        GivesBackForEver,
        OpensWhenGivenBack,
        ExpiredIsNothing,
        ExpiredMakesRoom,
        LateIsInTime,
        NoMaxDuration,
        NothingCloses,
        TooFewOpen,
        MaxDurationFirst,
        DeltasCountInHalfOpen,
        ForeignCounts,
        RepeatsCount,
        RestartForgetsStragglers,
        RestartKeepsHalfOpen,
        RestartKeepsGeneration,
        ToldBeforeWritten,
    ] {
        expect_harm(broken, Server::new(broken, SETTINGS, true));
    }
    expect_harm(ForgetsStragglers, Server::new(ForgetsStragglers, ONE_DECIDES, true));
    // If nothing is written when it becomes half-open, what is told of that must not be told again.
    for broken in [NoBootNumber, RestartKeepsGeneration] {
        expect_harm(broken, Server::new(broken, SETTINGS, false));
    }
}
