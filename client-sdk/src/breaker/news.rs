//! What a circuit saw since its last report.

use fusebox_core::circuit::{LATENCIES, MAX_KINDS};
use fusebox_proto::v1;

use super::{Verdict, circuit::End};
use crate::{binding::Binding, part::COUNT_MOST};

/// Most bytes of a kind of failure: the server's limit.
const KIND_MOST: usize = 64;

/// Calls of one generation that the server was not told of.
#[derive(Debug)]
pub(super) struct News {
    successes: u64,
    failures: u64,
    slow: u64,
    ignored: u64,
    local_failures: u64,
    latencies: [u32; LATENCIES],
    kinds: Vec<(&'static str, u32)>,
}

impl Default for News {
    fn default() -> Self {
        Self {
            successes: 0,
            failures: 0,
            slow: 0,
            ignored: 0,
            local_failures: 0,
            latencies: [0; LATENCIES],
            kinds: Vec::new(),
        }
    }
}

impl News {
    pub(super) fn is_empty(&self) -> bool {
        self.successes + self.failures + self.ignored + self.local_failures == 0
    }

    pub(super) fn failures(&self) -> u64 {
        self.failures
    }

    /// Adds good calls of one bucket.
    pub(super) fn add_good(&mut self, bucket: usize, calls: u32) {
        self.successes += u64::from(calls);
        let sum = &mut self.latencies[bucket];
        *sum = sum.saturating_add(calls);
    }

    /// Adds a call.
    pub(super) fn add(&mut self, end: End, bucket: usize, slow: bool) {
        match end {
            End::Told(Verdict::Success) => self.add_good(bucket, 1),
            End::Told(Verdict::Failure(kind)) => {
                self.failures += 1;
                self.latencies[bucket] = self.latencies[bucket].saturating_add(1);
                self.add_kind(kind);
            }
            End::Told(Verdict::LocalFailure) => return self.local_failures += 1,
            End::Told(Verdict::Ignored) | End::Abandoned => return self.ignored += 1,
        }
        self.slow += u64::from(slow);
    }

    /// Of more kinds than there is room for, a new one takes the place of the least, with its count: so one that
    /// comes often gets there.
    fn add_kind(&mut self, kind: &'static str) {
        if kind.is_empty() {
        } else if let Some((_, count)) = self.kinds.iter_mut().find(|(known, _)| *known == kind) {
            *count = count.saturating_add(1);
        } else if self.kinds.len() < MAX_KINDS {
            self.kinds.push((kind, 1));
        } else if let Some(least) = self.kinds.iter_mut().min_by_key(|(_, count)| *count) {
            *least = (kind, least.1.saturating_add(1));
        }
    }

    /// As the server is told of it.
    pub(super) fn delta(mut self, binding: &Binding, generation: u64) -> v1::CircuitDelta {
        self.kinds.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let kinds = self.kinds.iter().map(|(kind, _)| cut(kind).to_owned());
        let used = self.latencies.iter().rposition(|calls| *calls > 0).map_or(0, |last| last + 1);
        v1::CircuitDelta {
            policy: binding.policy.to_string(),
            key: binding.key.to_string(),
            generation,
            successes: self.successes.min(COUNT_MOST),
            failures: self.failures.min(COUNT_MOST),
            slow: self.slow.min(COUNT_MOST),
            ignored: self.ignored.min(COUNT_MOST),
            local_failures: self.local_failures.min(COUNT_MOST),
            latency_counts: self.latency_counts(used),
            error_kinds: kinds.collect(),
            ..v1::CircuitDelta::default()
        }
    }

    fn latency_counts(&self, used: usize) -> Vec<u64> {
        if self.successes.max(self.failures) > COUNT_MOST {
            // They may not add up to more than is told.
            return Vec::new();
        }
        self.latencies[..used].iter().map(|calls| u64::from(*calls)).collect()
    }
}

/// The beginning of a kind of failure, as much as may be told.
pub(super) fn cut(kind: &str) -> &str {
    &kind[..kind.floor_char_boundary(KIND_MOST)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(kind: &'static str) -> End {
        End::Told(Verdict::Failure(kind))
    }

    #[test]
    fn each_call_is_told_as_what_it_was() {
        let mut news = News::default();
        assert!(news.is_empty());
        news.add_good(2, 5);
        news.add(failed("late"), 4, true);
        news.add(failed(""), 0, false);
        news.add(End::Told(Verdict::Success), 3, true);
        news.add(End::Told(Verdict::LocalFailure), 9, true);
        news.add(End::Told(Verdict::Ignored), 9, true);
        news.add(End::Abandoned, 9, true);
        let delta = news.delta(&Binding::new("payments", "eu", 3), 7);
        let told = v1::CircuitDelta {
            policy: "payments".to_owned(),
            key: "eu".to_owned(),
            generation: 7,
            successes: 6,
            failures: 2,
            slow: 2,
            ignored: 2,
            local_failures: 1,
            latency_counts: vec![1, 0, 5, 1, 1],
            error_kinds: vec!["late".to_owned()],
            ..v1::CircuitDelta::default()
        };
        assert_eq!(delta, told);
    }

    #[test]
    fn of_many_kinds_those_are_told_that_come_often() {
        let mut news = News::default();
        for kind in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"] {
            news.add(failed(kind), 0, false);
            news.add(failed("often"), 0, false);
        }
        let kinds = news.delta(&Binding::new("p", "", 0), 1).error_kinds;
        assert_eq!((kinds.len(), &*kinds[0]), (MAX_KINDS, "often"));
    }

    #[test]
    fn a_kind_is_cut_where_a_letter_ends() {
        assert_eq!(cut("short"), "short");
        let long = "é".repeat(40);
        assert_eq!(cut(&long).len(), 64);
        let odd = format!("x{long}");
        assert_eq!(cut(&odd).len(), 63);
    }
}
