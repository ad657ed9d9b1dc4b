//! One key: what memory answers, what is asked for, and what is done alone.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fusebox_core::{Limit, Time};
use fusebox_proto::v1;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use super::{
    Priority,
    demand::Demand,
    denial::Denial,
    engine::Denied,
    line::{Line, Told, Waiter},
    share::Share,
    word::Word,
};
use crate::{
    Clock, Decider, Fallback, Reason, Rejected,
    binding::Binding,
    context::Context,
    owed::Owed,
    settings::{Kind, OnUnreachable, Settings},
    telemetry::Event,
};

/// Time to live of leases of a policy that was not told of yet.
const LEASE_TIME: Duration = Duration::from_secs(1);

/// A lease is given back so long before it expires, if some of it is left: the way to the server takes time, and the
/// client's part is tended each 50 ms. Of a short lease it is a quarter of its life.
const BACK_AHEAD: Duration = Duration::from_millis(75);

/// A key that nobody called for so long leaves memory, if it has nothing left.
const IDLE: Duration = Duration::from_secs(1);

/// What all keys of a client share.
pub(super) struct Shell {
    pub(super) context: Arc<Context>,
    pub(super) owed: Owed,
    pub(super) closed: AtomicBool,
    /// Counts the states of servers: what was granted by an earlier one is worth nothing.
    pub(super) truth: AtomicU64,
    /// Whether a session was ever up. Before, callers wait for it; later they know that it is gone.
    pub(super) was_linked: AtomicBool,
}

impl Shell {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            owed: Owed::default(),
            closed: AtomicBool::new(false),
            truth: AtomicU64::new(0),
            was_linked: AtomicBool::new(false),
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// How a grant of that truth ended is told with the next report, if it is still the truth.
    pub(super) fn settle(&self, truth: u64, outcome: v1::GrantOutcome) {
        if truth == self.truth.load(Ordering::Relaxed) && !outcome.grant_id.is_empty() {
            self.owed.push(outcome, &self.context.telemetry);
        }
    }

    /// An estimate that nobody uses is given back.
    pub(super) fn give_back(&self, truth: u64, grant_id: String) {
        let actual_cost = Some(0);
        self.settle(truth, v1::GrantOutcome { grant_id, actual_cost, ..Default::default() });
    }
}

/// One policy and key.
pub(super) struct Key {
    hot: Hot,
    /// That of the context, beside what is read with it.
    pub(super) clock: Clock,
    pub(super) shell: Arc<Shell>,
    pub(super) context: Arc<Context>,
    pub(super) binding: Arc<Binding>,
    /// Whether it may lease; one that there was no room for asks each time.
    leases: bool,
    pub(super) cold: Mutex<Cold>,
    pub(super) wake: Notify,
}

/// What every call touches, in cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Hot {
    /// Two leases, so that one that comes ahead of need neither makes the other live longer nor shorter.
    words: [Word; 2],
    /// Which of them is spent.
    spending: AtomicUsize,
    /// With so few tokens left the next lease is asked for; 0 if it has been.
    low: AtomicU64,
    /// Tokens that calls took beyond the first one of each: what was spent less this is how many calls there were. So
    /// a call that takes one token counts nothing, which would take as long as its decision.
    beyond: AtomicU64,
    /// By priority.
    denials: [Denial; 3],
    /// Calls that a denial rejected.
    rejected: AtomicU64,
}

/// What calls touch that memory has no answer for.
#[derive(Default)]
pub(super) struct Cold {
    leases: [Option<Lease>; 2],
    /// Tokens that calls spent of leases that are over.
    spent: u64,
    pub(super) line: Line,
    pub(super) demand: Demand,
    /// Whether a task asks for this key.
    pub(super) running: bool,
    /// Whether a lease is wanted.
    pub(super) refill: bool,
    pub(super) asking: super::engine::Asking,
    /// When somebody wanted something last.
    used: Time,
    /// How it is decided without the server, while it is.
    degraded: Option<Decider>,
    share: Share,
}

/// A lease, beside what is left of it.
#[derive(Debug)]
struct Lease {
    grant_id: String,
    granted: u64,
    /// Those of it that were put at hand; the others went to who stood in line.
    put: u64,
    /// Tokens that demand knows of.
    counted: u64,
    /// When it was asked for, and when it expires.
    sent: Time,
    expires: Time,
    truth: u64,
}

impl Lease {
    fn expires_within(&self, part: u32, most: Duration, now: Time) -> bool {
        let life = Duration::from_nanos(self.expires.nanos_since(self.sent));
        self.expires <= now.after(most.min(life / part))
    }
}

impl Key {
    pub(super) fn new(shell: &Arc<Shell>, binding: Arc<Binding>, leases: bool) -> Arc<Self> {
        let used = shell.context.clock.now();
        Arc::new(Self {
            hot: Hot::default(),
            clock: shell.context.clock.clone(),
            shell: Arc::clone(shell),
            context: Arc::clone(&shell.context),
            binding,
            leases,
            cold: Mutex::new(Cold { used, ..Cold::default() }),
            wake: Notify::new(),
        })
    }

    /// Whether a lease covers `cost` tokens, at least 1: then they are spent.
    #[inline]
    pub(super) fn spend(self: &Arc<Self>, cost: u64, now: Time) -> bool {
        let spending = self.hot.spending.load(Ordering::Relaxed) & 1;
        match self.hot.words[spending].take(cost, now) {
            Some(left) => {
                if cost > 1 {
                    self.hot.beyond.fetch_add(cost - 1, Ordering::Relaxed);
                }
                if left <= self.hot.low.load(Ordering::Relaxed) {
                    self.runs_low(left, now);
                }
                true
            }
            None => self.spend_reserve(spending, cost, now),
        }
    }

    /// The same of the other lease, which is the one to spend from then on.
    #[cold]
    fn spend_reserve(self: &Arc<Self>, spending: usize, cost: u64, now: Time) -> bool {
        if self.hot.words[spending ^ 1].take(cost, now).is_none() {
            return false;
        }
        self.hot.beyond.fetch_add(cost - 1, Ordering::Relaxed);
        let mut cold = self.cold.lock();
        if self.hot.spending.load(Ordering::Relaxed) & 1 == spending {
            self.retire(&mut cold, spending, now);
            self.turn(&mut cold);
        }
        cold.refill = true;
        self.run(&mut cold);
        true
    }

    #[cold]
    fn runs_low(self: &Arc<Self>, left: u64, now: Time) {
        if self.hot.low.swap(0, Ordering::Relaxed) == 0 && left > 0 {
            return;
        }
        let mut cold = self.cold.lock();
        let spending = self.hot.spending.load(Ordering::Relaxed) & 1;
        if self.hot.words[spending].left() == 0 {
            self.retire(&mut cold, spending, now);
            self.turn(&mut cold);
        }
        cold.refill = true;
        self.run(&mut cold);
    }

    /// Why `cost` tokens are denied now, if that is remembered.
    #[inline]
    pub(super) fn denial(&self, cost: u64, priority: Priority, now: Time) -> Option<Rejected> {
        let (reason, left) = self.hot.denials[priority.index()].of(cost, now)?;
        if self.shell.is_closed() {
            return None;
        }
        self.hot.rejected.fetch_add(1, Ordering::Relaxed);
        let retry_after = (!matches!(reason, Reason::Blocked | Reason::Refused)).then_some(left);
        Some(self.rejection(reason, retry_after, Decider::Memory))
    }

    /// What is remembered of that, for somebody who waits all the same.
    fn denied(&self, cost: u64, priority: Priority, now: Time) -> Option<Denied> {
        let (reason, left) = self.hot.denials[priority.index()].of(cost, now)?;
        Some(Denied { at: now, reason, until: Some(now.after(left)) })
    }

    /// A denial of `priority`, and of those below it.
    pub(super) fn remember_denial(
        &self,
        cost: u64,
        priority: Priority,
        reason: Reason,
        until: Time,
        now: Time,
    ) {
        for denial in &self.hot.denials[priority.index()..] {
            let left = Duration::from_nanos(until.nanos_since(now));
            // What is known holds for more costs, and for as long.
            if denial.of(cost, now).is_none_or(|(_, known)| known < left) {
                denial.remember(cost, reason, until);
            }
        }
    }

    pub(super) fn rejection(
        &self,
        reason: Reason,
        retry_after: Option<Duration>,
        decider: Decider,
    ) -> Rejected {
        Rejected::new(&self.binding, reason, retry_after, decider, None)
    }

    /// Lets a caller into the line, and has the server asked; `None` if there is no room in it.
    pub(super) fn join(
        self: &Arc<Self>,
        cost: u64,
        priority: Priority,
        estimated: bool,
        until: Time,
        now: Time,
    ) -> Option<InLine> {
        let (tell, told) = oneshot::channel();
        let truth = self.shell.truth.load(Ordering::Relaxed);
        let denied = if until > now { self.denied(cost, priority, now) } else { None };
        let is_denied = denied.is_some();
        let in_line = InLine { told, denied, shell: Arc::clone(&self.shell), truth };
        let mut cold = self.cold.lock();
        cold.used = now;
        cold.demand.add(cost, now);
        if self.is_gone(&cold) {
            drop(cold);
            let _ = tell.send(Told::Unreachable);
            return Some(in_line);
        }
        let waiter = Waiter { cost, priority, estimated, until, denied: is_denied, tell };
        let joined = cold.line.join(waiter);
        if joined.is_ok() {
            self.run(&mut cold);
        }
        drop(cold);
        joined.ok().map(|()| in_line)
    }

    /// A caller that did not wait wanted as much.
    pub(super) fn miss(self: &Arc<Self>, cost: u64, now: Time) {
        let mut cold = self.cold.lock();
        cold.used = now;
        cold.demand.add(cost, now);
        cold.refill = true;
        self.run(&mut cold);
    }

    /// Whether it is known that there is nobody to ask.
    pub(super) fn is_gone(&self, cold: &Cold) -> bool {
        cold.asking.silent
            || !self.context.exchange.is_up() && self.shell.was_linked.load(Ordering::Relaxed)
    }

    pub(super) fn lease_time(&self) -> Duration {
        self.binding.settings().map_or(LEASE_TIME, |settings| settings.lease_time)
    }

    /// Whether there is a place for one more lease, of a policy that can be leased as far as is known.
    pub(super) fn may_lease(&self, cold: &Cold) -> bool {
        let leasable = |settings: Arc<Settings>| match &settings.kind {
            Kind::Rate(limits) => {
                !settings.shadow
                    && !limits.iter().any(|limit| matches!(limit, Limit::SlidingWindow(_)))
            }
            Kind::Calendar => !settings.shadow,
            _ => false,
        };
        self.leases
            && cold.leases.iter().any(Option::is_none)
            && self.binding.settings().is_none_or(leasable)
    }

    /// Has what is left of a lease at hand from now on, in the place that is free.
    pub(super) fn install(
        &self,
        cold: &mut Cold,
        granted: (String, u64),
        left: u64,
        (sent, expires): (Time, Time),
        truth: u64,
    ) {
        let (grant_id, granted) = granted;
        let spending = self.hot.spending.load(Ordering::Relaxed) & 1;
        let free = [spending, spending ^ 1].into_iter().find(|slot| cold.leases[*slot].is_none());
        let now = self.context.clock.now();
        let counted = granted - left;
        let lease = Lease { grant_id, granted, put: left, counted, sent, expires, truth };
        match free {
            Some(slot) if left > 0 && expires > now && !self.shell.is_closed() => {
                self.hot.words[slot].put(left, expires);
                cold.leases[slot] = Some(lease);
                self.turn(cold);
            }
            // Nobody has seen it, so what is left is certainly unspent.
            _ => self.settle(lease, left),
        }
    }

    /// Ends a lease: takes what is left of it, and gives it back.
    fn retire(&self, cold: &mut Cold, slot: usize, now: Time) {
        let Some(lease) = cold.leases[slot].take() else { return };
        let left = self.hot.words[slot].clear();
        cold.spent += lease.put - left;
        let spent = (lease.granted - left).saturating_sub(lease.counted);
        if spent > 0 {
            (cold.used, _) = (now, cold.demand.add(spent, now));
        }
        self.settle(lease, left);
    }

    fn settle(&self, lease: Lease, left: u64) {
        let Lease { grant_id, granted, truth, .. } = lease;
        let outcome =
            v1::GrantOutcome { grant_id, lease_returned: left, ..v1::GrantOutcome::default() };
        self.shell.settle(truth, outcome);
        if self.is_much(granted) {
            self.context.exchange.hurry();
        }
    }

    /// Whether a bucket would notice for a beat that such a lease is over: what is out does not refill.
    fn is_much(&self, granted: u64) -> bool {
        let Some(settings) = self.binding.settings() else { return true };
        let Kind::Rate(limits) = &settings.kind else { return false };
        let mut bursts = limits.iter().filter_map(|limit| match limit {
            Limit::TokenBucket(bucket) => Some(bucket.burst()),
            _ => None,
        });
        // A beat is some twentieth of a second, so two dozen leases of 64 to a burst are still little of it.
        bursts.any(|burst| granted >= burst / 64)
    }

    /// Spends the other lease if the one that was spent is over.
    fn turn(&self, cold: &mut Cold) {
        let spending = self.hot.spending.load(Ordering::Relaxed) & 1;
        let other = spending ^ 1;
        let reserve = cold.leases[other].is_some();
        let (spending, low) = match (&cold.leases[spending], reserve) {
            (None, true) => (other, self.hot.words[other].left() / 2),
            (Some(_), true) | (None, false) => (spending, 0),
            (Some(_), false) => (spending, self.hot.words[spending].left() / 2),
        };
        self.hot.spending.store(spending, Ordering::Relaxed);
        self.hot.low.store(low, Ordering::Relaxed);
    }

    /// Tells demand what was spent of leases.
    pub(super) fn count_spent(&self, cold: &mut Cold, now: Time) {
        let Cold { leases, demand, used, .. } = cold;
        for (lease, word) in leases.iter_mut().zip(&self.hot.words) {
            let Some(lease) = lease else { continue };
            let spent = lease.granted - word.left().min(lease.granted);
            if spent > lease.counted {
                demand.add(spent - lease.counted, now);
                (lease.counted, *used) = (spent, now);
            }
        }
    }

    /// Looks after what time does to leases; tells whether the key may leave memory.
    pub(super) fn tend(self: &Arc<Self>, now: Time) -> bool {
        let mut cold = self.cold.lock();
        self.count_spent(&mut cold, now);
        let unused = Duration::from_nanos(now.nanos_since(cold.used));
        let idle = unused >= self.lease_time();
        let mut soon = false;
        for slot in [0, 1] {
            let Some(lease) = &cold.leases[slot] else { continue };
            // The next one is asked for a beat or two before this one is given back.
            soon |= lease.expires_within(2, 2 * BACK_AHEAD, now);
            if idle || lease.expires_within(4, BACK_AHEAD, now) {
                self.retire(&mut cold, slot, now);
                self.turn(&mut cold);
            }
        }
        if soon && !idle && cold.leases.iter().any(Option::is_none) {
            cold.refill = true;
            self.run(&mut cold);
        }
        unused >= IDLE
            && idle
            && !cold.running
            && cold.degraded.is_none()
            && cold.leases.iter().all(Option::is_none)
            && cold.line.head().is_none()
            && cold.share.is_full(self.context.clock.moment())
    }

    /// Decides without the server, as the policy says.
    ///
    /// # Errors
    /// If the policy denies then, or this process's share is used up.
    pub(super) fn decide_alone(&self, cost: u64) -> Result<(), Rejected> {
        let settings = self.binding.settings();
        let mut cold = self.cold.lock();
        let (decider, decided) = self.alone(&mut cold.share, settings.as_deref(), cost);
        let begins = cold.degraded.replace(decider).is_none();
        drop(cold);
        if begins {
            self.tell_degraded(decider, true);
        }
        match decided {
            Ok(()) => {
                self.context.telemetry.decided(decider);
                Ok(())
            }
            Err((reason, retry_after)) => {
                self.context.telemetry.rejected(decider, reason);
                Err(self.rejection(reason, retry_after, decider))
            }
        }
    }

    fn alone(&self, share: &mut Share, settings: Option<&Settings>, cost: u64) -> Alone {
        let deny = (Decider::Fallback, Err((Reason::Unreachable, None)));
        let allow = (Decider::Fallback, Ok(()));
        let Some(settings) = settings else {
            return if self.context.fallback == Fallback::Allow { allow } else { deny };
        };
        match (settings.on_unreachable, &settings.kind) {
            // What only watches denies nothing.
            _ if settings.shadow => allow,
            (OnUnreachable::Allow, _) => allow,
            (OnUnreachable::Local, Kind::Rate(limits)) => {
                let now = self.context.clock.moment();
                let decided = share.spend(cost, limits, self.binding.clients(), now);
                (Decider::Local, decided.map_err(|wait| (Reason::RateLimited, wait)))
            }
            (OnUnreachable::Deny | OnUnreachable::Local, _) => deny,
        }
    }

    fn tell_degraded(&self, decider: Decider, begins: bool) {
        let (policy, key) = (&*self.binding.policy, &*self.binding.key);
        self.context.telemetry.tell(&Event::Degraded { policy, key, decider, begins });
    }

    /// The server decides again.
    pub(super) fn recover(&self) {
        let degraded = self.cold.lock().degraded.take();
        if let Some(decider) = degraded {
            self.tell_degraded(decider, false);
        }
    }

    /// A session is up, or none is any more; `replaced` if it is another truth than before.
    pub(super) fn linked(self: &Arc<Self>, is_up: bool, replaced: bool) {
        let mut cold = self.cold.lock();
        if replaced {
            // Counted as any other; nobody is told of their end, since it is another truth.
            let now = self.context.clock.now();
            [0, 1].into_iter().for_each(|slot| self.retire(&mut cold, slot, now));
            self.hot.denials.iter().for_each(Denial::forget);
            self.turn(&mut cold);
        }
        if is_up {
            cold.asking.silent = false;
        }
        if cold.running || cold.line.head().is_some() {
            self.run(&mut cold);
        }
        drop(cold);
        if is_up {
            self.recover();
        }
    }

    /// Gives back all that is left, and tells the line that it is over.
    pub(super) fn close(self: &Arc<Self>, now: Time) {
        let mut cold = self.cold.lock();
        for slot in [0, 1] {
            self.retire(&mut cold, slot, now);
        }
        if cold.line.head().is_some() {
            self.run(&mut cold);
        }
    }

    /// Calls that memory decided, and those of them that were rejected.
    pub(super) fn counts(&self) -> (u64, u64) {
        let rejected = self.hot.rejected.load(Ordering::Relaxed);
        let cold = self.cold.lock();
        let leases = cold.leases.iter().zip(&self.hot.words);
        let spent = leases.filter_map(|(lease, word)| Some(lease.as_ref()?.put - word.left()));
        let spent = cold.spent + spent.sum::<u64>();
        // Of a call at this very moment one may be told without the other.
        let allowed = spent.saturating_sub(self.hot.beyond.load(Ordering::Relaxed));
        (allowed + rejected, rejected)
    }
}

/// A place in the line. An estimate that is told to somebody who has left is given back.
pub(super) struct InLine {
    pub(super) told: oneshot::Receiver<Told>,
    /// As which it was known to be denied when it came.
    pub(super) denied: Option<Denied>,
    shell: Arc<Shell>,
    truth: u64,
}

impl Drop for InLine {
    fn drop(&mut self) {
        self.told.close();
        if let Ok(Told::Allowed { grant_id, .. }) = self.told.try_recv() {
            let actual_cost = Some(0);
            let outcome = v1::GrantOutcome { grant_id, actual_cost, ..v1::GrantOutcome::default() };
            self.shell.settle(self.truth, outcome);
        }
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // What it counted stays counted.
        let (memory, rejected) = self.counts();
        self.context.telemetry.memory.fetch_add(memory, Ordering::Relaxed);
        self.context.telemetry.rejected.fetch_add(rejected, Ordering::Relaxed);
    }
}

/// Who decided alone, and what.
type Alone = (Decider, Result<(), (Reason, Option<Duration>)>);
