//! The operations port: what probes and scrapers ask by HTTP.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};

use crate::{
    lifecycle::{Lifecycle, Phase},
    metrics::Metrics,
};

#[derive(Clone)]
struct Ops {
    lifecycle: Arc<Lifecycle>,
    metrics: Arc<Metrics>,
}

/// `/livez`, `/readyz` and `/metrics`.
pub(crate) fn router(lifecycle: Arc<Lifecycle>, metrics: Arc<Metrics>) -> Router {
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics_text))
        .with_state(Ops { lifecycle, metrics })
}

async fn readyz(State(ops): State<Ops>) -> impl IntoResponse {
    match ops.lifecycle.phase() {
        Phase::Ready => (StatusCode::OK, "ready\n"),
        Phase::Starting => {
            (StatusCode::SERVICE_UNAVAILABLE, "starting: state is being recovered\n")
        }
        Phase::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
        Phase::Failed => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the storage failed; see the log, mend it and restart\n",
        ),
    }
}

async fn metrics_text(State(ops): State<Ops>) -> impl IntoResponse {
    let headers = [(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)];
    match ops.metrics.text() {
        Ok(text) => (StatusCode::OK, headers, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, headers, format!("{error}\n")),
    }
}
