//! What the stream's relation numbers stand for.

use std::collections::HashMap;
use std::sync::Arc;

use tokio_postgres::Client;

use crate::mapping::{Shape, TableMapping};
use crate::postgres::catalog::{self, KeyColumn};
use crate::postgres::pgoutput;
use crate::problem::{Problem, ProblemKind};
use crate::table::{Column, TableId};

/// A relation as the stream announced it last.
#[derive(Debug)]
pub(super) struct Relation {
    /// `pg_class.oid`.
    pub(super) oid: u32,
    /// Its own name at that time: the table's, or that of a partition.
    pub(super) table: TableId,
    /// It is the mapped table itself, not a partition of it.
    pub(super) whole: bool,
    /// Where its rows go; none: it is published but not mapped, and left out by design.
    pub(super) mapping: Option<Arc<TableMapping>>,
    /// Its columns.
    pub(super) shape: Shape,
    /// The numbers of those that name its documents; none: one that was dropped since.
    key: Vec<Option<i16>>,
}

/// A mapped table.
struct Mapped {
    mapping: Arc<TableMapping>,
    /// The relation that had its name last.
    oid: u32,
}

/// The announced relations, and the tables that they may be.
pub(super) struct Relations {
    tables: HashMap<TableId, Mapped>,
    known: HashMap<u32, Relation>,
    /// What [`Relation::key`] was when it was followed last.
    keys: HashMap<u32, Vec<Option<i16>>>,
    need_key: bool,
}

impl Relations {
    /// Looks the tables up. `need_key`: the key names the documents; else a handler does.
    ///
    /// # Errors
    /// The catalog cannot be read.
    pub(super) async fn of(
        client: &Client,
        mappings: impl IntoIterator<Item = Arc<TableMapping>>,
        need_key: bool,
    ) -> Result<Self, Problem> {
        let (mut tables, mut keys) = (HashMap::new(), HashMap::new());
        for mapping in mappings {
            let (oid, key) = catalog::identity(client, &mapping.table).await?.unwrap_or_default();
            keys.insert(oid, key.iter().map(|column| Some(column.number)).collect());
            tables.insert(mapping.table.clone(), Mapped { mapping, oid });
        }
        Ok(Self { tables, known: HashMap::new(), keys, need_key })
    }

    #[inline]
    pub(super) fn get(&self, oid: u32) -> Option<&Relation> {
        self.known.get(&oid)
    }

    /// Takes an announcement of transaction `xid` in. Its columns hold from here on. True when documents may have other
    /// ids than before, so that the table has to be copied again; said again until it is [`followed`](Self::followed).
    ///
    /// # Errors
    /// The catalog cannot be read, a mapped table has no key that PostgreSQL sends, or has been renamed and no other one has its name.
    pub(super) async fn announce(
        &mut self,
        client: &Client,
        relation: &pgoutput::Relation<'_>,
        xid: u32,
    ) -> Result<bool, Problem> {
        let oid = relation.oid;
        let announced = TableId::new(relation.schema, relation.name);
        let names = catalog::names(client, oid).await?;
        // Without publish_via_partition_root a partition speaks for its root. By today's names before the one of then,
        // which another table may have by now.
        let found = names.iter().chain([&announced]).find(|name| self.tables.contains_key(*name)).cloned();
        let mut entry = Relation {
            oid,
            table: announced,
            whole: false,
            mapping: None,
            shape: Shape::new(Vec::new()),
            key: Vec::new(),
        };
        let Some(mapped) = found.and_then(|name| self.tables.get(&name)) else {
            if let Some(mapped) = self.tables.values().find(|mapped| mapped.oid == oid) {
                let table = &mapped.mapping.table;
                // Another table that has the name now is copied again, by the looks at definitions.
                if catalog::identity(client, table).await?.is_none() {
                    return Err(renamed(table, &entry.table));
                }
            }
            self.known.insert(oid, entry);
            return Ok(false);
        };
        let mapping = Arc::clone(&mapped.mapping);
        entry.whole = entry.table == mapping.table || names.first() == Some(&mapping.table);
        let (another, root) = (entry.whole && mapped.oid != oid, mapped.oid);
        let (shape, key) = shape_of(client, relation, &mapping, (!entry.whole).then_some(root), xid).await?;
        // With any other identity the old row, by whose content its document is named, would not come.
        let by_whole_rows = shape.names_by_whole_rows() && relation.replica_identity == b'f';
        if self.need_key && key.is_empty() && !by_whole_rows {
            return Err(no_key(&mapping.table));
        }
        let changed = self.keys.get(&oid).is_some_and(|before| *before != key);
        entry.shape = shape;
        entry.key = key;
        entry.mapping = Some(mapping);
        self.known.insert(oid, entry);
        Ok(self.need_key && (another || changed))
    }

    /// What follows from the last announcement of a relation is done. Until then a pause may have dropped it half-way,
    /// and the stream announces the relation again.
    pub(super) fn followed(&mut self, oid: u32) {
        let Some(relation) = self.known.get(&oid) else { return };
        let Some(mapping) = &relation.mapping else { return };
        if relation.whole
            && let Some(mapped) = self.tables.get_mut(&mapping.table)
        {
            mapped.oid = oid;
        }
        self.keys.insert(oid, relation.key.clone());
    }
}

/// The columns of an announcement, and the numbers of those that name a document. `root`: the table that it is a
/// partition of.
async fn shape_of(
    client: &Client,
    relation: &pgoutput::Relation<'_>,
    mapping: &TableMapping,
    root: Option<u32>,
    xid: u32,
) -> Result<(Shape, Vec<Option<i16>>), Problem> {
    let types = catalog::resolve_types(client, relation.columns.iter().map(|column| column.type_oid)).await?;
    let announced: Vec<&str> = relation.columns.iter().map(|column| column.name).collect();
    let today = catalog::today(client, relation.oid, xid, &announced).await?.map(|today| today.columns);
    let today = today.unwrap_or_else(|| vec![None; announced.len()]);
    // With DEFAULT and INDEX the announcement marks the key as it was at that time. FULL marks every column and
    // NOTHING none: then it is the primary key, as the catalog has it now. Columns may have been renamed in between.
    let marked = matches!(relation.replica_identity, b'd' | b'i');
    let mut key: Vec<usize> = if marked {
        relation.columns.iter().enumerate().filter(|(_, column)| column.key).map(|(at, _)| at).collect()
    } else {
        let key = catalog::key(client, relation.oid, 'd').await?;
        let place = |wanted: &KeyColumn| today.iter().position(|column| column.as_ref() == Some(wanted));
        let places: Vec<usize> = key.iter().filter_map(place).collect();
        if places.len() == key.len() { places } else { Vec::new() }
    };
    let shape = |key: &[usize]| {
        let columns = relation.columns.iter().enumerate().map(|(at, column)| Column {
            name: column.name.to_owned(),
            type_oid: types.get(&column.type_oid).copied().unwrap_or(column.type_oid),
            key: key.contains(&at),
        });
        mapping.shape(columns.collect(), Some(key.to_vec()))
    };
    if root.is_some()
        && let Some((_, names)) = catalog::identity(client, &mapping.table).await?
    {
        // The copy names documents by the table's key, in the table's order of columns.
        let place = |wanted: &KeyColumn| {
            let is_it = |column: &Option<KeyColumn>| column.as_ref().is_some_and(|column| column.name == wanted.name);
            today.iter().position(is_it).filter(|&at| !marked || relation.columns[at].key)
        };
        if let Some(places) = names.iter().map(place).collect() {
            key = places;
        }
    }
    let numbers = key.iter().map(|&at| today[at].as_ref().map(|column| column.number)).collect();
    Ok((shape(&key), numbers))
}

fn renamed(table: &TableId, now: &TableId) -> Problem {
    Problem::new(
        ProblemKind::Setup,
        format!("table {table} has been renamed: its changes come as those of {now} now, which goes to no index"),
        format!("Rename it back, or write {now} in the configuration."),
    )
}

/// A table whose rows name no document.
pub(crate) fn no_key(table: &TableId) -> Problem {
    Problem::new(
        ProblemKind::Setup,
        format!("table {table} has no primary key that is published, so its rows name no document"),
        format!(
            "Add a primary key, or set REPLICA IDENTITY USING INDEX with a unique index on columns that are NOT NULL \
             (`replicaIdentity: USING INDEX`), or take {table} out of `tableIndexMapping`. Where no two rows are ever equal, \
             REPLICA IDENTITY FULL and `elasticsearch.tablesWithoutKey: hash` do as well."
        ),
    )
}
