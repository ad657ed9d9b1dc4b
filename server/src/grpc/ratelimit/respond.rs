//! From what became of a request to a proxy's message.

use std::{collections::BTreeMap, time::Duration};

use fusebox_proto::{
    Entry,
    envoy::{
        config::core::v3::HeaderValue,
        extensions::common::ratelimit::v3::RateLimitDescriptor,
        service::ratelimit::v3::{
            RateLimitRequest, RateLimitResponse,
            rate_limit_response::{
                Code, DescriptorStatus, RateLimit, rate_limit::Unit as WireUnit,
            },
        },
    },
};
use prost_types::{ListValue, Struct, Value, value::Kind};

use crate::{
    app::{CurrentLimit, Ratelimited, Status},
    config::envoy::{Metadata, ResponseHeaders, Unit},
};

/// What a proxy is told of its request.
pub(super) fn limited(request: &RateLimitRequest, limited: &Ratelimited<'_>) -> RateLimitResponse {
    let settings = limited.settings;
    let headers = settings.response_headers.as_ref();
    let dynamic = settings.response_dynamic_metadata;
    RateLimitResponse {
        overall_code: code(limited.over).into(),
        statuses: limited.statuses.iter().map(status).collect(),
        response_headers_to_add: headers
            .and_then(|names| nearest(&limited.statuses).map(|nearest| told(names, nearest)))
            .unwrap_or_default(),
        dynamic_metadata: dynamic.then(|| metadata(request, &limited.statuses)),
        ..RateLimitResponse::default()
    }
}

fn code(over: bool) -> Code {
    if over { Code::OverLimit } else { Code::Ok }
}

fn status(status: &Status<'_>) -> DescriptorStatus {
    DescriptorStatus {
        code: code(status.over).into(),
        current_limit: status.limit.as_ref().map(current_limit),
        limit_remaining: if status.unlimited { u32::MAX } else { narrow(status.remaining) },
        duration_until_reset: status.limit.map(|_| prost_types::Duration {
            seconds: i64::try_from(whole_seconds(status.reset_after)).unwrap_or(i64::MAX),
            nanos: 0,
        }),
        quota: None,
    }
}

fn current_limit(limit: &CurrentLimit<'_>) -> RateLimit {
    let unit = match limit.unit {
        None => WireUnit::Unknown,
        Some(Unit::Second) => WireUnit::Second,
        Some(Unit::Minute) => WireUnit::Minute,
        Some(Unit::Hour) => WireUnit::Hour,
        Some(Unit::Day) => WireUnit::Day,
        Some(Unit::Week) => WireUnit::Week,
        Some(Unit::Month) => WireUnit::Month,
        Some(Unit::Year) => WireUnit::Year,
    };
    RateLimit {
        requests_per_unit: narrow(limit.per_unit),
        unit: unit.into(),
        name: limit.name.to_owned(),
    }
}

/// As many as the wire can tell.
fn narrow(hits: u64) -> u32 {
    u32::try_from(hits).unwrap_or(u32::MAX)
}

/// Rounded up, so that who waits for so long has not waited in vain.
fn whole_seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

/// The limit that is told in headers: the last one that is over and binds alone, else the first of those with the
/// least left.
fn nearest<'s, 'c>(statuses: &'s [Status<'c>]) -> Option<&'s Status<'c>> {
    let limits = || statuses.iter().filter(|status| status.limit.is_some());
    let over = limits().rfind(|status| status.over && !status.quota);
    over.or_else(|| limits().min_by_key(|status| status.remaining))
}

fn told(names: &ResponseHeaders, status: &Status<'_>) -> Vec<HeaderValue> {
    let limit = status.limit.map_or(0, |limit| limit.per_unit);
    let reset = whole_seconds(status.reset_after);
    let headers =
        [(&names.limit, limit), (&names.remaining, status.remaining), (&names.reset, reset)];
    let header = |(key, value): (&String, u64)| HeaderValue {
        key: key.clone(),
        value: value.to_string(),
        raw_value: Vec::new(),
    };
    headers.map(header).into()
}

/// What was asked, and what the rules that are not over their limit have to tell; of two with one name the first.
fn metadata(request: &RateLimitRequest, statuses: &[Status<'_>]) -> Struct {
    let mut fields = BTreeMap::from([("domain".to_owned(), text(request.domain.clone()))]);
    let descriptors = request.descriptors.iter().map(described).collect();
    fields.insert("descriptors".to_owned(), list(descriptors));
    if request.hits_addend != 0 {
        fields.insert("hitsAddend".to_owned(), number(request.hits_addend.into()));
    }
    let mut told = BTreeMap::new();
    let passed = statuses.iter().filter(|status| !status.over);
    for (name, metadata) in passed.filter_map(|status| status.metadata).flatten() {
        told.entry(name.clone()).or_insert_with(|| value(metadata));
    }
    if !told.is_empty() {
        fields.insert("metadata".to_owned(), map(told));
    }
    Struct { fields }
}

/// A descriptor as it was asked; its limit is a text, as protobuf writes messages.
fn described(descriptor: &RateLimitDescriptor) -> Value {
    let entry = |Entry { key, value }: &Entry| text(format!("{key}={value}"));
    let entries = list(descriptor.entries.iter().map(entry).collect());
    let mut fields = BTreeMap::from([("entries".to_owned(), entries)]);
    if let Some(limit) = &descriptor.limit {
        let (requests, unit) = (limit.requests_per_unit, limit.unit().as_str_name());
        let requests = (requests > 0).then(|| format!("requests_per_unit:{requests} "));
        let limit = requests.unwrap_or_default() + "unit:" + unit;
        fields.insert("limit".to_owned(), text(limit));
    }
    if let Some(hits) = descriptor.hits_addend {
        // As JSON has numbers: exact up to 2^53.
        fields.insert("hitsAddend".to_owned(), number(hits as f64));
    }
    map(fields)
}

fn value(metadata: &Metadata) -> Value {
    match metadata {
        Metadata::Null => of(Kind::NullValue(0)),
        Metadata::Bool(value) => of(Kind::BoolValue(*value)),
        Metadata::Number(value) => number(*value),
        Metadata::Text(value) => text(value.clone()),
        Metadata::List(values) => list(values.iter().map(value).collect()),
        Metadata::Map(fields) => {
            map(fields.iter().map(|(name, field)| (name.clone(), value(field))).collect())
        }
    }
}

fn text(text: String) -> Value {
    of(Kind::StringValue(text))
}

fn number(number: f64) -> Value {
    of(Kind::NumberValue(number))
}

fn list(values: Vec<Value>) -> Value {
    of(Kind::ListValue(ListValue { values }))
}

fn map(fields: BTreeMap<String, Value>) -> Value {
    of(Kind::StructValue(Struct { fields }))
}

fn of(kind: Kind) -> Value {
    Value { kind: Some(kind) }
}
