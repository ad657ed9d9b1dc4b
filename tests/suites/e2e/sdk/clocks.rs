//! People who set the server's wall clock: rates, leases and permits do not notice.

use std::time::Duration;

use fusebox_client::Client;
use fusebox_tests::{PATIENCE, Server};

const CONFIG: &str = "
namespaces:
  test:
    policies:
      tokens: {token_bucket: {limit: 100, per: 1m}, on_unreachable: deny}
      permits: {concurrency: {limit: 2, ttl: 60s}, on_unreachable: deny}
";

const HOUR: Duration = Duration::from_secs(3_600);

/// Tokens that are had at once, while the wall clock is set before each.
async fn spent(server: &Server, client: &Client) -> usize {
    let (limiter, mut spent) = (client.limiter("tokens"), 0);
    for call in 0..300 {
        match call % 3 {
            0 => server.clock.turn_wall_on(HOUR),
            1 => server.clock.turn_wall_back(2 * HOUR),
            _ => server.clock.turn_wall_on(24 * HOUR),
        }
        spent += usize::from(limiter.acquire(1).await.is_ok());
    }
    spent
}

#[tokio::test]
async fn steps_of_the_servers_wall_clock_bring_no_token_and_no_permit() {
    let server = Server::start(CONFIG).await;
    let client = Client::connect(format!("http://{}", server.grpc))
        .namespace("test")
        .decide_within(PATIENCE)
        .build()
        .unwrap();
    client.connected().await;

    let first = spent(&server, &client).await;
    assert!((1..=100).contains(&first), "{first}");
    server.advance(Duration::from_secs(30));
    client.limiter("tokens").max_wait(PATIENCE).acquire(1).await.unwrap();
    let more = spent(&server, &client).await;
    assert!(first + 1 + more <= 150, "{first} and {more} of 150");

    let bulkhead = client.bulkhead("permits");
    let _held = [bulkhead.acquire().await.unwrap(), bulkhead.acquire().await.unwrap()];
    for _ in 0..3 {
        server.clock.turn_wall_on(HOUR);
        assert!(bulkhead.acquire().await.is_err());
        server.clock.turn_wall_back(2 * HOUR);
        assert!(bulkhead.acquire().await.is_err());
    }
}
