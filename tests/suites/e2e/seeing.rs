//! Seeing what it does.

use fusebox_client::unary::Ask;
use fusebox_server::limits;
use fusebox_tests::{PATIENCE, Server, eventually};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic_types::StatusExt;

use crate::{CONFIG, ask, request};

#[tokio::test]
async fn decisions_are_counted_by_what_became_of_them() {
    let server = Server::start(CONFIG).await;
    let client = server.client("test").await;
    let both = || [Ask::new("hundred", "a").cost(10), Ask::new("three", "a").cost(3)];
    client.acquire(both()).await.unwrap();
    client.acquire(both()).await.unwrap();
    client.acquire([Ask::new("closed", "a")]).await.unwrap();
    client.acquire([Ask::new("hundred", "a").cost(0)]).await.unwrap();

    let (status, metrics) = server.http("/metrics").await;
    assert_eq!(status, 200);
    for (policy, decision, reason, count) in [
        ("hundred", "allow", "", 1),
        ("hundred", "deny", "", 1), // by another ask of the same Acquire
        ("three", "allow", "", 1),
        ("three", "deny", "rate_limited", 1),
        ("closed", "deny", "blocked", 1),
    ] {
        let line = format!(
            r#"fusebox_decisions_total{{decision="{decision}",namespace="test",policy="{policy}",reason="{reason}"}} {count}"#
        );
        assert!(metrics.contains(&line), "{line} is not in {metrics}");
    }
    assert!(metrics.contains("fusebox_live_cells 2\n"));
    assert!(metrics.ends_with('\n'));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn calls_are_timed_by_method_and_status() {
    let server = Server::start(CONFIG).await;
    let mut raw = server.raw().await;
    raw.acquire(request([ask("three", "a", 1)])).await.unwrap();
    let refused = raw.acquire(request([])).await.unwrap_err();
    assert!(refused.get_error_details().bad_request().is_some());

    // The client has its answer a moment before the server has counted it.
    let count = |status: &str| {
        format!(
            r#"rpc_server_call_duration_seconds_count{{rpc_method="fusebox.v1.Resilience/Acquire",rpc_response_status_code="{status}",rpc_system_name="grpc"}} 1"#
        )
    };
    eventually("both are counted", async || {
        let (_, metrics) = server.http("/metrics").await;
        metrics.contains(&count("OK")) && metrics.contains(&count("INVALID_ARGUMENT"))
    })
    .await;
    let (_, metrics) = server.http("/metrics").await;
    assert!(metrics.contains(r#"le="0.000025""#), "buckets of microseconds");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn probes_are_answered() {
    let server = Server::start(CONFIG).await;
    assert_eq!(server.http("/livez").await, (200, "ok\n".into()));
    assert_eq!(server.http("/readyz").await, (200, "ready\n".into()));
    assert_eq!(server.http("/elsewhere").await.0, 404);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn connections_past_the_limit_are_closed_at_once_and_counted() {
    let server = Server::start(CONFIG).await;
    let mut connections = Vec::new();
    for _ in 0..limits::OPS_CONNECTIONS {
        connections.push(TcpStream::connect(server.ops).await.unwrap());
    }
    // Accepted in order: when one past the limit is closed, all before it were taken.
    let mut one_more = TcpStream::connect(server.ops).await.unwrap();
    let closed = tokio::time::timeout(PATIENCE, one_more.read(&mut [0])).await.unwrap();
    assert!(matches!(closed, Ok(0) | Err(_)));

    drop(connections);
    eventually("there is room again", async || {
        let mut stream = TcpStream::connect(server.ops).await.unwrap();
        let asked = stream.write_all(b"GET /livez HTTP/1.1\r\nhost: test\r\n\r\n").await;
        asked.is_ok() && matches!(stream.read(&mut [0; 12]).await, Ok(12))
    })
    .await;
    eventually("it is told", async || {
        let (_, metrics) = server.http("/metrics").await;
        let refused = metrics.lines().find_map(|line| {
            line.strip_prefix(r#"fusebox_refused_connections_total{port="ops"} "#)
        });
        refused.is_some_and(|refused| refused != "0")
    })
    .await;
    server.stop().await.unwrap();
}
