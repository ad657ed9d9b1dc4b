//! A client of tonic, guarded by what a fleet shares: `tonic_client [ADDRESS [NAMESPACE]]`.
//!
//! It asks a service of gRPC for its health, more often than its policy allows. The service is Fusebox itself here,
//! since that is there; yours is guarded by the same two lines.

use std::{env, time::Duration};

use fusebox_client::{
    Client, Timeout,
    layer::{
        BoxError, BreakerLayer, RateLimitLayer, ResilienceLayer, RetryLayer, TimeoutLayer,
        breaker::GrpcStatus, grpc, retry::Unary,
    },
};
use tonic::{Status, body::Body, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tower::{Service, ServiceBuilder};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let mut arguments = env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "http://127.0.0.1:3873".to_owned());
    let namespace = arguments.next().unwrap_or_else(|| "demo".to_owned());

    let client = Client::connect(address.as_str()).namespace(namespace).build()?;
    let channel = Channel::from_shared(address)?.connect_lazy();
    // One that calls again only when it was served would be slowed down to what the policy allows, and hardly rejected.
    let callers = (0..8).map(|_| {
        let (client, channel) = (client.clone(), channel.clone());
        tokio::spawn(async move { run(&client, channel, 125).await })
    });
    let (mut served, mut failed) = (0, Vec::new());
    for caller in callers.collect::<Vec<_>>() {
        let (some, others) = caller.await?;
        served += some;
        failed.extend(others);
    }
    println!("{served} calls were served, {} were not", failed.len());
    if let Some(status) = failed.last() {
        println!("the last of them: {:?}: {}", status.code(), status.message());
    }
    client.close().await;
    Ok(())
}

/// Makes so many calls: how many were served, and what became of the others.
pub async fn run(client: &Client, channel: Channel, calls: usize) -> (usize, Vec<Status>) {
    let mut health = HealthClient::new(guarded(client, channel));
    let mut failed = Vec::new();
    for _ in 0..calls {
        if let Err(status) = health.check(HealthCheckRequest::default()).await {
            failed.push(status);
        }
    }
    (calls - failed.len(), failed)
}

/// The channel, and two lines more than it would have by itself.
///
/// What it returns is all that generated clients ask for. A rejection is an error like any other to them: a status,
/// whose message says which policy rejected the call, and why.
fn guarded(
    client: &Client,
    channel: Channel,
) -> impl Service<http::Request<Body>, Response = http::Response<Body>, Error = Status, Future: Send>
+ Clone {
    let resilience = ResilienceLayer::new()
        .retry(RetryLayer::new(client.retry("retries"), Unary::default()))
        .breaker(BreakerLayer::new(client.breaker("payments")).classify(GrpcStatus))
        .rate_limit(RateLimitLayer::new(client.limiter("api")))
        .timeout(TimeoutLayer::new(Timeout::new(Duration::from_secs(2))));

    ServiceBuilder::new()
        .map_err(grpc::status) // the first line
        .layer(resilience) // the second
        .service(channel)
}
