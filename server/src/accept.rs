//! The accept loop of a port, and the life of its connections.

use std::{
    future::Future,
    io,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use hyper::{rt::Executor, server::conn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulConnection,
    service::TowerToHyperService,
};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{counters::Connections, grpc::calls::Calls, limits, reservation::Reservation};

/// One port: the tasks of its connections, and how they end.
#[derive(Clone)]
pub(crate) struct Port {
    /// For log lines and metrics.
    pub(crate) name: &'static str,
    /// Its connections, counted.
    pub(crate) connections: Arc<Connections>,
    /// Ends the accept loop, and asks connections to finish.
    pub(crate) stop: CancellationToken,
    /// Most connections at once.
    capacity: usize,
    /// Cuts the connections that are left.
    cut: CancellationToken,
    /// The accept loop, every connection and every call.
    tasks: TaskTracker,
}

impl Port {
    /// A port that has at most `capacity` connections at once.
    pub(crate) fn new(name: &'static str, capacity: usize) -> Self {
        Self {
            name,
            connections: Arc::default(),
            stop: CancellationToken::new(),
            capacity,
            cut: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    /// Starts to accept connections, each served by `serve` in a task of its own.
    pub(crate) fn open<S, F>(&self, listener: TcpListener, serve: S)
    where
        S: Fn(Port, TcpStream) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let port = self.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = port.stop.cancelled() => {}
                () = port.accept(listener, serve) => {}
            }
        });
    }

    /// Asks every connection to finish, and cuts after `patience` those that did not.
    pub(crate) async fn close(&self, patience: Duration) {
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(patience, self.tasks.wait()).await.is_err() {
            let left = self.connections.open.load(Ordering::Relaxed);
            tracing::warn!(
                port = self.name,
                left,
                ?patience,
                "cutting connections that did not finish"
            );
            self.cut.cancel();
            self.tasks.wait().await;
        }
    }

    async fn accept<S, F>(&self, listener: TcpListener, serve: S)
    where
        S: Fn(Port, TcpStream) -> F,
        F: Future<Output = ()> + Send + 'static,
    {
        let mut failing = false;
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    failing = false;
                    self.admit(stream, &serve);
                }
                // The client gave up before we looked; the next one may not have.
                Err(error) if is_the_clients(&error) => {}
                Err(error) => {
                    if !failing {
                        tracing::error!(port = self.name, %error, "cannot accept connections; trying on");
                    }
                    failing = true;
                    tokio::time::sleep(limits::ACCEPT_BACKOFF).await;
                }
            }
        }
    }

    fn admit<S, F>(&self, stream: TcpStream, serve: &S)
    where
        S: Fn(Port, TcpStream) -> F,
        F: Future<Output = ()> + Send + 'static,
    {
        let Some(place) = Reservation::of(&self.connections.open, 1, self.capacity) else {
            self.connections.refused.fetch_add(1, Ordering::Relaxed);
            return;
        };
        // Answers are small and one to a packet: waiting to fill one only delays them.
        if stream.set_nodelay(true).is_err() {
            return;
        }
        let served = serve(self.clone(), stream);
        let cut = self.cut.clone();
        self.tasks.spawn(async move {
            cut.run_until_cancelled(served).await;
            drop(place);
        });
    }

    /// Serves a connection to its end; once the port stops, no longer than for the calls in flight.
    async fn serve<C>(&self, connection: C)
    where
        C: GracefulConnection<Error = hyper::Error>,
    {
        let mut connection = pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(port = self.name, %error, "a connection ended");
        }
    }
}

/// What every HTTP/2 client says first (RFC 9113, 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Serves gRPC: HTTP/2 with prior knowledge.
pub(crate) async fn serve_grpc(port: Port, mut stream: TcpStream, calls: Calls) {
    // A client speaks first. hyper would wait for it without an end, and hold a drain up meanwhile.
    let mut said = [0; PREFACE.len()];
    let preface = tokio::time::timeout(limits::PREFACE_WAIT, stream.read_exact(&mut said));
    tokio::select! {
        () = port.stop.cancelled() => return,
        read = preface => if !matches!(read, Ok(Ok(_))) { return },
    }
    if said != *PREFACE {
        tracing::debug!(port = port.name, "a client does not speak HTTP/2");
        return;
    }
    let (rest, write) = stream.into_split();
    let stream = tokio::io::join(PREFACE.chain(rest), write);
    let connection = conn::http2::Builder::new(Tracked(port.clone()))
        .timer(TokioTimer::new())
        .keep_alive_interval(limits::KEEPALIVE)
        .keep_alive_timeout(limits::KEEPALIVE)
        .max_concurrent_streams(limits::STREAMS_PER_CONNECTION)
        .max_header_list_size(limits::HEADER_BYTES)
        .max_pending_accept_reset_streams(limits::PENDING_RESETS)
        .serve_connection(TokioIo::new(stream), calls);
    port.serve(connection).await;
}

/// Serves the operations' HTTP/1.
pub(crate) async fn serve_http(port: Port, stream: TcpStream, router: axum::Router) {
    let connection = conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if tokio::time::timeout(limits::OPS_CONNECTION_LIFE, port.serve(connection)).await.is_err() {
        tracing::debug!(port = port.name, "a client took too long");
    }
}

/// Runs the calls of a connection as tasks of its port, so that a drain waits for them too.
#[derive(Clone)]
struct Tracked(Port);

impl<F> Executor<F> for Tracked
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, call: F) {
        let cut = self.0.cut.clone();
        self.0.tasks.spawn(async move {
            cut.run_until_cancelled(call).await;
        });
    }
}

fn is_the_clients(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
    )
}
