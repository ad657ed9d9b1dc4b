//! A process that links the client: started, stopped, continued, killed.

use std::{path::Path, process::Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

/// What such a process is told by its environment.
pub const ROLE: &str = "FUSEBOX_FLEET_ROLE";
pub const NUMBER: &str = "FUSEBOX_FLEET_NUMBER";
pub const OBSERVER: &str = "FUSEBOX_FLEET_OBSERVER";
pub const SERVER: &str = "FUSEBOX_FLEET_SERVER";

/// A process of a client. It is killed when it is dropped, and ends by itself when the observer does.
pub struct Client(Child);

impl Client {
    /// Starts this very program, to play a role.
    pub fn start(role: &str, number: u64, observer: &Path, server: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "a_process", "--ignored", "--nocapture"]);
        command.env(ROLE, role).env(NUMBER, number.to_string());
        command.env(OBSERVER, observer).env(SERVER, server);
        // What it has to say of itself is why it failed.
        command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        Self(command.spawn().unwrap())
    }

    /// Kills it, by SIGKILL, and returns when it is dead.
    pub async fn kill(mut self) {
        self.signal(Signal::KILL);
        self.0.wait().await.unwrap();
    }

    /// Stops it where it is, by SIGSTOP.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on, by SIGCONT.
    pub fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = self.0.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).unwrap()));
        kill_process(pid.expect("it has not ended by itself"), signal).unwrap();
    }
}
