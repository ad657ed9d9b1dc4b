//! The engines that the scripts are run against.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use fusebox_core::{Cell, Cells, Kind, Moment, Rule, Settled};
use fusebox_server::{
    catalogue::{Catalogue, CellId, Limiter, LimiterNumber},
    clock::ServerClock,
    config::Config,
    storage::{
        Answer, CellAsk, Charge, Charged, Decided, Embedded, Judge, Keeping, OpenGrant, OpenPart,
        Recovered, Settlement, Storage, Writer, journal::Sled,
    },
};
use fusebox_tests::{
    ManualClock, Simulated,
    panel::{recover, told},
};

/// What decides. Its server time begins at the first configuration.
pub trait Engine {
    /// These policies from now on. Where that takes a restart, the `open` grants go on.
    fn configure(&mut self, config: &Config, open: &[OpenGrant]);
    fn catalogue(&self) -> Arc<Catalogue>;
    fn clock(&self) -> &ManualClock;
    fn now(&self) -> Moment;
    fn apply(&mut self, charge: &Charge<'_>) -> Decided;
    fn settle(&mut self, settlement: &Settlement<'_>) -> Settled<Cell>;
    /// Changes a cell if it is there and `change` wants to; whether it did.
    fn change(&mut self, cell: CellId, judge: Judge<'_>, change: &mut Change<'_>) -> bool;
    /// Stops and starts again; the `open` grants go on.
    fn restart(&mut self, open: &[OpenGrant]);
    /// Is killed, and starts again.
    fn crash(&mut self);
    /// Cells that are not full, after housekeeping.
    fn cells(&mut self) -> usize;
}

pub type Change<'a> = dyn FnMut(Cell) -> Option<Cell> + 'a;

/// Policies that change while cells live. Their numbers and revisions are given by the server's own
/// recovery, on a disk that holds nothing else.
#[derive(Default)]
struct Policies {
    disk: Simulated,
    clock: Arc<ManualClock>,
    running: Option<(ServerClock, Arc<Catalogue>)>,
    /// Also those that no policy has any more, as cells of theirs may live.
    limiters: BTreeMap<LimiterNumber, Arc<Limiter>>,
}

impl Policies {
    fn change(&mut self, config: &Config) {
        let recovered = recover(self.disk.open(), config, &self.clock).expect("an empty disk");
        let Recovered { catalogue, writer, clock, .. } = recovered;
        writer.finish(&[]).expect("the disk writes");
        let policies: Vec<_> = catalogue.policies().cloned().collect();
        drop(catalogue);
        let mut policies: Vec<_> = policies.into_iter().filter_map(Arc::into_inner).collect();
        for policy in &mut policies {
            let overrides = &mut policy.overrides;
            let prefixes = overrides.prefixes.iter_mut().map(|(_, rules)| rules);
            let others = overrides.exact.values_mut().chain(prefixes);
            for limiter in others.chain([&mut policy.rules]).flat_map(|rules| &mut rules.limiters) {
                // No disk is under the cells.
                Arc::get_mut(limiter).expect("nobody else has it").keeping = Keeping::AtStop;
            }
            let own = policy.limiters().map(|limiter| (limiter.number, Arc::clone(limiter)));
            self.limiters.extend(own);
        }
        let catalogue = Catalogue::new(1, policies, self.limiters.values().cloned());
        let clock = self.running.take().map_or(clock, |(clock, _)| clock);
        self.running = Some((clock, Arc::new(catalogue)));
    }

    fn catalogue(&self) -> Arc<Catalogue> {
        Arc::clone(&self.running.as_ref().expect("a policy first").1)
    }

    fn now(&self) -> Moment {
        self.running.as_ref().expect("a policy first").0.now()
    }
}

/// The core alone, over a map.
#[derive(Default)]
pub struct Core {
    policies: Policies,
    cells: HashMap<CellId, (LimiterNumber, Cell)>,
}

impl Core {
    /// A cell in the terms of a limiter.
    fn find(&self, id: CellId, limiter: &Limiter) -> Option<Cell> {
        let (number, cell) = *self.cells.get(&id)?;
        if number == limiter.number {
            return Some(cell);
        }
        let catalogue = self.policies.catalogue();
        let other = catalogue.numbered(number).expect("a limiter that was known");
        Some(limiter.settings.adopted(cell, &other.settings, self.now()))
    }

    fn put(&mut self, id: CellId, limiter: &Limiter, cell: Option<Cell>) {
        if let Some(cell) = cell {
            self.cells.insert(id, (limiter.number, cell));
        }
    }
}

impl Engine for Core {
    fn configure(&mut self, config: &Config, _: &[OpenGrant]) {
        self.policies.change(config);
    }

    fn catalogue(&self) -> Arc<Catalogue> {
        self.policies.catalogue()
    }

    fn clock(&self) -> &ManualClock {
        &self.policies.clock
    }

    fn now(&self) -> Moment {
        self.policies.now()
    }

    fn apply(&mut self, charge: &Charge<'_>) -> Decided {
        let mut ids = Vec::new();
        let rules = charge.asks.iter().map(|ask| {
            let cell = ids.iter().position(|(known, _)| *known == ask.cell).unwrap_or_else(|| {
                ids.push((ask.cell, ask.limiter));
                ids.len() - 1
            });
            let policy = &ask.limiter.settings;
            let CellAsk { ask, shadow, quota, .. } = *ask;
            Rule { cell, policy, ask, shadow, quota, overflow: false, held: false }
        });
        let rules: Vec<_> = rules.collect();
        let before: Cells = ids.iter().map(|(id, limiter)| self.find(*id, limiter)).collect();
        let mut after = before.clone();
        let decision = fusebox_core::apply(&rules, charge.charging, &mut after, self.now());
        for ((id, limiter), (before, after)) in ids.into_iter().zip(before.into_iter().zip(after)) {
            if before != after {
                self.put(id, limiter, after);
            }
        }
        let charged = charge.asks.iter().zip(&decision.verdicts);
        let charged = charged.map(|(ask, verdict)| Charged {
            cell: ask.cell,
            slice: verdict.slice,
            is_new: false,
        });
        Decided { charged: charged.collect(), decision }
    }

    fn settle(&mut self, settlement: &Settlement<'_>) -> Settled<Cell> {
        let Settlement { cell: id, judge, revision, mut known } = *settlement;
        let number = self.cells.get(&id).map_or(judge.limiter.number, |(number, _)| *number);
        let limiter = judge.catalogue.numbered(number).expect("a limiter that was known");
        let mut cell = self.find(id, limiter);
        let charged = &judge.limiter.settings;
        let is_known =
            charged.is_like_since(revision) && charged.limit.is_like(&limiter.settings.limit);
        if !is_known {
            return Settled { state: cell, refunded: 0, owed: 0, dropped: 0 };
        }
        let same = number == judge.limiter.number && limiter.settings.revision == revision;
        known.slice = known.slice.filter(|_| same);
        let settled = fusebox_core::settle(&limiter.settings, &mut cell, known, self.now());
        self.put(id, limiter, cell);
        settled
    }

    fn change(&mut self, id: CellId, judge: Judge<'_>, change: &mut Change<'_>) -> bool {
        let changed = self.find(id, judge.limiter).and_then(change);
        self.put(id, judge.limiter, changed);
        changed.is_some()
    }

    fn restart(&mut self, open: &[OpenGrant]) {
        let (catalogue, now) = (self.catalogue(), self.now());
        for (id, (number, cell)) in &mut self.cells {
            let settings = &catalogue.numbered(*number).expect("its limiter").settings;
            let parts = open.iter().flat_map(|grant| &grant.parts);
            let out = parts.filter(|part| part.cell == *id).map(OpenPart::out).sum();
            let left = Cell { state: cell.state.with_out(out), ..*cell };
            let state = settings.limit.revive(settings.current(left), out, now);
            *cell = Cell { revision: settings.revision, state };
        }
    }

    fn crash(&mut self) {
        panic!("the core alone has no disk: say `without core memory`");
    }

    fn cells(&mut self) -> usize {
        let (catalogue, now) = (self.catalogue(), self.now());
        self.cells.retain(|_, (number, cell)| {
            let limiter = catalogue.numbered(*number).expect("its limiter");
            is_needed(limiter, *cell, now)
        });
        self.cells.len()
    }
}

/// The cells of the server, in memory.
pub struct Memory {
    policies: Policies,
    cells: Embedded,
}

impl Default for Memory {
    fn default() -> Self {
        Self { policies: Policies::default(), cells: Embedded::new(1_000).0 }
    }
}

impl Engine for Memory {
    fn configure(&mut self, config: &Config, _: &[OpenGrant]) {
        let before = self.policies.running.as_ref().map(|(_, catalogue)| Arc::clone(catalogue));
        self.policies.change(config);
        let after = self.catalogue();
        for old in before.iter().flat_map(|before| before.policies()) {
            let same = after.policies().find(|new| new.name == old.name);
            let Some(new) = same else { continue };
            for index in 0..old.budget.live() {
                new.budget.add(index < old.budget.overflow_cells());
            }
        }
    }

    fn catalogue(&self) -> Arc<Catalogue> {
        self.policies.catalogue()
    }

    fn clock(&self) -> &ManualClock {
        &self.policies.clock
    }

    fn now(&self) -> Moment {
        self.policies.now()
    }

    fn apply(&mut self, charge: &Charge<'_>) -> Decided {
        let mut decided = Decided::default();
        let answer = self.cells.apply(charge, None, self.now(), &mut decided);
        now(answer.expect("memory answers"));
        decided
    }

    fn settle(&mut self, settlement: &Settlement<'_>) -> Settled<Cell> {
        now(self.cells.settle(settlement, self.now()).expect("memory answers"))
    }

    fn change(&mut self, cell: CellId, judge: Judge<'_>, change: &mut Change<'_>) -> bool {
        now(self.cells.change(cell, judge, change, self.now()).expect("memory answers"))
    }

    fn restart(&mut self, _: &[OpenGrant]) {
        panic!("memory does not survive a restart: say `without memory`");
    }

    fn crash(&mut self) {
        panic!("memory does not survive a crash: say `without core memory`");
    }

    fn cells(&mut self) -> usize {
        tend(&self.cells, &self.catalogue(), self.now());
        self.cells.live()
    }
}

/// The server's storage on real sled: a change of policies is a restart with another configuration.
pub struct OnSled {
    directory: tempfile::TempDir,
    clock: Arc<ManualClock>,
    config: Config,
    running: Option<Running>,
    /// Cells that were charged, and by whom.
    charged: HashSet<(CellId, LimiterNumber)>,
}

struct Running {
    catalogue: Arc<Catalogue>,
    cells: Arc<Embedded>,
    writer: Writer,
    clock: ServerClock,
}

impl Default for OnSled {
    fn default() -> Self {
        Self {
            directory: tempfile::tempdir().expect("a directory"),
            clock: Arc::default(),
            config: Config::parse("spec.yaml", "{}").expect("a configuration"),
            running: None,
            charged: HashSet::new(),
        }
    }
}

impl OnSled {
    fn running(&self) -> &Running {
        self.running.as_ref().expect("a policy first")
    }

    fn told<T>(&mut self, answer: Answer<T>) -> T {
        told(answer, &mut self.running.as_mut().expect("a policy first").writer)
    }

    fn start(&mut self) {
        let directory = self.directory.path().to_owned();
        let journal = Box::new(move || {
            let mut opened = Sled::open(&directory, false);
            // Within one process sled keeps its lock for a moment after it was dropped.
            for _ in 0..1_000 {
                match &opened {
                    Err(error) if error.to_string().contains("acquire lock") => {}
                    _ => break,
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
                opened = Sled::open(&directory, false);
            }
            Ok(Box::new(opened?) as Box<_>)
        });
        let recovered = recover(journal, &self.config, &self.clock).expect("sled recovers");
        let Recovered { catalogue, cells, writer, clock, .. } = recovered;
        self.running = Some(Running { catalogue: Arc::new(catalogue), cells, writer, clock });
    }
}

impl Engine for OnSled {
    fn configure(&mut self, config: &Config, open: &[OpenGrant]) {
        self.config = config.clone();
        self.restart(open);
    }

    fn catalogue(&self) -> Arc<Catalogue> {
        Arc::clone(&self.running().catalogue)
    }

    fn clock(&self) -> &ManualClock {
        &self.clock
    }

    fn now(&self) -> Moment {
        self.running().clock.now()
    }

    fn apply(&mut self, charge: &Charge<'_>) -> Decided {
        let mut decided = Decided::default();
        let answer = self.running().cells.apply(charge, None, self.now(), &mut decided);
        self.told(answer.expect("the storage answers"));
        let charged = charge.asks.iter().zip(&decided.charged);
        self.charged.extend(charged.map(|(ask, charged)| (charged.cell, ask.limiter.number)));
        decided
    }

    fn settle(&mut self, settlement: &Settlement<'_>) -> Settled<Cell> {
        let answer = self.running().cells.settle(settlement, self.now());
        self.told(answer.expect("the storage answers"))
    }

    fn change(&mut self, cell: CellId, judge: Judge<'_>, change: &mut Change<'_>) -> bool {
        let answer = self.running().cells.change(cell, judge, change, self.now());
        self.told(answer.expect("the storage answers"))
    }

    fn restart(&mut self, open: &[OpenGrant]) {
        if let Some(running) = self.running.take() {
            running.writer.finish(open).expect("sled writes");
        }
        self.start();
    }

    fn crash(&mut self) {
        self.running = None;
        self.start();
    }

    /// Those that are not full: what is on disk lingers for a while after it is.
    fn cells(&mut self) -> usize {
        let (running, now) = (self.running(), self.now());
        tend(&running.cells, &running.catalogue, now);
        let needed = self.charged.iter().filter_map(|(id, number)| {
            let limiter = running.catalogue.numbered(*number)?;
            let judge = Judge { limiter, catalogue: &running.catalogue };
            let cell = running.cells.look(*id, judge, now)?;
            is_needed(limiter, cell, now).then_some(id)
        });
        let needed = needed.collect::<HashSet<_>>().len();
        assert!(running.cells.live() >= needed, "a cell that is not full has left");
        needed
    }
}

fn is_needed(limiter: &Limiter, cell: Cell, now: Moment) -> bool {
    limiter.settings.leaves_at(cell, now).is_none_or(|leaves_at| leaves_at > now.time)
}

fn tend(cells: &Embedded, catalogue: &Catalogue, now: Moment) {
    for _ in 0..cells.shards() {
        cells.tend(catalogue, now);
    }
}

fn now<T>(answer: Answer<T>) -> T {
    match answer {
        Answer::Now(answer) => answer,
        Answer::Later(..) => panic!("memory answers at once"),
    }
}
