//! Server time.

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

/// `duration` in nanoseconds, at most `u64::MAX` (584 years).
#[must_use]
pub fn saturating_nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
