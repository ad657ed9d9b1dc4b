//! A server in the simulation: the service itself over a network, a disk and clocks that are simulated.
//!
//! What is not here of `run` is what a simulation has no use for: threads, the operations port, a graceful end.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use fusebox_server::{
    clock::Clock,
    config::Config,
    entropy::Entropy,
    grpc::{Answers, Service, calls::Calls, ratelimit::Ratelimit},
    lifecycle::Lifecycle,
    limits,
    metrics::Metrics,
    storage::{self, Left, Start, Writer},
};
use fusebox_tests::{Simulated, panel};
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use turmoil::net::TcpListener;

use crate::chance::Chance;

/// Where it is reached.
pub const PORT: u16 = 3873;

/// Time of the simulation, as a server's clocks tell it.
pub struct Virtual;

impl Clock for Virtual {
    fn monotonic(&self) -> Duration {
        turmoil::sim_elapsed().unwrap_or_default()
    }

    fn wall(&self) -> Duration {
        turmoil::since_epoch().unwrap_or_default()
    }
}

/// Bytes that a seed decides.
pub struct Seeded(pub Chance);

impl Entropy for Seeded {
    fn fill(&self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.0.next().to_be_bytes()[..chunk.len()]);
        }
    }
}

/// One life of a server on a disk that outlives it. It ends when its host is crashed.
///
/// # Errors
/// If the disk is not one that a server can start on, or the network is gone.
pub async fn serve(disk: Arc<Simulated>, config: Arc<Config>, chance: Chance) -> turmoil::Result {
    let entropy = Arc::new(Seeded(chance.fork()));
    let recovered = storage::recover(Start {
        journal: disk.open(),
        accept_loss: false,
        namespaces: &config.namespaces,
        rules: None,
        durability: config.storage.durability,
        clock: Arc::new(Virtual),
        entropy: &*entropy,
    })?;
    let written = recovered.writer.disk();
    let (app, writer) = panel::app_of(recovered, Arc::clone(&entropy) as Arc<_>);
    let (app, lifecycle) = (Arc::new(app), Arc::new(Lifecycle::default()));
    lifecycle.recovered(Arc::clone(&app), written);
    tokio::spawn(write(writer, chance.fork()));

    let answers = Arc::new(Answers::new(entropy.bytes16()));
    let metrics = Metrics::new(&lifecycle, &[]).map_err(|error| error.to_string())?;
    let calls = Calls::new(
        Service::new(Arc::clone(&lifecycle), Arc::clone(&answers)),
        Ratelimit::new(Arc::clone(&lifecycle)),
        Routes::default(),
        Arc::new(Virtual),
        &metrics,
        CancellationToken::new(),
    );
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).await?;
    let mut rounds = interval(limits::HOUSEKEEPING_INTERVAL);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            _ = rounds.tick() => {
                // A disk that fails is another matter: this one is lost, or works.
                let _ = app.tend();
                answers.tend(app.time());
            }
            accepted = listener.accept() => {
                let (stream, _) = accepted?;
                let connection = http2::Builder::new(TokioExecutor::new())
                    .timer(TokioTimer::new())
                    .serve_connection(TokioIo::new(stream), calls.clone());
                tokio::spawn(connection);
            }
        }
    }
}

/// The writer, as a task: each round takes as long as a disk may.
async fn write(mut writer: Writer, chance: Chance) {
    loop {
        sleep(Duration::from_micros(chance.within(500..20_000))).await;
        while matches!(writer.round(), Ok(Left::More)) {}
    }
}
