//! What PostgreSQL's catalog says about the tables of the configuration.

use std::collections::{BTreeMap, HashMap, HashSet};

use tokio_postgres::Client;

use crate::problem::{Problem, ProblemKind};
use crate::table::{Column, TableId};

/// Type OIDs below this are PostgreSQL's own and the same on every server (`FirstNormalObjectId`).
const FIRST_USER_OID: u32 = 16_384;
const TEXT: u32 = 25;
const TEXT_ARRAY: u32 = 1_009;

/// A table as the catalog describes it now.
#[derive(Clone, Debug)]
pub struct TableInfo {
    /// Its name.
    pub id: TableId,
    /// `pg_class.oid`.
    pub oid: u32,
    /// `pg_class.relkind`: `r` table, `p` partitioned table; others cannot be published.
    pub kind: char,
    /// `pg_class.relreplident`: `d`efault, `f`ull, `i`ndex, `n`othing.
    pub replica_identity: char,
    /// The columns that are published and copied, in order; generated ones are not among them, as PostgreSQL does
    /// not publish them. Types are resolved by [`resolve_types`].
    pub columns: Vec<Column>,
    /// The tables that hold the rows: the table itself, or the leaves of a partitioned one.
    pub leaves: Vec<Leaf>,
}

impl TableInfo {
    /// Names of the columns that name a document, in the order of the key; empty where the table has none.
    #[must_use]
    pub fn key(&self) -> Vec<&str> {
        self.columns.iter().filter(|column| column.key).map(|column| column.name.as_str()).collect()
    }

    /// The columns as a select list.
    #[must_use]
    pub fn select_list(&self) -> String {
        let names: Vec<_> = self.columns.iter().map(|column| crate::table::quote_identifier(&column.name)).collect();
        names.join(", ")
    }
}

/// A table that holds rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Its name.
    pub id: TableId,
    /// `pg_class.oid`.
    pub oid: u32,
    /// `pg_relation_filenode`: changes when the table is rewritten or truncated.
    pub filenode: u32,
    /// Pages now.
    pub pages: u64,
    /// Rows that the last ANALYZE or VACUUM estimated for the present number of pages; none if there was none.
    pub rows: Option<u64>,
}

/// What is wanted of a table.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The table.
    pub id: TableId,
    /// Only these columns; all when empty.
    pub columns: Vec<String>,
}

/// Looks a table up. `None` when there is no such table, or it is no table.
///
/// # Errors
/// The queries fail, or a wanted column does not exist.
pub async fn table(client: &Client, wanted: &Wanted) -> Result<Option<TableInfo>, Problem> {
    let Some(class) = client
        .query_opt(
            "SELECT c.oid, c.relkind::text, c.relreplident::text FROM pg_catalog.pg_class c
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p')",
            &[&wanted.id.schema, &wanted.id.name],
        )
        .await?
    else {
        return Ok(None);
    };
    let (oid, kind, identity): (u32, String, String) = (class.get(0), class.get(1), class.get(2));
    let identity = identity.chars().next().unwrap_or('d');
    let mut columns = columns(client, oid, identity).await?;
    if !wanted.columns.is_empty() {
        if let Some(missing) = wanted.columns.iter().find(|name| !columns.iter().any(|column| column.name == **name)) {
            return Err(Problem::new(
                ProblemKind::Setup,
                format!("table {} has no column {missing:?} that is published", wanted.id),
                "Correct `columns` of that table in the configuration. Generated columns are not published.",
            ));
        }
        columns.retain(|column| wanted.columns.contains(&column.name));
    }
    Ok(Some(TableInfo {
        id: wanted.id.clone(),
        oid,
        kind: kind.chars().next().unwrap_or('r'),
        replica_identity: identity,
        columns,
        leaves: leaves(client, oid).await?,
    }))
}

/// The columns of a table, their types resolved, those of its document key marked.
///
/// The key must be what PostgreSQL sends with an UPDATE or DELETE: the columns of the replica identity's index, else
/// those of the primary key (with FULL the whole row comes, the primary key in it).
///
/// # Errors
/// The query fails.
pub async fn columns(client: &Client, oid: u32, replica_identity: char) -> Result<Vec<Column>, Problem> {
    let rows = client
        .query(
            "SELECT a.attname::text, a.atttypid,
                    a.attnum = ANY (SELECT unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) FROM pg_catalog.pg_index i
                                    WHERE i.indrelid = a.attrelid AND i.indisvalid
                                      AND CASE WHEN $2 THEN i.indisreplident ELSE i.indisprimary END)
             FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
             ORDER BY a.attnum",
            &[&oid, &(replica_identity == 'i')],
        )
        .await?;
    let types: HashSet<u32> = rows.iter().map(|row| row.get(1)).collect();
    let types = resolve_types(client, types).await?;
    Ok(rows
        .iter()
        .map(|row| {
            let type_oid: u32 = row.get(1);
            Column { name: row.get(0), type_oid: types.get(&type_oid).copied().unwrap_or(type_oid), key: row.get(2) }
        })
        .collect())
}

async fn leaves(client: &Client, oid: u32) -> Result<Vec<Leaf>, Problem> {
    let rows = client
        .query(
            "SELECT n.nspname::text, c.relname::text, c.oid, coalesce(pg_catalog.pg_relation_filenode(c.oid), 0::oid),
                    pg_catalog.pg_relation_size(c.oid) / current_setting('block_size')::int8,
                    c.relpages::int8, c.reltuples::float8
             FROM (SELECT $1::oid AS relid WHERE NOT EXISTS
                       (SELECT FROM pg_catalog.pg_partitioned_table WHERE partrelid = $1)
                   UNION ALL
                   SELECT t.relid::oid FROM pg_catalog.pg_partition_tree($1) t WHERE t.isleaf AND t.relid::oid <> $1) l
             JOIN pg_catalog.pg_class c ON c.oid = l.relid
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             ORDER BY n.nspname, c.relname",
            &[&oid],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| {
            let (pages, known_pages, known_rows): (i64, i64, f64) = (row.get(4), row.get(5), row.get(6));
            Leaf {
                id: TableId::new(row.get::<_, String>(0), row.get::<_, String>(1)),
                oid: row.get(2),
                filenode: row.get(3),
                pages: u64::try_from(pages).unwrap_or(0),
                rows: estimate(pages, known_pages, known_rows),
            }
        })
        .collect())
}

/// Rows by the density of the last ANALYZE, as the planner does it (`estimate_rel_size`).
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an estimate")]
fn estimate(pages: i64, known_pages: i64, known_rows: f64) -> Option<u64> {
    if pages == 0 {
        Some(0)
    } else if known_pages > 0 && known_rows >= 0.0 {
        Some((known_rows / known_pages as f64 * pages as f64).round() as u64)
    } else {
        None
    }
}

/// The built-in type whose text form each type shares: a domain its base type, an enum `text`, an array of either an
/// array of those; any other type of an extension or a user `text`. Built-in types stand for themselves.
///
/// # Errors
/// The query fails.
pub async fn resolve_types(
    client: &Client,
    types: impl IntoIterator<Item = u32>,
) -> Result<HashMap<u32, u32>, Problem> {
    struct Type {
        kind: String,
        base: u32,
        element: u32,
        array: u32,
    }
    let types: Vec<u32> = types.into_iter().collect();
    let mut known: BTreeMap<u32, Type> = BTreeMap::new();
    let mut ask: Vec<u32> = types.iter().copied().filter(|&oid| oid >= FIRST_USER_OID).collect();
    while !ask.is_empty() {
        let rows = client
            .query(
                "SELECT oid, typtype::text, typbasetype, CASE WHEN typcategory = 'A' THEN typelem ELSE 0::oid END, typarray
                 FROM pg_catalog.pg_type WHERE oid = ANY ($1)",
                &[&ask],
            )
            .await?;
        ask.clear();
        for row in rows {
            let found = Type { kind: row.get(1), base: row.get(2), element: row.get(3), array: row.get(4) };
            // Built-in elements are asked for too: their array type is wanted.
            ask.extend([found.base, found.element].iter().filter(|&&oid| oid != 0 && !known.contains_key(&oid)));
            known.insert(row.get(0), found);
        }
        ask.retain(|oid| !known.contains_key(oid));
    }
    fn scalar(known: &BTreeMap<u32, Type>, mut oid: u32) -> u32 {
        while let Some(found) = known.get(&oid).filter(|found| found.kind == "d" && found.base != 0) {
            oid = found.base;
        }
        if oid < FIRST_USER_OID {
            return oid;
        }
        let Some(element) = known.get(&oid).map(|found| found.element).filter(|&element| element != 0) else {
            return TEXT;
        };
        let element = scalar(known, element);
        known.get(&element).map(|found| found.array).filter(|&array| array != 0).unwrap_or(TEXT_ARRAY)
    }
    Ok(types.into_iter().map(|oid| (oid, scalar(&known, oid))).collect())
}

/// The root of each partition among the published tables, by the name of the leaf: without
/// `publish_via_partition_root` the stream names the leaf.
///
/// # Errors
/// The query fails.
pub async fn partition_roots(client: &Client, leaf: &TableId) -> Result<Vec<TableId>, Problem> {
    let rows = client
        .query(
            "SELECT n.nspname::text, c.relname::text
             FROM pg_catalog.pg_class l JOIN pg_catalog.pg_namespace ln ON ln.oid = l.relnamespace,
                  pg_catalog.pg_partition_ancestors(l.oid) a
             JOIN pg_catalog.pg_class c ON c.oid = a.relid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE ln.nspname = $1 AND l.relname = $2",
            &[&leaf.schema, &leaf.name],
        )
        .await?;
    Ok(rows.iter().map(|row| TableId::new(row.get::<_, String>(0), row.get::<_, String>(1))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_estimated_by_density_and_unknown_is_not_zero() {
        assert_eq!(estimate(0, 0, -1.0), Some(0));
        assert_eq!(estimate(10, 0, -1.0), None);
        assert_eq!(estimate(20, 10, 500.0), Some(1_000));
    }
}
