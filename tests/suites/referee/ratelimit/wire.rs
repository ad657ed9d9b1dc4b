//! From a line to what Envoy sends.

use fusebox_proto::{
    Entry,
    envoy::{
        extensions::common::ratelimit::v3::{
            RateLimitDescriptor, rate_limit_descriptor::RateLimitOverride,
        },
        r#type::v3::RateLimitUnit,
    },
};

use crate::words::Line;

/// Words that are no keys.
const WORDS: [&str; 2] = ["hits=", "limit="];

/// A descriptor: `path=/login user=alice hits=0 limit=10/DAY`.
pub fn descriptor(text: &str) -> RateLimitDescriptor {
    let line = Line::new(text);
    let limit = text.split(' ').find_map(|word| word.strip_prefix("limit="));
    RateLimitDescriptor {
        entries: entries(text)
            .map(|(key, value)| Entry { key: key.into(), value: value.into() })
            .collect(),
        limit: limit.map(limit_of),
        hits_addend: line.number("hits"),
        is_negative_hits: line.has("negative"),
    }
}

/// The keys and values of a descriptor.
pub fn entries(line: &str) -> impl Iterator<Item = (&str, &str)> {
    let words = line.split(' ').filter(|word| !WORDS.iter().any(|other| word.starts_with(other)));
    words.filter_map(|word| word.split_once('='))
}

fn limit_of(text: &str) -> RateLimitOverride {
    let (requests, unit) = text.split_once('/').expect("limit=N/UNIT");
    RateLimitOverride {
        requests_per_unit: requests.parse().expect("a number"),
        unit: RateLimitUnit::from_str_name(unit).expect("a unit").into(),
    }
}
