//! One life of the server, from its parts to its end. What tends it, and the thread that writes, start and end
//! here; connections have tasks of their own.

use std::{
    pin::pin,
    sync::{
        Arc,
        mpsc::{self, TryRecvError},
    },
    thread,
    time::Duration,
};

use fusebox_proto::{
    envoy::service::ratelimit::v3::rate_limit_service_server::RateLimitServiceServer,
    v1::{admin_server::AdminServer, resilience_server::ResilienceServer},
};
use thiserror::Error;
use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
    time::{MissedTickBehavior, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{server::NamedService, service::Routes};
use tonic_health::{
    ServingStatus,
    pb::health_server::{Health, HealthServer},
    server::HealthReporter,
};

use crate::{
    accept::{self, Port},
    app::{App, Life},
    clock::Clock,
    config::{Durability, Namespaces, envoy::Ruleset},
    entropy::Entropy,
    grpc::{Answers, Service, admin::Admin, calls::Calls, ratelimit::Ratelimit},
    lifecycle::Lifecycle,
    limits,
    metrics::Metrics,
    ops, rule_files,
    storage::{
        self, Left, OpenGrant, RecoveryError, Start, Writer,
        journal::{JournalError, OpenJournal},
    },
};

/// All that a server is given: everything it knows of the world outside.
pub struct Parts {
    /// What it limits.
    pub namespaces: Namespaces,
    /// What Envoy is limited by, if it is.
    pub rules: Option<Ruleset>,
    /// How state is kept where a policy does not say.
    pub durability: Durability,
    /// Start although the journal has lost some of what was written.
    pub accept_loss: bool,
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
    let answers = Arc::new(Answers::new(parts.entropy.bytes16()));
    let service = Service::new(Arc::clone(&lifecycle), Arc::clone(&answers));
    let routes = routes(health_service, Admin::new(Arc::clone(&lifecycle)))?;
    let ratelimit = Ratelimit::new(Arc::clone(&lifecycle));
    let clock = Arc::clone(&parts.clock);
    let calls = Calls::new(service, ratelimit, routes, clock, &metrics, grpc.stop.clone());
    grpc.open(parts.listeners.grpc, move |port, stream| {
        accept::serve_grpc(port, stream, calls.clone())
    });
    let router = ops::router(Arc::clone(&lifecycle), Arc::new(metrics));
    ops.open(parts.listeners.ops, move |port, stream| {
        accept::serve_http(port, stream, router.clone())
    });

    let (entropy, own_rules) = (Arc::clone(&parts.entropy), parts.rules.clone());
    let recovery = tokio::task::spawn_blocking(move || {
        storage::recover(Start {
            journal: parts.journal,
            accept_loss: parts.accept_loss,
            namespaces: &parts.namespaces,
            rules: own_rules.as_ref(),
            durability: parts.durability,
            clock: parts.clock,
            entropy: &*entropy,
        })
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
    let storage::Recovered {
        catalogue,
        cells,
        circuits,
        grants,
        operations,
        writer,
        clock,
        boot,
        secret,
        clean,
    } = recovered;
    if !clean {
        tracing::warn!(
            "the last stop was not clean: what is never written starts empty, which is policies that fill \
             within {:?}, and retry budgets",
            limits::FAST_FILL
        );
    }
    tracing::info!(
        boot,
        policies = operations.registry.count(),
        rules = operations.registry.rule_count(),
        catalogue = catalogue.revision,
        live_cells = storage::Storage::live(&*cells),
        open_grants = grants.len(),
        "ready"
    );
    let disk = writer.disk();
    let app = Arc::new(App::new(
        catalogue,
        Arc::clone(&cells) as Arc<_>,
        clock,
        parts.entropy,
        Life { boot, secret, circuits, open: grants, operations, draining: grpc.stop.clone() },
    ));
    let writer = WriterThread::spawn(writer).map_err(internal)?;
    lifecycle.recovered(Arc::clone(&app), disk);
    set_health(&health, ServingStatus::Serving).await;

    let rules = parts
        .rules
        .map(|rules| tokio::spawn(rule_files::follow(Arc::clone(&app), rules, grpc.stop.clone())));

    let tended = Tended { app: &app, answers: &answers };
    tend_until(&parts.shutdown, tended, &writer, &lifecycle, &health).await;

    tracing::info!(drain_timeout = ?parts.drain_timeout, "draining");
    lifecycle.shut_down();
    set_health(&health, ServingStatus::NotServing).await;
    grpc.close(parts.drain_timeout).await;
    if let Some(rules) = rules {
        // It may be at a file that hangs.
        rules.abort();
    }
    // Nothing is settled while the open grants are written down.
    cells.stop();
    let flushed = writer.finish(app.grants().all()).await;
    // Last, so that probes can watch the drain; scrapers have until now as well.
    ops.close(limits::OPS_DRAIN).await;
    flushed.inspect(|()| tracing::info!("stopped"))
}

/// All services behind the gRPC port, but for the one that nearly all calls are for.
fn routes(health: HealthServer<impl Health>, admin: Admin) -> Result<Routes, RunError> {
    let descriptors = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(fusebox_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // So that grpcurl can print the details of our errors in clear.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let reflection = descriptors().build_v1().map_err(internal)?;
    let reflection_alpha = descriptors().build_v1alpha().map_err(internal)?;
    let admin = AdminServer::new(admin).max_decoding_message_size(limits::MESSAGE_BYTES);
    let routes = Routes::new(health.max_decoding_message_size(limits::MESSAGE_BYTES))
        .add_service(admin)
        .add_service(reflection.max_decoding_message_size(limits::MESSAGE_BYTES))
        .add_service(reflection_alpha.max_decoding_message_size(limits::MESSAGE_BYTES));
    Ok(routes.prepare())
}

/// What needs housekeeping.
struct Tended<'a> {
    app: &'a App,
    answers: &'a Answers,
}

/// Keeps house until the end is asked for.
async fn tend_until(
    shutdown: &CancellationToken,
    tended: Tended<'_>,
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
                // It fails only where the writer has failed, and the writer tells us itself.
                let _ = tended.app.tend();
                tended.answers.tend(tended.app.time());
            }
        }
    }
    // Up, so that it can be looked at; ready for nothing, so that nobody relies on it.
    lifecycle.storage_failed();
    set_health(health, ServingStatus::NotServing).await;
    shutdown.cancelled().await;
}

/// Overall, and of our services: all names that a client may ask for.
async fn set_health(health: &HealthReporter, status: ServingStatus) {
    health.set_service_status("", status).await;
    health.set_service_status(<ResilienceServer<Service> as NamedService>::NAME, status).await;
    health.set_service_status(<AdminServer<Admin> as NamedService>::NAME, status).await;
    let ratelimit = <RateLimitServiceServer<Ratelimit> as NamedService>::NAME;
    health.set_service_status(ratelimit, status).await;
}

#[allow(clippy::needless_pass_by_value)] // so that `map_err` takes it as it is
fn internal(error: impl ToString) -> RunError {
    RunError::Internal(error.to_string())
}

/// The thread that owns the journal: its calls block, so no async task makes them.
struct WriterThread {
    /// Tells what is to be written last, and so asks for the end.
    stop: mpsc::Sender<Vec<OpenGrant>>,
    progress: watch::Receiver<Progress>,
    /// How the last round went.
    finished: oneshot::Receiver<Result<(), JournalError>>,
}

/// What the writer is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Waiting,
    Writing,
    Failed,
}

impl WriterThread {
    fn spawn(mut writer: Writer) -> std::io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let (told, progress) = watch::channel(Progress::Waiting);
        let (finish, finished) = oneshot::channel();
        thread::Builder::new().name("writer".into()).spawn(move || {
            let mut left = Left::Nothing;
            let grants = loop {
                match stopped.try_recv() {
                    Ok(grants) => break grants,
                    Err(TryRecvError::Disconnected) => break Vec::new(),
                    Err(TryRecvError::Empty) => {}
                }
                if left == Left::Nothing {
                    told.send_replace(Progress::Waiting);
                    writer.wait();
                }
                told.send_replace(Progress::Writing);
                match writer.round() {
                    Ok(more) => left = more,
                    Err(error) => {
                        told.send_replace(Progress::Failed);
                        tracing::error!(
                            %error,
                            "the storage failed: nothing is admitted from here on. \
                             Free space or mend the disk, then restart"
                        );
                        break stopped.recv().unwrap_or_default();
                    }
                }
            };
            // Who waited for it may have lost patience.
            let _ = finish.send(writer.finish(&grants));
        })?;
        Ok(Self { stop, progress, finished })
    }

    /// Returns once a write has failed, or takes longer than any should.
    fn failed(&self) -> impl Future<Output = ()> + use<> {
        let mut progress = self.progress.clone();
        async move {
            loop {
                let now = *progress.borrow_and_update();
                let change = progress.changed();
                let changed = match now {
                    Progress::Failed => return,
                    Progress::Waiting => change.await,
                    Progress::Writing => match timeout(limits::WRITE_STALL, change).await {
                        Ok(changed) => changed,
                        Err(_) => {
                            tracing::error!(
                                "the disk hangs: nothing is admitted from here on. Mend it, then restart"
                            );
                            return;
                        }
                    },
                };
                if changed.is_err() {
                    // The thread is gone without a failure: it was asked to finish.
                    return std::future::pending().await;
                }
            }
        }
    }

    /// Asks for the end, with the grants that are open then, and returns when all of it is on disk.
    async fn finish(self, grants: Vec<OpenGrant>) -> Result<(), RunError> {
        // If it is gone already, it says so itself.
        let _ = self.stop.send(grants);
        match timeout(limits::FLUSH, self.finished).await {
            Ok(Ok(written)) => written.map_err(RunError::Flush),
            Ok(Err(_)) => Err(internal("the writer panicked")),
            Err(_) => Err(RunError::Flush(JournalError::Io {
                action: "sync",
                cause: "the disk hangs; what was charged last is lost".into(),
            })),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::Receiver,
    };

    use fusebox_core::{Ask, Charging};
    use parking_lot::Mutex;

    use super::*;
    use crate::{
        app::Priority,
        clock::SystemClock,
        config::Config,
        entropy::SystemEntropy,
        storage::{
            Charge, Decided, Storage,
            journal::{Batch, Journal, Keyspace, Visit},
        },
    };

    /// A disk that hangs once it is told to, until the test lets it go.
    struct Hanging {
        hangs: Arc<AtomicBool>,
        let_go: Mutex<Receiver<()>>,
    }

    impl Journal for Hanging {
        fn keeps(&self) -> bool {
            true
        }

        fn scan(&self, _: Keyspace, _: &mut Visit<'_>) -> Result<(), JournalError> {
            Ok(())
        }

        fn commit(&mut self, _: Batch) -> Result<(), JournalError> {
            Ok(())
        }

        fn sync(&mut self) -> Result<(), JournalError> {
            if self.hangs.load(Ordering::Relaxed) {
                let _ = self.let_go.lock().recv();
            }
            Ok(())
        }

        fn witnessed(&self) -> u64 {
            0
        }

        fn witness(&mut self, _: u64) -> Result<(), JournalError> {
            Ok(())
        }
    }

    /// A writer with something to write, and what lets its disk go.
    fn writer() -> (Writer, mpsc::Sender<()>) {
        let (go, let_go) = mpsc::channel();
        let hangs = Arc::new(AtomicBool::new(false));
        let disk = Hanging { hangs: Arc::clone(&hangs), let_go: Mutex::new(let_go) };
        let journal = Box::new(|| Ok(Box::new(disk) as Box<dyn Journal>));
        let config = Config::demo().unwrap();
        let recovered = storage::recover(Start {
            journal,
            accept_loss: false,
            namespaces: &config.namespaces,
            rules: None,
            durability: Durability::Strict,
            clock: Arc::new(SystemClock::default()),
            entropy: &SystemEntropy,
        });
        let recovered = recovered.unwrap();
        hangs.store(true, Ordering::Relaxed);
        let policy = recovered.catalogue.namespace("demo").unwrap().policy("signup").unwrap();
        let now = recovered.clock.now();
        let asks: Vec<_> = policy.asks("", Ask::spend(1), Priority::Normal, now).collect();
        let catalogue = &recovered.catalogue;
        let charge = Charge { charging: Charging::AllOrNothing, asks: &asks, catalogue };
        recovered.cells.apply(&charge, None, now, &mut Decided::default()).unwrap();
        (recovered.writer, go)
    }

    // Time is paused: it goes on by itself to the next timer, and the disk hangs for no longer than that.

    #[tokio::test(start_paused = true)]
    async fn a_disk_that_hangs_is_a_failure() {
        let (writer, _go) = writer();
        WriterThread::spawn(writer).unwrap().failed().await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_does_not_wait_for_a_disk_that_hangs() {
        let (writer, _go) = writer();
        let ended = WriterThread::spawn(writer).unwrap().finish(Vec::new()).await.unwrap_err();
        assert!(ended.to_string().contains("the disk hangs"), "{ended}");
    }
}
