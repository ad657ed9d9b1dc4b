//! The generator: calls in flight without a pause, or calls that arrive whether or not others were answered.
//!
//! It stands on `h2` itself, and sends requests that were encoded before: it shares the cores with the server
//! it measures, and a client that decodes answers costs as much as the server.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    net::SocketAddr,
    rc::Rc,
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::client::SendRequest;
use hdrhistogram::Histogram;
use http::{HeaderMap, Method, Request};
use tokio::{
    net::TcpStream,
    sync::mpsc,
    task::{JoinSet, spawn_local},
    time::{sleep, timeout},
};

use crate::{
    Result,
    machine::{Meter, busy},
    process::Server,
    traffic::{Shape, Traffic},
};

/// Seconds before each measurement: memory is touched, caches and branch predictors settle.
const WARM_UP: f64 = 1.0;

/// Calls that have arrived and are in flight, at most. The others wait, and their wait counts; a client has no
/// more streams either, and with thousands of them its own work would be what is measured.
const IN_FLIGHT: usize = 1_024;

/// Wait for answers after the last call was due; what comes later is an error.
const PATIENCE: Duration = Duration::from_secs(5);

/// Pause of a caller whose call failed: a dead connection fails at once, and must not spin.
const BACKOFF: Duration = Duration::from_millis(10);

/// Most nanoseconds that a latency is told as: many times what a call is waited for.
const LONGEST: u64 = 600_000_000_000;

/// Connections to a server.
pub(crate) struct Load {
    connections: Vec<SendRequest<Bytes>>,
    pid: u32,
    address: SocketAddr,
}

/// Calls that failed, and how the first did.
#[derive(Clone, Default)]
pub(crate) struct Failures {
    pub(crate) count: u64,
    pub(crate) first: Option<String>,
}

impl Failures {
    fn add(&mut self, error: String) {
        self.count += 1;
        self.first.get_or_insert(error);
    }

    pub(crate) fn join(&mut self, other: Self) {
        self.count += other.count;
        self.first = self.first.take().or(other.first);
    }
}

/// What a server did at most.
pub(crate) struct Saturation {
    /// Calls answered.
    pub(crate) calls: u64,
    /// In this time.
    pub(crate) elapsed: Duration,
    /// CPU of the server.
    pub(crate) cpu: Duration,
    /// CPU of the generator.
    pub(crate) generator: Duration,
    /// Cores that everything else on the machine had.
    pub(crate) others: f64,
    pub(crate) failures: Failures,
}

impl Saturation {
    pub(crate) fn rate(&self) -> f64 {
        self.calls as f64 / self.elapsed.as_secs_f64()
    }
}

/// How long answers took at a rate.
pub(crate) struct Latency {
    /// Nanoseconds since a call was due.
    pub(crate) nanos: Histogram<u64>,
    /// Nanoseconds from when a call was due to when it was made: what of the above is the generator's own, or
    /// the wait for one of [`IN_FLIGHT`] places.
    pub(crate) late: Histogram<u64>,
    /// Cores that everything else on the machine had.
    pub(crate) others: f64,
    pub(crate) failures: Failures,
}

/// What the callers of one measurement share.
struct Shared {
    traffic: RefCell<Traffic>,
    shape: Shape,
    request: Request<()>,
    calls: Cell<u64>,
    failures: RefCell<Failures>,
    over: Cell<bool>,
}

impl Load {
    /// Connects, and checks one answer in full.
    pub(crate) async fn connect(
        server: &Server,
        connections: u16,
        traffic: &mut Traffic,
    ) -> Result<Self> {
        let mut load = Self { connections: Vec::new(), pid: server.pid(), address: server.grpc() };
        for _ in 0..connections {
            let stream = TcpStream::connect(load.address).await?;
            stream.set_nodelay(true)?;
            let (send, connection) = h2::client::Builder::new()
                .initial_window_size(1 << 20)
                .initial_connection_window_size(1 << 24)
                .handshake::<_, Bytes>(stream)
                .await?;
            spawn_local(connection);
            load.connections.push(send);
        }
        let mut answer = Vec::new();
        let request = load.request(traffic.shape)?;
        call(&mut load.connections[0].clone(), request, traffic.next(), |chunk| {
            answer.extend(chunk);
        })
        .await?;
        traffic.shape.check(&answer)?;
        Ok(load)
    }

    /// Makes each of so many calls once, a few at a time.
    pub(crate) async fn each(&self, traffic: Traffic, calls: u32) -> Result<()> {
        const AT_ONCE: u32 = 4;
        let shared = self.shared(traffic)?;
        let left = Rc::new(Cell::new(calls));
        let mut callers = JoinSet::new();
        for connection in self.connections.iter().cycle().take(AT_ONCE as usize) {
            let (shared, left, mut connection) =
                (Rc::clone(&shared), Rc::clone(&left), connection.clone());
            callers.spawn_local(async move {
                while let Some(fewer) = left.get().checked_sub(1) {
                    left.set(fewer);
                    shared.call(&mut connection).await?;
                }
                Ok::<_, String>(())
            });
        }
        while let Some(done) = callers.join_next().await {
            done??;
        }
        Ok(())
    }

    /// Keeps so many calls in flight.
    pub(crate) async fn saturate(
        &self,
        traffic: Traffic,
        in_flight: u16,
        seconds: f64,
    ) -> Result<Saturation> {
        let shared = self.shared(traffic)?;
        let mut callers = JoinSet::new();
        for connection in self.connections.iter().cycle().take(in_flight.into()) {
            let (shared, mut connection) = (Rc::clone(&shared), connection.clone());
            callers.spawn_local(async move {
                while !shared.over.get() {
                    if let Err(error) = shared.call(&mut connection).await {
                        shared.failures.borrow_mut().add(error);
                        sleep(BACKOFF).await;
                    }
                }
            });
        }
        sleep(Duration::from_secs_f64(WARM_UP)).await;
        shared.calls.set(0);
        let (server, generator) = (Meter::start(self.pid)?, Meter::start(std::process::id())?);
        let (begin, busy_before) = (Instant::now(), busy()?);
        sleep(Duration::from_secs_f64(seconds)).await;
        let (calls, elapsed) = (shared.calls.get(), begin.elapsed());
        let (all, cpu, generator) = (busy()? - busy_before, server.stop()?, generator.stop()?);
        let others = all.saturating_sub(cpu + generator).div_duration_f64(elapsed);
        shared.over.set(true);
        if timeout(PATIENCE, async { while callers.join_next().await.is_some() {} }).await.is_err()
        {
            shared.failures.borrow_mut().add("a call was never answered".into());
        }
        let failures = shared.failures.take();
        Ok(Saturation { calls, elapsed, cpu, generator, others, failures })
    }

    /// Makes so many calls a second, evenly, whether or not others were answered.
    pub(crate) async fn arrive(
        &self,
        traffic: Traffic,
        rate: f64,
        seconds: f64,
    ) -> Result<Latency> {
        let shared = self.shared(traffic)?;
        let nanos = Rc::new(RefCell::new(Histogram::new_with_max(LONGEST, 3)?));
        let mut late = Histogram::new_with_max(LONGEST, 3)?;
        let (generator, server) = (Meter::start(std::process::id())?, Meter::start(self.pid)?);
        let (begin, busy_before) = (Instant::now(), busy()?);
        let warm = begin + Duration::from_secs_f64(WARM_UP);
        let mut due = arrivals(rate, (rate * (WARM_UP + seconds)) as u64)?;
        let mut connections = self.connections.iter().cycle();
        let mut callers = JoinSet::new();
        let made = async {
            while let Some(due) = due.recv().await {
                if callers.len() == IN_FLIGHT {
                    callers.join_next().await;
                }
                if due >= warm {
                    late.saturating_record(nanos_since(due));
                }
                let (shared, nanos) = (Rc::clone(&shared), Rc::clone(&nanos));
                let Some(mut connection) = connections.next().cloned() else { break };
                callers.spawn_local(async move {
                    match shared.call(&mut connection).await {
                        Ok(()) if due >= warm => {
                            nanos.borrow_mut().saturating_record(nanos_since(due));
                        }
                        Ok(()) => {}
                        Err(error) => shared.failures.borrow_mut().add(error),
                    }
                });
                // What is done is let go of.
                while callers.try_join_next().is_some() {}
            }
            while callers.join_next().await.is_some() {}
        };
        let patience = Duration::from_secs_f64(WARM_UP + seconds) + PATIENCE;
        let answered = timeout(patience, made).await;
        let all = busy()? - busy_before;
        let others = all
            .saturating_sub(server.stop()? + generator.stop()?)
            .div_duration_f64(begin.elapsed());
        let mut failures = shared.failures.take();
        if answered.is_err() {
            let left = (callers.len() + due.len()) as u64;
            let first = Some(format!("{left} calls were not answered {PATIENCE:?} after the last"));
            failures.join(Failures { count: left, first });
            callers.shutdown().await;
        }
        let nanos = nanos.borrow().clone();
        Ok(Latency { nanos, late, others, failures })
    }

    fn shared(&self, traffic: Traffic) -> Result<Rc<Shared>> {
        let (shape, request) = (traffic.shape, self.request(traffic.shape)?);
        let (traffic, failures) = (RefCell::new(traffic), RefCell::default());
        Ok(Rc::new(Shared {
            traffic,
            shape,
            request,
            calls: Cell::new(0),
            failures,
            over: Cell::new(false),
        }))
    }

    fn request(&self, shape: Shape) -> Result<Request<()>> {
        Ok(Request::builder()
            .method(Method::POST)
            .uri(format!("http://{}{}", self.address, shape.path()))
            .header("te", "trailers")
            .header("content-type", "application/grpc")
            .body(())?)
    }
}

impl Shared {
    /// The next call, and whether its answer allows.
    async fn call(&self, connection: &mut SendRequest<Bytes>) -> Result<(), String> {
        const START: usize = 16;
        let frame = self.traffic.borrow_mut().next();
        let (mut start, mut length) = ([0; START], 0);
        call(connection, self.request.clone(), frame, |chunk: Bytes| {
            if length < START {
                let more = chunk.len().min(START - length);
                start[length..length + more].copy_from_slice(&chunk[..more]);
            }
            length += chunk.len();
        })
        .await?;
        self.calls.set(self.calls.get() + 1);
        if self.shape.begins_allowed(&start, length) {
            Ok(())
        } else {
            Err("an answer does not allow".into())
        }
    }
}

/// One call; `receive` is given its answer piece by piece.
async fn call(
    connection: &mut SendRequest<Bytes>,
    request: Request<()>,
    frame: Bytes,
    mut receive: impl FnMut(Bytes),
) -> Result<(), String> {
    let transport = |error: h2::Error| format!("transport: {error}");
    poll_fn(|context| connection.poll_ready(context)).await.map_err(transport)?;
    let (answer, mut stream) = connection.send_request(request, false).map_err(transport)?;
    stream.send_data(frame, true).map_err(transport)?;
    let answer = answer.await.map_err(transport)?;
    if answer.status() != 200 {
        return Err(format!("HTTP {}", answer.status()));
    }
    check_status(answer.headers(), true)?;
    let mut body = answer.into_body();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(transport)?;
        body.flow_control().release_capacity(chunk.len()).map_err(transport)?;
        receive(chunk);
    }
    let trailers = body.trailers().await.map_err(transport)?;
    check_status(&trailers.unwrap_or_default(), false)
}

/// Whether gRPC says that the call went well; headers may leave that to the trailers.
fn check_status(headers: &HeaderMap, later: bool) -> Result<(), String> {
    match headers.get("grpc-status") {
        None if later => Ok(()),
        Some(status) if status == "0" => Ok(()),
        status => {
            let status =
                status.map_or("none".into(), |status| String::from_utf8_lossy(status.as_bytes()));
            let message = headers
                .get("grpc-message")
                .map(|message| String::from_utf8_lossy(message.as_bytes()));
            Err(format!("gRPC status {status}: {}", message.unwrap_or_default()))
        }
    }
}

fn nanos_since(due: Instant) -> u64 {
    u64::try_from(due.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// The moments at which calls are due, each told when it has come.
///
/// A thread that sleeps tells them: the timers of the runtime are a millisecond coarse.
fn arrivals(rate: f64, count: u64) -> Result<mpsc::UnboundedReceiver<Instant>> {
    // Unbounded, but told at a rate for seconds.
    let (tell, told) = mpsc::unbounded_channel();
    thread::Builder::new().name("arrivals".into()).spawn(move || {
        let begin = Instant::now();
        for index in 0..count {
            let due = begin + Duration::from_secs_f64(index as f64 / rate);
            if let Some(wait) = due.checked_duration_since(Instant::now()) {
                thread::sleep(wait);
            }
            if tell.send(due).is_err() {
                return;
            }
        }
    })?;
    Ok(told)
}
