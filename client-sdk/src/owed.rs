//! What is owed to the server: how grants ended, until the next report tells of it.

use std::collections::VecDeque;

use fusebox_proto::v1;
use parking_lot::Mutex;

use crate::{
    part::Draft,
    telemetry::{Event, Telemetry},
};

/// Ends of grants that wait for a report, at most: ten reports full. While no session is up more end than can be told,
/// and those of long ago have expired by themselves.
const OWED_MOST: usize = 10_000;

/// Ends of grants, in the order in which they ended.
#[derive(Debug, Default)]
pub(crate) struct Owed {
    outcomes: Mutex<VecDeque<v1::GrantOutcome>>,
}

impl Owed {
    /// Has the next report tell of it. Where there is no room, the one that waits for longest is dropped: its grant
    /// ends when it expires.
    pub(crate) fn push(&self, outcome: v1::GrantOutcome, telemetry: &Telemetry) {
        let mut outcomes = self.outcomes.lock();
        let full = outcomes.len() >= OWED_MOST;
        if full {
            outcomes.pop_front();
        }
        outcomes.push_back(outcome);
        drop(outcomes);
        if full {
            telemetry.tell(&Event::Dropped { what: "ends of grants", count: 1 });
        }
    }

    /// Moves into a report as much as there is room for; tells whether that was all.
    pub(crate) fn report(&self, draft: &mut Draft) -> bool {
        let mut outcomes = self.outcomes.lock();
        let most = draft.room_for_outcomes().min(outcomes.len());
        draft.outcomes.extend(outcomes.drain(..most));
        outcomes.is_empty()
    }

    /// Forgets all: it was owed to somebody else.
    pub(crate) fn forget(&self) {
        self.outcomes.lock().clear();
    }
}
