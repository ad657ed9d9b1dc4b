//! The audit trail: what was changed, when, by whom and why.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use fusebox_core::saturating_nanos;
use parking_lot::Mutex;
use prost::Message;

use crate::{
    catalogue::registry::Edit,
    config::envoy::NAMESPACE,
    limits,
    storage::journal::{Keyspace, Write},
};

/// Who changes what the configuration file says.
pub const FILE: &str = "file";

/// Who changes what the files of rules say.
pub const RULE_FILES: &str = "rule files";

/// What a text ends with that was cut.
const CUT: &str = "…";

/// Numbers that a start has before those of the next, which begins a second later at the least.
const NUMBERS_OF_START: u64 = 1 << 20;

/// One change that somebody made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its place in the order of all: grows, with gaps, and is never given twice.
    pub number: u64,
    /// When: time since the Unix epoch, by the wall clock. People set that clock, so it is not the order.
    pub at: Duration,
    /// Who, what and why.
    pub change: Change,
}

/// What is told of a change. What it is not about is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Who made it; `file` for the configuration file.
    pub actor: String,
    /// What was done.
    pub action: Action,
    /// Namespace that it was done to.
    pub namespace: String,
    /// Policy that it was done to.
    pub policy: String,
    /// Bucket or circuit that it was done to.
    pub key: String,
    /// Why, as the actor said.
    pub reason: String,
    /// What was there.
    pub before: String,
    /// What is there now.
    pub after: String,
}

/// What can be done. The numbers are on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Action {
    /// A policy is new.
    PolicyCreated = 1,
    /// A policy has other settings.
    PolicyChanged = 2,
    /// A policy is no more.
    PolicyDeleted = 3,
    /// What a bucket had spent is forgotten.
    BucketReset = 4,
    /// A grant was ended before its time.
    GrantReleased = 5,
    /// Rules of Envoy's rate limit service were changed in their files.
    RulesChanged = 6,
    /// The mode of a circuit was set.
    CircuitModeSet = 7,
}

/// Which events are wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Filter<'a> {
    /// Only of this namespace.
    pub namespace: Option<&'a str>,
    /// Only of policies of this name.
    pub policy: Option<&'a str>,
}

/// What became of a change.
#[derive(Clone, Debug)]
pub struct Appended {
    /// The event that it is now: to be [written](EventRecord::of).
    pub event: Arc<Event>,
    /// The event that left for it: to be deleted.
    pub evicted: Option<u64>,
}

/// The latest events. It knows no disk: who appends an event writes it, and tells of it when it is written.
#[derive(Debug)]
pub struct Events {
    ring: Mutex<Ring>,
}

#[derive(Debug)]
struct Ring {
    /// The oldest first.
    events: VecDeque<Arc<Event>>,
    capacity: usize,
    next: u64,
}

impl Events {
    /// No event yet, and room for that many, at least one. Numbers begin with `boot`, the number of this
    /// start: one that a crash took with it is not given again.
    pub fn new(capacity: usize, boot: u64) -> Self {
        let events = VecDeque::new();
        let next = boot.saturating_mul(NUMBERS_OF_START).max(1);
        Self { ring: Mutex::new(Ring { events, capacity: capacity.max(1), next }) }
    }

    /// Goes on with the events that were written, in any order; returns those that there is no room for, oldest
    /// first: to be deleted.
    pub fn restore(&self, written: impl IntoIterator<Item = Event>) -> Vec<u64> {
        let mut ring = self.ring.lock();
        let mut events: Vec<_> = written.into_iter().map(Arc::new).collect();
        events.extend(ring.events.drain(..));
        events.sort_unstable_by_key(|event| event.number);
        if let Some(last) = events.last() {
            ring.next = ring.next.max(last.number.saturating_add(1));
        }
        let kept = events.split_off(events.len().saturating_sub(ring.capacity));
        ring.events = kept.into();
        events.iter().map(|event| event.number).collect()
    }

    /// Remembers a change that was made at this time since the Unix epoch; texts that are too long are cut.
    pub fn append(&self, at: Duration, change: Change) -> Appended {
        let mut ring = self.ring.lock();
        let number = ring.next;
        ring.next = number.saturating_add(1);
        let evicted = (ring.events.len() >= ring.capacity).then(|| ring.events.pop_front());
        let event = Arc::new(Event { number, at, change: change.cut() });
        ring.events.push_back(Arc::clone(&event));
        Appended { event, evicted: evicted.flatten().map(|event| event.number) }
    }

    /// Events that are remembered.
    pub fn len(&self) -> usize {
        self.ring.lock().events.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The latest `count` events that the filter lets through, newest first; only those with a number below
    /// `before`, if one is given.
    pub fn list(&self, before: Option<u64>, count: usize, filter: Filter<'_>) -> Vec<Arc<Event>> {
        let ring = self.ring.lock();
        let end = before.map_or(ring.events.len(), |before| {
            ring.events.partition_point(|event| event.number < before)
        });
        let wanted = ring.events.range(..end).rev().filter(|event| filter.wants(event));
        wanted.take(count).cloned().collect()
    }
}

impl Filter<'_> {
    fn wants(&self, Event { change, .. }: &Event) -> bool {
        self.namespace.is_none_or(|namespace| namespace == change.namespace)
            && self.policy.is_none_or(|policy| policy == change.policy)
    }
}

impl Change {
    /// What was changed in files of rules, if anything: one event, however many rules.
    pub fn of_rules(edits: &[Edit]) -> Option<Self> {
        let mut counts = [0; 3];
        let lines = edits.iter().map(|Edit { name, before, after, .. }| {
            let (sign, count) = match (before, after) {
                (None, _) => ('+', 0),
                (Some(_), Some(_)) => ('~', 1),
                (Some(_), None) => ('-', 2),
            };
            counts[count] += 1;
            format!("{sign} {}", name.policy)
        });
        let after = lines.collect::<Vec<_>>().join("\n");
        let [added, changed, removed] = counts;
        (!edits.is_empty()).then(|| Self {
            actor: RULE_FILES.to_owned(),
            action: Action::RulesChanged,
            namespace: NAMESPACE.to_owned(),
            policy: String::new(),
            key: String::new(),
            reason: format!("{added} added, {changed} changed, {removed} removed"),
            before: String::new(),
            after,
        })
    }

    fn cut(self) -> Self {
        Self {
            actor: cut(self.actor, limits::EVENT_ACTOR_BYTES),
            action: self.action,
            namespace: cut(self.namespace, limits::NAME_BYTES),
            policy: cut(self.policy, limits::RULE_PATH_BYTES),
            key: cut(self.key, limits::KEY_BYTES),
            reason: cut(self.reason, limits::REASON_BYTES),
            before: cut(self.before, limits::EVENT_VALUE_BYTES),
            after: cut(self.after, limits::EVENT_VALUE_BYTES),
        }
    }
}

/// The text, or as much of it as fits, and that it was cut.
fn cut(mut text: String, most: usize) -> String {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most - CUT.len()));
        text.push_str(CUT);
    }
    // It may have been made with room to spare, and stays for long.
    text.shrink_to_fit();
    text
}

/// An event as it is written, under its number.
#[derive(Clone, PartialEq, Message)]
pub struct EventRecord {
    #[prost(uint64, tag = "1")]
    at_nanos: u64,
    #[prost(string, tag = "2")]
    actor: String,
    #[prost(enumeration = "Action", tag = "3")]
    action: i32,
    #[prost(string, tag = "4")]
    namespace: String,
    #[prost(string, tag = "5")]
    policy: String,
    #[prost(string, tag = "6")]
    key: String,
    #[prost(string, tag = "7")]
    reason: String,
    #[prost(string, tag = "8")]
    before: String,
    #[prost(string, tag = "9")]
    after: String,
}

impl EventRecord {
    /// What is written of an event, under its [`event_key`].
    pub fn of(Event { number: _, at, change }: &Event) -> Self {
        let Change { actor, action, namespace, policy, key, reason, before, after } =
            change.clone();
        let at_nanos = saturating_nanos(*at);
        let action = action.into();
        Self { at_nanos, actor, action, namespace, policy, key, reason, before, after }
    }

    /// The event of that number; `None` if the record makes no sense.
    pub fn event(self, number: u64) -> Option<Event> {
        let action = Action::try_from(self.action).ok()?;
        let Self { actor, namespace, policy, key, reason, before, after, .. } = self;
        let change = Change { actor, action, namespace, policy, key, reason, before, after };
        Some(Event { number, at: Duration::from_nanos(self.at_nanos), change: change.cut() })
    }
}

/// What is to be written for an event.
pub fn write(event: &Event) -> Write {
    Write::put(Keyspace::Events, event_key(event.number), EventRecord::of(event).encode_to_vec())
}

/// What is to be written for the event of that number to be gone.
pub fn deletion(number: u64) -> Write {
    Write::delete(Keyspace::Events, event_key(number))
}

/// The key of an event: in the order of the events.
pub fn event_key(number: u64) -> [u8; 8] {
    number.to_be_bytes()
}

/// The number of the event of a key; `None` if it is not one.
pub fn event_of_key(key: &[u8]) -> Option<u64> {
    key.try_into().ok().map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Duration = Duration::new(1_700_000_000, 7);

    fn change(namespace: &str, policy: &str) -> Change {
        Change {
            actor: "anonymous".into(),
            action: Action::PolicyChanged,
            namespace: namespace.into(),
            policy: policy.into(),
            key: "alice".into(),
            reason: "a campaign".into(),
            before: "100".into(),
            after: "200".into(),
        }
    }

    fn numbers(events: &[Arc<Event>]) -> Vec<u64> {
        events.iter().map(|event| event.number).collect()
    }

    fn all(events: &Events) -> Vec<u64> {
        numbers(&events.list(None, usize::MAX, Filter::default()))
    }

    #[test]
    fn the_newest_come_first_page_by_page() {
        let events = Events::new(10, 0);
        for _ in 0..5 {
            assert_eq!(events.append(AT, change("demo", "api")).evicted, None);
        }
        let page = |before| numbers(&events.list(before, 2, Filter::default()));
        assert_eq!([page(None), page(Some(4)), page(Some(2))], [vec![5, 4], vec![3, 2], vec![1]]);
        assert_eq!(page(Some(1)), [0; 0]);
        assert_eq!(page(Some(u64::MAX)), [5, 4]);
    }

    #[test]
    fn the_oldest_leaves_when_there_is_no_room() {
        let events = Events::new(3, 0);
        let evicted: Vec<_> =
            (0..5).map(|_| events.append(AT, change("demo", "api")).evicted).collect();
        assert_eq!(evicted, [None, None, None, Some(1), Some(2)]);
        assert_eq!(all(&events), [5, 4, 3]);
    }

    #[test]
    fn as_many_are_kept_as_the_limits_say() {
        let events = Events::new(limits::EVENTS, 1);
        let evicted = (0..limits::EVENTS + 1)
            .filter_map(|_| events.append(AT, change("demo", "api")).evicted)
            .count();
        assert_eq!((all(&events).len(), evicted), (limits::EVENTS, 1));
    }

    #[test]
    fn only_what_is_asked_for_is_listed() {
        let events = Events::new(10, 0);
        for (namespace, policy) in [("a", "x"), ("a", "y"), ("b", "x"), ("", ""), ("a", "x")] {
            events.append(AT, change(namespace, policy));
        }
        let list = |namespace, policy, before| {
            numbers(&events.list(before, 2, Filter { namespace, policy }))
        };
        assert_eq!(list(Some("a"), None, None), [5, 2]);
        assert_eq!(list(Some("a"), None, Some(2)), [1]);
        assert_eq!(list(Some("a"), Some("x"), None), [5, 1]);
        assert_eq!(list(None, Some("x"), None), [5, 3]);
        assert_eq!(list(Some("c"), None, None), [0; 0]);
    }

    #[test]
    fn numbers_go_on_over_restarts_and_clocks_that_step() {
        let first = Events::new(3, 9);
        for _ in 0..3 {
            first.append(AT, change("demo", "api"));
        }
        let written: Vec<_> =
            first.list(None, 3, Filter::default()).iter().map(|event| (**event).clone()).collect();
        let [last, ..] = &all(&first)[..] else { panic!("three") };

        let second = Events::new(3, 10);
        assert_eq!(second.restore(written.clone()), Vec::<u64>::new());
        let Appended { event, evicted } = second.append(Duration::ZERO, change("demo", "api"));
        assert!(event.number > last + 1, "also than one that was lost");
        assert_eq!(evicted, Some(written[2].number));

        // A number of a start that is lower than what is there.
        let third = Events::new(3, 0);
        third.restore(written);
        assert_eq!(third.append(AT, change("demo", "api")).event.number, last + 1);
    }

    #[test]
    fn what_has_no_room_after_a_restart_is_told() {
        let events = Events::new(2, 0);
        let written = [4, 2, 3, 1].map(|number| Event { number, at: AT, change: change("a", "x") });
        assert_eq!(events.restore(written), [1, 2]);
        assert_eq!(all(&events), [4, 3]);
        assert_eq!(events.append(AT, change("a", "x")).event.number, 5);
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let events = Events::new(10, 3);
        for action in [
            Action::PolicyCreated,
            Action::PolicyChanged,
            Action::PolicyDeleted,
            Action::BucketReset,
            Action::GrantReleased,
            Action::RulesChanged,
            Action::CircuitModeSet,
        ] {
            let event = events.append(AT, Change { action, ..change("demo", "api") }).event;
            let (key, value) = (event_key(event.number), EventRecord::of(&event).encode_to_vec());
            let number = event_of_key(&key).unwrap();
            let read = EventRecord::decode(&value[..]).unwrap().event(number);
            assert_eq!(read.as_ref(), Some(&*event));
        }
        assert!(event_key(255) < event_key(256), "keys are in the order of the numbers");
    }

    #[test]
    fn a_record_that_makes_no_sense_is_no_event() {
        let event = Events::new(1, 0).append(AT, change("demo", "api")).event;
        for action in [0, 8, -1] {
            let record = EventRecord { action, ..EventRecord::of(&event) };
            assert_eq!(record.event(1), None, "{action}");
        }
        assert_eq!(event_of_key(&[0; 7]), None);
        assert_eq!(event_of_key(&[0; 9]), None);
    }

    #[test]
    fn a_text_that_is_too_long_is_cut_between_characters() {
        for (text, most, expected) in [
            ("", 4, ""),
            ("abcd", 4, "abcd"),
            ("abcde", 4, "a…"),
            ("aécde", 5, "a…"),
            ("aécdef", 6, "aé…"),
            ("🦀🦀", 7, "🦀…"),
            ("🦀🦀", 6, "…"),
            ("🦀🦀", 8, "🦀🦀"),
        ] {
            assert_eq!(cut(text.into(), most), expected, "{text} at {most}");
        }

        let long = "é".repeat(2_000);
        let event = Events::new(1, 0).append(
            AT,
            Change {
                actor: long.clone(),
                action: Action::BucketReset,
                namespace: long.clone(),
                policy: long.clone(),
                key: long.clone(),
                reason: long.clone(),
                before: long.clone(),
                after: long,
            },
        );
        let Change { actor, action: _, namespace, policy, key, reason, before, after } =
            &event.event.change;
        for (text, most) in [
            (actor, limits::EVENT_ACTOR_BYTES),
            (namespace, limits::NAME_BYTES),
            (policy, limits::RULE_PATH_BYTES),
            (key, limits::KEY_BYTES),
            (reason, limits::REASON_BYTES),
            (before, limits::EVENT_VALUE_BYTES),
            (after, limits::EVENT_VALUE_BYTES),
        ] {
            assert!(
                text.len() <= most && text.len() > most - CUT.len(),
                "{} at {most}",
                text.len()
            );
            assert!(text.ends_with(CUT), "{text}");
        }
    }
}
