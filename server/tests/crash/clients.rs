//! Callers of a server that may be killed any moment: they write to the ledger what they ask and are told.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use fusebox_proto::v1::{
    AcquireBatchRequest, AcquireRequest, AcquireResponse, Ask, Decision, GrantOutcome,
    ReportRequest, ReportResult,
};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::{
    chance::Chance,
    ledger::{Ledger, Ticket, What},
    policies::{Kept, Key, NAMESPACE, SLOW},
    process::Client,
};

/// Entries of a batch, at most.
const BATCH: u64 = 12;

/// The first number of keys that no caller asks about, and what is charged of each.
const NOBODYS: u64 = 1_000;
const WEIGHT: u64 = 1_000;

/// An estimate that was granted.
#[derive(Clone, Debug)]
pub struct Granted {
    pub key: Key,
    pub id: String,
    pub estimate: u64,
}

/// One who asks: what it knows, and whom it tells.
pub struct Caller {
    client: Client,
    ledger: Arc<Mutex<Ledger>>,
    chance: Chance,
    keys: Vec<Key>,
    /// Set when no more is to be asked.
    enough: Arc<AtomicBool>,
}

/// Callers that run.
pub struct Callers {
    tasks: JoinSet<()>,
    enough: Arc<AtomicBool>,
}

/// Estimates that nobody reported, shared by all callers.
pub type LeftOpen = Arc<Mutex<Vec<Granted>>>;

impl Callers {
    /// Lets callers of each sort loose, until they get no answer or have [enough](Self::enough).
    pub fn let_loose(mut caller: impl FnMut() -> Caller, left_open: &LeftOpen) -> Self {
        let (mut tasks, enough) = (JoinSet::new(), Arc::default());
        let mut caller = || Caller { enough: Arc::clone(&enough), ..caller() };
        for one in [caller(), caller()] {
            tasks.spawn(async { one.one_by_one().await.unwrap_or_else(no_answer) });
        }
        let many = caller();
        tasks.spawn(async { many.in_batches().await.unwrap_or_else(no_answer) });
        let holder = caller();
        tasks.spawn(async { holder.by_permits().await.unwrap_or_else(no_answer) });
        let (estimates, open) = (caller(), Arc::clone(left_open));
        tasks.spawn(async move { estimates.by_estimates(&open).await.unwrap_or_else(no_answer) });
        Self { tasks, enough }
    }

    /// Nothing more is asked, and all that was is answered.
    pub async fn enough(self) {
        self.enough.store(true, Ordering::Relaxed);
        self.tasks.join_all().await;
    }
}

/// The server went away, or goes: what was asked was perhaps charged. Anything else is a mistake of its.
#[allow(clippy::needless_pass_by_value)] // so that `unwrap_or_else` takes it as it is
pub fn no_answer(status: Status) {
    let gone = [Code::Unavailable, Code::Cancelled, Code::Unknown, Code::Internal];
    assert!(gone.contains(&status.code()), "{status:?}");
}

impl Caller {
    pub fn new(client: &Client, ledger: &Arc<Mutex<Ledger>>, chance: Chance) -> Self {
        let keys = ledger.lock().keys();
        Self {
            client: client.clone(),
            ledger: Arc::clone(ledger),
            chance,
            keys,
            enough: Arc::default(),
        }
    }

    fn goes_on(&self) -> bool {
        !self.enough.load(Ordering::Relaxed)
    }

    fn some_key(&mut self) -> (Key, u64) {
        let key = self.chance.one_of(&self.keys);
        (key, self.chance.within(key.policy.costs()))
    }

    /// Charges of one key, or of two together.
    async fn one_by_one(mut self) -> Result<(), Status> {
        self.keys.retain(|key| key.policy.ttl().is_none());
        while self.goes_on() {
            let mut wanted = vec![self.some_key()];
            let other = self.some_key();
            if self.chance.once_in(3) && other.0 != wanted[0].0 {
                wanted.push(other);
            }
            self.acquire(&wanted, false).await?;
        }
        Ok(())
    }

    /// Charges all of these keys, if that is allowed; the grant, if it is estimated.
    pub async fn acquire(
        &mut self,
        wanted: &[(Key, u64)],
        estimated: bool,
    ) -> Result<Option<Granted>, Status> {
        let request = request(wanted, estimated);
        let tickets = sends(&mut self.ledger.lock(), wanted);
        let response = self.client.acquire(request).await?.into_inner();
        let allowed = conclude(&mut self.ledger.lock(), &tickets, &response);
        let (key, estimate) = wanted[0];
        Ok((allowed && estimated).then_some(Granted { key, id: response.grant_id, estimate }))
    }

    async fn in_batches(mut self) -> Result<(), Status> {
        self.keys.retain(|key| key.policy.ttl().is_none());
        while self.goes_on() {
            let entries: Vec<_> =
                (0..self.chance.within(1..BATCH)).map(|_| vec![self.some_key()]).collect();
            let batch = batch_of(entries.iter().map(|wanted| in_batch(wanted)).collect());
            let tickets: Vec<_> = {
                let mut ledger = self.ledger.lock();
                entries.iter().map(|wanted| sends(&mut ledger, wanted)).collect()
            };
            let responses = self.client.acquire_batch(batch).await?.into_inner().responses;
            let mut ledger = self.ledger.lock();
            for (tickets, response) in tickets.iter().zip(&responses) {
                conclude(&mut ledger, tickets, response);
            }
        }
        Ok(())
    }

    /// Estimates that turn out too high or too low, and some that nobody ever reports.
    async fn by_estimates(mut self, left_open: &LeftOpen) -> Result<(), Status> {
        self.keys.retain(|Key { policy, .. }| {
            policy.is_bucket() && policy.kept != Kept::Fast && policy.burst() > 100
        });
        while self.goes_on() {
            let wanted = self.some_key();
            let Some(granted) = self.acquire(&[wanted], true).await? else { continue };
            if self.chance.once_in(4) {
                left_open.lock().push(granted);
                continue;
            }
            let actual = self.chance.within(0..granted.estimate + 5);
            let result = self.report(&granted, actual).await?;
            assert_eq!(result, ReportResult::Applied, "{granted:?} was open");
        }
        Ok(())
    }

    /// Permits that are released after a while, and some that never are.
    async fn by_permits(mut self) -> Result<(), Status> {
        self.keys.retain(|key| key.policy.ttl().is_some());
        let mut held = VecDeque::new();
        while self.goes_on() {
            let wanted = self.some_key();
            let ticket = self.ledger.lock().sends(wanted.0, What::Charge, wanted.1);
            let response = self.client.acquire(request(&[wanted], false)).await?.into_inner();
            if conclude(&mut self.ledger.lock(), &[ticket], &response) && !self.chance.once_in(50) {
                held.push_back((ticket, response.grant_id));
            }
            if self.chance.once_in(3) {
                continue;
            }
            let Some((ticket, grant_id)) = held.pop_front() else { continue };
            self.ledger.lock().releases(ticket);
            let result = self.outcome(GrantOutcome { grant_id, ..Default::default() }).await?;
            assert_ne!(result, ReportResult::Duplicate, "it is released once");
        }
        Ok(())
    }

    /// Reports what a call cost.
    pub async fn report(&mut self, granted: &Granted, actual: u64) -> Result<ReportResult, Status> {
        let Granted { key, id, estimate } = granted.clone();
        let what = if actual > estimate { What::Owed } else { What::Credit };
        let ticket = self.ledger.lock().sends(key, what, actual.abs_diff(estimate));
        let outcome =
            GrantOutcome { grant_id: id, actual_cost: Some(actual), ..Default::default() };
        let result = self.outcome(outcome).await?;
        let mut ledger = self.ledger.lock();
        match result {
            ReportResult::Applied => ledger.done(ticket),
            _ => ledger.refused(ticket),
        }
        Ok(result)
    }

    async fn outcome(&mut self, outcome: GrantOutcome) -> Result<ReportResult, Status> {
        let report = ReportRequest {
            namespace: NAMESPACE.into(),
            outcomes: vec![outcome],
            ..Default::default()
        };
        let results = self.client.report(report).await?.into_inner().results;
        Ok(ReportResult::try_from(results[0]).unwrap())
    }

    /// Asks what is left of every key, while nobody else asks, and has the ledger compare.
    pub async fn look(&mut self) {
        for key in self.keys.clone() {
            let (asked, left) = self.left(key).await;
            let compared = self.ledger.lock().left(asked, left);
            compared.unwrap_or_else(|lost| panic!("{lost}"));
        }
    }

    /// Charges many keys that no caller asks about, so that there is much to move.
    pub async fn weigh_down(&mut self, keys: u64) {
        for response in self.weights(keys, WEIGHT).await {
            assert_eq!(response.decision(), Decision::Allow);
        }
    }

    /// All of them are still charged, since that moment, and no more than once.
    pub async fn check_weights(&mut self, keys: u64, since: Instant) {
        let responses = self.weights(keys, 0).await;
        let least = SLOW.burst() - i128::from(WEIGHT);
        let most = least + SLOW.refill(since.elapsed()) / SLOW.parts();
        for (key, response) in responses.iter().enumerate() {
            let left = i128::from(response.verdicts[0].remaining.unwrap());
            assert!((least..=most).contains(&left), "weight {key} has {left} left, not {most}");
        }
    }

    async fn weights(&mut self, keys: u64, cost: u64) -> Vec<AcquireResponse> {
        let mut responses = Vec::new();
        let numbers: Vec<u64> = (0..keys).map(|key| NOBODYS + key).collect();
        for numbers in numbers.chunks(1_000) {
            let keys = numbers.iter().map(|number| Key { policy: &SLOW, number: *number });
            let requests = keys.map(|key| in_batch(&[(key, cost)])).collect();
            let batch = batch_of(requests);
            responses
                .extend(self.client.acquire_batch(batch).await.unwrap().into_inner().responses);
        }
        responses
    }

    /// Asks what is left of one key.
    pub async fn left(&mut self, key: Key) -> (Ticket, u64) {
        let ticket = self.ledger.lock().sends(key, What::Left, 0);
        let response = self.client.acquire(request(&[(key, 0)], false)).await.unwrap().into_inner();
        (ticket, response.verdicts[0].remaining.unwrap())
    }
}

fn request(wanted: &[(Key, u64)], estimated: bool) -> AcquireRequest {
    let asks = wanted.iter().map(|(key, cost)| Ask {
        policy: key.policy.name.into(),
        key: format!("key-{}", key.number),
        cost: Some(*cost),
        estimated,
        ..Default::default()
    });
    AcquireRequest { namespace: NAMESPACE.into(), asks: asks.collect(), ..Default::default() }
}

fn in_batch(wanted: &[(Key, u64)]) -> AcquireRequest {
    AcquireRequest { namespace: String::new(), ..request(wanted, false) }
}

fn batch_of(requests: Vec<AcquireRequest>) -> AcquireBatchRequest {
    AcquireBatchRequest { namespace: NAMESPACE.into(), requests, ..Default::default() }
}

fn sends(ledger: &mut Ledger, wanted: &[(Key, u64)]) -> Vec<Ticket> {
    wanted.iter().map(|(key, cost)| ledger.sends(*key, What::Charge, *cost)).collect()
}

/// Whether it was allowed.
fn conclude(ledger: &mut Ledger, tickets: &[Ticket], response: &AcquireResponse) -> bool {
    let allowed = response.decision() == Decision::Allow;
    for ticket in tickets {
        if allowed { ledger.done(*ticket) } else { ledger.refused(*ticket) }
    }
    allowed
}
