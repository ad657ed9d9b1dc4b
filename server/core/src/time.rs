//! Server time, and the wall clock.

use core::time::Duration;

/// A point of server time, in nanoseconds since the data directory's first start.
///
/// Server time is monotonic and goes on where it was after a restart; it never steps with the wall clock.
/// 64 bits of nanoseconds last 584 years.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(u64);

impl Time {
    /// The data directory's first start.
    pub const ZERO: Self = Self(0);

    /// The point so many nanoseconds after [`Time::ZERO`].
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since [`Time::ZERO`].
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Nanoseconds from `earlier` to this point; 0 if `earlier` is in fact later.
    ///
    /// Two callers read the clock before they meet at a cell's lock, so "earlier" may be.
    #[must_use]
    pub const fn nanos_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The point `wait` after this one, at most the end of time.
    #[must_use]
    pub fn after(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(saturating_nanos(wait)))
    }
}

/// What the wall clock shows, in nanoseconds since the Unix epoch: up to the year 2554.
///
/// It may step, in both directions. Windows that people know by the calendar are counted in it, and nothing
/// else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Wall(u64);

impl Wall {
    /// So many nanoseconds after the Unix epoch.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the Unix epoch.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Nanoseconds from `earlier` to this point; 0 if `earlier` is in fact later.
    #[must_use]
    pub const fn nanos_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The point `wait` after this one, at most the end of time.
    #[must_use]
    pub fn after(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(saturating_nanos(wait)))
    }
}

/// One moment on both clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// Server time.
    pub time: Time,
    /// The wall clock.
    pub wall: Wall,
}

impl Moment {
    /// The first moment of a data directory, at the Unix epoch.
    pub const ZERO: Self = Self { time: Time::ZERO, wall: Wall(0) };

    /// The moment at which both clocks show so many nanoseconds.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self { time: Time(nanos), wall: Wall(nanos) }
    }

    /// The later of both, on each clock.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self { time: self.time.max(other.time), wall: self.wall.max(other.wall) }
    }

    /// Server time when the wall clock will show, or did show, `wall`, if it does not step.
    #[must_use]
    pub fn time_at(self, wall: Wall) -> Time {
        let ahead = Duration::from_nanos(wall.nanos_since(self.wall));
        Time(self.time.after(ahead).0.saturating_sub(self.wall.nanos_since(wall)))
    }
}

/// `duration` in nanoseconds, at most `u64::MAX` (584 years).
#[must_use]
pub fn saturating_nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
