use std::collections::HashMap;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{Reply, Request, Server, all_ok, bulk_answer, eventually, operations, sink};
use crate::change::Action;
use crate::config;
use crate::sink::{Body, Client, Delivered, Sink, SinkError, SinkOptions, Target};

pub(super) fn body(ids: &[&str]) -> Body {
    let target = Target::new("users", 7);
    let mut body = Body::default();
    for id in ids {
        body.index(&target, id.as_bytes(), 5, |out| out.extend_from_slice(format!("{{\"id\":\"{id}\"}}").as_bytes()));
    }
    body
}

pub(super) async fn deliver(sink: &Sink, body: Body) -> Delivered {
    let stop = CancellationToken::new();
    tokio::time::timeout(Duration::from_secs(20), sink.deliver(body, &stop)).await.expect("answered in time").unwrap()
}

fn ok(count: u64) -> Delivered {
    Delivered { ok: count, ..Delivered::default() }
}

fn error(kind: &str) -> Value {
    json!({"type": kind, "reason": "r"})
}

fn ids(server: &Server) -> Vec<String> {
    server.requests().iter().map(|request| request.ids().concat()).collect()
}

#[tokio::test]
async fn a_good_bulk_is_sent_once_and_counted() {
    let server = Server::start(|_, request| Reply::json(200, &all_ok(request))).await;
    let (sink, _folder) = sink(&server.url);
    let mut body = body(&["1", "2"]);
    body.delete(&Target::new("orders", 8), b"3", 5);
    let bytes = body.bytes() as u64;
    assert_eq!(deliver(&sink, body).await, ok(3));
    let requests = server.requests();
    assert_eq!(requests.len(), 1);
    let request = &requests[0];
    assert_eq!(
        (request.method.as_str(), request.path.as_str()),
        ("POST", "/_bulk?filter_path=errors%2Citems.*.status%2Citems.*.error.type%2Citems.*.error.reason&timeout=30s")
    );
    assert_eq!(request.headers["content-type"], "application/x-ndjson");
    let stats = sink.stats();
    assert_eq!(
        (stats.documents, stats.bytes, stats.bulk_documents, stats.bulk_bytes),
        (3, bytes, Some(3), Some(bytes))
    );
    assert_eq!((stats.in_flight, stats.in_flight_limit, stats.queued_documents, stats.retried), (0, 4, 0, 0));
    let totals: Vec<_> = stats.indices.iter().map(|i| (i.index.as_str(), i.indexed, i.deleted)).collect();
    assert_eq!(totals, [("orders", 0, 1), ("users", 2, 0)]);
    assert!(
        stats.latency.is_some_and(|latency| latency.p50 > 0.0 && latency.max >= latency.p50) && stats.trouble.is_none()
    );
    assert_eq!(deliver(&sink, Body::default()).await, ok(0));
    // The next body is written into the same buffer.
    assert!(sink.body().capacity() as u64 >= bytes);
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn only_failed_items_are_sent_again() {
    let server = Server::start(|number, request| {
        let answer = bulk_answer(&request.operations(), |_, operation| match (number, operation.id.as_str()) {
            (0, "2" | "4") => (429, error("es_rejected_execution_exception")),
            (1, "4") => (503, error("unavailable_shards_exception")),
            (2, "4") => (400, error("index_closed_exception")),
            (3, "4") => (404, error("index_not_found_exception")),
            (4, "4") => (403, error("cluster_block_exception")),
            (_, "3") => (409, error("version_conflict_engine_exception")),
            _ => (201, Value::Null),
        });
        Reply::json(200, &answer)
    })
    .await;
    let (sink, _folder) = sink(&server.url);
    assert_eq!(deliver(&sink, body(&["1", "2", "3", "4"])).await, Delivered { ok: 3, superseded: 1, rejected: 0 });
    assert_eq!(ids(&server), ["1234", "24", "4", "4", "4", "4"]);
    let stats = sink.stats();
    assert_eq!((stats.documents, stats.superseded, stats.retried, stats.throttled), (4, 1, 6, 2));
    assert_eq!(stats.trouble, None);
}

#[tokio::test]
async fn an_item_is_not_sent_again_over_a_later_one_of_its_document() {
    let server = Server::start(|number, request| {
        let answer = bulk_answer(&request.operations(), |at, _| match (number, at) {
            (0, 0 | 2 | 3) => (429, error("es_rejected_execution_exception")),
            _ => (200, Value::Null),
        });
        Reply::json(200, &answer)
    })
    .await;
    let (sink, _folder) = sink(&server.url);
    // The first "a" is void once the second is written; the second "b" is the newest and goes again.
    assert_eq!(deliver(&sink, body(&["a", "a", "b", "b"])).await, Delivered { ok: 3, superseded: 1, rejected: 0 });
    assert_eq!(ids(&server), ["aabb", "bb"]);
}

#[tokio::test]
async fn requests_that_fail_as_a_whole_are_sent_again_as_they_were() {
    let applied = Arc::new(Mutex::new(0));
    let count = Arc::clone(&applied);
    let server = Server::start(move |number, request| {
        let answer = all_ok(request).to_string().into_bytes();
        match number {
            0 => Reply::error(429, "es_rejected_execution_exception", "busy"),
            1 => Reply::error(503, "cluster_block_exception", "no master"),
            2 => Reply::Answer { status: 502, headers: Vec::new(), body: b"<html>".to_vec() },
            3 => Reply::Hangup,
            4 => Reply::Cut { at: answer.len() / 2, body: answer },
            5 => Reply::Cut { at: 0, body: answer },
            6 => Reply::json(200, &json!({"errors": false, "items": [{"index": {"status": 200}}]})),
            7 => Reply::Answer { status: 200, headers: Vec::new(), body: b"{\"errors\":fal".to_vec() },
            8 => Reply::error(401, "security_exception", "who"),
            9 => Reply::error(403, "security_exception", "not you"),
            10 => Reply::Answer { status: 404, headers: Vec::new(), body: b"nothing here".to_vec() },
            11 => Reply::Answer { status: 400, headers: Vec::new(), body: b"<html>a proxy's</html>".to_vec() },
            12 => Reply::Answer { status: 302, headers: Vec::new(), body: Vec::new() },
            _ => {
                *count.lock().unwrap() += 1;
                Reply::json(200, &all_ok(request))
            }
        }
    })
    .await;
    let (sink, folder) = sink(&server.url);
    assert_eq!(deliver(&sink, body(&["1", "2"])).await, ok(2));
    let requests = server.requests();
    assert_eq!(requests.len(), 14);
    assert!(requests.iter().all(|request| request.body == requests[0].body));
    assert_eq!(*applied.lock().unwrap(), 1);
    let stats = sink.stats();
    assert_eq!((stats.documents, stats.retried, stats.throttled, stats.rejected), (2, 26, 1, 0));
    assert!(!folder.path().join("dead.ndjson").exists());
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let server = Server::start(|number, request| match number {
        0 => Reply::Answer { status: 429, headers: vec![("Retry-After", "1".to_owned())], body: Vec::new() },
        _ => Reply::json(200, &all_ok(request)),
    })
    .await;
    let (sink, _folder) = sink(&server.url);
    let began = Instant::now();
    deliver(&sink, body(&["1"])).await;
    assert!(began.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn a_body_that_is_too_long_is_halved_in_order_and_an_item_that_is_goes_to_the_dead_letters() {
    let server = Server::start(|_, request| {
        if request.body.len() > 250 || request.ids().contains(&"6".to_owned()) {
            Reply::Answer { status: 413, headers: Vec::new(), body: Vec::new() }
        } else {
            Reply::json(200, &all_ok(request))
        }
    })
    .await;
    let (sink, folder) = sink(&server.url);
    let delivered = deliver(&sink, body(&["1", "2", "3", "4", "5", "6", "7"])).await;
    assert_eq!(delivered, Delivered { ok: 6, superseded: 0, rejected: 1 });
    let done: Vec<_> = ids(&server).into_iter().filter(|ids| ids.len() <= 2 && !ids.contains('6')).collect();
    assert_eq!(done.concat(), "123457");
    let letters = std::fs::read_to_string(folder.path().join("dead.ndjson")).unwrap();
    let letter: Value = serde_json::from_str(letters.trim()).unwrap();
    assert_eq!((&letter["status"], &letter["document"]), (&json!(413), &json!({"id": "6"})));
}

#[tokio::test]
async fn an_item_that_spoils_its_request_is_found() {
    let server = Server::start(|_, request| {
        if request.ids().contains(&String::new()) {
            Reply::error(400, "illegal_argument_exception", "if _id is specified it must not be empty")
        } else {
            Reply::json(200, &all_ok(request))
        }
    })
    .await;
    let (sink, _folder) = sink(&server.url);
    let delivered = deliver(&sink, body(&["1", "2", "", "4", "5"])).await;
    assert_eq!(delivered, Delivered { ok: 4, superseded: 0, rejected: 1 });
    let stats = sink.stats();
    assert_eq!(stats.rejections[0].rejection.last_id, "");
    assert_eq!(stats.rejected_by_table, [(7, 1)].into());
}

#[tokio::test]
async fn a_refused_document_is_on_the_disk_before_it_counts_as_answered() {
    let server = Server::start(|_, request| {
        let answer = bulk_answer(&request.operations(), |_, operation| match operation.id.as_str() {
            "bad\n\"" | "worse" => (
                400,
                json!({"type": "mapper_parsing_exception", "reason":
                    "failed to parse field [n] of type [long] in document with id 'x'. Preview of field's value: 'SECRET'"}),
            ),
            _ => (200, Value::Null),
        });
        Reply::json(200, &answer)
    })
    .await;
    let (sink, folder) = sink(&server.url);
    let path = folder.path().join("dead.ndjson");
    // In the way until it is removed.
    std::fs::create_dir(&path).unwrap();
    let mut body = body(&["1"]);
    body.index(&Target::new("orders", 9), b"bad\n\"", 5, |out| {
        out.extend_from_slice(b"{\"n\":12345678901234567890.10}")
    });
    body.delete(&Target::new("orders", 9), b"worse", 5);
    let stop = CancellationToken::new();
    let task = tokio::spawn({
        let sink = sink.clone();
        async move { sink.deliver(body, &stop).await }
    });
    eventually("the trouble is told", || sink.stats().trouble.is_some_and(|trouble| trouble.attempts > 2)).await;
    let stats = sink.stats();
    assert!(stats.trouble.unwrap().reason.contains("dead.ndjson"));
    assert_eq!((stats.rejected, stats.queued_documents), (0, 3));
    assert!(!task.is_finished());
    std::fs::remove_dir(&path).unwrap();
    assert_eq!(task.await.unwrap(), Ok(Delivered { ok: 1, superseded: 0, rejected: 2 }));

    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), 2);
    assert!(text.contains(r#","document":{"n":12345678901234567890.10}}"#), "{text}");
    let letter: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(letter["table"], "public.orders");
    assert_eq!(letter["type"], "mapper_parsing_exception");
    assert!(letter["reason"].as_str().unwrap().contains("SECRET"));
    assert_eq!(letter["action"]["index"]["_id"], "bad\n\"");
    assert!(letter["time"].as_str().unwrap().ends_with('Z'));
    let letter: Value = serde_json::from_str(text.lines().nth(1).unwrap()).unwrap();
    assert_eq!(letter.get("document"), None);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

    let stats = sink.stats();
    assert_eq!((stats.documents, stats.rejected, stats.trouble), (1, 2, None));
    assert_eq!(stats.rejections.len(), 1);
    let rejection = &stats.rejections[0].rejection;
    assert_eq!((rejection.count, rejection.index.as_str(), rejection.last_id.as_str()), (2, "orders", "worse"));
    assert_eq!(rejection.reason, "400 mapper_parsing_exception: failed to parse field [n] of type [long]");

    // Half a line, as a crash leaves it, spoils no later letter; nor does a file that was moved away.
    let moved = folder.path().join("moved");
    std::fs::rename(&path, &moved).unwrap();
    std::fs::write(&path, "{\"half").unwrap();
    let mut body = Body::default();
    body.delete(&Target::new("orders", 9), b"worse", 5);
    deliver(&sink, body).await;
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().next(), Some("{\"half"));
    assert!(serde_json::from_str::<Value>(text.lines().nth(1).unwrap()).is_ok(), "{text}");
}

#[tokio::test]
async fn trouble_is_visible_while_it_lasts_and_gone_after() {
    let down = Arc::new(AtomicBool::new(true));
    let switch = Arc::clone(&down);
    let server = Server::start(move |_, request| {
        if switch.load(Ordering::SeqCst) {
            Reply::error(401, "security_exception", "unable to authenticate")
        } else {
            Reply::json(200, &all_ok(request))
        }
    })
    .await;
    let (sink, _folder) = sink(&server.url);
    let stop = CancellationToken::new();
    let task = tokio::spawn({
        let sink = sink.clone();
        async move { sink.deliver(body(&["1"]), &stop).await }
    });
    eventually("401 is told", || sink.stats().trouble.is_some_and(|trouble| trouble.attempts >= 3)).await;
    let trouble = sink.stats().trouble.unwrap();
    assert!(trouble.reason.contains("401") && trouble.hint.contains("elasticsearch.password"), "{trouble:?}");
    assert!(trouble.since > 0);
    down.store(false, Ordering::SeqCst);
    assert_eq!(task.await.unwrap(), Ok(ok(1)));
    assert_eq!(sink.stats().trouble, None);
}

#[tokio::test]
async fn a_server_that_comes_up_later_is_waited_for() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let (sink, _folder) = sink(&format!("http://{address}"));
    let stop = CancellationToken::new();
    let task = tokio::spawn({
        let sink = sink.clone();
        async move { sink.deliver(body(&["1"]), &stop).await }
    });
    eventually("refused connections are told", || sink.stats().trouble.is_some()).await;
    assert!(sink.stats().trouble.unwrap().reason.contains("refused"));
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let server = Server::at(listener, |_, request| Reply::json(200, &all_ok(request)));
    assert_eq!(task.await.unwrap(), Ok(ok(1)));
    assert_eq!(ids(&server), ["1"]);
}

#[tokio::test]
async fn stop_ends_a_delivery_that_would_wait_for_ever() {
    let server = Server::start(|_, _| Reply::error(503, "x", "y")).await;
    let (sink, _folder) = sink(&server.url);
    let stop = CancellationToken::new();
    let task = tokio::spawn({
        let (sink, stop) = (sink.clone(), stop.clone());
        async move { sink.deliver(body(&["1"]), &stop).await }
    });
    eventually("it is tried", || server.requests().len() > 2).await;
    stop.cancel();
    assert_eq!(task.await.unwrap(), Err(SinkError::Stopped));
    let stats = sink.stats();
    assert_eq!((stats.documents, stats.queued_documents, stats.trouble), (0, 0, None));
}

#[tokio::test]
async fn bulks_in_flight_are_limited() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let server =
        Server::start(move |_, request| Reply::Held(Arc::clone(&held), Box::new(Reply::json(200, &all_ok(request)))))
            .await;
    let folder = tempfile::tempdir().unwrap();
    let client = Client::new(&super::config(&server.url)).unwrap();
    let sink = Sink::new(client, SinkOptions::new(2, folder.path().join("dead")));
    let tasks: Vec<_> = (0..5)
        .map(|_| {
            let sink = sink.clone();
            tokio::spawn(async move { deliver(&sink, body(&["1"])).await })
        })
        .collect();
    eventually("two are in flight", || server.requests().len() == 2).await;
    let stats = sink.stats();
    assert_eq!((stats.in_flight, stats.in_flight_limit, stats.queued_documents), (2, 2, 5));
    gate.add_permits(1);
    eventually("a third follows", || server.requests().len() == 3).await;
    assert_eq!(sink.stats().in_flight, 2);
    gate.add_permits(4);
    for task in tasks {
        assert_eq!(task.await.unwrap(), ok(1));
    }
    assert_eq!((server.requests().len(), sink.stats().in_flight), (5, 0));
}

#[tokio::test]
async fn an_answer_that_does_not_come_is_told_before_anything_fails() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let server =
        Server::start(move |_, request| Reply::Held(Arc::clone(&held), Box::new(Reply::json(200, &all_ok(request)))))
            .await;
    let folder = tempfile::tempdir().unwrap();
    let client = Client::new(&super::config(&server.url)).unwrap();
    let options = SinkOptions { slow: Duration::from_millis(50), ..SinkOptions::new(2, folder.path().join("dead")) };
    let sink = Sink::new(client, options);
    let task = tokio::spawn({
        let sink = sink.clone();
        async move { deliver(&sink, body(&["1"])).await }
    });
    eventually("it is told", || sink.stats().trouble.is_some()).await;
    let trouble = sink.stats().trouble.unwrap();
    assert!(trouble.reason.contains("no answer") && trouble.attempts == 1, "{trouble:?}");
    gate.add_permits(1);
    assert_eq!(task.await.unwrap(), ok(1));
    assert_eq!((sink.stats().trouble, server.requests().len()), (None, 1));
}

#[tokio::test]
async fn bodies_are_compressed_when_asked() {
    let server = Server::start(|_, request| {
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(&request.body[..]).read_to_end(&mut plain).unwrap();
        Reply::json(200, &bulk_answer(&operations(&plain), |_, _| (200, Value::Null)))
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let config = config::Elasticsearch { compression_enabled: true, ..super::config(&server.url) };
    let sink = Sink::new(Client::new(&config).unwrap(), SinkOptions::new(1, folder.path().join("dead")));
    assert_eq!(deliver(&sink, body(&["1", "2"])).await, ok(2));
    assert_eq!(server.requests()[0].headers["content-encoding"], "gzip");
}

#[tokio::test]
async fn scripts_that_met_another_writer_run_again() {
    let server = Server::start(|number, request| {
        let answer = bulk_answer(&request.operations(), |_, _| match number {
            0 => (409, error("version_conflict_engine_exception")),
            _ => (200, Value::Null),
        });
        Reply::json(200, &answer)
    })
    .await;
    let (sink, _folder) = sink(&server.url);
    let mut body = Body::default();
    let script = Action::script_update("a", json!({"script": {"source": "s"}}));
    body.action(&Target::new("users", 7), &script, 5).unwrap();
    body.delete(&Target::new("users", 7), b"b", 5);
    assert_eq!(deliver(&sink, body).await, Delivered { ok: 1, superseded: 1, rejected: 0 });
    assert_eq!(ids(&server), ["ab", "a"]);
}

/// What a server with external versions makes of its requests: the versions and documents by index and id.
#[derive(Default)]
pub(super) struct Model {
    pub(super) documents: HashMap<(String, String), (u64, Option<Value>)>,
}

impl Model {
    pub(super) fn apply(&mut self, request: &Request) -> Value {
        let operations = request.operations();
        let mut statuses = Vec::new();
        for operation in &operations {
            statuses.push(self.apply_one(operation));
        }
        bulk_answer(&operations, |at, _| match statuses[at] {
            409 => (409, error("version_conflict_engine_exception")),
            status => (status, Value::Null),
        })
    }

    pub(super) fn apply_one(&mut self, operation: &super::Operation) -> u16 {
        let key = (operation.index.clone(), operation.id.clone());
        let version = operation.version.unwrap();
        if self.documents.get(&key).is_some_and(|(current, _)| *current > version) {
            return 409;
        }
        self.documents.insert(key, (version, operation.document.clone()));
        200
    }
}
