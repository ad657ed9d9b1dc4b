//! A server of a few lines, for the tests of the parts: limits decided by the core, leases by the server's rule.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fusebox_core::{
    Admission, Ask, Cell, Charging, Decision, Limit, Moment, Policy, Purpose, Reason, Rule,
    Settlement, Time, apply, saturating_nanos, settle,
};
use fusebox_proto::v1;
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::Notify, time};

use crate::{
    Clock,
    binding::Binding,
    context::{Context, Random},
    exchange::{Answer, Answers, Asked, Exchange, Question, Unanswered},
    part::{Draft, Link, Part},
    settings::{Fallback, Kind, OnUnreachable, Settings},
    telemetry::{Event, Telemetry},
};

/// How long an estimate lives.
const ESTIMATE_LIFE: Duration = Duration::from_secs(600);

/// The runtime's paused time, as a clock.
fn clock() -> Clock {
    let now = time::Instant::now;
    let start = now();
    Clock::given(move || now() - start)
}

/// One policy, all keys of it, and who has what of them.
pub(crate) struct Server {
    clock: Clock,
    pub(crate) settings: Settings,
    policy: Policy,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    cells: HashMap<String, Cell>,
    lessees: HashMap<String, BTreeMap<usize, Time>>,
    grants: BTreeMap<String, Grant>,
    /// Answers by the id of their request, and what else was asked under it.
    answered: HashMap<String, (Option<Duration>, Answer)>,
    numbers: u64,
    /// Tokens that were charged, less what came back.
    charged: u64,
}

#[derive(Clone)]
struct Grant {
    key: String,
    tokens: u64,
    expires: Time,
    holds: Holds,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Holds {
    Lease,
    Estimate,
    Permit,
}

impl Server {
    pub(crate) fn of(limit: Limit, on_unreachable: OnUnreachable) -> Arc<Self> {
        let kind = match limit {
            Limit::Concurrency(permits) => Kind::Concurrency(permits),
            limit => Kind::Rate(vec![limit]),
        };
        let lease_time = Duration::from_secs(1);
        let settings = Settings { kind, on_unreachable, lease_time, shadow: false };
        let policy = Policy::new(limit, 0);
        Arc::new(Self { clock: clock(), settings, policy, state: Mutex::default() })
    }

    fn now(&self) -> Moment {
        Moment::from_nanos(self.clock.now().as_nanos())
    }

    pub(crate) fn now_there(&self) -> Time {
        self.clock.now()
    }

    /// Tokens that were charged so far, less what came back.
    pub(crate) fn charged(&self) -> u64 {
        self.state.lock().charged
    }

    /// Grants that are neither settled nor expired.
    pub(crate) fn grants(&self) -> usize {
        let now = self.now().time;
        self.state.lock().grants.values().filter(|grant| grant.expires > now).count()
    }

    fn decide(&self, client: usize, question: &Question) -> Answer {
        let mut state = self.state.lock();
        let state = &mut *state;
        let now = self.now();
        self.expire(state, now);
        if let Some(answer) = state.answered.get(&question.request_id) {
            return answer.1.clone();
        }
        let key = question.binding.key.to_string();
        let purpose = if question.estimated { Purpose::Estimate } else { Purpose::Spend };
        let decision = self.charge(state, &key, Ask::spend(question.cost).to(purpose), now);
        let mut leased = 0;
        if question.lease > 0 && decision.allowed {
            let clients = lessees(state, &key, client, self.settings.lease_time, now.time);
            if is_leasable(&self.policy.limit, self.settings.lease_time, clients) {
                let lease = Ask::spend(question.lease).to(Purpose::Lease { clients });
                leased = self.charge(state, &key, lease, now).verdicts[0].granted;
            }
        }
        let held = match &self.policy.limit {
            Limit::Concurrency(permits) => {
                (question.cost > 0).then_some((Holds::Permit, question.cost, permits.ttl()))
            }
            _ if question.estimated => Some((Holds::Estimate, question.cost, ESTIMATE_LIFE)),
            _ if leased > 0 => Some((Holds::Lease, leased, self.settings.lease_time)),
            _ => None,
        };
        let held = held.filter(|_| decision.allowed);
        let grant_id = held.map_or(String::new(), |(holds, tokens, life)| {
            state.numbers += 1;
            let id = format!("grant {}", state.numbers);
            let expires = now.time.after(life);
            state.grants.insert(id.clone(), Grant { key: key.clone(), tokens, expires, holds });
            id
        });
        let (reason, retry_after) = match decision.verdicts[0].admission {
            Admission::Allow => (v1::Reason::Unspecified, None),
            Admission::Deny { reason, retry_after } => (wire(reason), retry_after),
        };
        let verdict = v1::Verdict {
            reason: reason.into(),
            retry_after: retry_after.map(|wait| wait.try_into().unwrap()),
            leased,
            expires_in: held.map(|(_, _, life)| life.try_into().unwrap()),
            ..v1::Verdict::default()
        };
        let answer =
            Answer { allowed: decision.allowed, grant_id, waited: Duration::ZERO, verdict };
        if !question.request_id.is_empty() && answer.allowed {
            let remembered = (question.max_wait, answer.clone());
            state.answered.insert(question.request_id.clone(), remembered);
        }
        answer
    }

    /// Whether another question was asked under its id.
    fn differs(&self, question: &Question) -> bool {
        let state = self.state.lock();
        let answered = state.answered.get(&question.request_id);
        answered.is_some_and(|(max_wait, _)| *max_wait != question.max_wait)
    }

    fn charge(&self, state: &mut State, key: &str, ask: Ask, now: Moment) -> Decision {
        let rule = Rule {
            cell: 0,
            policy: &self.policy,
            ask,
            shadow: false,
            quota: false,
            overflow: false,
            held: false,
        };
        let mut cells = [state.cells.get(key).copied()];
        let decision = apply(&[rule], Charging::AllOrNothing, &mut cells, now);
        if let Some(cell) = cells[0] {
            state.cells.insert(key.to_owned(), cell);
        }
        if decision.allowed {
            state.charged += decision.verdicts[0].granted;
        }
        decision
    }

    /// Ends grants whose time is over: permits are free, the rest stands as charged.
    fn expire(&self, state: &mut State, now: Moment) {
        let over = |grant: &Grant| grant.expires <= now.time;
        let ids = state.grants.iter().filter(|(_, grant)| over(grant)).map(|(id, _)| id.clone());
        for id in ids.collect::<Vec<_>>() {
            self.end(
                state,
                &id,
                now,
                |grant| {
                    if grant.holds == Holds::Permit { 0 } else { grant.tokens }
                },
            );
        }
    }

    fn end(
        &self,
        state: &mut State,
        id: &str,
        now: Moment,
        actual: impl FnOnce(&Grant) -> u64,
    ) -> bool {
        let Some(grant) = state.grants.remove(id) else { return false };
        let mut cell = state.cells.get(&grant.key).copied();
        let settlement = Settlement {
            charged: grant.tokens,
            told: 0,
            actual: actual(&grant),
            partial: false,
            slice: Some(0),
            window: None,
            max_debt: 0,
        };
        let settled = settle(&self.policy, &mut cell, settlement, now);
        state.charged = state.charged + settled.owed - settled.refunded;
        if let Some(cell) = cell {
            state.cells.insert(grant.key, cell);
        }
        true
    }

    fn report(&self, draft: &Draft) -> v1::ReportResponse {
        let mut state = self.state.lock();
        let state = &mut *state;
        let now = self.now();
        self.expire(state, now);
        let results = draft.outcomes.iter().map(|outcome| {
            let known = self.end(state, &outcome.grant_id, now, |grant| match grant.holds {
                Holds::Lease => grant.tokens.saturating_sub(outcome.lease_returned),
                Holds::Estimate => outcome.actual_cost.unwrap_or(grant.tokens),
                Holds::Permit => 0,
            });
            let result =
                if known { v1::ReportResult::Applied } else { v1::ReportResult::UnknownGrant };
            result.into()
        });
        let results = results.collect();
        let renewals = draft.renew_grant_ids.iter().map(|id| {
            let life = match (&self.policy.limit, state.grants.get_mut(id)) {
                (Limit::Concurrency(permits), Some(grant)) => {
                    grant.expires = now.time.after(permits.ttl());
                    permits.ttl()
                }
                _ => Duration::ZERO,
            };
            v1::Renewal { grant_id: id.clone(), expires_in: Some(life.try_into().unwrap()) }
        });
        let renewals = renewals.collect();
        v1::ReportResponse { results, renewals, ..v1::ReportResponse::default() }
    }

    /// All that was granted is known no more.
    pub(crate) fn forget_grants(&self) {
        self.state.lock().grants.clear();
    }
}

fn lessees(state: &mut State, key: &str, client: usize, lease_time: Duration, now: Time) -> u32 {
    let lessees = state.lessees.entry(key.to_owned()).or_default();
    lessees.insert(client, now.after(2 * lease_time));
    lessees.retain(|_, until| *until > now);
    u32::try_from(lessees.len()).unwrap()
}

fn is_leasable(limit: &Limit, lease_time: Duration, clients: u32) -> bool {
    let Limit::TokenBucket(bucket) = limit else { return false };
    let flows = u128::from(bucket.limit()) * lease_time.as_nanos();
    flows >= 2 * u128::from(clients) * bucket.per().as_nanos()
}

fn wire(reason: Reason) -> v1::Reason {
    match reason {
        Reason::ConcurrencyLimited => v1::Reason::ConcurrencyLimited,
        Reason::Blocked => v1::Reason::Blocked,
        _ => v1::Reason::RateLimited,
    }
}

/// The way of one client to its server.
pub(crate) struct Lane {
    pub(crate) server: Arc<Server>,
    client: usize,
    /// One way, in milliseconds, from the first to the second.
    latency: (u64, u64),
    random: Random,
    pub(crate) up: AtomicBool,
    /// Nothing is answered, and nobody is told why.
    pub(crate) hangs: AtomicBool,
    /// What is asked is decided, and the answer lost with the session, so many times.
    pub(crate) loses: AtomicUsize,
    /// There is no such policy.
    pub(crate) is_unknown: AtomicBool,
    /// Refuses messages that ask for more than this.
    pub(crate) most: AtomicU64,
    /// Messages that asked, how many questions were in the last one, and how many are under way, at most.
    pub(crate) asked: AtomicUsize,
    pub(crate) questions: AtomicUsize,
    under_way: AtomicUsize,
    pub(crate) under_way_most: AtomicUsize,
    pub(crate) reports: AtomicUsize,
    hurried: Notify,
    bindings: Mutex<HashMap<String, Arc<Binding>>>,
    /// Whether policies are told when they are bound.
    pub(crate) tells: AtomicBool,
    pub(crate) clients: AtomicU64,
    me: std::sync::Weak<Self>,
}

impl Lane {
    pub(crate) fn to(server: &Arc<Server>, client: usize, latency: (u64, u64)) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            server: Arc::clone(server),
            client,
            latency,
            random: Random::of(u64::try_from(client).unwrap() + 1),
            up: AtomicBool::new(true),
            hangs: AtomicBool::new(false),
            loses: AtomicUsize::new(0),
            is_unknown: AtomicBool::new(false),
            most: AtomicU64::new(u64::MAX),
            asked: AtomicUsize::new(0),
            questions: AtomicUsize::new(0),
            under_way: AtomicUsize::new(0),
            under_way_most: AtomicUsize::new(0),
            reports: AtomicUsize::new(0),
            hurried: Notify::new(),
            bindings: Mutex::default(),
            tells: AtomicBool::new(true),
            clients: AtomicU64::new(1),
            me: me.clone(),
        })
    }

    /// What a part of this client is given.
    pub(crate) fn context(self: &Arc<Self>, events: &Events) -> Arc<Context> {
        let heard = Arc::clone(events);
        let observer = move |event: &Event<'_>| heard.lock().push(format!("{event:?}"));
        Arc::new(Context {
            clock: self.server.clock.clone(),
            runtime: Handle::current(),
            exchange: Arc::<Self>::clone(self),
            decide_within: Duration::from_millis(50),
            fallback: Fallback::Allow,
            telemetry: Telemetry { observer: Some(Arc::new(observer)), ..Telemetry::default() },
            random: Random::of(u64::try_from(self.client).unwrap()),
        })
    }

    /// Has a part tended and reported of, as a session does.
    pub(crate) fn carry<P: Part>(self: &Arc<Self>, part: &Arc<P>) {
        let (lane, part) = (Arc::clone(self), Arc::clone(part));
        part.linked(Link::Resumed, lane.server.clock.now());
        let (tending, tended) = (Arc::clone(self), Arc::clone(&part));
        tokio::spawn(async move {
            loop {
                time::sleep(Duration::from_millis(50)).await;
                tended.tend(tending.server.clock.now());
            }
        });
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    biased;
                    () = lane.hurried.notified() => {}
                    () = time::sleep(Duration::from_millis(50)) => {}
                }
                if lane.up.load(Ordering::Relaxed) {
                    lane.report(&*part).await;
                }
            }
        });
    }

    async fn report<P: Part>(&self, part: &P) {
        let (mut draft, sent) = (Draft::default(), self.server.clock.now());
        part.report(&mut draft, sent);
        if draft.is_empty() {
            return;
        }
        self.reports.fetch_add(1, Ordering::Relaxed);
        self.travel().await;
        let response = self.server.report(&draft);
        self.travel().await;
        part.reported(&response, sent);
    }

    async fn travel(&self) {
        let (least, most) = self.latency;
        let jitter = self.random.up_to(Duration::from_millis(most - least));
        time::sleep(Duration::from_millis(least) + jitter).await;
    }

    /// The link is down, or up again.
    pub(crate) fn set_up<P: Part>(&self, part: &P, up: bool) {
        self.up.store(up, Ordering::Relaxed);
        let link = if up { Link::Resumed } else { Link::Down };
        part.linked(link, self.server.clock.now());
    }

    pub(crate) fn now(&self) -> Time {
        self.server.clock.now()
    }
}

/// What an observer heard.
pub(crate) type Events = Arc<Mutex<Vec<String>>>;

impl Exchange for Lane {
    fn ask(&self, questions: Vec<Question>) -> Asked {
        let Some(lane) = self.me.upgrade() else {
            return Box::pin(std::future::ready(Err(Unanswered::Unreachable)));
        };
        Box::pin(async move {
            if !lane.is_up() {
                return Err(Unanswered::Unreachable);
            }
            let sent = lane.server.clock.now();
            lane.asked.fetch_add(1, Ordering::Relaxed);
            lane.questions.store(questions.len(), Ordering::Relaxed);
            let under_way = lane.under_way.fetch_add(1, Ordering::Relaxed) + 1;
            lane.under_way_most.fetch_max(under_way, Ordering::Relaxed);
            lane.travel().await;
            while lane.hangs.load(Ordering::Relaxed) {
                time::sleep(Duration::from_millis(1)).await;
            }
            let most = lane.most.load(Ordering::Relaxed);
            let answers = if lane.is_unknown.load(Ordering::Relaxed) {
                let message = "unknown policy".into();
                Err(Unanswered::Refused { code: tonic::Code::NotFound, message })
            } else if questions.iter().any(|question| question.cost > most) {
                let message = "never possible".into();
                Err(Unanswered::Refused { code: tonic::Code::InvalidArgument, message })
            } else if questions.iter().any(|question| lane.server.differs(question)) {
                let message = "other content under the same id".into();
                Err(Unanswered::Refused { code: tonic::Code::InvalidArgument, message })
            } else {
                let max_wait = questions[0].max_wait.unwrap_or_default();
                let entered = lane.now();
                let until = entered.after(max_wait);
                let mut answers: Vec<_>;
                loop {
                    let decide = |question| lane.server.decide(lane.client, question);
                    answers = questions.iter().map(decide).collect();
                    if answers[0].allowed || lane.now() >= until {
                        break;
                    }
                    time::sleep(Duration::from_millis(1)).await;
                }
                answers[0].waited = Duration::from_nanos(lane.now().nanos_since(entered));
                Ok(Answers { sent, answers })
            };
            lane.travel().await;
            lane.under_way.fetch_sub(1, Ordering::Relaxed);
            let lost = lane
                .loses
                .try_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            if lost.is_ok() || !lane.is_up() { Err(Unanswered::Unreachable) } else { answers }
        })
    }

    fn hurry(&self) {
        self.hurried.notify_one();
    }

    fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    fn bind(&self, policy: &str, key: &str) -> Arc<Binding> {
        let mut bindings = self.bindings.lock();
        let binding = bindings.entry(format!("{policy} {key}")).or_insert_with(|| {
            let binding = Binding::new(policy, key, 1);
            if self.tells.load(Ordering::Relaxed) {
                let clients = u32::try_from(self.clients.load(Ordering::Relaxed)).unwrap();
                binding.is_told(Some(Arc::new(self.server.settings.clone())), clients);
            }
            Arc::new(binding)
        });
        Arc::clone(binding)
    }
}

/// So many tokens a second, of which as many gather.
pub(crate) fn bucket(per_second: u64) -> Limit {
    let per = Duration::from_secs(1);
    Limit::TokenBucket(fusebox_core::TokenBucket::new(per_second, per, per_second).unwrap())
}

/// Has time pass, and all that happens in it happen.
pub(crate) async fn pass(millis: u64) {
    time::sleep(Duration::from_millis(millis)).await;
}

/// Milliseconds between two times.
pub(crate) fn millis_since(earlier: Time, later: Time) -> u64 {
    later.nanos_since(earlier) / saturating_nanos(Duration::from_millis(1))
}
