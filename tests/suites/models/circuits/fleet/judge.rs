//! What a fleet is held to from any world on: that it recovers, and that a dead target is left alone.

use super::super::client::{Client, LocalSettings};
use super::{FORCED_FOR, Fleet, SETTINGS};

/// Ticks between calls that are few: longer than what was told is valid, and than most that is waited for.
const MINUTE: u8 = 4;
/// Calls after which it is taken to never recover.
const NEVER: u8 = 20;

impl Fleet {
    /// A call of each client, and `pause` ticks: the target works, and all is delivered if the server is there.
    /// Tells whether all were let through.
    fn good_calls(&self, server: bool, pause: u8) -> (Self, bool) {
        let mut next = Self { well: true, ..self.clone() };
        let mut all = true;
        for client in 0..next.clients.len() {
            if server {
                next = next.failures_reported(client).unwrap_or(next);
                next = next.push(client, false).unwrap_or(next);
            }
            let (called, passed) = next.call(client, server);
            next = called;
            all &= passed;
            if server {
                next = next.probe_reported(client).unwrap_or(next);
            }
        }
        for _ in 0..pause {
            next = next.tick();
        }
        (next, all)
    }

    /// How often calls are made, of which not all pass.
    fn recovers_after(&self, server: bool, pause: u8) -> u8 {
        let mut fleet = self.clone();
        for calls in 0..NEVER {
            let (next, all) = fleet.good_calls(server, pause);
            if all {
                return calls;
            }
            fleet = next;
        }
        NEVER
    }

    /// Ticks after which all calls are let through. A shared circuit that all know to be open is all that they
    /// wait for: what is out expires, and it has been open for the longest time. Otherwise each waits for its
    /// own, as for what it was told until that is stale.
    fn longest_recovery(&self, server: bool) -> u8 {
        let known = |client: &Client| client.is_fresh() && client.status.open;
        let shared = SETTINGS.probe_timeout + SETTINGS.open_for_max;
        let ticks = match server && self.clients.iter().all(known) {
            true => u8::try_from(shared).unwrap(),
            false => self.clients[0].settings.open_for_max,
        };
        if self.operated { ticks + FORCED_FOR } else { ticks }
    }

    pub fn does_not_recover(&self) -> Option<String> {
        [(true, 1), (false, 1), (true, MINUTE), (false, MINUTE)].into_iter().find_map(
            |(server, pause)| {
                let calls = self.recovers_after(server, pause);
                let late = calls > self.longest_recovery(server).div_ceil(pause);
                let server = if server { "a" } else { "no" };
                late.then(|| {
                    format!("{calls} calls, {pause} apart, before all pass with {server} server")
                })
            },
        )
    }

    /// Until a client's breaker has backed off as far as it does, twice: a probe that passed while the target
    /// still worked may close the shared circuit after that, which resets the local one once more.
    pub fn too_many_calls(&self) -> Option<String> {
        let LocalSettings { opens_at, open_for, open_for_max } = self.clients[0].settings;
        let waits =
            (0..8).map(|attempt| open_for << attempt).take_while(|wait| *wait < open_for_max);
        let most =
            2 * (opens_at * open_for_max + waits.map(|wait| open_for_max - wait).sum::<u8>());
        let outrun = self.clients.iter().map(|client| client.outrun).max()?;
        (outrun > most)
            .then(|| format!("{outrun} ticks' worth of calls of {most} on a dead target"))
    }
}
