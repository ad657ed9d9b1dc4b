//! Why a circuit is open, and what is known of the calls beside whether they failed.

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::time::Duration;

use super::{
    breaker::{self, Breaker, Share},
    quorum::{self, Fleet, Judged},
    window::Window,
};
use crate::{Time, saturating_nanos};

/// Buckets of latencies: bucket i counts calls of 2^i to 2^(i+1) microseconds, the first also shorter ones and
/// the last also longer ones.
pub const LATENCIES: usize = 40;

/// Kinds of failure that are told apart, and zones that are told.
pub const MAX_KINDS: usize = 8;

/// What a circuit was opened by, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// The share of calls that failed.
    pub failure_rate: Share,
    /// The share of calls that were slow.
    pub slow_rate: Share,
    /// The calls; of a circuit that was half-open, the results of its probes.
    pub calls: u64,
    /// Reporters that made them; 0 where they are not told apart.
    pub reporters: u32,
    /// Those that see the target failing, or slow, by themselves.
    pub unhealthy: u32,
    /// Where those run, at most [`MAX_KINDS`].
    pub zones: Vec<Arc<str>>,
    /// Kinds of failure that were told, the most frequent first.
    pub kinds: Vec<Arc<str>>,
}

impl Evidence {
    /// What a window says, and what was told beside.
    pub(super) fn of(
        window: &Window,
        breaker: &Breaker,
        details: Option<&Details>,
        now: Time,
    ) -> Self {
        let judged @ Judged { counts, reporters, unhealthy, .. } =
            quorum::judge(window, now, breaker, now);
        let mut zones = Vec::new();
        if let Window::Time(told) = window
            && judged.unhealthy > 0
        {
            let fleet = Fleet::of(told.seen(now), breaker);
            let unhealthy = told.seen(now).filter(|one| fleet.is_unhealthy(one.counts));
            unhealthy.for_each(|one| note(&mut zones, &one.by.zone, MAX_KINDS));
        }
        Self {
            failure_rate: Share::of(counts.failures.into(), counts.calls.into()),
            slow_rate: Share::of(counts.slow.into(), counts.calls.into()),
            calls: counts.calls.into(),
            reporters,
            unhealthy,
            zones,
            kinds: details.map(Details::most_frequent).unwrap_or_default(),
        }
    }
}

/// Adds a name that is not there yet, while there is room for so many.
pub(super) fn note(names: &mut Vec<Arc<str>>, name: &Arc<str>, most: usize) {
    if !name.is_empty() && names.len() < most && !names.contains(name) {
        names.push(Arc::clone(name));
    }
}

/// What is told of calls beside whether they failed: of the last half to whole window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Details {
    /// The half that goes on, and the one before.
    halves: [Half; 2],
    /// The number of the half that goes on.
    number: u64,
    half_nanos: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Half {
    latencies: [u32; LATENCIES],
    kinds: Vec<(Arc<str>, u32)>,
}

impl Half {
    const fn new() -> Self {
        Self { latencies: [0; LATENCIES], kinds: Vec::new() }
    }

    /// Of more kinds than there is room for, a new one takes the place of the least, with its count: so one that
    /// comes often gets there.
    fn add_kind(&mut self, kind: &str) {
        if let Some((_, count)) = self.kinds.iter_mut().find(|(known, _)| **known == *kind) {
            *count = count.saturating_add(1);
        } else if self.kinds.len() < MAX_KINDS {
            self.kinds.push((kind.into(), 1));
        } else if let Some(least) = self.kinds.iter_mut().min_by_key(|(_, count)| *count) {
            *least = (kind.into(), least.1.saturating_add(1));
        }
    }
}

impl Details {
    pub(super) fn new(breaker: &Breaker) -> Box<Self> {
        let window = match breaker.window {
            breaker::Window::Time(time) => time,
            // Of those that have no time: as long as a reporter counts as there.
            breaker::Window::Calls(_) | breaker::Window::Consecutive(_) => super::window::PRESENT,
        };
        let half_nanos = saturating_nanos(window).div_ceil(2).max(1);
        Box::new(Self { halves: [Half::new(), Half::new()], number: 0, half_nanos })
    }

    /// Forgets what is too long ago, and makes room for what is told now.
    pub(super) fn slide(&mut self, now: Time) -> &mut Half {
        let number = now.as_nanos() / self.half_nanos;
        if number > self.number {
            self.halves.swap(0, 1);
            self.halves[0] = Half::new();
            if number > self.number + 1 {
                self.halves[1] = Half::new();
            }
            self.number = number;
        }
        &mut self.halves[0]
    }

    pub(super) fn add_latencies(&mut self, counts: &[u64], now: Time) {
        let half = self.slide(now);
        for (sum, count) in half.latencies.iter_mut().zip(counts) {
            *sum = sum.saturating_add(u32::try_from(*count).unwrap_or(u32::MAX));
        }
    }

    pub(super) fn add_latency(&mut self, latency: Duration, now: Time) {
        let place = latency.as_micros().checked_ilog2().unwrap_or(0) as usize;
        let half = self.slide(now);
        let sum = &mut half.latencies[place.min(LATENCIES - 1)];
        *sum = sum.saturating_add(1);
    }

    pub(super) fn add_kind(&mut self, kind: &str, now: Time) {
        self.slide(now).add_kind(kind);
    }

    /// The most frequent first.
    pub(super) fn most_frequent(&self) -> Vec<Arc<str>> {
        let mut counted: Vec<(Arc<str>, u32)> = Vec::new();
        for (kind, count) in self.halves.iter().flat_map(|half| &half.kinds) {
            match counted.iter_mut().find(|(known, _)| known == kind) {
                Some((_, sum)) => *sum = sum.saturating_add(*count),
                None => counted.push((Arc::clone(kind), *count)),
            }
        }
        counted.sort_by_key(|(_, count)| core::cmp::Reverse(*count));
        counted.into_iter().take(MAX_KINDS).map(|(kind, _)| kind).collect()
    }

    /// The latency that such a share of the calls did not exceed: the end of its bucket. `None` of no calls.
    pub(super) fn latency(&self, share: Share) -> Option<Duration> {
        let count =
            |bucket: usize| self.halves.iter().map(move |half| u64::from(half.latencies[bucket]));
        let all: u64 = (0..LATENCIES).flat_map(count).sum();
        let mut sum = 0;
        (0..LATENCIES).find_map(|bucket| {
            sum += count(bucket).sum::<u64>();
            share.is_reached(sum, all).then(|| Duration::from_micros(2 << bucket))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use alloc::format;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn details() -> Box<Details> {
        Details::new(&Breaker::new(breaker::Settings::default()).unwrap())
    }

    fn share(basis_points: u16) -> Share {
        Share::new(basis_points).unwrap()
    }

    #[test]
    fn a_latency_is_told_as_the_end_of_its_bucket() {
        let mut details = details();
        assert_eq!(details.latency(Share::ALL), None);
        for _ in 0..98 {
            details.add_latency(Duration::from_micros(1_500), Time::ZERO);
        }
        details.add_latency(SECOND, Time::ZERO);
        details.add_latency(Duration::MAX, Time::ZERO);
        let [half, most, all] = [5_000, 9_900, 10_000].map(|one| details.latency(share(one)));
        assert_eq!(half, Some(Duration::from_micros(2_048)));
        assert_eq!(most, Some(Duration::from_micros(1 << 20)));
        assert_eq!(all, Some(Duration::from_micros(1 << LATENCIES)));
    }

    #[test]
    fn latencies_that_are_told_together_have_their_buckets() {
        let (mut together, mut each) = (details(), details());
        together.add_latencies(&[1, 0, 2], Time::ZERO);
        for micros in [0, 4, 7] {
            each.add_latency(Duration::from_micros(micros), Time::ZERO);
        }
        assert_eq!(together, each);
    }

    #[test]
    fn what_is_told_lasts_for_half_to_all_of_the_window() {
        let mut details = details();
        details.add_latency(SECOND, Time::ZERO.after(SECOND * 101));
        details.add_kind("timeout", Time::ZERO.after(SECOND * 101));
        for (now, is_known) in [(109, true), (20, true), (110, false)] {
            details.slide(Time::ZERO.after(SECOND * now));
            assert_eq!(details.latency(Share::ALL).is_some(), is_known, "{now} s");
            assert_eq!(details.most_frequent().is_empty(), !is_known, "{now} s");
        }
    }

    #[test]
    fn a_kind_that_comes_often_finds_its_place_among_many() {
        let mut details = details();
        for number in 0..100 {
            details.add_kind(&format!("{number}"), Time::ZERO);
            details.add_kind("often", Time::ZERO.after(SECOND * 5));
        }
        let kinds = details.most_frequent();
        assert_eq!((&*kinds[0], kinds.len()), ("often", MAX_KINDS));
    }
}
