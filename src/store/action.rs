//! The lines of a bulk body.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::failure::Failure;
use super::filter_path::Text;
use super::index::Versioning;

/// What an action does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Index,
    Create,
    Delete,
    Update,
}

impl Kind {
    pub(super) const ALL: [Self; 4] = [Self::Index, Self::Create, Self::Delete, Self::Update];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Index => "index",
            Self::Create => "create",
            Self::Delete => "delete",
            Self::Update => "update",
        }
    }

    fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// An action and its source.
#[derive(Debug)]
pub(super) struct Action<'a> {
    pub(super) kind: Kind,
    /// None: the index in the path.
    pub(super) index: Option<Cow<'a, str>>,
    /// None: one is made up.
    pub(super) id: Option<Cow<'a, str>>,
    pub(super) routing: Option<Cow<'a, str>>,
    pub(super) versioning: Versioning,
    pub(super) require_alias: Option<bool>,
    /// Empty for a delete. None if it is not UTF-8.
    pub(super) source: Option<&'a str>,
}

/// Takes a bulk body apart. Refuses the whole of it as Elasticsearch 8 does: for a line that is no action, for a
/// missing newline at the end, for a version that cannot be.
pub(super) fn parse(body: &[u8]) -> Result<Vec<Action<'_>>, Failure> {
    if body.is_empty() {
        return Err(Failure::new(400, "parse_exception", "request body is required"));
    }
    if body.last() != Some(&b'\n') {
        return Err(Failure::argument("The bulk request must be terminated by a newline [\\n]"));
    }
    // Once for all lines, as that is much quicker than line by line.
    let whole = std::str::from_utf8(body).ok();
    let mut at = 0;
    let mut number = 0;
    let mut next_line = || {
        let length = memchr::memchr(b'\n', &body[at..])?;
        let (start, end) = (at, at + length);
        at = end + 1;
        number += 1;
        let text = match whole {
            // A cut beside a newline is always between two characters.
            Some(whole) => whole.get(start..end),
            None => std::str::from_utf8(&body[start..end]).ok(),
        };
        Some((number, text.map(|text| text.strip_suffix('\r').unwrap_or(text))))
    };
    let mut actions = Vec::with_capacity(body.len() / 256);
    while let Some((number, line)) = next_line() {
        let line = line.ok_or_else(|| malformed(number, "invalid UTF-8"))?;
        if line.is_empty() {
            continue;
        }
        let mut action = parse_action(line, number)?;
        if action.kind != Kind::Delete {
            let Some((_, source)) = next_line() else {
                return Err(Failure::argument(format!(
                    "Malformed action/metadata line [{number}], expected a source line behind it"
                )));
            };
            action.source = source;
        }
        actions.push(action);
    }
    if actions.is_empty() {
        return Err(Failure::validation("no requests added"));
    }
    Ok(actions)
}

fn malformed(number: usize, why: &str) -> Failure {
    Failure::argument(format!("Malformed action/metadata line [{number}], {why}"))
}

/// `{"index":{"_index":"t","_id":"1","version":5,"version_type":"external_gte"}}` and the like.
fn parse_action(line: &str, number: usize) -> Result<Action<'_>, Failure> {
    if !line.trim_start().starts_with('{') {
        return Err(malformed(number, "expected START_OBJECT"));
    }
    let mut problem = None;
    let mut json = serde_json::Deserializer::from_str(line);
    let read = Outer { problem: &mut problem };
    let parsed = json.deserialize_map(read).and_then(|parsed| json.end().map(|()| parsed));
    match (parsed, problem) {
        (Ok((kind, meta)), _) => meta.into_action(kind),
        (Err(_), Some(problem)) => Err(match problem {
            Problem::Kind(name) => {
                malformed(number, &format!("expected field [create], [delete], [index] or [update] but found [{name}]"))
            }
            Problem::Parameter(name) => {
                Failure::argument(format!("Action/metadata line [{number}] contains an unknown parameter [{name}]"))
            }
        }),
        (Err(error), None) => Err(Failure::new(
            400,
            "x_content_parse_exception",
            format!("[{number}:{}] malformed action", error.column()),
        )),
    }
}

enum Problem {
    Kind(String),
    Parameter(String),
}

#[derive(Default)]
struct ActionMeta<'a> {
    index: Option<Cow<'a, str>>,
    id: Option<Cow<'a, str>>,
    routing: Option<Cow<'a, str>>,
    version: Option<i64>,
    version_type: Option<Cow<'a, str>>,
    if_seq_no: Option<u64>,
    if_primary_term: Option<u64>,
    require_alias: Option<bool>,
    op_type_create: bool,
}

impl<'a> ActionMeta<'a> {
    fn into_action(self, kind: Kind) -> Result<Action<'a>, Failure> {
        let kind = if kind == Kind::Index && self.op_type_create { Kind::Create } else { kind };
        let external = match self.version_type.as_deref() {
            None | Some("internal") => None,
            Some("external") => Some("EXTERNAL"),
            Some("external_gte") => Some("EXTERNAL_GTE"),
            Some(other) => return Err(Failure::argument(format!("No version type match [{other}]"))),
        };
        let if_seq_no = self.if_seq_no.or(self.if_primary_term.map(|_| 0));
        let versioning = match (external, self.version) {
            (Some(_), _) | (None, Some(_)) if kind == Kind::Update => {
                return Err(Failure::argument(
                    "Update requests do not support versioning. Please use `if_seq_no` and `if_primary_term` instead",
                ));
            }
            (Some(_), _) if kind == Kind::Create => {
                return Err(Failure::validation(
                    "create operations only support internal versioning. use index instead",
                ));
            }
            (Some(_), _) if if_seq_no.is_some() => {
                return Err(Failure::validation("compare and write operations can not use versioning"));
            }
            (Some(name), version) => match version {
                Some(version) if version >= 0 && name == "EXTERNAL" => Versioning::External(version),
                Some(version) if version >= 0 => Versioning::ExternalGte(version),
                other => {
                    let version = other.unwrap_or(-3);
                    return Err(Failure::validation(&format!(
                        "illegal version value [{version}] for version type [{name}]"
                    )));
                }
            },
            (None, Some(_)) => {
                return Err(Failure::validation(
                    "internal versioning can not be used for optimistic concurrency control. Please use `if_seq_no` and `if_primary_term` instead",
                ));
            }
            (None, None) if kind == Kind::Create => Versioning::Create,
            (None, None) => match if_seq_no {
                Some(seq) => Versioning::IfSeqNo(seq, self.if_primary_term.unwrap_or(0)),
                None => Versioning::Internal,
            },
        };
        match self.id.as_deref() {
            None | Some("") if matches!(kind, Kind::Delete | Kind::Update) => {
                return Err(Failure::validation("id is missing"));
            }
            Some(id) if id.len() > 512 => {
                return Err(Failure::validation(&format!(
                    "id [{}...] is too long, must be no longer than 512 bytes but was: {}",
                    id.chars().take(32).collect::<String>(),
                    id.len()
                )));
            }
            None if matches!(versioning, Versioning::External(_) | Versioning::ExternalGte(_)) => {
                return Err(Failure::validation("an id must be provided if version type or value are set"));
            }
            _ => {}
        }
        Ok(Action {
            kind,
            index: self.index,
            id: self.id,
            routing: self.routing,
            versioning,
            require_alias: self.require_alias,
            source: Some(""),
        })
    }
}

struct Outer<'p> {
    problem: &'p mut Option<Problem>,
}

impl<'de> Visitor<'de> for Outer<'_> {
    type Value = (Kind, ActionMeta<'de>);

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("an action")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let Some(Text(name)) = map.next_key()? else { return Err(A::Error::custom("no action")) };
        let Some(kind) = Kind::of(&name) else {
            *self.problem = Some(Problem::Kind(name.into_owned()));
            return Err(A::Error::custom("unknown action"));
        };
        let meta = map.next_value_seed(Inner { problem: self.problem })?;
        match map.next_key::<Text<'_>>()? {
            None => Ok((kind, meta)),
            Some(_) => Err(A::Error::custom("more than one action in a line")),
        }
    }
}

struct Inner<'p> {
    problem: &'p mut Option<Problem>,
}

impl<'de> DeserializeSeed<'de> for Inner<'_> {
    type Value = ActionMeta<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Inner<'_> {
    type Value = ActionMeta<'de>;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("the parameters of an action")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let text = |text: Option<Text<'de>>| text.map(|text| text.0);
        let mut meta = ActionMeta::default();
        while let Some(Text(name)) = map.next_key()? {
            match &*name {
                "_index" => meta.index = text(map.next_value()?),
                "_id" => meta.id = text(map.next_value()?),
                "routing" => meta.routing = text(map.next_value()?),
                "version" => meta.version = Some(map.next_value()?),
                "version_type" => meta.version_type = text(map.next_value()?),
                "if_seq_no" => meta.if_seq_no = Some(map.next_value()?),
                "if_primary_term" => meta.if_primary_term = Some(map.next_value()?),
                "require_alias" => meta.require_alias = map.next_value()?,
                "op_type" => meta.op_type_create = text(map.next_value()?).as_deref() == Some("create"),
                "retry_on_conflict"
                | "pipeline"
                | "dynamic_templates"
                | "list_executed_pipelines"
                | "require_data_stream"
                | "_source" => {
                    map.next_value::<IgnoredAny>()?;
                }
                _ => {
                    *self.problem = Some(Problem::Parameter(name.into_owned()));
                    return Err(A::Error::custom("unknown parameter"));
                }
            }
        }
        Ok(meta)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn reason(body: &str) -> String {
        parse(body.as_bytes()).unwrap_err().reason
    }

    #[test]
    fn takes_actions_apart() {
        let body = "{\"index\":{\"_index\":\"t\",\"_id\":\"\\u00fc\",\"version\":5,\"version_type\":\"external_gte\",\"routing\":\"r\"}}\n{\"a\":1}\r\n\n{ \"delete\" : {\"_id\":7}}\n{\"create\":{}}\n{}\n";
        let actions = parse(body.as_bytes()).unwrap();
        assert_eq!(actions.iter().map(|a| a.kind).collect::<Vec<_>>(), [Kind::Index, Kind::Delete, Kind::Create]);
        assert_eq!(actions[0].id.as_deref(), Some("ü"));
        assert_eq!(actions[0].versioning, Versioning::ExternalGte(5));
        assert_eq!((actions[0].routing.as_deref(), actions[0].source), (Some("r"), Some("{\"a\":1}")));
        assert_eq!((actions[1].id.as_deref(), actions[1].source), (Some("7"), Some("")));
        assert_eq!(actions[2].versioning, Versioning::Create);
    }

    #[test]
    fn refuses_the_whole_body() {
        assert!(reason("{\"delete\":{\"_id\":\"1\"}}").contains("terminated by a newline"));
        assert!(reason("{\"index\":{}}\n").contains("[1], expected a source line"));
        assert!(
            reason("{\"delete\":{\"_id\":\"1\"}}\n{\"foo\":{}}\n")
                .contains("line [2], expected field [create], [delete], [index] or [update] but found [foo]")
        );
        assert!(reason("{\"index\":{\"_type\":\"_doc\"}}\n{}\n").contains("unknown parameter [_type]"));
        assert!(reason("[]\n").contains("expected START_OBJECT"));
        assert!(reason("{\"index\":\n{}\n").contains("malformed action"));
        assert!(reason("\n").contains("no requests added"));
        assert!(reason("").contains("request body is required"));
        assert!(reason("{\"delete\":{}}\n").contains("id is missing"));
        let long = format!("{{\"delete\":{{\"_id\":\"{}\"}}}}\n", "x".repeat(513));
        assert!(reason(&long).contains("must be no longer than 512 bytes but was: 513"));
    }

    #[test]
    fn refuses_versions_that_cannot_be() {
        let versioned = |kind: &str, rest: &str| reason(&format!("{{\"{kind}\":{{\"_id\":\"1\",{rest}}}}}\n{{}}\n"));
        assert!(
            versioned("index", r#""version":-1,"version_type":"external_gte""#).contains("illegal version value [-1]")
        );
        assert!(
            versioned("index", r#""version":9223372036854775808,"version_type":"external""#)
                .contains("malformed action")
        );
        assert!(
            versioned("create", r#""version":1,"version_type":"external""#)
                .contains("only support internal versioning")
        );
        assert!(versioned("update", r#""version":1,"version_type":"external""#).contains("do not support versioning"));
        assert!(
            versioned("index", r#""version":1,"version_type":"external","if_seq_no":1,"if_primary_term":1"#)
                .contains("compare and write")
        );
        assert!(versioned("index", r#""version":1"#).contains("internal versioning can not be used"));
        assert!(versioned("index", r#""version_type":"external""#).contains("illegal version value"));
    }

    #[test]
    fn a_source_that_is_no_text_is_the_items_own_trouble() {
        let actions = parse(b"{\"index\":{}}\n{\"a\":\"\xff\"}\n{\"index\":{}}\n{}\n").unwrap();
        assert_eq!((actions[0].source, actions[1].source), (None, Some("{}")));
    }
}
