//! What is asked: requests, encoded before the clock runs.

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};
use fusebox_proto::{
    envoy::service::ratelimit::v3::{
        RateLimitRequest, RateLimitResponse,
        rate_limit_response::{Code, DescriptorStatus},
    },
    v1::{
        AcquireBatchRequest, AcquireBatchResponse, AcquireRequest, AcquireResponse, Ask,
        CircuitDelta, CircuitState, Client, Decision, GrantOutcome, Outcome, ReportRequest,
        ReportResponse, ReportResult, resilience_client::ResilienceClient,
    },
};
use prost::Message;

use crate::{Result, process::Server, rules, table::count};

/// Flag and length, before each message of gRPC.
pub(crate) const PREFIX: usize = 5;

/// Most Acquires in one batch.
pub(crate) const BATCH: u32 = 1_000;

/// The breaker whose circuits calls go through.
pub(crate) const BREAKER: &str = "target";

/// Place of the latency that is told of calls, among those of deltas: about 10 ms.
const LATENCY: usize = 13;

/// Draws of a sequence, which then begins again: many times the calls between two draws of a rare key.
const DRAWS: usize = 1 << 20;

/// What one call asks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// An Acquire of so many asks.
    Asks(u32),
    /// A batch of so many Acquires of one ask.
    Batch(u32),
    /// Of Envoy's rate limit service: so many descriptors, each of which meets a rule.
    Descriptors(u32),
    /// An Acquire of a circuit.
    Circuit,
    /// An Acquire of one ask, and of a circuit.
    Guarded,
    /// A Report of so many outcomes, of calls through one circuit.
    Outcomes(u32),
    /// A Report of one delta of so many calls.
    Delta(u32),
}

impl Shape {
    pub(crate) fn name(self) -> String {
        match self {
            Self::Asks(1) => "1 ask".into(),
            Self::Asks(asks) => format!("{asks} asks"),
            Self::Batch(entries) => format!("batch of {}", count(entries)),
            Self::Descriptors(1) => "ratelimit, 1 descriptor".into(),
            Self::Descriptors(descriptors) => format!("ratelimit, {descriptors} descriptors"),
            Self::Circuit => "a circuit".into(),
            Self::Guarded => "1 ask and a circuit".into(),
            Self::Outcomes(1) => "report of 1 outcome".into(),
            Self::Outcomes(outcomes) => format!("report of {outcomes} outcomes"),
            Self::Delta(1) => "report of a delta of 1 call".into(),
            Self::Delta(calls) => format!("report of a delta of {} calls", count(calls)),
        }
    }

    /// What is decided in one call, asks or descriptors, each of which is charged; or the calls that are told of.
    pub(crate) fn decisions(self) -> u32 {
        match self {
            Self::Asks(count) | Self::Batch(count) | Self::Descriptors(count) => count,
            Self::Outcomes(count) | Self::Delta(count) => count,
            Self::Circuit => 1,
            Self::Guarded => 2,
        }
    }

    /// Whether it tells of calls that were let through before.
    const fn tells(self) -> bool {
        matches!(self, Self::Outcomes(_) | Self::Delta(_))
    }

    /// The method that takes it.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Asks(_) | Self::Circuit | Self::Guarded => "/fusebox.v1.Resilience/Acquire",
            Self::Outcomes(_) | Self::Delta(_) => "/fusebox.v1.Resilience/Report",
            Self::Batch(_) => "/fusebox.v1.Resilience/AcquireBatch",
            Self::Descriptors(_) => "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit",
        }
    }

    /// Whether an answer is as long as it says and begins with an allowed Acquire, or an outcome that counts. Cheap,
    /// for each answer.
    pub(crate) fn begins_allowed(self, start: &[u8], length: usize) -> bool {
        // Field 1 of AcquireResponse is a varint, the decision; of AcquireBatchResponse the first response,
        // with one verdict and thus shorter than 128 bytes; of RateLimitResponse a varint, the code of all.
        const ALLOWED: [u8; 2] = [1 << 3, Decision::Allow as u8];
        const OK: [u8; 2] = [1 << 3, Code::Ok as u8];
        // Of ReportResponse the results of outcomes, as many as there are and below 128; of a delta's its circuit.
        const RESULTS: u8 = 1 << 3 | 2;
        const CIRCUIT: u8 = 3 << 3 | 2;
        let Some((prefix, message)) = start.split_at_checked(PREFIX) else { return false };
        let promised = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
        prefix[0] == 0
            && promised as usize + PREFIX == length
            && match self {
                Self::Asks(_) | Self::Circuit | Self::Guarded => message.starts_with(&ALLOWED),
                Self::Outcomes(count) => {
                    message.starts_with(&[RESULTS, count as u8, ReportResult::Applied as u8])
                }
                Self::Delta(_) => message.starts_with(&[CIRCUIT]),
                Self::Batch(_) => message.get(2..).is_some_and(|first| first.starts_with(&ALLOWED)),
                Self::Descriptors(_) => message.starts_with(&OK),
            }
    }

    /// Whether an answer has all its verdicts, and each allows. Thorough, for one answer.
    pub(crate) fn check(self, answer: &[u8]) -> Result<()> {
        let message = answer.get(PREFIX..).ok_or("an answer without a message")?;
        let responses = match self {
            Self::Asks(_) | Self::Circuit | Self::Guarded => {
                vec![AcquireResponse::decode(message)?]
            }
            Self::Outcomes(_) | Self::Delta(_) => {
                return self.check_results(&ReportResponse::decode(message)?);
            }
            Self::Batch(_) => AcquireBatchResponse::decode(message)?.responses,
            Self::Descriptors(_) => {
                return self.check_statuses(&RateLimitResponse::decode(message)?);
            }
        };
        let allowed = responses.iter().all(|response| response.decision() == Decision::Allow);
        let verdicts: Vec<_> = responses.iter().flat_map(|response| &response.verdicts).collect();
        let complete = |verdict: &&&_| {
            let fusebox_proto::v1::Verdict { limit, remaining, reset_after, .. } = verdict;
            let is_limit = limit.is_some() && remaining.is_some() && reset_after.is_some();
            is_limit || verdict.circuit_state() == CircuitState::Closed
        };
        if allowed && verdicts.iter().filter(complete).count() == self.decisions() as usize {
            Ok(())
        } else {
            Err(format!("not {} allowed asks: {responses:?}", self.decisions()).into())
        }
    }

    fn check_results(self, response: &ReportResponse) -> Result<()> {
        let results = match self {
            Self::Outcomes(count) => (response.results.len() == count as usize, &response.results),
            _ => (response.delta_results.len() == 1, &response.delta_results),
        };
        let (true, results) = results else { return Err(format!("{response:?}").into()) };
        let applied = results.iter().all(|result| *result == i32::from(ReportResult::Applied));
        let closed = |status: &&_| {
            let fusebox_proto::v1::CircuitStatus { valid_for, .. } = status;
            status.state() == CircuitState::Closed && valid_for.is_some()
        };
        if applied && response.circuits.iter().filter(closed).count() == 1 {
            Ok(())
        } else {
            Err(format!("not all applied, to a circuit that is closed: {response:?}").into())
        }
    }

    fn check_statuses(self, response: &RateLimitResponse) -> Result<()> {
        let complete = |status: &&DescriptorStatus| {
            status.code() == Code::Ok
                && status.current_limit.is_some()
                && status.duration_until_reset.is_some()
        };
        let statuses = &response.statuses;
        if response.overall_code() == Code::Ok
            && statuses.iter().filter(complete).count() == self.decisions() as usize
        {
            Ok(())
        } else {
            Err(format!("not {} limits that are OK: {response:?}", self.decisions()).into())
        }
    }
}

/// Which keys are asked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keys {
    /// Always the same.
    Hot,
    /// A thousand, each as often as another.
    Thousand,
    /// A million, by Zipf's law: the n-th as often as 1/n of the first.
    Million,
}

impl Keys {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Hot => "one hot key",
            Self::Thousand => "1,000 keys",
            Self::Million => "1,000,000 keys (Zipf)",
        }
    }

    pub(crate) const fn count(self) -> u32 {
        match self {
            Self::Hot => 1,
            Self::Thousand => 1_000,
            Self::Million => 1_000_000,
        }
    }
}

/// Calls that were let through closed circuits, one for each key.
#[derive(Default)]
struct Passed {
    /// The ids of their grants.
    ids: Vec<String>,
    generation: u64,
}

impl Passed {
    /// Has them let through by that server.
    async fn by(server: &Server, keys: u32) -> Result<Self> {
        let mut client = ResilienceClient::new(server.channel().await?);
        let entry = |key| AcquireRequest { asks: vec![circuit(key)], ..AcquireRequest::default() };
        let (namespace, requests) = (String::from("bench"), (0..keys).map(entry).collect());
        let request = AcquireBatchRequest { namespace, requests, ..AcquireBatchRequest::default() };
        let responses = client.acquire_batch(request).await?.into_inner().responses;
        let verdict = responses.first().and_then(|response| response.verdicts.first());
        let generation = verdict.ok_or("no verdict")?.generation;
        let ids = responses.into_iter().map(|response| response.grant_id).collect();
        Ok(Self { ids, generation })
    }
}

/// Calls, one after another, for ever.
#[derive(Clone)]
pub(crate) struct Traffic {
    pub(crate) shape: Shape,
    /// All requests, of one length each.
    frames: Bytes,
    length: usize,
    /// Which request comes when.
    order: Vec<u32>,
    next: usize,
}

impl Traffic {
    /// Calls of one shape on a policy of that server, which has let calls through if some are told of.
    pub(crate) async fn of_server(
        server: &Server,
        (shape, policy, keys): (Shape, &str, Keys),
    ) -> Result<Self> {
        if !shape.tells() {
            return Ok(Self::new(shape, policy, keys));
        }
        let passed = Passed::by(server, keys.count()).await?;
        Ok(Self::after(&passed, (shape, policy, keys)))
    }

    /// Calls of one shape on a policy.
    pub(crate) fn new(shape: Shape, policy: &str, keys: Keys) -> Self {
        Self::after(&Passed::default(), (shape, policy, keys))
    }

    fn after(passed: &Passed, (shape, policy, keys): (Shape, &str, Keys)) -> Self {
        let calls = match shape {
            Shape::Batch(entries) => (keys.count() / entries).max(1),
            _ => keys.count(),
        };
        let order = match keys {
            Keys::Hot => vec![0],
            Keys::Thousand => drawn(calls, |_| 1.0),
            Keys::Million => drawn(calls, |rank| 1.0 / f64::from(rank)),
        };
        Self::of_calls((shape, policy), passed, 0..calls, order)
    }

    /// Batches that ask every key once, and how many they are.
    pub(crate) fn each_once(policy: &str, keys: u32) -> (Self, u32) {
        let batches = keys.div_ceil(BATCH);
        (Self::of_batches(policy, 0..batches), batches)
    }

    /// Batches that ask each of these keys once, whole thousands of them, and how many they are.
    pub(crate) fn each_between(policy: &str, keys: Range<u32>) -> (Self, u32) {
        let calls = keys.start / BATCH..keys.end / BATCH;
        let batches = calls.len() as u32;
        (Self::of_batches(policy, calls), batches)
    }

    /// Calls of one ask, each under an id of its own.
    pub(crate) fn with_ids(policy: &str, calls: u32) -> Self {
        let mut frames = BytesMut::new();
        for call in 0..calls {
            let client = Some(Client { id: "bench".into(), ..Client::default() });
            let ask = Ask { policy: policy.into(), ..Ask::default() };
            let request = AcquireRequest {
                namespace: "bench".into(),
                asks: vec![ask],
                client,
                request_id: format!("request-{call:07}"),
                ..AcquireRequest::default()
            };
            put_message(&mut frames, &request);
        }
        let length = frames.len() / calls as usize;
        let order = (0..calls).collect();
        Self { shape: Shape::Asks(1), frames: frames.freeze(), length, order, next: 0 }
    }

    fn of_batches(policy: &str, calls: Range<u32>) -> Self {
        let order = (0..calls.len() as u32).collect();
        Self::of_calls((Shape::Batch(BATCH), policy), &Passed::default(), calls, order)
    }

    fn of_calls(
        (shape, policy): (Shape, &str),
        passed: &Passed,
        calls: Range<u32>,
        order: Vec<u32>,
    ) -> Self {
        let mut frames = BytesMut::new();
        let count = calls.len();
        for call in calls {
            put(&mut frames, (shape, policy), passed, call);
        }
        let length = frames.len() / count;
        Self { shape, frames: frames.freeze(), length, order, next: 0 }
    }

    /// The next request.
    pub(crate) fn next(&mut self) -> Bytes {
        let start = self.order[self.next] as usize * self.length;
        self.next = (self.next + 1) % self.order.len();
        self.frames.slice(start..start + self.length)
    }
}

/// The ask of a circuit.
fn circuit(key: u32) -> Ask {
    Ask { policy: BREAKER.into(), key: self::key(key), ..Ask::default() }
}

fn key(key: u32) -> String {
    format!("tenant-{key:07}")
}

/// Keys are of one length, so that all requests are.
fn put(frames: &mut BytesMut, (shape, policy): (Shape, &str), passed: &Passed, call: u32) {
    let ask = |key: u32| Ask { policy: policy.into(), key: self::key(key), ..Ask::default() };
    let namespace = String::from("bench");
    let client = || Some(Client { id: "bench".into(), ..Client::default() });
    match shape {
        Shape::Circuit => {
            let asks = vec![circuit(call)];
            put_message(frames, &AcquireRequest { namespace, asks, ..AcquireRequest::default() });
        }
        Shape::Guarded => {
            let asks = vec![ask(call), circuit(call)];
            put_message(frames, &AcquireRequest { namespace, asks, ..AcquireRequest::default() });
        }
        Shape::Outcomes(count) => {
            let outcome = GrantOutcome {
                grant_id: passed.ids[call as usize].clone(),
                outcome: Outcome::Success.into(),
                latency: Some(prost_types::Duration { seconds: 0, nanos: 10_000_000 }),
                ..GrantOutcome::default()
            };
            let outcomes = vec![outcome; count as usize];
            let report = ReportRequest { outcomes, ..ReportRequest::default() };
            put_message(frames, &ReportRequest { namespace, client: client(), ..report });
        }
        Shape::Delta(calls) => {
            let mut latency_counts = vec![0; LATENCY + 1];
            latency_counts[LATENCY] = calls.into();
            let delta = CircuitDelta {
                policy: policy.into(),
                key: key(call),
                generation: passed.generation,
                successes: calls.into(),
                latency_counts,
                ..CircuitDelta::default()
            };
            let report = ReportRequest { deltas: vec![delta], ..ReportRequest::default() };
            put_message(frames, &ReportRequest { namespace, client: client(), ..report });
        }
        // The first ask is the call's own; the others are of the keys after it.
        Shape::Asks(count) => {
            let asks = (call..call + count).map(ask).collect();
            put_message(frames, &AcquireRequest { namespace, asks, ..AcquireRequest::default() });
        }
        Shape::Batch(count) => {
            let entry = |key| AcquireRequest { asks: vec![ask(key)], ..AcquireRequest::default() };
            let requests = (call * count..(call + 1) * count).map(entry).collect();
            put_message(
                frames,
                &AcquireBatchRequest { namespace, requests, ..AcquireBatchRequest::default() },
            );
        }
        Shape::Descriptors(count) => {
            let descriptors = (0..count).map(|index| rules::descriptor(index, call)).collect();
            put_message(
                frames,
                &RateLimitRequest { domain: rules::DOMAIN.into(), descriptors, hits_addend: 0 },
            );
        }
    }
}

fn put_message(frames: &mut BytesMut, message: &impl Message) {
    frames.put_u8(0);
    frames.put_u32(message.encoded_len() as u32);
    frames.put_slice(&message.encode_to_vec());
}

/// Draws of 0 to `count`, by the weight of their rank, the same in every run.
fn drawn(count: u32, weight: impl Fn(u32) -> f64) -> Vec<u32> {
    let mut sum = 0.0;
    let sums: Vec<f64> = (1..=count)
        .map(|rank| {
            sum += weight(rank);
            sum
        })
        .collect();
    let mut seed = 0_u64;
    let draw = |_| {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let uniform = (mixed(seed) >> 11) as f64 / (1_u64 << 53) as f64;
        sums.partition_point(|sum| *sum <= uniform * sums[sums.len() - 1]).min(sums.len() - 1)
            as u32
    };
    (0..DRAWS).map(draw).collect()
}

/// The mixing step of `SplitMix64` (Steele, Lea, Flood, 2014).
fn mixed(seed: u64) -> u64 {
    let first = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let second = (first ^ (first >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    second ^ (second >> 31)
}
