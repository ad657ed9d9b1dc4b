//! The one task that calls the parts of a client.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use fusebox_core::Time;
use tokio::{
    sync::{mpsc, oneshot},
    time::MissedTickBehavior,
};
use tonic::Code;

use super::{
    Shared,
    link::{Command, News, Told, What},
    reports::Reports,
    truths::{Truth, Truths, Welcomed},
    watching::Watching,
};
use crate::{
    part::{Draft, Link, Part},
    telemetry::Event,
};

/// How often the parts are looked after, and say something if they have to.
const BEAT: Duration = Duration::from_millis(50);

/// How often it is looked for bindings that nobody uses: a number is free again after twice this time.
const SWEEP: Duration = Duration::from_secs(10);

/// How long a client that ends says goodbye, at most.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);

/// How long a client that ends waits for a session to say goodbye on, at most.
const CONNECT_WITHIN: Duration = Duration::from_millis(500);

/// The one task that calls the parts of a client.
pub(super) struct Steward {
    shared: Arc<Shared>,
    /// Weak, so that a client ends when nobody has it any more.
    parts: Vec<Weak<dyn Part>>,
    commands: Vec<mpsc::Sender<Command>>,
    told: mpsc::Receiver<Told>,
    /// Number of the session of each connection.
    sessions: Vec<u64>,
    last_session: u64,
    /// Which connection carries reports and news.
    first: Option<usize>,
    truths: Truths,
    reports: Reports,
    watching: Watching,
    /// Whether parts are to be asked for a report as soon as one can be sent.
    report_due: bool,
    /// Why a report was refused last.
    mistake: Option<(Code, String)>,
    is_closing: bool,
    closed: bool,
    sweep_at: Time,
}

impl Steward {
    pub(super) fn new(
        shared: Arc<Shared>,
        parts: Vec<Weak<dyn Part>>,
        commands: Vec<mpsc::Sender<Command>>,
        told: mpsc::Receiver<Told>,
    ) -> Self {
        let (connections, now) = (commands.len(), shared.clock.now());
        Self {
            shared,
            parts,
            commands,
            told,
            sessions: vec![0; connections],
            last_session: 0,
            first: None,
            truths: Truths::new(connections),
            reports: Reports::default(),
            watching: Watching::default(),
            report_due: false,
            mistake: None,
            is_closing: false,
            closed: false,
            sweep_at: now.after(SWEEP),
        }
    }

    /// Looks after the parts until the client is closed, and says goodbye.
    pub(super) async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = shared.close.notified() => break,
                Some(told) = self.told.recv() => self.hear(told),
                () = shared.hurry.notified() => self.report_due = true,
                _ = beat.tick() => self.beat(),
            }
            self.say();
        }
        // What could not be said by then is not said.
        let _ = tokio::time::timeout(CLOSE_WITHIN, self.say_goodbye()).await;
    }

    fn now(&self) -> Time {
        self.shared.clock.now()
    }

    fn parts(&self) -> impl Iterator<Item = Arc<dyn Part>> {
        self.parts.iter().filter_map(Weak::upgrade)
    }

    fn beat(&mut self) {
        let now = self.now();
        let mut breakers = Vec::new();
        for part in self.parts() {
            part.tend(now);
            breakers.extend(part.watches());
        }
        self.watching.wants(breakers);
        self.report_due = true;
        if now >= self.sweep_at {
            self.sweep_at = now.after(SWEEP);
            self.shared.bindings.lock().sweep();
            self.bind_all();
        }
    }

    /// Says what is to be said and can be.
    fn say(&mut self) {
        let now = self.now();
        let Some(first) = self.first else { return };
        if self.report_due && self.reports.is_idle() {
            self.report_due = false;
            let mut draft = Draft::default();
            self.parts().for_each(|part| part.report(&mut draft, now));
            self.reports.add(draft);
        }
        self.say_reports(first, now);
        if let Some((asking, watch)) = self.watching.next(now)
            && !self.command(first, What::Watch(asking, watch))
        {
            self.watching.broke();
        }
    }

    fn say_reports(&mut self, first: usize, now: Time) {
        if let Some(report) = self.reports.next(now)
            && !self.command(first, What::Report(report))
        {
            // It was not handed over; the next beat tries again.
            self.reports.broke();
        }
    }

    /// Hands a command to a connection; `false` if it has no room for one.
    fn command(&self, connection: usize, what: What) -> bool {
        let session = self.sessions[connection];
        self.commands[connection].try_send(Command { session, what }).is_ok()
    }

    /// Has each connection look again which bindings are its own.
    fn bind_all(&self) {
        for connection in 0..self.commands.len() {
            // One that has no room has bindings to look at already.
            let _ = self.command(connection, What::Bind);
        }
    }

    fn hear(&mut self, Told { connection, news }: Told) {
        let now = self.now();
        match news {
            News::Welcomed(truth, reply) => self.is_welcomed(connection, truth, reply, now),
            News::Broken => self.is_broken(connection, now),
            News::Reported(response, sent) => {
                self.reports.is_answered();
                self.parts().for_each(|part| part.reported(&response, sent));
            }
            News::ReportRefused(code, message) => self.report_is_refused(code, &message, now),
            News::Watched(asking, news, sent) => {
                if self.watching.hears(asking, &news) && !self.is_closing {
                    self.parts().for_each(|part| part.watched(&news, sent));
                }
            }
            News::WatchRefused(asking, code, message) => {
                self.watching.is_refused(asking, now);
                self.refused(code, &message);
            }
            News::Closed => self.closed = true,
        }
    }

    fn is_welcomed(
        &mut self,
        connection: usize,
        truth: Truth,
        reply: oneshot::Sender<Result<u64, Arc<str>>>,
        now: Time,
    ) {
        let former = self.truths.known().map(|former| Arc::clone(&former.id));
        let id = Arc::clone(&truth.id);
        let link = match self.truths.welcomed(connection, truth) {
            Welcomed::Used(link) => link,
            Welcomed::Refused(other) => {
                let _ = reply.send(Err(other));
                return;
            }
        };
        if link == Some(Link::Replaced) {
            let former = &*former.unwrap_or_default();
            self.shared.tell(&Event::Replaced { former, truth_id: &id });
        }
        if let Some(link) = link {
            self.is_linked(link, now);
        }
        self.last_session += 1;
        self.sessions[connection] = self.last_session;
        self.shared.set_up(connection, true);
        let _ = reply.send(Ok(self.last_session));
        self.first.get_or_insert(connection);
        // Of several connections, another one may have looked after its keys.
        if self.commands.len() > 1 {
            self.bind_all();
        }
    }

    fn is_broken(&mut self, connection: usize, now: Time) {
        let down = self.truths.broke(connection);
        self.shared.set_up(connection, false);
        if self.first == Some(connection) {
            self.first = self.truths.first_up();
            self.reports.broke();
            self.watching.broke();
        }
        match down {
            Some(down) => self.is_linked(down, now),
            None => self.bind_all(),
        }
    }

    fn is_linked(&mut self, link: Link, now: Time) {
        let lost = match link {
            Link::Down | Link::Resumed => 0,
            Link::Restarted => self.reports.restarted(),
            Link::Replaced => {
                self.watching.replaced();
                self.reports.replaced()
            }
        };
        if lost > 0 {
            self.shared
                .tell(&Event::Dropped { what: "reports that may have counted", count: lost });
        }
        if !self.is_closing {
            self.parts().for_each(|part| part.linked(link, now));
        }
    }

    fn report_is_refused(&mut self, code: Code, message: &str, now: Time) {
        if matches!(
            code,
            Code::Unavailable
                | Code::ResourceExhausted
                | Code::DeadlineExceeded
                | Code::Cancelled
                | Code::Aborted
        ) {
            self.reports.is_put_off(now);
            return;
        }
        let is_in_it =
            matches!(code, Code::InvalidArgument | Code::NotFound | Code::FailedPrecondition);
        if is_in_it && self.reports.is_refused() {
            return;
        }
        self.reports.is_answered();
        // One policy that is gone may have many keys.
        let is_news = self.mistake.as_ref().is_none_or(|known| *known != (code, message.into()));
        if is_news {
            self.refused(code, message);
            self.mistake = Some((code, message.into()));
        }
    }

    fn refused(&self, code: Code, message: &str) {
        self.shared.tell(&Event::Refused { policy: "", key: "", code, message });
    }

    /// The last reports, and the end of the session.
    async fn say_goodbye(&mut self) {
        self.is_closing = true;
        self.take_leave();
        // A client that no server ever heard of has nothing to say to one.
        if self.truths.known().is_none() {
            return;
        }
        self.reports.add_goodbye();
        let mut beat = tokio::time::interval(BEAT);
        while !self.reports.is_idle() {
            if self.first.is_none() && !self.is_up_again().await {
                return;
            }
            if let Some(first) = self.first {
                self.say_reports(first, self.now());
            }
            tokio::select! {
                biased;
                Some(told) = self.told.recv() => self.hear(told),
                _ = beat.tick() => {}
            }
        }
        let Some(first) = self.first else { return };
        self.add_late_ends();
        self.say_reports(first, self.now());
        self.command(first, What::Close);
        while !self.closed
            && self.first == Some(first)
            && let Some(told) = self.told.recv().await
        {
            self.hear(told);
        }
    }

    /// Adds ends of what was granted while it was said: leases that were under way. Nothing is decided by the answer,
    /// so none is waited for.
    fn add_late_ends(&mut self) {
        let now = self.now();
        let mut late = Draft::default();
        self.parts().for_each(|part| part.report(&mut late, now));
        self.reports.add(Draft { outcomes: late.outcomes, ..Draft::default() });
    }

    /// Asks the parts for all that they hold.
    fn take_leave(&mut self) {
        let (now, mut last) = (self.now(), Draft::default());
        for part in self.parts() {
            let mut draft = Draft::default();
            part.close(&mut draft, now);
            last.outcomes.append(&mut draft.outcomes);
            last.deltas.append(&mut draft.deltas);
            last.renew_grant_ids.append(&mut draft.renew_grant_ids);
        }
        self.reports.add(last);
    }

    /// Waits for a session, for a while.
    async fn is_up_again(&mut self) -> bool {
        let up = async {
            while self.first.is_none() {
                match self.told.recv().await {
                    Some(told) => self.hear(told),
                    None => return,
                }
            }
        };
        tokio::time::timeout(CONNECT_WITHIN, up).await.is_ok()
    }
}
