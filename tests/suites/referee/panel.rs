//! A server without its transport, over a disk that outlives it.

use std::{
    pin::pin,
    sync::Arc,
    task::{Context, Waker},
    time::Duration,
};

use fusebox_core::Decision;
use fusebox_server::{
    app::{
        Acquire, AcquireError, Acquired, App, Ask, Batch, BatchError, Client, Entry, GrantName,
        Granted, Held, Principal, Priority, Receipt, Report, Told,
    },
    config::Config,
    limits,
    storage::{Writer, journal::Nothing},
};
use fusebox_tests::{
    Counting, ManualClock, Simulated,
    panel::{app_of, recover, told, write_all},
};

/// A server, and what stays of it when it is restarted.
#[derive(Default)]
pub struct Panel {
    disk: Simulated,
    entropy: Arc<Counting>,
    pub clock: Arc<ManualClock>,
    config: Option<Config>,
    running: Option<(App, Writer)>,
}

/// What a caller is told.
pub struct Answered {
    pub decision: Decision,
    pub grant: Option<GrantName>,
    pub held: Vec<Held>,
}

impl Answered {
    fn of(acquired: &Acquired) -> Self {
        Self {
            decision: acquired.decided.decision.clone(),
            grant: acquired.grant.clone().and_then(Granted::kept),
            held: acquired.held.to_vec(),
        }
    }
}

impl Panel {
    /// A server with another configuration: there is no other way to change it than a restart.
    pub fn configure(&mut self, config: Config) {
        self.config = Some(config);
        self.restart();
    }

    fn running(&mut self) -> (&App, &mut Writer) {
        let (app, writer) = self.running.as_mut().expect("a policy first");
        (app, writer)
    }

    pub fn acquire<'a>(
        &mut self,
        acquire: Acquire<'a, Vec<Ask<'a>>>,
    ) -> Result<Answered, AcquireError> {
        let (app, writer) = self.running();
        let answer = app.acquire(app.caller(Principal::Anonymous), acquire, Answered::of)?;
        Ok(told(answer, writer))
    }

    pub fn acquire_batch<'a>(
        &mut self,
        namespace: &'a str,
        entries: Vec<Entry<Vec<Ask<'a>>>>,
    ) -> Result<Vec<Answered>, BatchError> {
        let (app, writer) = self.running();
        let batch = Batch { namespace, client: None, entries: entries.into_iter() };
        let answers = app.acquire_batch(app.caller(Principal::Anonymous), batch, Answered::of)?;
        Ok(answers.into_iter().map(|answer| told(answer, writer)).collect())
    }

    pub fn report(
        &mut self,
        namespace: &str,
        outcomes: Vec<(Option<GrantName>, Told<'_>)>,
        renewals: Vec<Option<GrantName>>,
    ) -> Receipt {
        let (app, writer) = self.running();
        let kept = |(name, told): (Option<GrantName>, _)| (name.map(Granted::Kept), told);
        let outcomes = outcomes.into_iter().map(kept).collect();
        let report = Report { namespace, outcomes, renewals, ..Report::default() };
        let mut report = pin!(app.report(app.caller(Principal::Anonymous), &report));
        loop {
            match report.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                std::task::Poll::Ready(reported) => return reported.expect("a known namespace"),
                std::task::Poll::Pending => write_all(writer).expect("the disk writes"),
            }
        }
    }

    /// Time goes by, and housekeeping with it.
    pub fn advance(&mut self, by: Duration) {
        self.clock.advance(by);
        let (app, writer) = self.running();
        for _ in 0..limits::CELL_SHARDS {
            app.tend().expect("the storage keeps house");
        }
        write_all(writer).expect("the disk writes");
    }

    /// A clean stop, and a start.
    pub fn restart(&mut self) {
        if let Some((app, writer)) = self.running.take() {
            writer.finish(&app.grants().all()).expect("the disk writes");
        }
        self.start();
    }

    /// Is killed, and starts again.
    pub fn crash(&mut self) {
        self.disk.kill();
        self.start();
    }

    fn start(&mut self) {
        let config = self.config.as_ref().expect("a policy first");
        let recovered = recover(self.disk.open(), config, &self.clock).expect("the disk recovers");
        self.running = Some(app_of(recovered, Arc::clone(&self.entropy) as Arc<_>));
    }
}

/// A server that keeps nothing, for many threads at once.
pub fn in_memory(policies: &str) -> (App, Arc<ManualClock>) {
    let clock = Arc::<ManualClock>::default();
    let recovered = recover(Nothing::open(), &config(policies), &clock).expect("nothing recovers");
    (app_of(recovered, Arc::<Counting>::default()).0, clock)
}

/// A configuration of these policies, in the namespace `test`.
pub fn config(policies: &str) -> Config {
    let text = format!("namespaces: {{test: {{policies: {{{policies}}}}}}}");
    Config::parse("test.yaml", &text).expect("a configuration")
}

/// An Acquire of one ask, in the namespace `test`.
pub fn one<'a>(client: &'a str, ask: Ask<'a>) -> Acquire<'a, [Ask<'a>; 1]> {
    let client = Some(Client { id: client, service: "", zone: "" });
    let entry = Entry { asks: [ask], priority: Priority::Normal, retry: false };
    Acquire { namespace: "test", client, entry }
}
