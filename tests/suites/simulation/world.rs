//! A fleet, a server, what happens to them, and what is asked of them in the end.

use std::{
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use fusebox_server::config::Config;
use fusebox_tests::Simulated;
use parking_lot::Mutex;
use turmoil::Sim;

use crate::{
    chance::Chance,
    client::Process,
    ledger::{self, Entry, Promise, What},
    server,
};

const PROCESSES: usize = 3;

/// While all kinds of things go wrong.
const TROUBLE: Duration = Duration::from_secs(20);

/// After that, nothing does. Longer than the longest wait of a circuit, and than a silent connection is believed in.
const PEACE: Duration = Duration::from_secs(15);

/// The end of it, when all must be well.
const WELL: Duration = Duration::from_secs(5);

const CONFIG: &str = "
storage: {durability: strict}
namespaces:
  test:
    policies:
      strict: {token_bucket: {limit: 200, per: 1s}, on_unreachable: deny}
      open: {token_bucket: {limit: 200, per: 1s}, on_unreachable: allow}
      slow: {token_bucket: {limit: 1000, per: 20s, burst: 100}, on_unreachable: deny}
      calm: {token_bucket: {limit: 200, per: 1s}, on_unreachable: deny}
      permits: {concurrency: {limit: 2, ttl: 3s}}
      target:
        breaker:
          window: 2s
          min_calls: 10
          open_for: 500ms
          backoff: {max: 2s}
          half_open: {probes: 2, probe_timeout: 1s, max_duration: 3s}
          ramp: {steps: [50%, 100%], each: 500ms}
";

/// Those that the ledger is held to. A lease lives for a second.
const PROMISES: [Promise; 3] = [
    Promise { policy: "strict", rate_per_second: 200, burst: 200, lease: Duration::from_secs(1) },
    Promise { policy: "calm", rate_per_second: 200, burst: 200, lease: Duration::from_secs(1) },
    Promise { policy: "slow", rate_per_second: 50, burst: 100, lease: Duration::from_secs(1) },
];

/// One thing that goes wrong.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    /// The server is gone, what it did not sync is lost, and nobody is told; it is back after so long.
    PowerCut { back_in: u64 },
    /// A process is gone in the same way, and another takes its place.
    Death { process: usize, back_in: u64 },
    /// Nothing goes from or to a process.
    Cut { process: usize, mended_in: u64 },
    /// Nothing goes one way.
    OneWay { process: usize, to_server: bool, mended_in: u64 },
    /// What is sent arrives later, all at once.
    Held { process: usize, let_go_in: u64 },
    /// The target works no more, or works again.
    Target,
}

impl Trouble {
    fn draw(chance: &Chance) -> Self {
        let process = usize::try_from(chance.within(0..PROCESSES as u64)).unwrap();
        let millis = chance.within(50..6_000);
        match chance.within(0..8) {
            0 => Self::PowerCut { back_in: millis },
            1 => Self::Death { process, back_in: millis },
            2 | 3 => Self::Cut { process, mended_in: millis },
            4 => Self::OneWay { process, to_server: chance.one_in(2), mended_in: millis },
            5 => Self::Held { process, let_go_in: millis },
            _ => Self::Target,
        }
    }
}

/// What puts an end to a trouble, and when.
type Ends = Vec<(Duration, Trouble)>;

/// Lives the world of a seed, and judges it. What happened in it, so that two can be compared.
///
/// # Panics
/// If a promise is broken.
pub fn live(seed: u64) -> Vec<Entry> {
    let mut world = World::of(seed);
    while world.now() < TROUBLE {
        world.step();
        if world.chance.one_in(700) {
            let trouble = Trouble::draw(&world.chance);
            world.begin(trouble);
        }
    }
    world.mend_all();
    while world.now() < TROUBLE + PEACE {
        world.step();
    }
    world.judge()
}

struct World {
    sim: Sim<'static>,
    chance: Chance,
    disk: Arc<Simulated>,
    ledger: Arc<Mutex<Vec<Entry>>>,
    target: Arc<Mutex<bool>>,
    ends: Ends,
}

impl World {
    fn of(seed: u64) -> Self {
        let chance = Chance::of(seed);
        let mut sim = turmoil::Builder::new()
            .epoch(UNIX_EPOCH + Duration::from_secs(1_790_000_000))
            .simulation_duration(TROUBLE + PEACE + Duration::from_secs(1))
            .tick_duration(Duration::from_millis(1))
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(chance.within(2..15)))
            .tcp_capacity(1_024)
            .enable_random_order()
            .rng_seed(chance.next())
            .build();
        let (disk, target) = (Arc::new(Simulated::default()), Arc::new(Mutex::new(true)));
        let config = Arc::new(Config::parse("simulation.yaml", CONFIG).expect("a configuration"));
        let (servers, on) = (chance.fork(), Arc::clone(&disk));
        sim.host("server", move || {
            server::serve(Arc::clone(&on), Arc::clone(&config), servers.fork())
        });
        let ledger = Arc::<Mutex<Vec<Entry>>>::default();
        for index in 0..PROCESSES {
            let (processes, ledger) = (chance.fork(), Arc::clone(&ledger));
            let target = Arc::clone(&target);
            sim.host(name(index), move || {
                let chance = Arc::new(processes.fork());
                let (ledger, target) = (Arc::clone(&ledger), Arc::clone(&target));
                Process { index, chance, ledger, target }.run()
            });
        }
        Self { sim, chance, disk, ledger, target, ends: Ends::new() }
    }

    fn now(&self) -> Duration {
        self.sim.elapsed()
    }

    fn step(&mut self) {
        self.sim.step().expect("nobody gives up");
        let now = self.now();
        while let Some(due) = self.ends.iter().position(|(at, _)| *at <= now) {
            let (_, trouble) = self.ends.remove(due);
            self.end(trouble);
        }
    }

    fn begin(&mut self, trouble: Trouble) {
        let lasts = match trouble {
            Trouble::PowerCut { back_in } => {
                // One at a time.
                if !self.sim.is_host_running("server") {
                    return;
                }
                // Nobody is told: connections that end by themselves would end in an order of their own.
                (0..PROCESSES).for_each(|index| self.sim.partition("server", name(index)));
                (0..PROCESSES).for_each(|index| self.note(index, What::CutOff));
                self.sim.crash("server");
                self.disk.lose_power();
                back_in
            }
            Trouble::Death { process, back_in } => {
                if !self.sim.is_host_running(name(process)) {
                    return;
                }
                self.sim.partition("server", name(process));
                self.sim.crash(name(process));
                self.bury(process);
                back_in
            }
            Trouble::Cut { process, mended_in } => {
                self.sim.partition("server", name(process));
                self.note(process, What::CutOff);
                mended_in
            }
            Trouble::OneWay { process, to_server, mended_in } => {
                let (from, to) = (name(process), "server".to_owned());
                let (from, to) = if to_server { (from, to) } else { (to, from) };
                self.sim.partition_oneway(from, to);
                self.note(process, What::CutOff);
                mended_in
            }
            Trouble::Held { process, let_go_in } => {
                self.sim.hold("server", name(process));
                self.note(process, What::CutOff);
                let_go_in
            }
            Trouble::Target => {
                let mut works = self.target.lock();
                *works = !*works;
                return;
            }
        };
        self.ends.push((self.now() + Duration::from_millis(lasts), trouble));
    }

    fn end(&mut self, trouble: Trouble) {
        match trouble {
            Trouble::PowerCut { .. } => {
                self.sim.bounce("server");
                (0..PROCESSES).for_each(|index| self.mend(index));
            }
            Trouble::Death { process, .. } => {
                self.sim.bounce(name(process));
                self.mend(process);
            }
            Trouble::Cut { process, .. } | Trouble::OneWay { process, .. } => {
                self.mend(process);
            }
            Trouble::Held { process, .. } => {
                self.sim.release("server", name(process));
                self.note(process, What::Mended);
            }
            Trouble::Target => {}
        }
    }

    fn mend(&self, process: usize) {
        self.sim.repair("server", name(process));
        self.note(process, What::Mended);
    }

    fn note(&self, client: usize, what: What) {
        self.ledger.lock().push(Entry { at: self.now(), client, what });
    }

    /// Who is dead holds nothing.
    fn bury(&self, process: usize) {
        let mut ledger = self.ledger.lock();
        let at = self.now();
        let held = ledger.iter().filter(|entry| entry.client == process);
        let permits: Vec<_> = held
            .filter_map(|entry| match entry.what {
                What::Held { permit } => Some(permit),
                _ => None,
            })
            .collect();
        for permit in permits {
            ledger.push(Entry { at, client: process, what: What::LetGo { permit } });
        }
    }

    fn mend_all(&mut self) {
        for (_, trouble) in std::mem::take(&mut self.ends) {
            self.end(trouble);
        }
        *self.target.lock() = true;
    }

    fn judge(self) -> Vec<Entry> {
        drop(self.sim);
        let entries = std::mem::take(&mut *self.ledger.lock());
        PROMISES.iter().for_each(|promise| promise.check(&entries));
        ledger::check_droughts(&entries, &PROMISES);
        ledger::check_permits(&entries, 2);
        ledger::check_allowed(&entries, "open");
        // Within `decide_within`, and what a runtime's timers may be late.
        ledger::check_waits(&entries, Duration::from_millis(55));
        // All is well again: what there is to spend is spent, and everybody calls.
        let well = TROUBLE + PEACE - WELL..TROUBLE + PEACE;
        let seconds = WELL.as_secs();
        for promise in PROMISES.iter().filter(|promise| promise.policy != "calm") {
            let spent = ledger::spent(&entries, promise.policy, well.clone());
            let steady = promise.rate_per_second * seconds;
            assert!(spent * 100 >= steady * 95, "{spent} of {steady} of `{}`", promise.policy);
        }
        for process in 0..PROCESSES {
            let mut of_it = entries.iter().filter(|entry| entry.client == process);
            let calls = of_it.any(|entry| {
                well.contains(&entry.at) && entry.what == What::Called { success: true }
            });
            assert!(calls, "{} calls no more", name(process));
        }
        entries
    }
}

fn name(process: usize) -> String {
    format!("process-{process}")
}
