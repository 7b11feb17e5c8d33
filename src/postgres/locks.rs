//! Who has a table locked.

use tokio_postgres::Client;

use crate::problem::Problem;
use crate::table::{TableId, quote_literal};

/// What is said of a query: texts of queries hold values, these words never do.
const WORDS: &[&str] = &[
    "ALTER",
    "CLUSTER",
    "CREATE",
    "DROP",
    "FULL",
    "INDEX",
    "LOCK",
    "MATERIALIZED",
    "REFRESH",
    "REINDEX",
    "RULE",
    "TABLE",
    "TRIGGER",
    "TRUNCATE",
    "VACUUM",
    "VIEW",
];

/// That a table (one of its partitions) could not be locked for reading: what happened, and what to do. Names who has
/// it, or waits for it before us, as far as that is to be seen now. `client` is in no failed transaction.
///
/// # Errors
/// The queries fail.
pub(crate) async fn locked(client: &Client, table: &TableId) -> Result<(String, String), Problem> {
    // Only ACCESS EXCLUSIVE keeps readers out, and one that is waited for does so as well. Children that are not
    // partitions are not read.
    let holders = client
        .query(
            "WITH RECURSIVE part(oid) AS (
                 SELECT pg_catalog.to_regclass($1)::oid
                 UNION SELECT c.oid FROM part JOIN pg_catalog.pg_inherits i ON i.inhparent = part.oid
                                              JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid AND c.relispartition)
             SELECT l.pid, l.granted, coalesce(a.application_name, ''), coalesce(r.rolname::text, ''),
                    to_char(a.xact_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'), coalesce(a.query, '')
             FROM pg_catalog.pg_locks l
             LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
             LEFT JOIN pg_catalog.pg_roles r ON r.oid = a.usesysid
             WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND l.relation IN (SELECT oid FROM part)
               AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
             ORDER BY l.granted DESC, a.xact_start LIMIT 1",
            &[&table.quoted()],
        )
        .await?;
    let Some(holder) = holders.first() else {
        return Ok((
            format!("table {table} is locked by another session (ALTER, TRUNCATE, VACUUM FULL, ...)"),
            format!(
                "Wait for it, or see who it is: SELECT pid, query FROM pg_stat_activity WHERE pid IN \
                 (SELECT pid FROM pg_locks WHERE relation = {}::regclass).",
                quote_literal(&table.quoted())
            ),
        ));
    };
    let Some(pid) = holder.get::<_, Option<i32>>(0) else {
        return Ok((
            format!("table {table} is locked by a prepared transaction"),
            "End it: SELECT gid, prepared FROM pg_prepared_xacts names it for COMMIT PREPARED or ROLLBACK PREPARED."
                .to_owned(),
        ));
    };
    let mut who = format!("pid {pid}");
    for (what, value) in [("application", holder.get::<_, String>(2)), ("user", holder.get(3))] {
        if !value.is_empty() {
            who.push_str(&format!(", {what} {value}"));
        }
    }
    if let Some(since) = holder.get::<_, Option<String>>(4) {
        who.push_str(&format!(", in its transaction since {since} UTC"));
    }
    let query = command(&holder.get::<_, String>(5));
    if !query.is_empty() {
        who.push_str(&format!(", {query}"));
    }
    if !holder.get::<_, bool>(1) {
        who.push_str(", which itself waits for the lock");
    }
    Ok((
        format!("table {table} is locked by another session: {who}"),
        format!("Wait for its transaction to end, or end it: SELECT pg_terminate_backend({pid})."),
    ))
}

/// The words that a query begins with, as far as they are known ones.
fn command(query: &str) -> String {
    let words = query.split(|letter: char| letter.is_whitespace() || letter == ';').map(str::to_ascii_uppercase);
    let words = words.skip_while(|word| word.is_empty() || word == "BEGIN");
    let known: Vec<String> = words.take_while(|word| WORDS.contains(&word.as_str())).take(2).collect();
    known.join(" ")
}

#[cfg(test)]
mod tests {
    use super::command;

    #[test]
    fn of_a_query_only_known_words_are_shown() {
        assert_eq!(command("alter table people add secret text default 'x'"), "ALTER TABLE");
        assert_eq!(command("BEGIN; LOCK TABLE people IN ACCESS EXCLUSIVE MODE"), "LOCK TABLE");
        assert_eq!(command("TRUNCATE people"), "TRUNCATE");
        for query in
            ["INSERT INTO people VALUES ('secret')", "/* secret */ DROP TABLE people", "", "<insufficient privilege>"]
        {
            assert_eq!(command(query), "", "{query}");
        }
    }
}
