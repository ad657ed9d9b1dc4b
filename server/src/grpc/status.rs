//! Errors on the wire: the one table from what went wrong to a gRPC status.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use crate::{app::AcquireError, limits, storage::StorageError};

/// Bytes of a caller's own text that an error repeats to it.
const ECHOED_BYTES: usize = 128;

/// What is wrong with a request, or what it wants that this build does not have.
#[derive(Debug, Default)]
pub(super) struct Refusal {
    unsupported: Vec<FieldViolation>,
    violations: Vec<FieldViolation>,
}

impl Refusal {
    /// Notes a field whose function this build does not have, if it is set.
    pub(super) fn unsupported(&mut self, set: bool, field: impl FnOnce() -> String) {
        if set && !self.is_full() {
            self.unsupported
                .push(FieldViolation::new(field(), "not supported by this build; leave it unset"));
        }
    }

    /// Notes a field that is wrong.
    pub(super) fn violation(&mut self, field: impl Into<String>, message: impl Into<String>) {
        if !self.is_full() {
            self.violations.push(FieldViolation::new(field, message));
        }
    }

    /// As much is noted as one answer tells.
    pub(super) fn is_full(&self) -> bool {
        self.unsupported.len() + self.violations.len() >= limits::VIOLATIONS
    }

    /// `accept` if nothing was noted.
    pub(super) fn or_else<T>(self, accept: impl FnOnce() -> T) -> Result<T, Self> {
        if self.unsupported.is_empty() && self.violations.is_empty() {
            Ok(accept())
        } else {
            Err(self)
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        if refusal.unsupported.is_empty() {
            violations(Code::InvalidArgument, refusal.violations)
        } else {
            violations(Code::Unimplemented, refusal.unsupported)
        }
    }
}

/// The status of an error of the app; `path` is where in a batch its fields are.
pub(super) fn acquire(error: &AcquireError, path: &str) -> Status {
    let message = shortened(error.to_string());
    match error {
        AcquireError::UnknownNamespace(namespace) => not_found("namespace", namespace, message),
        AcquireError::UnknownPolicy { ask, policy, .. } => {
            not_found("policy", policy, format!("{path}asks[{ask}].policy: {message}"))
        }
        AcquireError::NeverPossible { ask, .. } => {
            let field = format!("{path}asks[{ask}].cost");
            violations(Code::InvalidArgument, vec![FieldViolation::new(field, message)])
        }
        AcquireError::GrantsFull | AcquireError::Storage(StorageError::Full(_)) => {
            Status::resource_exhausted(message)
        }
        AcquireError::Storage(StorageError::Failed(_)) => Status::unavailable(message),
    }
}

/// The first violation in the message, for those who only print that; all of them in the details.
fn violations(code: Code, violations: Vec<FieldViolation>) -> Status {
    let more = violations.len().saturating_sub(1);
    let mut message = violations
        .first()
        .map(|first| format!("{}: {}", first.field, first.description))
        .unwrap_or_default();
    if more > 0 {
        message += &format!(" (and {more} more)");
    }
    Status::with_error_details(code, message, ErrorDetails::with_bad_request(violations))
}

fn not_found(kind: &str, name: &str, message: String) -> Status {
    let details = ErrorDetails::with_resource_info(kind, shortened(name.to_owned()), "", &message);
    Status::with_error_details(Code::NotFound, message, details)
}

fn shortened(mut text: String) -> String {
    if text.len() > 2 * ECHOED_BYTES {
        let end = (0..=ECHOED_BYTES).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push('\u{2026}');
    }
    text
}

/// What tonic answers to a message that it cannot take, as this service's contract says it.
pub(super) fn corrected(status: Status) -> Status {
    match status.code() {
        // Nothing here is a range that a caller could iterate over.
        Code::OutOfRange => Status::resource_exhausted(format!(
            "the message is too large: at most {} bytes",
            limits::MESSAGE_BYTES
        )),
        // The handlers have no internal errors: this is a message that is not one.
        Code::Internal => Status::invalid_argument(shortened(status.message().to_owned())),
        _ => status,
    }
}
