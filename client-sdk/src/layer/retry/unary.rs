use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use hyper::body::{Body as _, Bytes, Frame};
use tonic::{Code, Status, body::Body};
use tower::BoxError;

use super::Policy;
use crate::{TimedOut, layer::source_of, retry::Again};

/// Largest request that is kept for another try: the size up to which a server takes messages, if not told otherwise.
const BYTES_MOST: usize = 4 << 20;

/// Calls of tonic with one message: after `UNAVAILABLE`, when the target's `grpc-retry-pushback-ms` says. (gRFC A6.)
///
/// That is safe for methods that may be executed twice, since the connection can break after the target has done its
/// work. A message above 4 MiB, or one that is still being made when the call begins, is sent once. What comes in the
/// trailers after a message is not waited for: a response with one is not tried again.
#[derive(Clone, Copy, Debug)]
pub struct Unary {
    codes: &'static [Code],
}

impl Default for Unary {
    fn default() -> Self {
        Self { codes: &[Code::Unavailable] }
    }
}

impl Unary {
    /// After these codes instead. Errors of the connection are `UNAVAILABLE`, and a timeout is `DEADLINE_EXCEEDED`.
    #[must_use]
    pub const fn after(codes: &'static [Code]) -> Self {
        Self { codes }
    }

    fn again_after(&self, code: Code, metadata: &http::HeaderMap) -> Again {
        match self.codes.contains(&code) {
            true => Again::after_pushback(metadata),
            false => Again::No,
        }
    }
}

impl<B> Policy<http::Request<Body>, http::Response<B>> for Unary {
    fn keep(
        &self,
        request: http::Request<Body>,
    ) -> (http::Request<Body>, Option<http::Request<Body>>) {
        let (parts, body) = request.into_parts();
        let (frames, rest) = read(body);
        let kept = rest.is_none().then(|| {
            let again = Body::new(Read { frames: frames.clone(), rest: None });
            http::Request::from_parts(parts.clone(), again)
        });
        let sent = Body::new(Read { frames, rest });
        (http::Request::from_parts(parts, sent), kept)
    }

    fn again(&self, result: Result<&http::Response<B>, &BoxError>) -> Again {
        match result {
            Ok(response) => match Status::from_header_map(response.headers()) {
                Some(status) => self.again_after(status.code(), response.headers()),
                None => Again::No,
            },
            Err(error) => match source_of::<Status>(&**error) {
                Some(status) => self.again_after(status.code(), status.metadata().as_ref()),
                None if source_of::<TimedOut>(&**error).is_some() => {
                    self.again_after(Code::DeadlineExceeded, &http::HeaderMap::new())
                }
                None => self.again_after(Code::Unavailable, &http::HeaderMap::new()),
            },
        }
    }
}

/// What is there of a body already, and the rest, if that is not all.
fn read(mut body: Body) -> (VecDeque<Bytes>, Option<Rest>) {
    let (mut frames, mut bytes) = (VecDeque::new(), 0);
    // Whoever reads the rest is woken by it: a body wakes the last that has asked.
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        let rest = match Pin::new(&mut body).poll_frame(&mut cx) {
            Poll::Ready(None) => return (frames, None),
            Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => {
                    bytes += data.len();
                    frames.push_back(data);
                    if bytes <= BYTES_MOST {
                        continue;
                    }
                    Rest { next: None, body }
                }
                Err(trailers) => Rest { next: Some(Ok(trailers)), body },
            },
            Poll::Ready(Some(Err(error))) => Rest { next: Some(Err(error)), body },
            Poll::Pending => Rest { next: None, body },
        };
        return (frames, Some(rest));
    }
}

/// A body of which some was read before it is sent.
struct Read {
    frames: VecDeque<Bytes>,
    rest: Option<Rest>,
}

struct Rest {
    /// What was read, and is no data.
    next: Option<Result<Frame<Bytes>, Status>>,
    body: Body,
}

impl hyper::body::Body for Read {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(data) = self.frames.pop_front() {
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        let Some(rest) = &mut self.rest else { return Poll::Ready(None) };
        match rest.next.take() {
            Some(next) => Poll::Ready(Some(next)),
            None => Pin::new(&mut rest.body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        let rest_ended = |rest: &Rest| rest.next.is_none() && rest.body.is_end_stream();
        self.frames.is_empty() && self.rest.as_ref().is_none_or(rest_ended)
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, time::Duration};

    use http_body_util::{BodyExt as _, Full, StreamBody};
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    fn keep(body: Body) -> (Body, Option<Body>) {
        let request = http::Request::builder().uri("/service/method").body(body).unwrap();
        let policy: &dyn Policy<_, http::Response<()>> = &Unary::default();
        let (sent, kept) = policy.keep(request);
        assert_eq!(sent.uri(), "/service/method");
        (sent.into_body(), kept.map(http::Request::into_body))
    }

    async fn text(body: Body) -> Bytes {
        body.collect().await.unwrap().to_bytes()
    }

    fn again(response: http::response::Builder) -> Again {
        let policy: &dyn Policy<http::Request<Body>, _> = &Unary::default();
        policy.again(Ok(&response.body(()).unwrap()))
    }

    fn again_after(error: impl Into<BoxError>) -> Again {
        let policy: &dyn Policy<http::Request<Body>, http::Response<()>> = &Unary::default();
        policy.again(Err(&error.into()))
    }

    #[tokio::test]
    async fn one_message_can_be_sent_twice() {
        let (sent, kept) = keep(Body::new(Full::from("message")));
        assert_eq!(text(sent).await, "message");
        let (sent, kept) = keep(kept.unwrap());
        assert_eq!(text(sent).await, "message");
        assert_eq!(text(kept.unwrap()).await, "message");
        let (sent, kept) = keep(Body::empty());
        assert!(sent.is_end_stream());
        assert!(kept.unwrap().is_end_stream());
    }

    #[tokio::test]
    async fn a_stream_is_sent_once_and_whole() {
        let (messages, receiver) = mpsc::channel::<Result<_, Status>>(4);
        let frame = |text: &'static str| Ok(Frame::data(Bytes::from_static(text.as_bytes())));
        messages.send(frame("begin")).await.unwrap();
        let stream = StreamBody::new(ReceiverStream::new(receiver));
        let (mut sent, kept) = keep(Body::new(stream));
        assert!(kept.is_none());

        let mut next = async || {
            let frame = poll_fn(|cx| Pin::new(&mut sent).poll_frame(cx)).await;
            frame.map(|frame| frame.unwrap().into_data().unwrap())
        };
        assert_eq!(next().await.unwrap(), "begin");
        let (end, ()) = tokio::join!(next(), async {
            messages.send(frame("end")).await.unwrap();
        });
        assert_eq!(end.unwrap(), "end");
        drop(messages);
        assert_eq!(next().await, None);
    }

    #[tokio::test]
    async fn a_message_that_is_too_large_to_keep_is_sent_once_and_whole() {
        let (sent, kept) = keep(Body::new(Full::from(vec![0; BYTES_MOST + 1])));
        assert!(kept.is_none());
        assert_eq!(text(sent).await.len(), BYTES_MOST + 1);
    }

    #[test]
    fn a_target_that_is_away_is_tried_again_when_it_says() {
        let response = || http::Response::builder().header("grpc-status", "14");
        assert_eq!(again(response()), Again::Yes);
        let pushback = |millis| again(response().header("grpc-retry-pushback-ms", millis));
        assert_eq!(pushback("20"), Again::After(Duration::from_millis(20)));
        assert_eq!(pushback("-1"), Again::No);
        assert_eq!(again(http::Response::builder().header("grpc-status", "13")), Again::No);
        assert_eq!(again(http::Response::builder()), Again::No);
    }

    #[test]
    fn a_connection_that_breaks_is_a_target_that_is_away() {
        assert_eq!(again_after("connection reset"), Again::Yes);
        assert_eq!(again_after(Status::unavailable("")), Again::Yes);
        assert_eq!(again_after(Status::internal("")), Again::No);
        assert_eq!(again_after(TimedOut { after: Duration::from_secs(1) }), Again::No);
    }
}
