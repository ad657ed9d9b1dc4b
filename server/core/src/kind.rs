//! What a kind of limiter must know, and what all of them speak of.

use core::time::Duration;

use crate::{Moment, Time, Window};

/// What a limiter must know for its cells to be decided, stored and recovered.
///
/// An absent state means a full one everywhere: a cell that nobody charged needs no memory.
pub trait Kind: Sized {
    /// What one cell remembers.
    type State: Copy + PartialEq;

    /// Most that an ask could ever be granted at once. More is never possible; 0 blocks all.
    fn capacity(&self) -> u64;

    /// Decides one ask, and says what the cell would be after it.
    fn plan(&self, state: Option<Self::State>, ask: Ask, now: Moment) -> Plan<Self::State>;

    /// Corrects a charge by what is known of it now.
    fn settle(
        &self,
        state: Option<Self::State>,
        settlement: Settlement,
        now: Moment,
    ) -> Settled<Self::State>;

    /// A mark that covers `state`, and the next `step` tokens if they are charged at once.
    ///
    /// As time refills it, it covers less: [`covers`](Self::covers) tells.
    fn mark(&self, state: Self::State, step: u64, now: Moment) -> Mark;

    /// The longest step of a mark: what a crash may take from one cell.
    fn max_step(&self) -> u64;

    /// Whether recovering from `mark` instead of `after` admits nothing that `after` would not. The mark
    /// was made of `before`, or of a state that became it without leaving its slice.
    fn covers(&self, mark: Mark, before: Self::State, after: Self::State) -> bool;

    /// The state to go on with after a restart at `now`, when `state` is all that is left. Of what it had
    /// spent, `held` belongs to grants that go on.
    fn revive(&self, state: Self::State, held: u64, now: Moment) -> Self::State;

    /// Tokens that cannot be had now, because somebody had them before.
    fn spent(&self, state: Self::State, now: Moment) -> u64;

    /// A state in which so many tokens have just been spent.
    fn having_spent(&self, tokens: u64, at: Moment) -> Self::State;

    /// Time in which an empty cell fills; `None` if it never does by time alone.
    fn fills_in(&self) -> Option<Duration>;

    /// When the cell will be full, or has been, and so may leave memory and disk; `None` while something is
    /// owed to it.
    fn full_at(&self, state: Self::State, now: Moment) -> Option<Time>;

    /// `state`, counted under `older` until `at`, in the terms of these settings. What was spent stays
    /// spent; under settings that nobody remembers (`None`) nothing is refilled.
    fn rebase(&self, state: Self::State, older: Option<&Self>, at: Moment) -> Self::State;
}

/// What one ask wants of one cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Tokens to charge; 0 is a peek.
    pub tokens: u64,
    /// What they are for.
    pub purpose: Purpose,
    /// Tokens of the capacity that this caller must leave to others.
    pub reserved: u64,
    /// The call is a retry: it withdraws from retry budgets, where a first one deposits.
    pub retry: bool,
    /// The calendar's window at this moment, for limiters that are counted in one.
    pub window: Option<Window>,
    /// Judges instead of a window's own limit: the cell counts for whatever limit it is asked by.
    pub limit: Option<u64>,
}

impl Ask {
    /// To spend so many tokens, now and for good; 0 is a peek.
    #[must_use]
    pub const fn spend(tokens: u64) -> Self {
        let purpose = Purpose::Spend;
        Self { tokens, purpose, reserved: 0, retry: false, window: None, limit: None }
    }

    /// The same, for another purpose.
    #[must_use]
    pub const fn to(self, purpose: Purpose) -> Self {
        Self { purpose, ..self }
    }
}

/// What tokens are charged for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be spent at once: none comes back.
    Spend,
    /// As an estimate, to be settled later.
    Estimate,
    /// For nothing: none is charged, and it is denied where a window has spent more than its limit, or another
    /// cell has nothing left. A peek that spends 0 is never denied.
    Peek,
    /// Not charged but given back, by the word of the caller, and never above full: also where it is denied, since a
    /// window has spent more than its limit even so. Permits and retries are not given back so.
    Credit,
    /// To be spent later by a client that holds them until then. It is never denied: it gets a share of what
    /// is there, up to what it wants, so that as many clients can have as much, and again.
    Lease {
        /// How many clients share.
        clients: u32,
    },
}

impl Ask {
    /// Tokens that are given back.
    pub(crate) const fn credited(&self) -> u64 {
        if matches!(self.purpose, Purpose::Credit) { self.tokens } else { 0 }
    }

    /// Whether it is a peek that is denied because nothing is left.
    pub(crate) fn finds_nothing(&self, left: u64) -> bool {
        self.purpose == Purpose::Peek && left == 0
    }

    /// Tokens to charge of a cell that has `left`; a lease takes no more than its share.
    pub(crate) fn granted_of(&self, left: u64) -> u64 {
        match self.purpose {
            Purpose::Spend | Purpose::Estimate => self.tokens,
            Purpose::Peek | Purpose::Credit => 0,
            Purpose::Lease { clients } => {
                let share = left.saturating_sub(self.reserved) / (2 * u64::from(clients.max(1)));
                self.tokens.min(share)
            }
        }
    }
}

/// What is known of a charge that was made for a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settlement {
    /// Tokens that were charged when the grant was given.
    pub charged: u64,
    /// Tokens that the call was known to have cost before; 0 if nothing was known.
    pub told: u64,
    /// Tokens that it is known to have cost now, at least `told`.
    pub actual: u64,
    /// More will follow: nothing is given back yet.
    pub partial: bool,
    /// The [slice](Plan::slice) that was charged, if these are the settings that it was charged under.
    pub slice: Option<u64>,
    /// The calendar's window at this moment, for limiters that are counted in one.
    pub window: Option<Window>,
    /// Most tokens that a cell may owe beyond an empty one.
    pub max_debt: u64,
}

impl Settlement {
    /// Tokens that may still come back before it.
    #[must_use]
    pub const fn out_before(&self) -> u64 {
        self.charged.saturating_sub(self.told)
    }

    /// Tokens that may still come back after it.
    #[must_use]
    pub const fn out_after(&self) -> u64 {
        if self.partial { self.charged.saturating_sub(self.actual) } else { 0 }
    }

    /// Tokens that it gives back.
    #[must_use]
    pub const fn refund(&self) -> u64 {
        if self.partial { 0 } else { self.charged.saturating_sub(self.actual) }
    }

    /// Tokens that it charges on top.
    #[must_use]
    pub const fn excess(&self) -> u64 {
        let known = if self.told > self.charged { self.told } else { self.charged };
        self.actual.saturating_sub(known)
    }
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
    /// Tokens that were spent before it, which no one could have; more than the limit is debt.
    pub spent: u64,
    /// Most tokens that this caller could ever be granted at once.
    pub limit: u64,
    /// The cell as it is.
    pub before: Level,
    /// The cell after the charge.
    pub after: Level,
    /// The state after the charge: of a denied ask, with the cell drained, and a window or a retry budget in debt;
    /// `None` if there is nothing to store.
    pub charged: Option<S>,
    /// Tokens that are charged if it is allowed: of a lease maybe fewer than were wanted.
    pub granted: u64,
    /// The part of the cell's time that is charged, which a later settlement names; 0 where there is one.
    pub slice: u64,
}

/// How full a cell is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// Whole tokens that this caller could be charged now.
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
        /// Time after which a lone caller would be allowed; `None` if nobody knows, or waiting does not mend
        /// it.
        retry_after: Option<Duration>,
    },
}

/// Why an ask was denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The rate is used up.
    RateLimited,
    /// All permits are held.
    ConcurrencyLimited,
    /// The retries that the requests pay for are used up.
    RetryBudgetExhausted,
    /// What is left is reserved for a higher priority.
    ReservedForPriority,
    /// The policy has more keys than its budget; those past it share one cell, which is used up.
    OverflowBucket,
    /// Too many wait in line already: told by whoever keeps the line.
    LineFull,
    /// The policy denies all: its limit is 0.
    Blocked,
}

/// What is kept on disk of one living cell besides its state: an upper bound of what it spends until the next
/// one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// Whole tokens that are spent, or may be by the time that a crash asks; of a cell with slices, in the
    /// newest one.
    pub spent: u64,
    /// When this was true.
    pub at: Time,
}

/// Whether so many tokens can be had of a cell that has `left`, of which `reserved` are kept from this
/// caller.
pub(crate) fn admit(
    tokens: u64,
    left: u64,
    reserved: u64,
    reason: Reason,
    retry_after: impl FnOnce() -> Option<Duration>,
) -> Admission {
    if tokens <= left.saturating_sub(reserved) {
        return Admission::Allow;
    }
    let reason = if tokens <= left { Reason::ReservedForPriority } else { reason };
    Admission::Deny { reason, retry_after: retry_after() }
}
