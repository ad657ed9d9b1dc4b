//! What an operator says of circuits: when they open, for how long, and how they close again.

use core::time::Duration;

use arrayvec::ArrayVec;
use thiserror::Error;

use crate::saturating_nanos;

/// A share, in basis points: 10,000 is all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Share(u16);

impl Share {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// All of it.
    pub const ALL: Self = Self(10_000);

    /// So many basis points; `None` above 10,000.
    #[must_use]
    pub const fn new(basis_points: u16) -> Option<Self> {
        if basis_points <= Self::ALL.0 { Some(Self(basis_points)) } else { None }
    }

    /// `part` of `whole`, rounded down; nothing of nothing.
    #[must_use]
    pub fn of(part: u64, whole: u64) -> Self {
        let share = u128::from(part.min(whole)) * u128::from(Self::ALL.0);
        let share = share.checked_div(u128::from(whole)).unwrap_or(0);
        Self(u16::try_from(share).unwrap_or(Self::ALL.0))
    }

    /// In basis points.
    #[must_use]
    pub const fn basis_points(self) -> u16 {
        self.0
    }

    /// Whether `part` of `whole` is this share or more. Nothing of nothing is not.
    #[must_use]
    pub fn is_reached(self, part: u64, whole: u64) -> bool {
        whole > 0 && u128::from(part) * 10_000 >= u128::from(self.0) * u128::from(whole)
    }
}

/// Most calls of a window that counts calls, and of failures in a row: each is remembered by itself.
pub const MAX_COUNT: u32 = 1_000;

/// Most of `min_calls`.
pub const MAX_MIN_CALLS: u32 = 1_000_000;

/// Most probes of one generation, each of which is remembered by itself.
pub const MAX_PROBES: u32 = 1_000;

/// Most reporters that are told apart; all others are one.
pub const MAX_REPORTERS: usize = 32;

/// Most steps of a ramp.
pub const MAX_STEPS: usize = 8;

/// Shortest and longest time windows.
pub const WINDOWS: core::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(60 * 60);

/// Shortest and longest waits and durations.
pub const WAITS: core::ops::RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_secs(24 * 60 * 60);

/// The calls that a closed circuit is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// Those of the last so long, by reporter.
    Time(Duration),
    /// The last so many, in the order in which they are told.
    Calls(u32),
    /// Those that failed in a row: so many open it.
    Consecutive(u32),
}

/// Calls that take too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowCall {
    /// A call is slow if it takes longer than this.
    pub over: Duration,
    /// The share of slow calls that opens a circuit.
    pub rate: Share,
}

/// How long a circuit stays open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFor {
    /// The first time.
    pub first: Duration,
    /// How much longer each further time since it was closed, in hundredths: 200 is twice as long.
    pub factor_hundredths: u16,
    /// The longest time, before jitter.
    pub max: Duration,
    /// The part of the time that is added at most, by chance.
    pub jitter: Share,
}

/// How a circuit finds out whether it may close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HalfOpen {
    /// Calls that are let through to see.
    pub probes: u32,
    /// Of those at the same time.
    pub max_in_flight: u32,
    /// A probe that is not told of by then has failed.
    pub probe_timeout: Duration,
    /// When a circuit is judged by what is counted, however little that is.
    pub max_duration: Duration,
}

/// The shares of calls that a circuit lets through after it has closed, one after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ramp {
    /// Ascending; none lets all through at once.
    pub steps: ArrayVec<Share, MAX_STEPS>,
    /// How long each lasts.
    pub each: Duration,
}

/// Settings as an operator writes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The calls that a closed circuit is judged by.
    pub window: Window,
    /// The share of failures that opens a circuit.
    pub failure_rate: Share,
    /// The calls that are too slow, if any is.
    pub slow_call: Option<SlowCall>,
    /// Calls without which no rate says anything.
    pub min_calls: u32,
    /// How long a circuit stays open.
    pub open_for: OpenFor,
    /// How it finds out whether it may close.
    pub half_open: HalfOpen,
    /// How it lets calls through after that.
    pub ramp: Ramp,
    /// Reporters that must see the target failing.
    pub min_reporters: u32,
}

impl Default for Settings {
    /// What a circuit does if nobody says otherwise. The README has these beside those of other libraries.
    fn default() -> Self {
        let steps = [2_500, 5_000, 7_500, 10_000].map(Share);
        Self {
            window: Window::Time(Duration::from_secs(10)),
            failure_rate: Share(5_000),
            slow_call: None,
            min_calls: 20,
            open_for: OpenFor {
                first: Duration::from_secs(5),
                factor_hundredths: 200,
                max: Duration::from_secs(60),
                jitter: Share(1_000),
            },
            half_open: HalfOpen {
                probes: 3,
                max_in_flight: 3,
                probe_timeout: Duration::from_secs(10),
                max_duration: Duration::from_secs(60),
            },
            ramp: Ramp { steps: steps.into_iter().collect(), each: Duration::from_secs(5) },
            min_reporters: 2,
        }
    }
}

/// Settings that make sense together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Breaker(Settings);

impl core::ops::Deref for Breaker {
    type Target = Settings;

    fn deref(&self) -> &Settings {
        &self.0
    }
}

/// Settings that no breaker can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum InvalidBreaker {
    /// Too short a window, or too long a one.
    #[error("`window` is {0:?}, outside 100ms to 1 hour")]
    Window(Duration),
    /// Too few calls, or too many.
    #[error("`count` is {0}, outside 1 to {MAX_COUNT} calls")]
    Count(u32),
    /// Too few failures, or too many.
    #[error("`consecutive_failures` is {0}, outside 1 to {MAX_COUNT}")]
    Consecutive(u32),
    /// What needs an order of all calls, which reporters do not have among each other.
    #[error(
        "`{0}` needs `min_reporters: 1`: it goes by the order of calls, and reports of several reporters, \
         each of many calls, have none; use `window` for a fleet"
    )]
    NoOrder(&'static str),
    /// A rate that every call reaches.
    #[error("`{0}` is 0%, which opens a circuit whatever happens; it is above 0% and at most 100%")]
    NoRate(&'static str),
    /// Slow calls are not counted.
    #[error(
        "`slow_call` beside `consecutive_failures`: those count failures only; use `window` or `count`"
    )]
    SlowInARow,
    /// No calls, or too many.
    #[error("`min_calls` is {0}, outside 1 to {MAX_MIN_CALLS}")]
    MinCalls(u32),
    /// A time that is too short, or too long.
    #[error("`{field}` is {value:?}, outside 1ms to 24 hours")]
    Wait {
        /// Which.
        field: &'static str,
        /// What it is.
        value: Duration,
    },
    /// A wait that shrinks, or explodes.
    #[error("`backoff.factor` is {}.{:02}, outside 1 to 10", .0 / 100, .0 % 100)]
    Factor(u16),
    /// A longest wait that is shorter than the first.
    #[error("`backoff.max` is {max:?}, shorter than `open_for`, {first:?}")]
    MaxWait {
        /// The longest.
        max: Duration,
        /// The first.
        first: Duration,
    },
    /// No probes, or too many.
    #[error("`half_open.probes` is {0}, outside 1 to {MAX_PROBES}")]
    Probes(u32),
    /// None at a time, or more than there are.
    #[error("`half_open.max_in_flight` is {0}, outside 1 to `probes`, {1}")]
    InFlight(u32, u32),
    /// It would be judged before the first probe can be.
    #[error(
        "`half_open.max_duration` is {max_duration:?}, shorter than `half_open.probe_timeout`, \
         {probe_timeout:?}: no probe could use its time"
    )]
    MaxDuration {
        /// The longest time in which it is half-open.
        max_duration: Duration,
        /// The time of a probe.
        probe_timeout: Duration,
    },
    /// A ramp that goes down, or nowhere.
    #[error("`ramp.steps` must ascend, above 0%")]
    Steps,
    /// Nobody, or more than are told apart.
    #[error("`min_reporters` is {0}, outside 1 to {MAX_REPORTERS}")]
    MinReporters(u32),
}

impl Breaker {
    /// A breaker of these settings.
    ///
    /// # Errors
    /// If a setting is out of its range, or two do not go together.
    pub fn new(settings: Settings) -> Result<Self, InvalidBreaker> {
        let Settings { window, failure_rate, slow_call, min_calls, open_for, .. } = &settings;
        let Settings { half_open, ramp, min_reporters, .. } = &settings;
        let ordered = match window {
            Window::Time(time) if !WINDOWS.contains(time) => {
                return Err(InvalidBreaker::Window(*time));
            }
            Window::Calls(count) if !(1..=MAX_COUNT).contains(count) => {
                return Err(InvalidBreaker::Count(*count));
            }
            Window::Consecutive(count) if !(1..=MAX_COUNT).contains(count) => {
                return Err(InvalidBreaker::Consecutive(*count));
            }
            Window::Time(_) => None,
            Window::Calls(_) => Some("count"),
            Window::Consecutive(_) => Some("consecutive_failures"),
        };
        if let Some(field) = ordered.filter(|_| *min_reporters != 1) {
            return Err(InvalidBreaker::NoOrder(field));
        }
        if *failure_rate == Share::NONE {
            return Err(InvalidBreaker::NoRate("failure_rate"));
        }
        if let Some(SlowCall { over, rate }) = slow_call {
            if matches!(window, Window::Consecutive(_)) {
                return Err(InvalidBreaker::SlowInARow);
            }
            if *rate == Share::NONE {
                return Err(InvalidBreaker::NoRate("slow_call.rate"));
            }
            wait("slow_call.over", *over)?;
        }
        if !(1..=MAX_MIN_CALLS).contains(min_calls) {
            return Err(InvalidBreaker::MinCalls(*min_calls));
        }
        let OpenFor { first, factor_hundredths, max, .. } = *open_for;
        wait("open_for", first)?;
        wait("backoff.max", max)?;
        if !(100..=1_000).contains(&factor_hundredths) {
            return Err(InvalidBreaker::Factor(factor_hundredths));
        }
        if max < first {
            return Err(InvalidBreaker::MaxWait { max, first });
        }
        let HalfOpen { probes, max_in_flight, probe_timeout, max_duration } = *half_open;
        if !(1..=MAX_PROBES).contains(&probes) {
            return Err(InvalidBreaker::Probes(probes));
        }
        if !(1..=probes).contains(&max_in_flight) {
            return Err(InvalidBreaker::InFlight(max_in_flight, probes));
        }
        wait("half_open.probe_timeout", probe_timeout)?;
        wait("half_open.max_duration", max_duration)?;
        if max_duration < probe_timeout {
            return Err(InvalidBreaker::MaxDuration { max_duration, probe_timeout });
        }
        wait("ramp.each", ramp.each)?;
        let ascends = ramp.steps.windows(2).all(|two| two[0] < two[1]);
        if !ascends || ramp.steps.first() == Some(&Share::NONE) {
            return Err(InvalidBreaker::Steps);
        }
        if *min_reporters < 1 || *min_reporters as usize > MAX_REPORTERS {
            return Err(InvalidBreaker::MinReporters(*min_reporters));
        }
        Ok(Self(settings))
    }

    /// Results of probes that are enough to judge by.
    #[must_use]
    pub fn enough(&self) -> u32 {
        self.half_open.probes.min(self.min_calls)
    }

    /// How long a circuit stays open that was half-open in vain so often since it was closed. `draw` is drawn
    /// anew each time, of all numbers alike.
    #[must_use]
    pub fn wait(&self, attempt: u32, draw: u32) -> Duration {
        let OpenFor { first, factor_hundredths, max, jitter } = self.open_for;
        let max = u128::from(saturating_nanos(max));
        let mut nanos = u128::from(saturating_nanos(first));
        // What grows at all has reached the longest time after some hundreds of steps.
        let grows = factor_hundredths > 100;
        for _ in 0..attempt {
            if nanos >= max || !grows {
                break;
            }
            nanos = nanos * u128::from(factor_hundredths) / 100;
        }
        let nanos = nanos.min(max);
        let added = nanos * u128::from(jitter.0) * u128::from(draw) / (10_000 * (1 << 32));
        Duration::from_nanos(u64::try_from(nanos + added).unwrap_or(u64::MAX))
    }

    /// Whether a call of that latency is slow.
    #[must_use]
    pub fn is_slow(&self, latency: Duration) -> bool {
        self.slow_call.is_some_and(|slow| latency > slow.over)
    }

    /// The share of slow calls that opens a circuit, if one does.
    pub(super) fn slow_rate(&self) -> Option<Share> {
        self.slow_call.map(|slow| slow.rate)
    }
}

fn wait(field: &'static str, value: Duration) -> Result<(), InvalidBreaker> {
    if WAITS.contains(&value) { Ok(()) } else { Err(InvalidBreaker::Wait { field, value }) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn each_further_wait_is_longer_up_to_the_longest() {
        let mut settings = Settings::default();
        settings.open_for.jitter = Share::NONE;
        let breaker = Breaker::new(settings.clone()).unwrap();
        let waits = [0, 1, 2, 3, 4, u32::MAX].map(|attempt| breaker.wait(attempt, u32::MAX));
        assert_eq!(waits, [5, 10, 20, 40, 60, 60].map(Duration::from_secs));

        // One that grows slowly gets there, too, and one that does not grow never does.
        let millis = Duration::from_millis(1);
        for (factor_hundredths, longest) in [(101, SECOND), (100, millis)] {
            let slow =
                OpenFor { first: millis, factor_hundredths, max: SECOND, jitter: Share::NONE };
            let breaker = Breaker::new(Settings { open_for: slow, ..settings.clone() }).unwrap();
            assert_eq!(breaker.wait(u32::MAX, 0), longest);
        }
    }

    #[test]
    fn jitter_adds_at_most_its_part_also_to_the_longest_wait() {
        let breaker = Breaker::new(Settings::default()).unwrap();
        for (attempt, wait) in [(0, SECOND * 5), (9, SECOND * 60)] {
            let drawn = [0, 1 << 31, u32::MAX].map(|draw| breaker.wait(attempt, draw) - wait);
            assert_eq!(drawn[..2], [Duration::ZERO, wait / 20]);
            assert!(drawn[1] < drawn[2] && drawn[2] < wait / 10, "{drawn:?}");
        }
    }

    #[test]
    fn settings_outside_their_range_are_refused() {
        let is_wrong = |change: &dyn Fn(&mut Settings)| {
            let mut settings = Settings::default();
            change(&mut settings);
            Breaker::new(settings).unwrap_err()
        };
        let wait = |field, value| InvalidBreaker::Wait { field, value };
        let zero = Duration::ZERO;
        let slow = |over, rate| Some(SlowCall { over, rate });
        assert_eq!(is_wrong(&|one| one.window = Window::Time(zero)), InvalidBreaker::Window(zero));
        for count in [0, MAX_COUNT + 1] {
            let wrong = is_wrong(&|one| one.window = Window::Calls(count));
            assert_eq!(wrong, InvalidBreaker::Count(count));
            let wrong = is_wrong(&|one| one.window = Window::Consecutive(count));
            assert_eq!(wrong, InvalidBreaker::Consecutive(count));
        }
        let wrong = is_wrong(&|one| one.window = Window::Calls(1));
        assert_eq!(wrong, InvalidBreaker::NoOrder("count"));
        let wrong = is_wrong(&|one| one.window = Window::Consecutive(1));
        assert_eq!(wrong, InvalidBreaker::NoOrder("consecutive_failures"));
        let wrong = is_wrong(&|one| {
            (one.window, one.min_reporters) = (Window::Consecutive(1), 1);
            one.slow_call = slow(SECOND, Share::ALL);
        });
        assert_eq!(wrong, InvalidBreaker::SlowInARow);
        let wrong = is_wrong(&|one| one.failure_rate = Share::NONE);
        assert_eq!(wrong, InvalidBreaker::NoRate("failure_rate"));
        let wrong = is_wrong(&|one| one.slow_call = slow(SECOND, Share::NONE));
        assert_eq!(wrong, InvalidBreaker::NoRate("slow_call.rate"));
        let wrong = is_wrong(&|one| one.slow_call = slow(zero, Share::ALL));
        assert_eq!(wrong, wait("slow_call.over", zero));
        for calls in [0, MAX_MIN_CALLS + 1] {
            assert_eq!(is_wrong(&|one| one.min_calls = calls), InvalidBreaker::MinCalls(calls));
        }
        assert_eq!(is_wrong(&|one| one.open_for.first = zero), wait("open_for", zero));
        assert_eq!(is_wrong(&|one| one.open_for.max = zero), wait("backoff.max", zero));
        for factor in [99, 1_001] {
            let wrong = is_wrong(&|one| one.open_for.factor_hundredths = factor);
            assert_eq!(wrong, InvalidBreaker::Factor(factor));
        }
        let wrong = is_wrong(&|one| one.open_for.max = SECOND);
        assert_eq!(wrong, InvalidBreaker::MaxWait { max: SECOND, first: SECOND * 5 });
        for probes in [0, MAX_PROBES + 1] {
            assert_eq!(
                is_wrong(&|one| one.half_open.probes = probes),
                InvalidBreaker::Probes(probes)
            );
        }
        for most in [0, 4] {
            let wrong = is_wrong(&|one| one.half_open.max_in_flight = most);
            assert_eq!(wrong, InvalidBreaker::InFlight(most, 3));
        }
        let wrong = is_wrong(&|one| one.half_open.probe_timeout = zero);
        assert_eq!(wrong, wait("half_open.probe_timeout", zero));
        let wrong = is_wrong(&|one| one.half_open.max_duration = SECOND);
        let probe_timeout = SECOND * 10;
        assert_eq!(wrong, InvalidBreaker::MaxDuration { max_duration: SECOND, probe_timeout });
        assert_eq!(is_wrong(&|one| one.ramp.each = zero), wait("ramp.each", zero));
        assert_eq!(is_wrong(&|one| one.ramp.steps.swap(0, 1)), InvalidBreaker::Steps);
        assert_eq!(is_wrong(&|one| one.ramp.steps[0] = Share::NONE), InvalidBreaker::Steps);
        for reporters in [0, 33] {
            let wrong = is_wrong(&|one| one.min_reporters = reporters);
            assert_eq!(wrong, InvalidBreaker::MinReporters(reporters));
        }
    }

    #[test]
    fn a_share_is_reached_by_what_is_no_less() {
        let third = Share::new(3_333).unwrap();
        assert!(third.is_reached(1, 3) && !Share::new(3_334).unwrap().is_reached(1, 3));
        assert!(!Share::ALL.is_reached(0, 0) && Share::ALL.is_reached(u64::MAX, u64::MAX));
        assert_eq!(
            (Share::of(1, 3), Share::of(0, 0), Share::of(5, 3)),
            (third, Share::NONE, Share::ALL)
        );
        assert_eq!(Share::new(10_001), None);
    }
}
