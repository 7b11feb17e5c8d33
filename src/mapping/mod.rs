//! A row to its document: the document's id, its content, and an embedder's [`Handler`] in their place.

mod document_id;

use std::sync::Arc;
use std::time::SystemTime;

pub use document_id::{read_id, write_id};

use crate::change::{Change, Field, Handler, Operation, Row};
use crate::config::{Config, Mode, NumericAs, WithoutKey};
use crate::lsn::Lsn;
use crate::problem::{Problem, ProblemKind};
use crate::sink::{Body, Target};
use crate::table::{Column, TableId};
use crate::text::Encoder;

/// A table of the configuration and the index it goes to.
#[derive(Clone, Debug)]
pub struct TableMapping {
    /// The table.
    pub table: TableId,
    /// Its position in the status.
    pub number: usize,
    /// The index, prepared for bulk bodies.
    pub target: Target,
    /// The index's name.
    pub index: String,
    /// No other table goes to this index: documents that no row accounts for may be removed.
    pub exclusive: bool,
    /// How its columns of the type `numeric` are written.
    pub numeric_as: NumericAs,
    /// What becomes of it if it has no key.
    pub without_key: WithoutKey,
}

impl TableMapping {
    /// How rows of these columns become this table's documents. `key`: positions of the key's columns in the order of the
    /// id; those that are marked, where none. Without a key whole rows name the documents, if the configuration says so.
    #[must_use]
    pub fn shape(&self, mut columns: Vec<Column>, key: Option<Vec<usize>>) -> Shape {
        if self.numeric_as == NumericAs::String {
            for column in &mut columns {
                column.type_oid = match column.type_oid {
                    NUMERIC => TEXT,
                    NUMERIC_ARRAY => TEXT_ARRAY,
                    other => other,
                };
            }
        }
        let mut shape = match key {
            Some(key) => Shape::with_key(columns, key),
            None => Shape::new(columns),
        };
        if shape.key.is_empty() && self.without_key == WithoutKey::Hash {
            // A partition may have its columns in another order.
            let mut by_name: Vec<usize> = (0..shape.columns.len()).collect();
            by_name.sort_by_key(|&at| &shape.columns[at].name);
            shape.whole = Some(by_name.into());
        }
        shape
    }
}

const NUMERIC: u32 = 1700;
const NUMERIC_ARRAY: u32 = 1231;
const TEXT: u32 = 25;
const TEXT_ARRAY: u32 = 1009;

/// The tables that go somewhere, in the order of the publication's list, then of the mapping.
///
/// `handled`: an embedder's code says where changes go, so that a table needs no index.
///
/// # Errors
/// There is none.
pub fn tables(config: &Config, handled: bool) -> Result<Vec<Arc<TableMapping>>, Problem> {
    let indices = &config.elasticsearch.table_index_mapping;
    let listed = match config.mode() {
        Mode::SnapshotOnly if !config.cdc.snapshot.tables.is_empty() => &config.cdc.snapshot.tables,
        _ => &config.cdc.publication.tables,
    };
    let mut tables: Vec<TableId> = Vec::new();
    // Without a mapping only a handler can say where a table goes.
    let goes_somewhere = |id: &&TableId| handled || indices.contains_key(*id);
    for id in listed.iter().map(|table| &table.id).filter(goes_somewhere).chain(indices.keys()) {
        if !tables.contains(id) && config.cdc.heartbeat.as_ref().is_none_or(|heartbeat| heartbeat.table != *id) {
            tables.push(id.clone());
        }
    }
    if tables.is_empty() {
        return Err(Problem::new(
            ProblemKind::Config,
            "no table goes to any index",
            "Map at least one in `elasticsearch.tableIndexMapping`, such as `public.users: users`.",
        ));
    }
    let mapping = |(number, table): (usize, TableId)| {
        let index = indices.get(&table).cloned().unwrap_or_default();
        let exclusive = indices.values().filter(|other| **other == index).count() == 1;
        let target = Target::new(&index, u32::try_from(number).unwrap_or(u32::MAX));
        let (numeric_as, without_key) = (config.elasticsearch.numeric_as, config.elasticsearch.without_key);
        Arc::new(TableMapping { table, number, target, index, exclusive, numeric_as, without_key })
    };
    Ok(tables.into_iter().enumerate().map(mapping).collect())
}

/// What the tables are called, by their numbers.
#[must_use]
pub fn names(tables: &[Arc<TableMapping>]) -> Vec<String> {
    tables.iter().map(|table| table.table.to_string()).collect()
}

/// The columns of a table at one time, prepared for encoding.
#[derive(Debug)]
pub struct Shape {
    columns: Vec<Column>,
    key: Vec<usize>,
    /// Where there is no key and the whole row names the document: all columns, in the order of the digest.
    whole: Option<Box<[usize]>>,
    encoder: Encoder,
}

impl Shape {
    /// Rows of these columns. Those marked as key name the document.
    #[must_use]
    pub fn new(columns: Vec<Column>) -> Self {
        let key = columns.iter().enumerate().filter(|(_, column)| column.key).map(|(at, _)| at).collect();
        Self::with_key(columns, key)
    }

    /// The same with the positions of the key's columns in the order of the id: a partition may have its columns in
    /// another order than its table.
    #[must_use]
    pub fn with_key(columns: Vec<Column>, key: Vec<usize>) -> Self {
        let encoder = Encoder::new(&columns);
        Self { columns, key, whole: None, encoder }
    }

    /// The columns in order.
    #[must_use]
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// Positions of the columns that name the document, in the order of the id.
    #[must_use]
    pub fn key(&self) -> &[usize] {
        &self.key
    }

    /// The whole row names the document.
    #[must_use]
    pub fn names_by_whole_rows(&self) -> bool {
        self.whole.is_some()
    }

    /// The encoder of whole rows.
    #[must_use]
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// Writes the id of a row's document into `id`, which is emptied first. False when a key column was not sent or
    /// is NULL, or a column of a row without a key was not sent: the row names no document.
    #[inline]
    pub fn id<'a>(&self, id: &mut Vec<u8>, fields: impl Iterator<Item = Field<'a>> + Clone) -> bool {
        id.clear();
        if let &[at] = self.key.as_slice() {
            let Some(Field::Text(text)) = fields.clone().nth(at) else { return false };
            id.extend_from_slice(if text.is_empty() { document_id::EMPTY } else { text });
            return true;
        }
        if let Some(columns) = &self.whole {
            return document_id::write_digest(id, columns.iter().map(|&at| fields.clone().nth(at)));
        }
        !self.key.is_empty() && write_id(id, self.key.iter().map(|&at| fields.clone().nth(at)))
    }

    /// The row is from before the key: a column of it is NULL. So it comes under `REPLICA IDENTITY FULL`, where the key is
    /// that of today. No document has its name, and a table whose key has changed is copied again.
    #[must_use]
    pub fn precedes_key<'a>(&self, fields: impl Iterator<Item = Field<'a>> + Clone) -> bool {
        self.key.iter().any(|&at| matches!(fields.clone().nth(at), Some(Field::Null)))
    }
}

/// A handler's action that does not serialise to JSON.
pub(crate) fn unwritable(error: serde_json::Error) -> Problem {
    Problem::new(
        ProblemKind::Internal,
        format!("the handler gave an action that cannot be written as JSON: {error}"),
        "Mend the handler: maps need keys that are strings, and numbers must be finite.",
    )
}

/// A change on its way to an embedder's handler.
pub struct Handled<'a> {
    /// The embedder's code.
    pub handler: &'a Arc<dyn Handler>,
    /// Where the change comes from and what it is.
    pub mapping: &'a TableMapping,
    /// Position of the commit, or of the snapshot.
    pub lsn: Lsn,
    /// When it was committed.
    pub commit_time: SystemTime,
    /// The transaction.
    pub xid: u32,
}

impl Handled<'_> {
    /// The actions for a change of this kind with these rows.
    #[must_use]
    pub fn actions(
        &self,
        operation: Operation,
        new: Option<Row<'_>>,
        old: Option<Row<'_>>,
    ) -> Vec<crate::change::Action> {
        self.handler.handle(&Change {
            operation,
            table: &self.mapping.table,
            new,
            old,
            lsn: self.lsn,
            commit_time: self.commit_time,
            xid: self.xid,
        })
    }
}

/// Writes one row as the document `id`.
///
/// # Errors
/// The fields do not fit the columns, or one was not sent. Nothing is written then.
#[inline]
pub fn write_row<'a>(
    body: &mut Body,
    target: &Target,
    shape: &Shape,
    id: &[u8],
    version: u64,
    fields: impl IntoIterator<Item = Field<'a>>,
) -> Result<(), crate::text::RowError> {
    let mut outcome = Ok(());
    body.index(target, id, version, |out| outcome = shape.encoder().row(out, fields));
    if outcome.is_err() {
        body.truncate_last();
    }
    outcome
}
