//! What one retry budget saw of this process: what the server is still to be told, and what this process may do
//! alone. Pure.

use fusebox_core::{Admission, Ask, Kind, Moment, RetryBudget, Time, Wall, retry_budget};
use fusebox_proto::v1;

use crate::{binding::Binding, part::COUNT_MOST};

/// Most requests that are put into the local budget at once: what one ask of it may be.
const AT_ONCE_MOST: u64 = 1_000_000;

/// What one retry budget saw of this process.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Calls of all time that have been put in.
    calls: u64,
    /// Calls that the server has not been told of.
    requests: u64,
    /// Retries that the server has not withdrawn.
    retries: u64,
    /// This process's share of the budget, and by which settings it was counted.
    local: Option<(RetryBudget, retry_budget::State)>,
}

impl Ledger {
    /// So many calls were made in all of time; those that are new pay in.
    pub(super) fn deposit(&mut self, calls: u64, share: Option<RetryBudget>, now: Time) {
        let requests = calls.saturating_sub(self.calls);
        self.calls = self.calls.max(calls);
        self.requests = self.requests.saturating_add(requests);
        if requests > 0 {
            let ask = Ask::spend(requests.min(AT_ONCE_MOST));
            self.charge(ask, share, now);
        }
    }

    /// A retry was withdrawn by the server.
    pub(super) fn withdrawn(&mut self, share: Option<RetryBudget>, now: Time) {
        self.charge(Ask { retry: true, ..Ask::spend(1) }, share, now);
    }

    /// A retry was made that the server is to be told of.
    pub(super) fn made(&mut self) {
        self.retries = self.retries.saturating_add(1);
    }

    /// Withdraws a retry from this process's share, if there is one in it.
    pub(super) fn withdraw(&mut self, share: RetryBudget, now: Time) -> bool {
        let ask = Ask { retry: true, ..Ask::spend(1) };
        let plan = share.plan(self.local(share, now), ask, moment(now));
        let allowed = matches!(plan.admission, Admission::Allow);
        if allowed {
            self.local = plan.charged.map(|state| (share, state));
        }
        allowed
    }

    /// What the server has not been told; it counts as told from now on.
    pub(super) fn tell(&mut self, binding: &Binding) -> Option<v1::CircuitDelta> {
        // The rest goes with the next.
        let requests = self.requests.min(COUNT_MOST);
        let retries = self.retries.min(COUNT_MOST);
        if requests == 0 && retries == 0 {
            return None;
        }
        self.requests -= requests;
        self.retries -= retries;
        Some(v1::CircuitDelta {
            policy: binding.policy.to_string(),
            key: binding.key.to_string(),
            requests,
            retries,
            ..Default::default()
        })
    }

    /// Whether nothing is left to be told, once `calls` are paid in.
    pub(super) fn is_told(&self, calls: u64) -> bool {
        self.requests == 0 && self.retries == 0 && self.calls >= calls
    }

    fn charge(&mut self, ask: Ask, share: Option<RetryBudget>, now: Time) {
        let Some(share) = share else { return };
        let state = self.local(share, now);
        // Whether there was enough or not: it was made.
        self.local = share.plan(state, ask, moment(now)).charged.map(|state| (share, state));
    }

    /// The state of this process's share, in the terms of these settings.
    fn local(&self, share: RetryBudget, now: Time) -> Option<retry_budget::State> {
        self.local.map(|(older, state)| match older == share {
            true => state,
            false => share.rebase(state, Some(&older), moment(now)),
        })
    }
}

/// A budget goes by one clock only.
fn moment(now: Time) -> Moment {
    Moment { time: now, wall: Wall::from_nanos(0) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn budget(ratio_per_mille: u16, min_per_second: u32) -> RetryBudget {
        RetryBudget::new(ratio_per_mille, min_per_second, Duration::from_secs(10)).unwrap()
    }

    fn at(seconds: u64) -> Time {
        Time::ZERO.after(Duration::from_secs(seconds))
    }

    #[test]
    fn what_was_told_is_not_told_again() {
        let (mut ledger, binding) = (Ledger::default(), Binding::new("budget", "a", 0));
        assert_eq!(ledger.tell(&binding), None);

        ledger.deposit(3, None, at(0));
        ledger.made();
        let delta = ledger.tell(&binding).unwrap();
        assert_eq!((delta.policy.as_str(), delta.key.as_str()), ("budget", "a"));
        assert_eq!((delta.requests, delta.retries), (3, 1));
        assert!(ledger.is_told(3));
        assert!(!ledger.is_told(4));
        assert_eq!(ledger.tell(&binding), None);
    }

    #[test]
    fn a_delta_holds_no_more_than_the_server_takes() {
        let (mut ledger, binding) = (Ledger::default(), Binding::new("budget", "", 0));
        ledger.deposit(COUNT_MOST + 7, None, at(0));
        assert_eq!(ledger.tell(&binding).unwrap().requests, COUNT_MOST);
        assert_eq!(ledger.tell(&binding).unwrap().requests, 7);
    }

    #[test]
    fn alone_a_process_retries_for_its_own_calls() {
        let (mut ledger, share) = (Ledger::default(), budget(100, 0));
        ledger.deposit(20, Some(share), at(0));
        let made = (0..5).filter(|_| ledger.withdraw(share, at(1))).count();
        assert_eq!(made, 2);
        assert!(!ledger.withdraw(share, at(100)), "what was earned is forgotten");
    }

    #[test]
    fn what_the_server_withdrew_is_not_there_to_be_had_alone() {
        let (mut ledger, share) = (Ledger::default(), budget(100, 0));
        ledger.deposit(20, Some(share), at(0));
        ledger.withdrawn(Some(share), at(0));
        let made = (0..5).filter(|_| ledger.withdraw(share, at(1))).count();
        assert_eq!(made, 1);
    }

    #[test]
    fn another_share_keeps_what_was_earned() {
        let mut ledger = Ledger::default();
        ledger.deposit(20, Some(budget(100, 4)), at(0));
        let share = budget(100, 0);
        let made = (0..5).filter(|_| ledger.withdraw(share, at(1))).count();
        assert_eq!(made, 2);
    }
}
