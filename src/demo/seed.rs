//! The rows of the demo.

use tokio_postgres::Client;

use super::ServerError;

/// The tables of the demo and their first rows, `init.sql` of the repository.
pub const INIT_SQL: &str = include_str!("../../init.sql");

/// Rows added by one statement: enough to be fast, few enough for a bar that moves.
const STEP: u64 = 20_000;

/// As the rows of `init.sql`, of about 100 bytes. The id comes from its sequence.
const MORE_USERS: &str = "\
INSERT INTO users (name, email, age, created_at, bio)
SELECT 'User ' || i,
       CASE WHEN i % 10 <> 0 THEN 'user' || i || '@example.com' END,
       CASE WHEN i % 7 <> 0 THEN (18 + i % 60)::int END,
       timestamptz '2024-01-01 00:00:00+00' + i * interval '1 second',
       'Reads, writes and waits for the tide ' || i % 97
FROM generate_series($1::bigint, $2::bigint) AS i";

/// How many rows the tables have after [`seed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Rows of `users`.
    pub users: u64,
    /// Rows of `books`.
    pub books: u64,
}

/// Creates the demo's tables in an empty database and fills them; `users` gets `rows` rows, but not fewer than
/// `init.sql` gives it. `on_rows` hears rows done and rows in all. The tables are analyzed at the end, so that estimates
/// of their sizes are right.
///
/// # Errors
/// The tables exist already, or the connection is lost.
pub async fn seed(client: &Client, rows: u64, on_rows: impl Fn(u64, u64)) -> Result<Loaded, ServerError> {
    client.batch_execute(INIT_SQL).await?;
    let mut users = count(client, "users").await?;
    let total = rows.max(users);
    on_rows(users, total);
    let statement = client.prepare(MORE_USERS).await?;
    while users < total {
        let last = total.min(users + STEP);
        // Numbers of rows that fit a table fit an i64.
        let range = [users + 1, last].map(|number| i64::try_from(number).unwrap_or(i64::MAX));
        users += client.execute(&statement, &[&range[0], &range[1]]).await?;
        on_rows(users, total);
    }
    client.batch_execute("ANALYZE users; ANALYZE books").await?;
    Ok(Loaded { users, books: count(client, "books").await? })
}

async fn count(client: &Client, table: &'static str) -> Result<u64, ServerError> {
    let count: i64 = client.query_one(&format!("SELECT count(*) FROM {table}"), &[]).await?.get(0);
    Ok(u64::try_from(count).unwrap_or(0))
}
