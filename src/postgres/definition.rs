//! What a mapped table is at a moment, as far as its documents depend on it and the stream does not tell.
//!
//! The stream brings changes of rows. That a column was added with a default, a type changed, a partition attached with
//! its rows, or that nothing was published for a while, it does not bring. So the table's definition is kept with each
//! copy, and compared with the catalog of today.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use crate::problem::Problem;
use crate::table::{TableId, quote_identifier};

/// A table's definition, by the rows of the catalog alone: read under an older snapshot it is that of then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// `pg_class.oid`.
    pub oid: u32,
    /// Its rows are in partitions.
    pub partitioned: bool,
    /// Columns that it has had so far, dropped ones included.
    columns_ever: i16,
    columns: Vec<Column>,
    /// Numbers of the columns that name its documents; empty where there is no key.
    pub key: Vec<i16>,
    /// The tables that hold its rows.
    pub leaves: Vec<Leaf>,
    /// The publication; none where there is none of the configured name.
    pub publication: Option<Publication>,
}

/// A published column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Column {
    number: i16,
    name: String,
    r#type: u32,
    modifier: i32,
    /// The transaction that altered it last.
    #[serde(default)]
    altered: String,
    /// `pg_attrdef.oid` of a generated column.
    expression: Option<u32>,
    /// Of an enum: the words of its values, each behind the transaction that wrote it.
    labels: Option<BTreeMap<u32, String>>,
}

/// A table that holds rows: the table itself, or a partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaf {
    /// `pg_class.oid`.
    pub oid: u32,
    filenode: u32,
    /// Its TOAST table; 0 where it has none. ALTER TABLE that writes rows anew makes another, and nothing else does.
    #[serde(default)]
    toast: u32,
    /// The publication has it by its name: PostgreSQL does not let it become unlogged.
    #[serde(default)]
    named: bool,
    /// The transactions that made it a partition, and its parents those of theirs.
    attached: Vec<String>,
    /// Why it is published, as in [`Publication`]. Not of the table itself.
    members: Vec<u32>,
    /// Its changes are not in the WAL.
    pub unlogged: bool,
    /// PostgreSQL has nothing to name its rows by in the stream: where UPDATE and DELETE are published, it refuses them.
    pub nameless: bool,
}

/// The publication, as far as a table depends on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    oid: u32,
    /// The transaction that altered it last.
    altered: String,
    all: bool,
    /// `publish_via_partition_root`.
    pub via_root: bool,
    /// What it publishes of INSERT, UPDATE, DELETE and TRUNCATE, in that order.
    pub operations: [bool; 4],
    /// Why it publishes the table: oids of rows of the catalog, with a schema's the transaction that put the table there.
    /// What was taken out and put in again has another.
    members: Vec<u32>,
}

/// A table, or a partition of it, as the stream announced it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announced {
    /// The table itself. A partition may have its columns in another order.
    pub whole: bool,
    /// Names and types.
    pub columns: Vec<(String, u32)>,
}

/// A definition, and when it was so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What was seen.
    pub definition: Definition,
    /// Every transaction below this one had ended by then.
    pub horizon: u64,
}

/// Looks at the tables; in the order asked for, none for one that is not there. Under the snapshot of `client`'s
/// transaction, if it has one.
///
/// # Errors
/// The query fails.
pub async fn look(
    client: &Client,
    server: u32,
    tables: &[TableId],
    publication: &str,
) -> Result<Vec<Option<Seen>>, Problem> {
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    let rows = client.query(&sql(server), &[&schemas, &names, &publication]).await?;
    let mut seen: Vec<Option<Seen>> = tables.iter().map(|_| None).collect();
    for row in rows {
        let (number, definition, horizon): (i64, String, i64) = (row.get(0), row.get(1), row.get(2));
        let definition = serde_json::from_str(&definition).map_err(|error| {
            Problem::new(
                crate::problem::ProblemKind::Internal,
                format!("the catalog's answer about a table cannot be read: {error}"),
                "Report this.",
            )
        })?;
        let place = usize::try_from(number - 1).ok().and_then(|number| seen.get_mut(number));
        if let Some(place) = place {
            *place = Some(Seen { definition, horizon: u64::try_from(horizon).unwrap_or(0) });
        }
    }
    Ok(seen)
}

/// Tables of the catalog only: functions such as `pg_partition_tree` say what is so now, whatever the snapshot.
fn sql(server: u32) -> String {
    let (schemas, listed) = if server >= 150_000 {
        (
            "UNION ALL SELECT r.n, r.oid, m.oid FROM relations r JOIN pg_catalog.pg_class c ON c.oid = r.oid
             JOIN pg_catalog.pg_publication_namespace m ON m.pnnspid = c.relnamespace JOIN publication p ON p.oid = m.pnpubid
             UNION ALL SELECT r.n, r.oid, d.xmin::text::oid FROM relations r JOIN pg_catalog.pg_class c ON c.oid = r.oid
             JOIN pg_catalog.pg_publication_namespace m ON m.pnnspid = c.relnamespace JOIN publication p ON p.oid = m.pnpubid
             JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = r.oid AND d.objsubid = 0
              AND d.refclassid = 'pg_catalog.pg_namespace'::regclass AND d.refobjid = c.relnamespace",
            "(SELECT m.prattrs::int2[] FROM pg_catalog.pg_publication_rel m JOIN publication p ON p.oid = m.prpubid
              WHERE m.prrelid = w.oid)",
        )
    } else {
        ("", "NULL::int2[]")
    };
    let generated = if server >= 180_000 {
        "OR a.attgenerated = 's' AND (l.list IS NOT NULL OR EXISTS (SELECT FROM publication WHERE pubgencols = 's'))"
    } else {
        ""
    };
    format!(
        "WITH RECURSIVE wanted AS (
             SELECT w.n, c.oid, c.relkind, c.relreplident, c.relnatts
             FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS w (schema, name, n)
             JOIN pg_catalog.pg_namespace s ON s.nspname = w.schema
             JOIN pg_catalog.pg_class c ON c.relnamespace = s.oid AND c.relname = w.name AND c.relkind IN ('r', 'p')
         ), tree (n, oid, attached) AS (
             SELECT n, oid, ARRAY[]::text[] FROM wanted
             UNION ALL
             SELECT t.n, i.inhrelid, t.attached || i.xmin::text
             FROM tree t JOIN pg_catalog.pg_class c ON c.oid = t.oid AND c.relkind = 'p'
             JOIN pg_catalog.pg_inherits i ON i.inhparent = t.oid AND NOT i.inhdetachpending
         ), roots (n, oid) AS (
             SELECT n, oid FROM wanted
             UNION ALL
             SELECT r.n, i.inhparent FROM roots r JOIN pg_catalog.pg_class c ON c.oid = r.oid AND c.relispartition
             JOIN pg_catalog.pg_inherits i ON i.inhrelid = r.oid
         ), relations (n, oid) AS (
             SELECT n, oid FROM tree UNION SELECT n, oid FROM roots
         ), publication AS (
             SELECT p.*, p.xmin::text AS altered FROM pg_catalog.pg_publication p WHERE p.pubname = $3
         ), members (n, relation, oid) AS (
             SELECT r.n, r.oid, m.oid FROM relations r JOIN pg_catalog.pg_publication_rel m ON m.prrelid = r.oid
             JOIN publication p ON p.oid = m.prpubid
             {schemas}
         ), leaves AS (
             SELECT t.n, t.oid, t.attached, c.relfilenode, c.reltoastrelid, c.relpersistence, c.relreplident
             FROM tree t JOIN pg_catalog.pg_class c ON c.oid = t.oid AND c.relkind <> 'p'
         )
         SELECT w.n, pg_catalog.jsonb_build_object(
             'oid', w.oid::int8, 'partitioned', w.relkind = 'p', 'columns_ever', w.relnatts,
             'columns', (
                 SELECT coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
                     'number', a.attnum, 'name', a.attname, 'type', a.atttypid::int8, 'modifier', a.atttypmod,
                     'altered', a.xmin::text,
                     'expression', (SELECT d.oid::int8 FROM pg_catalog.pg_attrdef d
                                    WHERE d.adrelid = a.attrelid AND d.adnum = a.attnum AND a.attgenerated <> ''),
                     'labels', (SELECT pg_catalog.jsonb_object_agg(e.oid::text, e.xmin::text || ' ' || e.enumlabel) FROM pg_catalog.pg_type t
                                JOIN pg_catalog.pg_enum e ON e.enumtypid IN (t.oid, t.typelem, t.typbasetype)
                                WHERE t.oid = a.atttypid)) ORDER BY a.attnum), '[]')
                 FROM pg_catalog.pg_attribute a CROSS JOIN (SELECT {listed}) AS l (list)
                 WHERE a.attrelid = w.oid AND a.attnum > 0 AND NOT a.attisdropped
                   AND (l.list IS NULL OR a.attnum = ANY (l.list)) AND (a.attgenerated = '' {generated})),
             'key', (
                 SELECT coalesce(pg_catalog.jsonb_agg(k ORDER BY k), '[]')
                 FROM pg_catalog.pg_index i, unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) AS k
                 WHERE i.indrelid = w.oid AND i.indisvalid
                   AND CASE WHEN w.relreplident = 'i' THEN i.indisreplident ELSE i.indisprimary END),
             'leaves', (
                 SELECT coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
                     'oid', l.oid::int8, 'filenode', l.relfilenode::int8, 'toast', l.reltoastrelid::int8, 'attached', l.attached,
                     'named', EXISTS (SELECT FROM pg_catalog.pg_publication_rel m JOIN publication p ON p.oid = m.prpubid
                                      WHERE m.prrelid = l.oid),
                     'members', (SELECT coalesce(pg_catalog.jsonb_agg(m.oid::int8 ORDER BY m.oid), '[]') FROM members m
                                 WHERE m.n = w.n AND m.relation = l.oid AND l.oid <> w.oid),
                     'unlogged', l.relpersistence <> 'p',
                     'nameless', CASE l.relreplident WHEN 'f' THEN FALSE WHEN 'n' THEN TRUE ELSE NOT EXISTS (
                         SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = l.oid
                         AND CASE l.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END) END)
                     ORDER BY l.oid), '[]')
                 FROM leaves l WHERE l.n = w.n),
             'publication', (
                 SELECT pg_catalog.jsonb_build_object(
                     'oid', p.oid::int8, 'altered', p.altered, 'all', p.puballtables, 'via_root', p.pubviaroot,
                     'operations', pg_catalog.jsonb_build_array(p.pubinsert, p.pubupdate, p.pubdelete, p.pubtruncate),
                     'members', (SELECT coalesce(pg_catalog.jsonb_agg(m.oid::int8 ORDER BY m.oid), '[]') FROM members m
                                 WHERE m.n = w.n AND m.relation NOT IN (
                                     SELECT l.oid FROM leaves l WHERE l.n = w.n AND l.oid <> w.oid)))
                 FROM publication p))::text,
             pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text::int8
         FROM wanted w"
    )
}

const TEXTS: [u32; 2] = [25, 1_043];

impl Definition {
    /// Why documents that were made of the table as it was (`self`) are no longer its rows as it is `now`: some changed,
    /// came or went without the stream's saying so. None where nothing of that kind happened, or only
    /// [doubtful](Self::doubtful) things.
    #[must_use]
    pub fn outdated(&self, now: &Self) -> Option<&'static str> {
        let leaf = |leaf: &Leaf| now.leaves.iter().find(|other| other.oid == leaf.oid).cloned();
        let rewritten = self.leaves.iter().any(|old| leaf(old).is_some_and(|new| new.filenode != old.filenode));
        if self.oid != now.oid {
            return Some("it was dropped and made anew");
        }
        if self.key != now.key {
            return Some("its key has changed");
        }
        if self.columns_ever != now.columns_ever
            || self.columns.len() != now.columns.len()
            || self
                .columns
                .iter()
                .zip(&now.columns)
                .any(|(old, new)| (old.number, &old.name) != (new.number, &new.name))
        {
            return Some("its columns have changed");
        }
        if self.columns.iter().zip(&now.columns).any(|(old, new)| !old.prints_as(new, rewritten)) {
            return Some("the type of a column has changed");
        }
        if self.partitioned != now.partitioned || self.leaves.iter().any(|old| leaf(old).is_none()) {
            return Some("a partition was detached or dropped");
        }
        let again = |old: &Leaf| leaf(old).is_some_and(|new| new.attached != old.attached);
        if self.leaves.iter().any(again) {
            return Some("a partition was detached and attached again");
        }
        let logged = |old: &Leaf| leaf(old).is_some_and(|new| new.unlogged != old.unlogged);
        if self.leaves.iter().any(logged) {
            return Some("it was unlogged for a while");
        }
        let anew = |old: &Leaf| leaf(old).is_some_and(|new| old.written_by_alter(&new));
        if self.leaves.iter().any(anew) {
            return Some("its rows were written anew, and it may have been unlogged for a while");
        }
        let published = |old: &Leaf| leaf(old).is_some_and(|new| new.members != old.members);
        if self.publication != now.publication || self.leaves.iter().any(published) {
            return Some("the publication was altered, and did not publish all of its changes in between");
        }
        None
    }

    /// Leaves of `now` that may have come with rows, and such that may have been emptied, or unlogged for a while, without the
    /// stream's saying so.
    /// Only the leaves themselves tell: [`holds_rows`], [`kept_rows`].
    #[must_use]
    pub fn doubtful(&self, now: &Self) -> (Vec<u32>, Vec<u32>) {
        let old = |leaf: &&Leaf| self.leaves.iter().find(|old| old.oid == leaf.oid);
        let came = now.leaves.iter().filter(|leaf| old(leaf).is_none()).map(|leaf| leaf.oid).collect();
        // Through its root a publication tells of TRUNCATE of the whole table only.
        let silent = now.partitioned && now.publication.as_ref().is_some_and(|publication| publication.via_root);
        let rewritten = |leaf: &&Leaf| {
            let doubtful = |old: &Leaf| old.filenode != leaf.filenode && (silent || old.toast == 0 && !leaf.named);
            old(leaf).is_some_and(doubtful)
        };
        (came, now.leaves.iter().filter(rewritten).map(|leaf| leaf.oid).collect())
    }

    /// Rows that were announced so have become documents as the rows of this definition do.
    #[must_use]
    pub fn fits(&self, announced: &Announced) -> bool {
        let is = |column: &Column, name: &str, r#type| column.name == name && alike(column.r#type, r#type);
        if announced.whole {
            return self.columns.len() == announced.columns.len()
                && self
                    .columns
                    .iter()
                    .zip(&announced.columns)
                    .all(|(column, (name, r#type))| is(column, name, *r#type));
        }
        announced.columns.iter().all(|(name, r#type)| self.columns.iter().any(|column| is(column, name, *r#type)))
    }

    /// The names of the columns that are published.
    #[must_use]
    pub fn published(&self) -> Vec<&str> {
        self.columns.iter().map(|column| column.name.as_str()).collect()
    }

    /// The publication publishes it, every partition included.
    #[must_use]
    pub fn is_published(&self) -> bool {
        self.publication.as_ref().is_some_and(|publication| {
            publication.all
                || !publication.members.is_empty()
                || !self.leaves.is_empty() && self.leaves.iter().all(|leaf| !leaf.members.is_empty())
        })
    }

    /// Its application's UPDATE and DELETE fail.
    #[must_use]
    pub fn refuses_changes(&self) -> bool {
        let published = |publication: &Publication| publication.operations[1] || publication.operations[2];
        self.publication.as_ref().is_some_and(published) && self.leaves.iter().any(|leaf| leaf.nameless)
    }
}

impl Leaf {
    /// ALTER TABLE wrote its rows anew, and it may have been unlogged until then.
    fn written_by_alter(&self, now: &Self) -> bool {
        !now.named && self.filenode != now.filenode && self.toast != 0 && self.toast != now.toast
    }
}

/// Values of both types print the same.
fn alike(one: u32, other: u32) -> bool {
    one == other || TEXTS.contains(&one) && TEXTS.contains(&other)
}

impl Column {
    /// Values that are stored already print as they did.
    fn prints_as(&self, now: &Self, rewritten: bool) -> bool {
        let renamed = |(value, word): (&u32, &String)| {
            now.labels.as_ref().and_then(|labels| labels.get(value)).is_some_and(|other| other != word)
        };
        // ALTER TYPE changes values only by rewriting them, to the type that they have as well (USING). What else rewrites
        // a table, as VACUUM FULL, leaves its columns' rows in the catalog alone.
        let altered = self.altered != now.altered;
        alike(self.r#type, now.r#type)
            && !(rewritten && altered)
            && self.expression == now.expression
            && !self.labels.iter().flatten().any(renamed)
    }
}

/// A table has, or had since it was made or truncated, a row. Before PostgreSQL 15, where the stream sends nothing of a
/// partition that it has seen changed before: had a row at any time, or was looked at by VACUUM or ANALYZE.
///
/// # Errors
/// The query fails: somebody has it locked.
pub async fn holds_rows(client: &Client, server: u32, oid: u32) -> Result<bool, Problem> {
    let sql =
        "SELECT coalesce(pg_catalog.pg_relation_size(oid), 0) > 0 OR $2 AND (relfilenode <> oid OR reltuples >= 0)
               FROM pg_catalog.pg_class WHERE oid = $1";
    let row = client.query_opt(sql, &[&oid, &(server < 150_000)]).await?;
    Ok(row.is_some_and(|row| row.get(0)))
}

/// A table has a row of a transaction that had ended before `horizon`: it was not truncated since.
///
/// # Errors
/// The queries fail: somebody has it locked.
pub async fn kept_rows(client: &Client, oid: u32, horizon: u64) -> Result<bool, Problem> {
    let Some(name) = client
        .query_opt(
            "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1",
            &[&oid],
        )
        .await?
    else {
        return Ok(false);
    };
    let (schema, name): (String, String) = (name.get(0), name.get(1));
    // Ages, as transaction numbers go round.
    let sql = format!(
        "SELECT EXISTS (SELECT FROM ONLY {}.{} AS t
                        WHERE pg_catalog.age(t.xmin) > pg_catalog.age('{}'::pg_catalog.xid))",
        quote_identifier(&schema),
        quote_identifier(&name),
        horizon & 0xffff_ffff
    );
    Ok(client.query_one(&sql, &[]).await?.get(0))
}
