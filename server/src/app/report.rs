//! What callers tell after a call.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::BuildHasherDefault,
    num::NonZeroU64,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fusebox_core::{
    Limit, Moment, Time,
    circuit::{self, Call, Generation, Reporter},
};
use thiserror::Error;

use super::{
    App, Caller, Client, Delta, GrantName, Granted, Pass, PassName, Seen, Told,
    grants::{Grant, Owner, Part, Taken},
};
use crate::{
    catalogue::CellId,
    storage::{Answer, Durable, Hashed, Holds, Judge, OpenPart, StorageError},
};

/// How calls went, and which grants are still needed.
#[derive(Clone, Debug, Default)]
pub struct Report<'a> {
    /// Namespace of the policies.
    pub namespace: &'a str,
    /// Who reports, if it says so; it does if there is a number, a delta or a goodbye.
    pub client: Option<Client<'a>>,
    /// Which of this client's reports it is, if it is to count once however often it arrives.
    pub sequence: Option<NonZeroU64>,
    /// Each of a grant; `None` where the id cannot be one of ours.
    pub outcomes: Vec<(Option<Granted>, Told<'a>)>,
    /// Counters of many calls.
    pub deltas: Vec<Delta<'a>>,
    /// Grants to keep alive.
    pub renewals: Vec<Option<GrantName>>,
    /// The client ends.
    pub goodbye: bool,
}

impl Report<'_> {
    /// Every grant that it names and that is kept.
    fn names(&self) -> impl Iterator<Item = GrantName> {
        let outcomes = self.outcomes.iter().filter_map(|(name, _)| match name {
            Some(Granted::Kept(name)) => Some(*name),
            Some(Granted::Passed(_)) | None => None,
        });
        outcomes.chain(self.renewals.iter().flatten().copied())
    }
}

/// Why nothing could be settled. Nothing has changed, unless the storage failed.
#[derive(Debug, Error)]
pub enum ReportError {
    /// No such namespace.
    #[error("unknown namespace `{0}`")]
    UnknownNamespace(String),
    /// No such policy.
    #[error("unknown policy `{policy}`")]
    UnknownPolicy {
        /// Index of the delta.
        delta: usize,
        /// The policy.
        policy: String,
    },
    /// A delta of what counts by itself.
    #[error("policy `{policy}` is neither a breaker nor a retry budget, and is told of no calls")]
    CountsItself {
        /// Index of the delta.
        delta: usize,
        /// The policy.
        policy: String,
    },
    /// A retry budget is told what only a circuit can know of.
    #[error("policy `{policy}` is a retry budget: it is told of `requests` and `retries` only")]
    OfCircuits {
        /// Index of the delta.
        delta: usize,
        /// What it is told.
        field: &'static str,
        /// The policy.
        policy: String,
    },
    /// A circuit is told what only a retry budget can know of.
    #[error("policy `{policy}` is a breaker: `requests` and `retries` are for retry budgets")]
    OfBudgets {
        /// Index of the delta.
        delta: usize,
        /// What it is told.
        field: &'static str,
        /// The policy.
        policy: String,
    },
    /// The storage cannot.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// What became of a report.
#[derive(Clone, Debug, Default)]
pub struct Receipt {
    /// One for each outcome, in their order.
    pub results: Vec<Reported>,
    /// One for each delta, in their order.
    pub delta_results: Vec<Reported>,
    /// One for each grant to keep alive, in their order.
    pub renewals: Vec<Renewed>,
    /// Circuits that it told of, as they are after it.
    pub circuits: Vec<Seen>,
    /// It had come before.
    pub duplicate: bool,
}

/// What became of one outcome, or of one delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reported {
    /// It counts.
    Applied,
    /// It had been told before.
    Duplicate,
    /// There is no such grant, or it is not this caller's.
    UnknownGrant,
    /// The circuit is in another generation.
    StaleGeneration,
    /// There is no room for the circuit.
    NotShared,
}

impl Reported {
    /// Of what became of two calls under one id, what is told: whether anything changed, and if not, why.
    const fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Applied, _) | (_, Self::Applied) => Self::Applied,
            (Self::UnknownGrant, other) => other,
            (one, _) => one,
        }
    }
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
    /// Told of an earlier generation of a circuit.
    pub stale_generation: AtomicU64,
}

impl Reports {
    fn count(&self, result: Reported) {
        let count = match result {
            Reported::Applied => &self.applied,
            Reported::Duplicate => &self.duplicate,
            Reported::UnknownGrant => &self.unknown_grant,
            Reported::StaleGeneration => &self.stale_generation,
            // Of deltas only.
            Reported::NotShared => return,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// What is gathered while a report is taken.
pub(super) struct Telling<'a> {
    /// Whose grants and calls it may speak of.
    owner: Owner,
    /// Whose word the circuits have it on.
    pub(super) by: Reporter<'a>,
    pub(super) now: Moment,
    /// It had come before.
    pub(super) again: bool,
    /// What has to be durable before anybody is told.
    waits: Vec<Durable>,
    circuits: Vec<Seen>,
    /// Where each of them is.
    places: HashMap<CellId, usize, BuildHasherDefault<Hashed>>,
}

impl Telling<'_> {
    /// Waits with all that is told until that may be; gives what it is.
    pub(super) fn wait<T>(&mut self, answer: Answer<T>) -> T {
        match answer {
            Answer::Now(value) => value,
            Answer::Later(value, durable) => {
                self.waits.push(durable);
                value
            }
        }
    }

    /// Notes how a circuit is now, for the end of the report; gives what became of what it was told.
    pub(super) fn see<T>(&mut self, answer: Answer<(T, Seen)>) -> (T, Generation) {
        let (became, seen) = self.wait(answer);
        let generation = seen.view.generation;
        match self.places.entry(seen.name.cell) {
            Entry::Occupied(place) => self.circuits[*place.get()] = seen,
            Entry::Vacant(place) => {
                place.insert(self.circuits.len());
                self.circuits.push(seen);
            }
        }
        (became, generation)
    }
}

impl App {
    /// Takes what a caller tells: settles grants, each once, tells circuits and retry budgets how calls went, and
    /// renews permits.
    ///
    /// # Errors
    /// If the namespace or a policy is unknown or is told what it cannot know of, or the storage failed.
    pub async fn report(
        &self,
        caller: Caller,
        report: &Report<'_>,
    ) -> Result<Receipt, ReportError> {
        // All of it at once, so that a caller that goes away leaves nothing behind; then all is waited for.
        let (receipt, waits) = self.take(caller, report)?;
        for durable in waits {
            Answer::Later((), durable).told().await?;
        }
        Ok(receipt)
    }

    fn take(
        &self,
        caller: Caller,
        report: &Report<'_>,
    ) -> Result<(Receipt, Vec<Durable>), ReportError> {
        let owner = Owner { principal: caller.principal, namespace: report.namespace.into() };
        let (catalogue, now) = (self.catalogue.load(), caller.now);
        let namespace = catalogue.namespace(report.namespace);
        // Its last policy may have ended, and what was granted by it has not.
        let is_known =
            namespace.is_some() || report.names().any(|name| self.grants.is_open(name.id, &owner));
        if !is_known {
            return Err(ReportError::UnknownNamespace(report.namespace.to_owned()));
        }
        let deltas = report.deltas.iter().enumerate();
        let targets = deltas.map(|(index, delta)| delta.target(index, namespace));
        let targets = targets.collect::<Result<Vec<_>, _>>()?;

        let Client { id, zone, .. } = report.client.unwrap_or_default();
        if let Some(client) = report.client {
            self.desk.clients.see(report.namespace, client, now.time);
        }
        // Nothing is refused from here on, and nothing has changed so far. If the storage fails on the way, the
        // number stays taken: part of the report may count already, and none of it is to count twice.
        let is_new = |sequence| self.sequences.take(&owner, id, sequence, now.time);
        let again = report.sequence.is_some_and(|sequence| !is_new(sequence));
        let mut telling = Telling {
            owner,
            by: Reporter { id, zone },
            now,
            again,
            waits: Vec::new(),
            circuits: Vec::new(),
            places: HashMap::default(),
        };

        let mut receipt = Receipt {
            results: Vec::with_capacity(report.outcomes.len()),
            delta_results: Vec::with_capacity(report.deltas.len()),
            renewals: Vec::with_capacity(report.renewals.len()),
            circuits: Vec::new(),
            duplicate: again,
        };
        for (granted, told) in &report.outcomes {
            let result = match granted {
                Some(Granted::Kept(name)) => self.settle_kept(*name, *told, &mut telling)?,
                Some(Granted::Passed(name)) => self.tell_passed(name, *told, &mut telling)?,
                None => Reported::UnknownGrant,
            };
            self.reports.count(result);
            receipt.results.push(result);
        }
        for told in report.deltas.iter().zip(&targets) {
            receipt.delta_results.push(self.tell_delta(told, &catalogue, &mut telling)?);
        }
        for name in &report.renewals {
            receipt.renewals.push(match name {
                Some(name) => self.renew(*name, report.client, &mut telling)?,
                None => Duration::ZERO,
            });
        }
        if report.goodbye {
            self.leave(report.namespace, id, now.time);
        }
        receipt.circuits = telling.circuits;
        Ok((receipt, telling.waits))
    }

    /// Settles a grant that is kept, or a part of what it owes.
    fn settle_kept(
        &self,
        name: GrantName,
        told: Told<'_>,
        telling: &mut Telling<'_>,
    ) -> Result<Reported, StorageError> {
        let (dues, passes) =
            match self.grants.settle(name.id, &telling.owner, told, telling.now.time) {
                Taken::Open(owed) => owed,
                Taken::Settled => return Ok(Reported::Duplicate),
                Taken::Unknown => return Ok(Reported::UnknownGrant),
            };
        for due in dues {
            telling.wait(self.settle(&due, telling.now)?);
        }
        // Whatever becomes of that: nobody tells of this grant again.
        self.tell_passes(&passes, told.call, false, telling)?;
        Ok(Reported::Applied)
    }

    /// Tells circuits of calls of which the server keeps nothing.
    fn tell_passed(
        &self,
        name: &PassName,
        told: Told<'_>,
        telling: &mut Telling<'_>,
    ) -> Result<Reported, StorageError> {
        if !name.is_true(&telling.owner, self.grants.secret()) {
            return Ok(Reported::UnknownGrant);
        }
        if told.partial {
            // The calls go on, and nothing is known of them yet.
            return Ok(Reported::Applied);
        }
        self.tell_passes(&name.passes, told.call, telling.again, telling)
    }

    /// Tells circuits how calls went, of which they are not told `again`. A probe can be told of any time: its
    /// circuit knows which are out.
    fn tell_passes(
        &self,
        passes: &[Pass],
        call: Call<'_>,
        again: bool,
        telling: &mut Telling<'_>,
    ) -> Result<Reported, StorageError> {
        let mut result = Reported::UnknownGrant;
        for pass in passes {
            let told = (*pass, (!again || pass.probe.is_some()).then_some(call));
            let namespace = &telling.owner.namespace;
            let answer = self.report_pass(namespace, told, telling.by, telling.now.time)?;
            let Some(answer) = answer else { continue };
            result = result.or(match telling.see(answer) {
                (Some(circuit::Reported::Applied), _) => Reported::Applied,
                (None, _) => Reported::Duplicate,
                (Some(circuit::Reported::Stale), _) if again => Reported::Duplicate,
                // The probe is out no more: it expired, or was told of.
                (Some(circuit::Reported::Stale), generation) if generation == pass.generation => {
                    Reported::UnknownGrant
                }
                (Some(circuit::Reported::Stale), _) => Reported::StaleGeneration,
            });
        }
        Ok(result)
    }

    /// Keeps a grant alive; one that a crash forgot is taken over, if its permits are still held without a
    /// name.
    fn renew(
        &self,
        name: GrantName,
        client: Option<Client<'_>>,
        telling: &mut Telling<'_>,
    ) -> Result<Renewed, StorageError> {
        let now = telling.now;
        // Two attempts at once must not take over the permits of two.
        let _alone = self.grants.is_of_earlier(name.id).then(|| self.attesting.lock());
        let catalogue = self.catalogue.load();
        match self.grants.renew(name.id, &telling.owner, &catalogue, now.time) {
            Taken::Open(life) => return Ok(life),
            Taken::Settled => return Ok(Duration::ZERO),
            Taken::Unknown => {}
        }
        let Some(claim) = name.claim.filter(|_| self.grants.is_forgotten(name, &telling.owner))
        else {
            return Ok(Duration::ZERO);
        };
        let Some(limiter) = catalogue.numbered(claim.number) else { return Ok(Duration::ZERO) };
        let Limit::Concurrency(permits) = &limiter.settings.limit else {
            return Ok(Duration::ZERO);
        };
        let judge = Judge { limiter, catalogue: &catalogue };
        let mut attest = |cell| limiter.settings.attested(cell, claim.permits, now);
        let (attested, answer) = self.storage.change(claim.cell, judge, &mut attest, now)?.split();
        if !attested {
            return Ok(Duration::ZERO);
        }
        telling.wait(answer);
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
            Grant {
                owner: telling.owner.clone(),
                client,
                parts,
                passes: Default::default(),
                probes_until: Time::ZERO,
            },
        );
        Ok(permits.ttl())
    }
}
