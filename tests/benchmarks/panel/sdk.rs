//! What a decision costs the process that asks: the client's handles and layers beside the crates that decide for one
//! process alone.
//!
//! The client runs on threads of its own and has a real server, from which its leases come. What is compared takes
//! turns, a millisecond or so each, so that a neighbour who takes the CPU takes it from all.

mod contest;
mod guards;
mod steady;

use std::thread;

use fusebox_client::Client;
use tokio::runtime::{self, Runtime};

use crate::{
    Options, Result,
    process::{Engine, Home, Server},
};

pub(crate) async fn measure(options: &Options) -> Result<()> {
    let home = Home::new(options, Engine::Memory, 0)?;
    let server = home.start().await.map_err(|error| format!("not started: {error}"))?;
    guards::measure(options, &server).await?;
    steady::measure(options, &server).await
}

/// A client that is connected, and the threads that it runs on.
struct Site {
    client: Client,
    runtime: Option<Runtime>,
}

impl Site {
    async fn new(server: &Server) -> Result<Self> {
        let runtime =
            runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let client = {
            let _entered = runtime.enter();
            Client::connect(format!("http://{}", server.grpc())).namespace("bench").build()?
        };
        client.connected().await;
        Ok(Self { client, runtime: Some(runtime) })
    }

    fn handle(&self) -> Result<runtime::Handle> {
        Ok(self.runtime.as_ref().ok_or("it has ended")?.handle().clone())
    }

    async fn end(self) {
        self.client.close().await;
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // One that waits for its threads may not be dropped where another runs.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Threads that can run at a time.
fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}
