//! The tables in PostgreSQL that remember how far the copy has come: those of the reference, and a few columns more.
//!
//! They live in the schema `public`, where the reference looks for its own. A chunk's row says `pending`,
//! `in_progress` or `completed`; it is completed only after the sink has answered for its last document. Losing the
//! record of a completed chunk costs a second copy of it and nothing else, so chunk rows are written without waiting
//! for the disk.
//!
//! A table that is to be copied again has a row of its own, of chunk -1 and `wanted`, from the wish until documents
//! without a row are removed: its chunks alone would be completed before that.

use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Mutex, MutexGuard, OnceCell};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Statement};

use super::plan::Range;
use crate::lsn::Lsn;
use crate::postgres::PostgresError;
use crate::problem::{Problem, ProblemKind};
use crate::table::{TableId, quote_identifier};

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
    ADD COLUMN IF NOT EXISTS attempts INT NOT NULL DEFAULT 0;
ALTER TABLE public.cdc_snapshot_job
    ADD COLUMN IF NOT EXISTS writer TEXT,
    ADD COLUMN IF NOT EXISTS system_id TEXT,
    ADD COLUMN IF NOT EXISTS sweep BOOLEAN NOT NULL DEFAULT FALSE;
CREATE INDEX IF NOT EXISTS idx_chunks_claim ON public.cdc_snapshot_chunks (slot_name, status, claimed_at)
    WHERE status IN ('pending', 'in_progress');
CREATE INDEX IF NOT EXISTS idx_chunks_status ON public.cdc_snapshot_chunks (slot_name, status);
";

/// Columns added by pgtide: where one is missing, [`CREATE`] has to run. `ALTER TABLE` takes a lock even where it has
/// nothing to do, so it is not run for nothing.
const COMPLETE: &str = "
SELECT count(*) = 2 FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = 'public' AND NOT a.attisdropped
  AND (c.relname, a.attname) IN (('cdc_snapshot_chunks', 'attempts'), ('cdc_snapshot_job', 'sweep'))";

async fn create(client: &Client) -> Result<(), Problem> {
    let Err(error) = client.batch_execute(CREATE).await else { return Ok(()) };
    if error.code() != Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
        return Err(error.into());
    }
    let user: String = client.query_one("SELECT current_user::text", &[]).await?.get(0);
    Err(Problem::new(
        ProblemKind::Setup,
        format!(
            "user {user} may not create the ledger (public.cdc_snapshot_job, public.cdc_snapshot_chunks): {}",
            PostgresError::from(error)
        ),
        format!(
            "GRANT USAGE, CREATE ON SCHEMA public TO {}; once the ledger is there, CREATE can be revoked.",
            quote_identifier(&user)
        ),
    ))
}

/// A copy as the ledger remembers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// The snapshot's position: every document of the job has at least the version one below it.
    pub lsn: Lsn,
    /// Every chunk was completed.
    pub completed: bool,
    /// pgtide wrote it; the reference leaves nothing here.
    pub ours: bool,
    /// The server's system identifier, where pgtide wrote it.
    pub system_id: Option<String>,
    /// Documents that no row of this job replaced are to be removed at its end.
    pub sweep: bool,
}

/// A chunk of the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkRow {
    /// `cdc_snapshot_chunks.id`.
    pub id: i32,
    /// The table.
    pub table: TableId,
    /// Its number in the table, from 0.
    pub index: usize,
    /// The position of the snapshot that its table was planned under: the job's, or a later one's where the table was
    /// planned anew.
    pub lsn: Lsn,
    /// What to copy.
    pub range: Range,
    /// The sink has answered for it.
    pub completed: bool,
    /// Rows that it held, once completed.
    pub rows: u64,
    /// How often it was claimed so far.
    pub attempts: u32,
}

/// The ledger of one slot (or, in mode `snapshot_only`, of one job name).
#[derive(Debug)]
pub struct Ledger {
    client: Client,
    job: String,
    instance: String,
    /// Who has it may begin a transaction: there is one connection.
    transacting: Mutex<()>,
    claim: OnceCell<Statement>,
    complete: OnceCell<Statement>,
}

impl Ledger {
    /// The ledger of `job`, its tables created where they are missing. `instance` names this process in claims.
    ///
    /// # Errors
    /// The tables cannot be created: the role needs CREATE on the schema `public`.
    pub async fn open(client: Client, job: &str, instance: &str) -> Result<Self, Problem> {
        client.batch_execute("SET synchronous_commit = off").await?;
        if !client.query_one(COMPLETE, &[]).await?.get::<_, bool>(0) {
            create(&client).await?;
        }
        Ok(Self {
            client,
            job: job.to_owned(),
            instance: instance.to_owned(),
            transacting: Mutex::new(()),
            claim: OnceCell::new(),
            complete: OnceCell::new(),
        })
    }

    /// Takes the lock that makes this process the only one that works for the job, for as long as the ledger's
    /// connection lives. False: another process has it.
    ///
    /// # Errors
    /// The query fails.
    pub async fn try_lock(&self) -> Result<bool, Problem> {
        let row = self
            .client
            .query_one(
                "SELECT pg_catalog.pg_try_advisory_lock(pg_catalog.hashtextextended('pgtide ' || $1, 0))",
                &[&self.job],
            )
            .await?;
        Ok(row.get(0))
    }

    /// Ends when the ledger's connection has ended, and the lock with it. Nobody tells, so it is looked at.
    pub async fn lost(&self) -> Problem {
        while !self.client.is_closed() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Problem::new(
            ProblemKind::Postgres,
            "the connection of the ledger has ended, and with it the lock that keeps a second pgtide out",
            "It is made again by itself. If it keeps ending, the server's log says why.",
        )
        .transient()
    }

    /// Who has the lock, in words, as [`try_lock`](Self::try_lock) did not get it. A process that copies and whose last
    /// sign of life is older than `claim_timeout` is said to hang.
    ///
    /// # Errors
    /// The query fails.
    pub async fn holder(&self, claim_timeout: Duration) -> Result<String, Problem> {
        // A lock of 64 bits shows as two halves, objsubid 1: "pg_locks" in PostgreSQL's manual.
        let held = "SELECT l.pid,
                (SELECT claimed_by FROM public.cdc_snapshot_chunks c
                 WHERE slot_name = $1 AND status = 'in_progress' ORDER BY heartbeat_at DESC NULLS LAST LIMIT 1),
                (SELECT extract(epoch FROM now() AT TIME ZONE 'UTC' - max(heartbeat_at))::float8
                 FROM public.cdc_snapshot_chunks WHERE slot_name = $1 AND status = 'in_progress')
             FROM pg_catalog.pg_locks l, pg_catalog.hashtextextended('pgtide ' || $1, 0) AS key
             WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
               AND (l.classid::int8 << 32 | l.objid::int8) = key
               AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())";
        let Some(row) = self.client.query_opt(held, &[&self.job]).await? else { return Ok(String::new()) };
        let (pid, instance, silent): (i32, Option<String>, Option<f64>) = (row.get(0), row.get(1), row.get(2));
        let instance = instance.map(|instance| format!("instance {instance}, ")).unwrap_or_default();
        let silent = silent.filter(|silent| *silent > claim_timeout.as_secs_f64());
        let silent = silent.map(|silent| format!(", which gave no sign of life for {silent:.0} s: it may hang"));
        Ok(format!(" ({instance}backend {pid}{})", silent.unwrap_or_default()))
    }

    /// Begins a transaction that is on disk once it has committed. Statements that others make meanwhile are part of
    /// it. Dropped without a commit it is rolled back.
    async fn transaction(&self) -> Result<Open<'_>, Problem> {
        let alone = self.transacting.lock().await;
        let open = Open(Some(&self.client), alone);
        self.client.batch_execute("BEGIN; SET LOCAL synchronous_commit = on").await?;
        Ok(open)
    }

    /// The job, if there is one.
    ///
    /// # Errors
    /// The query fails.
    pub async fn job(&self) -> Result<Option<Job>, Problem> {
        let row = self
            .client
            .query_opt(
                "SELECT snapshot_lsn, coalesce(completed, FALSE), writer IS NOT NULL, system_id, sweep
                 FROM public.cdc_snapshot_job WHERE slot_name = $1",
                &[&self.job],
            )
            .await?;
        Ok(row.map(|row| Job {
            lsn: row.get::<_, String>(0).parse().unwrap_or_default(),
            completed: row.get(1),
            ours: row.get(2),
            system_id: row.get(3),
            sweep: row.get(4),
        }))
    }

    /// The job's chunks in the order of the plan.
    ///
    /// # Errors
    /// The query fails.
    pub async fn chunks(&self) -> Result<Vec<ChunkRow>, Problem> {
        let rows = self
            .client
            .query(
                &format!("SELECT {CHUNK} FROM public.cdc_snapshot_chunks c WHERE slot_name = $1 AND chunk_index >= 0 ORDER BY id"),
                &[&self.job],
            )
            .await?;
        Ok(rows.iter().map(chunk_row).collect())
    }

    /// Writes a new job and its plan, in one transaction that is on disk when this returns. What stood there before
    /// is gone: a crash in between leaves either the old or the new.
    ///
    /// # Errors
    /// A statement fails; nothing is changed then.
    pub async fn begin_job(
        &self,
        snapshot: &str,
        lsn: Lsn,
        system_id: &str,
        sweep: bool,
        plan: &[(TableId, Vec<Range>)],
    ) -> Result<(), Problem> {
        let total: usize = plan.iter().map(|(_, ranges)| ranges.len()).sum();
        let total = i32::try_from(total).unwrap_or(i32::MAX);
        let transaction = self.transaction().await?;
        self.client.execute("DELETE FROM public.cdc_snapshot_job WHERE slot_name = $1", &[&self.job]).await?;
        self.client.execute("DELETE FROM public.cdc_snapshot_chunks WHERE slot_name = $1", &[&self.job]).await?;
        self.client
            .execute(
                "INSERT INTO public.cdc_snapshot_job
                    (slot_name, snapshot_id, snapshot_lsn, started_at, completed, total_chunks, completed_chunks,
                     writer, system_id, sweep)
                 VALUES ($1, $2, $3, now() AT TIME ZONE 'UTC', FALSE, $4, 0, $5, $6, $7)",
                &[&self.job, &snapshot, &lsn.to_string(), &total, &WRITER, &system_id, &sweep],
            )
            .await?;
        for (table, ranges) in plan {
            insert_chunks(&self.client, &self.job, table, ranges, lsn).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Plans one table anew within the job: its chunks of before are forgotten. On disk when this returns.
    ///
    /// # Errors
    /// A statement fails; nothing is changed then.
    pub async fn replan(&self, table: &TableId, lsn: Lsn, ranges: &[Range]) -> Result<(), Problem> {
        let transaction = self.transaction().await?;
        self.client
            .execute(
                "DELETE FROM public.cdc_snapshot_chunks
                 WHERE slot_name = $1 AND table_schema = $2 AND table_name = $3 AND chunk_index >= 0",
                &[&self.job, &table.schema, &table.name],
            )
            .await?;
        insert_chunks(&self.client, &self.job, table, ranges, lsn).await?;
        self.client
            .execute(
                "UPDATE public.cdc_snapshot_job j SET
                    total_chunks = (SELECT count(*) FROM public.cdc_snapshot_chunks c
                                    WHERE c.slot_name = j.slot_name AND c.chunk_index >= 0),
                    completed_chunks = (SELECT count(*) FROM public.cdc_snapshot_chunks c
                                        WHERE c.slot_name = j.slot_name AND c.status = 'completed')
                 WHERE slot_name = $1",
                &[&self.job],
            )
            .await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Marks the job as one that is to be done again from its beginning, whatever of it is done.
    ///
    /// # Errors
    /// The query fails.
    pub async fn reopen_job(&self) -> Result<(), Problem> {
        self.client
            .execute(
                "UPDATE public.cdc_snapshot_job SET completed = FALSE, writer = NULL WHERE slot_name = $1",
                &[&self.job],
            )
            .await?;
        Ok(())
    }

    /// Says that a table is to be copied again; on disk when this returns. Gives the wish's number.
    ///
    /// # Errors
    /// The query fails.
    pub async fn want(&self, table: &TableId) -> Result<i32, Problem> {
        let transaction = self.transaction().await?;
        let row = self
            .client
            .query_one(
                "INSERT INTO public.cdc_snapshot_chunks AS c
                    (slot_name, table_schema, table_name, chunk_index, chunk_start, chunk_size, status, attempts)
                 VALUES ($1, $2, $3, -1, 0, 0, 'wanted', 1)
                 ON CONFLICT (slot_name, table_schema, table_name, chunk_index) DO UPDATE SET attempts = c.attempts + 1
                 RETURNING attempts",
                &[&self.job, &table.schema, &table.name],
            )
            .await?;
        transaction.commit().await?;
        Ok(row.get(0))
    }

    /// The table was copied again as `wish` asked for. A later wish stays.
    ///
    /// # Errors
    /// The query fails.
    pub async fn granted(&self, table: &TableId, wish: i32) -> Result<(), Problem> {
        self.client
            .execute(
                "DELETE FROM public.cdc_snapshot_chunks
                 WHERE slot_name = $1 AND table_schema = $2 AND table_name = $3 AND chunk_index = -1 AND attempts = $4",
                &[&self.job, &table.schema, &table.name, &wish],
            )
            .await?;
        Ok(())
    }

    /// A table has chunks that are not completed, or is to be copied again.
    ///
    /// # Errors
    /// The query fails.
    pub async fn has_pending(&self, table: &TableId) -> Result<bool, Problem> {
        let row = self
            .client
            .query_one(
                "SELECT EXISTS (SELECT FROM public.cdc_snapshot_chunks WHERE slot_name = $1 AND table_schema = $2
                                AND table_name = $3 AND status <> 'completed')",
                &[&self.job, &table.schema, &table.name],
            )
            .await?;
        Ok(row.get(0))
    }

    /// Rows that the completed chunks of a table held when they were copied.
    ///
    /// # Errors
    /// The query fails.
    pub async fn rows(&self, table: &TableId) -> Result<u64, Problem> {
        let row = self
            .client
            .query_one(
                "SELECT coalesce(sum(rows_processed), 0)::int8 FROM public.cdc_snapshot_chunks
                 WHERE slot_name = $1 AND table_schema = $2 AND table_name = $3 AND status = 'completed'",
                &[&self.job, &table.schema, &table.name],
            )
            .await?;
        Ok(row.get::<_, i64>(0).try_into().unwrap_or(0))
    }

    /// Forgets the chunks of a table: what it had is no longer part of the job.
    ///
    /// # Errors
    /// The query fails.
    pub async fn forget(&self, table: &TableId) -> Result<(), Problem> {
        self.client
            .execute(
                "DELETE FROM public.cdc_snapshot_chunks WHERE slot_name = $1 AND table_schema = $2 AND table_name = $3",
                &[&self.job, &table.schema, &table.name],
            )
            .await?;
        Ok(())
    }

    /// Makes the chunks that a process left in the middle claimable again. Only for the process that has the lock.
    ///
    /// # Errors
    /// The query fails.
    pub async fn release_all(&self) -> Result<(), Problem> {
        self.client
            .execute(
                "UPDATE public.cdc_snapshot_chunks SET status = 'pending', claimed_by = NULL
                 WHERE slot_name = $1 AND status = 'in_progress'",
                &[&self.job],
            )
            .await?;
        Ok(())
    }

    /// Claims up to `limit` chunks of tables that are not in `held`, in the order of the plan.
    ///
    /// # Errors
    /// The query fails.
    pub async fn claim(&self, limit: i64, held: &[String]) -> Result<Vec<ChunkRow>, Problem> {
        let sql = format!(
            "UPDATE public.cdc_snapshot_chunks c SET status = 'in_progress', claimed_by = $2, attempts = attempts + 1,
                    claimed_at = now() AT TIME ZONE 'UTC', heartbeat_at = now() AT TIME ZONE 'UTC'
             WHERE id IN (SELECT id FROM public.cdc_snapshot_chunks WHERE slot_name = $1 AND status = 'pending'
                            AND NOT table_schema || '.' || table_name = ANY ($4)
                          ORDER BY id LIMIT $3 FOR UPDATE SKIP LOCKED)
             RETURNING {CHUNK}"
        );
        let statement = self.claim.get_or_try_init(|| self.client.prepare(&sql)).await?;
        let rows = self.client.query(statement, &[&self.job, &self.instance, &limit, &held]).await?;
        let mut chunks: Vec<_> = rows.iter().map(chunk_row).collect();
        chunks.sort_by_key(|chunk| chunk.id);
        Ok(chunks)
    }

    /// Says that this process is alive and still works on its chunks.
    ///
    /// # Errors
    /// The query fails.
    pub async fn heartbeat(&self) -> Result<(), Problem> {
        self.client
            .execute(
                "UPDATE public.cdc_snapshot_chunks SET heartbeat_at = now() AT TIME ZONE 'UTC'
                 WHERE slot_name = $1 AND status = 'in_progress' AND claimed_by = $2",
                &[&self.job, &self.instance],
            )
            .await?;
        Ok(())
    }

    /// Marks chunks as completed: the sink has answered for their last document. `done` holds ids and rows.
    ///
    /// # Errors
    /// The query fails.
    pub async fn complete(&self, done: &[(i32, u64)]) -> Result<(), Problem> {
        if done.is_empty() {
            return Ok(());
        }
        let ids: Vec<i32> = done.iter().map(|(id, _)| *id).collect();
        let rows: Vec<i64> = done.iter().map(|(_, rows)| i64::try_from(*rows).unwrap_or(i64::MAX)).collect();
        let sql = "WITH done AS (
                    UPDATE public.cdc_snapshot_chunks c SET status = 'completed', rows_processed = d.rows,
                           completed_at = now() AT TIME ZONE 'UTC'
                    FROM unnest($2::int4[], $3::int8[]) AS d(id, rows)
                    WHERE c.id = d.id AND c.slot_name = $1 AND c.status = 'in_progress' AND c.claimed_by = $4
                    RETURNING 1)
                 UPDATE public.cdc_snapshot_job SET completed_chunks = completed_chunks + (SELECT count(*) FROM done)
                 WHERE slot_name = $1";
        let statement = self.complete.get_or_try_init(|| self.client.prepare(sql)).await?;
        self.client.execute(statement, &[&self.job, &ids, &rows, &self.instance]).await?;
        Ok(())
    }

    /// Marks the job as completed; on disk when this returns. True only if every chunk is completed.
    ///
    /// # Errors
    /// The query fails.
    pub async fn finish_job(&self) -> Result<bool, Problem> {
        let transaction = self.transaction().await?;
        let changed = self
            .client
            .execute(
                "UPDATE public.cdc_snapshot_job j SET completed = TRUE, sweep = FALSE
                 WHERE slot_name = $1 AND NOT EXISTS (SELECT FROM public.cdc_snapshot_chunks c
                                                      WHERE c.slot_name = j.slot_name AND c.status <> 'completed'
                                                        AND c.chunk_index >= 0)",
                &[&self.job],
            )
            .await?;
        transaction.commit().await?;
        Ok(changed == 1)
    }
}

/// A transaction of the ledger's connection.
struct Open<'a>(Option<&'a Client>, #[allow(dead_code, reason = "held")] MutexGuard<'a, ()>);

impl Open<'_> {
    async fn commit(mut self) -> Result<(), Problem> {
        if let Some(client) = self.0.take() {
            client.batch_execute("COMMIT").await?;
        }
        Ok(())
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if let Some(client) = self.0.take() {
            // Queued on the connection before anything that comes later; the answer is of no interest.
            drop(client.batch_execute("ROLLBACK").now_or_never());
        }
    }
}

const WRITER: &str = concat!("pgtide ", env!("CARGO_PKG_VERSION"));

const CHUNK: &str = "c.id, c.table_schema, c.table_name, c.chunk_index, coalesce(c.leaf_schema, c.table_schema),
    coalesce(c.leaf_name, c.table_name), coalesce(c.leaf_filenode, 0), coalesce(c.block_start, 0), c.block_end,
    c.status = 'completed', coalesce(c.rows_processed, 0), c.attempts,
    coalesce(c.snapshot_lsn, '')";

fn chunk_row(row: &tokio_postgres::Row) -> ChunkRow {
    let unsigned = |value: i64| u64::try_from(value).unwrap_or(0);
    ChunkRow {
        id: row.get(0),
        table: TableId::new(row.get::<_, String>(1), row.get::<_, String>(2)),
        index: usize::try_from(row.get::<_, i32>(3)).unwrap_or(0),
        lsn: row.get::<_, String>(12).parse().unwrap_or_default(),
        range: Range {
            leaf: TableId::new(row.get::<_, String>(4), row.get::<_, String>(5)),
            filenode: u32::try_from(row.get::<_, i64>(6)).unwrap_or(0),
            start: unsigned(row.get(7)),
            end: row.get::<_, Option<i64>>(8).map(unsigned),
        },
        completed: row.get(9),
        rows: unsigned(row.get(10)),
        attempts: u32::try_from(row.get::<_, i32>(11)).unwrap_or(0),
    }
}

async fn insert_chunks(client: &Client, job: &str, table: &TableId, ranges: &[Range], lsn: Lsn) -> Result<(), Problem> {
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    // The parameters of one statement must fit into memory on both sides.
    for (batch, ranges) in ranges.chunks(10_000).enumerate() {
        let first = i32::try_from(batch * 10_000).unwrap_or(i32::MAX);
        let schemas: Vec<&str> = ranges.iter().map(|range| range.leaf.schema.as_str()).collect();
        let names: Vec<&str> = ranges.iter().map(|range| range.leaf.name.as_str()).collect();
        let nodes: Vec<i64> = ranges.iter().map(|range| i64::from(range.filenode)).collect();
        let starts: Vec<i64> = ranges.iter().map(|range| signed(range.start)).collect();
        let ends: Vec<Option<i64>> = ranges.iter().map(|range| range.end.map(signed)).collect();
        client
            .execute(
                "INSERT INTO public.cdc_snapshot_chunks
                    (slot_name, table_schema, table_name, chunk_index, chunk_start, chunk_size, block_start, block_end,
                     is_last_chunk, partition_strategy, leaf_schema, leaf_name, leaf_filenode, snapshot_lsn)
                 SELECT $1, $2, $3, $4 + (r.n - 1)::int4, r.b, coalesce(r.e - r.b, 0), r.b, r.e, r.e IS NULL, 'ctid_block',
                        r.s, r.t, r.f, $5
                 FROM unnest($6::text[], $7::text[], $8::int8[], $9::int8[], $10::int8[])
                      WITH ORDINALITY AS r(s, t, f, b, e, n)
                 ORDER BY r.n",
                &[
                    &job,
                    &table.schema,
                    &table.name,
                    &first,
                    &lsn.to_string(),
                    &schemas,
                    &names,
                    &nodes,
                    &starts,
                    &ends,
                ],
            )
            .await?;
    }
    Ok(())
}
