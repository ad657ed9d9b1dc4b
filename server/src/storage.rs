//! Cells, and who may change them at once.
//!
//! A [`Storage`] owns the cells and their concurrency, and asks the core what becomes of them. Under
//! [`Embedded`], which keeps them in memory, a [`Journal`](journal::Journal) keeps them on disk. [`Circuits`]
//! are in memory wherever cells are, and their journal is the same.

mod circuits;
mod embedded;
pub mod journal;
pub(crate) mod record;
mod recovery;
mod table;
mod writer;

use std::collections::HashSet;

use arrayvec::ArrayVec;
use fusebox_core::{Ask, Cell, Charging, Decision, MAX_RULES, Moment, Settled, Time};
use thiserror::Error;
use tokio::sync::oneshot;

use self::journal::Write;
pub use self::{
    circuits::{Board, Boards, Changes, CircuitName, Circuits, Hashed, Locked, Place, Tally},
    embedded::Embedded,
    recovery::{Operations, Recovered, RecoveryError, Start, recover},
    writer::{Left, Writer},
};
use crate::{
    app::GrantId,
    catalogue::{Catalogue, CellId, Limiter, LimiterNumber},
    reservation::Reservation,
};

/// Owns cells: decides over them and keeps them.
pub trait Storage: Send + Sync + 'static {
    /// Decides over all asks of `charge` together, and charges their cells. What needs room takes it of
    /// `room`, which was [reserved](Self::reserve) for it; without it, there must be room now.
    ///
    /// What is decided is written to `decided`, because it is some kilobytes that nobody should move around.
    ///
    /// # Errors
    /// If nothing could be decided; then nothing was charged.
    fn apply(
        &self,
        charge: &Charge<'_>,
        room: Option<&mut Room>,
        now: Moment,
        decided: &mut Decided,
    ) -> Result<Answer<()>, StorageError>;

    /// Corrects the charge of a grant by what is known of it now.
    ///
    /// # Errors
    /// If the cell could not be changed.
    fn settle(
        &self,
        settlement: &Settlement<'_>,
        now: Moment,
    ) -> Result<Answer<Settled<Cell>>, StorageError>;

    /// Changes the cell of a limiter as `change` says, if it is there and `change` wants to; whether it did.
    ///
    /// # Errors
    /// If the cell could not be changed.
    fn change(
        &self,
        cell: CellId,
        judge: Judge<'_>,
        change: &mut dyn FnMut(Cell) -> Option<Cell>,
        now: Moment,
    ) -> Result<Answer<bool>, StorageError>;

    /// The cell, in the terms of the limiter, if it is there.
    fn look(&self, cell: CellId, judge: Judge<'_>, now: Moment) -> Option<Cell>;

    /// Writes records that are no cell's, all of them or none; when they are on disk is in the answer.
    ///
    /// # Errors
    /// If they cannot be queued.
    fn note(&self, writes: Vec<Write>) -> Result<Answer<()>, StorageError>;

    /// Writes a cell as it is, so that a crash no longer forgets what came back to it; when that is on disk is
    /// in the answer. One that is not kept on disk is not written.
    ///
    /// # Errors
    /// If nothing is written any more.
    fn write_out(&self, cell: CellId) -> Result<Answer<()>, StorageError>;

    /// Writes down as they are the cells of limiters that were not kept on disk so far, of one part of all cells;
    /// when they are on disk is in the answer. There are [`CELL_SHARDS`](crate::limits::CELL_SHARDS) parts.
    ///
    /// # Errors
    /// If nothing is written any more.
    fn write_down(
        &self,
        part: usize,
        limiters: &HashSet<LimiterNumber>,
    ) -> Result<Answer<()>, StorageError>;

    /// Makes sure of room for all marks that `asks` may queue, so that none fails for want of it.
    ///
    /// # Errors
    /// [`StorageError::Behind`].
    fn reserve(&self, asks: &[CellAsk<'_>]) -> Result<Room, StorageError>;

    /// One bounded round of housekeeping: drops some of the cells that are full, which is the same as none.
    fn tend(&self, catalogue: &Catalogue, now: Moment);

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

    /// The value, which is not to be told yet, and when it may be.
    pub fn split(self) -> (T, Answer<()>) {
        match self {
            Self::Now(value) => (value, Answer::Now(())),
            Self::Later(value, durable) => (value, Answer::Later((), durable)),
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

/// Room in the queue of the disk that charges have for themselves.
#[derive(Debug)]
pub struct Room {
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
    /// What is asked, 1 to 64.
    pub asks: &'a [CellAsk<'a>],
    /// The policies in force.
    pub catalogue: &'a Catalogue,
}

/// One ask and the cell that it charges.
#[derive(Clone, Copy, Debug)]
pub struct CellAsk<'a> {
    /// The cell.
    pub cell: CellId,
    /// The first cell of its key, which may have several.
    pub key: CellId,
    /// The cell to charge instead if the policy has no room for another one.
    pub overflow: Option<CellId>,
    /// Who judges.
    pub limiter: &'a Limiter,
    /// What is asked.
    pub ask: Ask,
    /// It only watches.
    pub shadow: bool,
    /// It is one of several that serve the same.
    pub quota: bool,
    /// Others wait for the cell, so what is there is theirs.
    pub held: bool,
}

/// What became of a [`Charge`].
#[derive(Debug, Default)]
pub struct Decided {
    /// The decision, with a verdict for each ask.
    pub decision: Decision,
    /// What each ask charges, if it is allowed.
    pub charged: ArrayVec<Charged, MAX_RULES>,
}

impl Decided {
    /// Nothing was asked of any cell.
    pub fn clear(&mut self, allowed: bool) {
        self.decision.allowed = allowed;
        self.decision.verdicts.clear();
        self.charged.clear();
    }
}

/// Where a charge is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Charged {
    /// The cell, which may be one that many keys share.
    pub cell: CellId,
    /// The part of its time.
    pub slice: u64,
    /// It is charged for the first time in this life.
    pub is_new: bool,
}

/// The limiter that a cell is held against, and where to find the one that it was counted by.
#[derive(Clone, Copy, Debug)]
pub struct Judge<'a> {
    /// Who judges.
    pub limiter: &'a Limiter,
    /// The policies in force.
    pub catalogue: &'a Catalogue,
}

/// What is known of a charge.
#[derive(Clone, Copy, Debug)]
pub struct Settlement<'a> {
    /// The cell that was charged.
    pub cell: CellId,
    /// Who judged, as it is now.
    pub judge: Judge<'a>,
    /// The revision of it that was charged under.
    pub revision: u32,
    /// What is known.
    pub known: fusebox_core::Settlement,
}

/// A grant that is open at a clean stop, and goes on at the next start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenGrant {
    /// Names it.
    pub id: GrantId,
    /// The client that it was given to; empty if it did not say.
    pub client: String,
    /// What it holds.
    pub parts: Vec<OpenPart>,
}

/// What an open grant holds of one cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenPart {
    /// What it holds.
    pub holds: Holds,
    /// The limiter that was asked.
    pub number: LimiterNumber,
    /// Its revision then.
    pub revision: u32,
    /// The cell that was charged.
    pub cell: CellId,
    /// The part of its time.
    pub slice: u64,
    /// Tokens that were charged.
    pub charged: u64,
    /// Tokens that the call is known to have cost so far.
    pub told: u64,
    /// When it settles by itself.
    pub expires_at: Time,
}

/// What a part of a grant holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// Tokens that may turn out to be fewer or more.
    Estimate,
    /// Tokens that a client spends when it likes.
    Lease,
    /// Permits.
    Permit,
}

impl OpenPart {
    /// Tokens of the cell that may still come back.
    #[must_use]
    pub const fn out(&self) -> u64 {
        self.charged.saturating_sub(self.told)
    }
}

/// Why nothing could be decided.
#[derive(Clone, Debug, Error)]
pub enum StorageError {
    /// No room for another mark in the queue of the disk.
    #[error("{0} charges wait for the disk, as many as this server holds; try again soon")]
    Behind(usize),
    /// No room for another note.
    #[error("{0} changes wait for the disk, as many as this server holds; try again soon")]
    Noted(usize),
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
