use tonic::Code;
use tower::BoxError;

use crate::{TimedOut, breaker::Verdict, layer::source_of};

/// Says how a call went. Implemented by functions of its result.
///
/// It is not asked about calls that a layer within rejected: those never reached the target.
pub trait Classify<Response> {
    /// How it went.
    fn classify(&self, result: Result<&Response, &BoxError>) -> Verdict;
}

impl<Response, F> Classify<Response> for F
where
    F: Fn(Result<&Response, &BoxError>) -> Verdict,
{
    fn classify(&self, result: Result<&Response, &BoxError>) -> Verdict {
        self(result)
    }
}

/// Each error is a failure of the target.
#[derive(Clone, Copy, Debug, Default)]
pub struct Errors;

impl<Response> Classify<Response> for Errors {
    fn classify(&self, result: Result<&Response, &BoxError>) -> Verdict {
        match result {
            Ok(_) => Verdict::Success,
            Err(error) => of_error(error),
        }
    }
}

/// Errors are failures, and so are responses of HTTP with a status of 500 and above.
#[derive(Clone, Copy, Debug, Default)]
pub struct HttpStatus;

impl<Body> Classify<http::Response<Body>> for HttpStatus {
    fn classify(&self, result: Result<&http::Response<Body>, &BoxError>) -> Verdict {
        match result {
            Ok(response) => of_http(response.status()),
            Err(error) => of_error(error),
        }
    }
}

/// Goes by the status of gRPC where the headers of a response have it: so do all responses without a message. A status
/// that comes after messages, in the trailers, is not waited for: such a call counts as a success.
///
/// `UNKNOWN`, `DEADLINE_EXCEEDED`, `RESOURCE_EXHAUSTED`, `INTERNAL`, `UNAVAILABLE` and `DATA_LOSS` are failures of the
/// target; `CANCELLED` says nothing about it; all others are answers.
#[derive(Clone, Copy, Debug, Default)]
pub struct GrpcStatus;

impl<Body> Classify<http::Response<Body>> for GrpcStatus {
    fn classify(&self, result: Result<&http::Response<Body>, &BoxError>) -> Verdict {
        match result {
            Ok(response) => match response.headers().get("grpc-status") {
                Some(status) => of_code(Code::from_bytes(status.as_bytes())),
                None => of_http(response.status()),
            },
            Err(error) => of_error(error),
        }
    }
}

fn of_error(error: &BoxError) -> Verdict {
    if source_of::<TimedOut>(&**error).is_some() {
        return Verdict::Failure("timed out");
    }
    match source_of::<tonic::Status>(&**error) {
        Some(status) => of_code(status.code()),
        None => Verdict::Failure("error"),
    }
}

fn of_http(status: http::StatusCode) -> Verdict {
    match status.as_u16() {
        ..500 => Verdict::Success,
        500 => Verdict::Failure("HTTP 500"),
        502 => Verdict::Failure("HTTP 502"),
        503 => Verdict::Failure("HTTP 503"),
        504 => Verdict::Failure("HTTP 504"),
        _ => Verdict::Failure("HTTP 5xx"),
    }
}

fn of_code(code: Code) -> Verdict {
    match code {
        Code::Unknown => Verdict::Failure("UNKNOWN"),
        Code::DeadlineExceeded => Verdict::Failure("DEADLINE_EXCEEDED"),
        Code::ResourceExhausted => Verdict::Failure("RESOURCE_EXHAUSTED"),
        Code::Internal => Verdict::Failure("INTERNAL"),
        Code::Unavailable => Verdict::Failure("UNAVAILABLE"),
        Code::DataLoss => Verdict::Failure("DATA_LOSS"),
        Code::Cancelled => Verdict::Ignored,
        _ => Verdict::Success,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn response(status: u16, grpc_status: Option<&str>) -> http::Response<()> {
        let mut response = http::Response::builder().status(status);
        if let Some(grpc_status) = grpc_status {
            response = response.header("grpc-status", grpc_status);
        }
        response.body(()).unwrap()
    }

    fn error(error: impl Into<BoxError>) -> BoxError {
        error.into()
    }

    #[test]
    fn a_status_of_http_from_500_on_is_a_failure() {
        let classify = |status| HttpStatus.classify(Ok(&response(status, None)));
        for status in [200, 302, 404, 429, 499] {
            assert_eq!(classify(status), Verdict::Success, "{status}");
        }
        assert_eq!(classify(500), Verdict::Failure("HTTP 500"));
        assert_eq!(classify(599), Verdict::Failure("HTTP 5xx"));
    }

    #[test]
    fn a_status_of_grpc_comes_before_that_of_http() {
        let classify = |http, grpc| GrpcStatus.classify(Ok(&response(http, grpc)));
        assert_eq!(classify(200, Some("14")), Verdict::Failure("UNAVAILABLE"));
        assert_eq!(classify(200, Some("5")), Verdict::Success);
        assert_eq!(classify(200, Some("1")), Verdict::Ignored);
        assert_eq!(classify(200, Some("0")), Verdict::Success);
        assert_eq!(classify(200, None), Verdict::Success);
        assert_eq!(classify(503, None), Verdict::Failure("HTTP 503"));
        assert_eq!(classify(200, Some("what")), Verdict::Failure("UNKNOWN"));
    }

    #[test]
    fn errors_are_failures_of_the_kind_that_they_are() {
        let classify = |error: BoxError| Classify::<()>::classify(&Errors, Err(&error));
        let timed_out = error(TimedOut { after: Duration::from_secs(1) });
        assert_eq!(classify(timed_out), Verdict::Failure("timed out"));
        assert_eq!(classify(error(tonic::Status::not_found(""))), Verdict::Success);
        assert_eq!(classify(error(tonic::Status::internal(""))), Verdict::Failure("INTERNAL"));
        assert_eq!(classify(error("broken")), Verdict::Failure("error"));
        assert_eq!(Errors.classify(Ok(&())), Verdict::Success);
    }
}
