//! What PostgreSQL's catalog says about the tables of the configuration.

use std::collections::{BTreeMap, HashMap, HashSet};

use tokio_postgres::Client;

use crate::problem::{Problem, ProblemKind};
use crate::table::{Column, TableId};
use crate::text::stand_in;

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
    /// The columns that are published and copied, in order; generated ones are among them only where PostgreSQL publishes
    /// them. Types are resolved by [`resolve_types`].
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
    let mut columns = columns(client, oid, identity, &wanted.columns).await?;
    if !wanted.columns.is_empty() {
        if let Some(missing) = wanted.columns.iter().find(|name| !columns.iter().any(|column| column.name == **name)) {
            return Err(Problem::new(
                ProblemKind::Setup,
                format!("table {} has no column {missing:?} that is published", wanted.id),
                "Correct `columns` of that table in the configuration.",
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

/// A column by its number, which stays when it is renamed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyColumn {
    /// `pg_attribute.attnum`.
    pub number: i16,
    /// Its name.
    pub name: String,
}

/// The columns that name a document, in their order in the table.
///
/// They must be what PostgreSQL sends with an UPDATE or DELETE: the columns of the replica identity's index, else
/// those of the primary key (with FULL the whole row comes, the primary key in it).
///
/// # Errors
/// The query fails.
pub async fn key(client: &Client, oid: u32, replica_identity: char) -> Result<Vec<KeyColumn>, Problem> {
    let rows = client
        .query(
            "SELECT a.attnum, a.attname::text FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = $1 AND NOT a.attisdropped
               AND a.attnum IN (SELECT unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) FROM pg_catalog.pg_index i
                                WHERE i.indrelid = $1 AND i.indisvalid
                                  AND CASE WHEN $2 THEN i.indisreplident ELSE i.indisprimary END)
             ORDER BY a.attnum",
            &[&oid, &(replica_identity == 'i')],
        )
        .await?;
    Ok(rows.iter().map(|row| KeyColumn { number: row.get(0), name: row.get(1) }).collect())
}

/// The columns of a table, their types resolved, those of its [`key`] marked. Of the generated ones only those that are
/// `named`.
///
/// # Errors
/// The queries fail.
pub async fn columns(
    client: &Client,
    oid: u32,
    replica_identity: char,
    named: &[String],
) -> Result<Vec<Column>, Problem> {
    let rows = client
        .query(
            "SELECT a.attname::text, a.atttypid, a.attnum FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped
               AND (a.attgenerated = '' OR a.attname = ANY ($2))
             ORDER BY a.attnum",
            &[&oid, &named],
        )
        .await?;
    let key = key(client, oid, replica_identity).await?;
    let types: HashSet<u32> = rows.iter().map(|row| row.get(1)).collect();
    let types = resolve_types(client, types).await?;
    Ok(rows
        .iter()
        .map(|row| {
            let (type_oid, number): (u32, i16) = (row.get(1), row.get(2));
            Column {
                name: row.get(0),
                type_oid: types.get(&type_oid).copied().unwrap_or(type_oid),
                key: key.iter().any(|column| column.number == number),
            }
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
/// array of those; some types of extensions a [`stand_in`]; any other type of an extension or a user `text`. Built-in
/// types stand for themselves.
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
        name: String,
        delimiter: String,
    }
    let types: Vec<u32> = types.into_iter().collect();
    let mut known: BTreeMap<u32, Type> = BTreeMap::new();
    let mut ask: Vec<u32> = types.iter().copied().filter(|&oid| oid >= FIRST_USER_OID).collect();
    while !ask.is_empty() {
        let rows = client
            .query(
                "SELECT oid, typtype::text, typbasetype, CASE WHEN typcategory = 'A' THEN typelem ELSE 0::oid END, typarray,
                        typname::text, typdelim::text
                 FROM pg_catalog.pg_type WHERE oid = ANY ($1)",
                &[&ask],
            )
            .await?;
        ask.clear();
        for row in rows {
            let (name, delimiter) = (row.get(5), row.get(6));
            let (base, element, array) = (row.get(2), row.get(3), row.get(4));
            let found = Type { kind: row.get(1), base, element, array, name, delimiter };
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
        let Some(found) = known.get(&oid) else { return TEXT };
        if found.element == 0 {
            return stand_in::of(&found.name).filter(|_| found.kind == "b").unwrap_or(TEXT);
        }
        let delimiter = known.get(&found.element).map(|element| element.delimiter.as_str());
        let element = scalar(known, found.element);
        if let Some(array) = stand_in::array_of(element) {
            return array;
        }
        let array = known.get(&element).map(|found| found.array).filter(|&array| array != 0);
        // An array that is printed with another delimiter stays whole.
        array.unwrap_or(if delimiter == Some(",") { TEXT_ARRAY } else { TEXT })
    }
    Ok(types.into_iter().map(|oid| (oid, scalar(&known, oid))).collect())
}

/// The name that a relation has now, and those of the tables that it is a partition of, the nearest first; empty when it
/// is gone. By oid: the name under which the stream announces it may be an old one.
///
/// # Errors
/// The query fails.
pub async fn names(client: &Client, oid: u32) -> Result<Vec<TableId>, Problem> {
    let rows = client
        .query(
            "SELECT n.nspname::text, c.relname::text
             FROM (SELECT $1::oid, 0 UNION ALL
                   SELECT relid::oid, place FROM pg_catalog.pg_partition_ancestors($1) WITH ORDINALITY AS a (relid, place)
                  ) AS l (relid, place)
             JOIN pg_catalog.pg_class c ON c.oid = l.relid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             ORDER BY l.place",
            &[&oid],
        )
        .await?;
    Ok(rows.iter().map(|row| TableId::new(row.get::<_, String>(0), row.get::<_, String>(1))).collect())
}

/// The oid that a table has now and the numbers of its key's columns, as [`columns`] marks them; `None` when it is gone.
///
/// # Errors
/// The queries fail.
pub async fn identity(client: &Client, table: &TableId) -> Result<Option<(u32, Vec<KeyColumn>)>, Problem> {
    let class = client
        .query_opt(
            "SELECT c.oid, c.relreplident::text FROM pg_catalog.pg_class c
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2",
            &[&table.schema, &table.name],
        )
        .await?;
    let Some(class) = class else { return Ok(None) };
    let (oid, identity): (u32, String) = (class.get(0), class.get(1));
    Ok(Some((oid, key(client, oid, identity.chars().next().unwrap_or('d')).await?)))
}

/// A relation that the stream announced, as it is now.
#[derive(Clone, Debug)]
pub struct Today {
    /// The name.
    pub table: TableId,
    /// Its rows are in partitions.
    pub partitioned: bool,
    /// Each announced column; none: it was dropped since.
    pub columns: Vec<Option<KeyColumn>>,
}

/// What has become of a relation whose columns had the names of `announced` when transaction `xid` changed it; `None`
/// when it is gone.
///
/// # Errors
/// The queries fail.
pub async fn today(client: &Client, oid: u32, xid: u32, announced: &[&str]) -> Result<Option<Today>, Problem> {
    let class = client
        .query_opt(
            "SELECT n.nspname::text, c.relname::text, c.relkind = 'p',
                    EXISTS (SELECT FROM pg_catalog.pg_publication_rel r WHERE pg_catalog.to_jsonb(r) ->> 'prattrs' IS NOT NULL)
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1",
            &[&oid],
        )
        .await?;
    let Some(class) = class else { return Ok(None) };
    // Columns that were there when it was announced, and those that were added since. What was dropped before is not
    // among them: its row in the catalog is older than the transaction.
    let rows = client
        .query(
            "SELECT a.attnum, a.attname::text, a.attisdropped FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = $1 AND a.attnum > 0 AND (a.attgenerated = '' OR a.attname = ANY ($3))
               AND (NOT a.attisdropped OR pg_catalog.age(a.xmin) <= pg_catalog.age($2::text::pg_catalog.xid))
             ORDER BY a.attnum",
            &[&oid, &xid.to_string(), &announced],
        )
        .await?;
    let present: Vec<Option<KeyColumn>> = rows
        .iter()
        .map(|row| (!row.get::<_, bool>(2)).then(|| KeyColumn { number: row.get(0), name: row.get(1) }))
        .collect();
    Ok(Some(Today {
        table: TableId::new(class.get::<_, String>(0), class.get::<_, String>(1)),
        partitioned: class.get(2),
        columns: pair(announced, &present, class.get(3)),
    }))
}

/// Pairs columns with those of the same name, and renamed ones by their place: PostgreSQL announces columns in the
/// order of their numbers, and new ones get higher numbers. A list of columns that is published makes gaps that are not
/// known here (`lists`); then only names count.
fn pair(announced: &[&str], present: &[Option<KeyColumn>], lists: bool) -> Vec<Option<KeyColumn>> {
    let by_name =
        |name: &str| present.iter().position(|column| column.as_ref().is_some_and(|column| column.name == name));
    let in_order = !lists
        && announced.len() <= present.len()
        && announced.iter().enumerate().all(|(at, name)| by_name(name).is_none_or(|found| found == at));
    let place = |(at, name): (usize, &&str)| if in_order { Some(at) } else { by_name(name) };
    announced.iter().enumerate().map(|column| place(column).and_then(|at| present[at].clone())).collect()
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

    #[test]
    fn renamed_columns_are_found_by_their_place_and_dropped_ones_are_not() {
        let column = |number: i16, name: &str| Some(KeyColumn { number, name: name.to_owned() });
        let (id, text, more) = (column(1, "id"), column(3, "text"), column(4, "more"));
        let now = [id.clone(), column(2, "new"), None, more.clone()];
        let found = pair(&["id", "old", "gone"], &now, false);
        assert_eq!(found, [id.clone(), column(2, "new"), None]);
        // Lists of columns: nothing that is not published may be taken for something that is.
        assert_eq!(pair(&["id", "old"], &now, true), [id.clone(), None]);
        // Another order than that of the numbers, so that places mean nothing.
        assert_eq!(pair(&["id", "more", "text"], &[id.clone(), text.clone(), more.clone()], false), [id, more, text]);
    }
}
