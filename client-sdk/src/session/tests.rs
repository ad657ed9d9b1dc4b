//! The session against a server of a few lines, over a network in memory, in the time of the runtime's timers.

mod fake;

use std::sync::Arc;

use fusebox_proto::v1::{
    self, SessionResponse, session_request::Request, session_response::Response,
};
use tokio::time::timeout;
use tonic::{Code, Status};

use self::fake::{HEARTBEAT, Net, PATIENCE, Peer, allowed, eventually, now, saying, terms};
use super::*;

#[tokio::test(start_paused = true)]
async fn while_nothing_is_up_nobody_waits() {
    let client = Net::default().client(&["a"], 1);
    let before = now();
    assert!(matches!(client.ask("k").await, Err(Unanswered::Unreachable)));
    assert_eq!(before.elapsed(), Duration::ZERO);
    assert!(!client.wire.is_up());
}

#[tokio::test(start_paused = true)]
async fn answers_find_whoever_asked_in_any_order() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    let (first, second) = (client.ask("1"), client.ask("2"));
    let (one, two) = (peer.asked().await, peer.asked().await);
    assert_eq!((&*one.1.asks[0].key, &*two.1.asks[0].key), ("1", "2"));
    peer.refuse(two.0, Code::NotFound).await;
    peer.tell(one.0, Response::Acquire(allowed())).await;
    let answers = first.await.unwrap().answers;
    assert!(answers[0].allowed && answers[0].verdict.remaining == Some(7));
    assert!(matches!(second.await, Err(Unanswered::Refused { code: Code::NotFound, .. })));
}

#[tokio::test(start_paused = true)]
async fn several_questions_are_one_message_and_fewer_answers_are_none() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    let question = Question::of(&client.wire.bind("api", ""));
    peer.bound().await;
    for answers in [2, 1] {
        let asked = client.wire.ask(vec![question.clone(), question.clone()]);
        let (id, request) = peer.next().await.unwrap();
        assert!(matches!(request, Request::AcquireBatch(batch) if batch.requests.len() == 2));
        let responses = vec![allowed(); answers];
        let response = v1::AcquireBatchResponse { responses };
        peer.tell(id, Response::AcquireBatch(response)).await;
        assert_eq!(asked.await.is_ok(), answers == 2);
    }
}

#[tokio::test(start_paused = true)]
async fn at_most_a_thousand_questions_are_under_way_and_the_others_wait_their_turn() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    let asked: Vec<_> = (0..1010).map(|_| client.ask("k")).collect();
    let mut ids = Vec::new();
    for _ in 0..1000 {
        ids.push(peer.asked().await.0);
    }
    assert!(timeout(HEARTBEAT / 2, peer.asked()).await.is_err(), "one more is under way");
    for id in ids {
        peer.tell(id, Response::Acquire(allowed())).await;
    }
    for _ in 0..10 {
        let (id, _) = peer.asked().await;
        peer.tell(id, Response::Acquire(allowed())).await;
    }
    for asked in asked {
        assert!(asked.await.is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn more_questions_than_there_is_room_for_are_dropped_and_said_to_be() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let _peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    // No task runs before this one waits.
    let mut asked: Vec<_> = (0..=QUEUED_MOST).map(|_| client.ask("k")).collect();
    assert!(matches!(asked.pop().unwrap().await, Err(Unanswered::Unreachable)));
    assert!(client.told("dropped") >= 1);
}

#[tokio::test(start_paused = true)]
async fn when_a_session_breaks_nobody_waits_for_it_any_more() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    let asked = client.ask("k");
    peer.asked().await;
    peer.end(Status::internal("broken")).await;
    assert!(matches!(asked.await, Err(Unanswered::Unreachable)));
    assert_eq!(client.told("disconnected { endpoint: \"a\", cause: \"internal: broken\""), 1);
    let _peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    eventually(|| client.part.has_heard() == ["Resumed", "Down", "Resumed"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_is_given_up_after_three_heartbeats() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let _silent = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    let since = now();
    let asked = client.ask("k");
    assert!(matches!(asked.await, Err(Unanswered::Unreachable)));
    assert_eq!(since.elapsed().as_secs(), 3);
    assert_eq!(client.told("the server is silent"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_speaks_and_does_not_hear_is_given_up() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let deaf = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    let since = now();
    while client.wire.is_up() {
        let beat = SessionResponse { id: 0, response: Some(Response::Heartbeat(v1::Heartbeat {})) };
        let _ = deaf.responses.send(Ok(beat)).await;
        tokio::time::sleep(HEARTBEAT / 2).await;
    }
    assert_eq!(since.elapsed().as_secs(), 4);
    assert_eq!(client.told("the server does not answer"), 1);
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_is_not_there_is_passed_over_at_once() {
    for seed in 0..4 {
        let net = Net::default();
        let mut sessions = net.serve("b");
        let since = now();
        let names: &[&str] = if seed % 2 == 0 { &["a", "b"] } else { &["b", "a"] };
        let client = net.client(names, 1);
        let _peer = Peer::welcomed(&mut sessions, "t", 1).await;
        client.wire.is_connected().await;
        assert!(since.elapsed() < Duration::from_millis(5));
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_drains_is_left_for_another_one_soon() {
    let net = Net::default();
    let (mut a, mut b) = (net.serve("a"), net.serve("b"));
    let client = net.client(&["a", "b"], 1);
    let (mut first, other) = tokio::select! {
        Some(peer) = a.recv() => (peer, &mut b),
        Some(peer) = b.recv() => (peer, &mut a),
    };
    first.welcome("t", 1).await;
    client.wire.is_connected().await;
    let since = now();
    first.end(Status::unavailable("draining: connect again")).await;
    let _second = Peer::welcomed(other, "t", 1).await;
    eventually(|| client.wire.is_up()).await;
    assert!(since.elapsed() < Duration::from_millis(110), "{:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_report_is_sent_again_under_its_number_until_it_is_answered_once() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.part.drafts.lock().push(saying(1, 2));
    let (_, first) = peer.reported().await;
    client.part.drafts.lock().push(saying(3, 0));
    peer.end(Status::internal("broken")).await;
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    let (id, again) = peer.reported().await;
    assert_eq!(again, first);
    peer.tell(id, Response::Report(v1::ReportResponse::default())).await;
    let (id, next) = peer.reported().await;
    assert_eq!((next.sequence, next.outcomes.len()), (first.sequence + 1, 3));
    let results = vec![0; 3];
    peer.tell(id, Response::Report(v1::ReportResponse { results, ..Default::default() })).await;
    let heard = ["Resumed", "Down", "Resumed", "reported 0", "reported 3"];
    eventually(|| client.part.has_heard() == heard).await;
}

#[tokio::test(start_paused = true)]
async fn after_a_restart_what_may_have_counted_is_not_counted_again() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.part.drafts.lock().push(saying(1, 2));
    peer.reported().await;
    peer.end(Status::internal("broken")).await;
    let mut peer = Peer::welcomed(&mut sessions, "t", 2).await;
    let (_, again) = peer.reported().await;
    assert_eq!((again.sequence, again.outcomes.len(), again.deltas.len()), (1, 1, 0));
    assert_eq!(client.part.has_heard(), ["Resumed", "Down", "Restarted"]);
    assert_eq!(client.told("count: 2"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_report_that_is_refused_is_said_to_be_and_does_not_stop_the_next() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.part.drafts.lock().extend([saying(2, 0), saying(1, 0)]);
    let (id, first) = peer.reported().await;
    peer.refuse(id, Code::ResourceExhausted).await;
    let (id, again) = peer.reported().await;
    assert_eq!(again, first);
    peer.refuse(id, Code::InvalidArgument).await;
    assert_eq!(peer.reported().await.1.outcomes.len(), 2);
    assert_eq!(client.told("refused"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_mistake_in_a_report_is_found_and_said_once_and_all_else_is_told() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.part.drafts.lock().push(saying(2, 2));
    let mut told = 0;
    while told < 2 {
        let (id, report) = peer.reported().await;
        if report.deltas.is_empty() {
            told += report.outcomes.len();
            peer.tell(id, Response::Report(v1::ReportResponse::default())).await;
        } else {
            peer.refuse(id, Code::NotFound).await;
        }
    }
    for _ in 0..3 {
        let (id, _) = peer.reported().await;
        peer.refuse(id, Code::NotFound).await;
    }
    eventually(|| client.told("refused") == 1).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_urgent_does_not_wait_for_the_beat() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    tokio::time::sleep(Duration::from_millis(160)).await;
    client.part.drafts.lock().push(saying(1, 0));
    let since = now();
    client.wire.hurry();
    peer.reported().await;
    assert!(since.elapsed() < Duration::from_millis(5), "{:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn another_state_is_not_used_beside_the_first() {
    let mut refused = 0;
    for seed in 0..8 {
        let net = Net::default();
        let (mut a, mut b) = (net.serve("a"), net.serve("b"));
        let client = net.seeded(&["a", "b"], 2, seed);
        let mut peers = Vec::new();
        // Whichever way they go, each is welcomed with the state of its server.
        let welcoming = async {
            loop {
                let (mut peer, truth) = tokio::select! {
                    Some(peer) = a.recv() => (peer, "state-a"),
                    Some(peer) = b.recv() => (peer, "state-b"),
                };
                peer.welcome(truth, 1).await;
                peers.push(peer);
            }
        };
        let _ = timeout(HEARTBEAT, welcoming).await;
        refused += client.told("its state is `state-");
        assert_eq!(client.told("connected { endpoint: \"a\", truth") % 2, 0);
        assert_eq!(client.told("connected { endpoint: \"b\", truth") % 2, 0);
        assert_eq!(client.context.telemetry.connects.load(Ordering::Relaxed), 2);
        assert_eq!(client.part.has_heard(), ["Resumed"]);
    }
    assert!(refused > 0, "both went to the same server each time");
}

#[tokio::test(start_paused = true)]
async fn a_replaced_state_is_told_before_it_is_used() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    peer.end(Status::internal("broken")).await;
    let mut peer = Peer::welcomed(&mut sessions, "other", 1).await;
    client.part.drafts.lock().push(saying(1, 0));
    peer.reported().await;
    assert_eq!(client.part.has_heard(), ["Resumed", "Down", "Replaced"]);
    assert_eq!(client.told("replaced { former: \"t\", truth_id: \"other\" }"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_binding_is_told_of_its_policy_and_its_number_is_used_from_then_on() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let binding = client.wire.bind("api", "k");
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    let (id, bind) = peer.bound().await;
    assert_eq!((bind.handle, &*bind.policy, &*bind.key), (1, "api", "k"));
    let _early = client.ask("k");
    assert_eq!(peer.asked().await.1.asks[0].policy, "api");
    peer.tell(id, Response::Bound(terms(1))).await;
    eventually(|| binding.settings().is_some()).await;
    assert_eq!(binding.clients(), 3);
    let _late = client.ask("k");
    let ask = peer.asked().await.1.asks.remove(0);
    assert_eq!((ask.handle, &*ask.policy, &*ask.key), (1, "", ""));
    // It is bound again on the next session, and known meanwhile.
    peer.end(Status::internal("broken")).await;
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    assert!(binding.settings().is_some());
    assert_eq!(peer.bound().await.1, bind);
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_is_not_there_is_said_once_and_asked_for_again() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let binding = client.wire.bind("api", "k");
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    for _ in 0..3 {
        let (id, _) = peer.bound().await;
        peer.refuse(id, Code::NotFound).await;
    }
    let (id, _) = peer.bound().await;
    assert_eq!(client.told("refused"), 1);
    peer.tell(id, Response::Bound(terms(1))).await;
    eventually(|| binding.settings().is_some()).await;
}

#[tokio::test(start_paused = true)]
async fn a_binding_that_nobody_uses_is_unbound() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    drop(client.wire.bind("api", "k"));
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    let (id, _) = peer.bound().await;
    peer.tell(id, Response::Bound(terms(1))).await;
    let (_, unbind) = peer.bound().await;
    assert_eq!(unbind, v1::Bind { handle: 1, ..Default::default() });
}

#[tokio::test(start_paused = true)]
async fn bindings_without_a_number_are_told_by_the_spare_one() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let all: Vec<_> = (0..4100).map(|key| client.wire.bind("api", &key.to_string())).collect();
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    while all.iter().any(|binding| binding.settings().is_none()) {
        let (id, bind) = peer.bound().await;
        peer.tell(id, Response::Bound(terms(bind.handle))).await;
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_parts_watch_is_watched_and_goes_on_after_a_break() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    *client.part.watches.lock() = vec!["b".into(), "a".into(), "b".into()];
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    let (id, watch) = peer.watched().await;
    assert_eq!((watch.policies, watch.epoch), (vec!["a".to_owned(), "b".to_owned()], 0));
    let news = v1::WatchResponse { epoch: 4, version: 9, ..Default::default() };
    peer.tell(id, Response::Watch(news)).await;
    eventually(|| client.part.has_heard().contains(&"watched 9".to_owned())).await;
    peer.end(Status::internal("broken")).await;
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    let (_, again) = peer.watched().await;
    assert_eq!((again.epoch, again.version), (4, 9));
}

#[tokio::test(start_paused = true)]
async fn keys_are_spread_over_connections_and_move_when_one_breaks() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 2);
    let mut peers =
        [Peer::welcomed(&mut sessions, "t", 1).await, Peer::welcomed(&mut sessions, "t", 1).await];
    eventually(|| client.told("connected { endpoint: \"a\", truth") == 2).await;
    let bindings: Vec<_> = (0..20).map(|key| client.wire.bind("api", &key.to_string())).collect();
    let mut counts = [0, 0];
    for (count, peer) in counts.iter_mut().zip(&mut peers) {
        while let Ok(Some((_, Request::Bind(_)))) = timeout(HEARTBEAT / 4, peer.next()).await {
            *count += 1;
        }
    }
    assert!(counts[0] + counts[1] == 20 && counts.iter().all(|count| *count > 3), "{counts:?}");
    let [first, mut second] = peers;
    first.end(Status::internal("broken")).await;
    for _ in 0..counts[0] {
        second.bound().await;
    }
    drop(bindings);
}

#[tokio::test(start_paused = true)]
async fn who_closes_says_all_that_is_left_and_goodbye_and_ends_the_session() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    *client.part.last.lock() = Some(saying(1500, 0));
    let wire = Arc::clone(&client.wire);
    let closing = tokio::spawn(async move { wire.close().await });
    for (outcomes, goodbye) in [(1000, false), (500, true)] {
        let (id, report) = peer.reported().await;
        assert_eq!((report.outcomes.len(), report.goodbye), (outcomes, goodbye));
        peer.tell(id, Response::Report(v1::ReportResponse::default())).await;
    }
    let (id, close) = peer.next().await.unwrap();
    assert!(matches!(close, Request::Close(_)));
    assert!(!closing.is_finished());
    peer.tell(id, Response::Closed(v1::Closed {})).await;
    closing.await.unwrap();
    assert!(client.wire.tasks.tracker.is_empty());
    assert!(matches!(client.ask("k").await, Err(Unanswered::Unreachable)));
    // Once more is the same.
    client.wire.close().await;
}

#[tokio::test(start_paused = true)]
async fn what_was_granted_while_the_client_closes_is_given_back_before_it_ends() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    let wire = Arc::clone(&client.wire);
    tokio::spawn(async move { wire.close().await });
    let (id, goodbye) = peer.reported().await;
    assert!(goodbye.goodbye);
    client.part.drafts.lock().push(saying(2, 3));
    peer.tell(id, Response::Report(v1::ReportResponse::default())).await;
    let (_, late) = peer.reported().await;
    assert_eq!((late.outcomes.len(), late.deltas.len()), (2, 0));
    assert!(matches!(peer.next().await, Some((_, Request::Close(_)))));
}

#[tokio::test(start_paused = true)]
async fn who_closes_does_not_wait_for_ever() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    let since = now();
    client.wire.close().await;
    assert_eq!(since.elapsed().as_secs(), 3);
    assert!(peer.reported().await.1.goodbye);
    assert!(client.wire.tasks.tracker.is_empty());
}

#[tokio::test(start_paused = true)]
async fn who_was_never_connected_closes_at_once() {
    let client = Net::default().client(&["a"], 1);
    let since = now();
    client.wire.close().await;
    assert!(since.elapsed() < Duration::from_millis(5));
    assert!(client.wire.tasks.tracker.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_client_whose_steward_panics_ends_and_decides_as_without_a_server() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 1);
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    client.part.panics.store(true, Ordering::Relaxed);
    eventually(|| !client.wire.is_up()).await;
    assert!(matches!(client.ask("k").await, Err(Unanswered::Unreachable)));
    assert!(peer.next().await.is_none(), "it speaks on");
    timeout(Duration::from_secs(5), client.wire.close()).await.expect("it is closed");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_left_of_a_client_that_is_dropped() {
    let net = Net::default();
    let mut sessions = net.serve("a");
    let client = net.client(&["a"], 2);
    let mut peer = Peer::welcomed(&mut sessions, "t", 1).await;
    client.wire.is_connected().await;
    let tracker = client.wire.tasks.tracker.clone();
    assert!(!tracker.is_empty());
    drop(client);
    tracker.close();
    timeout(PATIENCE, tracker.wait()).await.expect("all tasks end");
    assert!(peer.next().await.is_none(), "and nothing was said");
}
