//! Reading a row whose large values an update did not send.

use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use tokio_postgres::{Client, SimpleQueryMessage};

use crate::change::Field;
use crate::mapping::Shape;
use crate::postgres::pgoutput::Tuple;
use crate::problem::Problem;
use crate::table::{TableId, quote_identifier, quote_literal};

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

/// The row of `table` that has the key of `tuple`, as a line of COPY, its columns those of `shape`; `None` when there is
/// none now.
///
/// By COPY, so that its text is the same as the copy's and the stream's.
///
/// # Errors
/// The query fails.
pub(super) async fn current_row(
    client: &Client,
    table: &TableId,
    shape: &Shape,
    tuple: Tuple<'_>,
) -> Result<Option<Vec<u8>>, Problem> {
    let fields: Vec<Field<'_>> = tuple.iter().collect();
    let mut conditions = Vec::new();
    for &at in shape.key() {
        let (Some(column), Some(Field::Text(text))) = (shape.columns().get(at), fields.get(at)) else {
            return Ok(None);
        };
        let literal = quote_literal(&String::from_utf8_lossy(text));
        conditions.push(format!("{} = {literal}", quote_identifier(&column.name)));
    }
    if conditions.is_empty() {
        return Ok(None);
    }
    let columns: Vec<String> = shape.columns().iter().map(|column| quote_identifier(&column.name)).collect();
    let sql = format!(
        "COPY (SELECT {} FROM {} WHERE {}) TO STDOUT",
        columns.join(", "),
        table.quoted(),
        conditions.join(" AND ")
    );
    let mut lines = pin!(client.copy_out(&sql).await?);
    let mut found = None;
    while let Some(line) = lines.next().await {
        found = Some(line?.to_vec());
    }
    Ok(found)
}
