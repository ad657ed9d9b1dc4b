//! Models: small worlds in which every order of events is tried. They came before the code that they are
//! about, and stay.

#![allow(clippy::unwrap_used)]

mod circuits;
mod kinds;
mod leases;
mod marks;
mod search;
