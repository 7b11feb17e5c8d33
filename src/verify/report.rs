//! What was found.

use std::collections::BTreeMap;

use serde::Serialize;

/// In what an id differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DifferenceKind {
    /// A row without a document.
    Missing,
    /// A document without a row.
    Extra,
    /// A document that is not its row.
    Different,
}

/// An id whose row and document are not equal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// What it is.
    pub kind: DifferenceKind,
    /// The document's id.
    pub id: String,
    /// The fields that differ, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<String>,
    /// The document's version is ahead of the server: something else wrote it, and no change will replace it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub foreign: bool,
    /// The document's version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// The newest dead letter with this id and a later version: what Elasticsearch called the reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// The document that the row makes, as JSON, when values were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub row: Option<String>,
    /// The document that is there, as JSON, when values were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub document: Option<String>,
}

/// What a repair did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Repaired {
    /// Documents sent, those included that were superseded or refused.
    pub written: u64,
    /// Deletes sent, likewise.
    pub deleted: u64,
    /// Of both, those that a newer version was in the way of.
    pub superseded: u64,
    /// Refused for good by Elasticsearch; they are among the dead letters.
    pub refused: u64,
}

/// What was found of one table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TableReport {
    /// The table.
    pub table: String,
    /// Its index.
    pub index: String,
    /// Rows read.
    pub rows: u64,
    /// Documents read.
    pub documents: u64,
    /// Rows without a document.
    pub missing: u64,
    /// Documents without a row.
    pub extra: u64,
    /// Documents that are not their row.
    pub different: u64,
    /// Ids that could not be compared, by the reason.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub not_compared: BTreeMap<String, u64>,
    /// What the repair did, if one was asked for and needed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repaired: Option<Repaired>,
    /// Differences that the repair left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left: Option<u64>,
    /// The first differences; after a repair those that it left.
    #[serde(skip)]
    pub differences: Vec<Difference>,
}

impl TableReport {
    /// Differences that there are now.
    #[must_use]
    pub fn unequal(&self) -> u64 {
        self.left.unwrap_or(self.missing + self.extra + self.different)
    }
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Table by table.
    pub tables: Vec<TableReport>,
    /// What makes documents differ from rows and may be meant so, a sentence each.
    pub notes: Vec<String>,
}

/// The outcome as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every row has its document, and no document is left over.
    Equal,
    /// Some differ, for certain.
    Different,
    /// None differs for certain, but some could not be compared.
    NotCompared,
}

impl Report {
    /// The outcome as a whole.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        if self.tables.iter().any(|table| table.unequal() > 0) {
            Outcome::Different
        } else if self.tables.iter().any(|table| !table.not_compared.is_empty()) {
            Outcome::NotCompared
        } else {
            Outcome::Equal
        }
    }
}
