//! The engines that the scripts are run against.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Write,
    sync::Arc,
    time::Duration,
};

use fusebox_core::{
    Cell, Cells, Charging, Cost, Decision, Kind, Limit, Policy, Rule, Settled, Time, TokenBucket,
};
use fusebox_server::{
    catalogue::{self, Catalogue, CellHasher, PolicyNumber},
    config::Config,
    storage::{Answer, Charge, Embedded, Keeping, Recovered, Settlement, Storage, journal::Sled},
};
use fusebox_tests::{
    ManualClock,
    panel::{recover, told},
};

/// Policies by name: the bucket and the most debt.
pub type Policies = BTreeMap<String, (TokenBucket, u64)>;

/// What is charged.
#[derive(Clone, Copy)]
pub struct Named<'a> {
    pub policy: &'a str,
    pub key: &'a str,
}

/// Something that decides. Its time starts at zero.
pub trait Engine {
    /// The policies from now on.
    fn policies(&mut self, policies: &Policies);
    fn acquire(&mut self, asks: &[(Named<'_>, Cost)], charging: Charging) -> Decision;
    /// Refunded, owed and dropped.
    fn settle(&mut self, named: &Named<'_>, charged: u64, actual: u64) -> (u64, u64, u64);
    fn advance(&mut self, by: Duration);
    fn restart(&mut self);
    fn cells(&mut self) -> usize;
}

/// The core alone, over a map.
#[derive(Default)]
pub struct Core {
    policies: BTreeMap<String, Policy>,
    cells: HashMap<(String, String), Cell>,
    now: Time,
}

impl Engine for Core {
    fn policies(&mut self, policies: &Policies) {
        revise(&mut self.policies, policies, self.now);
    }

    fn acquire(&mut self, asks: &[(Named<'_>, Cost)], charging: Charging) -> Decision {
        let mut names = Vec::new();
        let rules = asks.iter().map(|(named, cost)| {
            let name = (named.policy.to_owned(), named.key.to_owned());
            let cell = names.iter().position(|known| *known == name).unwrap_or_else(|| {
                names.push(name);
                names.len() - 1
            });
            Rule { cell, policy: &self.policies[named.policy], cost: *cost }
        });
        let rules: Vec<_> = rules.collect();
        let mut cells: Cells = names.iter().map(|name| self.cells.get(name).copied()).collect();
        let decision = fusebox_core::apply(&rules, charging, &mut cells, self.now);
        for (name, cell) in names.into_iter().zip(cells) {
            if let Some(cell) = cell {
                self.cells.insert(name, cell);
            }
        }
        decision
    }

    fn settle(&mut self, named: &Named<'_>, charged: u64, actual: u64) -> (u64, u64, u64) {
        let name = (named.policy.to_owned(), named.key.to_owned());
        let mut cell = self.cells.get(&name).copied();
        let policy = &self.policies[named.policy];
        let settled = fusebox_core::settle(policy, &mut cell, charged, actual, self.now);
        if let Some(cell) = cell {
            self.cells.insert(name, cell);
        }
        (settled.refunded, settled.owed, settled.dropped)
    }

    fn advance(&mut self, by: Duration) {
        self.now = self.now.after(by);
    }

    fn restart(&mut self) {
        for ((policy, _), cell) in &mut self.cells {
            let policy = &self.policies[policy];
            let state = policy.limit.revive(policy.current(*cell), self.now);
            *cell = Cell { revision: policy.revision, state };
        }
    }

    fn cells(&mut self) -> usize {
        let (policies, now) = (&self.policies, self.now);
        self.cells.retain(|(policy, _), cell| {
            policies[policy].leaves_at(*cell).is_none_or(|leaves_at| leaves_at > now)
        });
        self.cells.len()
    }
}

/// The cells of the server, in memory.
pub struct Memory {
    policies: BTreeMap<String, Policy>,
    cells: Embedded,
    now: Time,
}

impl Default for Memory {
    fn default() -> Self {
        Self { policies: BTreeMap::new(), cells: Embedded::new(1_000).0, now: Time::ZERO }
    }
}

impl Memory {
    /// The policies as the server has them, numbered by name.
    fn catalogue(&self) -> Catalogue {
        let policies = (0..).zip(&self.policies).map(|(number, (name, settings))| {
            let policy = catalogue::Policy {
                namespace: "spec".into(),
                name: name.as_str().into(),
                number: PolicyNumber(number),
                settings: settings.clone(),
                keeping: Keeping::AtStop,
                cells: CellHasher::new(&[0; 16], "spec", name),
                decisions: Arc::default(),
            };
            (policy, true)
        });
        Catalogue::new(1, policies)
    }
}

impl Engine for Memory {
    fn policies(&mut self, policies: &Policies) {
        revise(&mut self.policies, policies, self.now);
    }

    fn acquire(&mut self, asks: &[(Named<'_>, Cost)], charging: Charging) -> Decision {
        now(acquire(&self.cells, &self.catalogue(), asks, charging, self.now))
    }

    fn settle(&mut self, named: &Named<'_>, charged: u64, actual: u64) -> (u64, u64, u64) {
        let settled = now(settle(&self.cells, &self.catalogue(), named, charged, actual, self.now));
        (settled.refunded, settled.owed, settled.dropped)
    }

    fn advance(&mut self, by: Duration) {
        self.now = self.now.after(by);
    }

    fn restart(&mut self) {
        panic!("memory does not survive a restart: such scripts are in specs/restart");
    }

    fn cells(&mut self) -> usize {
        tend(&self.cells, &self.catalogue(), self.now)
    }
}

/// The server's storage on real sled: a change of policies is a restart with another configuration.
pub struct OnSled {
    directory: tempfile::TempDir,
    clock: Arc<ManualClock>,
    configuration: String,
    running: Option<Recovered>,
    /// Policies and keys that were asked for.
    asked: BTreeSet<(String, String)>,
}

impl Default for OnSled {
    fn default() -> Self {
        Self {
            directory: tempfile::tempdir().expect("a directory"),
            clock: Arc::default(),
            configuration: String::new(),
            running: None,
            asked: BTreeSet::new(),
        }
    }
}

impl OnSled {
    fn running(&mut self) -> &mut Recovered {
        self.running.as_mut().expect("a policy first")
    }
}

impl Engine for OnSled {
    fn policies(&mut self, policies: &Policies) {
        self.configuration = "namespaces: {spec: {policies: {\n".into();
        for (name, (bucket, max_debt)) in policies {
            let (limit, per, burst) = (bucket.limit(), bucket.per().as_nanos(), bucket.burst());
            writeln!(
                self.configuration,
                "{name}: {{token_bucket: {{limit: {limit}, per: {per}ns, burst: {burst}}}, \
                 max_debt: {max_debt}}},"
            )
            .unwrap();
        }
        self.configuration += "}}}";
        self.restart();
    }

    fn acquire(&mut self, asks: &[(Named<'_>, Cost)], charging: Charging) -> Decision {
        let names = asks.iter().map(|(named, _)| (named.policy.to_owned(), named.key.to_owned()));
        self.asked.extend(names);
        let running = self.running();
        let now = running.clock.now();
        let answer = acquire(&*running.cells, &running.catalogue, asks, charging, now);
        told(answer, &mut running.writer)
    }

    fn settle(&mut self, named: &Named<'_>, charged: u64, actual: u64) -> (u64, u64, u64) {
        let running = self.running();
        let now = running.clock.now();
        let answer = settle(&*running.cells, &running.catalogue, named, charged, actual, now);
        let settled = told(answer, &mut running.writer);
        (settled.refunded, settled.owed, settled.dropped)
    }

    fn advance(&mut self, by: Duration) {
        self.clock.advance(by);
    }

    fn restart(&mut self) {
        if let Some(running) = self.running.take() {
            running.writer.finish(&[]).expect("sled writes");
        }
        let config = Config::parse("spec.yaml", &self.configuration).expect("a configuration");
        let directory = self.directory.path().to_owned();
        let journal = Box::new(move || Ok(Box::new(Sled::open(&directory, false)?) as Box<_>));
        let recovered = recover(journal, &config, &self.clock);
        self.running = Some(recovered.expect("sled recovers"));
    }

    /// Those that are not full: what is on disk lingers for a while after it is.
    fn cells(&mut self) -> usize {
        let running = self.running();
        let live = tend(&running.cells, &running.catalogue, running.clock.now());
        let asked = self.asked.clone();
        let peek = Cost { tokens: 0, estimated: false };
        let is_full = |(policy, key): &&(String, String)| {
            let decision = self.acquire(&[(Named { policy, key }, peek)], Charging::AllOrNothing);
            decision.verdicts[0].reset_after.is_zero()
        };
        let full = asked.iter().filter(is_full).count();
        assert!(live >= asked.len() - full, "a cell that is not full has left");
        asked.len() - full
    }
}

fn revise(revised: &mut BTreeMap<String, Policy>, policies: &Policies, now: Time) {
    for (name, (bucket, max_debt)) in policies {
        let limit = Limit::TokenBucket(*bucket);
        let policy = revised.entry(name.clone()).or_insert_with(|| Policy::new(limit, *max_debt));
        if policy.limit != limit {
            *policy = policy.changed(limit, now);
        }
        policy.max_debt = *max_debt;
    }
}

fn acquire(
    storage: &dyn Storage,
    catalogue: &Catalogue,
    asks: &[(Named<'_>, Cost)],
    charging: Charging,
    now: Time,
) -> Answer<Decision> {
    let namespace = catalogue.namespace("spec").expect("a policy first");
    let asks = asks.iter().map(|(named, cost)| {
        namespace.policy(named.policy).expect("a known policy").ask(named.key, *cost)
    });
    let charge = Charge { charging, asks: &asks.collect::<Vec<_>>() };
    let mut decision = Decision::default();
    let answer = storage.apply(&charge, None, now, &mut decision).expect("the storage answers");
    answer.map(|()| decision)
}

fn settle(
    storage: &dyn Storage,
    catalogue: &Catalogue,
    named: &Named<'_>,
    charged: u64,
    actual: u64,
    now: Time,
) -> Answer<Settled<Cell>> {
    let policy = catalogue.namespace("spec").and_then(|spec| spec.policy(named.policy));
    let policy = policy.expect("a known policy");
    let cell = policy.cells.cell(named.key);
    let settlement = Settlement {
        cell,
        number: policy.number,
        policy: &policy.settings,
        keeping: policy.keeping,
        charged,
        actual,
    };
    storage.settle(&settlement, now).expect("the storage answers")
}

fn tend(cells: &Embedded, catalogue: &Catalogue, now: Time) -> usize {
    for _ in 0..cells.shards() {
        cells.tend(catalogue, now);
    }
    cells.live()
}

fn now<T>(answer: Answer<T>) -> T {
    match answer {
        Answer::Now(answer) => answer,
        Answer::Later(..) => panic!("memory answers at once"),
    }
}
