//! Retries against a server of a few lines.

use std::{
    future::pending,
    io,
    sync::atomic::{AtomicU32, Ordering},
};

use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::Notify};
use tonic::Code;

use super::*;
use crate::{
    Rejected,
    binding::Binding,
    breaker, bulkhead,
    exchange::{Answer, Answers, Asked, Exchange, Question, Unanswered},
    settings::{Fallback, Settings},
    telemetry::{Event, Telemetry},
};

/// What the server makes of retries.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Answering {
    Allow,
    Deny,
    /// No session is up.
    Down,
    /// Nothing, until it is told to answer.
    Late,
    /// No such policy.
    Refuse,
}

struct Server {
    answering: Mutex<Answering>,
    asked: Mutex<Vec<u32>>,
    bindings: Mutex<Vec<Arc<Binding>>>,
    settings: Mutex<Option<Arc<Settings>>>,
    answers: Arc<Notify>,
}

impl Exchange for Server {
    fn ask(&self, questions: Vec<Question>) -> Asked {
        let [question] = questions.as_slice() else { panic!("one retry at a time") };
        assert_eq!((question.cost, question.lease), (1, 0));
        self.asked.lock().push(question.attempt);
        let (answering, answers) = (*self.answering.lock(), Arc::clone(&self.answers));
        let answer = |allowed| {
            let verdict = v1::Verdict::default();
            let answer =
                Answer { allowed, grant_id: String::new(), waited: Duration::ZERO, verdict };
            Ok(Answers { sent: Time::ZERO, answers: vec![answer] })
        };
        Box::pin(async move {
            match answering {
                Answering::Allow => answer(true),
                Answering::Deny => answer(false),
                Answering::Down => Err(Unanswered::Unreachable),
                Answering::Late => {
                    answers.notified().await;
                    answer(true)
                }
                Answering::Refuse => {
                    let message = "unknown policy".into();
                    Err(Unanswered::Refused { code: Code::NotFound, message })
                }
            }
        })
    }

    fn hurry(&self) {}

    fn is_up(&self) -> bool {
        *self.answering.lock() != Answering::Down
    }

    fn bind(&self, policy: &str, key: &str) -> Arc<Binding> {
        let binding = Arc::new(Binding::new(policy, key, 0));
        binding.is_told(self.settings.lock().clone(), 2);
        self.bindings.lock().push(Arc::clone(&binding));
        binding
    }
}

struct Bench {
    server: Arc<Server>,
    retries: Arc<Retries>,
    events: Arc<Mutex<Vec<String>>>,
}

impl Bench {
    fn new(answering: Answering) -> Self {
        Self::falling_back(answering, Fallback::Allow)
    }

    fn falling_back(answering: Answering, fallback: Fallback) -> Self {
        let server = Arc::new(Server {
            answering: Mutex::new(answering),
            asked: Mutex::default(),
            bindings: Mutex::default(),
            settings: Mutex::new(Some(settings(v1::OnUnreachable::Allow))),
            answers: Arc::default(),
        });
        let events = Arc::<Mutex<Vec<String>>>::default();
        let heard = Arc::clone(&events);
        let observer = move |event: &Event<'_>| heard.lock().push(format!("{event:?}"));
        let retries = Arc::new(Retries::new(Arc::new(Context {
            clock: Clock::of_the_runtime(),
            runtime: Handle::current(),
            exchange: Arc::clone(&server) as Arc<_>,
            decide_within: Duration::from_millis(50),
            fallback,
            telemetry: Telemetry { observer: Some(Arc::new(observer)), ..Telemetry::default() },
            random: Random::of(7),
        })));
        Self { server, retries, events }
    }

    fn with(self, settings: Option<Arc<Settings>>) -> Self {
        *self.server.settings.lock() = settings;
        self
    }

    fn retry(&self) -> Retry {
        self.retries.of("budget")
    }

    /// What the next report says: key, requests and retries.
    fn told(&self) -> Vec<(String, u64, u64)> {
        let mut draft = Draft::default();
        self.retries.report(&mut draft, self.retries.context.clock.now());
        draft.deltas.into_iter().map(|delta| (delta.key, delta.requests, delta.retries)).collect()
    }
}

fn settings(on_unreachable: v1::OnUnreachable) -> Arc<Settings> {
    settings_of(
        v1::RetryBudget {
            ratio_basis_points: Some(1_000),
            min_per_second: Some(0),
            ttl: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
        },
        on_unreachable,
    )
}

fn settings_of(budget: v1::RetryBudget, on_unreachable: v1::OnUnreachable) -> Arc<Settings> {
    let kind = Some(v1::policy::Kind::RetryBudget(budget));
    let on_unreachable = on_unreachable.into();
    let policy = v1::Policy { kind, on_unreachable, ..Default::default() };
    Arc::new(policy.try_into().expect("settings"))
}

/// A call that fails each time, and counts how often.
async fn failing(retry: &Retry) -> u32 {
    let tries = AtomicU32::new(0);
    let result = retry
        .call(|attempt| {
            assert_eq!(tries.fetch_add(1, Ordering::Relaxed), attempt);
            async { Err::<(), _>(io::Error::other("down")) }
        })
        .await;
    assert_eq!(result.unwrap_err().to_string(), "down", "the last error, whatever ends it");
    tries.into_inner()
}

fn rejected() -> Rejected {
    Rejected::of_names("api", "")
}

#[tokio::test(start_paused = true)]
async fn each_retry_is_asked_for_and_first_calls_are_told() {
    let bench = Bench::new(Answering::Allow);
    let retry = bench.retry();
    assert_eq!(failing(&retry).await, 3);
    assert_eq!(*bench.server.asked.lock(), [1, 2]);
    assert_eq!(bench.told(), [(String::new(), 1, 0)]);
    assert_eq!(bench.told(), []);
    assert_eq!(retry.counts(), Counts { calls: 1, retries: 2, exhausted: 1, ..Counts::default() });
}

#[tokio::test(start_paused = true)]
async fn a_call_that_succeeds_asks_nothing() {
    let bench = Bench::new(Answering::Deny);
    let retry = bench.retry();
    for _ in 0..5 {
        retry.call(|_| async { Ok::<_, io::Error>(()) }).await.unwrap();
    }
    assert!(bench.server.asked.lock().is_empty());
    assert_eq!(bench.told(), [(String::new(), 5, 0)]);
}

#[tokio::test(start_paused = true)]
async fn a_spent_budget_leaves_the_last_error() {
    let bench = Bench::new(Answering::Deny);
    let retry = bench.retry();
    let clock = Clock::of_the_runtime();
    assert_eq!(failing(&retry).await, 1);
    assert_eq!(clock.now(), Time::ZERO, "who is denied is not kept");
    assert_eq!(retry.counts(), Counts { calls: 1, denied: 1, ..Counts::default() });
}

#[tokio::test(start_paused = true)]
async fn each_key_has_a_budget_of_its_own() {
    let bench = Bench::new(Answering::Allow);
    let (a, b) = (bench.retry().key("a"), bench.retry().key("b"));
    failing(&a).await;
    failing(&a.clone().key("b")).await;
    failing(&b).await;
    assert_eq!(bench.told(), [("a".into(), 1, 0), ("b".into(), 2, 0)]);
    let bound: Vec<_> =
        bench.server.bindings.lock().iter().map(|binding| binding.key.to_string()).collect();
    assert_eq!(bound, ["a", "b"], "a handle that only leads to others binds nothing");
}

#[tokio::test(start_paused = true)]
async fn without_the_server_a_budget_that_allows_lets_retries_through_and_tells_of_them() {
    let bench = Bench::new(Answering::Down);
    assert_eq!(failing(&bench.retry()).await, 3);
    assert_eq!(bench.told(), [(String::new(), 1, 2)]);
}

#[tokio::test(start_paused = true)]
async fn without_the_server_a_budget_that_denies_lets_none_through() {
    let bench = Bench::new(Answering::Down).with(Some(settings(v1::OnUnreachable::Deny)));
    assert_eq!(failing(&bench.retry()).await, 1);
    assert_eq!(bench.told(), [(String::new(), 1, 0)]);
}

#[tokio::test(start_paused = true)]
async fn without_the_server_a_local_budget_is_paid_by_the_calls_of_this_process() {
    let bench = Bench::new(Answering::Down).with(Some(settings(v1::OnUnreachable::Local)));
    let retry = bench.retry();
    for _ in 0..9 {
        retry.call(|_| async { Ok::<_, io::Error>(()) }).await.unwrap();
    }
    // The tenth pays for one retry, at 10%.
    assert_eq!(failing(&retry).await, 2);
    assert_eq!(failing(&retry).await, 1);
    assert_eq!(bench.told(), [(String::new(), 11, 1)]);
}

#[tokio::test(start_paused = true)]
async fn without_the_server_the_floor_is_divided_among_its_clients() {
    let budget = v1::RetryBudget {
        ratio_basis_points: Some(0),
        min_per_second: Some(1),
        ttl: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
    };
    let settings = settings_of(budget, v1::OnUnreachable::Local);
    let bench = Bench::new(Answering::Down).with(Some(settings));
    let retry = bench.retry();
    assert_eq!(failing(&retry).await, 1, "half a retry a second is none");
    bench.server.bindings.lock()[0].is_told(bench.server.settings.lock().clone(), 1);
    assert_eq!(failing(&retry).await, 3, "ten in ten seconds");
}

#[tokio::test(start_paused = true)]
async fn before_the_first_word_of_the_server_the_fallback_decides() {
    for (fallback, tries) in [(Fallback::Allow, 3), (Fallback::Deny, 1)] {
        let bench = Bench::falling_back(Answering::Down, fallback).with(None);
        assert_eq!(failing(&bench.retry()).await, tries, "{fallback:?}");
        assert_eq!(bench.told(), [], "not before it is known to be a budget");
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_delays_a_retry_by_no_more_than_it_may_and_counts_once() {
    let bench = Bench::new(Answering::Late);
    let retry = bench.retry().max_attempts(2);
    let mut attempts = retry.attempts();
    let clock = Clock::of_the_runtime();
    attempts.again(Again::After(Duration::from_secs(1))).await.unwrap();
    assert_eq!(clock.now(), Time::ZERO.after(Duration::from_millis(1_050)));

    bench.server.answers.notify_waiters();
    tokio::task::yield_now().await;
    assert_eq!(bench.told(), [(String::new(), 1, 0)], "the server withdrew it itself");
}

#[tokio::test(start_paused = true)]
async fn being_without_the_server_is_told_when_it_begins_and_when_it_ends() {
    let bench = Bench::new(Answering::Down);
    let retry = bench.retry();
    failing(&retry).await;
    *bench.server.answering.lock() = Answering::Allow;
    failing(&retry).await;
    let events = bench.events.lock();
    let [begins, ends] = events.as_slice() else { panic!("{events:?}") };
    assert!(begins.contains("Degraded") && begins.contains("begins: true"), "{begins}");
    assert!(ends.contains("Degraded") && ends.contains("begins: false"), "{ends}");
}

#[tokio::test(start_paused = true)]
async fn what_is_no_budget_lets_no_retry_through_and_is_told_once() {
    let bench = Bench::new(Answering::Refuse);
    let retry = bench.retry();
    assert_eq!(failing(&retry).await, 1);
    assert_eq!(failing(&retry).await, 1);
    assert_eq!(bench.events.lock().len(), 1);
    let mut attempts = retry.attempts();
    assert_eq!(attempts.again(Again::Yes).await, Err(GaveUp::Refused));
}

#[tokio::test(start_paused = true)]
async fn asking_takes_none_of_the_time_that_the_deadline_leaves_for_the_pause() {
    let bench = Bench::new(Answering::Late);
    let mut attempts = bench.retry().deadline(Duration::from_millis(100)).attempts();
    let clock = Clock::of_the_runtime();
    attempts.again(Again::After(Duration::from_millis(90))).await.unwrap();
    assert_eq!(clock.now(), Time::ZERO.after(Duration::from_millis(100)));
    assert_eq!(attempts.again(Again::Yes).await, Err(GaveUp::Deadline));
}

#[tokio::test(start_paused = true)]
async fn a_rejection_is_never_tried_again() {
    #[derive(Debug, thiserror::Error)]
    #[error("wrapped")]
    struct Wrapped(#[source] Rejected);

    let retry = Retry::local();
    let tries = AtomicU32::new(0);
    let count = || tries.fetch_add(1, Ordering::Relaxed);

    let wrapped = |_| {
        count();
        async { Err::<(), _>(Wrapped(rejected())) }
    };
    retry.call(wrapped).await.unwrap_err();
    assert_eq!(tries.swap(0, Ordering::Relaxed), 1);

    let by_breaker = |_| {
        count();
        async { Err::<(), breaker::CallError<io::Error>>(rejected().into()) }
    };
    retry.call(by_breaker).await.unwrap_err();
    assert_eq!(tries.swap(0, Ordering::Relaxed), 1);

    let by_bulkhead = |_| {
        count();
        async { Err::<(), bulkhead::CallError>(rejected().into()) }
    };
    retry.call(by_bulkhead).await.unwrap_err();
    assert_eq!(tries.swap(0, Ordering::Relaxed), 1);

    let boxed = |_| {
        count();
        async { Err::<(), BoxError>(Box::new(Wrapped(rejected()))) }
    };
    retry.call_with(|_| Again::Yes, boxed).await.unwrap_err();
    assert_eq!(tries.swap(0, Ordering::Relaxed), 1);

    let status = |_| {
        count();
        let mut status = tonic::Status::unavailable("rejected");
        status.set_source(Arc::new(rejected()));
        async { Err::<(), _>(status) }
    };
    retry.call_with(Again::on_error, status).await.unwrap_err();
    assert_eq!(tries.swap(0, Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_decider_may_try_a_success_again_and_leave_an_error() {
    let clock = Clock::of_the_runtime();
    let retry = Retry::local_with(clock.clone(), 1);
    let not_yet = |result: &Result<u32, ()>| match result {
        Ok(0) => Again::After(Duration::from_secs(3)),
        _ => Again::No,
    };
    assert_eq!(retry.call_with(not_yet, |attempt| async move { Ok(attempt) }).await, Ok(1));
    assert_eq!(clock.now(), Time::ZERO.after(Duration::from_secs(3)));
    assert_eq!(retry.call_with(not_yet, |_| async { Err(()) }).await, Err(()));
    assert_eq!(retry.counts(), Counts { calls: 2, retries: 1, ..Counts::default() });
}

#[tokio::test(start_paused = true)]
async fn keys_past_the_most_share_the_budget_of_none() {
    let bench = Bench::new(Answering::Allow);
    let held: Vec<_> = (0..ACCOUNTS_MOST + 2).map(|n| bench.retry().key(&n.to_string())).collect();
    for retry in &held {
        drop(retry.attempts());
    }
    let told = bench.told();
    assert_eq!(told.len(), ACCOUNTS_MOST);
    // The handle without a key is one of them.
    assert!(told.contains(&(String::new(), 3, 0)), "{told:?}");

    drop(held);
    bench.retries.tend(Time::ZERO);
    assert_eq!(bench.retries.accounts.read().in_turn.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn budgets_that_a_report_has_no_room_for_are_first_in_the_next() {
    let bench = Bench::new(Answering::Allow);
    let [a, b] = ["a", "b"].map(|key| bench.retry().key(key));
    let told = |room| {
        let mut draft = Draft::default();
        draft.deltas.resize(REPORT_MOST - room, v1::CircuitDelta::default());
        bench.retries.report(&mut draft, Time::ZERO);
        let said = draft.deltas.split_off(REPORT_MOST - room);
        said.into_iter().map(|delta| delta.key).collect::<Vec<_>>()
    };
    let mut heard = Vec::new();
    for _ in 0..2 {
        drop((a.attempts(), b.attempts()));
        heard.extend(told(1));
    }
    heard.sort();
    assert_eq!(heard, ["a", "b"]);
}

#[tokio::test(start_paused = true)]
async fn dropping_a_call_drops_its_pause() {
    let retry = Retry::local();
    let call = retry.call_with(
        |_: &Result<(), ()>| Again::After(Duration::from_secs(50)),
        |attempt| async move { if attempt > 0 { pending().await } else { Err(()) } },
    );
    let ended = tokio::time::timeout(Duration::from_secs(1), call).await;
    assert!(ended.is_err());
    assert_eq!(retry.counts().retries, 1);
}
