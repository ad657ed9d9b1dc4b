//! Circuits: the shared one alone, and what it takes to open it.

mod ledger;
mod quorum;
mod recovery;
mod rules;
mod shared;
