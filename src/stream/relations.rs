//! What the stream's relation numbers stand for.

use std::collections::HashMap;
use std::sync::Arc;

use tokio_postgres::Client;

use crate::mapping::{Shape, TableMapping};
use crate::postgres::catalog;
use crate::postgres::pgoutput;
use crate::problem::{Problem, ProblemKind};
use crate::table::{Column, TableId};

/// A relation as the stream announced it last.
#[derive(Debug)]
pub(super) struct Relation {
    /// Its own name: the table's, or that of a partition.
    pub(super) table: TableId,
    /// Where its rows go; none: it is published but not mapped, and left out by design.
    pub(super) mapping: Option<Arc<TableMapping>>,
    /// Its columns.
    pub(super) shape: Shape,
}

/// The announced relations, and the tables that they may be.
pub(super) struct Relations {
    tables: HashMap<TableId, Arc<TableMapping>>,
    known: HashMap<u32, Relation>,
}

impl Relations {
    pub(super) fn new(tables: impl IntoIterator<Item = Arc<TableMapping>>) -> Self {
        let tables = tables.into_iter().map(|mapping| (mapping.table.clone(), mapping)).collect();
        Self { tables, known: HashMap::new() }
    }

    #[inline]
    pub(super) fn get(&self, oid: u32) -> Option<&Relation> {
        self.known.get(&oid)
    }

    /// Takes an announcement in. Its columns hold from here on.
    ///
    /// # Errors
    /// The catalog cannot be read, or a mapped table has no key that PostgreSQL sends.
    pub(super) async fn announce(
        &mut self,
        catalog_client: &Client,
        relation: &pgoutput::Relation<'_>,
    ) -> Result<(), Problem> {
        let table = TableId::new(relation.schema, relation.name);
        let mapping = match self.tables.get(&table) {
            Some(mapping) => Some(Arc::clone(mapping)),
            None => {
                // Without publish_via_partition_root a partition speaks for its root.
                let roots = catalog::partition_roots(catalog_client, &table).await?;
                roots.iter().find_map(|root| self.tables.get(root)).cloned()
            }
        };
        let mut shape = Shape::new(Vec::new());
        if let Some(mapping) = &mapping {
            shape = shape_of(catalog_client, relation, mapping).await?;
        }
        self.known.insert(relation.oid, Relation { table, mapping, shape });
        Ok(())
    }
}

async fn shape_of(
    client: &Client,
    relation: &pgoutput::Relation<'_>,
    mapping: &TableMapping,
) -> Result<Shape, Problem> {
    let types = catalog::resolve_types(client, relation.columns.iter().map(|column| column.type_oid)).await?;
    // With DEFAULT and INDEX the announcement marks the key as it was at that time. FULL marks every column and
    // NOTHING none: then it is the primary key, as the catalog has it now.
    let marked = matches!(relation.replica_identity, b'd' | b'i');
    let keys: Vec<String> = if marked {
        Vec::new()
    } else {
        let columns = catalog::columns(client, relation.oid, 'd').await?;
        columns.into_iter().filter(|column| column.key).map(|column| column.name).collect()
    };
    let columns: Vec<Column> = relation
        .columns
        .iter()
        .map(|column| Column {
            name: column.name.to_owned(),
            type_oid: types.get(&column.type_oid).copied().unwrap_or(column.type_oid),
            key: if marked { column.key } else { keys.iter().any(|key| key == column.name) },
        })
        .collect();
    let shape = Shape::new(columns);
    if shape.key().is_empty() || (!marked && shape.key().len() != keys.len()) {
        return Err(no_key(&mapping.table));
    }
    Ok(shape)
}

/// A table whose rows name no document.
pub(crate) fn no_key(table: &TableId) -> Problem {
    Problem::new(
        ProblemKind::Setup,
        format!("table {table} has no primary key that is published, so its rows name no document"),
        format!(
            "Add a primary key, or set REPLICA IDENTITY USING INDEX with a unique index on columns that are NOT NULL \
             (`replicaIdentity: USING INDEX`), or take {table} out of `tableIndexMapping`."
        ),
    )
}
