//! Which keys of a policy are asked for most, in little memory.
//!
//! Space-Saving, by Metwally, Agrawal and El Abbadi, "Efficient Computation of Frequent and Top-k Elements in
//! Data Streams", ICDT 2005.

use std::{
    cmp::Reverse,
    hash::BuildHasher,
    sync::atomic::{AtomicU32, Ordering},
};

use crossbeam_utils::CachePadded;
use fusebox_core::Time;
use hashbrown::{DefaultHashBuilder, HashTable};
use parking_lot::Mutex;

use crate::{catalogue::CellId, limits};

/// One key with how much it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopKey {
    /// The key.
    pub key: String,
    /// At most so many tokens.
    pub count: u64,
    /// How much of that may be another key's: at least `count - error` are its own.
    pub error: u64,
}

/// The keys of a policy at one moment, the largest count first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranking {
    /// The keys.
    pub keys: Vec<TopKey>,
    /// How many asks one counted ask stands for now. While it has always been 1, the bounds of [`TopKey`]
    /// hold.
    pub sample_one_in: u32,
}

/// The top keys of one policy, fed by every caller at once.
///
/// A quiet policy counts every ask. A busy one counts one in 2, 4, 8 and so on, each for as many, so that
/// what the rest pay is two multiplications and a load of a cache line that hardly ever changes. What is
/// counted takes the lock only if nobody has it.
///
/// The price is honesty about the error. With one in N, a count is an estimate: c tokens, by asks of w each,
/// have a standard deviation of sqrt(c x w x (N - 1)), to either side, and [`TopKey`]'s bounds hold for what
/// was counted, not for what was asked. What finds the lock taken is not counted at all, so a count is then
/// low by that share; sampling keeps it small.
#[derive(Debug)]
pub struct TopKeys {
    /// N is two to the power of this; on a line of its own, since all read it.
    sampling: CachePadded<AtomicU32>,
    counted: Mutex<Counted>,
}

#[derive(Debug)]
struct Counted {
    summary: SpaceSaving,
    /// Asks counted since the sampling last changed, or counts were halved.
    asks: u32,
}

impl TopKeys {
    /// Nothing counted yet. It grows as keys come, up to that many.
    pub fn new(keys: usize) -> Self {
        let counted = Counted { summary: SpaceSaving::new(keys), asks: 0 };
        Self { sampling: CachePadded::default(), counted: Mutex::new(counted) }
    }

    /// Counts `weight` tokens of `key`, or leaves that to another ask, as `draw` decides: any number that is
    /// as likely as another each time, such as [`draw`] makes.
    pub fn record(&self, key: &str, weight: u64, draw: u64) {
        let sampling = self.sampling.load(Ordering::Relaxed);
        if weight == 0 || draw & ((1 << sampling) - 1) != 0 {
            return;
        }
        let Some(mut counted) = self.counted.try_lock() else { return };
        // For as many as it was chosen from, whatever the sampling has become since.
        counted.summary.record(key, weight.saturating_mul(1 << sampling));
        counted.asks += 1;
        if counted.asks >= limits::TOP_KEYS_SAMPLE {
            counted.asks = 0;
            let less = self.sampling.load(Ordering::Relaxed) + 1;
            self.sampling.store(less.min(limits::TOP_KEYS_SAMPLING), Ordering::Relaxed);
        }
    }

    /// The `count` keys that are asked for most.
    pub fn top(&self, count: usize) -> Ranking {
        let keys = self.counted.lock().summary.top(count);
        Ranking { keys, sample_one_in: 1 << self.sampling.load(Ordering::Relaxed) }
    }

    /// Halves all counts, so that what was asked long ago fades, and counts more of the asks if there were
    /// few. To be called every [`limits::TOP_KEYS_HALVED`].
    pub fn halve(&self) {
        let mut counted = self.counted.lock();
        counted.summary.halve();
        let sampling = self.sampling.load(Ordering::Relaxed);
        // With twice as many there would still be room.
        if counted.asks < limits::TOP_KEYS_SAMPLE / 2 {
            self.sampling.store(sampling.saturating_sub(1), Ordering::Relaxed);
        }
        counted.asks = 0;
    }
}

/// A number for [`TopKeys::record`] that needs no state of its own: nobody outside knows the hash that names
/// the cell, and the same key comes at another moment.
///
/// Two asks of one key at one moment have the same, so both are counted or neither; that is as right on
/// average.
pub fn draw(cell: CellId, now: Time) -> u64 {
    // The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of the moment reaches the lowest.
    let mut mixed = cell.0[0] ^ now.as_nanos();
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Counts the most frequent of any number of keys with a fixed number of counters.
///
/// A key that has no counter takes the least one over: its count goes on, and is from then on also the new
/// key's error. So no count is ever too low, none is too high by more than its error, and no error is above
/// the total over the number of counters.
#[derive(Debug)]
pub struct SpaceSaving {
    capacity: usize,
    hasher: DefaultHashBuilder,
    /// Finds the counter of a key.
    index: HashTable<usize>,
    counters: Vec<Counter>,
    /// Counters, none less than its parent: the least is first.
    heap: Vec<usize>,
}

#[derive(Debug)]
struct Counter {
    key: String,
    hash: u64,
    count: u64,
    error: u64,
    /// Where it is in the heap.
    place: usize,
}

impl SpaceSaving {
    /// At most that many keys; with none, nothing is counted.
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity,
            hasher: DefaultHashBuilder::default(),
            index: HashTable::new(),
            counters: Vec::new(),
            heap: Vec::new(),
        }
    }

    /// Counts `weight` for `key`. The key is copied only when it gets a counter, into the room of the one that
    /// leaves.
    pub fn record(&mut self, key: &str, weight: u64) {
        if weight == 0 || self.capacity == 0 {
            return;
        }
        let hash = self.hasher.hash_one(key);
        let counters = &self.counters;
        let same =
            |&counter: &usize| counters[counter].hash == hash && counters[counter].key == key;
        let counter = match self.index.find(hash, same) {
            Some(&counter) => counter,
            None if self.counters.len() < self.capacity => self.add(key, hash),
            None => self.take_over(key, hash),
        };
        let count = &mut self.counters[counter].count;
        *count = count.saturating_add(weight);
        self.sink(self.counters[counter].place);
    }

    /// The `count` keys of the largest counts, the largest first; ties by error, then by key.
    pub fn top(&self, count: usize) -> Vec<TopKey> {
        let mut counters: Vec<_> = self.counters.iter().collect();
        counters.sort_unstable_by_key(|counter| {
            (Reverse(counter.count), counter.error, counter.key.as_str())
        });
        let top = counters.into_iter().take(count);
        top.map(|&Counter { ref key, count, error, .. }| TopKey { key: key.clone(), count, error })
            .collect()
    }

    /// Halves what was counted so far: the bounds hold for a stream in which all of it weighs half.
    pub fn halve(&mut self) {
        for counter in &mut self.counters {
            let least = counter.count - counter.error;
            // Up and down, so that half of a token is on neither wrong side. The order stays.
            counter.count = counter.count.div_ceil(2);
            counter.error = counter.count - least / 2;
        }
    }

    /// A counter of nothing for a key that has none, as the least.
    fn add(&mut self, key: &str, hash: u64) -> usize {
        let (counter, place) = (self.counters.len(), self.heap.len());
        self.counters.push(Counter { key: key.to_owned(), hash, count: 0, error: 0, place });
        self.heap.push(counter);
        self.enter(counter);
        self.rise(place);
        counter
    }

    /// The least counter, for another key.
    fn take_over(&mut self, key: &str, hash: u64) -> usize {
        let counter = self.heap[0];
        let left = self.index.find_entry(self.counters[counter].hash, |&other| other == counter);
        if let Ok(left) = left {
            left.remove();
        }
        let taken = &mut self.counters[counter];
        taken.key.clear();
        // Not more than the longest key that it ever held.
        taken.key.reserve_exact(key.len());
        taken.key.push_str(key);
        taken.hash = hash;
        taken.error = taken.count;
        self.enter(counter);
        counter
    }

    /// Makes a counter found by its key.
    fn enter(&mut self, counter: usize) {
        let counters = &self.counters;
        let hash = counters[counter].hash;
        self.index.insert_unique(hash, counter, |&other| counters[other].hash);
    }

    /// Moves what is in that place down until nothing below it is less.
    fn sink(&mut self, mut place: usize) {
        loop {
            let children = 2 * place + 1..self.heap.len().min(2 * place + 3);
            let Some(least) = children.min_by_key(|&child| self.count_at(child)) else { return };
            if self.count_at(place) <= self.count_at(least) {
                return;
            }
            self.swap(place, least);
            place = least;
        }
    }

    /// Moves what is in that place up until nothing above it is more.
    fn rise(&mut self, mut place: usize) {
        while place > 0 && self.count_at(place) < self.count_at((place - 1) / 2) {
            self.swap(place, (place - 1) / 2);
            place = (place - 1) / 2;
        }
    }

    fn count_at(&self, place: usize) -> u64 {
        self.counters[self.heap[place]].count
    }

    fn swap(&mut self, one: usize, other: usize) {
        self.heap.swap(one, other);
        self.counters[self.heap[one]].place = one;
        self.counters[self.heap[other]].place = other;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Numbers that look random and are the same each time.
    struct Draws(u64);

    impl Draws {
        fn next(&mut self) -> u64 {
            self.0 += 1;
            draw(CellId([0x9e37_79b9_7f4a_7c15, 0]), Time::from_nanos(self.0))
        }
    }

    /// A stream of `length` keys out of `keys`, the n-th of them as frequent as 1 / n.
    fn zipf(keys: u32, length: usize, seed: u64) -> impl Iterator<Item = u32> {
        let mut draws = Draws(seed << 32);
        let sums: Vec<f64> = (1..=keys)
            .scan(0.0, |sum, rank| {
                *sum += 1.0 / f64::from(rank);
                Some(*sum)
            })
            .collect();
        let total = sums[sums.len() - 1];
        (0..length).map(move |_| {
            let share = f64::from(u32::try_from(draws.next() >> 32).unwrap()) / 2f64.powi(32);
            u32::try_from(sums.partition_point(|&sum| sum < share * total)).unwrap()
        })
    }

    fn counter<'a>(top: &'a [TopKey], key: &str) -> Option<&'a TopKey> {
        top.iter().find(|top| top.key == key)
    }

    #[test]
    fn with_a_counter_for_every_key_all_are_exact() {
        let mut summary = SpaceSaving::new(4);
        for (key, weight) in [("a", 3), ("b", 1), ("a", 2), ("", 9), ("c", 0), ("b", 1), ("d", 2)] {
            summary.record(key, weight);
        }
        let exact = |(key, count): (&str, u64)| TopKey { key: key.into(), count, error: 0 };
        assert_eq!(summary.top(9), [("", 9), ("a", 5), ("b", 2), ("d", 2)].map(exact));
        assert_eq!(summary.top(1), [("", 9)].map(exact));
        assert_eq!(summary.top(0), []);
    }

    #[test]
    fn a_key_without_a_counter_takes_the_least_over_with_its_error() {
        let mut summary = SpaceSaving::new(2);
        for (key, weight) in [("a", 7), ("b", 3), ("c", 1)] {
            summary.record(key, weight);
        }
        let top = |key: &str, count, error| TopKey { key: key.into(), count, error };
        assert_eq!(summary.top(2), [top("a", 7, 0), top("c", 4, 3)]);
    }

    #[test]
    fn the_true_count_is_within_the_error_on_every_stream() {
        for seed in 0..20 {
            let mut summary = SpaceSaving::new(64);
            let (mut truth, mut total) = (HashMap::<String, u64>::new(), 0);
            for (index, key) in zipf(5_000, 20_000, seed).enumerate() {
                let (key, weight) = (format!("key-{key}"), index as u64 % 7 + 1);
                summary.record(&key, weight);
                *truth.entry(key).or_default() += weight;
                total += weight;
            }
            let top = summary.top(64);
            for TopKey { key, count, error } in &top {
                let true_count = truth[key];
                assert!(count - error <= true_count && true_count <= *count, "{seed}: {key}");
                assert!(*error <= total / 64, "{seed}: {key}");
            }
            // What was counted is what was asked, and what is not told is not more than the least.
            assert_eq!(top.iter().map(|top| top.count).sum::<u64>(), total, "{seed}");
            let untold = truth.iter().filter(|(key, _)| counter(&top, key).is_none());
            let most = untold.map(|(_, &count)| count).max().unwrap();
            assert!(most <= top[63].count, "{seed}");
        }
    }

    #[test]
    fn halving_keeps_the_bounds_of_what_then_weighs_half() {
        let mut summary = SpaceSaving::new(32);
        // In 16ths of a token, so that four halvings leave no rest.
        let mut truth = HashMap::<String, u64>::new();
        for round in 0..4 {
            for key in zipf(500, 5_000, round) {
                let key = format!("key-{key}");
                summary.record(&key, 1);
                *truth.entry(key).or_default() += 16;
            }
            summary.halve();
            truth.values_mut().for_each(|count| *count /= 2);
            for TopKey { key, count, error } in summary.top(32) {
                let least = 16 * (count - error);
                assert!((least..=16 * count).contains(&truth[&key]), "{round}: {key}");
            }
        }
    }

    #[test]
    fn memory_does_not_grow_with_the_keys() {
        let mut summary = SpaceSaving::new(128);
        for key in 0..100_000 {
            let bytes = limits::KEY_BYTES - key % 200;
            summary.record(&format!("{key:0bytes$}"), 1);
        }
        assert_eq!(
            (summary.counters.len(), summary.heap.len(), summary.index.len()),
            (128, 128, 128)
        );
        assert!(summary.index.capacity() <= 512, "{}", summary.index.capacity());
        let text: usize = summary.counters.iter().map(|counter| counter.key.capacity()).sum();
        assert!(text <= 128 * limits::KEY_BYTES, "{text}");

        let mut nothing = SpaceSaving::new(0);
        nothing.record("a", 1);
        assert_eq!(nothing.top(1), []);
    }

    #[test]
    fn the_largest_counts_are_as_large_as_a_number_gets() {
        let mut summary = SpaceSaving::new(1);
        summary.record("a", u64::MAX);
        summary.record("b", 5);
        let top = TopKey { key: "b".into(), count: u64::MAX, error: u64::MAX };
        assert_eq!(summary.top(1), [top]);
    }

    #[test]
    fn a_quiet_policy_counts_every_ask() {
        let (keys, mut draws) = (TopKeys::new(8), Draws(1));
        for _ in 1..limits::TOP_KEYS_SAMPLE {
            keys.record("a", 2, draws.next());
        }
        let count = u64::from(limits::TOP_KEYS_SAMPLE - 1) * 2;
        let top = vec![TopKey { key: "a".into(), count, error: 0 }];
        assert_eq!(keys.top(8), Ranking { keys: top, sample_one_in: 1 });
    }

    #[test]
    fn a_busy_policy_counts_few_asks_and_finds_its_heavy_keys() {
        let (keys, mut draws) = (TopKeys::new(limits::TOP_KEYS), Draws(1));
        let length = limits::TOP_KEYS_SAMPLE as usize * 40;
        let mut truth = HashMap::<u32, u64>::new();
        for key in zipf(2_000, length, 7) {
            keys.record(&key.to_string(), 1, draws.next());
            *truth.entry(key).or_default() += 1;
        }
        let Ranking { keys: top, sample_one_in } = keys.top(20);
        assert!((8..=64).contains(&sample_one_in), "{sample_one_in}");
        for heavy in 0..10 {
            let found = counter(&top, &heavy.to_string()).expect("among twice as many");
            let (count, error, truth) = (found.count, found.error, truth[&heavy]);
            // Six standard deviations, and what Space-Saving itself may add.
            let noise = 6 * (truth * u64::from(sample_one_in)).isqrt();
            assert!(truth.saturating_sub(noise) <= count, "{heavy}: {found:?}, {truth}");
            assert!(count <= truth + noise + error, "{heavy}: {found:?}, {truth}");
        }
    }

    #[test]
    fn a_policy_that_turns_quiet_counts_every_ask_again() {
        let (keys, mut draws) = (TopKeys::new(8), Draws(1));
        for _ in 0..limits::TOP_KEYS_SAMPLE * 16 {
            keys.record("a", 1, draws.next());
        }
        assert!(keys.top(1).sample_one_in > 4);
        for _ in 0..limits::TOP_KEYS_SAMPLING {
            keys.halve();
        }
        assert_eq!(keys.top(1).sample_one_in, 1);
    }

    #[test]
    fn an_ask_that_finds_the_lock_taken_does_not_wait() {
        let keys = TopKeys::new(8);
        let taken = keys.counted.lock();
        keys.record("a", 1, 0);
        drop(taken);
        assert_eq!(keys.top(8).keys, []);
    }

    #[test]
    fn draws_are_even_over_the_moments_of_a_key() {
        let mut draws = Draws(0);
        let mut hits = [0u32; 8];
        for _ in 0..80_000 {
            hits[usize::try_from(draws.next() % 8).unwrap()] += 1;
        }
        assert!(hits.iter().all(|hits| (9_500..10_500).contains(hits)), "{hits:?}");
    }
}
