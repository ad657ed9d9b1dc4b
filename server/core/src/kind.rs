//! What a kind of limiter must know.

use core::time::Duration;

use crate::{
    Time,
    token_bucket::{self, TokenBucket},
};

/// What a limiter must know for its cells to be decided, stored and recovered.
///
/// An absent state means a full one everywhere: a cell that nobody charged needs no memory.
pub trait Kind: Sized {
    /// What one cell remembers.
    type State: Copy + From<Self::Mark>;

    /// What is kept of a cell on disk while it lives: an upper bound of what it has spent. Made of a state
    /// alone, it covers that and nothing more.
    type Mark: Copy + From<Self::State>;

    /// Most that an ask could ever be granted at once. More is never possible; 0 blocks all.
    fn capacity(&self) -> u64;

    /// Decides one ask, and says what the cell would be after it.
    fn plan(&self, state: Option<Self::State>, cost: Cost, now: Time) -> Plan<Self::State>;

    /// Corrects a charge by what it really cost.
    fn settle(
        &self,
        state: Option<Self::State>,
        settlement: Settlement,
        now: Time,
    ) -> Settled<Self::State>;

    /// A mark that covers `state`, and the next `step` tokens if they are charged at once.
    ///
    /// As time refills it, it covers less: [`covers`](Self::covers) tells.
    fn mark(&self, state: Self::State, step: u64) -> Self::Mark;

    /// The longest step of a mark: what a crash may take from one cell.
    fn max_step(&self) -> u64;

    /// Whether recovering from `mark` instead of `state` admits nothing that `state` would not.
    fn covers(&self, mark: Self::Mark, state: Self::State) -> bool;

    /// The state to go on with after a restart at `now`, when `state` is all that is left.
    fn revive(&self, state: Self::State, now: Time) -> Self::State;

    /// A state with nothing left in it, but no debt.
    fn empty(&self, at: Time) -> Self::State;

    /// Time in which an empty cell fills; `None` if it never does.
    fn fills_in(&self) -> Option<Duration>;

    /// When the cell will be full, and so may leave memory and disk; `None` while something is owed to it.
    fn full_at(&self, state: Self::State) -> Option<Time>;

    /// `state`, counted under `older` until `at`, in the terms of these settings. What was spent stays
    /// spent; under settings that nobody remembers (`None`) nothing is refilled.
    fn rebase(&self, state: Self::State, older: Option<&Self>, at: Time) -> Self::State;
}

/// What one ask wants of one cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Tokens to charge; 0 is a peek.
    pub tokens: u64,
    /// They are an estimate, to be settled later.
    pub estimated: bool,
}

/// What a charge really cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settlement {
    /// Tokens charged as an estimate.
    pub charged: u64,
    /// Tokens that the call really cost.
    pub actual: u64,
    /// Most tokens that a cell may owe beyond an empty bucket.
    pub max_debt: u64,
}

/// What a settlement did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled<S> {
    /// The cell after it; `None` stays absent.
    pub state: Option<S>,
    /// Tokens given back.
    pub refunded: u64,
    /// Tokens charged on top.
    pub owed: u64,
    /// Tokens above `max_debt`, not charged.
    pub dropped: u64,
}

/// The answer to one ask, and the states to choose from at commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan<S> {
    /// The answer.
    pub admission: Admission,
    /// Most tokens that could ever be granted at once.
    pub limit: u64,
    /// The cell as it is.
    pub before: Level,
    /// The cell after the charge.
    pub after: Level,
    /// The state after the charge: of a denied ask, with the cell drained; `None` if there is nothing to
    /// store.
    pub charged: Option<S>,
}

/// How full a cell is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// Whole tokens that could be charged now.
    pub remaining: u64,
    /// Time until the cell is full if nobody charges it.
    pub reset_after: Duration,
}

/// Whether an ask may be charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It may.
    Allow,
    /// It may not.
    Deny {
        /// Why.
        reason: Reason,
        /// Time after which a lone caller would be allowed; `None` if waiting does not mend it.
        retry_after: Option<Duration>,
    },
}

/// Why an ask was denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The rate is used up.
    RateLimited,
    /// The policy denies all: its limit is 0.
    Blocked,
}

/// The settings of one limiter, of any kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// A token bucket.
    TokenBucket(TokenBucket),
}

/// What one cell remembers, of any kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A token bucket's.
    TokenBucket(token_bucket::State),
}

/// What is kept on disk of one living cell, of any kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// A token bucket's.
    TokenBucket(token_bucket::Mark),
}

impl State {
    /// Tokens that may still come back: those of open estimates.
    #[must_use]
    pub const fn out(&self) -> u64 {
        let Self::TokenBucket(state) = self;
        state.out
    }

    /// The state with so many of its spent tokens out.
    #[must_use]
    pub fn with_out(self, out: u64) -> Self {
        let Self::TokenBucket(state) = self;
        Self::TokenBucket(token_bucket::State { out: out.min(state.spent), ..state })
    }
}

impl Mark {
    /// When the mark was made.
    #[must_use]
    pub const fn at(&self) -> Time {
        let Self::TokenBucket(mark) = self;
        mark.at
    }
}

impl From<State> for Mark {
    fn from(state: State) -> Self {
        let State::TokenBucket(state) = state;
        Self::TokenBucket(state.into())
    }
}

impl From<Mark> for State {
    fn from(mark: Mark) -> Self {
        let Mark::TokenBucket(mark) = mark;
        Self::TokenBucket(mark.into())
    }
}

impl Kind for Limit {
    type State = State;
    type Mark = Mark;

    fn capacity(&self) -> u64 {
        let Self::TokenBucket(bucket) = self;
        bucket.capacity()
    }

    #[inline]
    fn plan(&self, state: Option<State>, cost: Cost, now: Time) -> Plan<State> {
        let Self::TokenBucket(bucket) = self;
        let plan = bucket.plan(state.map(token_bucket), cost, now);
        Plan {
            admission: plan.admission,
            limit: plan.limit,
            before: plan.before,
            after: plan.after,
            charged: plan.charged.map(State::TokenBucket),
        }
    }

    fn settle(&self, state: Option<State>, settlement: Settlement, now: Time) -> Settled<State> {
        let Self::TokenBucket(bucket) = self;
        let settled = bucket.settle(state.map(token_bucket), settlement, now);
        Settled {
            state: settled.state.map(State::TokenBucket),
            refunded: settled.refunded,
            owed: settled.owed,
            dropped: settled.dropped,
        }
    }

    fn mark(&self, state: State, step: u64) -> Mark {
        let Self::TokenBucket(bucket) = self;
        Mark::TokenBucket(bucket.mark(token_bucket(state), step))
    }

    fn max_step(&self) -> u64 {
        let Self::TokenBucket(bucket) = self;
        bucket.max_step()
    }

    fn covers(&self, mark: Mark, state: State) -> bool {
        let (Self::TokenBucket(bucket), Mark::TokenBucket(mark)) = (self, mark);
        bucket.covers(mark, token_bucket(state))
    }

    fn revive(&self, state: State, now: Time) -> State {
        let Self::TokenBucket(bucket) = self;
        State::TokenBucket(bucket.revive(token_bucket(state), now))
    }

    fn empty(&self, at: Time) -> State {
        let Self::TokenBucket(bucket) = self;
        State::TokenBucket(bucket.empty(at))
    }

    fn fills_in(&self) -> Option<Duration> {
        let Self::TokenBucket(bucket) = self;
        bucket.fills_in()
    }

    fn full_at(&self, state: State) -> Option<Time> {
        let Self::TokenBucket(bucket) = self;
        bucket.full_at(token_bucket(state))
    }

    fn rebase(&self, state: State, older: Option<&Self>, at: Time) -> State {
        let Self::TokenBucket(bucket) = self;
        let older = older.map(|Self::TokenBucket(older)| older);
        State::TokenBucket(bucket.rebase(token_bucket(state), older, at))
    }
}

fn token_bucket(state: State) -> token_bucket::State {
    let State::TokenBucket(state) = state;
    state
}
