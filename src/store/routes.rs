//! Which request does what.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use axum::http::Method;
use serde_json::{Map, Value, json};

use super::bulk::{Demands, bulk};
use super::catalog::{apply_settings, nest};
use super::failure::Failure;
use super::faults::{Armed, Fault};
use super::fields::{Mapping, merge};
use super::filter_path::Filter;
use super::index::{Index, Versioning};
use super::query::Query;
use super::search::{SourceFilter, View};
use super::{Reply, Shared, VERSION};

/// A request, taken apart.
pub(super) struct Request {
    pub(super) method: Method,
    /// As it came, with the query.
    pub(super) uri: String,
    /// Of the path, decoded.
    pub(super) segments: Vec<String>,
    pub(super) params: HashMap<String, String>,
    /// Inflated.
    pub(super) body: Vec<u8>,
}

impl Request {
    pub(super) fn filter(&self) -> Option<Filter> {
        self.params.get("filter_path").and_then(|text| Filter::parse(text))
    }

    /// Whether a flag is set: `x`, `x=`, `x=true`.
    fn flag(&self, name: &str) -> bool {
        self.params.get(name).is_some_and(|value| value != "false")
    }

    /// The body as JSON; null if there is none.
    fn json(&self) -> Result<Value, Failure> {
        if self.body.trim_ascii().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&self.body)
            .map_err(|error| Failure::new(400, "x_content_parse_exception", format!("the body is not JSON: {error}")))
    }
}

/// The segments of a path, decoded.
pub(super) fn segments(path: &str) -> Vec<String> {
    path.split('/').filter(|segment| !segment.is_empty()).map(decode).collect()
}

fn decode(segment: &str) -> String {
    let digit =
        |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16)).and_then(|d| u8::try_from(d).ok());
    let bytes = segment.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], digit(bytes.get(at + 1)), digit(bytes.get(at + 2))) {
            (b'%', Some(high), Some(low)) => {
                out.push(high * 16 + low);
                at += 3;
            }
            (byte, ..) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Answers a request. `fault`: what is to go wrong with items.
pub(super) fn answer(shared: &Shared, request: &Request, fault: Option<&Armed>) -> Reply {
    match route(shared, request, fault) {
        Ok(reply) => match request.filter() {
            // `_bulk` has done it already; errors of whole requests are not filtered.
            Some(filter) if reply.status < 400 && !reply.filtered => match std::str::from_utf8(&reply.body) {
                Ok(json) => Reply { body: filter.apply(json).into_bytes(), ..reply },
                Err(_) => reply,
            },
            _ => reply,
        },
        Err(failure) => Reply::failure(&failure),
    }
}

fn route(shared: &Shared, request: &Request, fault: Option<&Armed>) -> Result<Reply, Failure> {
    let segments: Vec<&str> = request.segments.iter().map(String::as_str).collect();
    let catalog = &shared.catalog;
    let ignore = request.flag("ignore_unavailable");
    let read = request.method == Method::GET || request.method == Method::HEAD;
    let ask = request.method == Method::GET || request.method == Method::POST;
    let put = request.method == Method::PUT || request.method == Method::POST;
    let delete = request.method == Method::DELETE;
    let ok = |value: Value| Ok(Reply::ok(value.to_string().into_bytes()));
    let acknowledged = || Ok(Reply::ok(br#"{"acknowledged":true}"#.to_vec()));
    match segments.as_slice() {
        [] if read => ok(json!({
            "name": "pgtide", "cluster_name": "pgtide-store", "cluster_uuid": shared.uuid, "build_flavor": "pgtide-store",
            "version": { "number": VERSION, "distribution": "pgtide-store", "build_flavor": "pgtide-store",
                "minimum_wire_compatibility_version": "7.17.0", "minimum_index_compatibility_version": "7.0.0" },
            "tagline": "The local document store of pgtide",
        })),
        ["_bulk"] if put => run_bulk(shared, request, None, fault),
        [index, "_bulk"] if put => run_bulk(shared, request, Some(index), fault),
        ["_count"] if ask => count(shared, request, "_all"),
        [index, "_count"] if ask => count(shared, request, index),
        ["_search"] if ask => search(shared, request, ""),
        ["_search", "scroll"] if ask => {
            let body = request.json()?;
            let id =
                body.get("scroll_id").and_then(Value::as_str).or(request.params.get("scroll_id").map(String::as_str));
            let keep = body.get("scroll").and_then(Value::as_str).or(request.params.get("scroll").map(String::as_str));
            let id = id.ok_or_else(|| Failure::validation("scrollId is missing"))?;
            Ok(Reply::ok(shared.contexts.scroll(id, keep)?.into_bytes()))
        }
        ["_search", "scroll", rest @ ..] if delete => {
            let body = request.json()?;
            let mut ids = strings(body.get("scroll_id"));
            ids.extend(rest.iter().flat_map(|ids| ids.split(',')).map(str::to_owned));
            Ok(freed(shared.contexts.close(&ids)))
        }
        [index, "_search"] if ask => search(shared, request, index),
        ["_pit"] if delete => Ok(freed(shared.contexts.close(&strings(request.json()?.get("id"))))),
        [index, "_pit"] if request.method == Method::POST => {
            let indices = catalog.resolve(index, ignore)?;
            ok(shared.contexts.open_point(indices, request.params.get("keep_alive").map(String::as_str))?)
        }
        [index, "_doc", id] if read => document(shared, request, index, id),
        [index, "_source", id] if read => source(shared, request, index, id),
        ["_mget"] if ask => mget(shared, request, None),
        [index, "_mget"] if ask => mget(shared, request, Some(index)),
        [index, "_delete_by_query"] if request.method == Method::POST => delete_by_query(shared, request, index),
        ["_refresh" | "_flush"] if ask => {
            Ok(Reply::ok(br#"{"_shards":{"total":2,"successful":1,"failed":0}}"#.to_vec()))
        }
        [index, "_refresh" | "_flush"] if ask => {
            if let Some(closed) = catalog.resolve(index, ignore)?.iter().find(|index| index.meta().closed) {
                return Err(Failure::closed(closed));
            }
            Ok(Reply::ok(br#"{"_shards":{"total":2,"successful":1,"failed":0}}"#.to_vec()))
        }
        ["_aliases"] if request.method == Method::POST => {
            catalog.update_aliases(&request.json()?)?;
            ok(json!({ "acknowledged": true, "errors": false }))
        }
        ["_alias" | "_aliases"] if read => aliases(shared, "_all", None),
        ["_alias", name] if read => aliases(shared, "_all", Some(name)),
        [index, "_alias"] if read => aliases(shared, index, None),
        [index, "_alias", name] if read => aliases(shared, index, Some(name)),
        [index, "_alias", name] if put || delete => {
            let verb = if delete { "remove" } else { "add" };
            let mut options = json!({ "index": index, "alias": name });
            if let Some(is_write) = request.json()?.get("is_write_index") {
                options["is_write_index"] = is_write.clone();
            }
            catalog.update_aliases(&json!({ "actions": [{ verb: options }] }))?;
            acknowledged()
        }
        ["_cluster", "health"] if read => health(shared, "_all"),
        ["_cluster", "health", index] if read => health(shared, index),
        ["_cat", "indices"] if read => cat_indices(shared, request, "_all"),
        ["_cat", "indices", index] if read => cat_indices(shared, request, index),
        ["_settings"] if read => per_index(shared, request, "_all", settings_of),
        [index, "_settings"] if read => per_index(shared, request, index, settings_of),
        [index, "_settings"] if request.method == Method::PUT => {
            let body = request.json()?;
            let body = body.get("settings").unwrap_or(&body);
            for index in catalog.resolve(index, ignore)? {
                update_settings(&index, body)?;
            }
            acknowledged()
        }
        ["_mapping"] if read => per_index(shared, request, "_all", mapping_of),
        [index, "_mapping"] if read => per_index(shared, request, index, mapping_of),
        [index, "_mapping"] if put => {
            let body = request.json()?;
            for index in catalog.resolve(index, ignore)? {
                let mut meta = index.meta_mut();
                let mut merged = meta.mapping_json.clone();
                merge(&mut merged, &body)?;
                meta.mapping = Mapping::parse(&merged)?.into();
                meta.mapping_json = merged;
            }
            acknowledged()
        }
        [index, verb @ ("_close" | "_open")] if request.method == Method::POST => {
            let mut answer = json!({ "acknowledged": true, "shards_acknowledged": true });
            for index in catalog.resolve(index, ignore)? {
                let close = *verb == "_close";
                index.meta_mut().closed = close;
                if close {
                    answer["indices"][&index.name] = json!({ "closed": true });
                }
            }
            ok(answer)
        }
        ["_pgtide", "faults"] if request.method == Method::POST => {
            shared.faults.inject(Fault::parse(&request.body)?);
            acknowledged()
        }
        ["_pgtide", "faults"] if delete => {
            shared.faults.clear();
            acknowledged()
        }
        ["_pgtide", "faults"] if read => {
            let (queued, held) = shared.faults.counts();
            ok(json!({ "queued": queued, "held": held }))
        }
        ["_pgtide", "tombstones"] if delete => {
            shared.forget_tombstones();
            acknowledged()
        }
        [index] if !index.starts_with('_') || *index == "_all" => match request.method {
            Method::GET | Method::HEAD => per_index(shared, request, index, |shared, request, index| {
                let mut answer = Map::new();
                answer.insert("aliases".to_owned(), Value::Object(shared.catalog.aliases_of(&index.name)));
                answer.extend(mapping_of(shared, request, index));
                answer.extend(settings_of(shared, request, index));
                answer
            }),
            Method::PUT => {
                catalog.create(index, &request.json()?)?;
                ok(json!({ "acknowledged": true, "shards_acknowledged": true, "index": index }))
            }
            Method::DELETE => {
                catalog.delete(index, ignore)?;
                acknowledged()
            }
            _ => Err(unknown(request)),
        },
        _ => Err(unknown(request)),
    }
}

fn unknown(request: &Request) -> Failure {
    Failure::argument(format!("no handler found for uri [{}] and method [{}]", request.uri, request.method))
}

fn strings(value: Option<&Value>) -> Vec<String> {
    match value {
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(values)) => values.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}

fn freed(count: usize) -> Reply {
    let mut reply = Reply::ok(json!({ "succeeded": true, "num_freed": count }).to_string().into_bytes());
    if count == 0 {
        reply.status = 404;
    }
    reply
}

fn run_bulk(shared: &Shared, request: &Request, index: Option<&str>, fault: Option<&Armed>) -> Result<Reply, Failure> {
    let filter = request.filter();
    let demands = Demands {
        index,
        routing: request.params.get("routing").map(String::as_str),
        require_alias: request.flag("require_alias"),
        refreshed: request.params.get("refresh").is_some_and(|refresh| refresh.is_empty() || refresh == "true"),
        filter: filter.as_ref(),
        auto_create: shared.options.auto_create_index,
        reject: &|id| fault.and_then(|fault| fault.reject_item(id)),
    };
    let (body, items) = bulk(&shared.catalog, &demands, &request.body)?;
    shared.counters.items.fetch_add(items as u64, Ordering::Relaxed);
    Ok(Reply { filtered: true, ..Reply::ok(body) })
}

fn count(shared: &Shared, request: &Request, expression: &str) -> Result<Reply, Failure> {
    let body = request.json()?;
    let query = Query::parse(body.get("query"))?;
    let indices = shared.catalog.resolve(expression, request.flag("ignore_unavailable"))?;
    let count: u64 = if matches!(query, Query::All) {
        let closed = indices.iter().find(|index| index.meta().closed);
        if let Some(index) = closed {
            return Err(Failure::closed(index));
        }
        indices.iter().map(|index| index.count()).sum()
    } else {
        View::of(indices, Some(&query))?.matching(&query, None, None).count() as u64
    };
    let shards = json!({ "total": 1, "successful": 1, "skipped": 0, "failed": 0 });
    Ok(Reply::ok(json!({ "count": count, "_shards": shards }).to_string().into_bytes()))
}

fn search(shared: &Shared, request: &Request, expression: &str) -> Result<Reply, Failure> {
    let body = request.json()?;
    let answer = shared.contexts.search(&shared.catalog, expression, &body, &request.params)?;
    Ok(Reply::ok(answer.into_bytes()))
}

/// The only index behind a name, for reads of single documents.
fn only(shared: &Shared, name: &str) -> Result<std::sync::Arc<Index>, Failure> {
    let mut indices = shared.catalog.resolve(name, false)?;
    match (indices.pop(), indices.is_empty()) {
        (Some(index), true) if index.meta().closed => Err(Failure::closed(&index)),
        (Some(index), true) => Ok(index),
        (None, _) => Err(Failure::no_index(name)),
        (Some(_), false) => Err(Failure::argument(format!(
            "alias [{name}] has more than one index associated with it, can't execute a single index op"
        ))),
    }
}

/// A document as `_doc` and `_mget` show it, and whether it was found.
fn shown(index: &Index, id: &str, filter: &SourceFilter) -> (String, bool) {
    let found = index.documents().get(id).cloned();
    let mut out = format!("{{\"_index\":{},\"_id\":{}", json!(index.name), json!(id));
    match &found {
        None => out.push_str(",\"found\":false}"),
        Some(document) => {
            out.push_str(&format!(
                ",\"_version\":{},\"_seq_no\":{},\"_primary_term\":1",
                document.version, document.seq
            ));
            if let Some(routing) = document.routing() {
                out.push_str(&format!(",\"_routing\":{}", json!(routing)));
            }
            out.push_str(",\"found\":true");
            filter.write(document.source(), &mut out);
            out.push('}');
        }
    }
    (out, found.is_some())
}

fn document(shared: &Shared, request: &Request, index: &str, id: &str) -> Result<Reply, Failure> {
    let filter = SourceFilter::of_params(&request.params).unwrap_or(SourceFilter::All);
    let (json, found) = shown(&*only(shared, index)?, id, &filter);
    Ok(Reply { status: if found { 200 } else { 404 }, ..Reply::ok(json.into_bytes()) })
}

fn source(shared: &Shared, request: &Request, index: &str, id: &str) -> Result<Reply, Failure> {
    let found = only(shared, index)?.documents().get(id).cloned();
    let Some(document) = found else {
        let reason = format!("Document not found [{index}]/[{id}]");
        return Err(Failure::new(404, "resource_not_found_exception", reason));
    };
    let json = match SourceFilter::of_params(&request.params) {
        Some(SourceFilter::Some(filter)) => filter.apply(document.source()),
        _ => document.source().to_owned(),
    };
    Ok(Reply::ok(json.into_bytes()))
}

fn mget(shared: &Shared, request: &Request, index: Option<&str>) -> Result<Reply, Failure> {
    let body = request.json()?;
    let wanted: Vec<Value> = match (body.get("docs"), body.get("ids")) {
        (Some(Value::Array(docs)), _) => docs.clone(),
        (None, Some(Value::Array(ids))) => ids.iter().map(|id| json!({ "_id": id })).collect(),
        _ => Vec::new(),
    };
    if wanted.is_empty() {
        return Err(Failure::validation("no documents to get"));
    }
    let mut out = String::from("{\"docs\":[");
    for (number, doc) in wanted.iter().enumerate() {
        if number > 0 {
            out.push(',');
        }
        let name = doc
            .get("_index")
            .and_then(Value::as_str)
            .or(index)
            .ok_or_else(|| Failure::validation("index is missing"))?;
        let id = match doc.get("_id") {
            Some(Value::String(id)) => id.clone(),
            Some(Value::Number(id)) => id.to_string(),
            _ => return Err(Failure::validation("id is missing")),
        };
        let filter = match doc.get("_source") {
            None => SourceFilter::of_params(&request.params).unwrap_or(SourceFilter::All),
            some => SourceFilter::of(some),
        };
        match only(shared, name) {
            Ok(index) => out.push_str(&shown(&index, &id, &filter).0),
            Err(failure) => {
                let error = &failure.body()["error"];
                out.push_str(&json!({ "_index": name, "_id": id, "error": error }).to_string());
            }
        }
    }
    out.push_str("]}");
    Ok(Reply::ok(out.into_bytes()))
}

fn delete_by_query(shared: &Shared, request: &Request, expression: &str) -> Result<Reply, Failure> {
    let body = request.json()?;
    let Some(query) = body.get("query") else { return Err(Failure::validation("query is missing")) };
    let query = Query::parse(Some(query))?;
    let indices = shared.catalog.resolve(expression, request.flag("ignore_unavailable"))?;
    for index in &indices {
        if index.meta().write_rules().block_write {
            let reason = format!("index [{}] blocked by: [FORBIDDEN/8/index write (api)];", index.name);
            return Err(Failure::new(403, "cluster_block_exception", reason).about(&index.name));
        }
    }
    let view = View::of(indices, Some(&query))?;
    let (mut total, mut deleted, mut conflicts) = (0_u64, 0_u64, 0_u64);
    for found in view.matching(&query, None, None) {
        total += 1;
        let gc_deletes = found.index.meta().write_rules().gc_deletes;
        // What was written since the view was taken stays.
        let unchanged = Versioning::IfSeqNo(found.document.seq, 1);
        let now = std::time::Instant::now();
        match found.index.documents().delete(found.document.id(), unchanged, now, gc_deletes) {
            super::index::Outcome::Deleted { .. } => deleted += 1,
            _ => conflicts += 1,
        }
    }
    let answer = json!({
        "took": 1, "timed_out": false, "total": total, "deleted": deleted, "batches": 1, "version_conflicts": conflicts,
        "noops": 0, "retries": { "bulk": 0, "search": 0 }, "throttled_millis": 0, "requests_per_second": -1.0,
        "throttled_until_millis": 0, "failures": [],
    });
    Ok(Reply { status: if conflicts > 0 { 409 } else { 200 }, ..Reply::ok(answer.to_string().into_bytes()) })
}

fn aliases(shared: &Shared, expression: &str, alias: Option<&str>) -> Result<Reply, Failure> {
    let mut answer = Map::new();
    for index in shared.catalog.resolve(expression, false)? {
        let mut pairs = shared.catalog.aliases_of(&index.name);
        if let Some(alias) = alias {
            pairs.retain(|name, _| alias.split(',').any(|pattern| super::filter_path::glob(pattern, name)));
            if pairs.is_empty() {
                continue;
            }
        }
        answer.insert(index.name.clone(), json!({ "aliases": pairs }));
    }
    match alias {
        Some(alias) if answer.is_empty() && !alias.contains('*') => {
            let error = format!("alias [{alias}] missing");
            Ok(Reply { status: 404, ..Reply::ok(json!({ "error": error, "status": 404 }).to_string().into_bytes()) })
        }
        _ => Ok(Reply::ok(Value::Object(answer).to_string().into_bytes())),
    }
}

fn health(shared: &Shared, expression: &str) -> Result<Reply, Failure> {
    let indices = shared.catalog.resolve(expression, true)?.len();
    let answer = json!({
        "cluster_name": "pgtide-store", "status": "green", "timed_out": false, "number_of_nodes": 1,
        "number_of_data_nodes": 1, "active_primary_shards": indices, "active_shards": indices, "relocating_shards": 0,
        "initializing_shards": 0, "unassigned_shards": 0, "delayed_unassigned_shards": 0, "number_of_pending_tasks": 0,
        "number_of_in_flight_fetch": 0, "task_max_waiting_in_queue_millis": 0, "active_shards_percent_as_number": 100.0,
    });
    Ok(Reply::ok(answer.to_string().into_bytes()))
}

fn cat_indices(shared: &Shared, request: &Request, expression: &str) -> Result<Reply, Failure> {
    let indices = shared.catalog.resolve(expression, false)?;
    let row = |index: &Index| {
        let (closed, replicas) = {
            let meta = index.meta();
            let replicas = meta.settings.get("index.number_of_replicas").cloned();
            (meta.closed, replicas.unwrap_or_else(|| "1".to_owned()))
        };
        let (bytes, deleted) = {
            let documents = index.documents();
            (documents.bytes(), documents.deleted())
        };
        let size = if request.params.contains_key("bytes") { bytes.to_string() } else { format!("{bytes}b") };
        json!({
            "health": "green", "status": if closed { "close" } else { "open" }, "index": index.name, "uuid": index.uuid,
            "pri": "1", "rep": replicas, "docs.count": index.count().to_string(), "docs.deleted": deleted.to_string(),
            "store.size": size, "pri.store.size": size,
        })
    };
    let rows: Vec<Value> = indices.iter().map(|index| row(index)).collect();
    if request.params.get("format").is_some_and(|format| format == "json") {
        return Ok(Reply::ok(Value::Array(rows).to_string().into_bytes()));
    }
    let names = [
        "health",
        "status",
        "index",
        "uuid",
        "pri",
        "rep",
        "docs.count",
        "docs.deleted",
        "store.size",
        "pri.store.size",
    ];
    let line = |row: &Value| {
        let cells: Vec<&str> = names.iter().map(|name| row[name].as_str().unwrap_or_default()).collect();
        cells.join(" ") + "\n"
    };
    Ok(Reply { text: true, filtered: true, ..Reply::ok(rows.iter().map(line).collect::<String>().into_bytes()) })
}

/// `{index: what, ...}` for the indices of an expression.
fn per_index(
    shared: &Shared,
    request: &Request,
    expression: &str,
    what: impl Fn(&Shared, &Request, &Index) -> Map<String, Value>,
) -> Result<Reply, Failure> {
    let indices = shared.catalog.resolve(expression, request.flag("ignore_unavailable"))?;
    if indices.is_empty() && request.method == Method::HEAD && !shared.catalog.is_alias(expression) {
        return Err(Failure::no_index(expression));
    }
    let answer: Map<String, Value> =
        indices.iter().map(|index| (index.name.clone(), Value::Object(what(shared, request, index)))).collect();
    Ok(Reply::ok(Value::Object(answer).to_string().into_bytes()))
}

fn settings_of(_: &Shared, request: &Request, index: &Index) -> Map<String, Value> {
    let mut settings = index.meta().settings.clone();
    let mut default = |name: &str, value: String| {
        settings.entry(name.to_owned()).or_insert(value);
    };
    default("index.number_of_shards", "1".to_owned());
    default("index.number_of_replicas", "1".to_owned());
    default("index.creation_date", index.created.to_string());
    default("index.provided_name", index.name.clone());
    default("index.uuid", index.uuid.clone());
    default("index.version.created", "8536000".to_owned());
    let settings = if request.flag("flat_settings") { json!(settings) } else { nest(&settings) };
    Map::from_iter([("settings".to_owned(), settings)])
}

fn mapping_of(_: &Shared, _: &Request, index: &Index) -> Map<String, Value> {
    Map::from_iter([("mappings".to_owned(), index.meta().mapping_json.clone())])
}

fn update_settings(index: &Index, body: &Value) -> Result<(), Failure> {
    let mut meta = index.meta_mut();
    let mut settings = meta.settings.clone();
    apply_settings(&mut settings, body)?;
    let fixed = "index.number_of_shards";
    if settings.get(fixed) != meta.settings.get(fixed) && !meta.closed {
        return Err(Failure::argument(format!(
            "Can't update non dynamic settings [[{fixed}]] for open indices [[{}/{}]]",
            index.name, index.uuid
        )));
    }
    meta.settings = settings;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_decoded_segment_by_segment() {
        assert_eq!(segments("/a%2Fb/_doc/%C3%BC+%"), ["a/b", "_doc", "ü+%"]);
        assert!(segments("//").is_empty());
    }
}
