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
    }

    fn slice(&mut self, number: u64) -> &mut Counts {
        #[allow(clippy::cast_possible_truncation)] // below the number of slices
        let place = (number % SLICES as u64) as usize;
        &mut self.counts[place]
    }

    fn sum(&self) -> Counts {
        let mut sum = Counts::default();
        self.counts.iter().for_each(|counts| sum.add(*counts));
        sum
    }
}

/// What a circuit is judged by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Window {
    Time(Reporters),
    Calls(Box<Ring>),
    Consecutive { failures: u32 },
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
            })),
            breaker::Window::Consecutive(_) => Self::Consecutive { failures: 0 },
        }
    }

    /// Whether it is one of these settings: what others counted says nothing in them.
    pub(super) fn fits(&self, breaker: &Breaker) -> bool {
        match (self, breaker.window) {
            (Self::Time(reporters), breaker::Window::Time(time)) => {
                reporters.slice_nanos == slice_nanos(time)
            }
            (Self::Calls(ring), breaker::Window::Calls(most)) => ring.most == most as usize,
            (Self::Consecutive { .. }, breaker::Window::Consecutive(_)) => true,
            _ => false,
        }
    }

    /// Forgets all calls, but not who is there.
    pub(super) fn clear(&mut self) {
        match self {
            Self::Time(reporters) => {
                let all = reporters.tracked.iter_mut().chain(reporters.others.as_deref_mut());
                all.for_each(|one| one.slices.counts = Default::default());
            }
            Self::Calls(ring) => {
                ring.calls.clear();
                ring.sum = Counts::default();
            }
            Self::Consecutive { failures } => *failures = 0,
        }
    }

    /// Counts calls that a reporter tells of.
    pub(super) fn count(&mut self, reporter: Reporter<'_>, counts: Counts, now: Time) {
        match self {
            Self::Time(reporters) => reporters.count(reporter, counts, now),
            Self::Calls(ring) => ring.count(counts),
            // What failed is taken to have failed last.
            Self::Consecutive { failures } if counts.failures < counts.calls => {
                *failures = counts.failures;
            }
            Self::Consecutive { failures } => *failures = failures.saturating_add(counts.failures),
        }
    }

    /// A reporter leaves, and takes what it told along.
    pub(super) fn leave(&mut self, reporter: &str) {
        if let Self::Time(reporters) = self {
            reporters.tracked.retain(|one| *one.id != *reporter);
        }
    }

    /// Whether nobody told anything within the last minute, nor of calls that still count. What goes by order has
    /// no time.
    pub(super) fn is_quiet(&self, now: Time) -> bool {
        match self {
            Self::Time(reporters) => reporters.seen(now).all(|one| !one.is_present),
            Self::Calls(_) | Self::Consecutive { .. } => true,
        }
    }
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

    fn slice(&self, now: Time) -> u64 {
        now.as_nanos() / self.slice_nanos
    }

    fn count(&mut self, reporter: Reporter<'_>, counts: Counts, now: Time) {
        let slice = self.slice(now);
        let one = self.tracked(reporter, now);
        one.told_at = one.told_at.max(now);
        one.slices.slide(slice);
        let newest = one.slices.newest;
        one.slices.slice(newest).add(counts);
    }

    /// The place of a reporter: its own, one that nobody uses any more, or that of all others.
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
            let absent = self.seen(now).take(MAX_REPORTERS).position(|one| one.counts.calls == 0);
            let Some(place) = absent else {
                return self.others.get_or_insert_with(|| Box::new(new("", "")));
            };
            self.tracked.swap_remove(place);
        }
        self.tracked.push(new(id, zone));
        let last = self.tracked.len() - 1;
        &mut self.tracked[last]
    }

    /// What each reporter told of the window that ends now; those that are not told apart come last, as one.
    pub(super) fn seen(&self, now: Time) -> impl Iterator<Item = Seen<'_>> {
        let slice = self.slice(now);
        self.tracked.iter().chain(self.others.as_deref()).map(move |by| {
            let mut slices = by.slices;
            slices.slide(slice);
            let counts = slices.sum();
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

/// Rounded up, so that the slices of a window are never shorter than it.
fn slice_nanos(window: Duration) -> u64 {
    saturating_nanos(window).div_ceil(SLICES as u64).max(1)
}
