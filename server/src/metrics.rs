//! How `/metrics` tells what the server counts.
//!
//! The OpenTelemetry meter observes the [`counters`](crate::counters) at each scrape. The histogram of call
//! durations is a Prometheus one in the same registry, because every record of the meter's own takes a lock.

mod observe;

use std::{sync::Arc, time::Duration};

use opentelemetry_sdk::{
    Resource,
    metrics::{Instrument, SdkMeterProvider, Stream},
};
use prometheus::{Histogram, HistogramOpts, HistogramVec, Registry, TextEncoder};
use tonic::Code;

use crate::{
    counters::{Connections, DECISION_LABELS},
    lifecycle::Lifecycle,
    limits,
};

/// Bounds of the buckets of call durations, in seconds: a decision takes microseconds.
const DURATION_SECONDS: [f64; 14] = [
    0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.1, 0.5,
    2.5, 10.0,
];

/// Everything that `/metrics` tells.
pub struct Metrics {
    registry: Registry,
    /// Ends the meter's callbacks when dropped.
    _provider: SdkMeterProvider,
    durations: HistogramVec,
}

impl Metrics {
    /// Registers every metric; `connections` are those of each port, by its name.
    ///
    /// # Errors
    /// If two metrics have one name, which is a mistake in this file.
    pub fn new(
        lifecycle: &Arc<Lifecycle>,
        connections: &[(&'static str, Arc<Connections>)],
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let registry = Registry::new();
        let exporter = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .scope_info_enabled(false)
            .build()?;
        let provider = SdkMeterProvider::builder()
            .with_reader(exporter)
            .with_resource(Resource::builder().with_service_name("fusebox").build())
            .with_view(|instrument: &Instrument| {
                let series = (limits::POLICIES + limits::RULES) * DECISION_LABELS.len();
                let per_policy = [
                    "fusebox_decisions",
                    "fusebox_debt_dropped_tokens",
                    "fusebox_policy_cells",
                    "fusebox_policy_overflow_cells",
                    "fusebox_circuits",
                    "fusebox_circuit_transitions",
                    "fusebox_ratelimit_hits",
                    "fusebox_ratelimit_over_limit_hits",
                    "fusebox_ratelimit_near_limit_hits",
                    "fusebox_ratelimit_within_limit_hits",
                    "fusebox_ratelimit_shadow_mode_hits",
                ];
                per_policy
                    .contains(&instrument.name())
                    .then(|| Stream::builder().with_cardinality_limit(series).build().ok())?
            })
            .build();
        observe::observe(&provider, lifecycle, connections);

        let durations = HistogramVec::new(
            HistogramOpts::new(
                "rpc_server_call_duration_seconds",
                "Time from the headers of a call to the end of its answer",
            )
            .buckets(DURATION_SECONDS.to_vec()),
            &["rpc_system_name", "rpc_method", "rpc_response_status_code"],
        )?;
        registry.register(Box::new(durations.clone()))?;
        Ok(Self { registry, _provider: provider, durations })
    }

    /// The text that Prometheus scrapes.
    ///
    /// # Errors
    /// If a metric cannot be told.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// Durations of calls of one method, `package.Service/Method`.
    pub fn method(&self, method: &'static str) -> MethodDurations {
        let ok = self.durations.with_label_values(&["grpc", method, code_label(Code::Ok)]);
        MethodDurations { method, ok, all: self.durations.clone() }
    }
}

/// Durations of the calls of one method.
pub struct MethodDurations {
    method: &'static str,
    /// Looked up once: a call that ends well counts without a lock.
    ok: Histogram,
    all: HistogramVec,
}

impl MethodDurations {
    /// Counts a call that took so long and ended so.
    pub fn record(&self, duration: Duration, code: Code) {
        let seconds = duration.as_secs_f64();
        if code == Code::Ok {
            self.ok.observe(seconds);
        } else {
            self.all.with_label_values(&["grpc", self.method, code_label(code)]).observe(seconds);
        }
    }
}

/// The name of a code, as semantic conventions want it.
fn code_label(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
