//! The mapping of an index, and whether a source fits it.
//!
//! Nothing is guessed: only fields that somebody mapped are looked at.

use std::collections::HashMap;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::failure::Failure;
use super::filter_path::Text;

/// The fields of a document or of an object in it.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Mapping {
    strict: bool,
    fields: HashMap<String, Field>,
}

#[derive(Debug, PartialEq)]
enum Field {
    Object(Mapping),
    Leaf(Leaf),
}

#[derive(Debug, PartialEq)]
struct Leaf {
    kind: Kind,
    /// The name of its type, for messages.
    type_name: String,
    ignore_malformed: bool,
}

/// What may stand in a field.
#[derive(Clone, Debug, PartialEq)]
enum Kind {
    /// A whole number between these; a fraction is cut off, a string parsed.
    Integer(i128, i128),
    Float,
    Boolean,
    /// By these formats, parted by `||`.
    Date(String),
    Keyword,
    Text,
    Ip,
    /// Objects only.
    Flattened,
    /// Not checked.
    Any,
}

impl Mapping {
    /// From the JSON of a mapping (`dynamic`, `properties`, ...).
    pub(super) fn parse(json: &Value) -> Result<Self, Failure> {
        Self::parse_object(json, false)
    }

    fn parse_object(json: &Value, strict: bool) -> Result<Self, Failure> {
        let strict = match json.get("dynamic") {
            Some(Value::String(text)) => text.eq_ignore_ascii_case("strict"),
            Some(_) => false,
            None => strict,
        };
        let mut fields = HashMap::new();
        let empty = Map::new();
        let properties = match json.get("properties") {
            None => &empty,
            Some(Value::Object(properties)) => properties,
            Some(_) => return Err(mapper_failure("Expected map for property [properties] but got a value")),
        };
        for (name, field) in properties {
            let type_name = match field.get("type").and_then(Value::as_str) {
                Some(name) => name,
                None if field.get("properties").is_some() => "object",
                None => {
                    return Err(mapper_failure(&format!("No type specified for field [{name}]")));
                }
            };
            let parsed = if field.get("enabled") == Some(&Value::Bool(false)) {
                Field::Leaf(Leaf { kind: Kind::Any, type_name: type_name.to_owned(), ignore_malformed: false })
            } else if type_name == "object" || type_name == "nested" {
                Field::Object(Self::parse_object(field, strict)?)
            } else {
                Field::Leaf(Leaf {
                    kind: kind_of(type_name, field),
                    type_name: type_name.to_owned(),
                    ignore_malformed: field.get("ignore_malformed") == Some(&Value::Bool(true)),
                })
            };
            fields.insert(name.clone(), parsed);
        }
        Ok(Self { strict, fields })
    }

    /// Whether `field` is mapped as analysed text.
    pub(super) fn is_text(&self, field: &str) -> bool {
        match self.find(field) {
            Some(Field::Leaf(leaf)) => leaf.kind == Kind::Text,
            _ => false,
        }
    }

    /// Whether `field` is mapped.
    pub(super) fn has(&self, field: &str) -> bool {
        self.find(field).is_some()
    }

    fn find(&self, name: &str) -> Option<&Field> {
        if let Some(field) = self.fields.get(name) {
            return Some(field);
        }
        let (head, tail) = name.split_once('.')?;
        match self.fields.get(head)? {
            Field::Object(below) => below.find(tail),
            Field::Leaf(_) => None,
        }
    }

    /// Whether `source` is a JSON object that fits. Else what Elasticsearch 8.19 would answer for the item. `lenient`:
    /// `index.mapping.ignore_malformed`.
    pub(super) fn check(&self, source: &str, id: &str, lenient: bool) -> Result<(), Failure> {
        if source.trim_start().as_bytes().first() != Some(&b'{') {
            return Err(document_failure("[1:1] failed to parse: Malformed content, must start with an object"));
        }
        let mut refusal = None;
        let mut json = serde_json::Deserializer::from_str(source);
        let check = Check { mapping: self, path: "", id, top: true, lenient, refusal: &mut refusal };
        let result = check.deserialize(&mut json).and_then(|()| json.end());
        match (result, refusal) {
            (_, Some(refusal)) => Err(refusal),
            (Ok(()), None) => Ok(()),
            (Err(error), None) => Err(document_failure(&format!("[1:{}] failed to parse", error.column()))),
        }
    }
}

/// Adds `added` to the mapping `json`. Refuses to change a field's type, as Elasticsearch does.
pub(super) fn merge(json: &mut Value, added: &Value) -> Result<(), Failure> {
    merge_object(json, added, "")
}

fn merge_object(json: &mut Value, added: &Value, path: &str) -> Result<(), Failure> {
    let (Value::Object(json), Value::Object(added)) = (json, added) else {
        return Err(mapper_failure("Expected a map"));
    };
    for (key, value) in added {
        if key != "properties" {
            json.insert(key.clone(), value.clone());
            continue;
        }
        let Value::Object(added_fields) = value else {
            return Err(mapper_failure("Expected map for property [properties] but got a value"));
        };
        let Value::Object(fields) = json.entry("properties").or_insert_with(|| Value::Object(Map::new())) else {
            return Err(mapper_failure("Expected map for property [properties] but got a value"));
        };
        for (name, field) in added_fields {
            let Some(old) = fields.get_mut(name) else {
                fields.insert(name.clone(), field.clone());
                continue;
            };
            let type_of = |field: &Value| field.get("type").and_then(Value::as_str).unwrap_or("object").to_owned();
            let (from, to) = (type_of(old), type_of(field));
            if from != to {
                return Err(Failure::argument(format!(
                    "mapper [{path}{name}] cannot be changed from type [{from}] to [{to}]"
                )));
            }
            merge_object(old, field, &format!("{path}{name}."))?;
        }
    }
    Ok(())
}

fn mapper_failure(reason: &str) -> Failure {
    Failure::new(400, "mapper_parsing_exception", reason)
}

fn document_failure(reason: &str) -> Failure {
    Failure::new(400, "document_parsing_exception", reason)
}

fn kind_of(type_name: &str, field: &Value) -> Kind {
    let signed = |bits: u32| Kind::Integer(-(1_i128 << (bits - 1)), (1_i128 << (bits - 1)) - 1);
    match type_name {
        "byte" => signed(8),
        "short" => signed(16),
        "integer" => signed(32),
        "long" => signed(64),
        "unsigned_long" => Kind::Integer(0, (1_i128 << 64) - 1),
        "float" | "double" | "half_float" | "scaled_float" => Kind::Float,
        "boolean" => Kind::Boolean,
        "date" | "date_nanos" => {
            let format = field.get("format").and_then(Value::as_str);
            Kind::Date(format.unwrap_or("strict_date_optional_time||epoch_millis").to_owned())
        }
        "keyword" | "constant_keyword" | "wildcard" => Kind::Keyword,
        "text" | "match_only_text" => Kind::Text,
        "ip" => Kind::Ip,
        "flattened" => Kind::Flattened,
        _ => Kind::Any,
    }
}

impl Leaf {
    /// Whether one value (no array, not null) may stand here.
    fn accepts(&self, raw: &str) -> bool {
        if self.kind == Kind::Any {
            return true;
        }
        if raw.starts_with('{') || self.kind == Kind::Flattened {
            return raw.starts_with('{') && self.kind == Kind::Flattened;
        }
        let unquoted = if raw.starts_with('"') { serde_json::from_str::<String>(raw).ok() } else { None };
        let text = unquoted.as_deref().unwrap_or(raw);
        let is_boolean = unquoted.is_none() && (raw == "true" || raw == "false");
        match &self.kind {
            Kind::Integer(min, max) => {
                let in_range = |number: i128| (*min..=*max).contains(&number);
                !is_boolean
                    && (text.parse().is_ok_and(in_range)
                        || text.parse::<f64>().is_ok_and(|number| number.is_finite() && in_range(number as i128)))
            }
            Kind::Float => !is_boolean && text.parse::<f64>().is_ok_and(f64::is_finite),
            Kind::Boolean => is_boolean || (unquoted.is_some() && matches!(text, "true" | "false" | "")),
            Kind::Date(formats) => {
                !is_boolean && formats.split("||").any(|format| fits_date(format, text, unquoted.is_some()))
            }
            Kind::Ip => text.parse::<std::net::IpAddr>().is_ok(),
            Kind::Keyword | Kind::Text | Kind::Any | Kind::Flattened => true,
        }
    }

    /// Whether a value that it does not accept is left out of its index, and the document kept.
    fn ignores(&self, raw: &str, lenient: bool) -> bool {
        let strict = matches!(self.kind, Kind::Keyword | Kind::Text | Kind::Flattened);
        self.ignore_malformed || lenient && !strict && !raw.starts_with('{')
    }
}

/// Whether `text` looks like a date in `format`. A pattern of letters is only checked for the characters of a date.
fn fits_date(format: &str, text: &str, is_string: bool) -> bool {
    match format {
        "epoch_millis" | "epoch_second" => text.parse::<f64>().is_ok_and(f64::is_finite),
        _ if !is_string => false,
        "strict_date_optional_time" | "strict_date_optional_time_nanos" | "date_optional_time" => is_iso_date(text),
        _ => {
            let body = text.strip_prefix(['-', '+']).unwrap_or(text);
            body.starts_with(|c: char| c.is_ascii_digit())
                && body.chars().all(|c| c.is_ascii_digit() || "-:./+ TZ,".contains(c) || c.is_ascii_uppercase())
        }
    }
}

/// `yyyy[-MM[-dd['T'HH[:mm[:ss[.fraction]]][zone]]]]`.
fn is_iso_date(text: &str) -> bool {
    let digits = |part: &str, length: usize, max: u32| {
        part.len() == length
            && part.bytes().all(|byte| byte.is_ascii_digit())
            && part.parse::<u32>().is_ok_and(|number| number <= max)
    };
    let (date, time) = match text.split_once('T') {
        Some((date, time)) => (date, Some(time)),
        None => (text, None),
    };
    let mut parts = date.split('-');
    if !parts.next().is_some_and(|year| digits(year, 4, 9999)) {
        return false;
    }
    let (month, day) = (parts.next(), parts.next());
    if parts.next().is_some()
        || month.is_some_and(|month| !digits(month, 2, 12) || month == "00")
        || day.is_some_and(|day| !digits(day, 2, 31) || day == "00")
    {
        return false;
    }
    let Some(time) = time else { return true };
    let zone_at = time.find(['Z', '+', '-']).unwrap_or(time.len());
    let (clock, zone) = time.split_at(zone_at);
    let zone_fits = zone.is_empty()
        || zone == "Z"
        || zone[1..].split(':').all(|part| digits(part, 2, 59)) && zone.len() <= 6
        || digits(&zone[1..], 4, 2359);
    let (clock, fraction) = clock.split_once(['.', ',']).unwrap_or((clock, "0"));
    let mut parts = clock.split(':');
    let hour_fits = clock.is_empty() || parts.next().is_some_and(|hour| digits(hour, 2, 24));
    zone_fits
        && hour_fits
        && parts.by_ref().take(2).all(|part| digits(part, 2, 60))
        && parts.next().is_none()
        && (1..=9).contains(&fraction.len())
        && fraction.bytes().all(|byte| byte.is_ascii_digit())
}

/// Names that no document may use as a field.
const METADATA: [&str; 11] = [
    "_id",
    "_index",
    "_source",
    "_routing",
    "_version",
    "_seq_no",
    "_primary_term",
    "_field_names",
    "_ignored",
    "_size",
    "_doc_count",
];

/// Walks an object of a source beside its mapping.
struct Check<'m, 'r> {
    mapping: &'m Mapping,
    /// The names above, each with a dot behind.
    path: &'m str,
    id: &'m str,
    top: bool,
    lenient: bool,
    refusal: &'r mut Option<Failure>,
}

impl<'de> DeserializeSeed<'de> for Check<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Check<'_, '_> {
    type Value = ();

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Text(name)) = map.next_key()? {
            if self.mapping.fields.is_empty() && !self.mapping.strict && !suspicious(&name) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let refused = match self.check_name(&name) {
                Ok(None) => {
                    map.next_value::<IgnoredAny>()?;
                    None
                }
                Ok(Some(field)) => {
                    let value: &RawValue = map.next_value()?;
                    check_value(field, &format!("{}{name}", self.path), value.get(), self.id, (0, self.lenient)).err()
                }
                Err(failure) => Some(failure),
            };
            if let Some(failure) = refused {
                *self.refusal = Some(failure);
                return Err(A::Error::custom("refused"));
            }
        }
        Ok(())
    }
}

/// Whether a name needs a closer look.
fn suspicious(name: &str) -> bool {
    name.is_empty() || name.starts_with('_') || memchr::memchr(b'.', name.as_bytes()).is_some()
}

impl<'m> Check<'m, '_> {
    fn check_name(&self, name: &str) -> Result<Option<&'m Field>, Failure> {
        let path = self.path;
        if self.top && METADATA.contains(&name) {
            return Err(document_failure(&format!(
                "[1:1] Field [{name}] is a metadata field and cannot be added inside a document. Use the index API request parameters."
            )));
        }
        if name.is_empty() || name.split('.').any(|part| part.trim().is_empty()) {
            return Err(document_failure(&format!(
                "[1:1] field name cannot be empty or have empty parts: [{path}{name}]"
            )));
        }
        let found = self.mapping.find(name);
        if found.is_none() && self.mapping.strict_at(name) {
            let within = if path.is_empty() { "_doc" } else { path.trim_end_matches('.') };
            return Err(Failure::new(
                400,
                "strict_dynamic_mapping_exception",
                format!(
                    "[1:1] mapping set to strict, dynamic introduction of [{name}] within [{within}] is not allowed"
                ),
            ));
        }
        Ok(found)
    }
}

impl Mapping {
    /// Whether the object that would hold `name` is strict.
    fn strict_at(&self, name: &str) -> bool {
        match name.split_once('.') {
            Some((head, tail)) => match self.fields.get(head) {
                Some(Field::Object(below)) => below.strict_at(tail),
                _ => self.strict,
            },
            None => self.strict,
        }
    }
}

/// Arrays within arrays: the check of each is a call within a call.
const MAX_DEPTH: usize = 100;

/// `depth`: arrays around the value.
fn check_value(field: &Field, path: &str, raw: &str, id: &str, (depth, lenient): (usize, bool)) -> Result<(), Failure> {
    if raw == "null" {
        return Ok(());
    }
    if raw.starts_with('[') {
        if matches!(field, Field::Leaf(leaf) if leaf.kind == Kind::Any) {
            return Ok(());
        }
        if depth == MAX_DEPTH {
            return Err(document_failure(&format!("[1:1] arrays are nested too deep in field [{path}]")));
        }
        let elements: Vec<&RawValue> = serde_json::from_str(raw)
            .map_err(|_| document_failure(&format!("[1:1] failed to parse field [{path}]")))?;
        return elements
            .iter()
            .try_for_each(|element| check_value(field, path, element.get(), id, (depth + 1, lenient)));
    }
    match field {
        Field::Object(below) => {
            if !raw.starts_with('{') {
                return Err(document_failure(&format!(
                    "[1:1] object mapping for [{path}] tried to parse field [{path}] as object, but found a concrete value"
                )));
            }
            let mut refusal = None;
            let path = format!("{path}.");
            let check = Check { mapping: below, path: &path, id, top: false, lenient, refusal: &mut refusal };
            let result = check.deserialize(&mut serde_json::Deserializer::from_str(raw));
            match (result, refusal) {
                (_, Some(refusal)) => Err(refusal),
                (Err(_), None) => Err(document_failure("[1:1] failed to parse")),
                (Ok(()), None) => Ok(()),
            }
        }
        Field::Leaf(leaf) if leaf.accepts(raw) || leaf.ignores(raw, lenient) => Ok(()),
        Field::Leaf(leaf) => {
            let preview: String = raw.trim_matches('"').chars().take(100).collect();
            Err(document_failure(&format!(
                "[1:1] failed to parse field [{path}] of type [{}] in document with id '{id}'. Preview of field's value: '{preview}'",
                leaf.type_name
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn refusal(mapping: &Value, source: &str) -> Option<(String, String)> {
        let checked = Mapping::parse(mapping).unwrap().check(source, "1", false);
        checked.err().map(|failure| (failure.kind, failure.reason))
    }

    #[test]
    fn without_a_mapping_any_object_is_welcome() {
        assert_eq!(refusal(&json!({}), r#"{"a":{"b":[1,"x",null]},"a.b":2}"#), None);
        for bad in ["", "[]", "1", "{", r#"{"a":1}x"#, r#"{"a":1,}"#, r#"{"_id":1}"#, r#"{"":1}"#, r#"{"a..b":1}"#] {
            assert_eq!(refusal(&json!({}), bad).unwrap().0, "document_parsing_exception", "{bad}");
        }
    }

    #[test]
    fn types_are_checked() {
        let mapping = json!({"dynamic": false, "properties": {
            "b": {"type": "byte"}, "l": {"type": "long"}, "d": {"type": "double"}, "o": {"type": "boolean"},
            "t": {"type": "date"}, "k": {"type": "keyword"}, "i": {"type": "ip"}, "f": {"type": "flattened"},
            "x": {"properties": {"y": {"type": "integer"}}}, "m": {"type": "long", "ignore_malformed": true}}});
        let good = [
            r#"{"b":-128,"l":9223372036854775807,"d":"1e3","o":"","t":"2024-02-29T12:00:00.123456Z","k":1}"#,
            r#"{"b":"12","l":1.5,"d":17.50,"o":false,"t":1700000000000,"i":"::1","f":{"a":{}},"x":{"y":1}}"#,
            r#"{"b":null,"l":[1,2,null],"x":[{"y":1},{"y":"2"}],"x.y":3,"m":"no","unmapped":{"z":1}}"#,
            r#"{"t":"2024-01-01T00:00:00+02:00"}"#,
        ];
        for source in good {
            assert_eq!(refusal(&mapping, source), None, "{source}");
        }
        let bad = [
            r#"{"b":128}"#,
            r#"{"l":9223372036854775808}"#,
            r#"{"l":"abc"}"#,
            r#"{"l":true}"#,
            r#"{"d":"NaN"}"#,
            r#"{"o":1}"#,
            r#"{"t":"infinity"}"#,
            r#"{"t":"2024-13-01"}"#,
            r#"{"t":"2024-01-01 00:00:00"}"#,
            r#"{"k":{"a":1}}"#,
            r#"{"i":"10.0.0.0/8"}"#,
            r#"{"x":1}"#,
            r#"{"x":{"y":"z"}}"#,
            r#"{"x.y":"z"}"#,
            r#"{"l":[1,"z"]}"#,
        ];
        for source in bad {
            assert_eq!(refusal(&mapping, source).unwrap().0, "document_parsing_exception", "{source}");
        }
        let reason = refusal(&mapping, r#"{"l":"abc"}"#).unwrap().1;
        assert!(reason.contains("failed to parse field [l] of type [long] in document with id '1'"), "{reason}");
    }

    /// As Elasticsearch 9.5.3 has it.
    #[test]
    fn what_is_malformed_may_be_ignored_and_what_is_not_enabled_is_not_looked_at() {
        let mapping = json!({"dynamic": false, "properties": {
            "l": {"type": "long"}, "t": {"type": "date"}, "o": {"type": "boolean"}, "i": {"type": "ip"}, "k": {"type": "keyword"},
            "f": {"type": "flattened"}, "s": {"type": "object", "enabled": false}}});
        let mapping = Mapping::parse(&mapping).unwrap();
        let fits = |source: &str| mapping.check(source, "1", true).is_ok();
        for good in [
            r#"{"l":"x","t":"12024-01-01","o":"maybe","i":"10.0.0.1/8"}"#,
            r#"{"l":[1,"x"],"f":[{"a":1}]}"#,
            r#"{"s":5}"#,
            r#"{"s":[1,{"":2}]}"#,
        ] {
            assert!(fits(good), "{good}");
        }
        for bad in [r#"{"l":{"a":1}}"#, r#"{"k":{"a":1}}"#, r#"{"f":5}"#, r#"{"f":["a"]}"#] {
            assert!(!fits(bad), "{bad}");
        }
        assert!(mapping.check(r#"{"l":"x"}"#, "1", false).is_err());
    }

    #[test]
    fn strict_refuses_unknown_fields_at_every_level() {
        let mapping = json!({"dynamic": "strict", "properties": {
            "a": {"type": "long"}, "x": {"properties": {"y": {"type": "long"}}}, "o": {"type": "object", "dynamic": false}}});
        assert_eq!(refusal(&mapping, r#"{"a":1,"x":{"y":1},"o":{"any":1},"x.y":1}"#), None);
        for bad in [r#"{"b":1}"#, r#"{"x":{"z":1}}"#, r#"{"x.z":1}"#] {
            assert_eq!(refusal(&mapping, bad).unwrap().0, "strict_dynamic_mapping_exception", "{bad}");
        }
    }

    #[test]
    fn a_pattern_of_letters_takes_what_looks_like_a_date() {
        let mapping = json!({"properties": {"t": {"type": "date", "format": "yyyy-MM-dd HH:mm:ss.SSSSSSX"}}});
        assert_eq!(refusal(&mapping, r#"{"t":"2024-01-01 00:00:00.123+00"}"#), None);
        assert!(refusal(&mapping, r#"{"t":"yesterday"}"#).is_some() && refusal(&mapping, r#"{"t":12}"#).is_some());
    }

    #[test]
    fn deep_nesting_is_refused_without_a_crash() {
        let deep = format!("{{\"l\":{}{}}}", "[".repeat(200_000), "]".repeat(200_000));
        assert_eq!(refusal(&json!({}), &deep), None);
        assert!(refusal(&json!({"properties": {"l": {"type": "long"}}}), &deep).unwrap().1.contains("too deep"));
    }

    #[test]
    fn merging_adds_fields_and_changes_no_type() {
        let mut mapping = json!({"properties": {"a": {"type": "long"}}});
        merge(&mut mapping, &json!({"dynamic": "strict", "properties": {"b": {"type": "keyword"}}})).unwrap();
        assert_eq!(
            mapping,
            json!({"dynamic": "strict", "properties": {"a": {"type": "long"}, "b": {"type": "keyword"}}})
        );
        let failure = merge(&mut mapping, &json!({"properties": {"a": {"type": "text"}}})).unwrap_err();
        assert_eq!(failure.reason, "mapper [a] cannot be changed from type [long] to [text]");
    }
}
