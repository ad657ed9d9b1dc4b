//! All circuits of a client, and what the session has to do with them.

use std::{
    hash::BuildHasher,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fusebox_core::Time;
use fusebox_proto::v1;
use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
use parking_lot::{Mutex, RwLock};

use super::{
    Breaker, InvalidLocal, Local,
    circuit::{Changes, Circuit, OwnSettings},
    home::Home,
    shared::{Told, told_at},
};
use crate::{
    binding::Binding,
    context::Context,
    exchange::{duration, lasts_until},
    part::{Draft, Link, Part},
    settings::Kind,
    telemetry::Counts,
};

/// Circuits that the server is told of, at most: each is three kilobytes or four here, and some there.
const SHARED_MOST: usize = 10_000;

/// Circuits in all, at most; the rest of them have a local breaker alone.
const CIRCUITS_MOST: usize = 20_000;

/// How long a circuit stays that nobody holds and no call comes for: longer than nearly all stay open.
const IDLE: Duration = Duration::from_secs(5 * 60);

/// How often those are looked for.
const SWEEP: Duration = Duration::from_secs(10);

/// Circuits that are not in use and are told of, at most: of further ones it is known once they are reported on.
const OTHERS_MOST: usize = 10_000;

/// Parts of a policy's circuits, each with a lock of its own: calls for many keys look them up at the same time.
const SHARDS: usize = 16;

/// All breakers of a client.
pub(crate) struct Breakers {
    home: Arc<Home>,
    policies: Mutex<Vec<Arc<Policy>>>,
    /// All that are in use, in the order in which they were first used: what is done to each is done in that order.
    circuits: Mutex<Vec<Arc<Circuit>>>,
    shared: AtomicUsize,
    watch: Mutex<Watch>,
    /// What those counted that have left, and when they were looked for.
    former: Mutex<(Counts, Time)>,
    /// Who is told of in the report that is under way, and where they begin in it.
    reported: Mutex<(usize, Vec<Arc<Circuit>>)>,
}

/// The circuits of one policy.
pub(super) struct Policy {
    /// That of the empty key, which says whether it is a breaker, and how those are set that the server is not told of.
    binding: Arc<Binding>,
    breakers: Weak<Breakers>,
    home: Arc<Home>,
    own: Arc<OwnSettings>,
    hasher: DefaultHashBuilder,
    shards: [RwLock<HashTable<Arc<Circuit>>>; SHARDS],
}

/// What a Watch told.
#[derive(Default)]
struct Watch {
    /// The breakers that are wanted, and since when.
    wanted: Vec<Arc<str>>,
    wanted_at: Time,
    /// Those of which all is told.
    covered: Vec<Arc<str>>,
    /// The generation of circuits that nothing is told of, and when it was so.
    absent: Option<(u64, Time)>,
    /// Counts the snapshots.
    snapshot: u64,
    /// One is being told.
    is_in_snapshot: bool,
    /// Circuits that are told of and not in use, by policy and key.
    others: HashMap<(Box<str>, Box<str>), Told>,
    /// There were more of them.
    has_forgotten: bool,
}

impl Breakers {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self {
            home: Arc::new(Home::new(context)),
            policies: Mutex::default(),
            circuits: Mutex::default(),
            shared: AtomicUsize::new(0),
            watch: Mutex::default(),
            former: Mutex::default(),
            reported: Mutex::default(),
        }
    }

    pub(crate) fn of(self: &Arc<Self>, name: &str) -> Breaker {
        let policy = {
            let mut policies = self.policies.lock();
            let known = policies.iter().find(|policy| *policy.binding.policy == *name).cloned();
            known.unwrap_or_else(|| {
                let policy = Arc::new(Policy::new(name, self));
                policies.push(Arc::clone(&policy));
                policy
            })
        };
        let circuit = policy.circuit("");
        Breaker { policy, circuit }
    }

    /// The circuit of that name, if it is in use.
    fn find(&self, policy: &str, key: &str) -> Option<Arc<Circuit>> {
        let policies = self.policies.lock();
        policies.iter().find(|known| *known.binding.policy == *policy)?.find(key)
    }

    /// A circuit that was not in use.
    fn begin(&self, policy: &Policy, key: &str) -> Arc<Circuit> {
        // Nothing is told meanwhile.
        let watch = self.watch.lock();
        if let Some(circuit) = policy.find(key) {
            return circuit;
        }
        let now = self.home.now();
        let is_shared = self.shared.load(Ordering::Relaxed) < SHARED_MOST && !self.home.is_closed();
        let circuit = policy.new_circuit(key, is_shared, now);
        if is_shared {
            watch.introduce(&circuit, now);
        }
        let mut circuits = self.circuits.lock();
        if circuits.len() < CIRCUITS_MOST {
            self.shared.fetch_add(usize::from(is_shared), Ordering::Relaxed);
            circuits.push(Arc::clone(&circuit));
            policy.keep(&circuit);
        }
        circuit
    }

    /// Lets circuits go that nobody holds, and that no call came for.
    fn sweep(&self, now: Time) {
        {
            let mut former = self.former.lock();
            if now < former.1.after(SWEEP) {
                return;
            }
            former.1 = now;
        }
        let policies = self.policies.lock().clone();
        let mut gone = Counts::default();
        let mut left = 0;
        self.circuits.lock().retain(|circuit| {
            if !circuit.is_idle(IDLE, now) {
                return true;
            }
            let policy = policies.iter().find(|one| one.binding.policy == circuit.binding.policy);
            let goes = policy.is_none_or(|policy| policy.let_go(circuit));
            if goes {
                circuit.count(&mut gone);
                left += usize::from(circuit.is_shared());
            }
            !goes
        });
        self.shared.fetch_sub(left, Ordering::Relaxed);
        let counts = &mut self.former.lock().0;
        counts.memory += gone.memory;
        counts.local += gone.local;
        counts.rejected += gone.rejected;
    }

    fn all(&self) -> Vec<Arc<Circuit>> {
        self.circuits.lock().clone()
    }

    /// Keeps those of the active circuits that `stays` says so of, in their order.
    fn look_after(&self, mut stays: impl FnMut(&Arc<Circuit>) -> bool) {
        // Calls add further ones meanwhile.
        let mut active = std::mem::take(&mut *self.home.active.lock());
        active.retain(|circuit| stays(circuit));
        let mut begun = self.home.active.lock();
        active.append(&mut begun);
        *begun = active;
    }

    fn draft_outcomes(&self, draft: &mut Draft) {
        let mut outcomes = self.home.outcomes.lock();
        let room = draft.room_for_outcomes().min(outcomes.len());
        draft.outcomes.extend(outcomes.drain(..room));
    }

    fn draft_deltas(&self, draft: &mut Draft, now: Time) {
        let mut reported = (draft.deltas.len(), Vec::new());
        // Those that there was no room for come first the next time.
        let mut late = Vec::new();
        self.look_after(|circuit| {
            if draft.room_for_deltas() == 0 {
                late.push(Arc::clone(circuit));
                return false;
            }
            if let Some(delta) = circuit.delta(now) {
                draft.deltas.push(delta);
                reported.1.push(Arc::clone(circuit));
            }
            true
        });
        if !late.is_empty() {
            let mut active = self.home.active.lock();
            late.append(&mut active);
            *active = late;
        }
        *self.reported.lock() = reported;
    }
}

#[cfg(test)]
impl Breakers {
    pub(super) fn in_use(&self) -> usize {
        self.circuits.lock().len()
    }
}

impl Part for Breakers {
    fn tend(&self, now: Time) {
        self.look_after(|circuit| circuit.tend(now));
        self.sweep(now);
    }

    fn report(&self, draft: &mut Draft, now: Time) {
        self.draft_outcomes(draft);
        self.draft_deltas(draft, now);
    }

    fn reported(&self, response: &v1::ReportResponse, sent: Time) {
        let now = self.home.now();
        let (first, told_of) = std::mem::take(&mut *self.reported.lock());
        let results = response.delta_results.iter().skip(first);
        for (circuit, result) in told_of.iter().zip(results) {
            if *result == i32::from(v1::ReportResult::NotShared) {
                circuit.is_refused_room(now);
            }
        }
        for status in &response.circuits {
            let circuit = self.find(&status.policy, &status.key);
            if let (Some(circuit), Some(told)) = (circuit, Told::of(status, sent, now)) {
                let changes = circuit.is_told(told, None, now);
                circuit.tell(changes);
            }
        }
    }

    fn watches(&self) -> Vec<Arc<str>> {
        let policies = self.policies.lock();
        let used = policies.iter().filter(|policy| policy.is_breaker());
        let wanted: Vec<_> = used.map(|policy| Arc::clone(&policy.binding.policy)).collect();
        drop(policies);
        let mut watch = self.watch.lock();
        if watch.wanted != wanted {
            (watch.wanted, watch.wanted_at) = (wanted.clone(), self.home.now());
        }
        wanted
    }

    fn watched(&self, news: &v1::WatchResponse, sent: Time) {
        let now = self.home.now();
        let at = told_at(sent, news.elapsed, now);
        let until = lasts_until(at, duration(news.valid_for).unwrap_or_default());
        let mut changed = Vec::new();
        let mut watch = self.watch.lock();
        if news.snapshot {
            watch.begins();
        }
        for status in &news.circuits {
            let Some(told) = Told::of(status, at, now) else { continue };
            let told = told.watched(until, news.generation);
            match self.find(&status.policy, &status.key) {
                Some(circuit) => {
                    let changes = circuit.is_told(told, Some(watch.snapshot), now);
                    changed.push((circuit, changes));
                }
                None => watch.note(status, told),
            }
        }
        if news.complete {
            let all = self.all();
            changed.extend(watch.completes(&all, news.generation, (sent, at, now)));
            self.home.is_watched_until(until);
        }
        drop(watch);
        for (circuit, changes) in changed {
            circuit.tell(changes);
        }
    }

    fn linked(&self, link: Link, now: Time) {
        let is_replaced = match link {
            Link::Down | Link::Resumed => return,
            Link::Restarted => false,
            Link::Replaced => true,
        };
        let mut watch = self.watch.lock();
        self.home.is_watched_until(Time::ZERO);
        self.home.outcomes.lock().clear();
        watch.ends();
        for circuit in self.all() {
            circuit.is_stale(is_replaced, now);
        }
    }

    fn count(&self, counts: &mut Counts) {
        let former = self.former.lock().0;
        counts.memory += former.memory;
        counts.local += former.local;
        counts.rejected += former.rejected;
        for circuit in self.all() {
            circuit.count(counts);
        }
    }

    fn close(&self, draft: &mut Draft, now: Time) {
        self.home.is_closed.store(true, Ordering::Release);
        let given_back = self.all().into_iter().filter_map(|circuit| circuit.close());
        self.home.outcomes.lock().extend(given_back);
        self.draft_outcomes(draft);
        self.draft_deltas(draft, now);
        self.home.active.lock().clear();
    }
}

impl Drop for Breakers {
    fn drop(&mut self) {
        // Circuits that handles are held of go on alone.
        self.home.is_closed.store(true, Ordering::Release);
        self.home.active.lock().clear();
    }
}

impl Policy {
    fn new(name: &str, breakers: &Arc<Breakers>) -> Self {
        Self {
            binding: breakers.home.context.exchange.bind(name, ""),
            breakers: Arc::downgrade(breakers),
            home: Arc::clone(&breakers.home),
            own: Arc::default(),
            hasher: DefaultHashBuilder::default(),
            shards: Default::default(),
        }
    }

    /// The circuit of a key.
    pub(super) fn circuit(&self, key: &str) -> Arc<Circuit> {
        self.find(key).unwrap_or_else(|| self.begin(key))
    }

    fn find(&self, key: &str) -> Option<Arc<Circuit>> {
        let (shard, hash) = self.shard(key);
        shard.read().find(hash, |circuit| *circuit.binding.key == *key).cloned()
    }

    fn keep(&self, circuit: &Arc<Circuit>) {
        let (shard, hash) = self.shard(&circuit.binding.key);
        let hasher = |one: &Arc<Circuit>| self.hasher.hash_one(&*one.binding.key);
        shard.write().insert_unique(hash, Arc::clone(circuit), hasher);
    }

    fn begin(&self, key: &str) -> Arc<Circuit> {
        match self.breakers.upgrade() {
            Some(breakers) => breakers.begin(self, key),
            // The client is gone: nobody is to be told of it.
            None => self.new_circuit(key, false, self.home.now()),
        }
    }

    fn new_circuit(&self, key: &str, is_shared: bool, now: Time) -> Arc<Circuit> {
        let own = Arc::clone(&self.own);
        Arc::new(if is_shared {
            let binding = self.home.context.exchange.bind(&self.binding.policy, key);
            Circuit::shared(&self.home, binding, own, now)
        } else {
            Circuit::unshared(&self.home, key, &self.binding, own, now)
        })
    }

    /// The user's own settings of the local breakers.
    pub(super) fn is_set(&self, local: Local) -> Result<(), InvalidLocal> {
        self.own.store(Some(Arc::new(local.build()?)));
        for shard in &self.shards {
            let circuits: Vec<_> = shard.read().iter().cloned().collect();
            circuits.iter().for_each(Circuit::is_set);
        }
        Ok(())
    }

    /// Forgets a circuit, unless somebody holds it; whether it did.
    fn let_go(&self, circuit: &Arc<Circuit>) -> bool {
        let (shard, hash) = self.shard(&circuit.binding.key);
        let mut shard = shard.write();
        // Here, and in the list of all.
        if Arc::strong_count(circuit) > 2 {
            return false;
        }
        if let Ok(place) = shard.find_entry(hash, |one| Arc::ptr_eq(one, circuit)) {
            place.remove();
        }
        true
    }

    /// Whether the server says that it is a breaker.
    fn is_breaker(&self) -> bool {
        let settings = self.binding.settings();
        settings.is_some_and(|settings| matches!(settings.kind, Kind::Breaker(_)))
    }

    /// Where the circuit of a key is.
    fn shard(&self, key: &str) -> (&RwLock<HashTable<Arc<Circuit>>>, u64) {
        let hash = self.hasher.hash_one(key);
        // Neither the lowest bits nor the seven highest, by which a table finds its places.
        #[allow(clippy::cast_possible_truncation)] // below the number of shards
        let place = (hash >> 48) as usize % SHARDS;
        (&self.shards[place], hash)
    }
}

impl Watch {
    /// Another snapshot begins.
    fn begins(&mut self) {
        self.snapshot += 1;
        self.is_in_snapshot = true;
        self.others.clear();
        self.has_forgotten = false;
    }

    /// The server started again: what it told is of no use to go on from.
    fn ends(&mut self) {
        self.begins();
        self.is_in_snapshot = false;
        self.covered.clear();
        self.absent = None;
    }

    /// A circuit is told of that is not in use.
    fn note(&mut self, status: &v1::CircuitStatus, told: Told) {
        let name = (Box::from(&*status.policy), Box::from(&*status.key));
        if told.absent {
            self.others.remove(&name);
        } else if self.others.len() < OTHERS_MOST || self.others.contains_key(&name) {
            self.others.insert(name, told);
        } else {
            self.has_forgotten = true;
        }
    }

    /// All is told for now.
    fn completes(
        &mut self,
        all: &[Arc<Circuit>],
        generation: u64,
        (sent, at, now): (Time, Time, Time),
    ) -> Vec<(Arc<Circuit>, Changes)> {
        let mut changed = Vec::new();
        let before = self.absent.replace((generation, at));
        if std::mem::take(&mut self.is_in_snapshot) {
            if sent >= self.wanted_at {
                self.covered.clone_from(&self.wanted);
            }
            let covered = all.iter().filter(|circuit| self.covers(circuit) && circuit.is_shared());
            for circuit in covered {
                let changes = circuit.is_in_snapshot(self.snapshot, generation, at, now);
                changed.push((Arc::clone(circuit), changes));
            }
        } else if before.is_none_or(|(before, _)| before != generation) {
            all.iter().for_each(|circuit| circuit.grows(generation, at));
        }
        changed
    }

    fn covers(&self, circuit: &Circuit) -> bool {
        self.covered.contains(&circuit.binding.policy)
    }

    /// Tells a circuit that comes in use what is known of it.
    fn introduce(&self, circuit: &Circuit, now: Time) {
        let Some((generation, at)) = self.absent.filter(|_| self.covers(circuit)) else { return };
        let name = (Box::from(&*circuit.binding.policy), Box::from(&*circuit.binding.key));
        if let Some(told) = self.others.get(&name) {
            circuit.is_told(told.clone(), Some(self.snapshot), now);
            circuit.is_in_snapshot(self.snapshot, generation, at, now);
        } else if !self.has_forgotten {
            circuit.is_in_snapshot(self.snapshot, generation, at, now);
        }
    }
}
