//! Lines of Acquires that wait: a line, not a reservation.
//!
//! The server holds the reply of who stands in line. Nothing is charged before the head of a line is
//! admitted, so leaving costs nothing, and leaving is all that a lost caller, a crash and a drain do.
//!
//! Only the head of a cell tries; it is woken when what it waits for may have changed, and all others
//! sleep until they are the head. So what happens at a cell wakes one waiter, however many there are.

use std::{
    collections::{BTreeMap, HashMap},
    future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

use super::Priority;
use crate::{catalogue::CellId, limits, reservation::Reservation};

/// Everybody who waits, at every cell.
#[derive(Debug)]
pub struct Lines {
    /// Who stands anywhere: while that is nobody, nobody else looks further.
    standing: Arc<AtomicUsize>,
    shards: Box<[Mutex<Shard>]>,
    draining: CancellationToken,
}

#[derive(Debug, Default)]
struct Shard {
    /// Tickets given so far: they tell the order of arrival, and are never given again.
    tickets: u64,
    /// A line in which nobody stands is not here.
    lines: HashMap<CellId, Line>,
}

/// Who waits at one cell, by priority, in order of arrival.
#[derive(Debug, Default)]
struct Line {
    queues: [BTreeMap<u64, Arc<Notify>>; Priority::COUNT],
}

/// What an attempt to be admitted came to.
#[derive(Debug)]
pub enum Attempt<T> {
    /// It is admitted, and charged.
    Admitted(T),
    /// Nothing was charged.
    NotYet {
        /// When to try again, if nothing happens before; `None` if only something that happens helps.
        retry_after: Option<Duration>,
        /// What to answer if there is no time to try again.
        denied: T,
    },
}

/// What became of standing in line.
#[derive(Debug, PartialEq, Eq)]
pub enum Stood<T> {
    /// It was admitted.
    Admitted(T),
    /// Its time was up: the latest denial, or `None` if it never came to the head.
    TimedOut(Option<T>),
    /// The server drains. Nothing was charged.
    Drained,
}

impl Lines {
    /// Nobody waits; everybody who does leaves when `draining` is cancelled.
    pub fn new(draining: CancellationToken) -> Self {
        let shards = (0..limits::LINE_SHARDS).map(|_| Mutex::default()).collect();
        Self { standing: Arc::default(), shards, draining }
    }

    /// Who waits now, at all cells.
    pub fn standing(&self) -> usize {
        self.standing.load(Ordering::Relaxed)
    }

    /// Who waits now at one cell.
    pub fn standing_at(&self, cell: CellId) -> usize {
        let shard = self.shard(cell).lock();
        let queues = shard.lines.get(&cell).map(|line| &line.queues);
        queues.map_or(0, |queues| queues.iter().map(BTreeMap::len).sum())
    }

    /// Whether somebody at least as urgent waits at the cell: then an ask that does not wait is denied,
    /// and no lease is given.
    pub fn is_held_for(&self, cell: CellId, priority: Priority) -> bool {
        self.standing() != 0 && self.shard(cell).lock().is_held_for(cell, priority)
    }

    /// Enters the line of a cell, as the last of its priority.
    ///
    /// `None` if `most` of that priority wait there already: what is less urgent must not fill the line of
    /// what is more so. Also if as many wait as this server holds.
    pub fn enter(&self, cell: CellId, priority: Priority, most: usize) -> Option<Place<'_>> {
        let room = Reservation::of(&self.standing, 1, limits::WAITING)?;
        let turn = Arc::new(Notify::new());
        let ticket = self.shard(cell).lock().enter(cell, priority, most, &turn)?;
        Some(Place { lines: self, cell, priority, ticket, turn, _room: room })
    }

    /// Lets the head of a cell try at once: something came back to the cell.
    ///
    /// To be called after that. The head entered before it tried, and it tries under the lock of the cell,
    /// so who changes the cell after an attempt that failed sees it stand here.
    pub fn wake(&self, cell: CellId) {
        if self.standing() == 0 {
            return;
        }
        let shard = self.shard(cell).lock();
        if let Some((_, head)) = shard.lines.get(&cell).and_then(Line::head) {
            head.notify_one();
        }
    }

    /// Lets every head try at once: the policies changed.
    pub fn wake_all(&self) {
        if self.standing() == 0 {
            return;
        }
        for shard in &self.shards {
            for (_, head) in shard.lock().lines.values().filter_map(Line::head) {
                head.notify_one();
            }
        }
    }

    fn shard(&self, cell: CellId) -> &Mutex<Shard> {
        &self.shards[(cell.0[0] >> 32) as usize % limits::LINE_SHARDS]
    }
}

impl Shard {
    fn is_held_for(&self, cell: CellId, priority: Priority) -> bool {
        self.lines.get(&cell).is_some_and(|line| line.is_held_for(priority))
    }

    /// The ticket; `None` if the line is full.
    ///
    /// A head that is displaced needs no word of it: before it tries again, it looks whether it is the head.
    fn enter(
        &mut self,
        cell: CellId,
        priority: Priority,
        most: usize,
        turn: &Arc<Notify>,
    ) -> Option<u64> {
        let waiting = |line: &Line| line.queues[priority as usize].len();
        if self.lines.get(&cell).map_or(0, waiting) >= most {
            return None;
        }
        let ticket = self.tickets;
        self.tickets += 1;
        let line = self.lines.entry(cell).or_default();
        line.queues[priority as usize].insert(ticket, Arc::clone(turn));
        Some(ticket)
    }

    /// The head that follows, if the head left.
    fn leave(&mut self, cell: CellId, priority: Priority, ticket: u64) -> Option<Arc<Notify>> {
        let line = self.lines.get_mut(&cell)?;
        let was_head = line.is_head(ticket);
        line.queues[priority as usize].remove(&ticket);
        let Some((_, head)) = line.head() else {
            self.lines.remove(&cell);
            return None;
        };
        was_head.then(|| Arc::clone(head))
    }
}

impl Line {
    /// The first of the most urgent who wait.
    fn head(&self) -> Option<(u64, &Arc<Notify>)> {
        let (ticket, turn) = self.queues.iter().find_map(BTreeMap::first_key_value)?;
        Some((*ticket, turn))
    }

    fn is_head(&self, ticket: u64) -> bool {
        self.head().is_some_and(|(first, _)| first == ticket)
    }

    fn is_held_for(&self, priority: Priority) -> bool {
        self.queues[..=priority as usize].iter().any(|queue| !queue.is_empty())
    }
}

/// A place in the line of a cell, until dropped.
#[derive(Debug)]
#[must_use = "who drops a place has left the line"]
pub struct Place<'a> {
    lines: &'a Lines,
    cell: CellId,
    priority: Priority,
    ticket: u64,
    /// Told when this becomes the head, and to the head when it should try. What is told while nobody listens
    /// is kept, so nothing that happens during an attempt is missed.
    turn: Arc<Notify>,
    _room: Reservation,
}

impl Place<'_> {
    /// Stands in line for at most `max_wait`; tries whenever this is the head and may be admitted.
    ///
    /// A head tries once more when its time is up, so that its denial is not an old one.
    pub async fn stand<T>(
        self,
        max_wait: Duration,
        mut try_now: impl FnMut() -> Attempt<T>,
    ) -> Stood<T> {
        let mut drained = pin!(self.lines.draining.cancelled());
        let mut time_is_up = pin!(sleep(max_wait));
        let mut latest = None;
        loop {
            tokio::select! {
                biased;
                () = &mut drained => return Stood::Drained,
                () = self.at_head() => {}
                () = &mut time_is_up => return Stood::TimedOut(latest),
            }
            let retry_after = match try_now() {
                Attempt::Admitted(answer) => return Stood::Admitted(answer),
                Attempt::NotYet { retry_after, denied } => {
                    latest = Some(denied);
                    retry_after
                }
            };
            if time_is_up.is_elapsed() {
                return Stood::TimedOut(latest);
            }
            tokio::select! {
                biased;
                () = &mut drained => return Stood::Drained,
                () = self.turn.notified() => {}
                () = pause(retry_after) => {}
                () = &mut time_is_up => {}
            }
        }
    }

    /// Until this is the head.
    async fn at_head(&self) {
        while !self.is_head() {
            self.turn.notified().await;
        }
    }

    fn is_head(&self) -> bool {
        let shard = self.lines.shard(self.cell).lock();
        shard.lines.get(&self.cell).is_some_and(|line| line.is_head(self.ticket))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let next = self.lines.shard(self.cell).lock().leave(self.cell, self.priority, self.ticket);
        if let Some(head) = next {
            head.notify_one();
        }
    }
}

/// Until it is time to try again; for ever if time does not help.
async fn pause(retry_after: Option<Duration>) {
    match retry_after {
        Some(wait) => sleep(wait.max(limits::RETRY_PAUSE)).await,
        None => future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, pin::Pin, task::Poll};

    use tokio::time::{Instant, advance};

    use super::*;

    const CELL: CellId = CellId([1, 2]);
    /// In the same shard.
    const OTHER: CellId = CellId([1, 3]);
    const LONG: Duration = Duration::from_secs(3_600);

    fn lines() -> Lines {
        Lines::new(CancellationToken::new())
    }

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// The clock of the test, which stands still until somebody waits.
    fn now() -> Instant {
        sleep(Duration::ZERO).deadline()
    }

    /// Permits that come back by hand, and how often somebody asked for one.
    #[derive(Default)]
    struct Permits {
        free: Cell<u32>,
        tries: Cell<u32>,
    }

    impl Permits {
        fn take(&self) -> Attempt<u32> {
            self.tries.set(self.tries.get() + 1);
            match self.free.get().checked_sub(1) {
                Some(left) => {
                    self.free.set(left);
                    Attempt::Admitted(self.tries.get())
                }
                None => Attempt::NotYet { retry_after: None, denied: self.tries.get() },
            }
        }

        fn give(&self, lines: &Lines) {
            self.free.set(self.free.get() + 1);
            lines.wake(CELL);
        }

        /// Who enters now and waits for long.
        fn wait_as<'a>(&'a self, lines: &'a Lines, priority: Priority) -> Waiter<'a> {
            let place = lines.enter(CELL, priority, usize::MAX).unwrap();
            Box::pin(place.stand(LONG, || self.take()))
        }

        fn wait<'a>(&'a self, lines: &'a Lines) -> Waiter<'a> {
            self.wait_as(lines, Priority::Normal)
        }
    }

    type Waiter<'a> = Pin<Box<dyn Future<Output = Stood<u32>> + 'a>>;

    async fn is_admitted(waiter: &mut Waiter<'_>) -> bool {
        let polled = future::poll_fn(|cx| Poll::Ready(waiter.as_mut().poll(cx))).await;
        matches!(polled, Poll::Ready(Stood::Admitted(_)))
    }

    #[tokio::test(start_paused = true)]
    async fn who_came_first_is_admitted_first() {
        let (lines, permits) = (lines(), Permits::default());
        let (mut first, mut second) = (permits.wait(&lines), permits.wait(&lines));
        assert!(!is_admitted(&mut second).await && !is_admitted(&mut first).await);
        permits.give(&lines);
        assert!(!is_admitted(&mut second).await);
        assert!(is_admitted(&mut first).await);
        permits.give(&lines);
        assert!(is_admitted(&mut second).await);
        assert_eq!(lines.standing(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_more_urgent_is_admitted_first() {
        let (lines, permits) = (lines(), Permits::default());
        let mut bulk = permits.wait_as(&lines, Priority::Bulk);
        let mut normal = permits.wait_as(&lines, Priority::Normal);
        let mut critical = permits.wait_as(&lines, Priority::Critical);
        for _ in 0..3 {
            permits.give(&lines);
        }
        assert!(!is_admitted(&mut bulk).await && !is_admitted(&mut normal).await);
        assert!(is_admitted(&mut critical).await);
        assert!(!is_admitted(&mut bulk).await && is_admitted(&mut normal).await);
        assert!(is_admitted(&mut bulk).await);
        assert_eq!(lines.standing(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_displaced_head_stops_trying_until_it_is_the_head_again() {
        let (lines, permits) = (lines(), Permits::default());
        let bucket = || {
            permits.take();
            Attempt::NotYet { retry_after: Some(ms(10)), denied: 0 }
        };
        let place = lines.enter(CELL, Priority::Bulk, 1).unwrap();
        let mut bulk: Waiter<'_> = Box::pin(place.stand(LONG, bucket));
        assert!(!is_admitted(&mut bulk).await);
        assert_eq!(permits.tries.get(), 1);
        let critical = lines.enter(CELL, Priority::Critical, 1).unwrap();
        for _ in 0..5 {
            advance(ms(10)).await;
            assert!(!is_admitted(&mut bulk).await);
        }
        assert_eq!(permits.tries.get(), 1, "it is not its turn");
        drop(critical);
        assert!(!is_admitted(&mut bulk).await);
        assert_eq!(permits.tries.get(), 2, "it is its turn again");
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_from_the_middle_is_not_missed() {
        let (lines, permits) = (lines(), Permits::default());
        let (mut first, mut second) = (permits.wait(&lines), permits.wait(&lines));
        let mut third = permits.wait(&lines);
        for waiter in [&mut first, &mut second, &mut third] {
            assert!(!is_admitted(waiter).await);
        }
        drop(second);
        assert_eq!(lines.standing(), 2);
        permits.give(&lines);
        assert!(is_admitted(&mut first).await);
        permits.give(&lines);
        assert!(is_admitted(&mut third).await);
        assert_eq!(lines.standing(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_leaves_lets_the_next_try() {
        let (lines, permits) = (lines(), Permits::default());
        let mut first = permits.wait(&lines);
        assert!(!is_admitted(&mut first).await);
        permits.give(&lines); // It is woken for the permit, and leaves without having taken it.
        let second = permits.wait(&lines);
        let leave = async {
            tokio::task::yield_now().await;
            drop(first);
        };
        let (stood, ()) = tokio::join!(second, leave);
        assert!(matches!(stood, Stood::Admitted(_)));
        assert_eq!(lines.standing(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn each_priority_has_a_line_of_its_own_length() {
        let lines = lines();
        let enter = |cell, priority| lines.enter(cell, priority, 2);
        let places = [enter(CELL, Priority::Bulk).unwrap(), enter(CELL, Priority::Bulk).unwrap()];
        assert!(enter(CELL, Priority::Bulk).is_none());
        assert_eq!(lines.standing(), 2, "who does not fit does not stand");
        let _critical = enter(CELL, Priority::Critical).unwrap();
        let _other = enter(OTHER, Priority::Bulk).unwrap();
        drop(places);
        assert!(enter(CELL, Priority::Bulk).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_of_no_length_is_always_full() {
        let lines = lines();
        assert!(lines.enter(CELL, Priority::Critical, 0).is_none());
        assert!(!lines.is_held_for(CELL, Priority::Bulk));
        assert!(lines.shard(CELL).lock().lines.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_wait_than_the_server_holds() {
        let lines = lines();
        let cell = |number| CellId([number << 32, 0]);
        let enter = |number| lines.enter(cell(number), Priority::Normal, 1);
        let mut places: Vec<_> = (0..limits::WAITING as u64).filter_map(enter).collect();
        assert_eq!(places.len(), limits::WAITING);
        assert!(lines.enter(CELL, Priority::Critical, usize::MAX).is_none());
        places.pop();
        assert!(lines.enter(CELL, Priority::Critical, usize::MAX).is_some());
        drop(places);
        assert_eq!(lines.standing(), 0);
        assert!(lines.shards.iter().all(|shard| shard.lock().lines.is_empty()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_cell_is_held_for_those_who_wait_and_the_more_urgent() {
        let lines = lines();
        let held = |cell| {
            [Priority::Critical, Priority::Normal, Priority::Bulk]
                .map(|p| lines.is_held_for(cell, p))
        };
        assert_eq!(held(CELL), [false; 3]);
        let place = lines.enter(CELL, Priority::Normal, 1).unwrap();
        assert_eq!(held(CELL), [false, true, true]);
        assert_eq!(held(OTHER), [false; 3], "it is of that cell");
        drop(place);
        assert_eq!(held(CELL), [false; 3]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_never_came_to_the_head_leaves_in_time_without_an_answer() {
        let (lines, permits, start) = (lines(), Permits::default(), now());
        let _head = lines.enter(CELL, Priority::Normal, 2).unwrap();
        let place = lines.enter(CELL, Priority::Normal, 2).unwrap();
        assert_eq!(place.stand(ms(50), || permits.take()).await, Stood::TimedOut(None));
        assert_eq!((now() - start, permits.tries.get()), (ms(50), 0));
        assert_eq!(lines.standing(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_tries_a_last_time_when_its_time_is_up() {
        let (lines, start) = (lines(), now());
        let bucket = |full_at: Duration| {
            move || match full_at.checked_sub(now() - start) {
                None | Some(Duration::ZERO) => Attempt::Admitted(Duration::ZERO),
                Some(wait) => Attempt::NotYet { retry_after: Some(wait), denied: wait },
            }
        };
        let enter = || lines.enter(CELL, Priority::Normal, 1).unwrap();
        let early = enter().stand(ms(50), bucket(ms(80))).await;
        assert_eq!(early, Stood::TimedOut(Some(ms(30))), "as of the end of its wait");
        let just = enter().stand(ms(30), bucket(ms(80))).await;
        assert_eq!(just, Stood::Admitted(Duration::ZERO));
        assert_eq!((now() - start, lines.standing()), (ms(80), 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_displaced_head_leaves_with_its_latest_denial() {
        let (lines, permits) = (lines(), Permits::default());
        let place = lines.enter(CELL, Priority::Normal, 1).unwrap();
        let mut normal: Waiter<'_> = Box::pin(place.stand(ms(50), || permits.take()));
        assert!(!is_admitted(&mut normal).await);
        let _critical = lines.enter(CELL, Priority::Critical, 1).unwrap();
        assert_eq!(normal.await, Stood::TimedOut(Some(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_is_woken_by_what_comes_back_to_its_cell_only() {
        let (lines, permits) = (lines(), Permits::default());
        let mut waiter = permits.wait(&lines);
        assert!(!is_admitted(&mut waiter).await);
        lines.wake(OTHER);
        assert!(!is_admitted(&mut waiter).await);
        assert_eq!(permits.tries.get(), 1);
        lines.wake_all();
        assert!(!is_admitted(&mut waiter).await);
        assert_eq!(permits.tries.get(), 2);
        permits.give(&lines);
        assert!(is_admitted(&mut waiter).await);
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_back_during_an_attempt_is_not_missed() {
        let (lines, permits) = (lines(), Permits::default());
        let place = lines.enter(CELL, Priority::Normal, 1).unwrap();
        let unlucky = || {
            let attempt = permits.take();
            if permits.tries.get() == 1 {
                permits.give(&lines);
            }
            attempt
        };
        assert_eq!(place.stand(LONG, unlucky).await, Stood::Admitted(2));
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_that_says_at_once_is_not_repeated_without_a_pause() {
        let (lines, tries) = (lines(), Cell::new(0));
        let never = || {
            tries.set(tries.get() + 1);
            Attempt::NotYet { retry_after: Some(Duration::ZERO), denied: () }
        };
        let place = lines.enter(CELL, Priority::Normal, 1).unwrap();
        assert_eq!(place.stand(ms(20), never).await, Stood::TimedOut(Some(())));
        assert!(tries.get() <= 22, "{}", tries.get());
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_empties_every_line() {
        let draining = CancellationToken::new();
        let (lines, permits, start) = (Lines::new(draining.clone()), Permits::default(), now());
        let (mut head, mut other) = (permits.wait(&lines), permits.wait(&lines));
        assert!(!is_admitted(&mut head).await && !is_admitted(&mut other).await);
        permits.free.set(2);
        draining.cancel();
        assert_eq!((other.await, head.await), (Stood::Drained, Stood::Drained));
        assert_eq!(permits.wait(&lines).await, Stood::Drained, "and so does who comes later");
        assert_eq!((permits.tries.get(), lines.standing(), now()), (1, 0, start));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_dropped_at_any_point_leaves_no_ghost() {
        let (lines, permits) = (lines(), Permits::default());
        for polls in 0..4 {
            let (mut first, mut second) = (permits.wait(&lines), permits.wait(&lines));
            for _ in 0..polls {
                assert!(!is_admitted(&mut second).await && !is_admitted(&mut first).await);
                lines.wake(CELL);
            }
            drop(first);
            drop(second);
            assert_eq!(lines.standing(), 0);
            assert!(lines.shard(CELL).lock().lines.is_empty());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn ten_thousand_are_admitted_in_order_each_at_its_time() {
        const WAITERS: u32 = 10_000;
        let (lines, start) = (Arc::new(lines()), now());
        let tries = Arc::new(AtomicUsize::new(0));
        let admitted = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..WAITERS {
            let (lines, tries, admitted) = (lines.clone(), tries.clone(), admitted.clone());
            tasks.spawn(async move {
                let place = lines.enter(CELL, Priority::Normal, usize::MAX).unwrap();
                let one_per_millisecond = || {
                    tries.fetch_add(1, Ordering::Relaxed);
                    let mut admitted = admitted.lock();
                    let due = ms(admitted.len() as u64 + 1);
                    let passed = now() - start;
                    if passed < due {
                        return Attempt::NotYet { retry_after: Some(due - passed), denied: () };
                    }
                    admitted.push((number, passed));
                    Attempt::Admitted(())
                };
                place.stand(LONG, one_per_millisecond).await
            });
        }
        while let Some(stood) = tasks.join_next().await {
            assert_eq!(stood.unwrap(), Stood::Admitted(()));
        }
        let expected = (0..WAITERS).map(|number| (number, ms(u64::from(number) + 1)));
        assert!(admitted.lock().iter().copied().eq(expected));
        assert!(
            tries.load(Ordering::Relaxed) <= 2 * WAITERS as usize,
            "others than the head tried"
        );
        assert_eq!(lines.standing(), 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn permits_that_come_back_meanwhile_are_never_left_lying() {
        const WAITERS: usize = 2_000;
        let (lines, permits) = (Arc::new(lines()), Arc::new(Mutex::new(3)));
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..WAITERS {
            let (lines, permits) = (lines.clone(), permits.clone());
            tasks.spawn(async move {
                let priority = [Priority::Critical, Priority::Normal, Priority::Bulk][number % 3];
                let place = lines.enter(CELL, priority, usize::MAX).unwrap();
                let take = || {
                    let mut free = permits.lock();
                    if *free == 0 {
                        return Attempt::NotYet { retry_after: None, denied: () };
                    }
                    *free -= 1;
                    Attempt::Admitted(())
                };
                let stood = place.stand(LONG, take).await;
                tokio::task::yield_now().await;
                *permits.lock() += 1;
                lines.wake(CELL);
                stood
            });
        }
        let all = tokio::time::timeout(Duration::from_secs(60), tasks.join_all()).await.unwrap();
        assert!(all.iter().all(|stood| *stood == Stood::Admitted(())));
        assert_eq!((*permits.lock(), lines.standing()), (3, 0));
    }
}
