//! Random transactions. What they are depends on the seed alone; what becomes of them (a key that exists, a lock, a
//! deadlock) does not matter: the rows are the oracle.

use fastrand::Rng;

use super::alter;
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
    /// Some of everything but DDL.
    pub const EVERYTHING: Weights = Weights {
        insert: 8,
        update: 8,
        large: 4,
        key: 3,
        delete: 5,
        truncate: 1,
        many: 2,
        alter: 0,
        rewrite: 1,
        statements: 5,
        keys: 6,
    };
    /// Rows come, change and go.
    pub const ROWS: Weights = Weights { truncate: 0, many: 1, rewrite: 0, key: 1, large: 1, ..Weights::EVERYTHING };
}

/// What a session runs at a time: after an error the rest of a transaction is left out, and it is rolled back.
#[derive(Debug)]
pub struct Statement {
    pub sql: String,
    /// The table whose documents have to be made anew for it, though the stream says nothing of it.
    pub alters: Option<Kind>,
    /// It keeps others from reading a table.
    pub locks: bool,
}

impl From<String> for Statement {
    fn from(sql: String) -> Self {
        Self { sql, alters: None, locks: false }
    }
}

impl Statement {
    /// One that locks, too.
    pub fn locking(sql: String) -> Self {
        Self { sql, alters: None, locks: true }
    }

    /// One that locks and alters, too.
    pub fn altering(sql: String, table: Kind) -> Self {
        Self { sql, alters: Some(table), locks: true }
    }
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
    pub fn next(&mut self) -> Vec<Statement> {
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
            return vec![Statement::locking(sql)];
        }
        let count = self.rng.usize(1..=self.weights.statements);
        let mut statements: Vec<Statement> = (0..count).map(|_| self.statement()).collect();
        if count > 2 && self.rng.u32(..4) == 0 {
            let from = self.rng.usize(..count - 1);
            statements.insert(from, "SAVEPOINT s".to_owned().into());
            let to = self.rng.usize(from + 2..=count + 1);
            let end = if self.rng.bool() { "ROLLBACK TO s" } else { "RELEASE s" };
            statements.insert(to, end.to_owned().into());
        }
        if statements.len() > 1 || self.rng.u32(..4) == 0 {
            statements.insert(0, "BEGIN".to_owned().into());
            let end = if self.rng.u32(..8) == 0 { "ROLLBACK" } else { "COMMIT" };
            statements.push(end.to_owned().into());
        }
        statements
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

    fn statement(&mut self) -> Statement {
        let table = *pick(&mut self.rng, &self.tables);
        let weights = self.weights;
        let choice = self.rng.u32(..weights.total() - weights.rewrite);
        let rows = weights.total() - weights.rewrite - weights.truncate - weights.alter;
        if choice < rows {
            self.change(table, choice).into()
        } else if choice < rows + weights.truncate {
            alter::truncate(&mut self.rng, table, &self.tables, self.via_root)
        } else {
            alter::alter(&mut self.rng, table)
        }
    }

    /// A change of rows, of all kinds by their weights.
    fn change(&mut self, table: Kind, mut choice: u32) -> String {
        let name = table.name();
        let weights = self.weights;
        let number = self.rng.u32(..1_000_000);
        let (place, key) = self.place(table);
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
        let from = COLD + self.rng.i64(0..60);
        match (table, self.rng.u32(..4)) {
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
        }
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
