//! Cells, and who may change them at once.
//!
//! A [`Storage`] owns the cells and their concurrency, and asks the core what becomes of them. Under
//! [`Embedded`], which keeps them in memory, a [`Journal`](journal::Journal) keeps them on disk.

mod embedded;
pub mod journal;
mod record;
mod recovery;
mod table;
mod writer;

use fusebox_core::{Cell, Charging, Cost, Decision, Policy, Settled, Time};
use thiserror::Error;
use tokio::sync::oneshot;

pub use self::{
    embedded::Embedded,
    recovery::{Recovered, RecoveryError, Start, recover},
    writer::{Left, Writer},
};
use crate::{
    app::GrantId,
    catalogue::{Catalogue, CellId, PolicyNumber},
    reservation::Reservation,
};

/// Owns cells: decides over them and keeps them.
pub trait Storage: Send + Sync + 'static {
    /// Decides over all asks of `charge` together, and charges their cells. What needs room takes it of
    /// `room`, which was [reserved](Self::reserve) for it; without it, there must be room now.
    ///
    /// The decision is written to `decision`, because it is a kilobyte that nobody should move around.
    ///
    /// # Errors
    /// If nothing could be decided; then nothing was charged.
    fn apply(
        &self,
        charge: &Charge<'_>,
        room: Option<&mut Room>,
        now: Time,
        decision: &mut Decision,
    ) -> Result<Answer<()>, StorageError>;

    /// Corrects the charge of an estimate by what it really cost.
    ///
    /// # Errors
    /// If the cell could not be changed.
    fn settle(
        &self,
        settlement: &Settlement<'_>,
        now: Time,
    ) -> Result<Answer<Settled<Cell>>, StorageError>;

    /// Makes sure of room for all that `asks` may create or queue, so that none fails for want of it.
    ///
    /// # Errors
    /// [`StorageError::Full`] or [`StorageError::Behind`].
    fn reserve(&self, asks: &[CellAsk<'_>]) -> Result<Room, StorageError>;

    /// One bounded round of housekeeping: drops some of the cells that are full, which is the same as none.
    fn tend(&self, catalogue: &Catalogue, now: Time);

    /// Cells that live now.
    fn live(&self) -> usize;
}

/// What was decided, and when it may be told.
#[derive(Debug)]
pub enum Answer<T> {
    /// Now.
    Now(T),
    /// Once it is durable; what it charges is visible to others already.
    Later(T, Durable),
}

/// Comes when what was charged is on disk, or can no longer get there.
pub type Durable = oneshot::Receiver<Result<(), StorageError>>;

impl<T> Answer<T> {
    fn new(value: T, durable: Option<Durable>) -> Self {
        match durable {
            None => Self::Now(value),
            Some(durable) => Self::Later(value, durable),
        }
    }

    /// The same, about something made of it.
    pub fn map<U>(self, make: impl FnOnce(T) -> U) -> Answer<U> {
        match self {
            Self::Now(value) => Answer::Now(make(value)),
            Self::Later(value, durable) => Answer::Later(make(value), durable),
        }
    }

    /// The value, when it may be told.
    ///
    /// # Errors
    /// If what was charged could not be written: it is charged all the same, and not admitted.
    pub async fn told(self) -> Result<T, StorageError> {
        match self {
            Self::Now(value) => Ok(value),
            Self::Later(value, durable) => {
                durable.await.unwrap_or_else(|_| Err(StorageError::gone()))?;
                Ok(value)
            }
        }
    }
}

/// Room that charges have for themselves.
#[derive(Debug)]
pub struct Room {
    cells: Reservation,
    marks: Reservation,
}

/// How the cells of a policy are kept on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeping {
    /// Only by a clean stop, if at all: they fill faster than a crash is over.
    AtStop,
    /// Behind memory: `durability: relaxed`.
    Behind,
    /// By marks that are durable before anybody is told: `durability: strict`.
    Marked,
}

/// Charges that are decided together.
#[derive(Clone, Copy, Debug)]
pub struct Charge<'a> {
    /// What to charge when not all allow.
    pub charging: Charging,
    /// What is asked, 1 to 16.
    pub asks: &'a [CellAsk<'a>],
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
    /// How it is kept.
    pub keeping: Keeping,
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
    /// How it is kept.
    pub keeping: Keeping,
    /// Tokens that were charged.
    pub charged: u64,
    /// Tokens that the call really cost.
    pub actual: u64,
}

/// A grant that is open at a clean stop, and goes on at the next start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenGrant {
    /// Names it.
    pub id: GrantId,
    /// The policy that was asked.
    pub number: PolicyNumber,
    /// The cell that was charged.
    pub cell: CellId,
    /// Tokens that were charged.
    pub amount: u64,
    /// When it settles by itself.
    pub expires_at: Time,
}

/// Why nothing could be decided.
#[derive(Clone, Debug, Error)]
pub enum StorageError {
    /// No room for another cell.
    #[error("{0} keys are live, as many as this server holds; wait until idle ones have left")]
    Full(usize),
    /// No room for another mark in the queue of the disk.
    #[error("{0} charges wait for the disk, as many as this server holds; try again soon")]
    Behind(usize),
    /// A write failed, and that is final.
    #[error("the storage failed, and nothing is admitted until a restart: {0}")]
    Failed(std::sync::Arc<str>),
    /// The end has begun, and the last state is being written.
    #[error("stopping: the last state is being written")]
    Stopping,
}

impl StorageError {
    /// Whoever was to answer went away without an answer.
    pub(crate) fn gone() -> Self {
        Self::Failed("it stopped before it answered".into())
    }
}
