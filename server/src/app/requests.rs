//! Answers remembered by the id of their request, so that who asks twice is charged once.
//!
//! A repetition of a request in progress joins it. Its answer is one for all of them: what it gave that can be
//! taken back is, and the answer forgotten, only when none of those who waited for it is left to be told. Any
//! other ALLOW stands, so that who lost it can ask again. A denial is told to those who joined, and not
//! remembered. A crash forgets: then it is charged again, never less.

use std::{
    collections::{HashMap, VecDeque, hash_map},
    fmt, mem,
    ops::Deref,
    sync::Arc,
};

use fusebox_core::Time;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::Principal;
use crate::{
    digest::{Content, Digest},
    limits,
};

/// Names a request: who asks, and the id that they gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestKey([u64; 2]);

/// What became of a request with an id.
#[derive(Debug)]
pub enum Begun<'a, T> {
    /// Nobody decided it yet, so this caller does.
    First(InProgress<'a, T>),
    /// Somebody else decides it now.
    Joined(Joined<'a, T>),
    /// It is decided.
    Decided(Share<T>),
    /// Another request has this id.
    Differs,
}

/// The requests in progress, and the answers that are remembered.
#[derive(Debug)]
pub struct Requests<T> {
    secret: [u8; 16],
    shards: Box<[Mutex<Shard<T>>]>,
}

#[derive(Debug)]
struct Shard<T> {
    entries: HashMap<RequestKey, Entry<T>>,
    /// In the order in which they were remembered, and until when. If its entry is of another time, it
    /// was replaced since.
    remembered: VecDeque<(RequestKey, Time)>,
}

#[derive(Debug)]
struct Entry<T> {
    digest: Digest,
    state: State<T>,
}

/// Those who joined a request in progress.
type Waiting<T> = Vec<oneshot::Sender<Share<T>>>;

#[derive(Debug)]
enum State<T> {
    /// Who is to be told; if one of these is dropped, they begin anew.
    InProgress(Waiting<T>),
    Remembered {
        until: Time,
        answer: Arc<Answer<T>>,
    },
}

impl<T> Requests<T> {
    /// Nothing is remembered; the secret is what nobody can guess, so that nobody finds two requests of
    /// one name.
    pub fn new(secret: [u8; 16]) -> Self {
        let shards = (0..limits::REQUEST_SHARDS).map(|_| Mutex::new(Shard::default())).collect();
        Self { secret, shards }
    }

    /// Names the request of that id of a client.
    pub fn key(&self, principal: Principal, client: &str, request: &str) -> RequestKey {
        let principal = match principal {
            Principal::Anonymous => "",
        };
        let Digest(key) = self.content().text(principal).text(client).text(request).digest();
        RequestKey(key)
    }

    /// To be filled with all that a repetition has to repeat.
    pub fn content(&self) -> Content {
        Content::new(&self.secret)
    }

    /// Begins a request, or finds what became of it.
    pub fn begin(&self, key: RequestKey, digest: Digest, now: Time) -> Begun<'_, T> {
        let mut shard = self.shard(key).lock();
        let found = match shard.entries.get_mut(&key) {
            Some(entry) => entry.find(digest, now),
            None => Found::Nothing,
        };
        match found {
            Found::Decided(told) => Begun::Decided(told),
            Found::Differs => Begun::Differs,
            Found::InProgress(answer) => {
                Begun::Joined(Joined { requests: self, key, digest, now, answer })
            }
            Found::Nothing => {
                shard.entries.insert(key, Entry { digest, state: State::InProgress(Vec::new()) });
                Begun::First(InProgress { requests: self, key, ended: false })
            }
        }
    }

    /// Forgets answers whose time is over, a bounded number of them.
    pub fn tend(&self, now: Time) {
        for shard in &self.shards {
            let mut shard = shard.lock();
            for _ in 0..limits::FORGOTTEN_PER_ROUND {
                if shard.remembered.front().is_none_or(|(_, until)| now < *until) {
                    break;
                }
                shard.forget_oldest();
            }
        }
    }

    /// Answers that take room now.
    pub fn remembered(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().remembered.len()).sum()
    }

    fn shard(&self, key: RequestKey) -> &Mutex<Shard<T>> {
        &self.shards[(key.0[0] >> 32) as usize % limits::REQUEST_SHARDS]
    }
}

impl<T> Default for Shard<T> {
    fn default() -> Self {
        Self { entries: HashMap::new(), remembered: VecDeque::new() }
    }
}

impl<T> Shard<T> {
    /// Remembers the answer of a request in progress; gives who is to be told.
    fn remember(&mut self, key: RequestKey, until: Time, answer: Arc<Answer<T>>) -> Waiting<T> {
        if self.remembered.len() == limits::REMEMBERED_REQUESTS / limits::REQUEST_SHARDS {
            self.forget_oldest();
        }
        let Some(entry) = self.entries.get_mut(&key) else { return Vec::new() };
        self.remembered.push_back((key, until));
        let state = State::Remembered { until, answer };
        match mem::replace(&mut entry.state, state) {
            State::InProgress(joined) => joined,
            State::Remembered { .. } => Vec::new(),
        }
    }

    /// Ends a request in progress without an answer to remember; gives who is to be told.
    fn end(&mut self, key: RequestKey) -> Waiting<T> {
        match self.entries.remove(&key) {
            Some(Entry { state: State::InProgress(joined), .. }) => joined,
            _ => Vec::new(),
        }
    }

    fn forget_oldest(&mut self) {
        let Some((key, time)) = self.remembered.pop_front() else { return };
        if let hash_map::Entry::Occupied(entry) = self.entries.entry(key)
            && matches!(entry.get().state, State::Remembered { until, .. } if until == time)
        {
            entry.remove();
        }
    }
}

/// What an entry is to a request of its key.
enum Found<T> {
    InProgress(oneshot::Receiver<Share<T>>),
    Decided(Share<T>),
    Differs,
    /// It was remembered, and is no longer.
    Nothing,
}

impl<T> Entry<T> {
    fn find(&mut self, digest: Digest, now: Time) -> Found<T> {
        let is_same = self.digest == digest;
        match &mut self.state {
            State::Remembered { until, .. } if *until <= now => Found::Nothing,
            State::Remembered { answer, .. } if !is_same && answer.is_lost() => Found::Nothing,
            _ if !is_same => Found::Differs,
            State::Remembered { answer, .. } => {
                answer.tell().map_or(Found::Nothing, Found::Decided)
            }
            State::InProgress(joined) => {
                // Those that went away make room before it grows: a client may repeat itself often.
                if joined.len() == joined.capacity() {
                    joined.retain(|one| !one.is_closed());
                }
                let (sender, receiver) = oneshot::channel();
                joined.push(sender);
                Found::InProgress(receiver)
            }
        }
    }
}

/// A request that this caller decides. If it is dropped undecided, one of those who joined decides it.
///
/// What charges and what ends this must not be split by an await, or a caller that goes away between them
/// leaves a charge that nobody knows of. An answer that waits for the disk is ended first and waits then.
#[derive(Debug)]
#[must_use = "a request in progress has to end"]
pub struct InProgress<'a, T> {
    requests: &'a Requests<T>,
    key: RequestKey,
    ended: bool,
}

impl<T> InProgress<'_, T> {
    /// Tells an ALLOW to this caller and those who joined, and remembers it.
    ///
    /// `until` is the shortest expiry that it carries, or [`limits::REMEMBERED_FOR`] from now if that is
    /// sooner. If nobody is left to be told, it is forgotten, and `undelivered` takes back what it gave.
    pub fn remember(
        self,
        answer: T,
        until: Time,
        undelivered: impl FnOnce(&T) + Send + 'static,
    ) -> Share<T> {
        let delivery = Delivery::Open { callers: 1, undelivered: Box::new(undelivered) };
        self.end(answer, delivery, Some(until))
    }

    /// The same of an ALLOW of which nothing is taken back: it is remembered also if nobody is left to be told,
    /// so that who repeats it is not charged again.
    pub fn keep(self, answer: T, until: Time) -> Share<T> {
        self.end(answer, Delivery::Done, Some(until))
    }

    /// Tells a denial, or whatever else gives nothing, to this caller and those who joined.
    pub fn tell(self, answer: T) -> Share<T> {
        self.end(answer, Delivery::Done, None)
    }

    fn end(mut self, answer: T, delivery: Delivery<T>, until: Option<Time>) -> Share<T> {
        self.ended = true;
        // This caller counts already, so the answer is not lost before all the others are told.
        let told = Share(Arc::new(Answer { answer, delivery: Mutex::new(delivery) }));
        let mut shard = self.requests.shard(self.key).lock();
        let joined = match until {
            Some(until) => shard.remember(self.key, until, Arc::clone(&told.0)),
            None => shard.end(self.key),
        };
        drop(shard);
        for one in joined {
            if let Some(told) = told.0.tell() {
                // Who is gone gives it back, and counts no longer.
                drop(one.send(told));
            }
        }
        told
    }
}

impl<T> Drop for InProgress<'_, T> {
    fn drop(&mut self) {
        if !self.ended {
            let joined = self.requests.shard(self.key).lock().end(self.key);
            drop(joined);
        }
    }
}

/// A request that somebody else decides.
#[derive(Debug)]
#[must_use = "who joined waits for the answer"]
pub struct Joined<'a, T> {
    requests: &'a Requests<T>,
    key: RequestKey,
    digest: Digest,
    now: Time,
    answer: oneshot::Receiver<Share<T>>,
}

impl<'a, T> Joined<'a, T> {
    /// Waits until the request is decided, or this caller has to decide it because who did went away.
    pub async fn turn(mut self) -> Begun<'a, T> {
        loop {
            if let Ok(told) = (&mut self.answer).await {
                return Begun::Decided(told);
            }
            match self.requests.begin(self.key, self.digest, self.now) {
                Begun::Joined(again) => self = again,
                begun => return begun,
            }
        }
    }
}

/// An answer, and who is being told it.
struct Answer<T> {
    answer: T,
    delivery: Mutex<Delivery<T>>,
}

/// Takes back what an answer gave.
type Undelivered<T> = Box<dyn FnOnce(&T) + Send>;

enum Delivery<T> {
    /// Nobody has been told yet.
    Open { callers: usize, undelivered: Undelivered<T> },
    /// Somebody has been told, or there is nothing to take back.
    Done,
    /// Nobody was told, and nobody will be.
    Lost,
}

impl<T: fmt::Debug> fmt::Debug for Answer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.answer.fmt(f)
    }
}

impl<T> Answer<T> {
    /// For one more caller; `None` if it is lost.
    fn tell(self: &Arc<Self>) -> Option<Share<T>> {
        match &mut *self.delivery.lock() {
            Delivery::Open { callers, .. } => *callers += 1,
            Delivery::Done => {}
            Delivery::Lost => return None,
        }
        Some(Share(Arc::clone(self)))
    }

    fn is_lost(&self) -> bool {
        matches!(*self.delivery.lock(), Delivery::Lost)
    }

    /// One caller less; gives what takes the answer back if that was the last.
    fn give_up(&self) -> Option<Undelivered<T>> {
        let mut delivery = self.delivery.lock();
        if let Delivery::Open { callers, .. } = &mut *delivery {
            *callers -= 1;
            if *callers > 0 {
                return None;
            }
        }
        match mem::replace(&mut *delivery, Delivery::Lost) {
            Delivery::Open { undelivered, .. } => Some(undelivered),
            former => {
                *delivery = former;
                None
            }
        }
    }
}

/// The answer, for one caller who is to be told. It is one for all who asked.
#[derive(Debug)]
#[must_use = "an answer that nobody is told is taken back"]
pub struct Share<T>(Arc<Answer<T>>);

impl<T> Share<T> {
    /// The caller was told: what the answer gave is now somebody's.
    pub fn delivered(self) {
        let former = mem::replace(&mut *self.0.delivery.lock(), Delivery::Done);
        drop(former);
    }
}

impl<T> Deref for Share<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.answer
    }
}

impl<T> Drop for Share<T> {
    fn drop(&mut self) {
        if let Some(undelivered) = self.0.give_up() {
            undelivered(&self.0.answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future,
        pin::{Pin, pin},
        sync::atomic::{AtomicUsize, Ordering},
        task::Poll,
    };

    use super::*;

    const KEY: RequestKey = RequestKey([1, 2]);
    const CONTENT: Digest = Digest([3, 4]);
    const OTHER: Digest = Digest([3, 5]);
    const NOW: Time = Time::from_nanos(10);
    const LATER: Time = Time::from_nanos(20);

    fn requests() -> Requests<u32> {
        Requests::new([7; 16])
    }

    /// How often an answer was taken back.
    #[derive(Clone, Default)]
    struct TakenBack(Arc<AtomicUsize>);

    impl TakenBack {
        fn one_more(&self) -> impl FnOnce(&u32) + Send + use<> {
            let taken_back = Arc::clone(&self.0);
            move |_| {
                taken_back.fetch_add(1, Ordering::Relaxed);
            }
        }

        fn times(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    fn begin(requests: &Requests<u32>) -> Begun<'_, u32> {
        requests.begin(KEY, CONTENT, NOW)
    }

    fn first(requests: &Requests<u32>) -> InProgress<'_, u32> {
        match begin(requests) {
            Begun::First(first) => first,
            other => panic!("{other:?}"),
        }
    }

    fn joined(requests: &Requests<u32>) -> Joined<'_, u32> {
        match begin(requests) {
            Begun::Joined(joined) => joined,
            other => panic!("{other:?}"),
        }
    }

    fn decided(begun: Begun<'_, u32>) -> Share<u32> {
        match begun {
            Begun::Decided(told) => told,
            other => panic!("{other:?}"),
        }
    }

    async fn poll<F: Future>(future: &mut Pin<&mut F>) -> Poll<F::Output> {
        future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await
    }

    #[test]
    fn a_repetition_is_told_the_same_until_the_answer_expires() {
        let requests = requests();
        first(&requests).remember(5, LATER, |_| ()).delivered();
        for _ in 0..3 {
            let told = decided(begin(&requests));
            assert_eq!(*told, 5);
            drop(told); // Somebody was told before, so this changes nothing.
        }
        assert!(matches!(requests.begin(KEY, CONTENT, LATER), Begun::First(_)));
    }

    #[test]
    fn other_content_under_the_same_id_is_refused() {
        let requests = requests();
        let in_progress = first(&requests);
        assert!(matches!(requests.begin(KEY, OTHER, NOW), Begun::Differs));
        in_progress.remember(5, LATER, |_| ()).delivered();
        assert!(matches!(requests.begin(KEY, OTHER, NOW), Begun::Differs));
        assert!(matches!(requests.begin(KEY, OTHER, LATER), Begun::First(_)));
    }

    #[tokio::test]
    async fn who_joins_is_told_what_the_first_is() {
        let requests = requests();
        let in_progress = first(&requests);
        let mut waiting = pin!(joined(&requests).turn());
        assert!(poll(&mut waiting).await.is_pending());
        in_progress.remember(5, LATER, |_| ()).delivered();
        assert_eq!(*decided(waiting.await), 5);
    }

    #[tokio::test]
    async fn a_denial_is_told_to_who_joined_and_forgotten() {
        let requests = requests();
        let in_progress = first(&requests);
        let waiting = joined(&requests);
        drop(in_progress.tell(5));
        assert_eq!(*decided(waiting.turn().await), 5);
        assert!(matches!(requests.begin(KEY, OTHER, NOW), Begun::First(_)));
        assert_eq!(requests.remembered(), 0);
    }

    #[tokio::test]
    async fn if_the_first_goes_away_one_of_the_joined_decides() {
        let requests = requests();
        let in_progress = first(&requests);
        let mut one = pin!(joined(&requests).turn());
        let mut other = pin!(joined(&requests).turn());
        assert!(poll(&mut one).await.is_pending() && poll(&mut other).await.is_pending());
        drop(in_progress);
        let Poll::Ready(Begun::First(in_progress)) = poll(&mut one).await else { panic!() };
        assert!(poll(&mut other).await.is_pending());
        in_progress.remember(5, LATER, |_| ()).delivered();
        assert_eq!(*decided(other.await), 5);
    }

    #[test]
    fn a_first_that_goes_away_alone_is_forgotten() {
        let requests = requests();
        drop(first(&requests));
        assert!(requests.shard(KEY).lock().entries.is_empty());
        assert!(matches!(requests.begin(KEY, OTHER, NOW), Begun::First(_)));
    }

    #[test]
    fn an_answer_that_nobody_is_told_is_taken_back_and_forgotten() {
        let (requests, taken_back) = (requests(), TakenBack::default());
        let told = first(&requests).remember(5, LATER, taken_back.one_more());
        assert_eq!(taken_back.times(), 0);
        drop(told);
        assert_eq!(taken_back.times(), 1);
        assert!(matches!(requests.begin(KEY, OTHER, NOW), Begun::First(_)));
        assert!(matches!(begin(&requests), Begun::First(_)));
    }

    #[test]
    fn an_answer_of_which_nothing_is_taken_back_is_kept_for_who_asks_again() {
        let requests = requests();
        drop(first(&requests).keep(5, LATER));
        assert_eq!(*decided(begin(&requests)), 5);
        assert!(matches!(requests.begin(KEY, OTHER, NOW), Begun::Differs));
        assert!(matches!(requests.begin(KEY, CONTENT, LATER), Begun::First(_)));
    }

    #[tokio::test]
    async fn an_answer_stands_as_long_as_somebody_is_left_to_be_told() {
        let (requests, taken_back) = (requests(), TakenBack::default());
        let in_progress = first(&requests);
        let (one, other) = (joined(&requests), joined(&requests));
        drop(in_progress.remember(5, LATER, taken_back.one_more()));
        drop(one);
        assert_eq!(taken_back.times(), 0);
        let repeated = decided(begin(&requests));
        drop(other.turn().await);
        assert_eq!(taken_back.times(), 0, "one asked again meanwhile");
        drop(repeated);
        assert_eq!(taken_back.times(), 1);
    }

    #[tokio::test]
    async fn an_answer_that_one_was_told_is_not_taken_back() {
        let (requests, taken_back) = (requests(), TakenBack::default());
        let in_progress = first(&requests);
        let waiting = joined(&requests);
        let told = in_progress.remember(5, LATER, taken_back.one_more());
        decided(waiting.turn().await).delivered();
        drop(told);
        assert_eq!((taken_back.times(), *decided(begin(&requests))), (0, 5));
    }

    #[tokio::test]
    async fn who_went_away_before_the_answer_does_not_count() {
        let (requests, taken_back) = (requests(), TakenBack::default());
        let in_progress = first(&requests);
        drop(joined(&requests));
        let mut waiting = Box::pin(joined(&requests).turn());
        assert!(poll(&mut waiting.as_mut()).await.is_pending());
        drop(waiting);
        drop(in_progress.remember(5, LATER, taken_back.one_more()));
        assert_eq!(taken_back.times(), 1);
    }

    #[test]
    fn an_answer_that_expires_before_anybody_is_told_is_taken_back_once() {
        let (requests, taken_back) = (requests(), TakenBack::default());
        let late = first(&requests).remember(5, LATER, taken_back.one_more());
        requests.tend(LATER);
        let Begun::First(again) = requests.begin(KEY, CONTENT, LATER) else { panic!() };
        let told = again.remember(6, Time::from_nanos(30), |_| panic!("it is another answer"));
        drop(late);
        assert_eq!(taken_back.times(), 1);
        assert_eq!(*decided(requests.begin(KEY, CONTENT, LATER)), 6);
        told.delivered();
    }

    #[test]
    fn the_oldest_answer_is_forgotten_first() {
        let requests = requests();
        let most = u32::try_from(limits::REMEMBERED_REQUESTS / limits::REQUEST_SHARDS).unwrap();
        // All of one shard.
        let key = |number: u32| RequestKey([0, number.into()]);
        for number in 0..=most {
            let Begun::First(first) = requests.begin(key(number), CONTENT, NOW) else { panic!() };
            // The last that is remembered expires first: that does not matter here.
            let until = LATER.after(limits::REMEMBERED_FOR / (1 + number));
            first.remember(5, until, |_| ()).delivered();
        }
        assert_eq!(requests.remembered(), most as usize);
        assert!(matches!(requests.begin(key(1), CONTENT, NOW), Begun::Decided(_)));
        assert!(matches!(requests.begin(key(0), CONTENT, NOW), Begun::First(_)));
    }

    #[test]
    fn a_round_forgets_a_bounded_number_of_expired_answers() {
        let requests = requests();
        let most = limits::FORGOTTEN_PER_ROUND;
        for number in 0..=most as u64 {
            let key = RequestKey([0, number]);
            let Begun::First(first) = requests.begin(key, CONTENT, NOW) else { panic!() };
            first.remember(5, LATER, |_| ()).delivered();
        }
        requests.tend(NOW);
        assert_eq!(requests.remembered(), most + 1);
        requests.tend(LATER);
        assert_eq!(requests.remembered(), 1);
        requests.tend(LATER);
        assert_eq!(requests.remembered(), 0);
        assert!(requests.shards.iter().all(|shard| shard.lock().entries.is_empty()));
    }

    #[test]
    fn what_replaced_an_expired_answer_is_not_forgotten_with_it() {
        let requests = requests();
        first(&requests).remember(5, LATER, |_| ()).delivered();
        let Begun::First(again) = requests.begin(KEY, CONTENT, LATER) else { panic!() };
        again.remember(6, Time::from_nanos(30), |_| ()).delivered();
        assert_eq!(requests.remembered(), 2);
        requests.tend(LATER);
        assert_eq!(requests.remembered(), 1);
        assert_eq!(*decided(requests.begin(KEY, CONTENT, LATER)), 6);
    }

    #[test]
    fn who_decides_anew_is_not_forgotten_with_the_expired_answer() {
        let requests = requests();
        first(&requests).remember(5, LATER, |_| ()).delivered();
        let again = requests.begin(KEY, CONTENT, LATER);
        requests.tend(LATER);
        assert!(matches!(requests.begin(KEY, CONTENT, LATER), Begun::Joined(_)));
        drop(again);
    }

    #[test]
    fn repetitions_that_went_away_take_no_room() {
        let requests = requests();
        let _in_progress = first(&requests);
        for _ in 0..1_000 {
            drop(joined(&requests));
        }
        let shard = requests.shard(KEY).lock();
        let State::InProgress(joined) = &shard.entries[&KEY].state else { panic!() };
        assert!(joined.capacity() < 10, "{}", joined.capacity());
    }

    #[test]
    fn an_entry_is_small() {
        // What the reason of `limits::REMEMBERED_REQUESTS` adds up.
        assert!(size_of::<(RequestKey, Entry<u32>)>() <= 56);
        assert!(size_of::<(RequestKey, Time)>() <= 24);
        assert!(size_of::<Answer<()>>() <= 40);
    }

    #[test]
    fn ids_that_join_to_the_same_text_are_different_requests() {
        let requests = requests();
        let key = |client, request| requests.key(Principal::Anonymous, client, request);
        let keys = [key("a_b", "c"), key("a", "b_c"), key("a_bc", ""), key("", "a_bc")];
        for (index, one) in keys.iter().enumerate() {
            assert!(!keys[..index].contains(one), "key {index} collides");
        }
        assert_ne!(
            key("a", "b"),
            Requests::<u32>::new([8; 16]).key(Principal::Anonymous, "a", "b")
        );
        let content = || requests.content().text("a");
        assert_eq!(content().number(1).digest(), content().number(1).digest());
        assert_ne!(content().number(1).digest(), content().number(2).digest());
    }

    /// Asks 64 times at once: how many decided, and what each is to be told.
    async fn ask_64_times(taken_back: &TakenBack) -> (usize, Vec<Share<u32>>) {
        let (requests, decisions) = (Arc::new(requests()), Arc::new(AtomicUsize::new(0)));
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..64 {
            let (requests, decisions) = (Arc::clone(&requests), Arc::clone(&decisions));
            let taken_back = taken_back.one_more();
            tasks.spawn(async move {
                let begun = match begin(&requests) {
                    Begun::Joined(joined) => joined.turn().await,
                    begun => begun,
                };
                let Begun::First(in_progress) = begun else { return decided(begun) };
                decisions.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
                in_progress.remember(number, LATER, taken_back)
            });
        }
        let all = tasks.join_all().await;
        (decisions.load(Ordering::Relaxed), all)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn of_64_at_once_exactly_one_decides() {
        for _ in 0..50 {
            let taken_back = TakenBack::default();
            let (decisions, mut all) = ask_64_times(&taken_back).await;
            assert_eq!(decisions, 1);
            assert!(all.iter().all(|told| **told == *all[0]));
            all.swap_remove(40).delivered();
            drop(all);
            assert_eq!(taken_back.times(), 0);
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn of_64_that_all_go_away_the_last_takes_the_answer_back() {
        for _ in 0..50 {
            let taken_back = TakenBack::default();
            let (_, mut all) = ask_64_times(&taken_back).await;
            let half = all.split_off(32);
            std::thread::scope(|scope| {
                scope.spawn(|| drop(half));
                drop(all);
            });
            assert_eq!(taken_back.times(), 1);
        }
    }
}
