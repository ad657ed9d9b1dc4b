//! A process of a fleet in the simulation: its calls, and what it writes down of them.

use std::{future::pending, ops::Range, sync::Arc, time::Duration};

use fusebox_client::{Client, Clock, Decider, Fallback, Rejected};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::time::sleep;
use turmoil::net::TcpStream;

use crate::{
    chance::Chance,
    ledger::{Entry, What},
    server,
};

/// What one process is given.
#[derive(Clone)]
pub struct Process {
    pub index: usize,
    pub chance: Arc<Chance>,
    pub ledger: Arc<Mutex<Vec<Entry>>>,
    /// Whether the target works.
    pub target: Arc<Mutex<bool>>,
}

impl Process {
    /// Calls until its host is crashed.
    ///
    /// # Errors
    /// If it cannot even begin.
    pub async fn run(self) -> turmoil::Result {
        let address = format!("http://server:{}", server::PORT);
        let client = Client::connect([address])
            .namespace("test")
            .service(format!("process-{}", self.index))
            .connector(tower::service_fn(connect))
            .clock(Clock::given(now))
            // Who has never heard of a policy must not spend: else no limit could be held to anything.
            .fallback(Fallback::Deny)
            .seed(self.chance.next())
            .build()?;
        for policy in ["strict", "open", "slow"] {
            for _ in 0..2 {
                tokio::spawn(self.clone().spends(client.clone(), policy, 3..40));
            }
        }
        // Leases of it outlive the need, so that some are there when things go wrong.
        tokio::spawn(self.clone().spends(client.clone(), "calm", 1..300));
        tokio::spawn(self.clone().holds(client.clone()));
        tokio::spawn(self.calls(client));
        pending().await
    }

    fn note(&self, what: What) {
        self.ledger.lock().push(Entry { at: now(), client: self.index, what });
    }

    fn rejected(&self, policy: &'static str, began: Duration, rejected: &Rejected) {
        let after = now().saturating_sub(began);
        self.note(What::Rejected { policy, decider: rejected.decider, after });
    }

    async fn pause(&self, millis: Range<u64>) {
        sleep(Duration::from_millis(self.chance.within(millis))).await;
    }

    /// Spends as much as it may, once it was told of the policy.
    async fn spends(self, client: Client, policy: &'static str, pauses: Range<u64>) {
        let limiter = client.limiter(policy);
        let mut knows = false;
        loop {
            let tokens = self.chance.within(1..4);
            let began = now();
            match limiter.acquire(tokens).await {
                Ok(()) => {
                    knows = true;
                    self.note(What::Spent { policy, tokens });
                }
                Err(rejected) if knows || rejected.decider != Decider::Fallback => {
                    self.rejected(policy, began, &rejected);
                }
                Err(_) => {}
            }
            self.pause(pauses.clone()).await;
        }
    }

    /// Holds permits, as long as they last.
    async fn holds(self, client: Client) {
        let bulkhead = client.bulkhead("permits").max_wait(Duration::from_millis(500));
        loop {
            match bulkhead.acquire().await {
                Ok(permit) => {
                    let number = self.chance.next();
                    self.note(What::Held { permit: number });
                    tokio::select! {
                        biased;
                        () = permit.expired() => {}
                        () = self.pause(1..4_000) => {}
                    }
                    self.note(What::LetGo { permit: number });
                    drop(permit);
                }
                // It may wait: how long a rejection takes says nothing.
                Err(rejected) => self.rejected("permits", now(), &rejected),
            }
            self.pause(1..200).await;
        }
    }

    /// Calls a target through its circuit.
    async fn calls(self, client: Client) {
        let breaker = client.breaker("target");
        loop {
            let began = now();
            match breaker.admit().await {
                Ok(permit) => {
                    self.pause(1..10).await;
                    let success = *self.target.lock();
                    self.note(What::Called { success });
                    if success { permit.success() } else { permit.failure("boom") }
                }
                Err(rejected) => self.rejected("target", began, &rejected),
            }
            self.pause(10..80).await;
        }
    }
}

async fn connect(uri: http::Uri) -> std::io::Result<TokioIo<TcpStream>> {
    let host = uri.host().unwrap_or_default().to_owned();
    Ok(TokioIo::new(TcpStream::connect((host, server::PORT)).await?))
}

fn now() -> Duration {
    turmoil::sim_elapsed().unwrap_or_default()
}
