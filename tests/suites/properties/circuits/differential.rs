//! The circuit of the server against that of the model, which was searched for every order of events.

use fusebox_core::circuit::Phase;
use proptest::prelude::*;

use super::*;

#[path = "../../models/circuits/rules.rs"]
#[allow(dead_code)] // the model breaks its rules, to show that it needs them
mod rules;

/// What happens next. Times are in ticks of a second.
#[derive(Clone, Debug)]
enum Event {
    Pass(u16),
    Ask,
    Report { which: Index, outcome: rules::Outcome },
    Repeat { which: Index },
    CallsFailed { which: Index },
    Touch,
    Restart,
}

fn events() -> impl Strategy<Value = Event> {
    use rules::Outcome::{Failure, GivenBack, Success};
    let outcomes = select(vec![Success, Success, Failure, GivenBack]);
    prop_oneof![
        4 => prop_oneof![3 => 1..5_u16, 1 => 1..40_u16].prop_map(Event::Pass),
        6 => Just(Event::Ask),
        4 => (any::<Index>(), outcomes)
            .prop_map(|(which, outcome)| Event::Report { which, outcome }),
        1 => any::<Index>().prop_map(|which| Event::Repeat { which }),
        2 => any::<Index>().prop_map(|which| Event::CallsFailed { which }),
        1 => Just(Event::Touch),
        1 => Just(Event::Restart),
    ]
}

fn settings() -> impl Strategy<Value = rules::Settings> {
    let probes = (1..5_u8).prop_flat_map(|probes| (Just(probes), 1..=probes));
    (probes, 1..6_u16, 0..6_u16, 1..6_u16, 0..6_u16).prop_map(
        |((probes, enough), probe_timeout, longer, open_for, more)| rules::Settings {
            probes,
            enough,
            probe_timeout,
            max_duration: probe_timeout + longer,
            open_for,
            open_for_max: open_for + more,
        },
    )
}

fn ticks(ticks: u16) -> Duration {
    Duration::from_secs(ticks.into())
}

/// The settings of the model, as an operator would write them.
fn breaker(settings: rules::Settings) -> Breaker {
    let settings = Settings {
        window: WindowSettings::Consecutive(1),
        min_calls: settings.enough.into(),
        min_reporters: 1,
        open_for: OpenFor {
            first: ticks(settings.open_for),
            factor_hundredths: 200,
            max: ticks(settings.open_for_max),
            jitter: Share::NONE,
        },
        half_open: HalfOpen {
            probes: settings.probes.into(),
            max_in_flight: settings.probes.into(),
            probe_timeout: ticks(settings.probe_timeout),
            max_duration: ticks(settings.max_duration),
        },
        ramp: Ramp { steps: [].into_iter().collect(), each: ticks(1) },
        ..Settings::default()
    };
    Breaker::new(settings).unwrap()
}

/// A probe that both let through.
#[derive(Clone, Copy)]
struct Sent {
    generation: rules::Generation,
    id: ProbeId,
    at: Time,
}

/// Both circuits, and what is on disk of them.
struct Pair {
    model: rules::Circuit,
    record: rules::Circuit,
    world: World,
    out: Vec<Sent>,
    told: Vec<Sent>,
    generations: Vec<rules::Generation>,
}

/// As the server numbers them.
fn numbered((boot, begun): rules::Generation) -> Generation {
    Generation((u64::from(boot) << 32) + u64::from(begun))
}

impl Pair {
    /// Both have just opened.
    fn new(settings: rules::Settings) -> Self {
        let model = rules::Circuit::open(rules::Broken::Nothing, settings);
        let mut world = World::new(breaker(settings), false);
        world.numbers = Numbers { boot: 1, begun: Cell::new(0) };
        let mut pair = Self {
            record: model.record(),
            generations: vec![model.generation],
            model,
            world,
            out: Vec::new(),
            told: Vec::new(),
        };
        pair.fail(Generation(0));
        pair.compare();
        pair
    }

    /// A call fails in the circuit of the server.
    fn fail(&mut self, generation: Generation) {
        let counts = Counts { calls: 1, failures: 1, slow: 0 };
        let (now, delta) = (self.world.newest, Delta { counts, ..Delta::default() });
        self.world.turn(now, |circuit, turn| circuit.report(generation, delta, by("a"), turn));
    }

    fn happen(&mut self, event: &Event) {
        let now = self.world.newest;
        match event {
            Event::Pass(passed) => {
                // Somebody looks at the model all the time: it forgets what was due long ago. And nobody looks at
                // the other, which has to find out in what order all of it was due.
                for _ in 0..*passed {
                    self.model.pass(1);
                    self.model.settle();
                    self.record.pass(1);
                }
                self.world.newest = now.after(ticks(*passed));
            }
            Event::Ask => self.ask(),
            Event::Report { which, outcome } if !self.out.is_empty() => {
                let sent = self.out.swap_remove(which.index(self.out.len()));
                let age = now.nanos_since(sent.at) / ticks(1).as_nanos() as u64;
                self.report(sent, age as u16, *outcome);
                self.told.push(sent);
            }
            Event::Repeat { which } if !self.told.is_empty() => {
                let sent = *which.get(&self.told);
                self.report(sent, u16::MAX, rules::Outcome::Success);
            }
            Event::CallsFailed { which } => {
                let generation = *which.get(&self.generations);
                self.model.report_failures(generation);
                self.fail(numbered(generation));
            }
            Event::Restart => {
                let boot = self.world.numbers.boot + 1;
                self.model = self.record.clone().recovered(boot as u8, false);
                self.world.restart(now);
            }
            Event::Touch | Event::Report { .. } | Event::Repeat { .. } => {
                self.model.settle();
                self.world.turn(now, Circuit::touch);
            }
        }
        self.compare();
    }

    fn ask(&mut self) {
        let now = self.world.newest;
        let expected = match self.model.ask() {
            Some(rules::State::HalfOpen) => Some(Passage::Probe),
            Some(_) => Some(Passage::Free),
            None => None,
        };
        let passage = self.world.turn(now, Circuit::ask);
        let found = (!matches!(passage, Passage::Refused { .. })).then_some(passage);
        assert_eq!(found, expected);
        if found.is_some() {
            let admitted = self.world.turn(now, |circuit, turn| circuit.admit(passage, turn));
            let generation = self.model.generation;
            let sent = admitted.probe.map(|(id, _)| Sent { generation, id, at: now });
            self.out.extend(sent);
        } else if let Passage::Refused { refusal: Refusal::Open, retry_after } = passage {
            assert_eq!(retry_after, Some(ticks(self.model.left())));
        }
    }

    fn report(&mut self, sent: Sent, age: u16, outcome: rules::Outcome) {
        let Sent { generation, id, .. } = sent;
        self.model.report(generation, age, outcome);
        let outcome = match outcome {
            rules::Outcome::Success => Outcome::Success,
            rules::Outcome::Failure => Outcome::Failure,
            rules::Outcome::GivenBack => Outcome::Ignored,
        };
        let (now, probe) = (self.world.newest, (numbered(generation), id));
        let call = Call { outcome, latency: None, kind: "" };
        self.world.turn(now, |circuit, turn| circuit.report_probe(probe, call, by("a"), turn));
    }

    /// Both are the same to who looks at them.
    fn compare(&mut self) {
        let now = self.world.newest;
        self.model.settle();
        let (state, generation) = self.model.read();
        self.world.turn(now, Circuit::touch);
        let circuit = &self.world.circuit;
        let phase = match state {
            rules::State::Closed => Phase::Closed,
            rules::State::Open => Phase::Open,
            rules::State::HalfOpen => Phase::HalfOpen,
        };
        assert_eq!((circuit.phase(), circuit.generation()), (phase, numbered(generation)));
        let ages = circuit.probes().map(|(_, at)| now.nanos_since(at) / 1_000_000_000);
        assert!(ages.eq(self.model.out.iter().map(|age| u64::from(*age))), "those that are out");
        if self.generations.last() != Some(&self.model.generation) {
            self.generations.push(self.model.generation);
        }
        // What is half-open is not written.
        if self.model.state != rules::State::HalfOpen {
            self.record = self.model.record();
            self.world.kept = self.world.circuit.kept();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn the_circuit_is_that_of_the_model(
        settings in settings(),
        events in vec(events(), 1..100),
    ) {
        let mut pair = Pair::new(settings);
        for event in &events {
            pair.happen(event);
        }
    }
}
