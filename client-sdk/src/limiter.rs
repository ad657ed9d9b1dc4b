//! Rates and windows, spent from leases.
//!
//! A [`Limiter`] spends tokens that the server has debited before: a *lease*. While it lasts a decision is one clock
//! reading and one exchange of a word, and the next lease is asked for before this one is used up. What no lease
//! covers is asked for, one message at a time for each key, however many calls wait for it; a denial is remembered
//! for as long as the server says that it holds, at most for the policy's lease time.

mod demand;
mod denial;
mod engine;
mod estimate;
mod key;
mod keys;
mod line;
mod share;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod word;

use std::{
    fmt,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{self, Poll},
    time::Duration,
};

use fusebox_core::Time;
use fusebox_proto::v1;

pub use self::estimate::Estimate;
use self::{
    engine::Denied,
    key::{InLine, Key, Shell},
    keys::{Family, Keys},
    line::Told,
};
use crate::{
    Decider, Reason, Rejected,
    context::Context,
    part::{Draft, Link, Part},
    telemetry::Counts,
};

/// All limiters of a client.
pub(crate) struct Limiters {
    shell: Arc<Shell>,
    keys: Keys,
}

impl Limiters {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self { shell: Arc::new(Shell::new(context)), keys: Keys::default() }
    }

    pub(crate) fn of(self: &Arc<Self>, policy: &str) -> Limiter {
        let family = self.keys.family(policy);
        let key = self.key(&family, "");
        Limiter {
            limiters: Arc::clone(self),
            family,
            key,
            max_wait: Duration::ZERO,
            priority: Priority::Normal,
        }
    }

    fn key(&self, family: &Arc<Family>, key: &str) -> Arc<Key> {
        self.keys.key(&self.shell, family, key)
    }
}

impl Part for Limiters {
    fn tend(&self, now: Time) {
        self.keys.retain(|key| !key.tend(now));
    }

    fn report(&self, draft: &mut Draft, _: Time) {
        if !self.shell.owed.report(draft) {
            self.shell.context.exchange.hurry();
        }
    }

    fn reported(&self, _: &v1::ReportResponse, _: Time) {
        // A lease or estimate that the server knows no more has expired there, and stands as it was charged.
    }

    fn linked(&self, link: Link, _: Time) {
        let replaced = link == Link::Replaced;
        if replaced {
            self.shell.truth.fetch_add(1, Ordering::Relaxed);
            self.shell.owed.forget();
        }
        let is_up = link != Link::Down;
        self.shell.was_linked.fetch_or(is_up, Ordering::Relaxed);
        self.keys.for_each(|key| key.linked(is_up, replaced));
    }

    fn count(&self, counts: &mut Counts) {
        self.keys.for_each(|key| {
            let (memory, rejected) = key.counts();
            counts.memory += memory;
            counts.rejected += rejected;
        });
    }

    fn close(&self, draft: &mut Draft, now: Time) {
        self.shell.closed.store(true, Ordering::Relaxed);
        self.keys.for_each(|key| key.close(now));
        self.shell.owed.report(draft);
    }
}

/// How much a call matters: what a policy reserves for more important ones is left to them.
///
/// It is told to the server with what is asked for. A lease is taken of what even [`Bulk`](Self::Bulk) may have, so it
/// serves all alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Priority {
    /// May use what is reserved for critical calls.
    Critical,
    /// Ordinary calls.
    #[default]
    Normal,
    /// Work that can wait.
    Bulk,
}

impl Priority {
    const fn index(self) -> usize {
        match self {
            Self::Critical => 0,
            Self::Normal => 1,
            Self::Bulk => 2,
        }
    }

    const fn wire(self) -> v1::Priority {
        match self {
            Self::Critical => v1::Priority::Critical,
            Self::Normal => v1::Priority::Normal,
            Self::Bulk => v1::Priority::Bulk,
        }
    }
}

/// A rate or window of one key.
///
/// Clones are the same key, with a wait and a priority of their own; making one allocates nothing. A cost of 0 is
/// allowed always, also after the client was closed, and counts nowhere.
#[derive(Clone)]
pub struct Limiter {
    limiters: Arc<Limiters>,
    family: Arc<Family>,
    key: Arc<Key>,
    max_wait: Duration,
    priority: Priority,
}

impl Limiter {
    /// The same policy for another key: at most 256 bytes, empty at first.
    #[must_use]
    pub fn key(&self, key: &str) -> Self {
        Self { key: self.limiters.key(&self.family, key), ..self.clone() }
    }

    /// How long [`acquire`](Self::acquire) may wait for tokens that are not there yet; nothing at first.
    ///
    /// That is on top of no decision: one that is not made within the client's `decide_within`, because the server
    /// does not answer, is made without it.
    #[must_use]
    pub fn max_wait(self, max_wait: Duration) -> Self {
        Self { max_wait, ..self }
    }

    /// How much its calls matter; [`Priority::Normal`] at first.
    #[must_use]
    pub fn priority(self, priority: Priority) -> Self {
        Self { priority, ..self }
    }

    /// Takes `cost` tokens: from memory where a lease covers them, else by asking.
    ///
    /// Calls that have to wait stand in a line, those of a higher priority first and each after those that came before
    /// it, until there are tokens or `max_wait` is over. Dropping the future leaves the line and costs nothing, with
    /// one exception: what the server grants at that moment serves the next in line, or is lost if it does not do for
    /// that one. It is never spent twice.
    ///
    /// # Errors
    /// If the tokens are denied; if the server cannot be reached and the policy denies then, or this process's share of
    /// it is used up; if there is no such policy, or so many tokens are never possible; or if the client is closed.
    #[inline]
    pub fn acquire(&self, cost: u64) -> impl Future<Output = Result<(), Rejected>> + Send + '_ {
        Acquiring { limiter: self, cost, asking: None }
    }

    /// As [`acquire`](Self::acquire), of another key of the policy: one that is in use is found without allocating.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    pub async fn acquire_for(&self, key: &str, cost: u64) -> Result<(), Rejected> {
        match self.recall_for(key, cost, self.max_wait > Duration::ZERO) {
            Some(decided) => decided,
            None => self.ask(&self.limiters.key(&self.family, key), cost).await,
        }
    }

    /// Takes `cost` tokens from memory, and asks nobody.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire); and with [`Reason::Undecided`] where memory has no answer. Then a lease is asked
    /// for, so that the next try may have one: not of policies that are not leased, which are always undecided.
    #[inline]
    pub fn try_acquire(&self, cost: u64) -> Result<(), Rejected> {
        let now = self.key.clock.now();
        if cost == 0 || self.key.spend(cost, now) {
            return Ok(());
        }
        match self.recall_denial(&self.key, cost, false, now) {
            Some(denied) => Err(denied),
            None => self.miss(&self.key, cost),
        }
    }

    /// As [`try_acquire`](Self::try_acquire), of another key of the policy.
    ///
    /// # Errors
    /// As [`try_acquire`](Self::try_acquire).
    pub fn try_acquire_for(&self, key: &str, cost: u64) -> Result<(), Rejected> {
        match self.recall_for(key, cost, false) {
            Some(decided) => decided,
            None => self.miss(&self.limiters.key(&self.family, key), cost),
        }
    }

    /// Takes `cost` tokens as an estimate, to be settled when it is known what the call did cost.
    ///
    /// The server is always asked, since only it can be owed something; waiting and dropping the future are as of
    /// [`acquire`](Self::acquire), but what is granted to nobody is given back. An estimate of 0 is nobody's, and
    /// settles nothing. One that was decided without the server stands as it is.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    pub async fn estimate(&self, cost: u64) -> Result<Estimate, Rejected> {
        if cost == 0 {
            return Ok(Estimate::none());
        }
        let shell = &self.key.shell;
        let now = shell.context.clock.now();
        if self.max_wait.is_zero()
            && let Some(denied) = self.key.denial(cost, self.priority, now)
        {
            return Err(denied);
        }
        let truth = shell.truth.load(Ordering::Relaxed);
        let grant_id = self.stand_in_line(&self.key, cost, true).await?;
        Ok(Estimate::of(shell, truth, grant_id, cost))
    }

    /// As [`acquire`](Self::acquire), of this key or another, as far as memory goes: `None` where it has no answer. For
    /// layers, whose futures have a name and so cannot hold one that waits.
    #[inline]
    pub(crate) fn acquire_now(&self, key: Option<&str>, cost: u64) -> Option<Result<(), Rejected>> {
        let waits = self.max_wait > Duration::ZERO;
        match key {
            None => self.recall(&self.key, cost, waits),
            Some(key) => self.recall_for(key, cost, waits),
        }
    }

    /// What memory says of another key: one that is in use is not even counted as held meanwhile.
    #[inline]
    fn recall_for(&self, key: &str, cost: u64, waits: bool) -> Option<Result<(), Rejected>> {
        if cost == 0 {
            return Some(Ok(()));
        }
        // One that is not there yet has no lease either.
        self.family.find(key, |key| self.recall(key, cost, waits)).flatten()
    }

    /// What memory says: `None` where it has no answer.
    #[inline]
    fn recall(&self, key: &Arc<Key>, cost: u64, waits: bool) -> Option<Result<(), Rejected>> {
        if cost == 0 {
            return Some(Ok(()));
        }
        let now = key.clock.now();
        if key.spend(cost, now) {
            return Some(Ok(()));
        }
        self.recall_denial(key, cost, waits, now).map(Err)
    }

    /// What memory says where no lease covers it. Not inlined, so that what a lease covers carries nothing of it along.
    #[inline(never)]
    fn recall_denial(&self, key: &Key, cost: u64, waits: bool, now: Time) -> Option<Rejected> {
        if waits { None } else { key.denial(cost, self.priority, now) }
    }

    /// Boxed, so that a caller whom a lease covers carries nothing of it along.
    #[cold]
    fn ask<'a>(&'a self, key: &'a Arc<Key>, cost: u64) -> Asking<'a> {
        Box::pin(async move { self.stand_in_line(key, cost, false).await.map(drop) })
    }

    /// Tells the grant of an estimate, which may be none.
    async fn stand_in_line(
        &self,
        key: &Arc<Key>,
        cost: u64,
        estimated: bool,
    ) -> Result<String, Rejected> {
        let reject = |reason, decider| {
            key.context.telemetry.rejected(decider, reason);
            key.rejection(reason, None, decider)
        };
        let asked = key.context.clock.now();
        if key.shell.is_closed() {
            return Err(reject(Reason::Closed, Decider::Local));
        }
        if !key.is_a_rate(asked) {
            return Err(reject(Reason::Refused, Decider::Local));
        }
        let until = asked.after(self.max_wait);
        let Some(line) = key.join(cost, self.priority, estimated, until, asked) else {
            return Err(reject(Reason::LineFull, Decider::Local));
        };
        let truth = key.shell.truth.load(Ordering::Relaxed);
        match wait(key, line, asked, until).await {
            // The process was stopped meanwhile: what it was given then is another's by now.
            Told::Allowed { grant_id, expires, .. } if expires <= key.context.clock.now() => {
                key.shell.give_back(truth, grant_id);
                key.decide_alone(cost).map(|()| String::new())
            }
            Told::Allowed { decider, grant_id, .. } => {
                key.context.telemetry.decided(decider);
                Ok(grant_id)
            }
            Told::Denied { reason, retry_after } => {
                key.context.telemetry.rejected(Decider::Server, reason);
                Err(key.rejection(reason, retry_after, Decider::Server))
            }
            Told::Unreachable => key.decide_alone(cost).map(|()| String::new()),
            Told::Closed => Err(reject(Reason::Closed, Decider::Local)),
        }
    }

    #[cold]
    fn miss(&self, key: &Arc<Key>, cost: u64) -> Result<(), Rejected> {
        let now = key.context.clock.now();
        let decided = if key.shell.is_closed() {
            Reason::Closed
        } else if !key.is_a_rate(now) {
            Reason::Refused
        } else if key.is_gone(&key.cold.lock()) {
            return key.decide_alone(cost);
        } else {
            key.miss(cost, now);
            Reason::Undecided
        };
        key.context.telemetry.rejected(Decider::Local, decided);
        Err(key.rejection(decided, None, Decider::Local))
    }
}

/// What is waited for where memory has no answer.
type Asking<'a> = Pin<Box<dyn Future<Output = Result<(), Rejected>> + Send + 'a>>;

/// A call that takes tokens. Written out, since the body of an `async fn` cannot be inlined.
struct Acquiring<'a> {
    limiter: &'a Limiter,
    cost: u64,
    asking: Option<Asking<'a>>,
}

impl Future for Acquiring<'_> {
    type Output = Result<(), Rejected>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Self::Output> {
        if self.asking.is_none() {
            let (key, cost) = (&self.limiter.key, self.cost);
            let now = key.clock.now();
            if cost == 0 || key.spend(cost, now) {
                return Poll::Ready(Ok(()));
            }
            return self.begin(now, cx);
        }
        self.wait(cx)
    }
}

impl Acquiring<'_> {
    #[inline(never)]
    fn begin(&mut self, now: Time, cx: &mut task::Context<'_>) -> Poll<Result<(), Rejected>> {
        let Self { limiter, cost, asking } = self;
        let waits = limiter.max_wait > Duration::ZERO;
        if let Some(denied) = limiter.recall_denial(&limiter.key, *cost, waits, now) {
            return Poll::Ready(Err(denied));
        }
        *asking = Some(limiter.ask(&limiter.key, *cost));
        self.wait(cx)
    }

    #[cold]
    fn wait(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), Rejected>> {
        self.asking.as_mut().map_or(Poll::Pending, |asking| asking.as_mut().poll(cx))
    }
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binding = &self.key.binding;
        f.debug_struct("Limiter")
            .field("policy", &binding.policy)
            .field("key", &binding.key)
            .field("max_wait", &self.max_wait)
            .field("priority", &self.priority)
            .finish()
    }
}

/// Waits in line until something is told, or the time is over.
async fn wait(key: &Arc<Key>, mut line: InLine, asked: Time, until: Time) -> Told {
    let within = key.context.decide_within;
    // Whose wait is over is told so then, and who is not decided at all when that is.
    let mut next = if until > asked { until.min(asked.after(within)) } else { asked.after(within) };
    loop {
        tokio::select! {
            biased;
            said = &mut line.told => return said.unwrap_or(Told::Closed),
            () = key.context.sleep_until(next) => {}
        }
        match key.overdue(line.denied, asked, until) {
            Ok(later) => next = later,
            Err(over) => {
                // What was said at this very moment counts.
                line.told.close();
                return line.told.try_recv().unwrap_or(over);
            }
        }
    }
}

impl Key {
    /// What becomes of somebody in line who was told nothing yet: waits on until then, or is told now. Who was known
    /// to be denied when it came is asked for when that is over, so it is denied if its own time is over before.
    fn overdue(&self, known: Option<Denied>, asked: Time, until: Time) -> Result<Time, Told> {
        let now = self.context.clock.now();
        let within = self.context.decide_within;
        let mut cold = self.cold.lock();
        let asking = &mut cold.asking;
        let denied = asking.denied.filter(|denied| denied.at >= asked).or(known);
        if now >= until
            && let Some(denied) = denied
        {
            let wait = denied.until.map(|until| Duration::from_nanos(until.nanos_since(now)));
            return Err(Told::Denied { reason: denied.reason, retry_after: wait });
        }
        if now < asked.after(within) {
            return Ok(asked.after(within));
        }
        let hangs = asking.since.is_some_and(|since| since.after(within) <= now);
        if now < until && !hangs && self.context.exchange.is_up() {
            return Ok(until.min(now.after(within)));
        }
        asking.silent |= hangs || !self.context.exchange.is_up();
        Err(Told::Unreachable)
    }
}
