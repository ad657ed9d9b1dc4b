//! How many cells a policy may have, and what becomes of keys past that.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The cells of one policy. Keys past the budget share overflow cells: memory stays bounded, and nobody gets
/// a fresh bucket by making names up. Outlives the snapshot.
#[derive(Debug, Default)]
pub struct Budget {
    most: AtomicUsize,
    live: AtomicUsize,
    overflow_cells: AtomicUsize,
}

impl Budget {
    /// Room for so many cells, of which there are none.
    pub fn new(most: usize) -> Self {
        Self { most: AtomicUsize::new(most), ..Self::default() }
    }

    /// Most cells.
    pub fn most(&self) -> usize {
        self.most.load(Ordering::Relaxed)
    }

    /// Changes the most; cells that live stay.
    pub fn set_most(&self, most: usize) {
        self.most.store(most, Ordering::Relaxed);
    }

    /// Cells that live now.
    pub fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// Overflow cells that live now.
    pub fn overflow_cells(&self) -> usize {
        self.overflow_cells.load(Ordering::Relaxed)
    }

    /// Whether there is no room for another cell.
    pub fn is_full(&self) -> bool {
        self.live() >= self.most()
    }

    /// Whether a new key may not simply start full.
    pub fn overflows(&self) -> bool {
        self.is_full() || self.overflow_cells() > 0
    }

    /// A cell has come.
    pub fn add(&self, is_overflow: bool) {
        self.live.fetch_add(1, Ordering::Relaxed);
        self.overflow_cells.fetch_add(usize::from(is_overflow), Ordering::Relaxed);
    }

    /// A cell has left. One that came while its key was another policy's was not counted here.
    pub fn remove(&self, is_overflow: bool) {
        let less = |by: usize| move |count: usize| Some(count.saturating_sub(by));
        let _ = self.live.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less(1));
        let overflow = less(usize::from(is_overflow));
        let _ = self.overflow_cells.fetch_update(Ordering::Relaxed, Ordering::Relaxed, overflow);
    }
}
