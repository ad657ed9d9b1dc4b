//! Good calls, counted without a lock: by latency, each bucket with the generation that it counts for.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::Duration,
};

use fusebox_core::circuit::LATENCIES;

/// Lanes of a tally: threads of different ones do not wait for each other, and each takes a third of a kilobyte.
const LANES: usize = 4;

/// Calls by latency, in lanes of which each thread has one.
#[derive(Debug)]
pub(super) struct Tally {
    lanes: [Lane; LANES],
}

/// The calls of some threads.
///
/// A bucket holds, beside the count, the [`Tag`] of the generation that it is of, and both change together: so a call of
/// a generation that has passed is never counted for the next, whenever its thread was halted.
#[derive(Debug)]
#[repr(align(64))]
struct Lane {
    /// Those that ever counted: most calls take about as long as others.
    used: AtomicU64,
    buckets: [AtomicU64; LATENCIES],
}

/// The generation of a bucket, in the high half of its word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag(pub(super) u32);

/// Counts that were read, by lane and bucket.
pub(super) type Seen = [[u32; LATENCIES]; LANES];

/// None.
pub(super) const UNSEEN: Seen = [[0; LATENCIES]; LANES];

const COUNT: u64 = u32::MAX as u64;

impl Tally {
    pub(super) fn new(tag: Tag) -> Self {
        Self { lanes: std::array::from_fn(|_| Lane::new(tag)) }
    }

    /// Counts a call; whether it was of the present generation.
    #[inline]
    pub(super) fn add(&self, bucket: usize, tag: Tag) -> bool {
        self.lanes[lane()].add(bucket, tag)
    }

    /// Tells `each` of the calls of each bucket that were not seen yet.
    pub(super) fn read(&self, seen: &mut Seen, mut each: impl FnMut(usize, u32)) {
        for (lane, seen) in self.lanes.iter().zip(seen) {
            for bucket in places(lane.used.load(Ordering::Relaxed)) {
                let word = lane.buckets[bucket].load(Ordering::Acquire);
                note(&mut seen[bucket], word, |calls| each(bucket, calls));
            }
        }
    }

    /// Begins a generation, and tells `each` of the calls of the former that were not seen yet.
    pub(super) fn begin(&self, tag: Tag, seen: &mut Seen, mut each: impl FnMut(usize, u32)) {
        for (lane, seen) in self.lanes.iter().zip(seen) {
            for (bucket, place) in lane.buckets.iter().enumerate() {
                let word = place.swap(u64::from(tag.0) << 32, Ordering::AcqRel);
                note(&mut seen[bucket], word, |calls| each(bucket, calls));
                seen[bucket] = 0;
            }
        }
    }
}

impl Lane {
    fn new(tag: Tag) -> Self {
        Self {
            used: AtomicU64::new(0),
            buckets: std::array::from_fn(|_| AtomicU64::new(u64::from(tag.0) << 32)),
        }
    }

    #[inline]
    fn add(&self, bucket: usize, tag: Tag) -> bool {
        let Some(place) = self.buckets.get(bucket) else { return false };
        let mut word = place.load(Ordering::Relaxed);
        loop {
            if word >> 32 != u64::from(tag.0) {
                return false;
            }
            // Counts go round: who reads them knows what it has seen.
            let next = (word & !COUNT) | (word.wrapping_add(1) & COUNT);
            match place.compare_exchange_weak(word, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => break,
                Err(other) => word = other,
            }
        }
        if self.used.load(Ordering::Relaxed) & (1 << bucket) == 0 {
            self.used.fetch_or(1 << bucket, Ordering::Relaxed);
        }
        true
    }
}

/// The lane of this thread: they are dealt in turn, and what is counted is the same whichever it is.
#[inline]
fn lane() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static LANE: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    LANE.with(|lane| {
        if lane.get() == usize::MAX {
            lane.set(NEXT.fetch_add(1, Ordering::Relaxed) % LANES);
        }
        lane.get()
    }) % LANES
}

/// The bucket of calls that take so long.
#[inline]
pub(super) fn bucket(latency: Duration) -> usize {
    let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
    bucket_of(micros)
}

#[inline]
pub(super) fn bucket_of(micros: u64) -> usize {
    (micros.checked_ilog2().unwrap_or(0) as usize).min(LATENCIES - 1)
}

fn places(mut used: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let place = (used != 0).then(|| used.trailing_zeros() as usize)?;
        used &= used - 1;
        Some(place)
    })
}

fn note(seen: &mut u32, word: u64, tell: impl FnOnce(u32)) {
    #[allow(clippy::cast_possible_truncation)] // the low half
    let count = word as u32;
    let calls = count.wrapping_sub(*seen);
    *seen = count;
    if calls > 0 {
        tell(calls);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_read_once() {
        let (tally, mut seen) = (Tally::new(Tag(7)), UNSEEN);
        for bucket in [0, 3, 3, 39] {
            assert!(tally.add(bucket, Tag(7)));
        }
        let mut read = |expected: &[(usize, u32)]| {
            let mut all = Vec::new();
            tally.read(&mut seen, |bucket, calls| all.push((bucket, calls)));
            assert_eq!(all, expected);
        };
        read(&[(0, 1), (3, 2), (39, 1)]);
        read(&[]);
        tally.add(3, Tag(7));
        read(&[(3, 1)]);
    }

    #[test]
    fn a_call_of_a_generation_that_has_passed_is_not_counted() {
        let (tally, mut seen) = (Tally::new(Tag(1)), UNSEEN);
        tally.add(5, Tag(1));
        let mut left = 0;
        tally.begin(Tag(2), &mut seen, |_, calls| left += calls);
        assert_eq!(left, 1);
        assert!(!tally.add(5, Tag(1)) && tally.add(5, Tag(2)));
        tally.read(&mut seen, |bucket, calls| left += calls * u32::try_from(bucket).unwrap());
        assert_eq!(left, 6);
    }

    #[test]
    fn a_count_that_goes_round_leaves_the_generation_alone() {
        let (tally, mut seen) = (Tally::new(Tag(1)), [[u32::MAX; LATENCIES]; LANES]);
        let place = &tally.lanes[lane()].buckets[0];
        place.store((1 << 32) | COUNT, Ordering::Relaxed);
        assert!(tally.add(0, Tag(1)));
        let mut calls = 0;
        tally.read(&mut seen, |_, more| calls += more);
        assert_eq!((calls, place.load(Ordering::Relaxed)), (1, 1 << 32));
    }

    #[test]
    fn threads_lose_no_call() {
        let tally = Tally::new(Tag(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10_000).for_each(|call| assert!(tally.add(call % 3, Tag(0)))));
            }
        });
        let mut all = 0;
        tally.read(&mut UNSEEN.clone(), |_, calls| all += calls);
        assert_eq!(all, 40_000);
    }

    #[test]
    fn buckets_are_those_of_the_core() {
        let micros = [0, 1, 2, 3, 4, 1_500, u64::MAX].map(bucket_of);
        assert_eq!(micros, [0, 0, 1, 1, 2, 10, LATENCIES - 1]);
        assert_eq!(bucket(Duration::MAX), LATENCIES - 1);
    }
}
