//! Bindings that have no number of their own, and take turns with a spare one to be told their settings.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
    time::Duration,
};

use fusebox_core::Time;

use crate::binding::Binding;

/// How often one is asked for that has been told before: all of a thousand are looked at within a minute.
const TURN: Duration = Duration::from_millis(50);

/// Bindings that wait for their first turn, at most; those that nothing remembers have no other.
const FRESH_MOST: usize = 4_096;

/// Who has the spare number, and who is next: new ones at once, each of the others in turn.
#[derive(Debug, Default)]
pub(crate) struct Spare {
    fresh: VecDeque<Weak<Binding>>,
    turn: VecDeque<Weak<Binding>>,
    bound: Option<Holder>,
    not_before: Time,
}

#[derive(Debug)]
struct Holder {
    /// Number of the Bind.
    id: u64,
    binding: Weak<Binding>,
    answered: bool,
}

impl Spare {
    /// Takes in a new one.
    pub(crate) fn add(&mut self, binding: &Arc<Binding>) {
        if self.fresh.len() < FRESH_MOST {
            self.fresh.push_back(Arc::downgrade(binding));
        }
    }

    /// These, and no others, take turns; those of them that were never told come first.
    pub(crate) fn set(&mut self, bindings: impl Iterator<Item = Arc<Binding>>) {
        let first = self.turn.is_empty();
        let turn: Vec<_> = bindings.map(|binding| Arc::downgrade(&binding)).collect();
        if first || turn.len() != self.turn.len() {
            self.turn = turn.into();
        }
    }

    /// Whose turn it is; nobody's while another one is asked for.
    pub(crate) fn next(&mut self, now: Time) -> Option<Arc<Binding>> {
        if self.bound.as_ref().is_some_and(|holder| !holder.answered) {
            return None;
        }
        while let Some(fresh) = self.fresh.pop_front() {
            if let Some(binding) = fresh.upgrade() {
                return Some(binding);
            }
        }
        while now >= self.not_before {
            let next = self.turn.pop_front()?;
            let Some(binding) = next.upgrade() else { continue };
            // Those without settings are asked for one after the other.
            if binding.settings().is_some() {
                self.not_before = now.after(TURN);
            }
            self.turn.push_back(next);
            return Some(binding);
        }
        None
    }

    /// When there is a next one, if no answer is waited for.
    pub(crate) fn next_at(&self) -> Option<Time> {
        let waits = self.bound.as_ref().is_some_and(|holder| !holder.answered);
        (!waits && !self.turn.is_empty()).then_some(self.not_before)
    }

    /// One is asked for.
    pub(crate) fn is_bound(&mut self, id: u64, binding: &Arc<Binding>) {
        self.bound = Some(Holder { id, binding: Arc::downgrade(binding), answered: false });
    }

    /// Whom an answer is about, if it is about the one that has the number.
    pub(crate) fn answered(&mut self, id: u64) -> Option<Option<Arc<Binding>>> {
        let holder = self.bound.as_mut().filter(|holder| holder.id == id)?;
        holder.answered = true;
        Some(holder.binding.upgrade())
    }

    /// As [`answered`](Self::answered), of a refusal: the next turn is not at once, whoever has it.
    pub(crate) fn refused(&mut self, id: u64, now: Time) -> Option<Option<Arc<Binding>>> {
        let binding = self.answered(id)?;
        self.not_before = self.not_before.max(now.after(TURN));
        Some(binding)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Time {
        Time::ZERO.after(Duration::from_millis(millis))
    }

    fn bindings(count: usize) -> Vec<Arc<Binding>> {
        (0..count).map(|key| Arc::new(Binding::new("p", &key.to_string(), 0))).collect()
    }

    #[test]
    fn new_ones_come_at_once_and_one_at_a_time() {
        let (mut spare, all) = (Spare::default(), bindings(2));
        all.iter().for_each(|one| spare.add(one));
        let first = spare.next(at(0)).unwrap();
        spare.is_bound(1, &first);
        assert!(spare.next(at(0)).is_none());
        assert!(spare.answered(2).is_none());
        assert!(Arc::ptr_eq(&spare.answered(1).flatten().unwrap(), &all[0]));
        assert!(Arc::ptr_eq(&spare.next(at(0)).unwrap(), &all[1]));
    }

    #[test]
    fn one_that_is_gone_is_passed_over() {
        let (mut spare, mut all) = (Spare::default(), bindings(2));
        all.iter().for_each(|one| spare.add(one));
        spare.set(all.clone().into_iter());
        drop(all.remove(0));
        assert_eq!(&*spare.next(at(0)).unwrap().key, "1");
        assert_eq!(&*spare.next(at(0)).unwrap().key, "1");
    }

    #[test]
    fn refusals_do_not_follow_one_another_without_end() {
        let (mut spare, all) = (Spare::default(), bindings(1));
        spare.set(all.into_iter());
        // Its only owner is gone by now, so there is nobody.
        assert!(spare.next(at(0)).is_none());
        let all = bindings(1);
        spare.set(all.clone().into_iter());
        let one = spare.next(at(0)).unwrap();
        spare.is_bound(1, &one);
        spare.refused(1, at(10));
        assert!(spare.next(at(59)).is_none());
        assert!(spare.next(at(60)).is_some());
    }
}
