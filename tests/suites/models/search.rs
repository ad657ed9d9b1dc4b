//! Every state that a world can reach, each once.

use std::{
    collections::{HashSet, VecDeque},
    fmt::Debug,
    hash::Hash,
};

/// A world: what can happen in it next, and what must never be.
pub trait World: Clone + Eq + Hash {
    /// What can happen.
    type Event: Clone + Debug;

    /// Everything that can happen now, and the world after it.
    fn next(&self) -> Vec<(Self::Event, Self)>;

    /// What is wrong with this world, if anything.
    fn wrong(&self) -> Option<String>;
}

/// What a search found.
#[derive(Debug)]
pub enum Found<E> {
    /// Nothing is wrong in any of so many worlds.
    Nothing { worlds: usize },
    /// The events that lead to a world that is wrong, and what is.
    Wrong { events: Vec<E>, why: String },
}

/// Looks at every world that can be reached from `first`.
pub fn search<W: World>(first: W) -> Found<W::Event> {
    // Each world that was met, and how: the index of the one before it, and the event.
    let mut seen = HashSet::from([first.clone()]);
    let mut steps: Vec<(usize, Option<W::Event>)> = vec![(0, None)];
    // In the order they were met, so that what is found wrong is told by the shortest history.
    let mut frontier = VecDeque::from([(0, first)]);
    while let Some((index, world)) = frontier.pop_front() {
        if let Some(why) = world.wrong() {
            let mut events = Vec::new();
            let mut step = &steps[index];
            while let (before, Some(event)) = step {
                events.push(event.clone());
                step = &steps[*before];
            }
            events.reverse();
            return Found::Wrong { events, why };
        }
        for (event, next) in world.next() {
            if seen.insert(next.clone()) {
                steps.push((index, Some(event)));
                frontier.push_back((steps.len() - 1, next));
            }
        }
    }
    Found::Nothing { worlds: seen.len() }
}

/// Searches a world that keeps every rule that it needs.
pub fn expect_nothing<W: World>(world: W, at_least: usize) {
    match search(world) {
        Found::Nothing { worlds } => {
            println!("{worlds} worlds");
            assert!(worlds > at_least, "the search ended early: {worlds} worlds");
        }
        Found::Wrong { events, why } => panic!("{why} after {events:#?}"),
    }
}

/// Searches a world that breaks a rule.
pub fn expect_harm<W: World>(broken: impl Debug, world: W) {
    match search(world) {
        Found::Nothing { worlds } => panic!("{broken:?} harms nobody in {worlds} worlds"),
        Found::Wrong { events, why } => println!("{broken:?}: {why} after {events:?}"),
    }
}
