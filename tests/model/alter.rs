//! Statements that change tables rather than rows, and what becomes of tables for a while.

use fastrand::Rng;

use super::schema::{Kind, pick};
use super::traffic::Statement;

/// TRUNCATE, of partitions alone as well.
pub fn truncate(rng: &mut Rng, table: Kind, tables: &[Kind], via_root: bool) -> Statement {
    let sql = match (table, rng.u32(..4)) {
        (Kind::Parts, choice @ 0..2) => {
            let sql = format!("TRUNCATE {}", if choice == 0 { "parts_low" } else { "parts_mid" });
            // PostgreSQL does not send it then.
            return if via_root { Statement::altering(sql, table) } else { Statement::locking(sql) };
        }
        (Kind::Plain, _) => "TRUNCATE plain RESTART IDENTITY CASCADE".into(),
        (_, 2) => {
            let other = *pick(rng, tables);
            let other = if other == table { String::new() } else { format!(", {}", other.name()) };
            format!("TRUNCATE {}{other} CASCADE", table.name())
        }
        _ => format!("TRUNCATE {}", table.name()),
    };
    Statement::locking(sql)
}

/// Columns, types, keys, replica identities and partitions. What is not possible just then fails.
pub fn alter(rng: &mut Rng, table: Kind) -> Statement {
    let name = table.name();
    if rng.u32(..5) == 0 {
        // A partition has its own.
        let name = if table == Kind::Parts { *pick(rng, &["parts_low", "parts_mid", "parts_rest"]) } else { name };
        let identity = if rng.bool() { "FULL" } else { "DEFAULT" };
        // The documents had the names of another index, perhaps.
        return Statement::altering(format!("ALTER TABLE {name} REPLICA IDENTITY {identity}"), table);
    }
    if table == Kind::Parts && rng.u32(..3) > 0 {
        return Statement::altering(partition(rng), table);
    }
    let sql = match rng.u32(..12) {
        0 => format!("ALTER TABLE {name} ADD COLUMN IF NOT EXISTS x int"),
        1 => format!("ALTER TABLE {name} ADD COLUMN IF NOT EXISTS x int DEFAULT 7"),
        // Rewrites the table.
        2 => format!("ALTER TABLE {name} ADD COLUMN IF NOT EXISTS y float8 DEFAULT random()"),
        3 => format!("ALTER TABLE {name} DROP COLUMN IF EXISTS x"),
        4 => format!("ALTER TABLE {name} RENAME COLUMN x TO z"),
        5 => format!("ALTER TABLE {name} ALTER COLUMN n TYPE numeric(12, 2)"),
        6 => format!("ALTER TABLE {name} ALTER COLUMN n TYPE bigint"),
        // Of the same type, or of another.
        7 => format!("ALTER TABLE {name} ALTER COLUMN v TYPE text USING v || '!'"),
        8 => format!("ALTER TABLE {name} ALTER COLUMN n TYPE bigint USING n / 2"),
        9 => format!("ALTER TABLE {name} ALTER COLUMN n TYPE numeric(12, 2) USING n % 100"),
        10 => key(table, "id, n", "SET"),
        _ => key(table, "id", "DROP"),
    };
    Statement::altering(sql, table)
}

/// Another primary key.
fn key(table: Kind, columns: &str, not_null: &str) -> String {
    let name = table.name();
    if table == Kind::Pairs {
        // The same columns: the documents keep their names.
        return "ALTER TABLE pairs DROP CONSTRAINT pairs_pkey, ADD PRIMARY KEY (id, a)".into();
    }
    format!(
        "UPDATE {name} SET n = 0 WHERE n IS NULL; ALTER TABLE {name} DROP CONSTRAINT {name}_pkey CASCADE; \
         ALTER TABLE {name} ALTER n {not_null} NOT NULL, ADD CONSTRAINT {name}_pkey PRIMARY KEY ({columns})"
    )
}

/// A partition comes or goes, with its rows or without.
fn partition(rng: &mut Rng) -> String {
    let (name, bounds, inside) = *pick(
        rng,
        &[
            ("parts_low", "FROM (MINVALUE) TO (4)", "id < 4"),
            ("parts_mid", "FROM (4) TO (1020)", "id >= 4 AND id < 1020"),
        ],
    );
    let id = if name == "parts_low" { rng.i64(1..4) } else { rng.i64(4..8) };
    match rng.u32(..6) {
        0 => format!("ALTER TABLE parts DETACH PARTITION {name}"),
        1 => format!("DROP TABLE IF EXISTS {name}"),
        2 => {
            format!("DELETE FROM parts_rest WHERE {inside}; CREATE TABLE {name} PARTITION OF parts FOR VALUES {bounds}")
        }
        3 => format!(
            "DELETE FROM parts_rest WHERE {inside}; CREATE TABLE {name} (id int NOT NULL, n int, v text); \
             INSERT INTO {name} VALUES ({id}, 1, 'came'); ALTER TABLE parts ATTACH PARTITION {name} FOR VALUES {bounds}"
        ),
        _ => format!(
            "DELETE FROM parts_rest WHERE {inside}; ALTER TABLE parts ATTACH PARTITION {name} FOR VALUES {bounds}"
        ),
    }
}

/// What becomes of a table for a while. A process that runs says so and goes on with the others; one that starts may
/// refuse to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Away {
    /// The publication leaves it out.
    Unpublished,
    /// Its changes are not in the WAL.
    Unlogged,
    Renamed,
    /// `REPLICA IDENTITY NOTHING`: PostgreSQL refuses UPDATE and DELETE.
    Nameless,
    /// Its rows are named by another index, and stay so.
    Index,
}

impl Away {
    /// One that fits.
    pub fn random(rng: &mut Rng, table: Kind) -> Self {
        // Each partition would have to have the same index.
        let last = if table == Kind::Parts { 4 } else { 5 };
        [Away::Unpublished, Away::Unlogged, Away::Renamed, Away::Nameless, Away::Index][rng.usize(..last)]
    }

    /// How it comes about, and how it ends.
    pub fn sql(self, table: Kind, publication: &str) -> (String, String) {
        let name = table.name();
        let of = if table == Kind::Parts { "parts_low" } else { name };
        match self {
            Away::Unpublished => (
                format!("ALTER PUBLICATION {publication} DROP TABLE {name}"),
                format!("ALTER PUBLICATION {publication} ADD TABLE {name}"),
            ),
            Away::Unlogged if table == Kind::Parts => {
                ("ALTER TABLE parts_low SET UNLOGGED".into(), "ALTER TABLE parts_low SET LOGGED".into())
            }
            Away::Unlogged => (
                format!("ALTER PUBLICATION {publication} DROP TABLE {name}; ALTER TABLE {name} SET UNLOGGED"),
                format!("ALTER TABLE {name} SET LOGGED; ALTER PUBLICATION {publication} ADD TABLE {name}"),
            ),
            Away::Renamed => (
                format!("ALTER TABLE {name} RENAME TO {name}_away"),
                format!("ALTER TABLE {name}_away RENAME TO {name}"),
            ),
            Away::Nameless => (
                format!("ALTER TABLE {of} REPLICA IDENTITY NOTHING"),
                format!("ALTER TABLE {of} REPLICA IDENTITY DEFAULT"),
            ),
            Away::Index => (
                format!(
                    "UPDATE {name} SET n = 0 WHERE n IS NULL; ALTER TABLE {name} ALTER n SET NOT NULL; \
                     CREATE UNIQUE INDEX {name}_other ON {name} (id, n); \
                     ALTER TABLE {name} REPLICA IDENTITY USING INDEX {name}_other"
                ),
                "SELECT".into(),
            ),
        }
    }
}
