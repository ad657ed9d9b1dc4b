//! How many circuits a breaker has, by what they are told to be, and how often any became that.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use fusebox_core::circuit::Phase;

/// The circuits of one breaker; outlives each of them.
#[derive(Debug, Default)]
pub struct Tally {
    circuits: [AtomicUsize; Phase::ALL.len()],
    transitions: [AtomicU64; Phase::ALL.len()],
}

impl Tally {
    /// Circuits that are there.
    pub fn live(&self) -> usize {
        self.circuits.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// Circuits by what they are, in the order of [`Phase::ALL`].
    pub fn circuits(&self) -> [usize; Phase::ALL.len()] {
        self.circuits.each_ref().map(|count| count.load(Ordering::Relaxed))
    }

    /// How often a circuit became that, in the order of [`Phase::ALL`].
    pub fn transitions(&self) -> [u64; Phase::ALL.len()] {
        self.transitions.each_ref().map(|count| count.load(Ordering::Relaxed))
    }

    pub(super) fn come(&self, phase: Phase) {
        self.circuits[phase as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn leave(&self, phase: Phase) {
        self.circuits[phase as usize].fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn change(&self, before: Phase, after: Phase) {
        self.come(after);
        self.leave(before);
    }

    pub(super) fn count(&self, became: Phase) {
        self.transitions[became as usize].fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_has_its_own_counts() {
        let tally = Tally::default();
        for (index, phase) in Phase::ALL.into_iter().enumerate() {
            tally.come(Phase::Closed);
            tally.change(Phase::Closed, phase);
            tally.count(phase);
            assert_eq!((tally.circuits()[index], tally.transitions()[index]), (1, 1), "{phase:?}");
            assert_eq!(tally.live(), index + 1);
        }
        tally.leave(Phase::Open);
        assert_eq!(tally.circuits(), [1, 0, 1, 1, 1, 1]);
    }
}
