//! Reading a row whose large values an update did not send.

use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::relations::Relation;
use crate::change::Field;
use crate::lsn::Lsn;
use crate::postgres::catalog;
use crate::postgres::pgoutput::Tuple;
use crate::problem::Problem;
use crate::table::{quote_identifier, quote_value};

/// The longest pause between two looks at a transaction.
const LOOK: Duration = Duration::from_millis(100);

/// Waits until other sessions see the transaction. The stream may bring it before: PostgreSQL decodes a commit that is
/// on disk, and shows it to others only a moment later; under synchronous replication, when a standby has confirmed it.
///
/// # Errors
/// The query fails.
pub(super) async fn seen(client: &Client, xid: u32) -> Result<(), Problem> {
    // The stream's xid lacks the epoch: it is the one next to the snapshot's end, before or behind it.
    let sql = format!(
        "SELECT pg_catalog.pg_visible_in_snapshot(
            (x + (({xid}::bigint - x + 2147483648) & 4294967295) - 2147483648)::text::pg_catalog.xid8, s)
         FROM (SELECT s, pg_catalog.pg_snapshot_xmax(s)::text::bigint FROM pg_catalog.pg_current_snapshot() AS c (s)) AS v (s, x)"
    );
    let mut pause = Duration::from_millis(1);
    loop {
        let answer = client.simple_query(&sql).await?;
        if answer.iter().any(|message| matches!(message, SimpleQueryMessage::Row(row) if row.get(0) == Some("t"))) {
            return Ok(());
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LOOK);
    }
}

/// The row of `relation` that has the key of `new`, as a line of COPY with the announced columns; `None` when there is
/// none now, or none can be, because the key has another type; and a position before which everything was committed that it shows. `xid`: the transaction of the change.
///
/// By COPY, so that its text is the same as the copy's and the stream's.
///
/// The table may have changed since the announcement. It is read by today's names; of a column that has been dropped
/// the value is the one that the change brought, or NULL.
///
/// # Errors
/// The queries fail.
pub(super) async fn current_row(
    client: &Client,
    relation: &Relation,
    xid: u32,
    old: Option<Tuple<'_>>,
    new: Tuple<'_>,
) -> Result<(Option<Vec<u8>>, Lsn), Problem> {
    match read(client, relation, xid, old, new).await? {
        Some(mut line) => {
            let end = line.iter().rposition(|&byte| byte == b'\t').unwrap_or(line.len());
            let position = str::from_utf8(&line[end..]).ok().and_then(|text| text.trim().parse().ok());
            line.truncate(end);
            Ok((Some(line), position.unwrap_or(Lsn(u64::MAX))))
        }
        None => {
            let row = client.query_one(&format!("SELECT {POSITION}::text"), &[]).await?;
            Ok((None, row.get::<_, String>(0).parse().unwrap_or(Lsn(u64::MAX))))
        }
    }
}

/// What PostgreSQL says of a literal that the type it is compared with has no value for.
const NO_VALUE: [SqlState; 5] = [
    SqlState::INVALID_TEXT_REPRESENTATION,
    SqlState::NUMERIC_VALUE_OUT_OF_RANGE,
    SqlState::INVALID_DATETIME_FORMAT,
    SqlState::DATETIME_FIELD_OVERFLOW,
    SqlState::UNDEFINED_FUNCTION,
];

/// Where PostgreSQL writes: evaluated after the snapshot of its query is taken.
const POSITION: &str = "pg_catalog.pg_current_wal_insert_lsn()";

/// The row's line, with the position as one column more.
async fn read(
    client: &Client,
    relation: &Relation,
    xid: u32,
    old: Option<Tuple<'_>>,
    new: Tuple<'_>,
) -> Result<Option<Vec<u8>>, Problem> {
    let shape = &relation.shape;
    let announced: Vec<&str> = shape.columns().iter().map(|column| column.name.as_str()).collect();
    let Some(today) = catalog::today(client, relation.oid, xid, &announced).await? else { return Ok(None) };
    let name = |at: usize| Some(quote_identifier(&today.columns.get(at)?.as_ref()?.name));
    let fields: Vec<Field<'_>> = new.iter().collect();
    let literal = |field: Option<&Field<'_>>| match field {
        Some(Field::Text(text)) => Some(quote_value(text)),
        _ => None,
    };
    let mut conditions = Vec::new();
    for &at in shape.key() {
        // A key that is large enough to be stored apart is not sent either, unless as the old one.
        let before = old.and_then(|old| old.iter().nth(at));
        let field = fields.get(at).filter(|field| **field != Field::Unchanged).or(before.as_ref());
        let (Some(name), Some(literal)) = (name(at), literal(field)) else { return Ok(None) };
        conditions.push(format!("{name} = {literal}"));
    }
    if conditions.is_empty() {
        return Ok(None);
    }
    let gone = |at: usize| literal(fields.get(at)).unwrap_or_else(|| "NULL".to_owned());
    let columns: Vec<String> = (0..announced.len()).map(|at| name(at).unwrap_or_else(|| gone(at))).collect();
    let sql = format!(
        "COPY (SELECT {}, {POSITION} FROM {} {} WHERE {}) TO STDOUT",
        columns.join(", "),
        // Rows of tables that inherit from it are not its own.
        if today.partitioned { "" } else { "ONLY" },
        today.table.quoted(),
        conditions.join(" AND ")
    );
    let lines = match client.copy_out(&sql).await {
        Ok(lines) => lines,
        // The key's type is another by now, for which that is no value. The table is copied again for it.
        Err(error) if error.code().is_some_and(|code| NO_VALUE.contains(code)) => return Ok(None),
        Err(error) => {
            // Somebody was faster: the next attempt looks again.
            let changed = matches!(error.code(), Some(&SqlState::UNDEFINED_COLUMN | &SqlState::UNDEFINED_TABLE));
            let problem = Problem::from(error);
            return Err(if changed { problem.transient() } else { problem });
        }
    };
    let mut lines = pin!(lines);
    let mut found = None;
    while let Some(line) = lines.next().await {
        found = Some(line?.to_vec());
    }
    Ok(found)
}
