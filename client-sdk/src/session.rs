//! The client's side of `Session`: what carries questions, reports and news between the parts and the server.
//!
//! One task, the [`Steward`], calls the parts: on each beat, and with what they are to hear. Each connection is a
//! [`Link`] with a task of its own; it keeps one endpoint, says what it is given, and hands back answers. What is to be
//! decided is decided by state machines that know neither sockets nor clocks: [`endpoints`], [`liveness`], [`truths`],
//! [`reports`], [`watching`] and [`bindings`].

mod backoff;
mod bindings;
mod conversation;
mod dialer;
mod endpoints;
mod link;
mod liveness;
mod reports;
mod spare;
mod steward;
#[cfg(test)]
mod tests;
mod truths;
mod watching;

use std::{
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use fusebox_core::Time;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

pub(crate) use self::dialer::{Connect, Dialer, Given, Target};
use self::{bindings::Bindings, link::Link, steward::Steward};
use crate::{
    Clock,
    binding::Binding,
    context::{Context, Random},
    exchange::{Answers, Asked, Exchange, Question, Unanswered},
    part::Part,
    telemetry::{Event, Telemetry},
};

/// Questions that wait for their turn on one connection, at most. At a thousand under way, and a millisecond for each,
/// more would wait for longer than anybody does.
const QUEUED_MOST: usize = 4_096;

/// Messages between the steward and a connection, at most; who has more to say waits.
const TOLD_MOST: usize = 64;

/// How long `close` waits for tasks to end, once there is nothing more to say.
const END_WITHIN: Duration = Duration::from_secs(1);

/// The way to the server, over all reconnects. When it is dropped, its tasks end.
pub(crate) struct Wire {
    shared: Arc<Shared>,
    tasks: Tasks,
    _end: DropGuard,
}

/// Where tasks of a client run, and how they end.
#[derive(Clone)]
pub(crate) struct Tasks {
    runtime: tokio::runtime::Handle,
    tracker: TaskTracker,
    end: CancellationToken,
}

impl Tasks {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let task = self.end.clone().run_until_cancelled_owned(task);
        self.tracker.spawn_on(task, &self.runtime);
    }

    /// The same, of which some can be ended before the others.
    fn child(&self) -> Self {
        Self { end: self.end.child_token(), ..self.clone() }
    }
}

/// What calls and tasks of one client share.
struct Shared {
    clock: Clock,
    /// Weak, so that tasks do not keep up what they work for.
    context: OnceLock<Weak<Context>>,
    /// A bit for each connection that is up.
    up: AtomicU32,
    is_up: watch::Sender<bool>,
    is_closing: AtomicBool,
    close: Notify,
    hurry: Notify,
    bindings: Mutex<Bindings>,
    /// Of each connection.
    queues: Vec<mpsc::Sender<Queued>>,
}

/// What calls want of a connection.
enum Queued {
    Ask(Ask),
    Bind(Arc<Binding>),
}

/// Questions of one message, and who waits for the answers.
struct Ask {
    questions: Vec<Question>,
    answer: oneshot::Sender<Result<Answers, Unanswered>>,
}

/// The parts of a wire that only its tasks need, until they are started.
pub(crate) struct Ends {
    queues: Vec<mpsc::Receiver<Queued>>,
}

impl Wire {
    /// A wire of so many connections. Nothing runs before [`start`](Self::start).
    pub(crate) fn new(
        connections: usize,
        clock: Clock,
        runtime: tokio::runtime::Handle,
    ) -> (Self, Ends) {
        let queue = |_| mpsc::channel(QUEUED_MOST);
        let (queues, ends) = (0..connections).map(queue).unzip();
        let shared = Arc::new(Shared {
            clock,
            context: OnceLock::new(),
            up: AtomicU32::new(0),
            is_up: watch::Sender::new(false),
            is_closing: AtomicBool::new(false),
            close: Notify::new(),
            hurry: Notify::new(),
            bindings: Mutex::default(),
            queues,
        });
        let end = CancellationToken::new();
        let tasks = Tasks { runtime, tracker: TaskTracker::new(), end: end.clone() };
        (Self { shared, tasks, _end: end.drop_guard() }, Ends { queues: ends })
    }

    /// Starts the tasks.
    pub(crate) fn start(
        &self,
        ends: Ends,
        context: Weak<Context>,
        dialer: Dialer,
        parts: Vec<Weak<dyn Part>>,
        random: &Random,
    ) {
        let _ = self.shared.context.set(context);
        let dialer = Arc::new(dialer);
        let (tell, told) = mpsc::channel(TOLD_MOST);
        let mut commands = Vec::with_capacity(ends.queues.len());
        for (index, queue) in ends.queues.into_iter().enumerate() {
            let (command, commanded) = mpsc::channel(TOLD_MOST);
            commands.push(command);
            let random = Random::of(random.next());
            let link = Link {
                index,
                shared: Arc::clone(&self.shared),
                dialer: Arc::clone(&dialer),
                tasks: self.tasks.clone(),
                random,
                queue,
                commands: commanded,
                tell: tell.clone(),
            };
            let ends_all = self.ends_all(false);
            self.tasks.spawn(async move {
                let _ends_all = ends_all;
                link.run().await;
            });
        }
        let steward = Steward::new(Arc::clone(&self.shared), parts, commands, told);
        let ends_all = self.ends_all(true);
        self.tasks.spawn(async move {
            let _ends_all = ends_all;
            steward.run().await;
        });
    }

    fn ends_all(&self, always: bool) -> EndsAll {
        EndsAll { always, shared: Arc::clone(&self.shared), end: self.tasks.end.clone() }
    }

    /// Returns when a session is up.
    pub(crate) async fn is_connected(&self) {
        // The sender is in `self`, so there is no end of it.
        let _ = self.shared.is_up.subscribe().wait_for(|up| *up).await;
    }

    /// Says goodbye, and ends the tasks. Goes on without whoever stops waiting for it.
    pub(crate) async fn close(&self) {
        self.shared.is_closing.store(true, Ordering::Release);
        self.shared.close.notify_one();
        self.tasks.end.cancelled().await;
        self.tasks.tracker.close();
        let _ = tokio::time::timeout(END_WITHIN, self.tasks.tracker.wait()).await;
    }
}

/// Ends all of a client with one of its tasks: at the latest when that panics. A client that lacks one would neither
/// hear nor be heard, and not know it; one that has ended is decided as without a server.
struct EndsAll {
    /// Also if it ends well.
    always: bool,
    shared: Arc<Shared>,
    end: CancellationToken,
}

impl Drop for EndsAll {
    fn drop(&mut self) {
        let panics = std::thread::panicking();
        if panics {
            tracing::error!("a task of the client panicked, which ends it");
        }
        if panics || self.always {
            self.shared.is_closing.store(true, Ordering::Release);
            self.shared.up.store(0, Ordering::Release);
            self.shared.is_up.send_replace(false);
            self.end.cancel();
        }
    }
}

impl Exchange for Wire {
    fn ask(&self, questions: Vec<Question>) -> Asked {
        let asked = self.shared.ask(questions);
        Box::pin(async move {
            match asked {
                Ok(answer) => answer.await.unwrap_or(Err(Unanswered::Unreachable)),
                Err(unanswered) => Err(unanswered),
            }
        })
    }

    fn hurry(&self) {
        self.shared.hurry.notify_one();
    }

    fn is_up(&self) -> bool {
        self.shared.is_up()
    }

    fn bind(&self, policy: &str, key: &str) -> Arc<Binding> {
        let (binding, new) = self.shared.bindings.lock().bind(policy, key);
        if new && let Some(connection) = self.shared.route(&binding) {
            // If there is no room now, it is bound on the next look at all of them.
            let _ = self.shared.queues[connection].try_send(Queued::Bind(Arc::clone(&binding)));
        }
        binding
    }
}

impl Shared {
    fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire) != 0 && !self.is_closing.load(Ordering::Acquire)
    }

    fn ask(
        &self,
        questions: Vec<Question>,
    ) -> Result<oneshot::Receiver<Result<Answers, Unanswered>>, Unanswered> {
        let first = questions.first().ok_or_else(|| Unanswered::Refused {
            code: tonic::Code::InvalidArgument,
            message: "no question was asked".into(),
        })?;
        if self.is_closing.load(Ordering::Acquire) {
            return Err(Unanswered::Unreachable);
        }
        let connection = self.route(&first.binding).ok_or(Unanswered::Unreachable)?;
        let count = questions.len() as u64;
        let (answer, answered) = oneshot::channel();
        let sent = self.queues[connection].try_send(Queued::Ask(Ask { questions, answer }));
        if sent.is_err() {
            self.tell(&Event::Dropped { what: "questions to the server", count });
            return Err(Unanswered::Unreachable);
        }
        Ok(answered)
    }

    /// The connection of a key: its own, or the next one that is up.
    fn route(&self, binding: &Binding) -> Option<usize> {
        let up = self.up.load(Ordering::Acquire);
        let count = self.queues.len();
        let own = usize::try_from(binding.spread % count as u64).unwrap_or_default();
        (0..count).map(|step| (own + step) % count).find(|index| up & (1 << index) != 0)
    }

    fn set_up(&self, connection: usize, up: bool) {
        let bit = 1 << connection;
        let before = if up {
            self.up.fetch_or(bit, Ordering::AcqRel)
        } else {
            self.up.fetch_and(!bit, Ordering::AcqRel)
        };
        self.is_up.send_replace(up || before & !bit != 0);
    }

    fn context(&self) -> Option<Arc<Context>> {
        self.context.get().and_then(Weak::upgrade)
    }

    fn tell(&self, event: &Event<'_>) {
        if let Some(context) = self.context() {
            context.telemetry.tell(event);
        }
    }

    fn count(&self, counter: impl Fn(&Telemetry) -> &AtomicU64) {
        if let Some(context) = self.context() {
            counter(&context.telemetry).fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns at that time.
    async fn sleep_until(&self, at: Time) {
        tokio::time::sleep(until(self.clock.now(), at)).await;
    }
}

/// How long it is from `now` to `at`.
fn until(now: Time, at: Time) -> Duration {
    Duration::from_nanos(at.nanos_since(now))
}
