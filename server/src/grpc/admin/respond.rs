//! From what operators asked for to messages.

use std::time::Duration;

use fusebox_proto::v1::{
    self, DeletePolicyResponse, NamedPolicy, PolicyChange, PolicySource, PutPolicyResponse,
    ServerInfoResponse, StorageEngine, TopKeysResponse,
};
use prost_types::Timestamp;

use super::policy::{durability_message, message};
use crate::{
    app::{
        admin::{Bucket, ClientStatus, Holding, Info, PolicyDeleted, PolicyPut},
        events::{Action, Event},
        top_keys::Ranking,
    },
    catalogue::{
        PolicyName,
        registry::{Configured, Source},
    },
    grpc::respond::duration,
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

pub(super) fn event(Event { number, at, change }: &Event) -> v1::Event {
    let action = match change.action {
        Action::PolicyCreated => v1::EventAction::PolicyCreated,
        Action::PolicyChanged => v1::EventAction::PolicyChanged,
        Action::PolicyDeleted => v1::EventAction::PolicyDeleted,
        Action::BucketReset => v1::EventAction::BucketReset,
        Action::GrantReleased => v1::EventAction::GrantReleased,
        Action::RulesChanged => v1::EventAction::RulesChanged,
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
        circuits: 0,
        watchers: 0,
    }
}

fn timestamp(since_epoch: Duration) -> Timestamp {
    let prost_types::Duration { seconds, nanos } = duration(since_epoch);
    Timestamp { seconds, nanos }
}
