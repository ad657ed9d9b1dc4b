//! Envoy's rate limit service: what proxies ask.

mod parse;
mod respond;

use std::sync::Arc;

use fusebox_proto::envoy::service::ratelimit::v3::{
    RateLimitRequest, RateLimitResponse, rate_limit_service_server::RateLimitService,
};
use tonic::{Request, Response, Status};

use super::{answered, arrive, status};
use crate::{app::Ratelimited, lifecycle::Lifecycle};

pub use self::parse::request as parse;

/// `envoy.service.ratelimit.v3.RateLimitService`.
pub struct Ratelimit {
    lifecycle: Arc<Lifecycle>,
}

impl Ratelimit {
    /// A service that answers once `lifecycle` is ready.
    pub fn new(lifecycle: Arc<Lifecycle>) -> Self {
        Self { lifecycle }
    }
}

#[tonic::async_trait]
impl RateLimitService for Ratelimit {
    async fn should_rate_limit(
        &self,
        request: Request<RateLimitRequest>,
    ) -> Result<Response<RateLimitResponse>, Status> {
        let (app, caller) = arrive(&self.lifecycle)?;
        let request = request.get_ref();
        let wanted = parse::request(request)?;
        let tell = |limited: &Ratelimited<'_>| respond::limited(request, limited);
        let answer = app.should_rate_limit(caller, wanted, tell);
        let answer = answer.map_err(|error| status::ratelimit(&error))?;
        Ok(Response::new(answered(answer).await?))
    }
}
