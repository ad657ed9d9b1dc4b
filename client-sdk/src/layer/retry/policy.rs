use http::Method;
use tower::BoxError;

use crate::retry::Again;

/// Which calls are made again.
///
/// Implemented by pairs of functions: the first clones a request that may be sent twice, the second says of a result
/// whether to.
pub trait Policy<Request, Response> {
    /// The request as it is sent, and the same for another try; `None` if it must not, or cannot, be sent twice.
    fn keep(&self, request: Request) -> (Request, Option<Request>);

    /// Whether a call that ended so is to be made again. It is not asked about rejections, which never are.
    fn again(&self, result: Result<&Response, &BoxError>) -> Again;
}

impl<Request, Response, C, A> Policy<Request, Response> for (C, A)
where
    C: Fn(&Request) -> Option<Request>,
    A: Fn(Result<&Response, &BoxError>) -> Again,
{
    fn keep(&self, request: Request) -> (Request, Option<Request>) {
        let kept = self.0(&request);
        (request, kept)
    }

    fn again(&self, result: Result<&Response, &BoxError>) -> Again {
        self.1(result)
    }
}

/// Requests of HTTP with an idempotent method (RFC 9110, 9.2.2) and a body that can be cloned, such as `Empty` and
/// `Full` of `http-body-util`: after errors, and after the statuses 429, 502, 503 and 504, when `retry-after` says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Idempotent;

impl<B: Clone, C> Policy<http::Request<B>, http::Response<C>> for Idempotent {
    fn keep(&self, request: http::Request<B>) -> (http::Request<B>, Option<http::Request<B>>) {
        let kept = is_idempotent(request.method()).then(|| request.clone());
        (request, kept)
    }

    fn again(&self, result: Result<&http::Response<C>, &BoxError>) -> Again {
        let Ok(response) = result else { return Again::Yes };
        match response.status().as_u16() {
            429 | 502..=504 => Again::retry_after(response.headers()),
            _ => Again::No,
        }
    }
}

fn is_idempotent(method: &Method) -> bool {
    [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE, Method::PUT, Method::DELETE]
        .contains(method)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    type Request = http::Request<&'static str>;

    fn again(status: u16, retry_after: &str) -> Again {
        let response = http::Response::builder().status(status).header("retry-after", retry_after);
        Policy::<Request, _>::again(&Idempotent, Ok(&response.body(()).unwrap()))
    }

    #[test]
    fn only_idempotent_requests_are_kept() {
        let kept = |method| {
            let request = http::Request::builder().method(method).body("body").unwrap();
            let (_, kept) = Policy::<_, http::Response<()>>::keep(&Idempotent, request);
            kept.map(Request::into_body)
        };
        assert_eq!(kept("GET"), Some("body"));
        assert_eq!(kept("PUT"), Some("body"));
        assert_eq!(kept("POST"), None);
        assert_eq!(kept("PATCH"), None);
    }

    #[test]
    fn a_target_that_is_away_is_tried_again_when_it_says() {
        assert_eq!(again(503, "2"), Again::After(Duration::from_secs(2)));
        assert_eq!(again(429, ""), Again::Yes);
        assert_eq!(again(500, "2"), Again::No);
        assert_eq!(again(200, "2"), Again::No);
    }
}
