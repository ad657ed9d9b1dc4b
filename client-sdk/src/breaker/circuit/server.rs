//! What the server says of a circuit, and what it is asked.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use fusebox_core::{
    Time,
    circuit::{self, Generation},
};
use fusebox_proto::v1;
use tokio::sync::oneshot;

use super::{Changes, Circuit, Decided, Inner, LEAST_LIFE, Passed};
use crate::{
    Decider, Reason, Rejected,
    breaker::{
        news::News,
        permit::{Pass, Permit},
        probe::{Grant, Held, Offer},
        shared::{Change, State, Told},
    },
    context::Context,
    exchange::{Answers, Question, Unanswered, duration, lasts_until},
};

/// The least time between two asks for a probe that got none: a circuit is half-open for seconds, and each client that
/// has calls for it asks.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// How long an answer is waited for that its caller did not wait for: longer than a server takes, and shorter than
/// most probes live.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// How long the server is not told of a circuit that it has no room for.
const NOT_SHARED_FOR: Duration = Duration::from_secs(60);

impl Circuit {
    /// The server is asked for a probe, by one call at a time.
    pub(super) fn ask(self: &Arc<Self>, inner: &mut Inner, waits: bool) -> Passed {
        if inner.is_asking || self.home.is_closed() {
            return inner.refuse_by_shared();
        }
        inner.is_asking = true;
        let (waiter, offer) = oneshot::channel();
        let context = Arc::clone(&self.home.context);
        let request_id = format!("{:016x}{:016x}", context.random.next(), context.random.next());
        let question = Question { request_id, ..Question::of(&self.binding) };
        let waiter = waits.then_some(waiter);
        context.runtime.spawn(Arc::clone(self).await_answer(question, waiter));
        if waits { Passed::Asked(offer) } else { inner.refuse_by_shared() }
    }

    /// Waits for the answer: with its caller for as long as that does, then without.
    async fn await_answer(
        self: Arc<Self>,
        question: Question,
        waiter: Option<oneshot::Sender<Offer>>,
    ) {
        let Context { exchange, decide_within, .. } = &*self.home.context;
        let mut asked = exchange.ask(vec![question]);
        let (answer, waiter) = match tokio::time::timeout(*decide_within, &mut asked).await {
            Ok(answer) => (answer, waiter),
            Err(_) => {
                drop(waiter);
                let late = tokio::time::timeout(ANSWER_WITHIN, asked).await;
                (late.unwrap_or(Err(Unanswered::Unreachable)), None)
            }
        };
        let offer = self.answered(answer);
        if let (Some(offer), Some(waiter)) = (offer, waiter) {
            // A probe that nobody waits for any more goes to the pocket.
            drop(waiter.send(offer));
        }
    }

    /// What an answer offers to who waits for it; nothing of none.
    fn answered(self: &Arc<Self>, answer: Result<Answers, Unanswered>) -> Option<Offer> {
        let now = self.home.now();
        let answer = answer.ok().and_then(|all| Some((all.answers.into_iter().next()?, all.sent)));
        let mut changes = Changes::default();
        let offer = {
            let mut inner = self.inner.lock();
            self.visit(&mut inner, now);
            inner.is_asking = false;
            let Some((answer, sent)) = answer else {
                inner.shared.asks_at(now.after(ASK_AGAIN));
                return None;
            };
            let verdict = &answer.verdict;
            let retry_after = duration(verdict.retry_after);
            let evidence = verdict.evidence.clone().map(|evidence| Arc::new(evidence.into()));
            if verdict.reason() == v1::Reason::NotShared {
                self.is_not_shared(&mut inner, now);
            } else if let Some(state) = State::of(verdict.circuit_state())
                && verdict.reason() != v1::Reason::CircuitForcedOpen
            {
                let change = inner.is_answered(state, verdict, evidence.clone(), (sent, now));
                changes = self.take(&mut inner, change, now);
            }
            let offer = if !answer.allowed {
                // Others may give probes back before the server can know.
                let is_open = verdict.reason() == v1::Reason::CircuitOpen;
                let wait = retry_after.filter(|_| is_open).unwrap_or(ASK_AGAIN);
                inner.shared.asks_at(now.after(wait));
                Offer::Denied { reason: Reason::of(verdict.reason), retry_after, evidence }
            } else if verdict.probe {
                let life = duration(verdict.expires_in).unwrap_or_default();
                let grant = Grant { id: answer.grant_id, until: lasts_until(sent, life) };
                Offer::Probe(Held::new(self, grant))
            } else {
                Offer::Again
            };
            self.shown.refused.store(None);
            let published = self.publish(&mut inner, now);
            changes = Changes { shared: changes.shared, ..published };
            offer
        };
        self.tell(changes);
        Some(offer)
    }

    /// A call that would have to wait is refused.
    pub(in crate::breaker) fn is_undecided(&self) -> Rejected {
        self.refuse(Reason::Undecided, Decider::Memory, None, None)
    }

    /// Waits for what the server offers.
    pub(in crate::breaker) async fn offered(
        self: &Arc<Self>,
        offer: oneshot::Receiver<Offer>,
    ) -> Result<Permit, Rejected> {
        let Ok(offer) = offer.await else {
            // Nobody else decides while what was told may be believed.
            let (reason, evidence) = {
                let inner = self.inner.lock();
                let told = inner.shared.told();
                (inner.shared_reason(), told.and_then(|told| told.evidence.clone()))
            };
            return Err(self.refuse(reason, Decider::Memory, None, evidence));
        };
        let now = self.shown.clock.now();
        match offer {
            Offer::Denied { reason, retry_after, evidence } => {
                Err(self.refuse(reason, Decider::Server, retry_after, evidence))
            }
            Offer::Probe(held) => match held.take(now) {
                Some(grant) => {
                    let word = self.shown.gate.load(Ordering::Acquire);
                    Ok(self.permit(Pass::Probe(Box::new(grant)), word, now))
                }
                None => Err(self.refuse(Reason::ProbesInUse, Decider::Memory, None, None)),
            },
            Offer::Again => match self.decide(now, false) {
                Decided::Now(decided) => decided,
                Decided::Asked(_) => {
                    Err(self.refuse(Reason::ProbesInUse, Decider::Memory, None, None))
                }
            },
        }
    }

    /// A probe that nobody took: it waits for the next call, or is given back.
    pub(in crate::breaker) fn pocket(self: &Arc<Self>, grant: Grant) {
        let now = self.home.now();
        let left = {
            let mut inner = self.inner.lock();
            let is_open = inner.shared.told().is_some_and(|told| told.state != State::Closed);
            if inner.pocket.is_none()
                && is_open
                && grant.lives(now, LEAST_LIFE)
                && !self.home.is_closed()
            {
                inner.pocket = Some(grant);
                self.shown.refused.store(None);
                self.visit(&mut inner, now);
                None
            } else {
                Some(grant)
            }
        };
        if let Some(grant) = left {
            self.home.settle(grant.given_back());
        }
    }

    /// What is told of it by name, in that snapshot of a Watch if it is one.
    pub(in crate::breaker) fn is_told(
        &self,
        told: Told,
        snapshot: Option<u64>,
        now: Time,
    ) -> Changes {
        let mut inner = self.inner.lock();
        if let Some(snapshot) = snapshot {
            inner.snapshot = snapshot;
        }
        self.read(&mut inner, now);
        self.catch_up(&mut inner, now);
        let change = inner.shared.is_told(told);
        let told = self.take(&mut inner, change, now);
        self.shown.refused.store(None);
        let changes = self.publish(&mut inner, now);
        Changes { shared: told.shared, ..changes }
    }

    /// A snapshot is complete, or it is new among circuits of which all is told.
    pub(in crate::breaker) fn is_in_snapshot(
        &self,
        snapshot: u64,
        generation: u64,
        at: Time,
        now: Time,
    ) -> Changes {
        let was_told = {
            let mut inner = self.inner.lock();
            inner.is_watched = true;
            inner.snapshot == snapshot
        };
        if was_told {
            return Changes::default();
        }
        self.is_told(Told::closed(generation, at), None, now)
    }

    /// Circuits that nothing is told of are of that generation now.
    pub(in crate::breaker) fn grows(&self, generation: u64, at: Time) {
        self.inner.lock().shared.grows(generation, at);
    }

    /// The server started again: nothing that it told is believed, and of its probes it knows nothing.
    pub(in crate::breaker) fn is_stale(&self, is_replaced: bool, now: Time) {
        let mut inner = self.inner.lock();
        self.read(&mut inner, now);
        self.catch_up(&mut inner, now);
        inner.is_watched = false;
        inner.pocket = None;
        inner.shared.is_stale();
        if is_replaced {
            let change = inner.shared.forget();
            self.take(&mut inner, change, now);
        }
        self.shown.refused.store(None);
        self.publish(&mut inner, now);
    }

    /// The server has no room for it: the local breaker acts alone.
    fn is_not_shared(&self, inner: &mut Inner, now: Time) {
        inner.not_shared_until = now.after(NOT_SHARED_FOR);
        let change = inner.shared.forget();
        self.take(inner, change, now);
    }

    /// As the answer to a report says.
    pub(in crate::breaker) fn is_refused_room(&self, now: Time) {
        let mut inner = self.inner.lock();
        self.read(&mut inner, now);
        self.catch_up(&mut inner, now);
        self.is_not_shared(&mut inner, now);
        self.shown.refused.store(None);
        self.publish(&mut inner, now);
    }

    /// Does what follows from news; what was counted is told before.
    fn take(&self, inner: &mut Inner, change: Change, now: Time) -> Changes {
        if change.generation {
            inner.shared_number = inner.shared_number.wrapping_add(1);
            inner.news = News::default();
            inner.has_hurried = false;
        }
        if change.closed {
            inner.generations += 1;
            inner.untold = 0;
            inner.own = circuit::Circuit::new(Generation(inner.generations), &inner.breaker, now);
        }
        let shared = (change.opened || change.closed).then_some(change.closed);
        Changes { shared, ..Changes::default() }
    }
}
