//! Whatever bytes come as a request to Envoy's rate limit service, they are read or refused.

use std::{cell::Cell, fs, path::Path, thread};

use fusebox_proto::{
    Entry,
    envoy::{
        extensions::common::ratelimit::v3::{
            RateLimitDescriptor, rate_limit_descriptor::RateLimitOverride,
        },
        service::ratelimit::v3::RateLimitRequest,
    },
};
use fusebox_server::{grpc::ratelimit::parse, limits};
use prost::Message;
use tonic::Code;

use crate::{Random, rounds};

/// What holds for all bytes. A finding becomes a file of the corpus.
fn check(bytes: &[u8]) {
    let _finding = Finding(bytes);
    if let Ok(request) = RateLimitRequest::decode(bytes) {
        let again = request.encode_to_vec();
        assert_eq!(again.len(), request.encoded_len());
        assert_eq!(RateLimitRequest::decode(&*again).as_ref(), Ok(&request));
        check_parsed(&request);
    }
}

/// What the service takes is within its limits and says what was sent, and what it refuses is not.
fn check_parsed(request: &RateLimitRequest) {
    let parsed = match parse(request) {
        Ok(parsed) => parsed,
        Err(refused) => {
            assert_eq!(refused.code(), Code::InvalidArgument);
            assert!(!refused.message().is_empty() && !is_within_limits(request), "{refused}");
            return;
        }
    };
    assert!(is_within_limits(request));
    assert_eq!(parsed.domain, request.domain);
    assert_eq!(parsed.descriptors.clone().count(), request.descriptors.len());
    for (parsed, sent) in parsed.descriptors.zip(&request.descriptors) {
        let entries = sent.entries.iter().map(|entry| (&*entry.key, &*entry.value));
        assert!(parsed.entries.eq(entries));
        let limit = sent.limit.as_ref().map(|limit| limit.requests_per_unit);
        assert_eq!(parsed.limit.map(|(requests, _)| requests), limit);
        let of_request = request.hits_addend.max(1).into();
        assert_eq!(parsed.hits, sent.hits_addend.unwrap_or(of_request));
        assert_eq!(parsed.negative, sent.is_negative_hits);
    }
}

fn is_within_limits(RateLimitRequest { domain, descriptors, .. }: &RateLimitRequest) -> bool {
    let is_sound = |RateLimitDescriptor { entries, limit, .. }: &RateLimitDescriptor| {
        entries.len() <= limits::DESCRIPTOR_ENTRIES
            && limit.as_ref().is_none_or(|limit| (1..=6).contains(&limit.unit))
    };
    !domain.is_empty()
        && (1..=limits::DESCRIPTORS).contains(&descriptors.len())
        && descriptors.iter().all(is_sound)
}

/// A number on either side of a limit, or far below it.
fn around(random: &mut Random, limit: usize) -> usize {
    if random.one_in(4) { limit - 1 + random.below(3) } else { random.below(3) }
}

fn request_around_limits(random: &mut Random) -> RateLimitRequest {
    let text = |random: &mut Random| "x".repeat(random.below(3));
    let descriptor = |random: &mut Random| {
        let entry = |random: &mut Random| Entry { key: text(random), value: text(random) };
        RateLimitDescriptor {
            entries: (0..around(random, limits::DESCRIPTOR_ENTRIES))
                .map(|_| entry(random))
                .collect(),
            limit: random.one_in(4).then(|| RateLimitOverride {
                requests_per_unit: random.next() as u32,
                unit: random.below(9) as i32 - 1,
            }),
            hits_addend: random.one_in(2).then(|| random.next()),
            is_negative_hits: random.one_in(2),
        }
    };
    // Few are refused for two things at once, so that each limit is the only one now and then.
    let count = around(random, limits::DESCRIPTORS);
    let descriptors = (0..count).map(|_| descriptor(random)).collect();
    RateLimitRequest { domain: text(random), descriptors, hits_addend: random.below(3) as u32 }
}

/// Tells the bytes that something does not hold for.
struct Finding<'b>(&'b [u8]);

impl Drop for Finding<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let hex = self.0.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            eprintln!("keep it: echo {hex} | xxd -r -p > tests/suites/fuzz/corpus/NAME");
        }
    }
}

/// Requests by the name of their file, which tells what is in it.
fn corpus() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("suites/fuzz/corpus");
    let mut corpus = Vec::new();
    for file in fs::read_dir(folder).unwrap() {
        let file = file.unwrap();
        corpus.push((file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap()));
    }
    corpus.sort_unstable();
    corpus
}

/// Damages bytes in one way.
fn damage(bytes: &mut Vec<u8>, random: &mut Random, corpus: &[(String, Vec<u8>)]) {
    let at = random.below(bytes.len() + 1);
    match random.below(7) {
        0 => bytes.truncate(at),
        1 => bytes.insert(at, random.next() as u8),
        2 => {
            // The end of another.
            let (_, other) = random.pick(corpus);
            bytes.truncate(at);
            bytes.extend(&other[random.below(other.len() + 1)..]);
        }
        3 => {
            // A part of it once more.
            let part = bytes[at..bytes.len().min(at + random.below(16))].to_vec();
            let to = random.below(bytes.len() + 1);
            bytes.splice(to..to, part);
        }
        _ if at == bytes.len() => {}
        4 => bytes[at] ^= 1 << random.below(8),
        5 => {
            // Most bytes that follow a tag are lengths: one more, one less, or as large as can be written.
            let lengths: [&[u8]; 6] = [
                &[bytes[at].wrapping_add(1)],
                &[bytes[at].wrapping_sub(1)],
                &[0],
                &[0x80, 0x00],
                &[0xff, 0xff, 0xff, 0xff, 0x0f],
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            ];
            let length = random.pick(&lengths).to_vec();
            bytes.splice(at..=at, length);
        }
        _ => bytes[at] = random.next() as u8,
    }
}

#[test]
fn every_seed_of_the_corpus_is_told_as_it_was_read() {
    let corpus = corpus();
    assert!(corpus.len() >= 10);
    for (name, bytes) in &corpus {
        check(bytes);
        let is_read = RateLimitRequest::decode(&**bytes).is_ok();
        assert_eq!(is_read, !name.starts_with("refused-"), "{name}");
    }
}

#[test]
fn damaged_requests_are_read_or_refused() {
    let corpus = corpus();
    rounds(50_000, |mut random| {
        let (_, seed) = random.pick(&corpus);
        let mut bytes = seed.clone();
        for _ in 0..=random.below(4) {
            damage(&mut bytes, &mut random, &corpus);
        }
        check(&bytes);
    });
}

#[test]
fn requests_around_every_limit_are_taken_or_refused() {
    let (taken, refused) = (Cell::new(0), Cell::new(0));
    rounds(2_000, |mut random| {
        let request = request_around_limits(&mut random);
        check_parsed(&request);
        let count = if is_within_limits(&request) { &taken } else { &refused };
        count.set(count.get() + 1);
    });
    assert!(taken.get() > 0 && refused.get() > 0, "{taken:?} {refused:?}");
}
