//! Errors on the wire: the one table from what went wrong to a gRPC status.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use super::parse::in_entry;
use crate::{
    app::{AcquireError, RatelimitError, ReportError, WatchError, admin::AdminError},
    limits,
    storage::StorageError,
};

/// What is wrong with a request.
#[derive(Debug, Default)]
pub(super) struct Refusal {
    violations: Vec<FieldViolation>,
}

impl Refusal {
    /// Notes a field that is wrong.
    pub(super) fn violation(&mut self, field: impl Into<String>, message: impl Into<String>) {
        if !self.is_full() {
            self.violations.push(FieldViolation::new(field, message));
        }
    }

    /// Notes a name that is missing.
    pub(super) fn required(&mut self, name: &str, of: &str, field: impl FnOnce() -> String) {
        if name.is_empty() {
            self.violation(field(), format!("required: the name of a {of}"));
        }
    }

    /// Notes a text that is too long.
    pub(super) fn at_most(&mut self, most: usize, text: &str, field: impl FnOnce() -> String) {
        let bytes = text.len();
        if bytes > most {
            self.violation(field(), format!("{bytes} bytes; at most {most}"));
        }
    }

    /// As much is noted as one answer tells.
    pub(super) fn is_full(&self) -> bool {
        self.violations.len() >= limits::VIOLATIONS
    }

    /// `accept` if nothing was noted.
    pub(super) fn or_else<T>(self, accept: impl FnOnce() -> T) -> Result<T, Self> {
        if self.violations.is_empty() { Ok(accept()) } else { Err(self) }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        violations(Code::InvalidArgument, refusal.violations)
    }
}

/// The status of an Acquire that could not be decided; of a batch, that of the entry.
pub(super) fn acquire(error: &AcquireError, entry: Option<usize>) -> Status {
    let field = |ask: usize, name: &str| format!("{}asks[{ask}].{name}", in_entry(entry));
    match error {
        AcquireError::UnknownNamespace(namespace) => not_found("namespace", namespace, None),
        AcquireError::UnknownPolicy { ask, policy } => {
            not_found("policy", policy, Some(field(*ask, "policy")))
        }
        AcquireError::NeverPossible { ask, .. } => wrong(field(*ask, "cost"), error.to_string()),
        AcquireError::NotEstimable { ask, .. } => {
            wrong(field(*ask, "estimated"), error.to_string())
        }
        AcquireError::OneCall { ask, .. } => wrong(field(*ask, "cost"), error.to_string()),
        AcquireError::TooManyCircuits { ask, .. } => {
            wrong(field(*ask, "policy"), error.to_string())
        }
        AcquireError::NoLine { .. } => wrong("max_wait", error.to_string()),
        AcquireError::TooManyLimits { .. } => wrong("requests", error.to_string()),
        AcquireError::Draining => Status::unavailable(error.to_string()),
        AcquireError::GrantsFull => Status::resource_exhausted(error.to_string()),
        AcquireError::Storage(error) => storage(error),
    }
}

/// The status of an Acquire under an id that another one has.
pub(super) fn other_request(entry: Option<usize>) -> Status {
    let message = "another Acquire of this client had this id within the last minute: an id is for repeating \
                   the same Acquire";
    wrong(in_entry(entry) + "request_id", message)
}

/// The status of a Report that could not be taken.
pub(super) fn report(error: &ReportError) -> Status {
    let field = |delta: usize, name: &str| format!("deltas[{delta}].{name}");
    match error {
        ReportError::UnknownNamespace(namespace) => not_found("namespace", namespace, None),
        ReportError::UnknownPolicy { delta, policy } => {
            not_found("policy", policy, Some(field(*delta, "policy")))
        }
        ReportError::CountsItself { delta, .. } => {
            wrong(field(*delta, "policy"), error.to_string())
        }
        ReportError::OfCircuits { delta, field: name, .. }
        | ReportError::OfBudgets { delta, field: name, .. } => {
            wrong(field(*delta, name), error.to_string())
        }
        ReportError::Storage(error) => storage(error),
    }
}

/// The status of circuits that cannot be watched.
pub(super) fn watch(error: &WatchError) -> Status {
    let field = |index: usize| format!("policies[{index}]");
    match error {
        WatchError::UnknownNamespace(namespace) => not_found("namespace", namespace, None),
        WatchError::UnknownPolicy { index, policy } => {
            not_found("policy", policy, Some(field(*index)))
        }
        WatchError::NotABreaker { index, .. } => wrong(field(*index), error.to_string()),
        WatchError::TooManyWatchers => Status::resource_exhausted(error.to_string()),
        WatchError::Storage(error) => storage(error),
    }
}

/// The status of a proxy's request that could not be decided.
pub(super) fn ratelimit(error: &RatelimitError) -> Status {
    match error {
        RatelimitError::NotConfigured
        | RatelimitError::UnknownPolicy { .. }
        | RatelimitError::NotARate { .. } => Status::failed_precondition(error.to_string()),
        RatelimitError::TooManyLimits => wrong("descriptors", error.to_string()),
        RatelimitError::Storage(error) => storage(error),
    }
}

/// The status of what an operator asked for and was not done.
pub(super) fn admin(error: &AdminError) -> Status {
    match error {
        AdminError::UnknownNamespace(namespace) => not_found("namespace", namespace, None),
        AdminError::UnknownPolicy(name) => not_found("policy", &name.policy, None),
        AdminError::UnknownGrant(id) => not_found("grant", id, None),
        AdminError::ManagedByFile(_)
        | AdminError::ManagedByRules(_)
        | AdminError::Judges { .. } => Status::failed_precondition(error.to_string()),
        AdminError::IsBreaker(_) | AdminError::IsLimiter(_) => wrong("policy", error.to_string()),
        AdminError::Conflict { .. } | AdminError::Moved { .. } => {
            Status::aborted(error.to_string())
        }
        AdminError::TooManyPolicies
        | AdminError::TooManyLimiters
        | AdminError::TooManyCircuits(_) => Status::resource_exhausted(error.to_string()),
        AdminError::Storage(error) => storage(error),
    }
}

/// The status of what the storage did not do.
pub(super) fn storage(error: &StorageError) -> Status {
    match error {
        StorageError::Behind(_) | StorageError::Noted(_) => {
            Status::resource_exhausted(error.to_string())
        }
        StorageError::Failed(_) | StorageError::Stopping => Status::unavailable(error.to_string()),
    }
}

/// One field is wrong.
pub(super) fn wrong(field: impl Into<String>, message: impl Into<String>) -> Status {
    violations(Code::InvalidArgument, vec![FieldViolation::new(field, message)])
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

/// A name that nothing has, and the field that says it.
pub(super) fn not_found(kind: &str, name: &str, field: Option<String>) -> Status {
    let name = shortened(name);
    let field = field.map(|field| field + ": ").unwrap_or_default();
    let message = format!("{field}unknown {kind} `{name}`");
    let details = ErrorDetails::with_resource_info(kind, name, "", &message);
    Status::with_error_details(Code::NotFound, message, details)
}

/// At most [`limits::ECHOED_BYTES`] of a caller's own text.
fn shortened(text: &str) -> String {
    if text.len() <= limits::ECHOED_BYTES {
        return text.to_owned();
    }
    format!("{}\u{2026}", &text[..text.floor_char_boundary(limits::ECHOED_BYTES)])
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
        Code::Internal => Status::invalid_argument(status.message()),
        _ => status,
    }
}
