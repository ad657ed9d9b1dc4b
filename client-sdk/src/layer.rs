//! Layers for tower.
use std::error::Error;

use crate::Rejected;

pub use tower::BoxError;

/// The rejection that an error is, or comes of.
#[must_use]
pub fn rejection(error: &BoxError) -> Option<&Rejected> {
    rejected_in(&**error)
}

/// As [`rejection`], of any error.
pub(crate) fn rejected_in<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Rejected> {
    let mut error = Some(error);
    // A chain that has no end would be a mistake of others; one of so many links as this tells nothing any more.
    for _ in 0..MOST_SOURCES {
        let this = error?;
        if let Some(rejected) = this.downcast_ref() {
            return Some(rejected);
        }
        error = this.source();
    }
    None
}

/// Links of a chain of sources that are looked at.
const MOST_SOURCES: usize = 64;
