//! `filter_path` and `_source` filters: which parts of a JSON text stay.
//!
//! Works on the text, not on parsed values: a number keeps its spelling.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// Dotted patterns; `*` stands for any part of a name, `**` for any number of names.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Filter {
    include: Vec<Vec<String>>,
    exclude: Vec<Vec<String>>,
    /// A dot in a member's name stands for a level, as it does in documents.
    dotted: bool,
}

impl Filter {
    /// From the query parameter: comma separated, `-` in front excludes. None where nothing is asked for.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (exclude, include): (Vec<&str>, Vec<&str>) =
            text.split(',').map(str::trim).filter(|pattern| !pattern.is_empty()).partition(|p| p.starts_with('-'));
        let exclude = exclude.into_iter().map(|pattern| &pattern[1..]);
        // Of answers it matches names as they are: nothing matches one with a dot in it.
        let filter = Self { dotted: false, ..Self::of(include, exclude) };
        (filter != Self::default()).then_some(filter)
    }

    /// Of documents: keeps what `include` names (everything if it names nothing) without what `exclude` names.
    pub(super) fn of<'a>(
        include: impl IntoIterator<Item = &'a str>,
        exclude: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let split = |pattern: &str| pattern.split('.').map(str::to_owned).collect();
        Self {
            include: include.into_iter().map(split).collect(),
            exclude: exclude.into_iter().map(split).collect(),
            dotted: true,
        }
    }

    /// The part of `json` that stays; `{}` if nothing does. `json` unchanged if it is no JSON.
    pub(super) fn apply(&self, json: &str) -> String {
        let mut out = String::with_capacity(json.len().min(4096));
        match self.state().write(json.trim(), &mut out, 0) {
            Ok(true) => out,
            Ok(false) => "{}".to_owned(),
            Err(_) => json.to_owned(),
        }
    }

    /// Whether the value at `path` stays (arrays are no part of a path).
    pub(super) fn keeps(&self, path: &[&str]) -> bool {
        let mut state = self.state();
        for name in path {
            match state.enter(name) {
                Some(next) => state = next,
                None => return false,
            }
        }
        state.all
    }

    fn state(&self) -> State<'_> {
        State {
            all: self.include.is_empty(),
            include: self.include.iter().map(Vec::as_slice).collect(),
            exclude: self.exclude.iter().map(Vec::as_slice).collect(),
            dotted: self.dotted,
        }
    }
}

/// What lies deeper is kept whole: each level is a call within a call.
const MAX_DEPTH: usize = 100;

/// The patterns as far as they still apply below some point of the document.
struct State<'f> {
    all: bool,
    include: Vec<&'f [String]>,
    exclude: Vec<&'f [String]>,
    dotted: bool,
}

impl<'f> State<'f> {
    /// The state below the member `name`; none if nothing below can stay.
    fn enter(&self, name: &str) -> Option<State<'f>> {
        let dotted = self.dotted;
        let include = if self.all { Vec::new() } else { advance(&self.include, name, dotted) };
        let exclude = advance(&self.exclude, name, dotted);
        if exclude.iter().any(|rest| finished(rest)) {
            return None;
        }
        let all = self.all || include.iter().any(|rest| finished(rest));
        (all || !include.is_empty()).then_some(State { all, include, exclude, dotted })
    }

    /// Writes what stays of `json`; false if that is nothing.
    fn write(&self, json: &str, out: &mut String, depth: usize) -> serde_json::Result<bool> {
        if (self.all && self.exclude.is_empty()) || depth == MAX_DEPTH {
            out.push_str(json);
            return Ok(true);
        }
        let start = out.len();
        match json.as_bytes().first() {
            Some(b'{') => {
                let members: Members<'_> = serde_json::from_str(json)?;
                out.push('{');
                for (name, value) in &members.0 {
                    let Some(below) = self.enter(name) else { continue };
                    let before = out.len();
                    if before > start + 1 {
                        out.push(',');
                    }
                    out.push_str(&serde_json::to_string(name)?);
                    out.push(':');
                    if !below.write(value.get(), out, depth + 1)? {
                        out.truncate(before);
                    }
                }
                out.push('}');
                let kept = out.len() > start + 2 || (self.all && members.0.is_empty());
                if !kept {
                    out.truncate(start);
                }
                Ok(kept)
            }
            Some(b'[') => {
                let elements: Vec<&RawValue> = serde_json::from_str(json)?;
                out.push('[');
                for element in &elements {
                    let before = out.len();
                    if before > start + 1 {
                        out.push(',');
                    }
                    if !self.write(element.get(), out, depth + 1)? {
                        out.truncate(before);
                    }
                }
                out.push(']');
                let kept = out.len() > start + 2 || (self.all && elements.is_empty());
                if !kept {
                    out.truncate(start);
                }
                Ok(kept)
            }
            _ if self.all => {
                out.push_str(json);
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

fn finished(rest: &[String]) -> bool {
    rest.iter().all(|part| part == "**")
}

/// The rests of `patterns` below a member.
fn advance<'f>(patterns: &[&'f [String]], name: &str, dotted: bool) -> Vec<&'f [String]> {
    let mut now = patterns.to_vec();
    let parts = if dotted { name.split('.').collect() } else { vec![name] };
    for part in parts {
        let mut next = Vec::new();
        for &pattern in &now {
            // `**` may stand for this level and more, or end before it.
            let mut pattern = pattern;
            while let [first, rest @ ..] = pattern {
                if first == "**" {
                    next.push(pattern);
                    pattern = rest;
                    continue;
                }
                if glob(first, part) {
                    next.push(rest);
                }
                break;
            }
        }
        now = next;
    }
    now
}

/// Whether `name` matches `pattern`, where `*` stands for anything.
pub(super) fn glob(pattern: &str, name: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut rest) = name.strip_prefix(head) else { return false };
    let mut parts: Vec<&str> = tail.split('*').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// The members of a JSON object in their order.
pub(super) struct Members<'a>(pub(super) Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members<'de>;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some((Text(name), value)) = map.next_entry()? {
                    members.push((name, value));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// A string that borrows from the input where it has no escapes.
pub(super) struct Text<'a>(pub(super) Cow<'a, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Text<'de>;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }

            fn visit_i64<E>(self, number: i64) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(number.to_string())))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(number.to_string())))
            }
        }
        deserializer.deserialize_any(Read)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn filtered(filter: &str, json: &str) -> String {
        Filter::parse(filter).unwrap().apply(json)
    }

    const BULK: &str = r#"{"took":3,"errors":true,"items":[{"index":{"_id":"1","status":201}},{"delete":{"_id":"2","status":409,"error":{"type":"v","reason":"r","index":"t"}}}]}"#;

    #[test]
    fn keeps_every_item_by_its_status() {
        assert_eq!(
            filtered("errors,items.*.status,items.*.error.type,items.*.error.reason", BULK),
            r#"{"errors":true,"items":[{"index":{"status":201}},{"delete":{"status":409,"error":{"type":"v","reason":"r"}}}]}"#
        );
    }

    #[test]
    fn drops_what_matches_nothing() {
        assert_eq!(
            filtered("items.*.error", BULK),
            r#"{"items":[{"delete":{"error":{"type":"v","reason":"r","index":"t"}}}]}"#
        );
        assert_eq!(filtered("nothing.here", BULK), "{}");
    }

    #[test]
    fn understands_stars_exclusions_and_dotted_names() {
        assert_eq!(filtered("t*", BULK), r#"{"took":3}"#);
        assert_eq!(filtered("**.type", BULK), r#"{"items":[{"delete":{"error":{"type":"v"}}}]}"#);
        assert_eq!(filtered("-items", BULK), r#"{"took":3,"errors":true}"#);
        assert_eq!(filtered("items.**,-items.*.error", BULK).matches("status").count(), 2);
        let both = r#"{"a.b":17.50,"a":{"b":[],"c":1}}"#;
        assert_eq!(filtered("a.b", both), r#"{"a":{"b":[]}}"#);
        assert_eq!(Filter::of(["a.b"], []).apply(both), r#"{"a.b":17.50,"a":{"b":[]}}"#);
    }

    #[test]
    fn tells_of_a_path_without_a_document() {
        let filter = Filter::parse("errors,items.*.status").unwrap();
        assert!(filter.keeps(&["errors"]) && filter.keeps(&["items", "index", "status"]));
        assert!(!filter.keeps(&["took"]) && !filter.keeps(&["items", "index", "_id"]));
        assert!(Filter::parse("items").unwrap().keeps(&["items", "delete", "error", "type"]));
        assert!(Filter::parse(" ,").is_none());
    }

    #[test]
    fn deep_nesting_is_kept_without_a_crash() {
        let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(filtered("**.a", &deep), deep);
    }

    #[test]
    fn globs() {
        assert!(glob("*", "") && glob("a*c", "abc") && glob("*b*", "abc") && glob("logs-*-1", "logs-x-1"));
        assert!(!glob("a*a", "a") && !glob("a*", "ba") && !glob("a", "ab"));
    }
}
