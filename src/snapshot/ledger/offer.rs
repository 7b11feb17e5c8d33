//! What the leader offers to the processes that stand by: its snapshot, to copy chunks under.

use super::Ledger;
use super::lock::HOLDER;
use crate::lsn::Lsn;
use crate::problem::Problem;

/// A snapshot that others may import, as long as its leader leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Its name.
    pub snapshot: String,
    /// Its consistent point. The version of what is read under it comes from this one, and not from the job, which may have
    /// been begun under an earlier snapshot.
    pub lsn: Lsn,
    /// What is copied of which table and into which index: `Context::plan_of`.
    pub tables: String,
}

/// An offer as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offered {
    /// The snapshot.
    pub offer: Offer,
    /// Tables whose copy the leader's operator holds.
    pub held: Vec<String>,
}

impl Ledger {
    /// Offers a snapshot. Only for the leader. The offer ends with its connection, whatever the job's row says.
    ///
    /// # Errors
    /// The query fails.
    pub async fn offer(&self, offer: &Offer, held: &[String]) -> Result<(), Problem> {
        self.client().await
            .execute(
                "UPDATE public.cdc_snapshot_job SET keeper_snapshot = $2, keeper_lsn = $3, keeper_tables = $4, keeper_held = $5,
                    keeper_pid = pg_catalog.pg_backend_pid()
                 WHERE slot_name = $1",
                &[&self.job, &offer.snapshot, &offer.lsn.to_string(), &offer.tables, &held],
            )
            .await?;
        Ok(())
    }

    /// Takes the offer back. Only for the leader.
    ///
    /// # Errors
    /// The query fails.
    pub async fn withdraw_offer(&self) -> Result<(), Problem> {
        let sql = "UPDATE public.cdc_snapshot_job SET keeper_snapshot = NULL WHERE slot_name = $1 AND keeper_snapshot IS NOT NULL";
        self.client().await.execute(sql, &[&self.job]).await?;
        Ok(())
    }

    /// The offer of whoever leads now.
    ///
    /// # Errors
    /// The query fails.
    pub async fn offered(&self) -> Result<Option<Offered>, Problem> {
        // A name alone may be that of another snapshot, once the server has restarted.
        let sql = format!(
            "SELECT keeper_snapshot, keeper_lsn, keeper_tables, keeper_held FROM public.cdc_snapshot_job
             WHERE slot_name = $1 AND keeper_snapshot IS NOT NULL AND NOT completed AND keeper_pid = (SELECT l.pid {HOLDER})"
        );
        let row = self.client().await.query_opt(&sql, &[&self.job]).await?;
        Ok(row.map(|row| Offered {
            offer: Offer {
                snapshot: row.get(0),
                lsn: row.get::<_, Option<String>>(1).and_then(|lsn| lsn.parse().ok()).unwrap_or_default(),
                tables: row.get::<_, Option<String>>(2).unwrap_or_default(),
            },
            held: row.get::<_, Option<Vec<String>>>(3).unwrap_or_default(),
        }))
    }

    /// Another process has a chunk in hand and gives signs of life.
    ///
    /// # Errors
    /// The query fails.
    pub async fn others_at_work(&self) -> Result<bool, Problem> {
        let row = self
            .client()
            .await
            .query_one(
                "SELECT EXISTS (SELECT FROM public.cdc_snapshot_chunks WHERE slot_name = $1 AND status = 'in_progress'
                    AND claimed_pid <> pg_catalog.pg_backend_pid()
                    AND heartbeat_at >= now() AT TIME ZONE 'UTC' - make_interval(secs => $2)
                    AND EXISTS (SELECT FROM pg_catalog.pg_stat_get_activity(claimed_pid)))",
                &[&self.job, &self.claim_timeout.as_secs_f64()],
            )
            .await?;
        Ok(row.get(0))
    }
}
