//! Circuits as those are told of them who watch: first all that are there, then each change.
//!
//! Of a watcher only the version is kept that it knows. What changed since is asked of the [`Board`] when there is
//! room for another message, and looked up then: so who reads slowly costs no memory and is told the present, and who
//! is too far behind is told all anew.

use std::{
    ops::Range,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use fusebox_core::{
    Time,
    circuit::{Generation, View},
};
use thiserror::Error;

use super::{App, Caller, Client};
use crate::{
    clock::ServerClock,
    limits,
    reservation::Reservation,
    storage::{Board, Changes, CircuitName, Circuits, StorageError},
};

/// What somebody wants to watch.
#[derive(Clone, Debug)]
pub struct Watched<'a> {
    /// Namespace of the breakers.
    pub namespace: &'a str,
    /// Who watches, if it says so.
    pub client: Option<Client<'a>>,
    /// Only these breakers; empty is all.
    pub policies: &'a [String],
    /// The start, and the version of it, that the watcher knows all up to.
    pub known: (u64, u64),
}

/// Why it cannot be watched.
#[derive(Debug, Error)]
pub enum WatchError {
    /// No such namespace.
    #[error("unknown namespace `{0}`")]
    UnknownNamespace(String),
    /// No such policy.
    #[error("unknown policy `{policy}`")]
    UnknownPolicy {
        /// Which of those that were named.
        index: usize,
        /// The policy.
        policy: String,
    },
    /// It has no circuits.
    #[error("policy `{policy}` is a limiter: only circuits are watched")]
    NotABreaker {
        /// Which of those that were named.
        index: usize,
        /// The policy.
        policy: String,
    },
    /// As many as there may be.
    #[error("{} streams watch circuits, as many as this server serves", limits::WATCHERS)]
    TooManyWatchers,
    /// The storage cannot.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// What is told at once.
#[derive(Debug)]
pub struct News {
    /// The start that the version is of.
    pub epoch: u64,
    /// All up to this one is told.
    pub version: u64,
    /// What was told before is to be forgotten, once this is complete.
    pub snapshot: bool,
    /// Nothing more follows at once.
    pub complete: bool,
    /// Circuits, each with what it is; `None` of those that are not there, or are as if they were not.
    pub circuits: Vec<(Arc<CircuitName>, Option<View>)>,
    /// The generation of all that are not told of.
    pub absent: Generation,
    /// Since the watcher came: what is told is no older than that moment.
    pub elapsed: Duration,
    /// When the circuits were looked up.
    pub now: Time,
}

/// One who watches.
pub struct Watch {
    circuits: Arc<Circuits>,
    clock: ServerClock,
    namespace: Arc<str>,
    /// Empty is all.
    policies: Vec<String>,
    board: Arc<Board>,
    changes: Changes,
    arrived: Time,
    /// All up to this version is told; 0 if a snapshot is not complete.
    version: u64,
    telling: Option<Telling>,
    _counted: Reservation,
}

/// What is being told, in as many messages as it takes.
///
/// It is read in this order: the time that has elapsed, the version, the generation of absent circuits, and then,
/// message by message, each circuit. So
/// - what happens later has a later version and is told after this: what is looked up may be newer than the version,
///   and then is told twice, but nothing is missed, or believed for longer than it may be;
/// - a circuit leaves first, then that generation grows, then it gets a version: so whose leaving has a version up to
///   this one is told with a generation above all of its life;
/// - whose leaving comes between that generation and the look at it is told with one that is too low. Reports of that
///   are stale, and it is told again with the next version, at once;
/// - whoever is there again by then has begun no lower, so its next generation is above what is told now.
struct Telling {
    elapsed: Duration,
    version: u64,
    absent: Generation,
    /// It is a snapshot, of which nothing is told yet.
    begins: bool,
    /// Parts of all circuits that are yet to be looked at.
    parts: Range<usize>,
    /// Circuits that are yet to be told of.
    names: Vec<Arc<CircuitName>>,
}

impl App {
    /// Watches circuits from now on.
    ///
    /// # Errors
    /// If there are none of that name, or too many watch already.
    pub fn watch_circuits(
        &self,
        caller: Caller,
        watched: &Watched<'_>,
    ) -> Result<Watch, WatchError> {
        let Watched { namespace: name, client, policies, known: (epoch, version) } = *watched;
        let catalogue = self.catalogue.load();
        let namespace = catalogue
            .namespace(name)
            .ok_or_else(|| WatchError::UnknownNamespace(name.to_owned()))?;
        for (index, policy) in policies.iter().enumerate() {
            let policy = policy.clone();
            match namespace.policy(&policy) {
                Some(found) if found.breakers.is_some() => {}
                Some(_) => return Err(WatchError::NotABreaker { index, policy }),
                None => return Err(WatchError::UnknownPolicy { index, policy }),
            }
        }
        let counted = Reservation::of(&self.watchers, 1, limits::WATCHERS);
        let counted = counted.ok_or(WatchError::TooManyWatchers)?;
        if let Some(client) = client {
            self.desk.clients.see(name, client, caller.now.time);
        }
        let namespace = Arc::from(name);
        let board = self.circuits.boards().of(&namespace);
        let mut watch = Watch {
            circuits: Arc::clone(&self.circuits),
            clock: self.clock.clone(),
            namespace,
            policies: policies.to_vec(),
            changes: board.subscribe(),
            board,
            arrived: caller.now.time,
            version: if epoch == self.circuits.boards().epoch() { version } else { 0 },
            telling: None,
            _counted: counted,
        };
        watch.telling = Some(watch.since_told());
        // From here on the end wakes it.
        self.circuits.check_alive()?;
        Ok(watch)
    }

    /// Those who watch circuits.
    pub fn watchers(&self) -> usize {
        self.watchers.load(Ordering::Relaxed)
    }
}

impl Watch {
    /// What is to be told next: the rest of what is being told, or else what changes from now on, or that nothing
    /// does.
    ///
    /// # Errors
    /// If nothing is decided any more.
    pub async fn next(&mut self) -> Result<News, StorageError> {
        let telling = match self.telling.take() {
            Some(telling) => telling,
            None => self.changed().await?,
        };
        self.circuits.check_alive()?;
        Ok(self.tell(telling))
    }

    /// What changed, once something has, or it has been silent for long enough.
    async fn changed(&mut self) -> Result<Telling, StorageError> {
        let mut silence = pin!(tokio::time::sleep(limits::WATCH_HEARTBEAT));
        loop {
            let silent = tokio::select! {
                biased;
                () = &mut silence => true,
                // It ends with the board, which is ours as well.
                () = self.changes.heard() => false,
            };
            self.circuits.check_alive()?;
            let telling = self.since_told();
            if silent || telling.begins || !telling.names.is_empty() {
                return Ok(telling);
            }
            // Others' circuits: that it knows all up to here is told with what is told next.
            self.version = telling.version;
        }
    }

    /// What changed since the version that is told; all that is there if nobody knows that.
    fn since_told(&mut self) -> Telling {
        let elapsed = Duration::from_nanos(self.clock.time().nanos_since(self.arrived));
        if let Some((mut names, version)) = self.board.since(self.version) {
            let absent = self.circuits.absent();
            names.retain(|name| self.wants(name));
            return Telling { elapsed, version, absent, begins: false, parts: 0..0, names };
        }
        self.version = 0;
        let version = self.board.version();
        let (absent, parts) = (self.circuits.absent(), 0..limits::CIRCUIT_SHARDS);
        Telling { elapsed, version, absent, begins: true, parts, names: Vec::new() }
    }

    /// As much of it as there is room for in one message.
    fn tell(&mut self, mut telling: Telling) -> News {
        let now = self.clock.time();
        let mut circuits = Vec::new();
        while circuits.len() < limits::WATCH_CIRCUITS {
            if let Some(name) = telling.names.pop() {
                let view = self.circuits.told(name.cell);
                circuits.push((name, view));
            } else if let Some(part) = telling.parts.next() {
                telling.names = self.circuits.told_in(part, &self.namespace);
                telling.names.retain(|name| self.wants(name));
            } else {
                break;
            }
        }
        let Telling { elapsed, version, absent, .. } = telling;
        let snapshot = std::mem::take(&mut telling.begins);
        let complete = telling.parts.is_empty() && telling.names.is_empty();
        if complete {
            self.version = version;
        } else {
            self.telling = Some(telling);
        }
        let epoch = self.circuits.boards().epoch();
        News { epoch, version: self.version, snapshot, complete, circuits, absent, elapsed, now }
    }

    fn wants(&self, name: &CircuitName) -> bool {
        let policy = &*name.breaker.policy;
        self.policies.is_empty() || self.policies.iter().any(|wanted| *wanted == *policy)
    }
}

#[cfg(test)]
mod tests {
    use fusebox_core::circuit::{Mode, Order, Phase};
    use tokio::time::timeout;

    use super::*;
    use crate::{
        app::{
            Principal,
            by_hand::{ByHand, app},
        },
        catalogue::PolicyName,
        storage::Writer,
    };

    const BREAKERS: &str =
        "one: {breaker: {}}, two: {breaker: {}}, rate: {token_bucket: {limit: 1, per: 1s}}";

    /// An app, and what writes for it.
    struct Panel {
        app: App,
        writer: Writer,
        clock: Arc<ByHand>,
    }

    impl Panel {
        fn new() -> Self {
            let clock = Arc::default();
            let (app, writer) = app(BREAKERS, &clock);
            Self { app, writer, clock }
        }

        fn try_watch(&self, policies: &[&str], known: (u64, u64)) -> Result<Watch, WatchError> {
            let policies: Vec<_> = policies.iter().map(ToString::to_string).collect();
            let watched = Watched { namespace: "test", client: None, policies: &policies, known };
            self.app.watch_circuits(self.app.caller(Principal::Anonymous), &watched)
        }

        fn watch(&self, known: (u64, u64)) -> Watch {
            self.try_watch(&[], known).unwrap()
        }

        /// An operator gives an order, which waits to be written.
        fn order(&self, policy: &str, key: &str, mode: Mode) {
            let catalogue = self.app.catalogue();
            let policy = catalogue.policy(&PolicyName::new("test", policy)).unwrap();
            let (reason, actor) = ("a test".into(), "nobody".into());
            let order = Order { mode, ttl: Duration::from_secs(60), reason, actor };
            let place = policy.place(key).unwrap();
            let set =
                self.app.circuits().change_named(&place, self.app.time(), |_, circuit, turn| {
                    ((), circuit.set(&order, turn))
                });
            assert!(set.unwrap().is_some());
        }

        fn set(&mut self, policy: &str, key: &str, mode: Mode) {
            self.order(policy, key, mode);
            self.writer.round().unwrap();
        }
    }

    /// What is told without any wait.
    async fn at_once(watch: &mut Watch) -> Result<News, StorageError> {
        timeout(Duration::from_millis(1), watch.next()).await.expect("at once")
    }

    /// What is told when it has been silent for long enough, and not before.
    async fn after_silence(watch: &mut Watch) -> News {
        let instant = Duration::from_millis(1);
        let early = timeout(limits::WATCH_HEARTBEAT - instant, watch.next()).await;
        assert!(early.is_err(), "{early:?}");
        timeout(limits::WATCH_HEARTBEAT + instant, watch.next()).await.expect("in time").unwrap()
    }

    /// Which circuits, sorted, and whether they are open; `None` of those that are not there.
    fn told(news: &News) -> Vec<(String, Option<bool>)> {
        let told = news.circuits.iter().map(|(name, view)| {
            let is_open = view.as_ref().map(|view| view.phase == Phase::ForcedOpen);
            (format!("{}/{}", name.breaker.policy, name.key), is_open)
        });
        let mut told: Vec<_> = told.collect();
        told.sort();
        told
    }

    fn one(name: &str, is_open: bool) -> Vec<(String, Option<bool>)> {
        vec![(name.to_owned(), Some(is_open))]
    }

    #[tokio::test(start_paused = true)]
    async fn first_all_that_is_there_is_told_and_then_what_changes_once_it_is_written() {
        let mut panel = Panel::new();
        panel.set("one", "a", Mode::ForcedOpen);
        let mut watch = panel.watch((0, 0));
        let first = watch.next().await.unwrap();
        assert!(first.snapshot && first.complete);
        assert_eq!(told(&first), one("one/a", true));

        panel.order("two", "b", Mode::ForcedOpen);
        let silence = watch.next().await.unwrap();
        assert_eq!((told(&silence), silence.version), (vec![], first.version), "not on disk");
        panel.writer.round().unwrap();
        panel.set("one", "a", Mode::Normal);
        panel.set("one", "a", Mode::Disabled);
        let news = watch.next().await.unwrap();
        assert!(news.complete && !news.snapshot);
        let both = [one("one/a", false), one("two/b", true)].concat();
        assert_eq!(told(&news), both, "each once, as it is now");
        assert_eq!(news.version, first.version + 3);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_told_with_how_long_it_lasts() {
        let panel = Panel::new();
        let mut watch = panel.watch((0, 0));
        let first = watch.next().await.unwrap();
        assert!(first.snapshot && first.complete && first.circuits.is_empty());
        assert_eq!(first.elapsed, Duration::ZERO);
        for second in 1..3 {
            panel.clock.advance(Duration::from_secs(1));
            let silence = after_silence(&mut watch).await;
            assert!(silence.complete && !silence.snapshot && silence.circuits.is_empty());
            assert_eq!(silence.elapsed, Duration::from_secs(second));
            assert_eq!((silence.epoch, silence.version), (first.epoch, first.version));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_back_is_told_what_was_missed() {
        let mut panel = Panel::new();
        panel.set("one", "a", Mode::ForcedOpen);
        let first = panel.watch((0, 0)).next().await.unwrap();
        panel.set("one", "b", Mode::ForcedOpen);
        let mut back = panel.watch((first.epoch, first.version));
        let missed = back.next().await.unwrap();
        assert!(missed.complete && !missed.snapshot);
        assert_eq!(told(&missed), one("one/b", true));
        // Also that it was nothing, at once.
        let mut back = panel.watch((missed.epoch, missed.version));
        let nothing = at_once(&mut back).await.unwrap();
        assert_eq!((told(&nothing), nothing.snapshot), (vec![], false));

        // Of another start, of a time to come, or of none.
        for known in [(first.epoch + 1, first.version), (first.epoch, 100), (first.epoch, 0)] {
            let all = panel.watch(known).next().await.unwrap();
            assert!(all.snapshot && all.circuits.len() == 2, "{known:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_from_another_server_is_told_all_anew() {
        // Both have started in the same second.
        let [mut one, mut other] = [(); 2].map(|()| Panel::new());
        one.set("one", "a", Mode::ForcedOpen);
        other.set("one", "b", Mode::ForcedOpen);
        let known = one.watch((0, 0)).next().await.unwrap();
        let all = other.watch((known.epoch, known.version)).next().await.unwrap();
        assert!(all.snapshot);
        assert_eq!(told(&all), [("one/b".to_owned(), Some(true))]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_too_far_behind_is_told_all_anew() {
        let mut panel = Panel::new();
        let mut watch = panel.watch((0, 0));
        watch.next().await.unwrap();
        for number in 0..=limits::WATCH_LOG {
            panel.order("one", &number.to_string(), Mode::ForcedOpen);
        }
        panel.writer.round().unwrap();
        let mut names = Vec::new();
        let last = loop {
            let news = watch.next().await.unwrap();
            assert_eq!(news.snapshot, names.is_empty(), "the first of them begins it");
            assert!(news.circuits.len() <= limits::WATCH_CIRCUITS);
            names.extend(told(&news).into_iter().map(|(name, _)| name));
            if news.complete {
                break news;
            }
            assert_eq!(news.version, 0, "nothing to go on from");
        };
        names.sort();
        names.dedup();
        assert_eq!(names.len(), limits::WATCH_LOG + 1);
        assert_eq!(told(&watch.next().await.unwrap()), [], "and then it goes on");
        assert_eq!(last.version, 2 + limits::WATCH_LOG as u64);
    }

    #[tokio::test(start_paused = true)]
    async fn changes_of_many_circuits_are_one_version_when_all_are_told() {
        let mut panel = Panel::new();
        let mut watch = panel.watch((0, 0));
        let first = watch.next().await.unwrap();
        for number in 0..limits::WATCH_CIRCUITS + 1 {
            panel.order("one", &number.to_string(), Mode::ForcedOpen);
        }
        panel.writer.round().unwrap();
        let news = watch.next().await.unwrap();
        assert_eq!((news.complete, news.version), (false, first.version), "to go on from");
        // What changes meanwhile comes after that.
        panel.set("two", "", Mode::ForcedOpen);
        let rest = watch.next().await.unwrap();
        assert_eq!((rest.complete, rest.circuits.len()), (true, 1));
        assert_eq!(rest.version, first.version + news.circuits.len() as u64 + 1);
        assert_eq!(told(&watch.next().await.unwrap()), one("two/", true));
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_breakers_are_told_that_are_wanted() {
        let mut panel = Panel::new();
        panel.set("one", "a", Mode::ForcedOpen);
        panel.set("two", "a", Mode::ForcedOpen);
        let mut watch = panel.try_watch(&["two"], (0, 0)).unwrap();
        let first = watch.next().await.unwrap();
        assert_eq!(told(&first), one("two/a", true));
        panel.set("one", "b", Mode::ForcedOpen);
        // Others' changes are silence.
        let silence = after_silence(&mut watch).await;
        assert_eq!((told(&silence), silence.version), (vec![], first.version + 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_circuit_that_is_gone_is_told_at_the_generation_of_those_that_are_not_there() {
        let mut panel = Panel::new();
        panel.set("one", "a", Mode::ForcedOpen);
        let mut watch = panel.watch((0, 0));
        let first = watch.next().await.unwrap();
        let (_, Some(before)) = &first.circuits[0] else { panic!("{first:?}") };
        let long = Duration::from_secs(60) + limits::CIRCUIT_REMEMBERED;
        for rest in [long, limits::CIRCUIT_REMEMBERED] {
            panel.clock.advance(rest);
            for _ in 0..limits::CIRCUIT_SHARDS {
                panel.app.tend().unwrap();
            }
            panel.writer.round().unwrap();
        }
        assert_eq!(panel.app.circuits().live(), 0);
        let news = watch.next().await.unwrap();
        assert_eq!(told(&news), [("one/a".to_owned(), None)]);
        assert!(news.absent > before.generation);
        assert_eq!(news.absent, panel.app.circuits().absent());
        // Nor is one told of of which nothing is known but that it is there.
        panel.set("one", "a", Mode::Normal);
        assert_eq!(panel.app.circuits().live(), 1);
        assert_eq!(told(&panel.watch((0, 0)).next().await.unwrap()), []);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_is_told_at_once() {
        let panel = Panel::new();
        let mut watch = panel.watch((0, 0));
        watch.next().await.unwrap();
        let (next, ()) = tokio::join!(at_once(&mut watch), async {
            panel.app.circuits().end(&StorageError::gone());
        });
        assert!(matches!(next, Err(StorageError::Failed(_))));
        assert!(matches!(panel.try_watch(&[], (0, 0)), Err(WatchError::Storage(_))));
    }

    #[test]
    fn who_goes_away_is_not_counted_and_who_is_wrong_never_was() {
        let panel = Panel::new();
        let watches = [panel.watch((0, 0)), panel.watch((0, 0))];
        let wrong = panel.try_watch(&["one", "three"], (0, 0));
        assert!(matches!(wrong, Err(WatchError::UnknownPolicy { index: 1, .. })));
        let wrong = panel.try_watch(&["rate"], (0, 0));
        assert!(matches!(wrong, Err(WatchError::NotABreaker { index: 0, .. })));
        assert_eq!(panel.app.watchers(), 2);
        drop(watches);
        assert_eq!(panel.app.watchers(), 0);
        let watches: Vec<_> = (0..limits::WATCHERS).map(|_| panel.watch((0, 0))).collect();
        let one_more = panel.try_watch(&[], (0, 0));
        assert!(matches!(one_more, Err(WatchError::TooManyWatchers)));
        drop(watches);
        panel.watch((0, 0));
    }
}
