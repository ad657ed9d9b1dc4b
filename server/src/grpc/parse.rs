//! From messages to what cannot be wrong. Past this file no name is empty and no number out of range.

use fusebox_core::Cost;
use fusebox_proto::v1::{
    AcquireBatchRequest, AcquireRequest, Ask, GrantOutcome, Priority, ReportRequest,
};

use super::status::Refusal;
use crate::{
    app::{self, Acquire, Batch, Outcome},
    limits,
};

/// One Acquire.
pub(super) fn acquire<'a>(
    request: &'a AcquireRequest,
) -> Result<Acquire<'a, impl Iterator<Item = app::Ask<'a>>>, Refusal> {
    let mut refusal = Refusal::default();
    namespace(&mut refusal, &request.namespace);
    entry(&mut refusal, None, request);
    refusal.or_else(|| Acquire { namespace: &request.namespace, asks: accepted(request) })
}

/// Every Acquire of a batch.
pub(super) fn batch<'a>(
    request: &'a AcquireBatchRequest,
) -> Result<Batch<'a, impl ExactSizeIterator<Item: Iterator<Item = app::Ask<'a>>>>, Refusal> {
    let mut refusal = Refusal::default();
    namespace(&mut refusal, &request.namespace);
    refusal.unsupported(request.client.is_some(), || "client".into());
    let entries = &request.requests;
    if entries.is_empty() || entries.len() > limits::BATCH_REQUESTS {
        refusal.violation("requests", count("requests", entries.len(), limits::BATCH_REQUESTS));
    }
    let asks: usize = entries.iter().map(|entry| entry.asks.len()).sum();
    if asks > limits::BATCH_ASKS {
        let most = limits::BATCH_ASKS;
        refusal.violation("requests", format!("{asks} asks in all; at most {most}"));
    }
    for (index, request) in entries.iter().enumerate() {
        if refusal.is_full() {
            break;
        }
        if !request.namespace.is_empty() {
            let message = "the batch names the namespace once; leave it out here";
            refusal.violation(format!("requests[{index}].namespace"), message);
        }
        entry(&mut refusal, Some(index), request);
    }
    refusal
        .or_else(|| Batch { namespace: &request.namespace, entries: entries.iter().map(accepted) })
}

/// Every outcome of a report.
pub(super) fn report(request: &ReportRequest) -> Result<Vec<Outcome>, Refusal> {
    let mut refusal = Refusal::default();
    namespace(&mut refusal, &request.namespace);
    refusal.unsupported(request.client.is_some(), || "client".into());
    refusal.unsupported(request.sequence != 0, || "sequence".into());
    refusal.unsupported(!request.deltas.is_empty(), || "deltas".into());
    refusal.unsupported(!request.renew_grant_ids.is_empty(), || "renew_grant_ids".into());
    let outcomes = &request.outcomes;
    if outcomes.is_empty() || outcomes.len() > limits::REPORT_OUTCOMES {
        refusal.violation("outcomes", count("outcomes", outcomes.len(), limits::REPORT_OUTCOMES));
    }
    for (index, outcome) in outcomes.iter().enumerate() {
        if refusal.is_full() {
            break;
        }
        grant_outcome(&mut refusal, index, outcome);
    }
    refusal.or_else(|| {
        let accepted = |outcome: &GrantOutcome| Outcome {
            grant: outcome.grant_id.parse().ok(),
            actual_cost: outcome.actual_cost,
        };
        outcomes.iter().map(accepted).collect()
    })
}

fn grant_outcome(refusal: &mut Refusal, index: usize, outcome: &GrantOutcome) {
    let field = |name: &str| format!("outcomes[{index}].{name}");
    refusal.unsupported(outcome.outcome != 0, || field("outcome"));
    refusal.unsupported(outcome.latency.is_some(), || field("latency"));
    refusal.unsupported(outcome.lease_returned != 0, || field("lease_returned"));
    refusal.unsupported(outcome.partial, || field("partial"));
    refusal.unsupported(!outcome.error_kind.is_empty(), || field("error_kind"));
    let bytes = outcome.grant_id.len();
    if bytes == 0 || bytes > limits::GRANT_ID_BYTES {
        let most = limits::GRANT_ID_BYTES;
        let message = format!("{bytes} bytes; a grant id has 1 to {most}, as Acquire answered it");
        refusal.violation(field("grant_id"), message);
    }
    if outcome.actual_cost.is_some_and(|cost| cost > limits::TOKENS) {
        refusal.violation(field("actual_cost"), "above 10^12 tokens, the most a policy can have");
    }
}

/// What an Acquire and an entry of a batch, which has an index, have in common.
fn entry(refusal: &mut Refusal, index: Option<usize>, request: &AcquireRequest) {
    let field = |name: &str| in_entry(index) + name;
    refusal.unsupported(request.client.is_some(), || field("client"));
    refusal.unsupported(!request.request_id.is_empty(), || field("request_id"));
    refusal.unsupported(request.max_wait.is_some(), || field("max_wait"));
    refusal.unsupported(request.attempt != 0, || field("attempt"));
    match Priority::try_from(request.priority) {
        Ok(Priority::Unspecified | Priority::Normal) => {}
        Ok(Priority::Critical | Priority::Bulk) => {
            refusal.unsupported(true, || field("priority"));
        }
        Err(_) => refusal.violation(field("priority"), "not a priority"),
    }

    let asks = &request.asks;
    if asks.is_empty() || asks.len() > limits::ASKS {
        refusal.violation(field("asks"), count("asks", asks.len(), limits::ASKS));
        return;
    }
    let mut estimated = 0;
    for (ask, one) in asks.iter().enumerate() {
        let field = |name: &str| format!("{}asks[{ask}].{name}", in_entry(index));
        refusal.unsupported(one.lease != 0, || field("lease"));
        refusal.unsupported(one.handle != 0, || field("handle"));
        if one.policy.is_empty() {
            refusal.violation(field("policy"), "required: the name of a policy");
        }
        if one.key.len() > limits::KEY_BYTES {
            let (bytes, most) = (one.key.len(), limits::KEY_BYTES);
            refusal.violation(field("key"), format!("{bytes} bytes; at most {most}"));
        }
        estimated += usize::from(one.estimated);
        if one.estimated && one.cost == Some(0) {
            refusal.violation(field("cost"), "an estimate is at least 1; 0 is a peek");
        }
        if one.estimated && estimated > 1 {
            refusal.violation(field("estimated"), "one ask of an Acquire may be estimated");
        }
        let same = |other: &Ask| other.policy == one.policy && other.key == one.key;
        if let Some(first) = asks[..ask].iter().position(same) {
            let message = format!("the same policy and key as asks[{first}]; add their costs up");
            refusal.violation(format!("{}asks[{ask}]", in_entry(index)), message);
        }
    }
}

/// The path of an entry of a batch.
pub(super) fn in_entry(index: Option<usize>) -> String {
    index.map(|index| format!("requests[{index}].")).unwrap_or_default()
}

fn namespace(refusal: &mut Refusal, namespace: &str) {
    if namespace.is_empty() {
        refusal.violation("namespace", "required: the name of a namespace");
    }
}

fn count(what: &str, count: usize, most: usize) -> String {
    format!("{count} {what}; 1 to {most} are needed")
}

/// The asks of a request, once nothing about it is refused.
fn accepted(request: &AcquireRequest) -> impl Iterator<Item = app::Ask<'_>> {
    request.asks.iter().map(|ask| app::Ask {
        policy: &ask.policy,
        key: &ask.key,
        cost: Cost { tokens: ask.cost.unwrap_or(1), estimated: ask.estimated },
    })
}
