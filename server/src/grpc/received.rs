//! What is received of a call: it counts until it is dealt with.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, atomic::AtomicUsize},
    task::{Context, Poll, ready},
};

use http::Request;
use http_body::Frame;
use hyper::body::Bytes;
use parking_lot::Mutex;
use pin_project_lite::pin_project;
use tonic::Status;
use tower::BoxError;

use crate::{limits, reservation::Reservation};

/// Bytes before each message: whether it is compressed, and its length (gRPC over HTTP/2, "Length-Prefixed-Message").
const PREFIX: usize = 5;

pin_project! {
    /// The body of a request: what is received of it counts until the call is over; of a session, each message until
    /// it is dealt with.
    pub(super) struct Received<B> {
        #[pin]
        body: B,
        bytes: Reservation,
        stream: Option<Framing>,
    }
}

impl<B> Received<B> {
    /// Counts what is received of a request; that of a session has its parcels as an extension, and takes them.
    pub(super) fn count(
        request: Request<B>,
        received: &Arc<AtomicUsize>,
        is_session: bool,
    ) -> Request<Self> {
        let parcels = is_session.then(Parcels::default);
        let mut request = request.map(|body| Self {
            body,
            bytes: Reservation::nothing(received),
            stream: parcels.clone().map(Framing::of),
        });
        if let Some(parcels) = parcels {
            request.extensions_mut().insert(parcels);
        }
        request
    }
}

/// What is taken for the bytes of each message of a stream that has been received and not been dealt with.
///
/// They are as many as one frame holds: the next is received when all of these have been taken.
#[derive(Clone, Debug, Default)]
pub(super) struct Parcels(Arc<Mutex<VecDeque<Reservation>>>);

impl Parcels {
    /// That of the next message, in the order in which they were received.
    pub(super) fn next(&self) -> Option<Reservation> {
        self.0.lock().pop_front()
    }
}

/// Where messages end in what is received.
struct Framing {
    parcels: Parcels,
    prefix: [u8; PREFIX],
    /// Bytes of the message so far, its prefix included.
    read: usize,
}

impl Framing {
    fn of(parcels: Parcels) -> Self {
        Self { parcels, prefix: [0; PREFIX], read: 0 }
    }

    /// Goes on with so much of it, and parts with the share of each message that is complete.
    fn read(&mut self, mut data: &[u8], bytes: &mut Reservation) {
        while !data.is_empty() {
            let left = match self.read {
                read if read < PREFIX => PREFIX - read,
                read => self.length() - read,
            };
            let some = left.min(data.len());
            if self.read < PREFIX {
                self.prefix[self.read..self.read + some].copy_from_slice(&data[..some]);
            }
            self.read += some;
            data = &data[some..];
            if self.read >= PREFIX && self.read == self.length() {
                self.parcels.0.lock().push_back(bytes.split(self.read));
                self.read = 0;
            }
        }
    }

    /// Bytes of the message, its prefix included.
    fn length(&self) -> usize {
        let [_, length @ ..] = self.prefix;
        PREFIX + u32::from_be_bytes(length) as usize
    }
}

impl<B> http_body::Body for Received<B>
where
    B: http_body::Body<Data = Bytes, Error: Into<BoxError>>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.project();
        let frame = ready!(this.body.poll_frame(cx));
        if let Some(Ok(frame)) = &frame {
            let data = frame.data_ref().map_or(&[][..], |data| data);
            if !this.bytes.grow(data.len(), limits::RECEIVED_BYTES) {
                let status = Status::resource_exhausted("too many messages are being received");
                return Poll::Ready(Some(Err(status.into())));
            }
            if let Some(stream) = this.stream {
                stream.read(data, this.bytes);
            }
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::{pin::pin, sync::atomic::Ordering};

    use http_body_util::{BodyExt, Full};
    use tonic::Code;

    use super::*;

    #[tokio::test]
    async fn what_is_received_is_counted_and_past_the_limit_refused() {
        let taken = Arc::new(AtomicUsize::new(limits::RECEIVED_BYTES - 10));
        let body = |bytes: &'static [u8]| {
            let request = Request::new(Full::new(Bytes::from_static(bytes)));
            Received::count(request, &taken, false).into_body()
        };
        let mut ten = pin!(body(&[0; 10]));
        assert!(ten.as_mut().frame().await.unwrap().is_ok());
        let refused = body(&[0]).collect().await.unwrap_err();
        let status = refused.downcast::<Status>().unwrap();
        assert_eq!(status.code(), Code::ResourceExhausted);
    }

    #[test]
    fn of_a_stream_each_message_is_given_back_alone_wherever_its_frames_end() {
        let sizes = [0, 1, 300, 7];
        let mut bytes = Vec::new();
        for size in sizes {
            bytes.push(0);
            bytes.extend(u32::to_be_bytes(size));
            bytes.extend(std::iter::repeat_n(9, size as usize));
        }
        bytes.extend([0, 0]);
        for cut in 1..bytes.len() {
            let taken = Arc::new(AtomicUsize::new(0));
            let parcels = Parcels::default();
            let mut framing = Framing::of(parcels.clone());
            let mut share = Reservation::of(&taken, bytes.len(), usize::MAX).unwrap();
            for part in bytes.chunks(cut) {
                framing.read(part, &mut share);
            }
            let mut left = bytes.len();
            for size in sizes {
                drop(parcels.next().expect("a message"));
                left -= PREFIX + size as usize;
                assert_eq!(taken.load(Ordering::Relaxed), left, "in parts of {cut}");
            }
            assert!(parcels.next().is_none() && left == 2);
        }
    }
}
