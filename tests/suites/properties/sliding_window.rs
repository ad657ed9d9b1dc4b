//! The sliding window, against a log of what was admitted.

use std::time::Duration;

use fusebox_core::{
    Admission, Ask, Kind, Moment, Purpose, Settlement, SlidingWindow,
    sliding_window::{MAX_LIMIT, SLICES, State},
};
use proptest::{collection::vec, prelude::*, sample::Index};

use crate::{estimate, later, settlement, tokens};

const SECOND: u64 = 1_000_000_000;

fn windows() -> impl Strategy<Value = SlidingWindow> {
    let per = prop_oneof![1..100_u64, Just(SECOND), Just(6 * SECOND), 1..86_400 * SECOND];
    (1..50_u64, per)
        .prop_map(|(limit, per)| SlidingWindow::new(limit, Duration::from_nanos(per)).unwrap())
}

/// A pause in thousandths of the period, tokens, and whether they are an estimate, or one is settled first.
type Step = (u64, u64, bool, Option<(Index, u64)>);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let pauses = prop_oneof![Just(0), 0..100_u64, 100..400_u64, 900..1_100_u64, 0..3_000_u64];
    let settled = prop::option::of((any::<Index>(), 0..30_u64));
    vec((pauses, 0..20_u64, any::<bool>(), settled), 1..80)
}

/// An admission: when, how much of it stands, and the slice that was charged.
struct Admitted {
    at: Moment,
    tokens: u64,
    slice: u64,
    open: bool,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_048))]

    /// Wherever a stretch of the period begins, never more than the limit lies in it.
    #[test]
    fn no_stretch_of_the_period_has_more_than_the_limit(window in windows(), steps in steps()) {
        let per = window.per().as_nanos() as u64;
        let mut log: Vec<Admitted> = Vec::new();
        let (mut state, mut now) = (None, Moment::from_nanos(SECOND + 1));
        for (pause, cost, estimated, settled) in steps {
            now = later(now, (u128::from(per) * u128::from(pause)).div_ceil(1_000) as u64);
            let open: Vec<usize> = (0..log.len()).filter(|index| log[*index].open).collect();
            if let Some((which, actual)) = settled.filter(|_| !open.is_empty()) {
                let one = &mut log[open[which.index(open.len())]];
                let slice = Some(one.slice);
                let known = Settlement { slice, ..settlement(one.tokens, actual.min(one.tokens)) };
                let settled = window.settle(state, known, now);
                prop_assert!(settled.refunded <= one.tokens);
                (one.tokens, one.open) = (one.tokens - settled.refunded, false);
                state = settled.state;
            }
            let ask = if estimated { estimate(cost) } else { tokens(cost) };
            let plan = window.plan(state, ask, now);
            if plan.admission == Admission::Allow {
                state = plan.charged;
                log.push(Admitted { at: now, tokens: cost, slice: plan.slice, open: estimated });
            }
            // Of all stretches only those that end at an admission can have just become too full.
            let in_it = log.iter().filter(|one| now.time.nanos_since(one.at.time) <= per);
            prop_assert!(in_it.map(|one| one.tokens).sum::<u64>() <= window.limit());
        }
    }

    /// What nobody asked for in the last slices is all there.
    #[test]
    fn all_of_it_is_there_after_one_slice_more_than_the_period(window in windows(), steps in steps()) {
        let (mut state, mut now) = (None, Moment::ZERO);
        for (pause, cost, ..) in steps {
            now = later(now, pause);
            state = window.plan(state, tokens(cost), now).charged.or(state);
        }
        let fills_in = window.fills_in().unwrap();
        let slice = window.per().as_nanos().div_ceil(SLICES as u128);
        prop_assert_eq!(fills_in.as_nanos(), slice * (SLICES as u128 + 1));
        let full = window.plan(state, tokens(window.limit()), later(now, fills_in.as_nanos() as u64));
        prop_assert_eq!(full.admission, Admission::Allow);
    }

    /// What comes back is taken off the slice that was charged: the others leave when they would have.
    #[test]
    fn a_refund_goes_into_the_slice_that_was_charged(
        limit in 10..50_u64,
        charges in vec(0..7_u64, SLICES + 3),
        which in any::<Index>(),
        back in 1..7_u64,
    ) {
        let window = SlidingWindow::new(limit, Duration::from_secs(6)).unwrap();
        let mut state = None;
        let mut slices = Vec::new();
        let mut now = Moment::ZERO;
        for cost in charges {
            let plan = window.plan(state, estimate(cost), now);
            let charged = if plan.admission == Admission::Allow { cost } else { 0 };
            state = plan.charged.filter(|_| charged > 0).or(state);
            slices.push((plan.slice, charged));
            now = later(now, SECOND);
        }
        let now = Moment::from_nanos(now.time.as_nanos() - SECOND);
        let Some(before) = window.settle(state, settlement(0, 0), now).state else { return Ok(()) };
        let index = which.index(slices.len());
        let (slice, charged) = slices[index];
        let known = Settlement { slice: Some(slice), ..settlement(charged, charged.saturating_sub(back)) };
        let settled = window.settle(Some(before), known, now);
        let age = slices.len() - 1 - index;
        if age > SLICES {
            prop_assert_eq!(settled.refunded, 0, "it has left");
        } else {
            prop_assert_eq!(settled.refunded, back.min(charged));
        }
        let current = |state| window.plan(Some(state), tokens(0), now).before.remaining;
        prop_assert_eq!(current(settled.state.unwrap()), current(before) + settled.refunded);
        for later_slice in 1..=SLICES as u64 + 1 {
            let moment = later(now, later_slice * SECOND);
            let left = |state| window.plan(Some(state), tokens(0), moment).before.remaining;
            let gone = age as u64 + later_slice > SLICES as u64;
            let more = if gone { 0 } else { settled.refunded };
            prop_assert_eq!(left(settled.state.unwrap()), left(before) + more);
        }
    }

    /// Counts stop where they would begin again at nothing.
    #[test]
    fn counts_saturate(owed in vec(0..u64::MAX, 1..10), far in any::<u64>()) {
        let window = SlidingWindow::new(MAX_LIMIT, Duration::from_secs(6)).unwrap();
        let (mut state, mut now) = (None, Moment::ZERO);
        let mut spent = 0;
        for (index, actual) in owed.into_iter().enumerate() {
            let known = Settlement { max_debt: u64::MAX, ..settlement(0, actual) };
            let settled = window.settle(state, known, now);
            prop_assert_eq!(settled.owed + settled.dropped, actual);
            spent += settled.owed;
            state = settled.state;
            let counted = state.map_or(0, |state| window.spent(state, now));
            prop_assert_eq!(counted, spent);
            if index.is_multiple_of(3) {
                now = later(now, SECOND);
            }
        }
        // The end of time is a time as well.
        let end = Moment::from_nanos(far.max(now.time.as_nanos()));
        let plan = window.plan(state, tokens(1), end);
        prop_assert!(plan.before.remaining <= MAX_LIMIT);
        let newest = window.having_spent(MAX_LIMIT, Moment::from_nanos(u64::MAX));
        let plan = window.plan(Some(newest), tokens(1), Moment::from_nanos(u64::MAX));
        prop_assert_ne!(plan.admission, Admission::Allow);
        let full = State::new([u32::MAX; SLICES + 1], u64::MAX);
        prop_assert_eq!(window.plan(Some(full), tokens(0), Moment::ZERO).before.remaining, 0);
    }

    /// Other periods have other slices: all that was spent is as if it were spent now.
    #[test]
    fn a_change_of_period_holds_what_was_spent_for_a_whole_new_one(
        older in windows(),
        newer in windows(),
        steps in steps(),
    ) {
        prop_assume!(older.per() != newer.per());
        let per = older.per().as_nanos() as u64;
        let (mut state, mut now) = (None, Moment::ZERO);
        for (pause, cost, ..) in steps {
            now = later(now, (u128::from(per) * u128::from(pause) / 1_000) as u64);
            let plan = older.plan(state, tokens(cost), now);
            if plan.admission == Admission::Allow {
                state = plan.charged;
            }
        }
        let Some(state) = state else { return Ok(()) };
        let spent = older.spent(state, now);
        let rebased = newer.rebase(state, Some(&older), now);
        // In the last nanosecond of a slice it leaves after the other six, which make one period at least.
        let still = later(now, newer.per().as_nanos() as u64);
        prop_assert_eq!(newer.spent(rebased, now), spent);
        prop_assert_eq!(newer.spent(rebased, still), spent);
        let fills_in = newer.fills_in().unwrap().as_nanos() as u64;
        prop_assert_eq!(newer.spent(rebased, later(now, fills_in)), 0);
    }

    /// A lease is a share, charged where it is given, and what is returned goes back there.
    #[test]
    fn a_lease_takes_its_share_and_no_more(window in windows(), wanted in 0..100_u64, clients in 1..9_u32) {
        let ask = Ask::spend(wanted).to(Purpose::Lease { clients });
        let plan = window.plan(None, ask, Moment::ZERO);
        prop_assert_eq!(plan.admission, Admission::Allow);
        prop_assert_eq!(plan.granted, wanted.min(window.limit() / (2 * u64::from(clients))));
    }
}

/// The price of slices, as it is stated.
#[test]
fn steady_demand_is_granted_six_sevenths() {
    let window = SlidingWindow::new(70, Duration::from_secs(6)).unwrap();
    let (mut state, mut admitted) = (None, 0);
    for hundredths in 0..42_000 {
        let plan = window.plan(state, tokens(1), Moment::from_nanos(hundredths * SECOND / 100));
        if plan.admission == Admission::Allow {
            (state, admitted) = (plan.charged, admitted + 1);
        }
    }
    assert_eq!(admitted, 70 * 420 / 7);
}
