//! From operators' messages to what cannot be wrong.

use std::time::Duration;

use fusebox_core::circuit::{Generation, Mode, State};
use fusebox_proto::v1::{
    CircuitMode, CircuitState, DeletePolicyRequest, ListBucketsRequest, ListCircuitsRequest,
    ListClientsRequest, ListEventsRequest, ListPoliciesRequest, PutPolicyRequest,
    SetCircuitModeRequest, TopKeysRequest,
};

use super::{page::Page, policy};
use crate::{
    app::{
        GrantName,
        admin::{DeletePolicy, PutPolicy, SetMode},
    },
    catalogue::PolicyName,
    config::Name,
    grpc::status::Refusal,
    limits,
};

/// One page of circuits.
pub(super) struct CircuitsPage<'a> {
    /// Only of this breaker.
    pub(super) policy: Option<&'a str>,
    /// Only in this state.
    pub(super) state: Option<State>,
    /// Only in this mode.
    pub(super) mode: Option<Mode>,
    /// The page.
    pub(super) page: Page,
}

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

/// One page of circuits, and which are wanted: those of what stays empty are all.
pub(super) fn circuits(request: &ListCircuitsRequest) -> Result<CircuitsPage<'_>, Refusal> {
    let ListCircuitsRequest { namespace, policy, state, mode, page_size, page_token } = request;
    let mut refusal = Refusal::default();
    refusal.required(namespace, "namespace", || "namespace".into());
    if CircuitState::try_from(*state).is_err() {
        refusal.violation("state", "not a state");
    }
    if CircuitMode::try_from(*mode).is_err() {
        refusal.violation("mode", "not a mode");
    }
    let (state, mode) = (request.state(), request.mode());
    let scope = ["circuits", namespace, policy, state.as_str_name(), mode.as_str_name()];
    let page = Page::of(&mut refusal, *page_size, page_token, &scope);
    let state = match state {
        CircuitState::Unspecified => None,
        CircuitState::Closed => Some(State::Closed),
        CircuitState::Open => Some(State::Open),
        CircuitState::HalfOpen => Some(State::HalfOpen),
    };
    refusal.or_else(|| CircuitsPage { policy: wanted(policy), state, mode: self::mode(mode), page })
}

pub(super) fn set_mode(request: SetCircuitModeRequest) -> Result<SetMode, Refusal> {
    let mut refusal = Refusal::default();
    let mode = CircuitMode::try_from(request.mode).ok().and_then(mode);
    let SetCircuitModeRequest { namespace, policy, key, reason, ttl, expected_generation, .. } =
        request;
    let name = named(&mut refusal, &namespace, &policy, "policy");
    refusal.at_most(limits::KEY_BYTES, &key, || "key".into());
    required_reason(&mut refusal, &reason);
    let ttl = match (mode, ttl) {
        (Some(Mode::Normal), None) => Duration::ZERO,
        (Some(Mode::Normal), Some(_)) => {
            let message = "not of CIRCUIT_MODE_NORMAL, which lasts: leave it unset";
            refusal.violation("ttl", message);
            Duration::ZERO
        }
        (_, ttl) => {
            let ttl = ttl.and_then(|ttl| Duration::try_from(ttl).ok());
            let ttl = ttl.filter(|ttl| limits::MODE_TTLS.contains(ttl));
            if ttl.is_none() {
                let message = "required: 1 s to 30 days, after which the circuit is normal again";
                refusal.violation("ttl", message);
            }
            ttl.unwrap_or_default()
        }
    };
    if mode.is_none() {
        refusal.violation("mode", "required: what the circuit is to be");
    }
    let expected = expected_generation.map(Generation);
    // Without a mode something was refused.
    match mode {
        Some(mode) => refusal.or_else(|| SetMode { name, key, mode, ttl, reason, expected }),
        None => Err(refusal),
    }
}

/// A mode that is said.
const fn mode(mode: CircuitMode) -> Option<Mode> {
    match mode {
        CircuitMode::Unspecified => None,
        CircuitMode::Normal => Some(Mode::Normal),
        CircuitMode::ForcedOpen => Some(Mode::ForcedOpen),
        CircuitMode::Disabled => Some(Mode::Disabled),
        CircuitMode::MetricsOnly => Some(Mode::MetricsOnly),
    }
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
