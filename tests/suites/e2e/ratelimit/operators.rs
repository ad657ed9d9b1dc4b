//! The buckets of rules, as other services and operators reach them.

use fusebox_proto::v1::{
    AcquireRequest, Bucket, DeletePolicyRequest, GetPolicyRequest, InspectBucketRequest,
    ListBucketsRequest, ListPoliciesRequest, NamedPolicy, PolicySource, PutPolicyRequest,
    ResetBucketRequest, TopKeysRequest, admin_client::AdminClient, policy::Kind,
};
use fusebox_tests::Server;
use tonic::{Code, transport::Channel};

use super::{Files, Proxy, Told, descriptor, hits, limited, peek, rl, rule};
use crate::{ask, caller::said};

/// An operator of the namespace `envoy`.
struct Operator(AdminClient<Channel>);

impl Operator {
    async fn of(server: &Server) -> Self {
        Self(AdminClient::new(server.channel().await))
    }

    async fn inspect(&mut self, policy: &str, key: &str) -> Bucket {
        let (namespace, policy, key) = ("envoy".into(), policy.into(), key.into());
        let request = InspectBucketRequest { namespace, policy, key };
        self.0.inspect_bucket(request).await.expect("it is told").into_inner().bucket.unwrap()
    }

    /// What is spent of each bucket, by key.
    async fn buckets(&mut self, policy: &str, page_size: u32) -> Vec<(String, u64)> {
        let (mut buckets, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = ListBucketsRequest {
                namespace: "envoy".into(),
                policy: policy.into(),
                key_prefix: String::new(),
                page_size,
                page_token,
            };
            let page = self.0.list_buckets(request).await.expect("they are told").into_inner();
            buckets.extend(page.buckets.into_iter().map(|one| (one.key, one.limits[0].spent)));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return buckets;
            }
        }
    }

    async fn policies(&mut self, page_size: u32) -> Vec<NamedPolicy> {
        let (mut policies, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = ListPoliciesRequest { namespace: "envoy".into(), page_size, page_token };
            let page = self.0.list_policies(request).await.expect("they are told").into_inner();
            policies.extend(page.policies);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return policies;
            }
        }
    }

    async fn reset(&mut self, policy: &str, key: &str) -> (Bucket, Bucket) {
        let request = ResetBucketRequest {
            namespace: "envoy".into(),
            policy: policy.into(),
            key: key.into(),
            reason: "a mistake".into(),
        };
        let reset = self.0.reset_bucket(request).await.expect("it is reset").into_inner();
        (reset.before.unwrap(), reset.after.unwrap())
    }
}

/// What is left when another service has asked for so much of a bucket; `None` if it was denied.
async fn acquire(server: &Server, policy: &str, key: &str, cost: u64) -> Option<u64> {
    let request = AcquireRequest {
        namespace: "envoy".into(),
        asks: vec![ask(policy, key, cost)],
        ..Default::default()
    };
    let answer = server.raw().await.acquire(request).await.expect("an answer").into_inner();
    let said = said(&answer.verdicts[0]);
    said.allowed.then_some(said.remaining)
}

#[tokio::test]
async fn one_bucket_is_reached_in_three_ways() {
    let files = Files::of(&[("rl.yaml", &rl(&[rule("user", 10, "hour")]))]);
    let server = files.serve().await;
    let (mut proxy, mut operator) = (Proxy::of(&server).await, Operator::of(&server).await);
    assert_eq!(proxy.one(hits("user", "alice", 2)).await, Told::Ok(8));
    assert_eq!(acquire(&server, "rl|user", "alice", 3).await, Some(5));
    assert_eq!(proxy.hit("user", "alice").await, Told::Ok(4));
    assert_eq!(acquire(&server, "rl|user", "alice", 5).await, None);
    assert_eq!(proxy.hit("user", "bob").await, Told::Ok(9));

    let bucket = operator.inspect("rl|user", "alice").await;
    let limit = &bucket.limits[0];
    assert_eq!((limit.limit, limit.remaining, limit.spent, bucket.live), (10, 4, 6, true));
    let all = [("alice".to_owned(), 6), ("bob".to_owned(), 1)];
    assert_eq!(operator.buckets("rl|user", 1).await, all);
    let top = TopKeysRequest { namespace: "envoy".into(), policy: "rl|user".into(), count: 1 };
    let top = operator.0.top_keys(top).await.unwrap().into_inner().keys;
    assert_eq!((top[0].key.as_str(), top[0].count), ("alice", 11), "with what was denied");

    let (before, after) = operator.reset("rl|user", "alice").await;
    assert_eq!((before.limits[0].spent, after.limits[0].spent), (6, 0));
    assert_eq!(proxy.one(peek("user", "alice")).await, Told::Ok(10));
    assert_eq!(proxy.one(peek("user", "bob")).await, Told::Ok(9));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_limit_that_a_request_carries_is_a_bucket_as_any() {
    let server = Files::of(&[("rl.yaml", &rl(&[rule("user", 9, "hour")]))]).serve().await;
    let (mut proxy, mut operator) = (Proxy::of(&server).await, Operator::of(&server).await);
    let of_hour = super::RateLimitUnit::Hour;
    assert_eq!(proxy.one(limited(hits("user", "a|b", 3), 5, of_hour)).await, Told::Ok(2));
    let key = "rl|user|a%7Cb";
    assert_eq!(operator.buckets("|per=hour", 0).await, [(key.to_owned(), 3)]);
    assert_eq!(operator.inspect("|per=hour", key).await.limits[0].spent, 3);
    operator.reset("|per=hour", key).await;
    assert_eq!(proxy.one(limited(hits("user", "a|b", 3), 5, of_hour)).await, Told::Ok(2));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn paths_tell_rules_apart_whatever_is_in_them() {
    let odd = "{key: 'a|b', value: 'c=d%', rate_limit: {unit: hour, requests_per_unit: 11}}";
    let dotted = "{key: 'a.b =', value: 'é \u{1F980}', descriptors: [{key: x y, \
                  rate_limit: {unit: hour, requests_per_unit: 12}}]}";
    let text = format!("domain: 'we|b.%/ =é'\ndescriptors: [{odd}, {dotted}]");
    let plain = rl(&[rule("user", 9, "hour")]);
    let server = Files::of(&[("odd.yaml", &text), ("rl.yaml", &plain)]).serve().await;
    let (mut proxy, mut operator) = (Proxy::of(&server).await, Operator::of(&server).await);
    let mut ask = async |descriptor| {
        let domain = "we|b.%/ =é".into();
        let request = super::RateLimitRequest { domain, ..super::request([descriptor]) };
        super::told(&proxy.send(request).await.statuses[0])
    };
    let paths = ["we%7Cb.%25/ =é|a%7Cb=c=d%25", "we%7Cb.%25/ =é|a.b %3D=é \u{1F980}|x y"];
    let two = [("a.b =", "é \u{1F980}"), ("x y", "50% |")];
    assert_eq!(ask(descriptor([("a|b", "c=d%")])).await, Told::Ok(10));
    assert_eq!(ask(descriptor(two)).await, Told::Ok(11));
    assert_eq!(operator.buckets(paths[0], 0).await, [(String::new(), 1)]);
    assert_eq!(operator.buckets(paths[1], 0).await, [("50% |".to_owned(), 1)]);
    assert_eq!(acquire(&server, paths[1], "50% |", 1).await, Some(10));
    operator.reset(paths[1], "50% |").await;
    assert_eq!(ask(descriptor(two)).await, Told::Ok(11));

    let units = ["day", "hour", "minute", "month", "second", "week", "year"];
    let own = units.map(|unit| format!("|per={unit}"));
    let mut names = vec!["rl|user", paths[0], paths[1]];
    names.extend(own.each_ref().map(String::as_str));
    for size in [0, 1, 2, 9, 10] {
        let listed = operator.policies(size).await;
        assert!(listed.iter().all(|policy| policy.source() == PolicySource::Envoy));
        let listed: Vec<_> = listed.iter().map(|policy| policy.name.as_str()).collect();
        assert_eq!(listed, names, "{size} at once");
    }
    let policy = operator.policies(0).await.remove(0);
    let kind = policy.policy.clone().unwrap().kind.unwrap();
    assert!(matches!(kind, Kind::FixedWindow(window) if window.limit == Some(9)));
    let request = GetPolicyRequest { namespace: "envoy".into(), name: "rl|user".into() };
    let got = operator.0.get_policy(request).await.unwrap().into_inner().policy;
    assert_eq!(got, Some(policy));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn the_longest_paths_and_keys_are_told_page_by_page() {
    // Two rules whose paths are as long as they may be.
    let long = |end: &str| {
        let value = "é".repeat((1_024 - "rl|user=".len() - end.len()) / 2) + end;
        format!("{{key: user, value: '{value}', rate_limit: {{unit: hour, requests_per_unit: 9}}}}")
    };
    let open = rule("page", 9, "hour");
    let text = rl(&[long("ab"), long("cd"), open]);
    let server = Files::of(&[("rl.yaml", &text)]).serve().await;
    let (mut proxy, mut operator) = (Proxy::of(&server).await, Operator::of(&server).await);
    let paths: Vec<_> = operator.policies(1).await.into_iter().map(|one| one.name).collect();
    let longest: Vec<_> = paths.iter().filter(|path| path.len() == 1_024).collect();
    assert_eq!(longest.len(), 2);
    assert_eq!(operator.inspect(longest[1], "").await.limits[0].remaining, 9);

    let mut values: Vec<_> = ["a", "b"].map(|end| "\u{1F980}".repeat(64) + end).into();
    values.push("\u{1F980}".repeat(64));
    for value in &values {
        assert_eq!(proxy.hit("page", value).await, Told::Ok(8), "a bucket of its own");
    }
    let buckets = operator.buckets("rl|page", 1).await;
    assert_eq!(buckets.len(), 3);
    assert_eq!(buckets[2], (values[2].clone(), 1), "what fits is told as it is");
    for (key, _) in &buckets {
        assert!(key.len() <= 256);
        assert_eq!(acquire(&server, "rl|page", key, 1).await, Some(7));
        assert_eq!(operator.reset("rl|page", key).await.0.limits[0].spent, 2);
    }
    for value in &values {
        assert_eq!(proxy.one(peek("page", value)).await, Told::Ok(9));
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_rule_is_changed_in_its_file_and_who_tries_elsewhere_is_told_so() {
    let server = Files::of(&[("rl.yaml", &rl(&[rule("user", 9, "hour")]))]).serve().await;
    let mut operator = Operator::of(&server).await;
    let policy = operator.policies(0).await.remove(0);
    assert_eq!(policy.name, "rl|user");
    let put = |name: &str, dry_run| PutPolicyRequest {
        namespace: "envoy".into(),
        name: name.into(),
        policy: policy.policy.clone(),
        dry_run,
        ..Default::default()
    };
    let delete = |dry_run| DeletePolicyRequest {
        namespace: "envoy".into(),
        name: "rl|user".into(),
        dry_run,
        reason: "over".into(),
        ..Default::default()
    };
    for dry_run in [false, true] {
        for refused in [
            operator.0.put_policy(put("rl|user", dry_run)).await.unwrap_err(),
            operator.0.delete_policy(delete(dry_run)).await.unwrap_err(),
        ] {
            assert_eq!(refused.code(), Code::FailedPrecondition);
            assert_eq!(
                refused.message(),
                "policy `envoy/rl|user` is a rule of Envoy's rate limit service: change it in its file, in \
                 the folder `envoy_ratelimit.config_dir`; it takes effect at once"
            );
        }
    }
    // One that there is not has no such name either.
    let refused = operator.0.put_policy(put("rl|others", false)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    // But a policy of one's own may stand beside the rules.
    operator.0.put_policy(put("rl", false)).await.unwrap();
    assert_eq!(acquire(&server, "rl", "a", 1).await, Some(8));
    assert_eq!(acquire(&server, "rl|user", "a", 1).await, Some(8));
    server.stop().await.unwrap();
}
