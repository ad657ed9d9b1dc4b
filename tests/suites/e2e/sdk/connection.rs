//! The client's connection, over a network that fails.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use fusebox_client::{Client, ClientBuilder, Tls, telemetry::Event};
use fusebox_proto::v1::{
    DeletePolicyRequest, Policy, PutPolicyRequest, RetryBudget, admin_client::AdminClient, policy,
};
use fusebox_tests::{Fault, PATIENCE, Proxy, Server, eventually};
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer},
    },
};

use crate::{CONFIG, ask, caller::serve, request};

/// What a client was told, in words.
#[derive(Clone, Default)]
struct Events(Arc<Mutex<Vec<String>>>);

impl Events {
    fn of(&self, builder: ClientBuilder) -> ClientBuilder {
        let events = Arc::clone(&self.0);
        builder.observer(move |event: &Event<'_>| events.lock().push(format!("{event:?}")))
    }

    fn with(&self, what: &str) -> usize {
        self.0.lock().iter().filter(|event| event.contains(what)).count()
    }
}

fn client(endpoints: &[String]) -> Client {
    Client::connect(endpoints).namespace("test").build().expect("the options are right")
}

async fn connected(client: &Client) {
    tokio::time::timeout(PATIENCE, client.connected()).await.expect("it connects");
}

/// Returns once a session has come up for the so manieth time.
async fn connects(client: &Client, times: u64) {
    eventually("it connects again", async || {
        client.counts().connects == times && client.is_connected()
    })
    .await;
}

#[tokio::test]
async fn a_client_is_built_before_there_is_a_server_and_finds_it_later() {
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Proxy::to(nobody.local_addr().unwrap()).await;
    drop(nobody);
    let client = client(&[proxy.url()]);
    assert!(!client.is_connected());
    let server = Server::start(CONFIG).await;
    proxy.redirect(server.grpc);
    connected(&client).await;
}

#[tokio::test]
async fn after_a_reset_the_session_is_up_again() {
    let server = Server::start(CONFIG).await;
    let proxy = Proxy::to(server.grpc).await;
    let client = client(&[proxy.url()]);
    connected(&client).await;
    proxy.set(Fault::Reset);
    eventually("it is down", async || !client.is_connected()).await;
    proxy.set(Fault::None);
    connects(&client, 2).await;
    assert_eq!(client.counts().disconnects, 1);
}

#[tokio::test]
async fn a_report_counts_once_though_the_link_broke_before_its_answer() {
    let budget = "share: {retry_budget: {ratio: 100%, min_per_second: 0, ttl: 1m}}";
    let window = "window: {sliding_window: {limit: 100, per: 1s}}";
    let server = serve(&format!("{budget}, {window}")).await;
    let proxy = Proxy::to(server.grpc).await;
    let client = client(&[proxy.url()]);
    connected(&client).await;
    let raw = server.raw().await;
    // What pays for retries is told in reports.
    let paid = async || {
        let request = request([ask("share", "", 0)]);
        let answer = raw.clone().acquire(request).await.unwrap().into_inner();
        answer.verdicts[0].remaining.unwrap()
    };
    let retry = client.retry("share");
    let calls = |calls| (0..calls).for_each(|_| drop(retry.attempts()));
    calls(10);
    eventually("it is told", async || paid().await == 10).await;
    // Answers come in order: once this one has, that of the report has, too, and the next report can be sent.
    client.limiter("window").acquire(1).await.unwrap();
    proxy.set(Fault::DeafClient);
    calls(20);
    eventually("it is told, and the answer on its way", async || paid().await == 30).await;
    proxy.set(Fault::Reset);
    eventually("it is down", async || !client.is_connected()).await;
    proxy.set(Fault::None);
    connects(&client, 2).await;
    calls(5);
    eventually("what came after it is told", async || paid().await >= 35).await;
    client.close().await;
    assert_eq!(paid().await, 35);
}

#[tokio::test]
async fn a_policy_that_is_deleted_takes_nothing_of_the_others_along() {
    let server = serve("share: {retry_budget: {ratio: 100%, min_per_second: 0, ttl: 1m}}").await;
    let mut operator = AdminClient::new(server.channel().await);
    let budget = RetryBudget {
        ratio_basis_points: Some(10_000),
        min_per_second: Some(0),
        ttl: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
    };
    let kind = Some(policy::Kind::RetryBudget(budget));
    let put = PutPolicyRequest {
        namespace: "test".into(),
        name: "gone".into(),
        policy: Some(Policy { kind, ..Default::default() }),
        ..Default::default()
    };
    operator.put_policy(put).await.unwrap();
    let proxy = Proxy::to(server.grpc).await;
    let client = client(&[proxy.url()]);
    connected(&client).await;
    let raw = server.raw().await;
    let paid = async |policy| {
        let answer = raw.clone().acquire(request([ask(policy, "", 0)])).await.unwrap();
        answer.into_inner().verdicts[0].remaining.unwrap()
    };
    let (kept, gone) = (client.retry("share"), client.retry("gone"));
    drop((kept.attempts(), gone.attempts()));
    eventually("both are told", async || paid("share").await + paid("gone").await == 2).await;
    // While the link is down it does not hear of it.
    proxy.set(Fault::Reset);
    eventually("it is down", async || !client.is_connected()).await;
    let policy =
        DeletePolicyRequest { namespace: "test".into(), name: "gone".into(), ..Default::default() };
    operator.delete_policy(policy).await.unwrap();
    (0..10).for_each(|_| drop((kept.attempts(), gone.attempts())));
    proxy.set(Fault::None);
    connects(&client, 2).await;
    eventually("the other is told", async || paid("share").await == 11).await;
}

#[tokio::test]
async fn who_is_sent_away_by_a_draining_server_goes_to_the_next() {
    let (first, second) = (Server::start(CONFIG).await, Server::start(CONFIG).await);
    let proxy = Proxy::to(first.grpc).await;
    let events = Events::default();
    let builder = Client::connect(proxy.url()).namespace("test");
    let client = events.of(builder).build().unwrap();
    connected(&client).await;
    proxy.redirect(second.grpc);
    first.stop().await.unwrap();
    connects(&client, 2).await;
    assert_eq!((events.with("Connected"), events.with("cause: \"Unavailable: draining")), (2, 1));
}

#[tokio::test]
async fn when_one_way_fails_the_other_is_taken() {
    let server = Server::start(CONFIG).await;
    let ways = [Proxy::to(server.grpc).await, Proxy::to(server.grpc).await];
    let client = client(&ways.each_ref().map(Proxy::url));
    connected(&client).await;
    let used = ways.iter().position(|way| way.live() == 1).expect("one of them is used");
    let since = Instant::now();
    ways[used].set(Fault::Reset);
    connects(&client, 2).await;
    assert!(since.elapsed() < Duration::from_millis(500), "{:?}", since.elapsed());
    assert_eq!(ways[1 - used].live(), 1);
}

#[tokio::test]
async fn silence_is_noticed_within_three_heartbeats() {
    let server = Server::start(CONFIG).await;
    for fault in [Fault::BlackHole, Fault::DeafClient] {
        let ways = [Proxy::to(server.grpc).await, Proxy::to(server.grpc).await];
        let client = client(&ways.each_ref().map(Proxy::url));
        connected(&client).await;
        let used = ways.iter().position(|way| way.live() == 1).expect("one of them is used");
        let since = Instant::now();
        ways[used].set(fault);
        connects(&client, 2).await;
        let took = since.elapsed();
        assert!(took > Duration::from_secs(1) && took < Duration::from_millis(3_500), "{took:?}");
    }
}

#[tokio::test]
async fn a_server_that_hears_nothing_is_noticed_too() {
    let server = Server::start(CONFIG).await;
    let ways = [Proxy::to(server.grpc).await, Proxy::to(server.grpc).await];
    let client = client(&ways.each_ref().map(Proxy::url));
    connected(&client).await;
    let used = ways.iter().position(|way| way.live() == 1).expect("one of them is used");
    ways[used].set(Fault::DeafServer);
    connects(&client, 2).await;
}

#[tokio::test]
async fn a_slow_network_breaks_nothing() {
    let server = Server::start(CONFIG).await;
    let proxy = Proxy::to(server.grpc).await;
    proxy.set(Fault::Delay(Duration::from_millis(100)));
    let client = client(&[proxy.url()]);
    connected(&client).await;
    proxy.set(Fault::Throttle(5_000));
    client.close().await;
    assert_eq!((client.counts().connects, client.counts().disconnects), (1, 0));
}

#[tokio::test]
async fn each_connection_is_one() {
    let server = Server::start(CONFIG).await;
    let proxy = Proxy::to(server.grpc).await;
    let builder = Client::connect(proxy.url()).namespace("test").connections(4);
    let client = builder.build().unwrap();
    eventually("all are up", async || client.counts().connects == 4).await;
    assert_eq!(proxy.live(), 4);
}

#[tokio::test]
async fn a_namespace_that_is_not_there_is_said_to_be_once() {
    let server = Server::start(CONFIG).await;
    let events = Events::default();
    let builder = Client::connect(format!("http://{}", server.grpc)).namespace("nobodys");
    let client = events.of(builder).build().unwrap();
    eventually("it was tried again", async || events.with("Disconnected") > 2).await;
    assert_eq!(events.with("Refused"), 1);
    assert!(events.with("nobodys") > 0);
    assert!(!client.is_connected());
}

#[tokio::test]
async fn close_ends_the_session_and_returns_soon() {
    let server = Server::start(CONFIG).await;
    let proxy = Proxy::to(server.grpc).await;
    let client = client(&[proxy.url()]);
    connected(&client).await;
    let since = Instant::now();
    client.close().await;
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    // The goodbye and Close.
    assert_eq!(client.counts().messages_sent, 2);
    eventually("its connection is gone", async || proxy.live() == 0).await;
    assert!(!client.is_connected());
    assert_eq!(client.counts().disconnects, 0);
}

#[tokio::test]
async fn close_is_bounded_while_the_server_is_silent() {
    let server = Server::start(CONFIG).await;
    let proxy = Proxy::to(server.grpc).await;
    let client = client(&[proxy.url()]);
    connected(&client).await;
    proxy.set(Fault::BlackHole);
    let since = Instant::now();
    client.close().await;
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
}

#[test]
fn no_task_is_left_of_a_client_that_is_dropped() {
    let servers = tokio::runtime::Runtime::new().unwrap();
    let server = servers.block_on(Server::start(CONFIG));
    let own = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    own.block_on(async {
        let builder = Client::connect(format!("http://{}", server.grpc)).namespace("test");
        let client = builder.connections(3).build().unwrap();
        connected(&client).await;
        let metrics = tokio::runtime::Handle::current().metrics();
        assert!(metrics.num_alive_tasks() > 3);
        drop(client);
        eventually("all ended", async || metrics.num_alive_tasks() == 0).await;
    });
}

/// Speaks TLS in front of a server: where, and how often it came to that.
async fn terminator(server: SocketAddr, authority: &Authority) -> (String, Arc<Mutex<usize>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = TlsAcceptor::from(Arc::clone(&authority.config));
    let spoken = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&spoken);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, counted) = (acceptor.clone(), Arc::clone(&counted));
            tokio::spawn(async move {
                let Ok(mut secured) = acceptor.accept(stream).await else { return };
                *counted.lock() += 1;
                let mut plain = TcpStream::connect(server).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut secured, &mut plain).await;
            });
        }
    });
    (format!("https://localhost:{port}"), spoken)
}

struct Authority {
    pem: String,
    config: Arc<ServerConfig>,
}

impl Authority {
    fn new() -> Self {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let chain = vec![CertificateDer::from(made.cert.der().to_vec())];
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Self { pem: made.cert.pem(), config: Arc::new(config) }
    }
}

#[tokio::test]
async fn over_tls_a_token_goes_to_whom_the_authority_vouches_for() {
    let server = Server::start(CONFIG).await;
    let authority = Authority::new();
    let (endpoint, spoken) = terminator(server.grpc, &authority).await;
    let builder = || Client::connect(&endpoint).namespace("test").token("a-secret");
    let client = builder().tls(Tls::new().authority(&authority.pem)).build().unwrap();
    connected(&client).await;
    assert_eq!(*spoken.lock(), 1);

    // Neither the web's authorities nor another one of that name vouch for it.
    for tls in [Tls::new(), Tls::new().authority(Authority::new().pem)] {
        let events = Events::default();
        let stranger = events.of(builder().tls(tls)).build().unwrap();
        eventually("it was refused", async || events.with("Disconnected") > 1).await;
        assert!(!stranger.is_connected());
        assert_eq!(events.with("a-secret"), 0);
    }
    assert_eq!(*spoken.lock(), 1);
}

#[tokio::test]
async fn a_token_is_sent_as_bearer() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let _client = Client::connect(endpoint).namespace("test").token("a-secret").build().unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    let authorization = Arc::new(Mutex::new(None));
    let seen = Arc::clone(&authorization);
    let service = hyper::service::service_fn(move |request: http::Request<_>| {
        *seen.lock() = request.headers().get("authorization").cloned();
        let _: &hyper::body::Incoming = request.body();
        async { Ok::<_, std::convert::Infallible>(http::Response::new(String::new())) }
    });
    let executor = hyper_util::rt::TokioExecutor::new();
    let io = hyper_util::rt::TokioIo::new(stream);
    tokio::spawn(hyper::server::conn::http2::Builder::new(executor).serve_connection(io, service));
    eventually("it is seen", async || authorization.lock().is_some()).await;
    assert_eq!(authorization.lock().as_ref().unwrap(), "Bearer a-secret");
}
