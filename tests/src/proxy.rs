//! A network that fails on command: a TCP proxy on loopback.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;

/// Bytes that are carried at a time, at most.
const CHUNK: usize = 16 << 10;

/// Chunks under way in one direction, at most: as much as a delay can hold.
const UNDER_WAY: usize = 256;

/// What is wrong with the network, for connections that live and new ones alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Each byte arrives so much later.
    Delay(Duration),
    /// Nothing arrives, in either direction, and nobody is told; what was sent arrives when this is over.
    BlackHole,
    /// What clients send does not arrive; what the server sends does.
    DeafServer,
    /// What the server sends does not arrive; what clients send does.
    DeafClient,
    /// So many bytes a second in each direction of each connection, at least 20.
    Throttle(u64),
    /// Connections are reset, and new ones too.
    Reset,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToServer,
    ToClient,
}

impl Fault {
    fn holds(self, direction: Direction) -> bool {
        match self {
            Self::BlackHole | Self::Reset => true,
            Self::DeafServer => direction == Direction::ToServer,
            Self::DeafClient => direction == Direction::ToClient,
            Self::None | Self::Delay(_) | Self::Throttle(_) => false,
        }
    }
}

/// A proxy between clients and one server. It ends when it is dropped, with all that it carries.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    server: watch::Sender<SocketAddr>,
    fault: watch::Sender<Fault>,
    accepted: Arc<AtomicUsize>,
    live: Arc<AtomicUsize>,
    _accepting: AbortOnDropHandle<()>,
}

impl Proxy {
    /// A proxy to a server, with nothing wrong.
    pub async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().unwrap();
        let (server, to) = watch::channel(server);
        let (fault, faults) = watch::channel(Fault::None);
        let (accepted, live) = (Arc::default(), Arc::default());
        let accepting = accept(listener, to, faults, Arc::clone(&accepted), Arc::clone(&live));
        let accepting: JoinHandle<()> = tokio::spawn(accepting);
        let _accepting = AbortOnDropHandle::new(accepting);
        Self { address, server, fault, accepted, live, _accepting }
    }

    /// Where clients find it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same as a client of gRPC writes it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What is wrong from now on.
    pub fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    /// Where new connections go from now on, as when a server comes up elsewhere.
    pub fn redirect(&self, server: SocketAddr) {
        self.server.send_replace(server);
    }

    /// Connections that were accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }

    /// Connections that are up.
    pub fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }
}

async fn accept(
    listener: TcpListener,
    to: watch::Receiver<SocketAddr>,
    faults: watch::Receiver<Fault>,
    accepted: Arc<AtomicUsize>,
    live: Arc<AtomicUsize>,
) {
    let mut carried = tokio::task::JoinSet::new();
    loop {
        let (client, _) = listener.accept().await.expect("the listener lives");
        accepted.fetch_add(1, Ordering::Relaxed);
        let (server, faults) = (*to.borrow(), faults.clone());
        let live = Live::of(&live);
        carried.spawn(async move {
            // Who cannot be reached looks to the client like one that hung up.
            let _ = carry(client, server, faults).await;
            drop(live);
        });
        while carried.try_join_next().is_some() {}
    }
}

/// Counts a connection while it is up.
struct Live(Arc<AtomicUsize>);

impl Live {
    fn of(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn carry(
    mut client: TcpStream,
    server: SocketAddr,
    faults: watch::Receiver<Fault>,
) -> io::Result<()> {
    let mut reset = faults.clone();
    let mut server = TcpStream::connect(server).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    {
        // Halves that are borrowed do not say goodbye when they are dropped.
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        tokio::select! {
            biased;
            _ = reset.wait_for(|fault| *fault == Fault::Reset) => {}
            carried = async {
                tokio::try_join!(
                    pump(from_client, to_server, Direction::ToServer, faults.clone()),
                    pump(from_server, to_client, Direction::ToClient, faults.clone()),
                )
            } => return carried.map(drop),
        }
    }
    client.set_zero_linger()?;
    server.set_zero_linger()
}

/// Carries one direction until its end.
async fn pump(
    from: impl AsyncRead + Unpin,
    to: impl AsyncWrite + Unpin,
    direction: Direction,
    faults: watch::Receiver<Fault>,
) -> io::Result<()> {
    let (chunks, under_way) = mpsc::channel(UNDER_WAY);
    tokio::try_join!(
        take(from, chunks, faults.clone()),
        deliver(to, under_way, direction, faults)
    )?;
    Ok(())
}

/// Takes what is sent, with the time at which it is to arrive.
async fn take(
    mut from: impl AsyncRead + Unpin,
    chunks: mpsc::Sender<(Instant, Vec<u8>)>,
    faults: watch::Receiver<Fault>,
) -> io::Result<()> {
    loop {
        let most = match *faults.borrow() {
            // Twenty times a second.
            Fault::Throttle(rate) => usize::try_from(rate / 20).unwrap_or(CHUNK).clamp(1, CHUNK),
            _ => CHUNK,
        };
        let mut chunk = vec![0; most];
        let length = from.read(&mut chunk).await?;
        if length == 0 {
            return Ok(());
        }
        chunk.truncate(length);
        let delay = match *faults.borrow() {
            Fault::Delay(delay) => delay,
            _ => Duration::ZERO,
        };
        if chunks.send((Instant::now() + delay, chunk)).await.is_err() {
            return Ok(());
        }
    }
}

async fn deliver(
    mut to: impl AsyncWrite + Unpin,
    mut under_way: mpsc::Receiver<(Instant, Vec<u8>)>,
    direction: Direction,
    mut faults: watch::Receiver<Fault>,
) -> io::Result<()> {
    while let Some((at, chunk)) = under_way.recv().await {
        tokio::time::sleep_until(at).await;
        passes(&mut faults, direction).await;
        to.write_all(&chunk).await?;
        let fault = *faults.borrow();
        if let Fault::Throttle(rate) = fault {
            let share = chunk.len() as f64 / rate.max(20) as f64;
            tokio::time::sleep(Duration::from_secs_f64(share)).await;
        }
    }
    passes(&mut faults, direction).await;
    to.shutdown().await
}

/// Returns when nothing holds up that direction.
async fn passes(faults: &mut watch::Receiver<Fault>, direction: Direction) {
    // The proxy is gone if this fails, and its tasks with it.
    let _ = faults.wait_for(|fault| !fault.holds(direction)).await;
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::{PATIENCE, eventually};

    /// Long enough to see that nothing comes.
    const MOMENT: Duration = Duration::from_millis(50);

    /// A server that says everything twice, a proxy to it, and a connection through that.
    async fn echo() -> (Proxy, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy::to(listener.local_addr().unwrap()).await;
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        says(&mut stream, b"hello").await;
        hears(&mut stream, b"hello").await;
        (proxy, stream)
    }

    async fn says(stream: &mut TcpStream, what: &[u8]) {
        stream.write_all(what).await.unwrap();
    }

    async fn hears(stream: &mut TcpStream, what: &[u8]) {
        let mut heard = vec![0; what.len()];
        timeout(PATIENCE, stream.read_exact(&mut heard)).await.expect("it comes").unwrap();
        assert_eq!(heard, what);
    }

    async fn hears_nothing(stream: &mut TcpStream) {
        assert!(timeout(MOMENT, stream.read_u8()).await.is_err(), "something comes");
    }

    #[tokio::test]
    async fn connections_are_counted() {
        let (proxy, stream) = echo().await;
        assert_eq!((proxy.accepted(), proxy.live()), (1, 1));
        drop(stream);
        eventually("it has gone", async || proxy.live() == 0).await;
        assert_eq!(proxy.accepted(), 1);
    }

    #[tokio::test]
    async fn what_a_black_hole_took_arrives_when_it_is_over() {
        let (proxy, mut stream) = echo().await;
        proxy.set(Fault::BlackHole);
        says(&mut stream, b"lost").await;
        hears_nothing(&mut stream).await;
        assert_eq!(proxy.live(), 1);
        proxy.set(Fault::None);
        hears(&mut stream, b"lost").await;
    }

    #[tokio::test]
    async fn a_reset_ends_connections_with_an_error_and_new_ones_too() {
        let (proxy, mut stream) = echo().await;
        proxy.set(Fault::Reset);
        let reset = timeout(PATIENCE, stream.read_u8()).await.unwrap().unwrap_err();
        assert_eq!(reset.kind(), io::ErrorKind::ConnectionReset);
        let mut another = TcpStream::connect(proxy.address()).await.unwrap();
        let reset = timeout(PATIENCE, another.read_u8()).await.unwrap().unwrap_err();
        assert_eq!(reset.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn one_direction_dies_alone() {
        let (proxy, mut stream) = echo().await;
        for fault in [Fault::DeafServer, Fault::DeafClient] {
            proxy.set(fault);
            says(&mut stream, b"half").await;
            hears_nothing(&mut stream).await;
            proxy.set(Fault::None);
            hears(&mut stream, b"half").await;
        }
    }

    #[tokio::test]
    async fn a_delay_is_in_each_direction() {
        let (proxy, mut stream) = echo().await;
        proxy.set(Fault::Delay(MOMENT));
        let since = Instant::now();
        says(&mut stream, b"later").await;
        hears(&mut stream, b"later").await;
        assert!(since.elapsed() >= MOMENT * 2);
    }

    #[tokio::test]
    async fn a_throttle_lets_so_many_bytes_through() {
        let (proxy, mut stream) = echo().await;
        proxy.set(Fault::Throttle(10_000));
        // What was being read when it was set is not cut.
        says(&mut stream, b"first").await;
        hears(&mut stream, b"first").await;
        let since = Instant::now();
        says(&mut stream, &[7; 2_000]).await;
        hears(&mut stream, &[7; 2_000]).await;
        assert!(since.elapsed() >= Duration::from_millis(100), "{:?}", since.elapsed());
    }

    #[tokio::test]
    async fn new_connections_follow_the_server() {
        let (proxy, _stream) = echo().await;
        let (other, _other) = echo().await;
        proxy.redirect(other.address());
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        says(&mut stream, b"there").await;
        hears(&mut stream, b"there").await;
        assert_eq!(other.accepted(), 2);
    }
}
