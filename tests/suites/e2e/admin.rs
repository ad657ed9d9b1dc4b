//! What operators do, and what becomes of it.

use std::sync::Arc;

use fusebox_proto::v1::{
    AcquireRequest, Bucket, BucketLimit, Client, ClientStatus, Concurrency, Decision,
    DeletePolicyRequest, DeletePolicyResponse, Durability, Event, EventAction, FixedWindow,
    GetPolicyRequest, GrantOutcome, InspectBucketRequest, ListBucketsRequest, ListBucketsResponse,
    ListClientsRequest, ListEventsRequest, ListEventsResponse, ListPoliciesRequest, NamedPolicy,
    Policy, PolicySource, PutPolicyRequest, PutPolicyResponse, ReleaseGrantRequest, ReportRequest,
    ReportResult, ResetBucketRequest, ResetBucketResponse, ServerInfoRequest, SlidingWindow,
    StorageEngine, TokenBucket, TopKeysRequest, admin_client::AdminClient, policy::Kind,
};
use fusebox_server::storage::journal::Keyspace;
use fusebox_tests::{ManualClock, Server, Simulated, eventually};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

use crate::{
    ask,
    caller::{Caller, config, duration, ended, seconds},
    request,
};

const FILE: &str = "three: {token_bucket: {limit: 3, per: 1m}},
    calls: {concurrency: {limit: 4, ttl: 1m}},
    tokens: {token_bucket: {limit: 600, per: 1m}},
    few: {token_bucket: {limit: 3, per: 1m}, max_cells: 2}";

/// An operator of the namespace `test`.
pub(crate) struct Operator(pub(crate) AdminClient<Channel>);

impl Operator {
    pub(crate) async fn of(server: &Server) -> Self {
        Self(AdminClient::new(server.channel().await))
    }

    pub(crate) async fn try_put(
        &mut self,
        request: PutPolicyRequest,
    ) -> Result<PutPolicyResponse, Status> {
        self.0.put_policy(request).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn put(&mut self, name: &str, kind: Kind) -> PutPolicyResponse {
        self.try_put(put(name, kind)).await.expect("it is put")
    }

    pub(crate) async fn get(&mut self, name: &str) -> Result<NamedPolicy, Status> {
        let request = GetPolicyRequest { namespace: "test".into(), name: name.into() };
        let answer = self.0.get_policy(request).await?.into_inner();
        Ok(answer.policy.expect("a policy"))
    }

    pub(crate) async fn try_delete(
        &mut self,
        name: &str,
        expected_version: Option<u64>,
        dry_run: bool,
    ) -> Result<DeletePolicyResponse, Status> {
        let request = DeletePolicyRequest {
            namespace: "test".into(),
            name: name.into(),
            expected_version,
            dry_run,
            reason: "over".into(),
        };
        self.0.delete_policy(request).await.map(tonic::Response::into_inner)
    }

    async fn names(&mut self, page_size: u32) -> Vec<String> {
        let (mut names, mut page_token) = (Vec::new(), String::new());
        loop {
            let namespace = String::new();
            let request = ListPoliciesRequest { namespace, page_size, page_token };
            let page = self.0.list_policies(request).await.unwrap().into_inner();
            names.extend(page.policies.into_iter().map(|policy| policy.name));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return names;
            }
        }
    }

    async fn inspect(&mut self, policy: &str, key: &str) -> Bucket {
        let request = InspectBucketRequest {
            namespace: "test".into(),
            policy: policy.into(),
            key: key.into(),
        };
        let answer = self.0.inspect_bucket(request).await.expect("it is told").into_inner();
        answer.bucket.expect("a bucket")
    }

    pub(crate) async fn buckets(
        &mut self,
        policy: &str,
        prefix: &str,
        page_token: &str,
    ) -> ListBucketsResponse {
        let request = ListBucketsRequest {
            namespace: "test".into(),
            policy: policy.into(),
            key_prefix: prefix.into(),
            page_size: 2,
            page_token: page_token.into(),
        };
        self.0.list_buckets(request).await.expect("they are told").into_inner()
    }

    async fn reset(&mut self, policy: &str, key: &str) -> ResetBucketResponse {
        let request = ResetBucketRequest {
            namespace: "test".into(),
            policy: policy.into(),
            key: key.into(),
            reason: "a mistake".into(),
        };
        self.0.reset_bucket(request).await.expect("it is reset").into_inner()
    }

    async fn clients(&mut self, request: ListClientsRequest) -> Vec<ClientStatus> {
        self.0.list_clients(request).await.expect("they are told").into_inner().clients
    }

    async fn release(&mut self, grant_id: &str) -> Result<(), Status> {
        let request = ReleaseGrantRequest { grant_id: grant_id.into(), reason: "it hangs".into() };
        self.0.release_grant(request).await.map(drop)
    }

    async fn events(&mut self, request: ListEventsRequest) -> ListEventsResponse {
        self.0.list_events(request).await.expect("they are told").into_inner()
    }

    pub(crate) async fn all_events(&mut self) -> Vec<Event> {
        self.events(ListEventsRequest::default()).await.events
    }
}

pub(crate) fn put(name: &str, kind: Kind) -> PutPolicyRequest {
    PutPolicyRequest {
        namespace: "test".into(),
        name: name.into(),
        policy: Some(Policy { kind: Some(kind), ..Default::default() }),
        reason: "a campaign".into(),
        ..Default::default()
    }
}

fn time(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

pub(crate) fn bucket(limit: u64, seconds: i64) -> Kind {
    Kind::TokenBucket(TokenBucket { limit: Some(limit), per: time(seconds), burst: None })
}

fn permits(limit: u64) -> Kind {
    Kind::Concurrency(Concurrency { limit: Some(limit), ttl: time(60) })
}

fn limit(bucket: &Bucket) -> &BucketLimit {
    let [limit] = bucket.limits.as_slice() else { panic!("{bucket:?}") };
    limit
}

fn keys(buckets: &[Bucket]) -> Vec<&str> {
    buckets.iter().map(|bucket| bucket.key.as_str()).collect()
}

async fn serve() -> Server {
    Server::start(&config(FILE)).await
}

#[tokio::test]
async fn a_policy_is_in_force_when_it_is_put_until_it_is_deleted() {
    let server = serve().await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    assert_eq!(operator.get("made").await.unwrap_err().code(), Code::NotFound);
    let put = operator.put("made", bucket(5, 60)).await;
    assert!(caller.ask("made", "a", 2).await.allowed);
    let made = operator.get("made").await.unwrap();
    assert_eq!(put.policy.as_ref(), Some(&made));
    assert_eq!(made.source(), PolicySource::Admin);
    assert_eq!(made.created, made.updated);
    assert_eq!((put.live_cells, put.changes.len()), (0, 6), "{:?}", put.changes);

    server.advance(seconds(6));
    let put = operator.put("made", bucket(10, 60)).await;
    let changed = put.policy.unwrap();
    assert!(changed.version > made.version && changed.created == made.created);
    assert_ne!(changed.updated, made.updated);
    let changes: Vec<_> = put
        .changes
        .iter()
        .map(|one| (one.field.as_str(), one.before.as_str(), one.after.as_str()))
        .collect();
    assert_eq!(changes, [("token_bucket.burst", "5", "10"), ("token_bucket.limit", "5", "10")]);
    assert_eq!(put.live_cells, 1);
    assert_eq!(caller.left("made", "a").await, 8, "half a token had come back");

    // What is told can be put again, and changes nothing.
    let told =
        PutPolicyRequest { policy: changed.policy.clone(), ..self::put("made", bucket(1, 1)) };
    let again = operator.try_put(told).await.unwrap();
    assert_eq!((again.policy.unwrap(), again.changes), (changed.clone(), vec![]));

    let would = operator.try_delete("made", Some(changed.version), true).await.unwrap();
    assert_eq!((would.policy.as_ref(), would.live_cells), (Some(&changed), 1));
    assert_eq!(operator.try_delete("made", None, false).await.unwrap(), would);
    assert_eq!(operator.try_delete("made", None, false).await.unwrap_err().code(), Code::NotFound);
    let gone =
        server.client("test").await.acquire([fusebox_client::unary::Ask::new("made", "a")]).await;
    assert!(format!("{:?}", gone.unwrap_err()).contains("NotFound"));

    // It comes back with what was spent, and with a version that it never had.
    let back = operator.put("made", bucket(10, 60)).await.policy.unwrap();
    assert!(back.version > changed.version);
    assert_eq!(caller.left("made", "a").await, 8);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_dry_run_tells_everything_and_changes_nothing() {
    let server = serve().await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    let dry = |kind| PutPolicyRequest { dry_run: true, ..put("made", kind) };
    let would = operator.try_put(dry(bucket(5, 60))).await.unwrap();
    assert_eq!(would.changes.len(), 6);
    assert_eq!(operator.get("made").await.unwrap_err().code(), Code::NotFound);

    let made = operator.put("made", bucket(5, 60)).await.policy.unwrap();
    assert!(caller.ask("made", "a", 3).await.allowed);
    let events = operator.all_events().await.len();
    let would = operator.try_put(dry(bucket(4, 60))).await.unwrap();
    let policy = would.policy.unwrap();
    assert_eq!((policy.version, policy.updated), (made.version, made.updated));
    assert_eq!(
        policy.policy.unwrap().kind,
        Some(Kind::TokenBucket(TokenBucket { limit: Some(4), per: time(60), burst: Some(4) }))
    );
    assert_eq!((would.changes.len(), would.live_cells), (2, 1));
    assert_eq!(operator.get("made").await.unwrap(), made);
    assert_eq!(caller.left("made", "a").await, 2);
    assert_eq!(operator.all_events().await.len(), events);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn who_expects_another_version_is_told_so() {
    let server = serve().await;
    let mut operator = Operator::of(&server).await;
    let expecting = |version| PutPolicyRequest {
        expected_version: Some(version),
        ..put("made", bucket(version + 5, 60))
    };
    assert_eq!(operator.try_put(expecting(7)).await.unwrap_err().code(), Code::Aborted);
    let made = operator.try_put(expecting(0)).await.unwrap().policy.unwrap();
    assert_eq!(operator.try_put(expecting(0)).await.unwrap_err().code(), Code::Aborted);
    let next = operator.try_put(expecting(made.version)).await.unwrap().policy.unwrap();
    for request in [expecting(made.version), expecting(next.version + 1)] {
        let dry = PutPolicyRequest { dry_run: true, ..request.clone() };
        let refused = operator.try_put(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::Aborted);
        assert!(refused.message().contains("`test/made`"), "{refused}");
        assert_eq!(operator.try_put(dry).await.unwrap_err().message(), refused.message());
    }
    let refused = operator.try_delete("made", Some(made.version), false).await.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted);
    assert_eq!(operator.get("made").await.unwrap(), next);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_the_file_manages_is_changed_there() {
    let server = serve().await;
    let mut operator = Operator::of(&server).await;
    let refused = operator.try_put(put("three", bucket(5, 60))).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("configuration file"), "{refused}");
    let refused = operator.try_delete("three", None, true).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let policy = operator.get("three").await.unwrap();
    assert_eq!(policy.source(), PolicySource::File);
    assert!(policy.version >= 1);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_changed_limit_keeps_what_was_spent_whatever_it_becomes() {
    let server = serve().await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    operator.put("made", bucket(100, 3_600)).await;
    assert!(caller.ask("made", "a", 80).await.allowed);
    let window = FixedWindow { limit: Some(100), per: time(86_400) };
    let sliding = SlidingWindow { limit: Some(100), per: time(86_400) };
    for (kind, left) in [
        (bucket(200, 3_600), 120),
        (bucket(50, 3_600), 0),
        // Lowered, raised: the present bucket owes nothing that it cannot hold.
        (bucket(100, 3_600), 20),
        (Kind::FixedWindow(window), 20),
        (Kind::SlidingWindow(sliding), 20),
        (bucket(100, 3_600), 20),
    ] {
        operator.put("made", kind.clone()).await;
        assert_eq!(caller.left("made", "a").await, left, "{kind:?}");
        assert_eq!(limit(&operator.inspect("made", "a").await).remaining, left, "{kind:?}");
    }
    assert_eq!(caller.left("made", "b").await, 100);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_was_put_outlives_the_server_however_it_ends() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let file = config(FILE);
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &file).await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    let made = operator.put("made", bucket(100, 3_600)).await.policy.unwrap();
    let three = operator.get("three").await.unwrap();
    operator.put("gone", bucket(5, 60)).await;
    operator.try_delete("gone", None, false).await.unwrap();
    assert!(caller.ask("made", "a", 30).await.allowed);
    let events = operator.all_events().await;
    server.stop().await.unwrap();

    let server = Server::start_on(journal.open(), Arc::clone(&clock), &file).await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    assert_eq!(operator.get("made").await.unwrap(), made);
    assert_eq!(operator.get("three").await.unwrap(), three);
    assert_eq!(operator.get("gone").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(operator.all_events().await, events);
    assert_eq!(caller.left("made", "a").await, 70);
    let changed = operator.put("made", bucket(50, 3_600)).await.policy.unwrap();
    assert!(changed.version > made.version);
    let events = operator.all_events().await;
    // The answer came, so it is on the disk.
    journal.lose_power();
    server.stop().await.unwrap_err();

    let server = Server::start_on(journal.open(), clock, &file).await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    assert_eq!(operator.get("made").await.unwrap(), changed);
    assert_eq!(operator.all_events().await, events);
    assert_eq!(caller.left("made", "a").await, 20);
    let last = operator.put("made", bucket(51, 3_600)).await.policy.unwrap();
    assert!(last.version > changed.version);
    let next = operator.all_events().await[0].number;
    assert!(next > events[0].number);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_policy_that_turns_slow_is_on_disk_when_the_change_is_told() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config(FILE)).await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    operator.put("made", bucket(100, 1)).await;
    for key in 0..20 {
        assert!(caller.ask("made", &key.to_string(), 60).await.allowed);
    }
    assert_eq!(journal.records(Keyspace::Cells), 0, "it would be full again in a second");
    operator.put("made", bucket(100, 3_600)).await;
    journal.lose_power();
    server.stop().await.unwrap_err();

    let server = Server::start_on(journal.open(), clock, &config(FILE)).await;
    let mut caller = Caller::of(&server).await;
    for key in 0..20 {
        assert_eq!(caller.left("made", &key.to_string()).await, 40);
    }
    assert_eq!(caller.left("made", "new").await, 100, "nothing else was lost");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_policy_that_was_fast_for_a_while_forgets_nothing_of_that_time() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config(FILE)).await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    operator.put("made", bucket(100, 3_600)).await;
    assert!(caller.ask("made", "a", 10).await.allowed);
    operator.put("made", bucket(100, 1)).await;
    assert!(caller.ask("made", "a", 60).await.allowed);
    operator.put("made", bucket(100, 3_600)).await;
    // What is on disk of the first time is not what was spent.
    journal.lose_power();
    server.stop().await.unwrap_err();
    let server = Server::start_on(journal.open(), clock, &config(FILE)).await;
    assert_eq!(Caller::of(&server).await.left("made", "a").await, 30);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn who_stands_in_line_is_served_when_a_limit_is_raised_or_reset() {
    let server = serve().await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    operator.put("made", bucket(5, 3_600)).await;
    for raise in [true, false] {
        let left = caller.left("made", "a").await;
        assert!(caller.ask("made", "a", left).await.allowed);
        let mut raw = server.raw().await;
        let waiting = tokio::spawn(async move {
            let max_wait = time(30);
            raw.acquire(AcquireRequest { max_wait, ..request([ask("made", "a", 2)]) }).await
        });
        eventually("it stands in line", async || operator.inspect("made", "a").await.waiting == 1)
            .await;
        let info = operator.0.server_info(ServerInfoRequest {}).await.unwrap().into_inner();
        assert_eq!(info.waiting, 1);
        if raise {
            operator.put("made", bucket(10, 3_600)).await;
        } else {
            operator.reset("made", "a").await;
        }
        let answer = waiting.await.unwrap().unwrap().into_inner();
        assert_eq!(answer.decision(), Decision::Allow);
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_file_must_not_name_what_was_put() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config(FILE)).await;
    Operator::of(&server).await.put("made", bucket(5, 60)).await;
    server.stop().await.unwrap();

    let both = config(&format!("{FILE}, made: {{token_bucket: {{limit: 5, per: 1m}}}}"));
    let server = Server::begin(journal.open(), Arc::clone(&clock), &both).await;
    let refused = server.ended().await.unwrap_err().to_string();
    for word in ["`namespaces.test.policies.made`", "`test/made`", "DeletePolicy"] {
        assert!(refused.contains(word), "{word}: {refused}");
    }

    // As the message says.
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config(FILE)).await;
    Operator::of(&server).await.try_delete("made", None, false).await.unwrap();
    server.stop().await.unwrap();
    let server = Server::start_on(journal.open(), clock, &both).await;
    let made = Operator::of(&server).await.get("made").await.unwrap();
    assert_eq!(made.source(), PolicySource::File);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn every_change_is_an_event_that_says_who_and_why() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config(FILE)).await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    assert_eq!(operator.all_events().await, [], "a first start is none");
    operator.put("made", bucket(5, 60)).await;
    operator.put("made", bucket(6, 60)).await;
    assert!(caller.ask("made", "a", 4).await.allowed);
    operator.reset("made", "a").await;
    let grant = caller.grant(ask("calls", "k", 2)).await;
    operator.release(&grant).await.unwrap();
    operator.try_delete("made", None, false).await.unwrap();
    let events = operator.all_events().await;
    let actions: Vec<_> = events.iter().map(Event::action).collect();
    assert_eq!(
        actions,
        [
            EventAction::PolicyDeleted,
            EventAction::GrantReleased,
            EventAction::BucketReset,
            EventAction::PolicyChanged,
            EventAction::PolicyCreated,
        ]
    );
    assert!(events.is_sorted_by(|newer, older| newer.number > older.number));
    let [deleted, released, reset, changed, created] = &events[..] else { panic!("five") };
    assert!(events.iter().all(|event| event.actor == "anonymous" && event.namespace == "test"));
    assert_eq!((created.reason.as_str(), created.before.as_str()), ("a campaign", ""));
    assert_eq!(changed.before, created.after);
    assert_eq!((deleted.before.as_str(), deleted.after.as_str()), (changed.after.as_str(), ""));
    let reset = (&*reset.policy, &*reset.key, &*reset.reason, &*reset.before, &*reset.after);
    assert_eq!(reset, ("made", "a", "a mistake", "4", "0"));
    assert_eq!((&*released.policy, &*released.reason), ("calls", "it hangs"));
    assert!(released.before.contains(&grant) && released.before.contains("2 permits"));

    // In pages, and only what is wanted.
    let page = |page_token: &str| ListEventsRequest {
        namespace: "test".into(),
        policy: "made".into(),
        page_size: 3,
        page_token: page_token.into(),
    };
    let first = operator.events(page("")).await;
    let second = operator.events(page(&first.next_page_token)).await;
    assert_eq!((first.events.len(), second.events.len()), (3, 1));
    assert_eq!((second.next_page_token.as_str(), &second.events[0]), ("", created));
    server.stop().await.unwrap();

    // What the file says differently is an event as well.
    let file = config(&FILE.replace("limit: 4", "limit: 5").replace("three", "drei"));
    let server = Server::start_on(journal.open(), clock, &file).await;
    let mut operator = Operator::of(&server).await;
    let after = operator.all_events().await;
    assert_eq!(after[3..], events);
    let mut edits: Vec<_> = after[..3]
        .iter()
        .map(|event| (event.actor.as_str(), event.action(), event.policy.as_str()))
        .collect();
    edits.sort_by_key(|(_, _, policy)| *policy);
    assert_eq!(
        edits,
        [
            ("file", EventAction::PolicyChanged, "calls"),
            ("file", EventAction::PolicyCreated, "drei"),
            ("file", EventAction::PolicyDeleted, "three"),
        ]
    );
    server.stop().await.unwrap();
}

#[tokio::test]
async fn to_look_at_a_bucket_charges_and_creates_nothing() {
    let server = serve().await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    let full = operator.inspect("three", "a").await;
    let all = BucketLimit { limit: 3, remaining: 3, reset_after: time(0), spent: 0, out: 0 };
    assert_eq!((limit(&full), full.live, full.overflow), (&all, false, false));
    assert!(caller.ask("three", "a", 2).await.allowed);
    for _ in 0..3 {
        let some = operator.inspect("three", "a").await;
        let left = BucketLimit { remaining: 1, spent: 2, reset_after: time(40), ..all };
        assert_eq!((limit(&some), some.live), (&left, true));
    }
    assert_eq!(caller.left("three", "a").await, 1);
    let info = operator.0.server_info(ServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.live_cells, 1);

    // Permits, and what is out of estimates.
    caller.grant(ask("calls", "a", 3)).await;
    let calls = operator.inspect("calls", "a").await;
    assert_eq!((calls.permits_held, limit(&calls).remaining), (3, 1));
    assert_eq!((limit(&calls).reset_after, limit(&calls).out), (None, 3));
    let estimated = fusebox_proto::v1::Ask { estimated: true, ..ask("tokens", "a", 60) };
    caller.grant(estimated).await;
    let tokens = operator.inspect("tokens", "a").await;
    assert_eq!((limit(&tokens).spent, limit(&tokens).out), (60, 60));

    // Keys past the budget share a bucket, and it says so.
    for key in ["a", "b", "c"] {
        assert!(caller.ask("few", key, 1).await.allowed);
    }
    let (_, metrics) = server.http("/metrics").await;
    for (metric, value) in [("policy_cells", 3), ("policy_overflow_cells", 1)] {
        let line = format!("fusebox_{metric}{{namespace=\"test\",policy=\"few\"}} {value}\n");
        assert!(metrics.contains(&line), "{line}: {metrics}");
    }
    let own = operator.inspect("few", "a").await;
    let shared = operator.inspect("few", "another").await;
    assert_eq!((own.overflow, shared.overflow), (false, true));
    assert_eq!((limit(&own).remaining, limit(&shared).remaining), (2, 2));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn buckets_are_listed_by_key_in_pages() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config(FILE)).await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    for key in ["b/2", "a", "b/1", "c", "b/3", ""] {
        assert!(caller.ask("three", key, 1).await.allowed);
    }
    caller.left("three", "never").await;
    let mut listed = Vec::new();
    let mut token = String::new();
    loop {
        let page = operator.buckets("three", "", &token).await;
        listed.extend(page.buckets);
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(keys(&listed), ["", "a", "b/1", "b/2", "b/3", "c"]);
    assert!(listed.iter().all(|bucket| limit(bucket).remaining == 2 && bucket.live));
    let first = operator.buckets("three", "b/", "").await;
    assert_eq!((keys(&first.buckets), first.unnamed_buckets), (vec!["b/1", "b/2"], 0));
    let second = operator.buckets("three", "b/", &first.next_page_token).await;
    assert_eq!(keys(&second.buckets), ["b/3"]);
    server.stop().await.unwrap();

    // The names of keys are not on disk: a key is known again when it is charged.
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config(FILE)).await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    let page = operator.buckets("three", "", "").await;
    assert_eq!((keys(&page.buckets), page.unnamed_buckets), (vec![], 6));
    assert!(caller.ask("three", "c", 1).await.allowed);
    let page = operator.buckets("three", "", "").await;
    assert_eq!((keys(&page.buckets), page.unnamed_buckets), (vec!["c"], 5));

    // And forgotten with its bucket.
    server.advance(seconds(300));
    eventually("full buckets leave", async || {
        let page = operator.buckets("three", "", "").await;
        page.buckets.is_empty() && page.unnamed_buckets == 0
    })
    .await;
    server.stop().await.unwrap();
}

#[tokio::test]
async fn the_keys_that_are_asked_for_most_come_first() {
    let server = serve().await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    for (key, cost) in [("a", 2), ("b", 1), ("c", 3), ("a", 2), ("peek", 0), ("b", 1)] {
        caller.ask("three", key, cost).await;
    }
    let top = |count| TopKeysRequest { namespace: "test".into(), policy: "three".into(), count };
    let told = operator.0.top_keys(top(0)).await.unwrap().into_inner();
    let keys: Vec<_> = told.keys.iter().map(|key| (key.key.as_str(), key.count)).collect();
    // Granted or not.
    assert_eq!(keys, [("a", 4), ("c", 3), ("b", 2)]);
    assert_eq!((told.sample_one_in, told.halved_every), (1, time(60)));
    let one = operator.0.top_keys(top(1)).await.unwrap().into_inner();
    assert_eq!(one.keys, told.keys[..1]);
    // They go on where the settings change.
    operator.put("made", bucket(5, 60)).await;
    caller.ask("made", "a", 1).await;
    operator.put("made", bucket(6, 60)).await;
    let made = TopKeysRequest { policy: "made".into(), ..top(1) };
    assert_eq!(operator.0.top_keys(made).await.unwrap().into_inner().keys[0].count, 1);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_reset_forgets_what_was_spent_and_not_what_is_held() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config(FILE)).await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    assert!(caller.ask("tokens", "a", 500).await.allowed);
    let estimated = fusebox_proto::v1::Ask { estimated: true, ..ask("tokens", "a", 60) };
    let grant = caller.grant(estimated).await;
    let ResetBucketResponse { before, after } = operator.reset("tokens", "a").await;
    assert_eq!(limit(&before.unwrap()).remaining, 40);
    let after = after.unwrap();
    assert_eq!((limit(&after).remaining, limit(&after).out), (540, 60));
    assert_eq!(caller.left("tokens", "a").await, 540);
    assert_eq!(caller.left("tokens", "b").await, 600);
    assert_eq!(caller.report(ended(&grant)).await, ReportResult::Applied);

    caller.grant(ask("calls", "a", 3)).await;
    operator.reset("calls", "a").await;
    assert_eq!(caller.left("calls", "a").await, 1);

    // It is on disk.
    journal.lose_power();
    server.stop().await.unwrap_err();
    let server = Server::start_on(journal.open(), clock, &config(FILE)).await;
    assert_eq!(Caller::of(&server).await.left("tokens", "a").await, 540);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_a_window_gives_back_after_a_reset_is_given_once() {
    let server = serve().await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    let fixed = Kind::FixedWindow(FixedWindow { limit: Some(10), per: time(3_600) });
    let sliding = Kind::SlidingWindow(SlidingWindow { limit: Some(10), per: time(3_600) });
    for (name, kind) in [("fixed", fixed), ("sliding", sliding)] {
        operator.put(name, kind).await;
        assert!(caller.ask(name, "a", 3).await.allowed);
        let estimated = fusebox_proto::v1::Ask { estimated: true, ..ask(name, "a", 4) };
        let grant = caller.grant(estimated).await;
        operator.reset(name, "a").await;
        assert_eq!(caller.left(name, "a").await, 6, "{name}: the estimate holds four");
        assert!(caller.ask(name, "a", 6).await.allowed);
        let nothing = GrantOutcome { actual_cost: Some(0), ..ended(&grant) };
        assert_eq!(caller.report(nothing).await, ReportResult::Applied);
        assert_eq!(caller.left(name, "a").await, 4, "{name}");
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_a_policy_gave_comes_back_after_its_end() {
    let server = serve().await;
    let mut operator = Operator::of(&server).await;
    let mut put = put("pool", permits(3));
    put.namespace = "alone".into();
    operator.try_put(put.clone()).await.unwrap();
    let mut raw = server.raw().await;
    let wanted = AcquireRequest { namespace: "alone".into(), ..request([ask("pool", "a", 3)]) };
    let grant_id = raw.acquire(wanted.clone()).await.unwrap().into_inner().grant_id;
    let request = DeletePolicyRequest {
        namespace: "alone".into(),
        name: "pool".into(),
        reason: "a mistake".into(),
        ..Default::default()
    };
    operator.0.delete_policy(request).await.unwrap();
    let report = ReportRequest {
        namespace: "alone".into(),
        outcomes: vec![ended(&grant_id)],
        ..Default::default()
    };
    let reported = raw.report(report.clone()).await.unwrap().into_inner();
    assert_eq!(reported.results().next(), Some(ReportResult::Applied));
    assert_eq!(raw.report(report).await.unwrap_err().code(), Code::NotFound);
    operator.try_put(put).await.unwrap();
    assert_eq!(raw.acquire(wanted).await.unwrap().into_inner().decision(), Decision::Allow);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_permit_is_not_renewed_once_its_policy_was_of_another_kind() {
    let server = serve().await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    operator.put("pool", permits(3)).await;
    let grant = caller.grant(ask("pool", "a", 3)).await;
    assert_eq!(caller.renew(&grant).await, seconds(60));
    operator.put("pool", bucket(5, 1)).await;
    assert_eq!(caller.renew(&grant).await, seconds(0));
    operator.put("pool", permits(3)).await;
    assert_eq!(caller.renew(&grant).await, seconds(0), "nobody counts it any more");
    // Of the same kind it lives as long as the policy says now.
    let grant = caller.grant(ask("pool", "b", 1)).await;
    let kind = Kind::Concurrency(Concurrency { limit: Some(3), ttl: time(30) });
    operator.put("pool", kind).await;
    assert_eq!(caller.renew(&grant).await, seconds(30));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_is_held_through_many_changes_comes_back() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), &config(FILE)).await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    operator.put("pool", permits(100)).await;
    let before = caller.grant(ask("pool", "a", 3)).await;
    for limit in 101..120 {
        operator.put("pool", permits(limit)).await;
    }
    assert_eq!(caller.left("pool", "a").await, 116);
    let after = caller.grant(ask("pool", "a", 2)).await;
    assert_eq!(caller.report(ended(&before)).await, ReportResult::Applied);
    assert_eq!(caller.left("pool", "a").await, 117);
    server.stop().await.unwrap();

    let server = Server::start_on(journal.open(), clock, &config(FILE)).await;
    let (mut operator, mut caller) = (Operator::of(&server).await, Caller::of(&server).await);
    for limit in 120..140 {
        operator.put("pool", permits(limit)).await;
    }
    assert_eq!(caller.report(ended(&after)).await, ReportResult::Applied);
    assert_eq!(caller.left("pool", "a").await, 139);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_grant_that_is_released_by_force_is_over_for_its_holder() {
    let server = serve().await;
    let mut operator = Operator::of(&server).await;
    let mut caller = Caller::named(&server, "one").await;
    let grant = caller.grant(ask("calls", "a", 3)).await;
    assert_eq!(caller.left("calls", "a").await, 1);
    let request = ReleaseGrantRequest { grant_id: grant.clone(), reason: "it hangs".into() };
    let released = operator.0.release_grant(request).await.unwrap().into_inner().grant.unwrap();
    assert_eq!((released.grant_id, released.permits), (grant.clone(), 3));
    assert_eq!(caller.left("calls", "a").await, 4);
    assert_eq!(caller.renew(&grant).await, seconds(0));
    assert_ne!(caller.report(ended(&grant)).await, ReportResult::Applied);
    assert_eq!(caller.left("calls", "a").await, 4);
    for unknown in [grant.as_str(), "nonsense", "1-00000000000000000000000000000001"] {
        assert_eq!(operator.release(unknown).await.unwrap_err().code(), Code::NotFound);
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn clients_are_listed_with_what_they_hold() {
    let server = serve().await;
    let mut operator = Operator::of(&server).await;
    let mut one = Caller::named(&server, "one").await;
    let mut two = Caller::named(&server, "two").await;
    let grants = [one.grant(ask("calls", "a", 1)).await, one.grant(ask("calls", "a", 2)).await];
    Caller::of(&server).await.grant(ask("calls", "b", 4)).await;
    server.advance(seconds(2));
    two.ask("three", "a", 1).await;

    let clients = operator.clients(ListClientsRequest::default()).await;
    let told: Vec<_> = clients
        .iter()
        .map(|status| {
            let Client { id, .. } = status.client.as_ref().unwrap();
            (id.as_str(), duration(status.last_seen), status.open_grants, status.permits)
        })
        .collect();
    assert_eq!(
        told,
        [("", None, 1, 4), ("one", Some(seconds(2)), 2, 3), ("two", Some(seconds(0)), 0, 0)]
    );
    assert!(clients.iter().all(|status| status.grants.is_empty()), "only of one that is named");

    let only = ListClientsRequest { client_id: "one".into(), ..Default::default() };
    let [only] = &operator.clients(only).await[..] else { panic!("one") };
    let mut ids: Vec<_> = only.grants.iter().map(|grant| grant.grant_id.clone()).collect();
    ids.sort_unstable();
    let mut grants = grants.to_vec();
    grants.sort_unstable();
    assert_eq!(ids, grants);
    let grant = &only.grants[0];
    assert_eq!((grant.namespace.as_str(), grant.policy.as_str()), ("test", "calls"));
    assert_eq!(duration(grant.expires_in), Some(seconds(58)));

    let mut pages = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = ListClientsRequest { page_size: 1, page_token, ..Default::default() };
        let page = operator.0.list_clients(request).await.unwrap().into_inner();
        pages.extend(page.clients.into_iter().map(|status| status.client.unwrap().id));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(pages, ["", "one", "two"]);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn policies_are_listed_by_name_in_pages() {
    let server = serve().await;
    let mut operator = Operator::of(&server).await;
    operator.put("made", bucket(5, 60)).await;
    let elsewhere = PutPolicyRequest { namespace: "a".into(), ..put("first", permits(1)) };
    operator.try_put(elsewhere).await.unwrap();
    let all = ["first", "calls", "few", "made", "three", "tokens"];
    for size in [0, 1, 2, 6, 1_000] {
        assert_eq!(operator.names(size).await, all, "{size}");
    }
    let of =
        |namespace: &str| ListPoliciesRequest { namespace: namespace.into(), ..Default::default() };
    let page = operator.0.list_policies(of("a")).await.unwrap().into_inner();
    assert_eq!(page.policies.len(), 1);
    assert_eq!(operator.0.list_policies(of("b")).await.unwrap_err().code(), Code::NotFound);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_server_tells_what_it_is() {
    let server = serve().await;
    let mut operator = Operator::of(&server).await;
    server.advance(seconds(5));
    let info = operator.0.server_info(ServerInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.storage_engine(), StorageEngine::Memory);
    assert_eq!(info.durability(), Durability::Strict);
    assert_eq!((info.policies, duration(info.uptime)), (4, Some(seconds(5))));
    assert_eq!(info.truth_id.len(), 32);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_mistake_changes_nothing_and_names_its_field() {
    let server = serve().await;
    let mut operator = Operator::of(&server).await;
    let good = || put("made", bucket(5, 60));
    for (request, fields) in [
        (PutPolicyRequest { name: "Made".into(), ..good() }, vec!["name"]),
        (PutPolicyRequest { namespace: String::new(), ..good() }, vec!["namespace"]),
        (PutPolicyRequest { policy: None, ..good() }, vec!["policy"]),
        (PutPolicyRequest { reason: "x".repeat(257), ..good() }, vec!["reason"]),
        (
            PutPolicyRequest { name: String::new(), ..put("", bucket(5, -1)) },
            vec!["name", "policy.token_bucket.per"],
        ),
    ] {
        let refused = operator.try_put(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        let details = refused.get_error_details();
        let violations = &details.bad_request().expect("violations").field_violations;
        let named: Vec<_> = violations.iter().map(|one| one.field.as_str()).collect();
        assert_eq!(named, fields);
    }
    let listing = |page_token: &str| ListPoliciesRequest {
        page_token: page_token.into(),
        ..Default::default()
    };
    let refused = operator.0.list_policies(listing("nonsense")).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(operator.names(0).await, ["calls", "few", "three", "tokens"]);
    assert_eq!(operator.all_events().await, []);
    server.stop().await.unwrap();
}
