//! Calls a service steadily, and tells each second who decided: `steady [ADDRESS [NAMESPACE [SECONDS]]]`.
//!
//! Kill the server meanwhile: no call fails, only the counters change.

use std::{env, time::Duration};

use fusebox_client::{
    Client, Timeout,
    layer::{BoxError, BreakerLayer, RateLimitLayer, ResilienceLayer, TimeoutLayer},
};
use tokio::time;
use tower::{Service, ServiceBuilder, ServiceExt};

/// Half of what the demo's `api` allows.
const CALLS_PER_SECOND: u32 = 50;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let mut arguments = env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "http://127.0.0.1:3873".to_owned());
    let namespace = arguments.next().unwrap_or_else(|| "demo".to_owned());
    let seconds: u32 = arguments.next().map_or(Ok(10), |seconds| seconds.parse())?;

    let client = Client::connect(address).namespace(namespace).build()?;
    let resilience = ResilienceLayer::new()
        .rate_limit(RateLimitLayer::new(client.limiter("api")))
        .breaker(BreakerLayer::new(client.breaker("payments")))
        .timeout(TimeoutLayer::new(Timeout::new(Duration::from_secs(2))));
    let mut service = ServiceBuilder::new().layer(resilience).service_fn(work);

    let mut ticks = time::interval(Duration::from_secs(1) / CALLS_PER_SECOND);
    let mut before = client.counts();
    for _ in 0..seconds {
        let mut failed = 0;
        for _ in 0..CALLS_PER_SECOND {
            ticks.tick().await;
            failed += u32::from(service.ready().await?.call(()).await.is_err());
        }
        let now = client.counts();
        println!(
            "{CALLS_PER_SECOND} calls, {failed} failed; decided by memory {}, server {}, this process {}, nobody {}",
            now.memory - before.memory,
            now.server - before.server,
            now.local - before.local,
            now.fallback - before.fallback,
        );
        before = now;
    }
    client.close().await;
    Ok(())
}

/// What is guarded: a call of yours takes its place.
async fn work((): ()) -> Result<(), BoxError> {
    Ok(())
}
