//! The ledger's tables.

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::postgres::PostgresError;
use crate::problem::{Problem, ProblemKind};
use crate::table::quote_identifier;

const CREATE: &str = "
CREATE TABLE IF NOT EXISTS public.cdc_snapshot_job (
    slot_name TEXT PRIMARY KEY,
    snapshot_id TEXT NOT NULL,
    snapshot_lsn TEXT NOT NULL,
    started_at TIMESTAMP NOT NULL,
    completed BOOLEAN DEFAULT FALSE,
    total_chunks INT NOT NULL DEFAULT 0,
    completed_chunks INT NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS public.cdc_snapshot_chunks (
    id SERIAL PRIMARY KEY,
    slot_name TEXT NOT NULL,
    table_schema TEXT NOT NULL,
    table_name TEXT NOT NULL,
    chunk_index INT NOT NULL,
    chunk_start BIGINT NOT NULL,
    chunk_size BIGINT NOT NULL,
    range_start BIGINT,
    range_end BIGINT,
    block_start BIGINT,
    block_end BIGINT,
    is_last_chunk BOOLEAN NOT NULL DEFAULT FALSE,
    partition_strategy TEXT NOT NULL DEFAULT 'offset',
    status TEXT NOT NULL DEFAULT 'pending',
    claimed_by TEXT,
    claimed_at TIMESTAMP,
    heartbeat_at TIMESTAMP,
    completed_at TIMESTAMP,
    rows_processed BIGINT DEFAULT 0,
    UNIQUE (slot_name, table_schema, table_name, chunk_index)
);
ALTER TABLE public.cdc_snapshot_chunks
    ADD COLUMN IF NOT EXISTS range_start BIGINT,
    ADD COLUMN IF NOT EXISTS range_end BIGINT,
    ADD COLUMN IF NOT EXISTS block_start BIGINT,
    ADD COLUMN IF NOT EXISTS block_end BIGINT,
    ADD COLUMN IF NOT EXISTS is_last_chunk BOOLEAN NOT NULL DEFAULT FALSE,
    ADD COLUMN IF NOT EXISTS partition_strategy TEXT NOT NULL DEFAULT 'offset',
    ADD COLUMN IF NOT EXISTS leaf_schema TEXT,
    ADD COLUMN IF NOT EXISTS leaf_name TEXT,
    ADD COLUMN IF NOT EXISTS leaf_filenode BIGINT,
    ADD COLUMN IF NOT EXISTS snapshot_lsn TEXT,
    ADD COLUMN IF NOT EXISTS attempts INT NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS claimed_pid INT,
    ADD COLUMN IF NOT EXISTS rows_refused BIGINT NOT NULL DEFAULT 0;
ALTER TABLE public.cdc_snapshot_job
    ADD COLUMN IF NOT EXISTS writer TEXT,
    ADD COLUMN IF NOT EXISTS system_id TEXT,
    ADD COLUMN IF NOT EXISTS sweep BOOLEAN NOT NULL DEFAULT FALSE,
    ADD COLUMN IF NOT EXISTS keeper_snapshot TEXT,
    ADD COLUMN IF NOT EXISTS keeper_lsn TEXT,
    ADD COLUMN IF NOT EXISTS keeper_pid INT,
    ADD COLUMN IF NOT EXISTS keeper_tables TEXT,
    ADD COLUMN IF NOT EXISTS keeper_held TEXT[],
    ADD COLUMN IF NOT EXISTS timeline BIGINT,
    ADD COLUMN IF NOT EXISTS acknowledged_lsn TEXT;
CREATE TABLE IF NOT EXISTS public.cdc_snapshot_tables (
    slot_name TEXT NOT NULL,
    table_schema TEXT NOT NULL,
    table_name TEXT NOT NULL,
    definition TEXT,
    horizon BIGINT,
    index_uuid TEXT,
    PRIMARY KEY (slot_name, table_schema, table_name)
);
ALTER TABLE public.cdc_snapshot_tables
    ADD COLUMN IF NOT EXISTS since TEXT,
    ADD COLUMN IF NOT EXISTS announced JSONB;
CREATE INDEX IF NOT EXISTS idx_chunks_claim ON public.cdc_snapshot_chunks (slot_name, status, claimed_at)
    WHERE status IN ('pending', 'in_progress');
CREATE INDEX IF NOT EXISTS idx_chunks_status ON public.cdc_snapshot_chunks (slot_name, status);
";

/// Columns added by pgtide: where one is missing, [`CREATE`] has to run. `ALTER TABLE` takes a lock even where it has
/// nothing to do, so it is not run for nothing.
const COMPLETE: &str = "
SELECT NOT EXISTS (
    SELECT FROM (VALUES
        ('cdc_snapshot_chunks', 'attempts'), ('cdc_snapshot_chunks', 'rows_refused'),
        ('cdc_snapshot_job', 'sweep'), ('cdc_snapshot_job', 'keeper_held'), ('cdc_snapshot_job', 'acknowledged_lsn'),
        ('cdc_snapshot_tables', 'announced')) AS needed (relname, attname)
    WHERE NOT EXISTS (
        SELECT FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'public' AND NOT a.attisdropped
          AND c.relname = needed.relname AND a.attname = needed.attname))";

/// Creates the tables, or the columns that are missing, unless all is there.
///
/// # Errors
/// The role needs CREATE on the schema `public`.
pub(super) async fn ensure(client: &Client) -> Result<(), Problem> {
    if client.query_one(COMPLETE, &[]).await?.get(0) {
        return Ok(());
    }
    // Processes that start at the same moment would be in each other's way: IF NOT EXISTS looks before it creates.
    let transaction =
        client.batch_execute("BEGIN; SELECT pg_catalog.pg_advisory_xact_lock(hashtextextended('pgtide', 0))");
    transaction.await?;
    let created = create(client).await;
    client.batch_execute(if created.is_ok() { "COMMIT" } else { "ROLLBACK" }).await?;
    created
}

async fn create(client: &Client) -> Result<(), Problem> {
    let Err(error) = client.batch_execute(CREATE).await else { return Ok(()) };
    if error.code() != Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
        return Err(error.into());
    }
    client.batch_execute("ROLLBACK").await?;
    let user: String = client.query_one("SELECT current_user::text", &[]).await?.get(0);
    Err(Problem::new(
        ProblemKind::Setup,
        format!(
            "user {user} may not create the ledger (public.cdc_snapshot_job, cdc_snapshot_chunks, cdc_snapshot_tables): {}",
            PostgresError::from(error)
        ),
        format!(
            "GRANT USAGE, CREATE ON SCHEMA public TO {}; once the ledger is there, CREATE can be revoked.",
            quote_identifier(&user)
        ),
    ))
}
