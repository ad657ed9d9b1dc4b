//! The life of a server: starting, draining, failing.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{Arc, mpsc},
    task::{Context, Poll},
};

use fusebox_client::unary::Ask;
use fusebox_proto::v1::{
    AcquireRequest, AcquireResponse, Decision, resilience_client::ResilienceClient,
};
use fusebox_server::{run::RunError, storage::journal::Nothing};
use fusebox_tests::{ManualClock, PATIENCE, Server, Simulated, eventually};
use http::uri::PathAndQuery;
use hyper::body::{Body, Bytes, Frame};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming, client::Grpc};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};
use tonic_prost::ProstCodec;

use crate::{CONFIG, ask, request};

const SERVICES: [&str; 3] =
    ["", "fusebox.v1.Resilience", "envoy.service.ratelimit.v3.RateLimitService"];

async fn watch(server: &Server, service: &str) -> Streaming<HealthCheckResponse> {
    let request = HealthCheckRequest { service: service.into() };
    HealthClient::new(server.channel().await).watch(request).await.unwrap().into_inner()
}

async fn next(watch: &mut Streaming<HealthCheckResponse>) -> Result<ServingStatus, Status> {
    let message = tokio::time::timeout(PATIENCE, watch.message()).await.expect("health is told");
    Ok(message?.expect("a watch ends with a status").status())
}

/// A call whose message is sent when the test says so.
struct SlowCall {
    message: tokio::sync::mpsc::Sender<AcquireRequest>,
    answer: tokio::task::JoinHandle<Result<AcquireResponse, Status>>,
}

impl SlowCall {
    /// Returns when the server has the call, but not its message.
    async fn begin(server: &Server) -> Self {
        let (message, messages) = tokio::sync::mpsc::channel(1);
        let channel = server.channel().await;
        let mut grpc = Grpc::new(channel.clone());
        let (begun, begin) = tokio::sync::oneshot::channel();
        let answer = tokio::spawn(async move {
            grpc.ready().await.unwrap();
            begun.send(()).unwrap();
            let path = PathAndQuery::from_static("/fusebox.v1.Resilience/Acquire");
            let request = Request::new(ReceiverStream::new(messages));
            let codec = ProstCodec::<AcquireRequest, AcquireResponse>::default();
            grpc.client_streaming(request, path, codec).await.map(tonic::Response::into_inner)
        });
        begin.await.unwrap();
        // Calls of one connection arrive in order: when a later one is answered, the server has this one.
        let peek = request([ask("three", "a", 0)]);
        ResilienceClient::new(channel).acquire(peek).await.unwrap();
        Self { message, answer }
    }
}

#[tokio::test]
async fn nothing_is_decided_before_state_is_recovered() {
    let (recover, recovering) = mpsc::channel::<()>();
    let journal = Box::new(move || {
        recovering.recv().expect("the test says when");
        Ok(Box::new(Nothing) as Box<_>)
    });
    let server = Server::begin(journal, Arc::<ManualClock>::default(), CONFIG).await;

    let mut watches = Vec::new();
    for service in SERVICES {
        let mut watch = watch(&server, service).await;
        assert_eq!(next(&mut watch).await.unwrap(), ServingStatus::NotServing);
        watches.push(watch);
    }
    assert_eq!(server.http("/livez").await.0, 200);
    let (status, body) = server.http("/readyz").await;
    assert_eq!((status, body.as_str()), (503, "starting: state is being recovered\n"));
    let refused = server.raw().await.acquire(request([ask("three", "a", 1)])).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);

    recover.send(()).unwrap();
    for watch in &mut watches {
        assert_eq!(next(watch).await.unwrap(), ServingStatus::Serving);
    }
    assert_eq!(server.http("/readyz").await.0, 200);
    let client = server.client("test").await;
    assert!(client.acquire([Ask::new("three", "a")]).await.unwrap().allowed);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_asked_to_end_does_not_recover_first() {
    let (recover, recovering) = mpsc::channel::<()>();
    let journal = Box::new(move || {
        let _ = recovering.recv();
        Ok(Box::new(Nothing) as Box<_>)
    });
    let server = Server::begin(journal, Arc::<ManualClock>::default(), CONFIG).await;
    server.ask_to_stop();
    tokio::time::timeout(PATIENCE, server.ended()).await.expect("it ends").unwrap();
    drop(recover);
}

#[tokio::test]
async fn a_drain_turns_health_and_ends_the_streams_that_never_end() {
    let patient = CONFIG.replace("drain_timeout: 10s", "drain_timeout: 10m");
    let server = Server::start(&patient).await;
    let mut watches = Vec::new();
    for service in SERVICES {
        let mut watch = watch(&server, service).await;
        assert_eq!(next(&mut watch).await.unwrap(), ServingStatus::Serving);
        watches.push(watch);
    }
    // Connections that say nothing at all do not hold it up either.
    let mut silent = TcpStream::connect(server.grpc).await.unwrap();
    let idle = server.client("test").await;

    server.ask_to_stop();
    for watch in &mut watches {
        assert_eq!(next(watch).await.unwrap(), ServingStatus::NotServing);
        assert_eq!(next(watch).await.unwrap_err().code(), Code::Unavailable);
    }
    tokio::time::timeout(PATIENCE, server.ended()).await.expect("no wait for 10m").unwrap();
    assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);
    assert!(idle.acquire([Ask::new("three", "a")]).await.is_err());
}

#[tokio::test]
async fn a_call_in_flight_is_answered_while_draining() {
    let server = Server::start(CONFIG).await;
    let SlowCall { message, answer } = SlowCall::begin(&server).await;

    server.ask_to_stop();
    eventually("it drains", async || server.http("/readyz").await == (503, "draining\n".into()))
        .await;
    message.send(request([ask("three", "a", 1)])).await.unwrap();
    drop(message);
    let answer = answer.await.unwrap().unwrap();
    assert_eq!(answer.decision(), Decision::Allow);
    tokio::time::timeout(PATIENCE, server.ended()).await.expect("the drain ends").unwrap();
}

#[tokio::test]
async fn a_call_that_never_ends_is_cut_when_the_drain_is_over() {
    let impatient = CONFIG.replace("drain_timeout: 10s", "drain_timeout: 50ms");
    let server = Server::start(&impatient).await;
    let call = SlowCall::begin(&server).await;
    server.ask_to_stop();
    tokio::time::timeout(PATIENCE, server.ended()).await.expect("the drain ends").unwrap();
    assert!(call.answer.await.unwrap().is_err());
}

#[tokio::test]
async fn the_first_failed_write_is_final() {
    let journal = Simulated::default();
    let server = Server::start_on(journal.open(), Arc::default(), CONFIG).await;
    let client = server.client("test").await;
    let mut health = watch(&server, "fusebox.v1.Resilience").await;
    assert_eq!(next(&mut health).await.unwrap(), ServingStatus::Serving);

    journal.fail();
    // First whoever waits for the write, then everybody.
    for key in ["a", "b"] {
        let refused = client.acquire([Ask::new("three", key)]).await.unwrap_err();
        let fusebox_client::unary::Error::Status(status) = refused else { panic!("{refused}") };
        assert_eq!(status.code(), Code::Unavailable);
    }
    assert_eq!(next(&mut health).await.unwrap(), ServingStatus::NotServing);
    assert_eq!(server.http("/readyz").await.0, 503);
    assert_eq!(server.http("/livez").await.0, 200, "up, so that it can be looked at");

    let ended = server.stop().await.unwrap_err();
    assert!(matches!(ended, RunError::Flush(_)), "{ended}");
}

/// A message that never comes.
struct Never;

impl Body for Never {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Pending
    }
}

#[tokio::test]
async fn a_time_limit_that_is_over_is_a_deadline() {
    let server = Server::start(CONFIG).await;
    // tonic's client ends such a call by itself, so this one is by hand.
    let stream = TokioIo::new(TcpStream::connect(server.grpc).await.unwrap());
    let (mut calls, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    let connection = tokio::spawn(connection);
    // Of a stream, too: it has not begun before its request is there.
    for method in ["fusebox.v1.Resilience/Acquire", "grpc.health.v1.Health/Watch"] {
        let request = http::Request::post(format!("/{method}"))
            .header("content-type", "application/grpc")
            .header("grpc-timeout", "10m")
            .body(Never)
            .unwrap();
        let response = calls.send_request(request).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "4", "DEADLINE_EXCEEDED of {method}");
    }
    drop(calls);
    connection.await.unwrap().unwrap();
    server.stop().await.unwrap();
}

#[tokio::test]
async fn who_does_not_speak_http2_is_shown_the_door() {
    let server = Server::start(CONFIG).await;
    let mut stream = TcpStream::connect(server.grpc).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n").await.unwrap();
    let read = tokio::time::timeout(PATIENCE, stream.read(&mut [0; 64])).await;
    assert!(matches!(read.expect("the connection ends"), Ok(0) | Err(_)));
    server.stop().await.unwrap();
}
