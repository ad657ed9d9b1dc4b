//! A policy as the decision sees it, and the cells counted under it.

use arrayvec::ArrayVec;

use crate::{Kind, Limit, Moment, State, Time};

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
    /// The first revision since which it has been of one kind.
    pub like_since: u32,
    /// Most tokens that a cell may owe beyond an empty bucket.
    pub max_debt: u64,
    /// What the limiter was before.
    pub formers: Formers,
    /// What a cell that is not there is: full if `None`. After a crash nobody knows what keys that are not
    /// written down had spent, so they were emptied then.
    pub absent: Option<Cell>,
}

/// What a policy was before a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Former {
    /// The revision that these settings were.
    pub revision: u32,
    /// The settings.
    pub limit: Limit,
    /// When they were replaced.
    pub until: Moment,
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
        Self { limit, revision: 1, like_since: 1, max_debt, formers: Formers::new(), absent: None }
    }

    /// The policy's next revision: `limit` from `at` on.
    #[must_use]
    pub fn changed(&self, limit: Limit, at: Moment) -> Self {
        let mut formers = self.formers.clone();
        if formers.is_full() {
            formers.remove(0);
        }
        formers.push(Former { revision: self.revision, limit: self.limit, until: at });
        let revision = self.revision + 1;
        let like_since = if limit.is_like(&self.limit) { self.like_since } else { revision };
        Self { limit, revision, like_since, formers, ..*self }
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

    /// The state of a cell that may not be there; `None` is full.
    #[must_use]
    pub fn state(&self, cell: Option<Cell>) -> Option<State> {
        cell.or(self.absent).map(|cell| self.current(cell))
    }

    /// A cell that was counted under another policy until now, as one of this: what was spent stays spent.
    #[must_use]
    pub fn adopted(&self, cell: Cell, other: &Self, now: Moment) -> Cell {
        let cell = other.overtaken(cell, now);
        let state = self.limit.rebase(other.current(cell), Some(&other.limit), now);
        Cell { revision: self.revision, state }
    }

    /// A cell that was counted under a policy that nobody here knows, as one of this: what was spent stays
    /// spent, and nothing is refilled.
    #[must_use]
    pub fn adopted_of_unknown(&self, cell: Cell, now: Moment) -> Cell {
        Cell { revision: self.revision, state: self.limit.rebase(cell.state, None, now) }
    }

    /// `cell` as these settings can know it where they are not the latest any more: of one that was counted in
    /// later ones, what was spent stays spent, and nothing is refilled.
    #[must_use]
    pub fn overtaken(&self, cell: Cell, now: Moment) -> Cell {
        if cell.revision <= self.revision {
            return cell;
        }
        self.adopted_of_unknown(cell, now)
    }

    /// Whether what was charged in that revision can still be given back: a cell that was of another kind
    /// since knows nothing of it.
    #[must_use]
    pub fn is_like_since(&self, revision: u32) -> bool {
        (self.like_since..=self.revision).contains(&revision)
    }

    /// `cell` after a holder that a crash forgot has told of `permits` that it holds: they are its own again.
    /// `None` if there are none that nobody has told of.
    #[must_use]
    pub fn attested(&self, cell: Cell, permits: u64, now: Moment) -> Option<Cell> {
        let State::Concurrency(state) = self.current(cell) else { return None };
        let state = State::Concurrency(state.attested(permits, now.time)?);
        Some(Cell { revision: self.revision, state })
    }

    /// `cell` as if nothing had been spent but what open grants hold, of each slice so much as `held` says.
    #[must_use]
    pub fn reset(&self, cell: Cell, held: impl Fn(u64) -> u64, now: Moment) -> Cell {
        let state = match self.current(cell) {
            State::TokenBucket(state) => State::TokenBucket(state.reset()),
            State::Concurrency(state) => State::Concurrency(state.reset()),
            State::SlidingWindow(state) => State::SlidingWindow(state.reset(held)),
            State::Window(state) if held(state.end.as_nanos()) > 0 => {
                State::Window(state.reset(held))
            }
            _ => self.limit.having_spent(0, now),
        };
        Cell { revision: self.revision, state }
    }

    /// When `cell` may leave memory and disk: it is full then, and so is one that is not there. `None` while
    /// something is owed to it.
    #[must_use]
    pub fn leaves_at(&self, cell: Cell, now: Moment) -> Option<Time> {
        let full_at = self.limit.full_at(self.current(cell), now)?;
        Some(full_at.max(self.absent_full_at(now)?))
    }

    /// When a cell that is not there is full; `None` if never.
    #[must_use]
    pub fn absent_full_at(&self, now: Moment) -> Option<Time> {
        self.absent.map_or(Some(Time::ZERO), |cell| self.limit.full_at(self.current(cell), now))
    }

    /// Every cell that is not there is empty as of `at`: a crash forgot what it had spent.
    #[must_use]
    pub fn emptied(&self, at: Moment) -> Self {
        let state = self.limit.having_spent(self.limit.capacity(), at);
        let empty = Cell { revision: self.revision, state };
        Self { absent: Some(empty), formers: self.formers.clone(), ..*self }
    }
}
