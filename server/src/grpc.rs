//! The gRPC service: parses, asks the app, and answers.

pub mod admin;
pub mod calls;
mod delivery;
mod once;
mod parse;
pub mod ratelimit;
mod received;
mod respond;
mod session;
mod status;
mod watch;

use std::sync::Arc;

use fusebox_proto::v1::{
    AcquireBatchRequest, AcquireBatchResponse, AcquireRequest, AcquireResponse, ReportRequest,
    ReportResponse, SessionRequest, WatchRequest, resilience_server::Resilience,
};
use tonic::{Request, Response, Status, Streaming};

use self::{
    delivery::{Delivery, Ended},
    once::Turn,
    respond::Reply,
};
pub use self::{once::Answers, session::Session, watch::Messages};
use crate::{
    app::{Acquired, App, Caller, Principal},
    lifecycle::{Lifecycle, Phase},
    storage::Answer,
};

/// `fusebox.v1.Resilience`.
#[derive(Clone)]
pub struct Service {
    lifecycle: Arc<Lifecycle>,
    answers: Arc<Answers>,
}

impl Service {
    /// A service that answers once `lifecycle` is ready, and remembers some of its `answers`.
    pub fn new(lifecycle: Arc<Lifecycle>, answers: Arc<Answers>) -> Self {
        Self { lifecycle, answers }
    }

    /// The answer to an Acquire, and what watches over its way.
    async fn acquire_told(
        &self,
        app: &Arc<App>,
        caller: Caller,
        request: &AcquireRequest,
    ) -> Told<AcquireResponse> {
        let wanted = parse::acquire(request)?;
        if let Some((client, id)) = wanted.request {
            let named = self.answers.key(caller.principal, client, id);
            let named = (named, self.answers.digest(&request.namespace, request));
            let turn = self.answers.begin(named, None, app.time())?;
            return turn.answer(app, None, || decided(app, caller, wanted)).await;
        }
        let answer = if wanted.max_wait.is_some() {
            decided(app, caller, wanted).await?
        } else {
            // Nearly always, and there is nothing to wait for.
            at_once(app, caller, wanted)?
        };
        watched(answer, app).await
    }

    /// The answer to a batch, and what watches over its way.
    async fn acquire_batch_told(
        &self,
        app: &Arc<App>,
        caller: Caller,
        request: &AcquireBatchRequest,
    ) -> Told<AcquireBatchResponse> {
        let batch = parse::batch(request)?;
        if request.requests.iter().any(|entry| !entry.request_id.is_empty()) {
            return self.acquire_batch_once(app, caller, request).await;
        }
        let answers =
            app.acquire_batch(caller, batch, |acquired| respond::acquired(acquired, None));
        let answers = answers.map_err(|batch| status::acquire(&batch.error, batch.entry))?;
        // What any of them holds is watched before the first is waited for.
        let answers: Vec<_> = answers.into_iter().map(|answer| on_its_way(answer, app)).collect();
        let mut responses = Vec::with_capacity(answers.len());
        let mut deliveries = Vec::new();
        for answer in answers {
            let (response, delivery) = answered(answer).await?;
            responses.push(response);
            deliveries.extend(delivery);
        }
        Ok((AcquireBatchResponse { responses }, together(deliveries)))
    }

    /// A batch of which some entries have an id.
    ///
    /// All that is this caller's to decide is decided and told to whom it concerns before anything is waited for:
    /// else two batches that join each other's entries would wait for each other.
    async fn acquire_batch_once(
        &self,
        app: &Arc<App>,
        caller: Caller,
        batch: &AcquireBatchRequest,
    ) -> Told<AcquireBatchResponse> {
        let mut turns = Vec::with_capacity(batch.requests.len());
        let mut ours = Vec::new();
        for index in 0..batch.requests.len() {
            let turn = self.turn(app, caller, batch, index)?;
            if matches!(turn, None | Some(Turn::First(_))) {
                ours.push(index);
            }
            turns.push(turn);
        }
        let mut answers = Vec::new();
        if !ours.is_empty() {
            let decide = parse::some_of(batch, &ours);
            let decided =
                app.acquire_batch(caller, decide, |acquired| respond::acquired(acquired, None));
            answers = decided.map_err(|batch| {
                status::acquire(&batch.error, batch.entry.map(|entry| ours[entry]))
            })?;
        }
        // One for each of ours, in their order.
        let mut answers = answers.into_iter();
        let mut pending = Vec::with_capacity(turns.len());
        for turn in turns {
            pending.extend(match turn {
                None => answers.next().map(|answer| Pending::Plain(on_its_way(answer, app))),
                Some(Turn::First(first)) => {
                    let decided = |answer| Pending::Shared(Turn::decided(first, answer, app));
                    answers.next().map(decided)
                }
                Some(turn) => Some(Pending::Shared(turn)),
            });
        }

        let mut responses = Vec::with_capacity(pending.len());
        let mut deliveries = Vec::new();
        for (index, pending) in pending.into_iter().enumerate() {
            let (response, delivery) = match pending {
                Pending::Plain(answer) => answered(answer).await?,
                Pending::Shared(turn) => {
                    // Who decides it may have gone away: then it is this caller's turn after all.
                    let decide = async || {
                        let acquire = parse::one_of(batch, index);
                        let tell = |acquired: &Acquired| respond::acquired(acquired, None);
                        let answer = app.acquire(caller, acquire, tell);
                        answer.map_err(|error| status::acquire(&error, Some(index)))
                    };
                    turn.answer(app, Some(index), decide).await?
                }
            };
            responses.push(response);
            deliveries.extend(delivery);
        }
        Ok((AcquireBatchResponse { responses }, together(deliveries)))
    }

    /// Whose turn it is to decide an entry of a batch, if it has an id.
    fn turn(
        &self,
        app: &App,
        caller: Caller,
        batch: &AcquireBatchRequest,
        index: usize,
    ) -> Result<Option<Turn<'_>>, Status> {
        let entry = &batch.requests[index];
        if entry.request_id.is_empty() {
            return Ok(None);
        }
        let client = batch.client.as_ref().map_or("", |client| &client.id);
        let key = self.answers.key(caller.principal, client, &entry.request_id);
        let digest = self.answers.digest(&batch.namespace, entry);
        self.answers.begin((key, digest), Some(index), app.time()).map(Some)
    }

    /// The app, and who calls it at this one moment.
    fn arrive(&self) -> Result<(&Arc<App>, Caller), Status> {
        arrive(&self.lifecycle)
    }
}

/// The app, if it answers, and who calls it at this one moment.
fn arrive(lifecycle: &Lifecycle) -> Result<(&Arc<App>, Caller), Status> {
    match (lifecycle.app(), lifecycle.phase()) {
        (Some(app), Phase::Ready | Phase::Draining) => Ok((app, app.caller(Principal::Anonymous))),
        (_, Phase::Failed) => Err(Status::unavailable(
            "the storage failed, and nothing is admitted until the server restarts",
        )),
        _ => Err(Status::unavailable("starting: state is being recovered; try again soon")),
    }
}

#[tonic::async_trait]
impl Resilience for Service {
    async fn acquire(
        &self,
        request: Request<AcquireRequest>,
    ) -> Result<Response<AcquireResponse>, Status> {
        let (app, caller) = self.arrive()?;
        self.acquire_told(app, caller, request.get_ref()).await.map(delivered)
    }

    async fn acquire_batch(
        &self,
        request: Request<AcquireBatchRequest>,
    ) -> Result<Response<AcquireBatchResponse>, Status> {
        let (app, caller) = self.arrive()?;
        self.acquire_batch_told(app, caller, request.get_ref()).await.map(delivered)
    }

    type WatchStream = Messages;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Messages>, Status> {
        let (app, caller) = self.arrive()?;
        watch_told(app, caller, request.get_ref()).map(Response::new)
    }

    async fn report(
        &self,
        request: Request<ReportRequest>,
    ) -> Result<Response<ReportResponse>, Status> {
        let (app, caller) = self.arrive()?;
        report_told(app, caller, request.into_inner()).await.map(Response::new)
    }

    type SessionStream = Session;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Session>, Status> {
        let (app, _) = self.arrive()?;
        Session::begin(self.clone(), app, request).map(Response::new)
    }
}

/// An answer, and what watches over its way if it gives permits.
type Told<T> = Result<(T, Option<Delivery>), Status>;

/// The answer to a Report.
async fn report_told(
    app: &App,
    caller: Caller,
    request: ReportRequest,
) -> Result<ReportResponse, Status> {
    let receipt = app.report(caller, &parse::report(&request)?).await;
    let receipt = receipt.map_err(|error| status::report(&error))?;
    Ok(respond::reported(&receipt, request.renew_grant_ids, caller.now.time))
}

/// The answers to a Watch.
fn watch_told(app: &App, caller: Caller, request: &WatchRequest) -> Result<Messages, Status> {
    let watched = parse::watch(request)?;
    let watch = app.watch_circuits(caller, &watched).map_err(|error| status::watch(&error))?;
    Ok(Messages::of(watch))
}

/// What an entry of a batch waits for.
enum Pending<'a> {
    /// The disk.
    Plain(Answer<(AcquireResponse, Option<Delivery>)>),
    /// What all that have its id are told.
    Shared(Turn<'a>),
}

/// Decides an Acquire that does not wait in line.
fn at_once(app: &App, caller: Caller, wanted: parse::Wanted<'_>) -> Result<Answer<Reply>, Status> {
    let answer =
        app.acquire(caller, wanted.acquire(), |acquired| respond::acquired(acquired, None));
    answer.map_err(|error| status::acquire(&error, None))
}

/// Decides an Acquire, when it is its turn if it waits.
async fn decided(
    app: &App,
    caller: Caller,
    wanted: parse::Wanted<'_>,
) -> Result<Answer<Reply>, Status> {
    let Some((max_wait, waiting)) = wanted.waiting() else { return at_once(app, caller, wanted) };
    let answer = app.acquire_in_line(caller, waiting, max_wait, respond::acquired).await;
    answer.map_err(|error| status::acquire(&error, None))
}

/// An answer, and what watches over it from now on if it gives permits.
fn on_its_way(
    answer: Answer<Reply>,
    app: &Arc<App>,
) -> Answer<(AcquireResponse, Option<Delivery>)> {
    answer.map(|reply| {
        let delivery = reply.to_give_back.map(|grant| {
            let app = Arc::clone(app);
            Delivery::new(move |ended| {
                if ended == Ended::Lost {
                    app.take_back(&grant);
                }
            })
        });
        (reply.response, delivery)
    })
}

async fn watched(answer: Answer<Reply>, app: &Arc<App>) -> Told<AcquireResponse> {
    answered(on_its_way(answer, app)).await
}

/// What watches over the way of one response with several answers.
fn together(deliveries: Vec<Delivery>) -> Option<Delivery> {
    (!deliveries.is_empty()).then(|| {
        Delivery::new(move |ended| match ended {
            Ended::Arrived => deliveries.iter().for_each(Delivery::arrived),
            Ended::Lost => drop(deliveries),
        })
    })
}

/// A response, with what watches over its way.
fn delivered<T>((response, delivery): (T, Option<Delivery>)) -> Response<T> {
    let mut response = Response::new(response);
    if let Some(delivery) = delivery {
        response.extensions_mut().insert(delivery);
    }
    response
}

async fn answered<T>(answer: Answer<T>) -> Result<T, Status> {
    answer.told().await.map_err(|error| status::acquire(&error.into(), None))
}
