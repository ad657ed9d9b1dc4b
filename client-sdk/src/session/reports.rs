//! Reports: one at a time, each until it is answered.

use std::{collections::VecDeque, mem, time::Duration};

use fusebox_core::Time;
use fusebox_proto::v1::ReportRequest;
use prost::Message;

use crate::part::{Draft, REPORT_MOST};

/// Size of a report on the wire, at most: the server reads messages of 1 MiB, and its envelope needs some of it.
const BYTES_MOST: usize = 900 << 10;

/// How long a server that is too busy for a report is left alone with it.
const AGAIN_AFTER: Duration = Duration::from_millis(500);

/// What is to be reported, and what of it is under way.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    /// In order; the first may be under way.
    pages: VecDeque<ReportRequest>,
    /// When the first was sent, on the session that is up.
    under_way: Option<Time>,
    /// Number of the last page that was ever sent.
    sequence: u64,
    not_before: Time,
}

impl Reports {
    /// Whether all was answered, so that parts may be asked for more.
    pub(crate) fn is_idle(&self) -> bool {
        self.pages.is_empty()
    }

    /// Adds what parts have to say; as many pages as it takes.
    pub(crate) fn add(&mut self, draft: Draft) {
        if !draft.is_empty() {
            self.add_page(ReportRequest {
                outcomes: draft.outcomes,
                deltas: draft.deltas,
                renew_grant_ids: draft.renew_grant_ids,
                ..Default::default()
            });
        }
    }

    /// Adds the last words, to whatever is said last.
    pub(crate) fn add_goodbye(&mut self) {
        // One that has been sent is sent again as it is.
        match self.pages.back_mut().filter(|page| page.sequence == 0) {
            Some(last) => last.goodbye = true,
            None => self.pages.push_back(ReportRequest { goodbye: true, ..Default::default() }),
        }
    }

    fn add_page(&mut self, mut page: ReportRequest) {
        if let Some(rest) = cut(&mut page) {
            self.add_page(page);
            self.add_page(rest);
        } else {
            self.pages.push_back(page);
        }
    }

    /// The report to send now, if there is one and none is under way.
    pub(crate) fn next(&mut self, now: Time) -> Option<ReportRequest> {
        if self.under_way.is_some() || now < self.not_before {
            return None;
        }
        let page = self.pages.front_mut()?;
        if page.sequence == 0 {
            self.sequence += 1;
            page.sequence = self.sequence;
        }
        self.under_way = Some(now);
        Some(page.clone())
    }

    /// The one under way is answered, or will never be.
    pub(crate) fn is_answered(&mut self) {
        if self.under_way.take().is_some() {
            self.pages.pop_front();
        }
    }

    /// The one under way is refused for a mistake somewhere in it, and nothing of it counted. It is said again in two
    /// halves, so that what is wrong takes nothing along; tells whether it could be halved, else it is dropped.
    pub(crate) fn is_refused(&mut self) -> bool {
        if self.under_way.take().is_none() {
            return false;
        }
        let Some(mut page) = self.pages.pop_front() else { return false };
        let Some(rest) = halve(&mut page) else { return false };
        // Other reports than before, so under numbers of their own.
        page.sequence = 0;
        self.pages.push_front(rest);
        self.pages.push_front(page);
        true
    }

    /// The server is too busy for the one under way: it is sent again after a while.
    pub(crate) fn is_put_off(&mut self, now: Time) {
        self.under_way = None;
        self.not_before = now.after(AGAIN_AFTER);
    }

    /// The session broke: the one under way is sent again on the next, under the same number.
    pub(crate) fn broke(&mut self) {
        self.under_way = None;
        self.not_before = Time::ZERO;
    }

    /// The server has started anew, and forgotten numbers: what was sent may have counted, and would count twice.
    /// Tells how many deltas are lost; outcomes are settled once, by their grants.
    pub(crate) fn restarted(&mut self) -> u64 {
        let Some(page) = self.pages.front_mut().filter(|page| page.sequence != 0) else { return 0 };
        let lost = mem::take(&mut page.deltas).len();
        page.renew_grant_ids.clear();
        if page.outcomes.is_empty() && !page.goodbye {
            self.pages.pop_front();
            self.under_way = None;
        }
        lost as u64
    }

    /// The server has another state, to which all of it says nothing. Tells how many deltas are lost.
    pub(crate) fn replaced(&mut self) -> u64 {
        let lost = self.pages.iter().map(|page| page.deltas.len() as u64).sum();
        let goodbye = self.pages.iter().any(|page| page.goodbye);
        self.pages.clear();
        self.under_way = None;
        if goodbye {
            self.add_goodbye();
        }
        lost
    }
}

/// Cuts off what is too much for one report.
fn cut(page: &mut ReportRequest) -> Option<ReportRequest> {
    let most = page.outcomes.len().max(page.deltas.len()).max(page.renew_grant_ids.len());
    let keep = match most {
        0 | 1 => return None,
        _ if most > REPORT_MOST => REPORT_MOST,
        _ if page.encoded_len() > BYTES_MOST => most / 2,
        _ => return None,
    };
    Some(ReportRequest {
        outcomes: page.outcomes.split_off(keep.min(page.outcomes.len())),
        deltas: page.deltas.split_off(keep.min(page.deltas.len())),
        renew_grant_ids: page.renew_grant_ids.split_off(keep.min(page.renew_grant_ids.len())),
        ..Default::default()
    })
}

/// Cuts off half of a report, if there is more than one thing in it: counts first, which name what may be gone.
fn halve(page: &mut ReportRequest) -> Option<ReportRequest> {
    let (outcomes, renewals) = (page.outcomes.len(), page.renew_grant_ids.len());
    let settles = outcomes + renewals > 0;
    let mut rest = ReportRequest { goodbye: page.goodbye, ..Default::default() };
    if settles && !page.deltas.is_empty() {
        rest.deltas = mem::take(&mut page.deltas);
    } else if outcomes > 0 && renewals > 0 {
        rest.renew_grant_ids = mem::take(&mut page.renew_grant_ids);
    } else if outcomes + renewals + page.deltas.len() > 1 {
        rest.outcomes = page.outcomes.split_off(outcomes.div_ceil(2));
        rest.renew_grant_ids = page.renew_grant_ids.split_off(renewals.div_ceil(2));
        rest.deltas = page.deltas.split_off(page.deltas.len().div_ceil(2));
    } else if !page.goodbye || outcomes + renewals + page.deltas.len() == 0 {
        return None;
    }
    page.goodbye = false;
    Some(rest)
}

#[cfg(test)]
mod tests {
    use fusebox_proto::v1::{CircuitDelta, GrantOutcome};

    use super::*;

    const NOW: Time = Time::ZERO;

    fn draft(outcomes: usize, deltas: usize, renewals: usize) -> Draft {
        Draft {
            outcomes: vec![GrantOutcome::default(); outcomes],
            deltas: vec![CircuitDelta::default(); deltas],
            renew_grant_ids: vec![String::new(); renewals],
        }
    }

    fn with(draft: Draft) -> Reports {
        let mut reports = Reports::default();
        reports.add(draft);
        reports
    }

    #[test]
    fn there_is_one_at_a_time() {
        let mut reports = with(draft(1, 0, 0));
        assert_eq!(reports.next(NOW).unwrap().sequence, 1);
        assert_eq!(reports.next(NOW), None);
        reports.is_answered();
        assert!(reports.is_idle());
        reports.add(draft(0, 1, 0));
        assert_eq!(reports.next(NOW).unwrap().sequence, 2);
    }

    #[test]
    fn nothing_to_say_is_not_said() {
        assert!(with(Draft::default()).is_idle());
    }

    #[test]
    fn one_that_was_not_answered_is_sent_again_as_it_was() {
        let mut reports = with(draft(1, 2, 3));
        let first = reports.next(NOW);
        reports.broke();
        assert_eq!(reports.next(NOW), first);
    }

    #[test]
    fn after_a_restart_only_outcomes_are_sent_again() {
        let mut reports = with(draft(1, 2, 3));
        let first = reports.next(NOW).unwrap();
        reports.broke();
        assert_eq!(reports.restarted(), 2);
        let again = reports.next(NOW).unwrap();
        assert_eq!(again.sequence, first.sequence);
        assert_eq!(again.outcomes, first.outcomes);
        assert!(again.deltas.is_empty() && again.renew_grant_ids.is_empty());
    }

    #[test]
    fn after_a_restart_nothing_but_counts_is_nothing() {
        let mut reports = with(draft(0, 2, 3));
        reports.next(NOW);
        reports.broke();
        assert_eq!(reports.restarted(), 2);
        assert!(reports.is_idle());
    }

    #[test]
    fn what_was_never_sent_is_not_lost_by_a_restart() {
        let mut reports = with(draft(0, 2, 0));
        assert_eq!(reports.restarted(), 0);
        assert_eq!(reports.next(NOW).unwrap().deltas.len(), 2);
    }

    #[test]
    fn another_state_hears_nothing_of_it() {
        let mut reports = with(draft(1, 2, 3));
        reports.next(NOW);
        reports.broke();
        assert_eq!(reports.replaced(), 2);
        assert!(reports.is_idle());
    }

    #[test]
    fn more_than_a_report_holds_is_sent_in_pages_of_which_the_last_says_goodbye() {
        let mut reports = with(draft(2500, 10, 1001));
        reports.add_goodbye();
        let mut pages = Vec::new();
        while let Some(page) = reports.next(NOW) {
            pages.push((
                page.outcomes.len(),
                page.deltas.len(),
                page.renew_grant_ids.len(),
                page.goodbye,
            ));
            reports.is_answered();
        }
        let expected = [(1000, 10, 1000, false), (1000, 0, 1, false), (500, 0, 0, true)];
        assert_eq!(pages, expected);
    }

    #[test]
    fn long_names_make_more_pages() {
        let delta = CircuitDelta { key: "k".repeat(2048), ..Default::default() };
        let mut reports = with(Draft { deltas: vec![delta; 1000], ..Default::default() });
        let mut deltas = 0;
        while let Some(page) = reports.next(NOW) {
            assert!(page.encoded_len() <= BYTES_MOST);
            deltas += page.deltas.len();
            reports.is_answered();
        }
        assert_eq!(deltas, 1000);
    }

    #[test]
    fn what_is_wrong_in_a_report_takes_nothing_along() {
        let bad = CircuitDelta { policy: "gone".into(), ..Default::default() };
        let mut reports = with(Draft { deltas: vec![bad.clone()], ..draft(900, 0, 3) });
        reports.pages[0].deltas.splice(0..0, vec![CircuitDelta::default(); 998]);
        reports.pages[0].deltas.push(CircuitDelta::default());
        reports.add_goodbye();
        let (mut told, mut dropped, mut said, mut last) = ((0, 0, 0), 0, 0, 0);
        while let Some(page) = reports.next(NOW) {
            said += 1;
            assert!(page.sequence > last, "a number of its own");
            last = page.sequence;
            if page.deltas.contains(&bad) {
                dropped += u32::from(!reports.is_refused());
                continue;
            }
            told.0 += page.outcomes.len();
            told.1 += page.deltas.len();
            told.2 += page.renew_grant_ids.len();
            assert_eq!(page.goodbye, reports.pages.len() == 1);
            reports.is_answered();
        }
        assert_eq!((told, dropped), ((900, 999, 3), 1));
        assert!(said < 30, "{said} reports");
    }

    #[test]
    fn goodbye_is_not_added_to_what_was_sent_without_it() {
        let mut reports = with(draft(1, 0, 0));
        assert!(!reports.next(NOW).unwrap().goodbye);
        reports.add_goodbye();
        reports.broke();
        assert!(!reports.next(NOW).unwrap().goodbye);
        reports.is_answered();
        assert!(reports.next(NOW).unwrap().goodbye);
    }

    #[test]
    fn a_busy_server_is_left_alone_for_a_while() {
        let mut reports = with(draft(1, 0, 0));
        let first = reports.next(NOW);
        reports.is_put_off(NOW);
        assert_eq!(reports.next(NOW), None);
        assert_eq!(reports.next(NOW.after(AGAIN_AFTER)), first);
    }
}
