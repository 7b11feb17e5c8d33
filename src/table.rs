//! Tables and their columns, as every room speaks of them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A table's name in PostgreSQL, unquoted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId {
    /// The schema, such as `public`.
    pub schema: String,
    /// The table's own name.
    pub name: String,
}

impl TableId {
    /// A table by schema and name, both unquoted.
    pub fn new(schema: impl Into<String>, name: impl Into<String>) -> Self {
        Self { schema: schema.into(), name: name.into() }
    }

    /// The name as SQL takes it, whatever characters it holds: `"public"."users"`.
    #[must_use]
    pub fn quoted(&self) -> String {
        format!("{}.{}", quote_identifier(&self.schema), quote_identifier(&self.name))
    }
}

/// `schema.name`, the form of the configuration's keys and of the screen.
impl fmt::Display for TableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

impl Serialize for TableId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TableId {
    /// Splits at the first dot: a schema whose own name holds a dot cannot be told apart in this form.
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (schema, name) = text.split_once('.').unwrap_or(("public", &text));
        Ok(TableId::new(schema, name))
    }
}

/// `text` as an SQL identifier in double quotes.
///
/// ```
/// assert_eq!(pgtide::table::quote_identifier("odd\"name"), "\"odd\"\"name\"");
/// ```
#[must_use]
pub fn quote_identifier(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

/// `text` as an SQL string literal, safe whatever `standard_conforming_strings` says.
///
/// ```
/// assert_eq!(pgtide::table::quote_literal("it's"), "'it''s'");
/// assert_eq!(pgtide::table::quote_literal(r"a\b"), r" E'a\\b'");
/// ```
#[must_use]
pub fn quote_literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') { format!(" E'{}'", quoted.replace('\\', "\\\\")) } else { format!("'{quoted}'") }
}

/// The same for a value as the server sent it, which is no UTF-8 where the database has no encoding (`SQL_ASCII`).
#[must_use]
pub fn quote_value(bytes: &[u8]) -> String {
    match str::from_utf8(bytes) {
        Ok(text) => quote_literal(text),
        Err(_) => {
            let hex: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!(" E'{hex}'")
        }
    }
}

/// A column: its name and the type that decides how its text becomes JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// The name, unquoted.
    pub name: String,
    /// `pg_type.oid`.
    pub type_oid: u32,
    /// Part of the key that names the document: the primary key or the replica identity.
    pub key: bool,
}
