//! The client that services link, against a whole server.

mod connection;
mod layers;
