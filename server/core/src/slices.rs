//! Counts by slice of time: what limiters remember that forget bit by bit.

use core::{num::NonZeroU64, time::Duration};

use crate::Time;

/// Slices of one period. Each is four bytes of every cell; with one more a sliding window had 1.8% more to
/// use.
pub const SLICES: usize = 6;

/// The counts of a period and of the slice that has begun, of 32 bits each, so that a cell of them is no larger
/// than that of a token bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slices<T> {
    /// By slice, the newest first.
    pub counts: [T; SLICES + 1],
    /// Number of the newest slice since [`Time::ZERO`]: the high and the low half.
    newest: [u32; 2],
}

impl<T: Copy + Default> Slices<T> {
    /// `counts` of the slice of that number and those before it.
    #[must_use]
    pub const fn new(counts: [T; SLICES + 1], newest: u64) -> Self {
        #[allow(clippy::cast_possible_truncation)] // two halves
        Self { counts, newest: [(newest >> 32) as u32, newest as u32] }
    }

    /// Nothing was counted yet in the slice of that number, nor before it.
    pub(crate) fn empty(newest: u64) -> Self {
        Self::new([T::default(); SLICES + 1], newest)
    }

    /// Number of the newest slice since [`Time::ZERO`].
    #[must_use]
    pub const fn newest(&self) -> u64 {
        ((self.newest[0] as u64) << 32) | self.newest[1] as u64
    }

    /// As they are once the slice of that number has begun; unchanged if they are already further.
    pub(crate) fn slid(self, to: u64) -> Self {
        let mut slid = Self::empty(to.max(self.newest()));
        let ahead = usize::try_from(slid.newest() - self.newest()).unwrap_or(usize::MAX);
        let kept = (SLICES + 1).saturating_sub(ahead);
        slid.counts[SLICES + 1 - kept..].copy_from_slice(&self.counts[..kept]);
        slid
    }
}

/// Server time, cut into slices of a [`SLICES`]th of a period.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    slice_nanos: NonZeroU64,
}

impl Cut {
    /// For a period of so many nanoseconds. Rounded up, so that the slices of a period are never shorter than it.
    pub(crate) fn of(period_nanos: NonZeroU64) -> Self {
        let nanos = period_nanos.get().div_ceil(SLICES as u64);
        Self { slice_nanos: NonZeroU64::new(nanos).unwrap_or(NonZeroU64::MIN) }
    }

    /// Number of the slice that `time` is in.
    pub(crate) fn slice(self, time: Time) -> u64 {
        time.as_nanos() / self.slice_nanos
    }

    /// When the slice of that number begins.
    pub(crate) fn begin(self, slice: u64) -> Time {
        Time::from_nanos(slice.saturating_mul(self.slice_nanos.get()))
    }

    /// Time until what has just been counted is forgotten, at most.
    pub(crate) fn all(self) -> Duration {
        Duration::from_nanos(self.slice_nanos.get().saturating_mul(SLICES as u64 + 1))
    }

    /// The slices of a cell as they are now.
    pub(crate) fn current<T: Copy + Default>(
        self,
        state: Option<Slices<T>>,
        now: Time,
    ) -> Slices<T> {
        let slice = self.slice(now);
        state.map_or(Slices::empty(slice), |state| state.slid(slice))
    }

    /// The slices to go on with after a restart. A state from the future would leave only once its time comes; a
    /// key must not wait for that.
    pub(crate) fn revived<T: Copy + Default>(self, state: Slices<T>, now: Time) -> Slices<T> {
        let slice = self.slice(now);
        if state.newest() > slice { Slices::new(state.counts, slice) } else { state.slid(slice) }
    }

    /// Time until the slice of that age is forgotten: when the newest is so much further.
    pub(crate) fn until_gone<T: Copy + Default>(
        self,
        state: &Slices<T>,
        age: usize,
        now: Time,
    ) -> Duration {
        let gone = state.newest().saturating_add((SLICES + 1 - age) as u64);
        Duration::from_nanos(self.begin(gone).nanos_since(now))
    }
}
