//! Acquires that wait for their turn.

use std::time::Duration;

use fusebox_core::{Admission, Reason};

use super::{
    Acquire, AcquireError, Acquired, App, Ask, Attempt, Caller, Counts, Entry, Stands, Stood,
};
use crate::{catalogue::CellId, limits, storage::Answer};

/// An Acquire of one ask, to be decided when it can be allowed.
pub type Waiting<'a> = Acquire<'a, Ask<'a>>;

impl App {
    /// Decides one Acquire of one ask, at once if it is allowed and nobody waits already, else after standing in
    /// line for at most `max_wait`. What is told of it, and how long it stood, is what `tell` makes.
    ///
    /// Nothing is charged before it is allowed, so who drops this has left.
    ///
    /// # Errors
    /// If nothing could be decided.
    pub async fn acquire_in_line<T>(
        &self,
        caller: Caller,
        acquire: Waiting<'_>,
        max_wait: Duration,
        tell: impl FnOnce(&Acquired, Option<Duration>) -> T,
    ) -> Result<Answer<T>, AcquireError> {
        if let Some(policy) = self.breaker_of(&acquire) {
            return Err(AcquireError::NoLine { policy });
        }
        // On the heap: it lives as long as the caller waits.
        let mut acquired = Box::new(Acquired::default());
        let attempt = |stands, counts, acquired: &mut Acquired| {
            let Acquire { namespace, client, entry } = acquire.clone();
            let Entry { asks: ask, priority, retry } = entry;
            let acquire =
                Acquire { namespace, client, entry: Entry { asks: [ask], priority, retry } };
            // Each at its own moment: by now the first one is over.
            let caller = Caller { now: self.clock.now(), ..caller };
            self.attempt(caller, acquire, (stands, counts), acquired)
        };
        let at_once = attempt(Stands::NotAtAll, Counts::IfAllowed, &mut acquired)?;
        if acquired.decided.decision.allowed {
            return Ok(at_once.map(|()| tell(&acquired, None)));
        }
        let place = match self.line_of(&acquire).filter(|_| can_wait(&acquired)) {
            Some((cell, most)) => self.lines.enter(cell, acquire.entry.priority, most),
            None => {
                let denied = attempt(Stands::NotAtAll, Counts::This, &mut acquired)?;
                return Ok(denied.map(|()| tell(&acquired, None)));
            }
        };
        let Some(place) = place else {
            let denied = attempt(Stands::Outside, Counts::This, &mut acquired)?;
            return Ok(denied.map(|()| tell(&acquired, None)));
        };
        let started = self.clock.time();
        let stood = place.stand(max_wait, || {
            match attempt(Stands::AtTheHead, Counts::IfAllowed, &mut acquired) {
                Err(error) => Attempt::Admitted(Err(error)),
                Ok(answer) if acquired.decided.decision.allowed => {
                    Attempt::Admitted(Ok(Some(answer)))
                }
                Ok(_) => {
                    let retry_after = retry_after(&acquired).min(limits::LINE_LOOKS);
                    Attempt::NotYet { retry_after: Some(retry_after), denied: Ok(None) }
                }
            }
        });
        let answer = match stood.await {
            Stood::Admitted(answer) => answer?,
            Stood::TimedOut(_) => None,
            Stood::Drained => return Err(AcquireError::Draining),
        };
        let answer = match answer {
            Some(answer) => answer,
            None => attempt(Stands::Behind, Counts::This, &mut acquired)?,
        };
        let waited = Duration::from_nanos(self.clock.time().nanos_since(started));
        Ok(answer.map(|()| tell(&acquired, Some(waited))))
    }

    /// The name of what is asked, if that is a breaker.
    fn breaker_of(&self, acquire: &Waiting<'_>) -> Option<String> {
        let catalogue = self.catalogue.load();
        let policy = catalogue.namespace(acquire.namespace)?.policy(acquire.entry.asks.policy)?;
        policy.breakers.as_ref().map(|_| policy.name.to_string())
    }

    /// The line of what is asked, and how many may stand in it.
    fn line_of(&self, acquire: &Waiting<'_>) -> Option<(CellId, usize)> {
        let catalogue = self.catalogue.load();
        let ask = &acquire.entry.asks;
        let policy = catalogue.namespace(acquire.namespace)?.policy(ask.policy)?;
        Some((policy.cells.cell(ask.key), policy.max_waiting))
    }
}

/// Whether waiting may mend a denial.
fn can_wait(acquired: &Acquired) -> bool {
    let blocked = |admission| matches!(admission, Admission::Deny { reason: Reason::Blocked, .. });
    !acquired.decided.decision.verdicts.iter().any(|verdict| blocked(verdict.admission))
}

fn retry_after(acquired: &Acquired) -> Duration {
    let waits = acquired.decided.decision.verdicts.iter().map(|verdict| match verdict.admission {
        Admission::Deny { retry_after, .. } => retry_after.unwrap_or(Duration::MAX),
        Admission::Allow => Duration::ZERO,
    });
    waits.max().unwrap_or(Duration::MAX)
}
