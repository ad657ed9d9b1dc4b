//! From a proxy's message to what cannot be wrong.

use fusebox_proto::envoy::{
    extensions::common::ratelimit::v3::{
        RateLimitDescriptor, rate_limit_descriptor::RateLimitOverride,
    },
    service::ratelimit::v3::RateLimitRequest,
    r#type::v3::RateLimitUnit,
};
use tonic::Status;

use crate::{
    app::{self, RatelimitRequest},
    config::envoy::Unit,
    grpc::status::Refusal,
    limits,
};

/// A request as the app takes it.
///
/// # Errors
/// `INVALID_ARGUMENT`; where clients know the words of envoyproxy/ratelimit, in these.
pub fn request(
    request: &RateLimitRequest,
) -> Result<
    RatelimitRequest<
        '_,
        impl Iterator<Item = app::Descriptor<impl Iterator<Item = (&str, &str)> + Clone>> + Clone,
    >,
    Status,
> {
    if request.domain.is_empty() {
        return Err(Status::invalid_argument("rate limit domain must not be empty"));
    }
    if request.descriptors.is_empty() {
        return Err(Status::invalid_argument("rate limit descriptor list must not be empty"));
    }
    check(request)?;
    let hits = u64::from(request.hits_addend.max(1));
    let descriptors = request.descriptors.iter().map(move |descriptor| app::Descriptor {
        entries: descriptor.entries.iter().map(|entry| (&*entry.key, &*entry.value)),
        limit: descriptor.limit.as_ref().and_then(limit),
        hits: descriptor.hits_addend.unwrap_or(hits),
        negative: descriptor.is_negative_hits,
    });
    Ok(RatelimitRequest { domain: &request.domain, descriptors })
}

/// Refuses more than there may be, and limits in no time: what the operator of a proxy wrote. Values are whoever
/// calls the proxy's, and none is refused, however long: an error would let the call pass, if the proxy is told so.
fn check(RateLimitRequest { descriptors, .. }: &RateLimitRequest) -> Result<(), Refusal> {
    let mut refusal = Refusal::default();
    let count = descriptors.len();
    if count > limits::DESCRIPTORS {
        let most = limits::DESCRIPTORS;
        refusal.violation("descriptors", format!("{count} descriptors; at most {most}"));
    }
    for (index, descriptor) in descriptors.iter().enumerate() {
        if refusal.is_full() {
            break;
        }
        check_descriptor(&mut refusal, index, descriptor);
    }
    refusal.or_else(|| ())
}

fn check_descriptor(refusal: &mut Refusal, index: usize, descriptor: &RateLimitDescriptor) {
    let count = descriptor.entries.len();
    if count > limits::DESCRIPTOR_ENTRIES {
        let (field, most) = (format!("descriptors[{index}].entries"), limits::DESCRIPTOR_ENTRIES);
        refusal.violation(field, format!("{count} entries; at most {most}"));
    }
    if descriptor.limit.as_ref().is_some_and(|limit| self::limit(limit).is_none()) {
        let field = format!("descriptors[{index}].limit.unit");
        refusal.violation(field, "required: SECOND, MINUTE, HOUR, DAY, MONTH or YEAR");
    }
}

/// The limit that a descriptor carries; `None` if it is in no time.
fn limit(limit: &RateLimitOverride) -> Option<(u32, Unit)> {
    let unit = match limit.unit() {
        RateLimitUnit::Unknown => return None,
        RateLimitUnit::Second => Unit::Second,
        RateLimitUnit::Minute => Unit::Minute,
        RateLimitUnit::Hour => Unit::Hour,
        RateLimitUnit::Day => Unit::Day,
        RateLimitUnit::Month => Unit::Month,
        RateLimitUnit::Year => Unit::Year,
    };
    Some((limit.requests_per_unit, unit))
}
