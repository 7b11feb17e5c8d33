//! The local document store answers in the shape of the real server: the same requests to both, compared field by field.
//! Fields that say what happened have to be equal; of the others the type. `EXCEPTIONS` has what may differ.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};

use pgtide::store::{Options, Store};
use reqwest::Method;
use serde_json::{Value, json};

use super::scene::Scene;
use super::support::elasticsearch::Installation;
use super::support::process::http;

const INDEX: &str = "contract";

/// What is sent with every bulk.
const BULK: &str = "/_bulk?timeout=30s&filter_path=errors,items.*.status,items.*.error.type,items.*.error.reason";

/// What is sent with every page of a scan that asks for no documents.
const PAGE: &str =
    "_scroll_id,timed_out,_shards.failed,hits.hits._index,hits.hits._id,hits.hits._version,hits.hits._routing";

/// Fields whose value is the answer. Of any other the type is compared: times, uuids, sequence numbers, words for people.
const EXACT: [&str; 24] = [
    "status",
    "errors",
    "result",
    "_index",
    "_id",
    "_version",
    "_routing",
    "_source",
    "found",
    "count",
    "acknowledged",
    "shards_acknowledged",
    "index",
    "type",
    "value",
    "relation",
    "timed_out",
    "succeeded",
    "num_freed",
    "dynamic",
    "is_write_index",
    "failed",
    "number_of_replicas",
    "refresh_interval",
];

/// An answer to `request` (empty: to any) that may differ at `place` (`*` stands for one step, `**` for the rest) from what
/// these servers say.
struct Exception {
    request: &'static str,
    place: &'static str,
    of: fn(&Installation) -> bool,
}

const fn exception(request: &'static str, place: &'static str, of: fn(&Installation) -> bool) -> Exception {
    Exception { request, place, of }
}

fn every(_: &Installation) -> bool {
    true
}

fn old(server: &Installation) -> bool {
    server.product == "elasticsearch" && server.major() == 7
}

/// Those that are not, or not yet, as Elasticsearch 8.19 is.
fn other(server: &Installation) -> bool {
    old(server) || server.is_opensearch()
}

const EXCEPTIONS: [Exception; 10] = [
    // What caused an error, and where in the body it lies: words for people.
    exception("a query that is none", "/error/**", every),
    // pgtide looks at the status only.
    exception("a scan that was closed", "/error/**", every),
    // `document_parsing_exception` is the newer name of `mapper_parsing_exception`: refused for good, by either.
    exception("values that fields do not take", "/items/*/index/error/type", other),
    exception("a document that is no JSON", "/items/*/index/error/type", other),
    exception("alias", "/errors", other),
    exception("an alias of two", "/errors", other),
    exception("swap", "/errors", other),
    exception("an action that is unknown", "/error/**", old),
    exception("scan of documents, next", "/terminated_early", old),
    // Types were removed in 8.
    exception("", "/hits/hits/*/_type", old),
];

/// A request: what the report calls it, and what is sent.
struct Request {
    name: &'static str,
    method: Method,
    path: String,
    body: String,
}

fn request(name: &'static str, method: &str, path: impl Into<String>, body: Value) -> Request {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    Request { name, method: method.parse().unwrap(), path: path.into(), body }
}

fn bulk(name: &'static str, lines: &[Value]) -> Request {
    let body = lines.iter().map(|line| format!("{line}\n")).collect();
    Request { name, method: Method::POST, path: BULK.to_owned(), body }
}

fn action(kind: &str, index: &str, id: &str, version: u64) -> Value {
    json!({kind: {"_index": index, "_id": id, "version": version, "version_type": "external_gte"}})
}

fn write(id: &str, version: u64) -> [Value; 2] {
    [action("index", INDEX, id, version), json!({"n": version, "text": "a"})]
}

fn remove(id: &str, version: u64) -> Value {
    action("delete", INDEX, id, version)
}

/// Everything that pgtide asks, in an order in which each finds what it is about.
fn requests() -> Vec<Request> {
    let path = |end: &str| format!("/{INDEX}{end}");
    let settings = "/_settings?filter_path=*.settings.index.uuid";
    let block = |name: &str, value: Value| json!({ format!("index.blocks.{name}"): value });
    let scan = json!({"size": 2, "version": true, "_source": false, "sort": ["_doc"]});
    let wholes = json!({"size": 2, "version": true, "_source": true, "sort": ["_doc"]});
    let fields =
        json!({"n": {"type": "long"}, "text": {"type": "keyword"}, "day": {"type": "date"}, "on": {"type": "boolean"}});
    let [one, two] = write("x", 30);
    let mut requests = vec![
        request("no such index: exists", "HEAD", path(""), Value::Null),
        request("no such index: settings", "GET", path(settings), Value::Null),
        request("no such index: refresh", "POST", path("/_refresh"), Value::Null),
        request("no such index: count", "GET", path("/_count"), Value::Null),
        request(
            "no such index: search",
            "POST",
            path("/_search?scroll=5m&allow_partial_search_results=false"),
            scan.clone(),
        ),
        request("no such index: delete", "DELETE", path(""), Value::Null),
        request(
            "create",
            "PUT",
            path(""),
            json!({"settings": {"index": {"number_of_shards": 1, "number_of_replicas": 0, "refresh_interval": "-1"}},
                   "mappings": {"dynamic": "strict", "properties": fields}}),
        ),
        request("create again", "PUT", path(""), json!({})),
        request("create under a bad name", "PUT", "/Contract", json!({})),
        request("exists", "HEAD", path(""), Value::Null),
        request("uuid", "GET", path(settings), Value::Null),
        request(
            "a flat name is no path",
            "GET",
            path("/_settings?flat_settings=true&filter_path=*.settings.index.uuid"),
            Value::Null,
        ),
        request("mapping", "GET", path("/_mapping"), Value::Null),
        request("add a field", "PUT", path("/_mapping"), json!({"properties": {"more": {"type": "integer"}}})),
        request("change a field", "PUT", path("/_mapping"), json!({"properties": {"n": {"type": "keyword"}}})),
        request("change settings", "PUT", path("/_settings"), json!({"index": {"refresh_interval": "1s"}})),
        request("reset a setting", "PUT", path("/_settings"), json!({"index": {"refresh_interval": null}})),
        request(
            "settings that are chosen",
            "GET",
            path("/_settings?filter_path=*.settings.index.number_of_replicas,*.settings.index.refresh_interval"),
            Value::Null,
        ),
        bulk("write", &[write("a", 10), write("b", 10), write("c", 10)].concat()),
        bulk("write again, older, equal, newer", &[write("a", 9), write("b", 10), write("c", 11)].concat()),
        bulk("delete, older, equal, newer", &[remove("a", 9), remove("b", 10), remove("c", 12)]),
        bulk("delete again, and what never was", &[remove("b", 10), remove("never", 5)]),
        bulk("write below and at a tombstone", &[write("b", 9), write("never", 4), write("c", 12)].concat()),
        bulk(
            "values that fields do not take",
            &[
                action("index", INDEX, "bad", 20),
                json!({"n": "no number"}),
                action("index", INDEX, "bad", 20),
                json!({"n": 1, "day": "no day"}),
                action("index", INDEX, "bad", 20),
                json!({"n": {"an": "object"}}),
                action("index", INDEX, "bad", 20),
                json!({"on": "perhaps"}),
                action("index", INDEX, "bad", 20),
                json!({"stranger": 1}),
                action("index", INDEX, "good", 20),
                json!({"n": 1}),
            ],
        ),
        Request {
            name: "a document that is no JSON",
            method: Method::POST,
            path: BULK.to_owned(),
            body: format!("{}\n{{\"n\":\n{one}\n{two}\n", action("index", INDEX, "bad", 20)),
        },
        bulk("an id that is empty", &[action("index", INDEX, "", 20), json!({"n": 1})]),
        bulk("an id that is too long", &[action("index", INDEX, &"i".repeat(513), 20), json!({"n": 1})]),
        bulk("an index of a bad name", &[action("index", "Contract", "a", 20), json!({"n": 1})]),
        bulk(
            "a negative version",
            &[
                json!({"index": {"_index": INDEX, "_id": "a", "version": -1, "version_type": "external_gte"}}),
                json!({"n": 1}),
            ],
        ),
        bulk("an action that is unknown", &[json!({"replace": {"_index": INDEX, "_id": "a"}}), json!({"n": 1})]),
        bulk(
            "routing",
            &[
                json!({"index": {"_index": INDEX, "_id": "r", "routing": "there", "version": 20, "version_type": "external_gte"}}),
                json!({"n": 1}),
            ],
        ),
        bulk(
            "update",
            &[json!({"update": {"_index": INDEX, "_id": "good"}}), json!({"doc": {"n": 2}, "doc_as_upsert": true})],
        ),
        bulk(
            "update of what is not there",
            &[json!({"update": {"_index": INDEX, "_id": "none"}}), json!({"doc": {"n": 2}})],
        ),
        Request { name: "an empty body", method: Method::POST, path: BULK.to_owned(), body: String::new() },
        request("whole answers to a bulk", "POST", "/_bulk", Value::Null),
        request("refresh", "POST", path("/_refresh"), Value::Null),
        request("count", "GET", path("/_count"), Value::Null),
        request(
            "scan",
            "POST",
            path(&format!("/_search?scroll=5m&allow_partial_search_results=false&filter_path={PAGE}")),
            scan.clone(),
        ),
        request("scan, next", "POST", format!("/_search/scroll?filter_path={PAGE}"), json!({"scroll": "5m"})),
        request("scan, next", "POST", format!("/_search/scroll?filter_path={PAGE}"), json!({"scroll": "5m"})),
        request("scan, end", "POST", format!("/_search/scroll?filter_path={PAGE}"), json!({"scroll": "5m"})),
        request("close a scan", "DELETE", "/_search/scroll", json!({})),
        request("a scan that was closed", "POST", "/_search/scroll", json!({"scroll": "5m"})),
        request("close it again", "DELETE", "/_search/scroll", json!({})),
        request("scan of documents", "POST", path("/_search?scroll=5m&allow_partial_search_results=false"), wholes),
        request("scan of documents, next", "POST", "/_search/scroll", json!({"scroll": "5m"})),
        request("close the scan of documents", "DELETE", "/_search/scroll", json!({})),
        request(
            "by id",
            "POST",
            path("/_search?allow_partial_search_results=false"),
            json!({"size": 12, "version": true, "sort": ["_doc"], "query": {"ids": {"values": ["a", "r", "none"]}}}),
        ),
        request("a query that is none", "POST", path("/_search"), json!({"query": {"no_such": {}}})),
        request(
            "alias",
            "POST",
            "/_aliases",
            json!({"actions": [{"add": {"index": INDEX, "alias": "contract_alias", "is_write_index": true}}]}),
        ),
        request(
            "alias of what is not there",
            "POST",
            "/_aliases",
            json!({"actions": [{"add": {"index": "contract2", "alias": "contract_alias"}}]}),
        ),
        request("who has the alias", "GET", "/_alias/contract_alias", Value::Null),
        request("no such alias", "GET", "/_alias/contract_none", Value::Null),
        request("alias: exists", "HEAD", "/contract_alias", Value::Null),
        bulk("through the alias", &[action("index", "contract_alias", "via", 20), json!({"n": 1})]),
        request("an index of the alias's name", "PUT", "/contract_alias", json!({})),
        request("a second index", "PUT", "/contract2", json!({"aliases": {"contract_many": {}}})),
        request(
            "an alias of two",
            "POST",
            "/_aliases",
            json!({"actions": [{"add": {"index": INDEX, "alias": "contract_many"}}]}),
        ),
        bulk("through an alias of two", &[action("index", "contract_many", "via", 20), json!({"n": 1})]),
        request(
            "swap",
            "POST",
            "/_aliases",
            json!({"actions": [{"remove": {"index": INDEX, "alias": "contract_alias"}}, {"add": {"index": "contract2", "alias": "contract_alias"}}]}),
        ),
        request("who has it now", "GET", "/_alias/contract_alias", Value::Null),
    ];
    requests.push(request("refresh before the blocks", "POST", path("/_refresh"), Value::Null));
    for name in ["read_only_allow_delete", "write", "read_only"] {
        requests.push(request("block", "PUT", path("/_settings"), block(name, json!(true))));
        requests.push(bulk("write to what is blocked", &[write("a", 40).to_vec(), vec![remove("a", 40)]].concat()));
        requests.push(request("count what is blocked", "GET", path("/_count"), Value::Null));
        requests.push(request("unblock", "PUT", path("/_settings"), block(name, Value::Null)));
    }
    requests.extend([
        request("close", "POST", path("/_close"), Value::Null),
        bulk("write to what is closed", &[write("a", 41).to_vec(), vec![remove("a", 41)]].concat()),
        request("closed: count", "GET", path("/_count"), Value::Null),
        request("closed: search", "POST", path("/_search?scroll=5m&allow_partial_search_results=false"), scan),
        request("closed: refresh", "POST", path("/_refresh"), Value::Null),
        request("closed: exists", "HEAD", path(""), Value::Null),
        request("open", "POST", path("/_open"), Value::Null),
        bulk("write to what is open again", &write("a", 42)),
        bulk("an index that is made by a write", &[action("index", "contract_made", "a", 1), json!({"n": 1})]),
        bulk(
            "one that must not be",
            &[json!({"index": {"_index": "contract_unmade", "_id": "a", "require_alias": true}}), json!({"n": 1})],
        ),
        request("delete", "DELETE", path(""), Value::Null),
        request("delete the rest", "DELETE", "/contract2", Value::Null),
        request("delete the rest", "DELETE", "/contract_made", Value::Null),
    ]);
    requests
}

/// One of the two: it remembers its own scroll.
struct Side {
    url: String,
    client: reqwest::Client,
    scroll: Option<Value>,
}

impl Side {
    fn new(url: String) -> Self {
        Self { url, client: http(), scroll: None }
    }

    /// The status, and the body: null where there is none, a text where it is no JSON.
    async fn ask(&mut self, request: &Request) -> (u16, Value) {
        let mut body = request.body.clone();
        if request.path.starts_with("/_search/scroll") {
            let mut with: Value = serde_json::from_str(&body).unwrap();
            with["scroll_id"] = self.scroll.clone().unwrap_or_default();
            body = with.to_string();
        }
        let kind = if request.path.starts_with("/_bulk") { "application/x-ndjson" } else { "application/json" };
        let asked = self.client.request(request.method.clone(), format!("{}{}", self.url, request.path));
        let answer = asked.header("content-type", kind).body(body).send().await.unwrap();
        let status = answer.status().as_u16();
        let text = answer.text().await.unwrap();
        let body: Value = match text.as_str() {
            "" => Value::Null,
            text => serde_json::from_str(text).unwrap_or_else(|_| text.into()),
        };
        if let Some(scroll) = body.get("_scroll_id") {
            self.scroll = Some(scroll.clone());
        }
        (status, body)
    }
}

/// Puts every difference into `found`, as `place: ours, theirs`.
fn compare(place: &str, ours: &Value, theirs: &Value, found: &mut Vec<(String, String)>) {
    let mut differ = |place: &str| found.push((place.to_owned(), format!("ours {ours}, theirs {theirs}")));
    match (ours, theirs) {
        (Value::Object(one), Value::Object(other)) => {
            let both: BTreeMap<&String, (Option<&Value>, Option<&Value>)> =
                one.keys().chain(other.keys()).map(|key| (key, (one.get(key), other.get(key)))).collect();
            for (key, values) in both {
                let place = format!("{place}/{key}");
                match values {
                    (Some(ours), Some(theirs)) => compare(&place, ours, theirs, found),
                    (Some(ours), None) => found.push((place, format!("only ours: {ours}"))),
                    (None, theirs) => {
                        found.push((place, format!("only theirs: {}", theirs.cloned().unwrap_or_default())))
                    }
                }
            }
        }
        (Value::Array(one), Value::Array(other)) => {
            if one.len() != other.len() {
                differ(place);
            }
            for (number, (ours, theirs)) in one.iter().zip(other).enumerate() {
                compare(&format!("{place}/{number}"), ours, theirs, found);
            }
        }
        _ => {
            let field = place.rsplit('/').find(|step| step.parse::<u32>().is_err()).unwrap_or_default();
            let same = std::mem::discriminant(ours) == std::mem::discriminant(theirs);
            if !same || (EXACT.contains(&field) || place.contains("_source")) && ours != theirs {
                differ(place);
            }
        }
    }
}

fn is_at(place: &str, pattern: &str) -> bool {
    let (mut steps, mut wanted) = (place.split('/'), pattern.split('/'));
    loop {
        match (steps.next(), wanted.next()) {
            (_, Some("**")) | (None, None) => return true,
            (Some(step), Some(wanted)) if wanted == "*" || step == wanted => {}
            _ => return false,
        }
    }
}

pub async fn same_answers(scene: Scene) {
    let server = scene.installation().clone();
    let store = Store::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), Options::default()).await.unwrap();
    let (mut ours, mut theirs) = (Side::new(store.url()), Side::new(scene.url()));
    let mut found = Vec::new();
    for request in requests() {
        let ((status, body), (their_status, their_body)) = (ours.ask(&request).await, theirs.ask(&request).await);
        let mut differences = Vec::new();
        if status != their_status {
            differences
                .push(("status".to_owned(), format!("ours {status} {body}, theirs {their_status} {their_body}")));
        }
        compare("", &body, &their_body, &mut differences);
        let excepted = |place: &str| {
            EXCEPTIONS.iter().any(|exception| {
                (exception.request.is_empty() || exception.request == request.name)
                    && is_at(place, exception.place)
                    && (exception.of)(&server)
            })
        };
        differences.retain(|(place, _)| !excepted(place));
        found.extend(differences.into_iter().map(|(place, what)| format!("{}: {place}: {what}", request.name)));
    }
    assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
}
