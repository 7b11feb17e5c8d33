//! `_bulk`: applies actions in their order and writes the answer as it goes.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Map, Value};

use super::action::{Action, Kind, parse};
use super::catalog::Catalog;
use super::failure::Failure;
use super::filter_path::Filter;
use super::index::{Document, Documents, Index, Outcome, Versioning, WriteRules, random_id};

/// What came with the request beside its body.
pub(super) struct Demands<'r> {
    /// The index in the path.
    pub(super) index: Option<&'r str>,
    pub(super) routing: Option<&'r str>,
    pub(super) require_alias: bool,
    /// `refresh=true`: said back for each item.
    pub(super) refreshed: bool,
    pub(super) filter: Option<&'r Filter>,
    /// Whether a missing index is made.
    pub(super) auto_create: bool,
    /// Items to reject on purpose: asked for each, in order, with its id.
    pub(super) reject: &'r dyn Fn(&str) -> Option<Failure>,
}

/// So many actions are applied at most under one hold of an index's lock.
const RUN: usize = 4096;

/// Applies `body` and returns the answer with the number of items.
pub(super) fn bulk(catalog: &Catalog, demands: &Demands<'_>, body: &[u8]) -> Result<(Vec<u8>, usize), Failure> {
    let started = Instant::now();
    let actions = parse(body)?;
    if demands.index.is_none() && actions.iter().any(|action| action.index.is_none()) {
        return Err(Failure::validation("index is missing"));
    }
    let count = actions.len();
    let mut answer = Answer::new(demands, count);
    let mut rest = actions.into_iter().peekable();
    let mut run = Vec::new();
    while let Some(first) = rest.next() {
        run.push(first);
        while run.len() < RUN
            && let Some(next) =
                rest.next_if(|next| next.index == run[0].index && next.require_alias == run[0].require_alias)
        {
            run.push(next);
        }
        let name = run[0].index.clone();
        let name = name.as_deref().or(demands.index).unwrap_or_default();
        apply_run(catalog, demands, name, run.drain(..), &mut answer);
    }
    Ok((answer.finish(started), count))
}

/// Applies actions that all name the index `name`.
fn apply_run<'a>(
    catalog: &Catalog,
    demands: &Demands<'_>,
    name: &str,
    run: impl ExactSizeIterator<Item = Action<'a>>,
    answer: &mut Answer<'_>,
) {
    let mut target: Option<(Arc<Index>, WriteRules)> = None;
    // What needs no lock is done before it is taken.
    let mut prepared = Vec::with_capacity(run.len());
    for action in run {
        let id = action.id.clone().unwrap_or_else(|| Cow::Owned(random_id(20)));
        if let Some(failure) = (demands.reject)(&id) {
            prepared.push((action.kind, id, Err(failure)));
            continue;
        }
        if target.is_none() {
            let external = matches!(action.versioning, Versioning::External(_) | Versioning::ExternalGte(_));
            let creates = demands.auto_create && (action.kind != Kind::Delete || external);
            let require_alias = action.require_alias.unwrap_or(demands.require_alias);
            match catalog.write_target(name, creates, require_alias) {
                Ok(index) => {
                    let rules = index.meta().write_rules();
                    target = Some((index, rules));
                }
                Err(mut failure) => {
                    if !demands.auto_create && failure.kind == "index_not_found_exception" && !require_alias {
                        failure.reason += " and [action.auto_create_index] is [false]";
                    }
                    prepared.push((action.kind, id, Err(failure)));
                    continue;
                }
            }
        }
        let Some((index, rules)) = &target else { continue };
        let step = prepare(&action, &id, demands, rules, index);
        prepared.push((action.kind, id, step));
    }
    let now = Instant::now();
    let mut documents = target.as_ref().map(|(index, rules)| (index.documents(), index, rules));
    let name = target.as_ref().map_or(name, |(index, _)| index.name.as_str());
    for (kind, id, step) in prepared {
        let (result, uuid) = match (&mut documents, step) {
            (Some((documents, index, rules)), Ok(step)) => {
                (apply(documents, &id, step, rules, now), Some(index.uuid.as_str()))
            }
            (held, Err(failure)) => (Err(failure), held.as_ref().map(|(_, index, _)| index.uuid.as_str())),
            (None, Ok(_)) => (Err(Failure::no_index(name)), None),
        };
        answer.item(kind, name, &id, uuid, &result);
    }
}

/// What is left to do under the lock.
enum Step {
    Index(Document, Versioning),
    Delete(Versioning),
    Update(Value, Versioning, Option<String>),
}

fn prepare(
    action: &Action<'_>,
    id: &str,
    demands: &Demands<'_>,
    rules: &WriteRules,
    index: &Index,
) -> Result<Step, Failure> {
    if rules.closed {
        return Err(Failure::closed(index));
    }
    if id.is_empty() {
        return Err(Failure::argument("if _id is specified it must not be empty"));
    }
    if rules.block_write {
        let reason = format!("index [{}] blocked by: [FORBIDDEN/8/index write (api)];", index.name);
        return Err(Failure::new(403, "cluster_block_exception", reason).about(&index.name));
    }
    if rules.block_delete_only {
        let reason = format!(
            "index [{}] blocked by: [TOO_MANY_REQUESTS/12/disk usage exceeded flood-stage watermark, index has read-only-allow-delete block];",
            index.name
        );
        return Err(Failure::new(429, "cluster_block_exception", reason).about(&index.name));
    }
    let routing = action.routing.as_deref().or(demands.routing);
    if action.kind == Kind::Delete {
        return Ok(Step::Delete(action.versioning));
    }
    let Some(source) = action.source else {
        return Err(Failure::new(400, "document_parsing_exception", "[1:1] failed to parse: invalid UTF-8"));
    };
    if action.kind == Kind::Update {
        let body: Value = serde_json::from_str(source)
            .map_err(|_| Failure::new(400, "x_content_parse_exception", "[1:1] failed to parse the update request"))?;
        if body.get("script").is_some() {
            return Err(Failure::argument("scripts are not supported by the local store"));
        }
        return Ok(Step::Update(body, action.versioning, routing.map(str::to_owned)));
    }
    rules.mapping.check(source, id, rules.ignore_malformed)?;
    Ok(Step::Index(Document::new(id, routing.unwrap_or_default(), source), action.versioning))
}

/// What an item comes to when it did not fail.
#[derive(Debug, PartialEq)]
enum Done {
    Created(i64, u64),
    Updated(i64, u64),
    Deleted(i64, u64),
    NotFound(i64, u64),
    /// An update that changed nothing.
    Noop(i64, u64),
}

fn apply(documents: &mut Documents, id: &str, step: Step, rules: &WriteRules, now: Instant) -> Result<Done, Failure> {
    let outcome = match step {
        Step::Index(document, versioning) => documents.index(document, versioning, now, rules.gc_deletes),
        Step::Delete(versioning) => documents.delete(id, versioning, now, rules.gc_deletes),
        Step::Update(body, versioning, routing) => {
            let current = documents.get(id).cloned();
            let source = match &current {
                None => match upsert(&body) {
                    Some(source) => source.clone(),
                    None => {
                        let reason = format!("[{id}]: document missing");
                        return Err(Failure::new(404, "document_missing_exception", reason));
                    }
                },
                Some(current) => {
                    let mut source: Value = serde_json::from_str(current.source()).unwrap_or(Value::Null);
                    let Some(Value::Object(doc)) = body.get("doc") else {
                        return Err(Failure::validation("script or doc is missing"));
                    };
                    let changed = merge(&mut source, doc);
                    if !changed && body.get("detect_noop") != Some(&Value::Bool(false)) {
                        return Ok(Done::Noop(current.version, current.seq));
                    }
                    source
                }
            };
            let source = source.to_string();
            rules.mapping.check(&source, id, rules.ignore_malformed)?;
            let routing = routing.as_deref().or(current.as_ref().and_then(|current| current.routing()));
            documents.index(Document::new(id, routing.unwrap_or_default(), &source), versioning, now, rules.gc_deletes)
        }
    };
    Ok(match outcome {
        Outcome::Created { version, seq } => Done::Created(version, seq),
        Outcome::Updated { version, seq } => Done::Updated(version, seq),
        Outcome::Deleted { version, seq } => Done::Deleted(version, seq),
        Outcome::NotFound { version, seq } => Done::NotFound(version, seq),
        Outcome::Conflict(reason) => return Err(Failure::new(409, "version_conflict_engine_exception", reason)),
    })
}

fn upsert(body: &Value) -> Option<&Value> {
    let doc_as_upsert = body.get("doc_as_upsert") == Some(&Value::Bool(true));
    body.get("upsert").or_else(|| body.get("doc").filter(|_| doc_as_upsert))
}

/// Merges `doc` into `source`, objects member by member. True if that changed anything.
fn merge(source: &mut Value, doc: &Map<String, Value>) -> bool {
    if !source.is_object() {
        *source = Value::Object(Map::new());
    }
    let Value::Object(members) = source else { return false };
    let mut changed = false;
    for (name, value) in doc {
        match (members.get_mut(name), value) {
            (Some(old @ Value::Object(_)), Value::Object(value)) => changed |= merge(old, value),
            (Some(old), value) if old == value => {}
            _ => {
                members.insert(name.clone(), value.clone());
                changed = true;
            }
        }
    }
    changed
}

/// Which fields of an item the `filter_path` keeps.
#[derive(Clone, Copy)]
struct Keep {
    index: bool,
    id: bool,
    version: bool,
    result: bool,
    forced_refresh: bool,
    shards: bool,
    seq_no: bool,
    primary_term: bool,
    status: bool,
    error_type: bool,
    error_reason: bool,
    error_uuid: bool,
    error_shard: bool,
    error_index: bool,
}

impl Keep {
    fn of(kind: Kind, filter: Option<&Filter>) -> Self {
        let keeps = |name: &str| filter.is_none_or(|filter| filter.keeps(&["items", kind.name(), name]));
        let keeps_error = |name: &str| filter.is_none_or(|filter| filter.keeps(&["items", kind.name(), "error", name]));
        Self {
            index: keeps("_index"),
            id: keeps("_id"),
            version: keeps("_version"),
            result: keeps("result"),
            forced_refresh: keeps("forced_refresh"),
            shards: filter.is_none_or(|filter| filter.keeps(&["items", kind.name(), "_shards", "total"])),
            seq_no: keeps("_seq_no"),
            primary_term: keeps("_primary_term"),
            status: keeps("status"),
            error_type: keeps_error("type"),
            error_reason: keeps_error("reason"),
            error_uuid: keeps_error("index_uuid"),
            error_shard: keeps_error("shard"),
            error_index: keeps_error("index"),
        }
    }
}

/// The answer while it is written.
struct Answer<'r> {
    demands: &'r Demands<'r>,
    out: Vec<u8>,
    /// Where `false` stands for `errors`; 0 if it does not.
    errors_at: usize,
    items_at: usize,
    any_item: bool,
    keep: [Keep; 4],
}

impl<'r> Answer<'r> {
    fn new(demands: &'r Demands<'r>, count: usize) -> Self {
        let filter = demands.filter;
        let mut out = Vec::with_capacity(64 + count * if filter.is_some() { 32 } else { 192 });
        out.push(b'{');
        let mut errors_at = 0;
        if filter.is_none_or(|filter| filter.keeps(&["errors"])) {
            out.extend_from_slice(b"\"errors\":");
            errors_at = out.len();
            out.extend_from_slice(b"false,");
        }
        let items_at = out.len();
        out.extend_from_slice(b"\"items\":[");
        Self { demands, out, errors_at, items_at, any_item: false, keep: Kind::ALL.map(|kind| Keep::of(kind, filter)) }
    }

    fn item(&mut self, kind: Kind, index: &str, id: &str, uuid: Option<&str>, result: &Result<Done, Failure>) {
        let keep = self.keep[kind as usize];
        if result.is_err() && self.errors_at > 0 {
            self.out[self.errors_at..self.errors_at + 5].copy_from_slice(b"true ");
        }
        let before = self.out.len();
        self.out.extend_from_slice(b"{\"");
        self.out.extend_from_slice(kind.name().as_bytes());
        self.out.extend_from_slice(b"\":{");
        let fields = self.out.len();
        let out = &mut self.out;
        if keep.index {
            text(out, "_index", index);
        }
        if keep.id {
            text(out, "_id", id);
        }
        match result {
            Ok(done) => {
                let (name, status, version, seq) = match *done {
                    Done::Created(version, seq) => ("created", 201, version, seq),
                    Done::Updated(version, seq) => ("updated", 200, version, seq),
                    Done::Deleted(version, seq) => ("deleted", 200, version, seq),
                    Done::NotFound(version, seq) => ("not_found", 404, version, seq),
                    Done::Noop(version, seq) => ("noop", 200, version, seq),
                };
                if keep.version {
                    number(out, "_version", version);
                }
                if keep.result {
                    text(out, "result", name);
                }
                if keep.forced_refresh && self.demands.refreshed {
                    out.extend_from_slice(b"\"forced_refresh\":true,");
                }
                if keep.shards {
                    out.extend_from_slice(b"\"_shards\":{\"total\":2,\"successful\":1,\"failed\":0},");
                }
                if keep.seq_no {
                    number(out, "_seq_no", seq);
                }
                if keep.primary_term {
                    number(out, "_primary_term", 1_u8);
                }
                if keep.status {
                    number(out, "status", status);
                }
            }
            Err(failure) => {
                if keep.status {
                    number(out, "status", failure.status);
                }
                let error = out.len();
                out.extend_from_slice(b"\"error\":{");
                let inside = out.len();
                if keep.error_type {
                    text(out, "type", &failure.kind);
                }
                if keep.error_reason {
                    text(out, "reason", &failure.reason);
                }
                if keep.error_uuid
                    && let Some(uuid) = uuid
                {
                    text(out, "index_uuid", uuid);
                }
                if keep.error_shard && uuid.is_some() {
                    text(out, "shard", "0");
                }
                if keep.error_index {
                    text(out, "index", index);
                }
                if out.len() == inside {
                    out.truncate(error);
                } else {
                    out.pop();
                    out.extend_from_slice(b"},");
                }
            }
        }
        if out.len() == fields {
            out.truncate(before);
            return;
        }
        out.pop();
        out.extend_from_slice(b"}},");
        self.any_item = true;
    }

    fn finish(mut self, started: Instant) -> Vec<u8> {
        if self.any_item {
            self.out.pop();
            self.out.extend_from_slice(b"],");
        } else {
            self.out.truncate(self.items_at);
        }
        if self.demands.filter.is_none_or(|filter| filter.keeps(&["took"])) {
            number(&mut self.out, "took", u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX));
        }
        if self.out.len() > 1 {
            self.out.pop();
        }
        self.out.push(b'}');
        self.out
    }
}

/// `"name":"value",`
fn text(out: &mut Vec<u8>, name: &str, value: &str) {
    out.push(b'"');
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
    // Writing to a Vec does not fail.
    let _ = serde_json::to_writer(&mut *out, value);
    out.push(b',');
}

/// `"name":value,`
fn number(out: &mut Vec<u8>, name: &str, value: impl itoa::Integer) {
    out.push(b'"');
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
    out.push(b',');
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn send(catalog: &Catalog, filter: Option<&str>, body: &str) -> Value {
        let filter = filter.and_then(Filter::parse);
        let demands = Demands {
            index: Some("t"),
            routing: None,
            require_alias: false,
            refreshed: false,
            filter: filter.as_ref(),
            auto_create: true,
            reject: &|id| (id == "bad").then(|| Failure::new(429, "es_rejected_execution_exception", "full")),
        };
        let (answer, count) = bulk(catalog, &demands, body.as_bytes()).unwrap();
        assert_eq!(count, body.matches("\"_id\"").count());
        serde_json::from_slice(&answer).unwrap()
    }

    #[test]
    fn answers_item_by_item() {
        let catalog = Catalog::default();
        let body = "{\"index\":{\"_id\":\"1\"}}\n{\"a\":1}\n{\"create\":{\"_id\":\"1\"}}\n{}\n{\"delete\":{\"_id\":\"2\"}}\n{\"index\":{\"_id\":\"bad\"}}\n{}\n";
        let answer = send(&catalog, None, body);
        assert_eq!(answer["errors"], true);
        assert_eq!(
            answer["items"][0]["index"],
            json!({"_index": "t", "_id": "1", "_version": 1, "result": "created", "_seq_no": 0, "_primary_term": 1,
                "_shards": {"total": 2, "successful": 1, "failed": 0}, "status": 201})
        );
        assert_eq!(answer["items"][1]["create"]["status"], 409);
        assert_eq!(answer["items"][1]["create"]["error"]["type"], "version_conflict_engine_exception");
        assert_eq!(answer["items"][2]["delete"]["result"], "not_found");
        assert_eq!(answer["items"][3]["index"]["status"], 429);
        assert!(catalog.resolve("t", false).unwrap()[0].documents().get("bad").is_none());
    }

    #[test]
    fn filters_the_answer() {
        let catalog = Catalog::default();
        let body = "{\"index\":{\"_id\":\"1\"}}\n{}\n{\"delete\":{\"_id\":\"2\"}}\n";
        let usual = "errors,items.*.status,items.*.error.type,items.*.error.reason";
        let answer = send(&catalog, Some(usual), body);
        assert_eq!(
            answer,
            json!({"errors": false, "items": [{"index": {"status": 201}}, {"delete": {"status": 404}}]})
        );
        let answer = send(&catalog, Some(usual), "{\"index\":{\"_id\":\"bad\"}}\n{}\n");
        assert_eq!(
            answer,
            json!({"errors": true, "items": [{"index": {"status": 429, "error": {"type": "es_rejected_execution_exception", "reason": "full"}}}]})
        );
        assert_eq!(send(&catalog, Some("items.*.error"), body), json!({}));
        assert_eq!(send(&catalog, Some("errors"), body), json!({"errors": false}));
        let answer = send(&catalog, Some("-took,-items.*._shards"), body);
        assert_eq!(answer["items"][0]["index"]["_version"], 4);
        assert!(answer.get("took").is_none() && answer["items"][0]["index"].get("_shards").is_none());
    }

    #[test]
    fn updates_merge_upsert_and_refuse_scripts() {
        let catalog = Catalog::default();
        let update = |body: &str| {
            let answer = send(&catalog, None, &format!("{{\"update\":{{\"_id\":\"1\"}}}}\n{body}\n"));
            let item = &answer["items"][0]["update"];
            (
                item["status"].as_u64().unwrap(),
                item["result"].as_str().or(item["error"]["type"].as_str()).unwrap().to_owned(),
            )
        };
        let is = |status: u64, text: &str| (status, text.to_owned());
        assert_eq!(update(r#"{"doc":{"a":1}}"#), is(404, "document_missing_exception"));
        assert_eq!(update(r#"{"doc":{"a":{"b":1}},"doc_as_upsert":true}"#), is(201, "created"));
        assert_eq!(update(r#"{"doc":{"a":{"c":2}}}"#), is(200, "updated"));
        assert_eq!(update(r#"{"doc":{"a":{"c":2}}}"#), is(200, "noop"));
        assert_eq!(update(r#"{"script":{"source":"x"}}"#), is(400, "illegal_argument_exception"));
        let index = catalog.resolve("t", false).unwrap().remove(0);
        assert_eq!(index.documents().get("1").unwrap().source(), r#"{"a":{"b":1,"c":2}}"#);
    }
}
