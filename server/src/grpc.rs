//! The gRPC service: parses, asks the app, and answers.

pub mod calls;
mod parse;
mod respond;
mod status;

use std::sync::Arc;

use fusebox_proto::v1::{
    AcquireBatchRequest, AcquireBatchResponse, AcquireRequest, AcquireResponse, ReportRequest,
    ReportResponse, resilience_server::Resilience,
};
use tonic::{Request, Response, Status};

use crate::{
    app::{App, Caller, Principal},
    lifecycle::{Lifecycle, Phase},
    storage::Answer,
};

/// `fusebox.v1.Resilience`.
pub struct Service {
    lifecycle: Arc<Lifecycle>,
}

impl Service {
    /// A service that answers once `lifecycle` is ready.
    pub fn new(lifecycle: Arc<Lifecycle>) -> Self {
        Self { lifecycle }
    }

    /// The app, and who calls it at this one moment.
    fn arrive(&self) -> Result<(&Arc<App>, Caller), Status> {
        match (self.lifecycle.app(), self.lifecycle.phase()) {
            (Some(app), Phase::Ready | Phase::Draining) => {
                Ok((app, app.caller(Principal::Anonymous)))
            }
            (_, Phase::Failed) => Err(Status::unavailable(
                "the storage failed, and nothing is admitted until the server restarts",
            )),
            _ => Err(Status::unavailable("starting: state is being recovered; try again soon")),
        }
    }
}

#[tonic::async_trait]
impl Resilience for Service {
    async fn acquire(
        &self,
        request: Request<AcquireRequest>,
    ) -> Result<Response<AcquireResponse>, Status> {
        let (app, caller) = self.arrive()?;
        let acquire = parse::acquire(request.get_ref())?;
        let answer = app.acquire(caller, acquire, respond::acquired);
        let answer = answer.map_err(|error| status::acquire(&error, None))?;
        Ok(Response::new(answered(answer).await?))
    }

    async fn acquire_batch(
        &self,
        request: Request<AcquireBatchRequest>,
    ) -> Result<Response<AcquireBatchResponse>, Status> {
        let (app, caller) = self.arrive()?;
        let batch = parse::batch(request.get_ref())?;
        let answers = app.acquire_batch(caller, batch, respond::acquired);
        let answers = answers.map_err(|batch| status::acquire(&batch.error, batch.entry))?;
        let mut responses = Vec::with_capacity(answers.len());
        for answer in answers {
            responses.push(answered(answer).await?);
        }
        Ok(Response::new(AcquireBatchResponse { responses }))
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

async fn answered<T>(answer: Answer<T>) -> Result<T, Status> {
    answer.told().await.map_err(|error| status::acquire(&error.into(), None))
}
