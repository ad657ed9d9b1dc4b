//! What every kind must keep: waits, reserves, settlements, changes of settings, and marks.

use std::time::Duration;

use fusebox_core::{
    Admission, Ask, Cell, Concurrency, Kind, Limit, Mark, Moment, Policy, Reason, RetryBudget,
    Settlement, SlidingWindow, State, TokenBucket, WindowLimit,
};
use proptest::{collection::vec, prelude::*, sample::Index};

use crate::{estimate, later, settlement, tokens};

const SECOND: u64 = 1_000_000_000;

/// Periods of which many divide into no slices.
fn periods() -> impl Strategy<Value = Duration> {
    prop_oneof![Just(SECOND), Just(6 * SECOND), SECOND..60 * SECOND].prop_map(Duration::from_nanos)
}

/// Tokens that are charged and settled: no permits, no retries.
fn rates() -> impl Strategy<Value = Limit> {
    let sizes = || (1..30_u64, periods());
    prop_oneof![
        (sizes(), 1..30_u64).prop_map(|((limit, per), burst)| {
            Limit::TokenBucket(TokenBucket::new(limit, per, burst).unwrap())
        }),
        sizes().prop_map(|(limit, per)| Limit::Window(WindowLimit::fixed(limit, per).unwrap())),
        sizes()
            .prop_map(|(limit, per)| Limit::SlidingWindow(SlidingWindow::new(limit, per).unwrap())),
    ]
}

fn permits() -> impl Strategy<Value = Limit> {
    let sizes = (1..30_u64, periods());
    sizes.prop_map(|(limit, ttl)| Limit::Concurrency(Concurrency::new(limit, ttl).unwrap()))
}

fn retry_budgets() -> impl Strategy<Value = Limit> {
    let sizes = (0..=1_000_u16, 0..5_u32, periods());
    sizes.prop_map(|(ratio, floor, ttl)| {
        Limit::RetryBudget(RetryBudget::new(ratio, floor, ttl).unwrap())
    })
}

fn limits() -> impl Strategy<Value = Limit> {
    prop_oneof![3 => rates(), 1 => permits(), 1 => retry_budgets()]
}

/// A pause in thousandths of the limit's period, and what is asked then.
type History = Vec<(u64, Ask)>;

fn asks() -> impl Strategy<Value = Ask> {
    (0..12_u64, any::<bool>()).prop_map(|(amount, retry)| Ask { retry, ..tokens(amount) })
}

fn histories() -> impl Strategy<Value = History> {
    let pauses = prop_oneof![Just(0), 0..200_u64, 0..1_500_u64];
    vec((pauses, asks()), 1..40)
}

/// A cell of one limit, and the moment that it is at.
#[derive(Clone, Copy)]
struct Life {
    limit: Limit,
    state: Option<State>,
    now: Moment,
}

impl Life {
    fn new(limit: Limit) -> Self {
        Self { limit, state: None, now: Moment::from_nanos(1_000 * SECOND + 7) }
    }

    fn of(limit: Limit, history: History) -> Self {
        let mut life = Self::new(limit);
        for (pause, ask) in history {
            life.pause(pause);
            life.charge(ask);
        }
        life
    }

    /// Lets so many thousandths of the period pass.
    fn pause(&mut self, thousandths: u64) {
        let period = match self.limit {
            Limit::TokenBucket(bucket) => bucket.per(),
            Limit::Window(window) => window.longest(),
            Limit::SlidingWindow(window) => window.per(),
            Limit::Concurrency(permits) => permits.ttl(),
            Limit::RetryBudget(budget) => budget.ttl(),
        };
        self.now = later(self.now, period.as_nanos() as u64 * thousandths / 1_000);
    }

    /// Whether it is allowed; then it is charged.
    fn charge(&mut self, ask: Ask) -> bool {
        let plan = self.limit.plan(self.state, ask, self.now);
        let allowed = plan.admission == Admission::Allow;
        if allowed {
            self.state = plan.charged;
        }
        allowed
    }

    fn settle(&mut self, known: Settlement) -> [u64; 3] {
        let settled = self.limit.settle(self.state, known, self.now);
        self.state = settled.state;
        [settled.refunded, settled.owed, settled.dropped]
    }

    fn admission(&self, ask: Ask, now: Moment) -> Admission {
        self.limit.plan(self.state, ask, now).admission
    }

    fn remaining(&self, now: Moment) -> u64 {
        self.limit.plan(self.state, tokens(0), now).before.remaining
    }

    fn spent(&self) -> u64 {
        self.state.map_or(0, |state| self.limit.spent(state, self.now))
    }

    /// A slice, or what is most like one: longer than any wait between two changes by time alone.
    fn long_after(&self) -> impl Iterator<Item = Moment> {
        let now = self.now;
        (1..200).map(move |seconds| later(now, seconds * SECOND))
    }
}

/// What a kind holds when nothing was earned or spent.
fn most_left(limit: &Limit) -> u64 {
    limit.plan(None, tokens(0), Moment::ZERO).before.remaining
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_024))]

    /// A denial holds for a lone caller until the promised instant, and not a nanosecond longer; where none is
    /// promised, no time mends it.
    #[test]
    fn the_wait_of_a_denial_is_exact(
        limit in limits(),
        history in histories(),
        ask in asks(),
        reserved in 0..8_u64,
    ) {
        let life = Life::of(limit, history);
        let ask = Ask { reserved, ..ask };
        match life.admission(ask, life.now) {
            Admission::Allow => {}
            Admission::Deny { retry_after: Some(wait), .. } => {
                let wait = wait.as_nanos() as u64;
                prop_assert!(wait > 0);
                prop_assert_ne!(life.admission(ask, later(life.now, wait - 1)), Admission::Allow);
                prop_assert_eq!(life.admission(ask, later(life.now, wait)), Admission::Allow);
            }
            Admission::Deny { retry_after: None, .. } => for moment in life.long_after() {
                prop_assert_ne!(life.admission(ask, moment), Admission::Allow);
            },
        }
    }

    /// A caller is admitted if what it leaves is at least what is kept from it, and told why if not.
    #[test]
    fn a_reserve_is_never_taken(
        limit in prop_oneof![rates(), permits()],
        history in histories(),
        amount in 1..12_u64,
        reserved in 0..12_u64,
    ) {
        let life = Life::of(limit, history);
        let left = life.remaining(life.now);
        let plan = limit.plan(life.state, Ask { reserved, ..tokens(amount) }, life.now);
        prop_assert_eq!(plan.before.remaining, left.saturating_sub(reserved));
        prop_assert_eq!(plan.limit, limit.capacity().saturating_sub(reserved));
        match plan.admission {
            Admission::Allow => prop_assert!(amount + reserved <= left),
            Admission::Deny { reason, .. } => {
                prop_assert!(amount + reserved > left);
                prop_assert_eq!(reason == Reason::ReservedForPriority, amount <= left);
            }
        }
    }

    /// A cell is full when it says so; then it is as good as none.
    #[test]
    fn a_cell_is_full_when_it_says(limit in limits(), history in histories()) {
        let life = Life::of(limit, history);
        let Some(full_at) = life.state.and_then(|state| limit.full_at(state, life.now)) else {
            return Ok(());
        };
        let full_at = later(life.now, full_at.nanos_since(life.now.time));
        let level = |state| limit.plan(state, tokens(0), full_at).before;
        prop_assert_eq!(level(life.state), level(None));
        if full_at != life.now {
            let nearly = Moment::from_nanos(full_at.time.as_nanos() - 1);
            prop_assert_ne!(limit.plan(life.state, tokens(0), nearly).before.reset_after, Duration::ZERO);
        }
    }

    /// Totals that are told on the way, again, or too late, come to what the last one alone does.
    #[test]
    fn partial_totals_add_up_to_the_last(
        limit in rates(),
        history in histories(),
        charged in 1..8_u64,
        totals in vec(0..20_u64, 1..6),
        max_debt in 0..10_u64,
    ) {
        let mut life = Life::of(limit, history);
        let charged = charged.min(life.remaining(life.now));
        if charged == 0 {
            return Ok(());
        }
        let plan = limit.plan(life.state, estimate(charged), life.now);
        prop_assert_eq!(plan.admission, Admission::Allow);
        life.state = plan.charged;
        let known = Settlement { slice: Some(plan.slice), max_debt, ..settlement(charged, 0) };

        let mut step_by_step = life;
        let (mut told, mut sums) = (0, [0; 3]);
        for total in &totals {
            let actual = told.max(*total);
            for told in [told, actual] {
                let partial = Settlement { told, actual, partial: true, ..known };
                let before = step_by_step.state;
                let [refunded, owed, dropped] = step_by_step.settle(partial);
                prop_assert_eq!(refunded, 0, "more may follow");
                prop_assert!(told < actual || step_by_step.state == before && owed + dropped == 0);
                sums = [sums[0], sums[1] + owed, sums[2] + dropped];
            }
            told = actual;
        }
        let last = step_by_step.settle(Settlement { told, actual: told, ..known });
        for (sum, last) in sums.iter_mut().zip(last) {
            *sum += last;
        }

        let mut at_once = life;
        prop_assert_eq!(at_once.settle(Settlement { actual: told, ..known }), sums);
        prop_assert_eq!(at_once.state, step_by_step.state);
        prop_assert_eq!(sums[0] + told, charged + sums[1] + sums[2]);
        prop_assert!(at_once.spent() <= limit.capacity() + max_debt);
    }

    /// What comes back is what was charged in a slice, and nothing comes back to one that has left.
    #[test]
    fn what_comes_back_makes_no_more_than_was_taken(
        limit in rates(),
        history in histories(),
        charged in 1..8_u64,
        pause in 0..3_000_u64,
        more in histories(),
    ) {
        let mut life = Life::of(limit, history);
        let charged = charged.min(life.remaining(life.now));
        if charged == 0 {
            return Ok(());
        }
        let plan = limit.plan(life.state, estimate(charged), life.now);
        prop_assert_eq!(plan.admission, Admission::Allow);
        let mut never = life;
        life.state = plan.charged;
        // One cell is charged and given all of it back, the other never was: what both then have is the same,
        // or less where the time of it had passed.
        life.pause(pause);
        never.pause(pause);
        life.settle(Settlement { slice: Some(plan.slice), ..settlement(charged, 0) });
        prop_assert!(life.remaining(life.now) <= never.remaining(never.now));
        for (pause, ask) in more {
            life.pause(pause);
            never.pause(pause);
            prop_assert!(life.remaining(life.now) <= never.remaining(never.now));
            if life.charge(ask) {
                prop_assert!(never.charge(ask));
            }
        }
    }

    /// All of it spent is nothing left.
    #[test]
    fn a_cell_that_has_spent_its_capacity_has_nothing_left(limit in limits(), at in any::<u32>()) {
        let at = Moment::from_nanos(u64::from(at) * SECOND / 7);
        let state = limit.having_spent(limit.capacity(), at);
        let life = Life { limit, state: Some(state), now: at };
        prop_assert_eq!(life.remaining(at), 0);
        let nothing_left = Ask { retry: true, ..tokens(1) };
        prop_assert_ne!(life.admission(nothing_left, at), Admission::Allow);
        let emptied = Policy::new(limit, 0).emptied(at);
        prop_assert_eq!(emptied.state(None), Some(state));
    }

    /// A cell that is counted by another limit from now on has spent what it had, of any kind, both ways.
    #[test]
    fn what_was_spent_stays_spent(older in limits(), newer in limits(), history in histories()) {
        let life = Life::of(older, history);
        let Some(state) = life.state else { return Ok(()) };
        let spent = life.spent();
        let cell = Cell { revision: 1, state };
        let changed = Policy::new(older, 0).changed(newer, life.now);
        let adopted = Policy::new(newer, 0).adopted(cell, &Policy::new(older, 0), life.now);
        for state in [changed.current(cell), adopted.state] {
            let newly = Life { limit: newer, state: Some(state), ..life };
            let most = most_left(&newer);
            if !older.is_like(&newer) {
                prop_assert_eq!(newly.spent(), spent.min(newer.capacity()).min(most));
            } else {
                prop_assert!(newly.spent() >= spent.min(most));
            }
            let keeps_what_was_earned = matches!((older, newer), (Limit::RetryBudget(_), Limit::RetryBudget(_)));
            prop_assert!(
                keeps_what_was_earned || newly.remaining(life.now) <= most.saturating_sub(spent)
            );
            // And as a cell that was charged so much there.
            let mut alike = Life { state: None, ..newly };
            if spent > 0 && alike.charge(Ask { retry: true, ..tokens(spent) }) {
                prop_assert!(newly.remaining(life.now) <= alike.remaining(life.now));
            }
        }
    }
}

/// The record of a cell, kept as a storage keeps it: a mark is made when the last one does not cover.
struct Kept {
    mark: Option<Mark>,
    record: Option<State>,
}

impl Kept {
    /// The record after a charge.
    fn follow(&mut self, limit: &Limit, before: State, life: &Life, step: u64, written: bool) {
        let Some(after) = life.state else { return };
        let covered = self.mark.filter(|mark| limit.covers(*mark, before, after));
        let mark = covered.unwrap_or_else(|| limit.mark(after, step, life.now));
        // One that covers may be written again at any time, as of then.
        if covered.is_none() || written {
            self.record = Some(after.kept(mark));
        }
        self.mark = Some(mark);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_048))]

    /// Whatever was recovered from what is on disk admits nothing that the living would not, now or later.
    #[test]
    fn what_is_recovered_admits_no_more_than_the_living(
        limit in limits(),
        history in vec((prop_oneof![2 => Just(0), 1 => 0..1_500_u64], asks(), any::<bool>()), 1..40),
        released in vec(any::<Index>(), 40),
        step in 0..5_u64,
        away in 0..1_500_u64,
    ) {
        let mut life = Life::new(limit);
        let mut kept = Kept { mark: None, record: None };
        let mut held = Vec::new();
        for ((pause, ask, written), which) in history.into_iter().zip(released) {
            life.pause(pause);
            let before = life.state;
            if !life.charge(ask) || life.state == before {
                continue;
            }
            let state = life.state.unwrap();
            kept.follow(&limit, before.unwrap_or(state), &life, step, written);
            let is_permit = matches!(limit, Limit::Concurrency(_));
            held.extend(is_permit.then_some(ask.tokens));
            if written && !held.is_empty() {
                let permits = held.swap_remove(which.index(held.len()));
                let before = life.state.unwrap();
                life.settle(settlement(permits, 0));
                kept.follow(&limit, before, &life, step, false);
            }
        }
        let Some(record) = kept.record else { return Ok(()) };
        let state = life.state.unwrap();
        prop_assert!(limit.covers(state.lowest_mark(life.now.time), state, state));

        life.pause(away);
        let revived = match limit {
            // Never written: after a crash the floor is spent.
            Limit::RetryBudget(_) => limit.having_spent(limit.capacity(), life.now),
            _ => limit.revive(record, 0, life.now),
        };
        let revived = Life { state: Some(revived), ..life };
        let lowest = state.kept(state.lowest_mark(life.now.time));
        let lowest = Life { state: Some(limit.revive(lowest, 0, life.now)), ..life };
        let mut moments = vec![life.now];
        let mut clock = life;
        for thousandths in [1, 150, 170, 300] {
            clock.pause(thousandths);
            moments.push(clock.now);
        }
        for moment in moments {
            prop_assert!(revived.remaining(moment) <= life.remaining(moment));
            if !matches!(limit, Limit::RetryBudget(_)) {
                prop_assert!(lowest.remaining(moment) <= life.remaining(moment));
            }
        }
    }

    /// A record of a time to come, from a clock that was wrong, refills from now on.
    #[test]
    fn a_record_of_the_future_locks_nobody_out(limit in rates(), history in histories(), back in 0..9_000_u64) {
        let life = Life::of(limit, history);
        let Some(state) = life.state else { return Ok(()) };
        let nanos = life.now.time.as_nanos().saturating_sub(back * SECOND);
        let early = Moment::from_nanos(nanos);
        let revived = Life { state: Some(limit.revive(state, 0, early)), now: early, ..life };
        let fills_in = limit.fills_in().unwrap().as_nanos() as u64;
        prop_assert!(revived.remaining(early) <= most_left(&limit));
        // A window that the clock comes to before one would be over is the current one, from its start on.
        let windows = if matches!(limit, Limit::Window(_)) { 2 } else { 1 };
        let full_at = limit.full_at(revived.state.unwrap(), early).unwrap();
        let full_after = full_at.nanos_since(early.time);
        prop_assert!(full_after <= windows * fills_in);
        prop_assert_eq!(revived.remaining(later(early, full_after)), most_left(&limit));
    }
}
