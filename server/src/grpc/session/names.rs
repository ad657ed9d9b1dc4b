//! What a session says once: who calls, and in which namespace; and what its handles stand for.

use std::sync::Arc;

use fusebox_proto::v1::{
    self, AcquireBatchRequest, AcquireRequest, Ask, CircuitDelta, Hello, ReportRequest,
    WatchRequest,
};
use tonic::Status;

use super::Bindings;
use crate::{
    app::{App, Caller},
    grpc::{
        parse::{self, in_entry},
        status::Refusal,
    },
};

/// Who calls: filled in where a call would name it, so that a request means what the call would.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub(super) namespace: String,
    client: v1::Client,
    /// The client's id again, to be shared.
    pub(super) client_id: Arc<str>,
}

impl Names {
    pub(super) fn of(Hello { namespace, client }: Hello) -> Self {
        let client = client.unwrap_or_default();
        Self { namespace, client_id: client.id.as_str().into(), client }
    }

    /// Notes that the client is there.
    pub(super) fn seen(&self, app: &App, caller: Caller) {
        app.see(&self.namespace, parse::accepted_client(&self.client), caller);
    }

    pub(super) fn of_acquire(
        &self,
        request: &mut AcquireRequest,
        bindings: &Bindings,
    ) -> Result<(), Status> {
        let mut refusal = Refusal::default();
        let AcquireRequest { namespace, client, asks, .. } = request;
        self.fill(&mut refusal, namespace, client);
        resolve_asks(&mut refusal, None, asks, bindings);
        Ok(refusal.or_else(|| ())?)
    }

    pub(super) fn of_batch(
        &self,
        request: &mut AcquireBatchRequest,
        bindings: &Bindings,
    ) -> Result<(), Status> {
        let mut refusal = Refusal::default();
        let AcquireBatchRequest { namespace, client, requests } = request;
        self.fill(&mut refusal, namespace, client);
        for (index, entry) in requests.iter_mut().enumerate() {
            resolve_asks(&mut refusal, Some(index), &mut entry.asks, bindings);
        }
        Ok(refusal.or_else(|| ())?)
    }

    pub(super) fn of_report(
        &self,
        request: &mut ReportRequest,
        bindings: &Bindings,
    ) -> Result<(), Status> {
        let mut refusal = Refusal::default();
        let ReportRequest { namespace, client, deltas, .. } = request;
        self.fill(&mut refusal, namespace, client);
        for (index, delta) in deltas.iter_mut().enumerate() {
            let CircuitDelta { handle, policy, key, .. } = delta;
            let field = || format!("deltas[{index}].handle");
            resolve(&mut refusal, (handle, policy, key), bindings, field);
        }
        Ok(refusal.or_else(|| ())?)
    }

    pub(super) fn of_watch(&self, request: &mut WatchRequest) -> Result<(), Status> {
        let mut refusal = Refusal::default();
        self.fill(&mut refusal, &mut request.namespace, &mut request.client);
        Ok(refusal.or_else(|| ())?)
    }

    /// Says who calls, unless the request says so itself.
    fn fill(&self, refusal: &mut Refusal, namespace: &mut String, client: &mut Option<v1::Client>) {
        if !namespace.is_empty() {
            refusal.violation("namespace", "the session names it once; leave it out here");
        }
        if client.is_some() {
            refusal.violation("client", "the session names it once; leave it out here");
        }
        namespace.clone_from(&self.namespace);
        *client = Some(self.client.clone());
    }
}

fn resolve_asks(
    refusal: &mut Refusal,
    entry: Option<usize>,
    asks: &mut [Ask],
    bindings: &Bindings,
) {
    for (index, ask) in asks.iter_mut().enumerate() {
        let Ask { handle, policy, key, .. } = ask;
        let field = || format!("{}asks[{index}].handle", in_entry(entry));
        resolve(refusal, (handle, policy, key), bindings, field);
    }
}

/// Names what a handle stands for, if there is one.
fn resolve(
    refusal: &mut Refusal,
    (handle, policy, key): (&mut u32, &mut String, &mut String),
    bindings: &Bindings,
    field: impl FnOnce() -> String,
) {
    if *handle == 0 {
        return;
    }
    if !policy.is_empty() || !key.is_empty() {
        refusal.violation(field(), "it stands for policy and key; leave them out, or the handle");
        return;
    }
    let Some(bound) = bindings.of(*handle) else {
        refusal.violation(field(), format!("{handle} is not bound on this session"));
        return;
    };
    policy.clone_from(&bound.policy);
    key.clone_from(&bound.key);
    *handle = 0;
}
