//! What the server counts: plain atomics, so that counting neither allocates nor locks.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use crossbeam_utils::CachePadded;
use fusebox_core::{Admission, Decision, Reason};

use crate::storage::journal::Stats;

/// What can become of one ask: the decision is the Acquire's, the reason the ask's own.
pub const DECISION_LABELS: [(&str, &str); 4] =
    [("allow", ""), ("deny", ""), ("deny", "rate_limited"), ("deny", "blocked")];

/// Decisions of one policy.
#[derive(Debug, Default)]
pub struct Decisions {
    counts: CachePadded<[AtomicU64; DECISION_LABELS.len()]>,
    debt_dropped: AtomicU64,
}

impl Decisions {
    /// Counts what became of one ask of `decision`.
    pub fn count(&self, decision: &Decision, ask: Admission) {
        let index = match ask {
            _ if decision.allowed => 0,
            Admission::Allow => 1,
            Admission::Deny { reason: Reason::RateLimited, .. } => 2,
            Admission::Deny { reason: Reason::Blocked, .. } => 3,
        };
        self.counts[index].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts tokens of debt that were forgiven, because the cell owed as much as it may.
    pub fn count_dropped_debt(&self, tokens: u64) {
        self.debt_dropped.fetch_add(tokens, Ordering::Relaxed);
    }

    /// How many asks each of [`DECISION_LABELS`] became of.
    pub fn counts(&self) -> [u64; DECISION_LABELS.len()] {
        self.counts.each_ref().map(|count| count.load(Ordering::Relaxed))
    }

    /// Tokens of debt that were forgiven.
    pub fn debt_dropped(&self) -> u64 {
        self.debt_dropped.load(Ordering::Relaxed)
    }
}

/// Outcomes of reports by their result.
#[derive(Debug, Default)]
pub struct Reports {
    /// Settled a grant.
    pub applied: AtomicU64,
    /// Came again.
    pub duplicate: AtomicU64,
    /// Named no open grant.
    pub unknown_grant: AtomicU64,
}

/// What the writer does.
#[derive(Debug, Default)]
pub struct Disk {
    /// Marks that wait to be written.
    pub queued: Arc<AtomicUsize>,
    /// Records written or deleted.
    pub records: AtomicU64,
    /// Commits of them.
    pub commits: AtomicU64,
    /// Times that the disk was asked to keep what it was given.
    pub syncs: AtomicU64,
    /// Times that what is alive was moved to a fresh store.
    pub rotations: AtomicU64,
    /// Bytes of the store.
    pub bytes: AtomicU64,
}

impl Disk {
    /// What the journal itself counts.
    pub(crate) fn set(&self, Stats { syncs, rotations, bytes }: Stats) {
        self.syncs.store(syncs, Ordering::Relaxed);
        self.rotations.store(rotations, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
    }
}

/// Connections of one port.
#[derive(Debug, Default)]
pub struct Connections {
    /// Open now.
    pub open: Arc<AtomicUsize>,
    /// Closed at once, because as many were open as may be.
    pub refused: AtomicU64,
}
