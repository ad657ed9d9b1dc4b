//! A fleet that spends and holds what it can while processes, network and server fail.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use fusebox_tests::{Fault, Proxy};
use parking_lot::Mutex;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{
    chance::Chance,
    client::Client,
    ledger::{self, Drought},
    millis, now,
    observer::{Observer, Said},
    server::Server,
};

/// Tokens a second, and at once.
const RATE: u64 = 400;
const BURST: u64 = 100;

/// Time to live of a lease.
const LEASE_TIME: Duration = millis(800);

/// Permits at a time.
const PERMITS: u64 = 5;

const CONFIGURATION: &str = "
namespaces:
  test:
    policies:
      tokens:
        token_bucket: {limit: 400, per: 1s, burst: 100}
        lease_time: 800ms
        on_unreachable: deny
      permits: {concurrency: {limit: 5, ttl: 1s}, on_unreachable: deny}
";

/// Processes at a time.
const PROCESSES: u64 = 5;

/// How long things go wrong.
const FOR: Duration = millis(22_000);

/// What befell a fleet, and when nobody can have had tokens.
#[derive(Clone, Default)]
struct Chronicle {
    droughts: Arc<Mutex<Vec<Drought>>>,
    faults: Arc<Mutex<BTreeMap<&'static str, u64>>>,
}

impl Chronicle {
    fn happens(&self, what: &'static str) {
        *self.faults.lock().entry(what).or_default() += 1;
    }

    /// From then on nothing reaches the server, so a lease time later all is spent or has expired; until now.
    fn was_cut_off(&self, why: &'static str, number: Option<u64>, since: u64) {
        let lease_time = u64::try_from(LEASE_TIME.as_nanos()).unwrap();
        self.was_dry(why, number, since + lease_time);
    }

    fn was_dry(&self, why: &'static str, number: Option<u64>, from: u64) {
        self.droughts.lock().push(Drought { why, number, from, to: now() });
    }
}

/// Runs the history of a seed.
pub async fn run(seed: u64) {
    let (mut chance, chronicle) = (Chance::new(seed), Chronicle::default());
    let (observer, mut server) = (Arc::new(Observer::new()), Server::of(CONFIGURATION));
    let address = server.start().await;
    let until = Instant::now() + FOR;
    let mut proxies = Vec::new();
    let mut lives = JoinSet::new();
    for number in 0..PROCESSES {
        let proxy = Arc::new(Proxy::to(address).await);
        proxies.push(Arc::clone(&proxy));
        let life = Life {
            number,
            process: start(&observer, &proxy, number),
            observer: Arc::clone(&observer),
            proxy,
            chance: chance.fork(),
            chronicle: chronicle.clone(),
        };
        lives.spawn(life.until(until));
    }
    kill_now_and_then(&mut server, &proxies, until, chance.fork(), &chronicle).await;
    lives.join_all().await;

    let book = observer.book();
    check(&book, &chronicle, now());
}

fn check(book: &[(u64, Said)], chronicle: &Chronicle, end: u64) {
    let spends = ledger::spends(book);
    let spent = ledger::spent_within(&spends, 0, end);
    let beyond = ledger::most_beyond(&spends, RATE);
    let held = ledger::most_held(book);
    let (droughts, faults) = (chronicle.droughts.lock(), chronicle.faults.lock());
    println!(
        "{spent} tokens in {} spends, at most {beyond} beyond the rate; at most {held} permits at a time; \
         {} droughts; {faults:?}",
        spends.len(),
        droughts.len(),
    );

    let most = BURST + RATE * u64::try_from(LEASE_TIME.as_millis()).unwrap() / 1_000;
    assert!(beyond <= most, "{beyond} tokens beyond the rate, where {most} can be");
    assert!(held <= PERMITS, "{held} permits were held at a time, where {PERMITS} can be");
    ledger::check_droughts(&spends, &droughts);

    // A fleet that does nothing does nothing wrong.
    let could = RATE * FOR.as_secs();
    assert!(spent >= could / 8, "{spent} tokens of {could} were spent: too few to tell");
    assert_eq!(held, PERMITS, "permits that were never all held do not tell");
    assert!(!droughts.is_empty() && faults.len() >= 5, "too little went wrong: {faults:?}");
}

fn start(observer: &Observer, proxy: &Proxy, number: u64) -> Client {
    Client::start("moody", number, &observer.path(), &proxy.url())
}

/// Kills the server, and has another one go on from what it left.
async fn kill_now_and_then(
    server: &mut Server,
    proxies: &[Arc<Proxy>],
    until: Instant,
    mut chance: Chance,
    chronicle: &Chronicle,
) {
    let redirect = |to: SocketAddr| proxies.iter().for_each(|proxy| proxy.redirect(to));
    loop {
        sleep(millis(1_500) + chance.below(millis(4_000))).await;
        if Instant::now() >= until {
            return;
        }
        chronicle.happens("the server was killed");
        server.kill().await;
        let since = now();
        // Half of the times for longer than a lease lives.
        sleep(chance.below(LEASE_TIME * 3)).await;
        chronicle.was_cut_off("the server was dead", None, since);
        redirect(server.start().await);
    }
}

/// One place in the fleet: a process, another one when it is killed, and its network.
struct Life {
    number: u64,
    process: Client,
    observer: Arc<Observer>,
    proxy: Arc<Proxy>,
    chance: Chance,
    chronicle: Chronicle,
}

impl Life {
    async fn until(mut self, until: Instant) {
        while Instant::now() < until {
            sleep(millis(200) + self.chance.below(millis(1_500))).await;
            match self.chance.within(0..8) {
                0 | 1 => self.is_killed().await,
                2 | 3 if self.chance.once_in(2) => self.is_stopped().await,
                2 | 3 => self.is_stopped_and_goes_on_cut_off().await,
                _ => self.is_badly_connected().await,
            }
        }
        self.process.kill().await;
    }

    async fn is_killed(&mut self) {
        self.chronicle.happens("a process was killed");
        // Its successor is there before it is dead, as when a fleet is rolled.
        self.number += PROCESSES;
        let successor = start(&self.observer, &self.proxy, self.number);
        std::mem::replace(&mut self.process, successor).kill().await;
    }

    async fn is_stopped(&mut self) {
        self.chronicle.happens("a process was stopped");
        self.process.stop();
        sleep(self.chance.below(LEASE_TIME * 3)).await;
        self.process.go_on();
    }

    async fn is_stopped_and_goes_on_cut_off(&mut self) {
        self.chronicle.happens("a process was stopped, and went on cut off");
        self.process.stop();
        self.proxy.set(Fault::BlackHole);
        sleep(LEASE_TIME + self.chance.below(LEASE_TIME)).await;
        let since = now();
        self.process.go_on();
        sleep(millis(500)).await;
        self.chronicle.was_dry("stopped, and cut off", Some(self.number), since);
        self.proxy.set(Fault::None);
    }

    async fn is_badly_connected(&mut self) {
        let delay = Fault::Delay(self.chance.below(millis(400)));
        let throttle = Fault::Throttle(self.chance.within(500..20_000));
        let cuts = [Fault::BlackHole, Fault::DeafServer, Fault::DeafClient];
        let cut = self.chance.one_of(&cuts);
        let fault = self.chance.one_of(&[delay, throttle, Fault::Reset, cut, cut]);
        self.chronicle.happens(match fault {
            Fault::Delay(_) => "a network was late",
            Fault::Throttle(_) => "a network was slow",
            Fault::Reset => "connections were reset",
            _ => "a network was cut",
        });
        self.proxy.set(fault);
        let since = now();
        sleep(millis(100) + self.chance.below(LEASE_TIME * 3)).await;
        if !matches!(fault, Fault::Delay(_) | Fault::Throttle(_)) {
            self.chronicle.was_cut_off("cut off", Some(self.number), since);
        }
        self.proxy.set(Fault::None);
    }
}
