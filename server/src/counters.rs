//! What the server counts: plain atomics, so that counting neither allocates nor locks.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use crossbeam_utils::CachePadded;
use fusebox_core::{
    Admission, Reason, Verdict,
    circuit::{Passage, Refusal},
};

use crate::{app::Crossed, storage::journal::Stats};

/// What can become of one ask: the decision is the Acquire's, the reason the ask's own. An ask that only
/// watches has a reason also where its Acquire is allowed.
pub const DECISION_LABELS: [(&str, &str); 2 * REASONS.len()] = {
    let mut labels = [("", ""); 2 * REASONS.len()];
    let mut index = 0;
    while index < REASONS.len() {
        labels[index] = ("allow", REASONS[index]);
        labels[REASONS.len() + index] = ("deny", REASONS[index]);
        index += 1;
    }
    labels
};

const REASONS: [&str; 13] = [
    "",
    "rate_limited",
    "concurrency_limited",
    "retry_budget_exhausted",
    "reserved_for_priority",
    "overflow_bucket",
    "line_full",
    "blocked",
    "circuit_open",
    "circuit_forced_open",
    "probes_in_use",
    "ramping",
    "not_shared",
];

fn index_of(admission: Admission) -> usize {
    match admission {
        Admission::Allow => 0,
        Admission::Deny { reason, .. } => match reason {
            Reason::RateLimited => 1,
            Reason::ConcurrencyLimited => 2,
            Reason::RetryBudgetExhausted => 3,
            Reason::ReservedForPriority => 4,
            Reason::OverflowBucket => 5,
            Reason::LineFull => 6,
            Reason::Blocked => 7,
        },
    }
}

fn index_of_crossing(crossed: &Crossed) -> usize {
    match crossed.passage {
        Passage::Refused { refusal, .. } => match refusal {
            Refusal::Open => 8,
            Refusal::ForcedOpen => 9,
            Refusal::ProbesInUse => 10,
            Refusal::Ramping => 11,
        },
        Passage::Free if crossed.view.is_none() => 12,
        Passage::Free | Passage::Probe => 0,
    }
}

/// How often files of rules were loaded.
#[derive(Debug, Default)]
pub struct RuleLoads {
    succeeded: AtomicU64,
    failed: AtomicU64,
}

impl RuleLoads {
    /// They are in force.
    pub fn succeeded(&self) {
        self.succeeded.fetch_add(1, Ordering::Relaxed);
    }

    /// Something is wrong with them.
    pub fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// By what became of it.
    pub fn counts(&self) -> [(&'static str, u64); 2] {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        [("ok", count(&self.succeeded)), ("error", count(&self.failed))]
    }
}

/// Decisions of one policy.
#[derive(Debug, Default)]
pub struct Decisions {
    counts: CachePadded<[AtomicU64; DECISION_LABELS.len()]>,
    debt_dropped: AtomicU64,
}

impl Decisions {
    /// Counts what became of an ask of a circuit.
    pub fn count_crossing(&self, allowed: bool, crossed: &Crossed) {
        let deny = if allowed { 0 } else { REASONS.len() };
        self.counts[deny + index_of_crossing(crossed)].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts what became of one ask of an Acquire.
    pub fn count(&self, allowed: bool, verdict: &Verdict) {
        let deny = if allowed { 0 } else { REASONS.len() };
        self.counts[deny + index_of(verdict.admission)].fetch_add(1, Ordering::Relaxed);
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
