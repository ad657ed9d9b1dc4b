//! Hits of rules, as envoyproxy/ratelimit counts them.

use std::{
    hash::BuildHasher,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use arrayvec::ArrayString;
use hashbrown::{DefaultHashBuilder, HashMap};
use parking_lot::Mutex;

use super::key::push;
use crate::limits;

/// One descriptor's hits as they met the limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hit {
    /// How many; 0 was a peek, and counts nothing.
    pub hits: u64,
    /// What was spent of the limit before them.
    pub spent_before: u64,
    /// The limit.
    pub limit: u64,
    /// They were over the limit, or would have been if it did more than watch.
    pub over: bool,
    /// The limit only watches.
    pub shadow: bool,
    /// They were given back: nothing met the limit, and nothing is counted.
    pub negative: bool,
}

/// Counts of one series; on a cache line of its own, since any call may write it.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Hits {
    /// All.
    pub total: AtomicU64,
    /// Those over the limit.
    pub over_limit: AtomicU64,
    /// Those within the limit, and past four fifths of it.
    pub near_limit: AtomicU64,
    /// Those of descriptors that were within the limit as a whole.
    pub within_limit: AtomicU64,
    /// Those over a limit that only watches.
    pub shadow_mode: AtomicU64,
}

/// What one hit adds to each of [`Hits`], or what they are at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    total: u64,
    over_limit: u64,
    near_limit: u64,
    within_limit: u64,
    shadow_mode: u64,
}

impl Hit {
    /// Whether there is something to count.
    fn counts(&self) -> bool {
        self.hits > 0 && !self.negative
    }

    /// What it adds. Hits that straddle the limit are those within it, of which only those near it are counted,
    /// and those over it.
    fn added(self) -> Counts {
        let Self { hits, spent_before: before, limit, over, shadow, .. } = self;
        if !self.counts() {
            return Counts::default();
        }
        // A caller must not be able to turn a counter over.
        let hits = hits.min(u32::MAX.into());
        let (near, after) = (near_limit(limit), before.saturating_add(hits));
        let mut counts = Counts { total: hits, ..Counts::default() };
        if !over {
            counts.within_limit = hits;
            counts.near_limit = after.saturating_sub(before.max(near));
        } else if before < limit && limit < after {
            counts.over_limit = after - limit;
            counts.near_limit = limit - before.max(near);
        } else {
            // Also where something else than the limit denied them.
            counts.over_limit = hits;
        }
        if shadow {
            counts.shadow_mode = counts.over_limit;
        }
        counts
    }
}

/// What may be spent of a limit before it is near: four fifths, in single precision, as envoyproxy has it.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn near_limit(limit: u64) -> u64 {
    (limit as f32 * 0.8).floor() as u64
}

impl Hits {
    /// Counts hits.
    pub(super) fn count(&self, hit: Hit) {
        self.add(hit.added());
    }

    /// Adds those of another series.
    pub(super) fn add_all(&self, other: &Self) {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        self.add(Counts {
            total: load(&other.total),
            over_limit: load(&other.over_limit),
            near_limit: load(&other.near_limit),
            within_limit: load(&other.within_limit),
            shadow_mode: load(&other.shadow_mode),
        });
    }

    /// Whether there are any.
    pub(super) fn is_counted(&self) -> bool {
        self.total.load(Ordering::Relaxed) > 0
    }

    fn add(&self, counts: Counts) {
        for (count, added) in [
            (&self.total, counts.total),
            (&self.over_limit, counts.over_limit),
            (&self.near_limit, counts.near_limit),
            (&self.within_limit, counts.within_limit),
            (&self.shadow_mode, counts.shadow_mode),
        ] {
            if added > 0 {
                count.fetch_add(added, Ordering::Relaxed);
            }
        }
    }
}

/// The key of a series, cut where it is too long.
pub(super) type SeriesKey = ArrayString<{ limits::HITS_KEY_BYTES }>;

/// Levels as envoyproxy tells them: each as `key` or `key_value`, between dots.
pub(super) fn series_key<'l>(
    levels: impl Iterator<Item = (&'l str, Option<&'l str>)>,
) -> SeriesKey {
    let mut text = SeriesKey::new();
    for (index, (key, value)) in levels.enumerate() {
        let dot = if index == 0 { "" } else { "." };
        let (bar, value) = value.map_or(("", ""), |value| ("_", value));
        for piece in [dot, key, bar, value] {
            if !push(&mut text, piece) {
                return text;
            }
        }
    }
    text
}

/// Series that one rule has for what callers send. None is forgotten while the rule is there: there is an end to
/// them instead.
#[derive(Debug)]
pub(super) struct Series {
    shards: [Mutex<HashMap<Box<str>, Hits>>; limits::HITS_SHARDS],
    hasher: DefaultHashBuilder,
    count: AtomicUsize,
    /// Of all rules.
    taken: Arc<AtomicUsize>,
}

impl Series {
    /// None yet; `taken` counts those of all rules.
    pub fn new(taken: Arc<AtomicUsize>) -> Self {
        let (shards, hasher, count) = Default::default();
        Self { shards, hasher, count, taken }
    }

    /// Counts hits in the series of that key, or else in the other one, if there is no room for a new one.
    pub fn count_or(&self, key: &str, hit: Hit, other: &Hits) {
        if !hit.counts() {
            return;
        }
        let mut shard = self.shard(key).lock();
        if let Some(hits) = shard.get(key) {
            hits.count(hit);
        } else if self.take() {
            shard.entry(key.into()).or_default().count(hit);
        } else {
            drop(shard);
            other.count(hit);
        }
    }

    #[allow(clippy::cast_possible_truncation)]
    fn shard(&self, key: &str) -> &Mutex<HashMap<Box<str>, Hits>> {
        &self.shards[self.hasher.hash_one(key) as usize % limits::HITS_SHARDS]
    }

    /// Takes the place of one more, if there is one.
    fn take(&self) -> bool {
        // Looked at first: once all are taken, callers need not write what all share.
        if self.taken.load(Ordering::Relaxed) >= limits::DETAILED_METRICS {
            return false;
        }
        if self.taken.fetch_add(1, Ordering::Relaxed) >= limits::DETAILED_METRICS {
            self.taken.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Visits every series.
    pub fn visit(&self, mut visit: impl FnMut(&str, &Hits)) {
        for shard in &self.shards {
            for (key, hits) in &*shard.lock() {
                visit(key, hits);
            }
        }
    }
}

impl Drop for Series {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.count.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hit(limit: u64, spent_before: u64, hits: u64) -> Hit {
        let over = spent_before + hits > limit;
        Hit { hits, spent_before, limit, over, ..Hit::default() }
    }

    /// As `total over near within`.
    fn told(Counts { total, over_limit, near_limit, within_limit, .. }: Counts) -> [u64; 4] {
        [total, over_limit, near_limit, within_limit]
    }

    #[test]
    fn hits_are_counted_as_envoyproxy_does() {
        for (limit, before, hits, counts) in [
            (15, 10, 1, [1, 0, 0, 1]),
            (15, 12, 1, [1, 0, 1, 1]),
            (15, 15, 1, [1, 1, 0, 0]),
            (20, 2, 3, [3, 0, 0, 3]),
            (8, 5, 2, [2, 0, 1, 2]),
            (20, 16, 3, [3, 0, 3, 3]),
            (20, 19, 3, [3, 2, 1, 0]),
            (20, 15, 7, [7, 2, 4, 0]),
            (10, 27, 3, [3, 3, 0, 0]),
            // Exactly at a threshold, and past both.
            (15, 11, 1, [1, 0, 0, 1]),
            (15, 14, 1, [1, 0, 1, 1]),
            (10, 0, 30, [30, 20, 2, 0]),
            (0, 0, 1, [1, 1, 0, 0]),
            (1, 0, 1, [1, 0, 1, 1]),
            // A peek.
            (20, 25, 0, [0, 0, 0, 0]),
        ] {
            let hit = hit(limit, before, hits);
            assert_eq!(told(hit.added()), counts, "{limit}: {before} + {hits}");
            assert_eq!(hit.added().shadow_mode, 0);
            let shadow = Hit { shadow: true, ..hit }.added();
            assert_eq!(told(shadow), counts, "also if it only watches");
            assert_eq!(shadow.shadow_mode, counts[1]);
        }
    }

    #[test]
    fn what_is_denied_below_the_limit_is_over_it_as_a_whole() {
        let denied = Hit { over: true, ..hit(20, 2, 3) };
        assert_eq!(told(denied.added()), [3, 3, 0, 0]);
    }

    #[test]
    fn what_is_given_back_counts_nothing() {
        assert_eq!(Hit { negative: true, ..hit(20, 2, 3) }.added(), Counts::default());
    }

    #[test]
    fn no_number_is_too_large() {
        for over in [false, true] {
            let counts = Hit { over, ..hit(u64::MAX, 0, u64::MAX) }.added();
            assert_eq!(counts.total, u32::MAX.into(), "as many as one request counts");
            let endless = Hit { hits: u64::MAX, spent_before: u64::MAX, over, ..Hit::default() };
            assert_eq!(endless.added().total, u32::MAX.into());
        }
        assert_eq!(near_limit(u64::from(u32::MAX)), 3_435_973_888, "in single precision");
    }

    fn total(hits: &Hits) -> u64 {
        hits.total.load(Ordering::Relaxed)
    }

    #[test]
    fn there_is_an_end_to_series_and_a_rule_that_goes_makes_room() {
        let taken = Arc::new(AtomicUsize::new(limits::DETAILED_METRICS - 1));
        let (series, other) = (Series::new(Arc::clone(&taken)), Hits::default());
        for key in ["a", "b", "a", "c"] {
            series.count_or(key, hit(20, 2, 3), &other);
        }
        let mut keys = Vec::new();
        series.visit(|key, hits| keys.push((key.to_owned(), total(hits))));
        assert_eq!((keys, total(&other)), (vec![("a".to_owned(), 6)], 6));
        drop(series);
        assert_eq!(taken.load(Ordering::Relaxed), limits::DETAILED_METRICS - 1);
    }

    #[test]
    fn what_counts_nothing_makes_no_series() {
        let (series, other) = (Series::new(Arc::default()), Hits::default());
        series.count_or("a", hit(20, 2, 0), &other);
        series.count_or("a", Hit { negative: true, ..hit(20, 2, 3) }, &other);
        series.visit(|key, _| panic!("{key}"));
    }

    #[test]
    fn a_key_is_cut_between_letters() {
        let value = "é".repeat(200);
        let key = series_key([("a", Some(&*value)), ("b", None)].into_iter());
        assert_eq!(*key, *format!("a_{}", "é".repeat(127)));
    }
}
