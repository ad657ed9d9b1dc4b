//! The server's own program, on one data directory from start to start.

use std::{fs::File, net::SocketAddr, process::Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::timeout,
};

use crate::PATIENCE;

/// A server, up or not. It is killed when it is dropped, and its data is removed.
pub struct Server {
    directory: TempDir,
    running: Option<Child>,
}

impl Server {
    /// A server of this configuration, which is not up yet.
    pub fn of(configuration: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("fusebox.yaml"), configuration).unwrap();
        Self { directory, running: None }
    }

    /// Starts it, and tells where it serves.
    pub async fn start(&mut self) -> SocketAddr {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fusebox"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("FUSEBOX_")) {
            command.env_remove(name);
        }
        command.args(["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0", "--log", "warn"]);
        command.arg("--data").arg(self.directory.path().join("data"));
        command.arg("--config").arg(self.directory.path().join("fusebox.yaml"));
        let log = self.directory.path().join("log");
        command.stdout(Stdio::piped()).stderr(File::create(&log).unwrap()).kill_on_drop(true);
        let child = self.running.insert(command.spawn().unwrap());
        match timeout(PATIENCE, serves_at(child)).await {
            Ok(Some(address)) => address,
            _ => panic!("the server does not start: {}", std::fs::read_to_string(log).unwrap()),
        }
    }

    /// Kills it, by SIGKILL, and returns when it is dead.
    pub async fn kill(&mut self) {
        let mut child = self.running.take().expect("it is up");
        let pid = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).unwrap()));
        kill_process(pid.expect("it has not ended by itself"), Signal::KILL).unwrap();
        child.wait().await.unwrap();
    }
}

async fn serves_at(child: &mut Child) -> Option<SocketAddr> {
    let mut lines = BufReader::new(child.stdout.take()?).lines();
    loop {
        let line = lines.next_line().await.ok()??;
        if let Some((_, address)) = line.split_once("gRPC") {
            // What it goes on to say fits into the pipe, or into nothing.
            tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
            return address.trim().parse().ok();
        }
    }
}
