//! What the tables and their indices were when they were copied.

use std::collections::HashMap;

use super::Ledger;
use crate::postgres::definition::{Definition, Seen};
use crate::problem::Problem;
use crate::table::TableId;

/// What the ledger remembers of a table, once it is planned.
#[derive(Clone, Debug, Default)]
pub struct Remembered {
    /// What it was when its documents were made, or later without a difference to them; none where nobody wrote it down.
    pub seen: Option<Seen>,
    /// Which index its documents went to, by `index.uuid`; none before there was one.
    pub index: Option<String>,
}

impl Ledger {
    /// What is remembered of each table.
    ///
    /// # Errors
    /// The query fails.
    pub async fn remembered(&self) -> Result<HashMap<TableId, Remembered>, Problem> {
        let rows = self
            .client()
            .await
            .query(
                "SELECT table_schema, table_name, definition, horizon, index_uuid FROM public.cdc_snapshot_tables
                 WHERE slot_name = $1",
                &[&self.job],
            )
            .await?;
        let remembered = |row: tokio_postgres::Row| {
            let definition: Option<Definition> =
                row.get::<_, Option<String>>(2).and_then(|text| serde_json::from_str(&text).ok());
            let horizon = row.get::<_, Option<i64>>(3).and_then(|horizon| u64::try_from(horizon).ok()).unwrap_or(0);
            let seen = definition.map(|definition| Seen { definition, horizon });
            (TableId::new(row.get::<_, String>(0), row.get::<_, String>(1)), Remembered { seen, index: row.get(4) })
        };
        Ok(rows.into_iter().map(remembered).collect())
    }

    /// The documents of `table` are, or are about to be, rows of what was `seen`.
    ///
    /// # Errors
    /// The query fails.
    pub async fn define(&self, table: &TableId, seen: &Seen) -> Result<(), Problem> {
        // Numbers, texts and lists of them always serialise.
        let definition = serde_json::to_string(&seen.definition).unwrap_or_default();
        let horizon = i64::try_from(seen.horizon).unwrap_or(i64::MAX);
        self.client()
            .await
            .execute(
                "INSERT INTO public.cdc_snapshot_tables (slot_name, table_schema, table_name, definition, horizon)
                 VALUES ($1, $2, $3, $4, $5)
                 ON CONFLICT (slot_name, table_schema, table_name)
                 DO UPDATE SET definition = excluded.definition, horizon = excluded.horizon",
                &[&self.job, &table.schema, &table.name, &definition, &horizon],
            )
            .await?;
        Ok(())
    }

    /// The documents of `table` are in the index of this `index.uuid`. What is known already stays.
    ///
    /// # Errors
    /// The query fails.
    pub async fn remember_index(&self, table: &TableId, uuid: &str) -> Result<(), Problem> {
        self.client()
            .await
            .execute(
                "INSERT INTO public.cdc_snapshot_tables AS t (slot_name, table_schema, table_name, index_uuid)
                 VALUES ($1, $2, $3, $4)
                 ON CONFLICT (slot_name, table_schema, table_name)
                 DO UPDATE SET index_uuid = coalesce(t.index_uuid, excluded.index_uuid)",
                &[&self.job, &table.schema, &table.name, &uuid],
            )
            .await?;
        Ok(())
    }
}
