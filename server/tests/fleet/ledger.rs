//! What is true of a fleet, whatever befell it, by what its processes said.
//!
//! The rules by which the observer counts, so that no stop between two instructions makes it accuse the wrong one:
//! * A spend happened between the two readings of the clock that enclose the decision. Readings that are far apart had a
//!   stop between them; nobody knows then when it was, and it is in no count. There is at most one of each stop and task.
//! * A permit is held from the first moment to the last of which its holder said that it has not expired. What a holder
//!   does that was stopped for longer, or killed, is no hold of a permit.

use std::collections::BTreeMap;

use crate::observer::Said;

/// Readings this far apart, in nanoseconds, had a stop between them.
const STOPPED: u64 = 100_000_000;

/// Tokens that were spent at some moment by a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spend {
    pub number: u64,
    pub tokens: u64,
    pub from: u64,
    pub to: u64,
}

/// All spends of which the time is known, by time.
pub fn spends(book: &[(u64, Said)]) -> Vec<Spend> {
    let spends = book.iter().filter_map(|(number, said)| match said {
        Said::Spent { tokens, from, to } if to - from < STOPPED => {
            Some(Spend { number: *number, tokens: *tokens, from: *from, to: *to })
        }
        _ => None,
    });
    let mut spends: Vec<_> = spends.collect();
    spends.sort_by_key(|spend| spend.to);
    spends
}

/// The most tokens that were spent in any interval beyond what flows in so many a second meanwhile.
///
/// In a bucket that leaks at that rate this is the highest level: spends obey "at most `burst + rate x (d + L)` in
/// any `d`" if and only if it is at most `burst + rate x L`.
pub fn most_beyond(spends: &[Spend], per_second: u64) -> u64 {
    let (mut level, mut last, mut most) = (0_u128, 0, 0);
    let unit = 1_000_000_000;
    for spend in spends {
        let leaked = u128::from(spend.to - last) * u128::from(per_second);
        level = level.saturating_sub(leaked) + u128::from(spend.tokens) * unit;
        (last, most) = (spend.to, most.max(level));
    }
    u64::try_from(most.div_ceil(unit)).unwrap()
}

/// Tokens that were spent from one moment on and before another one.
pub fn spent_within(spends: &[Spend], from: u64, to: u64) -> u64 {
    spends.iter().filter(|spend| (from..to).contains(&spend.to)).map(|spend| spend.tokens).sum()
}

/// A while in which nothing can be spent: whoever it is about has no server, and no lease that lives.
#[derive(Clone, Debug)]
pub struct Drought {
    pub why: &'static str,
    /// Of one process, or of all.
    pub number: Option<u64>,
    pub from: u64,
    pub to: u64,
}

/// Panics if something was spent in such a while.
pub fn check_droughts(spends: &[Spend], droughts: &[Drought]) {
    for drought in droughts {
        let concerned = |spend: &&Spend| drought.number.is_none_or(|number| number == spend.number);
        let within = |spend: &&Spend| drought.from <= spend.from && spend.to <= drought.to;
        let spent: Vec<_> = spends.iter().filter(concerned).filter(within).collect();
        let why = drought.why;
        assert!(
            spent.is_empty(),
            "{why}, so there were no tokens, and yet in {drought:?} {spent:?}"
        );
    }
}

/// The most permits that were held at one moment.
pub fn most_held(book: &[(u64, Said)]) -> u64 {
    let mut holds: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for (_, said) in book {
        if let Said::Held { permit, at } = said {
            let hold = holds.entry(*permit).or_insert((*at, *at));
            *hold = (hold.0.min(*at), hold.1.max(*at));
        }
    }
    // At one moment those who begin come before those who end: both say that they held then.
    let changes = holds.values().flat_map(|(from, to)| [(*from, 0), (*to, 1)]);
    let mut changes: Vec<_> = changes.collect();
    changes.sort_unstable();
    let (mut held, mut most) = (0, 0);
    for (_, ends) in changes {
        held = if ends == 1 { held - 1 } else { held + 1 };
        most = most.max(held);
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: u64 = 1_000_000;

    fn spend(number: u64, tokens: u64, millis: u64) -> (u64, Said) {
        let at = millis * MILLI;
        (number, Said::Spent { tokens, from: at - 1_000, to: at })
    }

    fn held(permit: u64, millis: u64) -> (u64, Said) {
        (0, Said::Held { permit, at: millis * MILLI })
    }

    #[test]
    fn what_is_beyond_the_rate_is_found_in_whatever_interval() {
        let steady: Vec<_> = (1..=100).map(|beat| spend(beat % 3, 10, beat * 100)).collect();
        assert_eq!(most_beyond(&spends(&steady), 100), 10);
        let mut burst = steady.clone();
        burst.extend([spend(7, 30, 4_010), spend(8, 30, 4_020)]);
        assert_eq!(most_beyond(&spends(&burst), 100), 70);
        // Of half a rate all is owed that is spent above it.
        assert_eq!(most_beyond(&spends(&steady), 50), 505);
        assert_eq!(spent_within(&spends(&steady), 1_000 * MILLI, 2_000 * MILLI), 100);
    }

    #[test]
    fn a_spend_of_unknown_time_is_in_no_count() {
        let stopped = (1, Said::Spent { tokens: 9, from: MILLI, to: MILLI + STOPPED });
        assert!(spends(&[stopped]).is_empty());
    }

    #[test]
    #[should_panic(expected = "there were no tokens")]
    fn a_spend_in_a_drought_is_found() {
        let drought = Drought { why: "test", number: Some(2), from: 10 * MILLI, to: 20 * MILLI };
        let innocent = spends(&[spend(1, 1, 15), spend(2, 1, 10), spend(2, 1, 21)]);
        check_droughts(&innocent, std::slice::from_ref(&drought));
        check_droughts(&spends(&[spend(2, 1, 15)]), &[drought]);
    }

    #[test]
    fn permits_are_held_from_the_first_word_of_them_to_the_last() {
        let book = [held(1, 10), held(1, 20), held(2, 20), held(2, 30), held(3, 25), held(4, 31)];
        assert_eq!(most_held(&book), 2);
        let more = [&book[..], &[held(1, 26)]].concat();
        assert_eq!(most_held(&more), 3);
        assert_eq!(most_held(&[]), 0);
    }
}
