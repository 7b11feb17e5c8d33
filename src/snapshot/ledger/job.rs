//! The copy as a whole: its row in the ledger.

use super::Ledger;
use super::chunks::insert_chunks;
use crate::lsn::Lsn;
use crate::problem::Problem;
use crate::snapshot::plan::Range;
use crate::table::TableId;

pub(super) const WRITER: &str = concat!("pgtide ", env!("CARGO_PKG_VERSION"));
/// A copy as the ledger remembers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// The snapshot's position: every document of the job has at least the version one below it.
    pub lsn: Lsn,
    /// A copy was begun: not where mode `never` has made the job, only to remember a position in it.
    pub begun: bool,
    /// Every chunk was completed.
    pub completed: bool,
    /// pgtide wrote it; the reference leaves nothing here.
    pub ours: bool,
    /// The server's system identifier, where pgtide wrote it.
    pub system_id: Option<String>,
    /// Its timeline, where pgtide wrote it.
    pub timeline: Option<u32>,
    /// Documents that no row of this job replaced are to be removed at its end.
    pub sweep: bool,
    /// When it was begun, by the server's clock, in a form that sorts: [`Ledger::now`].
    pub started_at: String,
}

impl Ledger {
    /// The server's time, in UTC, in a form that sorts.
    ///
    /// # Errors
    /// The query fails.
    pub async fn now(&self) -> Result<String, Problem> {
        let sql = "SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')";
        Ok(self.client().await.query_one(sql, &[]).await?.get(0))
    }

    /// The job, if there is one.
    ///
    /// # Errors
    /// The query fails.
    pub async fn job(&self) -> Result<Option<Job>, Problem> {
        let row = self
            .client()
            .await
            .query_opt(
                "SELECT snapshot_lsn, coalesce(completed, FALSE), writer IS NOT NULL, system_id, sweep,
                    to_char(started_at, 'YYYY-MM-DD HH24:MI:SS.US'), timeline, snapshot_id <> ''
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
            started_at: row.get(5),
            begun: row.get(7),
            timeline: row.get::<_, Option<i64>>(6).and_then(|timeline| u32::try_from(timeline).ok()),
        }))
    }

    /// Writes a new job and its plan, in one transaction that is on disk when this returns. What stood there before
    /// is gone: a crash in between leaves either the old or the new. The slot stands at `lsn` or before.
    ///
    /// # Errors
    /// A statement fails; nothing is changed then.
    pub async fn begin_job(
        &self,
        snapshot: &str,
        lsn: Lsn,
        (system_id, timeline): (&str, u32),
        sweep: bool,
        plan: &[(TableId, Vec<Range>)],
    ) -> Result<(), Problem> {
        let total: usize = plan.iter().map(|(_, ranges)| ranges.len()).sum();
        let total = i32::try_from(total).unwrap_or(i32::MAX);
        let transaction = self.transaction().await?;
        transaction.execute("DELETE FROM public.cdc_snapshot_job WHERE slot_name = $1", &[&self.job]).await?;
        transaction.execute("DELETE FROM public.cdc_snapshot_chunks WHERE slot_name = $1", &[&self.job]).await?;
        transaction.execute("DELETE FROM public.cdc_snapshot_tables WHERE slot_name = $1", &[&self.job]).await?;
        transaction
            .execute(
                "INSERT INTO public.cdc_snapshot_job
                    (slot_name, snapshot_id, snapshot_lsn, started_at, completed, total_chunks, completed_chunks,
                     writer, system_id, timeline, acknowledged_lsn, sweep)
                 VALUES ($1, $2, $3, now() AT TIME ZONE 'UTC', FALSE, $4, 0, $5, $6, $7, $3, $8)",
                &[&self.job, &snapshot, &lsn.to_string(), &total, &WRITER, &system_id, &i64::from(timeline), &sweep],
            )
            .await?;
        for (table, ranges) in plan {
            insert_chunks(&transaction, &self.job, table, ranges, lsn).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Marks the job as one that is to be done again from its beginning, whatever of it is done.
    ///
    /// # Errors
    /// The query fails.
    pub async fn reopen_job(&self) -> Result<(), Problem> {
        self.client()
            .await
            .execute(
                "UPDATE public.cdc_snapshot_job SET completed = FALSE, writer = NULL WHERE slot_name = $1",
                &[&self.job],
            )
            .await?;
        Ok(())
    }

    /// Marks the job as completed; on disk when this returns. True only if every chunk is completed.
    ///
    /// # Errors
    /// The query fails.
    pub async fn finish_job(&self) -> Result<bool, Problem> {
        let transaction = self.transaction().await?;
        let changed = transaction
            .execute(
                "UPDATE public.cdc_snapshot_job j SET completed = TRUE, sweep = FALSE,
                    (total_chunks, completed_chunks) = (SELECT count(*), count(*) FROM public.cdc_snapshot_chunks c
                                                        WHERE c.slot_name = j.slot_name AND c.chunk_index >= 0)
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
