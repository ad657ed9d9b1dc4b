//! The language of the scripts that speak as Envoy does: what proxies ask over the wire, and what they are told.

mod files;
mod shown;
mod wire;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use datadriven::TestCase;
use fusebox_proto::envoy::service::ratelimit::v3::{
    RateLimitRequest, rate_limit_service_client::RateLimitServiceClient,
};
use fusebox_server::config::{Config, envoy};
use fusebox_tests::{ManualClock, Server, Simulated, eventually};
use tokio::runtime::{Builder, Runtime};
use tonic::transport::Channel;

use self::files::Folder;
use crate::{
    table,
    words::{Arguments, wall},
};

/// The scripts beside the table that are written in this language.
pub fn scripts() -> Vec<PathBuf> {
    table::scripts().into_iter().filter(|script| is_script(script)).collect()
}

/// Whether a script is written in this language.
pub fn is_script(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("envoy"))
}

/// A script being run against a server over a disk that outlives it.
///
/// - `settings [none]`, then what is under `envoy_ratelimit`: the next files are those of a server that remembers
///   nothing; with `none` there is one that has no rules
/// - `files`, then those that there are from now on, each after `@ NAME`: a server starts, or the one that runs
///   loads them
/// - `load`, the same and a line of `? WORDS`: files of no server are wrong, are told so in these words, and where
/// - `ask [domain=D] [hits=N] [times=N]`, then descriptors, a line each: `KEY=VALUE KEY=VALUE [hits=N] [negative]
///   [limit=N/UNIT]`; with `times` an answer is a line
/// - `metrics [domain=D]`: the hits of its rules; without a domain what else is counted
/// - `calls`: how many calls ended with which code
/// - `advance by=D`, or `wall`, then a time
/// - `restart`: another server over the same disk
/// - `fail`: the disk fails
pub struct Script {
    runtime: Runtime,
    folder: Folder,
    clock: Arc<ManualClock>,
    disk: Simulated,
    settings: String,
    running: Option<Running>,
    /// Calls of the server that runs.
    asked: u64,
}

struct Running {
    server: Server,
    envoy: RateLimitServiceClient<Channel>,
}

impl Script {
    pub fn new() -> Self {
        Self {
            runtime: Builder::new_current_thread().enable_all().build().expect("a runtime"),
            folder: Folder::default(),
            clock: Arc::default(),
            disk: Simulated::default(),
            settings: String::new(),
            running: None,
            asked: 0,
        }
    }

    pub fn run(&mut self, case: &TestCase) -> String {
        let arguments = Arguments(&case.args);
        match case.directive.as_str() {
            "settings" => {
                // Nobody waits for its end: the next one has a disk of its own.
                self.running.take().inspect(|running| running.server.ask_to_stop());
                (self.disk, self.settings) = (Simulated::default(), case.input.clone());
                if arguments.has("none") {
                    self.start("");
                }
                String::new()
            }
            "files" => self.files(&case.input),
            "load" => self.load(&case.input),
            "ask" => self.ask(&arguments, &case.input),
            "metrics" => self.metrics(arguments.text("domain")),
            "calls" => self.calls(),
            "advance" => {
                self.clock.advance(arguments.duration("by").expect("advance by=DURATION"));
                String::new()
            }
            "wall" => {
                self.clock.set_wall(wall(case.input.trim()));
                String::new()
            }
            "restart" => {
                let Running { server, .. } = self.running.take().expect("files first");
                self.runtime.block_on(server.stop()).expect("the state is written");
                self.start(&self.config(&self.folder));
                String::new()
            }
            "fail" => {
                self.disk.fail();
                String::new()
            }
            other => panic!("no command `{other}`"),
        }
    }

    /// A configuration of the rules that are in a folder.
    fn config(&self, folder: &Folder) -> String {
        let folder = folder.path().display().to_string();
        let settings = self.settings.lines().map(|line| format!("  {line}\n"));
        format!("envoy_ratelimit:\n  config_dir: {folder}\n{}", settings.collect::<String>())
    }

    fn start(&mut self, config: &str) {
        let (journal, clock) = (self.disk.open(), Arc::clone(&self.clock));
        self.asked = 0;
        self.running = Some(self.runtime.block_on(async {
            let server = Server::start_on(journal, clock, config).await;
            let envoy = RateLimitServiceClient::new(server.channel().await);
            Running { server, envoy }
        }));
    }

    fn files(&mut self, input: &str) -> String {
        let Some(Running { server, .. }) = &self.running else {
            self.folder.write(input);
            self.start(&self.config(&self.folder));
            return String::new();
        };
        self.runtime.block_on(async {
            let before = loads(server).await;
            self.folder.write(input);
            let mut after = before;
            eventually("the files are looked at", async || {
                after = loads(server).await;
                after != before
            })
            .await;
            if after[1] > before[1] { "refused\n" } else { "loaded\n" }.to_owned()
        })
    }

    fn load(&self, input: &str) -> String {
        let (words, files): (Vec<_>, Vec<_>) =
            input.lines().partition(|line| line.starts_with("? "));
        let words = words.first().map_or("", |line| &line[2..]);
        let mut folder = Folder::default();
        folder.write(&files.join("\n"));
        let config = Config::parse("test.yaml", &self.config(&folder)).expect("a configuration");
        let settings = config.envoy_ratelimit.expect("settings");
        match envoy::read(Arc::new(settings)) {
            Ok(_) => "loaded\n".to_owned(),
            Err(error) => {
                error.mistakes.iter().map(|mistake| folder.shown(mistake, words)).collect()
            }
        }
    }

    fn ask(&mut self, arguments: &Arguments<'_>, input: &str) -> String {
        let number = |name| arguments.text(name).map(|text| text.parse().expect("a number"));
        let request = RateLimitRequest {
            domain: arguments.text("domain").unwrap_or_default().to_owned(),
            descriptors: input.lines().map(wire::descriptor).collect(),
            hits_addend: number("hits").unwrap_or(0),
        };
        let Running { envoy, .. } = self.running.as_mut().expect("files first");
        let mut answer = || {
            self.asked += 1;
            let answer = self.runtime.block_on(envoy.should_rate_limit(request.clone()));
            answer.map(tonic::Response::into_inner)
        };
        match number("times") {
            None => shown::answer(input, &answer()),
            Some(times) => shown::in_lines((0..times).map(|_| answer())),
        }
    }

    fn calls(&self) -> String {
        let Running { server, .. } = self.running.as_ref().expect("files first");
        self.runtime.block_on(async {
            let mut calls = BTreeMap::new();
            // A client has its answer a moment before the server has counted it.
            eventually("all calls are counted", async || {
                calls = shown::calls(&server.http("/metrics").await.1);
                calls.values().sum::<u64>() == self.asked
            })
            .await;
            calls.iter().map(|(code, count)| format!("{code}: {count}\n")).collect()
        })
    }

    fn metrics(&self, domain: Option<&str>) -> String {
        let Running { server, .. } = self.running.as_ref().expect("files first");
        let (_, metrics) = self.runtime.block_on(server.http("/metrics"));
        match domain {
            Some(domain) => shown::hits(&metrics, domain),
            None => shown::counts(&metrics),
        }
    }
}

/// How often files were loaded, and how often they could not be.
async fn loads(server: &Server) -> [u64; 2] {
    let (_, metrics) = server.http("/metrics").await;
    ["ok", "error"].map(|result| {
        let labels = format!(r#"result="{result}""#);
        shown::count(&metrics, "fusebox_ratelimit_config_loads_total", &labels)
    })
}
