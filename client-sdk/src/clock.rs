//! Where time comes from: the only file of the client that reads a clock.

use std::{fmt, sync::Arc, time::Duration};

use fusebox_core::{Moment, Time, Wall, saturating_nanos};

/// A clock that never steps, and the one that people set.
#[derive(Clone)]
pub struct Clock(Source);

#[derive(Clone)]
enum Source {
    Machine { clock: quanta::Clock, origin: u64 },
    Given(Arc<dyn Fn() -> Duration + Send + Sync>),
}

impl Default for Clock {
    /// The clocks of the machine; a reading takes some nanoseconds.
    fn default() -> Self {
        let clock = quanta::Clock::new();
        let origin = clock.raw();
        Self(Source::Machine { clock, origin })
    }
}

impl Clock {
    /// A clock that tells what `now` does: time since some moment, never less than before. For simulations; the
    /// runtime's timers must go by the same time.
    pub fn given(now: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self(Source::Given(Arc::new(now)))
    }

    /// Time since the clock began.
    #[inline]
    pub(crate) fn now(&self) -> Time {
        Time::from_nanos(match &self.0 {
            Source::Machine { clock, origin } => clock.delta_as_nanos(*origin, clock.raw()),
            Source::Given(now) => given(&**now),
        })
    }

    /// This moment on both clocks, for windows that begin where people's do.
    pub(crate) fn moment(&self) -> Moment {
        let wall = match &self.0 {
            // A clock before 1970 is a clock that nobody set.
            Source::Machine { .. } => std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap_or_default(),
            Source::Given(now) => now(),
        };
        Moment { time: self.now(), wall: Wall::from_nanos(saturating_nanos(wall)) }
    }
}

/// Kept apart: callers have the machine's clock within them.
#[cold]
fn given(now: &(dyn Fn() -> Duration + Send + Sync)) -> u64 {
    saturating_nanos(now())
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Source::Machine { .. } => "Clock::default()",
            Source::Given(_) => "Clock::given(..)",
        })
    }
}

/// When a timer of the runtime is over that is set now.
pub(crate) fn deadline(wait: Duration) -> tokio::time::Instant {
    tokio::time::Instant::now() + wait
}

#[cfg(test)]
impl Clock {
    /// The clock of the runtime's timers, which tests pause.
    pub(crate) fn of_the_runtime() -> Self {
        let origin = tokio::time::Instant::now();
        Self::given(move || origin.elapsed())
    }
}
