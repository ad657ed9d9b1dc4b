//! Breakers among their surroundings. Each rule that the model shows to be needed has a test here that names it.

mod differential;
mod shared;
