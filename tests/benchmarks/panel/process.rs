//! Servers as processes of their own.

use std::{
    env,
    fs::{self, File},
    io::{self, BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::sleep,
};
use tonic::transport::{Channel, Endpoint};

use crate::{
    Options, Result,
    rules::{self, Others},
};

/// Longer than any start or end takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Pause between two looks at something that is awaited.
pub(crate) const LOOK: Duration = Duration::from_millis(2);

/// What is asked, and under which names.
const POLICIES: &str = "
namespaces:
  bench:
    policies:
      slow: {token_bucket: {limit: 1000000000, per: 1d}, max_cells: 10000000}
      fast: {token_bucket: {limit: 1000000000, per: 1s}, max_cells: 10000000}
      # What one process is given nearly all of.
      steady: {token_bucket: {limit: 10000, per: 1s}}
      # One that is not full again before it is looked at: its cells stay.
      slowest: {token_bucket: {limit: 1000, per: 366d}, max_cells: 10000000}
      # One that has room for a part of the keys that are made up, and never denies.
      flooded: {token_bucket: {limit: 1000, per: 366d, burst: 1000000000000}, max_cells: 1000000}
      fixed: {fixed_window: {limit: 1000000000, per: 1d}}
      calendar: {calendar_window: {limit: 1000000000, every: day, time_zone: Europe/Vienna}}
      sliding: {sliding_window: {limit: 1000000000, per: 1d}}
      # One at a time: all others wait.
      one: {concurrency: {limit: 1, ttl: 10m}}
      # Nobody releases them: what is measured is also how they expire.
      permits: {concurrency: {limit: 1000000000, ttl: 100ms}}
      retries: {retry_budget: {ratio: 20%}}
      shadow: {token_bucket: {limit: 1000000000, per: 1d}, shadow: true}
      target: {breaker: {}, max_cells: 100000}
      # One reporter opens it, and an order closes it: nothing else does.
      fleet:
        breaker: {min_reporters: 1, open_for: 1h, backoff: {max: 1h}, ramp: {steps: []}}
        max_cells: 100000
      three:
        limits:
          - token_bucket: {limit: 1000000000, per: 1d}
          - fixed_window: {limit: 1000000000, per: 1d}
          - sliding_window: {limit: 1000000000, per: 1d}
";

/// Where the rules of Envoy's rate limit service are, if there are any.
const RULES: &str = "envoy_ratelimit: {config_dir: rules}\n";

/// Where a server keeps its state.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    Memory,
    Relaxed,
    Strict,
}

impl Engine {
    pub(crate) const ALL: [Self; 3] = [Self::Memory, Self::Relaxed, Self::Strict];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Relaxed => "sled relaxed",
            Self::Strict => "sled strict",
        }
    }

    fn settings(self) -> &'static str {
        match self {
            Self::Memory => "{engine: memory}",
            Self::Relaxed => "{engine: sled, path: data, durability: relaxed}",
            Self::Strict => "{engine: sled, path: data, durability: strict}",
        }
    }
}

/// Where one server lives: configuration, log and data, deleted when dropped.
pub(crate) struct Home {
    folder: TempDir,
    server: PathBuf,
}

impl Home {
    /// With so many rules of Envoy's rate limit service; without one it is not served.
    pub(crate) fn new(options: &Options, engine: Engine, rules: u32) -> Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("fusebox-bench-");
        let folder = match &options.data {
            Some(place) => builder.tempdir_in(place)?,
            None => builder.tempdir()?,
        };
        let storage = engine.settings();
        let mut settings =
            format!("listen: 127.0.0.1:0\nops_listen: 127.0.0.1:0\nstorage: {storage}\n{POLICIES}");
        if rules > 0 {
            settings += RULES;
        }
        fs::write(folder.path().join("fusebox.yaml"), settings)?;
        let server = options.server.as_ref().ok_or("--server says which server to measure")?;
        let server =
            server.canonicalize().map_err(|error| format!("{}: {error}", server.display()))?;
        let home = Self { folder, server };
        home.write_rules(&rules::file(rules, Others::Exact))?;
        Ok(home)
    }

    /// Writes the file of rules, in the place of an earlier one.
    pub(crate) fn write_rules(&self, text: &str) -> Result<()> {
        let folder = self.folder.path().join("rules");
        fs::create_dir_all(&folder)?;
        Ok(fs::write(folder.join("bench.yaml"), text)?)
    }

    /// Starts the server and waits until it is ready.
    ///
    /// # Errors
    /// If it does not come up; the message says what the server said.
    pub(crate) async fn start(&self) -> Result<Server> {
        let log = self.folder.path().join("log");
        let mut command = Command::new(&self.server);
        // What the shell of whoever runs this sets is not what is measured.
        for (name, _) in
            env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"FUSEBOX_"))
        {
            command.env_remove(name);
        }
        command.args(["--config", "fusebox.yaml"]).current_dir(self.folder.path());
        command.stderr(File::create(&log)?);
        let begin = Instant::now();
        let mut server = Server::spawn(&mut command, 2)
            .map_err(|error| said(&log).unwrap_or_else(|| error.to_string()))?;
        while !server.is_ready().await {
            if server.child.try_wait()?.is_some() || begin.elapsed() > PATIENCE {
                return Err(said(&log).unwrap_or_else(|| "it never became ready".into()).into());
            }
            sleep(LOOK).await;
        }
        server.start = begin.elapsed();
        Ok(server)
    }

    /// Bytes of all files of the data directory.
    pub(crate) fn disk(&self) -> Result<u64> {
        fn bytes(folder: &Path) -> Result<u64> {
            let mut sum = 0;
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                let kind = entry.file_type()?;
                sum += if kind.is_dir() { bytes(&entry.path())? } else { entry.metadata()?.len() };
            }
            Ok(sum)
        }
        let data = self.folder.path().join("data");
        if data.exists() { bytes(&data) } else { Ok(0) }
    }
}

/// A server that runs, until dropped.
pub(crate) struct Server {
    child: Child,
    /// Where gRPC is served, and operations if they are.
    addresses: Vec<SocketAddr>,
    /// From the command to readiness.
    pub(crate) start: Duration,
}

impl Server {
    /// Starts the rival.
    pub(crate) fn rival() -> Result<Self> {
        Self::spawn(Command::new(env::current_exe()?).arg("rival"), 1)
    }

    /// Starts a server that says on stdout where it listens, at so many addresses.
    fn spawn(command: &mut Command, addresses: usize) -> Result<Self> {
        let begin = Instant::now();
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}", command.get_program().display()))?;
        let mut server = Self { child, addresses: Vec::new(), start: Duration::ZERO };
        let said = server.child.stdout.take().ok_or("no stdout")?;
        for line in BufReader::new(said).lines() {
            let line = line?;
            let last = line.split(' ').next_back().unwrap_or_default();
            server.addresses.extend(last.trim_start_matches("http://").parse::<SocketAddr>());
            if server.addresses.len() == addresses {
                server.start = begin.elapsed();
                return Ok(server);
            }
        }
        Err("it ended before it listened".into())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn grpc(&self) -> SocketAddr {
        self.addresses[0]
    }

    /// A connection to it.
    pub(crate) async fn channel(&self) -> Result<Channel> {
        Ok(Endpoint::from_shared(format!("http://{}", self.grpc()))?.connect().await?)
    }

    /// Asks the server to end, and tells how long that took.
    pub(crate) async fn stop(mut self) -> Result<Duration> {
        let begin = Instant::now();
        Command::new("kill").arg("-TERM").arg(self.pid().to_string()).status()?;
        while begin.elapsed() < PATIENCE {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(begin.elapsed()),
                Some(status) => return Err(format!("the server did not end well: {status}").into()),
                None => sleep(LOOK).await,
            }
        }
        Err("the server does not end".into())
    }

    /// What operations answer at that path, with its head.
    pub(crate) async fn get(&self, path: &str) -> io::Result<String> {
        let mut stream = TcpStream::connect(self.addresses[1]).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    async fn is_ready(&self) -> bool {
        self.get("/readyz").await.is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; there is nobody to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Why a server ended, as it told people.
fn said(log: &Path) -> Option<String> {
    let log = fs::read_to_string(log).ok()?;
    let told = log.lines().find_map(|line| line.strip_prefix("fusebox: "));
    told.or(log.lines().last()).map(str::to_owned)
}
