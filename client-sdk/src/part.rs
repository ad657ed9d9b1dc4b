//! What the session does for each part of the client: limiters, bulkheads, breakers and retry budgets.

use std::sync::Arc;

use fusebox_core::Time;
use fusebox_proto::v1;

use crate::telemetry::Counts;

/// Outcomes, deltas and renewals of one report, at most: the server's limit.
pub(crate) const REPORT_MOST: usize = 1_000;

/// Most of one count of a delta: the server's limit.
pub(crate) const COUNT_MOST: u64 = 1_000_000_000;

/// A part of the client that has something to say, and wants to hear.
///
/// All of it is called by one task, never from a call of a user; none of it may wait.
pub(crate) trait Part: Send + Sync + 'static {
    /// Called each 50 ms, whether or not a session is up: looks after what time does to it.
    fn tend(&self, now: Time);

    /// Adds what there is to say. Only called if the report before was answered; what is added here is sent until
    /// it is answered, also over a reconnect, and not asked for again. Deltas name policy and key, never a handle:
    /// the session that carries them may be another one.
    fn report(&self, draft: &mut Draft, now: Time);

    /// The answer to a report of which this part may have said something. There may be less in it than was said: after
    /// a restart deltas and renewals are not sent again, and what is too large is answered in pages. A report that the
    /// server refuses for a mistake is an event, and not told.
    fn reported(&self, response: &v1::ReportResponse, sent: Time);

    /// Breakers that it wants to watch. Looked at on each beat; another answer than before begins another Watch.
    fn watches(&self) -> Vec<Arc<str>> {
        Vec::new()
    }

    /// A message of the Watch, and when the Watch was asked for.
    fn watched(&self, news: &v1::WatchResponse, sent: Time) {
        let _ = (news, sent);
    }

    /// A session is up, or none is any more.
    fn linked(&self, link: Link, now: Time);

    /// Adds what its handles counted by themselves.
    fn count(&self, counts: &mut Counts) {
        let _ = counts;
    }

    /// The client ends: the last report gets all that is held, and nothing is asked for any more. The draft is this
    /// part's own, and may have more than [`REPORT_MOST`] of each: it is sent in pages.
    fn close(&self, draft: &mut Draft, now: Time);
}

/// How the client stands to its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    /// No session is up.
    Down,
    /// One is up, with the very start of the server of before; or the first that ever is.
    Resumed,
    /// One is up, with another start on the same state: what was held is held, what only memory knew is gone there. Of
    /// a report without an answer only outcomes are sent again.
    Restarted,
    /// One is up, with another state: what was held of the other is worth nothing.
    Replaced,
}

/// A report that is being made.
#[derive(Debug, Default)]
pub(crate) struct Draft {
    pub(crate) outcomes: Vec<v1::GrantOutcome>,
    pub(crate) deltas: Vec<v1::CircuitDelta>,
    pub(crate) renew_grant_ids: Vec<String>,
}

impl Draft {
    /// Outcomes that there is room for.
    pub(crate) fn room_for_outcomes(&self) -> usize {
        REPORT_MOST.saturating_sub(self.outcomes.len())
    }

    /// Deltas that there is room for.
    pub(crate) fn room_for_deltas(&self) -> usize {
        REPORT_MOST.saturating_sub(self.deltas.len())
    }

    /// Renewals that there is room for.
    pub(crate) fn room_for_renewals(&self) -> usize {
        REPORT_MOST.saturating_sub(self.renew_grant_ids.len())
    }

    /// Whether there is nothing to say.
    pub(crate) fn is_empty(&self) -> bool {
        self.outcomes.is_empty() && self.deltas.is_empty() && self.renew_grant_ids.is_empty()
    }
}
