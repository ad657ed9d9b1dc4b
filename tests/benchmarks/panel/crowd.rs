//! Others that are there while something is measured, and should not be noticed.

use fusebox_proto::v1::{AcquireRequest, Ask, resilience_client::ResilienceClient};
use tokio::task::JoinSet;

use crate::{Result, load::Load, process::Server, traffic::Traffic};

/// Callers that stand in a line: as many as one connection has streams for.
const STANDING: usize = 1_000;

/// Answers that are remembered by the id of their request.
const REMEMBERED: u32 = 100_000;

/// Who is there besides.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Crowd {
    Nobody,
    /// A thousand callers that stand in the line of another key.
    Line,
    /// A hundred thousand answers that are remembered.
    Remembered,
}

impl Crowd {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nobody => "",
            Self::Line => ", beside 1,000 callers in line",
            Self::Remembered => ", beside 100,000 remembered answers",
        }
    }

    /// Has them come; they stay until what is returned is dropped.
    pub(crate) async fn gather(self, server: &Server, load: &Load) -> Result<JoinSet<()>> {
        let mut there = JoinSet::new();
        match self {
            Self::Nobody => {}
            Self::Remembered => {
                load.each(Traffic::with_ids("slow", REMEMBERED), REMEMBERED).await?;
            }
            Self::Line => {
                let mut client = ResilienceClient::new(server.channel().await?);
                let ask = Ask { policy: "one".into(), ..Ask::default() };
                let request = AcquireRequest {
                    namespace: "bench".into(),
                    asks: vec![ask],
                    ..AcquireRequest::default()
                };
                client.acquire(request.clone()).await?;
                let max_wait = Some(prost_types::Duration { seconds: 60, nanos: 0 });
                for _ in 0..STANDING {
                    let mut client = client.clone();
                    let request = AcquireRequest { max_wait, ..request.clone() };
                    there.spawn_local(async move {
                        // Nobody is admitted: it ends with what is measured.
                        let _ = client.acquire(request).await;
                    });
                }
            }
        }
        Ok(there)
    }
}
