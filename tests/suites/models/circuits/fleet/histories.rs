//! More clients than a search can have: histories at random.

use super::super::client::Broken;
use super::{Fleet, counted};
use crate::search::World;

const HISTORIES: u64 = 2_000;
const EVENTS: usize = 60;

/// Numbers that look like chance, and are the same each time.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % end
    }
}

/// What goes wrong in a history, if anything.
fn history(seed: u64, first: Fleet) -> Option<String> {
    let mut chance = Chance(seed);
    let mut fleet = first;
    for _ in 0..EVENTS {
        let mut next = fleet.next();
        fleet = next.swap_remove(chance.below(next.len())).1;
        if let Some(why) = fleet.wrong.map(str::to_owned).or_else(|| fleet.too_many_calls()) {
            return Some(why);
        }
    }
    fleet.does_not_recover()
}

#[test]
fn three_clients_recover_and_leave_a_dead_target_alone() {
    for seed in 0..HISTORIES {
        let why = history(seed, counted(Broken::Nothing, 3));
        assert!(why.is_none(), "{why:?} in history {seed}");
    }
}

#[test]
fn these_histories_find_what_is_wrong() {
    for broken in [Broken::StaleBinds, Broken::SharedIsEnough, Broken::LocalIsAskedFirst] {
        let found = (0..HISTORIES).find_map(|seed| history(seed, counted(broken, 3)));
        assert!(found.is_some(), "{broken:?}");
    }
}
