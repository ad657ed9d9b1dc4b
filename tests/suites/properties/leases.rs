//! Random lives of clients that lease, over a network that delays, loses and repeats, judged by when tokens are
//! really spent.

use std::time::Duration;
use std::{collections::BTreeMap, pin::pin, sync::Arc, task::Context, task::Waker};

use fusebox_server::{
    app::{
        self, Acquire, Acquired, App, Ask, Client, GrantName, Granted, Principal, Priority, Report,
        Told,
    },
    config::Config,
    storage::Writer,
};
use fusebox_tests::{
    ManualClock, Simulated,
    panel::{app_on, told, write_all},
};

const PER_MILLIS: u64 = 10;
const LEASE_MILLIS: u64 = 2_000;

/// One token in each hundredth of a second; leases of two seconds.
fn config(burst: u64) -> Config {
    let bucket = format!("{{limit: 100, per: 1s, burst: {burst}}}");
    let policy = format!("shared: {{token_bucket: {bucket}, lease_time: 2s}}");
    let text = format!("namespaces: {{test: {{policies: {{{policy}}}}}}}");
    Config::parse("test.yaml", &text).unwrap()
}

const CLIENTS: [&str; 3] = ["a", "b", "c"];

/// Numbers that look random, the same for the same seed.
struct Dice(u64);

impl Dice {
    /// One of `0..sides`.
    fn roll(&mut self, sides: u64) -> u64 {
        // Marsaglia, "Xorshift RNGs", 2003.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// What a client believes to hold.
struct Lease {
    client: usize,
    grant: GrantName,
    left: u64,
    /// On the clock of the client.
    until_millis: u64,
}

/// Something on its way.
#[derive(Clone)]
enum Message {
    /// An Acquire, sent at that time.
    Acquire { client: usize, sent_millis: u64, cost: u64, estimated: bool, lease: u64 },
    /// The answer to one.
    Leased { client: usize, sent_millis: u64, grant: GrantName, leased: u64, lives_millis: u64 },
    /// A Report.
    Report { grant: GrantName, told: Told<'static> },
}

/// The most by which what was spent since any moment exceeds what flowed since.
#[derive(Default)]
struct Ledger {
    /// In thousandths of a token.
    excess: u64,
    at_millis: u64,
    most: u64,
    spent: u64,
}

impl Ledger {
    fn spend(&mut self, tokens: u64, at_millis: u64) {
        let flowed = (at_millis - self.at_millis) * 1_000 / PER_MILLIS;
        self.excess = self.excess.saturating_sub(flowed) + tokens * 1_000;
        self.at_millis = at_millis;
        self.most = self.most.max(self.excess);
        self.spent += tokens;
    }
}

struct World {
    burst: u64,
    /// Leases are spent as late as can be: what could be spent twice is.
    hoards: bool,
    dice: Dice,
    journal: Simulated,
    clock: Arc<ManualClock>,
    app: App,
    writer: Writer,
    now_millis: u64,
    /// By when they arrive; what arrives at once, in any order.
    network: BTreeMap<(u64, u64), Message>,
    leases: Vec<Lease>,
    ledger: Ledger,
    leased: u64,
    crashes: u64,
}

fn start(journal: &Simulated, clock: &Arc<ManualClock>, burst: u64) -> (App, Writer) {
    app_on(journal.open(), &config(burst), clock).unwrap()
}

impl World {
    fn new(seed: u64, burst: u64) -> Self {
        let (journal, clock) = (Simulated::default(), Arc::default());
        let (app, writer) = start(&journal, &clock, burst);
        Self {
            burst,
            hoards: seed % 4 < 2,
            dice: Dice(seed),
            journal,
            clock,
            app,
            writer,
            now_millis: 0,
            network: BTreeMap::new(),
            leases: Vec::new(),
            ledger: Ledger::default(),
            leased: 0,
            crashes: 0,
        }
    }

    /// Most messages arrive soon, some late, some twice, some never.
    fn send(&mut self, message: &Message) {
        let copies = match self.dice.roll(10) {
            0 => 0,
            1 => 2,
            _ => 1,
        };
        for _ in 0..copies {
            let late = if self.dice.roll(4) == 0 { 4_000 } else { 20 };
            let at = self.now_millis + self.dice.roll(late);
            let order = self.dice.roll(u64::MAX);
            self.network.insert((at, order), message.clone());
        }
    }

    fn step(&mut self, crashes: bool) {
        let client = self.dice.roll(CLIENTS.len() as u64) as usize;
        match self.dice.roll(if crashes { 101 } else { 100 }) {
            0..25 => {
                let sent_millis = self.now_millis;
                // Nothing, a little, or much of the bucket.
                let most = [1, 4, self.burst * 3 / 4][self.dice.roll(3) as usize];
                let cost = self.dice.roll(most);
                let estimated = cost > 0 && self.dice.roll(4) == 0;
                let lease = self.dice.roll(2) * self.dice.roll(self.burst);
                self.send(&Message::Acquire { client, sent_millis, cost, estimated, lease });
            }
            25..60 => self.spend(client),
            60..70 => self.give_back(client),
            70..75 => self.app.tend().unwrap(),
            75..80 => self.writer.catch_up(),
            80..100 => {
                let millis = [1, 20, 300, 1_800][self.dice.roll(4) as usize];
                self.advance(millis);
            }
            _ => self.crash(),
        }
    }

    fn advance(&mut self, millis: u64) {
        let until = self.now_millis + millis;
        while let Some((&(at, order), _)) = self.network.first_key_value()
            && at <= until
        {
            let message = self.network.remove(&(at, order)).unwrap();
            self.to(at.max(self.now_millis));
            self.arrive(&message);
        }
        self.to(until);
    }

    fn to(&mut self, millis: u64) {
        self.clock.advance(Duration::from_millis(millis - self.now_millis));
        self.now_millis = millis;
    }

    fn arrive(&mut self, message: &Message) {
        match *message {
            Message::Acquire { client, sent_millis, cost, estimated, lease } => {
                self.acquire(client, sent_millis, cost, estimated, lease);
            }
            Message::Leased { client, sent_millis, grant, leased, lives_millis } => {
                // Counted from the sending, less 1% and 10 ms; a copy of an answer is no other lease.
                let until_millis = sent_millis + (lives_millis * 99 / 100).saturating_sub(10);
                let known = self.leases.iter().any(|lease| lease.grant == grant);
                if !known {
                    self.leases.push(Lease { client, grant, left: leased, until_millis });
                }
            }
            Message::Report { grant, told } => self.report(grant, told),
        }
    }

    fn acquire(&mut self, client: usize, sent_millis: u64, cost: u64, estimated: bool, lease: u64) {
        let client_id = Client { id: CLIENTS[client], service: "", zone: "" };
        let ask = Ask { policy: "shared", key: "", cost, estimated, lease };
        let entry = app::Entry { asks: [ask], priority: Priority::Normal, retry: false };
        let acquire = Acquire { namespace: "test", client: Some(client_id), entry };
        let caller = self.app.caller(Principal::Anonymous);
        let tell = |acquired: &Acquired| {
            let held = acquired.held.first().copied().unwrap_or_default();
            let verdict = acquired.decided.decision.verdicts[0];
            assert!(verdict.remaining <= verdict.limit);
            (
                acquired.decided.decision.allowed,
                acquired.grant.clone().and_then(Granted::kept),
                held,
            )
        };
        let answer = self.app.acquire(caller, acquire, tell).unwrap();
        let (allowed, grant, held) = told(answer, &mut self.writer);
        if allowed {
            self.ledger.spend(cost, self.now_millis);
        }
        let Some(grant) = grant else { return };
        if held.leased > 0 {
            self.leased += held.leased;
            let lives_millis = held.expires_in.as_millis() as u64;
            let leased = held.leased;
            self.send(&Message::Leased { client, sent_millis, grant, leased, lives_millis });
        }
        // What an estimate really cost is never less than what was spent of it, as the ledger counts it.
        if estimated && held.leased == 0 {
            let told = Told { actual_cost: Some(cost), ..Told::default() };
            self.send(&Message::Report { grant, told });
        }
    }

    fn spend(&mut self, client: usize) {
        let now = self.now_millis;
        let early = if self.hoards { 300 } else { LEASE_MILLIS };
        let alive = |lease: &&mut Lease| {
            lease.client == client && now < lease.until_millis && lease.until_millis <= now + early
        };
        let Some(lease) = self.leases.iter_mut().filter(alive).find(|lease| lease.left > 0) else {
            return;
        };
        let tokens = if self.hoards { lease.left } else { 1 + self.dice.roll(lease.left) };
        lease.left -= tokens;
        self.ledger.spend(tokens, now);
    }

    /// The rest of a lease; what is given back is not spent any more.
    fn give_back(&mut self, client: usize) {
        let mut of_client = self.leases.iter_mut().filter(|lease| lease.client == client);
        let Some(lease) = of_client.find(|lease| lease.left > 0) else { return };
        let lease_returned = std::mem::take(&mut lease.left);
        let (grant, told) = (lease.grant, Told { lease_returned, ..Told::default() });
        self.send(&Message::Report { grant, told });
    }

    fn report(&mut self, grant: GrantName, told: Told<'_>) {
        let caller = self.app.caller(Principal::Anonymous);
        let outcomes = vec![(Some(Granted::Kept(grant)), told)];
        let report = Report { namespace: "test", outcomes, ..Report::default() };
        let mut report = pin!(self.app.report(caller, &report));
        while report.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            write_all(&mut self.writer).unwrap();
        }
    }

    /// The process is killed, and starts again at once.
    fn crash(&mut self) {
        self.journal.kill();
        (self.app, self.writer) = start(&self.journal, &self.clock, self.burst);
        self.crashes += 1;
    }
}

/// Plays so many lives, and asserts that none spends more beyond the rate than a burst and `more` tokens.
fn lives(seeds: std::ops::Range<u64>, burst: u64, crashes: bool, more: u64) {
    let (mut leased, mut spent, mut killed, mut highest) = (0, 0, 0, 0);
    let most = (burst + more) * 1_000;
    for seed in seeds {
        let mut world = World::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, burst);
        for _ in 0..400 {
            world.step(crashes);
        }
        let found = world.ledger.most;
        assert!(found <= most, "seed {seed}: {found} of {most} thousandths of a token");
        highest = highest.max(found);
        leased += world.leased;
        spent += world.ledger.spent;
        killed += world.crashes;
    }
    assert!(leased > 0 && spent > 0 && (killed > 0) == crashes);
    println!("{leased} leased, {spent} spent, {killed} kills, {highest} of {most} thousandths");
}

#[test]
fn what_is_spent_of_leases_never_exceeds_one_burst_and_the_rate() {
    lives(0..300, 200, false, 0);
    // One that is slow to fill, so that a crash does not empty it.
    lives(300..600, 1_500, false, 0);
}

#[test]
fn a_crash_adds_no_more_than_flows_in_one_lease_time() {
    lives(1_000..1_300, 200, true, LEASE_MILLIS / PER_MILLIS);
    lives(1_300..1_600, 1_500, true, LEASE_MILLIS / PER_MILLIS);
}
