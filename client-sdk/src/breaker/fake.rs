//! A client's surroundings for the tests of its breakers: a clock that is set, and a server of a few lines.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fusebox_core::{
    Time,
    circuit::{self, Share},
};
use fusebox_proto::v1;
use parking_lot::Mutex;
use tokio::{runtime::Runtime, sync::oneshot};

use super::{Breaker, Breakers};
use crate::{
    Clock, Fallback,
    binding::Binding,
    context::{Context, Random},
    exchange::{Answer, Answers, Asked, Exchange, Question, Unanswered},
    part::{Draft, Part},
    settings::{Kind, OnUnreachable, Settings},
    telemetry::{Counts, Event, Observer, Telemetry},
};

pub(super) const SECOND: Duration = Duration::from_secs(1);
pub(super) const MILLI: Duration = Duration::from_millis(1);

type Waiter = oneshot::Sender<Result<Answers, Unanswered>>;

/// A server that answers when a test says so.
#[derive(Default)]
pub(super) struct Server {
    bindings: Mutex<BTreeMap<(String, String), Arc<Binding>>>,
    asked: Mutex<VecDeque<(Question, Waiter)>>,
    pub(super) asks: AtomicUsize,
    pub(super) hurries: AtomicUsize,
    pub(super) is_down: AtomicBool,
}

impl Exchange for Server {
    fn ask(&self, questions: Vec<Question>) -> Asked {
        self.asks.fetch_add(1, Ordering::Relaxed);
        if self.is_down.load(Ordering::Relaxed) {
            return Box::pin(async { Err(Unanswered::Unreachable) });
        }
        let (answer, answered) = oneshot::channel();
        self.asked.lock().push_back((questions.into_iter().next().unwrap(), answer));
        Box::pin(async { answered.await.unwrap_or(Err(Unanswered::Unreachable)) })
    }

    fn hurry(&self) {
        self.hurries.fetch_add(1, Ordering::Relaxed);
    }

    fn is_up(&self) -> bool {
        !self.is_down.load(Ordering::Relaxed)
    }

    fn bind(&self, policy: &str, key: &str) -> Arc<Binding> {
        let mut bindings = self.bindings.lock();
        let handle = u32::try_from(bindings.len()).unwrap() + 1;
        let name = (policy.to_owned(), key.to_owned());
        let binding = bindings.entry(name);
        Arc::clone(binding.or_insert_with(|| Arc::new(Binding::new(policy, key, handle))))
    }
}

/// Transitions that were told, as whose and whether it closed.
#[derive(Default)]
struct Heard(Mutex<Vec<(crate::Decider, bool)>>);

impl Observer for Arc<Heard> {
    fn observe(&self, event: &Event<'_>) {
        if let Event::Circuit { decider, closed, .. } = event {
            self.0.lock().push((*decider, *closed));
        }
    }
}

/// Breakers, and all that is around them.
pub(super) struct Scene {
    pub(super) breakers: Arc<Breakers>,
    pub(super) server: Arc<Server>,
    pub(super) runtime: Runtime,
    nanos: Arc<AtomicU64>,
    heard: Arc<Heard>,
}

/// Settings of a policy without chance or ramp.
pub(super) fn plain() -> circuit::Settings {
    let mut settings = circuit::Settings { min_reporters: 1, ..circuit::Settings::default() };
    settings.open_for.jitter = Share::NONE;
    settings.ramp.steps.clear();
    settings
}

impl Scene {
    pub(super) fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        let nanos = Arc::new(AtomicU64::new(1_000_000_000_000));
        let read = Arc::clone(&nanos);
        let server = Arc::new(Server::default());
        let heard = Arc::new(Heard::default());
        let observer: Arc<dyn Observer> = Arc::new(Arc::clone(&heard));
        let context = Arc::new(Context {
            clock: Clock::given(move || Duration::from_nanos(read.load(Ordering::Relaxed))),
            runtime: runtime.handle().clone(),
            exchange: Arc::clone(&server) as Arc<dyn Exchange>,
            decide_within: MILLI * 50,
            fallback: Fallback::Allow,
            telemetry: Telemetry { observer: Some(observer), ..Telemetry::default() },
            random: Random::of(7),
        });
        let breakers = Arc::new(Breakers::new(context));
        Self { breakers, server, runtime, nanos, heard }
    }

    /// The circuit of a policy that was told, with such settings.
    pub(super) fn breaker(&self, settings: circuit::Settings) -> Breaker {
        self.bind("payments", "", settings, false);
        self.breakers.of("payments")
    }

    pub(super) fn bind(&self, policy: &str, key: &str, settings: circuit::Settings, shadow: bool) {
        let kind = Kind::Breaker(Box::new(circuit::Breaker::new(settings).unwrap()));
        let (on_unreachable, lease_time) = (OnUnreachable::Allow, SECOND);
        let settings = Settings { kind, on_unreachable, lease_time, shadow };
        self.server.bind(policy, key).is_told(Some(Arc::new(settings)), 1);
    }

    pub(super) fn now(&self) -> Time {
        Time::from_nanos(self.nanos.load(Ordering::Relaxed))
    }

    pub(super) fn pass(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap();
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// What a Watch begins with, and what it goes on with.
    pub(super) fn watch(&self, snapshot: bool, circuits: Vec<v1::CircuitStatus>, generation: u64) {
        self.breakers.watches();
        self.breakers.watched(&news(snapshot, circuits, generation), self.now());
    }

    pub(super) fn report(&self) -> Draft {
        let mut draft = Draft::default();
        self.breakers.report(&mut draft, self.now());
        draft
    }

    pub(super) fn delta(&self) -> Option<v1::CircuitDelta> {
        let deltas = self.report().deltas;
        assert!(deltas.len() <= 1);
        deltas.into_iter().next()
    }

    /// Lets tasks do what they can.
    pub(super) fn settle(&self) {
        self.runtime.block_on(async {
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
        });
    }

    /// Answers the question that was asked first.
    pub(super) fn answer(&self, answer: Answer) -> Question {
        self.settle();
        let (question, waiter) = self.server.asked.lock().pop_front().unwrap();
        let answers = Answers { sent: self.now(), answers: vec![answer] };
        waiter.send(Ok(answers)).unwrap();
        self.settle();
        question
    }

    pub(super) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        self.breakers.count(&mut counts);
        counts
    }

    pub(super) fn heard(&self) -> Vec<(crate::Decider, bool)> {
        std::mem::take(&mut *self.heard.0.lock())
    }
}

pub(super) fn wire(duration: Duration) -> Option<prost_types::Duration> {
    Some(duration.try_into().unwrap())
}

pub(super) fn news(
    snapshot: bool,
    circuits: Vec<v1::CircuitStatus>,
    generation: u64,
) -> v1::WatchResponse {
    v1::WatchResponse {
        epoch: 1,
        version: 1,
        snapshot,
        complete: true,
        circuits,
        generation,
        elapsed: wire(Duration::ZERO),
        valid_for: wire(SECOND * 5),
    }
}

/// A circuit of the fleet.
pub(super) fn status(state: v1::CircuitState, generation: u64) -> v1::CircuitStatus {
    v1::CircuitStatus {
        policy: "payments".to_owned(),
        state: state.into(),
        mode: v1::CircuitMode::Normal.into(),
        generation,
        ..v1::CircuitStatus::default()
    }
}

/// One that is open, and may be asked for a probe in so long.
pub(super) fn open(generation: u64, open_for: Duration) -> v1::CircuitStatus {
    let evidence = v1::Evidence { calls: 42, ..v1::Evidence::default() };
    let status = status(v1::CircuitState::Open, generation);
    v1::CircuitStatus { open_for: wire(open_for), evidence: Some(evidence), ..status }
}

/// A probe.
pub(super) fn probe(generation: u64) -> Answer {
    let verdict = v1::Verdict {
        decision: v1::Decision::Allow.into(),
        circuit_state: v1::CircuitState::HalfOpen.into(),
        generation,
        probe: true,
        expires_in: wire(SECOND * 10),
        ..v1::Verdict::default()
    };
    Answer { allowed: true, grant_id: "grant".to_owned(), waited: Duration::ZERO, verdict }
}

/// Leave to go through a closed circuit.
pub(super) fn allowed(state: v1::CircuitState, reason: v1::Reason, generation: u64) -> Answer {
    let verdict = v1::Verdict {
        decision: v1::Decision::Allow.into(),
        reason: reason.into(),
        circuit_state: state.into(),
        generation,
        ..v1::Verdict::default()
    };
    Answer { allowed: true, grant_id: String::new(), waited: Duration::ZERO, verdict }
}

/// A denial.
pub(super) fn denied(
    state: v1::CircuitState,
    reason: v1::Reason,
    generation: u64,
    retry_after: Duration,
) -> Answer {
    let verdict = v1::Verdict {
        decision: v1::Decision::Deny.into(),
        reason: reason.into(),
        circuit_state: state.into(),
        generation,
        retry_after: wire(retry_after),
        ..v1::Verdict::default()
    };
    Answer { allowed: false, grant_id: String::new(), waited: Duration::ZERO, verdict }
}
