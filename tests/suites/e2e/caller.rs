//! A caller that speaks the messages themselves, and what it is told in words that compare.

use std::time::Duration;

use fusebox_proto::v1::{
    AcquireRequest, AcquireResponse, Ask, Client, Decision, GrantOutcome, Reason, ReportRequest,
    ReportResult, Verdict, resilience_client::ResilienceClient,
};
use fusebox_tests::Server;
use tonic::{Code, transport::Channel};

use crate::{ask, request};

/// A server of these policies in the namespace `test`.
pub(crate) async fn serve(policies: &str) -> Server {
    Server::start(&config(policies)).await
}

/// A configuration of these policies in the namespace `test`.
pub(crate) fn config(policies: &str) -> String {
    format!("namespaces: {{test: {{policies: {{{policies}}}}}}}")
}

/// Asks and tells as one process.
pub(crate) struct Caller {
    raw: ResilienceClient<Channel>,
    client: Option<Client>,
}

/// A verdict, as far as most tests look at it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) allowed: bool,
    pub(crate) reason: Reason,
    pub(crate) limit: u64,
    pub(crate) remaining: u64,
    pub(crate) retry_after: Option<Duration>,
    pub(crate) reset_after: Duration,
}

impl Caller {
    /// One that does not say who it is.
    pub(crate) async fn of(server: &Server) -> Self {
        Self { raw: server.raw().await, client: None }
    }

    /// One that does.
    pub(crate) async fn named(server: &Server, id: &str) -> Self {
        let client = Client { id: id.into(), ..Default::default() };
        Self { raw: server.raw().await, client: Some(client) }
    }

    /// The answer to a request.
    pub(crate) async fn acquire(&mut self, request: AcquireRequest) -> AcquireResponse {
        let request = AcquireRequest { client: self.client.clone(), ..request };
        self.raw.acquire(request).await.expect("an answer").into_inner()
    }

    /// The answer to one ask.
    pub(crate) async fn ask(&mut self, policy: &str, key: &str, cost: u64) -> Said {
        said(&self.acquire(request([ask(policy, key, cost)])).await.verdicts[0])
    }

    /// The grant of one ask.
    pub(crate) async fn grant(&mut self, ask: Ask) -> String {
        let answer = self.acquire(request([ask])).await;
        assert!(!answer.grant_id.is_empty(), "{answer:?}");
        answer.grant_id
    }

    /// What is left of a key.
    pub(crate) async fn left(&mut self, policy: &str, key: &str) -> u64 {
        self.ask(policy, key, 0).await.remaining
    }

    /// What is wrong with a request, and in which field.
    pub(crate) async fn refused(&mut self, request: AcquireRequest) -> String {
        let request = AcquireRequest { client: self.client.clone(), ..request };
        let refused = self.raw.acquire(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        refused.message().to_owned()
    }

    /// What becomes of one outcome.
    pub(crate) async fn report(&mut self, outcome: GrantOutcome) -> ReportResult {
        let namespace = "test".into();
        let report = ReportRequest { namespace, outcomes: vec![outcome], ..Default::default() };
        self.raw.report(report).await.expect("an answer").into_inner().results().next().unwrap()
    }

    /// How long a grant lives now; nothing if it is none.
    pub(crate) async fn renew(&mut self, grant: &str) -> Duration {
        let renew_grant_ids = vec![grant.to_owned()];
        let client = self.client.clone();
        let namespace = "test".into();
        let report = ReportRequest { namespace, client, renew_grant_ids, ..Default::default() };
        let answer = self.raw.report(report).await.expect("an answer").into_inner();
        let [renewal] = answer.renewals.as_slice() else { panic!("{answer:?}") };
        assert_eq!(renewal.grant_id, grant);
        duration(renewal.expires_in).expect("a time, also if it is over")
    }
}

/// A verdict in words that compare.
pub(crate) fn said(verdict: &Verdict) -> Said {
    Said {
        allowed: verdict.decision() == Decision::Allow,
        reason: verdict.reason(),
        limit: verdict.limit.expect("a limit"),
        remaining: verdict.remaining.expect("what is left"),
        retry_after: duration(verdict.retry_after),
        reset_after: duration(verdict.reset_after).expect("a time to be full"),
    }
}

/// The end of a grant, of which nothing else is told.
pub(crate) fn ended(grant_id: &str) -> GrantOutcome {
    GrantOutcome { grant_id: grant_id.into(), ..Default::default() }
}

pub(crate) fn duration(duration: Option<prost_types::Duration>) -> Option<Duration> {
    duration.map(|duration| duration.try_into().expect("a duration"))
}

pub(crate) const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}
