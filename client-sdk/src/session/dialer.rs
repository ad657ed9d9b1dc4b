//! How a session is begun: a connection, and Hello and Welcome over it.

use std::{pin::Pin, sync::Arc, time::Duration};

use fusebox_proto::v1::{
    self, SessionRequest, SessionResponse, resilience_client::ResilienceClient, session_request,
    session_response,
};
use http::Uri;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::DropGuard;
use tonic::{
    Code, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};
use tower::{Service, ServiceExt};

use super::Tasks;

/// Number of the Hello.
pub(super) const HELLO: u64 = 1;

/// Messages that were handed over and are not on their way yet, at most: what is behind them waits where it can still
/// be overtaken.
const HANDED_OVER_MOST: usize = 128;

/// An error of a connector.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

type Connecting<'a> =
    Pin<Box<dyn Future<Output = Result<Channel, tonic::transport::Error>> + Send + 'a>>;

/// Makes HTTP/2 connections over a connector of the user's.
pub(crate) trait Connect: Send + Sync {
    fn connect<'a>(&'a self, endpoint: &'a Endpoint) -> Connecting<'a>;
}

/// A connector of the user's.
pub(crate) struct Given<C>(pub(crate) C);

impl<C> Connect for Given<C>
where
    C: Service<Uri> + Clone + Send + Sync + 'static,
    C::Response: hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
    C::Future: Send + 'static,
    C::Error: Into<BoxError> + 'static,
{
    fn connect<'a>(&'a self, endpoint: &'a Endpoint) -> Connecting<'a> {
        let connector = self.0.clone().map_err(Into::<BoxError>::into);
        Box::pin(endpoint.connect_with_connector(connector))
    }
}

/// Where a server is.
pub(crate) struct Target {
    /// As the user wrote it.
    pub(crate) name: String,
    pub(crate) endpoint: Endpoint,
}

/// All that is needed to begin a session.
pub(crate) struct Dialer {
    pub(crate) targets: Vec<Target>,
    pub(crate) connector: Option<Arc<dyn Connect>>,
    pub(crate) authorization: Option<MetadataValue<Ascii>>,
    /// For all of it, until the Welcome is there.
    pub(crate) within: Duration,
    pub(crate) hello: v1::Hello,
}

/// A session that has begun. What carries it ends when it is dropped.
pub(super) struct Connection {
    pub(super) to_server: mpsc::Sender<SessionRequest>,
    pub(super) from_server: Streaming<SessionResponse>,
    pub(super) welcome: v1::Welcome,
    pub(super) end: DropGuard,
}

/// Why there is no session, or no longer.
#[derive(Debug)]
pub(super) struct Broken {
    pub(super) cause: String,
    /// The server drains, and sent its clients away.
    pub(super) drained: bool,
    /// The server understood, and does not want this client.
    pub(super) refused: Option<Code>,
}

impl Broken {
    pub(super) fn by(cause: impl Into<String>) -> Self {
        Self { cause: cause.into(), drained: false, refused: None }
    }

    pub(super) fn refused(code: Code, message: &str) -> Self {
        let drained = code == Code::Unavailable && message.starts_with("draining");
        let mistake = matches!(
            code,
            Code::InvalidArgument
                | Code::NotFound
                | Code::PermissionDenied
                | Code::Unauthenticated
                | Code::Unimplemented
        );
        let refused = mistake.then_some(code);
        Self { cause: format!("{code:?}: {message}"), drained, refused }
    }
}

impl From<Status> for Broken {
    fn from(status: Status) -> Self {
        // tonic's own words are "transport error"; what happened is further down.
        match std::error::Error::source(&status) {
            Some(source) => Self::by(innermost(source)),
            None => Self::refused(status.code(), status.message()),
        }
    }
}

impl Dialer {
    /// Begins a session. Takes no longer than the time there is for it.
    pub(super) async fn open(&self, target: usize, tasks: &Tasks) -> Result<Connection, Broken> {
        let opening = self.begin(&self.targets[target], tasks.child());
        tokio::time::timeout(self.within, opening)
            .await
            .unwrap_or_else(|_| Err(Broken::by(format!("no welcome within {:?}", self.within))))
    }

    async fn begin(&self, target: &Target, tasks: Tasks) -> Result<Connection, Broken> {
        let end = tasks.end.clone().drop_guard();
        let endpoint = target.endpoint.clone().executor(tasks);
        let connecting = match &self.connector {
            Some(connector) => connector.connect(&endpoint).await,
            None => endpoint.connect().await,
        };
        let channel = connecting.map_err(|error| Broken::by(innermost(&error)))?;

        let (to_server, handed_over) = mpsc::channel(HANDED_OVER_MOST);
        let hello = session_request::Request::Hello(self.hello.clone());
        // There is room: it is the first.
        let _ = to_server.try_send(SessionRequest { id: HELLO, request: Some(hello) });
        let mut request = tonic::Request::new(ReceiverStream::new(handed_over));
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        let mut from_server = ResilienceClient::new(channel).session(request).await?.into_inner();
        let first = from_server.message().await?.ok_or_else(|| Broken::by("no answer to Hello"))?;
        match first.response {
            Some(session_response::Response::Welcome(welcome)) => {
                Ok(Connection { to_server, from_server, welcome, end })
            }
            Some(session_response::Response::Refusal(refusal)) => {
                Err(Broken::refused(Code::from_i32(refusal.code), &refusal.message))
            }
            _ => Err(Broken::by("the answer to Hello is no Welcome")),
        }
    }
}

impl<T: Future<Output = ()> + Send + 'static> hyper::rt::Executor<T> for Tasks {
    fn execute(&self, task: T) {
        self.spawn(task);
    }
}

fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.by_ref().last().unwrap_or(error).to_string()
}
