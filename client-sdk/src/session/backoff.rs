//! How long an endpoint is left alone after it failed.

use std::time::Duration;

use crate::context::Random;

/// The most that the first wait may be: a server that only restarts is back in about this time.
const FIRST: Duration = Duration::from_millis(100);

/// The most that any wait may be: after an outage the fleet is back within this time.
const LAST: Duration = Duration::from_secs(5);

/// Failures in a row, and the wait that follows: exponential with full jitter, so that a fleet which lost its server
/// in one moment does not come back in one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Failures since it last went well.
    pub(crate) fn failures(self) -> u32 {
        self.failures
    }

    /// It failed once more: how long to wait.
    pub(crate) fn failed(&mut self, random: &Random) -> Duration {
        let wait = random.up_to(self.most());
        self.failures = self.failures.saturating_add(1);
        wait
    }

    /// It went well.
    pub(crate) fn went_well(&mut self) {
        self.failures = 0;
    }

    fn most(self) -> Duration {
        FIRST.saturating_mul(2_u32.saturating_pow(self.failures)).min(LAST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_from_100_ms_up_to_5_s() {
        let mut backoff = Backoff::default();
        let random = Random::of(1);
        let mosts: Vec<_> = (0..8)
            .map(|_| {
                let most = backoff.most();
                assert!(backoff.failed(&random) <= most);
                most.as_millis()
            })
            .collect();
        assert_eq!(mosts, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        backoff.went_well();
        assert_eq!(backoff.most(), FIRST);
    }

    #[test]
    fn waits_of_a_fleet_are_spread_over_all_of_the_time() {
        let waits: Vec<_> =
            (0..1000).map(|seed| Backoff::default().failed(&Random::of(seed))).collect();
        for tenth in 0..10 {
            let (from, to) = (FIRST / 10 * tenth, FIRST / 10 * (tenth + 1));
            let within = waits.iter().filter(|wait| (from..to).contains(wait)).count();
            assert!((50..200).contains(&within), "{within} of 1,000 within {from:?} and {to:?}");
        }
    }
}
