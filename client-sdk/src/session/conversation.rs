//! One session, from its Welcome until it breaks: what is said, and who hears the answers.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::{Pin, pin},
    sync::{Arc, Weak},
    time::Duration,
};

use fusebox_core::Time;
use fusebox_proto::v1::{
    self, AcquireBatchRequest, AcquireRequest, AcquireResponse, ReportRequest, SessionRequest,
    SessionResponse, WatchRequest, session_request::Request, session_response::Response,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Sleep,
};
use tonic::Code;

use super::{
    Ask, Queued,
    bindings::SPARE,
    dialer::{Broken, Connection, HELLO},
    link::{Command, Link, News, What},
    liveness::{Due, Liveness},
    spare::Spare,
    until,
};
use crate::{
    binding::Binding,
    clock,
    exchange::{Answer, Answers, Question, Unanswered, duration},
    settings::Settings,
    telemetry::Event,
};

/// Questions under way, at most: the server lets 1,024 requests wait, and some of them are no questions.
const UNDER_WAY_MOST: usize = 1_000;

/// How long after a refusal a policy is asked for again: it may be made any time.
const BIND_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// One session.
pub(super) struct Conversation<'a> {
    link: &'a mut Link,
    /// Number of the session, as the steward counts.
    session: u64,
    /// Number of the last request.
    last_id: u64,
    urgent: VecDeque<Urgent>,
    to_bind: VecDeque<Arc<Binding>>,
    /// Taken out of the queue, and not sent yet.
    drawn: Option<Queued>,
    asked: BTreeMap<u64, Waiting>,
    /// By number of the binding.
    bound: BTreeMap<u32, Bound>,
    /// Number of the binding, by number of the request.
    binds: BTreeMap<u64, u32>,
    spare: Spare,
    bind_again: Option<Time>,
    report: Option<(u64, Time)>,
    watch: Option<Watch>,
    probe: Option<u64>,
    close: Option<u64>,
    liveness: Liveness,
}

/// What goes before all questions.
enum Urgent {
    Report(ReportRequest),
    Watch(u64, WatchRequest),
    Unbind(u32),
    Probe,
    Close,
}

/// Whoever waits for the answers to one message.
struct Waiting {
    answer: oneshot::Sender<Result<Answers, Unanswered>>,
    sent: Time,
    questions: usize,
}

struct Bound {
    binding: Weak<Binding>,
    id: u64,
    state: State,
}

#[derive(PartialEq, Eq)]
enum State {
    Asked,
    /// The server knows the number.
    Told,
    Refused,
}

struct Watch {
    id: u64,
    asking: u64,
    sent: Time,
}

impl<'a> Conversation<'a> {
    pub(super) fn new(link: &'a mut Link, session: u64, welcome: &v1::Welcome) -> Self {
        let liveness = Liveness::new(duration(welcome.heartbeat), link.shared.clock.now());
        Self {
            link,
            session,
            last_id: HELLO,
            urgent: VecDeque::new(),
            to_bind: VecDeque::new(),
            drawn: None,
            asked: BTreeMap::new(),
            bound: BTreeMap::new(),
            binds: BTreeMap::new(),
            spare: Spare::default(),
            bind_again: None,
            report: None,
            watch: None,
            probe: None,
            close: None,
            liveness,
        }
    }

    /// Goes on until the session breaks. Those who wait for an answer then learn that there is none.
    pub(super) async fn run(mut self, connection: Connection) -> Broken {
        let Connection { to_server, mut from_server, end, welcome: _ } = connection;
        self.bind_all();
        let mut timer = pin!(tokio::time::sleep(Duration::ZERO));
        let broken = loop {
            let full = self.pump(&to_server);
            self.set(timer.as_mut(), full);
            let step = tokio::select! {
                biased;
                message = from_server.message() => match message {
                    Ok(Some(response)) => {
                        self.hear(response).await;
                        Ok(())
                    }
                    Ok(None) => Err(Broken::by("the server ended the session")),
                    Err(status) => Err(status.into()),
                },
                Some(command) = self.link.commands.recv() => {
                    self.obey(command);
                    Ok(())
                }
                _ = to_server.reserve(), if full => Ok(()),
                queued = self.link.queue.recv(), if !full && self.may_ask() => {
                    self.drawn = queued;
                    Ok(())
                }
                () = &mut timer => self.look_at_the_clock(),
            };
            if let Err(broken) = step {
                break broken;
            }
        };
        // The connection goes first: whoever asks again must find it gone.
        drop((to_server, from_server, end));
        self.link.shared.set_up(self.link.index, false);
        broken
    }

    fn now(&self) -> Time {
        self.link.shared.clock.now()
    }

    /// Whether there is room for one more question.
    fn may_ask(&self) -> bool {
        self.drawn.is_none() && self.asked.len() < UNDER_WAY_MOST
    }

    /// Says all that there is to say, and room for. Tells whether room is what is missing.
    fn pump(&mut self, to_server: &mpsc::Sender<SessionRequest>) -> bool {
        loop {
            let Ok(room) = to_server.try_reserve() else { return true };
            // What is asked counts from here, before anything carries it.
            let now = self.now();
            let Some(request) = self.next_request(now) else { return false };
            room.send(request);
        }
    }

    fn next_request(&mut self, now: Time) -> Option<SessionRequest> {
        let request = self.urgent_request(now).or_else(|| self.bind_request(now));
        let (request, id) = match request {
            Some(request) => (request, self.last_id),
            None => (self.question(now)?, self.last_id),
        };
        Some(SessionRequest { id, request: Some(request) })
    }

    fn id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn urgent_request(&mut self, now: Time) -> Option<Request> {
        let urgent = self.urgent.pop_front()?;
        let id = self.id();
        if !matches!(urgent, Urgent::Probe) {
            self.counts_one();
        }
        Some(match urgent {
            Urgent::Report(report) => {
                self.report = Some((id, now));
                Request::Report(report)
            }
            Urgent::Watch(asking, watch) => {
                self.watch = Some(Watch { id, asking, sent: now });
                Request::Watch(watch)
            }
            Urgent::Unbind(handle) => Request::Bind(v1::Bind { handle, ..Default::default() }),
            Urgent::Probe => {
                self.probe = Some(id);
                Request::Bind(v1::Bind { handle: SPARE, ..Default::default() })
            }
            Urgent::Close => {
                self.close = Some(id);
                Request::Close(v1::Close {})
            }
        })
    }

    fn counts_one(&self) {
        self.link.shared.count(|telemetry| &telemetry.messages_sent);
    }

    fn bind_request(&mut self, now: Time) -> Option<Request> {
        while let Some(binding) = self.to_bind.pop_front() {
            if !self.is_bound(&binding) {
                return Some(self.bind(&binding));
            }
        }
        let binding = self.spare.next(now)?;
        let id = self.id();
        self.spare.is_bound(id, &binding);
        self.counts_one();
        Some(bind(SPARE, &binding))
    }

    fn is_bound(&self, binding: &Arc<Binding>) -> bool {
        let bound = self.bound.get(&binding.handle);
        bound.is_some_and(|bound| is_of(bound, binding) && bound.state != State::Refused)
    }

    fn bind(&mut self, binding: &Arc<Binding>) -> Request {
        let id = self.id();
        let bound = Bound { binding: Arc::downgrade(binding), id, state: State::Asked };
        if let Some(former) = self.bound.insert(binding.handle, bound) {
            self.binds.remove(&former.id);
        }
        self.binds.insert(id, binding.handle);
        self.counts_one();
        bind(binding.handle, binding)
    }

    fn question(&mut self, now: Time) -> Option<Request> {
        loop {
            let queued = match self.drawn.take() {
                Some(queued) => queued,
                None if self.asked.len() < UNDER_WAY_MOST => self.link.queue.try_recv().ok()?,
                None => return None,
            };
            match queued {
                Queued::Bind(binding) if binding.handle == 0 => {
                    self.spare.add(&binding);
                    if let Some(request) = self.bind_request(now) {
                        return Some(request);
                    }
                }
                Queued::Bind(binding) if self.is_bound(&binding) => {}
                Queued::Bind(binding) => return Some(self.bind(&binding)),
                // Nobody waits for the answer any more.
                Queued::Ask(ask) if ask.answer.is_closed() => {}
                Queued::Ask(ask) => return Some(self.ask(ask, now)),
            }
        }
    }

    fn ask(&mut self, Ask { questions, answer }: Ask, now: Time) -> Request {
        let id = self.id();
        let waiting = Waiting { answer, sent: now, questions: questions.len() };
        self.asked.insert(id, waiting);
        self.counts_one();
        let mut requests: Vec<_> =
            questions.into_iter().map(|question| self.request(question)).collect();
        match requests.len() {
            1 => Request::Acquire(requests.remove(0)),
            _ => {
                for request in &mut requests {
                    request.max_wait = None;
                }
                Request::AcquireBatch(AcquireBatchRequest { requests, ..Default::default() })
            }
        }
    }

    fn request(&self, question: Question) -> AcquireRequest {
        let Question { binding, cost, lease, estimated, .. } = question;
        let mut ask = v1::Ask { cost: Some(cost), lease, estimated, ..Default::default() };
        let bound = self.bound.get(&binding.handle);
        if bound.is_some_and(|bound| is_of(bound, &binding) && bound.state == State::Told) {
            ask.handle = binding.handle;
        } else {
            ask.policy = binding.policy.to_string();
            ask.key = binding.key.to_string();
        }
        AcquireRequest {
            asks: vec![ask],
            request_id: question.request_id,
            priority: question.priority.into(),
            max_wait: question.max_wait.map(|wait| wait.try_into().unwrap_or_default()),
            attempt: question.attempt,
            ..Default::default()
        }
    }

    /// Does what the steward wants.
    fn obey(&mut self, Command { session, what }: Command) {
        if session != self.session {
            return;
        }
        match what {
            What::Report(report) => self.urgent.push_back(Urgent::Report(report)),
            What::Watch(asking, watch) => self.urgent.push_back(Urgent::Watch(asking, watch)),
            What::Bind => self.bind_all(),
            What::Close => self.urgent.push_back(Urgent::Close),
        }
    }

    /// Binds what is this connection's, and unbinds what is nobody's any more.
    fn bind_all(&mut self) {
        let shared = Arc::clone(&self.link.shared);
        let index = self.link.index;
        let bindings = shared.bindings.lock();
        let ours = |binding: &&Arc<Binding>| shared.route(binding) == Some(index);
        let (numbered, others): (Vec<_>, Vec<_>) =
            bindings.all().filter(ours).cloned().partition(|binding| binding.handle != 0);
        drop(bindings);
        self.to_bind.extend(numbered.into_iter().filter(|binding| {
            self.bound.get(&binding.handle).is_none_or(|bound| !is_of(bound, binding))
        }));
        self.spare.set(others.into_iter());
        let nobodys = |(_, bound): &(&u32, &Bound)| bound.binding.strong_count() == 0;
        let nobodys: Vec<_> =
            self.bound.iter().filter(nobodys).map(|(handle, _)| *handle).collect();
        for handle in nobodys {
            if let Some(bound) = self.bound.remove(&handle) {
                self.binds.remove(&bound.id);
            }
            self.urgent.push_back(Urgent::Unbind(handle));
        }
    }

    /// Sets the timer to what is due first.
    fn set(&self, mut timer: Pin<&mut Sleep>, full: bool) {
        let now = self.now();
        let alive = match self.liveness.due(now) {
            Due::At(at) => at,
            Due::Probe | Due::Dead(_) => now,
        };
        let spare = self.spare.next_at().filter(|_| !full);
        let at = [self.bind_again, spare].into_iter().flatten().fold(alive, Time::min);
        let deadline = clock::deadline(until(now, at));
        // A timer that fires early is set again then; setting it each time would cost more.
        if timer.is_elapsed() || deadline < timer.deadline() {
            timer.as_mut().reset(deadline);
        }
    }

    fn look_at_the_clock(&mut self) -> Result<(), Broken> {
        let now = self.now();
        match self.liveness.due(now) {
            Due::Dead(cause) => return Err(Broken::by(cause)),
            Due::Probe => {
                self.liveness.probed(now);
                self.urgent.push_back(Urgent::Probe);
            }
            Due::At(_) => {}
        }
        if self.bind_again.is_some_and(|at| now >= at) {
            self.bind_again = None;
            let refused = self.bound.values().filter(|bound| bound.state == State::Refused);
            self.to_bind.extend(refused.filter_map(|bound| bound.binding.upgrade()));
        }
        Ok(())
    }

    /// Takes in what the server says.
    async fn hear(&mut self, SessionResponse { id, response }: SessionResponse) {
        let now = self.now();
        self.liveness.heard(now);
        match response {
            Some(Response::Acquire(response)) => {
                self.liveness.answered(now);
                self.answer(id, vec![response]);
            }
            Some(Response::AcquireBatch(response)) => {
                self.liveness.answered(now);
                self.answer(id, response.responses);
            }
            Some(Response::Bound(bound)) => self.is_told(id, bound, now),
            Some(Response::Report(response)) => {
                self.liveness.answered(now);
                if let Some((_, sent)) = self.report.take_if(|(report, _)| *report == id) {
                    self.link.say(News::Reported(response, sent)).await;
                }
            }
            Some(Response::Watch(news)) => {
                if let Some(watch) = self.watch.as_ref().filter(|watch| watch.id == id) {
                    self.link.say(News::Watched(watch.asking, news, watch.sent)).await;
                }
            }
            Some(Response::Refusal(refusal)) => {
                self.liveness.answered(now);
                self.is_refused(id, refusal, now).await;
            }
            Some(Response::Closed(_)) if self.close.is_some() => {
                self.link.say(News::Closed).await;
                // That the stream ends now is no failure, and the task ends with the client.
                std::future::pending::<()>().await;
            }
            // The latter is of a later version of the server.
            Some(Response::Welcome(_) | Response::Closed(_) | Response::Heartbeat(_)) | None => {}
        }
    }

    fn answer(&mut self, id: u64, responses: Vec<AcquireResponse>) {
        let Some(Waiting { answer, sent, questions }) = self.asked.remove(&id) else { return };
        let answers: Vec<_> = responses.into_iter().filter_map(parse).collect();
        // Whoever does not wait any more does not want to know.
        let _ = answer.send(if answers.len() == questions {
            Ok(Answers { sent, answers })
        } else {
            Err(Unanswered::Refused {
                code: Code::Internal,
                message: format!("{} answers to {questions} questions", answers.len()).into(),
            })
        });
    }

    fn is_told(&mut self, id: u64, told: v1::Bound, now: Time) {
        if self.probe.take_if(|probe| *probe == id).is_some() {
            self.liveness.answered(now);
        } else if let Some(binding) = self.spare.answered(id) {
            self.liveness.answered(now);
            if let Some(binding) = binding {
                self.take(&binding, told);
            }
        } else if let Some(bound) =
            self.binds.get(&id).and_then(|handle| self.bound.get_mut(handle))
        {
            if bound.state == State::Asked {
                self.liveness.answered(now);
            }
            bound.state = State::Told;
            if let Some(binding) = bound.binding.upgrade() {
                self.take(&binding, told);
            }
        }
    }

    /// Writes down what the server told of a binding.
    fn take(&self, binding: &Binding, told: v1::Bound) {
        match told.policy.map(Settings::try_from) {
            Some(Ok(settings)) => {
                binding.is_accepted();
                binding.is_told(Some(Arc::new(settings)), told.clients);
            }
            Some(Err(error)) => {
                binding.is_told(None, told.clients);
                self.refuse(binding, Code::Unimplemented, &error.to_string());
            }
            None => binding.is_told(None, told.clients),
        }
    }

    fn refuse(&self, binding: &Binding, code: Code, message: &str) {
        if binding.is_refused() {
            let (policy, key) = (&*binding.policy, &*binding.key);
            self.link.shared.tell(&Event::Refused { policy, key, code, message });
        }
    }

    async fn is_refused(&mut self, id: u64, refusal: v1::Refusal, now: Time) {
        let code = Code::from_i32(refusal.code);
        let message = refusal.message;
        if let Some(waiting) = self.asked.remove(&id) {
            let _ = waiting.answer.send(Err(unanswered(code, &message)));
        } else if self.report.take_if(|(report, _)| *report == id).is_some() {
            self.link.say(News::ReportRefused(code, message)).await;
        } else if let Some(watch) = self.watch.take_if(|watch| watch.id == id) {
            self.link.say(News::WatchRefused(watch.asking, code, message)).await;
        } else if let Some(handle) = self.binds.remove(&id) {
            let Some(bound) = self.bound.get_mut(&handle) else { return };
            bound.state = State::Refused;
            self.bind_again.get_or_insert(now.after(BIND_AGAIN_AFTER));
            if let Some(binding) = bound.binding.upgrade() {
                self.is_unknown(&binding, code, &message);
            }
        } else if let Some(Some(binding)) = self.spare.refused(id, now) {
            self.is_unknown(&binding, code, &message);
        }
        self.probe.take_if(|probe| *probe == id);
    }

    fn is_unknown(&self, binding: &Binding, code: Code, message: &str) {
        // What is known stays known if the server is only too busy.
        if code == Code::NotFound {
            binding.is_told(None, 1);
        }
        self.refuse(binding, code, message);
    }
}

fn is_of(bound: &Bound, binding: &Arc<Binding>) -> bool {
    std::ptr::eq(bound.binding.as_ptr(), Arc::as_ptr(binding))
}

fn bind(handle: u32, binding: &Binding) -> Request {
    let (policy, key) = (binding.policy.to_string(), binding.key.to_string());
    Request::Bind(v1::Bind { handle, policy, key })
}

/// An answer, unless it is none.
fn parse(response: AcquireResponse) -> Option<Answer> {
    let allowed = match response.decision() {
        v1::Decision::Allow => true,
        v1::Decision::Deny => false,
        v1::Decision::Unspecified => return None,
    };
    let verdict = response.verdicts.into_iter().next()?;
    let waited = duration(response.waited).unwrap_or_default();
    Some(Answer { allowed, grant_id: response.grant_id, waited, verdict })
}

/// What a refusal means: of some codes nobody knows whether the server did something.
fn unanswered(code: Code, message: &str) -> Unanswered {
    match code {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => Unanswered::Unreachable,
        _ => Unanswered::Refused { code, message: message.into() },
    }
}
