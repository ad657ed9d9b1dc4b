//! From what a proxy is told, and what is counted, to text.

use std::{collections::BTreeMap, fmt::Write};

use fusebox_proto::envoy::service::ratelimit::v3::{
    RateLimitResponse,
    rate_limit_response::{DescriptorStatus, RateLimit},
};
use prost_types::{Struct, Value, value::Kind};
use tonic::Status;

use super::wire;

type Answer = Result<RateLimitResponse, Status>;

/// An answer in lines: what it is overall, then each status after the descriptor of the request that it is for.
pub fn answer(descriptors: &str, answer: &Answer) -> String {
    let response = match answer {
        Ok(response) => response,
        Err(error) => return refused(error),
    };
    assert_eq!(response.statuses.len(), descriptors.lines().count(), "one for each descriptor");
    let mut text = format!("{}\n", response.overall_code().as_str_name());
    for (line, told) in descriptors.lines().zip(&response.statuses) {
        let entries: Vec<_> =
            wire::entries(line).map(|(key, value)| format!("{key}={value}")).collect();
        writeln!(text, "{}: {}", entries.join(" "), status(told)).unwrap();
    }
    for header in &response.response_headers_to_add {
        assert!(header.raw_value.is_empty());
        writeln!(text, "{}: {}", header.key, header.value).unwrap();
    }
    if let Some(metadata) = &response.dynamic_metadata {
        writeln!(text, "metadata: {}", object(metadata)).unwrap();
    }
    let rest = RateLimitResponse {
        overall_code: response.overall_code,
        statuses: response.statuses.clone(),
        response_headers_to_add: response.response_headers_to_add.clone(),
        dynamic_metadata: response.dynamic_metadata.clone(),
        ..RateLimitResponse::default()
    };
    assert_eq!(*response, rest, "nothing else is told");
    text
}

/// Each answer in a line, and those in a row that are the same in one.
pub fn in_lines(answers: impl Iterator<Item = Answer>) -> String {
    let mut lines: Vec<(usize, String)> = Vec::new();
    for answer in answers {
        let line = match &answer {
            Ok(response) => {
                let overall = [response.overall_code().as_str_name().to_owned()];
                let parts: Vec<_> =
                    overall.into_iter().chain(response.statuses.iter().map(status)).collect();
                parts.join(" | ") + "\n"
            }
            Err(error) => refused(error),
        };
        match lines.last_mut() {
            Some((times, last)) if *last == line => *times += 1,
            _ => lines.push((1, line)),
        }
    }
    let shown = |(times, line)| match times {
        1 => line,
        _ => format!("{times} times {line}"),
    };
    lines.into_iter().map(shown).collect()
}

fn refused(error: &Status) -> String {
    format!("{:?}: {}\n", error.code(), error.message())
}

fn status(status: &DescriptorStatus) -> String {
    let code = status.code().as_str_name();
    let mut text = match &status.current_limit {
        None if status.limit_remaining == 0 => format!("{code}, no limit"),
        None => format!("{code}, no limit, {} left", status.limit_remaining),
        Some(limit) => {
            let RateLimit { requests_per_unit, .. } = limit;
            let (left, unit) = (status.limit_remaining, limit.unit().as_str_name());
            format!("{code}, {left} of {requests_per_unit}/{unit} left")
        }
    };
    if let Some(reset) = status.duration_until_reset {
        assert_eq!(reset.nanos, 0, "whole seconds");
        write!(text, ", reset in {}s", reset.seconds).unwrap();
    }
    let limit = status.current_limit.iter().filter(|limit| !limit.name.is_empty());
    text.extend(limit.map(|limit| format!(", by `{}`", limit.name)));
    assert_eq!(status.quota, None, "Envoy does not use it");
    text
}

fn object(of: &Struct) -> String {
    let fields: Vec<_> =
        of.fields.iter().map(|(name, field)| format!("{name:?}: {}", value(field))).collect();
    format!("{{{}}}", fields.join(", "))
}

fn value(of: &Value) -> String {
    match of.kind.as_ref().expect("a value") {
        Kind::NullValue(_) => "null".to_owned(),
        Kind::NumberValue(number) => number.to_string(),
        Kind::StringValue(text) => format!("{text:?}"),
        Kind::BoolValue(flag) => flag.to_string(),
        Kind::StructValue(fields) => object(fields),
        Kind::ListValue(list) => {
            format!("[{}]", list.values.iter().map(value).collect::<Vec<_>>().join(", "))
        }
    }
}

/// The hits of each series of a domain.
pub fn hits(metrics: &str, domain: &str) -> String {
    const PREFIX: &str = "fusebox_ratelimit_";
    let labels = format!("{{domain=\"{domain}\",key=\"");
    let mut series = BTreeMap::<&str, BTreeMap<&str, &str>>::new();
    for line in metrics.lines().filter(|line| line.starts_with(PREFIX)) {
        let Some((name, rest)) = line.split_once(&labels) else { continue };
        let (key, rest) = rest.split_once('"').expect("a key");
        let (_, count) = rest.rsplit_once(' ').expect("a count");
        series.entry(key).or_default().insert(&name[PREFIX.len()..], count);
    }
    let mut text = String::new();
    for (key, counts) in series {
        write!(text, "{key}: {} hits", counts["hits_total"]).unwrap();
        for (name, shown) in [
            ("within_limit_hits_total", "within"),
            ("near_limit_hits_total", "near"),
            ("over_limit_hits_total", "over"),
            ("shadow_mode_hits_total", "in shadow"),
        ] {
            let count = counts[name];
            if count != "0" {
                write!(text, ", {count} {shown}").unwrap();
            }
        }
        text.push('\n');
    }
    text
}

/// What is counted of no rule.
pub fn counts(metrics: &str) -> String {
    let of =
        |name: &str, labels: &str| count(metrics, &format!("fusebox_ratelimit_{name}"), labels);
    let mut text = String::new();
    for (shown, count) in [
        ("loaded", of("config_loads_total", "result=\"ok\"")),
        ("refused", of("config_loads_total", "result=\"error\"")),
        ("unknown domain", of("unknown_domain_total", "")),
        ("passed in shadow", of("passed_in_shadow_total", "")),
    ] {
        writeln!(text, "{shown}: {count}").unwrap();
    }
    text
}

/// How many calls of the service ended with which code.
pub fn calls(metrics: &str) -> BTreeMap<String, u64> {
    const CALLS: &str = "rpc_server_call_duration_seconds_count{\
        rpc_method=\"envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit\",\
        rpc_response_status_code=\"";
    let calls = metrics.lines().filter_map(|line| line.strip_prefix(CALLS));
    let calls = calls.map(|rest| {
        let (code, _) = rest.split_once('"').expect("a code");
        (code.to_owned(), count(rest, code, ""))
    });
    calls.filter(|(_, count)| *count > 0).collect()
}

/// A counter that has these labels; none is zero.
pub fn count(metrics: &str, name: &str, labels: &str) -> u64 {
    let mut lines = metrics.lines().filter(|line| line.starts_with(name) && line.contains(labels));
    lines.next().map_or(0, |line| {
        let (_, count) = line.rsplit_once(' ').expect("a count");
        count.parse().expect("a number")
    })
}
