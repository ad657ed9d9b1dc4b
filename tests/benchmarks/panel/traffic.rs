//! What is asked: requests, encoded before the clock runs.

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};
use fusebox_proto::{
    envoy::service::ratelimit::v3::{
        RateLimitRequest, RateLimitResponse,
        rate_limit_response::{Code, DescriptorStatus},
    },
    v1::{
        AcquireBatchRequest, AcquireBatchResponse, AcquireRequest, AcquireResponse, Ask, Client,
        Decision,
    },
};
use prost::Message;

use crate::{Result, rules, table::count};

/// Flag and length, before each message of gRPC.
pub(crate) const PREFIX: usize = 5;

/// Most Acquires in one batch.
pub(crate) const BATCH: u32 = 1_000;

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
}

impl Shape {
    pub(crate) fn name(self) -> String {
        match self {
            Self::Asks(1) => "1 ask".into(),
            Self::Asks(asks) => format!("{asks} asks"),
            Self::Batch(entries) => format!("batch of {}", count(entries)),
            Self::Descriptors(1) => "ratelimit, 1 descriptor".into(),
            Self::Descriptors(descriptors) => format!("ratelimit, {descriptors} descriptors"),
        }
    }

    /// What is decided in one call: asks or descriptors, each of which is charged.
    pub(crate) fn decisions(self) -> u32 {
        match self {
            Self::Asks(count) | Self::Batch(count) | Self::Descriptors(count) => count,
        }
    }

    /// The method that takes it.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Asks(_) => "/fusebox.v1.Resilience/Acquire",
            Self::Batch(_) => "/fusebox.v1.Resilience/AcquireBatch",
            Self::Descriptors(_) => "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit",
        }
    }

    /// Whether an answer is as long as it says and begins with an allowed Acquire. Cheap, for each answer.
    pub(crate) fn begins_allowed(self, start: &[u8], length: usize) -> bool {
        // Field 1 of AcquireResponse is a varint, the decision; of AcquireBatchResponse the first response,
        // with one verdict and thus shorter than 128 bytes; of RateLimitResponse a varint, the code of all.
        const ALLOWED: [u8; 2] = [1 << 3, Decision::Allow as u8];
        const OK: [u8; 2] = [1 << 3, Code::Ok as u8];
        let Some((prefix, message)) = start.split_at_checked(PREFIX) else { return false };
        let promised = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
        prefix[0] == 0
            && promised as usize + PREFIX == length
            && match self {
                Self::Asks(_) => message.starts_with(&ALLOWED),
                Self::Batch(_) => message.get(2..).is_some_and(|first| first.starts_with(&ALLOWED)),
                Self::Descriptors(_) => message.starts_with(&OK),
            }
    }

    /// Whether an answer has all its verdicts, and each allows. Thorough, for one answer.
    pub(crate) fn check(self, answer: &[u8]) -> Result<()> {
        let message = answer.get(PREFIX..).ok_or("an answer without a message")?;
        let responses = match self {
            Self::Asks(_) => vec![AcquireResponse::decode(message)?],
            Self::Batch(_) => AcquireBatchResponse::decode(message)?.responses,
            Self::Descriptors(_) => {
                return self.check_statuses(&RateLimitResponse::decode(message)?);
            }
        };
        let allowed = responses.iter().all(|response| response.decision() == Decision::Allow);
        let verdicts: Vec<_> = responses.iter().flat_map(|response| &response.verdicts).collect();
        let complete = |verdict: &&&_| {
            let fusebox_proto::v1::Verdict { limit, remaining, reset_after, .. } = verdict;
            limit.is_some() && remaining.is_some() && reset_after.is_some()
        };
        if allowed && verdicts.iter().filter(complete).count() == self.decisions() as usize {
            Ok(())
        } else {
            Err(format!("not {} allowed asks: {responses:?}", self.decisions()).into())
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

/// Calls, one after another, for ever.
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
    /// Calls of one shape on a policy.
    pub(crate) fn new(shape: Shape, policy: &str, keys: Keys) -> Self {
        let calls = match shape {
            Shape::Asks(_) | Shape::Descriptors(_) => keys.count(),
            Shape::Batch(entries) => (keys.count() / entries).max(1),
        };
        let order = match keys {
            Keys::Hot => vec![0],
            Keys::Thousand => drawn(calls, |_| 1.0),
            Keys::Million => drawn(calls, |rank| 1.0 / f64::from(rank)),
        };
        Self::of(shape, policy, calls, order)
    }

    /// Batches that ask every key once, and how many they are.
    pub(crate) fn each_once(policy: &str, keys: u32) -> (Self, u32) {
        let batches = keys.div_ceil(BATCH);
        (Self::of(Shape::Batch(BATCH), policy, batches, (0..batches).collect()), batches)
    }

    /// Batches that ask each of these keys once, whole thousands of them, and how many they are.
    pub(crate) fn each_between(policy: &str, keys: Range<u32>) -> (Self, u32) {
        let calls = keys.start / BATCH..keys.end / BATCH;
        let batches = calls.len() as u32;
        let order = (0..batches).collect();
        (Self::of_calls(Shape::Batch(BATCH), policy, calls, order), batches)
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

    fn of(shape: Shape, policy: &str, calls: u32, order: Vec<u32>) -> Self {
        Self::of_calls(shape, policy, 0..calls, order)
    }

    fn of_calls(shape: Shape, policy: &str, calls: Range<u32>, order: Vec<u32>) -> Self {
        let mut frames = BytesMut::new();
        let count = calls.len();
        for call in calls {
            put(&mut frames, shape, policy, call);
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

/// Keys are of one length, so that all requests are.
fn put(frames: &mut BytesMut, shape: Shape, policy: &str, call: u32) {
    let ask =
        |key: u32| Ask { policy: policy.into(), key: format!("tenant-{key:07}"), ..Ask::default() };
    let namespace = String::from("bench");
    match shape {
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
