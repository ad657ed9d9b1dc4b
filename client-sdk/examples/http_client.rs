//! A client of HTTP, guarded by what a fleet shares: `http_client [ADDRESS [NAMESPACE]]`.
//!
//! It calls a service that fails until its circuit opens: one circuit for each host, so that a host which fails takes
//! no other along. The service is a few lines of axum below.

use std::{borrow::Cow, env, net::SocketAddr, time::Duration};

use axum::{Router, routing::get};
use fusebox_client::{
    Client, Timeout,
    layer::{
        BoxError, BreakerLayer, ResilienceLayer, RetryLayer, TimeoutLayer, breaker::HttpStatus,
        rejection, retry::Idempotent,
    },
};
use http::{Request, StatusCode};
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper_util::{client::legacy, rt::TokioExecutor};
use tokio::net::TcpListener;
use tower::{Service, ServiceBuilder, ServiceExt};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let mut arguments = env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "http://127.0.0.1:3873".to_owned());
    let namespace = arguments.next().unwrap_or_else(|| "demo".to_owned());

    let client = Client::connect(address.as_str()).namespace(namespace).build()?;
    let called = run(&client, 300).await?;
    let answered = called.iter().filter(|called| matches!(called, Called::Answered(_))).count();
    println!(
        "the service was called {answered} times, and then spared {}",
        called.len() - answered
    );
    if let Some(Called::Rejected(why)) = called.last() {
        println!("{why}");
    }
    client.close().await;
    Ok(())
}

/// What became of a call.
#[derive(Debug, PartialEq)]
pub enum Called {
    /// The service answered.
    Answered(StatusCode),
    /// It was not called, and why.
    Rejected(String),
}

/// Starts a service that fails, and calls it so many times.
///
/// # Errors
/// If the service cannot be reached.
pub async fn run(client: &Client, calls: usize) -> Result<Vec<Called>, BoxError> {
    let service = failing_service().await?;
    let http = legacy::Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let resilience = ResilienceLayer::new()
        .retry(RetryLayer::new(client.retry("retries"), Idempotent))
        .breaker(BreakerLayer::new(client.breaker("payments")).key_by(host).classify(HttpStatus))
        .timeout(TimeoutLayer::new(Timeout::new(Duration::from_secs(2))));
    let mut http = ServiceBuilder::new().layer(resilience).service(http);

    let mut called = Vec::new();
    for _ in 0..calls {
        let request = Request::get(format!("http://{service}/")).body(Empty::new())?;
        called.push(match http.ready().await?.call(request).await {
            Ok(response) => Called::Answered(response.status()),
            Err(error) => match rejection(&error) {
                Some(rejected) => Called::Rejected(rejected.to_string()),
                None => return Err(error),
            },
        });
    }
    Ok(called)
}

/// Which circuit a request goes through.
fn host(request: &Request<Empty<Bytes>>) -> Cow<'_, str> {
    request.uri().authority().map_or("", |authority| authority.as_str()).into()
}

/// A service that is out of order, and so no good to try again.
async fn failing_service() -> Result<SocketAddr, BoxError> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let router = Router::new().route("/", get(async || StatusCode::INTERNAL_SERVER_ERROR));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(address)
}
