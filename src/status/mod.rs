//! Everything that the screen shows and that `GET /status` answers: one value.
//!
//! Unknown is `None` and is shown as `-`; zero is 0 and is shown as `0`. Times are microseconds since 1970 (UTC),
//! spans are seconds, sizes are bytes, rates are per second over about ten seconds.

mod chunks;

use serde::{Deserialize, Serialize};

pub use self::chunks::{ChunkMap, ChunkState};
use crate::lsn::Lsn;
use crate::problem::Problem;
use crate::table::TableId;

/// A moment, in microseconds since 1970-01-01 UTC.
pub type Micros = i64;

/// What the pipeline does as a whole.
///
/// ```text
/// Connecting -> Snapshot -> CatchUp -> Streaming        the usual way
/// Connecting -> Standby -> Connecting                   another process leads; it has ended, and this one takes over
/// any of them <-> Degraded                              something is refused or gone and is retried
/// Snapshot, CatchUp, Streaming -> Pausing -> Paused -> back to where it was
/// any -> Failed                                         an operator is needed; nothing is acknowledged any more
/// any -> Stopping -> Stopped                            quit; the next start goes on
/// ```
///
/// None of them is stored: a start derives its own from the ledger and the slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Looking at PostgreSQL and Elasticsearch, creating publication, slot and ledger.
    #[default]
    Connecting,
    /// Another process leads: `Status::standby` says which. This one takes over when that one ends, and copies chunks of its
    /// copy meanwhile.
    Standby,
    /// Copying tables. The stream waits at the slot's consistent point.
    Snapshot,
    /// Streaming what was committed during the copy.
    CatchUp,
    /// Streaming what is committed now.
    Streaming,
    /// A pause was asked for; requests are still on their way.
    Pausing,
    /// Nothing is read and nothing is sent. The slot keeps WAL.
    Paused,
    /// Retrying: `Status::problem` says what and why.
    Degraded,
    /// Ended by something that waiting does not mend: `Status::problem` says what to do.
    Failed,
    /// Answered requests are being acknowledged before the end.
    Stopping,
    /// Ended cleanly.
    Stopped,
}

impl Phase {
    /// The pipeline has ended, well or not.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Phase::Failed | Phase::Stopped)
    }

    /// The word of the header.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Phase::Connecting => "CONNECTING",
            Phase::Standby => "STANDBY",
            Phase::Snapshot => "BACKFILL",
            Phase::CatchUp => "CATCH-UP",
            Phase::Streaming => "STREAMING",
            Phase::Pausing => "PAUSING",
            Phase::Paused => "PAUSED",
            Phase::Degraded => "RETRYING",
            Phase::Failed => "FAILED",
            Phase::Stopping => "STOPPING",
            Phase::Stopped => "STOPPED",
        }
    }
}

/// What happens to one table.
///
/// ```text
/// Queued -> Copying -> CatchUp -> Live       the usual way; a resnapshot goes from Live to Copying again
/// Copying <-> Retrying                       a chunk is tried again
/// any -> Failed                              `TableStatus::problem` says why
/// any <-> Paused                             by the operator
/// any -> Standby -> CatchUp                  while another process leads
/// ```
///
/// Stored, by way of its chunks in the ledger: Queued, Copying and everything after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TableState {
    /// Waits for its copy.
    #[default]
    Queued,
    /// Chunks are being copied.
    Copying,
    /// Copied; changes made during the copy are being streamed.
    CatchUp,
    /// Its documents follow the stream.
    Live,
    /// Held by the operator.
    Paused,
    /// A chunk failed and is tried again.
    Retrying,
    /// Needs an operator.
    Failed,
    /// Copied; another process streams its changes, and knows how far that is.
    Standby,
}

impl TableState {
    /// The word of the table list.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            TableState::Queued => "queued",
            TableState::Copying => "copy",
            TableState::CatchUp => "catchup",
            TableState::Live => "live",
            TableState::Paused => "paused",
            TableState::Retrying => "RETRY",
            TableState::Failed => "FAILED",
            TableState::Standby => "standby",
        }
    }
}

/// The whole state, as of `at`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// When it was collected.
    pub at: Micros,
    /// When this process started its pipeline.
    pub started_at: Micros,
    /// What the pipeline does.
    pub phase: Phase,
    /// Since when.
    pub phase_since: Micros,
    /// In the phase Standby: who leads.
    pub standby: Option<Standby>,
    /// What stands in the way, in the phases Degraded and Failed.
    pub problem: Option<Problem>,
    /// How often that was tried again so far.
    pub attempts: u32,
    /// The operator has asked for a pause and not taken it back, whatever the phase. While that is Degraded nothing else
    /// says so, and once the trouble is over the pipeline is paused.
    pub pause_requested: bool,
    /// Control commands are refused.
    pub read_only: bool,
    /// The PostgreSQL side.
    pub source: Source,
    /// The Elasticsearch side.
    pub sink: Sink,
    /// The tables in the order of the configuration.
    pub tables: Vec<TableStatus>,
    /// The copy as a whole.
    pub snapshot: SnapshotStatus,
    /// The slot and the stream.
    pub replication: Replication,
    /// Events a second by operation.
    pub rates: Rates,
    /// A sample of the newest events, newest last; at most 1,000.
    pub events: Vec<Event>,
    /// One event in so many is in `events` (1 = every one), over about the last second.
    pub events_sampled: u64,
    /// Never sampled: errors, TRUNCATE, DDL, phase changes, operator's actions. Newest last; at most 1,000.
    pub notices: Vec<Notice>,
    /// Documents that Elasticsearch refused for good, grouped by table and reason.
    pub rejections: Vec<Rejection>,
    /// Resident memory of this process, in bytes.
    pub memory: Option<u64>,
}

/// What a process sees that stands by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standby {
    /// Who leads, such as `instance host-7, backend 4711`: its `cdc.snapshot.instanceId` and the backend of its ledger.
    pub leader: String,
    /// It has said nothing for `claimTimeout`: it hangs, and will lose the lead if this role may end its connection.
    pub silent: bool,
    /// This process copies chunks of the leader's copy.
    pub helps: bool,
    /// Why it does not, where there is something to copy.
    pub idle: Option<String>,
    /// The leader's operator has paused it.
    pub paused: bool,
    /// Tables whose copy the leader's operator holds.
    pub held: Vec<String>,
}

impl Standby {
    /// One sentence for a person, without its full stop.
    #[must_use]
    pub fn sentence(&self) -> String {
        let hangs = if self.silent { ", but hangs" } else { "" };
        let paused = if self.paused { ", paused by its operator" } else { "" };
        let held = match self.held.as_slice() {
            [] => String::new(),
            [table] => format!(", the copy of {table} held"),
            tables => format!(", the copies of {} tables held", tables.len()),
        };
        let does = match (&self.idle, self.helps) {
            (Some(why), _) => format!("; does not help with the copy: {why}"),
            (None, true) => "; helps with the copy".to_owned(),
            (None, false) => "; takes over when it ends".to_owned(),
        };
        format!("{} leads{hangs}{paused}{held}{does}", self.leader)
    }
}

/// The PostgreSQL side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Source {
    /// Host name, address, or folder of the Unix socket.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Database name.
    pub database: String,
    /// `server_version`, such as `17.4`; none until connected.
    pub version: Option<String>,
}

/// The Elasticsearch side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sink {
    /// The URL in use, without user and password.
    pub url: String,
    /// `elasticsearch`, `opensearch` or `pgtide-store`; none until it answered.
    pub distribution: Option<String>,
    /// Its version; none until it answered.
    pub version: Option<String>,
    /// Documents answered for since the start.
    pub documents: u64,
    /// Documents answered for, a second.
    pub documents_per_second: f64,
    /// Bytes of bulk bodies a second, before compression.
    pub bytes_per_second: f64,
    /// Documents in the newest bulk.
    pub bulk_documents: Option<u64>,
    /// Bytes in the newest bulk, before compression.
    pub bulk_bytes: Option<u64>,
    /// Time from sending a bulk to its answer, over about the last minute.
    pub latency: Option<Latency>,
    /// Milliseconds that the newest answer took.
    pub last_latency: Option<f64>,
    /// What each index was given since the start.
    pub indices: Vec<IndexTotals>,
    /// Bulks on their way.
    pub in_flight: u32,
    /// How many may be.
    pub in_flight_limit: u32,
    /// Documents encoded and not sent yet, or sent and not answered yet.
    pub queued_documents: u64,
    /// Answers 429 (whole request or item) a second.
    pub throttled_per_second: f64,
    /// Items and requests sent again since the start.
    pub retried: u64,
    /// Items refused for good since the start.
    pub rejected: u64,
    /// Items answered with 409: a newer version was there. Success.
    pub superseded: u64,
    /// Why requests fail at the moment, and for how many attempts.
    pub trouble: Option<Trouble>,
}

/// What an index was given since the start: items answered for, superseded ones included.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexTotals {
    /// The index or alias, as requests name it.
    pub index: String,
    /// `index` and `update` items.
    pub indexed: u64,
    /// `delete` items.
    pub deleted: u64,
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Half of the bulks were answered within.
    pub p50: f64,
    /// 95 in 100.
    pub p95: f64,
    /// 99 in 100.
    pub p99: f64,
    /// The slowest.
    pub max: f64,
}

/// What Elasticsearch keeps answering.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trouble {
    /// Such as `429 es_rejected_execution_exception` or `connection refused`.
    pub reason: String,
    /// What the reader can do.
    pub hint: String,
    /// Attempts so far.
    pub attempts: u32,
    /// Since when.
    pub since: Micros,
}

/// One table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TableStatus {
    /// Its name.
    pub table: TableName,
    /// The index that it goes to.
    pub index: String,
    /// What happens to it.
    pub state: TableState,
    /// Rows of the present copy that are answered for.
    pub rows_done: u64,
    /// Rows copied and answered for since the process started, over all copies: never falls.
    pub rows_copied: u64,
    /// Rows to copy; an estimate unless `rows_total_exact`.
    pub rows_total: Option<u64>,
    /// `rows_total` is a count, not an estimate: the copy has ended.
    pub rows_total_exact: bool,
    /// Rows and changes a second.
    pub rows_per_second: f64,
    /// Seconds to the end of its copy; none until two chunks and 30 s have passed, and none when done.
    pub eta: Option<u64>,
    /// Documents refused for good.
    pub errors: u64,
    /// How often its present chunk was tried again.
    pub attempts: u32,
    /// Its chunks; empty until planned.
    pub chunks: ChunkMap,
    /// Rows that a chunk should hold.
    pub chunk_rows: u64,
    /// INSERTs since the start.
    pub inserts: u64,
    /// UPDATEs since the start.
    pub updates: u64,
    /// DELETEs since the start.
    pub deletes: u64,
    /// TRUNCATEs since the start.
    pub truncates: u64,
    /// A resnapshot runs or is asked for.
    pub resnapshot: bool,
    /// No copy of it has ended yet, so that documents are missing: the one that runs or waits cannot be given up.
    pub first_copy: bool,
    /// Resnapshots that have ended since the process started, well or not: never falls.
    pub resnapshots_ended: u64,
    /// Why it failed or is retried.
    pub problem: Option<Problem>,
}

/// A table's name that has a default, for fixtures; otherwise a [`TableId`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TableName(pub TableId);

impl Default for TableName {
    fn default() -> Self {
        TableName(TableId::new("public", ""))
    }
}

impl TableStatus {
    /// Share of the copy that is done, 0 to 1, never 1 before the last chunk is answered for. None while unknown.
    #[must_use]
    pub fn progress(&self) -> Option<f64> {
        if matches!(self.state, TableState::CatchUp | TableState::Live | TableState::Standby) {
            return Some(1.0);
        }
        if self.chunks.is_empty() {
            return if self.state == TableState::Queued { Some(0.0) } else { None };
        }
        let done = self.chunks.done();
        if done == self.chunks.len() {
            return Some(1.0);
        }
        #[allow(clippy::cast_precision_loss, reason = "a share for a screen")]
        let share = match self.rows_total {
            Some(total) if total > 0 => self.rows_done as f64 / total as f64,
            _ => done as f64 / self.chunks.len() as f64,
        };
        // An estimate that is too low must not promise the end.
        Some(share.clamp(0.0, 0.999))
    }
}

/// The copy as a whole.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SnapshotStatus {
    /// A copy runs.
    pub running: bool,
    /// Seconds that it has taken so far, or took.
    pub seconds: f64,
    /// Workers that copy.
    pub workers: u32,
    /// Workers that have a chunk.
    pub active_workers: u32,
    /// Seconds to the end of the slowest table; none while unknown.
    pub eta: Option<u64>,
    /// Seconds that the exported snapshot has been held (it keeps VACUUM from cleaning); none when it is not.
    pub held_seconds: Option<f64>,
}

/// The slot and the stream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Replication {
    /// Name of the slot; none in mode `snapshot_only`.
    pub slot: Option<String>,
    /// Name of the publication.
    pub publication: Option<String>,
    /// `pg_replication_slots.active`.
    pub active: Option<bool>,
    /// `pg_replication_slots.active_pid`.
    pub active_pid: Option<i32>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// Where PostgreSQL writes now.
    pub current_lsn: Option<Lsn>,
    /// The newest position received.
    pub received_lsn: Option<Lsn>,
    /// `confirmed_flush_lsn`.
    pub confirmed_lsn: Option<Lsn>,
    /// `restart_lsn`.
    pub restart_lsn: Option<Lsn>,
    /// Bytes from `confirmed_lsn` to `current_lsn`.
    pub lag_bytes: Option<u64>,
    /// Seconds since the commit of the oldest transaction that is not answered for; where none was received, since
    /// PostgreSQL wrote at `confirmed_lsn`. 0 while nothing is behind.
    pub lag_seconds: Option<f64>,
    /// Seconds from the commit of the newest received transaction to its receipt.
    pub cdc_latency: Option<f64>,
    /// Seconds from the receipt of the newest answered transaction to the answer of the sink.
    pub process_latency: Option<f64>,
    /// Bytes of WAL kept for the slot: from `restart_lsn` to `current_lsn`.
    pub retained_bytes: Option<u64>,
    /// `max_slot_wal_keep_size` in bytes; none when unlimited (-1) or unknown.
    pub retained_limit: Option<u64>,
    /// Bytes until the slot may be lost (`safe_wal_size`); none when there is no limit.
    pub safe_bytes: Option<i64>,
    /// WAL that PostgreSQL writes, bytes a second over about five minutes.
    pub wal_per_second: Option<f64>,
    /// Seconds until the slot may be lost at that rate; none without a limit or a rate.
    pub seconds_to_loss: Option<u64>,
    /// Bytes that logical decoding spilled to disk (`pg_stat_replication_slots.spill_bytes`).
    pub spilled_bytes: Option<u64>,
    /// Changes received since the start.
    pub changes: u64,
    /// Transactions received since the start that held at least one of them.
    pub transactions: u64,
    /// Times the connection was made again.
    pub reconnects: u32,
}

/// Events a second by operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Rows copied and answered for.
    pub snapshot: f64,
    /// INSERTs.
    pub insert: f64,
    /// UPDATEs.
    pub update: f64,
    /// DELETEs.
    pub delete: f64,
}

/// What an [`Event`] is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum EventKind {
    /// A chunk was copied and answered for.
    #[default]
    Snapshot,
    /// A row was inserted.
    Insert,
    /// A row was updated.
    Update,
    /// A row was deleted.
    Delete,
    /// A table was emptied.
    Truncate,
    /// Elasticsearch refused a document for good.
    Reject,
}

/// One line of the event pane. `detail` may hold what the sink said and the key; the rest of the row is never here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Counts up; names the event for selection and deduplication.
    pub seq: u64,
    /// When it was answered for.
    pub at: Micros,
    /// What it is.
    pub kind: EventKind,
    /// Position in [`Status::tables`].
    pub table: u32,
    /// The document's id, cut to 40 bytes; for a chunk its number and count: `1590/1920`.
    pub key: String,
    /// Transaction id.
    pub xid: Option<u32>,
    /// Position of the commit.
    pub lsn: Option<Lsn>,
    /// Seconds from the commit (for a chunk: from its claim) to the answer of the sink.
    pub latency: Option<f64>,
    /// Rows of the chunk.
    pub rows: Option<u64>,
    /// Reason of a refusal.
    pub detail: String,
}

/// How loud a [`Notice`] is. WARN: nothing was lost. ERROR: an operator is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Level {
    /// Told for the record.
    #[default]
    Info,
    /// Nothing was lost.
    Warn,
    /// An operator is needed.
    Error,
}

/// One line of the log pane.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Notice {
    /// Counts up; names the notice for selection and deduplication.
    pub seq: u64,
    /// When.
    pub at: Micros,
    /// How loud.
    pub level: Level,
    /// One sentence.
    pub text: String,
}

/// Documents refused for good, of one table for one reason.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rejection {
    /// The index that refused.
    pub index: String,
    /// Error type and reason as Elasticsearch gave them, without the value.
    pub reason: String,
    /// How many.
    pub count: u64,
    /// First seen.
    pub first: Micros,
    /// Last seen.
    pub last: Micros,
    /// The id of the last one.
    pub last_id: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(states: &str, done: u64, total: Option<u64>) -> TableStatus {
        TableStatus {
            state: TableState::Copying,
            rows_done: done,
            rows_total: total,
            chunks: ChunkMap(states.bytes().collect()),
            ..TableStatus::default()
        }
    }

    #[test]
    fn a_low_estimate_never_promises_the_end() {
        assert_eq!(table("ddc", 500, Some(100)).progress(), Some(0.999));
        assert_eq!(table("ddp", 50, Some(100)).progress(), Some(0.5));
        assert_eq!(table("ddd", 50, Some(100)).progress(), Some(1.0));
        assert_eq!(table("", 0, None).progress(), None);
        assert_eq!(table("dp", 7, Some(0)).progress(), Some(0.5));
    }

    /// What matters is within the line of a small terminal.
    #[test]
    fn a_process_that_stands_by_says_what_the_leader_waits_for() {
        let leader = || "instance es-feed-1-4711, backend 81231".to_owned();
        let held = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        for (standby, said) in [
            (Standby { leader: leader(), paused: true, ..Standby::default() }, ", paused by its operator"),
            (
                Standby { leader: leader(), held: held(&["public.orders"]), ..Standby::default() },
                ", the copy of public.orders held",
            ),
            (
                Standby { leader: leader(), held: held(&["a", "b"]), ..Standby::default() },
                ", the copies of 2 tables held",
            ),
        ] {
            let sentence = standby.sentence();
            assert!(sentence.chars().take(78).collect::<String>().contains(said), "{sentence}");
        }
    }
}
