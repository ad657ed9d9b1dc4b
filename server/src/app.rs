//! What callers can do: the server without its transport.

mod grants;

use std::sync::{Arc, atomic::Ordering};

use arc_swap::ArcSwap;
use arrayvec::ArrayVec;
use fusebox_core::{Charging, Cost, Decision, Kind, MAX_RULES, Time};
use thiserror::Error;

use self::grants::{Grant, Taken};
pub use self::grants::{GrantId, Grants};
use crate::{
    catalogue::{Catalogue, Namespace, Policy},
    clock::ServerClock,
    counters::Reports,
    entropy::Entropy,
    limits,
    reservation::Reservation,
    storage::{Answer, CellAsk, Charge, OpenGrant, Room, Settlement, Storage, StorageError},
};

/// Who calls. There is no authentication yet, so everybody is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Principal {
    /// Nobody in particular.
    Anonymous,
}

/// Who calls, and the one moment at which the whole call is decided.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Who.
    pub principal: Principal,
    /// When.
    pub now: Time,
}

/// An Acquire that is well-formed.
#[derive(Clone, Debug)]
pub struct Acquire<'a, A> {
    /// Namespace of the policies.
    pub namespace: &'a str,
    /// 1 to 16 asks; at most one is estimated.
    pub asks: A,
}

/// Acquires that are well-formed, to be decided one after another.
#[derive(Clone, Debug)]
pub struct Batch<'a, E> {
    /// Namespace of all the policies.
    pub namespace: &'a str,
    /// The asks of each, as those of an [`Acquire`].
    pub entries: E,
}

/// An ask that is well-formed.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Name of the policy.
    pub policy: &'a str,
    /// Which bucket.
    pub key: &'a str,
    /// What it costs.
    pub cost: Cost,
}

/// What became of an Acquire.
#[derive(Debug, Default)]
pub struct Acquired {
    /// The decision.
    pub decision: Decision,
    /// The grant, and the index of the ask that opened it.
    pub grant: Option<(usize, GrantId)>,
}

/// Why nothing could be decided. Nothing was charged, unless the storage failed.
#[derive(Debug, Error)]
pub enum AcquireError {
    /// No such namespace.
    #[error("unknown namespace `{0}`")]
    UnknownNamespace(String),
    /// No such policy.
    #[error("unknown policy `{policy}`")]
    UnknownPolicy {
        /// Index of the ask.
        ask: usize,
        /// The policy.
        policy: String,
    },
    /// An ask that no wait would ever make possible.
    #[error("a cost of {cost} is never possible: policy `{policy}` grants at most {most} at once")]
    NeverPossible {
        /// Index of the ask.
        ask: usize,
        /// The policy.
        policy: String,
        /// What was asked.
        cost: u64,
        /// Most that the policy grants.
        most: u64,
    },
    /// Too many open grants.
    #[error(
        "{} estimates are open, as many as this server holds; report those that ended",
        limits::OPEN_GRANTS
    )]
    GrantsFull,
    /// The storage cannot.
    #[error(transparent)]
    Storage(#[from] StorageError),
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

/// Why a batch was not decided: the first entry that could not be.
#[derive(Debug)]
pub struct BatchError {
    /// The entry, if it was one.
    pub entry: Option<usize>,
    /// Why.
    pub error: AcquireError,
}

/// How one granted call went.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// The grant; `None` if it cannot be one of ours.
    pub grant: Option<GrantId>,
    /// Tokens that the call cost in all; `None` if it cost what was estimated.
    pub actual_cost: Option<u64>,
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

/// Decides: policies, cells and grants together.
pub struct App {
    catalogue: ArcSwap<Catalogue>,
    storage: Arc<dyn Storage>,
    grants: Grants,
    clock: ServerClock,
    entropy: Arc<dyn Entropy>,
    reports: Reports,
}

impl App {
    /// An app of this start, `boot`, which goes on with the grants that a clean stop left open.
    pub fn new(
        catalogue: Catalogue,
        storage: Arc<dyn Storage>,
        clock: ServerClock,
        entropy: Arc<dyn Entropy>,
        boot: u64,
        open: Vec<OpenGrant>,
    ) -> Self {
        let grants = Grants::new(boot, limits::OPEN_GRANTS);
        for grant in open {
            // Only of policies that are there: recovery sees to that.
            if let Some(policy) = catalogue.numbered(grant.number) {
                grants.restore(&grant, Arc::clone(policy));
            }
        }
        Self {
            catalogue: ArcSwap::from_pointee(catalogue),
            storage,
            grants,
            clock,
            entropy,
            reports: Reports::default(),
        }
    }

    /// The policies in force.
    pub fn catalogue(&self) -> Arc<Catalogue> {
        self.catalogue.load_full()
    }

    /// The grants that are open.
    pub fn grants(&self) -> &Grants {
        &self.grants
    }

    /// What became of reports.
    pub fn reports(&self) -> &Reports {
        &self.reports
    }

    /// Keys that are remembered.
    pub fn live_cells(&self) -> usize {
        self.storage.live()
    }

    /// A caller at this moment.
    pub fn caller(&self, principal: Principal) -> Caller {
        Caller { principal, now: self.clock.now() }
    }

    /// Decides one Acquire; what is to be told of it is what `tell` makes.
    ///
    /// # Errors
    /// If nothing could be decided.
    pub fn acquire<'a, T>(
        &self,
        caller: Caller,
        acquire: Acquire<'a, impl IntoIterator<Item = Ask<'a>>>,
        tell: impl FnOnce(&Acquired) -> T,
    ) -> Result<Answer<T>, AcquireError> {
        let catalogue = self.catalogue.load();
        let namespace = named(&catalogue, acquire.namespace)?;
        let mut policies = ArrayVec::<_, MAX_RULES>::new();
        let mut asks = ArrayVec::<_, MAX_RULES>::new();
        for (index, ask) in acquire.asks.into_iter().enumerate() {
            let (policy, ask) = resolved(namespace, index, ask)?;
            policies.push(policy);
            asks.push(ask);
        }
        let estimates = asks.iter().any(|ask| ask.cost.estimated);
        let mut grants = estimates.then(|| self.reserve_grants(1)).transpose()?;
        let resolved = Resolved { policies: &policies, asks: &asks };
        Ok(self.decide(caller, resolved, None, grants.as_mut(), tell)?)
    }

    /// Decides each Acquire of a batch, in order, against one snapshot of the policies; what is to be told of
    /// each is what `tell` makes.
    ///
    /// # Errors
    /// If one of them could not be decided; then nothing was charged, unless the storage failed.
    pub fn acquire_batch<'a, T>(
        &self,
        caller: Caller,
        batch: Batch<'a, impl ExactSizeIterator<Item: IntoIterator<Item = Ask<'a>>>>,
        tell: impl Fn(&Acquired) -> T,
    ) -> Result<Vec<Answer<T>>, BatchError> {
        let catalogue = self.catalogue.load();
        let in_entry = |index, error| BatchError { entry: Some(index), error };
        let in_all = |error| BatchError { entry: None, error };
        // An unknown namespace is told of the first entry, which is the first that is looked at.
        let namespace = named(&catalogue, batch.namespace).map_err(|error| in_entry(0, error))?;

        // Those of all entries in one row, and where each entry ends in it.
        let entries = batch.entries.len();
        let (mut policies, mut asks) = (Vec::with_capacity(entries), Vec::with_capacity(entries));
        let mut ends = Vec::with_capacity(entries);
        for (entry, entry_asks) in batch.entries.enumerate() {
            for (index, ask) in entry_asks.into_iter().enumerate() {
                let found = resolved(namespace, index, ask);
                let (policy, ask) = found.map_err(|error| in_entry(entry, error))?;
                policies.push(policy);
                asks.push(ask);
            }
            ends.push(asks.len());
        }

        // All the room that any entry may need, so that none fails after another was charged.
        let mut room = self.storage.reserve(&asks).map_err(|error| in_all(error.into()))?;
        let estimates = asks.iter().filter(|ask| ask.cost.estimated).count();
        let mut grants = self.reserve_grants(estimates).map_err(in_all)?;

        let mut answers = Vec::with_capacity(entries);
        let mut start = 0;
        for (entry, end) in ends.into_iter().enumerate() {
            let resolved = Resolved { policies: &policies[start..end], asks: &asks[start..end] };
            start = end;
            let answer = self.decide(caller, resolved, Some(&mut room), Some(&mut grants), &tell);
            answers.push(answer.map_err(|error| in_entry(entry, error.into()))?);
        }
        Ok(answers)
    }

    /// Settles grants, each once.
    ///
    /// # Errors
    /// If the namespace is unknown, or the storage failed.
    pub async fn report(
        &self,
        caller: Caller,
        namespace: &str,
        outcomes: &[Outcome],
    ) -> Result<Vec<Reported>, ReportError> {
        if self.catalogue.load().namespace(namespace).is_none() {
            return Err(ReportError::UnknownNamespace(namespace.to_owned()));
        }
        let mut results = Vec::with_capacity(outcomes.len());
        for outcome in outcomes {
            let taken = outcome.grant.map_or(Taken::Unknown, |id| {
                self.grants.settle(id, caller.principal, namespace, caller.now)
            });
            let result = match taken {
                Taken::Open(grant) => {
                    self.settle(&grant, outcome.actual_cost, caller.now).await?;
                    Reported::Applied
                }
                Taken::Settled => Reported::Duplicate,
                Taken::Unknown => Reported::UnknownGrant,
            };
            let count = match result {
                Reported::Applied => &self.reports.applied,
                Reported::Duplicate => &self.reports.duplicate,
                Reported::UnknownGrant => &self.reports.unknown_grant,
            };
            count.fetch_add(1, Ordering::Relaxed);
            results.push(result);
        }
        Ok(results)
    }

    /// One bounded round of housekeeping: full cells leave, and what expired is settled as charged.
    ///
    /// # Errors
    /// If the storage failed.
    pub async fn tend(&self) -> Result<(), StorageError> {
        let now = self.clock.now();
        self.storage.tend(&self.catalogue.load(), now);
        for grant in self.grants.expire(now) {
            self.settle(&grant, None, now).await?;
        }
        Ok(())
    }

    /// Room for so many grants, one for each estimate.
    fn reserve_grants(&self, amount: usize) -> Result<Reservation, AcquireError> {
        self.grants.reserve(amount).ok_or(AcquireError::GrantsFull)
    }

    /// Charges and concludes; when it may be told is in the answer.
    fn decide<T>(
        &self,
        caller: Caller,
        resolved: Resolved<'_>,
        room: Option<&mut Room>,
        grants: Option<&mut Reservation>,
        tell: impl FnOnce(&Acquired) -> T,
    ) -> Result<Answer<T>, StorageError> {
        let mut acquired = Acquired::default();
        let charge = Charge { charging: Charging::AllOrNothing, asks: resolved.asks };
        let answer = self.storage.apply(&charge, room, caller.now, &mut acquired.decision)?;
        // Concluded at once: a caller that goes away while the disk is at it must not leave an estimate out
        // that nobody can settle.
        self.conclude(caller, resolved, grants, &mut acquired);
        Ok(answer.map(|()| tell(&acquired)))
    }

    /// Counts a decision, and opens the grant that it owes in the room that is there for it.
    fn conclude(
        &self,
        caller: Caller,
        Resolved { policies, asks }: Resolved<'_>,
        grants: Option<&mut Reservation>,
        Acquired { decision, grant }: &mut Acquired,
    ) {
        for (policy, verdict) in policies.iter().zip(&decision.verdicts) {
            if verdict.cost > 0 {
                policy.decisions.count(decision, verdict.admission);
            }
        }
        let estimate = asks.iter().position(|ask| ask.cost.estimated);
        let Some((ask, room)) = estimate.zip(grants).filter(|_| decision.allowed) else { return };
        let owed = Grant {
            principal: caller.principal,
            policy: Arc::clone(policies[ask]),
            cell: asks[ask].cell,
            amount: asks[ask].cost.tokens,
            expires_at: caller.now.after(limits::ESTIMATE_LIFE),
        };
        let opened = self.grants.open_grant(owed, room, &*self.entropy);
        *grant = opened.map(|id| (ask, id));
    }

    async fn settle(
        &self,
        grant: &Grant,
        actual: Option<u64>,
        now: Time,
    ) -> Result<(), StorageError> {
        // The policy as it is now: its settings may have changed since the grant.
        let catalogue = self.catalogue();
        let policy = catalogue.numbered(grant.policy.number).unwrap_or(&grant.policy);
        let settlement = Settlement {
            cell: grant.cell,
            number: policy.number,
            policy: &policy.settings,
            keeping: policy.keeping,
            charged: grant.amount,
            actual: actual.unwrap_or(grant.amount),
        };
        let settled = self.storage.settle(&settlement, now)?.told().await?;
        if settled.dropped > 0 {
            policy.decisions.count_dropped_debt(settled.dropped);
        }
        Ok(())
    }
}

/// An Acquire whose names are found: its asks, and the policy of each.
#[derive(Clone, Copy)]
struct Resolved<'a> {
    policies: &'a [&'a Arc<Policy>],
    asks: &'a [CellAsk<'a>],
}

fn named<'a>(catalogue: &'a Catalogue, namespace: &str) -> Result<&'a Namespace, AcquireError> {
    let found = catalogue.namespace(namespace);
    found.ok_or_else(|| AcquireError::UnknownNamespace(namespace.to_owned()))
}

/// The ask of that index, with its policy.
fn resolved<'a>(
    namespace: &'a Namespace,
    index: usize,
    Ask { policy: name, key, cost }: Ask<'_>,
) -> Result<(&'a Arc<Policy>, CellAsk<'a>), AcquireError> {
    let policy = namespace
        .policy(name)
        .ok_or_else(|| AcquireError::UnknownPolicy { ask: index, policy: name.to_owned() })?;
    // A limit of 0 denies all, which is an answer; above another limit there is none.
    let most = policy.settings.limit.capacity();
    if most > 0 && cost.tokens > most {
        return Err(AcquireError::NeverPossible {
            ask: index,
            policy: name.to_owned(),
            cost: cost.tokens,
            most,
        });
    }
    Ok((policy, policy.ask(key, cost)))
}
