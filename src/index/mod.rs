//! Indices for tables: the mapping that fits a table's columns, the plan of what a start would make, and carrying it out.
//!
//! A mapping of ours never stands between a row and its document: values that do not fit a field (a year of five digits, a
//! type that was altered) are kept in `_source` and left out of the field's index.

mod compare;
mod fields;
mod manage;

use serde_json::{Map, Value, json};

pub use compare::{Difference, describe};
pub use manage::{Found, Indices};

use crate::config::JsonAs;
use crate::postgres::column_types::ColumnType;
use crate::sink::ServerInfo;
use crate::table::TableId;

/// How long Elasticsearch remembers a deleted document's version: its default of a minute is no longer than a request
/// may be on its way, and one that arrives later would bring the document back.
const GC_DELETES: &str = "10m";
/// `index.mapping.total_fields.limit` where nobody sets it.
const FIELDS: usize = 1000;

/// Field types that are in modules or plugins, and that there is something else for.
const OPTIONAL: [&str; 5] = ["scaled_float", "geo_shape", "dense_vector", "flattened", "flat_object"];

/// What answers, as far as mappings differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Product {
    opensearch: bool,
    /// Major and minor; none where it does not tell.
    version: Option<(u32, u32)>,
    /// Field types that it turned out not to have.
    lacks: Vec<String>,
}

impl Product {
    /// Out of what the root page says.
    #[must_use]
    pub fn of(info: &ServerInfo) -> Self {
        let version = info.version.as_deref().and_then(|text| {
            let mut parts = text.split('.');
            Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
        });
        Self { opensearch: info.distribution == "opensearch", version, lacks: Vec::new() }
    }

    /// The version of an Elasticsearch that tells it.
    fn elasticsearch(&self) -> Option<(u32, u32)> {
        self.version.filter(|_| !self.opensearch)
    }

    /// Whether it has this field type, for the ones that not all have.
    fn has(&self, field_type: &str) -> bool {
        let known = match field_type {
            "flat_object" => self.opensearch && self.version.is_none_or(|version| version >= (2, 7)),
            "flattened" | "dense_vector" => !self.opensearch,
            _ => true,
        };
        known && !self.lacks.iter().any(|lack| lack == field_type)
    }

    /// It has refused a mapping with this answer. False when that was not because of a field type that can be done without.
    fn learn(&mut self, answer: &str) -> bool {
        if !answer.contains("No handler for type") && !answer.contains("does not exist") {
            return false;
        }
        let lack = OPTIONAL.iter().find(|name| answer.contains(&format!("[{name}]")) && self.has(name));
        self.lacks.extend(lack.map(|name| (*name).to_owned()));
        lack.is_some()
    }

    /// One that has none of the types that can be done without.
    fn poorest(&self) -> Self {
        Self { lacks: OPTIONAL.map(str::to_owned).into(), ..self.clone() }
    }
}

/// The index that a table should have.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The table.
    pub table: TableId,
    /// What `tableIndexMapping` names, and what documents are sent to: an alias where the index is made by us.
    pub name: String,
    /// Each column: its name, its type in SQL, its field.
    pub fields: Vec<(String, String, Value)>,
}

impl Plan {
    /// The plan for a table with these columns.
    #[must_use]
    pub fn new(table: TableId, name: &str, product: &Product, json_as: JsonAs, columns: &[ColumnType]) -> Self {
        let field =
            |column: &ColumnType| (column.name.clone(), column.sql.clone(), fields::field(product, json_as, column));
        Self { table, name: name.to_owned(), fields: columns.iter().map(field).collect() }
    }

    /// The `properties` of its mapping.
    #[must_use]
    pub fn properties(&self) -> Map<String, Value> {
        let named: Vec<_> = self.fields.iter().map(|(name, _, field)| (name.clone(), field.clone())).collect();
        fields::properties(&named)
    }

    /// The name of the index itself, the `number`th for its alias.
    #[must_use]
    pub fn index(&self, number: u32) -> String {
        format!("{}-{number:06}", self.name)
    }

    /// `index.mapping.total_fields.limit`, where it has to be set for this many columns; with room for some more.
    fn limit(&self) -> Option<usize> {
        let count = fields::count(&self.properties());
        (count > FIELDS).then(|| (count / FIELDS + 2) * FIELDS)
    }

    /// The body of the request that creates it. `job`: of which pipeline it is.
    #[must_use]
    pub fn body(&self, job: &str) -> Value {
        let mut settings = json!({ "index.gc_deletes": GC_DELETES, "index.mapping.ignore_malformed": true });
        if let Some(limit) = self.limit() {
            settings["index.mapping.total_fields.limit"] = json!(limit);
        }
        json!({
            "settings": settings,
            "mappings": { "_meta": { MARK: Mark::new(job, &self.table).json() }, "dynamic": false, "properties": self.properties() },
            "aliases": { self.name.as_str(): {} },
        })
    }
}

/// Where in the `_meta` of a mapping ours stands: an index without it was made by somebody else, and is never changed.
const MARK: &str = "pgtide";

/// What we keep with an index of ours.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
struct Mark {
    /// The pipeline that made it.
    job: String,
    /// The table that it was made for.
    table: String,
    /// Settings that are others while the first copy runs, as they were before; null for one that was not set. Written
    /// before they are changed, and gone once they are as they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    settings_before_copy: Option<Map<String, Value>>,
}

impl Mark {
    fn new(job: &str, table: &TableId) -> Self {
        Self { job: job.to_owned(), table: table.to_string(), settings_before_copy: None }
    }

    fn of(mappings: &Value) -> Option<Self> {
        serde_json::from_value(mappings.get("_meta")?.get(MARK)?.clone()).ok()
    }

    fn json(&self) -> Value {
        // Texts and values always serialise.
        serde_json::to_value(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
