//! Circuits in memory, in shards, each written down before anybody is told of a change.
//!
//! A circuit that nobody has asked for is not there: it is closed, in the generation that all absent ones share.
//! One that leaves takes that generation to a new one, so that no report of its earlier life counts in its next.

mod board;
mod tally;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, hash_map},
    hash::{BuildHasherDefault, Hasher},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::SyncSender,
    },
};

use arrayvec::ArrayVec;
use crossbeam_utils::CachePadded;
use fusebox_core::{
    Time,
    circuit::{Admitted, Breaker, Circuit, Generation, Kept, Passage, Phase, Turn, View},
};
use parking_lot::{Mutex, MutexGuard};
use prost::Message;
use tokio::sync::oneshot;

pub use self::{
    board::{Board, Boards, Changes},
    tally::Tally,
};
use super::{
    Answer, Durable, StorageError,
    journal::{Keyspace, Write},
    record::CircuitRecord,
};
use crate::{
    catalogue::{Catalogue, CellId, PolicyName},
    limits,
};

/// All circuits of a server.
pub struct Circuits {
    shards: Box<[CachePadded<Mutex<Shard>>]>,
    /// The latest generation that any circuit began.
    latest: AtomicU64,
    /// The generation of those that are not there.
    absent: AtomicU64,
    live: AtomicUsize,
    /// How many of each breaker there are, and what became of them; also of those that had some.
    by_breaker: Mutex<HashMap<PolicyName, Arc<Tally>>>,
    /// What jitter is drawn from.
    seed: u64,
    boards: Boards,
    /// Wakes the writer; one waiting word is enough.
    wake: SyncSender<()>,
    /// The shard that housekeeping is at.
    tended: AtomicUsize,
    /// Why nothing is decided any more.
    over: OnceLock<StorageError>,
}

#[derive(Default)]
struct Shard {
    /// Each by itself: a table of what is as large as they are would be half empty, and stand still while it grows.
    circuits: HashMap<CellId, Box<Entry>, BuildHasherDefault<Hashed>>,
    /// Circuits whose record waits for the writer, to be written or to go.
    queued: Vec<CellId>,
    /// Who waits for what is queued.
    waiting: Vec<oneshot::Sender<Result<(), StorageError>>>,
    /// The revision of the policies by which housekeeping last looked at all of them.
    looked_at: u64,
}

/// An id of a circuit as its own hash: it is one, under a key that nobody outside has.
#[derive(Default)]
pub struct Hashed(u64);

impl Hasher for Hashed {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(last) = bytes.last_chunk() {
            self.0 = u64::from_ne_bytes(*last);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// The names of a circuit.
#[derive(Debug, PartialEq, Eq)]
pub struct CircuitName {
    /// Its breaker.
    pub breaker: PolicyName,
    /// Which of it.
    pub key: Box<str>,
    /// What names it in memory.
    pub cell: CellId,
}

/// A circuit that is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The namespace of its breaker.
    pub namespace: &'a Arc<str>,
    /// The breaker.
    pub policy: &'a Arc<str>,
    /// Which of it.
    pub key: &'a str,
    /// What names it in memory.
    pub cell: CellId,
    /// Its settings.
    pub breaker: &'a Breaker,
    /// Most circuits of the breaker.
    pub most: usize,
}

impl Place<'_> {
    fn breaker_name(&self) -> PolicyName {
        let Self { namespace, policy, .. } = *self;
        PolicyName { namespace: Arc::clone(namespace), policy: Arc::clone(policy) }
    }
}

/// A circuit, and what is on disk of it.
struct Entry {
    name: Arc<CircuitName>,
    tally: Arc<Tally>,
    circuit: Circuit,
    /// When somebody last asked for it, or told of it.
    used_at: Time,
    /// Its record waits for the writer.
    queued: bool,
    /// Its record is being written.
    in_flight: bool,
    /// It leaves, once its record is gone, if nobody uses it before that.
    leaves: bool,
    /// What is told of it.
    told: View,
    /// What will be, once it is written.
    next: View,
}

impl Entry {
    fn is_written(&self) -> bool {
        !self.queued && !self.in_flight
    }

    /// Whether something happens to it by time, or has, and is yet to be told.
    fn is_timed(&self) -> bool {
        self.circuit.is_timed() || self.told.ramp.is_some()
    }

    /// Has the writer look at it.
    fn queue(&mut self, queued: &mut Vec<CellId>) {
        if !std::mem::replace(&mut self.queued, true) {
            queued.push(self.name.cell);
        }
    }

    /// Whether nobody will miss it, who has not used it for long.
    fn is_over(&self, now: Time) -> bool {
        let last = self.circuit.history().last().map(|transition| transition.at);
        let is_remembered = last.is_some_and(|at| at.after(limits::CIRCUIT_REMEMBERED) > now);
        !is_remembered && self.is_written() && self.circuit.is_idle(now)
    }

    /// Whether it differs from one that is not there, for a start to find.
    fn has_record(&self) -> bool {
        self.circuit.history().len() > 0
    }
}

/// What the writer takes along: circuits whose records it writes, or deletes.
#[derive(Default)]
pub(super) struct Taken(Vec<CellId>);

impl Circuits {
    /// No circuits yet, in the start of that number; `wake` wakes the writer, and what is drawn follows from
    /// `seed`.
    pub(super) fn new(boot: u64, wake: SyncSender<()>, seed: u64) -> Self {
        // Above each of every earlier start.
        let first = boot << 32;
        Self {
            shards: (0..limits::CIRCUIT_SHARDS).map(|_| CachePadded::default()).collect(),
            latest: AtomicU64::new(first),
            absent: AtomicU64::new(first),
            live: AtomicUsize::new(0),
            by_breaker: Mutex::default(),
            seed,
            boards: Boards::new(first | seed >> 32),
            wake,
            tended: AtomicUsize::new(0),
            over: OnceLock::new(),
        }
    }

    /// Circuits that are there.
    pub fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// What is told of a namespace's circuits as they change.
    pub const fn boards(&self) -> &Boards {
        &self.boards
    }

    /// The generation of circuits that are not there: they are closed.
    pub fn absent(&self) -> Generation {
        Generation(self.absent.load(Ordering::Acquire))
    }

    /// Locks the shards of some circuits.
    ///
    /// # Errors
    /// If nothing is decided any more.
    pub fn lock(&self, cells: &[CellId]) -> Result<Locked<'_>, StorageError> {
        let mut indices: ArrayVec<usize, { limits::CIRCUIT_ASKS }> =
            cells.iter().map(|cell| shard_of(*cell)).collect();
        indices.sort_unstable();
        let mut shards = ArrayVec::<_, { limits::CIRCUIT_ASKS }>::new();
        for index in indices {
            if shards.last().is_none_or(|(last, _)| *last != index) {
                shards.push((index, self.shards[index].lock()));
            }
        }
        // Under the locks: whoever says that it is over looks at them after that.
        self.check_alive()?;
        Ok(Locked { circuits: self, shards, unwritten: None })
    }

    /// One circuit, which comes to be there if there is room; `None` if there is none. `change` may do with it
    /// what it likes, and tells whether it did more than begin a generation.
    ///
    /// # Errors
    /// If nothing is decided any more.
    pub fn change_named<T>(
        &self,
        place: &Place<'_>,
        now: Time,
        change: impl FnOnce(&Arc<CircuitName>, &mut Circuit, Turn<'_>) -> (T, bool),
    ) -> Result<Option<Answer<T>>, StorageError> {
        let mut locked = self.lock(&[place.cell])?;
        let Some(value) = locked.change_named(place, now, change) else { return Ok(None) };
        Ok(Some(Answer::new(value, locked.durable())))
    }

    /// The same of a circuit that is there; `None` if it is not.
    ///
    /// # Errors
    /// If nothing is decided any more.
    pub fn change_present<T>(
        &self,
        place: &Place<'_>,
        now: Time,
        change: impl FnOnce(&mut Circuit, Turn<'_>) -> (T, bool),
    ) -> Result<Option<Answer<T>>, StorageError> {
        let mut locked = self.lock(&[place.cell])?;
        if !locked.has(place) {
            return Ok(None);
        }
        let value = locked.change_named(place, now, |_, circuit, turn| change(circuit, turn));
        Ok(value.map(|value| Answer::new(value, locked.durable())))
    }

    /// Looks at one circuit as it is told of: its names, what it is, and all about it; `None` if it is not there.
    pub fn look<T>(
        &self,
        cell: CellId,
        look: impl FnOnce(&Arc<CircuitName>, &View, &Circuit) -> T,
    ) -> Option<T> {
        let shard = self.shards[shard_of(cell)].lock();
        let entry = shard.circuits.get(&cell)?;
        Some(look(&entry.name, &entry.told, &entry.circuit))
    }

    /// The generation that a circuit is told of in, where somebody says this one. One without a transition is as if it
    /// were not there, so whoever watches is not told of it, and says what generation those are in: any that they
    /// were in since it came is its own.
    pub fn meant(&self, circuit: &Circuit, said: Generation) -> Generation {
        let own = circuit.generation();
        let is_own = circuit.history().len() == 0 && (own..=self.absent()).contains(&said);
        if is_own { own } else { said }
    }

    /// What who watches is told of a circuit; `None` of one that is as if it were not there.
    pub fn told(&self, cell: CellId) -> Option<View> {
        let shard = self.shards[shard_of(cell)].lock();
        let entry = shard.circuits.get(&cell)?;
        entry.has_record().then(|| entry.told.clone())
    }

    /// The circuits of a namespace that who watches is told of, of one part of all:
    /// there are [`CIRCUIT_SHARDS`](limits::CIRCUIT_SHARDS) parts.
    pub fn told_in(&self, part: usize, namespace: &str) -> Vec<Arc<CircuitName>> {
        let shard = self.shards[part].lock();
        let of_it = |entry: &Entry| *entry.name.breaker.namespace == *namespace;
        let told = shard.circuits.values().filter(|entry| of_it(entry) && entry.has_record());
        told.map(|entry| Arc::clone(&entry.name)).collect()
    }

    /// Visits every circuit of a namespace as it is told of. Each shard is locked while it is visited.
    pub fn visit(
        &self,
        namespace: &str,
        mut visit: impl FnMut(&Arc<CircuitName>, &View, &Circuit),
    ) {
        for shard in &self.shards {
            let shard = shard.lock();
            let of_it = |entry: &Entry| *entry.name.breaker.namespace == *namespace;
            for entry in shard.circuits.values().filter(|entry| of_it(entry)) {
                visit(&entry.name, &entry.told, &entry.circuit);
            }
        }
    }

    /// The turn of a circuit of that breaker.
    pub fn turn<T>(
        &self,
        (cell, breaker): (CellId, &Breaker),
        now: Time,
        take: impl FnOnce(Turn<'_>) -> T,
    ) -> T {
        let generations = || self.next_generation();
        take(Turn { breaker, now, draw: self.draw(cell, now), generations: &generations })
    }

    /// One bounded round of housekeeping: what was due happens, and circuits leave that nobody has used for long,
    /// or whose breaker is gone.
    pub fn tend(&self, catalogue: &Catalogue, now: Time) {
        let at = self.tended.fetch_add(1, Ordering::Relaxed) % limits::CIRCUIT_SHARDS;
        let mut shard = self.shards[at].lock();
        if self.check_alive().is_err() {
            return;
        }
        let breaker_of = |entry: &Entry| {
            let breakers = catalogue.policy(&entry.name.breaker)?.breakers.as_ref()?;
            Some(Arc::clone(breakers.of(&entry.name.key)))
        };
        let mut left = Vec::new();
        let Shard { circuits, queued, looked_at, .. } = &mut *shard;
        let is_known = std::mem::replace(looked_at, catalogue.revision) == catalogue.revision;
        for (cell, entry) in &mut *circuits {
            // Nearly all: this is all that is done under the lock.
            let unused = entry.used_at.after(limits::CIRCUIT_LINGERS) <= now;
            if entry.leaves || is_known && !unused && !entry.is_timed() {
                continue;
            }
            let Some(breaker) = breaker_of(entry) else {
                left.push(*cell);
                continue;
            };
            if entry.is_timed() {
                self.settle(entry, &breaker, now, queued, |circuit, turn| {
                    circuit.touch(turn);
                    false
                });
            }
            if unused && entry.is_over(now) {
                left.push(*cell);
            }
        }
        for cell in left {
            match circuits.entry(cell) {
                // A start that found its record would know it again, and nobody is to be told that it is gone before.
                hash_map::Entry::Occupied(mut entry) if entry.get().has_record() => {
                    entry.get_mut().leaves = true;
                    entry.get_mut().queue(queued);
                }
                hash_map::Entry::Occupied(entry) => self.forget(&entry.remove()),
                hash_map::Entry::Vacant(_) => {}
            }
        }
        if !queued.is_empty() {
            let _ = self.wake.try_send(());
        }
    }

    /// A circuit has left.
    fn forget(&self, entry: &Entry) {
        self.live.fetch_sub(1, Ordering::Relaxed);
        entry.tally.leave(entry.told.phase);
        if entry.has_record() {
            // Nothing that was told of it counts for the one that may come in its place.
            let generation = self.next_generation();
            self.absent.fetch_max(generation.0, Ordering::AcqRel);
        }
    }

    /// Lets something happen to a circuit, and sees to it that what changed is written, then told. `change` tells
    /// whether it did more than begin a generation.
    fn settle(
        &self,
        entry: &mut Entry,
        breaker: &Breaker,
        now: Time,
        queued: &mut Vec<CellId>,
        change: impl FnOnce(&mut Circuit, Turn<'_>) -> bool,
    ) {
        self.turn((entry.name.cell, breaker), now, |turn| {
            let before = entry.circuit.generation();
            let changed = change(&mut entry.circuit, turn);
            if changed || entry.circuit.generation() != before {
                let latest = entry.circuit.history().rev();
                let latest = latest.take_while(|transition| transition.generation > before);
                latest.for_each(|transition| entry.tally.count(transition.phase));
                entry.next = entry.circuit.view(turn);
                entry.queue(queued);
            } else if entry.told.ramp.is_some() && entry.is_written() {
                // A ramp goes up by itself: that is not written, only told.
                let view = entry.circuit.view(turn);
                if view.ramp != entry.told.ramp {
                    (entry.told, entry.next) = (view.clone(), view);
                    self.boards.tell(&entry.name);
                }
            }
        });
    }

    fn next_generation(&self) -> Generation {
        Generation(self.latest.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// Thirty-two bits that are like drawn ones, of a circuit at a moment: nothing depends on nobody guessing them.
    /// (The finalizer of `SplitMix64`, Steele, Lea and Flood 2014.)
    const fn draw(&self, cell: CellId, now: Time) -> u32 {
        let mixed = self.seed ^ cell.0[1] ^ now.as_nanos();
        let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        #[allow(clippy::cast_possible_truncation)] // the high half
        let draw = (mixed >> 32) as u32;
        draw
    }

    /// Room for one more circuit of a breaker, which takes it.
    fn make_room(&self, place: &Place<'_>) -> Option<Arc<Tally>> {
        let mut by_breaker = self.by_breaker.lock();
        let tally = by_breaker.entry(place.breaker_name()).or_default();
        if tally.live() >= place.most || self.live() >= limits::CIRCUITS {
            return None;
        }
        // Under the lock of all of them, so that two do not take the same room.
        tally.come(Phase::Closed);
        self.live.fetch_add(1, Ordering::Relaxed);
        Some(Arc::clone(tally))
    }

    /// What the circuits of a breaker are, and what became of them.
    pub fn tally(&self, breaker: &PolicyName) -> Arc<Tally> {
        self.by_breaker.lock().get(breaker).map(Arc::clone).unwrap_or_default()
    }

    /// Whether anything is decided any more.
    ///
    /// # Errors
    /// Why not.
    pub fn check_alive(&self) -> Result<(), StorageError> {
        self.over.get().cloned().map_or(Ok(()), Err)
    }

    /// Nothing is decided from here on, for this reason; if nothing is written any more, who waits is told.
    pub(crate) fn end(&self, why: &StorageError) {
        // The first reason is the one to tell.
        let _ = self.over.set(why.clone());
        self.boards.end();
        if matches!(why, StorageError::Failed(_)) {
            for shard in &self.shards {
                for told in shard.lock().waiting.drain(..) {
                    // Who went away need not know.
                    let _ = told.send(Err(why.clone()));
                }
            }
        }
    }

    /// The records that wait, and who waits for them.
    pub(super) fn take_queued(
        &self,
        writes: &mut Vec<Write>,
        waiting: &mut Vec<oneshot::Sender<Result<(), StorageError>>>,
    ) -> Taken {
        let mut taken = Taken::default();
        for shard in &self.shards {
            let mut shard = shard.lock();
            let Shard { circuits, queued, waiting: here, .. } = &mut *shard;
            waiting.append(here);
            for cell in queued.drain(..) {
                // It is there: none leaves that is queued.
                let Some(entry) = circuits.get_mut(&cell) else { continue };
                (entry.queued, entry.in_flight) = (false, true);
                taken.0.push(cell);
                let key = cell.to_bytes();
                writes.push(if entry.leaves {
                    Write::delete(Keyspace::Circuits, key)
                } else {
                    let record = CircuitRecord::of(&entry.name, &entry.circuit.kept());
                    Write::put(Keyspace::Circuits, key, record.encode_to_vec())
                });
            }
        }
        taken
    }

    /// What was taken is on disk: now it is told.
    pub(super) fn written(&self, Taken(cells): Taken) {
        for cell in cells {
            let mut shard = self.shards[shard_of(cell)].lock();
            let Some(entry) = shard.circuits.get_mut(&cell) else { continue };
            entry.in_flight = false;
            if entry.queued {
                // What has changed since is told with its own record.
                continue;
            }
            let name = Arc::clone(&entry.name);
            if entry.leaves {
                if let Some(entry) = shard.circuits.remove(&cell) {
                    self.forget(&entry);
                }
            } else {
                entry.tally.change(entry.told.phase, entry.next.phase);
                entry.told = entry.next.clone();
            }
            drop(shard);
            self.boards.tell(&name);
        }
    }

    /// Puts a circuit that an earlier start has left.
    pub(super) fn restore(&self, place: &Place<'_>, kept: Kept, now: Time) {
        let mut shard = self.shards[shard_of(place.cell)].lock();
        // Also more than there is room for: they are there.
        let tally = Arc::clone(self.by_breaker.lock().entry(place.breaker_name()).or_default());
        let entry = self.turn((place.cell, place.breaker), now, |turn| {
            Entry::new(place, Circuit::recovered(kept, turn), tally, turn)
        });
        entry.tally.come(entry.told.phase);
        shard.circuits.insert(place.cell, Box::new(entry));
        self.live.fetch_add(1, Ordering::Relaxed);
    }
}

impl Entry {
    fn new(place: &Place<'_>, circuit: Circuit, tally: Arc<Tally>, turn: Turn<'_>) -> Self {
        let Place { key, cell, .. } = *place;
        let view = circuit.view(turn);
        Self {
            name: Arc::new(CircuitName { breaker: place.breaker_name(), key: key.into(), cell }),
            tally,
            circuit,
            used_at: turn.now,
            queued: false,
            in_flight: false,
            leaves: false,
            told: view.clone(),
            next: view,
        }
    }
}

/// The locks of the shards that some circuits live in, taken in the order of the shards, and always before those
/// of cells.
pub struct Locked<'a> {
    circuits: &'a Circuits,
    shards: ArrayVec<(usize, MutexGuard<'a, Shard>), { limits::CIRCUIT_ASKS }>,
    /// The first of the shards in which somebody saw what is not written yet.
    unwritten: Option<usize>,
}

impl Locked<'_> {
    /// One circuit, as [`Circuits::change_named`] says.
    pub fn change_named<T>(
        &mut self,
        place: &Place<'_>,
        now: Time,
        change: impl FnOnce(&Arc<CircuitName>, &mut Circuit, Turn<'_>) -> (T, bool),
    ) -> Option<T> {
        let circuits = self.circuits;
        let index = shard_of(place.cell);
        let locked = self.shards.iter_mut().position(|(locked, _)| *locked == index)?;
        let Shard { circuits: entries, queued, .. } = &mut *self.shards[locked].1;
        let entry = match entries.entry(place.cell) {
            hash_map::Entry::Occupied(entry) => entry.into_mut(),
            hash_map::Entry::Vacant(vacant) => {
                let tally = circuits.make_room(place)?;
                vacant.insert(circuits.turn((place.cell, place.breaker), now, |turn| {
                    let circuit = Circuit::new(circuits.absent(), place.breaker, now);
                    Box::new(Entry::new(place, circuit, tally, turn))
                }))
            }
        };
        entry.used_at = entry.used_at.max(now);
        if std::mem::take(&mut entry.leaves) {
            // Its record may be gone already.
            entry.queue(queued);
        }
        let mut value = None;
        let name = Arc::clone(&entry.name);
        circuits.settle(entry, place.breaker, now, queued, |circuit, turn| {
            let (made, changed) = change(&name, circuit, turn);
            value = Some(made);
            changed
        });
        if !entry.is_written() {
            // The writer takes the shards in their order: what waits in the first of them comes after all of it.
            self.unwritten = Some(self.unwritten.map_or(locked, |before| before.min(locked)));
        }
        value
    }

    /// What would become of a call, and how the circuit looks to it; `None` if there is no room for the circuit.
    pub fn ask(&mut self, place: &Place<'_>, now: Time) -> Option<(Passage, View)> {
        self.change_named(place, now, |_, circuit, turn| {
            ((circuit.ask(turn), circuit.view(turn)), false)
        })
    }

    /// Whether the circuit is there.
    pub fn has(&self, place: &Place<'_>) -> bool {
        let index = shard_of(place.cell);
        let shard = self.shards.iter().find(|(locked, _)| *locked == index);
        shard.is_some_and(|(_, shard)| shard.circuits.contains_key(&place.cell))
    }

    /// Lets a call through, or not, of which [`Self::ask`] has told what would become of it; and what the circuit is
    /// then, if it does.
    pub fn conclude(
        &mut self,
        place: &Place<'_>,
        passage: Passage,
        admitted: bool,
        now: Time,
    ) -> Option<(Admitted, View)> {
        self.change_named(place, now, |_, circuit, turn| {
            let admitted = if admitted {
                let admitted = circuit.admit(passage, turn);
                Some((admitted, circuit.view(turn)))
            } else {
                circuit.refuse(passage, turn);
                None
            };
            (admitted, false)
        })?
    }

    /// When all that was seen is on disk; `None` if it is already.
    pub fn durable(mut self) -> Option<Durable> {
        let (_, shard) = &mut self.shards[self.unwritten?];
        let (told, durable) = oneshot::channel();
        shard.waiting.push(told);
        // If a word waits already, the writer will look at all of it.
        let _ = self.circuits.wake.try_send(());
        Some(durable)
    }
}

/// The shard of a circuit. The id is of a keyed hash, so it spreads by itself.
const fn shard_of(cell: CellId) -> usize {
    #[allow(clippy::cast_possible_truncation)] // below the number of shards
    let shard = (cell.0[0] % limits::CIRCUIT_SHARDS as u64) as usize;
    shard
}
