//! By which state the server decides, and what it means to the parts when that changes.

use std::sync::Arc;

use crate::part::Link;

/// A state that a server decides by, and the start of the server that does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Truth {
    pub(crate) id: Arc<str>,
    pub(crate) boot: u64,
}

/// What the connections of a client were welcomed with: never two states at a time.
#[derive(Debug)]
pub(crate) struct Truths {
    /// Of each connection that is up.
    up: Vec<Option<Truth>>,
    /// What the parts know.
    known: Option<Truth>,
}

/// What becomes of a session.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Welcomed {
    /// It is used; the parts are told before that, if there is something to tell.
    Used(Option<Link>),
    /// It is not: the others decide by this state.
    Refused(Arc<str>),
}

impl Truths {
    /// So many connections, none of which is up.
    pub(crate) fn new(connections: usize) -> Self {
        Self { up: vec![None; connections], known: None }
    }

    /// What the parts know; `None` before the first session.
    pub(crate) fn known(&self) -> Option<&Truth> {
        self.known.as_ref()
    }

    /// A connection was welcomed.
    pub(crate) fn welcomed(&mut self, connection: usize, truth: Truth) -> Welcomed {
        let first = self.up.iter().all(Option::is_none);
        if let Some(other) = self.up.iter().flatten().find(|other| other.id != truth.id) {
            return Welcomed::Refused(Arc::clone(&other.id));
        }
        let link = match &self.known {
            Some(known) if known.id != truth.id => Some(Link::Replaced),
            Some(known) if known.boot != truth.boot => Some(Link::Restarted),
            _ => first.then_some(Link::Resumed),
        };
        self.known = Some(truth.clone());
        self.up[connection] = Some(truth);
        Welcomed::Used(link)
    }

    /// A connection broke. Tells what that means, if it was the last.
    pub(crate) fn broke(&mut self, connection: usize) -> Option<Link> {
        let was_up = self.up[connection].take().is_some();
        (was_up && self.up.iter().all(Option::is_none)).then_some(Link::Down)
    }

    /// The first connection that is up.
    pub(crate) fn first_up(&self) -> Option<usize> {
        self.up.iter().position(Option::is_some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn truth(id: &str, boot: u64) -> Truth {
        Truth { id: id.into(), boot }
    }

    #[test]
    fn the_first_session_ever_is_resumed() {
        let mut truths = Truths::new(1);
        assert_eq!(truths.welcomed(0, truth("a", 1)), Welcomed::Used(Some(Link::Resumed)));
    }

    #[test]
    fn what_changed_meanwhile_is_told() {
        let mut truths = Truths::new(1);
        for (next, told) in [
            (truth("a", 1), Link::Resumed),
            (truth("a", 1), Link::Resumed),
            (truth("a", 2), Link::Restarted),
            (truth("b", 2), Link::Replaced),
            (truth("b", 2), Link::Resumed),
        ] {
            assert_eq!(truths.welcomed(0, next), Welcomed::Used(Some(told)));
            assert_eq!(truths.broke(0), Some(Link::Down));
        }
    }

    #[test]
    fn more_sessions_of_the_same_are_not_told() {
        let mut truths = Truths::new(2);
        truths.welcomed(0, truth("a", 1));
        assert_eq!(truths.welcomed(1, truth("a", 1)), Welcomed::Used(None));
        assert_eq!(truths.broke(0), None);
        assert_eq!(truths.first_up(), Some(1));
        assert_eq!(truths.broke(1), Some(Link::Down));
        assert_eq!(truths.broke(1), None);
    }

    #[test]
    fn another_state_is_refused_while_one_is_in_use_and_replaces_it_afterwards() {
        let mut truths = Truths::new(2);
        truths.welcomed(0, truth("a", 1));
        assert_eq!(truths.welcomed(1, truth("b", 1)), Welcomed::Refused("a".into()));
        assert_eq!(truths.known(), Some(&truth("a", 1)));
        truths.broke(0);
        assert_eq!(truths.welcomed(1, truth("b", 1)), Welcomed::Used(Some(Link::Replaced)));
    }
}
