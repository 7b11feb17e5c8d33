//! Reading a row whose large values an update did not send.

use std::pin::pin;

use futures_util::StreamExt;
use tokio_postgres::Client;

use crate::change::Field;
use crate::mapping::Shape;
use crate::postgres::pgoutput::Tuple;
use crate::problem::Problem;
use crate::table::{TableId, quote_identifier, quote_literal};

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
