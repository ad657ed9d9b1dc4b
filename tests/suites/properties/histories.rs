//! Random lives of a panel on a disk that forgets, judged by a ledger that knows none of its parts.

use std::{
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use fusebox_core::Cost;
use fusebox_server::{
    app::{Acquire, App, Ask, GrantId, Outcome, Principal, Reported},
    config::Config,
    storage::{Answer, Durable, Recovered, Storage, Writer},
};
use fusebox_tests::{
    Counting, ManualClock, Simulated,
    panel::{recover, settled, write_all},
};
use proptest::{collection::vec, prelude::*, sample::select};

/// Name, limit, period in milliseconds, burst and debt, and what else is said of it.
type Policy = (&'static str, u64, u64, u64, u64, &'static str);

/// Slow ones whose mark runs a token ahead, or ten; a fast one; one whose ALLOWs do not wait.
const POLICIES: [Policy; 4] = [
    ("slow", 10, 20_000, 10, 5, ""),
    ("busy", 1_000, 60_000, 1_000, 100, ""),
    ("fast", 10, 1_000, 20, 5, ""),
    ("lax", 10, 20_000, 10, 5, "durability: relaxed"),
];

const KEYS: [&str; 2] = ["a", "b"];

#[derive(Clone, Debug)]
enum Event {
    /// A share of the burst, in percent.
    Acquire {
        policy: usize,
        key: usize,
        percent: u64,
        estimated: bool,
    },
    /// The true cost of an open estimate, in percent of it.
    Report {
        which: prop::sample::Index,
        percent: u64,
    },
    Advance {
        millis: u64,
    },
    Write {
        catch_up: bool,
    },
    Tend,
    Stop,
    /// What the process wrote is there, or only what was synced.
    Crash {
        synced_only: bool,
        wall_goes_back_millis: u64,
    },
}

fn events() -> impl Strategy<Value = Event> {
    // One token more often than not: so a mark that runs ahead covers what comes next.
    let percent = prop_oneof![2 => Just(0), 1 => 1..60_u64];
    let acquire = (0..POLICIES.len(), 0..KEYS.len(), percent, prop::bool::weighted(0.3));
    prop_oneof![
        12 => acquire.prop_map(|(policy, key, percent, estimated)| {
            Event::Acquire { policy, key, percent, estimated }
        }),
        3 => (any::<prop::sample::Index>(), 0..200_u64)
            .prop_map(|(which, percent)| Event::Report { which, percent }),
        4 => select(vec![1_u64, 50, 400, 3_000, 12_000])
            .prop_map(|millis| Event::Advance { millis }),
        6 => any::<bool>().prop_map(|catch_up| Event::Write { catch_up }),
        1 => Just(Event::Tend),
        1 => Just(Event::Stop),
        2 => (any::<bool>(), select(vec![0_u64, 0, 0, 5_000])).prop_map(
            |(synced_only, wall_goes_back_millis)| {
                Event::Crash { synced_only, wall_goes_back_millis }
            }
        ),
    ]
}

/// What happened to one bucket, by the clock on the wall of the test.
#[derive(Clone, Copy, Debug)]
struct Entry {
    policy: usize,
    key: usize,
    at_millis: u64,
    /// Tokens charged, or given back.
    tokens: i64,
    estimated: bool,
    told: bool,
}

/// Tokens spent in a bucket that nobody but the ledger fills, in thousandths times its period.
struct Ideal {
    spent: i128,
    at_millis: u64,
}

impl Ideal {
    fn full() -> Self {
        Self { spent: 0, at_millis: 0 }
    }

    fn refill(&mut self, (_, limit, ..): Policy, at_millis: u64) {
        let refill = i128::from(at_millis - self.at_millis) * i128::from(limit);
        self.spent = (self.spent - refill).max(0);
        self.at_millis = at_millis;
    }

    fn charge(&mut self, policy: Policy, entry: &Entry) {
        self.refill(policy, entry.at_millis);
        self.spent = (self.spent + i128::from(entry.tokens) * i128::from(policy.2)).max(0);
    }

    fn left(&self, policy: Policy) -> i128 {
        i128::from(policy.3) - (self.spent + i128::from(policy.2) - 1) / i128::from(policy.2)
    }
}

/// A panel, and everything that is known of it from outside.
struct World {
    journal: Simulated,
    clock: Arc<ManualClock>,
    config: Config,
    life: Option<Life>,
    now_millis: u64,
    wall_went_back: bool,
    ledger: Vec<Entry>,
    crashes: i128,
    /// Entries of `lax` up to here are on disk.
    caught_up: usize,
    open: Vec<(GrantId, usize, usize, u64)>,
}

struct Life {
    app: Arc<App>,
    cells: Arc<dyn Storage>,
    writer: Writer,
    stop: Box<dyn Fn()>,
    waiting: Vec<(Durable, usize)>,
}

impl World {
    fn new() -> Self {
        let mut config = "namespaces:\n  test:\n    policies:\n".to_owned();
        for (name, limit, per, burst, max_debt, more) in POLICIES {
            let bucket = format!("{{limit: {limit}, per: {per}ms, burst: {burst}}}");
            let more = if more.is_empty() { String::new() } else { format!(", {more}") };
            config +=
                &format!("      {name}: {{token_bucket: {bucket}, max_debt: {max_debt}{more}}}\n");
        }
        let mut world = Self {
            journal: Simulated::default(),
            clock: Arc::default(),
            config: Config::parse("test.yaml", &config).unwrap(),
            life: None,
            now_millis: 0,
            wall_went_back: false,
            ledger: Vec::new(),
            crashes: 0,
            caught_up: 0,
            open: Vec::new(),
        };
        world.start();
        world
    }

    fn start(&mut self) {
        let recovered = recover(self.journal.open(), &self.config, &self.clock).unwrap();
        let Recovered { catalogue, cells, grants, writer, clock, boot, .. } = recovered;
        let stop = {
            let cells = Arc::clone(&cells);
            Box::new(move || cells.stop())
        };
        let storage = Arc::clone(&cells) as Arc<dyn Storage>;
        let entropy = Arc::new(Counting::default());
        let app = App::new(catalogue, Arc::clone(&storage), clock, entropy, boot, grants);
        let app = Arc::new(app);
        self.life = Some(Life { app, cells: storage, writer, stop, waiting: Vec::new() });
    }

    fn life(&mut self) -> &mut Life {
        self.life.as_mut().unwrap()
    }

    fn acquire(&mut self, policy: usize, key: usize, tokens: u64, estimated: bool) -> Option<u64> {
        let (at_millis, next) = (self.now_millis, self.ledger.len());
        let life = self.life.as_mut().unwrap();
        let ask =
            Ask { policy: POLICIES[policy].0, key: KEYS[key], cost: Cost { tokens, estimated } };
        let acquire = Acquire { namespace: "test", asks: [ask].into_iter().collect() };
        let caller = life.app.caller(Principal::Anonymous);
        let (acquired, durable) = match life.app.acquire(caller, &acquire).unwrap() {
            Answer::Now(acquired) => (acquired, None),
            Answer::Later(acquired, durable) => (acquired, Some(durable)),
        };
        if tokens == 0 {
            return Some(acquired.decision.verdicts[0].remaining);
        }
        if acquired.decision.allowed {
            let charged = i64::try_from(tokens).unwrap();
            let told = durable.is_none();
            let entry = Entry { policy, key, at_millis, tokens: charged, estimated, told };
            self.ledger.push(entry);
            life.waiting.extend(durable.map(|durable| (durable, next)));
            // Its caller would not know its id before it is told; what is refused is never reported.
            self.open.extend(acquired.grant.map(|(_, id)| (id, policy, key, tokens)));
        }
        None
    }

    fn report(&mut self, index: usize, percent: u64) {
        let (id, policy, key, estimate) = self.open.remove(index);
        self.write(false);
        let actual = estimate * percent / 100;
        let at_millis = self.now_millis;
        let life = self.life.as_mut().unwrap();
        let caller = life.app.caller(Principal::Anonymous);
        let outcome = [Outcome { grant: Some(id), actual_cost: Some(actual) }];
        let mut report = pin!(life.app.report(caller, "test", &outcome));
        let reported = loop {
            match report.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(reported) => break reported.unwrap(),
                Poll::Pending => write_all(&mut life.writer).unwrap(),
            }
        };
        if reported == [Reported::Applied] {
            // What is owed is not the ledger's: it was not admitted.
            let tokens = -i64::try_from(estimate.saturating_sub(actual)).unwrap();
            let entry = Entry { policy, key, at_millis, tokens, estimated: true, told: true };
            self.ledger.push(entry);
        }
    }

    fn write(&mut self, catch_up: bool) {
        let entries = self.ledger.len();
        let life = self.life.as_mut().unwrap();
        if catch_up {
            life.writer.catch_up();
        }
        write_all(&mut life.writer).unwrap();
        life.waiting.retain_mut(|(durable, index)| {
            let told = settled(durable);
            if let Some(told) = &told {
                told.as_ref().unwrap();
                self.ledger[*index].told = true;
            }
            told.is_none()
        });
        if catch_up {
            self.caught_up = entries;
        }
    }

    fn advance(&mut self, millis: u64) {
        self.now_millis += millis;
        self.clock.advance(Duration::from_millis(millis));
    }

    fn stop(&mut self) {
        let mut before = Vec::new();
        for (policy, key) in Self::buckets() {
            before.push(self.acquire(policy, key, 0, false));
        }
        self.write(true);
        let Life { app, writer, stop, .. } = self.life.take().unwrap();
        stop();
        writer.finish(&app.grants().all()).unwrap();
        self.journal.lose_power();
        self.start();
        for ((policy, key), before) in Self::buckets().zip(before) {
            assert_eq!(self.acquire(policy, key, 0, false), before, "a clean stop loses nothing");
        }
    }

    fn crash(&mut self, synced_only: bool, wall_goes_back_millis: u64) {
        if synced_only {
            self.journal.lose_power();
        } else {
            self.journal.kill();
        }
        self.life = None;
        self.crashes += 1;
        self.open.clear();
        if wall_goes_back_millis > 0 {
            self.wall_went_back = true;
            self.clock.turn_wall_back(Duration::from_millis(wall_goes_back_millis));
        }
        // What relaxed was told since it was last written is forgotten, and may be admitted again.
        for entry in &mut self.ledger[self.caught_up..] {
            entry.told &= POLICIES[entry.policy].0 != "lax";
        }
        self.caught_up = self.ledger.len();
        self.start();
        self.check_capacity();
    }

    fn buckets() -> impl Iterator<Item = (usize, usize)> {
        (0..POLICIES.len()).flat_map(|policy| (0..KEYS.len()).map(move |key| (policy, key)))
    }

    fn of(&self, policy: usize, key: usize) -> impl Iterator<Item = &Entry> {
        self.ledger.iter().filter(move |entry| (entry.policy, entry.key) == (policy, key))
    }

    /// A crash takes at most one step of a mark from a slow bucket.
    fn check_capacity(&mut self) {
        for (index, key) in Self::buckets().filter(|(policy, _)| POLICIES[*policy].0 != "fast") {
            let policy = POLICIES[index];
            let mut ideal = Ideal::full();
            // Charged whether or not anybody was told; credits of the dead are none.
            for entry in self.of(index, key) {
                ideal.charge(policy, entry);
            }
            ideal.refill(policy, self.now_millis);
            let step = i128::from((policy.1.min(policy.3) / 100).max(1));
            let left = i128::from(self.acquire(index, key, 0, false).unwrap());
            // What is out refills no more, and nor does anything while the wall clock catches up.
            let estimated = self.of(index, key).any(|entry| entry.estimated);
            if !self.wall_went_back && !estimated {
                assert!(
                    left + self.crashes * (step + 1) >= ideal.left(policy).max(0),
                    "{} {key}: {left} are left of {}",
                    policy.0,
                    ideal.left(policy)
                );
            }
        }
    }

    /// Nobody was told to go on beyond what the bucket had.
    fn check(&self) {
        for (index, key) in Self::buckets() {
            let policy = POLICIES[index];
            let mut ideal = Ideal::full();
            for entry in self.of(index, key).filter(|entry| entry.told) {
                ideal.charge(policy, entry);
                assert!(
                    ideal.left(policy) >= 0,
                    "{} {key} at {} ms: {:?}",
                    policy.0,
                    entry.at_millis,
                    self.ledger
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4_000, ..ProptestConfig::with_cases(2_000) })]

    #[test]
    fn no_life_on_a_disk_that_forgets_admits_more_than_the_limit(history in vec(events(), 1..60)) {
        let mut world = World::new();
        for event in history {
            match event {
                Event::Acquire { policy, key, percent, estimated } => {
                    let tokens = (POLICIES[policy].3 * percent / 100).max(1);
                    world.acquire(policy, key, tokens, estimated);
                }
                Event::Report { which, percent } => {
                    if !world.open.is_empty() {
                        world.report(which.index(world.open.len()), percent);
                    }
                }
                Event::Advance { millis } => world.advance(millis),
                Event::Write { catch_up } => world.write(catch_up),
                Event::Tend => {
                    let life = world.life();
                    for _ in 0..256 {
                        life.cells.tend(&life.app.catalogue(), life.app.caller(Principal::Anonymous).now);
                    }
                }
                Event::Stop => world.stop(),
                Event::Crash { synced_only, wall_goes_back_millis } => {
                    world.crash(synced_only, wall_goes_back_millis);
                }
            }
            world.check();
        }
    }
}
