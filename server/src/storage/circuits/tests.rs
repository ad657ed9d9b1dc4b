use std::{sync::mpsc::sync_channel, thread, time::Duration};

use fusebox_core::circuit::{Mode, Order, Settings};

use super::*;

/// Circuits of one breaker, which nobody writes until a test does.
struct Scene {
    circuits: Circuits,
    names: PolicyName,
    breaker: Breaker,
}

impl Scene {
    fn new() -> Self {
        let (wake, _) = sync_channel(1);
        let breaker = Breaker::new(Settings::default()).unwrap();
        Self {
            circuits: Circuits::new(7, wake, 0),
            names: PolicyName::new("test", "target"),
            breaker,
        }
    }

    fn place(&self, cell: CellId) -> Place<'_> {
        let PolicyName { namespace, policy } = &self.names;
        Place { namespace, policy, key: "", cell, breaker: &self.breaker, most: 10 }
    }

    /// Forces circuits open, all under one lock; when that is on disk.
    fn force(&self, cells: &[CellId]) -> Option<Durable> {
        let (mode, ttl) = (Mode::ForcedOpen, Duration::from_secs(60));
        let order = Order { mode, ttl, reason: "a test".into(), actor: "nobody".into() };
        let mut locked = self.circuits.lock(cells).unwrap();
        for cell in cells {
            let set = locked.change_named(&self.place(*cell), Time::ZERO, |_, circuit, turn| {
                ((), circuit.set(&order, turn))
            });
            set.unwrap();
        }
        locked.durable()
    }
}

/// A circuit of that shard.
const fn in_shard(shard: u64) -> CellId {
    CellId([shard, shard])
}

#[test]
fn who_sees_two_circuits_waits_until_both_are_written() {
    let (first, second) = (in_shard(2), in_shard(9));
    // Whichever of them is asked first.
    for asked in [[first, second], [second, first]] {
        let scene = Scene::new();
        let circuits = &scene.circuits;
        scene.force(&[in_shard(2 + limits::CIRCUIT_SHARDS as u64)]);
        thread::scope(|scope| {
            let between = circuits.shards[5].lock();
            let round = scope.spawn(|| taken(circuits));
            // The writer has taken the first of their shards, and waits on its way to the second.
            while !circuits.shards[2].lock().queued.is_empty() {
                thread::yield_now();
            }
            assert!(scene.force(&asked).is_some());
            drop(between);
            assert_eq!(round.join().unwrap(), (2, 1), "one of the two, of which nobody is told");
        });
        assert_eq!(taken(circuits), (1, 1));
    }
}

/// How many records a round of the writer takes, and how many wait for them.
fn taken(circuits: &Circuits) -> (usize, usize) {
    let (mut writes, mut waiting) = (Vec::new(), Vec::new());
    circuits.take_queued(&mut writes, &mut waiting);
    (writes.len(), waiting.len())
}
