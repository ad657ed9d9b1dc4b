//! The stream of those who watch circuits.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use fusebox_proto::v1::WatchResponse;
use tokio_util::sync::ReusableBoxFuture;
use tonic::{Status, codegen::tokio_stream::Stream};

use super::{respond, status};
use crate::{
    app::{News, Watch},
    storage::StorageError,
};

/// What a watcher is told, each message made when there is room for it: nothing is queued.
pub struct Messages {
    next: ReusableBoxFuture<'static, (Watch, Result<News, StorageError>)>,
    ended: bool,
}

impl Messages {
    pub(super) fn of(watch: Watch) -> Self {
        Self { next: ReusableBoxFuture::new(next(watch)), ended: false }
    }
}

async fn next(mut watch: Watch) -> (Watch, Result<News, StorageError>) {
    let news = watch.next().await;
    (watch, news)
}

impl Stream for Messages {
    type Item = Result<WatchResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let (watch, news) = ready!(self.next.poll(cx));
        let message = match news {
            Ok(news) => {
                self.next.set(next(watch));
                Ok(respond::news(news))
            }
            Err(error) => {
                self.ended = true;
                Err(status::storage(&error))
            }
        };
        Poll::Ready(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use fusebox_core::{
        Time,
        circuit::{Evidence, Forced, Generation, MAX_KINDS, Phase, Share, View},
    };
    use prost::Message;

    use super::*;
    use crate::{
        catalogue::{CellId, PolicyName},
        limits,
        storage::CircuitName,
    };

    #[test]
    fn the_longest_message_is_not_too_long() {
        let text = |bytes: usize| -> Arc<str> { "x".repeat(bytes).into() };
        let texts = |bytes| vec![text(bytes); MAX_KINDS];
        let breaker = PolicyName::new("test", &text(limits::NAME_BYTES));
        let key = text(limits::KEY_BYTES).as_ref().into();
        let name = Arc::new(CircuitName { breaker, key, cell: CellId([0; 2]) });
        let end = Time::from_nanos(u64::MAX);
        let evidence = Evidence {
            failure_rate: Share::ALL,
            slow_rate: Share::ALL,
            calls: u64::MAX,
            reporters: u32::MAX,
            unhealthy: u32::MAX,
            zones: texts(limits::CLIENT_BYTES),
            kinds: texts(64),
        };
        let view = View {
            phase: Phase::ForcedOpen,
            generation: Generation(u64::MAX),
            since: Time::ZERO,
            opened_at: Some(Time::ZERO),
            half_open_at: Some(end),
            ramp: Some(Share::ALL),
            evidence: Some(Arc::new(evidence)),
            forced: Some(Arc::new(Forced {
                until: end,
                reason: text(limits::REASON_BYTES),
                actor: text(limits::EVENT_ACTOR_BYTES),
            })),
        };
        let news = News {
            epoch: u64::MAX,
            version: u64::MAX,
            snapshot: true,
            complete: true,
            circuits: vec![(name, Some(view)); limits::WATCH_CIRCUITS],
            absent: Generation(u64::MAX),
            elapsed: Duration::MAX,
            now: Time::ZERO,
        };
        let bytes = respond::news(news).encoded_len();
        assert!(bytes <= limits::MESSAGE_BYTES, "{bytes} bytes");
    }
}
