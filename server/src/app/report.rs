//! What callers tell after a call.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fusebox_core::{Limit, Moment};
use thiserror::Error;

use super::{
    App, Caller, Client, GrantName, Told,
    grants::{Grant, Owner, Part, Taken},
};
use crate::storage::{Answer, Holds, Judge, OpenPart, StorageError};

/// How calls went, and which grants are still needed.
#[derive(Clone, Debug)]
pub struct Report<'a> {
    /// Namespace of the policies.
    pub namespace: &'a str,
    /// Who reports, if it says so.
    pub client: Option<Client<'a>>,
    /// Each of a grant; `None` where the id cannot be one of ours.
    pub outcomes: Vec<(Option<GrantName>, Told)>,
    /// Grants to keep alive.
    pub renewals: Vec<Option<GrantName>>,
}

impl Report<'_> {
    /// Every grant that it names.
    fn names(&self) -> impl Iterator<Item = GrantName> {
        let outcomes = self.outcomes.iter().filter_map(|(name, _)| *name);
        outcomes.chain(self.renewals.iter().flatten().copied())
    }
}

/// Why nothing could be settled.
#[derive(Debug, Error)]
pub enum ReportError {
    /// No such namespace.
    #[error("unknown namespace `{0}`")]
    UnknownNamespace(String),
    /// The storage cannot.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// What became of one outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reported {
    /// The grant is settled.
    Applied,
    /// It had been settled before.
    Duplicate,
    /// There is no such grant, or it is not this caller's.
    UnknownGrant,
}

/// How long a grant lives on; zero if it is not renewed.
pub type Renewed = Duration;

/// Outcomes of reports by their result.
#[derive(Debug, Default)]
pub struct Reports {
    /// Settled a grant.
    pub applied: AtomicU64,
    /// Came again.
    pub duplicate: AtomicU64,
    /// Named no open grant.
    pub unknown_grant: AtomicU64,
}

impl App {
    /// Settles grants, each once, and renews permits.
    ///
    /// # Errors
    /// If the namespace is unknown, or the storage failed.
    pub async fn report(
        &self,
        caller: Caller,
        report: &Report<'_>,
    ) -> Result<(Vec<Reported>, Vec<Renewed>), ReportError> {
        let owner = Owner { principal: caller.principal, namespace: report.namespace.into() };
        // Its last policy may have ended, and what was granted by it has not.
        let is_known = self.catalogue.load().namespace(report.namespace).is_some()
            || report.names().any(|name| self.grants.is_open(name.id, &owner));
        if !is_known {
            return Err(ReportError::UnknownNamespace(report.namespace.to_owned()));
        }
        if let Some(client) = report.client {
            self.desk.clients.see(report.namespace, client, caller.now.time);
        }
        // All are settled at once, so that a caller that goes away leaves none behind; then all are waited for.
        let mut answers = Vec::new();
        let mut results = Vec::with_capacity(report.outcomes.len());
        for (name, told) in &report.outcomes {
            let taken = name.map_or(Taken::Unknown, |name| {
                self.grants.settle(name.id, &owner, *told, caller.now.time)
            });
            let (result, count) = match taken {
                Taken::Open((dues, _passes)) => {
                    for due in dues {
                        answers.push(self.settle(&due, caller.now)?);
                    }
                    (Reported::Applied, &self.reports.applied)
                }
                Taken::Settled => (Reported::Duplicate, &self.reports.duplicate),
                Taken::Unknown => (Reported::UnknownGrant, &self.reports.unknown_grant),
            };
            count.fetch_add(1, Ordering::Relaxed);
            results.push(result);
        }
        let mut renewals = Vec::with_capacity(report.renewals.len());
        for name in &report.renewals {
            let renewed = match name {
                Some(name) => self.renew(*name, &owner, report.client, caller.now, &mut answers)?,
                None => Duration::ZERO,
            };
            renewals.push(renewed);
        }
        for answer in answers {
            answer.told().await?;
        }
        Ok((results, renewals))
    }

    /// Keeps a grant alive; one that a crash forgot is taken over, if its permits are still held without a
    /// name.
    fn renew(
        &self,
        name: GrantName,
        owner: &Owner,
        client: Option<Client<'_>>,
        now: Moment,
        answers: &mut Vec<Answer<()>>,
    ) -> Result<Renewed, StorageError> {
        // Two attempts at once must not take over the permits of two.
        let _alone = self.grants.is_of_earlier(name.id).then(|| self.attesting.lock());
        let catalogue = self.catalogue.load();
        match self.grants.renew(name.id, owner, &catalogue, now.time) {
            Taken::Open(life) => return Ok(life),
            Taken::Settled => return Ok(Duration::ZERO),
            Taken::Unknown => {}
        }
        let Some(claim) = name.claim.filter(|_| self.grants.is_forgotten(name, owner)) else {
            return Ok(Duration::ZERO);
        };
        let Some(limiter) = catalogue.numbered(claim.number) else { return Ok(Duration::ZERO) };
        let Limit::Concurrency(permits) = &limiter.settings.limit else {
            return Ok(Duration::ZERO);
        };
        let judge = Judge { limiter, catalogue: &catalogue };
        let mut attest = |cell| limiter.settings.attested(cell, claim.permits, now);
        let (answer, attested) = split(self.storage.change(claim.cell, judge, &mut attest, now)?);
        if !attested {
            return Ok(Duration::ZERO);
        }
        answers.push(answer);
        let open = OpenPart {
            holds: Holds::Permit,
            number: claim.number,
            revision: limiter.settings.revision,
            cell: claim.cell,
            slice: 0,
            charged: claim.permits,
            told: 0,
            expires_at: now.time.after(permits.ttl()),
        };
        let parts = vec![Part { limiter: Arc::clone(limiter), open }];
        let client = client.map_or("", |client| client.id).into();
        self.grants.restore(
            name.id,
            Grant { owner: owner.clone(), client, parts, passes: Default::default() },
        );
        Ok(permits.ttl())
    }
}

/// What is known at once, and when it may be told.
fn split<T>(answer: Answer<T>) -> (Answer<()>, T) {
    match answer {
        Answer::Now(value) => (Answer::Now(()), value),
        Answer::Later(value, durable) => (Answer::Later((), durable), value),
    }
}
