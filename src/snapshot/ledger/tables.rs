//! What the tables and their indices were when they were copied.

use std::collections::{BTreeMap, HashMap};

use super::Ledger;
use crate::lsn::Lsn;
use crate::postgres::definition::{Announced, Definition, Seen};
use crate::problem::Problem;
use crate::table::TableId;

/// What the ledger remembers of a table, once it is planned.
#[derive(Clone, Debug, Default)]
pub struct Remembered {
    /// What it was when its documents were made, or later without a difference to them; none where nobody wrote it down.
    pub seen: Option<Seen>,
    /// As what the stream announced it since its documents were made: [`Ledger::announced`].
    pub announced: Vec<Announced>,
    /// Which index its documents went to, by `index.uuid`; none before there was one. (It was once written empty.)
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
                "SELECT table_schema, table_name, definition, horizon, nullif(index_uuid, ''), announced::text
                 FROM public.cdc_snapshot_tables WHERE slot_name = $1",
                &[&self.job],
            )
            .await?;
        let remembered = |row: tokio_postgres::Row| {
            let definition: Option<Definition> =
                row.get::<_, Option<String>>(2).and_then(|text| serde_json::from_str(&text).ok());
            let horizon = row.get::<_, Option<i64>>(3).and_then(|horizon| u64::try_from(horizon).ok()).unwrap_or(0);
            let seen = definition.map(|definition| Seen { definition, horizon });
            let announced: BTreeMap<String, String> =
                row.get::<_, Option<String>>(5).and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
            let announced = announced.keys().filter_map(|text| serde_json::from_str(text).ok()).collect();
            let table = TableId::new(row.get::<_, String>(0), row.get::<_, String>(1));
            (table, Remembered { seen, announced, index: row.get(4) })
        };
        Ok(rows.into_iter().map(remembered).collect())
    }

    /// The documents of `table` are, or are about to be, rows of what was `seen`. `since`: they are of the snapshot at this
    /// position and of what the stream brought after it; what it announced before is forgotten. None: they are as they were.
    ///
    /// # Errors
    /// The query fails.
    pub async fn define(&self, table: &TableId, seen: &Seen, since: Option<Lsn>) -> Result<(), Problem> {
        // Numbers, texts and lists of them always serialise.
        let definition = serde_json::to_string(&seen.definition).unwrap_or_default();
        let horizon = i64::try_from(seen.horizon).unwrap_or(i64::MAX);
        let since = since.map(|since| since.to_string());
        self.client()
            .await
            .execute(
                "INSERT INTO public.cdc_snapshot_tables AS t (slot_name, table_schema, table_name, definition, horizon, since)
                 VALUES ($1, $2, $3, $4, $5, $6)
                 ON CONFLICT (slot_name, table_schema, table_name)
                 DO UPDATE SET definition = excluded.definition, horizon = excluded.horizon,
                    since = coalesce(excluded.since, t.since),
                    announced = CASE WHEN excluded.since IS NULL THEN t.announced ELSE (
                        SELECT pg_catalog.jsonb_object_agg(a.key, a.value) FROM pg_catalog.jsonb_each_text(t.announced) AS a
                        WHERE a.value::pg_lsn >= excluded.since::pg_lsn) END",
                &[&self.job, &table.schema, &table.name, &definition, &horizon, &since],
            )
            .await?;
        Ok(())
    }

    /// The transaction that committed at `commit` has changes of `table` that the stream announced so. Not waited for to be on
    /// disk: what is acknowledged later is written later.
    ///
    /// # Errors
    /// The query fails.
    pub async fn announced(&self, table: &TableId, commit: Lsn, announced: &Announced) -> Result<(), Problem> {
        let announced = serde_json::to_string(announced).unwrap_or_default();
        self.client()
            .await
            .execute(
                "UPDATE public.cdc_snapshot_tables
                 SET announced = coalesce(announced, '{}') || pg_catalog.jsonb_build_object($4::text, $5::text)
                 WHERE slot_name = $1 AND table_schema = $2 AND table_name = $3 AND coalesce(since::pg_lsn <= $5::text::pg_lsn, TRUE)",
                &[&self.job, &table.schema, &table.name, &announced, &commit.to_string()],
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
                 DO UPDATE SET index_uuid = coalesce(nullif(t.index_uuid, ''), excluded.index_uuid)",
                &[&self.job, &table.schema, &table.name, &uuid],
            )
            .await?;
        Ok(())
    }
}
