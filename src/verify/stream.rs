//! Where the stream stands: a difference counts only once the stream has passed the position at which it was seen.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::config::{Config, Mode};
use crate::lsn::Lsn;
use crate::postgres::slot;
use crate::problem::Problem;
use crate::table::quote_identifier;

/// How long a slot may be without its stream: pgtide makes its connections again.
const RECONNECTING: Duration = Duration::from_secs(3);
/// Messages that are looked at in a slot which nobody streams from.
const LOOKED_AT: i32 = 10_000;
/// Longer than the header of a page of WAL.
const PAGE_HEADER: u64 = 40;

/// The moment before a look.
#[derive(Clone, Debug)]
pub(super) struct Moment {
    /// Where PostgreSQL inserted then.
    pub(super) position: Lsn,
    /// The transactions that had begun to write and that others did not see yet.
    open: Vec<String>,
}

impl Moment {
    pub(super) async fn now(client: &Client) -> Result<Self, Problem> {
        // In this order: what has committed before the position and is not seen yet has to be among those that are open.
        let position = position(client).await?;
        Ok(Self { position, open: open(client).await? })
    }

    /// Some transaction that was open then has not ended for others to see. Its commit may be in WAL all the same, and
    /// its changes in the index: for a moment always, under synchronous replication until a standby has confirmed it.
    pub(super) async fn still_open(&self, client: &Client) -> Result<bool, Problem> {
        Ok(!self.open.is_empty() && open(client).await?.iter().any(|xid| self.open.contains(xid)))
    }
}

/// The end of WAL, that which is not written yet included: a transaction that commits asynchronously is visible before.
pub(super) async fn position(client: &Client) -> Result<Lsn, Problem> {
    let row = client
        .query_one(
            "SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn()
                         ELSE pg_catalog.pg_current_wal_insert_lsn() END::text,
                    current_setting('wal_block_size')::int8",
            &[],
        )
        .await?;
    let position: Lsn = row.get::<_, String>(0).parse().unwrap_or_default();
    // At the beginning of a page it points behind the page's header, where no stream arrives before the next record.
    let into = position.0 % u64::try_from(row.get::<_, i64>(1)).unwrap_or(8192).max(1);
    Ok(if into <= PAGE_HEADER { Lsn(position.0 - into) } else { position })
}

/// Transactions that have a number. Each holds a lock on it until after it is visible; a snapshot does not tell of those
/// that are newer than the newest one which has ended.
async fn open(client: &Client) -> Result<Vec<String>, Problem> {
    let rows = client
        .query(
            "SELECT transactionid::text FROM pg_catalog.pg_locks WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock'",
            &[],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Whether commits may wait for a standby.
pub(super) async fn synchronous(client: &Client) -> Result<bool, Problem> {
    let row = client.query_one("SELECT current_setting('synchronous_standby_names') <> ''", &[]).await?;
    Ok(row.get(0))
}

/// The slot, if anything streams into the index at all.
pub(super) struct Stream {
    slot: Option<String>,
    publication: String,
}

/// Whether the stream has passed a position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Passed {
    Yes,
    /// Why not.
    No(String),
}

impl Stream {
    pub(super) fn new(config: &Config) -> Self {
        let streams = config.mode() != Mode::SnapshotOnly;
        Self { slot: streams.then(|| config.cdc.slot.name.clone()), publication: config.cdc.publication.name.clone() }
    }

    /// Waits until the stream has passed `position`, at most until `deadline`. It has as well where it will bring nothing
    /// more: there is no slot, it is lost, or nobody streams from it and no change of ours waits in it.
    pub(super) async fn pass(&self, client: &Client, position: Lsn, deadline: Instant) -> Result<Passed, Problem> {
        let Some(name) = &self.slot else { return Ok(Passed::Yes) };
        let mut idle_since = None;
        loop {
            let Some(info) = slot::find(client, name).await? else { return Ok(Passed::Yes) };
            // What is answered for; it is acknowledged later, much later where there is nothing to acknowledge.
            let confirmed = info.confirmed_lsn.max(info.applied_lsn).unwrap_or_default();
            if confirmed >= position || info.wal_status == "lost" {
                return Ok(Passed::Yes);
            }
            if info.active {
                idle_since = None;
            } else if idle_since.get_or_insert_with(Instant::now).elapsed() >= RECONNECTING
                || Instant::now() >= deadline
            {
                match self.waits(client, name, position).await? {
                    Some(false) => return Ok(Passed::Yes),
                    Some(true) => {
                        return Ok(Passed::No(format!(
                            "nothing streams from slot {name}, and changes wait in it: is pgtide stopped or paused?"
                        )));
                    }
                    // Somebody has it after all.
                    None => idle_since = None,
                }
            }
            if Instant::now() >= deadline {
                return Ok(Passed::No(format!(
                    "the stream of slot {name} stands at {confirmed}, {} bytes before {position}",
                    position.since(confirmed)
                )));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether changes of rows wait in the slot up to `position`; none when somebody has begun to stream from it.
    async fn waits(&self, client: &Client, slot: &str, position: Lsn) -> Result<Option<bool>, Problem> {
        let peeked = client
            .query(
                "SELECT get_byte(data, 0) FROM pg_catalog.pg_logical_slot_peek_binary_changes(
                     $1::text::name, $2::text::pg_lsn, $3, 'proto_version', '1', 'publication_names', $4::text)",
                &[&slot, &position.to_string(), &LOOKED_AT, &quote_identifier(&self.publication)],
            )
            .await;
        let rows = match peeked {
            Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) => return Ok(None),
            rows => rows?,
        };
        let change = |row: &tokio_postgres::Row| {
            u8::try_from(row.get::<_, i32>(0)).is_ok_and(|tag| matches!(tag, b'I' | b'U' | b'D' | b'T'))
        };
        Ok(Some(rows.iter().any(change) || i32::try_from(rows.len()).is_ok_and(|count| count >= LOOKED_AT)))
    }
}
