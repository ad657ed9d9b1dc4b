//! The connection, and what goes wrong with it.

use std::time::Duration;

use fusebox_proto::v1::{self, AcquireRequest, ReportRequest, resilience_client::ResilienceClient};
use thiserror::Error;
use tonic::{
    Request, Status,
    transport::{Channel, Endpoint},
};

use super::{Acquired, Ask, Outcome, Reported};

/// Wait for a connection: a server that is there answers in a fraction of it.
const CONNECT_TIME: Duration = Duration::from_secs(5);

/// Wait for an answer: a decision takes microseconds, so this only ends calls that are lost.
const CALL_TIME: Duration = Duration::from_secs(5);

/// Asks one server about the policies of one namespace. Clones share the connection.
#[derive(Clone, Debug)]
pub struct Client {
    inner: ResilienceClient<Channel>,
    namespace: String,
    who: Option<v1::Client>,
}

/// Why there is no answer. Never a denial: that is an answer.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no connection to the server.
    #[error("cannot connect to {endpoint}: {cause}")]
    Connect {
        /// Where the server should be.
        endpoint: String,
        /// What went wrong, told by the innermost of its sources.
        cause: String,
    },
    /// The server could not decide; its message says why.
    #[error("{:?}: {}", .0.code(), .0.message())]
    Status(#[from] Box<Status>),
    /// The answer is not one that this client understands.
    #[error("the server answered {0}")]
    Answer(&'static str),
}

impl Client {
    /// Connects to a server, such as `http://127.0.0.1:3873`. Dropping the future gives it up.
    ///
    /// # Errors
    /// If the address is not one, or nobody answers there within five seconds.
    pub async fn connect(
        endpoint: impl Into<String>,
        namespace: impl Into<String>,
    ) -> Result<Self, Error> {
        let endpoint = endpoint.into();
        let connected = async {
            let endpoint = Endpoint::from_shared(endpoint.clone())?;
            endpoint.connect_timeout(CONNECT_TIME).tcp_nodelay(true).connect().await
        };
        let channel = connected.await.map_err(|error| {
            let cause = innermost(&error).to_string();
            Error::Connect { endpoint: endpoint.clone(), cause }
        })?;
        Ok(Self { inner: ResilienceClient::new(channel), namespace: namespace.into(), who: None })
    }

    /// Names the process that calls, in at most 128 bytes: new at each start of it.
    ///
    /// Reporters of circuits are told apart by it; those without a name are one.
    #[must_use]
    pub fn named(self, id: impl Into<String>) -> Self {
        Self { who: Some(v1::Client { id: id.into(), ..Default::default() }), ..self }
    }

    /// Asks for 1 to 16 things together: all are charged, or none is.
    ///
    /// Takes at most five seconds. Dropped before it is answered it is perhaps charged.
    ///
    /// # Errors
    /// If there is no decision. [`Error::Status`] with `UNAVAILABLE`, `DEADLINE_EXCEEDED` or `CANCELLED` is
    /// "not admitted, perhaps charged"; every other code charged nothing.
    pub async fn acquire(&self, asks: impl IntoIterator<Item = Ask>) -> Result<Acquired, Error> {
        let asks = asks.into_iter().map(Into::into).collect();
        let (namespace, client) = (self.namespace.clone(), self.who.clone());
        let request = AcquireRequest { namespace, client, asks, ..Default::default() };
        let response = self.inner.clone().acquire(timed(request)).await.map_err(Box::new)?;
        Acquired::try_from(response.into_inner()).map_err(Error::Answer)
    }

    /// Tells how granted calls went; answers for each, in order.
    ///
    /// Takes at most five seconds. Dropped before it is answered it has perhaps counted; telling it again is safe.
    ///
    /// # Errors
    /// If the server could not take the report.
    pub async fn report(
        &self,
        outcomes: impl IntoIterator<Item = Outcome>,
    ) -> Result<Vec<Reported>, Error> {
        let outcomes = outcomes.into_iter().map(Into::into).collect();
        let (namespace, client) = (self.namespace.clone(), self.who.clone());
        let request = ReportRequest { namespace, client, outcomes, ..Default::default() };
        let response = self.inner.clone().report(timed(request)).await.map_err(Box::new)?;
        let results = response.into_inner().results;
        results
            .into_iter()
            .map(|result| Reported::try_from(result).map_err(Error::Answer))
            .collect()
    }
}

/// tonic's own words are "transport error"; what happened is further down.
fn innermost<'a>(error: &'a (dyn std::error::Error + 'static)) -> &'a dyn std::error::Error {
    std::iter::successors(Some(error), |error| error.source()).last().unwrap_or(error)
}

/// Ends the call after [`CALL_TIME`], here and at the server: it should not work on what nobody waits for.
fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIME);
    request
}
