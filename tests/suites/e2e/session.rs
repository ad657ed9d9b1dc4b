//! All that a client asks, on one stream.

use std::{sync::Arc, time::Duration};

use fusebox_proto::v1::{
    AcquireBatchRequest, AcquireRequest, AcquireResponse, Bind, Bound, CircuitState, Client, Close,
    Decision, GrantOutcome, Heartbeat, Hello, Refusal, ReportRequest, ReportResult, SessionRequest,
    SessionResponse, WatchRequest, Welcome, resilience_client::ResilienceClient,
    session_request::Request, session_response::Response,
};
use fusebox_server::limits;
use fusebox_tests::{ManualClock, PATIENCE, Server, Simulated, eventually};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};
use tonic_types::StatusExt;

use crate::{
    ask,
    caller::{Caller, seconds, serve},
    request,
};

/// A session, as one that speaks the messages themselves has it.
struct Session {
    requests: mpsc::Sender<SessionRequest>,
    messages: Streaming<SessionResponse>,
    welcome: Welcome,
    last: u64,
}

impl Session {
    /// One that has said who it is.
    async fn of(server: &Server, id: &str) -> Self {
        let mut session = Self::silent(server.raw().await).await;
        session.send(hello("test", id)).await;
        match session.told().await {
            Response::Welcome(welcome) => Self { welcome, ..session },
            other => panic!("{other:?}"),
        }
    }

    /// One that has said nothing.
    async fn silent(mut raw: ResilienceClient<Channel>) -> Self {
        let (requests, read) = mpsc::channel(limits::SESSION_UNANSWERED * 2);
        let messages = raw.session(ReceiverStream::new(read)).await.expect("a stream").into_inner();
        Self { requests, messages, welcome: Welcome::default(), last: 0 }
    }

    /// Asks under the next number, which it gives.
    async fn send(&mut self, request: impl Into<Wanted>) -> u64 {
        self.last += 1;
        self.send_as(self.last, request).await;
        self.last
    }

    async fn send_as(&mut self, id: u64, request: impl Into<Wanted>) {
        let Wanted(request) = request.into();
        self.requests.send(SessionRequest { id, request }).await.expect("it reads");
    }

    /// What comes next, heartbeats too; an error if the stream ends with one, `None` if it ends well.
    async fn try_next(&mut self) -> Result<Option<SessionResponse>, Status> {
        tokio::time::timeout(PATIENCE, self.messages.message()).await.expect("it says something")
    }

    /// What comes next that is no heartbeat.
    async fn next(&mut self) -> SessionResponse {
        loop {
            let next = self.try_next().await.expect("no error").expect("no end");
            if !matches!(next.response, Some(Response::Heartbeat(_))) {
                return next;
            }
        }
    }

    /// The same, of the request that was sent last.
    async fn told(&mut self) -> Response {
        let next = self.next().await;
        assert_eq!(next.id, self.last, "{next:?}");
        next.response.expect("something is told")
    }

    /// The error that it ends with.
    async fn ended(&mut self) -> Status {
        loop {
            match self.try_next().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended well"),
                Err(status) => return status,
            }
        }
    }

    async fn acquire(&mut self, request: AcquireRequest) -> AcquireResponse {
        self.send(unnamed(request)).await;
        match self.told().await {
            Response::Acquire(answer) => answer,
            other => panic!("{other:?}"),
        }
    }

    async fn allows(&mut self, policy: &str, key: &str) -> bool {
        let answer = self.acquire(request([ask(policy, key, 1)])).await;
        answer.decision() == Decision::Allow
    }

    async fn refused(&mut self, request: impl Into<Wanted>) -> Refusal {
        self.send(request).await;
        match self.told().await {
            Response::Refusal(refusal) => refusal,
            other => panic!("{other:?}"),
        }
    }

    async fn bind(&mut self, handle: u32, policy: &str, key: &str) -> Bound {
        self.send(bind(handle, policy, key)).await;
        match self.told().await {
            Response::Bound(bound) => bound,
            other => panic!("{other:?}"),
        }
    }
}

/// What a message wants.
struct Wanted(Option<Request>);

impl From<Request> for Wanted {
    fn from(request: Request) -> Self {
        Self(Some(request))
    }
}

impl From<AcquireRequest> for Wanted {
    fn from(request: AcquireRequest) -> Self {
        Request::Acquire(request).into()
    }
}

fn hello(namespace: &str, id: &str) -> Request {
    let client = Some(Client { id: id.into(), ..Default::default() });
    Request::Hello(Hello { namespace: namespace.into(), client })
}

fn bind(handle: u32, policy: &str, key: &str) -> Request {
    Request::Bind(Bind { handle, policy: policy.into(), key: key.into() })
}

/// What a session leaves out.
fn unnamed(request: AcquireRequest) -> AcquireRequest {
    AcquireRequest { namespace: String::new(), ..request }
}

#[tokio::test]
async fn a_session_carries_ten_thousand_acquires() {
    let server = serve("rate: {token_bucket: {limit: 6000, per: 1h}}").await;
    let mut session = Session::of(&server, "a").await;
    let requests = session.requests.clone();
    let asked = tokio::spawn(async move {
        for id in 2..=10_001 {
            let request = Some(Request::Acquire(unnamed(request([ask("rate", "", 1)]))));
            requests.send(SessionRequest { id, request }).await.unwrap();
        }
    });
    let mut allowed = 0;
    let mut seen = vec![false; 10_002];
    for _ in 0..10_000 {
        let SessionResponse { id, response } = session.next().await;
        let Some(Response::Acquire(answer)) = response else { panic!("{response:?}") };
        allowed += usize::from(answer.decision() == Decision::Allow);
        assert!(!std::mem::replace(&mut seen[usize::try_from(id).unwrap()], true), "{id} twice");
    }
    assert_eq!(allowed, 6_000);
    asked.await.unwrap();
    server.stop().await.unwrap();
}
