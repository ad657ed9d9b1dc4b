//! Circuits as a server keeps them, for random histories: callers, operators and watchers that come and go, a disk
//! that is late, a server that is killed at any time. Nothing that was told is ever taken back.

mod histories;
mod named;
mod threads;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use fusebox_core::circuit::{Call, Generation, Mode, Outcome, Phase, View};
use fusebox_server::{
    app::{
        Acquire, App, Ask, Client, Crossed, Delta, Entry, Granted, Principal, Priority, Report,
        Told,
        admin::{CircuitInspected, DeletePolicy, PutPolicy, SetMode},
    },
    catalogue::PolicyName,
    config::{self, Config},
    limits,
    storage::{Answer, Writer},
};
use fusebox_tests::{ManualClock, Simulated, panel};
use parking_lot::Mutex;

/// What every server here is configured with: limiters. Breakers are an operator's, who changes them.
const LIMITERS: &str = "namespaces: {test: {policies: {
    permits: {concurrency: {limit: 3, ttl: 1s}}, rate: {token_bucket: {limit: 5, per: 1s}}}}}";

/// Opens by two calls that fail, whoever tells of them; two probes.
const BREAKER: &str = "window: 1s, min_calls: 2, min_reporters: 1, open_for: 5s, backoff: {jitter: 0%, max: 10s}, \
    half_open: {probes: 2, probe_timeout: 4s, max_duration: 8s}";

/// Without a ramp, and with one.
const RAMPS: [&str; 2] = ["ramp: {steps: []}", "ramp: {steps: [50%], each: 1s}"];

/// A server without its transport, on a disk that outlives it.
struct Panel {
    disk: Simulated,
    clock: Arc<ManualClock>,
    config: Config,
    app: Arc<App>,
    writer: Writer,
}

/// Who makes a call, and what it asks.
type Asks<'a> = &'a [(&'a str, &'a str, u64)];

/// What an Acquire is told.
#[derive(Debug)]
struct Answered {
    allowed: bool,
    grant: Option<Granted>,
    circuits: Vec<Crossed>,
}

impl Panel {
    fn new() -> Self {
        let (disk, clock) = (Simulated::default(), Arc::<ManualClock>::default());
        let config = Config::parse("test.yaml", LIMITERS).unwrap();
        let (app, mut writer) = panel::app_on(disk.open(), &config, &clock).unwrap();
        panel::write_all(&mut writer).unwrap();
        Self { disk, clock, config, app: Arc::new(app), writer }
    }

    /// One with breakers of these names.
    fn with(breakers: &[&str], settings: &str) -> Self {
        let mut panel = Self::new();
        for breaker in breakers {
            panel.put(breaker, settings);
        }
        panel
    }

    /// Another start on the same disk.
    fn start(&mut self) {
        let (app, writer) = panel::app_on(self.disk.open(), &self.config, &self.clock).unwrap();
        (self.app, self.writer) = (Arc::new(app), writer);
    }

    fn kill(&mut self) {
        self.disk.kill();
        self.start();
    }

    /// What an operator does, with as many rounds of the writer as it takes.
    fn operate<T>(&mut self, order: impl Future<Output = T>) -> T {
        let mut order = std::pin::pin!(order);
        loop {
            if let Some(done) = poll(order.as_mut()) {
                return done;
            }
            panel::write_all(&mut self.writer).unwrap();
        }
    }

    fn put(&mut self, breaker: &str, settings: &str) {
        let app = Arc::clone(&self.app);
        let put = PutPolicy {
            name: PolicyName::new("test", breaker),
            settings: settings_of(settings),
            expected: None,
            dry_run: false,
            reason: String::new(),
        };
        self.operate(app.put_policy(Principal::Anonymous, put)).unwrap();
    }

    fn delete(&mut self, breaker: &str) {
        let app = Arc::clone(&self.app);
        let name = PolicyName::new("test", breaker);
        let delete = DeletePolicy { name, expected: None, dry_run: false, reason: String::new() };
        // It may be gone already.
        let _ = self.operate(app.delete_policy(Principal::Anonymous, delete));
    }

    fn set(&mut self, breaker: &str, key: &str, mode: Mode) -> Option<View> {
        let app = Arc::clone(&self.app);
        let set = SetMode {
            name: PolicyName::new("test", breaker),
            key: key.into(),
            mode,
            ttl: Duration::from_secs(30),
            reason: "a test".into(),
            expected: None,
        };
        let set = self.operate(app.set_circuit_mode(Principal::Anonymous, set));
        set.ok().map(|set| set.circuit.view)
    }

    fn inspect(&self, breaker: &str, key: &str) -> Option<CircuitInspected> {
        self.app.inspect_circuit(&PolicyName::new("test", breaker), key).ok()
    }

    /// Asks, and waits for what has to be written.
    fn ask(&mut self, asks: Asks<'_>) -> Answered {
        let answer = acquire(&self.app, asks).unwrap();
        panel::told(answer, &mut self.writer)
    }

    /// One whole round of housekeeping, of which nothing is written yet.
    fn tend(&self) {
        for _ in 0..limits::CIRCUIT_SHARDS {
            self.app.tend().unwrap();
        }
    }

    fn write(&mut self) {
        panel::write_all(&mut self.writer).unwrap();
    }

    /// A reporter tells of calls that failed.
    fn fails(&mut self, breaker: &str, key: &str, calls: u32) {
        let generation = self.inspect(breaker, key).unwrap().circuit.view.generation;
        let delta = Delta { policy: breaker, key, generation, failures: calls, ..Delta::default() };
        let app = Arc::clone(&self.app);
        let report = Report { deltas: vec![delta], ..report("reporter") };
        self.operate(app.report(app.caller(Principal::Anonymous), &report)).unwrap();
    }

    /// The owner of a grant tells how its call went.
    fn tell(&mut self, grant: &Granted, outcome: Outcome) -> fusebox_server::app::Reported {
        let app = Arc::clone(&self.app);
        let report =
            Report { outcomes: vec![(Some(grant.clone()), went(outcome))], ..report("reporter") };
        let told = self.operate(app.report(app.caller(Principal::Anonymous), &report)).unwrap();
        told.results[0]
    }
}

/// Looks once whether it is done.
fn poll<T>(future: std::pin::Pin<&mut (impl Future<Output = T> + ?Sized)>) -> Option<T> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match future.poll(&mut context) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}

/// A breaker of these settings, or a limiter if they are none.
fn settings_of(settings: &str) -> config::Policy {
    // A history has many of the same.
    static PARSED: Mutex<BTreeMap<String, config::Policy>> = Mutex::new(BTreeMap::new());
    if let Some(policy) = PARSED.lock().get(settings) {
        return policy.clone();
    }
    let policy = match settings {
        "" => "{token_bucket: {limit: 100, per: 1s}}".to_owned(),
        settings => format!("{{breaker: {{{settings}}}}}"),
    };
    let config = format!("namespaces: {{test: {{policies: {{one: {policy}}}}}}}");
    let config = Config::parse("test.yaml", &config).unwrap();
    let policies = config.namespaces.into_values().flat_map(|one| one.policies.into_values());
    let policy = policies.last().unwrap();
    PARSED.lock().insert(settings.to_owned(), policy.clone());
    policy
}

fn acquire(
    app: &App,
    asks: Asks<'_>,
) -> Result<Answer<Answered>, fusebox_server::app::AcquireError> {
    let ask =
        |&(policy, key, cost): &(_, _, _)| Ask { policy, key, cost, estimated: false, lease: 0 };
    let asks = asks.iter().map(|(policy, key, cost)| ask(&(*policy, *key, *cost)));
    let entry = Entry { asks, priority: Priority::Normal, retry: false };
    let acquire = Acquire { namespace: "test", client: None, entry };
    app.acquire(app.caller(Principal::Anonymous), acquire, |acquired| Answered {
        allowed: acquired.decided.decision.allowed,
        grant: acquired.grant.clone(),
        circuits: acquired.circuits.iter().cloned().collect(),
    })
}

fn report(id: &str) -> Report<'_> {
    let client = Some(Client { id, service: "", zone: "" });
    Report { namespace: "test", client, ..Report::default() }
}

fn went(outcome: Outcome) -> Told<'static> {
    Told { call: Call { outcome, latency: None, kind: "" }, ..Told::default() }
}
