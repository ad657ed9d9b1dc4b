//! What all circuits of a client have in common.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use fusebox_core::Time;
use fusebox_proto::v1;
use parking_lot::Mutex;

use super::circuit::Circuit;
use crate::{context::Context, telemetry::Event};

/// Outcomes of probes that wait for a report, at most: a few for each circuit that is half-open at a time. A probe that
/// is not told of has failed, when its time is over.
const OUTCOMES_MOST: usize = 10_000;

/// What all circuits of a client have in common.
pub(super) struct Home {
    pub(super) context: Arc<Context>,
    /// Until when all is believed that a Watch told, in nanoseconds.
    watched_until: AtomicU64,
    /// Circuits that have something to tell, or had of late.
    pub(super) active: Mutex<Vec<Arc<Circuit>>>,
    /// How probes went.
    pub(super) outcomes: Mutex<VecDeque<v1::GrantOutcome>>,
    pub(super) is_closed: AtomicBool,
}

impl Home {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            watched_until: AtomicU64::new(0),
            active: Mutex::default(),
            outcomes: Mutex::default(),
            is_closed: AtomicBool::new(false),
        }
    }

    pub(super) fn now(&self) -> Time {
        self.context.clock.now()
    }

    pub(super) fn watched_until(&self) -> Time {
        Time::from_nanos(self.watched_until.load(Ordering::Acquire))
    }

    pub(super) fn is_watched_until(&self, until: Time) {
        self.watched_until.store(until.as_nanos(), Ordering::Release);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// Tells the server how a probe went, at once: others wait for it.
    pub(super) fn settle(&self, outcome: v1::GrantOutcome) {
        let is_room = {
            let mut outcomes = self.outcomes.lock();
            let is_room = outcomes.len() < OUTCOMES_MOST;
            if is_room {
                outcomes.push_back(outcome);
            }
            is_room
        };
        if is_room {
            self.context.exchange.hurry();
        } else {
            let dropped = Event::Dropped { what: "outcomes of probes", count: 1 };
            self.context.telemetry.tell(&dropped);
        }
    }
}
