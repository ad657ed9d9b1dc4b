//! The shared circuit and the local breakers of its clients, over a network that delays, loses and is cut.
//!
//! What a server tells arrives at once or a tick late, or never; reports arrive late or never; the target
//! works and stops working; the server restarts, or is never heard of again. A late push is one of the state
//! of a tick ago.

mod histories;
mod judge;

use super::client::{Broken, Client, Forced, Gate, LocalSettings, Status, VALID};
use super::rules::{self, Circuit, Outcome, Settings, State};
use crate::search::{World, expect_harm, expect_nothing};

const SETTINGS: Settings = Settings {
    probes: 1,
    enough: 1,
    probe_timeout: 1,
    max_duration: 2,
    open_for: 1,
    open_for_max: 2,
};
/// Longer than the shared circuit's times, so that it is in their way if it can be.
const LOCAL: LocalSettings = LocalSettings { opens_at: 1, open_for: 5, open_for_max: 5 };
/// One that backs off, and forgives a failure.
const BACKS_OFF: LocalSettings = LocalSettings { opens_at: 2, open_for: 1, open_for_max: 4 };
const FORCED_FOR: u8 = 3;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Fleet {
    broken: Broken,
    /// Whether operators force it.
    operated: bool,
    /// Whether calls are counted that a target gets which does not work.
    counted: bool,
    well: bool,
    circuit: Circuit,
    forced: Option<(Forced, u8)>,
    /// What a client was told a tick ago, and whether that is of this generation.
    before: (Status, bool),
    /// A call failed, in this generation, and its client will say so.
    failed: bool,
    clients: Vec<Client>,
    wrong: Option<&'static str>,
}

#[derive(Clone, Debug)]
#[allow(dead_code)] // they are told by `Debug`
enum Event {
    Tick,
    Turn,
    Push { client: usize, late: bool },
    Call { client: usize, reachable: bool },
    ProbeReported { client: usize },
    FailuresReported { client: usize },
    Die { client: usize },
    Restart,
    Force { mode: Option<Forced> },
}

impl Fleet {
    fn new(broken: Broken, clients: usize, local: LocalSettings) -> Self {
        let mut circuit = Circuit::open(rules::Broken::Nothing, SETTINGS);
        circuit.pass(SETTINGS.open_for);
        let client = Client::new(broken, local);
        Self {
            broken,
            operated: false,
            counted: false,
            well: true,
            before: (Status::of(circuit.state, circuit.left(), None), true),
            circuit,
            forced: None,
            failed: false,
            clients: vec![client; clients],
            wrong: None,
        }
    }

    fn status(&self) -> Status {
        let mut circuit = self.circuit.clone();
        circuit.settle();
        Status::of(circuit.state, circuit.left(), self.forced)
    }

    /// What the server does; another generation makes strangers of all.
    fn serve<T>(&mut self, act: impl FnOnce(&mut Circuit) -> T) -> T {
        let before = self.circuit.generation;
        let done = act(&mut self.circuit);
        if self.circuit.generation != before {
            // Which one it is matters to nobody.
            self.circuit.generation = before;
            (self.before.1, self.failed) = (false, false);
            self.clients.iter_mut().for_each(Client::falls_behind);
        }
        done
    }

    fn tick(&self) -> Self {
        let mut next = self.clone();
        next.serve(Circuit::settle);
        next.before = (next.status().tick(), true);
        next.serve(|circuit| circuit.pass(1));
        next.forced = next.forced.map(|(mode, left)| (mode, left - 1));
        next.forced = next.forced.filter(|(_, left)| *left > 0);
        next.clients.iter_mut().for_each(Client::tick);
        next.clients.sort_unstable();
        next
    }

    fn turn(&self) -> Self {
        let mut next = Self { well: !self.well, ..self.clone() };
        next.clients.iter_mut().for_each(|client| client.outrun = 0);
        next
    }

    fn push(&self, client: usize, late: bool) -> Option<Self> {
        let mut next = self.clone();
        next.serve(Circuit::settle);
        let (status, ago, current) = match late {
            true => (next.before.0, 1, next.before.1),
            false => (next.status(), 0, true),
        };
        // What is told later comes later.
        let client = &mut next.clients[client];
        (client.told_ago >= ago).then(|| client.is_told(status, ago, current))?;
        Some(next)
    }

    /// The world after a call, and whether it was let through.
    fn call(&self, index: usize, reachable: bool) -> (Self, bool) {
        let mut next = self.clone();
        let client = &mut next.clients[index];
        let stale = client.told_ago >= VALID;
        match client.gate() {
            Gate::LetThrough => return (next.let_through(index), true),
            Gate::RefusedByForce if client.status.forced.is_none_or(|(_, left)| left == 0) => {
                next.wrong = Some("a call was refused by force past its time");
            }
            Gate::RefusedByLocal
                if self.clients[index].status.forced.is_some_and(|(_, left)| left > 0) =>
            {
                next.wrong = Some("a call was refused though the circuit is disabled");
            }
            Gate::RefusedByForce => {}
            Gate::RefusedByLocal => {
                let told = self.broken == Broken::RefusedIsFailure && client.current;
                client.failed |= told && !client.status.open;
            }
            Gate::RefusedByShared | Gate::Ask if stale => {
                next.wrong = Some("a call was refused past validity");
            }
            Gate::RefusedByShared => client.refused_by_shared(),
            Gate::Ask if reachable => return next.ask(index),
            Gate::Ask if self.broken == Broken::UnansweredIsStale => {
                let passes = client.local.lets_through();
                return if passes { (next.let_through(index), true) } else { (next, false) };
            }
            Gate::Ask if self.broken == Broken::UnreachableIsFailure => {
                client.local = client.local.after(false, client.settings);
                if !client.local.lets_through() {
                    next.wrong = Some("a local breaker opened, and no call failed");
                }
            }
            Gate::Ask => client.refused_by_shared(),
        }
        (next, false)
    }

    fn let_through(mut self, index: usize) -> Self {
        let client = &mut self.clients[index];
        let shared_is_open = client.told_ago < VALID && client.status.open;
        if client.forced() == Some(Forced::Disabled) {
            return self;
        }
        if shared_is_open {
            self.wrong = Some("a call passed an open circuit without a probe");
        }
        client.called(self.well);
        self.failed |= client.failed;
        if !self.well && self.counted {
            client.outrun += client.settings.open_for_max;
        }
        self
    }

    fn ask(mut self, index: usize) -> (Self, bool) {
        if self.forced.is_some() {
            let status = self.status();
            self.clients[index].is_told(status, 0, true);
            return (self, false);
        }
        let passed = self.serve(Circuit::ask);
        let (status, well) = (self.status(), self.well);
        let client = &mut self.clients[index];
        client.is_told(status, 0, true);
        match passed {
            None => {
                client.refused_by_shared();
                (self, false)
            }
            Some(State::HalfOpen)
                if self.broken == Broken::LocalBarsProbes && !client.local.lets_through() =>
            {
                let generation = self.circuit.generation;
                self.serve(|circuit| circuit.report(generation, 0, Outcome::GivenBack));
                (self, false)
            }
            Some(State::HalfOpen) => {
                client.probe = Some(well);
                (self, true)
            }
            Some(_) if client.local.lets_through() => (self.let_through(index), true),
            Some(_) => (self, false),
        }
    }

    fn probe_reported(&self, client: usize) -> Option<Self> {
        let mut next = self.clone();
        let success = next.clients[client].probe.take()?;
        let outcome = if success { Outcome::Success } else { Outcome::Failure };
        next.serve(|circuit| {
            let age = circuit.out.first().copied().unwrap_or(0);
            circuit.report(circuit.generation, age, outcome);
        });
        Some(next)
    }

    fn failures_reported(&self, client: usize) -> Option<Self> {
        let mut next = self.clone();
        if !std::mem::take(&mut next.clients[client].failed) {
            return None;
        }
        if !self.failed {
            next.wrong = Some("it opened, and no call failed");
        }
        if next.forced.is_none() {
            next.serve(|circuit| circuit.report_failures(circuit.generation));
        }
        Some(next)
    }

    /// Another client takes its place.
    fn die(&self, client: usize) -> Self {
        let mut next = self.clone();
        next.clients[client] = Client::new(self.broken, self.clients[client].settings);
        next
    }

    fn restart(&self) -> Self {
        let mut next = self.clone();
        next.serve(|circuit| *circuit = circuit.record().recovered(1, true));
        next
    }

    fn force(&self, mode: Option<Forced>) -> Option<Self> {
        let forced = mode.map(|mode| (mode, FORCED_FOR));
        let changes = self.forced.map(|(mode, _)| mode) != mode;
        (self.operated && changes).then(|| Self { forced, ..self.clone() })
    }
}

impl World for Fleet {
    type Event = Event;

    fn next(&self) -> Vec<(Event, Self)> {
        let mut next = vec![(Event::Tick, self.tick()), (Event::Turn, self.turn())];
        let mut add = |event, fleet: Option<Self>| next.extend(fleet.map(|fleet| (event, fleet)));
        for client in 0..self.clients.len() {
            for flag in [false, true] {
                add(Event::Push { client, late: flag }, self.push(client, flag));
                let called = self.call(client, flag).0;
                add(Event::Call { client, reachable: flag }, Some(called));
            }
            add(Event::ProbeReported { client }, self.probe_reported(client));
            add(Event::FailuresReported { client }, self.failures_reported(client));
            add(Event::Die { client }, Some(self.die(client)));
        }
        add(Event::Restart, Some(self.restart()));
        for mode in [None, Some(Forced::Open), Some(Forced::Disabled)] {
            add(Event::Force { mode }, self.force(mode));
        }
        next
    }

    fn wrong(&self) -> Option<String> {
        let wrong = self.wrong.map(str::to_owned);
        wrong.or_else(|| self.too_many_calls()).or_else(|| self.does_not_recover())
    }
}

fn counted(broken: Broken, clients: usize) -> Fleet {
    Fleet { counted: true, ..Fleet::new(broken, clients, BACKS_OFF) }
}

fn operated(broken: Broken) -> Fleet {
    Fleet { operated: true, ..Fleet::new(broken, 1, LOCAL) }
}

#[test]
fn no_history_leaves_clients_waiting_or_a_dead_target_without_relief() {
    expect_nothing(Fleet::new(Broken::Nothing, 2, LOCAL), 10_000);
    expect_nothing(counted(Broken::Nothing, 1), 10_000);
    expect_nothing(operated(Broken::Nothing), 10_000);
}

#[test]
fn every_rule_is_needed() {
    use Broken::*;
    for broken in [
        StaleBinds,
        CountsFromArrival,
        WaitsForHalfOpen,
        LocalBarsProbes,
        NoReset,
        LocalIsEnough,
        LocalIsAskedFirst,
        UnansweredIsStale,
        RefusedIsFailure,
        UnreachableIsFailure,
    ] {
        expect_harm(broken, Fleet::new(broken, 2, LOCAL));
    }
    for broken in [AlwaysReset, SharedIsEnough] {
        expect_harm(broken, counted(broken, 1));
    }
    for broken in [ForcedIsStale, ForcedForEver] {
        expect_harm(broken, operated(broken));
    }
}
