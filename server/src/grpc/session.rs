//! A session: all that a client asks, on one stream.
//!
//! It is a state machine that the transport polls when there is room for a message: what is ready is told, else the
//! next request is read, and most are decided on the spot. Those that have to wait do so in tasks of their own, which
//! end with the session. So who does not read is not read either, and nothing of it is queued but the answers to at
//! most [`limits::SESSION_UNANSWERED`] requests.

mod bindings;
mod names;

use std::{
    collections::{HashSet, VecDeque},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use fusebox_proto::v1::{
    AcquireRequest, AcquireResponse, Bind, Closed, Heartbeat, Hello, Refusal, SessionRequest,
    SessionResponse, Welcome, session_request::Request, session_response::Response,
};
use prost::bytes::Bytes;
use tokio::{
    task::JoinSet,
    time::{Interval, MissedTickBehavior},
};
use tonic::{Code, Status, Streaming, codegen::tokio_stream::Stream};

use self::{bindings::Bindings, names::Names};
use super::{
    Messages, Service, Told, answered, at_once, calls, delivery::Delivery, on_its_way, parse,
    received::Parcels, report_told, respond, status, watch_told,
};
use crate::{
    app::{App, Caller, Granted, sessions::BindError},
    lifecycle::Phase,
    limits,
    reservation::Reservation,
    storage::Answer,
};

/// What a session is told, each message made when there is room for it.
pub struct Session {
    service: Service,
    app: Arc<App>,
    requests: Streaming<SessionRequest>,
    parcels: Parcels,
    stage: Stage,
    /// Who calls, once it has said so.
    names: Names,
    /// Numbers of requests that wait for their answer, and of what is told without being asked.
    in_use: HashSet<u64>,
    waiting: JoinSet<Done>,
    watch: Option<(u64, Messages)>,
    bindings: Bindings,
    /// Probes that no table of grants knows, the latest: they are given back when the client ends.
    probes: VecDeque<Granted>,
    silence: Interval,
    /// How often it was silent before it said who it is.
    silences: u32,
    looks: Interval,
    counted: Option<Reservation>,
}

/// Where a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nobody has said who calls.
    Expected,
    /// Requests are read and answered.
    Begun,
    /// The client sends nothing more, and is answered what it asked.
    Deaf,
    /// The client ends.
    Closing,
    /// Nothing more is told.
    Over,
}

/// A request that waited, its number, and what was taken for its bytes.
type Done = (u64, Told<Response>, Option<Reservation>);

/// How a session ends.
enum End {
    /// As it should.
    Well,
    /// With an error.
    With(Status),
}

/// What was made of a request: its answer, unless it has to wait.
type Taken = Option<Told<Response>>;

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::With(status)
    }
}

impl Session {
    pub(super) fn begin(
        service: Service,
        app: &Arc<App>,
        request: tonic::Request<Streaming<SessionRequest>>,
    ) -> Result<Self, Status> {
        let counted = app.begin_session().ok_or_else(|| {
            let most = limits::SESSIONS;
            Status::resource_exhausted(format!("{most} sessions, as many as this server serves"))
        })?;
        let (_, extensions, requests) = request.into_parts();
        let every = |time| {
            let mut interval = tokio::time::interval(time);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            // The first tick is one period from now.
            interval.reset();
            interval
        };
        Ok(Self {
            app: Arc::clone(app),
            service,
            requests,
            parcels: extensions.get::<Parcels>().cloned().unwrap_or_default(),
            stage: Stage::Expected,
            names: Names::default(),
            in_use: HashSet::new(),
            waiting: JoinSet::new(),
            watch: None,
            bindings: Bindings::default(),
            probes: VecDeque::new(),
            silence: every(limits::SESSION_HEARTBEAT),
            silences: 0,
            looks: every(limits::SESSION_LOOKS),
            counted: Some(counted),
        })
    }

    /// What is told next.
    fn poll_told(&mut self, cx: &mut Context<'_>) -> Poll<Result<SessionResponse, End>> {
        loop {
            // What is ready first: it is bounded by what was asked.
            if let Poll::Ready(told) = self.poll_waiting(cx) {
                return Poll::Ready(told);
            }
            if let Poll::Ready(told) = self.poll_news(cx) {
                return Poll::Ready(told);
            }
            match self.poll_request(cx)? {
                Poll::Ready(Some(told)) => return Poll::Ready(Ok(told)),
                // It was taken, and may have left something to poll.
                Poll::Ready(None) => {}
                Poll::Pending => break,
            }
        }
        ready!(self.silence.poll_tick(cx));
        Poll::Ready(self.silent())
    }

    /// The answer to a request that waited.
    fn poll_waiting(&mut self, cx: &mut Context<'_>) -> Poll<Result<SessionResponse, End>> {
        match self.waiting.poll_join_next(cx) {
            Poll::Ready(Some(Ok((id, told, bytes)))) => {
                drop(bytes);
                self.in_use.remove(&id);
                Poll::Ready(Ok(self.answer(id, told)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Err(Status::internal(format!(
                "a mistake in fusebox itself: {error}"
            ))
            .into())),
            Poll::Ready(None) if self.stage == Stage::Deaf => Poll::Ready(Err(End::Well)),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }

    /// What is told without being asked.
    fn poll_news(&mut self, cx: &mut Context<'_>) -> Poll<Result<SessionResponse, End>> {
        if let Some((id, messages)) = &mut self.watch
            && let Poll::Ready(Some(message)) = Pin::new(messages).poll_next(cx)
        {
            let (id, response) = (*id, message.map(Response::Watch));
            return Poll::Ready(
                response.map(|response| message_of(id, response)).map_err(End::With),
            );
        }
        if self.bindings.is_empty() {
            return Poll::Pending;
        }
        loop {
            if let Some((id, told)) = self.bindings.next(&self.app) {
                if told.is_err() {
                    self.in_use.remove(&id);
                }
                let told = told.map(|bound| (Response::Bound(bound), None));
                return Poll::Ready(Ok(self.answer(id, told)));
            }
            ready!(self.looks.poll_tick(cx));
            self.bindings.look(&self.app);
        }
    }

    /// The next request, and its answer if it has one at once.
    fn poll_request(&mut self, cx: &mut Context<'_>) -> Result<Poll<Option<SessionResponse>>, End> {
        let is_full = self.waiting.len() >= limits::SESSION_UNANSWERED;
        // Who ends is read on, since nothing may follow.
        if self.stage == Stage::Deaf || is_full {
            return Ok(Poll::Pending);
        }
        match Pin::new(&mut self.requests).poll_next(cx) {
            Poll::Pending => Ok(Poll::Pending),
            Poll::Ready(None) if self.stage == Stage::Closing => Ok(Poll::Pending),
            Poll::Ready(None) => {
                self.stage = Stage::Deaf;
                Ok(Poll::Ready(None))
            }
            Poll::Ready(Some(Err(status))) => Err(End::With(status::corrected(status))),
            Poll::Ready(Some(Ok(request))) => self.take(request).map(Poll::Ready),
        }
    }

    /// Takes a request, and answers it if that can be done at once.
    fn take(&mut self, request: SessionRequest) -> Result<Option<SessionResponse>, End> {
        let bytes = self.parcels.next();
        let SessionRequest { id, request } = request;
        let request = self.expected(id, request)?;
        let (_, caller) = self.service.arrive()?;
        if self.service.lifecycle.phase() == Phase::Draining {
            return Err(calls::draining_status().into());
        }
        let taken = match request {
            Request::Hello(hello) => return self.greet(id, hello, caller).map(Some),
            Request::Acquire(request) => self.acquire(id, caller, request, bytes),
            Request::AcquireBatch(mut batch) => {
                self.names.of_batch(&mut batch, &self.bindings).map(|()| {
                    let (service, app) = (self.service.clone(), Arc::clone(&self.app));
                    let told = async move {
                        let told = service.acquire_batch_told(&app, caller, &batch).await;
                        told.map(|(told, delivery)| (Response::AcquireBatch(told), delivery))
                    };
                    self.begin_waiting(id, bytes, told)
                })
            }
            Request::Report(mut report) => {
                self.names.of_report(&mut report, &self.bindings).map(|()| {
                    let app = Arc::clone(&self.app);
                    let told = async move {
                        let told = report_told(&app, caller, report).await;
                        told.map(|told| (Response::Report(told), None))
                    };
                    self.begin_waiting(id, bytes, told)
                })
            }
            Request::Watch(mut watch) => {
                let watching = self.names.of_watch(&mut watch);
                let watching = watching.and_then(|()| watch_told(&self.app, caller, &watch));
                watching.map(|messages| {
                    if let Some((former, _)) = self.watch.replace((id, messages)) {
                        self.in_use.remove(&former);
                    }
                    self.in_use.insert(id);
                    None
                })
            }
            Request::Bind(bind) => self.bind(id, bind).map(Some),
            Request::Close(_) => Ok(self.close(id, caller)),
        };
        match taken.unwrap_or_else(|status| Some(Err(status))) {
            Some(told) => Ok(Some(self.answer(id, told))),
            None => Ok(None),
        }
    }

    /// What is asked, if it may be asked now under that number.
    fn expected(&self, id: u64, request: Option<Request>) -> Result<Request, End> {
        let wrong = |field: &str, message: &str| Err(status::wrong(field, message).into());
        let Some(request) = request else {
            return wrong("request", "required: exactly one of what this server knows");
        };
        let is_hello = matches!(request, Request::Hello(_));
        match self.stage {
            Stage::Expected if !is_hello => {
                wrong("hello", "required: a session begins with who calls")
            }
            Stage::Begun if is_hello => wrong("hello", "the second one; who calls is said once"),
            Stage::Closing => wrong("close", "something follows it; it is the last message"),
            _ if id == 0 => wrong("id", "0; a request has a number"),
            _ if self.in_use.contains(&id) => wrong(
                "id",
                &format!(
                    "{id} is that of a request without an answer, or of a Bind or Watch in force"
                ),
            ),
            _ => Ok(request),
        }
    }

    /// Says whom the session is with.
    fn greet(&mut self, id: u64, hello: Hello, caller: Caller) -> Result<SessionResponse, End> {
        let client = parse::hello(&hello).map_err(Status::from)?;
        let truth = self.app.greet(caller, &hello.namespace, client);
        let truth = truth.ok_or_else(|| status::not_found("namespace", &hello.namespace, None))?;
        self.names = Names::of(hello);
        self.stage = Stage::Begun;
        let welcome = Welcome {
            truth_id: truth.id,
            boot: truth.boot,
            heartbeat: Some(respond::duration(limits::SESSION_HEARTBEAT)),
        };
        Ok(message_of(id, Response::Welcome(welcome)))
    }

    /// Decides an Acquire, at once if nothing has to be waited for.
    fn acquire(
        &mut self,
        id: u64,
        caller: Caller,
        mut request: AcquireRequest,
        bytes: Option<Reservation>,
    ) -> Result<Taken, Status> {
        self.names.of_acquire(&mut request, &self.bindings)?;
        let wanted = parse::acquire(&request)?;
        if wanted.request.is_some() || wanted.max_wait.is_some() {
            let (service, app) = (self.service.clone(), Arc::clone(&self.app));
            let told = async move { acquired(service.acquire_told(&app, caller, &request).await) };
            return Ok(self.begin_waiting(id, bytes, told));
        }
        let answer = on_its_way(at_once(&self.app, caller, wanted)?, &self.app);
        Ok(match answer {
            Answer::Now(told) => Some(acquired(Ok(told))),
            later => self.begin_waiting(id, bytes, async { acquired(answered(later).await) }),
        })
    }

    /// Has a request wait for its answer, if it does not have it at once.
    fn begin_waiting(
        &mut self,
        id: u64,
        bytes: Option<Reservation>,
        told: impl Future<Output = Told<Response>> + Send + 'static,
    ) -> Taken {
        let mut told = Box::pin(told);
        let at_once = told.as_mut().poll(&mut Context::from_waker(std::task::Waker::noop()));
        if let Poll::Ready(told) = at_once {
            return Some(told);
        }
        self.in_use.insert(id);
        self.waiting.spawn(async move { (id, told.await, bytes) });
        None
    }

    /// Binds a number, or ends that.
    fn bind(&mut self, id: u64, bind: Bind) -> Result<Told<Response>, Status> {
        parse::bind(&bind)?;
        let Bind { handle, policy, key } = bind;
        if policy.is_empty() {
            if let Some(former) = self.bindings.unbind(handle) {
                self.in_use.remove(&former);
            }
            return Ok(Ok((Response::Bound(Default::default()), None)));
        }
        let (namespace, client) = (&self.names.namespace, &self.names.client_id);
        let (bound, terms) =
            self.app.bind(namespace, client, (policy, key)).map_err(|error| match error {
                BindError::UnknownPolicy(policy) => {
                    status::not_found("policy", &policy, Some("policy".to_owned()))
                }
                BindError::TooMany => Status::resource_exhausted(error.to_string()),
            })?;
        if let Some(former) = self.bindings.bind(handle, id, bound) {
            self.in_use.remove(&former);
        }
        self.in_use.insert(id);
        Ok(Ok((Response::Bound(respond::bound(handle, terms)), None)))
    }

    /// Ends all that the client holds. What is not answered yet is not answered any more.
    fn close(&mut self, id: u64, caller: Caller) -> Taken {
        self.release();
        self.stage = Stage::Closing;
        for probe in self.probes.drain(..) {
            self.app.take_back(&probe);
        }
        let names = &self.names;
        let ended = self.app.end_client(caller, &names.namespace, &names.client_id);
        let told = async move {
            for durable in ended.map_err(|error| status::storage(&error))? {
                let answer = Answer::Later((), durable).told().await;
                answer.map_err(|error| status::storage(&error))?;
            }
            Ok((Response::Closed(Closed {}), None))
        };
        self.begin_waiting(id, None, told)
    }

    /// An answer on its way: from here on it is the client's.
    fn answer(&mut self, id: u64, told: Told<Response>) -> SessionResponse {
        let response = match told {
            Ok((response, delivery)) => {
                if let Some(delivery) = delivery {
                    delivery.arrived();
                }
                response
            }
            Err(status) => Response::Refusal(refusal(&status)),
        };
        if let Response::Acquire(acquired) = &response {
            self.remember_probe(acquired);
        }
        message_of(id, response)
    }

    /// Remembers a probe that is not in the table of grants.
    fn remember_probe(&mut self, acquired: &AcquireResponse) {
        if !acquired.verdicts.iter().any(|verdict| verdict.probe) {
            return;
        }
        if let Ok(probe @ Granted::Passed(_)) = acquired.grant_id.parse() {
            if self.probes.len() == limits::SESSION_PROBES {
                self.probes.pop_front();
            }
            self.probes.push_back(probe);
        }
    }

    /// What is told when nothing else was for a while.
    fn silent(&mut self) -> Result<SessionResponse, End> {
        let (_, caller) = self.service.arrive()?;
        if self.stage == Stage::Expected {
            self.silences += 1;
            let waited = limits::SESSION_HEARTBEAT * self.silences;
            if waited >= limits::SESSION_HELLO {
                return Err(Status::deadline_exceeded(
                    "no Hello came, which a session begins with",
                )
                .into());
            }
        } else {
            self.names.seen(&self.app, caller);
        }
        Ok(message_of(0, Response::Heartbeat(Heartbeat {})))
    }

    /// Lets go of all that it holds of the server.
    fn release(&mut self) {
        self.waiting = JoinSet::new();
        self.in_use.clear();
        self.watch = None;
        self.bindings = Bindings::default();
    }

    fn end(&mut self) {
        self.release();
        self.stage = Stage::Over;
        self.counted = None;
    }
}

impl Stream for Session {
    type Item = Result<SessionResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.stage == Stage::Over {
            return Poll::Ready(None);
        }
        Poll::Ready(match ready!(this.poll_told(cx)) {
            Ok(message) => {
                this.silence.reset();
                if matches!(message.response, Some(Response::Closed(_))) {
                    this.end();
                }
                Some(Ok(message))
            }
            Err(end) => {
                this.end();
                match end {
                    End::Well => None,
                    End::With(status) => Some(Err(status)),
                }
            }
        })
    }
}

fn acquired(told: Told<AcquireResponse>) -> Told<Response> {
    told.map(|(told, delivery): (_, Option<Delivery>)| (Response::Acquire(told), delivery))
}

fn message_of(id: u64, response: Response) -> SessionResponse {
    SessionResponse { id, response: Some(response) }
}

/// An error as the call would have ended with it.
fn refusal(status: &Status) -> Refusal {
    Refusal {
        code: match status.code() {
            // A request alone cannot succeed with an error.
            Code::Ok => Code::Unknown.into(),
            code => code.into(),
        },
        message: status.message().to_owned(),
        details: Bytes::copy_from_slice(status.details()).into(),
    }
}
