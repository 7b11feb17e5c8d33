//! One search: what it asks for, which documents it finds, how they are shown.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::failure::Failure;
use super::fields::Mapping;
use super::filter_path::Filter;
use super::index::{Document, Index};
use super::query::{Query, Subject, compare};

/// The documents of some indices at one moment.
pub(super) struct View {
    parts: Vec<Part>,
}

struct Part {
    index: Arc<Index>,
    mapping: Arc<Mapping>,
    /// In the order of their sequence numbers, which stand beside them: sorting then need not follow pointers.
    documents: Vec<(u64, Arc<Document>)>,
}

/// A place in a view: which part, and the sequence number there.
const PART_SHIFT: u32 = 48;

impl View {
    /// `query`: leaves out what it can tell at a glance not to match.
    pub(super) fn of(indices: Vec<Arc<Index>>, query: Option<&Query>) -> Result<Self, Failure> {
        let mut parts = Vec::with_capacity(indices.len());
        for index in indices {
            let mapping = {
                let meta = index.meta();
                if meta.closed {
                    return Err(Failure::closed(&index));
                }
                Arc::clone(&meta.mapping)
            };
            let mut documents: Vec<_> = {
                let held = index.documents();
                match query.and_then(Query::ids) {
                    Some(ids) => {
                        ids.iter().filter_map(|id| held.get(id)).map(|found| (found.seq, Arc::clone(found))).collect()
                    }
                    None => held.all().map(|found| (found.seq, Arc::clone(found))).collect(),
                }
            };
            documents.sort_unstable_by_key(|(seq, _)| *seq);
            parts.push(Part { index, mapping, documents });
        }
        Ok(Self { parts })
    }

    fn len(&self) -> usize {
        self.parts.iter().map(|part| part.documents.len()).sum()
    }

    /// The matching documents behind `after` (a place) in the order of their places.
    pub(super) fn matching<'v>(
        &'v self,
        query: &'v Query,
        slice: Option<(u64, u64)>,
        after: Option<u64>,
    ) -> impl Iterator<Item = Found> + 'v {
        self.parts.iter().enumerate().flat_map(move |(number, part)| {
            let base = (number as u64) << PART_SHIFT;
            let start = match after {
                Some(after) => part.documents.partition_point(|(seq, _)| base + seq <= after),
                None => 0,
            };
            part.documents[start..].iter().filter_map(move |(seq, document)| {
                if let Some((id, max)) = slice
                    && foldhash::quality::FixedState::default().hash_one(document.id()) % max != id
                {
                    return None;
                }
                let subject = Subject::new(document, &part.index.name, &part.mapping);
                query.matches(&subject).then(|| Found {
                    document: Arc::clone(document),
                    index: Arc::clone(&part.index),
                    place: base + seq,
                    sort: Vec::new(),
                })
            })
        })
    }
}

/// A hit.
pub(super) struct Found {
    pub(super) document: Arc<Document>,
    pub(super) index: Arc<Index>,
    place: u64,
    sort: Vec<Value>,
}

/// What one search asks for.
pub(super) struct Search {
    pub(super) query: Query,
    slice: Option<(u64, u64)>,
    sort: Vec<SortBy>,
    explicit_sort: bool,
    search_after: Option<Vec<Value>>,
    pub(super) from: usize,
    pub(super) size: usize,
    /// Hits to count at most; none counts all.
    pub(super) track: Option<usize>,
    pub(super) shape: Shape,
}

/// What a hit shows.
pub(super) struct Shape {
    source: SourceFilter,
    version: bool,
    seq_no: bool,
    scored: bool,
}

struct SortBy {
    what: SortKey,
    descending: bool,
    missing_first: bool,
}

enum SortKey {
    Place,
    Id,
    Score,
    Field(String),
}

/// `_source`: all, none or some.
pub(super) enum SourceFilter {
    All,
    None,
    Some(Filter),
}

impl SourceFilter {
    /// From `_source` in a body.
    pub(super) fn of(json: Option<&Value>) -> Self {
        let list = |value: Option<&Value>| -> Vec<String> {
            match value {
                Some(Value::String(name)) => vec![name.clone()],
                Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
                _ => Vec::new(),
            }
        };
        let some = |include: Vec<String>, exclude: Vec<String>| {
            if include.is_empty() && exclude.is_empty() {
                return Self::All;
            }
            Self::Some(Filter::of(include.iter().map(String::as_str), exclude.iter().map(String::as_str)))
        };
        match json {
            None | Some(Value::Bool(true) | Value::Null) => Self::All,
            Some(Value::Bool(false)) => Self::None,
            Some(Value::Object(members)) => some(
                list(members.get("includes").or_else(|| members.get("include"))),
                list(members.get("excludes").or_else(|| members.get("exclude"))),
            ),
            listed => some(list(listed), Vec::new()),
        }
    }

    /// From the query parameters `_source`, `_source_includes` and `_source_excludes`. None: they say nothing.
    pub(super) fn of_params(params: &HashMap<String, String>) -> Option<Self> {
        let split = |name: &str| params.get(name).map(|text| text.split(',').map(str::to_owned).collect::<Vec<_>>());
        match params.get("_source").map(String::as_str) {
            Some("false") => return Some(Self::None),
            Some("true" | "") => return Some(Self::All),
            _ => {}
        }
        let include = split("_source_includes").or_else(|| split("_source"));
        let exclude = split("_source_excludes");
        if include.is_none() && exclude.is_none() {
            return None;
        }
        Some(Self::of(Some(
            &json!({ "includes": include.unwrap_or_default(), "excludes": exclude.unwrap_or_default() }),
        )))
    }

    /// Writes `,"_source":...` unless nothing is wanted.
    pub(super) fn write(&self, source: &str, out: &mut String) {
        match self {
            Self::None => {}
            Self::All => {
                out.push_str(",\"_source\":");
                out.push_str(source);
            }
            Self::Some(filter) => {
                out.push_str(",\"_source\":");
                out.push_str(&filter.apply(source));
            }
        }
    }
}

const KNOWN: [&str; 17] = [
    "query",
    "size",
    "from",
    "sort",
    "_source",
    "version",
    "seq_no_primary_term",
    "search_after",
    "track_total_hits",
    "pit",
    "slice",
    "track_scores",
    "timeout",
    "terminate_after",
    "explain",
    "profile",
    "stored_fields",
];

impl Search {
    pub(super) fn parse(body: &Value, params: &HashMap<String, String>, scrolls: bool) -> Result<Self, Failure> {
        if let Some(key) = body.as_object().and_then(|body| body.keys().find(|key| !KNOWN.contains(&key.as_str()))) {
            return Err(Failure::parsing(format!("unknown key [{key}]; the local store does not know it")));
        }
        let number = |name: &str, default: usize| match body.get(name) {
            Some(value) => value
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| Failure::argument(format!("[{name}] parameter cannot be negative, found [{value}]"))),
            None => match params.get(name) {
                Some(text) => {
                    text.parse().map_err(|_| Failure::argument(format!("Failed to parse int parameter [{name}]")))
                }
                None => Ok(default),
            },
        };
        let (from, size) = (number("from", 0)?, number("size", 10)?);
        let window = from.saturating_add(size);
        if window > 10_000 {
            let reason = if scrolls {
                format!("Batch size is too large, size must be less than or equal to: [10000] but was [{size}].")
            } else {
                format!(
                    "Result window is too large, from + size must be less than or equal to: [10000] but was [{window}]."
                )
            };
            return Err(Failure::argument(reason));
        }
        let sort = match (body.get("sort"), params.get("sort")) {
            (Some(sort), _) => parse_sort(sort)?,
            (None, Some(text)) => {
                let parts = text.split(',').map(|part| match part.rsplit_once(':') {
                    Some((field, order)) => json!({ field: order }),
                    None => json!(part),
                });
                parse_sort(&Value::Array(parts.collect()))?
            }
            (None, None) => Vec::new(),
        };
        let flag = |name: &str| {
            body.get(name).map_or_else(|| params.get(name).is_some_and(|v| v != "false"), |value| value == &json!(true))
        };
        let track = match body.get("track_total_hits").cloned().or_else(|| {
            params.get("track_total_hits").map(|text| serde_json::from_str(text).unwrap_or(Value::Bool(true)))
        }) {
            Some(Value::Bool(true)) => None,
            Some(Value::Bool(false)) => Some(0),
            Some(value) => Some(value.as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(10_000)),
            // A scroll counts all, as it has gone through all anyhow.
            None if scrolls => None,
            None => Some(10_000),
        };
        let slice = match body.get("slice") {
            None => None,
            Some(slice) => match (slice.get("id").and_then(Value::as_u64), slice.get("max").and_then(Value::as_u64)) {
                (Some(id), Some(max)) if id < max => Some((id, max)),
                _ => return Err(Failure::argument("[slice] max must be greater than id")),
            },
        };
        let scored = sort.is_empty() || sort.iter().any(|by| matches!(by.what, SortKey::Score));
        let source = match body.get("_source") {
            None => SourceFilter::of_params(params).unwrap_or(SourceFilter::All),
            some => SourceFilter::of(some),
        };
        Ok(Self {
            query: Query::parse(body.get("query"))?,
            slice,
            explicit_sort: !sort.is_empty(),
            sort,
            search_after: match body.get("search_after") {
                None => None,
                Some(Value::Array(values)) => Some(values.clone()),
                Some(_) => return Err(Failure::parsing("[search_after] expected an array")),
            },
            from,
            size,
            track,
            shape: Shape { source, version: flag("version"), seq_no: flag("seq_no_primary_term"), scored },
        })
    }

    /// A point in time sorts by place behind all else, and shows it.
    pub(super) fn in_point(&mut self) {
        if !self.sort.iter().any(|by| matches!(by.what, SortKey::Place)) {
            self.sort.push(SortBy { what: SortKey::Place, descending: false, missing_first: false });
        }
        self.explicit_sort = true;
    }

    /// The hits of this page, and how many there are in all: the number, and whether there are more.
    pub(super) fn run(&self, view: &View) -> Result<(Vec<Found>, usize, bool), Failure> {
        let by_place = match self.sort.as_slice() {
            [] => true,
            [by, ..] => matches!(by.what, SortKey::Place) && !by.descending,
        };
        if by_place && self.sort.len() <= 2 {
            return self.run_by_place(view);
        }
        let mut found: Vec<Found> = view.matching(&self.query, self.slice, None).collect();
        let total = found.len();
        for hit in &mut found {
            hit.sort = self.sort_values(hit);
        }
        found.sort_by(|a, b| self.order(&a.sort, &b.sort).then(a.place.cmp(&b.place)));
        if let Some(after) = &self.search_after {
            if after.len() != self.sort.len() {
                return Err(Failure::argument(format!(
                    "search_after has {} value(s) but sort has {}.",
                    after.len(),
                    self.sort.len()
                )));
            }
            let start = found.partition_point(|hit| self.order(&hit.sort, after).is_le());
            found.drain(..start);
        }
        let page: Vec<Found> = found.into_iter().skip(self.from).take(self.size).collect();
        Ok((page, total, false))
    }

    /// Without a look at what lies behind the page, as far as the count allows.
    fn run_by_place(&self, view: &View) -> Result<(Vec<Found>, usize, bool), Failure> {
        let after = match self.search_after.as_deref() {
            None => None,
            Some([first, ..]) if self.explicit_sort => {
                Some(first.as_u64().ok_or_else(|| Failure::argument("search_after: a whole number is needed"))?)
            }
            Some(_) => return Err(Failure::argument("Sort must contain at least one field when using search_after.")),
        };
        let mut page: Vec<Found> =
            view.matching(&self.query, self.slice, after).skip(self.from).take(self.size).collect();
        if self.explicit_sort {
            for hit in &mut page {
                hit.sort = self.sort.iter().map(|_| json!(hit.place)).collect();
            }
        }
        let most = self.track.unwrap_or(usize::MAX);
        let counted = if matches!(self.query, Query::All) && self.slice.is_none() {
            view.len()
        } else {
            view.matching(&self.query, self.slice, None).take(most.saturating_add(1)).count()
        };
        Ok((page, counted.min(most), counted > most))
    }

    fn sort_values(&self, hit: &Found) -> Vec<Value> {
        let value = |by: &SortBy| match &by.what {
            SortKey::Place => json!(hit.place),
            SortKey::Id => json!(hit.document.id()),
            SortKey::Score => json!(1.0),
            SortKey::Field(field) => {
                let mapping = &hit.index.meta().mapping;
                let mut values = Subject::new(&hit.document, &hit.index.name, mapping).values(field);
                values.sort_by(|a, b| compare(a, b).unwrap_or(Ordering::Equal));
                let chosen = if by.descending { values.pop() } else { values.into_iter().next() };
                chosen.unwrap_or(Value::Null)
            }
        };
        self.sort.iter().map(value).collect()
    }

    fn order(&self, a: &[Value], b: &[Value]) -> Ordering {
        for ((by, a), b) in self.sort.iter().zip(a).zip(b) {
            let order = match (a.is_null(), b.is_null()) {
                (true, true) => Ordering::Equal,
                (true, false) if by.missing_first => Ordering::Less,
                (true, false) => Ordering::Greater,
                (false, true) if by.missing_first => Ordering::Greater,
                (false, true) => Ordering::Less,
                (false, false) => {
                    let order = compare(a, b).unwrap_or(Ordering::Equal);
                    if by.descending { order.reverse() } else { order }
                }
            };
            if order.is_ne() {
                return order;
            }
        }
        Ordering::Equal
    }
}

fn parse_sort(json: &Value) -> Result<Vec<SortBy>, Failure> {
    let one = |name: &str, options: Option<&Value>| {
        let order = options.and_then(|options| options.get("order").unwrap_or(options).as_str());
        let what = match name {
            "_doc" | "_shard_doc" => SortKey::Place,
            "_id" => SortKey::Id,
            "_score" => SortKey::Score,
            field => SortKey::Field(field.to_owned()),
        };
        let descending = order.map_or(matches!(what, SortKey::Score), |order| order == "desc");
        let missing_first = options.and_then(|options| options.get("missing")) == Some(&json!("_first"));
        SortBy { what, descending, missing_first }
    };
    let mut sort = Vec::new();
    let items = match json {
        Value::Array(items) => items.as_slice(),
        other => std::slice::from_ref(other),
    };
    for item in items {
        match item {
            Value::String(name) => sort.push(one(name, None)),
            Value::Object(members) => sort.extend(members.iter().map(|(name, options)| one(name, Some(options)))),
            _ => return Err(Failure::parsing("[sort] malformed sort format, expected strings or objects")),
        }
    }
    Ok(sort)
}

pub(super) fn write_answer(
    hits: &[Found],
    total: Option<(usize, bool)>,
    shape: &Shape,
    id: Option<(&str, &str)>,
) -> String {
    let mut head = Map::new();
    if let Some((name, id)) = id {
        head.insert(name.to_owned(), json!(id));
    }
    head.insert("took".to_owned(), json!(1));
    head.insert("timed_out".to_owned(), json!(false));
    head.insert("_shards".to_owned(), json!({ "total": 1, "successful": 1, "skipped": 0, "failed": 0 }));
    let mut out = Value::Object(head).to_string();
    out.pop();
    out.push_str(",\"hits\":{");
    if let Some((total, more)) = total {
        let relation = if more { "gte" } else { "eq" };
        out.push_str(&format!("\"total\":{{\"value\":{total},\"relation\":\"{relation}\"}},"));
    }
    out.push_str(if shape.scored && !hits.is_empty() { "\"max_score\":1.0," } else { "\"max_score\":null," });
    out.push_str("\"hits\":[");
    for (number, hit) in hits.iter().enumerate() {
        if number > 0 {
            out.push(',');
        }
        write_hit(hit, shape, &mut out);
    }
    out.push_str("]}}");
    out
}

fn write_hit(hit: &Found, shape: &Shape, out: &mut String) {
    let document = &hit.document;
    out.push_str(&format!("{{\"_index\":{},\"_id\":{}", json!(hit.index.name), json!(document.id())));
    if shape.version {
        out.push_str(&format!(",\"_version\":{}", document.version));
    }
    if shape.seq_no {
        out.push_str(&format!(",\"_seq_no\":{},\"_primary_term\":1", document.seq));
    }
    out.push_str(if shape.scored { ",\"_score\":1.0" } else { ",\"_score\":null" });
    if let Some(routing) = document.routing() {
        out.push_str(&format!(",\"_routing\":{}", json!(routing)));
    }
    shape.source.write(document.source(), out);
    if !hit.sort.is_empty() {
        out.push_str(&format!(",\"sort\":{}", Value::Array(hit.sort.clone())));
    }
    out.push('}');
}
