//! The options of a client.

use std::{fmt, ops::RangeInclusive, sync::Arc, time::Duration};

use fusebox_proto::v1;
use http::Uri;
use thiserror::Error;
use tonic::{
    metadata::{Ascii, MetadataValue},
    transport::Endpoint,
};
use tower::Service;

#[cfg(feature = "tls")]
use super::Tls;
use super::{Client, Inner, endpoint::Address};
use crate::{
    Clock,
    breaker::Breakers,
    bulkhead::Bulkheads,
    context::{Context, Random},
    limiter::Limiters,
    retry::Retries,
    session::{Connect, Dialer, Given, Target, Wire},
    settings::Fallback,
    telemetry::{Observer, Telemetry},
};

/// Endpoints of one client, at most: more replicas of one state are behind a name.
const ENDPOINTS_MOST: usize = 16;

/// Connections of one client: more than one core of a server has to say to one process.
const CONNECTIONS: RangeInclusive<usize> = 1..=16;

/// Bytes of what says who calls, at most: the server's limit.
const WHO_MOST: usize = 128;

const CONNECT_TIMEOUT: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_secs(60);

/// More than this nobody waits for a decision.
const DECIDE_WITHIN: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(60);

const KEEPALIVE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(600);

/// Window of flow control: the answer to the largest batch fits.
const WINDOW: u32 = 1 << 20;

/// A client that is being described.
///
/// [`build`](Self::build) says what is wrong with it; until then nothing happens.
#[must_use = "a builder does nothing until it is built"]
pub struct ClientBuilder {
    endpoints: Vec<String>,
    namespace: String,
    service: String,
    zone: String,
    client_id: Option<String>,
    connections: usize,
    connect_timeout: Duration,
    decide_within: Duration,
    keepalive: Duration,
    fallback: Fallback,
    token: Option<String>,
    #[cfg(feature = "tls")]
    tls: Option<Tls>,
    connector: Option<Arc<dyn Connect>>,
    observer: Option<Arc<dyn Observer>>,
    clock: Option<Clock>,
    seed: Option<u64>,
}

/// What is wrong with a [`ClientBuilder`]; each names the option.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BuildError {
    /// There are no endpoints, or too many.
    #[error("`endpoints`: there are {0}, and 1 to 16 are possible")]
    Endpoints(usize),
    /// An endpoint is none, or cannot be used with the other options.
    #[error("`endpoints`: `{endpoint}` {wrong}")]
    Endpoint {
        /// As it was given.
        endpoint: String,
        /// What is wrong with it.
        wrong: String,
    },
    /// An option has a value that is not possible.
    #[error("`{option}`: {wrong}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// What is wrong with it.
        wrong: String,
    },
    /// A token would be sent where others can read it.
    #[error(
        "`token`: `{endpoint}` is plain text and not this machine, so others could read it; use `https://`"
    )]
    Token {
        /// The endpoint that it would be sent to.
        endpoint: String,
    },
    /// `build` was called outside of a tokio runtime.
    #[error("a client is to be built within a tokio runtime, where its tasks run")]
    Runtime,
}

impl ClientBuilder {
    pub(super) fn new(endpoints: Vec<String>) -> Self {
        Self {
            endpoints,
            namespace: String::new(),
            service: String::new(),
            zone: String::new(),
            client_id: None,
            connections: 1,
            connect_timeout: Duration::from_secs(5),
            decide_within: Duration::from_millis(50),
            keepalive: Duration::from_secs(10),
            fallback: Fallback::default(),
            token: None,
            #[cfg(feature = "tls")]
            tls: None,
            connector: None,
            observer: None,
            clock: None,
            seed: None,
        }
    }

    /// Namespace of all policies. Required; matches `[a-z][a-z0-9_-]{0,62}`.
    pub fn namespace(self, namespace: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), ..self }
    }

    /// Name of the service that calls, for operators to see. At most 128 bytes; default: none.
    pub fn service(self, service: impl Into<String>) -> Self {
        Self { service: service.into(), ..self }
    }

    /// Zone that the process runs in, for operators to see. At most 128 bytes; default: none.
    pub fn zone(self, zone: impl Into<String>) -> Self {
        Self { zone: zone.into(), ..self }
    }

    /// Id of this client, new at each start of it: two that share one spoil each other's leases and reports. 1 to 128
    /// bytes; default: 128 random bits.
    pub fn client_id(self, id: impl Into<String>) -> Self {
        Self { client_id: Some(id.into()), ..self }
    }

    /// HTTP/2 connections, over which keys are spread. 1 to 16; default: 1, which carries more than a server decides
    /// on one core.
    pub fn connections(self, connections: usize) -> Self {
        Self { connections, ..self }
    }

    /// How long one attempt to get a session may take, from the name's look-up to the server's welcome. 1 ms to 60 s;
    /// default: 5 s.
    pub fn connect_timeout(self, timeout: Duration) -> Self {
        Self { connect_timeout: timeout, ..self }
    }

    /// How long a call waits for a decision that memory cannot make, before it is decided without the server. Up to
    /// 60 s; default: 50 ms. While a session that was up is lost nothing waits; for the very first one the first calls
    /// do, since it is nearly there.
    pub fn decide_within(self, wait: Duration) -> Self {
        Self { decide_within: wait, ..self }
    }

    /// How long a connection may be silent before HTTP/2 pings, and again until it is given up. 1 s to 10 min;
    /// default: 10 s. The session's own heartbeats notice most failures before.
    pub fn keepalive(self, silence: Duration) -> Self {
        Self { keepalive: silence, ..self }
    }

    /// What is done of policies that the server has never told of, while it cannot be reached. Default:
    /// [`Fallback::Allow`]. Of all others their own `on_unreachable` says it.
    pub fn fallback(self, fallback: Fallback) -> Self {
        Self { fallback, ..self }
    }

    /// How endpoints of `https://` are talked to. Default: [`Tls::new`].
    #[cfg(feature = "tls")]
    pub fn tls(self, tls: Tls) -> Self {
        Self { tls: Some(tls), ..self }
    }

    /// A secret that says who calls, sent as `authorization: Bearer`. Printable ASCII; default: none. Only over
    /// `https://`, or to this machine. It is never logged.
    pub fn token(self, token: impl Into<String>) -> Self {
        Self { token: Some(token.into()), ..self }
    }

    /// What connects to an endpoint, by its URL: for other networks, and for simulated ones. TLS is spoken over what
    /// it returns if the endpoint is `https://`. Default: TCP.
    pub fn connector<C>(self, connector: C) -> Self
    where
        C: Service<Uri> + Clone + Send + Sync + 'static,
        C::Response: hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
        C::Future: Send + 'static,
        C::Error: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        Self { connector: Some(Arc::new(Given(connector))), ..self }
    }

    /// Who hears what happens to the client. Default: nobody but `tracing`.
    pub fn observer(self, observer: impl Observer) -> Self {
        Self { observer: Some(Arc::new(observer)), ..self }
    }

    /// The clock. Default: the machine's.
    pub fn clock(self, clock: Clock) -> Self {
        Self { clock: Some(clock), ..self }
    }

    /// All that is random comes of this number, also the client's id: for simulations. Default: the operating
    /// system's randomness.
    pub fn seed(self, seed: u64) -> Self {
        Self { seed: Some(seed), ..self }
    }

    /// A client, which connects in the background. Returns at once, whether or not there is a server.
    ///
    /// # Errors
    /// If an option is wrong, or if it is not called within a tokio runtime. Never because of the network.
    pub fn build(self) -> Result<Client, BuildError> {
        let runtime = tokio::runtime::Handle::try_current().map_err(|_| BuildError::Runtime)?;
        self.check()?;
        let seed = self.seed.map_or_else(secret, Ok)?;
        let random = Random::of(seed);
        let id = self.id(&random)?;
        let dialer = self.dialer(id)?;
        let clock = self.clock.unwrap_or_default();
        let (decide_within, fallback) = (self.decide_within, self.fallback);
        let telemetry = Telemetry { observer: self.observer, ..Telemetry::default() };

        // The parts ask over the wire, and the wire tells the observer that the parts have too.
        let (wire, ends) = Wire::new(self.connections, clock.clone(), runtime.clone());
        let (wire, links) = (Arc::new(wire), Random::of(random.next()));
        let exchange = Arc::clone(&wire) as Arc<_>;
        let context =
            Context { clock, runtime, exchange, decide_within, fallback, telemetry, random };
        let inner = Inner::new(wire, Arc::new(context));
        let parts = inner.parts().iter().map(Arc::downgrade).collect();
        inner.wire.start(ends, Arc::downgrade(&inner.context), dialer, parts, &links);
        Ok(Client { inner: Arc::new(inner) })
    }

    fn check(&self) -> Result<(), BuildError> {
        if !(1..=ENDPOINTS_MOST).contains(&self.endpoints.len()) {
            return Err(BuildError::Endpoints(self.endpoints.len()));
        }
        if !is_name(&self.namespace) {
            let wrong = format!("`{}` does not match `[a-z][a-z0-9_-]{{0,62}}`", self.namespace);
            return Err(BuildError::Option { option: "namespace", wrong });
        }
        short("service", &self.service)?;
        short("zone", &self.zone)?;
        within("connections", &self.connections, &CONNECTIONS)?;
        within("connect_timeout", &self.connect_timeout, &CONNECT_TIMEOUT)?;
        within("decide_within", &self.decide_within, &DECIDE_WITHIN)?;
        within("keepalive", &self.keepalive, &KEEPALIVE)
    }

    fn id(&self, random: &Random) -> Result<String, BuildError> {
        let id = match (&self.client_id, self.seed) {
            (Some(id), _) => id.clone(),
            (None, Some(_)) => random.id(),
            (None, None) => format!("{:016x}{:016x}", secret()?, secret()?),
        };
        if id.is_empty() {
            return Err(BuildError::Option { option: "client_id", wrong: "it is empty".into() });
        }
        short("client_id", &id)?;
        Ok(id)
    }

    fn dialer(&self, id: String) -> Result<Dialer, BuildError> {
        let targets = self.endpoints.iter().map(|endpoint| self.target(endpoint));
        let client = v1::Client { id, service: self.service.clone(), zone: self.zone.clone() };
        Ok(Dialer {
            targets: targets.collect::<Result<_, _>>()?,
            connector: self.connector.clone(),
            authorization: self.authorization()?,
            within: self.connect_timeout,
            hello: v1::Hello { namespace: self.namespace.clone(), client: Some(client) },
        })
    }

    fn target(&self, name: &str) -> Result<Target, BuildError> {
        let wrong =
            |wrong: &str| BuildError::Endpoint { endpoint: name.into(), wrong: wrong.into() };
        let address = Address::parse(name).map_err(wrong)?;
        if self.token.is_some() && address.is_plain && !address.is_loopback {
            return Err(BuildError::Token { endpoint: name.into() });
        }
        let endpoint = Endpoint::from(address.uri.clone())
            .connect_timeout(self.connect_timeout)
            .http2_keep_alive_interval(self.keepalive)
            .keep_alive_timeout(self.keepalive)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW);
        let endpoint = self.secured(endpoint, &address).map_err(|error| wrong(&error))?;
        Ok(Target { name: name.into(), endpoint })
    }

    #[cfg(feature = "tls")]
    fn secured(&self, endpoint: Endpoint, address: &Address) -> Result<Endpoint, String> {
        match (&self.tls, address.is_plain) {
            (None, true) => Ok(endpoint),
            (Some(_), true) => Err("is plain text, and `tls` is set; use `https://`".into()),
            (tls, false) => {
                let config = tls.clone().unwrap_or_default().into_config();
                endpoint.tls_config(config).map_err(|error| {
                    format!("cannot be talked to with this `tls`: {}", innermost(&error))
                })
            }
        }
    }

    #[cfg(not(feature = "tls"))]
    #[allow(clippy::unused_self)] // as with the feature, which looks at `tls`
    fn secured(&self, endpoint: Endpoint, address: &Address) -> Result<Endpoint, String> {
        if address.is_plain {
            return Ok(endpoint);
        }
        Err("needs the feature `tls` of this crate".into())
    }

    fn authorization(&self) -> Result<Option<MetadataValue<Ascii>>, BuildError> {
        let Some(token) = &self.token else { return Ok(None) };
        let wrong = |wrong: &str| BuildError::Option { option: "token", wrong: wrong.into() };
        if token.is_empty() {
            return Err(wrong("it is empty"));
        }
        // The error of the parser may show what it was given.
        let value = format!("Bearer {token}").parse::<MetadataValue<Ascii>>();
        let mut value = value.map_err(|_| wrong("it has other bytes than printable ASCII"))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

impl Inner {
    fn new(wire: Arc<Wire>, context: Arc<Context>) -> Self {
        Self {
            wire,
            limiters: Arc::new(Limiters::new(Arc::clone(&context))),
            bulkheads: Arc::new(Bulkheads::new(Arc::clone(&context))),
            breakers: Arc::new(Breakers::new(Arc::clone(&context))),
            retries: Arc::new(Retries::new(Arc::clone(&context))),
            context,
        }
    }
}

impl fmt::Debug for ClientBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientBuilder")
            .field("endpoints", &self.endpoints)
            .field("namespace", &self.namespace)
            .field("connections", &self.connections)
            .finish_non_exhaustive()
    }
}

/// Whether it matches `[a-z][a-z0-9_-]{0,62}`.
fn is_name(name: &str) -> bool {
    let later = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
    name.len() <= 63
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.bytes().all(later)
}

fn short(option: &'static str, value: &str) -> Result<(), BuildError> {
    if value.len() <= WHO_MOST {
        return Ok(());
    }
    let wrong = format!("it has {} bytes, and at most {WHO_MOST} are possible", value.len());
    Err(BuildError::Option { option, wrong })
}

fn within<T: PartialOrd + fmt::Debug>(
    option: &'static str,
    value: &T,
    possible: &RangeInclusive<T>,
) -> Result<(), BuildError> {
    if possible.contains(value) {
        return Ok(());
    }
    let (least, most) = (possible.start(), possible.end());
    let wrong = format!("it is {value:?}, and {least:?} to {most:?} is possible");
    Err(BuildError::Option { option, wrong })
}

/// A number that nobody else has.
fn secret() -> Result<u64, BuildError> {
    getrandom::u64().map_err(|error| BuildError::Option {
        option: "seed",
        wrong: format!("the operating system gives no random numbers: {error}"),
    })
}

#[cfg(feature = "tls")]
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.by_ref().last().unwrap_or(error).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builder() -> ClientBuilder {
        Client::connect("http://127.0.0.1:1").namespace("demo")
    }

    fn wrong(builder: ClientBuilder) -> String {
        builder.build().expect_err("it is wrong").to_string()
    }

    #[test]
    fn outside_of_a_runtime_it_is_not_built() {
        assert_eq!(builder().build().err(), Some(BuildError::Runtime));
    }

    #[tokio::test]
    async fn what_is_wrong_names_the_option() {
        for (wrong_one, begins) in [
            (Client::connect(Vec::<String>::new()).namespace("demo"), "`endpoints`: there are 0"),
            (Client::connect(["http://a"; 17]).namespace("demo"), "`endpoints`: there are 17"),
            (Client::connect("a:1").namespace("demo"), "`endpoints`: `a:1` has no"),
            (Client::connect("http://a"), "`namespace`: `` does not match"),
            (builder().namespace("Demo"), "`namespace`: `Demo` does not match"),
            (builder().namespace("d".repeat(64)), "`namespace`: "),
            (builder().service("s".repeat(129)), "`service`: it has 129 bytes"),
            (builder().zone("s".repeat(129)), "`zone`: it has 129 bytes"),
            (builder().client_id(""), "`client_id`: it is empty"),
            (builder().client_id("s".repeat(129)), "`client_id`: it has 129 bytes"),
            (builder().connections(0), "`connections`: it is 0, and 1 to 16 is possible"),
            (builder().connections(17), "`connections`: it is 17"),
            (
                builder().connect_timeout(Duration::ZERO),
                "`connect_timeout`: it is 0ns, and 1ms to 60s",
            ),
            (builder().decide_within(Duration::MAX), "`decide_within`: "),
            (builder().keepalive(Duration::ZERO), "`keepalive`: it is 0ns"),
            (builder().token(""), "`token`: it is empty"),
            (builder().token("a\nb"), "`token`: it has other bytes"),
        ] {
            let wrong = wrong(wrong_one);
            assert!(wrong.starts_with(begins), "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_token_goes_in_plain_text_to_this_machine_only() {
        let to =
            |endpoint: &str| Client::connect(endpoint).namespace("demo").token("secret").build();
        assert!(to("http://127.0.0.1:1").is_ok());
        let endpoint = "http://10.0.0.1:1".to_owned();
        assert_eq!(to(&endpoint).err(), Some(BuildError::Token { endpoint }));
    }

    #[tokio::test]
    async fn a_token_is_never_shown() {
        let builder = builder().token("secret");
        assert!(!format!("{builder:?}").contains("secret"));
        assert!(!format!("{:?}", builder.authorization().unwrap()).contains("secret"));
        assert!(!wrong(builder.token("secret\n")).contains("secret"));
    }

    #[tokio::test]
    async fn a_seed_makes_the_id() {
        let id = |seed| builder().seed(seed).id(&Random::of(seed)).unwrap();
        assert_eq!(id(1), id(1));
        assert_ne!(id(1), id(2));
        let (first, second) = (builder().id(&Random::of(1)), builder().id(&Random::of(1)));
        assert_eq!(first.as_ref().map(String::len), Ok(32));
        assert_ne!(first, second);
    }

    #[cfg(feature = "tls")]
    #[tokio::test]
    async fn tls_that_would_not_be_spoken_is_refused() {
        let wrong = wrong(builder().tls(Tls::new()));
        assert!(wrong.contains("is plain text, and `tls` is set"), "{wrong}");
        assert!(Client::connect("https://a").namespace("demo").build().is_ok());
    }
}
