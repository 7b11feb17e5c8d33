//! What the ledger says to somebody who only looks, and what is left of it when a pipeline is removed.

use tokio_postgres::Client;

use crate::problem::Problem;
use crate::table::TableId;

/// What is recorded of a job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// The ledger's tables are there.
    pub tables: bool,
    /// Rows of the job in all of them.
    pub rows: i64,
    /// Other jobs that have rows.
    pub others: Vec<String>,
    /// The job's first copy has begun and is not done.
    pub half_done: bool,
    /// Tables that are to be copied again.
    pub wanted: Vec<TableId>,
}

impl Recorded {
    /// Reads it; makes nothing.
    ///
    /// # Errors
    /// The queries fail.
    pub async fn read(client: &Client, job: &str) -> Result<Self, Problem> {
        let there =
            "SELECT count(*) = 2 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                     WHERE n.nspname = 'public' AND c.relname IN ('cdc_snapshot_job', 'cdc_snapshot_chunks')";
        if !client.query_one(there, &[]).await?.get::<_, bool>(0) {
            return Ok(Self::default());
        }
        // The reference has none of these.
        let definitions = match definitions(client).await? {
            true => "(SELECT count(*) FROM public.cdc_snapshot_tables WHERE slot_name = $1)",
            false => "0",
        };
        let row = client
            .query_one(
                &format!(
                    "SELECT (SELECT count(*) FROM public.cdc_snapshot_job WHERE slot_name = $1)
                            + (SELECT count(*) FROM public.cdc_snapshot_chunks WHERE slot_name = $1) + {definitions},
                        ARRAY(SELECT slot_name FROM public.cdc_snapshot_job WHERE slot_name <> $1
                              UNION SELECT slot_name FROM public.cdc_snapshot_chunks WHERE slot_name <> $1 ORDER BY 1),
                        EXISTS (SELECT FROM public.cdc_snapshot_job WHERE slot_name = $1 AND completed IS NOT TRUE AND snapshot_id <> '')"
                ),
                &[&job],
            )
            .await?;
        let wanted = client
            .query(
                "SELECT table_schema, table_name FROM public.cdc_snapshot_chunks WHERE slot_name = $1 AND chunk_index < 0",
                &[&job],
            )
            .await?;
        let table = |row: &tokio_postgres::Row| TableId::new(row.get::<_, String>(0), row.get::<_, String>(1));
        Ok(Self {
            tables: true,
            rows: row.get(0),
            others: row.get(1),
            half_done: row.get(2),
            wanted: wanted.iter().map(table).collect(),
        })
    }

    /// Removes the rows of a job; with `tables` the ledger's tables as well, if nothing else is in them by then. Gives
    /// whether they went: they stay where another role owns them, or a session works with them.
    ///
    /// # Errors
    /// The rows cannot be removed; nothing is then.
    pub async fn remove(client: &Client, job: &str, tables: bool) -> Result<bool, Problem> {
        client.batch_execute("BEGIN; SET LOCAL lock_timeout = '2s'; SET LOCAL synchronous_commit = on").await?;
        let removed = Self::remove_in_transaction(client, job, tables).await;
        client.batch_execute(if removed.is_ok() { "COMMIT" } else { "ROLLBACK" }).await?;
        removed
    }

    async fn remove_in_transaction(client: &Client, job: &str, tables: bool) -> Result<bool, Problem> {
        client.execute("DELETE FROM public.cdc_snapshot_chunks WHERE slot_name = $1", &[&job]).await?;
        client.execute("DELETE FROM public.cdc_snapshot_job WHERE slot_name = $1", &[&job]).await?;
        let mut names = "public.cdc_snapshot_chunks, public.cdc_snapshot_job".to_owned();
        let mut empty = "SELECT NOT EXISTS (SELECT FROM public.cdc_snapshot_chunks)
                            AND NOT EXISTS (SELECT FROM public.cdc_snapshot_job)"
            .to_owned();
        if definitions(client).await? {
            client.execute("DELETE FROM public.cdc_snapshot_tables WHERE slot_name = $1", &[&job]).await?;
            names.push_str(", public.cdc_snapshot_tables");
            empty.push_str(" AND NOT EXISTS (SELECT FROM public.cdc_snapshot_tables)");
        }
        if !tables {
            return Ok(false);
        }
        // What is not ours or in use stays, without the rows.
        let locked =
            client.batch_execute(&format!("SAVEPOINT tables; LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE")).await;
        if locked.is_ok() {
            let empty = client.query_one(&empty, &[]).await?.get::<_, bool>(0);
            if !empty || client.batch_execute(&format!("DROP TABLE {names}")).await.is_ok() {
                return Ok(empty);
            }
        }
        client.batch_execute("ROLLBACK TO SAVEPOINT tables").await?;
        Ok(false)
    }
}

/// The table of definitions is there.
async fn definitions(client: &Client) -> Result<bool, Problem> {
    let there = "SELECT pg_catalog.to_regclass('public.cdc_snapshot_tables') IS NOT NULL";
    Ok(client.query_one(there, &[]).await?.get(0))
}
