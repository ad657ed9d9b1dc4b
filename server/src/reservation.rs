//! A share of something bounded.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// A share of something bounded, counted as taken until dropped.
#[derive(Debug)]
#[must_use]
pub struct Reservation {
    taken: Arc<AtomicUsize>,
    amount: usize,
}

impl Reservation {
    /// `amount` more of what `taken` counts; `None` if that is above `capacity`. Nothing always fits.
    pub fn of(taken: &Arc<AtomicUsize>, amount: usize, capacity: usize) -> Option<Self> {
        let before = taken.fetch_add(amount, Ordering::Relaxed);
        let reservation = Self { taken: Arc::clone(taken), amount };
        (amount == 0 || before + amount <= capacity).then_some(reservation)
    }

    /// A share of nothing yet, to be [grown](Self::grow).
    pub fn nothing(taken: &Arc<AtomicUsize>) -> Self {
        Self { taken: Arc::clone(taken), amount: 0 }
    }

    /// Takes `amount` more; `false` if that is above `capacity`, and then what is taken stays as it is.
    #[must_use]
    pub fn grow(&mut self, amount: usize, capacity: usize) -> bool {
        let Some(mut more) = Self::of(&self.taken, amount, capacity) else { return false };
        self.amount += std::mem::take(&mut more.amount);
        true
    }

    /// Parts with `amount` of it, or with all if that is less: who has it now gives it back.
    pub fn split(&mut self, amount: usize) -> Self {
        let amount = amount.min(self.amount);
        self.amount -= amount;
        Self { taken: Arc::clone(&self.taken), amount }
    }

    /// Keeps one of the share for good: whoever has it now gives it back. `false` if none is left.
    #[must_use]
    pub fn keep_one(&mut self) -> bool {
        let left = self.amount.checked_sub(1);
        self.amount = left.unwrap_or(0);
        left.is_some()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.amount, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_grows_up_to_the_capacity() {
        let taken = Arc::new(AtomicUsize::new(0));
        let mut share = Reservation::nothing(&taken);
        assert!(share.grow(3, 4));
        assert!(!share.grow(2, 4));
        assert_eq!(taken.load(Ordering::Relaxed), 3);
        drop(share);
        assert_eq!(taken.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_is_split_off_comes_back_by_itself() {
        let taken = Arc::new(AtomicUsize::new(0));
        let mut share = Reservation::of(&taken, 5, 5).unwrap();
        let part = share.split(2);
        drop(part);
        assert_eq!(taken.load(Ordering::Relaxed), 3);
        let all = share.split(9);
        drop(share);
        assert_eq!(taken.load(Ordering::Relaxed), 3);
        drop(all);
        assert_eq!(taken.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_is_not_kept_comes_back() {
        let taken = Arc::new(AtomicUsize::new(0));
        let mut three = Reservation::of(&taken, 3, 4).unwrap();
        assert!(Reservation::of(&taken, 2, 4).is_none(), "a refusal takes nothing");
        assert!(three.keep_one());
        drop(three);
        assert_eq!(taken.load(Ordering::Relaxed), 1);
    }
}
