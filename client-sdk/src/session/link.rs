//! One connection of a client: one endpoint after the other, as long as the client lives.

use std::{sync::Arc, time::Duration};

use fusebox_proto::v1::{ReportRequest, ReportResponse, WatchRequest, WatchResponse};
use tokio::sync::{mpsc, oneshot};

use fusebox_core::Time;
use tonic::Code;

use super::{
    Queued, Shared, Tasks,
    conversation::Conversation,
    dialer::{Broken, Connection, Dialer},
    endpoints::{Endpoints, Next},
    truths::Truth,
    until,
};
use crate::{context::Random, telemetry::Event};

/// One connection of a client.
pub(super) struct Link {
    pub(super) index: usize,
    pub(super) shared: Arc<Shared>,
    pub(super) dialer: Arc<Dialer>,
    pub(super) tasks: Tasks,
    pub(super) random: Random,
    pub(super) queue: mpsc::Receiver<Queued>,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) tell: mpsc::Sender<Told>,
}

/// What the steward wants of the session that is up.
pub(super) struct Command {
    /// Number of that session: what was meant for an earlier one is not said on the next.
    pub(super) session: u64,
    pub(super) what: What,
}

/// What is wanted.
pub(super) enum What {
    /// To send a report.
    Report(ReportRequest),
    /// To ask for a Watch, under this number.
    Watch(u64, WatchRequest),
    /// To look which bindings are this connection's, and which are nobody's any more.
    Bind,
    /// To end the session, with all that the client holds.
    Close,
}

/// What the steward is told, and by which connection.
pub(super) struct Told {
    pub(super) connection: usize,
    pub(super) news: News,
}

/// What happened.
pub(super) enum News {
    /// A session has begun; may it be used? Under which number?
    Welcomed(Truth, oneshot::Sender<Result<u64, Arc<str>>>),
    /// It broke.
    Broken,
    /// A report that was sent then is answered.
    Reported(ReportResponse, Time),
    /// A report is refused.
    ReportRefused(Code, String),
    /// News of the Watch of that number, which was sent then.
    Watched(u64, WatchResponse, Time),
    /// The Watch of that number has ended.
    WatchRefused(u64, Code, String),
    /// The server has ended what the client held.
    Closed,
}

/// How an attempt ended.
enum Outcome {
    Broken {
        by: Broken,
        up_for: Duration,
        was_up: bool,
    },
    /// The other connections have another state.
    OtherTruth(String),
}

impl Link {
    /// Keeps a session up, on one endpoint or another, until the task is ended.
    pub(super) async fn run(mut self) {
        let mut endpoints = Endpoints::new(self.dialer.targets.len());
        let mut next = endpoints.next(self.shared.clock.now(), &self.random);
        let mut refused = None;
        loop {
            self.rest_until(next.at).await;
            let tried = next.endpoint;
            let outcome = self.attempt(tried).await;
            next = self.look_on(&mut endpoints, tried, &outcome);
            self.tell_of(tried, &outcome, next.at, &mut refused);
        }
    }

    /// Waits; who asks meanwhile learns at once that nobody hears it.
    async fn rest_until(&mut self, at: Time) {
        let shared = Arc::clone(&self.shared);
        while_refusing(&mut self.queue, shared.sleep_until(at)).await;
    }

    async fn attempt(&mut self, endpoint: usize) -> Outcome {
        let dialer = Arc::clone(&self.dialer);
        let opening = dialer.open(endpoint, &self.tasks);
        let connection = match while_refusing(&mut self.queue, opening).await {
            Ok(connection) => connection,
            Err(by) => return Outcome::Broken { by, up_for: Duration::ZERO, was_up: false },
        };
        let truth = Truth {
            id: connection.welcome.truth_id.as_str().into(),
            boot: connection.welcome.boot,
        };
        let (reply, replied) = oneshot::channel();
        self.say(News::Welcomed(truth.clone(), reply)).await;
        match replied.await {
            Ok(Ok(session)) => self.converse(endpoint, &truth, session, connection).await,
            Ok(Err(other)) => Outcome::OtherTruth(format!(
                "its state is `{}`, and that of the others `{other}`",
                truth.id
            )),
            // The steward ends only with all of the client.
            Err(_) => std::future::pending().await,
        }
    }

    async fn converse(
        &mut self,
        endpoint: usize,
        truth: &Truth,
        session: u64,
        connection: Connection,
    ) -> Outcome {
        let shared = Arc::clone(&self.shared);
        let since = shared.clock.now();
        shared.count(|telemetry| &telemetry.connects);
        shared.tell(&Event::Connected {
            endpoint: &self.dialer.targets[endpoint].name,
            truth_id: &truth.id,
            boot: truth.boot,
        });
        let by = Conversation::new(self, session, &connection.welcome).run(connection).await;
        shared.set_up(self.index, false);
        // What came in while it broke; a later call finds that nothing is up.
        while self.queue.try_recv().is_ok() {}
        shared.count(|telemetry| &telemetry.disconnects);
        self.say(News::Broken).await;
        Outcome::Broken { by, up_for: until(since, shared.clock.now()), was_up: true }
    }

    pub(super) async fn say(&self, news: News) {
        // The steward ends only with all of the client.
        let _ = self.tell.send(Told { connection: self.index, news }).await;
    }

    /// What an attempt says about its endpoint, and what is tried next.
    fn look_on(&self, endpoints: &mut Endpoints, endpoint: usize, outcome: &Outcome) -> Next {
        let now = self.shared.clock.now();
        match outcome {
            Outcome::OtherTruth(_) => endpoints.shunned(endpoint, now),
            Outcome::Broken { by, up_for, .. } if by.drained => {
                endpoints.drained(endpoint, *up_for, now, &self.random);
            }
            Outcome::Broken { up_for, .. } => {
                endpoints.failed(endpoint, *up_for, now, &self.random);
            }
        }
        endpoints.next(now, &self.random)
    }

    fn tell_of(&self, tried: usize, outcome: &Outcome, again: Time, refused: &mut Option<Code>) {
        let again_in = until(self.shared.clock.now(), again);
        let (cause, code) = match outcome {
            Outcome::OtherTruth(cause) => (cause, None),
            Outcome::Broken { by, .. } => (&by.cause, by.refused),
        };
        let was_up = matches!(outcome, Outcome::Broken { was_up: true, .. });
        if was_up {
            *refused = None;
        }
        // A mistake is said once, not with each attempt.
        if let Some(code) = code
            && refused.replace(code) != Some(code)
        {
            self.shared.tell(&Event::Refused { policy: "", key: "", code, message: cause });
        }
        let endpoint = &self.dialer.targets[tried].name;
        self.shared.tell(&Event::Disconnected { endpoint, cause, again_in });
    }
}

/// Does `work`; who asks meanwhile learns at once that nobody hears it.
async fn while_refusing<T>(queue: &mut mpsc::Receiver<Queued>, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            Some(_unheard) = queue.recv() => {}
        }
    }
}
