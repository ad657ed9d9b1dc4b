//! A server of a few lines, a network in memory to it, and a part that writes down what it hears.

use std::{collections::BTreeMap, io, sync::Arc};

use fusebox_proto::v1::{
    self, SessionRequest, SessionResponse,
    resilience_server::{Resilience, ResilienceServer},
    session_request::Request,
    session_response::Response,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::DuplexStream,
    sync::mpsc::{Receiver, Sender, UnboundedSender, unbounded_channel},
    time::{Instant, timeout},
};
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tonic::{Code, Status, Streaming, transport::Endpoint};

use crate::{
    part::{Draft, Link as Linked},
    session::*,
    settings::Fallback,
    telemetry::Counts,
};

/// Longer than anything here takes, in time that passes only when nothing else is left to do.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

pub(super) const HEARTBEAT: Duration = Duration::from_secs(1);

/// Servers by name; those that are not there refuse connections.
#[derive(Clone, Default)]
pub(super) struct Net {
    pub(super) servers: Arc<Mutex<BTreeMap<String, UnboundedSender<io::Result<DuplexStream>>>>>,
}

impl Net {
    /// A server of that name, which hands out each session that somebody begins.
    pub(super) fn serve(&self, name: &str) -> Receiver<Peer> {
        let (incoming, accepted) = unbounded_channel();
        self.servers.lock().insert(name.into(), incoming);
        let (peers, sessions) = mpsc::channel(16);
        let service = ResilienceServer::new(Fake { peers });
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(UnboundedReceiverStream::new(accepted)),
        );
        sessions
    }

    pub(super) fn connector(&self) -> Arc<dyn Connect> {
        let net = self.clone();
        Arc::new(Given(tower::service_fn(move |uri: http::Uri| {
            let server = net.servers.lock().get(uri.host().unwrap()).cloned();
            async move {
                let (ours, theirs) = tokio::io::duplex(1 << 20);
                let server = server.ok_or(io::ErrorKind::ConnectionRefused)?;
                server.send(Ok(theirs)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
                Ok::<_, io::Error>(TokioIo::new(ours))
            }
        })))
    }

    /// A client of these servers.
    pub(super) fn client(&self, names: &[&str], connections: usize) -> Client {
        self.seeded(names, connections, 2)
    }

    pub(super) fn seeded(&self, names: &[&str], connections: usize, seed: u64) -> Client {
        let clock = Clock::of_the_runtime();
        let runtime = tokio::runtime::Handle::current();
        let events = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&events);
        let observer =
            move |event: &Event<'_>| heard.lock().push(format!("{event:?}").to_lowercase());
        let (wire, ends) = Wire::new(connections, clock.clone(), runtime.clone());
        let wire = Arc::new(wire);
        let context = Arc::new(Context {
            clock,
            runtime,
            exchange: Arc::clone(&wire) as Arc<_>,
            decide_within: Duration::from_millis(50),
            fallback: Fallback::Allow,
            telemetry: Telemetry { observer: Some(Arc::new(observer)), ..Telemetry::default() },
            random: Random::of(1),
        });
        let target = |name: &&str| Target {
            name: (*name).into(),
            endpoint: Endpoint::from_shared(format!("http://{name}")).unwrap(),
        };
        let dialer = Dialer {
            targets: names.iter().map(target).collect(),
            connector: Some(self.connector()),
            authorization: None,
            within: Duration::from_secs(5),
            hello: v1::Hello { namespace: "demo".into(), client: None },
        };
        let part = Arc::new(Script::default());
        let parts = vec![Arc::downgrade(&part) as Weak<dyn Part>];
        wire.start(ends, Arc::downgrade(&context), dialer, parts, &Random::of(seed));
        Client { wire, context, part, events }
    }
}

pub(super) struct Client {
    pub(super) wire: Arc<Wire>,
    pub(super) context: Arc<Context>,
    pub(super) part: Arc<Script>,
    pub(super) events: Arc<Mutex<Vec<String>>>,
}

impl Client {
    /// Asks, without waiting for the answer.
    pub(super) fn ask(&self, key: &str) -> Asked {
        self.wire.ask(vec![Question::of(&self.wire.bind("api", key))])
    }

    pub(super) fn told(&self, what: &str) -> usize {
        self.events.lock().iter().filter(|event| event.contains(what)).count()
    }
}

/// A part that says what it is given, and writes down what it hears.
#[derive(Default)]
pub(super) struct Script {
    pub(super) drafts: Mutex<Vec<Draft>>,
    pub(super) last: Mutex<Option<Draft>>,
    pub(super) watches: Mutex<Vec<Arc<str>>>,
    pub(super) heard: Mutex<Vec<String>>,
    pub(super) panics: AtomicBool,
}

impl Script {
    pub(super) fn has_heard(&self) -> Vec<String> {
        self.heard.lock().clone()
    }
}

impl Part for Script {
    fn tend(&self, _now: Time) {
        assert!(!self.panics.load(Ordering::Relaxed), "as it was told to");
    }

    fn report(&self, draft: &mut Draft, _now: Time) {
        if let Some(next) = self.drafts.lock().pop() {
            *draft = next;
        }
    }

    fn reported(&self, response: &v1::ReportResponse, _sent: Time) {
        self.heard.lock().push(format!("reported {}", response.results.len()));
    }

    fn watches(&self) -> Vec<Arc<str>> {
        self.watches.lock().clone()
    }

    fn watched(&self, news: &v1::WatchResponse, _sent: Time) {
        self.heard.lock().push(format!("watched {}", news.version));
    }

    fn linked(&self, link: Linked, _now: Time) {
        self.heard.lock().push(format!("{link:?}"));
    }

    fn count(&self, _counts: &mut Counts) {}

    fn close(&self, draft: &mut Draft, _now: Time) {
        *draft = self.last.lock().take().unwrap_or_default();
    }
}

/// A session, as the server has it.
pub(super) struct Peer {
    pub(super) requests: Streaming<SessionRequest>,
    pub(super) responses: Sender<Result<SessionResponse, Status>>,
}

impl Peer {
    /// The next session, welcomed.
    pub(super) async fn welcomed(sessions: &mut Receiver<Self>, truth: &str, boot: u64) -> Self {
        let mut peer = Self::of(sessions).await;
        peer.welcome(truth, boot).await;
        peer
    }

    pub(super) async fn of(sessions: &mut Receiver<Self>) -> Self {
        timeout(PATIENCE, sessions.recv()).await.expect("a session begins").unwrap()
    }

    pub(super) async fn welcome(&mut self, truth: &str, boot: u64) {
        let hello = timeout(PATIENCE, self.requests.message()).await.unwrap().unwrap().unwrap();
        assert!(matches!(hello.request, Some(Request::Hello(_))), "{hello:?}");
        let heartbeat = Some(HEARTBEAT.try_into().unwrap());
        let welcome = v1::Welcome { truth_id: truth.into(), boot, heartbeat };
        self.tell(hello.id, Response::Welcome(welcome)).await;
    }

    pub(super) async fn tell(&self, id: u64, response: Response) {
        let response = SessionResponse { id, response: Some(response) };
        self.responses.send(Ok(response)).await.expect("it is heard");
    }

    pub(super) async fn refuse(&self, id: u64, code: Code) {
        let message = "no".into();
        self.tell(
            id,
            Response::Refusal(v1::Refusal { code: code.into(), message, details: vec![] }),
        )
        .await;
    }

    pub(super) async fn end(self, status: Status) {
        let _ = self.responses.send(Err(status)).await;
    }

    /// What comes next that is no probe; those are answered, as heartbeats would be sent.
    pub(super) async fn next(&mut self) -> Option<(u64, Request)> {
        loop {
            let next = timeout(PATIENCE, self.requests.message()).await.expect("it says something");
            let SessionRequest { id, request } = next.ok().flatten()?;
            match request.unwrap() {
                Request::Bind(v1::Bind { handle: bindings::SPARE, policy, .. })
                    if policy.is_empty() =>
                {
                    self.tell(id, Response::Bound(v1::Bound::default())).await;
                }
                request => return Some((id, request)),
            }
        }
    }

    pub(super) async fn asked(&mut self) -> (u64, v1::AcquireRequest) {
        loop {
            match self.next().await.expect("it goes on") {
                (id, Request::Acquire(acquire)) => return (id, acquire),
                (_, Request::Bind(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub(super) async fn bound(&mut self) -> (u64, v1::Bind) {
        match self.next().await.expect("it goes on") {
            (id, Request::Bind(bind)) => (id, bind),
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn reported(&mut self) -> (u64, v1::ReportRequest) {
        match self.next().await.expect("it goes on") {
            (id, Request::Report(report)) => (id, report),
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn watched(&mut self) -> (u64, v1::WatchRequest) {
        match self.next().await.expect("it goes on") {
            (id, Request::Watch(watch)) => (id, watch),
            other => panic!("{other:?}"),
        }
    }
}

pub(super) fn allowed() -> v1::AcquireResponse {
    v1::AcquireResponse {
        decision: v1::Decision::Allow.into(),
        verdicts: vec![v1::Verdict { remaining: Some(7), ..Default::default() }],
        ..Default::default()
    }
}

pub(super) fn terms(handle: u32) -> v1::Bound {
    let bucket = v1::TokenBucket {
        limit: Some(10),
        per: Some(Duration::from_secs(1).try_into().unwrap()),
        burst: Some(10),
    };
    let policy = v1::Policy {
        kind: Some(v1::policy::Kind::TokenBucket(bucket)),
        on_unreachable: v1::OnUnreachable::Deny.into(),
        ..Default::default()
    };
    v1::Bound { handle, policy: Some(policy), clients: 3 }
}

pub(super) fn saying(outcomes: usize, deltas: usize) -> Draft {
    Draft {
        outcomes: vec![v1::GrantOutcome::default(); outcomes],
        deltas: vec![v1::CircuitDelta::default(); deltas],
        renew_grant_ids: vec![],
    }
}

pub(super) fn now() -> Instant {
    crate::clock::deadline(Duration::ZERO)
}

/// Returns once `holds` does.
pub(super) async fn eventually(holds: impl Fn() -> bool) {
    let held = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, held).await.expect("it comes to hold");
}

struct Fake {
    pub(super) peers: Sender<Peer>,
}

type Stream<T> = ReceiverStream<Result<T, Status>>;

#[tonic::async_trait]
impl Resilience for Fake {
    type WatchStream = Stream<v1::WatchResponse>;
    type SessionStream = Stream<SessionResponse>;

    async fn session(
        &self,
        request: tonic::Request<Streaming<SessionRequest>>,
    ) -> Result<tonic::Response<Self::SessionStream>, Status> {
        let (responses, told) = mpsc::channel(2048);
        let _ = self.peers.send(Peer { requests: request.into_inner(), responses }).await;
        Ok(tonic::Response::new(ReceiverStream::new(told)))
    }

    async fn acquire(
        &self,
        _: tonic::Request<v1::AcquireRequest>,
    ) -> Result<tonic::Response<v1::AcquireResponse>, Status> {
        Err(Status::unimplemented("only sessions"))
    }

    async fn acquire_batch(
        &self,
        _: tonic::Request<v1::AcquireBatchRequest>,
    ) -> Result<tonic::Response<v1::AcquireBatchResponse>, Status> {
        Err(Status::unimplemented("only sessions"))
    }

    async fn report(
        &self,
        _: tonic::Request<v1::ReportRequest>,
    ) -> Result<tonic::Response<v1::ReportResponse>, Status> {
        Err(Status::unimplemented("only sessions"))
    }

    async fn watch(
        &self,
        _: tonic::Request<v1::WatchRequest>,
    ) -> Result<tonic::Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("only sessions"))
    }
}
