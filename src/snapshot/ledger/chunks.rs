//! The chunks of the copy: planned, claimed, completed; and the wishes for a table to be copied again.

use tokio_postgres::Client;

use super::Ledger;
use crate::broken::{Rule, broken};
use crate::lsn::Lsn;
use crate::problem::{Problem, ProblemKind};
use crate::sink::Moment;
use crate::snapshot::plan::{Bounds, Range};
use crate::table::TableId;
use crate::telemetry::lock;

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
    /// The number of its newest claim, from 1: who claimed it shows it with all that follows.
    pub token: i32,
}

/// A chunk that somebody has claimed or completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// The table.
    pub table: TableId,
    /// Its number in the table, from 0.
    pub index: usize,
    /// Completed; otherwise claimed.
    pub completed: bool,
    /// Rows that it held, once completed.
    pub rows: u64,
    /// By this process.
    pub own: bool,
}

/// A chunk that the sink has answered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// [`ChunkRow::id`].
    pub id: i32,
    /// [`ChunkRow::token`] of the claim under which it was copied.
    pub token: i32,
    /// Rows that it held.
    pub rows: u64,
    /// Rows of the table that were refused for good since this was last said.
    pub refused: u64,
}

impl Ledger {
    /// The job's chunks in the order of the plan.
    ///
    /// # Errors
    /// The query fails.
    pub async fn chunks(&self) -> Result<Vec<ChunkRow>, Problem> {
        let rows = self
            .client()
            .await
            .query(
                &format!("SELECT {CHUNK} FROM public.cdc_snapshot_chunks c WHERE slot_name = $1 AND chunk_index >= 0 ORDER BY id"),
                &[&self.job],
            )
            .await?;
        Ok(rows.iter().map(chunk_row).collect())
    }

    /// Plans one table anew within the job: its chunks of before are forgotten. On disk when this returns.
    ///
    /// # Errors
    /// A statement fails; nothing is changed then.
    pub async fn replan(&self, table: &TableId, lsn: Lsn, ranges: &[Range]) -> Result<(), Problem> {
        let transaction = self.transaction().await?;
        transaction
            .execute(
                "DELETE FROM public.cdc_snapshot_chunks
                 WHERE slot_name = $1 AND table_schema = $2 AND table_name = $3 AND chunk_index >= 0",
                &[&self.job, &table.schema, &table.name],
            )
            .await?;
        insert_chunks(&transaction, &self.job, table, ranges, lsn).await?;
        transaction
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

    /// Says that a table is to be copied again; on disk when this returns. Gives the wish's number, which is above `last`.
    ///
    /// # Errors
    /// The query fails.
    pub async fn want(&self, table: &TableId, last: i32) -> Result<i32, Problem> {
        let transaction = self.transaction().await?;
        let row = transaction
            .query_one(
                "INSERT INTO public.cdc_snapshot_chunks AS c
                    (slot_name, table_schema, table_name, chunk_index, chunk_start, chunk_size, status, attempts)
                 VALUES ($1, $2, $3, -1, 0, 0, 'wanted', $4::int + 1)
                 ON CONFLICT (slot_name, table_schema, table_name, chunk_index)
                 DO UPDATE SET attempts = GREATEST(c.attempts, $4::int) + 1
                 RETURNING attempts",
                &[&self.job, &table.schema, &table.name, &last],
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
        self.client()
            .await
            .execute(
                "DELETE FROM public.cdc_snapshot_chunks
                 WHERE slot_name = $1 AND table_schema = $2 AND table_name = $3 AND chunk_index = -1 AND attempts = $4",
                &[&self.job, &table.schema, &table.name, &wish],
            )
            .await?;
        Ok(())
    }

    /// The tables of the job: copied, being copied, or wanted. One whose new copy was given up has no chunks any more.
    ///
    /// # Errors
    /// The query fails.
    pub async fn tables(&self) -> Result<Vec<TableId>, Problem> {
        let rows = self
            .client()
            .await
            .query(
                "SELECT table_schema, table_name FROM public.cdc_snapshot_chunks WHERE slot_name = $1
                 UNION SELECT table_schema, table_name FROM public.cdc_snapshot_tables WHERE slot_name = $1 AND since IS NOT NULL
                 ORDER BY 1, 2",
                &[&self.job],
            )
            .await?;
        Ok(rows.iter().map(|row| TableId::new(row.get::<_, String>(0), row.get::<_, String>(1))).collect())
    }

    /// Some chunk is not completed.
    ///
    /// # Errors
    /// The query fails.
    pub async fn is_pending(&self) -> Result<bool, Problem> {
        let row = self
            .client()
            .await
            .query_one(
                "SELECT EXISTS (SELECT FROM public.cdc_snapshot_chunks
                                WHERE slot_name = $1 AND chunk_index >= 0 AND status <> 'completed')",
                &[&self.job],
            )
            .await?;
        Ok(row.get(0))
    }

    /// A table has chunks that are not completed, or is to be copied again.
    ///
    /// # Errors
    /// The query fails.
    pub async fn has_pending(&self, table: &TableId) -> Result<bool, Problem> {
        let row = self
            .client()
            .await
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
        self.sum("rows_processed", table).await
    }

    /// Rows of the completed chunks of a table that were refused for good.
    ///
    /// # Errors
    /// The query fails.
    pub async fn refused(&self, table: &TableId) -> Result<u64, Problem> {
        self.sum("rows_refused", table).await
    }

    async fn sum(&self, column: &str, table: &TableId) -> Result<u64, Problem> {
        let sql = format!(
            "SELECT coalesce(sum({column}), 0)::int8 FROM public.cdc_snapshot_chunks
             WHERE slot_name = $1 AND table_schema = $2 AND table_name = $3 AND status = 'completed'"
        );
        let row = self.client().await.query_one(&sql, &[&self.job, &table.schema, &table.name]).await?;
        Ok(row.get::<_, i64>(0).try_into().unwrap_or(0))
    }

    /// The chunks that somebody has in hand, and those that were completed since `since`, a moment that this gave before.
    ///
    /// # Errors
    /// The query fails.
    pub async fn moved(&self, since: &str) -> Result<(String, Vec<Moved>), Problem> {
        // A completion is seen a little later than it says.
        let rows = self
            .client()
            .await
            .query(
                "SELECT (now() AT TIME ZONE 'UTC')::text, table_schema, table_name, chunk_index, status = 'completed',
                        coalesce(rows_processed, 0), claimed_pid IS NOT DISTINCT FROM pg_catalog.pg_backend_pid()
                 FROM public.cdc_snapshot_chunks WHERE slot_name = $1 AND chunk_index >= 0 AND (status = 'in_progress'
                    OR status = 'completed' AND completed_at >= $2::text::timestamp - interval '10 s')",
                &[&self.job, &since],
            )
            .await?;
        let moved = rows.iter().map(|row| Moved {
            table: TableId::new(row.get::<_, String>(1), row.get::<_, String>(2)),
            index: usize::try_from(row.get::<_, i32>(3)).unwrap_or(usize::MAX),
            completed: row.get(4),
            rows: u64::try_from(row.get::<_, i64>(5)).unwrap_or(0),
            own: row.get(6),
        });
        Ok((rows.first().map_or_else(|| since.to_owned(), |row| row.get(0)), moved.collect()))
    }

    /// The newest chunk's number: another one belongs to another plan.
    ///
    /// # Errors
    /// The query fails.
    pub async fn newest(&self) -> Result<Option<i32>, Problem> {
        let row = self
            .client()
            .await
            .query_one(
                "SELECT max(id) FROM public.cdc_snapshot_chunks WHERE slot_name = $1 AND chunk_index >= 0",
                &[&self.job],
            )
            .await?;
        Ok(row.get(0))
    }

    /// Forgets a table: it is no longer part of the job.
    ///
    /// # Errors
    /// The query fails; nothing is changed then.
    pub async fn forget(&self, table: &TableId) -> Result<(), Problem> {
        self.remove(table, "TRUE").await
    }

    /// Forgets what was copied of a table, and what it was then; not whether it is to be copied again.
    ///
    /// # Errors
    /// The query fails; nothing is changed then.
    pub async fn forget_copy(&self, table: &TableId) -> Result<(), Problem> {
        self.remove(table, "chunk_index >= 0").await
    }

    async fn remove(&self, table: &TableId, which: &str) -> Result<(), Problem> {
        let sql = format!(
            "WITH chunks AS (DELETE FROM public.cdc_snapshot_chunks
                             WHERE slot_name = $1 AND table_schema = $2 AND table_name = $3 AND {which})
             DELETE FROM public.cdc_snapshot_tables WHERE slot_name = $1 AND table_schema = $2 AND table_name = $3"
        );
        self.client().await.execute(&sql, &[&self.job, &table.schema, &table.name]).await?;
        Ok(())
    }

    /// Takes back `wish` that a table be copied again, and what has been begun of it. A later wish stays.
    ///
    /// # Errors
    /// The query fails.
    pub async fn withdraw(&self, table: &TableId, wish: i32) -> Result<(), Problem> {
        let sql = "DELETE FROM public.cdc_snapshot_chunks
                   WHERE slot_name = $1 AND table_schema = $2 AND table_name = $3 AND status <> 'completed'
                     AND (chunk_index >= 0 OR attempts <= $4)";
        self.client().await.execute(sql, &[&self.job, &table.schema, &table.name, &wish]).await?;
        Ok(())
    }

    /// Claims up to `limit` chunks of `tables` that are not in `held`, in the order of the plan: pending ones, and those whose
    /// process has ended (its backend is gone) or has given no sign of life for `claimTimeout` by the server's clock.
    ///
    /// # Errors
    /// The query fails.
    pub async fn claim(&self, limit: i64, tables: &[String], held: &[String]) -> Result<Vec<ChunkRow>, Problem> {
        // `MATERIALIZED`: joined into the UPDATE it might run more than once and lock more than it gives.
        let sql = format!(
            "WITH free AS MATERIALIZED (
                 SELECT id FROM public.cdc_snapshot_chunks WHERE slot_name = $1 AND chunk_index >= 0
                    AND (status = 'pending' OR status = 'in_progress' AND claimed_pid IS DISTINCT FROM pg_catalog.pg_backend_pid()
                         AND (heartbeat_at < now() AT TIME ZONE 'UTC' - make_interval(secs => $5) OR claimed_pid IS NULL
                              OR NOT EXISTS (SELECT FROM pg_catalog.pg_stat_get_activity(claimed_pid))))
                    AND NOT table_schema || '.' || table_name = ANY ($4) AND table_schema || '.' || table_name = ANY ($6)
                 ORDER BY id LIMIT $3 FOR UPDATE SKIP LOCKED)
             UPDATE public.cdc_snapshot_chunks c SET status = 'in_progress', claimed_by = $2, attempts = attempts + 1,
                    claimed_pid = pg_catalog.pg_backend_pid(), claimed_at = now() AT TIME ZONE 'UTC',
                    heartbeat_at = now() AT TIME ZONE 'UTC'
             FROM free WHERE c.id = free.id
             RETURNING {CHUNK}"
        );
        let client = self.client().await;
        let statement = self.claim.get_or_try_init(|| client.prepare(&sql)).await?;
        let timeout = self.claim_timeout.as_secs_f64();
        let rows = client.query(statement, &[&self.job, &self.instance, &limit, &held, &timeout, &tables]).await?;
        let mut chunks: Vec<_> = rows.iter().map(chunk_row).collect();
        chunks.sort_by_key(|chunk| chunk.id);
        lock(&self.claims).extend(chunks.iter().map(|chunk| (chunk.id, chunk.token)));
        Ok(chunks)
    }

    /// A chunk of one of these tables is not completed.
    ///
    /// # Errors
    /// The query fails.
    pub async fn unfinished(&self, tables: impl Iterator<Item = &TableId>) -> Result<bool, Problem> {
        let (schemas, names): (Vec<&str>, Vec<&str>) =
            tables.map(|table| (table.schema.as_str(), table.name.as_str())).unzip();
        let row = self
            .client()
            .await
            .query_one(
                "SELECT EXISTS (SELECT FROM public.cdc_snapshot_chunks WHERE slot_name = $1 AND chunk_index >= 0
                    AND status <> 'completed' AND (table_schema, table_name) IN (SELECT * FROM unnest($2::text[], $3::text[])))",
                &[&self.job, &schemas, &names],
            )
            .await?;
        Ok(row.get(0))
    }

    /// Says that this process is alive and still works on its chunks.
    ///
    /// # Errors
    /// The query fails, or a chunk is no longer this process's: it was silent for too long.
    pub(super) async fn heartbeat(&self) -> Result<(), Problem> {
        let asked = Moment::now();
        let (ids, tokens): (Vec<i32>, Vec<i32>) = lock(&self.claims).iter().map(|(id, token)| (*id, *token)).unzip();
        let holds = holds();
        let sql = format!(
            "UPDATE public.cdc_snapshot_chunks c SET heartbeat_at = now() AT TIME ZONE 'UTC'
             FROM unnest($2::int4[], $3::int4[]) AS d (id, token) WHERE {holds} AND c.slot_name = $1 RETURNING c.id"
        );
        let rows = self.client().await.query(&sql, &[&self.job, &ids, &tokens]).await?;
        let held: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
        let claims = lock(&self.claims);
        // What was completed or given back meanwhile is not in the list any more.
        let gone = ids.iter().zip(&tokens).any(|(id, token)| !held.contains(id) && claims.get(id) == Some(token));
        if gone {
            return Err(taken_over());
        }
        let (lease, span) = &self.lease;
        lease.renew(asked, *span);
        Ok(())
    }

    /// Marks chunks as completed: the sink has answered for their last document.
    ///
    /// # Errors
    /// The query fails, or a chunk is no longer this process's: then another one copies it, and it is left to that one.
    pub async fn complete(&self, done: &[Done]) -> Result<(), Problem> {
        if done.is_empty() {
            return Ok(());
        }
        let signed = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let ids: Vec<i32> = done.iter().map(|done| done.id).collect();
        let tokens: Vec<i32> = done.iter().map(|done| done.token).collect();
        let rows: Vec<i64> = done.iter().map(|done| signed(done.rows)).collect();
        let refused: Vec<i64> = done.iter().map(|done| signed(done.refused)).collect();
        // Before the statement, so that a heartbeat behind it misses none of them.
        lock(&self.claims).retain(|id, _| !ids.contains(id));
        let holds = holds();
        let sql = format!(
            "WITH done AS (
                 UPDATE public.cdc_snapshot_chunks c SET status = 'completed', rows_processed = d.rows,
                        rows_refused = d.refused, completed_at = now() AT TIME ZONE 'UTC'
                 FROM unnest($2::int4[], $3::int4[], $4::int8[], $5::int8[]) AS d (id, token, rows, refused)
                 WHERE {holds} AND c.slot_name = $1
                 RETURNING 1)
             UPDATE public.cdc_snapshot_job SET completed_chunks = completed_chunks + (SELECT count(*) FROM done)
             WHERE slot_name = $1 RETURNING (SELECT count(*) FROM done)"
        );
        let client = self.client().await;
        let statement = self.complete.get_or_try_init(|| client.prepare(&sql)).await?;
        let row = client.query_opt(statement, &[&self.job, &ids, &tokens, &rows, &refused]).await?;
        let accepted = row.map_or(0, |row| row.get::<_, i64>(0));
        if usize::try_from(accepted) == Ok(done.len()) { Ok(()) } else { Err(taken_over()) }
    }

    /// Gives back what this process has claimed and not completed: others may take it at once.
    ///
    /// # Errors
    /// The query fails.
    pub async fn give_back(&self) -> Result<(), Problem> {
        let (ids, tokens): (Vec<i32>, Vec<i32>) = lock(&self.claims).drain().unzip();
        if ids.is_empty() {
            return Ok(());
        }
        let holds = holds();
        let sql = format!(
            "UPDATE public.cdc_snapshot_chunks c SET status = 'pending', claimed_by = NULL, claimed_pid = NULL
             FROM unnest($2::int4[], $3::int4[]) AS d (id, token) WHERE {holds} AND c.slot_name = $1"
        );
        self.client().await.execute(&sql, &[&self.job, &ids, &tokens]).await?;
        Ok(())
    }
}

/// Whether chunk `c` is still claimed as by `d`: its token is the number of the claim. Whoever works on a chunk has been
/// taken over by another when this does not hold, and must change nothing of it any more.
fn holds() -> &'static str {
    if broken(Rule::ClaimToken) {
        return "c.id = d.id AND d.token > 0";
    }
    "c.id = d.id AND c.status = 'in_progress' AND c.attempts = d.token"
}

fn taken_over() -> Problem {
    Problem::new(
        ProblemKind::Postgres,
        "another process has taken over what this one was copying: it gave no sign of life for cdc.snapshot.claimTimeout",
        "It goes on by itself with what is left. If it happens often, the machine or its way to PostgreSQL stalls.",
    )
    .transient()
}

const CHUNK: &str = "c.id, c.table_schema, c.table_name, c.chunk_index, coalesce(c.leaf_schema, c.table_schema),
    coalesce(c.leaf_name, c.table_name), coalesce(c.leaf_filenode, 0), coalesce(c.block_start, 0), c.block_end,
    c.status = 'completed', coalesce(c.rows_processed, 0), c.attempts,
    coalesce(c.snapshot_lsn, ''), c.partition_strategy = 'integer_range', c.range_start, c.range_end";

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
            bounds: if row.get(13) {
                Bounds::Keys { start: row.get(14), end: row.get(15) }
            } else {
                Bounds::Pages { start: unsigned(row.get(7)), end: row.get::<_, Option<i64>>(8).map(unsigned) }
            },
        },
        completed: row.get(9),
        rows: unsigned(row.get(10)),
        token: row.get(11),
    }
}

pub(super) async fn insert_chunks(
    client: &Client,
    job: &str,
    table: &TableId,
    ranges: &[Range],
    lsn: Lsn,
) -> Result<(), Problem> {
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let pages = |range: &Range| match range.bounds {
        Bounds::Pages { start, end } => (Some(signed(start)), end.map(signed)),
        Bounds::Keys { .. } => (None, None),
    };
    let keys = |range: &Range| match range.bounds {
        Bounds::Keys { start, end } => (start, end),
        Bounds::Pages { .. } => (None, None),
    };
    // The parameters of one statement must fit into memory on both sides.
    for (batch, ranges) in ranges.chunks(10_000).enumerate() {
        let first = i32::try_from(batch * 10_000).unwrap_or(i32::MAX);
        let schemas: Vec<&str> = ranges.iter().map(|range| range.leaf.schema.as_str()).collect();
        let names: Vec<&str> = ranges.iter().map(|range| range.leaf.name.as_str()).collect();
        let nodes: Vec<i64> = ranges.iter().map(|range| i64::from(range.filenode)).collect();
        let (first_pages, end_pages): (Vec<Option<i64>>, Vec<Option<i64>>) = ranges.iter().map(pages).unzip();
        let (first_keys, last_keys): (Vec<Option<i64>>, Vec<Option<i64>>) = ranges.iter().map(keys).unzip();
        let last: Vec<bool> = ranges.iter().map(|range| range.bounds.is_last()).collect();
        client
            .execute(
                "INSERT INTO public.cdc_snapshot_chunks
                    (slot_name, table_schema, table_name, chunk_index, chunk_start, chunk_size, block_start, block_end,
                     range_start, range_end, is_last_chunk, partition_strategy, leaf_schema, leaf_name, leaf_filenode,
                     snapshot_lsn)
                 SELECT $1, $2, $3, $4 + (r.n - 1)::int4, coalesce(r.b, r.k, 0), coalesce(r.e - r.b, 0), r.b, r.e,
                        r.k, r.l, r.z, CASE WHEN r.b IS NULL THEN 'integer_range' ELSE 'ctid_block' END, r.s, r.t, r.f, $5
                 FROM unnest($6::text[], $7::text[], $8::int8[], $9::int8[], $10::int8[], $11::int8[], $12::int8[], $13::bool[])
                      WITH ORDINALITY AS r(s, t, f, b, e, k, l, z, n)
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
                    &first_pages,
                    &end_pages,
                    &first_keys,
                    &last_keys,
                    &last,
                ],
            )
            .await?;
    }
    Ok(())
}
