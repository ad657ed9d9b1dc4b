//! What is watched: the breakers that the parts want to hear of, and how far they have heard.

use std::{sync::Arc, time::Duration};

use fusebox_core::Time;
use fusebox_proto::v1::{WatchRequest, WatchResponse};

/// Breakers that a Watch names, at most: the server's limit. More are watched by watching all.
const NAMED_MOST: usize = 64;

/// How long after a refusal it is asked for again.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// After so long the Watch is asked for anew, and goes on. How old news are is reckoned from when it was asked for, by
/// the clocks of both sides: they part by up to 100 millionths, which in this time is less than is allowed for.
const ANEW_AFTER: Duration = Duration::from_secs(2 * 60);

/// The one Watch of a client.
#[derive(Debug, Default)]
pub(crate) struct Watching {
    /// `None` if nobody wants to hear anything; empty is all of the namespace.
    wanted: Option<Vec<Arc<str>>>,
    /// When the server was asked, on the session that is up.
    asked: Option<Time>,
    /// Number of the last asking: what answers an earlier one is not news.
    asking: u64,
    /// Epoch and version of the last news.
    last: (u64, u64),
    /// The names were refused, so all is watched.
    all: bool,
    not_before: Time,
}

impl Watching {
    /// What the parts want to hear of, each once and in order.
    pub(crate) fn wants(&mut self, mut breakers: Vec<Arc<str>>) {
        breakers.sort_unstable();
        breakers.dedup();
        let wanted = match breakers.len() {
            0 => None,
            1..=NAMED_MOST => Some(breakers),
            _ => Some(Vec::new()),
        };
        if wanted != self.wanted {
            *self = Self { wanted, asking: self.asking, ..Self::default() };
        }
    }

    /// What to ask for now, and the number of it.
    pub(crate) fn next(&mut self, now: Time) -> Option<(u64, WatchRequest)> {
        let wanted = self.wanted.as_ref()?;
        let is_asked = self.asked.is_some_and(|asked| now < asked.after(ANEW_AFTER));
        if is_asked || now < self.not_before {
            return None;
        }
        self.asked = Some(now);
        self.asking += 1;
        let (epoch, version) = self.last;
        let names: &[Arc<str>] = if self.all { &[] } else { wanted };
        let policies = names.iter().map(ToString::to_string).collect();
        Some((self.asking, WatchRequest { policies, epoch, version, ..Default::default() }))
    }

    /// Whether these are news: they answer what was asked last.
    pub(crate) fn hears(&mut self, asking: u64, news: &WatchResponse) -> bool {
        let hears = self.asked.is_some() && asking == self.asking;
        if hears {
            self.last = (news.epoch, news.version);
        }
        hears
    }

    /// The server refuses. One that does not know all of the names may tell of all that it knows.
    pub(crate) fn is_refused(&mut self, asking: u64, now: Time) {
        if asking != self.asking {
            return;
        }
        self.asked = None;
        self.last = (0, 0);
        if self.all || self.wanted.as_ref().is_some_and(Vec::is_empty) {
            self.not_before = now.after(AGAIN_AFTER);
        } else {
            self.all = true;
        }
    }

    /// The session broke: the next one goes on from there.
    pub(crate) fn broke(&mut self) {
        self.asked = None;
        self.not_before = Time::ZERO;
    }

    /// The server has another state, of which nothing has been heard.
    pub(crate) fn replaced(&mut self) {
        self.last = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Time = Time::ZERO;

    fn names(count: usize) -> Vec<Arc<str>> {
        (0..count).map(|index| format!("b{index:03}").into()).collect()
    }

    fn wanting(breakers: Vec<Arc<str>>) -> Watching {
        let mut watching = Watching::default();
        watching.wants(breakers);
        watching
    }

    fn news(epoch: u64, version: u64) -> WatchResponse {
        WatchResponse { epoch, version, ..Default::default() }
    }

    #[test]
    fn nobody_wants_nothing() {
        assert_eq!(wanting(Vec::new()).next(NOW), None);
    }

    #[test]
    fn it_is_asked_once_and_resumed_after_a_break() {
        let mut watching = wanting(names(2));
        let (first, request) = watching.next(NOW).unwrap();
        assert_eq!(request.policies, ["b000", "b001"]);
        assert_eq!(watching.next(NOW), None);
        assert!(watching.hears(first, &news(7, 3)));
        watching.broke();
        let (_, again) = watching.next(NOW).unwrap();
        assert_eq!((again.epoch, again.version), (7, 3));
    }

    #[test]
    fn it_is_asked_anew_and_goes_on_before_clocks_part_by_much() {
        let mut watching = wanting(names(2));
        let (first, _) = watching.next(NOW).unwrap();
        watching.hears(first, &news(7, 3));
        let later = NOW.after(ANEW_AFTER);
        assert_eq!(watching.next(NOW.after(ANEW_AFTER / 2)), None);
        let (second, again) = watching.next(later).unwrap();
        assert_eq!((again.epoch, again.version), (7, 3));
        assert!(!watching.hears(first, &news(7, 4)), "what is left out is told again");
        assert!(watching.hears(second, &news(7, 4)));
        assert_eq!(watching.next(later), None);
    }

    #[test]
    fn other_wishes_begin_anew_and_the_same_do_not() {
        let mut watching = wanting(names(2));
        let (first, _) = watching.next(NOW).unwrap();
        watching.hears(first, &news(7, 3));
        watching.wants(names(2));
        assert_eq!(watching.next(NOW), None);
        watching.wants(names(3));
        let (second, request) = watching.next(NOW).unwrap();
        assert_eq!((request.epoch, request.version, request.policies.len()), (0, 0, 3));
        assert!(!watching.hears(first, &news(7, 4)));
        assert!(watching.hears(second, &news(7, 4)));
    }

    #[test]
    fn more_than_64_are_all() {
        assert_eq!(wanting(names(64)).next(NOW).unwrap().1.policies.len(), 64);
        assert!(wanting(names(65)).next(NOW).unwrap().1.policies.is_empty());
    }

    #[test]
    fn names_that_are_refused_make_it_watch_all() {
        let mut watching = wanting(names(2));
        let (first, _) = watching.next(NOW).unwrap();
        watching.is_refused(first, NOW);
        let (second, request) = watching.next(NOW).unwrap();
        assert!(request.policies.is_empty());
        watching.is_refused(second, NOW);
        assert_eq!(watching.next(NOW), None);
        assert!(watching.next(NOW.after(AGAIN_AFTER)).is_some());
    }

    #[test]
    fn another_state_begins_anew() {
        let mut watching = wanting(names(2));
        let (first, _) = watching.next(NOW).unwrap();
        watching.hears(first, &news(7, 3));
        watching.broke();
        watching.replaced();
        assert_eq!(watching.next(NOW).unwrap().1.epoch, 0);
    }
}
