//! Envoy's rate limit service: what proxies are told, and what becomes of what they count.

mod algorithms;
mod bad_input;
mod folders;
mod hits;
mod keys;
mod metrics;
mod native;
mod operators;
mod races;
mod reload;
mod restart;
mod together;

use std::{fs, ops::Deref, path::PathBuf, sync::Arc};

use fusebox_proto::{
    Entry,
    envoy::{
        extensions::common::ratelimit::v3::{
            RateLimitDescriptor, rate_limit_descriptor::RateLimitOverride,
        },
        service::ratelimit::v3::{
            RateLimitRequest, RateLimitResponse,
            rate_limit_response::{Code, DescriptorStatus},
            rate_limit_service_client::RateLimitServiceClient,
        },
        r#type::v3::RateLimitUnit,
    },
};
use fusebox_server::run::RunError;
use fusebox_tests::{ManualClock, Server, Simulated, eventually};
use tempfile::TempDir;
use tonic::{Status, transport::Channel};

/// Files of rules, in a folder that is alone in another.
struct Files {
    above: TempDir,
}

impl Files {
    /// Each a name and a text.
    fn of(files: &[(&str, &str)]) -> Self {
        let own = Self { above: TempDir::new().expect("a folder") };
        fs::create_dir(own.folder()).unwrap();
        for (name, text) in files {
            own.write(name, text);
        }
        own
    }

    fn folder(&self) -> PathBuf {
        self.above.path().join("config")
    }

    /// Writes a file at once, as tools do.
    fn write(&self, name: &str, text: &str) {
        let new = self.folder().join(".new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.folder().join(name)).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.folder().join(name)).unwrap();
    }

    /// A configuration that has them followed, with more settings of its own and of others.
    fn config(&self, settings: &str, others: &str) -> String {
        let folder = self.folder();
        format!("envoy_ratelimit: {{config_dir: '{}', {settings}}}\n{others}", folder.display())
    }

    /// A server of these rules alone, which keeps nothing.
    async fn serve(self) -> Served {
        self.serve_with("", "").await
    }

    /// The same with more settings.
    async fn serve_with(self, settings: &str, others: &str) -> Served {
        Served { server: Server::start(&self.config(settings, others)).await, files: self }
    }
}

/// A server, and the files of its rules as long as it runs.
struct Served {
    server: Server,
    files: Files,
}

impl Served {
    async fn stop(self) -> Result<(), RunError> {
        self.server.stop().await
    }
}

impl Deref for Served {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

/// A disk and a clock that outlive servers.
#[derive(Default)]
struct Machine {
    journal: Simulated,
    clock: Arc<ManualClock>,
}

impl Machine {
    async fn start(&self, config: &str) -> Server {
        Server::start_on(self.journal.open(), Arc::clone(&self.clock), config).await
    }

    /// Ends a server by a loss of power.
    async fn crash(&self, server: Server) {
        self.journal.lose_power();
        server.stop().await.expect_err("it cannot write any more");
    }
}

/// The file of the domain `rl`, of these descriptors.
fn rl(descriptors: &[String]) -> String {
    format!("domain: rl\ndescriptors: [{}]", descriptors.join(", "))
}

/// A rule of one level, for each value of a key.
fn rule(key: &str, per_unit: u32, unit: &str) -> String {
    format!("{{key: {key}, rate_limit: {{unit: {unit}, requests_per_unit: {per_unit}}}}}")
}

/// The same with flags of its own.
fn flagged(key: &str, per_unit: u32, unit: &str, flags: &str) -> String {
    let limit = format!("rate_limit: {{unit: {unit}, requests_per_unit: {per_unit}}}");
    format!("{{key: {key}, {limit}, {flags}}}")
}

fn descriptor<'a>(entries: impl IntoIterator<Item = (&'a str, &'a str)>) -> RateLimitDescriptor {
    let entry = |(key, value): (&str, &str)| Entry { key: key.into(), value: value.into() };
    let entries = entries.into_iter().map(entry).collect();
    RateLimitDescriptor { entries, ..Default::default() }
}

/// One entry that counts so many hits.
fn hits(key: &str, value: &str, hits: u64) -> RateLimitDescriptor {
    RateLimitDescriptor { hits_addend: Some(hits), ..descriptor([(key, value)]) }
}

/// One entry that counts nothing.
fn peek(key: &str, value: &str) -> RateLimitDescriptor {
    hits(key, value, 0)
}

/// One entry that gives so many hits back.
fn back(key: &str, value: &str, count: u64) -> RateLimitDescriptor {
    RateLimitDescriptor { is_negative_hits: true, ..hits(key, value, count) }
}

/// The same with a limit of its own.
fn limited(of: RateLimitDescriptor, requests: u32, unit: RateLimitUnit) -> RateLimitDescriptor {
    let limit = RateLimitOverride { requests_per_unit: requests, unit: unit.into() };
    RateLimitDescriptor { limit: Some(limit), ..of }
}

/// What a descriptor is told, with how much is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Ok(u32),
    Over(u32),
    /// No rule limits it.
    Free,
}

fn told(status: &DescriptorStatus) -> Told {
    match (status.code(), &status.current_limit) {
        (Code::Ok, None) => Told::Free,
        (Code::Ok, Some(_)) => Told::Ok(status.limit_remaining),
        (Code::OverLimit, Some(_)) => Told::Over(status.limit_remaining),
        _ => panic!("{status:?}"),
    }
}

/// A proxy that asks of the domain `rl`.
struct Proxy(RateLimitServiceClient<Channel>);

impl Proxy {
    async fn of(server: &Server) -> Self {
        Self(RateLimitServiceClient::new(server.channel().await))
    }

    async fn try_send(&mut self, request: RateLimitRequest) -> Result<RateLimitResponse, Status> {
        self.0.should_rate_limit(request).await.map(tonic::Response::into_inner)
    }

    async fn send(&mut self, request: RateLimitRequest) -> RateLimitResponse {
        self.try_send(request).await.expect("an answer")
    }

    /// What each descriptor is told, and whether the request is over a limit.
    async fn ask(
        &mut self,
        descriptors: impl IntoIterator<Item = RateLimitDescriptor>,
    ) -> (bool, Vec<Told>) {
        let answer = self.send(request(descriptors)).await;
        let over = answer.overall_code() == Code::OverLimit;
        (over, answer.statuses.iter().map(told).collect())
    }

    /// What the only descriptor is told.
    async fn one(&mut self, descriptor: RateLimitDescriptor) -> Told {
        let (over, told) = self.ask([descriptor]).await;
        let [told] = told[..] else { panic!("{told:?}") };
        assert_eq!(over, matches!(told, Told::Over(_)));
        told
    }

    /// What one hit of a key and a value is told.
    async fn hit(&mut self, key: &str, value: &str) -> Told {
        self.one(hits(key, value, 1)).await
    }
}

fn request(descriptors: impl IntoIterator<Item = RateLimitDescriptor>) -> RateLimitRequest {
    let (domain, descriptors) = ("rl".into(), descriptors.into_iter().collect());
    RateLimitRequest { domain, descriptors, hits_addend: 0 }
}

/// The value of a series in `/metrics`, named with all of its labels.
async fn metric(server: &Server, series: &str) -> Option<u64> {
    let (_, text) = server.http("/metrics").await;
    let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    value.map(|value| value.parse().expect("a number"))
}

/// How often files were loaded, and how often not.
async fn loads(server: &Server) -> (u64, u64) {
    let of = async |result: &str| {
        let series = format!(r#"fusebox_ratelimit_config_loads_total{{result="{result}"}}"#);
        metric(server, &series).await.expect("a count")
    };
    (of("ok").await, of("error").await)
}

/// Waits until files were loaded so often, and so often not.
async fn loaded(server: &Server, ok: u64, error: u64) {
    eventually("they are loaded", async || loads(server).await == (ok, error)).await;
}
