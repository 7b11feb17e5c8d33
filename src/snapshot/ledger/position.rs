//! How far the slot was acknowledged, remembered before the server is told.
//!
//! So the remembered position is never behind the slot's, whatever ends the process: a slot that stands beyond it was
//! moved, or made anew, by somebody else.

use super::Ledger;
use super::job::WRITER;
use crate::lsn::Lsn;
use crate::problem::Problem;

/// A position of a server's WAL, and which WAL it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The server's system identifier.
    pub system_id: String,
    /// Its timeline.
    pub timeline: u32,
    /// Nothing beyond it was ever acknowledged to the slot.
    pub acknowledged: Lsn,
}

impl Ledger {
    /// The position that was remembered last; none where no pgtide has streamed from the slot yet.
    ///
    /// # Errors
    /// The query fails.
    pub async fn position(&self) -> Result<Option<Position>, Problem> {
        let row = self
            .client()
            .await
            .query_opt(
                "SELECT system_id, timeline, acknowledged_lsn FROM public.cdc_snapshot_job
                 WHERE slot_name = $1 AND system_id IS NOT NULL AND timeline IS NOT NULL AND acknowledged_lsn IS NOT NULL",
                &[&self.job],
            )
            .await?;
        Ok(row.map(|row| Position {
            system_id: row.get(0),
            timeline: u32::try_from(row.get::<_, i64>(1)).unwrap_or(0),
            acknowledged: row.get::<_, String>(2).parse().unwrap_or_default(),
        }))
    }

    /// Remembers the position; on disk when this returns. Only then may the server be told.
    ///
    /// In mode `never` there is no job to remember it with: one is made that no copy has begun ([`Job::begun`](super::Job)). It is not
    /// completed either: whoever copies, the reference too, is to begin with the first row.
    ///
    /// # Errors
    /// A statement fails; what was remembered before stays.
    pub async fn acknowledge(&self, position: &Position) -> Result<(), Problem> {
        let transaction = self.transaction().await?;
        transaction
            .execute(
                "INSERT INTO public.cdc_snapshot_job AS j
                    (slot_name, snapshot_id, snapshot_lsn, started_at, completed, writer, system_id, timeline, acknowledged_lsn)
                 VALUES ($1, '', $2, now() AT TIME ZONE 'UTC', FALSE, $3, $4, $5, $2)
                 ON CONFLICT (slot_name) DO UPDATE SET system_id = $4, timeline = $5, acknowledged_lsn = $2",
                &[
                    &self.job,
                    &position.acknowledged.to_string(),
                    &WRITER,
                    &position.system_id,
                    &i64::from(position.timeline),
                ],
            )
            .await?;
        transaction.commit().await
    }
}
