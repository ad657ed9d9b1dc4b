//! Acquires with an id: who asks twice is charged once, and told the same.

use std::{sync::Arc, time::Duration};

use fusebox_core::Time;
use fusebox_proto::v1::{AcquireRequest, AcquireResponse};
use tokio::sync::Mutex;
use tonic::Status;

use super::{
    delivery::{Delivery, Ended},
    respond::{self, Reply},
    status,
};
use crate::{
    app::{App, Begun, InProgress, Joined, Principal, RequestKey, Requests, Share},
    digest::Digest,
    limits,
    storage::{Answer, Durable, StorageError},
};

/// The answers that are remembered.
pub struct Answers(Requests<Decided>);

/// What was decided of a request.
type Decided = Result<Remembered, Status>;

/// Whose turn it is to decide a request.
pub(super) enum Turn<'a> {
    /// This caller's.
    First(InProgress<'a, Decided>),
    /// Somebody else's.
    Joined(Joined<'a, Decided>),
    /// It is decided.
    Decided(Share<Decided>),
}

/// An answer, and when it may be told.
pub(super) struct Remembered {
    reply: Reply,
    /// When it was decided: what it says of lifetimes is counted from there.
    at: Time,
    durable: Mutex<Waited>,
}

/// What an answer waits for. Many may wait for it, each as long as it likes.
enum Waited {
    For(Durable),
    Over(Result<(), StorageError>),
}

impl Answers {
    /// None yet. The secret keeps anybody from finding two requests of one name.
    pub fn new(secret: [u8; 16]) -> Self {
        Self(Requests::new(secret))
    }

    /// Forgets some of those whose time is over.
    pub fn tend(&self, now: Time) {
        self.0.tend(now);
    }

    /// Names a request of a client.
    pub(super) fn key(&self, principal: Principal, client: &str, request: &str) -> RequestKey {
        self.0.key(principal, client, request)
    }

    /// What a repetition has to repeat.
    pub(super) fn digest(&self, namespace: &str, request: &AcquireRequest) -> Digest {
        let mut content = self.0.content().text(namespace);
        for ask in &request.asks {
            content = content.text(&ask.policy).text(&ask.key).number(ask.cost.unwrap_or(1));
            content = content.number(ask.lease).number(ask.estimated.into());
        }
        #[allow(clippy::cast_sign_loss)] // a number as any other
        let priority = request.priority as u64;
        let wait = request.max_wait.unwrap_or_default();
        #[allow(clippy::cast_sign_loss)]
        let wait = (wait.seconds as u64, wait.nanos as u64);
        content = content.number(priority).number(request.attempt.into());
        content.number(wait.0).number(wait.1).digest()
    }

    /// Begins a request of that id, or finds what became of it; of a batch, that of the entry.
    pub(super) fn begin(
        &self,
        (key, digest): (RequestKey, Digest),
        entry: Option<usize>,
        now: Time,
    ) -> Result<Turn<'_>, Status> {
        Turn::of(self.0.begin(key, digest, now)).ok_or_else(|| status::other_request(entry))
    }
}

impl<'a> Turn<'a> {
    /// `None` if another request has the id.
    fn of(begun: Begun<'a, Decided>) -> Option<Self> {
        match begun {
            Begun::First(first) => Some(Self::First(first)),
            Begun::Joined(joined) => Some(Self::Joined(joined)),
            Begun::Decided(told) => Some(Self::Decided(told)),
            Begun::Differs => None,
        }
    }

    /// The answer, once somebody has decided: of the first that asks what `decide` makes of it, of all others
    /// the same.
    pub(super) async fn answer<D>(
        self,
        app: &Arc<App>,
        entry: Option<usize>,
        decide: impl FnOnce() -> D,
    ) -> Result<(AcquireResponse, Option<Delivery>), Status>
    where
        D: Future<Output = Result<Answer<Reply>, Status>>,
    {
        let turn = match self {
            Self::Joined(joined) => Self::of(joined.turn().await),
            turn => Some(turn),
        };
        let told = match turn {
            Some(Self::First(first)) => Self::end(first, decide().await, app),
            Some(Self::Decided(told)) => told,
            // Whose turn it is has been waited for, so it is nobody else's.
            Some(Self::Joined(_)) | None => return Err(status::other_request(entry)),
        };
        let response = match &*told {
            Err(status) => return Err(status.clone()),
            Ok(remembered) => remembered.response(app).await?,
        };
        let delivery = Delivery::new(move |ended| match ended {
            Ended::Arrived => told.delivered(),
            Ended::Lost => drop(told),
        });
        Ok((response, Some(delivery)))
    }

    /// Ends a request with what was decided of it, which all that joined are told.
    ///
    /// To be called at once: a caller that goes away between the charge and this would leave a charge that nobody
    /// knows of.
    pub(super) fn decided(
        first: InProgress<'a, Decided>,
        answer: Answer<Reply>,
        app: &Arc<App>,
    ) -> Self {
        Self::Decided(Self::end(first, Ok(answer), app))
    }

    fn end(
        first: InProgress<'a, Decided>,
        answer: Result<Answer<Reply>, Status>,
        app: &Arc<App>,
    ) -> Share<Decided> {
        let answer = match answer {
            Ok(answer) => answer,
            Err(status) => return first.tell(Err(status)),
        };
        let at = app.time();
        let (reply, durable) = match answer {
            Answer::Now(reply) => (reply, Waited::Over(Ok(()))),
            Answer::Later(reply, durable) => (reply, Waited::For(durable)),
        };
        let (allowed, to_give_back) = (reply.allowed, reply.to_give_back.clone());
        let until = at.after(reply.lives().min(limits::REMEMBERED_FOR));
        let remembered = Ok(Remembered { reply, at, durable: Mutex::new(durable) });
        match to_give_back {
            Some(grant) => {
                let app = Arc::clone(app);
                first.remember(remembered, until, move |_| app.take_back(&grant))
            }
            // All else stands as charged, so it is told to whoever repeats the request.
            None if allowed => first.keep(remembered, until),
            None => first.tell(remembered),
        }
    }
}

impl Remembered {
    /// The answer as it is now: what it gave lives shorter by the time since, and not at all once that is over.
    async fn response(&self, app: &App) -> Result<AcquireResponse, Status> {
        let mut waited = self.durable.lock().await;
        if let Waited::For(durable) = &mut *waited {
            let written = durable.await.unwrap_or_else(|_| Err(StorageError::gone()));
            *waited = Waited::Over(written);
        }
        if let Waited::Over(Err(error)) = &*waited {
            return Err(status::acquire(&error.clone().into(), None));
        }
        drop(waited);
        let mut response = self.reply.response.clone();
        let since = Duration::from_nanos(app.time().nanos_since(self.at));
        for (ask, life) in &self.reply.lives {
            let left = respond::duration(life.saturating_sub(since));
            response.verdicts[*ask].expires_in = Some(left);
        }
        Ok(response)
    }
}
