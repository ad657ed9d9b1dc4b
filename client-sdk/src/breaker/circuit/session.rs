//! What the session looks after, and tells the server of.

use std::{
    mem,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use fusebox_core::{Time, circuit};
use fusebox_proto::v1;

use super::Circuit;
use crate::{
    breaker::{news::News, probe::Grant},
    telemetry::Counts as Counted,
};

/// How long a circuit without news is looked after.
const REST: Duration = Duration::from_secs(1);

/// How often the server is asked for the generation of a circuit, by a report of none.
const UNKNOWN_EVERY: Duration = Duration::from_secs(1);

impl Circuit {
    /// Looks after what time does to it; whether it needs that again soon.
    pub(in crate::breaker) fn tend(self: &Arc<Self>, now: Time) -> bool {
        let mut inner = self.inner.lock();
        self.read(&mut inner, now);
        let given_back = inner.take_spent_probe(now);
        let is_told = inner.is_breaker() && inner.shared.generation() > 0;
        let has_news = is_told && !inner.news.is_empty();
        let rests = inner.pocket.is_none() && !has_news && inner.busy_at.after(REST) <= now;
        if rests {
            // The next call finds it, and tells what is counted from now on.
            self.catch_up(&mut inner, now);
            inner.is_active = false;
            self.publish(&mut inner, now);
        }
        drop(inner);
        if let Some(grant) = given_back {
            self.home.settle(grant.given_back());
        }
        !rests
    }

    /// What the server is to be told of it, if there is anything.
    pub(in crate::breaker) fn delta(&self, now: Time) -> Option<v1::CircuitDelta> {
        let mut inner = self.inner.lock();
        self.read(&mut inner, now);
        self.fit(&mut inner);
        if inner.news.is_empty() || !inner.is_breaker() || now < inner.not_shared_until {
            return None;
        }
        let generation = inner.shared.generation();
        let mut news = News::default();
        if generation == 0 {
            // It tells nothing but that it does not know.
            let asked_at = inner.asked_generation_at;
            if asked_at.is_some_and(|asked_at| now < asked_at.after(UNKNOWN_EVERY)) {
                return None;
            }
            inner.asked_generation_at = Some(now);
        } else {
            news = mem::take(&mut inner.news);
        }
        inner.has_hurried = false;
        Some(news.delta(&self.binding, generation))
    }

    /// Gives back what it holds, as the client ends.
    pub(in crate::breaker) fn close(&self) -> Option<v1::GrantOutcome> {
        self.inner.lock().pocket.take().map(Grant::given_back)
    }

    /// Adds what it decided by itself.
    pub(in crate::breaker) fn count(&self, counts: &mut Counted) {
        {
            let mut inner = self.inner.lock();
            self.read(&mut inner, self.home.now());
            counts.memory += inner.by_memory;
            counts.local += inner.by_local;
        }
        let memory = self.refusals.by_memory.load(Ordering::Relaxed);
        let local = self.refusals.by_local.load(Ordering::Relaxed);
        counts.memory += memory;
        counts.local += local;
        counts.rejected += memory + local;
    }

    /// Whether no call came for so long.
    pub(in crate::breaker) fn is_idle(&self, time: Duration, now: Time) -> bool {
        let inner = self.inner.lock();
        !inner.is_active && inner.used_at.after(time) <= now
    }

    /// Whether the server is told of it.
    pub(in crate::breaker) fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// The user's settings have changed: the next call goes by them.
    pub(in crate::breaker) fn is_set(self: &Arc<Self>) {
        let now = self.home.now();
        let changes = {
            let mut inner = self.inner.lock();
            self.visit(&mut inner, now);
            inner.turn(now, 0, circuit::Circuit::touch);
            self.publish(&mut inner, now)
        };
        self.tell(changes);
    }
}
