//! What a crash leaves behind: marks, and cells of an earlier revision.

use fusebox_core::{
    Admission, Cell, Cells, Charging, Kind, Limit, Mark, Moment, State, Time, TokenBucket, apply,
    token_bucket,
};
use proptest::{collection::vec, prelude::*};

use crate::{buckets, costs, estimate, later, policy, rule, steps, tokens};

/// Some way into the life of a bucket.
fn lives() -> impl Strategy<Value = (TokenBucket, Vec<(u64, u64)>, u64, u64)> {
    buckets().prop_flat_map(|bucket| {
        let history = vec((steps(bucket), costs(bucket)), 1..20);
        (Just(bucket), history, steps(bucket), 1..=bucket.burst())
    })
}

/// What is on disk of a bucket with that mark.
fn kept(state: token_bucket::State, mark: Mark) -> token_bucket::State {
    let State::TokenBucket(kept) = State::TokenBucket(state).kept(mark) else {
        panic!("of another kind")
    };
    kept
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// A mark covers the state it was made of, and as many tokens more as its step.
    #[test]
    fn a_mark_covers_its_step((bucket, history, wait, step) in lives()) {
        let (mut state, mut now) = (None, Moment::ZERO);
        for (pause, cost) in history {
            now = later(now, pause);
            let plan = bucket.plan(state, tokens(cost), now);
            if plan.admission == Admission::Allow {
                state = plan.charged;
            }
        }
        // A mark is made where a charge is: of the state as it is now.
        let Some(marked) = state else { return Ok(()) };
        now.time = marked.at;
        let mark = bucket.mark(marked, step, now);
        prop_assert!(bucket.covers(mark, marked, marked));

        // At once: all of the step.
        let mut taken = 0;
        for cost in [step / 3, step / 2, step] {
            let plan = bucket.plan(state, tokens(cost), now);
            if plan.admission == Admission::Allow && taken + cost <= step {
                taken += cost;
                state = plan.charged;
                prop_assert!(bucket.covers(mark, marked, state.unwrap()), "after {} of {}", taken, step);
            }
        }

        // Later, when time has refilled some of it: as long as it says that it covers, what is recovered
        // from it admits nothing that the living would not, now or ever after.
        now = later(now, wait);
        let plan = bucket.plan(state, tokens(step), now);
        if plan.admission == Admission::Allow {
            state = plan.charged;
        }
        if bucket.covers(mark, marked, state.unwrap()) {
            for moment in [now, later(now, wait), later(now, wait.saturating_mul(2))] {
                let recovered = bucket.revive(kept(state.unwrap(), mark), 0, moment);
                let remaining = |state| bucket.plan(Some(state), tokens(0), moment).before.remaining;
                prop_assert!(remaining(recovered) <= remaining(state.unwrap()));
            }
        }
    }

    /// A mark that is behind is known as such.
    #[test]
    fn a_mark_that_is_behind_does_not_cover((bucket, history, ..) in lives()) {
        let (mut state, mut now) = (None::<token_bucket::State>, Moment::ZERO);
        for (pause, cost) in history {
            now = later(now, pause);
            let plan = bucket.plan(state, tokens(cost), now);
            if cost > 0 && plan.admission == Admission::Allow {
                if let Some(before) = state {
                    // In whole tokens, so it knows one that is behind by a whole one.
                    let behind = bucket.mark(before, 0, now);
                    prop_assert!(!bucket.covers(behind, before, plan.charged.unwrap()));
                }
                state = plan.charged;
            }
        }
    }

    /// A clock that went wrong while we were away never makes a key wait longer than its own burst.
    #[test]
    fn a_mark_of_the_future_refills_from_now((bucket, history, wait, step) in lives()) {
        let (mut state, mut now) = (None, Moment::ZERO);
        for (pause, cost) in history {
            now = later(now, pause);
            state = bucket.plan(state, tokens(cost), now).charged.or(state);
        }
        let Some(state) = state else { return Ok(()) };
        let mark = bucket.mark(state, step, now);
        let early = Moment::from_nanos(now.time.as_nanos().saturating_sub(wait));
        let revived = bucket.revive(kept(state, mark), 0, early);
        prop_assert!(revived.at <= early.time);
        prop_assert!(revived.spent <= mark.spent);
    }

    /// What was spent is carried over to the part, rounded up.
    #[test]
    fn a_change_of_period_rounds_what_was_spent_up(
        older in buckets(),
        newer in buckets(),
        spent in 0..1_000_000_000_000_u64,
        part in any::<prop::sample::Index>(),
    ) {
        let remainder = part.index(usize::try_from(older.per_nanos()).unwrap()) as u64;
        let state = token_bucket::State { spent, remainder, out: 0, at: Time::ZERO };
        let rebased = newer.rebase(state, Some(&older), Moment::ZERO);
        // The begun token as a fraction, remainder / per, multiplied out.
        let (old_per, per) = (u128::from(older.per_nanos()), u128::from(newer.per_nanos()));
        let parts = u128::from(rebased.spent - spent) * per + u128::from(rebased.remainder);
        let (was, is) = (u128::from(remainder) * per, parts * old_per);
        prop_assert!(is >= was, "some of it was forgotten");
        prop_assert!(is < was + old_per, "more than a part was added");
    }

    /// Through any chain of changes, known or forgotten, a cell never holds more than the same tokens
    /// would leave under the most generous of the settings all along.
    #[test]
    fn a_change_of_limit_never_forgets_what_was_spent(
        limits in vec(1..1_000_u64, 1..12),
        pauses in vec(0..2_000_000_000_u64, 12),
        cost in 1..1_000_u64,
    ) {
        let bucket = |limit| TokenBucket::new(limit, std::time::Duration::from_secs(1), 1_000);
        let mut changing = policy(bucket(limits[0]).unwrap(), 0);
        let most = bucket(*limits.iter().max().unwrap()).unwrap();
        let least = bucket(*limits.iter().min().unwrap()).unwrap();

        let mut now = Moment::ZERO;
        let mut cells = Cells::from_iter([None::<Cell>]);
        apply(&[rule(&changing, tokens(cost))], Charging::AllOrNothing, &mut cells, now);
        let cell = cells[0].unwrap();
        let State::TokenBucket(start) = cell.state else { panic!("of another kind") };

        for (limit, pause) in limits.iter().skip(1).zip(&pauses) {
            now = later(now, *pause);
            changing = changing.changed(Limit::TokenBucket(bucket(*limit).unwrap()), now);
        }
        let peek = |limit: &Limit, state| limit.plan(Some(state), tokens(0), now).before.remaining;
        let left = peek(&changing.limit, changing.current(cell));
        let at_most = most.plan(Some(start), tokens(0), now).before.remaining;
        prop_assert!(left <= at_most);
        if limits.len() <= fusebox_core::MAX_FORMERS {
            // One part for each change is rounded up, which may cost one whole token.
            let at_least = least.plan(Some(start), tokens(0), now).before.remaining;
            prop_assert!(left + 1 >= at_least);
        }
    }
}

#[test]
fn what_an_open_estimate_may_give_back_is_not_promised_after_a_crash() {
    let bucket = TokenBucket::new(1, std::time::Duration::from_secs(1), 10).unwrap();
    let state = bucket.plan(None, estimate(8), Moment::ZERO).charged.unwrap();
    let mark = bucket.mark(state, 0, Moment::ZERO);
    assert_eq!(kept(state, mark).out, 0);
    assert!(bucket.covers(mark, state, state));
}
