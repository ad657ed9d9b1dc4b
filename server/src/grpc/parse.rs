//! From messages to what cannot be wrong. Past this file no name is empty and no number out of range.

use std::{collections::HashMap, num::NonZeroU64, time::Duration};

use fusebox_core::circuit::{self, Call, Generation};
use fusebox_proto::v1::{
    self, AcquireBatchRequest, AcquireRequest, Ask, Bind, CircuitDelta, GrantOutcome, Hello,
    Priority, ReportRequest, WatchRequest,
};

use super::status::Refusal;
use crate::{
    app::{self, Acquire, Batch, Client, Delta, Entry, Granted, Report, Told, Waiting, Watched},
    limits,
};

/// Why a handle is refused where there is no session.
const NO_HANDLE: &str = "only on a session that bound it; here policy and key are named";

/// An Acquire with all that goes beside what it asks.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'a> {
    message: &'a AcquireRequest,
    /// The client and its id of the request, if it has one.
    pub(super) request: Option<(&'a str, &'a str)>,
    /// How long it waits in line, if it does.
    pub(super) max_wait: Option<Duration>,
}

impl<'a> Wanted<'a> {
    /// What is asked.
    pub(super) fn acquire(&self) -> Acquire<'a, impl Iterator<Item = app::Ask<'a>> + use<'a>> {
        Acquire {
            namespace: &self.message.namespace,
            client: self.message.client.as_ref().map(accepted_client),
            entry: accepted(self.message),
        }
    }

    /// The same as of an Acquire that waits, and how long; `None` if it does not.
    pub(super) fn waiting(&self) -> Option<(Duration, Waiting<'a>)> {
        let Acquire { namespace, client, entry } = self.acquire();
        let Entry { mut asks, priority, retry } = entry;
        let entry = Entry { asks: asks.next()?, priority, retry };
        Some((self.max_wait?, Acquire { namespace, client, entry }))
    }
}

/// One Acquire.
pub(super) fn acquire(request: &AcquireRequest) -> Result<Wanted<'_>, Refusal> {
    let mut refusal = Refusal::default();
    refusal.required(&request.namespace, "namespace", || "namespace".into());
    client(&mut refusal, request.client.as_ref());
    entry(&mut refusal, None, request.client.is_some(), request);
    let max_wait = max_wait(&mut refusal, request);
    let id = request.request_id.as_str();
    let client = request.client.as_ref().map_or("", |client| &client.id);
    refusal.or_else(|| Wanted {
        message: request,
        request: Some((client, id)).filter(|_| !id.is_empty()),
        max_wait,
    })
}

/// How long an Acquire waits in line, if it does.
fn max_wait(refusal: &mut Refusal, request: &AcquireRequest) -> Option<Duration> {
    let most = limits::MAX_WAIT;
    match Duration::try_from(request.max_wait?) {
        Ok(Duration::ZERO) => None,
        Ok(wait) if wait <= most => {
            if request.asks.len() > 1 {
                refusal.violation("max_wait", "only with exactly one ask: a line is one bucket's");
            }
            Some(wait)
        }
        _ => {
            refusal.violation("max_wait", format!("not within 0 to {} seconds", most.as_secs()));
            None
        }
    }
}

/// Every Acquire of a batch.
pub(super) fn batch<'a>(
    request: &'a AcquireBatchRequest,
) -> Result<
    Batch<'a, impl ExactSizeIterator<Item = Entry<impl Iterator<Item = app::Ask<'a>>>>>,
    Refusal,
> {
    let mut refusal = Refusal::default();
    refusal.required(&request.namespace, "namespace", || "namespace".into());
    client(&mut refusal, request.client.as_ref());
    let entries = &request.requests;
    if entries.is_empty() || entries.len() > limits::BATCH_REQUESTS {
        refusal.violation("requests", count("requests", entries.len(), limits::BATCH_REQUESTS));
    }
    let asks: usize = entries.iter().map(|entry| entry.asks.len()).sum();
    if asks > limits::BATCH_ASKS {
        let most = limits::BATCH_ASKS;
        refusal.violation("requests", format!("{asks} asks in all; at most {most}"));
    }
    let named = request.client.is_some();
    let mut ids = HashMap::new();
    for (index, request) in entries.iter().enumerate() {
        if refusal.is_full() {
            break;
        }
        if !request.namespace.is_empty() {
            let message = "the batch names the namespace once; leave it out here";
            refusal.violation(format!("requests[{index}].namespace"), message);
        }
        entry(&mut refusal, Some(index), named, request);
        let id = request.request_id.as_str();
        if !id.is_empty()
            && let Some(first) = ids.insert(id, index)
        {
            let message = format!("the same as of requests[{first}]; an id names one of them");
            refusal.violation(format!("requests[{index}].request_id"), message);
        }
    }
    refusal.or_else(|| Batch {
        namespace: &request.namespace,
        client: request.client.as_ref().map(accepted_client),
        entries: entries.iter().map(accepted),
    })
}

/// Some entries of a batch that nothing is wrong with.
pub(super) fn some_of<'a>(
    request: &'a AcquireBatchRequest,
    entries: &'a [usize],
) -> Batch<'a, impl ExactSizeIterator<Item = Entry<impl Iterator<Item = app::Ask<'a>>>>> {
    Batch {
        namespace: &request.namespace,
        client: request.client.as_ref().map(accepted_client),
        entries: entries.iter().map(|index| accepted(&request.requests[*index])),
    }
}

/// One entry of a batch that nothing is wrong with.
pub(super) fn one_of(
    request: &AcquireBatchRequest,
    entry: usize,
) -> Acquire<'_, impl Iterator<Item = app::Ask<'_>>> {
    Acquire {
        namespace: &request.namespace,
        client: request.client.as_ref().map(accepted_client),
        entry: accepted(&request.requests[entry]),
    }
}

/// All that a report tells.
pub(super) fn report(request: &ReportRequest) -> Result<Report<'_>, Refusal> {
    let mut refusal = Refusal::default();
    refusal.required(&request.namespace, "namespace", || "namespace".into());
    client(&mut refusal, request.client.as_ref());
    let ReportRequest { sequence, outcomes, deltas, renew_grant_ids: renewals, .. } = request;
    let named = request.client.is_some();
    if !named && (*sequence > 0 || !deltas.is_empty() || request.goodbye) {
        let message = "required: a sequence, deltas and a goodbye are a client's own";
        refusal.violation("client.id", message);
    }
    if outcomes.is_empty() && deltas.is_empty() && renewals.is_empty() && !request.goodbye {
        let message = "a report says something: outcomes, deltas, renew_grant_ids or goodbye";
        refusal.violation("outcomes", message);
    }
    for (field, what, number, most) in [
        ("outcomes", "outcomes", outcomes.len(), limits::REPORT_OUTCOMES),
        ("deltas", "deltas", deltas.len(), limits::REPORT_DELTAS),
        ("renew_grant_ids", "grants", renewals.len(), limits::REPORT_OUTCOMES),
    ] {
        if number > most {
            refusal.violation(field, count(what, number, most));
        }
    }
    for (index, outcome) in outcomes.iter().enumerate() {
        if refusal.is_full() {
            break;
        }
        grant_outcome(&mut refusal, index, outcome);
    }
    let mut named_before = HashMap::new();
    for (index, one) in deltas.iter().enumerate() {
        if refusal.is_full() {
            break;
        }
        delta(&mut refusal, index, one);
        if let Some(first) = named_before.insert((&one.policy, &one.key), index) {
            let message = format!("the same policy and key as deltas[{first}]; add them up");
            refusal.violation(format!("deltas[{index}]"), message);
        }
    }
    for (index, id) in renewals.iter().enumerate() {
        if refusal.is_full() {
            break;
        }
        grant_id(&mut refusal, || format!("renew_grant_ids[{index}]"), id);
    }
    refusal.or_else(|| Report {
        namespace: &request.namespace,
        client: request.client.as_ref().map(accepted_client),
        sequence: NonZeroU64::new(*sequence),
        outcomes: outcomes.iter().map(accepted_outcome).collect(),
        deltas: deltas.iter().map(accepted_delta).collect(),
        renewals: renewals.iter().map(|id| id.parse().ok()).collect(),
        goodbye: request.goodbye,
    })
}

/// Who begins a session.
pub(super) fn hello(hello: &Hello) -> Result<Client<'_>, Refusal> {
    let mut refusal = Refusal::default();
    refusal.required(&hello.namespace, "namespace", || "namespace".into());
    if hello.client.is_none() {
        refusal.violation("client.id", "required: new for each process");
    }
    client(&mut refusal, hello.client.as_ref());
    refusal.or_else(|| hello.client.as_ref().map(accepted_client).unwrap_or_default())
}

/// Checks what is to be bound to a handle.
pub(super) fn bind(bind: &Bind) -> Result<(), Refusal> {
    let mut refusal = Refusal::default();
    let most = limits::SESSION_BINDINGS;
    if !(1..=most).contains(&bind.handle) {
        refusal.violation("handle", format!("{}, outside 1 to {most}", bind.handle));
    }
    if bind.policy.is_empty() && !bind.key.is_empty() {
        refusal.violation("key", "without a policy it is the key of nothing; leave it out");
    }
    refusal.at_most(limits::KEY_BYTES, &bind.key, || "key".into());
    refusal.or_else(|| ())
}

/// What is to be watched.
pub(super) fn watch(request: &WatchRequest) -> Result<Watched<'_>, Refusal> {
    let mut refusal = Refusal::default();
    refusal.required(&request.namespace, "namespace", || "namespace".into());
    client(&mut refusal, request.client.as_ref());
    let policies = &request.policies;
    if policies.len() > limits::WATCH_POLICIES {
        let (count, most) = (policies.len(), limits::WATCH_POLICIES);
        let message = format!("{count} policies; at most {most}, or none for all of the namespace");
        refusal.violation("policies", message);
    }
    for (index, policy) in policies.iter().enumerate() {
        refusal.required(policy, "policy", || format!("policies[{index}]"));
    }
    refusal.or_else(|| Watched {
        namespace: &request.namespace,
        client: request.client.as_ref().map(accepted_client),
        policies,
        known: (request.epoch, request.version),
    })
}

fn accepted_outcome(outcome: &GrantOutcome) -> (Option<Granted>, Told<'_>) {
    let told = Told {
        actual_cost: outcome.actual_cost,
        lease_returned: outcome.lease_returned,
        partial: outcome.partial,
        call: Call {
            outcome: match outcome.outcome() {
                v1::Outcome::Success => circuit::Outcome::Success,
                v1::Outcome::Failure => circuit::Outcome::Failure,
                v1::Outcome::LocalFailure => circuit::Outcome::LocalFailure,
                v1::Outcome::Ignored => circuit::Outcome::Ignored,
                v1::Outcome::Unspecified | v1::Outcome::Abandoned => circuit::Outcome::Abandoned,
            },
            latency: outcome.latency.and_then(|latency| latency.try_into().ok()),
            kind: &outcome.error_kind,
        },
    };
    (outcome.grant_id.parse().ok(), told)
}

fn accepted_delta(delta: &CircuitDelta) -> Delta<'_> {
    // Not above what was accepted, so nothing is lost.
    let calls = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
    Delta {
        policy: &delta.policy,
        key: &delta.key,
        generation: Generation(delta.generation),
        successes: calls(delta.successes),
        failures: calls(delta.failures),
        slow: calls(delta.slow),
        ignored: delta.ignored,
        local_failures: delta.local_failures,
        requests: delta.requests,
        retries: delta.retries,
        latencies: &delta.latency_counts,
        kinds: delta.error_kinds.iter().map(String::as_str).take(limits::ERROR_KINDS).collect(),
    }
}

fn grant_id(refusal: &mut Refusal, field: impl FnOnce() -> String, id: &str) {
    let bytes = id.len();
    if bytes == 0 || bytes > limits::GRANT_ID_BYTES {
        let most = limits::GRANT_ID_BYTES;
        let message = format!("{bytes} bytes; a grant id has 1 to {most}, as Acquire answered it");
        refusal.violation(field(), message);
    }
}

fn grant_outcome(refusal: &mut Refusal, index: usize, outcome: &GrantOutcome) {
    let field = |name: &str| format!("outcomes[{index}].{name}");
    grant_id(refusal, || field("grant_id"), &outcome.grant_id);
    let is_said = outcome.outcome() != v1::Outcome::Unspecified;
    if v1::Outcome::try_from(outcome.outcome).is_err() {
        refusal.violation(field("outcome"), "not an outcome");
    } else if outcome.partial && is_said {
        refusal.violation(field("outcome"), "a call that goes on has none yet; leave it out");
    } else if !is_said {
        let message = "only with an outcome";
        if outcome.latency.is_some() {
            refusal.violation(field("latency"), message);
        }
        if !outcome.error_kind.is_empty() {
            refusal.violation(field("error_kind"), message);
        }
    }
    let latency = outcome.latency.map(Duration::try_from);
    if latency.is_some_and(|latency| latency.map_or(true, |latency| latency > limits::LATENCY)) {
        let most = limits::LATENCY.as_secs();
        refusal.violation(field("latency"), format!("not within 0 to {most} seconds"));
    }
    refusal.at_most(limits::ERROR_KIND_BYTES, &outcome.error_kind, || field("error_kind"));
    if outcome.partial && outcome.lease_returned > 0 {
        let message = "what is left of a lease is returned when it ends, not in parts";
        refusal.violation(field("lease_returned"), message);
    }
    if outcome.actual_cost.is_some_and(|cost| cost > limits::TOKENS) {
        refusal.violation(field("actual_cost"), "above 10^12 tokens, the most a policy can have");
    }
}

fn delta(refusal: &mut Refusal, index: usize, delta: &CircuitDelta) {
    let field = |name: &str| format!("deltas[{index}].{name}");
    if delta.handle != 0 {
        refusal.violation(field("handle"), NO_HANDLE);
    }
    refusal.required(&delta.policy, "policy", || field("policy"));
    refusal.at_most(limits::KEY_BYTES, &delta.key, || field("key"));
    for (name, calls) in [
        ("successes", delta.successes),
        ("failures", delta.failures),
        ("slow", delta.slow),
        ("ignored", delta.ignored),
        ("local_failures", delta.local_failures),
        ("requests", delta.requests),
        ("retries", delta.retries),
    ] {
        if calls > limits::DELTA_CALLS {
            refusal.violation(field(name), "above 10^9, the most that a delta counts");
        }
    }
    let calls = delta.successes.saturating_add(delta.failures);
    if delta.slow > calls {
        let message = "more than successes and failures together, which it is some of";
        refusal.violation(field("slow"), message);
    }
    let buckets = delta.latency_counts.len();
    if buckets > limits::LATENCIES {
        let message = format!("{buckets} buckets; at most {}", limits::LATENCIES);
        refusal.violation(field("latency_counts"), message);
    }
    let timed = delta.latency_counts.iter().fold(0, |sum: u64, one| sum.saturating_add(*one));
    if timed > calls {
        let message = "more calls than successes and failures together";
        refusal.violation(field("latency_counts"), message);
    }
    let kinds = delta.error_kinds.len();
    if kinds > limits::ERROR_KINDS {
        let message = format!("{kinds} kinds; at most {}", limits::ERROR_KINDS);
        refusal.violation(field("error_kinds"), message);
    }
    for (index, kind) in delta.error_kinds.iter().enumerate().take(limits::ERROR_KINDS) {
        let field = || field(&format!("error_kinds[{index}]"));
        refusal.at_most(limits::ERROR_KIND_BYTES, kind, field);
        if kind.is_empty() {
            refusal.violation(field(), "empty; leave it out");
        }
    }
}

/// What an Acquire and an entry of a batch, which has an index, have in common; `named` if the caller says
/// who it is.
fn entry(refusal: &mut Refusal, index: Option<usize>, named: bool, request: &AcquireRequest) {
    let field = |name: &str| in_entry(index) + name;
    if index.is_some() && request.client.is_some() {
        let message = "the batch names the client once; leave it out here";
        refusal.violation(field("client"), message);
    }
    if index.is_some() && request.max_wait.is_some() {
        refusal.violation(field("max_wait"), "nobody waits inside a batch; leave it out");
    }
    refusal.at_most(limits::REQUEST_ID_BYTES, &request.request_id, || field("request_id"));
    if !request.request_id.is_empty() && !named {
        refusal.violation("client.id", "required: a request_id is a client's own");
    }
    if Priority::try_from(request.priority).is_err() {
        refusal.violation(field("priority"), "not a priority");
    }

    let asks = &request.asks;
    if asks.is_empty() || asks.len() > limits::ASKS {
        refusal.violation(field("asks"), count("asks", asks.len(), limits::ASKS));
        return;
    }
    let (mut estimated, mut leased) = (0, 0);
    for (ask, one) in asks.iter().enumerate() {
        let field = |name: &str| format!("{}asks[{ask}].{name}", in_entry(index));
        leased += usize::from(one.lease > 0);
        if one.lease > limits::TOKENS {
            refusal.violation(field("lease"), "above 10^12 tokens, the most a policy can have");
        }
        if one.lease > 0 && leased > 1 {
            refusal.violation(field("lease"), "one ask of an Acquire may want a lease");
        }
        if one.lease > 0 && !named {
            refusal.violation("client.id", "required: a lease is a client's own");
        }
        if one.handle != 0 {
            refusal.violation(field("handle"), NO_HANDLE);
        }
        refusal.required(&one.policy, "policy", || field("policy"));
        refusal.at_most(limits::KEY_BYTES, &one.key, || field("key"));
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

/// Who calls: its id, if it says anything.
pub(super) fn client(refusal: &mut Refusal, client: Option<&v1::Client>) {
    let Some(client) = client else { return };
    if client.id.is_empty() {
        refusal.violation("client.id", "required: new for each process");
    }
    for (field, text) in [
        ("client.id", &client.id),
        ("client.service", &client.service),
        ("client.zone", &client.zone),
    ] {
        refusal.at_most(limits::CLIENT_BYTES, text, || field.into());
    }
}

pub(super) fn accepted_client(client: &v1::Client) -> Client<'_> {
    Client { id: &client.id, service: &client.service, zone: &client.zone }
}

fn count(what: &str, count: usize, most: usize) -> String {
    format!("{count} {what}; 1 to {most} are needed")
}

/// What a request asks, once nothing about it is refused.
fn accepted(request: &AcquireRequest) -> Entry<impl Iterator<Item = app::Ask<'_>>> {
    let asks = request.asks.iter().map(|ask| app::Ask {
        policy: &ask.policy,
        key: &ask.key,
        cost: ask.cost.unwrap_or(1),
        estimated: ask.estimated,
        lease: ask.lease,
    });
    let priority = match request.priority() {
        Priority::Critical => app::Priority::Critical,
        Priority::Unspecified | Priority::Normal => app::Priority::Normal,
        Priority::Bulk => app::Priority::Bulk,
    };
    Entry { asks, priority, retry: request.attempt > 0 }
}
