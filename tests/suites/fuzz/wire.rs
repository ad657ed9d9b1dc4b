//! Whatever bytes come as a request to Envoy's rate limit service, they are read or refused.

use std::{fs, path::Path, thread};

use fusebox_proto::envoy::service::ratelimit::v3::RateLimitRequest;
use prost::Message;

use crate::{Random, rounds};

/// What holds for all bytes. A finding becomes a file of the corpus.
fn check(bytes: &[u8]) {
    let _finding = Finding(bytes);
    if let Ok(request) = RateLimitRequest::decode(bytes) {
        let again = request.encode_to_vec();
        assert_eq!(again.len(), request.encoded_len());
        assert_eq!(RateLimitRequest::decode(&*again), Ok(request));
        // What the service makes of a request belongs here: it is parsed or refused as well.
    }
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
