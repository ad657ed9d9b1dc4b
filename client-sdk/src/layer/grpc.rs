//! What clients of tonic see.

use std::sync::Arc;

use tonic::{Code, Status};
use tower::BoxError;

use super::{rejection, source_of};
use crate::{Reason, TimedOut};

/// The status that an error of the layers is for a client of tonic, with the error as its source.
///
/// A rejection is `RESOURCE_EXHAUSTED` where a limit is used up and `UNAVAILABLE` where a circuit is open, and its
/// message says which and why; a timeout is `DEADLINE_EXCEEDED`; all else is what tonic makes of it. To be the
/// outermost of a stack, as in `ServiceBuilder::new().map_err(grpc::status).layer(resilience).service(channel)`.
#[must_use]
pub fn status(error: BoxError) -> Status {
    let code = match rejection(&error) {
        Some(rejected) => code(rejected.reason),
        None if source_of::<TimedOut>(&*error).is_some() => Code::DeadlineExceeded,
        None => return Status::from_error(error),
    };
    let mut status = Status::new(code, error.to_string());
    status.set_source(Arc::from(error));
    status
}

fn code(reason: Reason) -> Code {
    match reason {
        Reason::RateLimited
        | Reason::ConcurrencyLimited
        | Reason::RetryBudgetExhausted
        | Reason::ReservedForPriority
        | Reason::LineFull
        | Reason::OverflowBucket
        | Reason::Blocked => Code::ResourceExhausted,
        Reason::CircuitOpen
        | Reason::CircuitForcedOpen
        | Reason::ProbesInUse
        | Reason::Ramping
        | Reason::Undecided
        | Reason::Unreachable => Code::Unavailable,
        Reason::Refused => Code::Internal,
        Reason::Closed => Code::Cancelled,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{Rejected, layer::rejected_in};

    #[test]
    fn a_rejection_is_a_status_that_says_why() {
        let mut rejected = Rejected::of_names("api", "tenant");
        rejected.retry_after = Some(Duration::from_millis(20));
        let status = status(Box::new(rejected));
        assert_eq!(status.code(), Code::ResourceExhausted);
        let message = "rejected by `api` for `tenant`: the rate is used up; again in 20ms";
        assert_eq!(status.message(), message);
        assert!(rejected_in(&status).is_some(), "nobody tries it again");
    }

    #[test]
    fn what_is_no_rejection_stays_what_it_is() {
        let of = |error: BoxError| status(error).code();
        assert_eq!(of(Box::new(Status::not_found("x"))), Code::NotFound);
        assert_eq!(of("broken".into()), Code::Unknown);
        let timed_out = TimedOut { after: Duration::from_secs(1) };
        assert_eq!(of(Box::new(timed_out)), Code::DeadlineExceeded);
    }
}
