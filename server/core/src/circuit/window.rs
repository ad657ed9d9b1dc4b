//! What a closed circuit has seen: by reporter, or in the order in which it was told.

use alloc::{boxed::Box, collections::VecDeque, sync::Arc, vec::Vec};
use core::time::Duration;

use super::breaker::{self, Breaker, MAX_REPORTERS};
use crate::{Time, saturating_nanos};

/// Slices of a time window: what is judged by is between nine tenths of it and all.
const SLICES: usize = 10;

/// How long a reporter counts as there without calls.
pub(super) const PRESENT: Duration = Duration::from_secs(60);

/// Calls, and how they went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counts {
    /// All that say something about the target.
    pub calls: u32,
    /// Those that failed.
    pub failures: u32,
    /// Those that took too long, whether they failed or not.
    pub slow: u32,
}

impl Counts {
    /// Each of them and of `other`, as far as they can be counted.
    pub(super) fn add(&mut self, other: Self) {
        self.calls = self.calls.saturating_add(other.calls);
        self.failures = self.failures.saturating_add(other.failures);
        self.slow = self.slow.saturating_add(other.slow);
    }
}

/// Who tells how calls went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reporter<'a> {
    /// Different for each.
    pub id: &'a str,
    /// Where it runs.
    pub zone: &'a str,
}

/// A reporter whose calls are told apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tracked {
    pub(super) id: Arc<str>,
    pub(super) zone: Arc<str>,
    slices: Slices,
    /// When it last told anything.
    told_at: Time,
}

/// The calls of a time window, by slice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Slices {
    counts: [Counts; SLICES],
    /// All of them together: it is asked for of each reporter whenever one tells anything.
    sum: Counts,
    /// The number of the newest slice. A slice has its place by its number.
    newest: u64,
}

impl Slices {
    /// As they are once the slice of that number has begun; unchanged if they are already further.
    fn slide(&mut self, to: u64) {
        if to <= self.newest {
            return;
        }
        for begun in (self.newest + 1..=to).rev().take(self.counts.len()) {
            *self.slice(begun) = Counts::default();
        }
        self.newest = to;
        self.sum = Self::sum_of(self.counts);
    }

    fn add(&mut self, counts: Counts) {
        self.slice(self.newest).add(counts);
        self.sum.add(counts);
    }

    fn clear(&mut self) {
        (self.counts, self.sum) = Default::default();
    }

    fn slice(&mut self, number: u64) -> &mut Counts {
        &mut self.counts[Self::place(number)]
    }

    const fn place(number: u64) -> usize {
        #[allow(clippy::cast_possible_truncation)] // below the number of slices
        let place = (number % SLICES as u64) as usize;
        place
    }

    /// What they sum up to once the slice of that number has begun.
    fn sum_at(&self, to: u64) -> Counts {
        if to <= self.newest {
            return self.sum;
        }
        let first = (to + 1).saturating_sub(SLICES as u64);
        Self::sum_of((first..=self.newest).map(|number| self.counts[Self::place(number)]))
    }

    fn sum_of(counts: impl IntoIterator<Item = Counts>) -> Counts {
        let mut sum = Counts::default();
        counts.into_iter().for_each(|counts| sum.add(counts));
        sum
    }
}

/// What a circuit is judged by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Window {
    Time(Reporters),
    Calls(Box<Ring>),
    Consecutive { failures: u32, told_at: Time },
}

/// The reporters of a time window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reporters {
    slice_nanos: u64,
    tracked: Vec<Tracked>,
    /// All that there is no room for.
    others: Option<Box<Tracked>>,
}

/// The last so many calls, each as whether it failed and whether it was slow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ring {
    most: usize,
    calls: VecDeque<(bool, bool)>,
    sum: Counts,
    told_at: Time,
}

impl Window {
    /// Nothing was seen yet.
    pub(super) fn new(breaker: &Breaker) -> Self {
        match breaker.window {
            breaker::Window::Time(time) => Self::Time(Reporters::new(time)),
            breaker::Window::Calls(most) => Self::Calls(Box::new(Ring {
                most: most as usize,
                calls: VecDeque::new(),
                sum: Counts::default(),
                told_at: Time::ZERO,
            })),
            breaker::Window::Consecutive(_) => {
                Self::Consecutive { failures: 0, told_at: Time::ZERO }
            }
        }
    }

    /// Makes it one of these settings; whether it was not. What others counted says nothing in them, but who was
    /// there still is.
    pub(super) fn fit(&mut self, breaker: &Breaker) -> bool {
        match (&mut *self, breaker.window) {
            (Self::Time(reporters), breaker::Window::Time(time)) => return reporters.fit(time),
            (Self::Calls(ring), breaker::Window::Calls(most)) if ring.most == most as usize => {
                return false;
            }
            (Self::Consecutive { .. }, breaker::Window::Consecutive(_)) => return false,
            _ => {}
        }
        *self = Self::new(breaker);
        true
    }

    /// Forgets all calls, but not who is there.
    pub(super) fn clear(&mut self) {
        match self {
            Self::Time(reporters) => {
                let all = reporters.tracked.iter_mut().chain(reporters.others.as_deref_mut());
                all.for_each(|one| one.slices.clear());
            }
            Self::Calls(ring) => {
                ring.calls.clear();
                ring.sum = Counts::default();
            }
            Self::Consecutive { failures, .. } => *failures = 0,
        }
    }

    /// Counts calls that a reporter tells of.
    pub(super) fn count(&mut self, reporter: Reporter<'_>, counts: Counts, now: Time) {
        match self {
            Self::Time(reporters) => reporters.count(reporter, counts, now),
            Self::Calls(ring) => {
                ring.told_at = ring.told_at.max(now);
                ring.count(counts);
            }
            Self::Consecutive { failures, told_at } => {
                *told_at = now.max(*told_at);
                // What failed is taken to have failed last.
                let before = if counts.failures < counts.calls { 0 } else { *failures };
                *failures = before.saturating_add(counts.failures);
            }
        }
    }

    /// A reporter leaves, and takes what it told along.
    pub(super) fn leave(&mut self, reporter: &str) {
        if let Self::Time(reporters) = self {
            reporters.tracked.retain(|one| *one.id != *reporter);
        }
    }

    /// What is to be known to tell whether good calls can open a circuit; `None` if several reporters tell of calls.
    pub(super) fn calm(&self, breaker: &Breaker, now: Time) -> Option<Calm> {
        let calm = |counts: Counts, enough, until| Calm {
            nothing_bad: counts.failures == 0 && counts.slow == 0,
            enough: counts.calls >= enough,
            until,
        };
        let no_end = Time::from_nanos(u64::MAX);
        match self {
            Self::Time(reporters) if reporters.tracked.len() > 1 => None,
            Self::Time(reporters) => {
                let mut sum = Counts::default();
                reporters.seen(now).for_each(|one| sum.add(one.counts));
                // With fewer than two, and a tenth, a reporter does not speak for itself.
                let enough = breaker.min_calls.max(2);
                let next = reporters.slice(now).saturating_add(1);
                let end = next.saturating_mul(reporters.slice_nanos);
                Some(calm(sum, enough, Time::from_nanos(end)))
            }
            Self::Calls(ring) => {
                let most = u32::try_from(ring.most).unwrap_or(u32::MAX);
                Some(calm(ring.sum, breaker.min_calls.min(most), no_end))
            }
            // A good call ends the row.
            Self::Consecutive { .. } => Some(calm(Counts::default(), 0, no_end)),
        }
    }

    /// Whether nobody told anything within the last minute, nor of calls that still count. What goes by order
    /// counts without end: it is forgotten after as long as the longest time window.
    pub(super) fn is_quiet(&self, now: Time) -> bool {
        match self {
            Self::Time(reporters) => reporters.seen(now).all(|one| !one.is_present),
            Self::Calls(ring) => ring.sum.calls == 0 || is_long_ago(ring.told_at, now),
            Self::Consecutive { failures, told_at } => *failures == 0 || is_long_ago(*told_at, now),
        }
    }
}

/// Whether good calls can open a circuit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Calm {
    /// Of the calls in the window none failed or was slow.
    pub(super) nothing_bad: bool,
    /// There are so many that a further good one only lowers what is judged.
    pub(super) enough: bool,
    /// When the slice ends: what leaves the window then may be the good ones.
    pub(super) until: Time,
}

/// What one reporter has told of a time window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen<'a> {
    pub(super) by: &'a Tracked,
    pub(super) counts: Counts,
    /// It has calls in the window, or told something within the last minute.
    pub(super) is_present: bool,
}

impl Reporters {
    fn new(time: Duration) -> Self {
        Self { slice_nanos: slice_nanos(time), tracked: Vec::new(), others: None }
    }

    /// Makes them those of such a window, without calls; whether they were not.
    fn fit(&mut self, time: Duration) -> bool {
        let slice_nanos = slice_nanos(time);
        if self.slice_nanos == slice_nanos {
            return false;
        }
        self.slice_nanos = slice_nanos;
        let all = self.tracked.iter_mut().chain(self.others.as_deref_mut());
        all.for_each(|one| one.slices = Slices::default());
        true
    }

    /// How long the window is.
    pub(super) const fn length(&self) -> Duration {
        Duration::from_nanos(self.slice_nanos.saturating_mul(SLICES as u64))
    }

    fn slice(&self, now: Time) -> u64 {
        now.as_nanos() / self.slice_nanos
    }

    fn count(&mut self, reporter: Reporter<'_>, counts: Counts, now: Time) {
        let slice = self.slice(now);
        let one = self.tracked(reporter, now);
        one.told_at = one.told_at.max(now);
        one.slices.slide(slice);
        one.slices.add(counts);
    }

    /// The place of a reporter: its own, that of who told nothing for longest, or that of all others.
    fn tracked(&mut self, reporter: Reporter<'_>, now: Time) -> &mut Tracked {
        let Reporter { id, zone } = reporter;
        let new = |id: &str, zone: &str| Tracked {
            id: id.into(),
            zone: zone.into(),
            slices: Slices::default(),
            told_at: now,
        };
        if let Some(place) = self.tracked.iter().position(|one| *one.id == *id) {
            return &mut self.tracked[place];
        }
        if self.tracked.len() == MAX_REPORTERS {
            let places = self.seen(now).take(MAX_REPORTERS).enumerate();
            let silent = places.filter(|(_, one)| one.counts.calls == 0);
            let Some((place, _)) = silent.min_by_key(|(_, one)| one.by.told_at) else {
                return self.others.get_or_insert_with(|| Box::new(new("", "")));
            };
            self.tracked.swap_remove(place);
        }
        if self.tracked.is_empty() {
            // Many a circuit has one reporter.
            self.tracked.reserve_exact(1);
        }
        self.tracked.push(new(id, zone));
        let last = self.tracked.len() - 1;
        &mut self.tracked[last]
    }

    /// What each reporter told of the window that ends now; those that are not told apart come last, as one.
    pub(super) fn seen(&self, now: Time) -> impl Iterator<Item = Seen<'_>> + Clone {
        self.seen_of(now, |_| true)
    }

    /// What those told who are wanted.
    pub(super) fn seen_of<'a>(
        &'a self,
        now: Time,
        wanted: impl Fn(&Tracked) -> bool + Clone + 'a,
    ) -> impl Iterator<Item = Seen<'a>> + Clone {
        let slice = self.slice(now);
        let all = self.tracked.iter().chain(self.others.as_deref());
        all.filter(move |by| wanted(by)).map(move |by| {
            let counts = by.slices.sum_at(slice);
            let is_present = counts.calls > 0 || by.told_at.after(PRESENT) > now;
            Seen { by, counts, is_present }
        })
    }
}

impl Ring {
    pub(super) fn sum(&self) -> Counts {
        self.sum
    }

    /// Calls that are told together have no order: what failed is taken to have come last, and what was slow
    /// to be what failed.
    fn count(&mut self, Counts { calls, failures, slow }: Counts) {
        let most = u32::try_from(self.most).unwrap_or(u32::MAX);
        // Those before the last ones are pushed out by them.
        for left in (0..calls.min(most)).rev() {
            self.push((left < failures, left < slow));
        }
    }

    fn push(&mut self, call: (bool, bool)) {
        if self.calls.len() == self.most
            && let Some((failed, slow)) = self.calls.pop_front()
        {
            self.sum.calls -= 1;
            self.sum.failures -= u32::from(failed);
            self.sum.slow -= u32::from(slow);
        }
        let (failed, slow) = call;
        self.sum.add(Counts { calls: 1, failures: failed.into(), slow: slow.into() });
        self.calls.push_back(call);
    }
}

fn is_long_ago(told_at: Time, now: Time) -> bool {
    told_at.after(*breaker::WINDOWS.end()) <= now
}

/// Rounded up, so that the slices of a window are never shorter than it.
fn slice_nanos(window: Duration) -> u64 {
    saturating_nanos(window).div_ceil(SLICES as u64).max(1)
}

#[cfg(test)]
mod tests {
    use alloc::format;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const FAILED: Counts = Counts { calls: 1, failures: 1, slow: 0 };

    fn at(time: Duration) -> Time {
        Time::ZERO.after(time)
    }

    /// As many as are told apart, at that time, and two more.
    fn full(now: Time) -> Reporters {
        let mut reporters = Reporters::new(SECOND * 10);
        for number in 0..MAX_REPORTERS + 2 {
            let id = format!("{number}");
            reporters.count(Reporter { id: &id, zone: "" }, FAILED, now);
        }
        reporters
    }

    #[test]
    fn more_reporters_than_are_told_apart_have_one_place() {
        let reporters = full(at(SECOND));
        assert_eq!(reporters.seen(at(SECOND)).count(), MAX_REPORTERS + 1);
        let others = reporters.seen(at(SECOND)).last();
        let others = others.map(|one| (one.by.id.is_empty(), one.counts.calls));
        assert_eq!(others, Some((true, 2)));
    }

    #[test]
    fn who_has_no_calls_and_told_nothing_for_longest_gives_its_place_up() {
        let mut reporters = full(at(SECOND));
        let later = at(SECOND * 12);
        reporters.count(Reporter { id: "5", zone: "" }, FAILED, later);
        // The first says that it is there: the second is who told nothing for longest.
        reporters.count(Reporter { id: "0", zone: "" }, Counts::default(), later);
        reporters.count(Reporter { id: "new", zone: "west" }, FAILED, later);
        let called = reporters.seen(later).filter(|one| one.counts.calls > 0);
        assert!(called.map(|one| &*one.by.id).eq(["5", "new"]));
        assert_eq!(reporters.tracked.len(), MAX_REPORTERS);
        assert!(reporters.tracked.iter().all(|one| &*one.id != "1"));
    }

    #[test]
    fn a_call_counts_for_nine_tenths_of_the_window_and_no_longer_than_all_of_it() {
        for offset in 0..10 {
            let told = SECOND * 100 + Duration::from_millis(100) * offset;
            let mut reporters = Reporters::new(SECOND * 10);
            reporters.count(Reporter { id: "a", zone: "" }, FAILED, at(told));
            let calls =
                |age| reporters.seen(at(told + age)).map(|one| one.counts.calls).sum::<u32>();
            assert_eq!((calls(SECOND * 9), calls(SECOND * 10)), (1, 0), "{told:?}");
        }
    }

    #[test]
    fn who_told_anything_is_there_for_a_minute() {
        let mut reporters = Reporters::new(SECOND);
        reporters.count(Reporter { id: "a", zone: "" }, Counts::default(), at(SECOND));
        let is_present = |now| reporters.seen(at(now)).all(|one| one.is_present);
        assert!(is_present(SECOND * 60) && !is_present(SECOND * 61));
    }

    #[test]
    fn what_is_told_late_counts_as_of_the_newest() {
        let mut reporters = Reporters::new(SECOND * 10);
        let reporter = Reporter { id: "a", zone: "" };
        reporters.count(reporter, FAILED, at(SECOND * 100));
        reporters.count(reporter, FAILED, at(SECOND));
        for now in [SECOND, SECOND * 109] {
            assert_eq!(reporters.seen(at(now)).map(|one| one.counts.calls).sum::<u32>(), 2);
        }
    }
}
