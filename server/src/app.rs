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
    catalogue::{Catalogue, CellId, Policy},
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
pub struct Acquire<'a> {
    /// Namespace of the policies.
    pub namespace: &'a str,
    /// 1 to 16 asks; at most one is estimated.
    pub asks: ArrayVec<Ask<'a>, MAX_RULES>,
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
#[derive(Debug)]
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

    /// Decides one Acquire.
    ///
    /// # Errors
    /// If nothing could be decided.
    pub fn acquire(
        &self,
        caller: Caller,
        acquire: &Acquire<'_>,
    ) -> Result<Answer<Acquired>, AcquireError> {
        let catalogue = self.catalogue.load();
        let resolved = Resolved::new(&catalogue, acquire)?;
        let grant = self.reserve_grant(&resolved)?;
        Ok(self.decide(caller, &resolved, None, grant)?)
    }

    /// Decides each Acquire of a batch, in order, against one snapshot of the policies.
    ///
    /// # Errors
    /// If one of them could not be decided; then nothing was charged, unless the storage failed.
    pub fn acquire_batch(
        &self,
        caller: Caller,
        entries: &[Acquire<'_>],
    ) -> Result<Vec<Answer<Acquired>>, BatchError> {
        let catalogue = self.catalogue.load();
        let in_entry = |index, error| BatchError { entry: Some(index), error };
        let resolved = (0..).zip(entries).map(|(index, entry)| {
            Resolved::new(&catalogue, entry).map_err(|error| in_entry(index, error))
        });
        let resolved = resolved.collect::<Result<Vec<_>, _>>()?;

        // All the room that any entry may need, so that none fails after another was charged.
        let rooms = resolved.iter().map(|entry| {
            let room = self.storage.reserve(&entry.charge)?;
            Ok((room, self.reserve_grant(entry)?))
        });
        let rooms = rooms.collect::<Result<Vec<_>, AcquireError>>();
        let rooms = rooms.map_err(|error| BatchError { entry: None, error })?;

        let answers =
            (0..).zip(resolved.iter().zip(rooms)).map(|(index, (entry, (room, grant)))| {
                let answer = self.decide(caller, entry, Some(room), grant);
                answer.map_err(|error| in_entry(index, error.into()))
            });
        answers.collect()
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

    /// Room for the grant that an Acquire may open, if it may.
    fn reserve_grant(&self, resolved: &Resolved<'_>) -> Result<Option<Reservation>, AcquireError> {
        let reserve = |_| self.grants.reserve(1).ok_or(AcquireError::GrantsFull);
        resolved.estimate.map(reserve).transpose()
    }

    /// Charges and concludes; when it may be told is in the answer.
    fn decide(
        &self,
        caller: Caller,
        resolved: &Resolved<'_>,
        room: Option<Room>,
        grant: Option<Reservation>,
    ) -> Result<Answer<Acquired>, StorageError> {
        let owed = resolved.estimate.zip(grant);
        let answer = self.storage.apply(&resolved.charge, room, caller.now)?;
        // Concluded at once: a caller that goes away while the disk is at it must not leave an estimate out
        // that nobody can settle.
        Ok(answer.map(|decision| self.conclude(caller, decision, &resolved.policies, owed)))
    }

    /// Counts a decision, and opens the grant that it owes in the room that is there for it.
    fn conclude(
        &self,
        caller: Caller,
        decision: Decision,
        policies: &[&Arc<Policy>],
        owed: Option<(Estimate, Reservation)>,
    ) -> Acquired {
        for (policy, verdict) in policies.iter().zip(&decision.verdicts) {
            if verdict.cost > 0 {
                policy.decisions.count(&decision, verdict.admission);
            }
        }
        let open = |(Estimate { ask, cell, amount }, mut room)| {
            let grant = Grant {
                principal: caller.principal,
                policy: Arc::clone(policies[ask]),
                cell,
                amount,
                expires_at: caller.now.after(limits::ESTIMATE_LIFE),
            };
            Some((ask, self.grants.open_grant(grant, &mut room, &*self.entropy)?))
        };
        let grant = owed.filter(|_| decision.allowed).and_then(open);
        Acquired { decision, grant }
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

/// An Acquire whose names are found.
struct Resolved<'a> {
    policies: ArrayVec<&'a Arc<Policy>, MAX_RULES>,
    charge: Charge<'a>,
    estimate: Option<Estimate>,
}

/// The ask that opens a grant.
#[derive(Clone, Copy)]
struct Estimate {
    ask: usize,
    cell: CellId,
    amount: u64,
}

impl<'a> Resolved<'a> {
    fn new(catalogue: &'a Catalogue, acquire: &Acquire<'_>) -> Result<Self, AcquireError> {
        let namespace = catalogue
            .namespace(acquire.namespace)
            .ok_or_else(|| AcquireError::UnknownNamespace(acquire.namespace.to_owned()))?;
        let mut policies = ArrayVec::new();
        let mut asks = ArrayVec::new();
        for (index, Ask { policy: name, key, cost }) in acquire.asks.iter().enumerate() {
            let policy = namespace.policy(name).ok_or_else(|| AcquireError::UnknownPolicy {
                ask: index,
                policy: (*name).to_owned(),
            })?;
            // A limit of 0 denies all, which is an answer; above another limit there is none.
            let most = policy.settings.limit.capacity();
            if most > 0 && cost.tokens > most {
                return Err(AcquireError::NeverPossible {
                    ask: index,
                    policy: (*name).to_owned(),
                    cost: cost.tokens,
                    most,
                });
            }
            policies.push(policy);
            asks.push(CellAsk {
                cell: policy.cells.cell(key),
                number: policy.number,
                policy: &policy.settings,
                keeping: policy.keeping,
                cost: *cost,
            });
        }
        let estimated = |(ask, CellAsk { cell, cost, .. }): (usize, &CellAsk<'_>)| {
            cost.estimated.then_some(Estimate { ask, cell: *cell, amount: cost.tokens })
        };
        let estimate = asks.iter().enumerate().find_map(estimated);
        let charge = Charge { charging: Charging::AllOrNothing, asks };
        Ok(Self { policies, charge, estimate })
    }
}
