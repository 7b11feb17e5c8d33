use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::deliver::Model;
use super::{Reply, Server, all_ok, bulk_answer, eventually, sink};
use crate::change::Action;
use crate::lsn::Lsn;
use crate::sink::{Body, Lanes, Limits, SinkError, Target};

const LIMITS: Limits = Limits { documents: 3, bytes: 1 << 20, linger: Duration::ZERO };

fn add(body: &mut Body, target: &Target, id: &str, version: u64) {
    body.index(target, id.as_bytes(), version, |out| out.extend_from_slice(b"{}"));
}

/// Whatever fails on the way, the last operation on each document is the one that stays, and nothing counts as
/// answered before it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_operation_wins_through_all_faults() {
    let seed = fastrand::u64(..);
    let state = Arc::new(Mutex::new((Model::default(), fastrand::Rng::with_seed(seed))));
    let served = Arc::clone(&state);
    let server = Server::start(move |_, request| {
        let (model, rng) = &mut *served.lock().unwrap();
        match rng.u8(..10) {
            0 => Reply::Hangup,
            // Carried out, and the answer is lost.
            1 => {
                model.apply(request);
                Reply::Hangup
            }
            2 => Reply::error(429, "es_rejected_execution_exception", "busy"),
            3 | 4 => {
                let operations = request.operations();
                let statuses: Vec<u16> = operations
                    .iter()
                    .map(|operation| if rng.bool() { 429 } else { model.apply_one(operation) })
                    .collect();
                let answer = bulk_answer(&operations, |at, _| match statuses[at] {
                    200 => (200, Value::Null),
                    status => (status, json!({"type": "x", "reason": "y"})),
                });
                Reply::json(200, &answer)
            }
            5 => {
                let body = model.apply(request).to_string().into_bytes();
                Reply::Cut { at: rng.usize(..body.len()), body }
            }
            _ => Reply::json(200, &model.apply(request)),
        }
    })
    .await;
    let (sink, _folder) = sink(&server.url);
    let mut lanes = Lanes::new(sink.clone(), 3, LIMITS, CancellationToken::new());
    let target = Target::new("users", 0);
    let mut rng = fastrand::Rng::with_seed(seed ^ 1);
    let mut history: Vec<(String, u64)> = Vec::new();
    // Everything before the oldest unanswered commit is in the index, or something newer for its document.
    let check = |history: &[(String, u64)], oldest: Option<Lsn>| {
        let mut newest = HashMap::new();
        for (number, (id, commit)) in history.iter().enumerate() {
            if oldest.is_none_or(|oldest| Lsn(*commit) < oldest) {
                newest.insert(id.clone(), number as u64);
            }
        }
        let model = &state.lock().unwrap().0;
        for (id, number) in newest {
            let found = model.documents.get(&("users".to_owned(), id.clone()));
            let found = found.and_then(|(_, document)| document.as_ref()).and_then(|document| document["n"].as_u64());
            assert!(found >= Some(number), "seed {seed}: {id} is at {found:?}, {number} counts as answered");
        }
    };
    let mut commit = 1;
    for number in 0..600_u64 {
        commit += u64::from(rng.u8(..4) == 0);
        let id = rng.u8(..12).to_string();
        let body = lanes.body_for(&target, id.as_bytes(), Lsn(commit));
        body.index(&target, id.as_bytes(), commit, |out| {
            out.extend_from_slice(format!("{{\"n\":{number}}}").as_bytes())
        });
        history.push((id, commit));
        if lanes.needs_flush() {
            lanes.flush_full().await.unwrap();
        }
        assert!(!lanes.needs_flush());
        if rng.u8(..8) == 0 {
            lanes.flush_idle();
            // The position first: what is answered after it was read does not matter.
            let oldest = lanes.oldest_unanswered();
            check(&history, oldest);
        }
    }
    tokio::time::timeout(Duration::from_secs(60), lanes.drain()).await.expect("drained in time").unwrap();
    assert_eq!((lanes.oldest_unanswered(), lanes.under_construction(), lanes.failed()), (None, 0, None));
    let mut last = HashMap::new();
    for (number, (id, _)) in history.iter().enumerate() {
        last.insert(id.clone(), number as u64);
    }
    let model = &state.lock().unwrap().0;
    assert_eq!(model.documents.len(), last.len());
    for (id, number) in last {
        let document = model.documents[&("users".to_owned(), id.clone())].1.clone();
        assert_eq!(document, Some(json!({"n": number})), "seed {seed}: {id}");
    }
    let stats = sink.stats();
    assert_eq!((stats.documents, stats.queued_documents, stats.in_flight, stats.rejected), (600, 0, 0, 0));
}

#[tokio::test]
async fn a_lane_sends_one_bulk_at_a_time_and_holds_no_more_than_one_more() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let server =
        Server::start(move |_, request| Reply::Held(Arc::clone(&held), Box::new(Reply::json(200, &all_ok(request)))))
            .await;
    let (sink, _folder) = sink(&server.url);
    let mut lanes = Lanes::new(sink.clone(), 1, LIMITS, CancellationToken::new());
    let answered = lanes.answered();
    let target = Target::new("users", 0);
    assert_eq!(lanes.oldest_unanswered(), None);
    let mut flushed = 0;
    for commit in 10..19 {
        add(lanes.body_for(&target, b"1", Lsn(commit)), &target, "1", commit);
        if lanes.needs_flush() && flushed < 2 {
            lanes.flush_full().await.unwrap();
            flushed += 1;
        }
    }
    eventually("the first is sent", || server.requests().len() == 1).await;
    assert!(lanes.needs_flush());
    // One in flight, one waiting, one full: this one waits, and may be given up without loss.
    assert!(tokio::time::timeout(Duration::from_millis(50), lanes.flush_full()).await.is_err());
    lanes.flush_idle();
    assert_eq!((lanes.under_construction(), sink.stats().queued_documents), (3, 6));
    assert_eq!((server.requests().len(), lanes.oldest_unanswered()), (1, Some(Lsn(10))));
    for (sent, oldest) in [(2, Some(Lsn(13))), (2, Some(Lsn(16)))] {
        gate.add_permits(1);
        answered.notified().await;
        assert_eq!(lanes.oldest_unanswered(), oldest);
        eventually("the next is sent", || server.requests().len() == sent).await;
    }
    gate.add_permits(1);
    lanes.drain().await.unwrap();
    assert_eq!(lanes.oldest_unanswered(), None);
    assert_eq!(
        server.requests().iter().map(|request| request.operations()[0].version).collect::<Vec<_>>(),
        [Some(10), Some(13), Some(16)]
    );
}

#[tokio::test]
async fn idle_lanes_send_what_there_is_and_busy_ones_wait() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let server =
        Server::start(move |_, request| Reply::Held(Arc::clone(&held), Box::new(Reply::json(200, &all_ok(request)))))
            .await;
    let (sink, _folder) = sink(&server.url);
    let mut lanes = Lanes::new(sink, 1, LIMITS, CancellationToken::new());
    let target = Target::new("users", 0);
    add(lanes.body_for(&target, b"1", Lsn(1)), &target, "1", 1);
    lanes.flush_idle();
    add(lanes.body_for(&target, b"2", Lsn(2)), &target, "2", 2);
    lanes.flush_idle();
    assert_eq!((lanes.under_construction(), lanes.oldest_unanswered()), (1, Some(Lsn(1))));
    // An item that was dropped again holds nothing back.
    let answered = lanes.answered();
    gate.add_permits(1);
    answered.notified().await;
    lanes.body_for(&target, b"2", Lsn(2)).truncate_last();
    assert_eq!(lanes.oldest_unanswered(), None);
    add(lanes.body_for(&target, b"3", Lsn(3)), &target, "3", 3);
    assert_eq!(lanes.oldest_unanswered(), Some(Lsn(3)));
    lanes.flush_idle();
    gate.add_permits(1);
    lanes.drain().await.unwrap();
    assert_eq!(server.requests().iter().map(super::Request::ids).collect::<Vec<_>>(), [["1"], ["3"]]);
}

#[tokio::test]
async fn the_first_change_goes_at_once_and_the_next_ones_linger() {
    let server = Server::start(|_, request| Reply::json(200, &all_ok(request))).await;
    let (sink, _folder) = sink(&server.url);
    let linger = Duration::from_millis(50);
    let mut lanes = Lanes::new(sink, 1, Limits { linger, ..LIMITS }, CancellationToken::new());
    let answered = lanes.answered();
    let target = Target::new("users", 0);
    let before = Instant::now();
    add(lanes.body_for(&target, b"1", Lsn(1)), &target, "1", 1);
    assert_eq!(lanes.flush_idle(), None);
    let after = Instant::now();
    answered.notified().await;
    for id in ["2", "3"] {
        add(lanes.body_for(&target, id.as_bytes(), Lsn(2)), &target, id, 2);
    }
    let due = lanes.flush_idle().unwrap();
    assert!((before + linger..=after + linger).contains(&due));
    assert_eq!(lanes.under_construction(), 2);
    tokio::time::sleep_until(due).await;
    assert_eq!(lanes.flush_idle(), None);
    answered.notified().await;
    // Neither a full body nor the end waits.
    for id in ["4", "5", "6"] {
        add(lanes.body_for(&target, id.as_bytes(), Lsn(3)), &target, id, 3);
    }
    lanes.flush_full().await.unwrap();
    add(lanes.body_for(&target, b"7", Lsn(4)), &target, "7", 4);
    lanes.drain().await.unwrap();
    let ids: Vec<_> = server.requests().iter().map(super::Request::ids).collect();
    assert_eq!(ids, [vec!["1"], vec!["2", "3"], vec!["4", "5", "6"], vec!["7"]]);
}

#[tokio::test]
async fn documents_spread_over_lanes_and_stay_in_theirs() {
    let server = Server::start(|_, request| Reply::json(200, &all_ok(request))).await;
    let (sink, _folder) = sink(&server.url);
    let limits = Limits { documents: usize::MAX, bytes: usize::MAX, linger: Duration::ZERO };
    let mut lanes = Lanes::new(sink, 4, limits, CancellationToken::new());
    let (first, second) = (Target::new("users", 0), Target::new("users", 1));
    for id in 0..4000 {
        let id = id.to_string();
        add(lanes.body_for(&first, id.as_bytes(), Lsn(1)), &first, &id, 1);
        let action = Action::index(id.as_str(), &json!({})).unwrap().in_index("users");
        let other = Target::new("orders", 2);
        lanes.body_for_action(&other, &action, Lsn(1)).action(&other, &action, 1).unwrap();
        add(lanes.body_for(&second, id.as_bytes(), Lsn(1)), &second, &id, 1);
    }
    lanes.drain().await.unwrap();
    let requests = server.requests();
    assert_eq!(requests.len(), 4);
    for request in requests {
        let ids = request.ids();
        assert!((2700..3300).contains(&ids.len()), "{} of 12000 in a lane", ids.len());
        assert!(ids.chunks(3).all(|three| three[0] == three[1] && three[1] == three[2]));
    }
}

#[tokio::test]
async fn stop_is_told_to_everybody() {
    let server = Server::start(|_, _| Reply::error(503, "x", "y")).await;
    let (sink, _folder) = sink(&server.url);
    let stop = CancellationToken::new();
    let mut lanes = Lanes::new(sink.clone(), 2, LIMITS, stop.clone());
    let answered = lanes.answered();
    let target = Target::new("users", 0);
    for id in 0..20 {
        let id = id.to_string();
        add(lanes.body_for(&target, id.as_bytes(), Lsn(5)), &target, &id, 5);
    }
    lanes.flush_idle();
    eventually("it is tried", || server.requests().len() > 3).await;
    assert_eq!(lanes.failed(), None);
    stop.cancel();
    answered.notified().await;
    assert_eq!(lanes.failed(), Some(SinkError::Stopped));
    assert_eq!(lanes.drain().await, Err(SinkError::Stopped));
    assert_eq!(lanes.oldest_unanswered(), Some(Lsn(5)));
    for id in 20..40 {
        let id = id.to_string();
        add(lanes.body_for(&target, id.as_bytes(), Lsn(6)), &target, &id, 6);
    }
    assert_eq!(lanes.flush_full().await, Err(SinkError::Stopped));
}
