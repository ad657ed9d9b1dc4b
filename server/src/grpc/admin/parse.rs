//! From operators' messages to what cannot be wrong.

use fusebox_proto::v1::{
    DeletePolicyRequest, ListBucketsRequest, ListClientsRequest, ListEventsRequest,
    ListPoliciesRequest, PutPolicyRequest, TopKeysRequest,
};

use super::{page::Page, policy};
use crate::{
    app::{
        GrantName,
        admin::{DeletePolicy, PutPolicy},
    },
    catalogue::PolicyName,
    config::Name,
    grpc::status::Refusal,
    limits,
};

pub(super) fn put_policy(request: PutPolicyRequest) -> Result<PutPolicy, Refusal> {
    let PutPolicyRequest { namespace, name, policy, expected_version, dry_run, reason } = request;
    let mut refusal = Refusal::default();
    for (field, name) in [("namespace", &namespace), ("name", &name)] {
        if let Err(message) = Name::try_from(name.clone()) {
            refusal.violation(field, message);
        }
    }
    refusal.at_most(limits::REASON_BYTES, &reason, || "reason".into());
    let name = PolicyName::new(&namespace, &name);
    let settings = policy.as_ref().and_then(|policy| policy::settings(&mut refusal, policy));
    if policy.is_none() {
        refusal.violation("policy", "required: all settings");
    }
    // Without settings something was refused.
    let put = settings.map(|settings| PutPolicy {
        name,
        settings,
        expected: expected_version,
        dry_run,
        reason,
    });
    match put {
        Some(put) => refusal.or_else(|| put),
        None => Err(refusal),
    }
}

pub(super) fn delete_policy(request: DeletePolicyRequest) -> Result<DeletePolicy, Refusal> {
    let DeletePolicyRequest { namespace, name, expected_version: expected, dry_run, reason } =
        request;
    let mut refusal = Refusal::default();
    let name = named(&mut refusal, &namespace, &name, "name");
    refusal.at_most(limits::REASON_BYTES, &reason, || "reason".into());
    if expected == Some(0) {
        refusal.violation("expected_version", "versions begin at 1; leave it unset for any");
    }
    refusal.or_else(|| DeletePolicy { name, expected, dry_run, reason })
}

pub(super) fn policy_name(namespace: &str, name: &str) -> Result<PolicyName, Refusal> {
    let mut refusal = Refusal::default();
    let name = named(&mut refusal, namespace, name, "name");
    refusal.or_else(|| name)
}

pub(super) fn policies(request: &ListPoliciesRequest) -> Result<Page, Refusal> {
    let mut refusal = Refusal::default();
    let scope = ["policies", &request.namespace];
    let page = Page::of(&mut refusal, request.page_size, &request.page_token, &scope);
    refusal.or_else(|| page)
}

pub(super) fn bucket(namespace: &str, policy: &str, key: &str) -> Result<PolicyName, Refusal> {
    let mut refusal = Refusal::default();
    let name = named(&mut refusal, namespace, policy, "policy");
    refusal.at_most(limits::KEY_BYTES, key, || "key".into());
    refusal.or_else(|| name)
}

pub(super) fn buckets(request: &ListBucketsRequest) -> Result<(PolicyName, Page), Refusal> {
    let ListBucketsRequest { namespace, policy, key_prefix, page_size, page_token } = request;
    let mut refusal = Refusal::default();
    let name = named(&mut refusal, namespace, policy, "policy");
    refusal.at_most(limits::KEY_BYTES, key_prefix, || "key_prefix".into());
    let scope = ["buckets", namespace, policy, key_prefix];
    let page = Page::of(&mut refusal, *page_size, page_token, &scope);
    refusal.or_else(|| (name, page))
}

pub(super) fn top_keys(request: &TopKeysRequest) -> Result<(PolicyName, usize), Refusal> {
    let mut refusal = Refusal::default();
    let name = named(&mut refusal, &request.namespace, &request.policy, "policy");
    let count = usize::try_from(request.count).unwrap_or(usize::MAX);
    if count > limits::TOP_KEYS {
        let most = limits::TOP_KEYS;
        refusal.violation("count", format!("{count} keys; at most {most} are counted"));
    }
    refusal.or_else(|| (name, if count == 0 { limits::TOP_KEYS_TOLD } else { count }))
}

pub(super) fn reset(
    namespace: &str,
    policy: &str,
    key: &str,
    reason: &str,
) -> Result<PolicyName, Refusal> {
    let mut refusal = Refusal::default();
    let name = named(&mut refusal, namespace, policy, "policy");
    refusal.at_most(limits::KEY_BYTES, key, || "key".into());
    required_reason(&mut refusal, reason);
    refusal.or_else(|| name)
}

pub(super) fn clients(request: &ListClientsRequest) -> Result<Page, Refusal> {
    let ListClientsRequest { namespace, client_id, page_size, page_token } = request;
    let mut refusal = Refusal::default();
    refusal.at_most(limits::CLIENT_BYTES, client_id, || "client_id".into());
    let page = Page::of(&mut refusal, *page_size, page_token, &["clients", namespace, client_id]);
    refusal.or_else(|| page)
}

/// The grant of an id; `None` if no grant has such a one.
pub(super) fn release(id: &str, reason: &str) -> Result<Option<GrantName>, Refusal> {
    let mut refusal = Refusal::default();
    if id.is_empty() {
        refusal.violation("grant_id", "required: as ListClients tells it");
    }
    refusal.at_most(limits::GRANT_ID_BYTES, id, || "grant_id".into());
    required_reason(&mut refusal, reason);
    refusal.or_else(|| id.parse().ok())
}

pub(super) fn events(request: &ListEventsRequest) -> Result<Page, Refusal> {
    let ListEventsRequest { namespace, policy, page_size, page_token } = request;
    let mut refusal = Refusal::default();
    if namespace.is_empty() && !policy.is_empty() {
        refusal.violation("namespace", "required beside `policy`");
    }
    let page = Page::of(&mut refusal, *page_size, page_token, &["events", namespace, policy]);
    if page.after.as_ref().is_some_and(|last| last.parse::<u64>().is_err()) {
        refusal.violation("page_token", "not one that this server gave");
    }
    refusal.or_else(|| page)
}

/// What a filter is to let through; empty is all.
pub(super) fn wanted(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

fn named(refusal: &mut Refusal, namespace: &str, policy: &str, field: &str) -> PolicyName {
    refusal.required(namespace, "namespace", || "namespace".into());
    refusal.required(policy, "policy", || field.into());
    PolicyName::new(namespace, policy)
}

fn required_reason(refusal: &mut Refusal, reason: &str) {
    if reason.is_empty() {
        refusal.violation("reason", "required: why, for the events");
    }
    refusal.at_most(limits::REASON_BYTES, reason, || "reason".into());
}
