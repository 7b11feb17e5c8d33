//! A change of a row, and what becomes of it in Elasticsearch: the words between engine and [`Handler`].

use std::time::SystemTime;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::lsn::Lsn;
use crate::table::{Column, TableId};
use crate::text;

/// What happened to a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// It was there when the table was copied.
    Snapshot,
    /// It was inserted.
    Insert,
    /// It was updated.
    Update,
    /// It was deleted.
    Delete,
    /// Its table was emptied: there is no row.
    Truncate,
}

/// A field as PostgreSQL sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field<'a> {
    /// SQL NULL.
    Null,
    /// A large value that the update did not touch and PostgreSQL did not send. A row given to a [`Handler`] has none of these.
    Unchanged,
    /// The value's text form, as `SELECT` would show it under pgtide's session settings.
    Text(&'a [u8]),
}

/// A row: its columns and fields, in the same order and number.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// The columns.
    pub columns: &'a [Column],
    /// A field for each.
    pub fields: &'a [Field<'a>],
}

impl Row<'_> {
    /// The value of a column as JSON, by the same rules as in the documents. None where there is no such column.
    #[must_use]
    pub fn get(&self, column: &str) -> Option<Value> {
        let at = self.columns.iter().position(|candidate| candidate.name == column)?;
        Some(value(&self.columns[at], self.fields[at]))
    }

    /// The text of a column as PostgreSQL sent it. None for NULL and where there is no such column.
    #[must_use]
    pub fn text(&self, column: &str) -> Option<&[u8]> {
        let at = self.columns.iter().position(|candidate| candidate.name == column)?;
        match self.fields[at] {
            Field::Text(bytes) => Some(bytes),
            Field::Null | Field::Unchanged => None,
        }
    }

    /// The whole row as a JSON object.
    #[must_use]
    pub fn to_json(&self) -> Map<String, Value> {
        self.columns
            .iter()
            .zip(self.fields)
            .map(|(column, field)| (column.name.clone(), value(column, *field)))
            .collect()
    }
}

fn value(column: &Column, field: Field<'_>) -> Value {
    let Field::Text(bytes) = field else { return Value::Null };
    let mut out = Vec::with_capacity(bytes.len() + 2);
    text::write_value(&mut out, text::Kind::of(column.type_oid), bytes);
    serde_json::from_slice(&out).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(bytes).into_owned()))
}

/// A change of a row as a [`Handler`] sees it.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// What happened.
    pub operation: Operation,
    /// To which table.
    pub table: &'a TableId,
    /// The row as it is now; none for DELETE and TRUNCATE.
    pub new: Option<Row<'a>>,
    /// The row as it was, as far as the replica identity tells: for DELETE at least the key; for UPDATE the key if it
    /// changed, or everything under `REPLICA IDENTITY FULL`.
    pub old: Option<Row<'a>>,
    /// The commit's position, from which the version of what is written is made. For SNAPSHOT the position of the snapshot.
    pub lsn: Lsn,
    /// When it was committed; for SNAPSHOT when the copy began.
    pub commit_time: SystemTime,
    /// The transaction; 0 for SNAPSHOT.
    pub xid: u32,
}

/// What to do with a document.
#[derive(Clone, Debug, PartialEq)]
pub struct Action {
    /// The index; none for the one that `tableIndexMapping` names.
    pub index: Option<String>,
    /// The document's id.
    pub id: String,
    /// `routing`; none for Elasticsearch's own choice.
    pub routing: Option<String>,
    /// What to do.
    pub body: ActionBody,
}

/// The part of an [`Action`] that differs.
#[derive(Clone, Debug, PartialEq)]
pub enum ActionBody {
    /// Write the document whole. Versioned: an older one never replaces a newer one.
    Index(Value),
    /// Remove the document. Versioned likewise.
    Delete,
    /// `update` with this body (`script`, `upsert`, ...). Elasticsearch cannot version it: after a crash or a
    /// timeout it may run twice.
    ScriptUpdate(Value),
}

impl Action {
    /// Writes `document` as `id`.
    ///
    /// # Errors
    /// `document` does not serialise to JSON.
    pub fn index(id: impl Into<String>, document: &impl Serialize) -> Result<Self, serde_json::Error> {
        Ok(Self { index: None, id: id.into(), routing: None, body: ActionBody::Index(serde_json::to_value(document)?) })
    }

    /// Removes the document `id`.
    pub fn delete(id: impl Into<String>) -> Self {
        Self { index: None, id: id.into(), routing: None, body: ActionBody::Delete }
    }

    /// Runs a script update on the document `id`.
    pub fn script_update(id: impl Into<String>, update: Value) -> Self {
        Self { index: None, id: id.into(), routing: None, body: ActionBody::ScriptUpdate(update) }
    }

    /// The same in another index than `tableIndexMapping` names.
    #[must_use]
    pub fn in_index(mut self, index: impl Into<String>) -> Self {
        self.index = Some(index.into());
        self
    }

    /// The same with a routing value.
    #[must_use]
    pub fn routed(mut self, routing: impl Into<String>) -> Self {
        self.routing = Some(routing.into());
        self
    }
}

/// Turns changes into actions. The engine has its own, quicker way for those who need no code.
///
/// It is called for each change in the order of commits (for SNAPSHOT: in any order, from several threads), and
/// again for the same change after a crash: it must give the same actions for the same change. No actions: the
/// change is left out, on purpose.
pub trait Handler: Send + Sync {
    /// The actions for `change`.
    fn handle(&self, change: &Change<'_>) -> Vec<Action>;
}

impl<F: Fn(&Change<'_>) -> Vec<Action> + Send + Sync> Handler for F {
    fn handle(&self, change: &Change<'_>) -> Vec<Action> {
        self(change)
    }
}
