//! Whether the server is there, and hears what it is told.

use std::time::Duration;

use fusebox_core::Time;

/// So many times the silence that the server announced are too many.
const TIMES: u32 = 3;

/// The least silence that is taken at its word: a server of a shorter one would be asked all the time.
const LEAST: Duration = Duration::from_millis(50);

/// The most, which is also what a server has that announces none.
const MOST: Duration = Duration::from_secs(60);

/// What has been heard of the other side of a session.
///
/// Heartbeats come on their own, so they say nothing about the way there; after a while without any answer a probe is
/// sent, which is answered at once.
#[derive(Clone, Debug)]
pub(crate) struct Liveness {
    heartbeat: Duration,
    heard: Time,
    answered: Time,
    probed: Option<Time>,
}

/// What is to be done about it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// Nothing before then.
    At(Time),
    /// To probe.
    Probe,
    /// To give it up, and why.
    Dead(&'static str),
}

impl Liveness {
    /// A session that began now.
    pub(crate) fn new(heartbeat: Option<Duration>, now: Time) -> Self {
        let heartbeat = heartbeat.filter(|heartbeat| !heartbeat.is_zero());
        let heartbeat = heartbeat.unwrap_or(MOST).clamp(LEAST, MOST);
        Self { heartbeat, heard: now, answered: now, probed: None }
    }

    /// Something arrived.
    pub(crate) fn heard(&mut self, now: Time) {
        self.heard = now;
    }

    /// An answer arrived.
    pub(crate) fn answered(&mut self, now: Time) {
        self.heard = now;
        self.answered = now;
        self.probed = None;
    }

    /// A probe was sent.
    pub(crate) fn probed(&mut self, now: Time) {
        self.probed = Some(now);
    }

    /// What is due now.
    pub(crate) fn due(&self, now: Time) -> Due {
        let silent_at = self.heard.after(self.heartbeat * TIMES);
        if now >= silent_at {
            return Due::Dead("the server is silent");
        }
        let next = match self.probed {
            Some(probed) if now >= probed.after(self.heartbeat * TIMES) => {
                return Due::Dead("the server does not answer");
            }
            Some(probed) => probed.after(self.heartbeat * TIMES),
            None if now >= self.answered.after(self.heartbeat) => return Due::Probe,
            None => self.answered.after(self.heartbeat),
        };
        Due::At(next.min(silent_at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEARTBEAT: Duration = Duration::from_secs(1);

    fn at(millis: u64) -> Time {
        Time::ZERO.after(Duration::from_millis(millis))
    }

    fn liveness() -> Liveness {
        Liveness::new(Some(HEARTBEAT), at(0))
    }

    #[test]
    fn silence_of_three_heartbeats_is_death() {
        let mut liveness = liveness();
        liveness.probed(at(1000));
        assert_eq!(liveness.due(at(2999)), Due::At(at(3000)));
        assert!(matches!(liveness.due(at(3000)), Due::Dead(_)));
    }

    #[test]
    fn heartbeats_alone_are_not_enough() {
        let mut liveness = liveness();
        assert_eq!(liveness.due(at(999)), Due::At(at(1000)));
        assert_eq!(liveness.due(at(1000)), Due::Probe);
        liveness.probed(at(1000));
        for second in 1..4 {
            liveness.heard(at(second * 1000));
        }
        assert_eq!(liveness.due(at(3999)), Due::At(at(4000)));
        assert!(matches!(liveness.due(at(4000)), Due::Dead(_)));
    }

    #[test]
    fn an_answer_puts_off_the_probe() {
        let mut liveness = liveness();
        liveness.answered(at(900));
        assert_eq!(liveness.due(at(1000)), Due::At(at(1900)));
        liveness.probed(at(1900));
        liveness.answered(at(1950));
        assert_eq!(liveness.due(at(2000)), Due::At(at(2950)));
    }

    #[test]
    fn an_absurd_heartbeat_is_not_believed() {
        let due = |heartbeat| Liveness::new(heartbeat, at(0)).due(at(0));
        assert_eq!(due(None), Due::At(at(60_000)));
        assert_eq!(due(Some(Duration::ZERO)), Due::At(at(60_000)));
        assert_eq!(due(Some(Duration::from_nanos(1))), Due::At(at(50)));
        assert_eq!(due(Some(Duration::MAX)), Due::At(at(60_000)));
    }
}
