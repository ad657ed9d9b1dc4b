//! The permits of one key: who waits for one, and what is asked for them.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use fusebox_core::Time;
use fusebox_proto::v1;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    time,
};

use super::permit::Held;
use crate::{
    Decider, Fallback, Reason, Rejected,
    binding::Binding,
    context::Context,
    exchange::{Answer, Answers, Question, Unanswered, duration, is_mistake, lasts_until},
    owed::Owed,
    settings::{Kind, OnUnreachable},
    telemetry::Event,
};

/// Callers that wait for permits of one key, at most: each has a task that waits.
const LINE_MOST: usize = 10_000;

/// Callers that one message asks for, at most.
const BATCH_MOST: usize = 256;

/// Longest wait that the server takes.
const MAX_WAIT_MOST: Duration = Duration::from_secs(60);

/// A message that waits for nothing, and is not answered after so long, never will be.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);

/// Pause before asking again what no answer came to: a session that broke may not know it yet.
const AGAIN_AFTER: Duration = Duration::from_millis(5);

/// What all keys of a client share.
pub(super) struct Shell {
    pub(super) context: Arc<Context>,
    pub(super) owed: Owed,
    pub(super) closed: AtomicBool,
    /// Counts the states of servers.
    pub(super) truth: AtomicU64,
    /// Whether a session was ever up.
    pub(super) was_linked: AtomicBool,
    /// Permits that are held. It has no limit but those who hold them.
    pub(super) ledger: Mutex<Ledger>,
}

/// Permits by their grants, and of each the key.
pub(super) type Ledger = BTreeMap<String, (Arc<Held>, Arc<Pool>)>;

/// One policy and key.
pub(super) struct Pool {
    pub(super) shell: Arc<Shell>,
    pub(super) context: Arc<Context>,
    pub(super) binding: Arc<Binding>,
    cold: Mutex<Cold>,
    wake: Notify,
}

#[derive(Default)]
struct Cold {
    line: VecDeque<Waiter>,
    running: bool,
    /// Somebody of this process stands in the server's line: who does not wait is denied there.
    stands: bool,
    /// Since when a message is under way that waits for nothing.
    since: Option<Time>,
    /// A call waited in vain for an answer: until one comes, or a session, nobody else does.
    silent: bool,
    denied_at: Option<Time>,
    /// Until when nothing is asked.
    rests: Time,
    /// Permits that are held, whoever gave them.
    held: u64,
    degraded: Option<Decider>,
}

/// What a caller in the line is told.
pub(super) enum Told {
    Allowed(Arc<Held>),
    Denied(Reason, Option<Duration>, Decider),
    Unreachable,
    Closed,
}

struct Waiter {
    until: Time,
    denied: bool,
    /// Under which it is asked for, and asked for again if a session breaks: so it is charged once.
    request_id: String,
    /// How long it was to stand in the server's line when it was asked for under that id: so it is when it is asked
    /// for again, or it would be another question.
    stood_for: Option<Duration>,
    /// It was asked for under that id before.
    repeats: bool,
    tell: oneshot::Sender<Told>,
}

enum Step {
    Ask { waiters: Vec<Waiter>, max_wait: Option<Duration>, truth: u64 },
    Wait(Duration),
    Rest,
}

impl Pool {
    pub(super) fn new(shell: &Arc<Shell>, binding: Arc<Binding>) -> Arc<Self> {
        Arc::new(Self {
            shell: Arc::clone(shell),
            context: Arc::clone(&shell.context),
            binding,
            cold: Mutex::default(),
            wake: Notify::new(),
        })
    }

    pub(super) fn rejection(
        &self,
        reason: Reason,
        retry_after: Option<Duration>,
        decider: Decider,
    ) -> Rejected {
        self.context.telemetry.rejected(decider, reason);
        Rejected::new(&self.binding, reason, retry_after, decider, None)
    }

    /// Waits for a permit until then; `None` is one that was given without the server.
    pub(super) async fn acquire(
        self: &Arc<Self>,
        until: Time,
    ) -> Result<Option<Arc<Held>>, Rejected> {
        let asked = self.context.clock.now();
        let settings = self.binding.settings();
        if settings.is_some_and(|settings| !matches!(settings.kind, Kind::Concurrency(_))) {
            return Err(self.refuse(tonic::Code::InvalidArgument, "it has no permits"));
        }
        match self.stand_in_line(asked, until).await {
            Told::Allowed(held) => {
                self.context.telemetry.decided(Decider::Server);
                Ok(Some(held))
            }
            Told::Denied(reason, wait, decider) => Err(self.rejection(reason, wait, decider)),
            Told::Closed => Err(self.rejection(Reason::Closed, None, Decider::Local)),
            Told::Unreachable => self.decide_alone().map(|()| None),
        }
    }

    async fn stand_in_line(self: &Arc<Self>, asked: Time, until: Time) -> Told {
        let mut told = match self.join(asked, until) {
            Ok(told) => told,
            Err(told) => return told,
        };
        let within = self.context.decide_within;
        let mut next =
            if until > asked { until.min(asked.after(within)) } else { asked.after(within) };
        loop {
            tokio::select! {
                biased;
                said = &mut told.0 => return said.unwrap_or(Told::Closed),
                () = self.context.sleep_until(next) => {}
            }
            match self.overdue(asked, until) {
                Ok(later) => next = later,
                Err(over) => {
                    told.0.close();
                    return told.0.try_recv().unwrap_or(over);
                }
            }
        }
    }

    fn join(self: &Arc<Self>, now: Time, until: Time) -> Result<Awaiting, Told> {
        let mut cold = self.cold.lock();
        if self.shell.closed.load(Ordering::Relaxed) {
            return Err(Told::Closed);
        }
        if self.is_gone(&cold) {
            return Err(Told::Unreachable);
        }
        let waits = until > now;
        if cold.stands && !waits {
            // As the server would say: those who stand in line go first.
            return Err(Told::Denied(Reason::ConcurrencyLimited, None, Decider::Memory));
        }
        if cold.line.len() >= LINE_MOST {
            cold.line.retain(|waiter| !waiter.tell.is_closed());
        }
        if cold.line.len() >= LINE_MOST {
            return Err(Told::Denied(Reason::LineFull, None, Decider::Local));
        }
        let (tell, told) = oneshot::channel();
        let request_id = self.context.random.id();
        // Behind those who wait there is nothing to be had.
        let denied = waits && cold.line.iter().any(|waiter| waiter.denied);
        let waiter = Waiter { until, denied, request_id, stood_for: None, repeats: false, tell };
        cold.line.push_back(waiter);
        self.run(&mut cold);
        drop(cold);
        Ok(Awaiting(told, Arc::clone(self)))
    }

    fn is_gone(&self, cold: &Cold) -> bool {
        cold.silent
            || !self.context.exchange.is_up() && self.shell.was_linked.load(Ordering::Relaxed)
    }

    fn overdue(&self, asked: Time, until: Time) -> Result<Time, Told> {
        let now = self.context.clock.now();
        let within = self.context.decide_within;
        let mut cold = self.cold.lock();
        let was_denied = cold.stands || cold.denied_at.is_some_and(|at| at >= asked);
        let is_up = self.context.exchange.is_up();
        if now >= until && was_denied && is_up {
            return Err(Told::Denied(Reason::ConcurrencyLimited, None, Decider::Server));
        }
        if now < asked.after(within) {
            return Ok(asked.after(within));
        }
        let hangs = cold.since.is_some_and(|since| since.after(within) <= now);
        if now < until && is_up && !hangs {
            return Ok(until.min(now.after(within)));
        }
        cold.silent |= hangs || !is_up;
        Err(Told::Unreachable)
    }

    fn run(self: &Arc<Self>, cold: &mut Cold) {
        if cold.running {
            self.wake.notify_one();
            return;
        }
        cold.running = true;
        let pool = Arc::clone(self);
        self.context.runtime.spawn(async move { pool.ask_while_wanted().await });
    }

    async fn ask_while_wanted(self: Arc<Self>) {
        loop {
            match self.step() {
                Step::Ask { waiters, max_wait, truth } => {
                    let of = |waiter: &Waiter| Question {
                        max_wait,
                        request_id: waiter.request_id.clone(),
                        ..Question::of(&self.binding)
                    };
                    let asked = self.context.exchange.ask(waiters.iter().map(of).collect());
                    let within = ANSWERED_WITHIN + max_wait.unwrap_or_default();
                    let answers = time::timeout(within, asked).await;
                    let answers = answers.unwrap_or(Err(Unanswered::Unreachable));
                    self.answered(waiters, answers, truth);
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

    fn step(&self) -> Step {
        let mut cold = self.cold.lock();
        let now = self.context.clock.now();
        cold.line.retain(|waiter| !waiter.tell.is_closed());
        if self.shell.closed.load(Ordering::Relaxed) {
            cold.line.drain(..).for_each(|waiter| drop(waiter.tell.send(Told::Closed)));
        }
        if cold.line.is_empty() {
            cold.running = false;
            return Step::Rest;
        }
        if !self.context.exchange.is_up() {
            // A session comes, or those who wait have waited for long enough.
            return Step::Wait(self.context.decide_within);
        }
        if cold.rests > now {
            return Step::Wait(AGAIN_AFTER);
        }
        let truth = self.shell.truth.load(Ordering::Relaxed);
        let undecided = |waiter: &Waiter| !waiter.denied;
        if cold.line.iter().any(undecided) {
            let (mut waiters, kept): (Vec<_>, Vec<_>) = cold.line.drain(..).partition(undecided);
            let later = waiters.split_off(waiters.len().min(BATCH_MOST));
            cold.line.extend(kept.into_iter().chain(later));
            cold.since = Some(now);
            return Step::Ask { waiters, max_wait: None, truth };
        }
        let Some(mut head) = cold.line.pop_front() else { return Step::Rest };
        let wait = Duration::from_nanos(head.until.nanos_since(now)).min(MAX_WAIT_MOST);
        let max_wait = *head.stood_for.get_or_insert(wait);
        cold.stands = true;
        Step::Ask { waiters: vec![head], max_wait: Some(max_wait), truth }
    }

    fn answered(
        self: &Arc<Self>,
        mut waiters: Vec<Waiter>,
        answers: Result<Answers, Unanswered>,
        truth: u64,
    ) {
        let now = self.context.clock.now();
        let mut cold = self.cold.lock();
        (cold.stands, cold.since) = (false, None);
        let is_of_truth = truth == self.shell.truth.load(Ordering::Relaxed);
        match answers {
            Ok(answers) if is_of_truth => {
                cold.silent = false;
                self.decided(&mut cold, waiters, answers, truth, now);
                drop(cold);
                self.recover();
            }
            // Under the same ids it is asked for again, once a session is up, by those who still wait then.
            Ok(_) | Err(Unanswered::Unreachable) => {
                cold.rests = now.after(AGAIN_AFTER);
                waiters.iter_mut().for_each(|waiter| waiter.repeats = true);
                put_back(&mut cold.line, waiters);
            }
            Err(Unanswered::Refused { code, message }) => {
                drop(cold);
                let is_mistake = is_mistake(code);
                // That there is no such policy is said once, whoever asks.
                if is_mistake && (code != tonic::Code::NotFound || self.binding.is_refused()) {
                    self.tell_refused(code, &message);
                }
                for waiter in waiters {
                    let _ = waiter.tell.send(if is_mistake {
                        Told::Denied(Reason::Refused, None, Decider::Server)
                    } else {
                        Told::Unreachable
                    });
                }
            }
        }
    }

    fn decided(
        self: &Arc<Self>,
        cold: &mut Cold,
        waiters: Vec<Waiter>,
        answers: Answers,
        truth: u64,
        now: Time,
    ) {
        let sent = answers.sent;
        let mut answers = answers.answers.into_iter();
        let (mut waiting, mut spare) = (Vec::new(), Vec::new());
        for waiter in waiters {
            match answers.next() {
                None => drop(waiter.tell.send(Told::Unreachable)),
                Some(answer) if answer.allowed => {
                    // What repeats an answer may tell of a wait before it was sent.
                    let waited = if waiter.repeats { Duration::ZERO } else { answer.waited };
                    let granted = lasts_until(sent, waited).min(now);
                    let held = self.hold(cold, answer, truth, granted);
                    if held.is_expired(now) {
                        // It was too long on its way, and is not used.
                        self.give_back(cold, Some(&held));
                        cold.rests = now.after(AGAIN_AFTER);
                        waiting.push(self.anew(waiter));
                        continue;
                    }
                    if let Err(Told::Allowed(held)) = waiter.tell.send(Told::Allowed(held)) {
                        spare.push(held);
                    }
                }
                Some(answer) => {
                    cold.denied_at = Some(now);
                    if waiter.until > now && !waiter.tell.is_closed() {
                        waiting.push(Waiter { denied: true, ..self.anew(waiter) });
                        continue;
                    }
                    let reason = Reason::of(answer.verdict.reason);
                    let wait = duration(answer.verdict.retry_after);
                    let _ = waiter.tell.send(Told::Denied(reason, wait, Decider::Server));
                }
            }
        }
        put_back(&mut cold.line, waiting);
        // What was given to somebody who had left is the next one's, or is given back.
        for held in spare {
            self.pass_on(cold, held);
        }
    }

    /// Asked for anew, it is another question.
    fn anew(&self, waiter: Waiter) -> Waiter {
        let request_id = self.context.random.id();
        Waiter { request_id, stood_for: None, repeats: false, ..waiter }
    }

    fn pass_on(&self, cold: &mut Cold, mut held: Arc<Held>) {
        while let Some(waiter) = cold.line.pop_front() {
            match waiter.tell.send(Told::Allowed(held)) {
                Ok(()) => return,
                Err(Told::Allowed(back)) => held = back,
                Err(_) => return,
            }
        }
        self.give_back(cold, Some(&held));
    }

    /// Enters a permit into the ledger.
    fn hold(
        self: &Arc<Self>,
        cold: &mut Cold,
        answer: Answer,
        truth: u64,
        granted: Time,
    ) -> Arc<Held> {
        let life = duration(answer.verdict.expires_in).unwrap_or_default();
        let expires = lasts_until(granted, life);
        let held = Arc::new(Held::new(answer.grant_id, truth, granted, expires));
        cold.held += 1;
        // A policy that only watches gives no grant, and nothing to renew: such a permit is in no ledger.
        if held.grant_id.is_empty() {
            held.lives(granted, Time::from_nanos(u64::MAX));
        } else {
            let entry = (Arc::clone(&held), Arc::clone(self));
            self.shell.ledger.lock().insert(held.grant_id.clone(), entry);
        }
        held
    }

    /// A permit is given back; of one that was given without the server nobody is told.
    pub(super) fn release(&self, held: Option<&Held>) {
        self.give_back(&mut self.cold.lock(), held);
    }

    fn give_back(&self, cold: &mut Cold, held: Option<&Held>) {
        cold.held = cold.held.saturating_sub(1);
        let Some(held) = held.filter(|held| !held.grant_id.is_empty()) else { return };
        self.shell.ledger.lock().remove(&held.grant_id);
        if held.truth == self.shell.truth.load(Ordering::Relaxed) {
            let grant_id = held.grant_id.clone();
            let outcome = v1::GrantOutcome { grant_id, ..v1::GrantOutcome::default() };
            self.shell.owed.push(outcome, &self.context.telemetry);
            self.context.exchange.hurry();
        }
    }

    /// A permit has expired while it was held, which is told once.
    pub(super) fn expire(&self, held: &Held) {
        if !held.expire() {
            return;
        }
        self.context.telemetry.permits_expired.fetch_add(1, Ordering::Relaxed);
        let (policy, key) = (&*self.binding.policy, &*self.binding.key);
        self.context.telemetry.tell(&Event::PermitExpired { policy, key });
    }

    /// Decides without the server, as the policy says.
    fn decide_alone(&self) -> Result<(), Rejected> {
        let fallback = self.context.fallback;
        let mut cold = self.cold.lock();
        let alone = match self.binding.settings() {
            None if fallback == Fallback::Allow => (Decider::Fallback, None),
            None => (Decider::Fallback, Some(Reason::Unreachable)),
            Some(settings) => match (settings.on_unreachable, &settings.kind) {
                _ if settings.shadow => (Decider::Fallback, None),
                (OnUnreachable::Allow, _) => (Decider::Fallback, None),
                (OnUnreachable::Local, Kind::Concurrency(permits)) => {
                    let limit = permits.limit();
                    let share = (limit / u64::from(self.binding.clients())).max(1).min(limit);
                    let full = cold.held >= share;
                    (Decider::Local, full.then_some(Reason::ConcurrencyLimited))
                }
                _ => (Decider::Fallback, Some(Reason::Unreachable)),
            },
        };
        let (decider, denied) = alone;
        let begins = cold.degraded.replace(decider).is_none();
        cold.held += u64::from(denied.is_none());
        drop(cold);
        if begins {
            self.tell_degraded(decider, true);
        }
        match denied {
            Some(reason) => Err(self.rejection(reason, None, decider)),
            None => {
                self.context.telemetry.decided(decider);
                Ok(())
            }
        }
    }

    fn tell_degraded(&self, decider: Decider, begins: bool) {
        let (policy, key) = (&*self.binding.policy, &*self.binding.key);
        self.context.telemetry.tell(&Event::Degraded { policy, key, decider, begins });
    }

    fn recover(&self) {
        let degraded = self.cold.lock().degraded.take();
        if let Some(decider) = degraded {
            self.tell_degraded(decider, false);
        }
    }

    fn refuse(&self, code: tonic::Code, message: &str) -> Rejected {
        self.tell_refused(code, message);
        self.rejection(Reason::Refused, None, Decider::Local)
    }

    fn tell_refused(&self, code: tonic::Code, message: &str) {
        let (policy, key) = (&*self.binding.policy, &*self.binding.key);
        self.context.telemetry.tell(&Event::Refused { policy, key, code, message });
    }

    /// A session is up, or none is any more, or all ends.
    pub(super) fn changed(self: &Arc<Self>, is_up: bool) {
        let mut cold = self.cold.lock();
        cold.silent &= !is_up;
        if !cold.line.is_empty() {
            self.run(&mut cold);
        }
        drop(cold);
        if is_up {
            self.recover();
        }
    }

    /// Whether nothing of it need be remembered.
    pub(super) fn is_idle(&self) -> bool {
        let cold = self.cold.lock();
        cold.held == 0 && !cold.running && cold.degraded.is_none() && cold.line.is_empty()
    }
}

/// Somebody in line. What it is told after it has left is given back.
struct Awaiting(oneshot::Receiver<Told>, Arc<Pool>);

impl Drop for Awaiting {
    fn drop(&mut self) {
        self.0.close();
        if let Ok(Told::Allowed(held)) = self.0.try_recv() {
            let mut cold = self.1.cold.lock();
            self.1.pass_on(&mut cold, held);
        }
    }
}

/// Puts back at the front, in their order, those that were taken from there.
fn put_back(line: &mut VecDeque<Waiter>, waiters: Vec<Waiter>) {
    for waiter in waiters.into_iter().rev() {
        line.push_front(waiter);
    }
}
