//! Many lives of a server on one data directory, most of which end by a kill.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use fusebox_proto::v1::ReportResult;
use fusebox_server::limits;
use parking_lot::Mutex;
use tempfile::TempDir;

use crate::{
    chance::Chance,
    clients::{Caller, Callers, Granted, LeftOpen},
    ledger::Ledger,
    policies::{self, FAST, Key},
    process::{Client, Ended, Process, READY},
};

/// What a log says when a rotation begins, and when it is over but for the removal of the old store.
const MOVING: &str = "moving what is alive to a fresh store";
const MOVED: &str = "moved what is alive";

/// A drain without anybody in flight takes about as long.
const DRAIN: Duration = Duration::from_millis(40);

/// A move of a few thousand records takes about as long.
const MOVE: Duration = Duration::from_millis(150);

/// Spent of every bucket that is large at the start: what estimates hold back then never meets a full one.
const SPENT_AT_FIRST: u64 = 1_000;

/// When a life ends, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Killed before it is ready.
    Open,
    /// Killed while it serves.
    Serving,
    /// Killed while it moves to a fresh store, or removes the old one.
    Rotation,
    /// Killed after SIGTERM.
    Drain,
    /// Not killed.
    Clean,
}

/// How many lives of a history end how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    pub open: usize,
    pub serving: usize,
    pub rotation: usize,
    pub drain: usize,
    pub clean: usize,
}

/// What happens in a history.
pub struct Plan {
    /// At least so many of each.
    pub ends: Ends,
    /// How long callers are let loose in a life.
    pub life: std::ops::Range<Duration>,
    /// Keys of each policy.
    pub keys: u64,
    /// Keys that are charged once at the start, so that a move takes its time.
    pub ballast: u64,
}

/// A data directory, and what is known of it.
struct History<'a> {
    plan: &'a Plan,
    home: TempDir,
    ledger: Arc<Mutex<Ledger>>,
    chance: Chance,
    had: Ends,
    /// How the last life ended, and what it left open.
    last: End,
    left_open: LeftOpen,
    begun: Instant,
    /// The longest start so far.
    start_takes: Duration,
}

/// Runs a whole history, and says how its lives ended.
pub async fn run(seed: u64, plan: &Plan) -> Ends {
    let mut chance = Chance::new(seed);
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("fusebox.yaml"), policies::configuration()).unwrap();
    let mut history = History {
        plan,
        home,
        ledger: Arc::new(Mutex::new(Ledger::new(policies::keys(plan.keys)))),
        chance: chance.fork(),
        had: Ends::default(),
        last: End::Clean,
        left_open: LeftOpen::default(),
        begun: Instant::now(),
        start_takes: Duration::ZERO,
    };
    history.first_life().await;
    while let Some(end) = history.next_end() {
        history.live(end).await;
    }
    history.last_life().await;
    let ledger = history.ledger.lock();
    ledger.check().unwrap_or_else(|violation| panic!("{violation}"));
    let answers = ledger.allowed();
    println!("seed {seed}: {} kills, {:?}, {answers} charges", history.had.kills(), history.had);
    history.had
}

impl History<'_> {
    fn data(&self) -> PathBuf {
        self.home.path().join("data")
    }

    fn start(&self) -> Process {
        Process::start(&self.data(), &self.home.path().join("fusebox.yaml"))
    }

    fn caller(&mut self, client: &Client) -> Caller {
        Caller::new(client, &self.ledger, self.chance.fork())
    }

    /// One of the ends that are still to come.
    fn next_end(&mut self) -> Option<End> {
        let mut to_come = Vec::new();
        for end in [End::Open, End::Serving, End::Rotation, End::Drain, End::Clean] {
            let more = self.plan.ends.of(end).saturating_sub(self.had.of(end));
            to_come.extend(std::iter::repeat_n(end, more));
        }
        (!to_come.is_empty()).then(|| self.chance.one_of(&to_come))
    }

    /// Lays the ground, and ends well.
    async fn first_life(&mut self) {
        let mut process = self.start();
        let client = process.ready().await;
        let mut caller = self.caller(&client);
        for key in policies::keys(self.plan.keys).filter(|key| key.policy.burst() > 1_000) {
            caller.acquire(&[(key, SPENT_AT_FIRST)], false).await.unwrap();
        }
        caller.weigh_down(self.plan.ballast).await;
        caller.look().await;
        process.ask_to_end().await;
        let ended = process.ended().await;
        assert_eq!(ended.code, Some(0), "{}", ended.log);
    }

    /// One life, that is to end like this.
    async fn live(&mut self, end: End) {
        let begun = Instant::now();
        let mut process = self.start();
        if end == End::Open {
            let until = self.chance.below(self.start_takes);
            tokio::time::sleep(until.saturating_sub(begun.elapsed())).await;
            return self.bury(process.kill().await);
        }
        let client = process.ready().await;
        self.start_takes = self.start_takes.max(begun.elapsed());
        self.look(&client).await;
        let left_open = Arc::clone(&self.left_open);
        let callers = Callers::let_loose(|| self.caller(&client), &left_open);
        let lives_on = match end {
            End::Rotation => {
                outgrow(&self.data());
                assert!(process.says(MOVING).await, "it lives until it moves");
                self.chance.below(MOVE)
            }
            _ => {
                self.plan.life.start + self.chance.below(self.plan.life.end - self.plan.life.start)
            }
        };
        tokio::time::sleep(lives_on).await;
        if end == End::Clean {
            callers.enough().await;
            return self.end_well(process, &client).await;
        }
        if end == End::Drain {
            process.ask_to_end().await;
            tokio::time::sleep(self.chance.below(DRAIN)).await;
        }
        let ended = process.kill().await;
        // Whoever is left could find another server at the same address.
        drop(callers);
        self.bury(ended);
    }

    /// What is left of every bucket after a start, and what becomes of estimates that an earlier life granted.
    async fn look(&mut self, client: &Client) {
        let mut caller = self.caller(client);
        caller.look().await;
        let left_open: Vec<Granted> = self.left_open.lock().drain(..).collect();
        for granted in left_open.iter().take(3) {
            let actual = granted.estimate / 2;
            let result = caller.report(granted, actual).await.unwrap();
            match self.last {
                End::Clean => assert_eq!(result, ReportResult::Applied, "{granted:?}"),
                End::Serving | End::Rotation => {
                    assert_eq!(result, ReportResult::UnknownGrant, "{granted:?}");
                }
                // Perhaps all was written by then, or not yet taken as read.
                End::Drain | End::Open => {
                    assert_ne!(result, ReportResult::Duplicate, "{granted:?}");
                }
            }
            let again = caller.report(granted, 0).await.unwrap();
            assert_ne!(again, ReportResult::Applied, "{granted:?} is settled once");
        }
    }

    /// Stops without a kill: nothing may be lost, so what is left is noted before.
    async fn end_well(&mut self, process: Process, client: &Client) {
        self.ledger.lock().ended();
        self.caller(client).look().await;
        process.ask_to_end().await;
        let ended = process.ended().await;
        assert_eq!(ended.code, Some(0), "{}", ended.log);
        (self.had.clean, self.last) = (self.had.clean + 1, End::Clean);
    }

    /// Says how a life really ended.
    fn bury(&mut self, ended: Ended) {
        let Ended { killed, code, log } = ended;
        assert!(killed || code == Some(0), "it ends by itself, with {code:?}: {log}");
        if !killed {
            self.ledger.lock().ended();
            (self.had.clean, self.last) = (self.had.clean + 1, End::Clean);
            return;
        }
        self.ledger.lock().killed();
        self.last = if !log.contains(READY) {
            End::Open
        } else if log.contains(r#""message":"draining""#) {
            End::Drain
        } else if log.contains(MOVING) && (!log.contains(MOVED) || self.stores() > 1) {
            End::Rotation
        } else {
            End::Serving
        };
        *self.had.count(self.last) += 1;
    }

    fn stores(&self) -> usize {
        let names = fs::read_dir(self.data()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with("store-")).count()
    }

    /// After the last kill: what is fast is full soon, permits are free again, and what was spent is.
    async fn last_life(&mut self) {
        let mut process = self.start();
        let client = process.ready().await;
        self.look(&client).await;
        let mut caller = self.caller(&client);
        for key in policies::keys(self.plan.keys) {
            let Key { policy, .. } = key;
            let begun = Instant::now();
            let fills = *policy == FAST || policy.ttl().is_some();
            while fills && i128::from(caller.left(key).await.1) < policy.burst() {
                assert!(begun.elapsed() < Duration::from_secs(10), "{key} does not fill");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        caller.check_weights(self.plan.ballast, self.begun).await;
        process.ask_to_end().await;
        let ended = process.ended().await;
        assert_eq!(ended.code, Some(0), "{}", ended.log);
    }
}

/// Makes the store so large that its server moves what is alive: with zeros behind the end of the log, which
/// sled overwrites as it grows, or cuts off at the next start. To write so much takes seconds.
fn outgrow(data: &Path) {
    let current = fs::read_to_string(data.join("CURRENT")).unwrap();
    let log = File::options().write(true).open(data.join(current.trim_end()).join("db")).unwrap();
    log.set_len(limits::ROTATION_BYTES + 1).unwrap();
}

impl Ends {
    fn of(&self, end: End) -> usize {
        let mut ends = *self;
        *ends.count(end)
    }

    fn count(&mut self, end: End) -> &mut usize {
        match end {
            End::Open => &mut self.open,
            End::Serving => &mut self.serving,
            End::Rotation => &mut self.rotation,
            End::Drain => &mut self.drain,
            End::Clean => &mut self.clean,
        }
    }

    /// Those that were kills.
    pub fn kills(&self) -> usize {
        self.open + self.serving + self.rotation + self.drain
    }
}
