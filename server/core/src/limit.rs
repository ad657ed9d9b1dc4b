//! The sum of all kinds.

use core::time::Duration;

use crate::{
    Ask, Concurrency, Kind, Mark, Moment, Plan, Reason, RetryBudget, Settled, Settlement,
    SlidingWindow, Time, TokenBucket, WindowLimit, concurrency, retry_budget, sliding_window,
    token_bucket, window,
};

/// The settings of one limiter, of any kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// A token bucket.
    TokenBucket(TokenBucket),
    /// A fixed window, or one of a calendar.
    Window(WindowLimit),
    /// A sliding window.
    SlidingWindow(SlidingWindow),
    /// Permits.
    Concurrency(Concurrency),
    /// A retry budget.
    RetryBudget(RetryBudget),
}

/// What one cell remembers, of any kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A token bucket's.
    TokenBucket(token_bucket::State),
    /// That of a fixed window, or of one of a calendar.
    Window(window::State),
    /// A sliding window's.
    SlidingWindow(sliding_window::State),
    /// That of permits.
    Concurrency(concurrency::State),
    /// A retry budget's.
    RetryBudget(retry_budget::State),
}

/// A kind, as a part of the sum.
trait Part: Kind {
    fn settings(limit: &Limit) -> Option<&Self>;
    fn part(state: State) -> Option<Self::State>;
    fn whole(state: Self::State) -> State;

    /// The state as this kind's own. That of another is a mistake, and counts as spent.
    fn own(&self, state: State, now: Moment) -> Self::State {
        Self::part(state).unwrap_or_else(|| self.having_spent(self.capacity(), now))
    }
}

macro_rules! parts {
    ($($variant:ident: $kind:ty),*) => {
        $(impl Part for $kind {
            fn settings(limit: &Limit) -> Option<&Self> {
                if let Limit::$variant(kind) = limit { Some(kind) } else { None }
            }

            fn part(state: State) -> Option<Self::State> {
                if let State::$variant(state) = state { Some(state) } else { None }
            }

            fn whole(state: Self::State) -> State {
                State::$variant(state)
            }
        })*
    };
}

parts!(
    TokenBucket: TokenBucket,
    Window: WindowLimit,
    SlidingWindow: SlidingWindow,
    Concurrency: Concurrency,
    RetryBudget: RetryBudget
);

/// The same said of whichever kind it is.
macro_rules! each {
    ($limit:expr, $kind:ident => $said:expr) => {
        match $limit {
            Limit::TokenBucket($kind) => $said,
            Limit::Window($kind) => $said,
            Limit::SlidingWindow($kind) => $said,
            Limit::Concurrency($kind) => $said,
            Limit::RetryBudget($kind) => $said,
        }
    };
}

impl Limit {
    /// Why an ask is denied when nothing is left.
    #[must_use]
    pub const fn exhausted(&self) -> Reason {
        match self {
            Self::TokenBucket(_) | Self::Window(_) | Self::SlidingWindow(_) => Reason::RateLimited,
            Self::Concurrency(_) => Reason::ConcurrencyLimited,
            Self::RetryBudget(_) => Reason::RetryBudgetExhausted,
        }
    }

    /// Whether both are of one kind, so that each knows what a cell of the other remembers.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        core::mem::discriminant(self) == core::mem::discriminant(other)
    }
}

impl State {
    /// What is to be on disk of the cell while it lives, when that is its mark.
    #[must_use]
    pub fn kept(self, mark: Mark) -> Self {
        match self {
            Self::TokenBucket(state) => Self::TokenBucket(state.kept(mark)),
            Self::Window(state) => Self::Window(state.kept(mark)),
            Self::SlidingWindow(state) => Self::SlidingWindow(state.kept(mark)),
            Self::Concurrency(state) => Self::Concurrency(state.kept(mark)),
            Self::RetryBudget(_) => self,
        }
    }

    /// The mark that covers the state and nothing more, made at `at`.
    #[must_use]
    pub const fn lowest_mark(&self, at: Time) -> Mark {
        match self {
            Self::TokenBucket(state) => state.lowest_mark(),
            Self::Window(state) => state.lowest_mark(at),
            Self::SlidingWindow(state) => state.lowest_mark(at),
            Self::Concurrency(state) => state.lowest_mark(at),
            Self::RetryBudget(_) => Mark { spent: 0, at },
        }
    }

    /// The same with so many of the spent tokens out, where refill has to know it; permits are all held.
    #[must_use]
    pub fn with_out(self, out: u64) -> Self {
        match self {
            Self::TokenBucket(state) => {
                Self::TokenBucket(token_bucket::State { out: out.min(state.spent), ..state })
            }
            other => other,
        }
    }

    /// Tokens that may still come back: those of open grants.
    #[must_use]
    pub const fn out(&self) -> u64 {
        match self {
            Self::TokenBucket(state) => state.out,
            Self::Concurrency(state) => state.held,
            Self::Window(_) | Self::SlidingWindow(_) | Self::RetryBudget(_) => 0,
        }
    }
}

impl Kind for Limit {
    type State = State;

    fn capacity(&self) -> u64 {
        each!(self, kind => kind.capacity())
    }

    #[inline]
    fn plan(&self, state: Option<State>, ask: Ask, now: Moment) -> Plan<State> {
        each!(self, kind => plan(kind, state, ask, now))
    }

    fn settle(&self, state: Option<State>, settlement: Settlement, now: Moment) -> Settled<State> {
        each!(self, kind => settle(kind, state, settlement, now))
    }

    fn mark(&self, state: State, step: u64, now: Moment) -> Mark {
        each!(self, kind => kind.mark(kind.own(state, now), step, now))
    }

    fn max_step(&self) -> u64 {
        each!(self, kind => kind.max_step())
    }

    fn covers(&self, mark: Mark, before: State, after: State) -> bool {
        each!(self, kind => covers(kind, mark, before, after))
    }

    fn revive(&self, state: State, held: u64, now: Moment) -> State {
        each!(self, kind => revive(kind, state, held, now))
    }

    fn spent(&self, state: State, now: Moment) -> u64 {
        each!(self, kind => kind.spent(kind.own(state, now), now))
    }

    fn having_spent(&self, tokens: u64, at: Moment) -> State {
        each!(self, kind => having_spent(kind, tokens, at))
    }

    fn fills_in(&self) -> Option<Duration> {
        each!(self, kind => kind.fills_in())
    }

    fn full_at(&self, state: State, now: Moment) -> Option<Time> {
        each!(self, kind => kind.full_at(kind.own(state, now), now))
    }

    fn rebase(&self, state: State, older: Option<&Self>, at: Moment) -> State {
        match older {
            Some(older) if !self.is_like(older) => {
                self.having_spent(older.spent(state, at).min(self.capacity()), at)
            }
            _ => each!(self, kind => rebase(kind, state, older, at)),
        }
    }
}

#[inline]
fn plan<K: Part>(kind: &K, state: Option<State>, ask: Ask, now: Moment) -> Plan<State> {
    let plan = kind.plan(state.map(|state| kind.own(state, now)), ask, now);
    Plan {
        admission: plan.admission,
        spent: plan.spent,
        limit: plan.limit,
        before: plan.before,
        after: plan.after,
        charged: plan.charged.map(K::whole),
        granted: plan.granted,
        slice: plan.slice,
    }
}

fn settle<K: Part>(
    kind: &K,
    state: Option<State>,
    settlement: Settlement,
    now: Moment,
) -> Settled<State> {
    let settled = kind.settle(state.map(|state| kind.own(state, now)), settlement, now);
    Settled {
        state: settled.state.map(K::whole),
        refunded: settled.refunded,
        owed: settled.owed,
        dropped: settled.dropped,
    }
}

fn covers<K: Part>(kind: &K, mark: Mark, before: State, after: State) -> bool {
    let states = K::part(before).zip(K::part(after));
    states.is_some_and(|(before, after)| kind.covers(mark, before, after))
}

fn revive<K: Part>(kind: &K, state: State, held: u64, now: Moment) -> State {
    K::whole(kind.revive(kind.own(state, now), held, now))
}

fn having_spent<K: Part>(kind: &K, tokens: u64, at: Moment) -> State {
    K::whole(kind.having_spent(tokens, at))
}

fn rebase<K: Part>(kind: &K, state: State, older: Option<&Limit>, at: Moment) -> State {
    let older = older.and_then(K::settings);
    K::whole(kind.rebase(kind.own(state, at), older, at))
}
