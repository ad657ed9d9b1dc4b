//! How one key asks the server: one message at a time, whoever waits for it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use fusebox_core::Time;
use fusebox_proto::v1;
use tokio::time;

use super::{
    Priority,
    key::{Cold, Key},
    line::{Told, Waiter},
    word::TOKENS_MOST,
};
use crate::{
    Decider, Reason,
    exchange::{Answer, Answers, Question, Unanswered, duration, is_mistake, lasts_until},
    settings::Kind,
    telemetry::Event,
};

/// Callers that one message asks for, at most: a message takes no longer to decide than to carry.
const BATCH_MOST: usize = 256;

/// Callers that a message asks for at least where the last one brought denials: a limit that has more is noticed.
const BATCH_LEAST: usize = 8;

/// Pause between messages while tokens are scarce: what flows meanwhile is shared out in one message instead of many,
/// and a call that was to be decided waits for no longer than this on top. So a bucket of 10,000/s that is used up costs
/// no more than a message for each 200 decisions, and its tokens lie idle for a fiftieth of a second at most.
const PACE: Duration = Duration::from_millis(20);

/// Answers without a lease in a row, after which none is asked for for a while.
const FRUITLESS_MOST: u32 = 3;

/// The longest such while.
const REST_MOST: Duration = Duration::from_millis(500);

/// A denial of which nobody knows when it ends is asked for again after it: others wait, or calls give back.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// How long a mistake is remembered: a policy may be made meanwhile.
const REFUSED_FOR: Duration = Duration::from_secs(1);

/// A message that has not been answered after so long never will be: far longer than a session lives that says nothing.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);

/// What a key remembers of asking.
#[derive(Debug)]
pub(super) struct Asking {
    /// Callers that the next message may ask for.
    batch: usize,
    /// When the last message was sent.
    sent: Time,
    /// Since when a message is under way, if one is.
    pub(super) since: Option<Time>,
    /// When an answer came last.
    pub(super) answered: Option<Time>,
    /// The last one brought less than was wanted, though the policy is leased.
    scarce: bool,
    /// When there were tokens last to be leased.
    leased: Option<Time>,
    fruitless: u32,
    /// Until when no lease is asked for.
    rests: Time,
    /// The last denial: when it came, and from when on it is asked for again.
    pub(super) denied: Option<Denied>,
    /// When those who are denied are asked for again.
    again: Time,
    /// A call waited in vain for the answer of a message: until one comes, or a session, nobody else does.
    pub(super) silent: bool,
}

/// A denial, for those who wait on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Denied {
    pub(super) at: Time,
    pub(super) reason: Reason,
    /// When the same may be allowed, if that is known.
    pub(super) until: Option<Time>,
}

impl Default for Asking {
    fn default() -> Self {
        Self {
            batch: BATCH_MOST,
            sent: Time::ZERO,
            since: None,
            answered: None,
            scarce: false,
            leased: None,
            fruitless: 0,
            rests: Time::ZERO,
            denied: None,
            again: Time::ZERO,
            silent: false,
        }
    }
}

/// What there is to do.
enum Step {
    /// To ask.
    Ask(Batch),
    /// To wait, for so long or until something happens.
    Wait(Duration),
    /// Nothing, until somebody comes.
    Rest,
}

/// Who is asked for in one message.
struct Batch {
    waiters: Vec<Waiter>,
    /// Tokens wanted ahead, which are the last question; 0 is none.
    lease: u64,
    truth: u64,
}

impl Key {
    /// Has a task ask, unless one does.
    pub(super) fn run(self: &Arc<Self>, cold: &mut Cold) {
        if cold.running {
            self.wake.notify_one();
            return;
        }
        cold.running = true;
        let key = Arc::clone(self);
        self.context.runtime.spawn(async move { key.ask_while_wanted().await });
    }

    async fn ask_while_wanted(self: Arc<Self>) {
        loop {
            let step = self.step(self.context.clock.now());
            match step {
                Step::Ask(batch) => {
                    let asked = self.context.exchange.ask(self.questions(&batch));
                    let answers = time::timeout(ANSWERED_WITHIN, asked).await;
                    self.answered(batch, answers.unwrap_or(Err(Unanswered::Unreachable)));
                }
                Step::Wait(wait) => tokio::select! {
                    biased;
                    () = self.wake.notified() => {}
                    () = time::sleep(wait) => {}
                },
                Step::Rest => return,
            }
        }
    }

    fn step(&self, now: Time) -> Step {
        let mut cold = self.cold.lock();
        let cold = &mut *cold;
        let is_up = self.context.exchange.is_up();
        if self.shell.is_closed() {
            tell_all(cold, || Told::Closed);
        } else if self.is_gone(cold) {
            cold.refill = false;
            tell_all(cold, || Told::Unreachable);
        }
        let waits = cold.line.head().is_some();
        if !is_up && waits {
            // A session comes, or the time is over within which they want a decision.
            return Step::Wait(self.context.decide_within);
        }
        let leases = is_up && self.may_lease(cold) && now >= cold.asking.rests;
        let refills = cold.refill && leases;
        if !waits && !refills {
            (cold.refill, cold.running) = (false, false);
            return Step::Rest;
        }
        let asking = &cold.asking;
        let denied_until = asking.denied.and_then(|denied| denied.until).unwrap_or(asking.again);
        let undecided = waits && cold.line.has_undecided();
        let mut from = if asking.scarce { asking.sent.after(PACE) } else { now };
        if waits && !undecided {
            from = from.max(asking.again);
        }
        if from > now {
            return Step::Wait(Duration::from_nanos(from.nanos_since(now)));
        }
        // Who is denied is not asked for ahead of time, but goes first when it has come.
        let waiters = cold.line.take(asking.batch, undecided && now < denied_until);
        self.count_spent(cold, now);
        let lease =
            if leases { cold.demand.ahead(self.lease_time(), now).min(TOKENS_MOST) } else { 0 };
        cold.refill = false;
        (cold.asking.sent, cold.asking.since) = (now, Some(now));
        Step::Ask(Batch { waiters, lease, truth: self.shell.truth.load(Ordering::Relaxed) })
    }

    fn questions(&self, batch: &Batch) -> Vec<Question> {
        let of = |waiter: &Waiter| Question {
            cost: waiter.cost,
            estimated: waiter.estimated,
            priority: waiter.priority.wire(),
            ..Question::of(&self.binding)
        };
        let lease = Question { cost: 0, lease: batch.lease, ..Question::of(&self.binding) };
        let lease = (batch.lease > 0).then_some(lease);
        batch.waiters.iter().map(of).chain(lease).collect()
    }

    fn answered(&self, batch: Batch, answers: Result<Answers, Unanswered>) {
        let now = self.context.clock.now();
        self.cold.lock().asking.since = None;
        let is_of_truth = batch.truth == self.shell.truth.load(Ordering::Relaxed);
        match answers {
            Ok(answers) if is_of_truth => {
                self.decided(batch, answers, now);
                self.recover();
            }
            Ok(_) | Err(Unanswered::Unreachable) => self.unanswered(batch, now),
            Err(Unanswered::Refused { code, message }) if is_mistake(code) => {
                self.refused(batch, (code, &message), now);
            }
            Err(Unanswered::Refused { .. }) => self.unanswered(batch, now),
        }
    }

    /// Nobody decided: each does without, as the policy says.
    fn unanswered(&self, batch: Batch, now: Time) {
        // What could not be answered now is not asked for at once again.
        self.cold.lock().asking.rests = now.after(ASK_AGAIN);
        for waiter in batch.waiters {
            let _ = waiter.tell.send(Told::Unreachable);
        }
    }

    /// One of them asks for what cannot be: which, is found by asking for fewer.
    fn refused(&self, batch: Batch, (code, message): (tonic::Code, &str), now: Time) {
        let mut cold = self.cold.lock();
        cold.asking.answered = Some(now);
        cold.asking.silent = false;
        let mut waiters = batch.waiters;
        if waiters.len() > 1 {
            // Each time by half, and without a pause: the others wait for no fault of theirs.
            (cold.asking.batch, cold.asking.scarce) = (waiters.len() / 2, false);
            cold.line.put_back(waiters);
            return;
        }
        cold.asking.rests = now.after(REFUSED_FOR);
        drop(cold);
        // What is wrong with one may be its cost; what is wrong with none is wrong with all.
        let waiter = waiters.pop();
        let is_cost = code == tonic::Code::InvalidArgument;
        let cost = waiter.as_ref().filter(|_| is_cost).map_or(0, |waiter| waiter.cost);
        let priority = waiter.as_ref().map_or(Priority::Critical, |waiter| waiter.priority);
        self.remember_denial(cost, priority, Reason::Refused, now.after(REFUSED_FOR), now);
        // That there is no such policy is said once, whoever asks.
        if code != tonic::Code::NotFound || self.binding.is_refused() {
            let (policy, key) = (&*self.binding.policy, &*self.binding.key);
            self.context.telemetry.tell(&Event::Refused { policy, key, code, message });
        }
        if let Some(waiter) = waiter {
            let told = Told::Denied { reason: Reason::Refused, retry_after: None };
            let _ = waiter.tell.send(told);
        }
    }

    fn decided(&self, batch: Batch, answers: Answers, now: Time) {
        let mut guard = self.cold.lock();
        let cold = &mut *guard;
        (cold.asking.answered, cold.asking.silent) = (Some(now), false);
        let sent = answers.sent;
        let mut answers = answers.answers.into_iter();
        let (mut waiting, mut denied, mut spare) = (Vec::new(), 0, 0_u64);
        let asked = batch.waiters.len();
        // Tokens are spent soon after their charge, or not at all: as long as a lease would live, or as long as callers
        // wait for such an answer.
        let expires = lasts_until(sent, self.lease_time().max(self.context.decide_within));
        for waiter in batch.waiters {
            match answers.next() {
                None => {
                    let _ = waiter.tell.send(Told::Unreachable);
                }
                Some(answer) if answer.allowed => {
                    spare = spare.saturating_add(self.allow(waiter, answer, batch.truth, expires));
                }
                Some(answer) => {
                    let first = denied == 0;
                    denied += 1;
                    waiting.extend(self.deny(cold, waiter, &answer.verdict, first, now));
                }
            }
        }
        cold.line.put_back(waiting);
        let allowed = asked - denied;
        cold.asking.batch = if denied > 0 {
            (2 * allowed).clamp(BATCH_LEAST, BATCH_MOST)
        } else {
            (2 * cold.asking.batch).min(BATCH_MOST)
        };
        // What was given to somebody who had left is the next one's. What nobody can use is lost.
        if expires > now {
            serve(cold, &mut spare, Decider::Server, expires);
        }
        let leased = answers.next().filter(|_| batch.lease > 0);
        if let Some(answer) = leased {
            self.lease(cold, answer, sent, (batch.truth, batch.lease), now);
        }
        // Where nothing is leased, waiting brings no more than asking at once.
        let is_leased = cold.asking.leased.is_some_and(|at| at.after(REST_MOST) > now);
        cold.asking.scarce = is_leased && (cold.asking.scarce || denied > 0);
    }

    /// Tells somebody that it may go ahead; tells how many tokens are left over, if it is gone.
    fn allow(&self, waiter: Waiter, answer: Answer, truth: u64, expires: Time) -> u64 {
        let grant_id = answer.grant_id;
        if !waiter.estimated {
            // Nothing is owed of tokens that are spent; a grant of a policy that is no rate is not kept.
            let outcome = v1::GrantOutcome { grant_id, ..v1::GrantOutcome::default() };
            self.shell.settle(truth, outcome);
            let told = Told::Allowed { decider: Decider::Server, grant_id: String::new(), expires };
            return if waiter.tell.send(told).is_ok() { 0 } else { waiter.cost };
        }
        let told = Told::Allowed { decider: Decider::Server, grant_id, expires };
        if let Err(Told::Allowed { grant_id, .. }) = waiter.tell.send(told) {
            self.shell.give_back(truth, grant_id);
        }
        0
    }

    /// Remembers a denial, and tells who waits no longer; who does is given back.
    fn deny(
        &self,
        cold: &mut Cold,
        waiter: Waiter,
        verdict: &v1::Verdict,
        first: bool,
        now: Time,
    ) -> Option<Waiter> {
        let reason = Reason::of(verdict.reason);
        let retry_after = duration(verdict.retry_after);
        let lease_time = self.lease_time();
        let holds = match (retry_after, reason) {
            (Some(wait), _) => wait.min(lease_time),
            (None, Reason::Blocked) => lease_time,
            (None, _) => ASK_AGAIN.min(lease_time),
        };
        let until = now.after(holds);
        self.remember_denial(waiter.cost, waiter.priority, reason, until, now);
        if first {
            // Those who were told the same are not to ask at the same moment, or who is nearest is always first.
            let jitter = self.context.random.up_to((holds / 4).max(PACE / 4));
            cold.asking.again = until.after(jitter);
            let known = retry_after.map(|wait| now.after(wait));
            cold.asking.denied = Some(Denied { at: now, reason, until: known });
        }
        if waiter.until > now && !waiter.tell.is_closed() {
            return Some(Waiter { denied: true, ..waiter });
        }
        let _ = waiter.tell.send(Told::Denied { reason, retry_after });
        None
    }

    /// Shares out a lease: those in line first.
    fn lease(
        &self,
        cold: &mut Cold,
        answer: Answer,
        sent: Time,
        (truth, wanted): (u64, u64),
        now: Time,
    ) {
        let leased = answer.verdict.leased;
        cold.asking.scarce = leased < wanted / 2 + 1;
        if leased == 0 {
            cold.asking.fruitless += 1;
            if cold.asking.fruitless >= FRUITLESS_MOST {
                cold.asking.rests = now.after(self.lease_time().min(REST_MOST));
            }
            let outcome =
                v1::GrantOutcome { grant_id: answer.grant_id, ..v1::GrantOutcome::default() };
            self.shell.settle(truth, outcome);
            return;
        }
        (cold.asking.fruitless, cold.asking.leased) = (0, Some(now));
        let life = duration(answer.verdict.expires_in).unwrap_or_default();
        let expires = lasts_until(sent, life);
        let mut left = leased.min(TOKENS_MOST);
        if expires > now {
            serve(cold, &mut left, Decider::Memory, expires);
        }
        self.install(cold, (answer.grant_id, leased), left, (sent, expires), truth);
    }

    /// Whether that policy can be asked for tokens at all, as far as is known; a mistake is told once in a while.
    pub(super) fn is_a_rate(&self, now: Time) -> bool {
        let Some(settings) = self.binding.settings() else { return true };
        if matches!(settings.kind, Kind::Rate(_) | Kind::Calendar) {
            return true;
        }
        let until = now.after(REFUSED_FOR);
        self.remember_denial(0, Priority::Critical, Reason::Refused, until, now);
        let (policy, key) = (&*self.binding.policy, &*self.binding.key);
        let (code, message) = (tonic::Code::InvalidArgument, "it is neither a rate nor a window");
        self.context.telemetry.tell(&Event::Refused { policy, key, code, message });
        false
    }
}

/// Gives tokens to those in line, in their order, while there are enough for the first of them.
fn serve(cold: &mut Cold, tokens: &mut u64, decider: Decider, expires: Time) {
    while let Some(waiter) = cold.line.take_head(|head| !head.estimated && head.cost <= *tokens) {
        let told = Told::Allowed { decider, grant_id: String::new(), expires };
        if waiter.tell.send(told).is_ok() {
            *tokens -= waiter.cost;
        }
    }
}

fn tell_all(cold: &mut Cold, told: impl Fn() -> Told) {
    while let Some(waiter) = cold.line.take_head(|_| true) {
        let _ = waiter.tell.send(told());
    }
}
