//! Cells, and who may change them at once.
//!
//! A [`Storage`] owns the cells and their concurrency, and asks the core what becomes of them. Under
//! [`Embedded`], which keeps them in memory, a [`Journal`](journal::Journal) keeps them on disk.

mod embedded;
pub mod journal;
mod record;
mod recovery;
mod writer;

use arrayvec::ArrayVec;
use fusebox_core::{Cell, Charging, Cost, Decision, MAX_RULES, Policy, Settled, Time};
use thiserror::Error;
use tokio::sync::oneshot;

pub use self::{
    embedded::Embedded,
    recovery::{Recovered, RecoveryError, recover},
    writer::Writer,
};
use crate::{
    catalogue::{Catalogue, CellId, PolicyNumber},
    reservation::Reservation,
};

/// Owns cells: decides over them and keeps them.
pub trait Storage: Send + Sync + 'static {
    /// Decides over all asks of `charge` together, and charges their cells. New cells take of `room` what
    /// was [reserved](Self::reserve) for them; without it, they need room now.
    ///
    /// # Errors
    /// If nothing could be decided; then nothing was charged.
    fn apply(
        &self,
        charge: &Charge<'_>,
        room: Option<Reservation>,
        now: Time,
    ) -> Result<Answer<Decision>, StorageError>;

    /// Corrects the charge of an estimate by what it really cost.
    ///
    /// # Errors
    /// If the cell could not be changed.
    fn settle(
        &self,
        settlement: &Settlement<'_>,
        now: Time,
    ) -> Result<Answer<Settled<Cell>>, StorageError>;

    /// Makes sure of room for the cells that `charge` may create, so that it cannot fail for want of it.
    ///
    /// # Errors
    /// [`StorageError::Full`].
    fn reserve(&self, charge: &Charge<'_>) -> Result<Reservation, StorageError>;

    /// One bounded round of housekeeping: drops some of the cells that are full, which is the same as none.
    fn tend(&self, catalogue: &Catalogue, now: Time);

    /// Cells that live now.
    fn live(&self) -> usize;
}

/// An answer that is ready, or one that comes once it is durable.
#[derive(Debug)]
pub enum Answer<T> {
    /// Ready.
    Now(T),
    /// It comes later; the charge is made and visible to others already.
    Later(oneshot::Receiver<Result<T, StorageError>>),
}

/// Charges that are decided together.
#[derive(Clone, Debug)]
pub struct Charge<'a> {
    /// What to charge when not all allow.
    pub charging: Charging,
    /// What is asked, 1 to 16.
    pub asks: ArrayVec<CellAsk<'a>, MAX_RULES>,
}

/// One ask and the cell that it charges.
#[derive(Clone, Copy, Debug)]
pub struct CellAsk<'a> {
    /// The cell.
    pub cell: CellId,
    /// What the cell calls its policy.
    pub number: PolicyNumber,
    /// Who judges.
    pub policy: &'a Policy,
    /// What it costs.
    pub cost: Cost,
}

/// The true cost of an estimate.
#[derive(Clone, Copy, Debug)]
pub struct Settlement<'a> {
    /// The cell that was charged.
    pub cell: CellId,
    /// What the cell calls its policy.
    pub number: PolicyNumber,
    /// Who judged.
    pub policy: &'a Policy,
    /// Tokens that were charged.
    pub charged: u64,
    /// Tokens that the call really cost.
    pub actual: u64,
}

/// Why nothing could be decided.
#[derive(Clone, Debug, Error)]
pub enum StorageError {
    /// No room for another cell.
    #[error("{0} keys are live, as many as this server holds; wait until idle ones have left")]
    Full(usize),
    /// A write failed, and that is final.
    #[error("the storage failed, and nothing is admitted until a restart: {0}")]
    Failed(std::sync::Arc<str>),
}

impl StorageError {
    /// Whoever was to answer went away without an answer.
    pub(crate) fn gone() -> Self {
        Self::Failed("it stopped before it answered".into())
    }
}
