//! Windows of the wall clock, against what was charged in each, and clocks that step.

use std::{collections::HashMap, time::Duration};

use fusebox_core::{
    Admission, Ask, Kind, Moment, Settlement, Wall, Window, WindowLimit, window::State,
};
use proptest::{collection::vec, prelude::*};

use crate::{estimate, later, settlement, tokens};

const SECOND: u64 = 1_000_000_000;
const DAY: u64 = 86_400 * SECOND;

fn fixed() -> impl Strategy<Value = WindowLimit> {
    let per = prop_oneof![1..100_u64, Just(SECOND), Just(DAY), 1..400 * SECOND];
    (1..30_u64, per)
        .prop_map(|(limit, per)| WindowLimit::fixed(limit, Duration::from_nanos(per)).unwrap())
}

/// Pauses in thousandths of the longest window, and tokens.
fn histories() -> impl Strategy<Value = Vec<(u64, u64)>> {
    vec((prop_oneof![Just(0), 0..300_u64, 900..1_100_u64, 0..3_000_u64], 0..15_u64), 1..60)
}

fn pause(limit: &WindowLimit, thousandths: u64) -> u64 {
    (limit.longest().as_nanos() * u128::from(thousandths)).div_ceil(1_000) as u64
}

/// Some moment of a day in 2026, after some time of service.
fn start() -> Moment {
    Moment { wall: Wall::from_nanos(1_790_000_000 * SECOND + 12_345), ..Moment::from_nanos(77) }
}

fn calendar(lengths: &[u64]) -> impl Fn(Wall) -> Window {
    let mut bounds = vec![start().wall];
    for length in lengths.iter().cycle().take(200) {
        bounds.push(bounds.last().unwrap().after(Duration::from_nanos(*length)));
    }
    move |wall| {
        let next = bounds.partition_point(|bound| *bound <= wall);
        Window { start: bounds[next - 1], end: bounds[next] }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_024))]

    /// In each window the limit is there, and nothing beyond it.
    #[test]
    fn a_fixed_window_admits_what_fits_in_it(limit in fixed(), history in histories()) {
        let per = limit.longest().as_nanos() as u64;
        let mut charged = HashMap::<u64, u64>::new();
        let (mut state, mut now) = (None, start());
        for (thousandths, cost) in history {
            now = later(now, pause(&limit, thousandths));
            let window = charged.entry(now.wall.as_nanos() / per).or_default();
            let plan = limit.plan(state, tokens(cost), now);
            prop_assert_eq!(plan.before.remaining, limit.limit() - *window);
            prop_assert_eq!(plan.admission == Admission::Allow, *window + cost <= limit.limit());
            if plan.admission == Admission::Allow {
                *window += cost;
                state = plan.charged;
            }
        }
    }

    /// The same where windows differ in length.
    #[test]
    fn a_window_of_a_calendar_admits_what_fits_in_it(
        most in 1..30_u64,
        lengths in vec(20 * DAY..=31 * DAY, 1..12),
        history in vec((0..20 * DAY, 0..15_u64), 1..60),
    ) {
        let limit = WindowLimit::calendar(most, Duration::from_nanos(31 * DAY)).unwrap();
        let window_at = calendar(&lengths);
        let mut charged = HashMap::<Wall, u64>::new();
        let (mut state, mut now) = (None, start());
        for (nanos, cost) in history {
            now = later(now, nanos);
            let window = window_at(now.wall);
            let ask = Ask { window: Some(window), ..tokens(cost) };
            let charged = charged.entry(window.start).or_default();
            let plan = limit.plan(state, ask, now);
            prop_assert_eq!(plan.admission == Admission::Allow, *charged + cost <= most);
            match plan.admission {
                Admission::Allow => {
                    *charged += cost;
                    state = plan.charged;
                }
                Admission::Deny { retry_after, .. } => prop_assert_eq!(
                    retry_after,
                    (cost <= most).then(|| Duration::from_nanos(window.end.nanos_since(now.wall)))
                ),
            }
        }
    }

    /// A window goes on to its end, whatever the calendar says meanwhile.
    #[test]
    fn a_calendar_that_changes_cuts_no_window_short(most in 1..30_u64, early in 1..DAY, cost in 1..30_u64) {
        let limit = WindowLimit::calendar(most, Duration::from_nanos(DAY)).unwrap();
        let now = start();
        let window = |nanos| Window { start: now.wall, end: later(now, nanos).wall };
        let ask = |end| Ask { window: Some(window(end)), ..tokens(cost.min(most)) };
        let state = limit.plan(None, ask(DAY), now).charged;
        let moved = later(now, early);
        let other = Window { start: moved.wall, end: later(moved, DAY).wall };
        let plan = limit.plan(state, Ask { window: Some(other), ..tokens(0) }, moved);
        prop_assert_eq!(plan.before.remaining, most - cost.min(most));
        let over = later(now, DAY);
        let plan = limit.plan(state, Ask { window: Some(other), ..tokens(0) }, over);
        prop_assert_eq!(plan.before.remaining, most);
    }

    /// What comes back to another window is acknowledged, and changes nothing.
    #[test]
    fn a_refund_goes_into_the_window_that_was_charged(
        limit in fixed(),
        cost in 1..15_u64,
        thousandths in 0..3_000_u64,
    ) {
        let cost = cost.min(limit.limit());
        let per = limit.longest().as_nanos() as u64;
        let plan = limit.plan(None, estimate(cost), start());
        let now = later(start(), pause(&limit, thousandths));
        let state = limit.plan(plan.charged, tokens(1), now).charged;
        let known = Settlement { slice: Some(plan.slice), ..settlement(cost, 0) };
        let same = start().wall.as_nanos() / per == now.wall.as_nanos() / per;
        let settled = limit.settle(state, known, now);
        prop_assert_eq!(settled.refunded, if same { cost } else { 0 });
        prop_assert!(same || settled.state == state);
        let unknown = Settlement { slice: None, ..known };
        prop_assert_eq!(limit.settle(state, unknown, now).refunded, 0, "slices of other settings");
    }

    /// However far the wall clock steps back: until the window ends, or one would have, nothing is granted
    /// twice; then it is, and the wait for that is exact.
    #[test]
    fn a_step_back_grants_nothing_twice_and_locks_nobody_out(
        limit in fixed(),
        adopted in any::<bool>(),
        into in 0..1_000_u64,
        back in prop_oneof![0..2_000_u64, 0..1_000_000_u64],
        on in vec(0..700_u64, 1..8),
    ) {
        let full = limit.limit();
        let longest = limit.longest().as_nanos() as u64;
        let charged_at = later(start(), pause(&limit, into));
        let state = if adopted {
            limit.having_spent(full, charged_at)
        } else {
            limit.plan(None, tokens(full), charged_at).charged.unwrap()
        };
        let fixed_end = (charged_at.wall.as_nanos() / longest + 1) * longest;
        let wall = charged_at.wall.as_nanos().saturating_sub(pause(&limit, back));
        let mut now = Moment { wall: Wall::from_nanos(wall), ..charged_at };
        for thousandths in on {
            now = later(now, pause(&limit, thousandths));
            let is_over = now.wall.as_nanos() >= fixed_end;
            let would_be_over = now.time.nanos_since(charged_at.time) >= longest;
            let admission = limit.plan(Some(state), tokens(1), now).admission;
            match admission {
                Admission::Allow => prop_assert!(is_over || would_be_over),
                Admission::Deny { retry_after, .. } => {
                    prop_assert!(!is_over);
                    let wait = retry_after.unwrap().as_nanos() as u64;
                    prop_assert!(wait > 0 && wait <= 2 * longest);
                    let at = |nanos| limit.plan(Some(state), tokens(1), later(now, nanos)).admission;
                    // One that was counted by no window before goes from one into the next until its time.
                    if !adopted {
                        prop_assert_ne!(at(wait - 1), Admission::Allow);
                        prop_assert_eq!(at(wait), Admission::Allow);
                    }
                    let held_for = longest - now.time.nanos_since(charged_at.time).min(longest);
                    let until_end = fixed_end - now.wall.as_nanos();
                    prop_assert!([held_for, until_end].map(at).contains(&Admission::Allow));
                    prop_assert!(limit.spent(state, now) > 0);
                }
            }
            let full_at = limit.full_at(state, now).unwrap();
            let full_at = later(now, full_at.nanos_since(now.time));
            prop_assert_eq!(limit.plan(Some(state), tokens(0), full_at).before.remaining, full);
        }
    }

    /// New settings end a window no later than one of theirs would.
    #[test]
    fn a_change_of_period_keeps_the_window_for_one_of_the_new_at_most(
        older in fixed(),
        newer in fixed(),
        cost in 1..15_u64,
        thousandths in 0..1_000_u64,
    ) {
        let cost = cost.min(older.limit());
        let state = older.plan(None, tokens(cost), start()).charged.unwrap();
        let changed_at = later(start(), pause(&older, thousandths));
        let rebased = newer.rebase(state, Some(&older), changed_at);
        let was_over = older.spent(state, changed_at) == 0;
        let left = |moment| newer.plan(Some(rebased), tokens(0), moment).before.remaining;
        if !was_over {
            prop_assert_eq!(left(changed_at), newer.limit().saturating_sub(cost));
        }
        let longest = newer.longest().as_nanos() as u64;
        prop_assert_eq!(left(later(changed_at, longest)), newer.limit());
        let old_end = older.longest().as_nanos() as u64;
        prop_assert_eq!(left(later(start(), old_end.max(1))), newer.limit());
    }
}

#[test]
fn a_window_of_a_clock_that_was_years_ahead_is_held_for_one_period() {
    let hour = WindowLimit::fixed(10, Duration::from_secs(3_600)).unwrap();
    let ahead = Moment { wall: Wall::from_nanos(3_000_000_000 * SECOND), ..start() };
    for state in [hour.having_spent(10, ahead), hour.plan(None, tokens(10), ahead).charged.unwrap()]
    {
        let left = |seconds| {
            let now = later(start(), seconds * SECOND);
            hour.plan(Some(state), tokens(0), now).before.remaining
        };
        assert_eq!([left(0), left(3_599), left(3_600)], [0, 0, 10]);
        assert_eq!(hour.full_at(state, start()), Some(later(start(), 3_600 * SECOND).time));
    }
}

#[test]
fn a_second_back_at_the_turn_of_a_window_grants_neither_again() {
    let day = WindowLimit::fixed(10, Duration::from_nanos(DAY)).unwrap();
    let midnight = Moment { wall: Wall::from_nanos(20_000 * DAY), ..start() };
    let before = Moment { wall: Wall::from_nanos(20_000 * DAY - SECOND), ..midnight };
    let state: Option<State> = day.plan(None, tokens(10), midnight).charged;
    for seconds in [0, 1, 2, 86_000] {
        let plan = day.plan(state, tokens(1), later(before, seconds * SECOND));
        assert_ne!(plan.admission, Admission::Allow, "after {seconds} s");
    }
    let tomorrow = later(before, SECOND + DAY);
    assert_eq!(day.plan(state, tokens(10), tomorrow).admission, Admission::Allow);
}
