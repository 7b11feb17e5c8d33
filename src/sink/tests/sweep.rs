use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{Reply, Request, Server, bulk_answer, eventually, sink};
use crate::gate::Gate;
use crate::sink::{SinkError, Swept};

/// An index behind the alias `users`: id to version, source and routing; with scrolls of two documents a page.
struct Index {
    documents: BTreeMap<String, (u64, Option<&'static str>)>,
    scan: Vec<Value>,
    /// Forget the scan at this request.
    forget: Option<usize>,
    /// A newer version arrives while the sweep runs.
    newer: Option<(String, u64)>,
    open_scrolls: i32,
}

impl Index {
    fn page(&mut self) -> Reply {
        let at = self.scan.len().min(2);
        let hits: Vec<Value> = self.scan.drain(..at).collect();
        Reply::json(
            200,
            &json!({"_scroll_id": "s\"1", "timed_out": false, "_shards": {"failed": 0}, "hits": {"hits": hits}}),
        )
    }

    fn answer(&mut self, number: usize, request: &Request) -> Reply {
        let path = request.path.split('?').next().unwrap();
        match (request.method.as_str(), path) {
            ("POST", "/users/_refresh") if number == 0 => Reply::error(503, "busy", "busy"),
            ("POST", "/users/_refresh") => Reply::json(200, &json!({"_shards": {"total": 2, "failed": 0}})),
            ("POST", "/users/_search") if number == 2 => {
                Reply::json(200, &json!({"_scroll_id": "x", "_shards": {"failed": 1}, "hits": {"hits": []}}))
            }
            ("POST", "/users/_search") => {
                assert!(
                    request.path.contains("scroll=") && request.path.contains("allow_partial_search_results=false")
                );
                let body: Value = serde_json::from_slice(&request.body).unwrap();
                assert_eq!((&body["version"], &body["sort"]), (&json!(true), &json!(["_doc"])));
                let source = body["_source"] == true;
                self.scan = self
                    .documents
                    .iter()
                    .map(|(id, (version, routing))| {
                        let mut hit = json!({"_index": "users_v7", "_id": id, "_version": version});
                        if let Some(routing) = routing {
                            hit["_routing"] = json!(routing);
                        }
                        if source {
                            hit["_source"] = json!({"id": id});
                        }
                        hit
                    })
                    .collect();
                self.open_scrolls += 1;
                self.page()
            }
            ("POST", "/_search/scroll") => {
                let body: Value = serde_json::from_slice(&request.body).unwrap();
                assert_eq!(body["scroll_id"], "s\"1");
                if self.forget.is_some_and(|at| number >= at) {
                    self.forget = None;
                    self.open_scrolls -= 1;
                    return Reply::error(404, "search_phase_execution_exception", "all shards failed");
                }
                self.page()
            }
            ("DELETE", "/_search/scroll") => {
                self.open_scrolls -= 1;
                Reply::json(200, &json!({}))
            }
            ("POST", "/_bulk") => {
                if let Some((id, version)) = self.newer.take() {
                    self.documents.insert(id, (version, None));
                }
                let operations = request.operations();
                let mut statuses = Vec::new();
                for operation in &operations {
                    assert_eq!((operation.kind.as_str(), operation.index.as_str()), ("delete", "users_v7"));
                    let current = self.documents.get(&operation.id).copied();
                    statuses.push(match current {
                        None => 404,
                        Some((version, _)) if version > operation.version.unwrap() => 409,
                        Some((_, routing)) => {
                            assert_eq!(operation.routing.as_deref(), routing);
                            self.documents.remove(&operation.id);
                            200
                        }
                    });
                }
                Reply::json(
                    200,
                    &bulk_answer(&operations, |at, _| match statuses[at] {
                        409 => (409, json!({"type": "version_conflict_engine_exception", "reason": "r"})),
                        status => (status, Value::Null),
                    }),
                )
            }
            _ => Reply::error(404, "index_not_found_exception", "no such index"),
        }
    }
}

async fn index(forget: Option<usize>, newer: Option<(&str, u64)>) -> (Server, Arc<Mutex<Index>>) {
    let documents = [
        ("a", 1, None),
        ("b", 49, None),
        ("c", 50, None),
        ("d", 51, None),
        ("e", 10, Some("r1")),
        ("f", 20, None),
        ("kept", 3, None),
    ];
    let index = Index {
        documents: documents.into_iter().map(|(id, version, routing)| (id.to_owned(), (version, routing))).collect(),
        scan: Vec::new(),
        forget,
        newer: newer.map(|(id, version)| (id.to_owned(), version)),
        open_scrolls: 0,
    };
    let index = Arc::new(Mutex::new(index));
    let served = Arc::clone(&index);
    (Server::start(move |number, request| served.lock().unwrap().answer(number, request)).await, index)
}

fn left(index: &Mutex<Index>) -> String {
    index.lock().unwrap().documents.keys().cloned().collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn what_is_older_goes_and_the_rest_stays() {
    let (server, index) = index(None, None).await;
    let (sink, _folder) = sink(&server.url);
    let stop = CancellationToken::new();
    let removed = sink.sweep("users", 50, 50, |id| id == "kept", &Gate::default(), &stop).await;
    let swept = removed.unwrap();
    assert_eq!((swept.removed, left(&index)), (4, "c d kept".to_owned()));
    assert!(swept.newest >= 50, "{swept:?}");
    assert_eq!(index.lock().unwrap().open_scrolls, 0);
    assert_eq!(sink.stats().trouble, None);
    assert_eq!(sink.sweep("nothing", 50, 50, |_| false, &Gate::default(), &stop).await, Ok(Swept::default()));
}

#[tokio::test]
async fn a_newer_version_survives_and_a_forgotten_scan_begins_again() {
    let (server, index) = index(Some(6), Some(("a", 99))).await;
    let (sink, _folder) = sink(&server.url);
    let removed = sink.sweep("users", 50, 50, |_| false, &Gate::default(), &CancellationToken::new()).await;
    assert_eq!((removed.map(|swept| swept.removed), left(&index)), (Ok(4), "a c d".to_owned()));
    let searches = server.requests().iter().filter(|request| request.path.starts_with("/users/_search")).count();
    assert_eq!((searches, index.lock().unwrap().open_scrolls), (3, 0));
}

#[tokio::test]
async fn a_scan_tells_versions_and_documents() {
    let (server, index) = index(None, None).await;
    let (sink, _folder) = sink(&server.url);
    let stop = CancellationToken::new();
    sink.client().refresh("users").await.unwrap_err();
    let mut scan = sink.scan("users", true);
    let mut found = Vec::new();
    while let Some(hits) = scan.next_page(&stop).await.unwrap() {
        found.extend(hits);
    }
    assert_eq!(found.len(), 7);
    assert_eq!((found[4].id.as_str(), found[4].version, found[4].routing.as_deref()), ("e", 10, Some("r1")));
    assert_eq!(found[4].source.as_ref().unwrap().get(), r#"{"id":"e"}"#);
    assert!(matches!(scan.next_page(&stop).await, Ok(None)));
    // Filtered, Elasticsearch would write the documents anew.
    assert!(server.requests().iter().all(|request| !request.path.contains("filter_path")));
    assert_eq!(index.lock().unwrap().open_scrolls, 0);
}

#[tokio::test]
async fn an_answer_that_is_too_long_is_no_reason_to_ask_the_same_again() {
    let server = Server::start(|_, request| match request.path.split('?').next().unwrap() {
        "/users/_search" => Reply::Answer { status: 200, headers: Vec::new(), body: vec![b' '; (256 << 20) + 1] },
        _ => Reply::json(200, &json!({})),
    })
    .await;
    let (sink, _folder) = sink(&server.url);
    let stop = CancellationToken::new();
    let page = sink.scan("users", true).next_page(&stop).await;
    assert!(matches!(page, Err(SinkError::TooLong { .. })), "{page:?}");
    let found = sink.find("users", &["1"], &stop).await;
    assert!(matches!(found, Err(SinkError::TooLong { .. })), "{found:?}");
}

#[tokio::test]
async fn a_sweep_stops_when_told_and_says_what_is_refused() {
    let server = Server::start(|_, request| match request.path.as_str() {
        "/odd/_refresh" => Reply::error(400, "illegal_argument_exception", "no"),
        _ => Reply::error(403, "security_exception", "no"),
    })
    .await;
    let (sink, _folder) = sink(&server.url);
    let stop = CancellationToken::new();
    let refused = sink.sweep("odd", 5, 5, |_| false, &Gate::default(), &stop).await;
    assert!(matches!(refused, Err(SinkError::Refused { status: 400, .. })), "{refused:?}");
    let task = tokio::spawn({
        let (sink, stop) = (sink.clone(), stop.clone());
        async move { sink.sweep("users", 5, 5, |_| false, &Gate::default(), &stop).await }
    });
    eventually("the trouble is told", || sink.stats().trouble.is_some_and(|trouble| trouble.attempts > 1)).await;
    stop.cancel();
    assert_eq!(task.await.unwrap(), Err(SinkError::Stopped));
}
