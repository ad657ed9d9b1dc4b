//! Circuits: the shared one alone, what it takes to open it, and with the local breakers of its clients.

mod client;
mod fleet;
mod ledger;
mod quorum;
mod recovery;
mod rules;
mod shared;
