//! A permit: held by a guard, renewed by reports.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use fusebox_core::Time;
use tokio::sync::{Notify, OwnedSemaphorePermit};

use super::pool::Pool;

/// A permit that the server gave, as the guard and the reports see it.
pub(super) struct Held {
    pub(super) grant_id: String,
    pub(super) truth: u64,
    /// In nanoseconds of the client's clock.
    expires: AtomicU64,
    /// When it is to be renewed next.
    renew: AtomicU64,
    /// Whether it was told that it expired.
    told: AtomicBool,
    expired: Notify,
}

impl Held {
    pub(super) fn new(grant_id: String, truth: u64, sent: Time, expires: Time) -> Self {
        let held = Self {
            grant_id,
            truth,
            expires: AtomicU64::new(0),
            renew: AtomicU64::new(0),
            told: AtomicBool::new(false),
            expired: Notify::new(),
        };
        held.lives(sent, expires);
        held
    }

    /// It was asked for, or renewed, at `sent`: a third of its life later it is renewed again, so that two renewals may
    /// be lost.
    pub(super) fn lives(&self, sent: Time, expires: Time) {
        let third = Duration::from_nanos(expires.nanos_since(sent)) / 3;
        self.renew.store(sent.after(third).as_nanos(), Ordering::Relaxed);
        self.expires.store(expires.as_nanos(), Ordering::Relaxed);
    }

    /// It is to be renewed at once.
    pub(super) fn attest(&self) {
        self.renew.store(0, Ordering::Relaxed);
    }

    pub(super) fn is_due(&self, now: Time) -> bool {
        self.renew.load(Ordering::Relaxed) <= now.as_nanos() && !self.is_expired(now)
    }

    pub(super) fn is_expired(&self, now: Time) -> bool {
        self.expires.load(Ordering::Relaxed) <= now.as_nanos()
    }

    /// It is worth nothing from now on; tells whether nobody has been told of that.
    pub(super) fn expire(&self) -> bool {
        self.expires.store(0, Ordering::Relaxed);
        let first = !self.told.swap(true, Ordering::Relaxed);
        self.expired.notify_waiters();
        first
    }
}

/// A permit, given back when dropped: with the next report, which dropping does not wait for.
///
/// It is renewed for as long as it is held. If that fails until its time to live is over (the server cannot be reached,
/// the process was stopped) it has *expired*: the server may give its place to another, so its holder is over the limit
/// by itself. That is told as an event, and counted; what becomes of the call is up to
/// [`OnExpiry`](super::OnExpiry), or to you.
#[must_use = "a permit that is dropped is given back"]
pub struct Permit {
    pub(super) pool: Arc<Pool>,
    /// `None` if it was given without the server, and so never expires.
    pub(super) held: Option<Arc<Held>>,
    /// Its place in this process.
    pub(super) _local: Option<OwnedSemaphorePermit>,
}

impl Permit {
    /// Whether its time to live is over without a renewal. Once it has expired it stays so.
    pub fn is_expired(&self) -> bool {
        let now = self.pool.context.clock.now();
        let Some(held) = self.held.as_ref().filter(|held| held.is_expired(now)) else {
            return false;
        };
        self.pool.expire(held);
        true
    }

    /// Returns when it has expired; never if it is renewed all along. Dropping the future changes nothing.
    pub async fn expired(&self) {
        let Some(held) = &self.held else { return std::future::pending().await };
        loop {
            let told = held.expired.notified();
            tokio::pin!(told);
            told.as_mut().enable();
            if self.is_expired() {
                return;
            }
            let expires = Time::from_nanos(held.expires.load(Ordering::Relaxed));
            tokio::select! {
                biased;
                () = told => {}
                () = self.pool.context.sleep_until(expires) => {}
            }
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.pool.release(self.held.as_deref());
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grant_id = self.held.as_ref().map(|held| &held.grant_id);
        f.debug_struct("Permit").field("grant_id", &grant_id).finish_non_exhaustive()
    }
}
