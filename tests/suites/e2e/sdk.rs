//! The client that services link, against a whole server.

mod clocks;
mod connection;
mod layers;
