//! Acquires with an id: who asks twice is charged once, and told the same.

use std::{sync::Arc, time::Duration};

use fusebox_core::Time;
use fusebox_proto::v1::{AcquireRequest, AcquireResponse};
use tokio::sync::Mutex;
use tonic::Status;

use super::{
    delivery::{Delivery, Ended},
    respond::{self, Told},
    status,
};
use crate::{
    app::{App, Begun, Digest, Principal, RequestKey, Requests},
    limits,
    storage::{Answer, Durable, StorageError},
};

/// The answers that are remembered.
pub struct Answers(Requests<Result<Remembered, Status>>);

/// An answer, and when it may be told.
struct Remembered {
    told: Told,
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
    pub(super) fn digest(&self, request: &AcquireRequest) -> Digest {
        let mut content = self.0.content().text(&request.namespace);
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

    /// The answer to a request: of the first that asks what `decide` makes of it, of all others the same.
    pub(super) async fn answer<D>(
        &self,
        (key, digest): (RequestKey, Digest),
        app: &Arc<App>,
        decide: impl FnOnce() -> D,
    ) -> Result<(AcquireResponse, Option<Delivery>), Status>
    where
        D: Future<Output = Result<Answer<Told>, Status>>,
    {
        let begun = match self.0.begin(key, digest, app.time()) {
            Begun::Joined(joined) => joined.turn().await,
            begun => begun,
        };
        let told = match begun {
            Begun::First(first) => match decide().await {
                Ok(answer) => {
                    let at = app.time();
                    let (told, durable) = match answer {
                        Answer::Now(told) => (told, Waited::Over(Ok(()))),
                        Answer::Later(told, durable) => (told, Waited::For(durable)),
                    };
                    let (allowed, permits) = (told.allowed, told.permits);
                    let until = at.after(told.lives().min(limits::REMEMBERED_FOR));
                    let remembered = Ok(Remembered { told, at, durable: Mutex::new(durable) });
                    if allowed {
                        let app = Arc::clone(app);
                        first.remember(remembered, until, move |_| {
                            if let Some(grant) = permits {
                                app.take_back(grant);
                            }
                        })
                    } else {
                        first.tell(remembered)
                    }
                }
                Err(status) => first.tell(Err(status)),
            },
            Begun::Decided(told) => told,
            Begun::Differs | Begun::Joined(_) => return Err(status::other_request()),
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
        let mut response = self.told.response.clone();
        let since = Duration::from_nanos(app.time().nanos_since(self.at));
        for (ask, life) in &self.told.lives {
            let left = respond::duration(life.saturating_sub(since));
            response.verdicts[*ask].expires_in = Some(left);
        }
        Ok(response)
    }
}
