//! A whole server in this process.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use fusebox_client::unary::Client;
use fusebox_proto::v1::resilience_client::ResilienceClient;
use fusebox_server::{
    config::{Config, envoy},
    run::{self, Listeners, Parts, RunError},
    storage::journal::{Nothing, OpenJournal},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{Counting, ManualClock};

/// Longer than anything in a test takes; only one that fails ever waits for it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Returns once `holds` does; what other tasks do to it is not to be waited for in another way.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let held = async {
        while !holds().await {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, held).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// A server on free ports of this machine.
pub struct Server {
    /// Where gRPC is served.
    pub grpc: SocketAddr,
    /// Where the operations' HTTP is served.
    pub ops: SocketAddr,
    /// Its time.
    pub clock: Arc<ManualClock>,
    shutdown: CancellationToken,
    running: JoinHandle<Result<(), RunError>>,
}

impl Server {
    /// Starts a server that keeps nothing, and waits until it is ready.
    pub async fn start(config: &str) -> Self {
        Self::start_on(Nothing::open(), Arc::default(), config).await
    }

    /// Starts a server that keeps nothing and draws other numbers than most, and waits until it is ready.
    pub async fn start_drawing_from(first: u64, config: &str) -> Self {
        let (journal, clock) = (Nothing::open(), Arc::default());
        Self::begin_with(journal, clock, config, false, first.into()).await.ready().await
    }

    /// Starts a server on a journal, and waits until it is ready.
    pub async fn start_on(journal: OpenJournal, clock: Arc<ManualClock>, config: &str) -> Self {
        Self::begin(journal, clock, config).await.ready().await
    }

    /// Waits until it is ready.
    async fn ready(self) -> Self {
        let mut server = self;
        let mut watch = HealthClient::new(server.channel().await)
            .watch(HealthCheckRequest { service: "fusebox.v1.Resilience".into() })
            .await
            .expect("health can be watched")
            .into_inner();
        loop {
            tokio::select! {
                health = watch.message() => {
                    let health = health.expect("health goes on").expect("health has no end");
                    if health.status() == ServingStatus::Serving {
                        return server;
                    }
                }
                ended = &mut server.running => panic!("the server ended: {ended:?}"),
            }
        }
    }

    /// Starts a server, ready or not.
    pub async fn begin(journal: OpenJournal, clock: Arc<ManualClock>, config: &str) -> Self {
        Self::begin_with(journal, clock, config, false, Counting::default()).await
    }

    /// Starts a server, ready or not, although its journal has lost something.
    pub async fn begin_accepting_loss(
        journal: OpenJournal,
        clock: Arc<ManualClock>,
        config: &str,
    ) -> Self {
        Self::begin_with(journal, clock, config, true, Counting::default()).await
    }

    async fn begin_with(
        journal: OpenJournal,
        clock: Arc<ManualClock>,
        config: &str,
        accept_loss: bool,
        entropy: Counting,
    ) -> Self {
        let config = Config::parse("test.yaml", config).expect("a configuration");
        let listeners = Listeners {
            grpc: TcpListener::bind("127.0.0.1:0").await.expect("a free port"),
            ops: TcpListener::bind("127.0.0.1:0").await.expect("a free port"),
        };
        let (grpc, ops) =
            (listeners.grpc.local_addr().unwrap(), listeners.ops.local_addr().unwrap());
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(run::run(Parts {
            namespaces: config.namespaces,
            rules: config.envoy_ratelimit.map(|settings| {
                envoy::read(Arc::new(settings)).unwrap_or_else(|error| panic!("{error}"))
            }),
            durability: config.storage.durability,
            accept_loss,
            drain_timeout: config.drain_timeout,
            listeners,
            clock: Arc::clone(&clock) as Arc<_>,
            entropy: Arc::new(entropy),
            journal,
            shutdown: shutdown.clone(),
        }));
        Self { grpc, ops, clock, shutdown, running }
    }

    /// A connection to the gRPC port.
    pub async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.grpc)).unwrap();
        endpoint.connect().await.expect("the server accepts connections")
    }

    /// The messages themselves.
    pub async fn raw(&self) -> ResilienceClient<Channel> {
        ResilienceClient::new(self.channel().await)
    }

    /// The client that users link.
    pub async fn client(&self, namespace: &str) -> Client {
        let address = format!("http://{}", self.grpc);
        Client::connect(address, namespace).await.expect("the server accepts connections")
    }

    /// Status and body of a path of the operations port.
    pub async fn http(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.ops).await.expect("the operations port answers");
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        (status.expect("a status"), body.to_owned())
    }

    /// Moves time on.
    pub fn advance(&self, by: Duration) {
        self.clock.advance(by);
    }

    /// Asks the server to end, without waiting.
    pub fn ask_to_stop(&self) {
        self.shutdown.cancel();
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// As [`run::run`].
    pub async fn ended(self) -> Result<(), RunError> {
        self.running.await.expect("the server does not panic")
    }

    /// Asks the server to end, and waits for it.
    ///
    /// # Errors
    /// As [`run::run`].
    pub async fn stop(self) -> Result<(), RunError> {
        self.ask_to_stop();
        self.ended().await
    }
}
