//! From what operators asked for to messages.

use std::time::Duration;

use fusebox_core::{
    Moment, Time,
    circuit::{self, Transition},
};
use fusebox_proto::v1::{
    self, CircuitCause, DeletePolicyResponse, InspectCircuitResponse, NamedPolicy, PolicyChange,
    PolicySource, PutPolicyResponse, ServerInfoResponse, StorageEngine, TopKeysResponse,
};
use prost_types::Timestamp;

use super::policy::{durability_message, message};
use crate::{
    app::{
        admin::{
            Bucket, CircuitInspected, CircuitTold, ClientStatus, Holding, Info, PolicyDeleted,
            PolicyPut,
        },
        events::{Action, Event},
        top_keys::Ranking,
    },
    catalogue::{
        PolicyName,
        registry::{Configured, Source},
    },
    grpc::respond::{circuit_evidence, circuit_mode, circuit_state, duration, evidence},
    limits,
};

pub(super) fn put(name: &PolicyName, put: PolicyPut) -> PutPolicyResponse {
    let PolicyPut { configured, differences, live_cells } = put;
    let changes = differences.into_iter().map(|one| PolicyChange {
        field: one.field,
        before: one.before,
        after: one.after,
    });
    PutPolicyResponse {
        policy: Some(named(name, &configured)),
        changes: changes.collect(),
        live_cells: live_cells as u64,
    }
}

pub(super) fn deleted(name: &PolicyName, deleted: &PolicyDeleted) -> DeletePolicyResponse {
    DeletePolicyResponse {
        policy: Some(named(name, &deleted.configured)),
        live_cells: deleted.live_cells as u64,
        open_grants: deleted.open_grants as u64,
    }
}

pub(super) fn named(name: &PolicyName, configured: &Configured) -> NamedPolicy {
    let source = match configured.source {
        Source::File => PolicySource::File,
        Source::Admin => PolicySource::Admin,
        Source::Envoy => PolicySource::Envoy,
    };
    NamedPolicy {
        namespace: name.namespace.to_string(),
        name: name.policy.to_string(),
        policy: Some(message(&configured.settings)),
        version: configured.version,
        source: source.into(),
        created: Some(timestamp(configured.created)),
        updated: Some(timestamp(configured.updated)),
    }
}

pub(super) fn bucket(bucket: Bucket) -> v1::Bucket {
    let limits = bucket.limits.iter().map(|limit| v1::BucketLimit {
        limit: limit.limit,
        remaining: limit.remaining,
        reset_after: limit.reset_after.map(duration),
        spent: limit.spent,
        out: limit.out,
    });
    v1::Bucket {
        limits: limits.collect(),
        permits_held: bucket.permits_held,
        overflow: bucket.overflow,
        waiting: bucket.waiting as u64,
        live: bucket.live,
        key: bucket.key,
    }
}

pub(super) fn ranking(ranking: Ranking) -> TopKeysResponse {
    let keys = ranking.keys.into_iter().map(|top| v1::TopKey {
        key: top.key,
        count: top.count,
        error: top.error,
    });
    TopKeysResponse {
        keys: keys.collect(),
        sample_one_in: ranking.sample_one_in,
        halved_every: Some(duration(limits::TOP_KEYS_HALVED)),
    }
}

pub(super) fn client(id: &str, status: ClientStatus) -> v1::ClientStatus {
    let ClientStatus { service, zone, last_seen, open_grants, permits, leased, grants } = status;
    v1::ClientStatus {
        client: Some(v1::Client { id: id.to_owned(), service, zone }),
        last_seen: last_seen.map(duration),
        open_grants: open_grants as u64,
        permits,
        leased_tokens: leased,
        grants: grants.iter().map(holding).collect(),
    }
}

pub(super) fn holding(held: &Holding) -> v1::OpenGrant {
    v1::OpenGrant {
        grant_id: held.name.to_string(),
        namespace: held.policy.namespace.to_string(),
        policy: held.policy.policy.to_string(),
        permits: held.permits,
        leased_tokens: held.leased,
        estimated_tokens: held.estimated,
        expires_in: Some(duration(held.expires_in)),
    }
}

/// A circuit as operators are told of it.
pub(super) fn circuit_of(told: &CircuitTold) -> v1::Circuit {
    let CircuitTold { policy, key, view, says, live, now } = told;
    let left = |until: Time| duration(Duration::from_nanos(until.nanos_since(now.time)));
    // Of one that is closed also what its calls say, if there are any.
    let mut why = circuit_evidence(view, now.time);
    if let Some(says) = says.as_ref().filter(|says| says.calls > 0) {
        let forced_reason = why.unwrap_or_default().forced_reason;
        why = Some(v1::Evidence { forced_reason, ..evidence(says) });
    }
    v1::Circuit {
        policy: policy.to_string(),
        key: key.to_string(),
        state: circuit_state(view.phase.state()).into(),
        mode: circuit_mode(view.phase.mode()).into(),
        generation: view.generation.0,
        since: live.then(|| wall_time(view.since, *now)),
        open_for: view.half_open_at.map(left),
        ramp_basis_points: view.ramp.map(|share| share.basis_points().into()),
        evidence: why,
        forced_by: view.forced.as_ref().map(|forced| forced.actor.to_string()).unwrap_or_default(),
        mode_expires_in: view.forced.as_ref().map(|forced| left(forced.until)),
    }
}

pub(super) fn inspected(inspected: &CircuitInspected) -> InspectCircuitResponse {
    let CircuitInspected { calls, aside, latencies: [p50, p99], exceeded, .. } = inspected;
    let calls = v1::CircuitCalls {
        calls: calls.calls,
        failure_rate_basis_points: calls.failure_rate.basis_points().into(),
        slow_rate_basis_points: calls.slow_rate.basis_points().into(),
        ignored: aside.ignored,
        local_failures: aside.local_failures,
        latency_p50: p50.map(duration),
        latency_p99: p99.map(duration),
        would_open_by_failures: exceeded.failures,
        would_open_by_slow_calls: exceeded.slow,
    };
    let reporters = inspected.reporters.iter().map(|reporter| v1::CircuitReporter {
        client_id: reporter.id.clone(),
        zone: reporter.zone.clone(),
        calls: reporter.counts.calls.into(),
        failures: reporter.counts.failures.into(),
        slow: reporter.counts.slow.into(),
        unhealthy: reporter.unhealthy,
    });
    let probes = inspected.probes.iter().map(|(age, expires_in)| v1::CircuitProbe {
        age: Some(duration(*age)),
        expires_in: Some(duration(*expires_in)),
    });
    let now = inspected.circuit.now;
    InspectCircuitResponse {
        circuit: Some(circuit_of(&inspected.circuit)),
        calls: Some(calls),
        reporters: reporters.collect(),
        probes: probes.collect(),
        history: inspected.history.iter().map(|one| transition(one, now)).collect(),
    }
}

fn transition(one: &Transition, now: Moment) -> v1::CircuitTransition {
    let cause = match (one.event, &one.order) {
        (circuit::Event::Tripped, _) => CircuitCause::Tripped,
        (circuit::Event::Asked, _) => CircuitCause::Asked,
        (circuit::Event::Passed, _) => CircuitCause::ProbesPassed,
        (circuit::Event::Failed, _) => CircuitCause::ProbesFailed,
        (circuit::Event::Set(_), Some(_)) => CircuitCause::Operator,
        (circuit::Event::Set(_), None) => CircuitCause::ModeExpired,
        // It begins a generation, and is not remembered.
        (circuit::Event::Restarted, _) => CircuitCause::Unspecified,
    };
    let (reason, actor) = match &one.order {
        Some((reason, actor)) => (reason.to_string(), actor.to_string()),
        None => Default::default(),
    };
    v1::CircuitTransition {
        generation: one.generation.0,
        time: Some(wall_time(one.at, now)),
        cause: cause.into(),
        state: circuit_state(one.phase.state()).into(),
        mode: circuit_mode(one.phase.mode()).into(),
        evidence: one.evidence.as_deref().map(evidence),
        reason,
        actor,
    }
}

/// When that was, by the wall clock as it is now.
fn wall_time(at: Time, now: Moment) -> Timestamp {
    let age = now.time.nanos_since(at);
    timestamp(Duration::from_nanos(now.wall.as_nanos().saturating_sub(age)))
}

pub(super) fn event(Event { number, at, change }: &Event) -> v1::Event {
    let action = match change.action {
        Action::PolicyCreated => v1::EventAction::PolicyCreated,
        Action::PolicyChanged => v1::EventAction::PolicyChanged,
        Action::PolicyDeleted => v1::EventAction::PolicyDeleted,
        Action::BucketReset => v1::EventAction::BucketReset,
        Action::GrantReleased => v1::EventAction::GrantReleased,
        Action::RulesChanged => v1::EventAction::RulesChanged,
        Action::CircuitModeSet => v1::EventAction::CircuitModeSet,
    };
    v1::Event {
        number: *number,
        time: Some(timestamp(*at)),
        actor: change.actor.clone(),
        action: action.into(),
        namespace: change.namespace.clone(),
        policy: change.policy.clone(),
        key: change.key.clone(),
        reason: change.reason.clone(),
        before: change.before.clone(),
        after: change.after.clone(),
    }
}

pub(super) fn info(info: Info) -> ServerInfoResponse {
    let engine = if info.keeps { StorageEngine::Sled } else { StorageEngine::Memory };
    ServerInfoResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        boot: info.boot,
        uptime: Some(duration(info.uptime)),
        storage_engine: engine.into(),
        durability: durability_message(info.durability).into(),
        live_cells: info.live_cells as u64,
        policies: info.policies as u64,
        rules: info.rules as u64,
        open_grants: info.open_grants as u64,
        waiting: info.waiting as u64,
        truth_id: info.truth_id,
        circuits: info.circuits as u64,
        watchers: info.watchers as u64,
        sessions: info.sessions as u64,
    }
}

fn timestamp(since_epoch: Duration) -> Timestamp {
    let prost_types::Duration { seconds, nanos } = duration(since_epoch);
    Timestamp { seconds, nanos }
}
