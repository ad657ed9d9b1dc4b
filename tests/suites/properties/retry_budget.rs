//! The retry budget, against a log of requests and retries.

use std::time::Duration;

use fusebox_core::{
    Admission, Ask, Kind, Moment, RetryBudget, Time,
    retry_budget::{SLICES, State},
};
use proptest::{collection::vec, prelude::*};

use crate::{later, tokens};

const SECOND: u64 = 1_000_000_000;

fn budgets() -> impl Strategy<Value = RetryBudget> {
    let ttl = prop_oneof![Just(SECOND), Just(6 * SECOND), SECOND..60 * SECOND];
    (0..=1_000_u16, 0..5_u32, ttl).prop_map(|(ratio, floor, ttl)| {
        RetryBudget::new(ratio, floor, Duration::from_nanos(ttl)).unwrap()
    })
}

/// A pause in thousandths of the `ttl`, how many calls, and whether they are retries.
fn histories() -> impl Strategy<Value = Vec<(u64, u64, bool)>> {
    let pauses = prop_oneof![3 => Just(0), 2 => 0..200_u64, 1 => 0..2_000_u64];
    vec((pauses, 0..20_u64, any::<bool>()), 1..80)
}

fn ask(amount: u64, retry: bool) -> Ask {
    Ask { retry, ..tokens(amount) }
}

/// What was admitted.
struct Log<'a> {
    budget: &'a RetryBudget,
    calls: Vec<(Time, u64, bool)>,
}

impl Log<'_> {
    fn slice(&self, time: Time) -> u64 {
        let ttl = self.budget.ttl().as_nanos() as u64;
        time.as_nanos() / ttl.div_ceil(SLICES as u64)
    }

    /// Requests and retries of the stretch of slices that ends now.
    fn counted(&self, now: Time) -> (u64, u64) {
        let first = self.slice(now).saturating_sub(SLICES as u64);
        let of = |retries| {
            let calls = self.calls.iter().filter(|call| self.slice(call.0) >= first);
            calls.filter(|call| call.2 == retries).map(|call| call.1).sum()
        };
        (of(false), of(true))
    }

    /// In billionths of a retry, so that nothing rounds.
    fn allowance(&self, requests: u64) -> u128 {
        let ratio = u128::from(requests) * u128::from(self.budget.ratio_per_mille()) * 1_000_000;
        ratio + self.budget.ttl().as_nanos() * u128::from(self.budget.min_per_second())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_048))]

    /// A retry is admitted if the requests of the same slices pay for it, or the floor does.
    #[test]
    fn retries_are_a_share_of_requests_and_a_floor(budget in budgets(), history in histories()) {
        let ttl = budget.ttl().as_nanos() as u64;
        let mut log = Log { budget: &budget, calls: Vec::new() };
        let (mut state, mut now) = (None, Moment::from_nanos(1_000 * SECOND));
        for (pause, amount, retry) in history {
            now = later(now, (u128::from(ttl) * u128::from(pause) / 1_000) as u64);
            let plan = budget.plan(state, ask(amount, retry), now);
            let allowed = plan.admission == Admission::Allow;
            let (requests, retries) = log.counted(now.time);
            let wanted = u128::from(retries + amount) * 1_000_000_000;
            if !retry {
                prop_assert!(allowed, "a request is never refused");
            } else if allowed {
                prop_assert!(amount == 0 || wanted <= log.allowance(requests));
                let recent = |call: &&(Time, u64, bool)| call.2 && now.time.nanos_since(call.0) < ttl;
                let in_ttl: u64 = log.calls.iter().filter(recent).map(|call| call.1).sum();
                prop_assert!(in_ttl <= retries, "slices are no shorter than the ttl");
            } else {
                // Of the floor what is less than a thousandth is not counted.
                prop_assert!(wanted + 1_000_000 > log.allowance(requests));
            }
            if allowed {
                log.calls.push((now.time, amount, retry));
                state = plan.charged.or(state);
            }
        }
    }

    /// Those that were made count, whether there was enough for them or not.
    #[test]
    fn retries_that_were_made_all_the_same_are_owed(budget in budgets(), history in histories()) {
        let ttl = budget.ttl().as_nanos() as u64;
        let mut log = Log { budget: &budget, calls: Vec::new() };
        let (mut state, mut now) = (None, Moment::from_nanos(1_000 * SECOND));
        for (pause, amount, retry) in history {
            now = later(now, (u128::from(ttl) * u128::from(pause) / 1_000) as u64);
            state = budget.plan(state, ask(amount, retry), now).charged;
            log.calls.push((now.time, amount, retry));
            let (requests, retries) = log.counted(now.time);
            let left = log.allowance(requests).saturating_sub(u128::from(retries) * 1_000_000_000);
            let told = u128::from(budget.plan(state, tokens(0), now).before.remaining) * 1_000_000_000;
            // Of the floor what is less than a thousandth is not counted.
            prop_assert!(told <= left && left < told + 1_001_000_000);
        }
    }

    /// After a crash the floor is spent, and back after as many slices as are remembered.
    #[test]
    fn what_a_crash_forgot_comes_back(budget in budgets(), at in any::<u32>()) {
        let at = Moment::from_nanos(u64::from(at) * SECOND / 7);
        let state = budget.having_spent(budget.capacity(), at);
        let floor = budget.plan(None, tokens(0), at).before.remaining;
        let left = |moment| budget.plan(Some(state), tokens(0), moment).before.remaining;
        prop_assert_eq!(left(at), 0);
        prop_assert_eq!(left(later(at, budget.ttl().as_nanos() as u64 - 1)), 0);
        prop_assert_eq!(left(later(at, budget.fills_in().unwrap().as_nanos() as u64)), floor);
        prop_assert!(budget.full_at(state, at).unwrap() <= at.time.after(budget.fills_in().unwrap()));
    }

    /// What was earned under another `ttl` is not earned under this one; what was spent is spent.
    #[test]
    fn a_change_of_ttl_carries_debts_alone(
        older in budgets(),
        newer in budgets(),
        history in histories(),
    ) {
        let (mut state, mut now) = (None, Moment::from_nanos(1_000 * SECOND));
        for (pause, amount, retry) in history {
            now = later(now, pause * SECOND / 100);
            let plan = older.plan(state, ask(amount, retry), now);
            if plan.admission == Admission::Allow {
                state = plan.charged;
            }
        }
        let Some(state) = state else { return Ok(()) };
        let rebased = newer.rebase(state, Some(&older), now);
        prop_assert_eq!(newer.spent(rebased, now), older.spent(state, now));
        if older.ttl() != newer.ttl() {
            let floor = newer.plan(None, tokens(0), now).before.remaining;
            prop_assert!(newer.plan(Some(rebased), tokens(0), now).before.remaining <= floor);
        }
    }

    /// Balances stop where they would begin again at the other end.
    #[test]
    fn balances_saturate(
        ratio in 1..=1_000_u16,
        calls in vec((prop_oneof![Just(0), 0..2 * SECOND], 1..=1_000_000_u64), 1..40),
    ) {
        let budget = RetryBudget::new(ratio, 10_000, Duration::from_secs(60)).unwrap();
        let (mut state, mut now) = (None, Moment::ZERO);
        let (mut requests, mut retries) = (0, 0);
        for (pause, amount) in calls {
            now = later(now, pause);
            for _ in 0..5 {
                state = budget.plan(state, ask(amount, false), now).charged;
                requests += amount;
            }
            let left = budget.plan(state, tokens(0), now).before.remaining;
            for _ in 0..3 {
                let plan = budget.plan(state, ask(left.min(1_000_000), true), now);
                if plan.admission == Admission::Allow {
                    (state, retries) = (plan.charged, retries + left.min(1_000_000));
                }
            }
            prop_assert!(retries * 1_000 <= requests * u64::from(ratio) + 600_000_000);
        }
        for extreme in [i32::MIN, i32::MAX] {
            let state = State::new([extreme; SLICES + 1], u64::MAX);
            for retry in [false, true] {
                let end = Moment::from_nanos(u64::MAX);
                let plan = budget.plan(Some(state), ask(u64::MAX, retry), end);
                let is_debt = plan.charged.unwrap().counts[0] < 0;
                prop_assert_eq!(is_debt, retry);
            }
        }
    }
}
