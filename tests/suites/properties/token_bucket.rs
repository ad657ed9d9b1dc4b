//! One bucket.

use fusebox_core::{
    Admission, Kind, Moment, Reason, Settlement, Time, TokenBucket, token_bucket::State,
};
use proptest::{collection::vec, prelude::*};

use crate::{buckets, costs, estimate, later, model::History, settlement, steps, tokens};

fn histories() -> impl Strategy<Value = (TokenBucket, Vec<(u64, u64)>)> {
    buckets().prop_flat_map(|bucket| (Just(bucket), vec((steps(bucket), costs(bucket)), 1..60)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Neither more nor less: the bucket admits exactly what the definition does.
    #[test]
    fn a_bucket_admits_what_its_history_does((bucket, history) in histories()) {
        let mut model = History::new(bucket);
        let (mut state, mut now) = (None, Moment::ZERO);
        for (step, cost) in history {
            now = later(now, step);
            let plan = bucket.plan(state, tokens(cost), now);
            let admitted = plan.admission == Admission::Allow;
            prop_assert_eq!(admitted, model.admits(cost, now), "cost {} at {:?}", cost, now);
            if admitted {
                model.admit(cost, now);
                state = plan.charged;
            }
        }
    }

    /// A denial holds until the promised instant, and not a nanosecond longer.
    #[test]
    fn the_wait_of_a_denial_is_exact((bucket, history) in histories()) {
        let (mut state, mut now) = (None, Moment::ZERO);
        for (step, cost) in history {
            now = later(now, step);
            let plan = bucket.plan(state, tokens(cost), now);
            match plan.admission {
                Admission::Allow => state = plan.charged,
                Admission::Deny { reason, retry_after } => {
                    prop_assert_eq!(reason, Reason::RateLimited);
                    let wait = retry_after.expect("the cost is possible").as_nanos() as u64;
                    prop_assert!(wait > 0);
                    let before = bucket.plan(state, tokens(cost), later(now, wait - 1));
                    prop_assert_ne!(before.admission, Admission::Allow);
                    let after = bucket.plan(state, tokens(cost), later(now, wait));
                    prop_assert_eq!(after.admission, Admission::Allow);
                }
            }
        }
    }

    /// Full is when the cell says so, and not a nanosecond earlier; then it is as good as none.
    #[test]
    fn a_cell_is_full_when_it_says((bucket, history) in histories()) {
        let (mut state, mut now) = (None, Moment::ZERO);
        for (step, cost) in history {
            now = later(now, step);
            let plan = bucket.plan(state, tokens(cost), now);
            if plan.admission == Admission::Allow {
                state = plan.charged;
            }
            let Some(charged) = state else { continue };
            let full_at = bucket.full_at(charged, now).expect("nothing is out");
            let level = |at| bucket.plan(state, tokens(0), at).before;
            prop_assert_eq!(now.time.after(level(now).reset_after), full_at.max(now.time));
            let at = |time: Time| Moment { time, ..now };
            if full_at > now.time {
                let nearly = at(Time::from_nanos(full_at.as_nanos() - 1));
                prop_assert!(level(nearly).reset_after.as_nanos() == 1);
            }
            prop_assert_eq!(level(at(full_at)), bucket.plan(None, tokens(0), at(full_at)).before);
        }
    }

    /// A reader that is late, because another caller was first at the lock, changes nothing backwards.
    #[test]
    fn time_that_seems_to_go_back_admits_nothing_more(
        (bucket, history) in histories(),
        back in 0..1_000_000_u64,
    ) {
        let (mut state, mut now) = (None, Moment::from_nanos(1_000_000));
        for (step, cost) in history {
            now = later(now, step);
            let early = Moment::from_nanos(now.time.as_nanos() - back);
            let on_time = bucket.plan(state, tokens(cost), now);
            if let Some(state) = state {
                let late = bucket.plan(Some(state), tokens(cost), early);
                prop_assert!(late.before.remaining <= on_time.before.remaining);
            }
            if on_time.admission == Admission::Allow {
                state = on_time.charged;
            }
        }
    }

    /// An estimate that is settled at once is as if the true cost had been asked, up to the debt.
    #[test]
    fn a_settled_estimate_costs_what_it_cost(
        (bucket, history) in histories(),
        shares in vec(0..300_u64, 60),
        max_debt in 0..100_u64,
    ) {
        let (mut estimated, mut exact) = (None, None);
        let mut now = Moment::ZERO;
        for ((step, cost), share) in history.into_iter().zip(shares) {
            now = later(now, step);
            let actual = cost.saturating_mul(share) / 100;
            let plan = bucket.plan(estimated, estimate(cost), now);
            if cost == 0 || plan.admission != Admission::Allow {
                continue;
            }
            let settlement = Settlement { max_debt, ..settlement(cost, actual) };
            let settled = bucket.settle(plan.charged, settlement, now);
            prop_assert_eq!(settled.refunded + actual, cost + settled.owed + settled.dropped);
            estimated = settled.state;

            // The same, by charging what was really taken.
            let taken = cost + settled.owed - settled.refunded;
            let before = exact.unwrap_or(State { spent: 0, remainder: 0, out: 0, at: now.time });
            let refilled = bucket.plan(Some(before), tokens(0), now);
            let spent = bucket.revive(before, 0, now);
            prop_assert_eq!(refilled.before, bucket.plan(Some(spent), tokens(0), now).before);
            exact = Some(State { spent: spent.spent + taken, ..spent });
            prop_assert_eq!(estimated, exact);
            prop_assert!(estimated.unwrap().spent <= bucket.burst() + max_debt);
        }
    }

    /// However many estimates are open, and whenever they are settled: what comes back never makes more
    /// than one burst.
    #[test]
    fn what_comes_back_never_piles_up(
        (bucket, history) in histories(),
        settles in vec(any::<(bool, prop::sample::Index)>(), 60),
    ) {
        let mut open: Vec<u64> = Vec::new();
        let (mut state, mut now) = (None, Moment::ZERO);
        for ((step, cost), (settle, which)) in history.into_iter().zip(settles) {
            now = later(now, step);
            if settle && !open.is_empty() {
                let charged = open.swap_remove(which.index(open.len()));
                state = bucket.settle(state, settlement(charged, 0), now).state;
            } else {
                let plan = bucket.plan(state, estimate(cost), now);
                if cost > 0 && plan.admission == Admission::Allow {
                    state = plan.charged;
                    open.push(cost);
                }
            }
            let out: u64 = open.iter().sum();
            let remaining = bucket.plan(state, tokens(0), now).before.remaining;
            prop_assert!(remaining + out <= bucket.burst(), "{} left, {} out", remaining, out);
        }
    }
}
