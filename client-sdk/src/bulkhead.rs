//! Calls at the same time, in this process and in the fleet.
//!
//! A permit of the fleet is the server's word, and is asked for each time: unlike tokens, permits cannot be had ahead of
//! need without keeping others from calls that nobody makes. So there is no `try_acquire`. Of each key one message is
//! under way, however many calls wait for it.

mod permit;
mod pool;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use fusebox_core::Time;
use fusebox_proto::v1;
use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub use self::permit::Permit;
use self::pool::{Pool, Shell};
use crate::{
    Decider, Reason, Rejected,
    context::Context,
    exchange::{duration, lasts_until},
    owed::Owed,
    part::{Draft, Link, Part},
};

/// Keys of a client that share what is asked for, while there is a handle or a permit of them. Past it each handle asks
/// by itself.
const KEYS_MOST: usize = 100_000;

/// All bulkheads of a client.
pub(crate) struct Bulkheads {
    shell: Arc<Shell>,
    pools: Mutex<Pools>,
}

/// Pools by policy and key.
type Pools = BTreeMap<(Arc<str>, Arc<str>), Arc<Pool>>;

impl Bulkheads {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        let shell = Arc::new(Shell {
            context,
            owed: Owed::default(),
            closed: AtomicBool::new(false),
            truth: AtomicU64::new(0),
            was_linked: AtomicBool::new(false),
            ledger: Mutex::default(),
        });
        Self { shell, pools: Mutex::default() }
    }

    pub(crate) fn of(self: &Arc<Self>, policy: &str) -> Bulkhead {
        Bulkhead {
            bulkheads: Arc::clone(self),
            pool: self.pool(policy, ""),
            max_wait: Duration::ZERO,
            local: None,
            on_expiry: OnExpiry::Continue,
        }
    }

    fn pool(&self, policy: &str, key: &str) -> Arc<Pool> {
        let mut pools = self.pools.lock();
        let name = (Arc::<str>::from(policy), Arc::<str>::from(key));
        if let Some(pool) = pools.get(&name) {
            return Arc::clone(pool);
        }
        let pool = Pool::new(&self.shell, self.shell.context.exchange.bind(policy, key));
        if pools.len() < KEYS_MOST {
            pools.insert(name, Arc::clone(&pool));
        }
        pool
    }

    fn changed(&self, is_up: bool) {
        let pools: Vec<_> = self.pools.lock().values().map(Arc::clone).collect();
        pools.iter().for_each(|pool| pool.changed(is_up));
    }

    /// Ends what expired of the ledger: all of it, or what its time is over of.
    fn expire(&self, is_over: impl Fn(&permit::Held) -> bool) {
        let mut over = Vec::new();
        self.shell.ledger.lock().retain(|_, (held, pool)| {
            let is_over = is_over(held);
            if is_over {
                over.push((Arc::clone(held), Arc::clone(pool)));
            }
            !is_over
        });
        over.iter().for_each(|(held, pool)| pool.expire(held));
    }
}

impl Part for Bulkheads {
    fn tend(&self, now: Time) {
        self.expire(|held| held.is_expired(now));
        // Nobody comes by another while they are locked.
        self.pools.lock().retain(|_, pool| Arc::strong_count(pool) > 1 || !pool.is_idle());
    }

    fn report(&self, draft: &mut Draft, now: Time) {
        if !self.shell.owed.report(draft) {
            self.shell.context.exchange.hurry();
        }
        let room = draft.room_for_renewals();
        let ledger = self.shell.ledger.lock();
        let due = ledger.iter().filter(|(_, (held, _))| held.is_due(now));
        draft.renew_grant_ids.extend(due.take(room).map(|(grant_id, _)| grant_id.clone()));
    }

    fn reported(&self, response: &v1::ReportResponse, sent: Time) {
        for renewal in &response.renewals {
            let held = self.shell.ledger.lock().get(&renewal.grant_id).cloned();
            let Some((held, pool)) = held else { continue };
            let life = duration(renewal.expires_in).unwrap_or_default();
            if life.is_zero() {
                self.shell.ledger.lock().remove(&renewal.grant_id);
                pool.expire(&held);
            } else {
                held.lives(sent, lasts_until(sent, life));
            }
        }
    }

    fn linked(&self, link: Link, _: Time) {
        let is_up = link != Link::Down;
        self.shell.was_linked.fetch_or(is_up, Ordering::Relaxed);
        match link {
            Link::Replaced => {
                self.shell.truth.fetch_add(1, Ordering::Relaxed);
                self.shell.owed.forget();
                self.expire(|_| true);
            }
            Link::Restarted => {
                self.shell.ledger.lock().values().for_each(|(held, _)| held.attest());
                self.shell.context.exchange.hurry();
            }
            Link::Down | Link::Resumed => {}
        }
        self.changed(is_up);
    }

    fn close(&self, draft: &mut Draft, _: Time) {
        self.shell.closed.store(true, Ordering::Relaxed);
        self.shell.owed.report(draft);
        self.changed(false);
    }
}

/// What becomes of a call whose permit expired.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnExpiry {
    /// It goes on, over the limit by itself.
    #[default]
    Continue,
    /// It is dropped.
    Cancel,
}

/// Why [`Bulkhead::call`] has no outcome.
#[derive(Clone, Debug, Error)]
pub enum CallError {
    /// There was no permit, and the call was not made.
    #[error("{0}")]
    Rejected(#[from] Rejected),
    /// The permit expired, and the call was dropped where it was; what it has done stays done.
    #[error("the permit expired, and the call was cancelled")]
    Expired,
}

/// The permits of one key.
///
/// Clones are the same key, and share their [`local_limit`](Self::local_limit).
#[derive(Clone)]
pub struct Bulkhead {
    bulkheads: Arc<Bulkheads>,
    pool: Arc<Pool>,
    max_wait: Duration,
    local: Option<(usize, Arc<Semaphore>)>,
    on_expiry: OnExpiry,
}

impl Bulkhead {
    /// The same policy for another key, which has a local limit of its own, of as many.
    #[must_use]
    pub fn key(&self, key: &str) -> Self {
        let pool = self.bulkheads.pool(&self.pool.binding.policy, key);
        let local = self.local.as_ref().map(|(most, _)| (*most, Arc::new(Semaphore::new(*most))));
        Self { pool, local, ..self.clone() }
    }

    /// How long [`acquire`](Self::acquire) may wait for a permit; not at all at first.
    #[must_use]
    pub fn max_wait(self, max_wait: Duration) -> Self {
        Self { max_wait, ..self }
    }

    /// At most so many at a time by this handle and its clones, whatever the fleet has left, and whether or not there is
    /// a server. Who waits for it has it in the order of coming.
    #[must_use]
    pub fn local_limit(self, most: usize) -> Self {
        let most = most.min(Semaphore::MAX_PERMITS);
        Self { local: Some((most, Arc::new(Semaphore::new(most)))), ..self }
    }

    /// What becomes of a call whose permit expired, where the call is this crate's: [`call`](Self::call) and the layer.
    #[must_use]
    pub fn on_expiry(self, on_expiry: OnExpiry) -> Self {
        Self { on_expiry, ..self }
    }

    /// Takes a permit: a local one first, if there is a limit of them, then one of the fleet.
    ///
    /// Those who wait have it in the order of coming; the first of them stands in the server's line for all of this
    /// process. Dropping the future leaves the line; a permit that is granted at that moment goes to the next, or is
    /// given back. While the server cannot be reached nobody waits for the fleet's: the policy decides, and of a share
    /// of this process all permits count that it holds.
    ///
    /// # Errors
    /// If all permits are held until `max_wait` is over; if the server cannot be reached and the policy denies then, or
    /// this process's share is used up; if there is no such policy, or it is not of permits; or if the client is closed.
    pub async fn acquire(&self) -> Result<Permit, Rejected> {
        let until = self.pool.context.clock.now().after(self.max_wait);
        let local = self.local_permit(until).await?;
        let held = self.pool.acquire(until).await?;
        Ok(Permit { pool: Arc::clone(&self.pool), held, _local: local })
    }

    async fn local_permit(&self, until: Time) -> Result<Option<OwnedSemaphorePermit>, Rejected> {
        let Some((_, local)) = &self.local else { return Ok(None) };
        let full = || {
            let (reason, decider) = (Reason::ConcurrencyLimited, Decider::Local);
            self.pool.rejection(reason, None, decider)
        };
        if let Ok(permit) = Arc::clone(local).try_acquire_owned() {
            return Ok(Some(permit));
        }
        if self.max_wait.is_zero() {
            return Err(full());
        }
        tokio::select! {
            biased;
            permit = Arc::clone(local).acquire_owned() => permit.map(Some).map_err(|_| full()),
            () = self.pool.context.sleep_until(until) => Err(full()),
        }
    }

    /// Makes a call while holding a permit.
    ///
    /// Dropping the future drops the call, and gives the permit back.
    ///
    /// # Errors
    /// If there is no permit, as [`acquire`](Self::acquire), or it expires and [`OnExpiry::Cancel`] says what then.
    pub async fn call<F: Future>(&self, call: F) -> Result<F::Output, CallError> {
        let permit = self.acquire().await?;
        if !self.cancels_on_expiry() {
            return Ok(call.await);
        }
        tokio::select! {
            biased;
            outcome = call => Ok(outcome),
            () = permit.expired() => Err(CallError::Expired),
        }
    }

    /// Whether a call that outlives its permit is to be cancelled.
    pub(crate) fn cancels_on_expiry(&self) -> bool {
        self.on_expiry == OnExpiry::Cancel
    }
}

impl fmt::Debug for Bulkhead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bulkhead")
            .field("policy", &self.pool.binding.policy)
            .field("key", &self.pool.binding.key)
            .field("max_wait", &self.max_wait)
            .field("local_limit", &self.local.as_ref().map(|(most, _)| most))
            .field("on_expiry", &self.on_expiry)
            .finish()
    }
}
