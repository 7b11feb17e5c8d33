//! Changes at a rate: what makes the demo move.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use fastrand::Rng;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_postgres::{Client, Config, NoTls, Statement};
use tokio_util::sync::CancellationToken;

/// The shortest pause between two rounds: above 100 changes a second a round makes several.
const TICK: Duration = Duration::from_millis(10);

/// A rate that was not kept is made up for, at most for so long: no flood after the server was away.
const ARREARS: f64 = 1.0;

/// The most changes of one round.
const ROUND: f64 = 500.0;

/// How often a statement goes to `books` and not to `users`.
const BOOKS_SHARE: f64 = 0.3;

/// Shares of inserts and updates while a table grows; deletes are the rest. While it shrinks, inserts and deletes swap.
const INSERTS: f64 = 0.50;
const UPDATES: f64 = 0.35;

/// How a [`Workload`] works.
#[derive(Clone, Copy, Debug)]
pub struct WorkloadOptions {
    /// Changed rows a second, over both tables; 0 rests.
    pub rate: u32,
    /// The same seed draws from the same sequence; none from another each time. How many changes are made at once depends
    /// on the clock, so two histories of a seed are alike but not equal.
    pub seed: Option<u64>,
}

/// What a [`Workload`] has committed. When the connection is lost during a commit, that one may be missing here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Rows inserted.
    pub inserted: u64,
    /// Rows updated.
    pub updated: u64,
    /// Rows deleted.
    pub deleted: u64,
    /// Rounds that failed: the server was away or refused.
    pub failures: u64,
}

impl Stats {
    /// Changed rows.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.inserted + self.updated + self.deleted
    }
}

impl std::ops::Add for Stats {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            inserted: self.inserted + other.inserted,
            updated: self.updated + other.updated,
            deleted: self.deleted + other.deleted,
            failures: self.failures + other.failures,
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    rate: AtomicU32,
    inserted: AtomicU64,
    updated: AtomicU64,
    deleted: AtomicU64,
    failures: AtomicU64,
    stop: CancellationToken,
}

/// A task that inserts, updates and deletes rows of the demo's tables `users` and `books`.
///
/// About half of the changes are inserts while a table is near its first size; when it has grown by a tenth, deletes
/// prevail until it is back. When the server goes away, it waits and connects again. Dropping it stops it.
#[derive(Debug)]
pub struct Workload {
    shared: Arc<Shared>,
    task: Option<JoinHandle<()>>,
}

impl Workload {
    /// Starts it; must be called within a tokio runtime. `config` is that of the database with the demo's tables, as
    /// [`Server::socket_config`](super::Server::socket_config) gives it; no TLS.
    #[must_use]
    pub fn start(config: Config, options: WorkloadOptions) -> Self {
        let shared = Arc::new(Shared { rate: options.rate.into(), ..Shared::default() });
        let rng = options.seed.map_or_else(Rng::new, Rng::with_seed);
        let task = tokio::spawn(run(config, Arc::clone(&shared), rng));
        Self { shared, task: Some(task) }
    }

    /// Changes the rate, in changed rows a second.
    pub fn set_rate(&self, rate: u32) {
        self.shared.rate.store(rate, Relaxed);
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            inserted: self.shared.inserted.load(Relaxed),
            updated: self.shared.updated.load(Relaxed),
            deleted: self.shared.deleted.load(Relaxed),
            failures: self.shared.failures.load(Relaxed),
        }
    }

    /// Ends it after the transaction that it is in (which is rolled back if it takes longer than 5 s), and tells what it
    /// has done in all. Nothing is changed afterwards.
    pub async fn stop(mut self) -> Stats {
        self.shared.stop.cancel();
        if let Some(mut task) = self.task.take()
            && tokio::time::timeout(Duration::from_secs(5), &mut task).await.is_err()
        {
            task.abort();
            let _ = task.await;
        }
        self.stats()
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

/// Connects, works until something fails, and again.
async fn run(config: Config, shared: Arc<Shared>, mut rng: Rng) {
    while !shared.stop.is_cancelled() {
        let result = session(&config, &shared, &mut rng).await;
        if let Err(error) = result {
            shared.failures.fetch_add(1, Relaxed);
            tracing::debug!(code = ?error.code(), closed = error.is_closed(), "the workload failed, and tries again");
            let _ = tokio::time::timeout(Duration::from_millis(200), shared.stop.cancelled()).await;
        }
    }
}

async fn session(config: &Config, shared: &Shared, rng: &mut Rng) -> Result<(), tokio_postgres::Error> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    let mut tables = [Table::open(&client, &USERS).await?, Table::open(&client, &BOOKS).await?];
    let mut due = 0.0;
    let mut last = Instant::now();
    while !shared.stop.is_cancelled() {
        let rate = f64::from(shared.rate.load(Relaxed));
        let now = Instant::now();
        due = (due + now.duration_since(last).as_secs_f64() * rate).min((rate * ARREARS).max(1.0));
        last = now;
        if due < 1.0 {
            let wait = if rate > 0.0 { (1.0 - due) / rate } else { f64::INFINITY };
            // Long waits are cut, so that a new rate is soon heard.
            let wait = Duration::from_secs_f64(wait.min(0.1)).max(TICK);
            let _ = tokio::time::timeout(wait, shared.stop.cancelled()).await;
            continue;
        }
        // Fewer than a second's changes are due, so that a round is short and a stop is soon heard.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at least 1, at most ROUND")]
        let count = due.min(ROUND) as u32;
        // Two draws may meet the same row: what counts is what was done.
        due -= f64::from(round(&client, &mut tables, count, shared, rng).await?);
    }
    Ok(())
}

/// Makes about `count` changes by a few statements, half of the time in one transaction, and tells how many they were.
async fn round(
    client: &Client,
    tables: &mut [Table; 2],
    count: u32,
    shared: &Shared,
    rng: &mut Rng,
) -> Result<u32, tokio_postgres::Error> {
    let together = count > 1 && rng.bool();
    if together {
        client.batch_execute("BEGIN").await?;
    }
    let mut done = Stats::default();
    let mut rest = count;
    while rest > 0 {
        let part = rng.u32(1..=(count / 4).max(1)).min(rest);
        rest -= part;
        let [users, books] = &mut *tables;
        let table = if rng.f64() < BOOKS_SHARE { books } else { users };
        let change = table.change(client, part, rng).await?;
        done = done + change;
        if !together {
            shared.add(change);
        }
    }
    if together {
        client.batch_execute("COMMIT").await?;
        shared.add(done);
    }
    Ok(u32::try_from(done.changes()).unwrap_or(count))
}

impl Shared {
    fn add(&self, stats: Stats) {
        self.inserted.fetch_add(stats.inserted, Relaxed);
        self.updated.fetch_add(stats.updated, Relaxed);
        self.deleted.fetch_add(stats.deleted, Relaxed);
    }
}

/// The statements of a table, and how its values are drawn. Rows to update or delete are the first ones from drawn ids
/// on, so that holes in the ids do not matter.
struct Sql {
    size: &'static str,
    insert: &'static str,
    update: &'static str,
    delete: &'static str,
    /// The four columns of a new row, as text.
    row: fn(&mut Rng) -> [Option<String>; 4],
    /// The new value of an update, as text.
    value: fn(&mut Rng) -> String,
}

const USERS: Sql = Sql {
    size: "SELECT count(*), coalesce(min(id), 0)::bigint, coalesce(max(id), 0)::bigint FROM users",
    insert: "INSERT INTO users (name, email, age, bio) SELECT a, b, c::int, d \
             FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) AS v (a, b, c, d) RETURNING id::bigint",
    update: "UPDATE users SET bio = $2::text, age = coalesce(age, 17) % 90 + 1 WHERE id IN (SELECT t.id \
             FROM unnest($1::bigint[]) AS r (n), LATERAL (SELECT id FROM users WHERE id >= n ORDER BY id LIMIT 1) AS t)",
    delete: "DELETE FROM users WHERE id IN (SELECT t.id \
             FROM unnest($1::bigint[]) AS r (n), LATERAL (SELECT id FROM users WHERE id >= n ORDER BY id LIMIT 1) AS t)",
    row: |rng| {
        let name = format!("{} {}", pick(rng, &FIRST), pick(rng, &LAST));
        let email = (rng.u8(..) > 25).then(|| format!("{}{}@example.com", rng.u32(..), pick(rng, &["", ".x", "+y"])));
        let age = (rng.u8(..) > 25).then(|| rng.u32(18..90).to_string());
        [Some(name), email, age, Some(sentence(rng))]
    },
    value: sentence,
};

const BOOKS: Sql = Sql {
    size: "SELECT count(*), coalesce(min(id), 0)::bigint, coalesce(max(id), 0)::bigint FROM books",
    insert: "INSERT INTO books (title, author, price, published) SELECT a, b, c::numeric, d::date \
             FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) AS v (a, b, c, d) RETURNING id::bigint",
    update: "UPDATE books SET price = $2::text::numeric, in_stock = NOT in_stock WHERE id IN (SELECT t.id \
             FROM unnest($1::bigint[]) AS r (n), LATERAL (SELECT id FROM books WHERE id >= n ORDER BY id LIMIT 1) AS t)",
    delete: "DELETE FROM books WHERE id IN (SELECT t.id \
             FROM unnest($1::bigint[]) AS r (n), LATERAL (SELECT id FROM books WHERE id >= n ORDER BY id LIMIT 1) AS t)",
    row: |rng| {
        let title = format!("The {} of {}", pick(rng, &NOUNS), pick(rng, &LAST));
        let author = (rng.u8(..) > 25).then(|| format!("{} {}", pick(rng, &FIRST), pick(rng, &LAST)));
        let date = format!("{}-{:02}-{:02}", rng.u32(1950..2026), rng.u32(1..13), rng.u32(1..29));
        [Some(title), author, Some(price(rng)), Some(date)]
    },
    value: price,
};

const FIRST: [&str; 8] = ["Ada", "Björn", "Chiara", "Dmitri", "Émile", "Fatma", "Grace", "Haruki"];
const LAST: [&str; 8] = ["Lovelace", "Østergård", "O'Neill", "Иванов", "山田", "Yıldız", "Hopper", "von \"Neu\" Mann"];
const NOUNS: [&str; 6] = ["Tide", "Ledger", "Naïveté", "Index", "Shore", "Clock"];

fn pick(rng: &mut Rng, from: &[&'static str]) -> &'static str {
    rng.choice(from).copied().unwrap_or_default()
}

fn sentence(rng: &mut Rng) -> String {
    format!("{} met the {} of {}, {} times.", pick(rng, &FIRST), pick(rng, &NOUNS), pick(rng, &LAST), rng.u32(2..1000))
}

fn price(rng: &mut Rng) -> String {
    format!("{}.{:02}", rng.u32(1..120), rng.u32(0..100))
}

/// A table in a session.
struct Table {
    sql: &'static Sql,
    insert: Statement,
    update: Statement,
    delete: Statement,
    /// Rows when the session began, and now. Others' changes are not noticed.
    first: u64,
    rows: u64,
    /// Between these lie the ids.
    lowest: i64,
    highest: i64,
    shrinking: bool,
}

impl Table {
    async fn open(client: &Client, sql: &'static Sql) -> Result<Self, tokio_postgres::Error> {
        let row = client.query_one(sql.size, &[]).await?;
        let rows = u64::try_from(row.get::<_, i64>(0)).unwrap_or(0);
        Ok(Self {
            sql,
            insert: client.prepare(sql.insert).await?,
            update: client.prepare(sql.update).await?,
            delete: client.prepare(sql.delete).await?,
            first: rows,
            rows,
            lowest: row.get(1),
            highest: row.get(2),
            shrinking: false,
        })
    }

    /// One statement over up to `count` rows.
    async fn change(&mut self, client: &Client, count: u32, rng: &mut Rng) -> Result<Stats, tokio_postgres::Error> {
        if self.rows > self.first + self.first / 10 + 100 {
            self.shrinking = true;
        } else if self.rows <= self.first {
            self.shrinking = false;
        }
        let inserts = if self.shrinking { 1.0 - INSERTS - UPDATES } else { INSERTS };
        let draw = rng.f64();
        if self.rows == 0 || draw < inserts {
            let mut columns: [Vec<Option<String>>; 4] = Default::default();
            for _ in 0..count {
                for (column, value) in columns.iter_mut().zip((self.sql.row)(rng)) {
                    column.push(value);
                }
            }
            let [a, b, c, d] = &columns;
            let ids = client.query(&self.insert, &[a, b, c, d]).await?;
            self.highest = ids.iter().map(|row| row.get(0)).fold(self.highest, i64::max);
            self.rows += ids.len() as u64;
            return Ok(Stats { inserted: ids.len() as u64, ..Stats::default() });
        }
        let ids: Vec<i64> = (0..count).map(|_| rng.i64(self.lowest..=self.highest)).collect();
        if draw < inserts + UPDATES {
            let updated = client.execute(&self.update, &[&ids, &(self.sql.value)(rng)]).await?;
            return Ok(Stats { updated, ..Stats::default() });
        }
        let deleted = client.execute(&self.delete, &[&ids]).await?;
        self.rows = self.rows.saturating_sub(deleted);
        Ok(Stats { deleted, ..Stats::default() })
    }
}
