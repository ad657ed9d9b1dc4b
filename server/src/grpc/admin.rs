//! The gRPC service of operators: parses, asks the app, and answers.

mod page;
mod parse;
pub(super) mod policy;
mod respond;

use std::sync::Arc;

use fusebox_proto::v1::{
    DeletePolicyRequest, DeletePolicyResponse, GetPolicyRequest, GetPolicyResponse,
    InspectBucketRequest, InspectBucketResponse, InspectCircuitRequest, InspectCircuitResponse,
    ListBucketsRequest, ListBucketsResponse, ListCircuitsRequest, ListCircuitsResponse,
    ListClientsRequest, ListClientsResponse, ListEventsRequest, ListEventsResponse,
    ListPoliciesRequest, ListPoliciesResponse, PutPolicyRequest, PutPolicyResponse,
    ReleaseGrantRequest, ReleaseGrantResponse, ResetBucketRequest, ResetBucketResponse,
    ServerInfoRequest, ServerInfoResponse, SetCircuitModeRequest, SetCircuitModeResponse,
    TopKeysRequest, TopKeysResponse, admin_server::Admin as Methods,
};
use tonic::{Request, Response, Status};

use self::parse::CircuitsPage;
use super::{arrive, status};
use crate::{
    app::{
        App, Caller,
        admin::{AdminError, CircuitFilter, ClientFilter, ModeSet},
        events::Filter,
    },
    catalogue::{
        PolicyName,
        registry::{Configured, Source},
    },
    lifecycle::Lifecycle,
};

/// `fusebox.v1.Admin`.
pub struct Admin {
    lifecycle: Arc<Lifecycle>,
}

impl Admin {
    /// A service that answers once `lifecycle` is ready.
    pub fn new(lifecycle: Arc<Lifecycle>) -> Self {
        Self { lifecycle }
    }

    fn arrive(&self) -> Result<(&Arc<App>, Caller), Status> {
        arrive(&self.lifecycle)
    }

    /// Refuses the name of a rule: no policy could have it, but where it is written says more than that.
    fn refuse_rule(&self, namespace: &str, name: &str) -> Result<(), Status> {
        let (app, _) = self.arrive()?;
        let name = PolicyName::new(namespace, name);
        match app.policy(&name) {
            Ok(Configured { source: Source::Envoy, .. }) => {
                Err(status::admin(&AdminError::ManagedByRules(name)))
            }
            _ => Ok(()),
        }
    }

    /// Makes a change, to its end also where the caller goes away: what is on disk must be in force.
    async fn change<T, F>(
        &self,
        change: impl FnOnce(Arc<App>, Caller) -> F + Send,
    ) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, AdminError>> + Send + 'static,
    {
        let (app, caller) = self.arrive()?;
        let made = tokio::spawn(change(Arc::clone(app), caller)).await;
        let made = made.map_err(|_| Status::unavailable("it stopped; perhaps it is changed"))?;
        made.map_err(|error| status::admin(&error))
    }
}

#[tonic::async_trait]
impl Methods for Admin {
    async fn put_policy(
        &self,
        request: Request<PutPolicyRequest>,
    ) -> Result<Response<PutPolicyResponse>, Status> {
        let request = request.into_inner();
        self.refuse_rule(&request.namespace, &request.name)?;
        let put = parse::put_policy(request)?;
        let name = put.name.clone();
        let put =
            self.change(|app, caller| async move { app.put_policy(caller.principal, put).await });
        Ok(Response::new(respond::put(&name, put.await?)))
    }

    async fn get_policy(
        &self,
        request: Request<GetPolicyRequest>,
    ) -> Result<Response<GetPolicyResponse>, Status> {
        let GetPolicyRequest { namespace, name } = request.into_inner();
        let name = parse::policy_name(&namespace, &name)?;
        let (app, _) = self.arrive()?;
        let policy = app.policy(&name).map_err(|error| status::admin(&error))?;
        let policy = Some(respond::named(&name, &policy));
        Ok(Response::new(GetPolicyResponse { policy }))
    }

    async fn list_policies(
        &self,
        request: Request<ListPoliciesRequest>,
    ) -> Result<Response<ListPoliciesResponse>, Status> {
        let request = request.into_inner();
        let page = parse::policies(&request)?;
        let after = page.after.as_deref().map(|last| {
            let (namespace, policy) = last.split_once('/').unwrap_or((last, ""));
            PolicyName::new(namespace, policy)
        });
        let (app, _) = self.arrive()?;
        let policies = app.policies(parse::wanted(&request.namespace), after.as_ref(), page.more());
        let policies = policies.map_err(|error| status::admin(&error))?;
        let (policies, next_page_token) = page.fill(
            policies,
            |(name, _)| name.to_string(),
            |(name, policy)| respond::named(&name, &policy),
        );
        Ok(Response::new(ListPoliciesResponse { policies, next_page_token }))
    }

    async fn delete_policy(
        &self,
        request: Request<DeletePolicyRequest>,
    ) -> Result<Response<DeletePolicyResponse>, Status> {
        let delete = parse::delete_policy(request.into_inner())?;
        let name = delete.name.clone();
        let deleted = self
            .change(|app, caller| async move { app.delete_policy(caller.principal, delete).await });
        Ok(Response::new(respond::deleted(&name, &deleted.await?)))
    }

    async fn inspect_bucket(
        &self,
        request: Request<InspectBucketRequest>,
    ) -> Result<Response<InspectBucketResponse>, Status> {
        let InspectBucketRequest { namespace, policy, key } = request.into_inner();
        let name = parse::bucket(&namespace, &policy, &key)?;
        let (app, _) = self.arrive()?;
        let bucket = app.inspect(&name, &key).map_err(|error| status::admin(&error))?;
        let bucket = Some(respond::bucket(bucket));
        Ok(Response::new(InspectBucketResponse { bucket }))
    }

    async fn list_buckets(
        &self,
        request: Request<ListBucketsRequest>,
    ) -> Result<Response<ListBucketsResponse>, Status> {
        let request = request.into_inner();
        let (name, page) = parse::buckets(&request)?;
        let (app, _) = self.arrive()?;
        let listed = app.buckets(&name, &request.key_prefix, page.after.as_deref(), page.count);
        let listed = listed.map_err(|error| status::admin(&error))?;
        let next_page_token = listed.next.map(|last| page.token(&last)).unwrap_or_default();
        Ok(Response::new(ListBucketsResponse {
            buckets: listed.buckets.into_iter().map(respond::bucket).collect(),
            next_page_token,
            unnamed_buckets: listed.unnamed as u64,
        }))
    }

    async fn top_keys(
        &self,
        request: Request<TopKeysRequest>,
    ) -> Result<Response<TopKeysResponse>, Status> {
        let (name, count) = parse::top_keys(&request.into_inner())?;
        let (app, _) = self.arrive()?;
        let ranking = app.top_keys(&name, count).map_err(|error| status::admin(&error))?;
        Ok(Response::new(respond::ranking(ranking)))
    }

    async fn reset_bucket(
        &self,
        request: Request<ResetBucketRequest>,
    ) -> Result<Response<ResetBucketResponse>, Status> {
        let ResetBucketRequest { namespace, policy, key, reason } = request.into_inner();
        let name = parse::reset(&namespace, &policy, &key, &reason)?;
        let reset = self.change(|app, caller| async move {
            app.reset(caller.principal, &name, &key, reason).await
        });
        let (before, after) = reset.await?;
        let (before, after) = (Some(respond::bucket(before)), Some(respond::bucket(after)));
        Ok(Response::new(ResetBucketResponse { before, after }))
    }

    async fn list_clients(
        &self,
        request: Request<ListClientsRequest>,
    ) -> Result<Response<ListClientsResponse>, Status> {
        let request = request.into_inner();
        let page = parse::clients(&request)?;
        let filter = ClientFilter {
            namespace: parse::wanted(&request.namespace),
            id: parse::wanted(&request.client_id),
            after: page.after.as_deref(),
        };
        let (app, _) = self.arrive()?;
        let clients = app.clients(filter, page.more());
        let (clients, next_page_token) = page.fill(
            clients.map_err(|error| status::admin(&error))?,
            |(id, _)| id.to_string(),
            |(id, status)| respond::client(&id, status),
        );
        Ok(Response::new(ListClientsResponse { clients, next_page_token }))
    }

    async fn release_grant(
        &self,
        request: Request<ReleaseGrantRequest>,
    ) -> Result<Response<ReleaseGrantResponse>, Status> {
        let ReleaseGrantRequest { grant_id, reason } = request.into_inner();
        let grant = parse::release(&grant_id, &reason)?;
        let Some(grant) = grant else {
            return Err(status::admin(&AdminError::UnknownGrant(grant_id)));
        };
        let released = self.change(|app, caller| async move {
            app.release_grant(caller.principal, grant, reason).await
        });
        let grant = Some(respond::holding(&released.await?));
        Ok(Response::new(ReleaseGrantResponse { grant }))
    }

    async fn list_circuits(
        &self,
        request: Request<ListCircuitsRequest>,
    ) -> Result<Response<ListCircuitsResponse>, Status> {
        let request = request.into_inner();
        let CircuitsPage { policy, state, mode, page } = parse::circuits(&request)?;
        // No name of a policy has a slash; a key may.
        let after = page.after.as_deref();
        let after = after.map(|last| last.split_once('/').unwrap_or((last, "")));
        let filter = CircuitFilter { namespace: &request.namespace, policy, state, mode, after };
        let (app, _) = self.arrive()?;
        let circuits = app.list_circuits(filter, page.more());
        let (circuits, next_page_token) = page.fill(
            circuits.map_err(|error| status::admin(&error))?,
            |told| format!("{}/{}", told.policy, told.key),
            |told| respond::circuit_of(&told),
        );
        Ok(Response::new(ListCircuitsResponse { circuits, next_page_token }))
    }

    async fn inspect_circuit(
        &self,
        request: Request<InspectCircuitRequest>,
    ) -> Result<Response<InspectCircuitResponse>, Status> {
        let InspectCircuitRequest { namespace, policy, key } = request.into_inner();
        let name = parse::bucket(&namespace, &policy, &key)?;
        let (app, _) = self.arrive()?;
        let inspected = app.inspect_circuit(&name, &key).map_err(|error| status::admin(&error))?;
        Ok(Response::new(respond::inspected(&inspected)))
    }

    async fn set_circuit_mode(
        &self,
        request: Request<SetCircuitModeRequest>,
    ) -> Result<Response<SetCircuitModeResponse>, Status> {
        let set = parse::set_mode(request.into_inner())?;
        let set = self
            .change(|app, caller| async move { app.set_circuit_mode(caller.principal, set).await });
        let ModeSet { circuit, changed } = set.await?;
        let circuit = Some(respond::circuit_of(&circuit));
        Ok(Response::new(SetCircuitModeResponse { circuit, changed }))
    }

    async fn list_events(
        &self,
        request: Request<ListEventsRequest>,
    ) -> Result<Response<ListEventsResponse>, Status> {
        let request = request.into_inner();
        let page = parse::events(&request)?;
        let before = page.after.as_deref().and_then(|last| last.parse().ok());
        let filter = Filter {
            namespace: parse::wanted(&request.namespace),
            policy: parse::wanted(&request.policy),
        };
        let (app, _) = self.arrive()?;
        let events = app.events(before, page.more(), filter);
        let (events, next_page_token) =
            page.fill(events, |event| event.number.to_string(), |event| respond::event(&event));
        Ok(Response::new(ListEventsResponse { events, next_page_token }))
    }

    async fn server_info(
        &self,
        _: Request<ServerInfoRequest>,
    ) -> Result<Response<ServerInfoResponse>, Status> {
        let (app, _) = self.arrive()?;
        Ok(Response::new(respond::info(app.info())))
    }
}
