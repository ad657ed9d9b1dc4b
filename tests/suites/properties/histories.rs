//! Random lives of a panel on a disk that forgets, judged by a ledger that knows none of its parts.

use std::{
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use fusebox_server::{
    app::{
        self, Acquire, Acquired, App, Ask, GrantName, Granted, Principal, Priority, Report,
        Reported, Told,
    },
    config::Config,
    storage::{Answer, Decided, Durable, Storage, Writer},
};
use fusebox_tests::{
    Counting, ManualClock, Simulated,
    panel::{app_of, recover, settled, write_all},
};
use proptest::{collection::vec, prelude::*, sample::select};

/// A bucket of ten tokens in each period, of which there are two: it changes at some restarts.
struct Policy {
    name: &'static str,
    per_millis: [u64; 2],
    burst: u64,
    durability: &'static str,
}

const LIMIT: u64 = 10;

/// One that is slow, one that turns from fast to slow and back, and one whose ALLOWs do not wait.
const POLICIES: [Policy; 3] = [
    Policy { name: "slow", per_millis: [20_000, 30_000], burst: 10, durability: "strict" },
    Policy { name: "turning", per_millis: [1_000, 20_000], burst: 20, durability: "strict" },
    Policy { name: "lax", per_millis: [20_000, 20_000], burst: 10, durability: "relaxed" },
];

const TURNING: usize = 1;

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
    Stop {
        turns: bool,
    },
    /// What the process wrote is there, or only what was synced.
    Crash {
        synced_only: bool,
        wall_goes_back_millis: u64,
        turns: bool,
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
        1 => any::<bool>().prop_map(|turns| Event::Stop { turns }),
        2 => (any::<bool>(), select(vec![0_u64, 0, 0, 5_000]), any::<bool>()).prop_map(
            |(synced_only, wall_goes_back_millis, turns)| {
                Event::Crash { synced_only, wall_goes_back_millis, turns }
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
    /// The period that was in force up to here.
    per_millis: u64,
    /// Tokens charged, or given back.
    tokens: i64,
    estimated: bool,
    told: bool,
}

/// A bucket that nobody but the ledger fills: what was spent, in parts of a token.
struct Ideal {
    spent: u64,
    at_millis: u64,
}

/// Divided by every period.
const PARTS: u64 = 60_000;

impl Ideal {
    fn full() -> Self {
        Self { spent: 0, at_millis: 0 }
    }

    fn refill(&mut self, per_millis: u64, at_millis: u64) {
        let refill = (at_millis - self.at_millis) * LIMIT * (PARTS / per_millis);
        self.spent = self.spent.saturating_sub(refill);
        self.at_millis = at_millis;
    }

    fn charge(&mut self, entry: &Entry) {
        self.refill(entry.per_millis, entry.at_millis);
        let parts = entry.tokens.unsigned_abs() * PARTS;
        self.spent = match entry.tokens {
            0.. => self.spent + parts,
            _ => self.spent.saturating_sub(parts),
        };
    }

    /// Whole tokens; below zero is more than there was.
    fn left(&self, burst: u64) -> i64 {
        i64::try_from(burst).unwrap() - i64::try_from(self.spent.div_ceil(PARTS)).unwrap()
    }
}

/// A panel, and everything that is known of it from outside.
struct World {
    journal: Simulated,
    clock: Arc<ManualClock>,
    /// Which of the two periods is in force.
    turned: usize,
    life: Option<Life>,
    now_millis: u64,
    wall_went_back: bool,
    ledger: Vec<Entry>,
    crashes: i64,
    /// Entries of `lax` up to here are on disk.
    caught_up: usize,
    open: Vec<(GrantName, usize, usize, u64)>,
    /// Grants whose life ended in a crash.
    dead: Vec<GrantName>,
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
        let mut world = Self {
            journal: Simulated::default(),
            clock: Arc::default(),
            turned: 0,
            life: None,
            now_millis: 0,
            wall_went_back: false,
            ledger: Vec::new(),
            crashes: 0,
            caught_up: 0,
            open: Vec::new(),
            dead: Vec::new(),
        };
        world.start();
        world
    }

    fn config(&self) -> Config {
        let mut config = "namespaces:\n  test:\n    policies:\n".to_owned();
        for Policy { name, per_millis, burst, durability } in POLICIES {
            let per = per_millis[self.turned];
            let bucket = format!("{{limit: {LIMIT}, per: {per}ms, burst: {burst}}}");
            config +=
                &format!("      {name}: {{token_bucket: {bucket}, durability: {durability}}}\n");
        }
        Config::parse("test.yaml", &config).unwrap()
    }

    fn turn(&mut self) {
        for (policy, key) in Self::buckets() {
            let entry = self.entry(policy, key, 0, false, true);
            self.ledger.push(entry);
        }
        self.turned = 1 - self.turned;
    }

    fn entry(&self, policy: usize, key: usize, tokens: i64, estimated: bool, told: bool) -> Entry {
        let (at_millis, per_millis) = (self.now_millis, POLICIES[policy].per_millis[self.turned]);
        Entry { policy, key, at_millis, per_millis, tokens, estimated, told }
    }

    fn start(&mut self) {
        let recovered = recover(self.journal.open(), &self.config(), &self.clock).unwrap();
        let cells = Arc::clone(&recovered.cells);
        let (app, writer) = app_of(recovered, Arc::<Counting>::default());
        let storage = Arc::clone(&cells) as Arc<dyn Storage>;
        let stop = Box::new(move || cells.stop());
        self.life =
            Some(Life { app: Arc::new(app), cells: storage, writer, stop, waiting: Vec::new() });
    }

    fn life(&mut self) -> &mut Life {
        self.life.as_mut().unwrap()
    }

    fn acquire(&mut self, policy: usize, key: usize, tokens: u64, estimated: bool) -> Option<u64> {
        let next = self.ledger.len();
        let life = self.life.as_mut().unwrap();
        let (name, key_name) = (POLICIES[policy].name, KEYS[key]);
        let ask = Ask { policy: name, key: key_name, cost: tokens, estimated, lease: 0 };
        let entry = app::Entry { asks: [ask], priority: Priority::Normal, retry: false };
        let acquire = Acquire { namespace: "test", client: None, entry };
        let caller = life.app.caller(Principal::Anonymous);
        let tell = |acquired: &Acquired| {
            let Acquired { decided: Decided { decision, .. }, grant, .. } = acquired;
            (
                decision.allowed,
                decision.verdicts[0].remaining,
                grant.clone().and_then(Granted::kept),
            )
        };
        let ((allowed, remaining, grant), durable) =
            match life.app.acquire(caller, acquire, tell).unwrap() {
                Answer::Now(acquired) => (acquired, None),
                Answer::Later(acquired, durable) => (acquired, Some(durable)),
            };
        if tokens == 0 {
            return Some(remaining);
        }
        if allowed {
            let charged = i64::try_from(tokens).unwrap();
            let told = durable.is_none();
            life.waiting.extend(durable.map(|durable| (durable, next)));
            let entry = self.entry(policy, key, charged, estimated, told);
            self.ledger.push(entry);
            // Its caller would not know its id before it is told; what is refused is never reported.
            self.open.extend(grant.map(|name| (name, policy, key, tokens)));
        }
        None
    }

    fn report(&mut self, which: prop::sample::Index, percent: u64) {
        if self.open.is_empty() {
            if !self.dead.is_empty() {
                let dead = self.dead[which.index(self.dead.len())];
                assert_eq!(self.reported(dead, 0), Reported::UnknownGrant);
            }
            return;
        }
        let (id, policy, key, estimate) = self.open.remove(which.index(self.open.len()));
        // Nobody knows a grant that was not told.
        self.write(false);
        let actual = estimate * percent / 100;
        if self.reported(id, actual) == Reported::Applied {
            // What is owed is not the ledger's: it was not admitted.
            let refunded = i64::try_from(estimate.saturating_sub(actual)).unwrap();
            let entry = self.entry(policy, key, -refunded, true, true);
            self.ledger.push(entry);
        }
    }

    fn reported(&mut self, grant: GrantName, actual: u64) -> Reported {
        let life = self.life();
        let caller = life.app.caller(Principal::Anonymous);
        let told = Told { actual_cost: Some(actual), ..Told::default() };
        let outcomes = vec![(Some(Granted::Kept(grant)), told)];
        let report = Report { namespace: "test", outcomes, ..Report::default() };
        let mut report = pin!(life.app.report(caller, &report));
        loop {
            match report.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(reported) => return reported.unwrap().results[0],
                Poll::Pending => write_all(&mut life.writer).unwrap(),
            };
        }
    }

    fn write(&mut self, catch_up: bool) {
        let entries = self.ledger.len();
        let life = self.life.as_mut().unwrap();
        if catch_up {
            life.writer.catch_up();
        }
        write_all(&mut life.writer).unwrap();
        tell(&mut life.waiting, &mut self.ledger);
        if catch_up {
            self.caught_up = entries;
        }
    }

    fn advance(&mut self, millis: u64) {
        self.now_millis += millis;
        self.clock.advance(Duration::from_millis(millis));
    }

    fn stop(&mut self, turns: bool) {
        let mut before = Vec::new();
        for (policy, key) in Self::buckets() {
            before.push(self.acquire(policy, key, 0, false));
        }
        let Life { app, writer, stop, mut waiting, .. } = self.life.take().unwrap();
        stop();
        writer.finish(&app.grants().all()).unwrap();
        tell(&mut waiting, &mut self.ledger);
        assert!(waiting.is_empty(), "whoever waited is told");
        self.caught_up = self.ledger.len();
        self.journal.lose_power();
        if turns {
            self.turn();
        }
        self.start();
        for ((policy, key), before) in Self::buckets().zip(before) {
            assert_eq!(self.acquire(policy, key, 0, false), before, "a clean stop loses nothing");
        }
    }

    fn crash(&mut self, synced_only: bool, wall_goes_back_millis: u64, turns: bool) {
        if synced_only {
            self.journal.lose_power();
        } else {
            self.journal.kill();
        }
        self.life = None;
        self.crashes += 1;
        self.dead.extend(self.open.drain(..).map(|(id, ..)| id));
        if wall_goes_back_millis > 0 {
            self.wall_went_back = true;
            self.clock.turn_wall_back(Duration::from_millis(wall_goes_back_millis));
        }
        // What relaxed was told since it was last written may be forgotten, and admitted again; what came
        // back since then may be on disk.
        for entry in &mut self.ledger[self.caught_up..] {
            entry.told &= POLICIES[entry.policy].durability != "relaxed" || entry.tokens <= 0;
        }
        self.caught_up = self.ledger.len();
        if turns {
            self.turn();
        }
        self.start();
        self.check_capacity();
    }

    /// Takes all that is left in every bucket: whatever was forgotten is admitted again.
    fn drain(&mut self) {
        for (policy, key) in Self::buckets() {
            let mut entries = usize::MAX;
            while entries != self.ledger.len() {
                entries = self.ledger.len();
                self.acquire(policy, key, 1, false);
            }
        }
        self.write(true);
    }

    fn buckets() -> impl Iterator<Item = (usize, usize)> {
        (0..POLICIES.len()).flat_map(|policy| (0..KEYS.len()).map(move |key| (policy, key)))
    }

    fn of(&self, policy: usize, key: usize) -> impl Iterator<Item = &Entry> {
        self.ledger.iter().filter(move |entry| (entry.policy, entry.key) == (policy, key))
    }

    /// A crash takes at most one step of a mark, and a begun token, from a slow bucket.
    fn check_capacity(&mut self) {
        for (index, key) in Self::buckets().filter(|(policy, _)| *policy != TURNING) {
            let Policy { name, burst, .. } = POLICIES[index];
            let mut ideal = Ideal::full();
            // Charged whether or not anybody was told.
            for entry in self.of(index, key) {
                ideal.charge(entry);
            }
            ideal.refill(POLICIES[index].per_millis[self.turned], self.now_millis);
            let left = self.acquire(index, key, 0, false).unwrap();
            let left = i64::try_from(left).unwrap();
            // What is out refills no more, and nor does anything while the wall clock catches up.
            let estimated = self.of(index, key).any(|entry| entry.estimated);
            if !self.wall_went_back && !estimated {
                let ideal = ideal.left(burst).max(0);
                assert!(left + 2 * self.crashes >= ideal, "{name} {key}: {left} of {ideal}");
            }
        }
    }

    /// Nobody was told to go on beyond what the bucket had.
    fn check(&self) {
        for (index, key) in Self::buckets() {
            let Policy { name, burst, .. } = POLICIES[index];
            let mut ideal = Ideal::full();
            for entry in self.of(index, key).filter(|entry| entry.told) {
                ideal.charge(entry);
                assert!(ideal.left(burst) >= 0, "{name} {key}: too much at {entry:?}");
            }
        }
    }
}

/// Notes who has been told that it may go on.
fn tell(waiting: &mut Vec<(Durable, usize)>, ledger: &mut [Entry]) {
    waiting.retain_mut(|(durable, index)| match settled(durable) {
        Some(told) => {
            told.unwrap();
            ledger[*index].told = true;
            false
        }
        None => true,
    });
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4_000, ..ProptestConfig::with_cases(2_000) })]

    #[test]
    fn no_life_on_a_disk_that_forgets_admits_more_than_the_limit(history in vec(events(), 1..60)) {
        live(history);
    }
}

#[test]
fn a_record_of_before_a_policy_was_fast_is_not_believed() {
    let acquire = Event::Acquire { policy: TURNING, key: 0, percent: 0, estimated: false };
    let crash = |turns| Event::Crash { synced_only: true, wall_goes_back_millis: 0, turns };
    let stop = Event::Stop { turns: true };
    // Fast, slow, fast, and slow after a loss of power that takes the deletes along.
    live(vec![acquire.clone(), stop.clone(), stop, acquire, crash(true), crash(false)]);
}

/// Lives through a history, and takes all that is left.
fn live(history: Vec<Event>) {
    let mut world = World::new();
    for event in history {
        match event {
            Event::Acquire { policy, key, percent, estimated } => {
                let tokens = (POLICIES[policy].burst * percent / 100).max(1);
                world.acquire(policy, key, tokens, estimated);
            }
            Event::Report { which, percent } => world.report(which, percent),
            Event::Advance { millis } => world.advance(millis),
            Event::Write { catch_up } => world.write(catch_up),
            Event::Tend => {
                let life = world.life();
                for _ in 0..256 {
                    life.cells
                        .tend(&life.app.catalogue(), life.app.caller(Principal::Anonymous).now);
                }
            }
            Event::Stop { turns } => world.stop(turns),
            Event::Crash { synced_only, wall_goes_back_millis, turns } => {
                world.crash(synced_only, wall_goes_back_millis, turns);
            }
        }
        world.check();
    }
    world.drain();
    world.check();
}
