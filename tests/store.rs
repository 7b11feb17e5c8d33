//! The local document store over real HTTP.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::Write;
use std::sync::Once;
use std::time::{Duration, Instant};

use pgtide::store::{Effect, Fault, Options, Stats, Store};
use reqwest::{Client, Method, Response};
use serde_json::{Value, json};

const USUAL: &str = "filter_path=errors,items.*.status,items.*.error.type,items.*.error.reason";

struct Fixture {
    store: Store,
    client: Client,
}

impl Fixture {
    async fn new(options: Options) -> Self {
        // reqwest wants a provider of TLS even where it speaks plain HTTP.
        static PROVIDER: Once = Once::new();
        PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
        let store = Store::bind("127.0.0.1:0".parse().unwrap(), options).await.unwrap();
        Self { store, client: Client::new() }
    }

    async fn send(&self, method: Method, path: &str, body: impl Into<reqwest::Body>) -> reqwest::Result<Response> {
        let request = self.client.request(method, format!("{}{path}", self.store.url()));
        request.header("content-type", "application/x-ndjson").body(body).send().await
    }

    async fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let response = self.send(method.parse().unwrap(), path, body).await.unwrap();
        (response.status().as_u16(), serde_json::from_str(&response.text().await.unwrap()).unwrap_or(Value::Null))
    }

    async fn bulk(&self, body: impl Into<String>) -> (u16, Value) {
        let response = self.send(Method::POST, &format!("/_bulk?{USUAL}"), body.into()).await.unwrap();
        assert_eq!(response.headers()["x-elastic-product"], "Elasticsearch");
        (response.status().as_u16(), response.text().await.map(|text| serde_json::from_str(&text).unwrap()).unwrap())
    }

    async fn until_held(&self, count: usize) {
        let held = tokio::time::timeout(Duration::from_secs(10), self.store.until_held(count));
        held.await.expect("the request is not held");
    }

    /// The status of one item with an external version.
    async fn item(&self, kind: &str, id: &str, version: i64) -> u64 {
        let (status, answer) = self.bulk(action(kind, id, version)).await;
        assert_eq!(status, 200, "{answer}");
        answer["items"][0][kind]["status"].as_u64().unwrap()
    }

    /// `count` documents in index `t`, numbered in `n`, of version 10.
    async fn fill(&self, count: usize) {
        let body: String =
            (0..count).map(|n| action("index", &n.to_string(), 10).replace("{}", &format!("{{\"n\":{n}}}"))).collect();
        let (status, answer) = self.bulk(body).await;
        assert_eq!((status, &answer["errors"], answer["items"].as_array().unwrap().len()), (200, &json!(false), count));
    }
}

fn action(kind: &str, id: &str, version: i64) -> String {
    let source = if kind == "delete" { "" } else { "{}\n" };
    format!(
        "{{\"{kind}\":{{\"_index\":\"t\",\"_id\":\"{id}\",\"version\":{version},\"version_type\":\"external_gte\"}}}}\n{source}"
    )
}

fn ids(answer: &Value) -> Vec<&str> {
    answer["hits"]["hits"].as_array().unwrap().iter().map(|hit| hit["_id"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn says_what_it_is() {
    let fixture = Fixture::new(Options::default()).await;
    let response = fixture.send(Method::GET, "/", "").await.unwrap();
    assert_eq!(response.headers()["x-elastic-product"], "Elasticsearch");
    let root: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap();
    assert_eq!(root["version"]["distribution"], "pgtide-store");
    assert!(root["version"]["number"].as_str().unwrap().starts_with("8."));
    assert_eq!(fixture.call("HEAD", "/", Value::Null).await, (200, Value::Null));
    let (status, answer) = fixture.call("GET", "/t/_forcemerge?x=1", Value::Null).await;
    assert_eq!(status, 400);
    assert_eq!(answer["error"]["reason"], "no handler found for uri [/t/_forcemerge?x=1] and method [GET]");
}

#[tokio::test]
async fn versions_and_tombstones_are_those_of_a_real_server() {
    let fixture = Fixture::new(Options::default()).await;
    assert_eq!(fixture.item("index", "1", 10).await, 201);
    assert_eq!(fixture.item("index", "1", 9).await, 409);
    assert_eq!(fixture.item("index", "1", 10).await, 200);
    assert_eq!(fixture.item("delete", "1", 11).await, 200);
    assert_eq!(fixture.item("index", "1", 10).await, 409);
    assert_eq!(fixture.item("delete", "1", 11).await, 404);
    assert_eq!(fixture.item("index", "1", 11).await, 201);
    assert_eq!(fixture.item("delete", "never", 5).await, 404);
    assert_eq!(fixture.item("index", "never", 4).await, 409);
    let (_, answer) = fixture.bulk(action("index", "never", 4)).await;
    assert_eq!(answer["errors"], true);
    let error = &answer["items"][0]["index"]["error"];
    assert_eq!(error["type"], "version_conflict_engine_exception");
    assert_eq!(error["reason"], "[never]: version conflict, current version [5] is higher than the one provided [4]");
    fixture.store.forget_tombstones();
    assert_eq!(fixture.item("index", "never", 4).await, 201);
    assert_eq!(fixture.store.documents("t")["never"], (4, b"{}".to_vec()));
    assert_eq!(fixture.item("index", "max", i64::MAX).await, 201);
    assert_eq!(fixture.item("index", "max", i64::MAX - 1).await, 409);
}

#[tokio::test]
async fn tombstones_are_forgotten_after_gc_deletes() {
    let fixture = Fixture::new(Options::default()).await;
    let settings = json!({"settings": {"index": {"gc_deletes": "100ms"}}});
    assert_eq!(fixture.call("PUT", "/t", settings).await.0, 200);
    let deleted = Instant::now();
    assert_eq!(fixture.item("delete", "1", 11).await, 404);
    loop {
        match fixture.item("index", "1", 10).await {
            409 => assert!(deleted.elapsed() < Duration::from_secs(10), "the tombstone stays"),
            status => break assert_eq!(status, 201),
        }
    }
    assert!(deleted.elapsed() >= Duration::from_millis(100));
}

#[tokio::test]
async fn a_malformed_body_applies_nothing() {
    let fixture = Fixture::new(Options::default()).await;
    let good = action("index", "1", 1);
    for (bad, kind) in [
        (format!("{good}{{\"foo\":{{}}}}\n"), "illegal_argument_exception"),
        (good.trim_end().to_owned(), "illegal_argument_exception"),
        (format!("{good}{}", action("index", "2", -1)), "action_request_validation_exception"),
        (format!("{good}{}", action("update", "2", 1)), "illegal_argument_exception"),
        (String::new(), "parse_exception"),
    ] {
        let (status, answer) = fixture.bulk(bad).await;
        assert_eq!((status, &answer["status"]), (400, &json!(400)));
        assert_eq!((&answer["error"]["type"], &answer["error"]["root_cause"][0]["type"]), (&json!(kind), &json!(kind)));
    }
    assert!(fixture.store.documents("t").is_empty());
    let request = fixture.client.post(format!("{}/_bulk", fixture.store.url())).body(good);
    assert_eq!(request.send().await.unwrap().status(), 406);
}

#[tokio::test]
async fn bodies_may_be_gzip_and_not_too_long() {
    let fixture = Fixture::new(Options { max_content_length: 4096, ..Options::default() }).await;
    let gzip = |body: &str| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(body.as_bytes()).unwrap();
        encoder.finish().unwrap()
    };
    let post = |body: Vec<u8>| {
        let request = fixture.client.post(format!("{}/_bulk", fixture.store.url())).body(body);
        request.header("content-type", "application/json").header("content-encoding", "gzip").send()
    };
    let response = post(gzip(&action("index", "1", 1))).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(fixture.store.documents("t").len(), 1);
    // The limit is for the inflated size.
    let long = action("index", "2", 1).repeat(100);
    assert!(long.len() > 4096 && gzip(&long).len() < 4096);
    for response in [post(gzip(&long)).await.unwrap(), fixture.send(Method::POST, "/_bulk", long).await.unwrap()] {
        assert_eq!(response.status(), 413);
        assert!(response.headers().get("x-elastic-product").is_none());
        assert_eq!(response.bytes().await.unwrap().len(), 0);
    }
    assert!(post(b"no gzip at all".to_vec()).await.is_err(), "the connection closes without an answer");
    assert_eq!(fixture.store.documents("t").len(), 1);
}

#[tokio::test]
async fn items_fail_for_themselves() {
    let fixture = Fixture::new(Options::default()).await;
    let mapping = json!({"mappings": {"dynamic": "strict", "properties": {"n": {"type": "integer"}}}});
    fixture.call("PUT", "/t", mapping).await;
    let body = "{\"index\":{\"_id\":\"1\"}}\n{\"n\":1}\n{\"index\":{\"_id\":\"2\"}}\n{\"n\":\"x\"}\n{\"index\":{\"_id\":\"3\"}}\n{\"m\":1}\n{\"index\":{\"_id\":\"4\"}}\n[]\n";
    let (_, answer) = fixture.call_raw("/t/_bulk", body).await;
    let outcomes: Vec<_> = answer["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| (item["index"]["status"].as_u64().unwrap(), item["index"]["error"]["type"].as_str().unwrap_or("")))
        .collect();
    assert_eq!(
        outcomes,
        [
            (201, ""),
            (400, "document_parsing_exception"),
            (400, "strict_dynamic_mapping_exception"),
            (400, "document_parsing_exception")
        ]
    );

    let outcome = async || {
        let (_, answer) = fixture.bulk(action("delete", "1", 5)).await;
        let item = &answer["items"][0]["delete"];
        (item["status"].as_u64().unwrap(), item["error"]["type"].as_str().unwrap_or("").to_owned())
    };
    let is = |status: u64, kind: &str| (status, kind.to_owned());
    fixture.call("PUT", "/t/_settings", json!({"index.blocks.write": true})).await;
    assert_eq!(outcome().await, is(403, "cluster_block_exception"));
    fixture
        .call("PUT", "/t/_settings", json!({"index": {"blocks": {"write": null, "read_only_allow_delete": true}}}))
        .await;
    assert_eq!(outcome().await, is(429, "cluster_block_exception"));
    fixture.call("PUT", "/t/_settings", json!({"index.blocks.read_only_allow_delete": null})).await;
    fixture.call("POST", "/t/_close", Value::Null).await;
    assert_eq!(outcome().await, is(400, "index_closed_exception"));
    fixture.call("POST", "/t/_open", Value::Null).await;
    assert_eq!(outcome().await, is(200, ""));
}

impl Fixture {
    async fn call_raw(&self, path: &str, body: &str) -> (u16, Value) {
        let response = self.send(Method::POST, path, body.to_owned()).await.unwrap();
        (response.status().as_u16(), serde_json::from_str(&response.text().await.unwrap()).unwrap())
    }
}

#[tokio::test]
async fn indices_are_made_only_where_that_is_allowed() {
    let fixture = Fixture::new(Options { auto_create_index: false, ..Options::default() }).await;
    let (_, answer) = fixture.bulk(action("index", "1", 1)).await;
    let item = &answer["items"][0]["index"];
    assert_eq!((&item["status"], &item["error"]["type"]), (&json!(404), &json!("index_not_found_exception")));

    let fixture = Fixture::new(Options::default()).await;
    let (_, answer) = fixture.call_raw("/t/_bulk", "{\"delete\":{\"_id\":\"1\"}}\n").await;
    assert_eq!(answer["items"][0]["delete"]["status"], 404);
    assert_eq!(fixture.call("HEAD", "/t", Value::Null).await.0, 404, "an unversioned delete makes no index");
    let (_, answer) = fixture.call_raw("/t/_bulk?require_alias=true", "{\"index\":{}}\n{}\n").await;
    assert_eq!(answer["items"][0]["index"]["error"]["type"], "index_not_found_exception");
    assert_eq!(fixture.item("delete", "1", 1).await, 404);
    assert_eq!(fixture.call("HEAD", "/t", Value::Null).await.0, 200, "a versioned one does");
    assert_eq!(fixture.call("DELETE", "/t", Value::Null).await.0, 200);
    assert_eq!(fixture.call("GET", "/t", Value::Null).await.1["error"]["type"], "index_not_found_exception");
}

#[tokio::test]
async fn documents_can_be_read_back() {
    let fixture = Fixture::new(Options::default()).await;
    let body = "{\"index\":{\"_id\":\"ü/1\",\"routing\":\"r\"}}\n{\"price\":17.50,\"a\":{\"b\":1,\"c\":2}}\n";
    fixture.call_raw("/t/_bulk", body).await;
    let text = fixture.send(Method::GET, "/t/_source/%C3%BC%2F1", "").await.unwrap().text().await.unwrap();
    assert_eq!(text, r#"{"price":17.50,"a":{"b":1,"c":2}}"#);
    let (status, answer) = fixture.call("GET", "/t/_doc/%C3%BC%2F1?_source=a.b", Value::Null).await;
    assert_eq!(status, 200);
    assert_eq!(
        answer,
        json!({"_index": "t", "_id": "ü/1", "_version": 1, "_seq_no": 0, "_primary_term": 1, "_routing": "r", "found": true, "_source": {"a": {"b": 1}}})
    );
    assert_eq!(
        fixture.call("GET", "/t/_doc/2", Value::Null).await,
        (404, json!({"_index": "t", "_id": "2", "found": false}))
    );
    assert_eq!(fixture.call("HEAD", "/t/_doc/2", Value::Null).await.0, 404);
    let docs = json!({"docs": [{"_id": "ü/1", "_source": ["price"]}, {"_id": "2"}, {"_index": "no", "_id": "1"}]});
    let (_, answer) = fixture.call("POST", "/t/_mget?filter_path=docs.found,docs._source,docs.error.type", docs).await;
    assert_eq!(
        answer,
        json!({"docs": [{"found": true, "_source": {"price": 17.5}}, {"found": false}, {"error": {"type": "index_not_found_exception"}}]})
    );
}

#[tokio::test]
async fn searches_pages_and_counts() {
    let fixture = Fixture::new(Options::default()).await;
    fixture.fill(25).await;
    let search = async |body: Value| fixture.call("POST", "/t/_search", body).await;
    let (_, answer) = search(json!({"query": {"range": {"n": {"gte": 20}}}, "sort": [{"n": "desc"}], "size": 2, "version": true, "_source": false})).await;
    assert_eq!(answer["hits"]["total"], json!({"value": 5, "relation": "eq"}));
    assert_eq!(
        answer["hits"]["hits"],
        json!([{"_index": "t", "_id": "24", "_version": 10, "_score": null, "sort": [24]}, {"_index": "t", "_id": "23", "_version": 10, "_score": null, "sort": [23]}])
    );
    let (_, answer) = search(json!({"sort": "_id", "size": 3, "from": 1, "track_total_hits": 7})).await;
    assert_eq!(
        (ids(&answer), &answer["hits"]["total"]),
        (vec!["1", "10", "11"], &json!({"value": 25, "relation": "eq"}))
    );
    let (_, answer) = search(json!({"sort": ["_doc"], "track_total_hits": 7, "size": 1})).await;
    assert_eq!((ids(&answer), &answer["hits"]["total"]), (vec!["0"], &json!({"value": 7, "relation": "gte"})));
    let (_, answer) =
        search(json!({"query": {"ids": {"values": ["3", "4", "none"]}}, "track_total_hits": false})).await;
    assert_eq!((ids(&answer), answer["hits"].get("total")), (vec!["3", "4"], None));
    assert_eq!(search(json!({"size": 10_001})).await.0, 400);
    assert_eq!(search(json!({"aggs": {}})).await.1["error"]["type"], "parsing_exception");
    assert_eq!(fixture.call("GET", "/no/_search", Value::Null).await.0, 404);
    assert_eq!(fixture.call("GET", "/_count", Value::Null).await.1["count"], 25);
    let (_, answer) = fixture.call("POST", "/t/_count", json!({"query": {"term": {"n": 3}}})).await;
    assert_eq!(answer["count"], 1);
}

#[tokio::test]
async fn a_point_in_time_and_a_scroll_see_what_was_there() {
    let fixture = Fixture::new(Options::default()).await;
    fixture.fill(25).await;
    let (status, pit) = fixture.call("POST", "/t/_pit?keep_alive=1m", Value::Null).await;
    assert_eq!(status, 200);
    let body = json!({"size": 10, "version": true, "_source": false, "sort": ["_doc"]});
    let (_, mut page) = fixture.call("POST", "/t/_search?scroll=1m", body).await;
    // Neither sees what comes now.
    fixture.item("delete", "7", 11).await;
    fixture.item("index", "new", 11).await;
    fixture.item("index", "8", 12).await;

    let mut scrolled = Vec::new();
    while !ids(&page).is_empty() {
        assert_eq!(page["hits"]["total"]["value"], 25);
        scrolled.extend(
            page["hits"]["hits"].as_array().unwrap().iter().map(|hit| (hit["_id"].clone(), hit["_version"].clone())),
        );
        page =
            fixture.call("POST", "/_search/scroll", json!({"scroll": "1m", "scroll_id": page["_scroll_id"]})).await.1;
    }
    let mut seen = Vec::new();
    let mut after: Option<Value> = None;
    loop {
        let mut body = json!({"size": 10, "version": true, "_source": false, "pit": {"id": pit["id"], "keep_alive": "1m"}, "sort": ["_shard_doc"]});
        if let Some(after) = after {
            body["search_after"] = after;
        }
        let (status, answer) = fixture.call("POST", "/_search", body).await;
        assert_eq!((status, &answer["pit_id"]), (200, &pit["id"]));
        let Some(last) = answer["hits"]["hits"].as_array().unwrap().last().cloned() else { break };
        seen.extend(
            answer["hits"]["hits"].as_array().unwrap().iter().map(|hit| (hit["_id"].clone(), hit["_version"].clone())),
        );
        assert!(seen.len() <= 25, "a page comes twice");
        after = Some(last["sort"].clone());
    }
    let expected: Vec<_> = (0..25).map(|n| (json!(n.to_string()), json!(10))).collect();
    assert_eq!((&scrolled, &seen), (&expected, &expected));

    // Slices share the documents out.
    let mut sliced = Vec::new();
    for id in 0..3 {
        let body = json!({"size": 100, "pit": {"id": pit["id"]}, "slice": {"id": id, "max": 3}});
        let (_, answer) = fixture.call("POST", "/_search", body).await;
        assert_eq!(answer["hits"]["total"]["value"], ids(&answer).len());
        sliced.extend(ids(&answer).iter().map(|id| id.parse::<usize>().unwrap()));
    }
    sliced.sort_unstable();
    assert_eq!(sliced, (0..25).collect::<Vec<_>>());

    assert_eq!(
        fixture.call("DELETE", "/_pit", json!({"id": pit["id"]})).await,
        (200, json!({"succeeded": true, "num_freed": 1}))
    );
    let (status, answer) = fixture.call("POST", "/_search", json!({"pit": {"id": pit["id"]}})).await;
    assert_eq!((status, &answer["error"]["type"]), (404, &json!("search_context_missing_exception")));
    let (status, _) = fixture.call("DELETE", "/_search/scroll", json!({"scroll_id": page["_scroll_id"]})).await;
    assert_eq!(status, 200);
    assert_eq!(fixture.call("POST", "/_search/scroll", json!({"scroll_id": page["_scroll_id"]})).await.0, 404);
}

#[tokio::test]
async fn delete_by_query_raises_versions_by_one() {
    let fixture = Fixture::new(Options::default()).await;
    fixture.fill(10).await;
    let (status, answer) =
        fixture.call("POST", "/t/_delete_by_query", json!({"query": {"range": {"n": {"lt": 4}}}})).await;
    assert_eq!((status, &answer["deleted"], &answer["failures"]), (200, &json!(4), &json!([])));
    assert_eq!(fixture.store.documents("t").len(), 6);
    assert_eq!(fixture.item("index", "1", 10).await, 409);
    assert_eq!(fixture.item("index", "1", 11).await, 201);
}

#[tokio::test]
async fn aliases_swap_and_take_writes() {
    let fixture = Fixture::new(Options::default()).await;
    fixture.call("PUT", "/t-1", json!({"aliases": {"t": {}}})).await;
    fixture.call("PUT", "/t-2", Value::Null).await;
    assert_eq!(fixture.item("index", "1", 1).await, 201);
    let swap = json!({"actions": [{"remove": {"index": "t-1", "alias": "t"}}, {"add": {"index": "t-2", "alias": "t", "is_write_index": true}}]});
    assert_eq!(
        fixture.call("POST", "/_aliases", swap.clone()).await,
        (200, json!({"acknowledged": true, "errors": false}))
    );
    assert_eq!(fixture.call("POST", "/_aliases", swap).await.0, 404, "the alias is gone from t-1");
    assert_eq!(fixture.item("index", "2", 1).await, 201);
    assert_eq!((fixture.store.documents("t-1").len(), fixture.store.documents("t-2").len()), (1, 1));
    assert_eq!(
        fixture.call("GET", "/_alias/t", Value::Null).await,
        (200, json!({"t-2": {"aliases": {"t": {"is_write_index": true}}}}))
    );
    assert_eq!(fixture.call("GET", "/_alias/no", Value::Null).await.0, 404);
    assert_eq!(fixture.call("DELETE", "/t", Value::Null).await.0, 400, "an alias is not deleted as an index");
    assert_eq!(fixture.call("HEAD", "/t", Value::Null).await.0, 200);
}

#[tokio::test]
async fn settings_mappings_and_the_cluster() {
    let fixture = Fixture::new(Options::default()).await;
    let body = json!({"settings": {"number_of_replicas": 0, "refresh_interval": "1s"}, "mappings": {"properties": {"n": {"type": "long"}}}});
    assert_eq!(fixture.call("PUT", "/t", body.clone()).await.0, 200);
    assert_eq!(fixture.call("PUT", "/t", body).await.1["error"]["type"], "resource_already_exists_exception");
    fixture.call("PUT", "/t/_settings", json!({"index": {"refresh_interval": "-1"}})).await;
    let (_, answer) = fixture.call("GET", "/t/_settings", Value::Null).await;
    let index = &answer["t"]["settings"]["index"];
    assert_eq!((&index["refresh_interval"], &index["number_of_replicas"]), (&json!("-1"), &json!("0")));
    let (_, answer) = fixture.call("GET", "/t/_settings?flat_settings=true", Value::Null).await;
    assert_eq!(answer["t"]["settings"]["index.refresh_interval"], "-1");
    assert_eq!(fixture.call("PUT", "/t/_settings", json!({"number_of_shards": 2})).await.0, 400);
    assert_eq!(fixture.call("PUT", "/t/_mapping", json!({"properties": {"n": {"type": "text"}}})).await.0, 400);
    assert_eq!(fixture.call("PUT", "/t/_mapping", json!({"properties": {"k": {"type": "keyword"}}})).await.0, 200);
    let properties = json!({"n": {"type": "long"}, "k": {"type": "keyword"}});
    assert_eq!(fixture.call("GET", "/t/_mapping", Value::Null).await.1["t"]["mappings"]["properties"], properties);
    assert_eq!(fixture.call("GET", "/t", Value::Null).await.1["t"]["mappings"]["properties"], properties);
    assert_eq!(fixture.call("GET", "/_cluster/health?wait_for_status=yellow", Value::Null).await.1["status"], "green");
    fixture.fill(3).await;
    let (_, answer) = fixture.call("GET", "/_cat/indices?format=json&bytes=b", Value::Null).await;
    assert_eq!(
        (&answer[0]["index"], &answer[0]["docs.count"], &answer[0]["rep"]),
        (&json!("t"), &json!("3"), &json!("0"))
    );
    assert_eq!(fixture.call("POST", "/t/_refresh", Value::Null).await.0, 200);
}

#[tokio::test]
async fn asks_for_name_and_password() {
    let user = Some(("elastic".to_owned(), "secret".to_owned()));
    let fixture = Fixture::new(Options { user, ..Options::default() }).await;
    let get = |password| {
        let request = fixture.client.get(fixture.store.url());
        match password {
            Some(password) => request.basic_auth("elastic", Some(password)),
            None => request,
        }
        .send()
    };
    assert_eq!(get(Some("secret")).await.unwrap().status(), 200);
    for wrong in [None, Some("guess")] {
        let response = get(wrong).await.unwrap();
        assert_eq!(response.status(), 401);
        assert!(response.headers()["www-authenticate"].to_str().unwrap().starts_with("Basic"));
        assert!(response.text().await.unwrap().contains("security_exception"));
    }
}

#[tokio::test]
async fn null_mode_counts_and_keeps_nothing() {
    let fixture = Fixture::new(Options { null: true, max_content_length: 1 << 20, ..Options::default() }).await;
    fixture.fill(1000).await;
    let (_, answer) = fixture.bulk(action("delete", "1", 1) + &action("index", "2", 1).replace("\"t\"", "\"u\"")).await;
    assert_eq!(answer, json!({"errors": false, "items": [{"delete": {"status": 200}}, {"index": {"status": 201}}]}));
    assert_eq!(fixture.call("GET", "/t/_count", Value::Null).await.1["count"], 1000);
    assert_eq!(fixture.call("GET", "/_count", Value::Null).await.1["count"], 1001);
    assert!(fixture.store.documents("t").is_empty());
    let stats = fixture.store.stats();
    assert_eq!(Stats { bytes: 0, requests: 0, ..stats }, Stats { documents: 1001, items: 1002, ..Stats::default() });
    assert!(stats.requests == 4 && stats.bytes > 80_000, "{stats:?}");

    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(action("index", "1", 1).repeat(500).as_bytes()).unwrap();
    let gzip = |body: Vec<u8>| {
        let request = fixture.client.post(format!("{}/_bulk", fixture.store.url())).body(body);
        request.header("content-type", "application/json").header("content-encoding", "gzip").send()
    };
    let response: Value =
        serde_json::from_str(&gzip(encoder.finish().unwrap()).await.unwrap().text().await.unwrap()).unwrap();
    assert_eq!(response["items"].as_array().unwrap().len(), 500);
    assert!(gzip(b"no gzip".to_vec()).await.is_err());
    let (status, _) = fixture.bulk("{\"foo\":{}}\n").await;
    assert_eq!(status, 400);
    let long = fixture.send(Method::POST, "/_bulk", action("index", "1", 1).repeat(20_000)).await.unwrap();
    assert_eq!(long.status(), 413);
    assert_eq!(fixture.store.stats().documents, 1501);
}

#[tokio::test]
async fn faults_come_in_their_order() {
    let fixture = Fixture::new(Options::default()).await;
    fixture.store.inject(Fault::new(Effect::Reject { status: 503, kind: None }).times(1));
    fixture.store.inject(Fault::new(Effect::ApplyThenFail { status: None }).times(1));
    fixture.store.inject(Fault::new(Effect::Cut { bytes: 40 }).times(1));
    let fault = json!({"fault": "reject_items", "status": 429, "every": 2, "ids": ["x"], "times": 1});
    assert_eq!(fixture.call("POST", "/_pgtide/faults", fault).await.0, 200);
    assert_eq!(fixture.call("GET", "/_pgtide/faults", Value::Null).await.1, json!({"queued": 4, "held": 0}));
    assert_eq!(fixture.call("POST", "/_pgtide/faults", json!({"fault": "no"})).await.0, 400);

    let (status, answer) = fixture.bulk(action("index", "1", 1)).await;
    assert_eq!((status, &answer["error"]["type"]), (503, &json!("unavailable_shards_exception")));
    assert!(fixture.store.documents("t").is_empty());
    let send = |id| fixture.send(Method::POST, "/_bulk", action("index", id, 1));
    assert!(send("2").await.is_err());
    let whole = match send("3").await {
        Ok(response) => response.text().await,
        Err(error) => Err(error),
    };
    assert!(whole.is_err());
    assert_eq!(fixture.store.documents("t").into_keys().collect::<Vec<_>>(), ["2", "3"]);
    let (_, answer) = fixture.bulk(["a", "b", "x"].map(|id| action("index", id, 1)).concat()).await;
    let statuses: Vec<_> = (0..3).map(|n| answer["items"][n]["index"]["status"].as_u64().unwrap()).collect();
    assert_eq!((statuses, &answer["errors"]), (vec![201, 429, 429], &json!(true)));
    assert_eq!(fixture.item("index", "b", 1).await, 201);
}

#[tokio::test]
async fn a_held_request_is_applied_late_even_without_its_client() {
    let fixture = Fixture::new(Options::default()).await;
    fixture.store.inject(Fault::new(Effect::Hold { applied: true }).times(1));
    fixture.store.inject(Fault::new(Effect::Hold { applied: false }).times(1));
    let post = |id| {
        let request = fixture.client.post(format!("{}/_bulk", fixture.store.url()));
        tokio::spawn(request.header("content-type", "application/json").body(action("index", id, 1)).send())
    };
    let first = post("1");
    fixture.until_held(1).await;
    assert_eq!(fixture.store.documents("t").len(), 1);
    let late = post("2");
    fixture.until_held(2).await;
    late.abort();
    assert!(late.await.unwrap_err().is_cancelled());
    assert!(!fixture.store.documents("t").contains_key("2"));
    let start = Instant::now();
    while fixture.store.abandoned() != 1 {
        assert!(start.elapsed() < Duration::from_secs(10), "the client that has gone is not noticed");
        tokio::task::yield_now().await;
    }
    assert_eq!(fixture.call("DELETE", "/_pgtide/faults", Value::Null).await.0, 200);
    assert_eq!(first.await.unwrap().unwrap().status(), 200);
    fixture.store.until_applied().await;
    assert!(fixture.store.documents("t").contains_key("2"), "the late request is lost");
    assert_eq!(fixture.store.abandoned(), 0);
}

#[tokio::test]
async fn shuts_down_and_frees_its_port() {
    let fixture = Fixture::new(Options::default()).await;
    fixture.fill(1).await;
    let addr = fixture.store.local_addr();
    fixture.store.inject(Fault::new(Effect::Hold { applied: false }));
    let request = fixture.client.post(format!("{}/_bulk", fixture.store.url()));
    let held = tokio::spawn(request.header("content-type", "application/json").body(action("index", "2", 1)).send());
    fixture.until_held(1).await;
    fixture.store.shutdown().await;
    assert_eq!(held.await.unwrap().unwrap().status(), 200);
    let again = Store::bind(addr, Options::default()).await.unwrap();
    assert_eq!(again.stats().documents, 0);
}
