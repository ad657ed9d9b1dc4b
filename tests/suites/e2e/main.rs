//! The whole server over real sockets, in time that only moves when a test says so.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod acquire;
mod admin;
mod bad_input;
mod breakers;
mod caller;
mod circuits;
mod circuits_admin;
mod clocks;
mod kinds;
mod leases;
mod life;
mod overflow;
mod overrides;
mod permits;
mod priorities;
mod ratelimit;
mod report;
mod reports_circuits;
mod requests;
mod restart;
mod sdk;
mod seeing;
mod session;
mod several;
mod waiting;
mod watch;

use fusebox_proto::v1::{AcquireBatchRequest, AcquireRequest, Ask};
use fusebox_tests::Server;

/// Policies of every size that the tests need.
const CONFIG: &str = "
drain_timeout: 10s
namespaces:
  test:
    policies:
      three: {token_bucket: {limit: 3, per: 1m}}
      hundred: {token_bucket: {limit: 100, per: 1m}}
      tokens: {token_bucket: {limit: 10, per: 1s, burst: 100}, max_debt: 50}
      closed: {token_bucket: {limit: 0, per: 1s}}
  other:
    policies:
      three: {token_bucket: {limit: 3, per: 1m}}
";

fn ask(policy: &str, key: &str, cost: u64) -> Ask {
    Ask { policy: policy.into(), key: key.into(), cost: Some(cost), ..Default::default() }
}

fn request(asks: impl IntoIterator<Item = Ask>) -> AcquireRequest {
    AcquireRequest {
        namespace: "test".into(),
        asks: asks.into_iter().collect(),
        ..Default::default()
    }
}

fn batch(requests: Vec<AcquireRequest>) -> AcquireBatchRequest {
    AcquireBatchRequest { namespace: "test".into(), requests, client: None }
}

/// What a peek says is left.
async fn remaining(server: &Server, policy: &str, key: &str) -> u64 {
    let client = server.client("test").await;
    let peek = fusebox_client::unary::Ask::new(policy, key).cost(0);
    let answer = client.acquire([peek]).await.expect("a peek is answered");
    answer.verdicts[0].remaining.expect("a bucket says what is left")
}
