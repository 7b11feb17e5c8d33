//! The chunks of the copy: planned, claimed, completed; and the wishes for a table to be copied again.

use tokio_postgres::Client;

use super::Ledger;
use crate::lsn::Lsn;
use crate::problem::Problem;
use crate::snapshot::plan::{Bounds, Range};
use crate::table::TableId;

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

impl Ledger {
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

    /// The tables of the job: copied, being copied, or wanted.
    ///
    /// # Errors
    /// The query fails.
    pub async fn tables(&self) -> Result<Vec<TableId>, Problem> {
        let rows = self
            .client
            .query(
                "SELECT DISTINCT table_schema, table_name FROM public.cdc_snapshot_chunks WHERE slot_name = $1
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
            .client
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

    /// Forgets a table: it is no longer part of the job.
    ///
    /// # Errors
    /// The query fails; nothing is changed then.
    pub async fn forget(&self, table: &TableId) -> Result<(), Problem> {
        let sql = "WITH chunks AS (DELETE FROM public.cdc_snapshot_chunks
                                   WHERE slot_name = $1 AND table_schema = $2 AND table_name = $3)
                   DELETE FROM public.cdc_snapshot_tables
                   WHERE slot_name = $1 AND table_schema = $2 AND table_name = $3";
        self.client.execute(sql, &[&self.job, &table.schema, &table.name]).await?;
        Ok(())
    }

    /// Takes back the wish that a table be copied again, and what has been begun of it.
    ///
    /// # Errors
    /// The query fails.
    pub async fn withdraw(&self, table: &TableId) -> Result<(), Problem> {
        self.remove(table, "status <> 'completed'").await
    }

    /// Forgets the chunks of a table, and not whether it is to be copied again.
    ///
    /// # Errors
    /// The query fails.
    pub async fn forget_chunks(&self, table: &TableId) -> Result<(), Problem> {
        self.remove(table, "chunk_index >= 0").await
    }

    async fn remove(&self, table: &TableId, which: &str) -> Result<(), Problem> {
        let sql = format!(
            "DELETE FROM public.cdc_snapshot_chunks
             WHERE slot_name = $1 AND table_schema = $2 AND table_name = $3 AND {which}"
        );
        self.client.execute(&sql, &[&self.job, &table.schema, &table.name]).await?;
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
        attempts: u32::try_from(row.get::<_, i32>(11)).unwrap_or(0),
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
