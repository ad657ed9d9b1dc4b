//! One retry budget: asks the server for each retry, and decides where there is no answer.

use std::{
    pin::pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use fusebox_core::{RetryBudget, Time};
use parking_lot::Mutex;
use tonic::Code;

use super::{GaveUp, ledger::Ledger, tally::Tally};
use crate::{
    Decider, Reason,
    binding::Binding,
    context::Context,
    exchange::{Answers, Asked, Question, Unanswered, is_mistake},
    part::Draft,
    settings::{Fallback, Kind, OnUnreachable, Settings},
    telemetry::Event,
};

/// Most answers that are waited for after their retries have gone ahead. Past it a retry is told of at once, and
/// perhaps counted twice: that loses a retry, and never admits one.
const LATE_MOST: u64 = 256;

/// One policy and key, as all handles of it share it.
pub(super) struct Account {
    pub(super) policy: Arc<str>,
    pub(super) key: Arc<str>,
    pub(super) context: Arc<Context>,
    pub(super) tally: Tally,
    /// Bound by the first call, so that a handle that only leads to others binds nothing.
    binding: OnceLock<Arc<Binding>>,
    ledger: Mutex<Ledger>,
    /// Answers that are still waited for.
    late: AtomicU64,
    /// Decided without the server since the last answer.
    degraded: AtomicBool,
    /// Said not to be a retry budget since the last answer.
    refused: AtomicBool,
}

impl Account {
    pub(super) fn new(context: Arc<Context>, policy: &str, key: &str) -> Self {
        Self {
            policy: policy.into(),
            key: key.into(),
            context,
            tally: Tally::default(),
            binding: OnceLock::new(),
            ledger: Mutex::default(),
            late: AtomicU64::new(0),
            degraded: AtomicBool::new(false),
            refused: AtomicBool::new(false),
        }
    }

    /// A call begins: it pays for retries.
    pub(super) fn begin(&self) {
        self.binding();
        self.tally.call();
    }

    /// Withdraws the `attempt`-th retry of a call, or says why there is none. It waits no longer than `spare`.
    pub(super) async fn withdraw(
        self: &Arc<Self>,
        attempt: u32,
        spare: Option<Duration>,
    ) -> Result<(), GaveUp> {
        let within = self.context.decide_within.min(spare.unwrap_or(Duration::MAX));
        let mut asked =
            self.context.exchange.ask(vec![Question { attempt, ..Question::of(self.binding()) }]);
        match tokio::time::timeout(within, &mut asked).await {
            Ok(answer) => self.answered(answer),
            Err(_) => self.alone(Some(asked)),
        }
    }

    fn answered(self: &Arc<Self>, answer: Result<Answers, Unanswered>) -> Result<(), GaveUp> {
        match answer {
            Ok(answers) => {
                self.degrades(None);
                self.refused.store(false, Ordering::Relaxed);
                if answers.answers.first().is_some_and(|answer| answer.allowed) {
                    self.context.telemetry.decided(Decider::Server);
                    self.ledger.lock().withdrawn(self.share(), self.context.clock.now());
                    Ok(())
                } else {
                    self.denied(Decider::Server, GaveUp::Budget)
                }
            }
            Err(Unanswered::Refused { code, message }) if is_mistake(code) => {
                self.refuse(code, &message);
                self.denied(Decider::Server, GaveUp::Refused)
            }
            Err(_) => self.alone(None),
        }
    }

    /// There is no answer, or none yet.
    fn alone(self: &Arc<Self>, late: Option<Asked>) -> Result<(), GaveUp> {
        let (decider, allowed) = match self.settings() {
            None => (Decider::Fallback, self.context.fallback == Fallback::Allow),
            Some(settings) => self.alone_by(&settings),
        };
        self.degrades(Some(decider));
        if !allowed {
            let gave_up = match decider {
                Decider::Local => GaveUp::Budget,
                _ => GaveUp::Unreachable,
            };
            return self.denied(decider, gave_up);
        }
        self.context.telemetry.decided(decider);
        match late {
            Some(asked) if self.late.fetch_add(1, Ordering::Relaxed) < LATE_MOST => {
                self.context.runtime.spawn(Arc::clone(self).settle(asked));
            }
            Some(_) => {
                self.late.fetch_sub(1, Ordering::Relaxed);
                self.ledger.lock().made();
            }
            None => self.ledger.lock().made(),
        }
        Ok(())
    }

    fn alone_by(&self, settings: &Settings) -> (Decider, bool) {
        let now = self.context.clock.now();
        let share = share(settings, self.binding().clients());
        let mut ledger = self.ledger.lock();
        ledger.deposit(self.tally.calls(), share, now);
        match (settings.on_unreachable, share) {
            (OnUnreachable::Local, Some(share)) => {
                let enough = ledger.withdraw(share, now);
                (Decider::Local, enough || settings.shadow)
            }
            (OnUnreachable::Deny, _) if !settings.shadow => (Decider::Fallback, false),
            _ => {
                ledger.withdrawn(share, now);
                (Decider::Fallback, true)
            }
        }
    }

    /// A retry that went ahead is withdrawn once: by the question that it did not wait for, or by what is told.
    async fn settle(self: Arc<Self>, asked: Asked) {
        let withdrawn = match pin!(asked).await {
            Ok(answers) => answers.answers.first().is_some_and(|answer| answer.allowed),
            Err(_) => false,
        };
        self.late.fetch_sub(1, Ordering::Relaxed);
        if !withdrawn {
            self.ledger.lock().made();
        }
    }

    fn denied(&self, decider: Decider, gave_up: GaveUp) -> Result<(), GaveUp> {
        self.context.telemetry.rejected(decider, Reason::RetryBudgetExhausted);
        Err(gave_up)
    }

    /// Who decides now, if not the server; told when that changes.
    fn degrades(&self, decider: Option<Decider>) {
        let begins = decider.is_some();
        if self.degraded.swap(begins, Ordering::Relaxed) != begins {
            self.context.telemetry.tell(&Event::Degraded {
                policy: &self.policy,
                key: &self.key,
                decider: decider.unwrap_or(Decider::Server),
                begins,
            });
        }
    }

    fn refuse(&self, code: Code, message: &str) {
        if !self.refused.swap(true, Ordering::Relaxed) {
            let (policy, key) = (&*self.policy, &*self.key);
            self.context.telemetry.tell(&Event::Refused { policy, key, code, message });
        }
    }

    /// Takes in what was counted since, so that it is forgotten when its time comes.
    pub(super) fn tend(&self, now: Time) {
        if self.binding.get().is_some() {
            self.ledger.lock().deposit(self.tally.calls(), self.share(), now);
        }
    }

    /// Says what the server does not know.
    pub(super) fn report(&self, draft: &mut Draft, now: Time) {
        // Who told a rate of retries would have the whole report refused.
        let (Some(binding), Some(share)) = (self.binding.get(), self.share()) else { return };
        let mut ledger = self.ledger.lock();
        ledger.deposit(self.tally.calls(), Some(share), now);
        draft.deltas.extend(ledger.tell(binding));
    }

    /// Whether nothing is lost by forgetting it.
    pub(super) fn is_idle(&self) -> bool {
        let nothing_to_tell = self.settings().is_none() && self.degraded.load(Ordering::Relaxed);
        nothing_to_tell || self.ledger.lock().is_told(self.tally.calls())
    }

    fn binding(&self) -> &Arc<Binding> {
        self.binding.get_or_init(|| self.context.exchange.bind(&self.policy, &self.key))
    }

    fn settings(&self) -> Option<Arc<Settings>> {
        self.binding.get().and_then(|binding| binding.settings())
    }

    /// This process's share of the budget; `None` if it is not known, or not one.
    fn share(&self) -> Option<RetryBudget> {
        let binding = self.binding.get()?;
        share(&*binding.settings()?, binding.clients())
    }
}

/// One of so many equal parts of a budget. Each process's own calls pay for its own retries, so only the floor is
/// divided; what does not divide is nobody's.
fn share(settings: &Settings, clients: u32) -> Option<RetryBudget> {
    let Kind::RetryBudget(budget) = &settings.kind else { return None };
    let floor = budget.min_per_second() / clients.max(1);
    RetryBudget::new(budget.ratio_per_mille(), floor, budget.ttl()).ok()
}
