//! The program itself: started, watched, asked to end, killed.

use std::{os::unix::process::ExitStatusExt, path::Path, process::Stdio, time::Duration};

use fusebox_proto::v1::resilience_client::ResilienceClient;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, Command},
    sync::watch,
    task::JoinHandle,
    time::timeout,
};
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

/// Wait for a start or an end; only a test that fails ever waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the log says once it serves.
pub const READY: &str = r#""message":"ready""#;

pub type Client = ResilienceClient<Channel>;

/// A process that was started, and is killed when a test fails.
pub struct Process {
    child: Child,
    log: watch::Receiver<String>,
    logging: JoinHandle<()>,
}

/// How a process ended, and all that it said.
pub struct Ended {
    pub killed: bool,
    pub code: Option<i32>,
    pub log: String,
}

impl Process {
    /// Starts a server on a data directory.
    pub fn start(data: &Path, configuration: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fusebox"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("FUSEBOX_")) {
            command.env_remove(name);
        }
        command.args(["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"]);
        command.args(["--log", "info,fusebox_server=debug"]);
        command.arg("--data").arg(data).arg("--config").arg(configuration);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let (said, log) = watch::channel(String::new());
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let logging = tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                said.send_modify(|log| *log += &(line + "\n"));
            }
        });
        Self { child, log, logging }
    }

    /// Waits until it serves, and connects.
    pub async fn ready(&mut self) -> Client {
        ResilienceClient::new(self.connected().await)
    }

    /// The same, to whatever service.
    pub async fn connected(&mut self) -> Channel {
        if let Ok(Some(channel)) = timeout(PATIENCE, self.connect_when_ready()).await {
            return channel;
        }
        // All that it says, also of its end.
        let _ = timeout(Duration::from_secs(1), &mut self.logging).await;
        panic!("it does not start: {}", *self.log.borrow());
    }

    async fn connect_when_ready(&mut self) -> Option<Channel> {
        let mut lines = BufReader::new(self.child.stdout.as_mut()?).lines();
        let address = loop {
            let line = lines.next_line().await.ok()??;
            if let Some((_, address)) = line.split_once("gRPC") {
                break address.trim().to_owned();
            }
        };
        let endpoint = Endpoint::from_shared(format!("http://{address}")).ok()?;
        let channel = endpoint.tcp_nodelay(true).connect().await.ok()?;
        let service = "fusebox.v1.Resilience".to_owned();
        let mut health =
            HealthClient::new(channel.clone()).watch(HealthCheckRequest { service }).await.ok()?;
        while health.get_mut().message().await.ok()??.status() != ServingStatus::Serving {}
        Some(channel)
    }

    /// Waits until it says this; false if it ends before.
    pub async fn says(&mut self, words: &str) -> bool {
        let said = self.log.wait_for(|log| log.contains(words));
        timeout(PATIENCE, said).await.expect("it is said in time").is_ok()
    }

    /// Asks it to end, by SIGTERM.
    pub async fn ask_to_end(&self) {
        let Some(pid) = self.child.id() else { return };
        let mut kill = Command::new("kill");
        assert!(kill.args(["-TERM", &pid.to_string()]).status().await.unwrap().success());
    }

    /// Kills it, by SIGKILL, unless it has ended by itself.
    pub async fn kill(mut self) -> Ended {
        self.child.start_kill().unwrap();
        self.ended().await
    }

    /// Waits for its end.
    pub async fn ended(mut self) -> Ended {
        let ended = timeout(PATIENCE, self.child.wait()).await;
        let status = ended.unwrap_or_else(|_| panic!("it never ends: {}", *self.log.borrow()));
        let status = status.unwrap();
        self.logging.await.unwrap();
        let mut rest = String::new();
        if let Some(mut stdout) = self.child.stdout.take() {
            let _ = stdout.read_to_string(&mut rest).await;
        }
        let log = self.log.borrow().clone();
        Ended { killed: status.signal() == Some(9), code: status.code(), log }
    }
}
