//! How long to pause before a retry.

use std::time::Duration;

/// Pauses that grow with each retry, up to a longest.
///
/// ```
/// use fusebox_client::retry::Backoff;
///
/// let patient = Backoff { max: std::time::Duration::from_secs(30), ..Backoff::default() };
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    /// The pause before the first retry, before jitter.
    pub first: Duration,
    /// By how much each is longer than the one before; what is below 1, or no number, counts as 1.
    pub factor: f64,
    /// The longest pause.
    pub max: Duration,
    /// What chance makes of it.
    pub jitter: Jitter,
}

/// What chance makes of a pause, so that calls which failed together do not come back together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Jitter {
    /// Nothing.
    None,
    /// Any time from nothing to the pause.
    Full,
    /// Any time from `first` to three times the pause that was made before, however `factor` grows.
    Decorrelated,
}

impl Default for Backoff {
    /// 50 ms, then twice as long each time, 5 s at most, with full jitter.
    fn default() -> Self {
        Self {
            first: Duration::from_millis(50),
            factor: 2.0,
            max: Duration::from_secs(5),
            jitter: Jitter::Full,
        }
    }
}

impl Backoff {
    /// The pause before the `retry`-th retry, counted from 1, where the one before was `previous`.
    ///
    /// `up_to` draws a time from nothing to the one that it is given. (Full and decorrelated jitter: Brooker,
    /// "Exponential Backoff And Jitter", 2015.)
    pub(super) fn pause(
        &self,
        retry: u32,
        previous: Duration,
        up_to: impl FnOnce(Duration) -> Duration,
    ) -> Duration {
        match self.jitter {
            Jitter::None => self.without_jitter(retry),
            Jitter::Full => up_to(self.without_jitter(retry)),
            Jitter::Decorrelated => {
                let most = previous.max(self.first).saturating_mul(3);
                let pause = self.first.saturating_add(up_to(most.saturating_sub(self.first)));
                pause.min(self.max)
            }
        }
    }

    fn without_jitter(&self, retry: u32) -> Duration {
        // Also of what is no number.
        let factor = self.factor.max(1.0);
        let times = i32::try_from(retry.saturating_sub(1)).unwrap_or(i32::MAX);
        let seconds = self.first.as_secs_f64() * factor.powi(times);
        Duration::try_from_secs_f64(seconds).unwrap_or(self.max).min(self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn all(most: Duration) -> Duration {
        most
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        let backoff = Backoff { jitter: Jitter::None, ..Backoff::default() };
        let pauses: Vec<_> =
            [1, 2, 3, 7, 8, 1_000_000].map(|n| backoff.pause(n, Duration::ZERO, all)).into();
        assert_eq!(
            pauses,
            [millis(50), millis(100), millis(200), millis(3_200), millis(5_000), millis(5_000)]
        );
    }

    #[test]
    fn full_jitter_draws_from_nothing_to_the_pause() {
        let backoff = Backoff::default();
        assert_eq!(backoff.pause(3, Duration::ZERO, all), millis(200));
        assert_eq!(backoff.pause(3, Duration::ZERO, |most| most / 4), millis(50));
        assert_eq!(backoff.pause(3, Duration::ZERO, |_| Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn decorrelated_jitter_grows_from_the_pause_before() {
        let backoff = Backoff { jitter: Jitter::Decorrelated, ..Backoff::default() };
        assert_eq!(backoff.pause(1, Duration::ZERO, all), millis(150));
        assert_eq!(backoff.pause(2, millis(150), all), millis(450));
        assert_eq!(backoff.pause(2, millis(150), |_| Duration::ZERO), millis(50));
        assert_eq!(backoff.pause(9, millis(4_000), all), millis(5_000));
    }

    #[test]
    fn a_factor_that_is_no_number_makes_equal_pauses() {
        for factor in [f64::NAN, f64::NEG_INFINITY, 0.0] {
            let backoff = Backoff { factor, jitter: Jitter::None, ..Backoff::default() };
            assert_eq!(backoff.pause(5, Duration::ZERO, all), millis(50), "{factor}");
        }
        let backoff = Backoff { factor: f64::INFINITY, jitter: Jitter::None, ..Backoff::default() };
        assert_eq!(backoff.pause(1, Duration::ZERO, all), millis(50));
        assert_eq!(backoff.pause(2, Duration::ZERO, all), millis(5_000));
    }
}
