//! A connection pool that is bounded for a whole fleet: `pool [ADDRESS [NAMESPACE]]`.
//!
//! Each connection holds a permit, so that all processes together have no more of them than the policy says, however
//! large their pools are. The connections go to Fusebox itself here, since that is there; a database takes its place.

use std::{env, io, time::Duration};

use deadpool::managed::{self, Metrics, Pool, PoolError, RecycleError, RecycleResult};
use fusebox_client::{Bulkhead, Client, Rejected, bulkhead::Permit};
use thiserror::Error;
use tokio::net::TcpStream;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "http://127.0.0.1:3873".to_owned());
    let namespace = arguments.next().unwrap_or_else(|| "demo".to_owned());

    // A permit is worth a wait that a call would not be: to connect takes as long.
    let client = Client::connect(address.as_str())
        .namespace(namespace)
        .decide_within(Duration::from_secs(2))
        .build()?;
    let (connections, rejected) = run(&client, address.trim_start_matches("http://")).await?;
    println!("two pools have {connections} connections together; the next: {rejected}");
    client.close().await;
    Ok(())
}

/// Opens connections in two pools, such as two processes have, until the fleet has no more: how many, and why no more.
///
/// # Errors
/// If the target cannot be reached.
pub async fn run(client: &Client, target: &str) -> Result<(usize, Rejected), NotConnected> {
    let pools = [pool(client, target)?, pool(client, target)?];
    let mut held = Vec::new();
    loop {
        for pool in &pools {
            match pool.get().await {
                Ok(connection) => held.push(connection),
                Err(PoolError::Backend(NotConnected::Rejected(why))) => {
                    return Ok((held.len(), why));
                }
                Err(PoolError::Backend(error)) => return Err(error),
                Err(error) => return Err(io::Error::other(error).into()),
            }
        }
    }
}

/// A pool as it is in each process.
fn pool(client: &Client, target: &str) -> io::Result<Pool<Connections>> {
    let permits = client.bulkhead("connections").max_wait(Duration::from_millis(200));
    let connections = Connections { permits, target: target.to_owned() };
    Pool::builder(connections).max_size(64).build().map_err(io::Error::other)
}

/// Opens connections that hold a permit.
struct Connections {
    permits: Bulkhead,
    target: String,
}

/// A connection, and the permit that it holds until it is closed.
struct Connection {
    stream: TcpStream,
    permit: Permit,
}

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum NotConnected {
    /// The fleet has as many as it may.
    #[error("{0}")]
    Rejected(#[from] Rejected),
    /// The target cannot be reached.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl managed::Manager for Connections {
    type Type = Connection;
    type Error = NotConnected;

    async fn create(&self) -> Result<Connection, NotConnected> {
        let permit = self.permits.acquire().await?;
        let stream = TcpStream::connect(&self.target).await?;
        Ok(Connection { stream, permit })
    }

    async fn recycle(
        &self,
        connection: &mut Connection,
        _: &Metrics,
    ) -> RecycleResult<NotConnected> {
        // Somebody else has its permit by now: it is one too many.
        if connection.permit.is_expired() {
            return Err(RecycleError::message("its permit has expired"));
        }
        // A connection that nobody uses has nothing to say: it was closed.
        match connection.stream.try_read(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            _ => Err(RecycleError::message("the target closed it")),
        }
    }
}
