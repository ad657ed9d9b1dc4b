//! The callers of one key that memory has no answer for, in their order.

use std::{collections::VecDeque, time::Duration};

use fusebox_core::Time;
use tokio::sync::oneshot;

use super::Priority;
use crate::{Decider, Reason};

/// Callers in the line of one key, at most: each has a task that waits, so whoever has more has other trouble.
pub(super) const LINE_MOST: usize = 10_000;

/// What a caller in the line is told.
#[derive(Debug)]
pub(super) enum Told {
    /// It may go ahead before `expires`, by the word of the server or a lease; an estimate has a grant.
    Allowed { decider: Decider, grant_id: String, expires: Time },
    /// It may not.
    Denied { reason: Reason, retry_after: Option<Duration> },
    /// The server could not be asked.
    Unreachable,
    /// The client is closed.
    Closed,
}

/// A caller in the line.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) cost: u64,
    pub(super) priority: Priority,
    pub(super) estimated: bool,
    /// When the wait is over that it asked for.
    pub(super) until: Time,
    /// Whether it is known to be denied for now, and waits for tokens.
    pub(super) denied: bool,
    /// It is gone once this is dropped at the other end.
    pub(super) tell: oneshot::Sender<Told>,
}

/// Callers in their order: those of a higher priority first, then by their coming.
#[derive(Debug, Default)]
pub(super) struct Line {
    of: [VecDeque<Waiter>; 3],
}

impl Line {
    /// Lets somebody in at the end; gives it back if there is no room.
    pub(super) fn join(&mut self, waiter: Waiter) -> Result<(), Waiter> {
        if self.len() >= LINE_MOST {
            self.of.iter_mut().for_each(|of| of.retain(|waiter| !waiter.tell.is_closed()));
        }
        if self.len() >= LINE_MOST {
            return Err(waiter);
        }
        self.of[waiter.priority.index()].push_back(waiter);
        Ok(())
    }

    fn len(&self) -> usize {
        self.of.iter().map(VecDeque::len).sum()
    }

    /// The first of those that are still there. Those before it that are gone leave.
    pub(super) fn head(&mut self) -> Option<&Waiter> {
        for of in &mut self.of {
            while of.front().is_some_and(|waiter| waiter.tell.is_closed()) {
                of.pop_front();
            }
        }
        self.of.iter().find_map(VecDeque::front)
    }

    /// Whether somebody is there who is not known to be denied.
    pub(super) fn has_undecided(&self) -> bool {
        let mut waiters = self.of.iter().flatten();
        waiters.any(|waiter| !waiter.denied && !waiter.tell.is_closed())
    }

    /// Takes out the first `most`; if `undecided`, of those that are not known to be denied.
    pub(super) fn take(&mut self, most: usize, undecided: bool) -> Vec<Waiter> {
        let mut taken = Vec::new();
        for of in &mut self.of {
            if undecided {
                let (out, kept): (VecDeque<_>, VecDeque<_>) =
                    of.drain(..).partition(|waiter| !waiter.denied);
                *of = kept;
                let mut out = out.into_iter();
                taken.extend(out.by_ref().filter(is_there).take(most - taken.len()));
                // Those for whom there was no room came last, and stay so.
                of.extend(out);
            } else {
                while taken.len() < most
                    && let Some(waiter) = of.pop_front()
                {
                    taken.extend(Some(waiter).filter(is_there));
                }
            }
        }
        taken
    }

    /// Takes out the head if `fits` says so.
    pub(super) fn take_head(&mut self, fits: impl FnOnce(&Waiter) -> bool) -> Option<Waiter> {
        let priority = self.head().filter(|head| fits(head))?.priority;
        self.of[priority.index()].pop_front()
    }

    /// Puts back at the front, in their order, those that were taken from there.
    pub(super) fn put_back(&mut self, waiters: Vec<Waiter>) {
        for waiter in waiters.into_iter().rev() {
            self.of[waiter.priority.index()].push_front(waiter);
        }
    }
}

fn is_there(waiter: &Waiter) -> bool {
    !waiter.tell.is_closed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiter(cost: u64, priority: Priority, denied: bool) -> (Waiter, oneshot::Receiver<Told>) {
        let (tell, told) = oneshot::channel();
        let until = Time::ZERO;
        (Waiter { cost, priority, estimated: false, until, denied, tell }, told)
    }

    fn line(of: &[(u64, Priority, bool)]) -> (Line, Vec<oneshot::Receiver<Told>>) {
        let mut line = Line::default();
        let told = of.iter().map(|(cost, priority, denied)| {
            let (waiter, told) = waiter(*cost, *priority, *denied);
            line.join(waiter).unwrap();
            told
        });
        let told = told.collect();
        (line, told)
    }

    fn costs(waiters: &[Waiter]) -> Vec<u64> {
        waiters.iter().map(|waiter| waiter.cost).collect()
    }

    #[test]
    fn the_higher_priority_goes_first_and_of_one_who_came_first() {
        use Priority::{Bulk, Critical, Normal};
        let (mut line, _told) =
            line(&[(1, Bulk, false), (2, Normal, false), (3, Normal, false), (4, Critical, false)]);
        let taken = line.take(3, false);
        assert_eq!(costs(&taken), [4, 2, 3]);
        line.put_back(taken);
        assert_eq!(costs(&line.take(9, false)), [4, 2, 3, 1]);
    }

    #[test]
    fn who_is_gone_is_passed_over() {
        let (mut line, mut told) =
            line(&[(1, Priority::Normal, false), (2, Priority::Normal, true)]);
        told.remove(0);
        assert_eq!(line.head().unwrap().cost, 2);
        assert!(!line.has_undecided());
        assert!(line.take_head(|head| head.cost < 2).is_none());
        told.clear();
        assert!(line.head().is_none() && line.take(9, false).is_empty());
    }

    #[test]
    fn who_is_known_to_be_denied_keeps_its_place() {
        let normal = Priority::Normal;
        let (mut line, _told) = line(&[(9, normal, true), (1, normal, false), (2, normal, false)]);
        assert_eq!(costs(&line.take(1, true)), [1]);
        assert_eq!(costs(&line.take(9, false)), [9, 2]);
    }

    #[test]
    fn a_full_line_lets_nobody_in_until_somebody_leaves() {
        let mut line = Line::default();
        let told: Vec<_> = (0..LINE_MOST)
            .map(|_| {
                let (waiter, told) = waiter(1, Priority::Normal, false);
                line.join(waiter).unwrap();
                told
            })
            .collect();
        let one_more = |line: &mut Line| line.join(waiter(1, Priority::Normal, false).0).is_ok();
        assert!(!one_more(&mut line));
        drop(told);
        assert!(one_more(&mut line));
    }
}
