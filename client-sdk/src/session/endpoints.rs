//! Which endpoint a connection tries next, and when.

use std::time::Duration;

use fusebox_core::Time;

use super::backoff::Backoff;
use crate::context::Random;

/// A session that lasted so long was a good one: its endpoint begins anew when it breaks.
const STEADY: Duration = Duration::from_secs(10);

/// How long an endpoint is left alone that answers with another state than the others do: whoever operates it has to
/// mend it.
pub(crate) const SHUNNED: Duration = Duration::from_secs(30);

/// Those that a draining server sends away come back spread over this time.
const DRAINED: Duration = Duration::from_millis(100);

/// The endpoints of one connection, and what became of each.
#[derive(Clone, Debug)]
pub(crate) struct Endpoints {
    each: Vec<Health>,
    /// Nothing is tried before.
    not_before: Time,
}

#[derive(Clone, Copy, Debug, Default)]
struct Health {
    backoff: Backoff,
    not_before: Time,
}

/// What to try next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Next {
    pub(crate) endpoint: usize,
    pub(crate) at: Time,
}

impl Endpoints {
    /// So many endpoints, at least one, of which nothing is known yet.
    pub(crate) fn new(count: usize) -> Self {
        Self { each: vec![Health::default(); count.max(1)], not_before: Time::ZERO }
    }

    /// One of those that failed least, of those that may be tried now; else the one that may be first.
    pub(crate) fn next(&self, now: Time, random: &Random) -> Next {
        let at = self.not_before.max(now);
        let may = |health: &&Health| health.not_before <= at;
        let fewest = self.each.iter().filter(may).map(|one| one.backoff.failures()).min();
        let Some(fewest) = fewest else { return self.first() };
        let best = |health: &Health| may(&health) && health.backoff.failures() == fewest;
        let best: Vec<_> = (0..self.each.len()).filter(|index| best(&self.each[*index])).collect();
        let chosen = random.next() % best.len() as u64;
        let endpoint = usize::try_from(chosen).map_or(best[0], |chosen| best[chosen]);
        Next { endpoint, at }
    }

    fn first(&self) -> Next {
        let first = self.each.iter().enumerate().min_by_key(|(_, health)| health.not_before);
        let (endpoint, health) = first.unwrap_or((0, &self.each[0]));
        Next { endpoint, at: health.not_before.max(self.not_before) }
    }

    /// No session came up there, or one broke that had been up for so long.
    pub(crate) fn failed(&mut self, endpoint: usize, up_for: Duration, now: Time, random: &Random) {
        let health = &mut self.each[endpoint];
        if up_for >= STEADY {
            health.backoff.went_well();
        }
        health.not_before = now.after(health.backoff.failed(random));
    }

    /// The server there drains: others take over, though not in the same moment for all of its clients.
    pub(crate) fn drained(
        &mut self,
        endpoint: usize,
        up_for: Duration,
        now: Time,
        random: &Random,
    ) {
        self.failed(endpoint, up_for, now, random);
        self.not_before = now.after(random.up_to(DRAINED));
    }

    /// The server there decides by another state than the others.
    pub(crate) fn shunned(&mut self, endpoint: usize, now: Time) {
        self.each[endpoint].not_before = now.after(SHUNNED);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER_UP: Duration = Duration::ZERO;

    fn at(millis: u64) -> Time {
        Time::ZERO.after(Duration::from_millis(millis))
    }

    #[test]
    fn first_choices_are_spread() {
        let mut chosen = [0; 4];
        for seed in 0..1000 {
            chosen[Endpoints::new(4).next(at(0), &Random::of(seed)).endpoint] += 1;
        }
        assert!(chosen.iter().all(|count| (150..350).contains(count)), "{chosen:?}");
    }

    #[test]
    fn another_one_is_tried_at_once() {
        let random = Random::of(7);
        let mut endpoints = Endpoints::new(2);
        let first = endpoints.next(at(50), &random).endpoint;
        endpoints.failed(first, NEVER_UP, at(50), &random);
        assert_eq!(endpoints.next(at(50), &random), Next { endpoint: 1 - first, at: at(50) });
    }

    #[test]
    fn when_all_failed_the_first_that_may_be_tried_is_waited_for() {
        let random = Random::of(7);
        let mut endpoints = Endpoints::new(3);
        for endpoint in 0..3 {
            endpoints.failed(endpoint, NEVER_UP, at(1000), &random);
        }
        let next = endpoints.next(at(1000), &random);
        assert!(next.at > at(1000) && next.at <= at(1100), "{next:?}");
        let earliest = endpoints.each.iter().map(|health| health.not_before).min();
        assert_eq!(Some(next.at), earliest);
    }

    #[test]
    fn one_that_never_failed_is_preferred_to_one_whose_wait_is_over() {
        let random = Random::of(7);
        let mut endpoints = Endpoints::new(2);
        endpoints.failed(0, NEVER_UP, at(0), &random);
        for _ in 0..20 {
            assert_eq!(endpoints.next(at(60_000), &random).endpoint, 1);
        }
    }

    #[test]
    fn a_session_that_lasted_clears_what_failed_before_it() {
        let random = Random::of(7);
        let mut endpoints = Endpoints::new(1);
        for _ in 0..10 {
            endpoints.failed(0, NEVER_UP, at(0), &random);
        }
        endpoints.failed(0, STEADY, at(0), &random);
        assert!(endpoints.next(at(0), &random).at <= at(100));
    }

    #[test]
    fn a_session_that_broke_soon_does_not() {
        let random = Random::of(7);
        let mut endpoints = Endpoints::new(1);
        for _ in 0..10 {
            endpoints.failed(0, STEADY / 2, at(0), &random);
        }
        assert_eq!(endpoints.each[0].backoff.failures(), 10);
    }

    #[test]
    fn a_drained_fleet_comes_to_the_other_endpoint_within_100_ms_and_not_at_once() {
        let mut late = 0;
        for seed in 0..100 {
            let random = Random::of(seed);
            let mut endpoints = Endpoints::new(2);
            endpoints.drained(0, STEADY, at(0), &random);
            let next = endpoints.next(at(0), &random);
            // Its own wait may be over first, and yet it failed last.
            assert_eq!(next.endpoint, 1);
            assert!(next.at <= at(100));
            late += u32::from(next.at > at(50));
        }
        assert!((25..75).contains(&late), "{late}");
    }

    #[test]
    fn one_of_another_state_is_left_alone_for_long() {
        let random = Random::of(7);
        let mut endpoints = Endpoints::new(2);
        endpoints.shunned(0, at(0));
        endpoints.failed(1, NEVER_UP, at(0), &random);
        assert_eq!(endpoints.next(at(0), &random).endpoint, 1);
        assert_eq!(Endpoints::new(1).next(at(5), &random), Next { endpoint: 0, at: at(5) });
    }
}
