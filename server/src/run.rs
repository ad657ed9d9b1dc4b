//! One life of the server, from its parts to its end. Every task starts and ends here.

use std::{
    pin::pin,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use fusebox_proto::v1::resilience_server::ResilienceServer;
use thiserror::Error;
use tokio::{net::TcpListener, sync::watch, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::{server::NamedService, service::Routes};
use tonic_health::{
    ServingStatus,
    pb::health_server::{Health, HealthServer},
    server::HealthReporter,
};

use crate::{
    accept::{self, Port},
    app::App,
    clock::Clock,
    config::Namespaces,
    entropy::Entropy,
    grpc::{Service, calls::Calls},
    lifecycle::Lifecycle,
    limits,
    metrics::Metrics,
    ops,
    storage::{
        self, RecoveryError, Writer,
        journal::{JournalError, OpenJournal},
    },
};

/// All that a server is given: everything it knows of the world outside.
pub struct Parts {
    /// What it limits.
    pub namespaces: Namespaces,
    /// How long calls in flight may take to finish at the end.
    pub drain_timeout: Duration,
    /// Where it is reached.
    pub listeners: Listeners,
    /// What time it is.
    pub clock: Arc<dyn Clock>,
    /// What nobody can guess.
    pub entropy: Arc<dyn Entropy>,
    /// Where state is kept.
    pub journal: OpenJournal,
    /// Cancelled when it is to end.
    pub shutdown: CancellationToken,
}

/// Where a server is reached.
pub struct Listeners {
    /// gRPC.
    pub grpc: TcpListener,
    /// The operations' HTTP.
    pub ops: TcpListener,
}

/// Why a life ended before it was asked to, or not as it should.
#[derive(Debug, Error)]
pub enum RunError {
    /// State could not be recovered.
    #[error("cannot start: {0}")]
    Recovery(#[from] RecoveryError),
    /// The last state could not be written.
    #[error("the last state is not all written: {0}")]
    Flush(#[source] JournalError),
    /// A mistake in the server itself.
    #[error("a mistake in fusebox itself, please report it: {0}")]
    Internal(String),
}

/// Serves until `shutdown`, then drains: health turns, streams end, calls in flight finish, state is
/// written.
///
/// # Errors
/// If state could not be recovered, or not be written at the end.
pub async fn run(parts: Parts) -> Result<(), RunError> {
    let lifecycle = Arc::new(Lifecycle::default());
    let grpc = Port::new("grpc", limits::GRPC_CONNECTIONS);
    let ops = Port::new("ops", limits::OPS_CONNECTIONS);
    let connections = [&grpc, &ops].map(|port| (port.name, Arc::clone(&port.connections)));
    let metrics = Metrics::new(&lifecycle, &connections).map_err(internal)?;

    // Both ports answer while state is still being recovered: probes must see that the process lives.
    let (health, health_service) = tonic_health::server::health_reporter();
    set_health(&health, ServingStatus::NotServing).await;
    let routes = routes(Service::new(Arc::clone(&lifecycle)), health_service)?;
    let calls = Calls::new(routes, Arc::clone(&parts.clock), &metrics, grpc.stop.clone());
    grpc.open(parts.listeners.grpc, move |port, stream| {
        accept::serve_grpc(port, stream, calls.clone())
    });
    let router = ops::router(Arc::clone(&lifecycle), Arc::new(metrics));
    ops.open(parts.listeners.ops, move |port, stream| {
        accept::serve_http(port, stream, router.clone())
    });

    let (namespaces, clock, entropy) = (parts.namespaces, parts.clock, Arc::clone(&parts.entropy));
    let recovery = tokio::task::spawn_blocking(move || {
        storage::recover(parts.journal, &namespaces, clock, &*entropy)
    });
    let recovered = tokio::select! {
        recovered = recovery => recovered.map_err(internal)?.map_err(RunError::Recovery).map(Some),
        // Nothing has been decided yet, so there is nothing to finish and nothing to write.
        () = parts.shutdown.cancelled() => Ok(None),
    };
    let Ok(Some(recovered)) = recovered else {
        lifecycle.shut_down();
        grpc.close(Duration::ZERO).await;
        ops.close(Duration::ZERO).await;
        return recovered.map(|_| ());
    };
    let storage::Recovered { catalogue, cells, writer, clock, boot } = recovered;
    tracing::info!(
        boot,
        policies = catalogue.policies().count(),
        catalogue = catalogue.revision,
        live_cells = storage::Storage::live(&*cells),
        "ready"
    );
    let app = Arc::new(App::new(catalogue, cells, clock, parts.entropy, boot));
    let writer = WriterThread::spawn(writer).map_err(internal)?;
    lifecycle.recovered(Arc::clone(&app));
    set_health(&health, ServingStatus::Serving).await;

    tend_until(&parts.shutdown, &app, &writer, &lifecycle, &health).await;

    tracing::info!(drain_timeout = ?parts.drain_timeout, "draining");
    lifecycle.shut_down();
    set_health(&health, ServingStatus::NotServing).await;
    grpc.close(parts.drain_timeout).await;
    let flushed = writer.finish().await;
    // Last, so that probes can watch the drain; scrapers have until now as well.
    ops.close(limits::OPS_DRAIN).await;
    flushed.inspect(|()| tracing::info!("stopped"))
}

/// All services behind the gRPC port.
fn routes(service: Service, health: HealthServer<impl Health>) -> Result<Routes, RunError> {
    let descriptors = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(fusebox_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // So that grpcurl can print the details of our errors in clear.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let resilience =
        ResilienceServer::new(service).max_decoding_message_size(limits::MESSAGE_BYTES);
    let routes = Routes::new(resilience)
        .add_service(health)
        .add_service(descriptors().build_v1().map_err(internal)?)
        .add_service(descriptors().build_v1alpha().map_err(internal)?);
    Ok(routes.prepare())
}

/// Keeps house until the end is asked for.
async fn tend_until(
    shutdown: &CancellationToken,
    app: &App,
    writer: &WriterThread,
    lifecycle: &Lifecycle,
    health: &HealthReporter,
) {
    let mut rounds = tokio::time::interval(limits::HOUSEKEEPING_INTERVAL);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failed = pin!(writer.failed());
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = &mut failed => break,
            _ = rounds.tick() => {
                // A storage that failed tells the writer, which tells us.
                let _ = app.tend().await;
            }
        }
    }
    // Up, so that it can be looked at; ready for nothing, so that nobody relies on it.
    lifecycle.storage_failed();
    set_health(health, ServingStatus::NotServing).await;
    shutdown.cancelled().await;
}

/// Overall, and of our service: both names that a client may ask for.
async fn set_health(health: &HealthReporter, status: ServingStatus) {
    health.set_service_status("", status).await;
    health.set_service_status(<ResilienceServer<Service> as NamedService>::NAME, status).await;
}

#[allow(clippy::needless_pass_by_value)] // so that `map_err` takes it as it is
fn internal(error: impl ToString) -> RunError {
    RunError::Internal(error.to_string())
}

/// The thread that owns the journal: its calls block, so no async task makes them.
struct WriterThread {
    /// Dropped to ask for the last round.
    stop: mpsc::Sender<()>,
    failed: watch::Receiver<bool>,
    thread: thread::JoinHandle<Result<(), JournalError>>,
}

impl WriterThread {
    fn spawn(mut writer: Writer) -> std::io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let (fail, failed) = watch::channel(false);
        let thread = thread::Builder::new().name("writer".into()).spawn(move || {
            while stopped.recv_timeout(limits::RELAXED_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                if !writer.keeps() || *fail.borrow() {
                    continue;
                }
                if let Err(error) = writer.round() {
                    tracing::error!(
                        %error,
                        "the storage failed: nothing is admitted from here on. \
                         Free space or mend the disk, then restart"
                    );
                    let _ = fail.send(true);
                }
            }
            writer.finish()
        })?;
        Ok(Self { stop, failed, thread })
    }

    /// Returns once a write has failed.
    fn failed(&self) -> impl Future<Output = ()> + use<> {
        let mut failed = self.failed.clone();
        async move {
            if failed.wait_for(|failed| *failed).await.is_err() {
                // The thread is gone without a failure: it was asked to finish.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Asks for the last round, and returns when it is on disk.
    async fn finish(self) -> Result<(), RunError> {
        drop(self.stop);
        let joined = tokio::task::spawn_blocking(|| self.thread.join()).await.map_err(internal)?;
        joined.map_err(|_| internal("the writer panicked"))?.map_err(RunError::Flush)
    }
}
