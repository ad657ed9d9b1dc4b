//! The rival: a gRPC service that decides nothing, as anyone would write it with tonic.
//!
//! What Fusebox takes beyond it is the price of deciding, and of whatever it does otherwise than tonic.

use fusebox_proto::{
    envoy::service::ratelimit::v3::{
        RateLimitRequest, RateLimitResponse,
        rate_limit_response::{Code, DescriptorStatus, RateLimit, rate_limit::Unit},
        rate_limit_service_server::{RateLimitService, RateLimitServiceServer},
    },
    v1::{
        AcquireBatchRequest, AcquireBatchResponse, AcquireRequest, AcquireResponse, Decision,
        ReportRequest, ReportResponse, Verdict, WatchRequest, WatchResponse,
        resilience_server::{Resilience, ResilienceServer},
    },
};
use tokio::{net::TcpListener, runtime::Runtime};
use tonic::{
    Request, Response, Status,
    codegen::BoxStream,
    transport::{Server, server::TcpIncoming},
};

use crate::{Result, print, rules};

pub(crate) fn serve() -> Result<()> {
    Runtime::new()?.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        print(&format!("{}\n", listener.local_addr()?))?;
        let services = Server::builder()
            .add_service(ResilienceServer::new(Constant))
            .add_service(RateLimitServiceServer::new(Constant));
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        Ok(services.serve_with_incoming(incoming).await?)
    })
}

struct Constant;

#[tonic::async_trait]
impl Resilience for Constant {
    async fn acquire(
        &self,
        request: Request<AcquireRequest>,
    ) -> Result<Response<AcquireResponse>, Status> {
        Ok(Response::new(allowed(request.get_ref())))
    }

    async fn acquire_batch(
        &self,
        request: Request<AcquireBatchRequest>,
    ) -> Result<Response<AcquireBatchResponse>, Status> {
        let responses = request.get_ref().requests.iter().map(allowed).collect();
        Ok(Response::new(AcquireBatchResponse { responses }))
    }

    async fn report(&self, _: Request<ReportRequest>) -> Result<Response<ReportResponse>, Status> {
        Err(Status::unimplemented("nothing reports here"))
    }

    type WatchStream = BoxStream<WatchResponse>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("nothing is told here"))
    }
}

#[tonic::async_trait]
impl RateLimitService for Constant {
    async fn should_rate_limit(
        &self,
        request: Request<RateLimitRequest>,
    ) -> Result<Response<RateLimitResponse>, Status> {
        let statuses = (0..).zip(&request.get_ref().descriptors).map(|(index, _)| passes(index));
        Ok(Response::new(RateLimitResponse {
            overall_code: Code::Ok.into(),
            statuses: statuses.collect(),
            ..RateLimitResponse::default()
        }))
    }
}

/// As long as what Fusebox answers to that descriptor, in the middle of its unit.
fn passes(descriptor: u32) -> DescriptorStatus {
    let (_, unit) = rules::unit(descriptor);
    let seconds = if unit == Unit::Minute { 30 } else { 1_800 };
    DescriptorStatus {
        code: Code::Ok.into(),
        current_limit: Some(RateLimit {
            requests_per_unit: rules::PER_UNIT,
            unit: unit.into(),
            name: String::new(),
        }),
        limit_remaining: 999_940_000,
        duration_until_reset: Some(prost_types::Duration { seconds, nanos: 0 }),
        quota: None,
    }
}

/// As long as what Fusebox answers when a key of the policy `slow` was asked some thousand times.
fn allowed(request: &AcquireRequest) -> AcquireResponse {
    let verdict = || Verdict {
        decision: Decision::Allow.into(),
        limit: Some(1_000_000_000),
        remaining: Some(999_940_000),
        reset_after: Some(prost_types::Duration { seconds: 5, nanos: 184_000_000 }),
        ..Verdict::default()
    };
    AcquireResponse {
        decision: Decision::Allow.into(),
        verdicts: request.asks.iter().map(|_| verdict()).collect(),
        ..AcquireResponse::default()
    }
}
