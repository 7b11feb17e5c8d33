//! Random transactions. What they are depends on the seed alone; what becomes of them (a key that exists, a lock, a
//! deadlock) does not matter: the rows are the oracle.

use fastrand::Rng;

use super::schema::{COLD, Kind, Schema, large, pick};

/// How often what happens, relative to each other.
#[derive(Clone, Copy, Debug)]
pub struct Weights {
    pub insert: u32,
    pub update: u32,
    /// UPDATE that leaves a large value alone, and large values at all.
    pub large: u32,
    pub key: u32,
    pub delete: u32,
    pub truncate: u32,
    /// Statements that touch many rows.
    pub many: u32,
    pub alter: u32,
    pub rewrite: u32,
    /// Statements in a transaction at most.
    pub statements: usize,
    /// Keys that changes fall on.
    pub keys: i64,
}

impl Weights {
    /// Some of everything.
    pub const EVERYTHING: Weights = Weights {
        insert: 8,
        update: 8,
        large: 4,
        key: 3,
        delete: 5,
        truncate: 1,
        many: 2,
        alter: 1,
        rewrite: 1,
        statements: 5,
        keys: 6,
    };
    /// Rows come, change and go.
    pub const ROWS: Weights =
        Weights { truncate: 0, many: 1, alter: 0, rewrite: 0, key: 1, large: 1, ..Weights::EVERYTHING };
}

/// What a session runs at a time.
#[derive(Debug)]
pub struct Transaction {
    /// One after the other; after an error the rest is left out and the transaction rolled back.
    pub statements: Vec<String>,
    /// Tables whose documents differ from their rows by design until each row has changed: columns were altered.
    pub altered: Vec<Kind>,
}

/// The transactions of one session.
pub struct Traffic {
    rng: Rng,
    tables: Vec<Kind>,
    via_root: bool,
    weights: Weights,
}

impl Traffic {
    pub fn new(seed: u64, schema: &Schema, weights: Weights) -> Self {
        Self { rng: Rng::with_seed(seed), tables: schema.tables.clone(), via_root: schema.via_root, weights }
    }

    /// The next transaction.
    pub fn next(&mut self) -> Transaction {
        let mut altered = Vec::new();
        let total = self.weights.total();
        let alone = self.rng.u32(..total) < self.weights.rewrite;
        if alone {
            let table = *pick(&mut self.rng, &self.tables);
            let sql = match self.rng.u32(..4) {
                0 => format!("REINDEX TABLE {}", table.name()),
                1 => format!("ANALYZE {}", table.name()),
                // Of a partitioned table each partition, in a transaction of its own.
                _ => format!("VACUUM FULL {}", table.name()),
            };
            return Transaction { statements: vec![sql], altered };
        }
        let count = self.rng.usize(1..=self.weights.statements);
        let mut statements: Vec<String> = (0..count).map(|_| self.statement(&mut altered)).collect();
        if count > 2 && self.rng.u32(..4) == 0 {
            let from = self.rng.usize(..count - 1);
            statements.insert(from, "SAVEPOINT s".into());
            let to = self.rng.usize(from + 2..=count + 1);
            let end = if self.rng.bool() { "ROLLBACK TO s" } else { "RELEASE s" };
            statements.insert(to, end.into());
        }
        if statements.len() > 1 || self.rng.u32(..4) == 0 {
            statements.insert(0, "BEGIN".into());
            statements.push(if self.rng.u32(..8) == 0 { "ROLLBACK".into() } else { "COMMIT".into() });
        }
        Transaction { statements, altered }
    }

    fn key(&mut self) -> i64 {
        if self.rng.u32(..12) == 0 { COLD + self.rng.i64(0..60) } else { self.rng.i64(1..=self.weights.keys) }
    }

    /// A condition on the rows of one key, and the values of such a key.
    fn place(&mut self, table: Kind) -> (String, String) {
        let id = self.key();
        match table {
            Kind::Pairs => {
                let a = *pick(&mut self.rng, &["a:", r"b\", "ä", ""]);
                (format!("a = '{a}' AND id = {}", id % 3), format!("'{a}', {}", id % 3))
            }
            _ => (format!("id = {id}"), format!("{id}")),
        }
    }

    fn statement(&mut self, altered: &mut Vec<Kind>) -> String {
        let table = *pick(&mut self.rng, &self.tables);
        let name = table.name();
        let weights = self.weights;
        let number = self.rng.u32(..1_000_000);
        let (place, key) = self.place(table);
        let mut choice = self.rng.u32(..weights.total() - weights.rewrite);
        let mut is = |weight: u32| {
            let hit = choice < weight;
            choice = choice.wrapping_sub(weight);
            hit
        };
        if is(weights.insert) {
            return self.insert(table, &key, number);
        }
        if is(weights.update) {
            let by = *pick(&mut self.rng, &["n = n + 1", "n = NULL", "v = 'changed'", "n = 7, v = NULL"]);
            return format!("UPDATE {name} SET {by} WHERE {place}");
        }
        if is(weights.large) {
            let value = large(&number.to_string());
            return match (table, self.rng.u32(..4)) {
                (Kind::Large, 0) => format!("UPDATE large SET more = {value}, n = {number} WHERE {place}"),
                (Kind::Large | Kind::Full | Kind::Pairs, 1) => {
                    format!("UPDATE {name} SET big = {value} WHERE {place}")
                }
                (Kind::Unique, _) => {
                    format!("UPDATE singles SET u = {} WHERE {place}", self.rng.i64(1..=self.weights.keys))
                }
                _ => format!("UPDATE {name} SET v = '{number}' WHERE {place}"),
            };
        }
        if is(weights.key) {
            let to = self.key();
            return match table {
                Kind::Pairs => format!("UPDATE pairs SET a = a || '{}' WHERE {place}", self.rng.u8(..3)),
                _ if self.rng.bool() => format!("UPDATE {name} SET id = {to}, n = {number} WHERE {place}"),
                _ => format!("UPDATE {name} SET id = {to} WHERE {place}"),
            };
        }
        if is(weights.delete) {
            return match self.rng.u32(..5) {
                0 => format!("DELETE FROM {name} WHERE n = 7"),
                1 => format!("DELETE FROM {name} WHERE {place}; {}", self.insert(table, &key, number)),
                _ => format!("DELETE FROM {name} WHERE {place}"),
            };
        }
        if is(weights.truncate) {
            return self.truncate(table);
        }
        if is(weights.many) {
            let from = COLD + self.rng.i64(0..60);
            return match (table, self.rng.u32(..4)) {
                (Kind::Pairs, 0) => format!(
                    "INSERT INTO pairs SELECT i, NULL, i, 'cold', 'again' FROM generate_series({from}, {from} + 20) i \
                     ON CONFLICT DO NOTHING"
                ),
                (_, 0) => format!(
                    "INSERT INTO {name} (id, n, v) SELECT i, i, 'again' FROM generate_series({from}, {from} + 20) i \
                     ON CONFLICT DO NOTHING"
                ),
                (_, 1) => format!("DELETE FROM {name} WHERE id BETWEEN {from} AND {from} + 15"),
                (_, 2) => format!("UPDATE {name} SET v = coalesce(v, '') || '+' WHERE id % 3 = {}", number % 3),
                _ => format!("UPDATE {name} SET n = n + 1"),
            };
        }
        self.alter(table, altered)
    }

    fn insert(&mut self, table: Kind, key: &str, number: u32) -> String {
        let name = table.name();
        let big = if self.rng.u32(..3) == 0 { large(&number.to_string()) } else { format!("'{number}'") };
        let conflict = *pick(
            &mut self.rng,
            &["ON CONFLICT DO NOTHING", "ON CONFLICT DO NOTHING", "", "ON CONFLICT (KEY) DO UPDATE SET n = excluded.n"],
        );
        let conflict = conflict.replace("KEY", &table.key().join(", "));
        match table {
            Kind::Pairs => {
                format!("INSERT INTO pairs (a, id, n, big, v) VALUES ({key}, {number}, {big}, NULL) {conflict}")
            }
            Kind::Large => {
                format!(
                    "INSERT INTO large (id, n, big, more, v) VALUES ({key}, {number}, {big}, {big}, 'x') {conflict}"
                )
            }
            Kind::Full => format!("INSERT INTO whole (id, n, big, v) VALUES ({key}, 1.50, {big}, 'x') {conflict}"),
            Kind::Unique => {
                let u = self.rng.i64(1..=self.weights.keys);
                format!("INSERT INTO singles (id, u, n, v) VALUES ({key}, {u}, {number}, 'x') {conflict}")
            }
            Kind::Child => format!(
                "INSERT INTO child (id, n, v, parent) VALUES ({key}, {number}, 'x', (SELECT max(id) FROM plain)) {conflict}"
            ),
            Kind::Plain if self.rng.u32(..4) == 0 => {
                format!(
                    "INSERT INTO plain (n, v, at, j) VALUES ({number}, 'x', now(), '{{\"a\": [1, null]}}') {conflict}"
                )
            }
            Kind::Plain | Kind::Parts => {
                format!(r#"INSERT INTO {name} (id, n, v) VALUES ({key}, {number}, E'"\\\n\u00e4') {conflict}"#)
            }
        }
    }

    fn truncate(&mut self, table: Kind) -> String {
        match (table, self.rng.u32(..4)) {
            (Kind::Parts, 0) if !self.via_root => "TRUNCATE parts_low".into(),
            (Kind::Parts, 1) if !self.via_root => "TRUNCATE parts_mid".into(),
            (Kind::Plain, _) => "TRUNCATE plain RESTART IDENTITY CASCADE".into(),
            (_, 2) => {
                let other = *pick(&mut self.rng, &self.tables);
                let other = if other == table { String::new() } else { format!(", {}", other.name()) };
                format!("TRUNCATE {}{other} CASCADE", table.name())
            }
            _ => format!("TRUNCATE {}", table.name()),
        }
    }

    fn alter(&mut self, table: Kind, altered: &mut Vec<Kind>) -> String {
        let name = table.name();
        if table == Kind::Pairs && self.rng.u32(..3) == 0 {
            let identity = if self.rng.bool() { "FULL" } else { "DEFAULT" };
            return format!("ALTER TABLE pairs REPLICA IDENTITY {identity}");
        }
        altered.push(table);
        match self.rng.u32(..7) {
            0 => format!("ALTER TABLE {name} ADD COLUMN IF NOT EXISTS x int"),
            1 => format!("ALTER TABLE {name} ADD COLUMN IF NOT EXISTS x int DEFAULT 7"),
            // Rewrites the table.
            2 => format!("ALTER TABLE {name} ADD COLUMN IF NOT EXISTS y float8 DEFAULT random()"),
            3 => format!("ALTER TABLE {name} DROP COLUMN IF EXISTS x"),
            4 => format!("ALTER TABLE {name} RENAME COLUMN x TO z"),
            5 => format!("ALTER TABLE {name} ALTER COLUMN n TYPE numeric(12, 2)"),
            _ => format!("ALTER TABLE {name} ALTER COLUMN n TYPE bigint"),
        }
    }
}

impl Weights {
    fn total(&self) -> u32 {
        self.insert
            + self.update
            + self.large
            + self.key
            + self.delete
            + self.truncate
            + self.many
            + self.alter
            + self.rewrite
    }
}
