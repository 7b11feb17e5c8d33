//! What an index has beside what its table wants.

use serde_json::Value;

use super::{Plan, fields};

/// A column whose field is another than the plan's.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    /// The column.
    pub column: String,
    /// Its type in SQL.
    pub sql: String,
    /// The field type that it wants.
    pub wanted: String,
    /// The one that it has; none where the index does not know the column.
    pub found: Option<String>,
    /// The index refuses documents that have it: its mapping is strict.
    pub refused: bool,
}

/// The columns of `plan` that the mapping of its index has no field for, or one of another type. Formats, subfields and the
/// like are whatever they are.
pub(super) fn compare(plan: &Plan, mappings: &Value) -> Vec<Difference> {
    let is = |key: &Value, word: &str| key.as_str() == Some(word);
    let strict = is(&mappings["dynamic"], "strict") || is(&mappings["dynamic"], "strict_allow_templates");
    let difference = |(name, sql, wanted): &(String, String, Value)| {
        let found = fields::find(mappings, name).map(type_of);
        let wanted = type_of(wanted);
        let refused = strict && found.is_none();
        (found.as_ref() != Some(&wanted)).then(|| Difference {
            column: name.clone(),
            sql: sql.clone(),
            wanted,
            found,
            refused,
        })
    };
    plan.fields.iter().filter_map(difference).collect()
}

/// A field in words: its type, what is said of it, and the fields within it.
#[must_use]
pub fn describe(field: &Value) -> String {
    let mut words = type_of(field);
    if let Some(factor) = field["scaling_factor"].as_f64() {
        words.push_str(&format!(" by {factor}"));
    }
    if let Some(dims) = field["dims"].as_i64() {
        words.push_str(&format!(" of {dims}"));
    }
    if let Some(normalizer) = field["normalizer"].as_str() {
        words.push_str(&format!(", {normalizer}"));
    }
    if field["index"] == Value::Bool(false) {
        words.push_str(", not searched");
    }
    for (name, field) in field["fields"].as_object().into_iter().flatten() {
        words.push_str(&format!(", .{name}: {}", type_of(field)));
    }
    words
}

/// A field's type in a word or two.
fn type_of(field: &Value) -> String {
    if field["enabled"] == Value::Bool(false) {
        return "stored only".to_owned();
    }
    field["type"].as_str().unwrap_or("object").to_owned()
}
