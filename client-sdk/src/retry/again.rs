//! Whether to try again, and why not.

use std::time::Duration;

use http::HeaderMap;
use thiserror::Error;

/// Whether a call that ended so is to be made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// It is done: it succeeded, or trying again would be no use, or no good.
    No,
    /// After a pause of the backoff.
    Yes,
    /// After just this time, which the target asked for.
    After(Duration),
}

impl Again {
    /// Yes of each error: for calls that may safely be made twice, and whose errors all pass.
    pub fn on_error<T, E>(result: &Result<T, E>) -> Self {
        if result.is_err() { Self::Yes } else { Self::No }
    }

    /// What the metadata of a gRPC call that failed says in `grpc-retry-pushback-ms`: when to retry, or, by a
    /// negative number or what is none, not to. Yes if it says nothing. (gRFC A6.)
    #[must_use]
    pub fn after_pushback(metadata: &HeaderMap) -> Self {
        let Some(pushback) = metadata.get("grpc-retry-pushback-ms") else { return Self::Yes };
        match pushback.to_str().ok().and_then(|millis| millis.parse().ok()) {
            Some(millis) => Self::After(Duration::from_millis(millis)),
            None => Self::No,
        }
    }

    /// What an HTTP response says in `retry-after`, in seconds; a plain yes if it says nothing, or a date.
    #[must_use]
    pub fn retry_after(headers: &HeaderMap) -> Self {
        let seconds = headers.get(http::header::RETRY_AFTER).and_then(|after| after.to_str().ok());
        match seconds.and_then(|seconds| seconds.trim().parse().ok()) {
            Some(seconds) => Self::After(Duration::from_secs(seconds)),
            None => Self::Yes,
        }
    }
}

/// Why a call is not made again. The caller has the last result, which says more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum GaveUp {
    /// There is nothing to try again.
    #[error("it is done")]
    Done,
    /// It was made as often as it may be.
    #[error("it was tried as often as it may be")]
    Attempts,
    /// The next would begin after the deadline.
    #[error("the deadline leaves no time for another try")]
    Deadline,
    /// The target wants to be left alone for longer than a caller is kept waiting.
    #[error("the target wants to be left alone for longer than a minute")]
    Pushback,
    /// The fleet has made as many retries as its calls pay for.
    #[error("the retry budget is spent")]
    Budget,
    /// The server cannot be reached, and the budget says not to retry then.
    #[error("the server cannot be reached, and the retry budget denies then")]
    Unreachable,
    /// There is no such retry budget; an event tells what is wrong.
    #[error("the server could not decide")]
    Refused,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(http::HeaderName::from_static(name), value.parse().unwrap())])
    }

    #[test]
    fn pushback_says_when_or_never() {
        let pushback = |value| Again::after_pushback(&headers("grpc-retry-pushback-ms", value));
        assert_eq!(pushback("250"), Again::After(Duration::from_millis(250)));
        assert_eq!(pushback("0"), Again::After(Duration::ZERO));
        assert_eq!(pushback("-1"), Again::No);
        assert_eq!(pushback("soon"), Again::No);
        assert_eq!(Again::after_pushback(&HeaderMap::new()), Again::Yes);
    }

    #[test]
    fn retry_after_is_seconds() {
        let after = |value| Again::retry_after(&headers("retry-after", value));
        assert_eq!(after("2"), Again::After(Duration::from_secs(2)));
        assert_eq!(after("Wed, 21 Oct 2015 07:28:00 GMT"), Again::Yes);
        assert_eq!(Again::retry_after(&HeaderMap::new()), Again::Yes);
    }
}
