//! The gRPC service: parses, asks the app, and answers.

pub mod admin;
pub mod calls;
mod delivery;
mod once;
mod parse;
mod respond;
mod status;

use std::sync::Arc;

use fusebox_proto::v1::{
    AcquireBatchRequest, AcquireBatchResponse, AcquireRequest, AcquireResponse, ReportRequest,
    ReportResponse, resilience_server::Resilience,
};
use tonic::{Request, Response, Status};

pub use self::once::Answers;
use self::{
    delivery::{Delivery, Ended},
    respond::Told,
};
use crate::{
    app::{App, Caller, Principal},
    lifecycle::{Lifecycle, Phase},
    storage::Answer,
};

/// `fusebox.v1.Resilience`.
pub struct Service {
    lifecycle: Arc<Lifecycle>,
    answers: Arc<Answers>,
}

impl Service {
    /// A service that answers once `lifecycle` is ready, and remembers some of its `answers`.
    pub fn new(lifecycle: Arc<Lifecycle>, answers: Arc<Answers>) -> Self {
        Self { lifecycle, answers }
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
        let request = request.get_ref();
        let wanted = parse::acquire(request)?;
        if let Some((client, id)) = wanted.request {
            let named = self.answers.key(caller.principal, client, id);
            let named = (named, self.answers.digest(request));
            let decide = || decided(app, caller, wanted);
            let (response, delivery) = self.answers.answer(named, app, decide).await?;
            return Ok(delivered(response, delivery));
        }
        let answer = if wanted.max_wait.is_some() {
            decided(app, caller, wanted).await?
        } else {
            // Nearly always, and there is nothing to wait for.
            at_once(app, caller, wanted)?
        };
        let (response, delivery) = watched(answer, app).await?;
        Ok(delivered(response, delivery))
    }

    async fn acquire_batch(
        &self,
        request: Request<AcquireBatchRequest>,
    ) -> Result<Response<AcquireBatchResponse>, Status> {
        let (app, caller) = self.arrive()?;
        let batch = parse::batch(request.get_ref())?;
        let answers = app.acquire_batch(caller, batch, |told| respond::acquired(told, None));
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
        let delivery = (!deliveries.is_empty()).then(|| {
            Delivery::new(move |ended| match ended {
                Ended::Arrived => deliveries.iter().for_each(Delivery::arrived),
                Ended::Lost => drop(deliveries),
            })
        });
        Ok(delivered(AcquireBatchResponse { responses }, delivery))
    }

    async fn report(
        &self,
        request: Request<ReportRequest>,
    ) -> Result<Response<ReportResponse>, Status> {
        let (app, caller) = self.arrive()?;
        let request = request.into_inner();
        let report = parse::report(&request)?;
        let reported = app.report(caller, &report).await;
        let (results, renewed) = reported.map_err(|error| status::report(&error))?;
        Ok(Response::new(respond::reported(&results, &renewed, request.renew_grant_ids)))
    }
}

/// Decides an Acquire that does not wait in line.
fn at_once(app: &App, caller: Caller, wanted: parse::Wanted<'_>) -> Result<Answer<Told>, Status> {
    let answer = app.acquire(caller, wanted.acquire(), |told| respond::acquired(told, None));
    answer.map_err(|error| status::acquire(&error, None))
}

/// Decides an Acquire, when it is its turn if it waits.
async fn decided(
    app: &App,
    caller: Caller,
    wanted: parse::Wanted<'_>,
) -> Result<Answer<Told>, Status> {
    let Some((max_wait, waiting)) = wanted.waiting() else { return at_once(app, caller, wanted) };
    let answer = app.acquire_in_line(caller, waiting, max_wait, respond::acquired).await;
    answer.map_err(|error| status::acquire(&error, None))
}

/// An answer, and what watches over it from now on if it gives permits.
fn on_its_way(answer: Answer<Told>, app: &Arc<App>) -> Answer<(AcquireResponse, Option<Delivery>)> {
    answer.map(|told| {
        let delivery = told.permits.map(|grant| {
            let app = Arc::clone(app);
            Delivery::new(move |ended| {
                if ended == Ended::Lost {
                    app.take_back(grant);
                }
            })
        });
        (told.response, delivery)
    })
}

async fn watched(
    answer: Answer<Told>,
    app: &Arc<App>,
) -> Result<(AcquireResponse, Option<Delivery>), Status> {
    answered(on_its_way(answer, app)).await
}

/// A response, with what watches over its way.
fn delivered<T>(response: T, delivery: Option<Delivery>) -> Response<T> {
    let mut response = Response::new(response);
    if let Some(delivery) = delivery {
        response.extensions_mut().insert(delivery);
    }
    response
}

async fn answered<T>(answer: Answer<T>) -> Result<T, Status> {
    answer.told().await.map_err(|error| status::acquire(&error.into(), None))
}
