//! Where time comes from: the only file of the server that reads a clock.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use fusebox_core::{Moment, Time, Wall, saturating_nanos};

/// Both clocks of a machine.
pub trait Clock: Send + Sync + 'static {
    /// Time since an arbitrary moment, on a clock that never steps.
    fn monotonic(&self) -> Duration;

    /// Time since the Unix epoch, on a clock that people set.
    fn wall(&self) -> Duration;
}

/// The clocks of the operating system.
#[derive(Debug)]
pub struct SystemClock {
    origin: Instant,
}

impl Default for SystemClock {
    fn default() -> Self {
        Self { origin: Instant::now() }
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        self.origin.elapsed()
    }

    fn wall(&self) -> Duration {
        // A clock before 1970 is a clock that nobody set: the epoch is as good a guess as any.
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
    }
}

/// Server time: monotonic, and across restarts it goes on by as much as the wall clock did.
#[derive(Clone)]
pub struct ServerClock {
    clock: Arc<dyn Clock>,
    origin: Duration,
    base: Time,
}

impl ServerClock {
    /// Goes on from the last commit of an earlier life, or from zero.
    ///
    /// A wall clock that went back since then counts as one that stood still: rates are late by that much,
    /// never early.
    pub fn resume(clock: Arc<dyn Clock>, last: Option<Moment>) -> Self {
        let since = |last: Moment| Duration::from_nanos(wall(&*clock).nanos_since(last.wall));
        let base = last.map_or(Time::ZERO, |last| last.time.after(since(last)));
        Self { origin: clock.monotonic(), clock, base }
    }

    /// Server time now.
    pub fn time(&self) -> Time {
        self.base.after(self.clock.monotonic().saturating_sub(self.origin))
    }

    /// This moment on both clocks. Every commit writes it: a restart resumes from there.
    pub fn now(&self) -> Moment {
        Moment { time: self.time(), wall: wall(&*self.clock) }
    }
}

fn wall(clock: &dyn Clock) -> Wall {
    Wall::from_nanos(saturating_nanos(clock.wall()))
}
