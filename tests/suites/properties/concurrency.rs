//! Permits, against a list of who holds them.

use std::time::Duration;

use fusebox_core::{
    Admission, Cell, Concurrency, Kind, Limit, Moment, Policy, Settlement, State, concurrency,
};
use proptest::{collection::vec, prelude::*, sample::Index};

use crate::{later, settlement, tokens};

const SECOND: u64 = 1_000_000_000;

fn permits() -> impl Strategy<Value = Concurrency> {
    (1..30_u64, 1..60_u64)
        .prop_map(|(limit, ttl)| Concurrency::new(limit, Duration::from_secs(ttl)).unwrap())
}

fn attested(
    limit: Concurrency,
    state: concurrency::State,
    permits: u64,
    now: Moment,
) -> Option<concurrency::State> {
    let cell = Cell { revision: 1, state: State::Concurrency(state) };
    let attested = Policy::new(Limit::Concurrency(limit), 0).attested(cell, permits, now)?;
    let State::Concurrency(state) = attested.state else { panic!("of another kind") };
    Some(state)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_024))]

    /// A permit is had if one is free, and never otherwise, whatever time it is.
    #[test]
    fn no_more_permits_are_out_than_there_are(
        limit in permits(),
        steps in vec((0..2 * SECOND, 0..8_u64, prop::option::of(any::<Index>())), 1..80),
    ) {
        let (mut state, mut now, mut held) = (None, Moment::ZERO, Vec::new());
        for (pause, wanted, released) in steps {
            now = later(now, pause);
            if let Some(which) = released.filter(|_| !held.is_empty()) {
                let permits: u64 = held.swap_remove(which.index(held.len()));
                // Told of on the way, and again: it is released once it ends.
                let known = settlement(permits, 0);
                let renewed = limit.settle(state, Settlement { partial: true, ..known }, now);
                prop_assert_eq!((renewed.refunded, renewed.state), (0, state));
                let settled = limit.settle(state, known, now);
                prop_assert_eq!((settled.refunded, settled.owed), (permits, 0));
                state = settled.state;
            }
            let out: u64 = held.iter().sum();
            let plan = limit.plan(state, tokens(wanted), now);
            prop_assert_eq!(plan.before.remaining, limit.limit() - out);
            match plan.admission {
                Admission::Allow => {
                    prop_assert!(out + wanted <= limit.limit());
                    held.push(wanted);
                    state = plan.charged;
                }
                Admission::Deny { retry_after, .. } => {
                    prop_assert!(out + wanted > limit.limit());
                    prop_assert_eq!(retry_after, None, "nobody knows when a call ends");
                }
            }
            let full = state.is_none_or(|state| limit.full_at(state, now).is_some());
            prop_assert_eq!(full, held.iter().sum::<u64>() == 0);
        }
    }

    /// After a crash what was held is held on without a name for one life of a permit; who tells of some holds
    /// them, and none is counted twice or set free too early.
    #[test]
    fn what_a_crash_forgot_is_held_until_it_would_have_expired(
        limit in permits(),
        held in 0..30_u64,
        known in 0..30_u64,
        steps in vec((0..2 * SECOND, 0..6_u64, any::<bool>()), 1..40),
    ) {
        let (held, ttl) = (held.min(limit.limit()), limit.ttl().as_nanos() as u64);
        let was = concurrency::State { held, ..concurrency::State::default() };
        let recovered_at = Moment::from_nanos(1_000 * SECOND);
        let mut state = limit.revive(was, known, recovered_at);
        let (mut named, mut anonymous) = (known.min(held), held - known.min(held));
        prop_assert_eq!((state.held, state.anonymous), (named, anonymous));

        let mut now = recovered_at;
        for (pause, permits, attests) in steps {
            now = later(now, pause);
            if now.time.nanos_since(recovered_at.time) >= ttl {
                anonymous = 0;
            }
            if attests {
                let after = attested(limit, state, permits, now);
                prop_assert_eq!(after.is_some(), permits <= anonymous);
                if let Some(after) = after {
                    state = after;
                    (named, anonymous) = (named + permits, anonymous - permits);
                }
            } else {
                let plan = limit.plan(Some(state), tokens(permits), now);
                let fits = named + anonymous + permits <= limit.limit();
                prop_assert_eq!(plan.admission == Admission::Allow, fits);
                if let Admission::Deny { retry_after: Some(wait), .. } = plan.admission {
                    let nanos = wait.as_nanos() as u64;
                    prop_assert_eq!(later(now, nanos), later(recovered_at, ttl));
                }
                if fits {
                    named += permits;
                    state = plan.charged.unwrap_or(state);
                }
            }
            let taken = limit.limit() - limit.plan(Some(state), tokens(0), now).before.remaining;
            prop_assert_eq!(taken, named + anonymous);
        }
    }

    /// A second crash begins the wait anew: those who took permits since may hold them as long.
    #[test]
    fn a_second_crash_forgets_no_more_than_it_must(limit in permits(), held in 1..30_u64, taken in 0..30_u64) {
        let held = held.min(limit.limit());
        let was = concurrency::State { held, ..concurrency::State::default() };
        let first = Moment::from_nanos(1_000 * SECOND);
        let state = limit.revive(was, 0, first);
        let state = concurrency::State { held: taken.min(limit.limit() - held), ..state };
        let second = later(first, limit.ttl().as_nanos() as u64 / 2);
        let revived = limit.revive(state, 0, second);
        prop_assert_eq!(revived.anonymous, state.held + held);
        let expired = later(second, limit.ttl().as_nanos() as u64);
        prop_assert_eq!(limit.spent(revived, Moment::from_nanos(expired.time.as_nanos() - 1)), state.held + held);
        prop_assert_eq!(limit.spent(revived, expired), 0);
    }

    /// Most permits come and go without a write.
    #[test]
    fn a_mark_is_made_in_whole_steps(limit in permits(), held in 0..30_u64) {
        let held = held.min(limit.limit());
        let state = concurrency::State { held, ..concurrency::State::default() };
        let mark = limit.mark(state, 0, Moment::ZERO);
        prop_assert!(mark.spent >= held && mark.spent < held + limit.max_step());
        prop_assert!(mark.spent <= limit.limit());
        for fewer in 0..=held {
            let fewer = concurrency::State { held: fewer, ..state };
            prop_assert!(limit.covers(mark, state, fewer));
        }
        let more = concurrency::State { held: mark.spent + 1, ..state };
        prop_assert!(!limit.covers(mark, state, more));
    }
}
