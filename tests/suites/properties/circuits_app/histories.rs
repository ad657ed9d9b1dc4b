//! Random histories of a whole server, and what holds of all that anybody is told in them.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashSet},
    pin::Pin,
    rc::Rc,
};

use fusebox_core::circuit::State;
use fusebox_server::app::{News, Reported, Watch, Watched};
use proptest::{collection::vec, prelude::*, sample::select};

use super::*;

const BREAKERS: [&str; 2] = ["one", "two"];

/// Probes of each, as its settings say, and how long they live.
const PROBES: usize = 2;
const PROBE_LIVES: Duration = Duration::from_secs(4);

/// A circuit: its breaker, and its key.
type Name = (usize, usize);

const NAMES: [Name; 4] = [(0, 0), (0, 1), (1, 0), (1, 1)];

fn breaker(name: Name) -> &'static str {
    BREAKERS[name.0]
}

fn key(name: Name) -> &'static str {
    ["x", "y"][name.1]
}

fn name_of(breaker: &str, key: &str) -> Name {
    (usize::from(breaker == BREAKERS[1]), usize::from(key == "y"))
}

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    Ask {
        circuits: Vec<Name>,
        limiters: (bool, bool),
        peeks: bool,
    },
    /// The owner of some grant tells how its call went.
    Tell {
        which: usize,
        outcome: Outcome,
    },
    /// A reporter tells of calls in a generation that was told of the circuit so many ago.
    Count {
        name: Name,
        ago: usize,
        by: usize,
        failures: u32,
        successes: u32,
    },
    Goodbye {
        by: usize,
    },
    Set {
        name: Name,
        mode: Mode,
    },
    Put {
        breaker: usize,
        ramp: usize,
    },
    /// A limiter instead of the breaker, or nothing.
    End {
        breaker: usize,
        limiter: bool,
    },
    Pass(Duration),
    /// A day without anybody, but for housekeeping.
    Rest,
    Tend,
    Write,
    Watch {
        from: Option<usize>,
    },
    Read {
        which: usize,
    },
    Leave {
        which: usize,
    },
    Kill {
        loses_power: bool,
    },
    Stop,
}

fn steps() -> impl Strategy<Value = Step> {
    // Most of it is about one of them.
    let name = || prop_oneof![2 => Just(NAMES[0]), 1 => select(NAMES.to_vec())];
    let outcomes = || {
        use Outcome::{Abandoned, Failure, Ignored, Success};
        select(vec![Success, Success, Failure, Ignored, Abandoned])
    };
    let modes = select(vec![Mode::Normal, Mode::ForcedOpen, Mode::Disabled, Mode::MetricsOnly]);
    let times = [10_u64, 1_000, 5_000, 5_000, 10_000, 61_000, 660_000];
    let circuits = prop_oneof![
        3 => name().prop_map(|one| vec![one]),
        2 => (name(), name()).prop_map(|(one, two)| if one == two { vec![one] } else { vec![one, two] }),
    ];
    let limiters = prop_oneof![3 => Just((false, false)), 1 => any::<(bool, bool)>()];
    prop_oneof![
        10 => (circuits, limiters, prop::bool::weighted(0.1))
            .prop_map(|(circuits, limiters, peeks)| Step::Ask { circuits, limiters, peeks }),
        6 => (0..4_usize, outcomes()).prop_map(|(which, outcome)| Step::Tell { which, outcome }),
        6 => (name(), 0..6_usize, 0..3_usize, 0..3_u32, 0..2_u32).prop_map(
            |(name, ago, by, failures, successes)| {
                let ago = ago.saturating_sub(3);
                Step::Count { name, ago, by, failures, successes }
            }
        ),
        1 => (0..3_usize).prop_map(|by| Step::Goodbye { by }),
        2 => (name(), modes).prop_map(|(name, mode)| Step::Set { name, mode }),
        1 => (0..2_usize, 0..2_usize).prop_map(|(breaker, ramp)| Step::Put { breaker, ramp }),
        1 => (0..2_usize, any::<bool>())
            .prop_map(|(breaker, limiter)| Step::End { breaker, limiter }),
        6 => select(times.to_vec()).prop_map(|time| Step::Pass(Duration::from_millis(time))),
        4 => Just(Step::Tend),
        2 => Just(Step::Rest),
        6 => Just(Step::Write),
        2 => prop::option::of(0..4_usize).prop_map(|from| Step::Watch { from }),
        4 => (0..4_usize).prop_map(|which| Step::Read { which }),
        1 => (0..4_usize).prop_map(|which| Step::Leave { which }),
        2 => any::<bool>().prop_map(|loses_power| Step::Kill { loses_power }),
        1 => Just(Step::Stop),
    ]
}

/// What a circuit was told to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    generation: Generation,
    phase: Phase,
}

impl Seen {
    fn of(view: &View) -> Self {
        Self { generation: view.generation, phase: view.phase }
    }
}

/// A probe that somebody has.
struct Probe {
    name: Name,
    grant: String,
    expires_at: Duration,
}

/// All that anybody was told.
#[derive(Default)]
struct Ledger {
    /// What each circuit was in each generation.
    phases: BTreeMap<(Name, Generation), Phase>,
    grants: Vec<Granted>,
    given: HashSet<String>,
    probes: Vec<Probe>,
    now: Duration,
}

/// The highest generation that each circuit was told of in, when a question was asked.
type Floor = [Generation; NAMES.len()];

impl Ledger {
    fn latest(&self, name: Name) -> Option<Seen> {
        let (least, most) = (Generation(0), Generation(u64::MAX));
        let latest = self.phases.range((name, least)..=(name, most)).next_back();
        latest.map(|((_, generation), phase)| Seen { generation: *generation, phase: *phase })
    }

    fn floor(&self) -> Floor {
        NAMES.map(|name| self.latest(name).map_or(Generation(0), |seen| seen.generation))
    }

    /// Somebody is told of a circuit who asked when it had been told of as `floor` says.
    fn hear(&mut self, name: Name, seen: Seen, floor: Floor) {
        let index = NAMES.iter().position(|one| *one == name).unwrap();
        let before = floor[index];
        assert!(
            seen.generation >= before,
            "{name:?} was told of in {before:?}, and now as {seen:?}"
        );
        let phase = *self.phases.entry((name, seen.generation)).or_insert(seen.phase);
        assert_eq!(phase, seen.phase, "{name:?} was two things in {:?}", seen.generation);
    }

    fn give(&mut self, name: Name, grant: String, asked_at: Duration) {
        let expires_at = asked_at + PROBE_LIVES;
        self.probes.push(Probe { name, grant, expires_at });
    }

    /// No more probes are out than may be.
    fn expect_bounds(&mut self) {
        self.probes.retain(|probe| probe.expires_at > self.now);
        for name in NAMES {
            let out = self.probes.iter().filter(|probe| probe.name == name).count();
            assert!(out <= PROBES, "{out} probes of {name:?} are out");
        }
    }
}

/// One who watches, and what it was told.
struct Watcher {
    watch: Option<Watch>,
    /// The epoch, and the version, that it knows.
    known: (u64, u64),
    map: BTreeMap<Name, View>,
    /// What is told of a snapshot that is not complete.
    fresh: Option<BTreeMap<Name, View>>,
    absent: Generation,
    floor: Floor,
}

impl Watcher {
    fn is_told(&mut self, news: News, ledger: &mut Ledger) {
        if news.snapshot {
            self.fresh = Some(BTreeMap::new());
        }
        self.absent = news.absent;
        let map = self.fresh.as_mut().unwrap_or(&mut self.map);
        for (name, view) in news.circuits {
            let name = name_of(&name.breaker.policy, &name.key);
            match view {
                Some(view) => map.insert(name, view),
                None => map.remove(&name),
            };
        }
        self.known = (news.epoch, news.version);
        if news.complete {
            self.map = self.fresh.take().unwrap_or_else(|| std::mem::take(&mut self.map));
            for (name, view) in &self.map {
                ledger.hear(*name, Seen::of(view), self.floor);
            }
        }
    }
}

type Pending = Pin<Box<dyn Future<Output = ()>>>;

struct World {
    panel: Panel,
    ledger: Rc<RefCell<Ledger>>,
    pending: Vec<Pending>,
    watchers: Vec<Watcher>,
    epochs: HashSet<u64>,
}

impl World {
    fn new() -> Self {
        let settings = format!("{BREAKER}, {}", RAMPS[0]);
        let panel = Panel::with(&BREAKERS, &settings);
        let epochs = HashSet::from([panel.app.circuits().boards().epoch()]);
        Self { panel, ledger: Rc::default(), pending: Vec::new(), watchers: Vec::new(), epochs }
    }

    fn is_there(&self, breaker: usize) -> bool {
        let name = PolicyName::new("test", BREAKERS[breaker]);
        let catalogue = self.panel.app.catalogue();
        catalogue.policy(&name).is_some_and(|policy| policy.breakers.is_some())
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Ask { circuits, limiters, peeks } => self.ask(&circuits, limiters, peeks),
            Step::Tell { which, outcome } => self.tell(which, outcome),
            Step::Count { name, ago, by, failures, successes } => {
                self.count(name, ago, by, (failures, successes));
            }
            Step::Goodbye { by } => {
                let app = Arc::clone(&self.panel.app);
                self.begin(async move {
                    let report = Report { goodbye: true, ..report(["r0", "r1", "r2"][by]) };
                    app.report(app.caller(Principal::Anonymous), &report).await.unwrap();
                });
            }
            Step::Set { name, mode } => {
                let floor = self.ledger.borrow().floor();
                if self.is_there(name.0)
                    && let Some(view) = self.panel.set(breaker(name), key(name), mode)
                {
                    assert_eq!(view.phase.mode(), mode);
                    self.ledger.borrow_mut().hear(name, Seen::of(&view), floor);
                }
            }
            Step::Put { breaker, ramp } => {
                self.panel.put(BREAKERS[breaker], &format!("{BREAKER}, {}", RAMPS[ramp]));
            }
            Step::End { breaker, limiter } => {
                match limiter {
                    true => self.panel.put(BREAKERS[breaker], ""),
                    false => self.panel.delete(BREAKERS[breaker]),
                }
                // Nobody remembers what those may do that are out.
                self.ledger.borrow_mut().probes.retain(|probe| probe.name.0 != breaker);
            }
            Step::Pass(time) => {
                self.panel.clock.advance(time);
                self.ledger.borrow_mut().now += time;
            }
            Step::Rest => {
                self.take(Step::Pass(limits::CIRCUIT_REMEMBERED));
                self.panel.tend();
            }
            Step::Tend => self.panel.tend(),
            Step::Write => self.panel.write(),
            Step::Watch { from } => self.watch(from),
            Step::Read { which } => {
                if !self.watchers.is_empty() {
                    self.read(which % self.watchers.len());
                }
            }
            Step::Leave { which } => {
                if let Some(watcher) = self.watchers.get_mut(which) {
                    watcher.watch = None;
                }
            }
            Step::Kill { loses_power } => {
                if loses_power {
                    self.panel.disk.lose_power();
                }
                self.panel.disk.kill();
                self.restart();
            }
            Step::Stop => self.stop(),
        }
        self.listen();
        self.ledger.borrow_mut().expect_bounds();
    }

    /// Begins something that tells when it may.
    fn begin(&mut self, task: impl Future<Output = ()> + 'static) {
        self.pending.push(Box::pin(task));
        self.listen();
    }

    fn listen(&mut self) {
        self.pending.retain_mut(|task| poll(task.as_mut()).is_none());
    }

    fn ask(&mut self, circuits: &[Name], (permits, rate): (bool, bool), peeks: bool) {
        if !circuits.iter().all(|name| self.is_there(name.0)) {
            return;
        }
        let cost = u64::from(!peeks);
        let mut asks: Vec<_> =
            circuits.iter().map(|name| (breaker(*name), key(*name), cost)).collect();
        asks.extend(rate.then_some(("rate", "", 1)));
        if permits {
            asks.insert(0, ("permits", "", 1));
        }
        let answer = acquire(&self.panel.app, &asks).unwrap();
        let (ledger, names) = (Rc::clone(&self.ledger), circuits.to_vec());
        let (floor, asked_at) = (ledger.borrow().floor(), ledger.borrow().now);
        self.begin(async move {
            let answered = answer.told().await.unwrap();
            let mut ledger = ledger.borrow_mut();
            let grant = answered.grant.as_ref().map(ToString::to_string);
            for (name, crossed) in names.iter().zip(&answered.circuits) {
                let view = crossed.view.as_ref().unwrap();
                ledger.hear(*name, Seen::of(view), floor);
                let probe = crossed.admitted.is_some_and(|admitted| admitted.probe.is_some());
                assert_eq!(probe, answered.allowed && !peeks && view.phase == Phase::HalfOpen);
                if probe {
                    assert!(ledger.given.insert(format!("{name:?} {grant:?}")), "told twice");
                    ledger.give(*name, grant.clone().unwrap(), asked_at);
                }
                let is_open = view.phase.state() == State::Open;
                assert!(!answered.allowed || !is_open || peeks, "let through {view:?}");
            }
            ledger.grants.extend(answered.grant);
        });
    }

    fn tell(&mut self, which: usize, outcome: Outcome) {
        let mut ledger = self.ledger.borrow_mut();
        let Some(which) = ledger.grants.len().checked_sub(1 + which) else { return };
        let grant = ledger.grants[which].clone();
        let text = grant.to_string();
        ledger.probes.retain(|probe| probe.grant != text);
        let floor = ledger.floor();
        drop(ledger);
        let (app, ledger) = (Arc::clone(&self.panel.app), Rc::clone(&self.ledger));
        self.begin(async move {
            let report = Report { outcomes: vec![(Some(grant), went(outcome))], ..report("r0") };
            let told = app.report(app.caller(Principal::Anonymous), &report).await.unwrap();
            for seen in &told.circuits {
                let name = name_of(&seen.name.breaker.policy, &seen.name.key);
                ledger.borrow_mut().hear(name, Seen::of(&seen.view), floor);
            }
        });
    }

    fn count(&mut self, name: Name, ago: usize, by: usize, (failures, successes): (u32, u32)) {
        if !self.is_there(name.0) {
            return;
        }
        let ledger = self.ledger.borrow();
        let told = || ledger.phases.keys().filter(|(one, _)| *one == name);
        let ago = ago.min(told().count().saturating_sub(1));
        let generation =
            told().nth_back(ago).map_or_else(|| self.panel.app.circuits().absent(), |one| one.1);
        // It was something else since.
        let since = ledger.phases.range((name, Generation(generation.0 + 1))..);
        let is_old = since
            .take_while(|((one, _), _)| *one == name)
            .any(|(_, phase)| *phase != Phase::Closed);
        let floor = ledger.floor();
        drop(ledger);
        let (app, ledger) = (Arc::clone(&self.panel.app), Rc::clone(&self.ledger));
        self.begin(async move {
            let (policy, key) = (breaker(name), key(name));
            let delta = Delta { policy, key, generation, failures, successes, ..Delta::default() };
            let report = Report { deltas: vec![delta], ..report(["r0", "r1", "r2"][by]) };
            let told = app.report(app.caller(Principal::Anonymous), &report).await.unwrap();
            assert!(
                !is_old || told.delta_results != [Reported::Applied],
                "{generation:?} of {name:?}"
            );
            ledger.borrow_mut().hear(name, Seen::of(&told.circuits[0].view), floor);
        });
    }

    /// Somebody watches from now on, or goes on where it stopped.
    fn watch(&mut self, from: Option<usize>) {
        let floor = self.ledger.borrow().floor();
        let known = |watcher: &Watcher| watcher.known;
        let index = from.filter(|index| *index < self.watchers.len());
        let known = index.map_or((0, 0), |index| known(&self.watchers[index]));
        let watched = Watched { namespace: "test", client: None, policies: &[], known };
        let watch =
            self.panel.app.watch_circuits(self.panel.app.caller(Principal::Anonymous), &watched);
        let watch = Some(watch.unwrap());
        if let Some(index) = index {
            let watcher = &mut self.watchers[index];
            (watcher.watch, watcher.floor, watcher.fresh) = (watch, floor, None);
        } else if self.watchers.len() < 4 {
            let (map, fresh, absent) = (BTreeMap::new(), None, Generation(0));
            self.watchers.push(Watcher { watch, known, map, fresh, absent, floor });
        }
    }

    /// All that there is to be told now.
    fn read(&mut self, which: usize) {
        let watcher = &mut self.watchers[which];
        let mut ledger = self.ledger.borrow_mut();
        while let Some(watch) = &mut watcher.watch {
            let Some(news) = poll(std::pin::pin!(watch.next())) else { break };
            watcher.is_told(news.unwrap(), &mut ledger);
            watcher.floor = ledger.floor();
        }
        watcher.floor = ledger.floor();
    }

    /// Whoever was told to wait is told nothing any more.
    fn end(&mut self) {
        self.pending.clear();
        self.watchers.iter_mut().for_each(|watcher| watcher.watch = None);
    }

    fn stop(&mut self) {
        self.end();
        let (app, writer) = panel::app_on(
            fusebox_server::storage::journal::Nothing::open(),
            &self.panel.config,
            &self.panel.clock,
        )
        .unwrap();
        let grants = self.panel.app.grants().all();
        self.panel.app = Arc::new(app);
        std::mem::replace(&mut self.panel.writer, writer).finish(&grants).unwrap();
        self.restart();
    }

    fn restart(&mut self) {
        self.end();
        self.panel.start();
        let epoch = self.panel.app.circuits().boards().epoch();
        assert!(self.epochs.insert(epoch), "of another start");
        // What was told is still so.
        let mut ledger = self.ledger.borrow_mut();
        let floor = ledger.floor();
        for name in NAMES {
            if let Some(found) = self.panel.inspect(breaker(name), key(name)) {
                ledger.hear(name, Seen::of(&found.circuit.view), floor);
            }
        }
    }

    /// Once nothing happens any more, whoever watches knows all.
    fn expect_quiet(&mut self) {
        self.panel.write();
        self.panel.tend();
        self.panel.write();
        self.listen();
        assert!(self.pending.is_empty(), "who waits is told in the end");
        for index in 0..self.watchers.len() {
            if self.watchers[index].watch.is_none() {
                self.watch(Some(index));
            }
            self.read(index);
            for name in NAMES {
                let told = self.watchers[index].map.get(&name).cloned();
                let Some(found) = self.panel.inspect(breaker(name), key(name)) else {
                    assert!(told.is_none(), "{name:?} has no breaker");
                    continue;
                };
                let view = found.circuit.view;
                match told {
                    Some(told) => assert_eq!(told, view, "{name:?}"),
                    None => assert_eq!(
                        (view.phase, found.history.len()),
                        (Phase::Closed, 0),
                        "{name:?}"
                    ),
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn nothing_that_was_told_is_taken_back(history in vec(steps(), 1..80)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _entered = runtime.enter();
        let mut world = World::new();
        for step in history {
            world.take(step);
        }
        world.expect_quiet();
    }
}
