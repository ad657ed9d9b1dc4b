//! Circuits, for random settings and histories: reports that are late, told twice or lost, of other generations,
//! restarts and orders at any time, and a clock that is now and then read late.

mod differential;
mod quorum;
mod recovery;

use std::{cell::Cell, collections::BTreeMap, time::Duration};

use fusebox_core::{
    Time,
    circuit::{
        Admitted, Breaker, Call, Circuit, Counts, Delta, Event, Generation, HalfOpen, Kept, Mode,
        OpenFor, Order, Outcome, Passage, Phase, ProbeId, Ramp, Refusal, Reported, Reporter,
        Settings, Share, SlowCall, Turn, WindowSettings,
    },
};
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select, subsequence},
};

const REPORTERS: [&str; 4] = ["a", "b", "c", "d"];

fn by(id: &str) -> Reporter<'_> {
    Reporter { id, zone: "" }
}

fn share(basis_points: u16) -> Share {
    Share::new(basis_points).unwrap()
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Numbers generations as a server does: by its boot, and how many it had begun.
#[derive(Clone, Default)]
struct Numbers {
    boot: u64,
    begun: Cell<u64>,
}

impl Numbers {
    fn next(&self) -> Generation {
        self.begun.set(self.begun.get() + 1);
        Generation((self.boot << 32) + self.begun.get() - 1)
    }
}

fn shares() -> impl Strategy<Value = Share> {
    prop_oneof![1..=10_000_u16, Just(5_000), Just(10_000)].prop_map(share)
}

fn waits() -> impl Strategy<Value = Duration> {
    prop_oneof![1..50_u64, 1_000..5_000_u64, Just(1_000)].prop_map(millis)
}

fn windows() -> impl Strategy<Value = WindowSettings> {
    prop_oneof![
        (100..30_000_u64).prop_map(|time| WindowSettings::Time(millis(time))),
        (1..20_u32).prop_map(WindowSettings::Calls),
        (1..6_u32).prop_map(WindowSettings::Consecutive),
    ]
}

fn open_for() -> impl Strategy<Value = OpenFor> {
    let jitter = prop_oneof![Just(Share::NONE), shares()];
    (waits(), 100..=1_000_u16, 1..20_u32, jitter).prop_map(|(first, factor, longer, jitter)| {
        OpenFor { first, factor_hundredths: factor, max: first * longer, jitter }
    })
}

fn half_open() -> impl Strategy<Value = HalfOpen> {
    let probes = (1..6_u32).prop_flat_map(|probes| (Just(probes), 1..=probes));
    (probes, waits(), prop_oneof![Just(Duration::ZERO), waits()]).prop_map(
        |((probes, max_in_flight), probe_timeout, longer)| HalfOpen {
            probes,
            max_in_flight,
            probe_timeout,
            max_duration: probe_timeout + longer,
        },
    )
}

fn ramps() -> impl Strategy<Value = Ramp> {
    let steps = subsequence(vec![1_u16, 2_500, 3_333, 7_500, 10_000], 0..=3);
    (steps, waits())
        .prop_map(|(steps, each)| Ramp { steps: steps.into_iter().map(share).collect(), each })
}

fn breakers() -> impl Strategy<Value = Breaker> {
    let slow_call = prop::option::of(shares());
    let parts = (windows(), shares(), slow_call, 1..20_u32, open_for(), half_open(), ramps());
    (parts, 1..4_u32).prop_map(|(parts, min_reporters)| {
        let (window, failure_rate, slow_rate, min_calls, open_for, half_open, ramp) = parts;
        let has_order = !matches!(window, WindowSettings::Time(_));
        let in_a_row = matches!(window, WindowSettings::Consecutive(_));
        let slow_call = slow_rate.filter(|_| !in_a_row);
        let settings = Settings {
            window,
            failure_rate,
            slow_call: slow_call.map(|rate| SlowCall { over: millis(100), rate }),
            min_calls,
            open_for,
            half_open,
            ramp,
            min_reporters: if has_order { 1 } else { min_reporters },
        };
        Breaker::new(settings).unwrap()
    })
}

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    Pass(Duration),
    /// As long as a call is told to wait.
    Wait,
    Ask {
        others_refuse: bool,
    },
    /// A probe that was ever let through is told of, perhaps again.
    Probe {
        which: Index,
        outcome: Outcome,
    },
    /// A call is told of, of a generation that there was.
    Call {
        which: Index,
        outcome: Outcome,
        latency: Duration,
    },
    Tell {
        which: Index,
        counts: Counts,
    },
    /// Of a generation that there is not yet.
    Foretell,
    Leave,
    Set(Mode, Duration),
    Restart,
}

/// As many of each at most.
fn counted(most: u32) -> impl Strategy<Value = Counts> {
    (0..=most, 0..=most, 0..=most).prop_map(|(good, failures, slow)| {
        let calls = good + failures;
        Counts { calls, failures, slow: slow.min(calls) }
    })
}

fn steps() -> impl Strategy<Value = Step> {
    let outcomes = || {
        let common = select(vec![Outcome::Success, Outcome::Success, Outcome::Failure]);
        let rare = select(vec![Outcome::Ignored, Outcome::Abandoned, Outcome::LocalFailure]);
        prop_oneof![3 => common, 1 => rare]
    };
    let pass = prop_oneof![Just(0), 1..50_u64, 500..5_000_u64, 30_000..120_000_u64];
    let modes = select(vec![Mode::Normal, Mode::ForcedOpen, Mode::Disabled, Mode::MetricsOnly]);
    prop_oneof![
        4 => pass.prop_map(|pass| Step::Pass(millis(pass))),
        4 => Just(Step::Wait),
        12 => prop::bool::weighted(0.1).prop_map(|others_refuse| Step::Ask { others_refuse }),
        8 => (any::<Index>(), outcomes())
            .prop_map(|(which, outcome)| Step::Probe { which, outcome }),
        2 => (any::<Index>(), outcomes(), waits())
            .prop_map(|(which, outcome, latency)| Step::Call { which, outcome, latency }),
        5 => (any::<Index>(), counted(9)).prop_map(|(which, counts)| Step::Tell { which, counts }),
        1 => Just(Step::Foretell),
        1 => Just(Step::Leave),
        1 => (modes, waits()).prop_map(|(mode, ttl)| Step::Set(mode, ttl)),
        1 => Just(Step::Restart),
    ]
}

/// One step, and what it is taken in.
type Taken = (Step, (u32, Duration, &'static str));

fn history() -> impl Strategy<Value = Vec<Taken>> {
    let behind = prop_oneof![9 => Just(Duration::ZERO), 1 => (1..50_u64).prop_map(millis)];
    vec((steps(), (any::<u32>(), behind, select(&REPORTERS))), 1..120)
}

/// A call that was let through as a probe.
struct Probe {
    generation: Generation,
    id: ProbeId,
    expires_at: Time,
    /// Whether it says anything, once it was told of in time.
    told: Option<bool>,
}

/// A circuit, and what is known of it from outside.
struct World {
    circuit: Circuit,
    breaker: Breaker,
    numbers: Numbers,
    /// The latest that anybody read.
    newest: Time,
    draw: u32,
    /// As it is on disk: whether it is half-open is written there, or not.
    kept: Kept,
    half_open_is_written: bool,
    /// What it was in each generation.
    phases: BTreeMap<Generation, Phase>,
    since: Time,
    /// How often it was half-open in vain since it was closed.
    attempt: u32,
    probes: Vec<Probe>,
}

impl World {
    fn new(breaker: Breaker, half_open_is_written: bool) -> Self {
        let newest = Time::ZERO.after(Duration::from_secs(1_000));
        let numbers = Numbers::default();
        let generation = numbers.next();
        let circuit = Circuit::new(generation, &breaker, newest);
        Self {
            kept: circuit.kept(),
            circuit,
            breaker,
            numbers,
            newest,
            draw: 0,
            half_open_is_written,
            phases: BTreeMap::from([(generation, Phase::Closed)]),
            since: newest,
            attempt: 0,
            probes: Vec::new(),
        }
    }

    fn turn<T>(&mut self, now: Time, act: impl FnOnce(&mut Circuit, Turn<'_>) -> T) -> T {
        let generations = || self.numbers.next();
        let turn = Turn { breaker: &self.breaker, now, draw: self.draw, generations: &generations };
        act(&mut self.circuit, turn)
    }

    /// The circuit as it will be, if nobody does anything.
    fn later(&self, now: Time) -> Circuit {
        let (mut circuit, numbers) = (self.circuit.clone(), self.numbers.clone());
        let generations = || numbers.next();
        let (breaker, draw) = (&self.breaker, self.draw);
        circuit.touch(Turn { breaker, now, draw, generations: &generations });
        circuit
    }

    fn take(&mut self, (step, (draw, behind, reporter)): Taken) {
        self.draw = draw;
        let behind = if matches!(step, Step::Restart) { Duration::ZERO } else { behind };
        let now = Time::from_nanos(self.newest.as_nanos() - behind.as_nanos() as u64);
        let untouched = self.later(now);
        match step {
            // Nobody looks.
            Step::Pass(time) => {
                self.newest = self.newest.after(time);
                return;
            }
            Step::Wait => {
                self.wait();
                return;
            }
            Step::Ask { others_refuse } => self.ask(others_refuse, now, behind.is_zero()),
            Step::Probe { which, outcome } => {
                if !self.probes.is_empty() {
                    self.tell_probe(which.index(self.probes.len()), outcome, reporter, now);
                }
            }
            Step::Call { which, outcome, latency } => {
                let call = Call { outcome, latency: Some(latency), kind: "timeout" };
                let generation = self.generation(which);
                let reported = self.turn(now, |circuit, turn| {
                    circuit.report_call(generation, call, by(reporter), turn)
                });
                self.expect_counted(generation, &untouched, reported);
            }
            Step::Tell { which, counts } => {
                self.tell(self.generation(which), counts, reporter, &untouched, now);
            }
            Step::Foretell => {
                let Generation(number) = self.circuit.generation();
                let counts = Counts { calls: 100, failures: 100, slow: 100 };
                self.tell(Generation(number + 1_000), counts, reporter, &untouched, now);
            }
            Step::Leave => self.turn(now, |circuit, turn| circuit.leave(reporter, turn)),
            Step::Set(mode, ttl) => {
                let order = Order { mode, ttl, reason: "".into(), actor: "".into() };
                self.turn(now, |circuit, turn| circuit.set(&order, turn));
                assert_eq!(self.circuit.phase().mode(), mode);
            }
            Step::Restart => self.restart(now),
        }
        let newest = self.newest;
        self.turn(newest, Circuit::touch);
        self.observe(newest);
    }

    /// One that there was; the present one most of the time.
    fn generation(&self, which: Index) -> Generation {
        let ago = which.index(4 + self.phases.len()).saturating_sub(4);
        *self.phases.keys().nth_back(ago).unwrap()
    }

    fn running(&self) -> impl Iterator<Item = &Probe> {
        self.probes.iter().filter(|one| one.told.is_none() && one.expires_at > self.newest)
    }

    /// Those of a generation that failed or succeeded, and those that were given back.
    fn ended(&self, generation: Generation) -> (usize, usize) {
        let own = || self.probes.iter().filter(|one| one.generation == generation);
        let expired = |one: &&Probe| one.told.is_none() && one.expires_at <= self.newest;
        let counted = own().filter(|one| one.told == Some(true) || expired(one)).count();
        (counted, own().filter(|one| one.told == Some(false)).count())
    }

    /// What is promised of the time of a refusal is kept: then it is otherwise, and a moment before it is not.
    fn wait(&mut self) {
        let newest = self.newest;
        let passage = self.turn(newest, Circuit::ask);
        self.observe(newest);
        let Passage::Refused { refusal, retry_after: Some(wait) } = passage else { return };
        assert!(!wait.is_zero());
        let asked = |now: Time| {
            let numbers = self.numbers.clone();
            let generations = || numbers.next();
            let (breaker, draw) = (&self.breaker, self.draw);
            self.circuit.clone().ask(Turn { breaker, now, draw, generations: &generations })
        };
        let nearly = asked(newest.after(wait - Duration::from_nanos(1)));
        assert!(matches!(nearly, Passage::Refused { refusal: same, .. } if same == refusal));
        let then = newest.after(wait);
        match refusal {
            Refusal::Open => assert_eq!(asked(then), Passage::Probe),
            Refusal::ProbesInUse => {
                let later = self.later(then);
                let ended = later.probes().count() < self.circuit.probes().count();
                assert!(ended || later.phase() != Phase::HalfOpen);
            }
            Refusal::ForcedOpen | Refusal::Ramping => panic!("nobody knows when"),
        }
        self.newest = then;
    }

    fn ask(&mut self, others_refuse: bool, now: Time, is_latest: bool) {
        let passage = self.turn(now, Circuit::ask);
        let HalfOpen { probes, max_in_flight, probe_timeout, .. } = self.breaker.half_open;
        match self.circuit.phase() {
            Phase::Disabled | Phase::MetricsOnly => assert_eq!(passage, Passage::Free),
            Phase::ForcedOpen => {
                let refusal = Refusal::ForcedOpen;
                assert_eq!(passage, Passage::Refused { refusal, retry_after: None });
            }
            Phase::HalfOpen if is_latest => {
                let (running, (counted, _)) =
                    (self.running().count(), self.ended(self.circuit.generation()));
                let has_room =
                    running + counted < probes as usize && running < max_in_flight as usize;
                assert_eq!(passage == Passage::Probe, has_room);
            }
            _ => {}
        }
        if others_refuse || matches!(passage, Passage::Refused { .. }) {
            self.turn(now, |circuit, turn| circuit.refuse(passage, turn));
            return;
        }
        let admitted = self.turn(now, |circuit, turn| circuit.admit(passage, turn));
        let Admitted { generation, probe } = admitted;
        assert_eq!(probe.is_some(), passage == Passage::Probe);
        assert_eq!(generation, self.circuit.generation());
        let Some((id, lives)) = probe else { return };
        assert_eq!((lives, self.circuit.phase()), (probe_timeout, Phase::HalfOpen));
        let (_, at) = self.circuit.probes().find(|(other, _)| *other == id).unwrap();
        self.probes.push(Probe { generation, id, expires_at: at.after(lives), told: None });
    }

    fn tell_probe(&mut self, index: usize, outcome: Outcome, reporter: &str, now: Time) {
        let untouched = self.later(now);
        let Probe { generation, id, expires_at, told } = self.probes[index];
        let call = Call { outcome, latency: Some(millis(1)), kind: "" };
        let reported = self.turn(now, |circuit, turn| {
            circuit.report_probe((generation, id), call, by(reporter), turn)
        });
        let is_out = told.is_none() && generation == untouched.generation();
        match reported {
            Reported::Applied => {
                assert!(is_out && now < expires_at && untouched.phase() == Phase::HalfOpen);
                let says = matches!(outcome, Outcome::Success | Outcome::Failure);
                self.probes[index].told = Some(says);
            }
            Reported::Stale => {
                assert!(!is_out || expires_at <= self.newest);
                self.expect_unmoved(&untouched);
            }
        }
    }

    fn tell(
        &mut self,
        generation: Generation,
        counts: Counts,
        reporter: &str,
        untouched: &Circuit,
        now: Time,
    ) {
        let delta = Delta { counts, ..Delta::default() };
        let reported =
            self.turn(now, |circuit, turn| circuit.report(generation, delta, by(reporter), turn));
        self.expect_counted(generation, untouched, reported);
    }

    /// Calls count in their own generation, while it counts any.
    fn expect_counted(&self, generation: Generation, untouched: &Circuit, reported: Reported) {
        let phase = untouched.phase();
        let is_own = generation == untouched.generation();
        let counts = matches!(phase, Phase::Closed | Phase::MetricsOnly);
        let is_applied = is_own && (counts || phase == Phase::Disabled);
        assert_eq!(reported == Reported::Applied, is_applied);
        if !is_own || !counts {
            self.expect_unmoved(untouched);
        }
    }

    fn expect_unmoved(&self, untouched: &Circuit) {
        assert_eq!(self.circuit.kept(), untouched.kept());
        assert!(self.circuit.probes().eq(untouched.probes()));
    }

    fn restart(&mut self, now: Time) {
        let kept = self.kept.clone();
        self.numbers = Numbers { boot: self.numbers.boot + 1, begun: Cell::new(0) };
        let recovered = self.turn(now, |_, turn| Circuit::recovered(kept.clone(), turn));
        self.circuit = recovered;
        let Kept { phase, generation, since, wait_until, .. } = kept;
        match phase {
            Phase::Open | Phase::HalfOpen => {
                let after = self.circuit.kept();
                assert_eq!((after.phase, after.since), (Phase::Open, since));
                assert_eq!(after.wait_until, wait_until);
                self.begin(after.generation, Phase::Open);
                self.since = since;
                self.attempt = after.attempt;
            }
            Phase::Closed => assert_eq!(self.circuit.generation(), generation),
            // Their time may be over.
            Phase::ForcedOpen | Phase::Disabled | Phase::MetricsOnly => {}
        }
    }

    /// A generation is never given twice, and later ones are larger.
    fn begin(&mut self, generation: Generation, phase: Phase) {
        assert!(self.phases.keys().all(|before| *before < generation), "{generation:?}");
        self.phases.insert(generation, phase);
    }

    /// Looks at what happened since.
    fn observe(&mut self, now: Time) {
        let last = *self.phases.keys().next_back().unwrap();
        let happened = self.circuit.history().filter(|one| one.generation > last).cloned();
        for transition in happened.collect::<Vec<_>>() {
            let before = *self.phases.values().next_back().unwrap();
            assert_eq!(before.after(transition.event), Some(transition.phase));
            assert!(transition.at <= now.max(self.since));
            self.begin(transition.generation, transition.phase);
            self.since = transition.at;
            self.attempt = match (transition.event, transition.phase) {
                (Event::Failed, _) => self.attempt + 1,
                (_, Phase::HalfOpen | Phase::ForcedOpen) => self.attempt,
                _ => 0,
            };
            assert_eq!(transition.evidence.is_some(), transition.phase == Phase::Open);
        }
        let (generation, phase) = (self.circuit.generation(), self.circuit.phase());
        assert_eq!(self.phases.last_key_value(), Some((&generation, &phase)));
        let kept = self.circuit.kept();
        assert_eq!(kept.since, self.since);
        if phase == Phase::Open && generation != last {
            self.expect_wait(kept.wait_until);
        }
        if phase == Phase::HalfOpen {
            self.expect_bounds(generation, now);
        }
        if phase != Phase::HalfOpen || self.half_open_is_written {
            self.kept = kept;
        }
    }

    /// As long as the formula says, and its jitter at most.
    fn expect_wait(&self, wait_until: Time) {
        let OpenFor { first, factor_hundredths, max, jitter } = self.breaker.open_for;
        let mut least = first;
        for _ in 0..self.attempt.min(2_000) {
            least = (least * u32::from(factor_hundredths) / 100).min(max);
        }
        let most = least + least * u32::from(jitter.basis_points()) / 10_000;
        let found = Duration::from_nanos(wait_until.nanos_since(self.since));
        assert!(found >= least && found <= most, "{found:?} of {least:?} to {most:?}");
    }

    fn expect_bounds(&self, generation: Generation, now: Time) {
        let HalfOpen { probes, max_in_flight, max_duration, .. } = self.breaker.half_open;
        let (running, (counted, given_back)) = (self.running().count(), self.ended(generation));
        // Also those of generations before, and of boots before.
        assert!(running + counted <= probes as usize, "{running} run, {counted} counted");
        assert!(running <= max_in_flight as usize, "{running} run");
        assert!(given_back <= probes as usize);
        let own = self.probes.iter().filter(|one| one.generation == generation);
        assert!(own.count() <= 2 * probes as usize);
        assert!(counted < self.breaker.enough() as usize, "it is judged when enough is known");
        assert!(now < self.since.after(max_duration), "it is half-open for too long");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]

    #[test]
    fn no_history_breaks_a_promise(
        breaker in breakers(),
        half_open_is_written in any::<bool>(),
        history in history(),
    ) {
        let mut world = World::new(breaker, half_open_is_written);
        for taken in history {
            world.take(taken);
        }
        // Whatever it is, it does not stay half-open.
        let HalfOpen { max_duration, .. } = world.breaker.half_open;
        let later = world.later(world.newest.after(max_duration));
        prop_assert!(later.phase() != Phase::HalfOpen || world.circuit.phase() != Phase::HalfOpen);
    }

    /// Among three or more that told anything within the last minute, one cannot open it, whatever it tells.
    #[test]
    fn one_of_three_opens_nothing(
        breaker in breakers(),
        well in 2..40_usize,
        told in vec((any::<Index>(), 0..50_u32, 0..40_000_u64, counted(9)), 1..150),
    ) {
        let mut settings = Settings::clone(&breaker);
        if !matches!(settings.window, WindowSettings::Time(_)) {
            settings.window = WindowSettings::Time(millis(10_000));
        }
        let mut world = World::new(Breaker::new(settings).unwrap(), true);
        let mut heard = vec![world.newest; well];
        for index in 0..well {
            let (now, generation) = (world.newest, world.circuit.generation());
            world.turn(now, |circuit, turn| {
                let reporter = format!("{index}");
                circuit.report(generation, Delta::default(), by(&reporter), turn)
            });
        }
        for (which, calls, pause, bad) in told {
            world.newest = world.newest.after(millis(pause / 10));
            let (generation, now) = (world.circuit.generation(), world.newest);
            let mut tell = |reporter: &str, counts| {
                let delta = Delta { counts, ..Delta::default() };
                world.turn(now, |circuit, turn| {
                    circuit.report(generation, delta, by(reporter), turn)
                });
            };
            let index = which.index(well);
            if which.index(3) == 0 {
                tell("bad", Counts { calls: bad.calls * 10, ..bad });
                tell("bad", Counts { calls: 50, failures: 50, slow: 50 });
            } else {
                tell(&format!("{index}"), Counts { calls: calls / 10, failures: 0, slow: 0 });
                heard[index] = now;
            }
            let minute = Duration::from_secs(60);
            if heard.iter().filter(|at| at.after(minute) > now).count() < 2 {
                break;
            }
            prop_assert_eq!(world.circuit.phase(), Phase::Closed);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Settings that change at any time do no harm, and half-open ends.
    #[test]
    fn settings_change_while_it_lives(
        breakers in vec(breakers(), 2..4),
        history in history(),
        turns in vec(any::<Index>(), 120),
    ) {
        let mut world = World::new(breakers[0].clone(), true);
        for ((step, (draw, _, reporter)), which) in history.into_iter().zip(turns) {
            world.draw = draw;
            world.breaker = which.get(&breakers).clone();
            let now = world.newest;
            let before = world.circuit.generation();
            match step {
                Step::Pass(time) => world.newest = now.after(time),
                Step::Wait => world.newest = now.after(millis(1_000)),
                Step::Tell { counts, .. } => {
                    let (generation, delta) = (before, Delta { counts, ..Delta::default() });
                    world.turn(now, |circuit, turn| {
                        circuit.report(generation, delta, by(reporter), turn)
                    });
                }
                Step::Probe { outcome, .. } => {
                    let out = world.circuit.probes().last();
                    let call = Call { outcome, latency: None, kind: "" };
                    if let Some((id, _)) = out {
                        world.turn(now, |circuit, turn| {
                            circuit.report_probe((before, id), call, by(reporter), turn)
                        });
                    }
                }
                _ => world.turn(now, |circuit, turn| match circuit.ask(turn) {
                    passage @ Passage::Refused { .. } => circuit.refuse(passage, turn),
                    passage => {
                        circuit.admit(passage, turn);
                    }
                }),
            }
            prop_assert!(world.circuit.generation() >= before);
            let max_duration = world.breaker.half_open.max_duration;
            let later = world.later(world.newest.after(max_duration));
            prop_assert!(later.phase() != Phase::HalfOpen);
        }
    }
}
