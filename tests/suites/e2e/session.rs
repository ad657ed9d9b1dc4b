//! All that a client asks, on one stream.

use std::sync::Arc;

use fusebox_proto::v1::{
    AcquireBatchRequest, AcquireRequest, AcquireResponse, Ask, Bind, Bound, CircuitDelta,
    CircuitMode, CircuitState, Client, Close, Decision, DeletePolicyRequest, Durability,
    GrantOutcome, Heartbeat, Hello, ListClientsRequest,
    OnUnreachable::{Allow, Deny, Local},
    Outcome, Policy, PutPolicyRequest, Refusal, ReportRequest, ReportResult, ServerInfoRequest,
    SessionRequest, SessionResponse, TokenBucket, WatchRequest, Welcome,
    admin_client::AdminClient,
    policy,
    resilience_client::ResilienceClient,
    session_request::Request,
    session_response::Response,
};
use fusebox_server::limits;
use fusebox_tests::{ManualClock, PATIENCE, Server, Simulated, eventually};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};
use tonic_types::StatusExt;

use crate::{
    ask,
    caller::{Caller, config, ended, seconds, serve},
    circuits_admin::{Operator, order},
    request,
};

/// A session, as one that speaks the messages themselves has it.
struct Session {
    requests: mpsc::Sender<SessionRequest>,
    messages: Streaming<SessionResponse>,
    welcome: Welcome,
    last: u64,
    /// The grant of some answer.
    granted: String,
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
        Self { requests, messages, welcome: Welcome::default(), last: 0, granted: String::new() }
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

/// What waits for its turn.
fn in_line(policy: &str) -> AcquireRequest {
    let max_wait = Some(seconds(60).try_into().unwrap());
    AcquireRequest { max_wait, ..unnamed(request([ask(policy, "", 1)])) }
}

#[allow(clippy::unnecessary_wraps)] // as a message has it
fn second() -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds: 1, nanos: 0 })
}

/// Ends grants.
fn report(grants: &[&str]) -> Request {
    let outcomes = grants.iter().map(|grant| ended(grant)).collect();
    Request::Report(ReportRequest { outcomes, ..Default::default() })
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

#[tokio::test]
async fn what_waits_does_not_hold_up_what_comes_after_it() {
    let server =
        serve("jobs: {concurrency: {limit: 1}}, rate: {token_bucket: {limit: 9, per: 1m}}").await;
    let mut session = Session::of(&server, "a").await;
    let held = session.acquire(request([ask("jobs", "", 1)])).await;
    let waits = session.send(in_line("jobs")).await;
    let named = AcquireRequest { request_id: "1".into(), ..in_line("jobs") };
    let joins = [session.send(named.clone()).await, session.send(named).await];
    assert!(session.allows("rate", "").await, "it is answered before them");

    for (grant, ids) in [(held.grant_id, vec![waits]), (String::new(), joins.to_vec())] {
        let mut grant = grant;
        if grant.is_empty() {
            grant = std::mem::take(&mut session.granted);
        }
        session.send(report(&[&grant])).await;
        let mut answered = Vec::new();
        while answered.len() <= ids.len() {
            let SessionResponse { id, response } = session.next().await;
            if let Some(Response::Acquire(answer)) = response {
                assert_eq!(answer.decision(), Decision::Allow);
                session.granted = answer.grant_id;
            }
            answered.push(id);
        }
        answered.sort_unstable();
        assert_eq!(answered, [ids, vec![session.last]].concat());
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn past_1024_unanswered_requests_it_reads_no_more_until_some_are_answered() {
    let server = serve(
        "jobs: {concurrency: {limit: 1}, max_waiting: 10000}, rate: {token_bucket: {limit: 9, per: 1m}}",
    )
    .await;
    let mut session = Session::of(&server, "a").await;
    let held = session.acquire(request([ask("jobs", "", 1)])).await;
    for _ in 0..limits::SESSION_UNANSWERED {
        session.send(in_line("jobs")).await;
    }
    let waiting = format!("fusebox_waiting {}\n", limits::SESSION_UNANSWERED);
    eventually("all wait", async || server.http("/metrics").await.1.contains(&waiting)).await;
    let one_more = session.send(unnamed(request([ask("rate", "", 1)]))).await;
    for _ in 0..2 {
        let next = session.try_next().await.unwrap().unwrap();
        assert_eq!(next.response, Some(Response::Heartbeat(Heartbeat {})), "it was read");
    }

    let mut other = Caller::of(&server).await;
    assert_eq!(other.report(ended(&held.grant_id)).await, ReportResult::Applied);
    let first = session.next().await;
    assert!(matches!(first.response, Some(Response::Acquire(_))) && first.id != one_more);
    assert_eq!(session.next().await.id, one_more);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_session_that_breaks_releases_nothing_and_a_close_all_at_once() {
    let server = serve(
        "jobs: {concurrency: {limit: 1, ttl: 10s}}, tokens: {token_bucket: {limit: 10, per: 1h}}",
    )
    .await;
    let mut other = Caller::named(&server, "b").await;
    let mut broken = Session::of(&server, "a").await;
    assert!(broken.allows("jobs", "").await);
    drop(broken);
    eventually("it is gone", async || {
        server.http("/metrics").await.1.contains("fusebox_sessions 0\n")
    })
    .await;
    assert!(!other.ask("jobs", "", 1).await.allowed, "the permit lives");
    let mut again = Session::of(&server, "a").await;
    assert!(!again.allows("jobs", "").await);
    drop(again);
    server.advance(seconds(11));
    eventually("it expired", async || other.left("jobs", "").await == 1).await;

    let mut session = Session::of(&server, "a").await;
    assert!(session.allows("jobs", "").await);
    let estimate = Ask { estimated: true, ..ask("tokens", "", 4) };
    let estimate = session.acquire(request([estimate])).await;
    let lease = Ask { lease: 2, ..ask("tokens", "", 0) };
    session.acquire(request([lease])).await;
    // What it was granted elsewhere ends as well, and nothing of others.
    Caller::named(&server, "a").await.grant(ask("jobs", "elsewhere", 1)).await;
    other.grant(ask("jobs", "others", 1)).await;
    let left = other.left("tokens", "").await;
    session.send(Request::Close(Close {})).await;
    assert!(matches!(session.told().await, Response::Closed(_)));
    assert_eq!(session.try_next().await.unwrap(), None, "it ends well");
    assert_eq!(other.left("jobs", "").await, 1);
    assert_eq!(other.left("jobs", "elsewhere").await, 1);
    assert_eq!(other.left("jobs", "others").await, 0);
    assert_eq!(other.left("tokens", "").await, left, "what was spent stays spent");
    let settled = GrantOutcome { actual_cost: Some(0), ..ended(&estimate.grant_id) };
    assert_eq!(other.report(settled).await, ReportResult::Duplicate);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_permit_that_was_not_told_of_is_back_when_the_stream_breaks() {
    let journal = Simulated::default();
    let config = config("jobs: {concurrency: {limit: 1, ttl: 1h}}");
    let server = Server::start_on(journal.open(), Arc::default(), &config).await;
    let mut session = Session::of(&server, "a").await;
    journal.hang();
    session.send(unnamed(request([ask("jobs", "", 1)]))).await;
    eventually("it waits for the disk", async || journal.hangs()).await;
    drop(session);
    eventually("it is gone", async || {
        server.http("/metrics").await.1.contains("fusebox_sessions 0\n")
    })
    .await;
    journal.go_on();
    let mut other = Caller::of(&server).await;
    eventually("it is back", async || other.left("jobs", "").await == 1).await;
    server.stop().await.unwrap();
}

#[tokio::test]
async fn who_goes_away_leaves_the_line() {
    let server = serve("jobs: {concurrency: {limit: 1}}").await;
    let mut session = Session::of(&server, "a").await;
    assert!(session.allows("jobs", "").await);
    session.send(in_line("jobs")).await;
    let waiting = async |count: u32| {
        let told = format!("fusebox_waiting {count}\n");
        eventually("so many wait", async || server.http("/metrics").await.1.contains(&told)).await;
    };
    waiting(1).await;
    drop(session);
    waiting(0).await;
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_close_gives_probes_back() {
    let server = serve(
        "payments: {breaker: {consecutive_failures: 1, min_reporters: 1, open_for: 5s, \
         backoff: {jitter: 0%}, half_open: {probes: 1, probe_timeout: 1h, max_duration: 2h}}}, \
         rate: {token_bucket: {limit: 100, per: 1h}}",
    )
    .await;
    let probe = async |session: &mut Session, asks: Vec<Ask>| {
        let answer = session.acquire(request(asks)).await;
        (answer.verdicts[0].probe, answer.grant_id)
    };
    let mut session = Session::of(&server, "a").await;
    let call = session.acquire(request([ask("payments", "", 1)])).await;
    let failed = GrantOutcome { outcome: Outcome::Failure.into(), ..ended(&call.grant_id) };
    let report = ReportRequest { outcomes: vec![failed], ..Default::default() };
    session.send(Request::Report(report)).await;
    session.told().await;
    server.advance(seconds(5));
    // Of circuits alone no grant is kept; beside an estimate one is.
    let alone = || vec![ask("payments", "", 1)];
    let kept = || vec![ask("payments", "", 1), Ask { estimated: true, ..ask("rate", "", 1) }];
    for asks in [alone(), kept()] {
        let mut first = Session::of(&server, "b").await;
        assert!(probe(&mut first, asks).await.0);
        assert!(!probe(&mut session, alone()).await.0, "there is one");
        first.send(Request::Close(Close {})).await;
        assert!(matches!(first.told().await, Response::Closed(_)));
        let (is_probe, grant) = probe(&mut session, alone()).await;
        assert!(is_probe, "it was given back");
        let ignored = GrantOutcome { outcome: Outcome::Ignored.into(), ..ended(&grant) };
        let report = ReportRequest { outcomes: vec![ignored], ..Default::default() };
        session.send(Request::Report(report)).await;
        session.told().await;
        server.advance(seconds(60));
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_handle_stands_for_a_policy_and_key() {
    let server = serve(
        "three: {token_bucket: {limit: 3, per: 1h}}, payments: {breaker: {}}, \
         retries: {retry_budget: {}}",
    )
    .await;
    let mut session = Session::of(&server, "a").await;
    let bound = session.bind(7, "three", "alice").await;
    assert_eq!((bound.handle, bound.clients), (7, 1));
    session.bind(8, "payments", "eu").await;
    let by_handle = |handle| Ask { handle, cost: Some(1), ..Default::default() };

    let answer = session.acquire(request([by_handle(7), by_handle(8)])).await;
    assert_eq!(answer.verdicts[0].remaining, Some(2));
    assert_eq!(answer.verdicts[1].circuit_state(), CircuitState::Closed);
    let mut other = Caller::of(&server).await;
    assert_eq!(other.left("three", "alice").await, 2);

    let entry = || unnamed(request([by_handle(7)]));
    let batch = AcquireBatchRequest { requests: vec![entry(), entry()], ..Default::default() };
    session.send(Request::AcquireBatch(batch)).await;
    let Response::AcquireBatch(answer) = session.told().await else { panic!("no answer") };
    assert!(answer.responses.iter().all(|one| one.decision() == Decision::Allow));
    assert_eq!(other.left("three", "alice").await, 0);

    let delta = CircuitDelta { handle: 8, successes: 1, ..Default::default() };
    let report = ReportRequest { deltas: vec![delta], ..Default::default() };
    session.send(Request::Report(report)).await;
    let Response::Report(answer) = session.told().await else { panic!("no answer") };
    let circuit = &answer.circuits[0];
    assert_eq!((&*circuit.policy, &*circuit.key), ("payments", "eu"));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_handle_that_stands_for_nothing_is_refused_by_name() {
    let server = serve("three: {token_bucket: {limit: 3, per: 1h}}, payments: {breaker: {}}").await;
    let mut session = Session::of(&server, "a").await;
    session.bind(7, "three", "alice").await;
    let handle = |handle| Ask { handle, ..Default::default() };
    let delta =
        |delta| Request::Report(ReportRequest { deltas: vec![delta], ..Default::default() });
    let batch = |asks| {
        let requests = vec![unnamed(request([ask("three", "", 1)])), unnamed(request(asks))];
        Request::AcquireBatch(AcquireBatchRequest { requests, ..Default::default() })
    };
    let twice = [handle(7), ask("three", "alice", 1)];
    let named = Some(Client { id: "b".into(), ..Default::default() });
    for (request, field, words) in [
        (Request::Acquire(unnamed(request([handle(8)]))), "asks[0].handle", "8 is not bound"),
        (
            Request::Acquire(unnamed(request([Ask { handle: 7, ..ask("three", "", 1) }]))),
            "asks[0].handle",
            "it stands for policy and key",
        ),
        (
            Request::Acquire(unnamed(request([Ask {
                handle: 7,
                key: "k".into(),
                ..Ask::default()
            }]))),
            "asks[0].handle",
            "it stands for policy and key",
        ),
        (
            Request::Acquire(unnamed(request(twice))),
            "asks[1]",
            "the same policy and key as asks[0]",
        ),
        (batch([handle(8)]), "requests[1].asks[0].handle", "8 is not bound"),
        (
            delta(CircuitDelta { handle: 8, successes: 1, ..Default::default() }),
            "deltas[0].handle",
            "8 is not bound",
        ),
        (Request::Acquire(request([handle(7)])), "namespace", "the session names it once"),
        (
            Request::Acquire(AcquireRequest { client: named, ..unnamed(request([handle(7)])) }),
            "client",
            "the session names it once",
        ),
        (bind(0, "three", ""), "handle", "0, outside 1 to 4096"),
        (bind(4_097, "three", ""), "handle", "4097, outside 1 to 4096"),
        (bind(1, "three", &"x".repeat(257)), "key", "257 bytes"),
        (bind(1, "", "alice"), "key", "leave it out"),
    ] {
        let refusal = session.refused(request).await;
        assert_eq!(Code::from_i32(refusal.code), Code::InvalidArgument);
        let status = Status::with_details(
            Code::from_i32(refusal.code),
            refusal.message.clone(),
            refusal.details.into(),
        );
        let details = status.get_error_details();
        let violation = &details.bad_request().expect("violations").field_violations[0];
        assert_eq!(violation.field, field, "{}", refusal.message);
        assert!(violation.description.contains(words), "{}", violation.description);
    }
    assert!(session.allows("three", "").await, "it goes on");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_refusal_says_what_the_call_would_have() {
    let server = serve("three: {token_bucket: {limit: 3, per: 1h}}").await;
    let mut session = Session::of(&server, "a").await;
    let mut raw = server.raw().await;
    let client = Some(Client { id: "a".into(), ..Default::default() });
    for asks in [
        vec![],
        vec![ask("three", "", 4)],
        vec![ask("three", "", 1), ask("nothing", "", 1)],
        vec![Ask { estimated: true, ..ask("three", "", 0) }, ask("three", &"x".repeat(300), 1)],
    ] {
        let named = AcquireRequest { client: client.clone(), ..request(asks) };
        let status = raw.acquire(named.clone()).await.unwrap_err();
        let refusal = session.refused(AcquireRequest { client: None, ..unnamed(named) }).await;
        assert_eq!(Code::from_i32(refusal.code), status.code());
        assert_eq!(refusal.message, status.message());
        assert_eq!(refusal.details, status.details());
        assert!(!refusal.details.is_empty());
    }
    let watch = WatchRequest { policies: vec!["three".into()], ..Default::default() };
    let refusal = session.refused(Request::Watch(watch)).await;
    assert!(refusal.message.starts_with("policies[0]: "), "{}", refusal.message);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_is_bound_is_told_with_all_that_a_client_needs_alone() {
    let server = serve(
        "rate: {token_bucket: {limit: 3, per: 1s}, overrides: [{prefix: slow/, fixed_window: {limit: 9, per: 1h}}]}, \
         jobs: {concurrency: {limit: 1}, on_unreachable: allow}, payments: {breaker: {}}",
    )
    .await;
    let mut session = Session::of(&server, "a").await;
    let rate = session.bind(1, "rate", "alice").await;
    let minute = |policy: &Policy| policy.lease_time.map(|time| (time.seconds, time.nanos));
    let policy = rate.policy.expect("a policy");
    let Some(policy::Kind::TokenBucket(bucket)) = &policy.kind else { panic!("{policy:?}") };
    assert_eq!((bucket.limit, bucket.burst), (Some(3), Some(3)));
    assert_eq!((policy.on_unreachable(), policy.durability()), (Local, Durability::Strict));
    assert_eq!((minute(&policy), policy.max_debt), (Some((1, 0)), Some(3)));
    assert!(policy.overrides.is_empty() && policy.reserves.is_some());

    let slow = session.bind(2, "rate", "slow/bob").await.policy.expect("a policy");
    assert!(matches!(slow.kind, Some(policy::Kind::FixedWindow(_))), "{slow:?}");
    assert_eq!((slow.on_unreachable(), slow.overrides.len()), (Deny, 0));
    assert_eq!(session.bind(3, "jobs", "").await.policy.unwrap().on_unreachable(), Allow);
    let breaker = session.bind(4, "payments", "").await.policy.unwrap();
    assert_eq!(breaker.on_unreachable(), Allow);
    assert!(matches!(breaker.kind, Some(policy::Kind::Breaker(_))));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_handle_is_bound_anew_and_ended() {
    let server = serve(
        "three: {token_bucket: {limit: 3, per: 1h}}, five: {token_bucket: {limit: 5, per: 1h}}",
    )
    .await;
    let mut session = Session::of(&server, "a").await;
    let left = async |session: &mut Session| {
        let by_handle = Ask { handle: 1, cost: Some(0), ..Default::default() };
        session.acquire(request([by_handle])).await.verdicts[0].remaining
    };
    session.bind(1, "three", "").await;
    assert_eq!(left(&mut session).await, Some(3));
    session.bind(1, "five", "").await;
    assert_eq!(left(&mut session).await, Some(5));

    let refusal = session.refused(bind(1, "nothing", "")).await;
    assert_eq!(Code::from_i32(refusal.code), Code::NotFound);
    assert_eq!(refusal.message, "policy: unknown policy `nothing`");
    assert_eq!(left(&mut session).await, Some(5), "the former one stays");

    // Their numbers are free again: of the first Bind since it was replaced, of the last since it is ended.
    session.send_as(2, bind(2, "three", "")).await;
    assert_eq!(session.next().await.id, 2);
    assert_eq!(session.bind(1, "", "").await, Bound::default());
    assert_eq!(session.bind(1, "", "").await, Bound::default(), "also if nothing is bound");
    let by_handle = Ask { handle: 1, ..Default::default() };
    let refusal = session.refused(unnamed(request([by_handle]))).await;
    assert!(refusal.message.starts_with("asks[0].handle: 1 is not bound"), "{}", refusal.message);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_changes_of_what_is_bound_is_told() {
    let server = serve("other: {token_bucket: {limit: 1, per: 1s}}").await;
    let mut operator = AdminClient::new(server.channel().await);
    let mut put = async |limit: u64| {
        let bucket = TokenBucket { limit: Some(limit), per: second(), burst: None };
        let policy = Policy { kind: Some(policy::Kind::TokenBucket(bucket)), ..Default::default() };
        let put = PutPolicyRequest {
            namespace: "test".into(),
            name: "rate".into(),
            policy: Some(policy),
            ..Default::default()
        };
        operator.put_policy(put).await.expect("it is put");
    };
    put(3).await;
    let mut session = Session::of(&server, "a").await;
    session.bind(1, "other", "").await;
    session.bind(2, "rate", "x").await;
    let id = session.last;
    let mut news = async || {
        let next = session.next().await;
        assert_eq!(next.id, id);
        match next.response {
            Some(Response::Bound(Bound { handle: 2, policy: Some(policy), clients })) => {
                let Some(policy::Kind::TokenBucket(bucket)) = policy.kind else { panic!() };
                Ok((bucket.limit.unwrap(), clients))
            }
            Some(Response::Refusal(refusal)) => Err(refusal),
            other => panic!("{other:?}"),
        }
    };
    put(5).await;
    assert_eq!(news().await, Ok((5, 1)));
    let mut second = Session::of(&server, "b").await;
    second.bind(9, "rate", "x").await;
    assert_eq!(news().await, Ok((5, 2)));
    // The same client on another session, and another key, are no more clients.
    let mut third = Session::of(&server, "b").await;
    assert_eq!(third.bind(1, "rate", "x").await.clients, 2);
    assert_eq!(third.bind(2, "rate", "y").await.clients, 1);
    drop(second);
    put(6).await;
    assert_eq!(news().await, Ok((6, 2)));
    drop(third);
    assert_eq!(news().await, Ok((6, 1)));

    let delete =
        DeletePolicyRequest { namespace: "test".into(), name: "rate".into(), ..Default::default() };
    operator.delete_policy(delete).await.expect("it is deleted");
    let refusal = news().await.unwrap_err();
    assert_eq!(Code::from_i32(refusal.code), Code::NotFound);
    assert_eq!(refusal.message, "unknown policy `rate`");
    // Its number is free again, and its handle stands for nothing.
    session.send_as(id, unnamed(request([Ask { handle: 2, ..Default::default() }]))).await;
    let next = session.next().await;
    assert!(
        matches!(next.response, Some(Response::Refusal(refusal)) if refusal.message.contains("not bound"))
    );
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_truth_has_the_same_name_after_a_restart_and_none_that_is_kept_nowhere_has_one_twice() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let config = config("three: {token_bucket: {limit: 3, per: 1h}}");
    let mut kept = Vec::new();
    for _ in 0..2 {
        let server = Server::start_on(journal.open(), Arc::clone(&clock), &config).await;
        let session = Session::of(&server, "a").await;
        let info = AdminClient::new(server.channel().await).server_info(ServerInfoRequest {}).await;
        let info = info.unwrap().into_inner();
        assert_eq!((&session.welcome.truth_id, session.welcome.boot), (&info.truth_id, info.boot));
        kept.push(session.welcome);
        server.stop().await.unwrap();
    }
    assert_eq!(kept[0].truth_id, kept[1].truth_id);
    assert!(kept[0].boot < kept[1].boot);
    assert_eq!(kept[0].heartbeat, second());

    let first = Server::start_drawing_from(500, &config).await;
    let second = Server::start_drawing_from(1_000, &config).await;
    let mut truths = vec![kept.remove(0).truth_id];
    for server in [&first, &second] {
        truths.push(Session::of(server, "a").await.welcome.truth_id);
    }
    truths.dedup();
    assert_eq!(truths.len(), 3);
    assert!(truths.iter().all(|truth| truth.len() == 32));
    first.stop().await.unwrap();
    second.stop().await.unwrap();
}

#[tokio::test]
async fn a_session_watches_circuits_and_a_later_watch_takes_its_place() {
    let server = serve(crate::circuits_admin::BREAKERS).await;
    let mut operator = Operator::of(&server).await;
    let mut session = Session::of(&server, "a").await;
    let watch = || Request::Watch(WatchRequest::default());
    let news = async |session: &mut Session, id: u64| loop {
        let next = session.next().await;
        let Some(Response::Watch(news)) = next.response else { panic!("{next:?}") };
        assert_eq!(next.id, id);
        if !news.circuits.is_empty() {
            return news;
        }
    };
    server.advance(seconds(100));
    let first = session.send(watch()).await;
    let snapshot = session.next().await;
    let Some(Response::Watch(snapshot)) = snapshot.response else { panic!("{snapshot:?}") };
    assert!(snapshot.snapshot && snapshot.complete);
    assert_eq!(snapshot.elapsed, Some(Default::default()), "since the Watch came");
    operator.set(order("payments", "eu", CircuitMode::ForcedOpen)).await;
    assert_eq!(news(&mut session, first).await.circuits[0].key, "eu");

    let only = WatchRequest { policies: vec!["search".into()], ..Default::default() };
    let second = session.send(Request::Watch(only)).await;
    let begins = session.next().await;
    assert_eq!(begins.id, second, "{begins:?}");
    operator.set(order("payments", "us", CircuitMode::ForcedOpen)).await;
    operator.set(order("search", "", CircuitMode::ForcedOpen)).await;
    let told = news(&mut session, second).await;
    assert_eq!(told.circuits.len(), 1);
    assert_eq!(told.circuits[0].policy, "search");
    // The number of the former is free.
    session.send_as(first, watch()).await;
    assert_eq!(news(&mut session, first).await.circuits.len(), 3);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_session_that_breaks_the_rules_ends_and_says_why() {
    let server =
        serve("three: {token_bucket: {limit: 3, per: 1h}}, jobs: {concurrency: {limit: 0}}").await;
    let acquire = || Wanted::from(unnamed(request([ask("three", "", 1)])));
    let nothing = || Wanted(None);
    for (first, words) in [
        (acquire(), "hello: required"),
        (nothing(), "request: required"),
        (hello("", "a").into(), "namespace: required"),
        (hello("test", "").into(), "client.id: required"),
        (Request::Hello(Hello { namespace: "test".into(), client: None }).into(), "client.id: "),
    ] {
        let mut session = Session::silent(server.raw().await).await;
        session.send(first).await;
        let status = session.ended().await;
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with(words), "{status}");
        assert!(status.get_error_details().bad_request().is_some());
    }
    let mut session = Session::silent(server.raw().await).await;
    session.send(hello("nowhere", "a")).await;
    let status = session.ended().await;
    assert_eq!((status.code(), status.message()), (Code::NotFound, "unknown namespace `nowhere`"));
    let mut session = Session::silent(server.raw().await).await;
    session.send_as(0, hello("test", "a")).await;
    assert!(session.ended().await.message().starts_with("id: 0; "));

    for (second, id, words) in [
        (hello("test", "a").into(), 9, "hello: the second one"),
        (nothing(), 9, "request: required"),
        (acquire(), 0, "id: 0; a request has a number"),
        (acquire(), 2, "id: 2 is that of a request without an answer"),
        (acquire(), 3, "id: 3 is that of a request without an answer, or of a Bind"),
    ] {
        let mut session = Session::of(&server, "a").await;
        session.send(Request::Watch(WatchRequest::default())).await;
        session.next().await;
        session.bind(1, "three", "").await;
        session.send_as(id, second).await;
        let status = session.ended().await;
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with(words), "{status}");
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn something_after_a_close_is_refused() {
    let (journal, clock) = (Simulated::default(), Arc::default());
    let server =
        Server::start_on(journal.open(), clock, &config("jobs: {concurrency: {limit: 4096}}"))
            .await;
    let mut session = Session::of(&server, "a").await;
    session.acquire(request([ask("jobs", "", 4_096)])).await;
    // It ends once what it gave back is on disk.
    journal.hang();
    session.send(Request::Close(Close {})).await;
    session.send(unnamed(request([ask("jobs", "", 1)]))).await;
    let ended = session.try_next().await;
    journal.go_on();
    match ended {
        // What comes back may need no disk: then the stream has ended before.
        Ok(Some(closed)) => assert!(matches!(closed.response, Some(Response::Closed(_)))),
        Err(status) => assert!(status.message().starts_with("close: something follows it")),
        Ok(None) => panic!("without a word"),
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn who_ends_its_side_is_answered_what_it_asked() {
    let server = serve("jobs: {concurrency: {limit: 1}}").await;
    let mut session = Session::of(&server, "a").await;
    let held = session.acquire(request([ask("jobs", "", 1)])).await;
    let waits = session.send(in_line("jobs")).await;
    session.requests = mpsc::channel(1).0;
    let heard = session.try_next().await.unwrap().unwrap();
    assert_eq!(heard.response, Some(Response::Heartbeat(Heartbeat {})));
    Caller::of(&server).await.report(ended(&held.grant_id)).await;
    assert_eq!(session.next().await.id, waits);
    assert_eq!(session.try_next().await.unwrap(), None);
    assert_eq!(Caller::of(&server).await.left("jobs", "").await, 0, "and nothing is released");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_drain_ends_sessions() {
    let server = serve("jobs: {concurrency: {limit: 1}}").await;
    let mut session = Session::of(&server, "a").await;
    assert!(session.allows("jobs", "").await);
    session.send(in_line("jobs")).await;
    server.ask_to_stop();
    let status = session.ended().await;
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    server.ended().await.unwrap();
}

#[tokio::test]
async fn a_storage_that_fails_ends_sessions() {
    let journal = Simulated::default();
    let config = config("three: {token_bucket: {limit: 3, per: 1h}}");
    let server = Server::start_on(journal.open(), Arc::default(), &config).await;
    let mut session = Session::of(&server, "a").await;
    let mut silent = Session::of(&server, "b").await;
    journal.fail();
    session.send(unnamed(request([ask("three", "", 1)]))).await;
    for session in [&mut session, &mut silent] {
        let status = session.ended().await;
        assert_eq!(status.code(), Code::Unavailable, "{status}");
    }
    server.ask_to_stop();
    server.ended().await.unwrap_err();
}

#[tokio::test]
async fn operators_see_sessions_and_their_clients() {
    let server = serve("jobs: {concurrency: {limit: 1}}").await;
    let mut session = Session::of(&server, "a").await;
    let mut operator = AdminClient::new(server.channel().await);
    let info = operator.server_info(ServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.sessions, 1);
    assert!(server.http("/metrics").await.1.contains("fusebox_sessions 1\n"));
    assert!(session.allows("jobs", "").await);
    // A client that asks for nothing is still there.
    server.advance(limits::CLIENT_SILENCE / 2);
    session.try_next().await.unwrap();
    server.advance(limits::CLIENT_SILENCE / 2 + seconds(1));
    let list = ListClientsRequest { namespace: "test".into(), ..Default::default() };
    let clients = operator.list_clients(list).await.unwrap().into_inner().clients;
    assert_eq!(clients[0].client.as_ref().unwrap().id, "a");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_was_received_in_days_counts_no_longer() {
    let server = serve("three: {token_bucket: {limit: 3, per: 1h}}").await;
    let mut session = Session::of(&server, "a").await;
    let key = "k".repeat(limits::MESSAGE_BYTES - 100);
    for _ in 0..=limits::RECEIVED_BYTES / key.len() {
        let refusal = session.refused(unnamed(request([ask("three", &key, 1)]))).await;
        assert_eq!(Code::from_i32(refusal.code), Code::InvalidArgument);
    }
    assert!(session.allows("three", "").await);
    server.stop().await.unwrap();
}
