//! Several cells at once.

use std::time::Duration;

use fusebox_core::{
    Admission, Ask, Cells, Charging, Decision, Kind, Limit, MAX_RULES, Moment, Policy, Purpose,
    Rule, Rules, WindowLimit, apply,
};
use proptest::{collection::vec, prelude::*};

use crate::{buckets, later, policy, rule, spent, tokens};

/// Policies, and rounds of asks: which policy and cell, which share of the burst, after which pause.
type Rounds = Vec<(u64, Vec<(usize, u64)>)>;

fn rounds() -> impl Strategy<Value = (Vec<Policy>, Rounds)> {
    let policies = vec(buckets().prop_map(|bucket| policy(bucket, 0)), 1..5);
    policies.prop_flat_map(|policies| {
        let asks = vec((0..policies.len(), 0..=120_u64), 1..=MAX_RULES);
        (Just(policies), vec((0..10_000_000_000_u64, asks), 1..20))
    })
}

/// One cell for each policy; a cost in hundredths of its burst, so some are never possible.
fn rules<'a>(policies: &'a [Policy], asks: &[(usize, u64)]) -> Rules<'a> {
    let one = |(index, share): &(usize, u64)| {
        let policy = &policies[*index];
        let cost = u128::from(policy.limit.capacity()) * u128::from(*share) / 100;
        Rule { cell: *index, ..rule(policy, tokens(cost as u64)) }
    };
    asks.iter().map(one).collect()
}

/// The decision that one gets by asking each rule in turn, and taking all back on a denial.
fn one_by_one(rules: &Rules<'_>, cells: &mut Cells, now: Moment) -> bool {
    let before = cells.clone();
    let allowed = rules.iter().all(|rule| {
        let alone = Rules::from_iter([*rule]);
        apply(&alone, Charging::AllOrNothing, cells, now).allowed
    });
    if !allowed {
        *cells = before;
    }
    allowed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn all_or_nothing_is_all_or_nothing((policies, rounds) in rounds()) {
        let mut cells: Cells = policies.iter().map(|_| None).collect();
        let mut now = Moment::ZERO;
        for (pause, asks) in rounds {
            now = later(now, pause);
            let rules = rules(&policies, &asks);
            let mut expected = cells.clone();
            let allowed = one_by_one(&rules, &mut expected, now);
            let before = cells.clone();
            let decision = apply(&rules, Charging::AllOrNothing, &mut cells, now);
            prop_assert_eq!(decision.allowed, allowed);
            prop_assert_eq!(&cells, if allowed { &expected } else { &before });
            told_as_it_is(&rules, &decision, &cells, now)?;
        }
    }

    #[test]
    fn each_alone_charges_what_it_allows((policies, rounds) in rounds()) {
        let mut cells: Cells = policies.iter().map(|_| None).collect();
        let mut now = Moment::ZERO;
        for (pause, asks) in rounds {
            now = later(now, pause);
            let rules = rules(&policies, &asks);
            let mut expected = cells.clone();
            let mut outcomes = Vec::new();
            for rule in &rules {
                let alone = Rules::from_iter([*rule]);
                outcomes.push(apply(&alone, Charging::AllOrNothing, &mut expected, now).allowed);
            }
            let decision = apply(&rules, Charging::EachAlone, &mut cells, now);
            let told: Vec<_> =
                decision.verdicts.iter().map(|verdict| verdict.admission == Admission::Allow).collect();
            prop_assert_eq!(told, outcomes);
            prop_assert_eq!(&cells, &expected);
        }
    }

    #[test]
    fn always_never_goes_into_debt((policies, rounds) in rounds()) {
        let mut cells: Cells = policies.iter().map(|_| None).collect();
        let mut now = Moment::ZERO;
        for (pause, asks) in rounds {
            now = later(now, pause);
            apply(&rules(&policies, &asks), Charging::Always, &mut cells, now);
            for (policy, cell) in policies.iter().zip(&cells) {
                prop_assert!(spent(*cell) <= policy.limit.capacity());
            }
        }
    }

    #[test]
    fn always_takes_nothing_from_those_who_wait((policies, rounds) in rounds()) {
        let mut cells: Cells = policies.iter().map(|_| None).collect();
        let mut now = Moment::ZERO;
        for (pause, asks) in rounds {
            now = later(now, pause);
            let rules = rules(&policies, &asks);
            apply(&rules, Charging::EachAlone, &mut cells, now);
            let held: Rules<'_> = rules.iter().map(|rule| Rule { held: true, ..*rule }).collect();
            let before = cells.clone();
            let decision = apply(&held, Charging::Always, &mut cells, now);
            prop_assert_eq!(&cells, &before);
            let asked = held.iter().any(|rule| rule.ask.tokens > 0);
            prop_assert!(!(decision.allowed && asked));
        }
    }

    #[test]
    fn what_comes_back_is_taken_also_where_others_wait((policies, rounds) in rounds()) {
        let mut cells: Cells = policies.iter().map(|_| None).collect();
        let mut now = Moment::ZERO;
        for (pause, asks) in rounds {
            now = later(now, pause);
            let rules = rules(&policies, &asks);
            apply(&rules, Charging::EachAlone, &mut cells, now);
            let credits = |held| -> Rules<'_> {
                let credit = |ask: Ask| ask.to(Purpose::Credit);
                rules.iter().map(|rule| Rule { ask: credit(rule.ask), held, ..*rule }).collect()
            };
            let mut expected = cells.clone();
            let decision = apply(&credits(false), Charging::Always, &mut expected, now);
            prop_assert!(decision.allowed);
            prop_assert_eq!(apply(&credits(true), Charging::Always, &mut cells, now), decision);
            prop_assert_eq!(&cells, &expected);
        }
    }

    #[test]
    fn a_peek_changes_and_creates_nothing((policies, rounds) in rounds()) {
        let mut cells: Cells = policies.iter().map(|_| None).collect();
        let mut now = Moment::ZERO;
        for (pause, asks) in rounds {
            now = later(now, pause);
            apply(&rules(&policies, &asks), Charging::EachAlone, &mut cells, now);
            let peeks: Rules<'_> = policies
                .iter()
                .enumerate()
                .map(|(cell, policy)| Rule { cell, ..rule(policy, tokens(0)) })
                .collect();
            for charging in [Charging::AllOrNothing, Charging::EachAlone, Charging::Always] {
                let before = cells.clone();
                let decision = apply(&peeks, charging, &mut cells, now);
                prop_assert!(decision.allowed);
                prop_assert_eq!(&cells, &before);
            }
        }
    }
}

#[test]
fn what_comes_back_to_a_window_in_debt_is_taken_also_where_others_wait() {
    let window = WindowLimit::fixed(10, Duration::from_secs(3_600)).unwrap();
    let policy = Policy::new(Limit::Window(window), 0);
    let mut cells = Cells::from_iter([None]);
    let mut spent_before = |ask: Ask, held| {
        let rule = Rule { held, ..rule(&policy, ask) };
        apply(&[rule], Charging::Always, &mut cells, Moment::ZERO).verdicts[0].spent
    };
    spent_before(tokens(25), false);
    assert_eq!(spent_before(tokens(5).to(Purpose::Credit), true), 25);
    assert_eq!(spent_before(tokens(0), false), 20);
}

/// What verdicts tell of the cells is what the cells are.
fn told_as_it_is(
    rules: &Rules<'_>,
    decision: &Decision,
    cells: &Cells,
    now: Moment,
) -> Result<(), TestCaseError> {
    for (index, (rule, verdict)) in rules.iter().zip(&decision.verdicts).enumerate() {
        let asked_again = rules[index + 1..].iter().any(|later| later.cell == rule.cell);
        if decision.allowed && asked_again {
            continue; // it tells what was left before the later ask
        }
        let state = cells[rule.cell].map(|cell| rule.policy.current(cell));
        let level = rule.policy.limit.plan(state, tokens(0), now);
        prop_assert_eq!(verdict.remaining, level.before.remaining);
        prop_assert_eq!(verdict.reset_after, level.before.reset_after);
        prop_assert_eq!(verdict.cost, rule.ask.tokens);
    }
    Ok(())
}
