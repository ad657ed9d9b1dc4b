//! A policy as the decision sees it, and the cells counted under it.

use arrayvec::ArrayVec;

use crate::{Kind, Limit, State, Time};

/// How many earlier settings of a policy are remembered. A cell that slept through more changes is
/// refilled by nothing up to the end of the oldest one known.
pub const MAX_FORMERS: usize = 8;

/// Earlier settings of a policy, oldest first.
pub type Formers = ArrayVec<Former, MAX_FORMERS>;

/// What decides: a limiter, its revision, and what it was before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The limiter.
    pub limit: Limit,
    /// Counts the changes of [`limit`](Self::limit).
    pub revision: u32,
    /// Most tokens that a cell may owe beyond an empty bucket.
    pub max_debt: u64,
    /// What the limiter was before.
    pub formers: Formers,
}

/// What a policy was before a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Former {
    /// The revision that these settings were.
    pub revision: u32,
    /// The settings.
    pub limit: Limit,
    /// When they were replaced.
    pub until: Time,
}

/// Stored state of one policy and key, and the revision it was counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Revision of the policy that the state was counted in.
    pub revision: u32,
    /// What the cell remembers.
    pub state: State,
}

impl Policy {
    /// A policy that has never been another.
    #[must_use]
    pub fn new(limit: Limit, max_debt: u64) -> Self {
        Self { limit, revision: 1, max_debt, formers: Formers::new() }
    }

    /// The policy's next revision: `limit` from `at` on.
    #[must_use]
    pub fn changed(&self, limit: Limit, at: Time) -> Self {
        let mut formers = self.formers.clone();
        if formers.is_full() {
            formers.remove(0);
        }
        formers.push(Former { revision: self.revision, limit: self.limit, until: at });
        Self { limit, revision: self.revision + 1, max_debt: self.max_debt, formers }
    }

    /// The state of `cell` in the terms of this revision: the first touch after a change converts it.
    ///
    /// Time is counted at the rate that was in force, change by change.
    #[must_use]
    pub fn current(&self, cell: Cell) -> State {
        let mut counted = (cell.revision != self.revision).then_some(cell.revision);
        let mut state = cell.state;
        for (index, former) in self.formers.iter().enumerate() {
            let Some(revision) = counted.filter(|revision| *revision <= former.revision) else {
                continue;
            };
            let older = (revision == former.revision).then_some(&former.limit);
            let newer = self.formers.get(index + 1);
            state =
                newer.map_or(&self.limit, |newer| &newer.limit).rebase(state, older, former.until);
            counted = Some(former.revision + 1);
        }
        state
    }

    /// When `cell` will be full, and so may leave memory and disk.
    #[must_use]
    pub fn full_at(&self, cell: Cell) -> Option<Time> {
        self.limit.full_at(self.current(cell))
    }
}
