//! Which field of an index a column of a table becomes.

use serde_json::{Map, Value, json};

use super::Product;
use crate::config::JsonAs;
use crate::postgres::column_types::ColumnType;

/// Characters of a keyword that is found by its value. UTF-8 has up to four bytes for each, and Lucene's longest term
/// is 32,766 bytes: what is longer would have its document refused.
const LONGEST_KEYWORD: u32 = 8191;
/// Digits that a double holds whatever they are: `scaled_float` computes with one.
const DOUBLE_DIGITS: i32 = 15;
/// Digits that a long holds whatever they are.
const LONG_DIGITS: i32 = 18;

/// The mapping of one column. What it refuses, no value of the column is, but for what `docs/indices.md` names: a row
/// has its document whether or not its values can be searched.
pub(super) fn field(product: &Product, json_as: JsonAs, column: &ColumnType) -> Value {
    // An element is a text of its own then.
    if column.arrays > 1 {
        return keyword();
    }
    match column.kind {
        'b' if column.built_in => built_in(product, json_as, column),
        'b' => extension(product, json_as, column),
        _ => keyword(),
    }
}

fn built_in(product: &Product, json_as: JsonAs, column: &ColumnType) -> Value {
    let simple = |kind: &str| json!({ "type": kind });
    match column.base.as_str() {
        "int2" => simple("short"),
        "int4" => simple("integer"),
        "int8" | "oid" => simple("long"),
        "float4" => simple("float"),
        "float8" => simple("double"),
        "numeric" => numeric(product, column.modifier),
        "bool" => simple("boolean"),
        "text" | "varchar" | "bpchar" => text(),
        "xml" => simple("text"),
        "date" | "timestamp" | "timestamptz" => json!({ "type": "date", "format": "strict_date_optional_time" }),
        "json" | "jsonb" => embedded(product, json_as),
        "bytea" => simple("binary"),
        "inet" => json!({ "type": "ip", "fields": { "keyword": keyword() } }),
        // Words with their places, made of another column to search in PostgreSQL.
        "tsvector" => json!({ "type": "keyword", "index": false, "doc_values": false }),
        // `cidr` too: an `ip_range` refuses documents with IPv4 networks mapped into IPv6, and has no `ignore_malformed`.
        _ => keyword(),
    }
}

fn extension(product: &Product, json_as: JsonAs, column: &ColumnType) -> Value {
    match column.base.as_str() {
        "citext" => json!({
            "type": "keyword", "normalizer": "lowercase", "ignore_above": LONGEST_KEYWORD, "fields": { "text": { "type": "text" } }
        }),
        // A `flattened` refuses a document whose key and value have more bytes than a term, a `flat_object` a long value.
        "hstore" => embedded(product, json_as),
        "geometry" | "geography" if product.has("geo_shape") => json!({ "type": "geo_shape" }),
        // Hexadecimal digits or GeoJSON: nothing else takes both.
        "geometry" | "geography" => stored(),
        "vector" | "halfvec" => vector(product, column),
        _ => keyword(),
    }
}

/// Precision and scale as `numeric_in` packs them, the scale with a sign (PostgreSQL 15).
fn numeric(product: &Product, modifier: i32) -> Value {
    if modifier >= 4 {
        let precision = (modifier - 4) >> 16;
        let scale = (((modifier - 4) & 0x7ff) ^ 0x400) - 0x400;
        if scale <= 0 && precision - scale <= LONG_DIGITS {
            return json!({ "type": "long" });
        }
        if precision.max(scale) <= DOUBLE_DIGITS && scale > 0 && product.has("scaled_float") {
            return json!({ "type": "scaled_float", "scaling_factor": 10_f64.powi(scale) });
        }
    }
    json!({ "type": "keyword", "ignore_above": LONGEST_KEYWORD, "fields": { "double": { "type": "double" } } })
}

/// By its number of dimensions, which the type modifier of pgvector's types is.
fn vector(product: &Product, column: &ColumnType) -> Value {
    let dims = column.modifier;
    let most = match product.elasticsearch() {
        Some(version) if version >= (8, 11) => 4096,
        Some(_) => 2048,
        None => 0,
    };
    if column.arrays > 0 || !(1..=most).contains(&dims) || !product.has("dense_vector") {
        return stored();
    }
    if most == 4096 {
        // `cosine`, the default, refuses vectors of zeros.
        json!({ "type": "dense_vector", "dims": dims, "index": true, "similarity": "l2_norm" })
    } else {
        json!({ "type": "dense_vector", "dims": dims })
    }
}

fn embedded(product: &Product, json_as: JsonAs) -> Value {
    match json_as {
        JsonAs::Flattened if product.has("flattened") => flattened(),
        JsonAs::Flattened if product.has("flat_object") => json!({ "type": "flat_object" }),
        _ => stored(),
    }
}

fn flattened() -> Value {
    json!({ "type": "flattened", "ignore_above": LONGEST_KEYWORD })
}

/// Kept in `_source` and looked at by nobody, so that any JSON will do.
fn stored() -> Value {
    json!({ "type": "object", "enabled": false })
}

fn keyword() -> Value {
    json!({ "type": "keyword", "ignore_above": LONGEST_KEYWORD })
}

fn text() -> Value {
    json!({ "type": "keyword", "ignore_above": LONGEST_KEYWORD, "fields": { "text": { "type": "text" } } })
}

/// The `properties` of a mapping that has these fields. A dot in a name is an object around it.
pub(super) fn properties(fields: &[(String, Value)]) -> Map<String, Value> {
    let mut root = Map::new();
    for (name, field) in fields {
        insert(&mut root, name, field);
    }
    root
}

fn insert(properties: &mut Map<String, Value>, name: &str, field: &Value) {
    let Some((head, tail)) = name.split_once('.') else {
        properties.insert(name.to_owned(), field.clone());
        return;
    };
    let object = properties.entry(head).or_insert_with(|| json!({ "properties": {} }));
    if let Some(below) = object.get_mut("properties").and_then(Value::as_object_mut) {
        insert(below, tail, field);
    }
}

/// The field that `name` is in a mapping, dots followed.
pub(super) fn find<'a>(mappings: &'a Value, name: &str) -> Option<&'a Value> {
    let mut at = mappings;
    for part in name.split('.') {
        at = at.get("properties")?.get(part)?;
    }
    Some(at)
}

/// Fields as `index.mapping.total_fields.limit` counts them: objects and fields within fields too.
pub(super) fn count(properties: &Map<String, Value>) -> usize {
    let below = |field: &Value, key: &str| field.get(key).and_then(Value::as_object).map_or(0, count);
    properties.values().map(|field| 1 + below(field, "properties") + below(field, "fields")).sum()
}
