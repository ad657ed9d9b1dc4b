//! The app over a storage that answers later, as one does whose charges must first be durable.

use std::sync::Arc;

use fusebox_core::{Cell, Cost, Decision, Settled, Time};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::*;
use crate::{
    clock::{Clock, SystemClock},
    config::Config,
    entropy::SystemEntropy,
    storage::{self, Embedded, Recovered, journal::Nothing},
};

/// Charges at once, and answers when the test says so.
struct Late {
    cells: Arc<Embedded>,
    answers: Mutex<Vec<(Answers, Decision)>>,
}

type Answers = oneshot::Sender<Result<Decision, StorageError>>;

impl Late {
    fn answer(&self) {
        for (sender, decision) in self.answers.lock().drain(..) {
            let _ = sender.send(Ok(decision));
        }
    }

    /// The answers will never come.
    fn die(&self) {
        self.answers.lock().clear();
    }
}

impl Storage for Late {
    fn apply(
        &self,
        charge: &Charge<'_>,
        room: Option<Reservation>,
        now: Time,
    ) -> Result<Answer<Decision>, StorageError> {
        let Answer::Now(decision) = self.cells.apply(charge, room, now)? else { unreachable!() };
        let (sender, later) = oneshot::channel();
        self.answers.lock().push((sender, decision));
        Ok(Answer::Later(later))
    }

    fn settle(
        &self,
        settlement: &Settlement<'_>,
        now: Time,
    ) -> Result<Answer<Settled<Cell>>, StorageError> {
        self.cells.settle(settlement, now)
    }

    fn reserve(&self, charge: &Charge<'_>) -> Result<Reservation, StorageError> {
        self.cells.reserve(charge)
    }

    fn tend(&self, catalogue: &Catalogue, now: Time) {
        self.cells.tend(catalogue, now);
    }

    fn live(&self) -> usize {
        self.cells.live()
    }
}

fn app() -> (Arc<App>, Arc<Late>) {
    let config = Config::parse(
        "test.yaml",
        "namespaces: {test: {policies: {tokens: {token_bucket: {limit: 10, per: 1h}}}}}",
    );
    let namespaces = config.unwrap().namespaces;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
    let recovered = storage::recover(Nothing::open(), &namespaces, clock, &SystemEntropy);
    let Recovered { catalogue, cells, clock, boot, .. } = recovered.unwrap();
    let late = Arc::new(Late { cells, answers: Mutex::default() });
    let storage = Arc::clone(&late) as Arc<dyn Storage>;
    let app = App::new(catalogue, storage, clock, Arc::new(SystemEntropy), boot);
    (Arc::new(app), late)
}

fn estimate(app: &Arc<App>, cost: u64) -> oneshot::Receiver<Result<Acquired, StorageError>> {
    let cost = Cost { tokens: cost, estimated: true };
    let asks = ArrayVec::from_iter([Ask { policy: "tokens", key: "a", cost }]);
    let caller = app.caller(Principal::Anonymous);
    match app.acquire(caller, &Acquire { namespace: "test", asks }).unwrap() {
        Answer::Later(later) => later,
        Answer::Now(_) => panic!("this storage answers later"),
    }
}

#[tokio::test]
async fn an_answer_that_comes_later_is_the_same() {
    let (app, late) = app();
    let later = estimate(&app, 6);
    late.answer();
    let acquired = later.await.unwrap().unwrap();
    assert!(acquired.decision.allowed);
    let (ask, grant) = acquired.grant.unwrap();
    assert_eq!((ask, app.grants().open()), (0, 1));

    let caller = app.caller(Principal::Anonymous);
    let outcome = Outcome { grant: Some(grant), actual_cost: Some(0) };
    let reported = app.report(caller, "test", &[outcome]).await.unwrap();
    assert_eq!(reported, [Reported::Applied]);
}

#[tokio::test]
async fn a_caller_that_went_away_still_opens_its_grant() {
    let (app, late) = app();
    drop(estimate(&app, 6));
    assert_eq!(app.grants().open(), 1, "its room is reserved");
    late.answer();
    // The conclusion is a task of this thread: it runs when the test lets it.
    tokio::task::yield_now().await;
    assert_eq!(app.grants.expire(Time::from_nanos(u64::MAX)).len(), 1, "and it can expire");
}

#[tokio::test]
async fn a_denial_that_comes_later_owes_nothing() {
    let (app, late) = app();
    let (first, second) = (estimate(&app, 6), estimate(&app, 6));
    assert_eq!(app.grants().open(), 2, "room for both is reserved");
    late.answer();
    assert!(first.await.unwrap().unwrap().grant.is_some());
    let denied = second.await.unwrap().unwrap();
    assert!(!denied.decision.allowed && denied.grant.is_none());
    assert_eq!(app.grants().open(), 1);
}

#[tokio::test]
async fn an_answer_that_never_comes_is_a_failure_and_not_an_allow() {
    let (app, late) = app();
    let later = estimate(&app, 6);
    late.die();
    let failed = later.await.unwrap().unwrap_err();
    assert!(matches!(failed, StorageError::Failed(_)), "{failed}");
    assert_eq!(app.grants().open(), 0);
}
