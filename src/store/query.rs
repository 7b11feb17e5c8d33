//! Queries: which documents match.

use std::cell::OnceCell;
use std::cmp::Ordering;
use std::collections::HashSet;

use serde_json::{Map, Value};

use super::failure::Failure;
use super::fields::Mapping;
use super::filter_path::glob;
use super::index::Document;

/// A query of the kinds that the store knows.
#[derive(Debug)]
pub(super) enum Query {
    All,
    None,
    Ids(HashSet<String>),
    Term { field: String, values: Vec<Value> },
    Range { field: String, bounds: Vec<(Bound, Value)> },
    Exists(String),
    Prefix { field: String, prefix: String },
    Wildcard { field: String, pattern: String },
    Match { field: String, tokens: Vec<String>, all: bool, value: Value },
    Bool { must: Vec<Query>, should: Vec<Query>, must_not: Vec<Query>, at_least: usize },
}

/// A bound of a range.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bound {
    Gt,
    Gte,
    Lt,
    Lte,
}

impl Query {
    /// From the JSON of a query. None: all documents.
    pub(super) fn parse(json: Option<&Value>) -> Result<Self, Failure> {
        let Some(json) = json else { return Ok(Self::All) };
        let members = object(json, "query")?;
        let mut members = members.iter();
        let (Some((kind, body)), None) = (members.next(), members.next()) else {
            return Err(Failure::parsing("[query] malformed query, expected exactly one kind of query"));
        };
        match kind.as_str() {
            "match_all" => Ok(Self::All),
            "match_none" => Ok(Self::None),
            "ids" => Ok(Self::Ids(strings(body.get("values"), "ids")?.into_iter().collect())),
            "exists" => Ok(Self::Exists(string(body.get("field"), "exists")?)),
            "term" => {
                let (field, value) = one_field(body, kind)?;
                let value = value.get("value").unwrap_or(value).clone();
                Ok(Self::Term { field, values: vec![value] })
            }
            "terms" => {
                let (field, values) = one_field(body, kind)?;
                let Value::Array(values) = values else {
                    return Err(Failure::parsing("[terms] query requires an array of values"));
                };
                Ok(Self::Term { field, values: values.clone() })
            }
            "prefix" => {
                let (field, value) = one_field(body, kind)?;
                Ok(Self::Prefix { field, prefix: string(Some(value.get("value").unwrap_or(value)), kind)? })
            }
            "wildcard" => {
                let (field, value) = one_field(body, kind)?;
                Ok(Self::Wildcard { field, pattern: string(Some(value.get("value").unwrap_or(value)), kind)? })
            }
            "match" => {
                let (field, value) = one_field(body, kind)?;
                let all = value.get("operator").and_then(Value::as_str).is_some_and(|o| o.eq_ignore_ascii_case("and"));
                let value = value.get("query").unwrap_or(value).clone();
                Ok(Self::Match { field, tokens: tokens(&plain(&value)), all, value })
            }
            "range" => {
                let (field, body) = one_field(body, kind)?;
                let mut bounds = Vec::new();
                for (name, value) in object(body, kind)? {
                    let bound = match name.as_str() {
                        "gt" => Bound::Gt,
                        "gte" => Bound::Gte,
                        "lt" => Bound::Lt,
                        "lte" => Bound::Lte,
                        "format" | "time_zone" | "boost" => continue,
                        other => return Err(Failure::parsing(format!("[range] query does not support [{other}]"))),
                    };
                    if !value.is_null() {
                        bounds.push((bound, value.clone()));
                    }
                }
                Ok(Self::Range { field, bounds })
            }
            "constant_score" => Self::parse(body.get("filter")),
            "bool" => {
                let body = object(body, kind)?;
                let known = ["must", "filter", "should", "must_not", "minimum_should_match", "boost"];
                if let Some(other) = body.keys().find(|key| !known.contains(&key.as_str())) {
                    return Err(Failure::parsing(format!("[bool] query does not support [{other}]")));
                }
                let mut must = clauses(body.get("must"))?;
                must.extend(clauses(body.get("filter"))?);
                let should = clauses(body.get("should"))?;
                let default = u64::from(must.is_empty() && !should.is_empty());
                let at_least = body.get("minimum_should_match").and_then(Value::as_u64).unwrap_or(default);
                let at_least = usize::try_from(at_least).unwrap_or(usize::MAX);
                Ok(Self::Bool { must, should, must_not: clauses(body.get("must_not"))?, at_least })
            }
            other => Err(Failure::parsing(format!("unknown query [{other}]; the local store has a few kinds only"))),
        }
    }

    /// The ids that alone can match, if the query says so.
    pub(super) fn ids(&self) -> Option<&HashSet<String>> {
        match self {
            Self::Ids(ids) => Some(ids),
            Self::Bool { must, .. } => must.iter().find_map(Self::ids),
            _ => None,
        }
    }

    pub(super) fn matches(&self, subject: &Subject<'_>) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Ids(ids) => ids.contains(subject.document.id()),
            Self::Term { field, values } => {
                let text = subject.mapping.is_text(field);
                subject.any(field, |found| {
                    values.iter().any(|value| {
                        equal(found, value)
                            || (text && tokens(&plain(found)).iter().any(|token| *token == plain(value)))
                    })
                })
            }
            Self::Exists(field) => subject.any(field, |_| true),
            Self::Prefix { field, prefix } => subject.any(field, |found| plain(found).starts_with(prefix.as_str())),
            Self::Wildcard { field, pattern } => subject.any(field, |found| glob(pattern, &plain(found))),
            Self::Match { field, tokens: wanted, all, value } => {
                let whole = subject.mapping.has(field) && !subject.mapping.is_text(field);
                subject.any(field, |found| {
                    if whole || !found.is_string() {
                        return equal(found, value);
                    }
                    let have = tokens(&plain(found));
                    let hit = |token: &String| have.contains(token);
                    if *all { wanted.iter().all(hit) } else { wanted.iter().any(hit) }
                })
            }
            Self::Range { field, bounds } => subject.any(field, |found| {
                bounds.iter().all(|(bound, value)| {
                    compare(found, value).is_some_and(|order| match bound {
                        Bound::Gt => order.is_gt(),
                        Bound::Gte => order.is_ge(),
                        Bound::Lt => order.is_lt(),
                        Bound::Lte => order.is_le(),
                    })
                })
            }),
            Self::Bool { must, should, must_not, at_least } => {
                must.iter().all(|query| query.matches(subject))
                    && !must_not.iter().any(|query| query.matches(subject))
                    && should.iter().filter(|query| query.matches(subject)).take(*at_least).count() >= *at_least
            }
        }
    }
}

/// A document under a query. Its source is read at most once, and only if a query asks for a field.
pub(super) struct Subject<'d> {
    pub(super) document: &'d Document,
    index: &'d str,
    mapping: &'d Mapping,
    source: OnceCell<Value>,
}

impl<'d> Subject<'d> {
    pub(super) fn new(document: &'d Document, index: &'d str, mapping: &'d Mapping) -> Self {
        Self { document, index, mapping, source: OnceCell::new() }
    }

    fn source(&self) -> &Value {
        self.source.get_or_init(|| serde_json::from_str(self.document.source()).unwrap_or(Value::Null))
    }

    /// The values of `field`; arrays taken apart, nulls left out.
    pub(super) fn values(&self, field: &str) -> Vec<Value> {
        let mut found = Vec::new();
        self.any(field, |value| {
            found.push(value.clone());
            false
        });
        found
    }

    fn any(&self, field: &str, mut test: impl FnMut(&Value) -> bool) -> bool {
        let meta = match field {
            "_id" => Some(self.document.id()),
            "_index" => Some(self.index),
            "_routing" => return self.document.routing().is_some_and(|routing| test(&routing.into())),
            _ => None,
        };
        if let Some(meta) = meta {
            return test(&meta.into());
        }
        let mut seen = false;
        let mut visit = |value: &Value| {
            seen = true;
            test(value)
        };
        if walk(self.source(), field, &mut visit) {
            return true;
        }
        // `name.keyword` is the value of `name`.
        match field.rsplit_once('.') {
            Some((parent, _)) if !seen => walk(self.source(), parent, &mut |value| !value.is_object() && test(value)),
            _ => false,
        }
    }
}

/// Calls `test` with the values at the dotted `path` until it says true.
fn walk(value: &Value, path: &str, test: &mut dyn FnMut(&Value) -> bool) -> bool {
    match value {
        Value::Array(elements) => elements.iter().any(|element| walk(element, path, test)),
        _ if path.is_empty() => !value.is_null() && test(value),
        Value::Object(members) => {
            // A member's name may hold dots itself: try each cut.
            if let Some(found) = members.get(path)
                && walk(found, "", test)
            {
                return true;
            }
            path.match_indices('.')
                .any(|(at, _)| members.get(&path[..at]).is_some_and(|below| walk(below, &path[at + 1..], test)))
        }
        _ => false,
    }
}

/// Numbers as numbers, text as text. None: cannot be compared.
pub(super) fn compare(a: &Value, b: &Value) -> Option<Ordering> {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => match (a.as_i64(), b.as_i64()) {
            (Some(a), Some(b)) => Some(a.cmp(&b)),
            _ => a.as_f64()?.partial_cmp(&b.as_f64()?),
        },
        (Value::String(a), Value::String(b)) => Some(a.cmp(b)),
        (Value::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
        (Value::Number(_), Value::String(text)) => {
            compare(a, &serde_json::from_str::<serde_json::Number>(text).ok()?.into())
        }
        (Value::String(text), Value::Number(_)) => {
            compare(&serde_json::from_str::<serde_json::Number>(text).ok()?.into(), b)
        }
        _ => None,
    }
}

fn equal(a: &Value, b: &Value) -> bool {
    compare(a, b).map_or_else(|| plain(a) == plain(b), Ordering::is_eq)
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn tokens(text: &str) -> Vec<String> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|token| !token.is_empty()).map(str::to_lowercase).collect()
}

fn object<'v>(json: &'v Value, of: &str) -> Result<&'v Map<String, Value>, Failure> {
    json.as_object().ok_or_else(|| Failure::parsing(format!("[{of}] expected an object")))
}

fn one_field<'v>(body: &'v Value, kind: &str) -> Result<(String, &'v Value), Failure> {
    let mut members = object(body, kind)?.iter().filter(|(name, _)| *name != "boost");
    match (members.next(), members.next()) {
        (Some((field, value)), None) => Ok((field.clone(), value)),
        _ => Err(Failure::parsing(format!("[{kind}] query expects exactly one field"))),
    }
}

fn string(value: Option<&Value>, of: &str) -> Result<String, Failure> {
    value
        .and_then(Value::as_str)
        .map(str::to_owned)
        .ok_or_else(|| Failure::parsing(format!("[{of}] expected a string")))
}

fn strings(value: Option<&Value>, of: &str) -> Result<Vec<String>, Failure> {
    match value {
        Some(Value::Array(values)) => Ok(values.iter().map(plain).collect()),
        Some(value @ (Value::String(_) | Value::Number(_))) => Ok(vec![plain(value)]),
        _ => Err(Failure::parsing(format!("[{of}] requires values"))),
    }
}

fn clauses(value: Option<&Value>) -> Result<Vec<Query>, Failure> {
    match value {
        None => Ok(Vec::new()),
        Some(Value::Array(queries)) => queries.iter().map(|query| Query::parse(Some(query))).collect(),
        Some(query) => Ok(vec![Query::parse(Some(query))?]),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn matches(query: &Value, source: &str) -> bool {
        let mapping =
            Mapping::parse(&json!({"properties": {"k": {"type": "keyword"}, "t": {"type": "text"}}})).unwrap();
        let document = Document::new("7", "r", source);
        Query::parse(Some(query)).unwrap().matches(&Subject::new(&document, "i", &mapping))
    }

    #[test]
    fn terms_find_values_wherever_they_are() {
        let source = r#"{"n":1,"k":"a b","t":"Quick Fox","l":["x","y"],"o":{"p":[{"q":2},{"q":3}]},"d.e":{"f":true}}"#;
        for (field, value) in [
            ("n", json!(1)),
            ("n", json!("1")),
            ("n", json!(1.0)),
            ("k", json!("a b")),
            ("t", json!("fox")),
            ("l", json!("y")),
            ("o.p.q", json!(3)),
            ("d.e.f", json!(true)),
            ("k.keyword", json!("a b")),
            ("_id", json!("7")),
            ("_routing", json!("r")),
        ] {
            assert!(matches(&json!({"term": {field: value}}), source), "{field}");
            assert!(matches(&json!({"terms": {field: ["no", value]}}), source), "{field}");
        }
        for (field, value) in
            [("n", json!(2)), ("k", json!("a")), ("t", json!("Quick")), ("missing", json!(null)), ("o", json!(1))]
        {
            assert!(!matches(&json!({"term": {field: {"value": value}}}), source), "{field}");
        }
    }

    #[test]
    fn ranges_compare_numbers_and_text() {
        let source = r#"{"n":9223372036854775807,"f":1.5,"d":"2024-02-01"}"#;
        assert!(matches(&json!({"range": {"n": {"gt": 9_223_372_036_854_775_806_i64}}}), source));
        assert!(!matches(&json!({"range": {"n": {"lt": 9_223_372_036_854_775_807_i64}}}), source));
        assert!(matches(&json!({"range": {"f": {"gte": 1.5, "lte": 1.5}}}), source));
        assert!(matches(&json!({"range": {"d": {"gte": "2024-01-01", "lt": "2024-03-01"}}}), source));
        assert!(!matches(&json!({"range": {"missing": {"lt": 1}}}), source));
    }

    #[test]
    fn bool_combines() {
        let source = r#"{"a":1,"b":2}"#;
        let (a, b, c) = (json!({"term": {"a": 1}}), json!({"term": {"b": 2}}), json!({"term": {"c": 3}}));
        assert!(matches(&json!({"bool": {"must": [a], "filter": b, "must_not": c}}), source));
        assert!(!matches(&json!({"bool": {"must": [a, c]}}), source));
        assert!(!matches(&json!({"bool": {"must_not": [a]}}), source));
        assert!(
            matches(&json!({"bool": {"should": [a, c]}}), source)
                && !matches(&json!({"bool": {"should": [c]}}), source)
        );
        assert!(matches(&json!({"bool": {"must": a, "should": [c]}}), source));
        assert!(!matches(&json!({"bool": {"should": [a, c], "minimum_should_match": 2}}), source));
        assert!(matches(&json!({"bool": {}}), source));
    }

    #[test]
    fn the_rest() {
        let source = r#"{"k":"abc","t":"Quick brown fox","z":null}"#;
        assert!(matches(&json!({"match": {"t": "FOX jumps"}}), source));
        assert!(!matches(&json!({"match": {"t": {"query": "fox jumps", "operator": "and"}}}), source));
        assert!(!matches(&json!({"match": {"k": "ab"}}), source) && matches(&json!({"match": {"k": "abc"}}), source));
        assert!(
            matches(&json!({"exists": {"field": "k"}}), source) && !matches(&json!({"exists": {"field": "z"}}), source)
        );
        assert!(
            matches(&json!({"prefix": {"k": "ab"}}), source)
                && matches(&json!({"wildcard": {"k": {"value": "a*c"}}}), source)
        );
        assert!(
            matches(&json!({"ids": {"values": ["7", 8]}}), source)
                && !matches(&json!({"ids": {"values": [8]}}), source)
        );
        assert!(!matches(&json!({"match_none": {}}), source));
        let failure = Query::parse(Some(&json!({"fuzzy": {"a": 1}}))).unwrap_err();
        assert_eq!((failure.status, failure.kind.as_str()), (400, "parsing_exception"));
        for bad in [
            json!(1),
            json!({}),
            json!({"term": {}}),
            json!({"range": {"a": {"from": 1}}}),
            json!({"bool": {"musst": []}}),
        ] {
            assert!(Query::parse(Some(&bad)).is_err(), "{bad}");
        }
    }
}
