//! Live figures that the copy and the stream write and the status reads. Nothing here ever waits for a reader.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::problem::Problem;
use crate::status::{ChunkMap, ChunkState, Event, Level, Micros, Notice, TableState};
use crate::table::TableId;

/// How many events and notices are kept.
const KEPT: usize = 1_000;

/// Events a second that are kept unsampled; beyond it one in so many is.
const EVENTS_PER_SECOND: u64 = 200;

/// Now, in microseconds since 1970.
#[must_use]
pub fn now() -> Micros {
    micros(SystemTime::now())
}

/// `time` in microseconds since 1970; a time before that is 0.
#[must_use]
pub fn micros(time: SystemTime) -> Micros {
    time.duration_since(UNIX_EPOCH).ok().and_then(|since| i64::try_from(since.as_micros()).ok()).unwrap_or(0)
}

/// The value behind a lock, whatever happened to a thread that held it: figures are worth showing all the same.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The figures of one table.
#[derive(Debug)]
pub struct TableCounters {
    /// The table.
    pub table: TableId,
    /// Its index.
    pub index: String,
    /// Rows copied and answered for, in the present copy.
    pub rows_done: AtomicU64,
    /// Rows copied since the start, over all copies.
    pub snapshot_rows: AtomicU64,
    /// Rows that other processes have copied, as seen in the ledger since the start.
    pub elsewhere: AtomicU64,
    /// Estimated rows of the copy; `u64::MAX` when unknown.
    pub rows_total: AtomicU64,
    /// INSERTs since the start.
    pub inserts: AtomicU64,
    /// UPDATEs since the start.
    pub updates: AtomicU64,
    /// DELETEs since the start.
    pub deletes: AtomicU64,
    /// TRUNCATEs since the start.
    pub truncates: AtomicU64,
    /// Documents refused for good, as far as the ledger has been told.
    pub(crate) refused_said: AtomicU64,
    /// Attempts of the chunk that is being tried again; 0 when none is.
    pub attempts: AtomicU32,
    /// The operator holds its copy.
    pub paused: AtomicBool,
    /// A resnapshot was asked for or runs.
    pub resnapshot: AtomicBool,
    /// No copy of it has ended yet, so that documents are missing until the one that runs or waits has.
    pub first_copy: AtomicBool,
    /// Resnapshots that have ended, well or not.
    pub resnapshots_ended: AtomicU64,
    state: AtomicU8,
    copy: Mutex<Copy>,
}

/// The present copy of a table.
#[derive(Debug, Default)]
struct Copy {
    chunks: Arc<[AtomicU8]>,
    started: Option<Micros>,
    problem: Option<Problem>,
}

impl TableCounters {
    pub(crate) fn new(table: TableId, index: String) -> Self {
        Self {
            table,
            index,
            rows_done: AtomicU64::new(0),
            snapshot_rows: AtomicU64::new(0),
            elsewhere: AtomicU64::new(0),
            rows_total: AtomicU64::new(u64::MAX),
            inserts: AtomicU64::new(0),
            updates: AtomicU64::new(0),
            deletes: AtomicU64::new(0),
            truncates: AtomicU64::new(0),
            refused_said: AtomicU64::new(0),
            attempts: AtomicU32::new(0),
            paused: AtomicBool::new(false),
            resnapshot: AtomicBool::new(false),
            first_copy: AtomicBool::new(false),
            resnapshots_ended: AtomicU64::new(0),
            state: AtomicU8::new(0),
            copy: Mutex::new(Copy::default()),
        }
    }

    /// Begins a copy whose chunks stand as `chunks` says, with `rows` already done and `total` expected.
    pub fn begin_copy(&self, chunks: &[ChunkState], rows: u64, total: Option<u64>) {
        let mut copy = lock(&self.copy);
        copy.chunks = chunks.iter().map(|&state| AtomicU8::new(state as u8)).collect();
        copy.started = Some(now());
        copy.problem = None;
        self.rows_done.store(rows, Relaxed);
        self.rows_total.store(total.unwrap_or(u64::MAX), Relaxed);
        self.attempts.store(0, Relaxed);
    }

    /// Notes where a chunk stands. An index beyond the plan is ignored.
    pub fn set_chunk(&self, index: usize, state: ChunkState) {
        if let Some(chunk) = lock(&self.copy).chunks.get(index) {
            chunk.store(state as u8, Relaxed);
        }
    }

    /// Notes that a chunk that stood at `from` stands at `to`; one that stands elsewhere by now stays there.
    pub fn move_chunk(&self, index: usize, from: ChunkState, to: ChunkState) {
        if let Some(chunk) = lock(&self.copy).chunks.get(index) {
            let _ = chunk.compare_exchange(from as u8, to as u8, Relaxed, Relaxed);
        }
    }

    /// Notes that another process has completed a chunk of so many rows. A chunk that is done already is not counted again.
    pub fn done_elsewhere(&self, index: usize, rows: u64) {
        let done = ChunkState::Done as u8;
        if lock(&self.copy).chunks.get(index).is_some_and(|chunk| chunk.swap(done, Relaxed) != done) {
            self.rows_done.fetch_add(rows, Relaxed);
            self.elsewhere.fetch_add(rows, Relaxed);
        }
    }

    /// How many chunks the present copy has.
    #[must_use]
    pub fn chunk_count(&self) -> usize {
        lock(&self.copy).chunks.len()
    }

    /// The chunks as they stand.
    #[must_use]
    pub fn chunks(&self) -> ChunkMap {
        let chunks = Arc::clone(&lock(&self.copy).chunks);
        ChunkMap(chunks.iter().map(|chunk| chunk.load(Relaxed)).collect())
    }

    /// When the present copy began in this process.
    #[must_use]
    pub fn copy_started(&self) -> Option<Micros> {
        lock(&self.copy).started
    }

    /// Notes that a resnapshot has ended, well or not. A short one begins and ends between two looks at the table; the
    /// count says that there was one.
    pub fn end_resnapshot(&self) {
        self.resnapshots_ended.fetch_add(1, Relaxed);
        self.resnapshot.store(false, Relaxed);
    }

    /// What the table is in.
    #[must_use]
    pub fn state(&self) -> TableState {
        match self.state.load(Relaxed) {
            1 => TableState::Copying,
            2 => TableState::CatchUp,
            3 => TableState::Live,
            4 => TableState::Paused,
            5 => TableState::Retrying,
            6 => TableState::Failed,
            7 => TableState::Standby,
            _ => TableState::Queued,
        }
    }

    /// Moves the table to `state`.
    pub fn set_state(&self, state: TableState) {
        let byte = match state {
            TableState::Queued => 0,
            TableState::Copying => 1,
            TableState::CatchUp => 2,
            TableState::Live => 3,
            TableState::Paused => 4,
            TableState::Retrying => 5,
            TableState::Failed => 6,
            TableState::Standby => 7,
        };
        self.state.store(byte, Relaxed);
    }

    /// Why it is retried or failed.
    #[must_use]
    pub fn problem(&self) -> Option<Problem> {
        lock(&self.copy).problem.clone()
    }

    /// Notes why it is retried or failed, or that it no longer is.
    pub fn set_problem(&self, problem: Option<Problem>) {
        lock(&self.copy).problem = problem;
    }
}

/// The figures of the whole pipeline that more than one room writes.
#[derive(Debug)]
pub struct Counters {
    /// In the order of the configuration.
    pub tables: Vec<TableCounters>,
    /// Workers that copy.
    pub workers: AtomicU32,
    /// Workers that have a chunk.
    pub active_workers: AtomicU32,
    /// Changes received by the stream.
    pub changes: AtomicU64,
    /// Transactions received by the stream that held at least one of them.
    pub transactions: AtomicU64,
    /// Times that the replication connection was made again.
    pub reconnects: AtomicU32,
    /// The newest position received; 0 before there is one.
    pub received_lsn: AtomicU64,
    /// The newest position that may be confirmed: everything before it has been answered for; 0 before there is one.
    pub confirmed_lsn: AtomicU64,
    /// Nothing beyond it was acknowledged to the slot; 0 before the stream begins.
    pub acknowledged_lsn: AtomicU64,
    /// The slot was found, or made for good: were it missing, changes would be lost.
    pub slot_expected: AtomicBool,
    /// Commits wait for what is acknowledged: pgtide is one of `synchronous_standby_names`, as it is under `*`.
    pub awaited: AtomicBool,
    /// Documents may hold what was committed up to here, and nothing that was committed later; 0 before there is one.
    pub applied_lsn: AtomicU64,
    /// Commit time of the oldest transaction that is not answered for; 0 while there is none.
    pub oldest_commit: AtomicI64,
    /// Microseconds from the commit of the newest received transaction to its receipt; negative before there is one.
    pub cdc_latency: AtomicI64,
    /// Microseconds from the receipt of the newest answered transaction to its answer; negative before there is one.
    pub process_latency: AtomicI64,
    events: Mutex<Events>,
    notices: Mutex<Notices>,
}

#[derive(Debug, Default)]
struct Events {
    ring: VecDeque<Event>,
    seq: u64,
    second: Micros,
    seen: u64,
    kept: u64,
    sampled: u64,
}

#[derive(Debug, Default)]
struct Notices {
    ring: VecDeque<Notice>,
    seq: u64,
}

impl Counters {
    /// Figures for these tables and their indices, all zero.
    #[must_use]
    pub fn new(tables: impl IntoIterator<Item = (TableId, String)>) -> Self {
        Self {
            tables: tables.into_iter().map(|(table, index)| TableCounters::new(table, index)).collect(),
            workers: AtomicU32::new(0),
            active_workers: AtomicU32::new(0),
            changes: AtomicU64::new(0),
            transactions: AtomicU64::new(0),
            reconnects: AtomicU32::new(0),
            received_lsn: AtomicU64::new(0),
            confirmed_lsn: AtomicU64::new(0),
            acknowledged_lsn: AtomicU64::new(0),
            slot_expected: AtomicBool::new(false),
            awaited: AtomicBool::new(false),
            applied_lsn: AtomicU64::new(0),
            oldest_commit: AtomicI64::new(0),
            cdc_latency: AtomicI64::new(-1),
            process_latency: AtomicI64::new(-1),
            events: Mutex::new(Events { sampled: 1, ..Events::default() }),
            notices: Mutex::new(Notices::default()),
        }
    }

    /// Keeps `event` in the ring. It stands for `of` events: itself and those that its caller left out.
    pub fn event(&self, mut event: Event, of: u64) {
        let mut events = lock(&self.events);
        let second = event.at / 1_000_000;
        if second != events.second {
            events.sampled = events.seen.checked_div(events.kept).unwrap_or(1).max(1);
            (events.second, events.seen, events.kept) = (second, 0, 0);
        }
        events.seen += of;
        if events.kept >= EVENTS_PER_SECOND {
            return;
        }
        events.kept += 1;
        events.seq += 1;
        event.seq = events.seq;
        if events.ring.len() == KEPT {
            events.ring.pop_front();
        }
        events.ring.push_back(event);
    }

    /// The kept events, oldest first, and how many each stands for.
    #[must_use]
    pub fn events(&self) -> (Vec<Event>, u64) {
        let events = lock(&self.events);
        let stale = now() / 1_000_000 - events.second > 2;
        (events.ring.iter().cloned().collect(), if stale { 1 } else { events.sampled })
    }

    /// Tells the log pane and the log file. `text` is one sentence and holds no row content.
    pub fn notice(&self, level: Level, text: impl Into<String>) {
        let text = text.into();
        match level {
            Level::Info => tracing::info!("{text}"),
            Level::Warn => tracing::warn!("{text}"),
            Level::Error => tracing::error!("{text}"),
        }
        self.keep_notice(level, text);
    }

    /// Tells the log pane and the log file why the pipeline ends. Not stderr: whoever runs the pipeline says it there.
    pub fn last_notice(&self, text: impl Into<String>) {
        let text = text.into();
        tracing::error!(target: super::log::END, "{text}");
        self.keep_notice(Level::Error, text);
    }

    fn keep_notice(&self, level: Level, text: String) {
        let mut notices = lock(&self.notices);
        notices.seq += 1;
        let notice = Notice { seq: notices.seq, at: now(), level, text };
        if notices.ring.len() == KEPT {
            notices.ring.pop_front();
        }
        notices.ring.push_back(notice);
    }

    /// The kept notices, oldest first.
    #[must_use]
    pub fn notices(&self) -> Vec<Notice> {
        lock(&self.notices).ring.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_beyond_the_rate_are_counted_and_said() {
        let counters = Counters::new([]);
        for n in 0..1_000 {
            counters.event(Event { at: 5_000_000, key: n.to_string(), ..Event::default() }, 1);
        }
        assert_eq!(counters.events().0.len(), 200);
        let second = now();
        counters.event(Event { at: second, ..Event::default() }, 1);
        let (events, sampled) = counters.events();
        assert_eq!((events.len(), sampled), (201, 5));
        assert!(events.windows(2).all(|pair| pair[0].seq < pair[1].seq));
    }
}
