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
        AcquireBatchRequest, AcquireBatchResponse, AcquireRequest, AcquireResponse, Ask,
        CircuitMode, CircuitState, CircuitStatus, Decision, Evidence, ReportRequest,
        ReportResponse, ReportResult, SessionRequest, SessionResponse, Verdict, WatchRequest,
        WatchResponse,
        resilience_server::{Resilience, ResilienceServer},
    },
};
use tokio::{net::TcpListener, runtime::Runtime, sync::watch};
use tokio_stream::{StreamExt, wrappers::WatchStream};
use tonic::{
    Request, Response, Status, Streaming,
    codegen::BoxStream,
    transport::{Server, server::TcpIncoming},
};

use crate::{Result, print, rules, traffic::BREAKER};

/// As long as that of a call through a circuit.
const GRANT: &str = "c-0123456789abcdef0123456789abcdef-100000000--0123456789abcdef";

/// As large as Fusebox's first.
const GENERATION: u64 = 1 << 32;

pub(crate) fn serve() -> Result<()> {
    Runtime::new()?.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        print(&format!("{}\n", listener.local_addr()?))?;
        let services = Server::builder()
            .add_service(ResilienceServer::new(Constant::default()))
            .add_service(RateLimitServiceServer::new(Constant::default()));
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        Ok(services.serve_with_incoming(incoming).await?)
    })
}

#[derive(Default)]
struct Constant {
    /// How often calls failed that it was told of: who watches is told each time.
    failed: watch::Sender<u64>,
}

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

    async fn report(
        &self,
        request: Request<ReportRequest>,
    ) -> Result<Response<ReportResponse>, Status> {
        let ReportRequest { outcomes, deltas, .. } = request.get_ref();
        if deltas.iter().any(|delta| delta.failures > 0) {
            self.failed.send_modify(|failed| *failed += 1);
        }
        Ok(Response::new(ReportResponse {
            results: outcomes.iter().map(|_| ReportResult::Applied.into()).collect(),
            circuits: vec![CircuitStatus {
                valid_for: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
                ..circuit(CircuitState::Closed)
            }],
            delta_results: deltas.iter().map(|_| ReportResult::Applied.into()).collect(),
            ..ReportResponse::default()
        }))
    }

    type WatchStream = BoxStream<WatchResponse>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let failed = WatchStream::new(self.failed.subscribe());
        Ok(Response::new(Box::pin(failed.map(|version| Ok(opened(version))))))
    }

    type SessionStream = BoxStream<SessionResponse>;

    async fn session(
        &self,
        _: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        Err(Status::unimplemented("nobody measures it"))
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

/// As long as what Fusebox answers when a key of the policy `slow` was asked some thousand times, and a circuit is
/// closed.
fn allowed(request: &AcquireRequest) -> AcquireResponse {
    let is_circuit = |ask: &Ask| ask.policy == BREAKER;
    let verdict = |ask: &Ask| match is_circuit(ask) {
        true => Verdict {
            decision: Decision::Allow.into(),
            circuit_state: CircuitState::Closed.into(),
            generation: GENERATION,
            ..Verdict::default()
        },
        false => Verdict {
            decision: Decision::Allow.into(),
            limit: Some(1_000_000_000),
            remaining: Some(999_940_000),
            reset_after: Some(prost_types::Duration { seconds: 5, nanos: 184_000_000 }),
            ..Verdict::default()
        },
    };
    let grant = if request.asks.iter().any(is_circuit) { GRANT } else { "" };
    AcquireResponse {
        decision: Decision::Allow.into(),
        grant_id: grant.into(),
        verdicts: request.asks.iter().map(verdict).collect(),
        ..AcquireResponse::default()
    }
}

/// As long as what Fusebox tells of a circuit.
fn circuit(state: CircuitState) -> CircuitStatus {
    CircuitStatus {
        policy: BREAKER.into(),
        key: "tenant-0000000".into(),
        state: state.into(),
        mode: CircuitMode::Normal.into(),
        generation: GENERATION,
        ..CircuitStatus::default()
    }
}

/// As long as what Fusebox tells who watches when a circuit has opened; the first time nothing has yet.
fn opened(version: u64) -> WatchResponse {
    let evidence = Evidence {
        failure_rate_basis_points: 10_000,
        calls: 20,
        reporters: 1,
        unhealthy_reporters: 1,
        open_since: Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 }),
        ..Evidence::default()
    };
    let circuit = CircuitStatus {
        open_for: Some(prost_types::Duration { seconds: 3_600, nanos: 0 }),
        evidence: Some(evidence),
        ..circuit(CircuitState::Open)
    };
    let is_first = version == 0;
    WatchResponse {
        epoch: 1,
        version: version + 1,
        snapshot: is_first,
        complete: true,
        circuits: if is_first { Vec::new() } else { vec![circuit] },
        generation: GENERATION,
        elapsed: Some(prost_types::Duration { seconds: 10, nanos: 123_456_789 }),
        valid_for: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
    }
}
