//! Retries, paid for by the calls of the whole fleet.
//!
//! A call that fails is made again after a pause that grows each time, as long as the calls of the whole fleet pay for
//! it: a policy of kind `retry_budget` lets a share of them be retries, so that a target which fails all is not buried
//! under three times its load. What a call asks of the server is one question for each retry, and nothing for the
//! first try: those are counted, and told many at a time.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use fusebox_client::Client;
//! # async fn charge(attempt: u32) -> Result<(), std::io::Error> { Ok(()) }
//!
//! # async fn example(client: Client) -> Result<(), std::io::Error> {
//! let retry = client.retry("payments-retries").max_attempts(4).deadline(Duration::from_secs(2));
//! retry.call(|attempt| charge(attempt)).await
//! # }
//! ```

mod account;
mod again;
mod attempts;
mod backoff;
mod ledger;
mod pacing;
mod tally;

use std::{any::Any, collections::BTreeMap, error::Error, fmt, sync::Arc, time::Duration};

use fusebox_core::Time;
use fusebox_proto::v1;
use parking_lot::RwLock;

use self::{account::Account, pacing::Terms, tally::Tally};
pub use self::{
    again::{Again, GaveUp},
    attempts::Attempts,
    backoff::{Backoff, Jitter},
    tally::Counts,
};
use crate::{
    Clock,
    context::{Context, Random},
    layer::{BoxError, rejected_in, rejection},
    part::{Draft, Link, Part, REPORT_MOST},
};

/// Budgets of one client, at most: all that one report can tell of. Keys past it pay into their policy's budget of no
/// key, and draw from it.
const ACCOUNTS_MOST: usize = REPORT_MOST;

/// All retry budgets of a client.
pub(crate) struct Retries {
    context: Arc<Context>,
    accounts: RwLock<Accounts>,
}

#[derive(Default)]
struct Accounts {
    by_name: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Arc<Account>>>,
    /// The same, in the order in which they are told of.
    in_turn: Vec<Arc<Account>>,
}

impl Accounts {
    fn get(&self, policy: &str, key: &str) -> Option<Arc<Account>> {
        self.by_name.get(policy)?.get(key).cloned()
    }

    fn insert(&mut self, account: &Arc<Account>) {
        let keys = self.by_name.entry(Arc::clone(&account.policy)).or_default();
        keys.insert(Arc::clone(&account.key), Arc::clone(account));
        self.in_turn.push(Arc::clone(account));
    }

    /// Forgets those that no handle leads to, and that have nothing to tell.
    fn forget_idle(&mut self) {
        let Self { by_name, in_turn } = self;
        in_turn.retain(|account| {
            // One for each of the two collections.
            let idle = Arc::strong_count(account) == 2 && account.is_idle();
            if idle && let Some(keys) = by_name.get_mut(&account.policy) {
                keys.remove(&account.key);
            }
            !idle
        });
        by_name.retain(|_, keys| !keys.is_empty());
    }
}

impl Retries {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self { context, accounts: RwLock::default() }
    }

    pub(crate) fn of(self: &Arc<Self>, policy: &str) -> Retry {
        self.keyed(policy, "", Terms::default())
    }

    fn keyed(self: &Arc<Self>, policy: &str, key: &str, terms: Terms) -> Retry {
        let account = self.account(policy, key);
        Retry { budget: Budget::Fleet { retries: Arc::clone(self), account }, terms }
    }

    fn account(&self, policy: &str, key: &str) -> Arc<Account> {
        if let Some(account) = self.accounts.read().get(policy, key) {
            return account;
        }
        let mut accounts = self.accounts.write();
        let full = accounts.in_turn.len() >= ACCOUNTS_MOST;
        let key = if full { "" } else { key };
        accounts.get(policy, key).unwrap_or_else(|| {
            let account = Arc::new(Account::new(Arc::clone(&self.context), policy, key));
            // Policies are named by the program, and so are few: theirs always have a place.
            accounts.insert(&account);
            account
        })
    }
}

impl Part for Retries {
    fn tend(&self, now: Time) {
        let mut accounts = self.accounts.write();
        for account in &accounts.in_turn {
            account.tend(now);
        }
        if accounts.in_turn.len() > ACCOUNTS_MOST / 2 {
            accounts.forget_idle();
        }
    }

    fn report(&self, draft: &mut Draft, now: Time) {
        let mut accounts = self.accounts.write();
        let mut asked = 0;
        for account in &accounts.in_turn {
            if draft.room_for_deltas() == 0 {
                break;
            }
            account.report(draft, now);
            asked += 1;
        }
        // Those that there was no room for are the first of the next.
        accounts.in_turn.rotate_left(asked);
    }

    fn reported(&self, _: &v1::ReportResponse, _: Time) {}

    fn linked(&self, _: Link, _: Time) {}

    fn close(&self, draft: &mut Draft, now: Time) {
        self.report(draft, now);
    }
}

/// The retries of one key. Clones are the same.
#[derive(Clone)]
pub struct Retry {
    budget: Budget,
    terms: Terms,
}

#[derive(Clone)]
enum Budget {
    Fleet { retries: Arc<Retries>, account: Arc<Account> },
    None(Arc<Alone>),
}

/// What retries without a budget go by.
struct Alone {
    clock: Clock,
    random: Random,
    tally: Tally,
}

impl Retry {
    /// Retries that no budget limits: only their number and their pauses do. For targets that are nobody else's.
    #[must_use]
    pub fn local() -> Self {
        // Without entropy all processes pause alike, which is bad, and works.
        Self::local_with(Clock::default(), getrandom::u64().unwrap_or_default())
    }

    /// As [`local`](Self::local), with a clock of your own and a seed for jitter: for simulations.
    #[must_use]
    pub fn local_with(clock: Clock, seed: u64) -> Self {
        let alone = Alone { clock, random: Random::of(seed), tally: Tally::default() };
        Self { budget: Budget::None(Arc::new(alone)), terms: Terms::default() }
    }

    /// The same for another key: each has a budget of its own. Without a budget it is the same for all.
    #[must_use]
    pub fn key(&self, key: &str) -> Self {
        match &self.budget {
            Budget::Fleet { retries, account } => retries.keyed(&account.policy, key, self.terms),
            Budget::None(_) => self.clone(),
        }
    }

    /// The pauses before retries; by default [`Backoff::default`].
    #[must_use]
    pub fn backoff(self, backoff: Backoff) -> Self {
        Self { terms: Terms { backoff, ..self.terms }, ..self }
    }

    /// Tries of one call in all, the first among them; by default 3. 0 is taken as 1.
    #[must_use]
    pub fn max_attempts(self, max_attempts: u32) -> Self {
        Self { terms: Terms { max_attempts, ..self.terms }, ..self }
    }

    /// Time for all tries of a call and the pauses between them; by default as much as they take. No try begins after
    /// it. The layer also ends one that is under way then; [`call`](Self::call) does not: see [`Attempts::left`].
    #[must_use]
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { terms: Terms { deadline: Some(deadline), ..self.terms }, ..self }
    }

    /// Makes a call, and makes it again on each error but a [`Rejected`](crate::Rejected), which may be the cause of
    /// the error as well. `call` is given the number of the try, counted from 0.
    ///
    /// Dropping the future drops the try or the pause that is under way.
    ///
    /// # Errors
    /// That of the last try.
    pub async fn call<T, E, F>(&self, call: impl FnMut(u32) -> F) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>>,
        E: Error + 'static,
    {
        let decide = |result: &Result<T, E>| match result {
            Err(error) if rejected_in(error).is_some() => Again::No,
            result => Again::on_error(result),
        };
        self.tries(call, decide).await
    }

    /// Makes a call, and makes it again as long as `decide` says so of its result.
    ///
    /// A [`Rejected`](crate::Rejected) is never tried again, whatever `decide` says: also one that is the cause of a
    /// boxed error, or of a `tonic::Status`. Of errors of your own that have one for a cause, `decide` must say no.
    ///
    /// # Errors
    /// That of the last try.
    pub async fn call_with<T, E, F>(
        &self,
        decide: impl Fn(&Result<T, E>) -> Again,
        call: impl FnMut(u32) -> F,
    ) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>>,
        E: 'static,
    {
        let decide = |result: &Result<T, E>| match result {
            Err(error) if is_rejection(error) => Again::No,
            result => decide(result),
        };
        self.tries(call, decide).await
    }

    async fn tries<T, E, F: Future<Output = Result<T, E>>>(
        &self,
        mut call: impl FnMut(u32) -> F,
        decide: impl Fn(&Result<T, E>) -> Again,
    ) -> Result<T, E> {
        let mut attempts = self.attempts();
        loop {
            let result = call(attempts.attempt()).await;
            if attempts.again(decide(&result)).await.is_err() {
                return result;
            }
        }
    }

    /// Begins a call whose tries you make yourself; it pays into the budget.
    #[must_use]
    pub fn attempts(&self) -> Attempts {
        match &self.budget {
            Budget::Fleet { account, .. } => account.begin(),
            Budget::None(alone) => alone.tally.call(),
        }
        Attempts::new(self)
    }

    /// What the handles of this budget did so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.tally().counts()
    }

    async fn withdraw(&self, attempt: u32, spare: Option<Duration>) -> Result<(), GaveUp> {
        match &self.budget {
            Budget::Fleet { account, .. } => account.withdraw(attempt, spare).await,
            Budget::None(_) => Ok(()),
        }
    }

    fn now(&self) -> Time {
        match &self.budget {
            Budget::Fleet { account, .. } => account.context.clock.now(),
            Budget::None(alone) => alone.clock.now(),
        }
    }

    fn random(&self) -> &Random {
        match &self.budget {
            Budget::Fleet { account, .. } => &account.context.random,
            Budget::None(alone) => &alone.random,
        }
    }

    fn tally(&self) -> &Tally {
        match &self.budget {
            Budget::Fleet { account, .. } => &account.tally,
            Budget::None(alone) => &alone.tally,
        }
    }
}

impl fmt::Debug for Retry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Retry");
        if let Budget::Fleet { account, .. } = &self.budget {
            shown.field("policy", &account.policy).field("key", &account.key);
        }
        shown.field("terms", &self.terms).finish()
    }
}

/// Whether an error of any type is known to come of a rejection.
fn is_rejection<E: 'static>(error: &E) -> bool {
    let error: &dyn Any = error;
    if let Some(error) = error.downcast_ref::<BoxError>() {
        return rejection(error).is_some();
    }
    if let Some(status) = error.downcast_ref::<tonic::Status>() {
        return rejected_in(status).is_some();
    }
    error.is::<crate::Rejected>()
}

#[cfg(test)]
mod tests;
