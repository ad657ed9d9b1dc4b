//! The user's own settings of the local breaker.

use std::time::Duration;

use fusebox_core::circuit::{self, Breaker, InvalidBreaker, Share, WindowSettings};
use thiserror::Error;

/// Settings of a breaker that sees the calls of this process alone.
///
/// Where nothing else is said a circuit
/// - opens when half of at least 20 calls within ten seconds failed,
/// - stays open for 5 s, twice as long each further time up to a minute, and up to a tenth longer by chance,
/// - then lets three probes through, each of which has 10 s to tell,
/// - and once closed lets 25, 50, 75 and 100% of the calls through, 5 s each.
///
/// ```
/// # use {fusebox_client::breaker::Local, std::time::Duration};
/// let picky = Local::default().consecutive_failures(5).open_for(Duration::from_secs(1));
/// ```
#[derive(Clone, Debug)]
pub struct Local(Result<circuit::Settings, InvalidLocal>);

/// Settings that no local breaker can have.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum InvalidLocal {
    /// A setting is out of its range, or two do not go together.
    #[error(transparent)]
    Settings(#[from] InvalidBreaker),
    /// A share that is none.
    #[error("{0} is no share: it is from 0 to 1")]
    Share(f64),
    /// Too many steps.
    #[error("a ramp has at most {} steps", circuit::MAX_STEPS)]
    Steps,
}

impl Default for Local {
    fn default() -> Self {
        Self(Ok(defaults()))
    }
}

fn defaults() -> circuit::Settings {
    circuit::Settings { min_reporters: 1, ..circuit::Settings::default() }
}

/// The breaker of a circuit that nobody has said anything of.
#[allow(clippy::expect_used)] // a test makes it
pub(super) fn default_breaker() -> Breaker {
    Breaker::new(defaults()).expect("defaults that make sense")
}

/// The breaker of a circuit whose policy is that.
pub(super) fn of_policy(policy: &Breaker) -> Breaker {
    let settings = circuit::Settings { min_reporters: 1, ..(**policy).clone() };
    // One reporter is enough for every window.
    Breaker::new(settings).unwrap_or_else(|_| default_breaker())
}

impl Local {
    /// Judges the calls of the last so long: 100 ms to an hour. Counted in ten slices.
    #[must_use]
    pub fn window(self, window: Duration) -> Self {
        self.with(|settings| settings.window = WindowSettings::Time(window))
    }

    /// Judges the last so many calls, 1 to 1,000, once there are as many, or [`min_calls`](Self::min_calls).
    #[must_use]
    pub fn count(self, calls: u32) -> Self {
        self.with(|settings| settings.window = WindowSettings::Calls(calls))
    }

    /// Opens after so many failures in a row: 1 to 1,000. Not beside [`slow_call`](Self::slow_call).
    #[must_use]
    pub fn consecutive_failures(self, failures: u32) -> Self {
        self.with(|settings| settings.window = WindowSettings::Consecutive(failures))
    }

    /// The share of calls, above 0 and at most 1, that opens a circuit when it fails.
    #[must_use]
    pub fn failure_rate(self, rate: f64) -> Self {
        self.with_share(rate, |settings, rate| settings.failure_rate = rate)
    }

    /// The share of calls, above 0 and at most 1, that opens a circuit when each takes longer than `over`.
    #[must_use]
    pub fn slow_call(self, over: Duration, rate: f64) -> Self {
        self.with_share(rate, |settings, rate| {
            settings.slow_call = Some(circuit::SlowCall { over, rate });
        })
    }

    /// Calls without which no rate says anything: 1 to 1,000,000.
    #[must_use]
    pub fn min_calls(self, calls: u32) -> Self {
        self.with(|settings| settings.min_calls = calls)
    }

    /// How long a circuit stays open: 1 ms to a day. The longest time is no shorter after this.
    #[must_use]
    pub fn open_for(self, wait: Duration) -> Self {
        self.with(|settings| {
            settings.open_for.first = wait;
            settings.open_for.max = settings.open_for.max.max(wait);
        })
    }

    /// How many times longer each further wait is, in hundredths (200 is twice as long), and the longest one.
    #[must_use]
    pub fn backoff(self, factor_hundredths: u16, max: Duration) -> Self {
        self.with(|settings| {
            settings.open_for.factor_hundredths = factor_hundredths;
            settings.open_for.max = max;
        })
    }

    /// The share of a wait that is added to it at most, by chance.
    #[must_use]
    pub fn jitter(self, share: f64) -> Self {
        self.with_share(share, |settings, share| settings.open_for.jitter = share)
    }

    /// Calls that a half-open circuit lets through to see, all at the same time, and the time after which one that
    /// has not told has failed.
    #[must_use]
    pub fn probes(self, probes: u32, timeout: Duration) -> Self {
        self.with(|settings| {
            let half_open = &mut settings.half_open;
            (half_open.probes, half_open.max_in_flight) = (probes, probes);
            half_open.probe_timeout = timeout;
            half_open.max_duration = half_open.max_duration.max(timeout);
        })
    }

    /// The shares of calls that a circuit which has closed lets through, ascending, each for so long; none is all at
    /// once.
    #[must_use]
    pub fn ramp(self, steps: &[f64], each: Duration) -> Self {
        let shares = steps.iter().map(|step| share(*step)).collect::<Result<Vec<_>, _>>();
        Self(self.0.and_then(|mut settings| {
            let shares = shares?;
            if shares.len() > circuit::MAX_STEPS {
                return Err(InvalidLocal::Steps);
            }
            settings.ramp = circuit::Ramp { steps: shares.into_iter().collect(), each };
            Ok(settings)
        }))
    }

    /// The breaker of these settings.
    pub(super) fn build(self) -> Result<Breaker, InvalidLocal> {
        Ok(Breaker::new(self.0?)?)
    }

    fn with(mut self, change: impl FnOnce(&mut circuit::Settings)) -> Self {
        if let Ok(settings) = &mut self.0 {
            change(settings);
        }
        self
    }

    fn with_share(self, part: f64, change: impl FnOnce(&mut circuit::Settings, Share)) -> Self {
        Self(self.0.and_then(|mut settings| {
            change(&mut settings, share(part)?);
            Ok(settings)
        }))
    }
}

fn share(part: f64) -> Result<Share, InvalidLocal> {
    if !(0.0..=1.0).contains(&part) {
        return Err(InvalidLocal::Share(part));
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 0 to 10,000
    let basis_points = (part * 10_000.0).round() as u16;
    Share::new(basis_points).ok_or(InvalidLocal::Share(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn defaults_make_sense() {
        assert_eq!(Local::default().build().unwrap(), default_breaker());
    }

    #[test]
    fn what_is_said_is_what_is_built() {
        let local = Local::default().window(SECOND).failure_rate(0.25).slow_call(SECOND, 1.0);
        let local = local.min_calls(5).open_for(SECOND * 90).jitter(0.0).probes(2, SECOND * 61);
        let built = local.ramp(&[0.5], SECOND).build().unwrap();
        assert_eq!(built.window, WindowSettings::Time(SECOND));
        assert_eq!(built.failure_rate.basis_points(), 2_500);
        assert_eq!(built.slow_call.map(|slow| slow.rate), Some(Share::ALL));
        assert_eq!((built.open_for.first, built.open_for.max), (SECOND * 90, SECOND * 90));
        assert_eq!(built.half_open.max_duration, SECOND * 61);
        assert_eq!((built.min_reporters, built.ramp.steps.len()), (1, 1));
        let backs_off = Local::default().backoff(150, SECOND * 7).build().unwrap();
        assert_eq!(backs_off.open_for.factor_hundredths, 150);
    }

    #[test]
    fn settings_that_make_no_sense_are_refused_by_name() {
        let wrong = |local: Local| local.build().unwrap_err().to_string();
        let zero = Duration::ZERO;
        assert!(wrong(Local::default().window(zero)).contains("`window` is 0ns"));
        assert!(wrong(Local::default().count(0)).contains("`count` is 0"));
        assert!(wrong(Local::default().failure_rate(1.5)).contains("1.5 is no share"));
        assert!(wrong(Local::default().failure_rate(f64::NAN)).contains("no share"));
        assert!(wrong(Local::default().ramp(&[0.1; 9], SECOND)).contains("at most 8 steps"));
        let slow_in_a_row = Local::default().consecutive_failures(3).slow_call(SECOND, 0.5);
        assert!(wrong(slow_in_a_row).contains("consecutive_failures"));
    }
}
