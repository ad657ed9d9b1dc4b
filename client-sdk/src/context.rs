//! What every part of a client is given.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fusebox_core::Time;
use tokio::{
    runtime::Handle,
    time::{Sleep, sleep},
};

use crate::{Clock, exchange::Exchange, settings::Fallback, telemetry::Telemetry};

/// What every part of a client is given: all that it knows of the world outside.
pub(crate) struct Context {
    pub(crate) clock: Clock,
    /// Where tasks of the client run, whoever calls it.
    pub(crate) runtime: Handle,
    pub(crate) exchange: Arc<dyn Exchange>,
    /// How long a call waits for a decision that memory cannot make.
    pub(crate) decide_within: Duration,
    /// What is done of policies that the server has not told of yet, while it cannot be reached.
    pub(crate) fallback: Fallback,
    pub(crate) telemetry: Telemetry,
    pub(crate) random: Random,
}

impl Context {
    /// Returns at that time of the clock. Whoever waits may be on no runtime, or on one without timers.
    pub(crate) fn sleep_until(&self, at: Time) -> Sleep {
        let _entered = self.runtime.enter();
        sleep(Duration::from_nanos(at.nanos_since(self.clock.now())))
    }
}

/// Numbers for jitter: spread well, secret from nobody.
pub(crate) struct Random(AtomicU64);

impl Random {
    pub(crate) fn of(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// The next number: `SplitMix64` (Steele, Lea, Flood 2014), so that threads share it without a lock.
    pub(crate) fn next(&self) -> u64 {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.0.fetch_add(GOLDEN, Ordering::Relaxed).wrapping_add(GOLDEN);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A name of 128 bits.
    pub(crate) fn id(&self) -> String {
        format!("{:016x}{:016x}", self.next(), self.next())
    }

    /// Some time from nothing to `most`.
    pub(crate) fn up_to(&self, most: Duration) -> Duration {
        // 32 bits are fine enough for any wait.
        let share = u32::try_from(self.next() >> 32).unwrap_or(u32::MAX);
        most.mul_f64(f64::from(share) / f64::from(u32::MAX))
    }
}
