//! What every call passes through, whatever service it is for: its time limit, its place in the metrics,
//! and the end of endless streams when the server drains.

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::{Arc, atomic::AtomicUsize},
    task::{Context, Poll, ready},
    time::Duration,
};

use fusebox_proto::{
    envoy::service::ratelimit::v3::rate_limit_service_server::RateLimitServiceServer,
    v1::resilience_server::ResilienceServer,
};
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Code, Status, body::Body, server::NamedService, service::Routes};
use tower::{ServiceExt, util::Either};

use super::{Service, delivery::Delivery, ratelimit::Ratelimit, received::Received, status};
use crate::{
    clock::Clock,
    limits,
    metrics::{MethodDurations, Metrics},
};

const GRPC_TIMEOUT: &str = "grpc-timeout";

const RESILIENCE: &str = <ResilienceServer<Service> as NamedService>::NAME;

const RATELIMIT: &str = <RateLimitServiceServer<Ratelimit> as NamedService>::NAME;

/// The one method whose requests are a stream that may have no end.
const SESSION: &str = "fusebox.v1.Resilience/Session";

/// A method, and whether its answer is a stream, which may have no end of its own.
struct Method {
    name: &'static str,
    streams: bool,
}

/// Every method served, the hot one first.
const METHODS: [Method; 26] = [
    Method { name: "fusebox.v1.Resilience/Acquire", streams: false },
    Method { name: "envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit", streams: false },
    Method { name: "fusebox.v1.Resilience/AcquireBatch", streams: false },
    Method { name: "fusebox.v1.Resilience/Report", streams: false },
    Method { name: SESSION, streams: true },
    Method { name: "fusebox.v1.Resilience/Watch", streams: true },
    Method { name: "fusebox.v1.Admin/PutPolicy", streams: false },
    Method { name: "fusebox.v1.Admin/GetPolicy", streams: false },
    Method { name: "fusebox.v1.Admin/ListPolicies", streams: false },
    Method { name: "fusebox.v1.Admin/DeletePolicy", streams: false },
    Method { name: "fusebox.v1.Admin/InspectBucket", streams: false },
    Method { name: "fusebox.v1.Admin/ListBuckets", streams: false },
    Method { name: "fusebox.v1.Admin/TopKeys", streams: false },
    Method { name: "fusebox.v1.Admin/ResetBucket", streams: false },
    Method { name: "fusebox.v1.Admin/ListClients", streams: false },
    Method { name: "fusebox.v1.Admin/ReleaseGrant", streams: false },
    Method { name: "fusebox.v1.Admin/ListCircuits", streams: false },
    Method { name: "fusebox.v1.Admin/InspectCircuit", streams: false },
    Method { name: "fusebox.v1.Admin/SetCircuitMode", streams: false },
    Method { name: "fusebox.v1.Admin/ListEvents", streams: false },
    Method { name: "fusebox.v1.Admin/ServerInfo", streams: false },
    Method { name: "grpc.health.v1.Health/Check", streams: false },
    Method { name: "grpc.health.v1.Health/Watch", streams: true },
    Method { name: "grpc.reflection.v1.ServerReflection/ServerReflectionInfo", streams: true },
    Method { name: "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", streams: true },
    // Anything else: callers must not be able to make up label values.
    Method { name: "_OTHER", streams: false },
];

/// Every gRPC service behind what all calls have in common.
#[derive(Clone)]
pub struct Calls {
    /// The services that nearly all calls are for: asked directly, without a router's copies and boxes.
    resilience: ResilienceServer<Service>,
    ratelimit: RateLimitServiceServer<Ratelimit>,
    /// All others, and whatever nothing serves.
    routes: Routes,
    clock: Arc<dyn Clock>,
    methods: Arc<[MethodDurations]>,
    /// Bytes of the messages that are being received.
    received: Arc<AtomicUsize>,
    draining: CancellationToken,
}

impl Calls {
    /// Serves `service`, `ratelimit` and `routes`; endless streams end when `draining` is cancelled.
    pub fn new(
        service: Service,
        ratelimit: Ratelimit,
        routes: Routes,
        clock: Arc<dyn Clock>,
        metrics: &Metrics,
        draining: CancellationToken,
    ) -> Self {
        let methods = METHODS.iter().map(|method| metrics.method(method.name)).collect();
        let resilience = ResilienceServer::new(service);
        let resilience = resilience.max_decoding_message_size(limits::MESSAGE_BYTES);
        let ratelimit = RateLimitServiceServer::new(ratelimit);
        let ratelimit = ratelimit.max_decoding_message_size(limits::MESSAGE_BYTES);
        Self { resilience, ratelimit, routes, clock, methods, received: Arc::default(), draining }
    }
}

impl hyper::service::Service<Request<Incoming>> for Calls {
    type Response = Response<CallBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let path = request.uri().path().trim_start_matches('/');
        let known = METHODS.iter().position(|method| method.name == path);
        let method = known.unwrap_or(METHODS.len() - 1);
        let Method { name, streams } = METHODS[method];
        let is_session = name == SESSION;
        let mut call = Call {
            clock: Arc::clone(&self.clock),
            methods: Arc::clone(&self.methods),
            method,
            started: self.clock.monotonic(),
            code: Code::Cancelled,
            delivery: None,
        };
        let path = request.uri().path();
        let service = if is_of(RESILIENCE, path) {
            Either::Left(Either::Left(self.resilience.clone()))
        } else if is_of(RATELIMIT, path) {
            Either::Left(Either::Right(self.ratelimit.clone()))
        } else {
            Either::Right(self.routes.clone())
        };
        let received = Arc::clone(&self.received);
        let draining = streams.then(|| Box::pin(self.draining.clone().cancelled_owned()));
        Box::pin(async move {
            let time = timeout(request.headers());
            let request = Received::count(request, &received, is_session);
            let mut draining = draining;
            let mut response = pin!(service.oneshot(request));
            // A call whose message is there is answered at once, and needs no timer.
            let at_once = poll_fn(|cx| Poll::Ready(response.as_mut().poll(cx))).await;
            let response = match at_once {
                Poll::Ready(response) => infallible(response),
                Poll::Pending => tokio::select! {
                    response = tokio::time::timeout(time, response) => response.map_or_else(
                        |_| Status::deadline_exceeded("the time for this call is over").into_http(),
                        infallible,
                    ),
                    // A stream that has not even begun.
                    () = cancelled(&mut draining) => draining_status().into_http(),
                },
            };
            let (mut head, inner) = response.into_parts();
            call.delivery = head.extensions.remove::<Delivery>();
            // Only an answer that is an error, and nothing else, has its status here.
            if let Some(status) = Status::from_header_map(&head.headers) {
                let status = status::corrected(status);
                call.code = status.code();
                head.headers.remove(Status::GRPC_MESSAGE);
                // What cannot be a header is told by its code alone.
                let _ = status.add_header(&mut head.headers);
            }
            Ok(Response::from_parts(head, CallBody { inner, call, draining }))
        })
    }
}

/// A call that is being answered: counted when it is dropped, however that comes about.
struct Call {
    clock: Arc<dyn Clock>,
    methods: Arc<[MethodDurations]>,
    method: usize,
    started: Duration,
    /// How it ended; cancelled until it has.
    code: Code,
    /// What is to be told once the answer is out.
    delivery: Option<Delivery>,
}

impl Drop for Call {
    fn drop(&mut self) {
        let duration = self.clock.monotonic().saturating_sub(self.started);
        self.methods[self.method].record(duration, self.code);
    }
}

pin_project! {
    /// The body of an answer: sees its status go by.
    pub struct CallBody {
        #[pin]
        inner: Body,
        call: Call,
        // Only of a stream, which may have no end of its own.
        draining: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    }
}

impl http_body::Body for CallBody {
    type Data = <Body as http_body::Body>::Data;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
        let this = self.project();
        let Poll::Ready(frame) = this.inner.poll_frame(cx) else {
            let Some(draining) = this.draining else { return Poll::Pending };
            ready!(draining.as_mut().poll(cx));
            *this.draining = None;
            this.call.code = Code::Unavailable;
            let mut trailers = HeaderMap::new();
            draining_status().add_header(&mut trailers)?;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        };
        if let Some(code) = frame
            .as_ref()
            .and_then(|frame| frame.as_ref().ok())
            .and_then(Frame::trailers_ref)
            .and_then(code_in)
        {
            this.call.code = code;
            if let Some(delivery) = this.call.delivery.take() {
                delivery.arrived();
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.inner.size_hint()
    }
}

pub(super) fn draining_status() -> Status {
    Status::unavailable("draining: connect again")
}

/// Whether a path is one of a service, known to it or not.
fn is_of(service: &str, path: &str) -> bool {
    let path = path.strip_prefix('/').and_then(|path| path.strip_prefix(service));
    path.is_some_and(|method| method.starts_with('/'))
}

/// Returns when it is cancelled; never if there is nothing to be.
async fn cancelled(draining: &mut Option<Pin<Box<WaitForCancellationFutureOwned>>>) {
    match draining {
        Some(draining) => draining.as_mut().await,
        None => std::future::pending().await,
    }
}

fn infallible<T>(result: Result<T, Infallible>) -> T {
    let Ok(value) = result;
    value
}

fn code_in(headers: &HeaderMap) -> Option<Code> {
    headers.get(Status::GRPC_STATUS).map(|code| Code::from_bytes(code.as_bytes()))
}

/// The time that a client gives the call, at most [`limits::CALL_TIME`].
///
/// The header is at most eight digits and a unit (gRPC over HTTP/2, "Timeout"); another is as none.
fn timeout(headers: &HeaderMap) -> Duration {
    let parse = |text: &str| {
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        if digits.is_empty()
            || digits.len() > 8
            || !digits.bytes().all(|digit| digit.is_ascii_digit())
        {
            return None;
        }
        let amount = digits.parse().ok()?;
        Some(match unit {
            "H" => Duration::from_secs(amount * 3_600),
            "M" => Duration::from_secs(amount * 60),
            "S" => Duration::from_secs(amount),
            "m" => Duration::from_millis(amount),
            "u" => Duration::from_micros(amount),
            "n" => Duration::from_nanos(amount),
            _ => return None,
        })
    };
    let header = headers.get(GRPC_TIMEOUT).and_then(|value| value.to_str().ok());
    header.and_then(parse).map_or(limits::CALL_TIME, |time| time.min(limits::CALL_TIME))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_client_sets_its_own_time_but_not_a_longer_one() {
        let timeout_of = |text: &'static str| {
            timeout(&HeaderMap::from_iter([(
                http::HeaderName::from_static(GRPC_TIMEOUT),
                HeaderValue::from_static(text),
            )]))
        };
        assert_eq!(timeout_of("250m"), Duration::from_millis(250));
        assert_eq!(timeout_of("1S"), Duration::from_secs(1));
        assert_eq!(timeout_of("99999999H"), limits::CALL_TIME);
        for not_a_timeout in ["", "S", "1", "1x", "+1S", "999999999S"] {
            assert_eq!(timeout_of(not_a_timeout), limits::CALL_TIME, "{not_a_timeout}");
        }
    }
}
