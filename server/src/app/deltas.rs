//! Counters of many calls, as callers tell them: of one circuit, or of one retry budget.

use arrayvec::ArrayVec;
use fusebox_core::{
    Ask, Charging, Limit, MAX_RULES, Moment,
    circuit::{self, Counts, Generation},
};

use super::{App, Priority, ReportError, Reported, report::Telling, top_keys};
use crate::{
    catalogue::{Catalogue, Namespace, Policy},
    limits,
    storage::{Answer, Charge, Decided, Place, StorageError},
};

/// What a reporter saw since its last report.
#[derive(Clone, Debug, Default)]
pub struct Delta<'a> {
    /// Name of a breaker, or of a retry budget.
    pub policy: &'a str,
    /// Which circuit or budget of it.
    pub key: &'a str,
    /// The generation that the calls were let through in.
    pub generation: Generation,
    /// Calls that succeeded.
    pub successes: u32,
    /// Calls that failed.
    pub failures: u32,
    /// Calls of either that were slow.
    pub slow: u32,
    /// Calls that say nothing about the target.
    pub ignored: u64,
    /// Calls that failed before they reached it.
    pub local_failures: u64,
    /// Calls that pay for retries.
    pub requests: u64,
    /// Retries that were made.
    pub retries: u64,
    /// Calls by latency.
    pub latencies: &'a [u64],
    /// Kinds of failure that were seen.
    pub kinds: ArrayVec<&'a str, { limits::ERROR_KINDS }>,
}

/// Who is told of a delta.
pub(super) enum Target<'a> {
    /// A circuit.
    Circuit(Place<'a>),
    /// A retry budget.
    Budget(&'a Policy),
}

impl Delta<'_> {
    /// A field that is set and says something to circuits only.
    fn of_circuits(&self) -> Option<&'static str> {
        first([
            ("generation", self.generation.0 > 0),
            ("successes", self.successes > 0),
            ("failures", self.failures > 0),
            ("slow", self.slow > 0),
            ("ignored", self.ignored > 0),
            ("local_failures", self.local_failures > 0),
            ("latency_counts", !self.latencies.is_empty()),
            ("error_kinds", !self.kinds.is_empty()),
        ])
    }

    /// A field that is set and says something to retry budgets only.
    fn of_budgets(&self) -> Option<&'static str> {
        first([("requests", self.requests > 0), ("retries", self.retries > 0)])
    }

    /// Who is told of it.
    pub(super) fn target<'a>(
        &'a self,
        index: usize,
        namespace: Option<&'a Namespace>,
    ) -> Result<Target<'a>, ReportError> {
        let name = || self.policy.to_owned();
        let policy = namespace.and_then(|namespace| namespace.policy(self.policy));
        let policy =
            policy.ok_or_else(|| ReportError::UnknownPolicy { delta: index, policy: name() })?;
        if let Some(place) = policy.place(self.key) {
            return match self.of_budgets() {
                Some(field) => Err(ReportError::OfBudgets { delta: index, field, policy: name() }),
                None => Ok(Target::Circuit(place)),
            };
        }
        let limiters = &policy.rules_of(self.key).limiters;
        let is_budget = |limit: &Limit| matches!(limit, Limit::RetryBudget(_));
        if !limiters.iter().all(|limiter| is_budget(&limiter.settings.limit)) {
            return Err(ReportError::CountsItself { delta: index, policy: name() });
        }
        match self.of_circuits() {
            Some(field) => Err(ReportError::OfCircuits { delta: index, field, policy: name() }),
            None => Ok(Target::Budget(policy)),
        }
    }
}

fn first<const N: usize>(fields: [(&'static str, bool); N]) -> Option<&'static str> {
    fields.into_iter().find(|(_, set)| *set).map(|(field, _)| field)
}

impl App {
    /// Tells of a delta, unless it has been told before.
    pub(super) fn tell_delta(
        &self,
        (delta, target): (&Delta<'_>, &Target<'_>),
        catalogue: &Catalogue,
        telling: &mut Telling<'_>,
    ) -> Result<Reported, StorageError> {
        let place = match target {
            Target::Budget(_) if telling.again => return Ok(Reported::Duplicate),
            Target::Budget(policy) => {
                telling.wait(self.tell_budget(delta, (catalogue, policy), telling.now)?);
                return Ok(Reported::Applied);
            }
            Target::Circuit(place) => place,
        };
        let told = circuit::Delta {
            counts: Counts {
                calls: delta.successes + delta.failures,
                failures: delta.failures,
                slow: delta.slow,
            },
            ignored: delta.ignored,
            local_failures: delta.local_failures,
            latencies: delta.latencies,
            kinds: &delta.kinds,
        };
        let told = (!telling.again).then_some((delta.generation, told));
        let answer = self.report_delta(place, told, telling.by, telling.now.time)?;
        Ok(match answer.map(|answer| telling.see(answer)) {
            None => Reported::NotShared,
            Some((None, _)) => Reported::Duplicate,
            Some((Some(circuit::Reported::Applied), _)) => Reported::Applied,
            Some((Some(circuit::Reported::Stale), _)) => Reported::StaleGeneration,
        })
    }

    /// Tells a retry budget of requests and retries. They were made, so all are charged, and none is refused.
    fn tell_budget(
        &self,
        delta: &Delta<'_>,
        (catalogue, policy): (&Catalogue, &Policy),
        now: Moment,
    ) -> Result<Answer<()>, StorageError> {
        let made = [(delta.requests, false), (delta.retries, true)].into_iter();
        let made = made.filter(|(calls, _)| *calls > 0);
        let asks: ArrayVec<_, MAX_RULES> = made
            .flat_map(|(calls, retry)| {
                let ask = Ask { retry, ..Ask::spend(calls) };
                policy.asks(delta.key, ask, Priority::Critical, now)
            })
            .collect();
        let Some(cell) = asks.first().map(|ask| ask.cell) else { return Ok(Answer::Now(())) };
        let charge = Charge { charging: Charging::Always, asks: &asks, catalogue };
        let mut decided = Decided::default();
        let answer = self.storage.apply(&charge, None, now, &mut decided)?;
        let calls = delta.requests.saturating_add(delta.retries);
        policy.top_keys.record(delta.key, calls, top_keys::draw(cell, now.time));
        if decided.charged.iter().any(|charged| charged.is_new && charged.cell == cell) {
            policy.names.add(delta.key, cell);
        }
        self.lines.wake(cell);
        Ok(answer)
    }
}
