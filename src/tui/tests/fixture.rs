//! Made-up states of a pipeline, on a fixed clock. `examples/screen.rs` shows them too.

use super::pgtide::engine::{
    ChunkMap, Event, EventKind, IndexTotals, Latency, Level, Notice, Phase, Rates, Rejection, Replication, Sink,
    SnapshotStatus, Source, Standby, Status, TableName, TableState, TableStatus, Trouble,
};
use super::pgtide::lsn::Lsn;
use super::pgtide::problem::{Problem, ProblemKind};
use super::pgtide::table::TableId;

/// 2026-11-23 10:32:07.412 UTC
pub(super) const NOW: i64 = 1_795_429_927_412_000;
const SECOND: i64 = 1_000_000;

/// Chunks as runs: `[(b'd', 1590), (b'c', 4)]`.
pub(super) fn chunks(runs: &[(u8, usize)]) -> ChunkMap {
    ChunkMap(runs.iter().flat_map(|&(state, count)| std::iter::repeat_n(state, count)).collect())
}

pub(super) fn table(name: &str, state: TableState) -> TableStatus {
    TableStatus {
        table: TableName(TableId::new("public", name)),
        index: format!("{name}-v1"),
        state,
        chunk_rows: 5000,
        ..TableStatus::default()
    }
}

fn rows(mut table: TableStatus, done: u64, total: u64, exact: bool, rate: f64) -> TableStatus {
    (table.rows_done, table.rows_total, table.rows_total_exact) = (done, Some(total), exact);
    table.rows_per_second = rate;
    table
}

fn tables() -> Vec<TableStatus> {
    use TableState::{CatchUp, Copying, Live, Paused, Queued, Retrying};
    let with = |mut table: TableStatus, eta: Option<u64>, runs: &[(u8, usize)]| {
        table.eta = eta;
        table.chunks = chunks(runs);
        table
    };
    let mut order_items = with(
        rows(table("order_items", Copying), 20_100_000, 47_500_000, false, 48_012.0),
        Some(571),
        &[(b'd', 4019), (b'c', 3), (b'p', 5478)],
    );
    order_items.errors = 17;
    let mut audit_log = with(
        rows(table("audit_log", Retrying), 9_100_000, 128_000_000, false, 9_200.0),
        Some(12_900),
        &[(b'd', 1820), (b'r', 1), (b'p', 23_779)],
    );
    audit_log.attempts = 2;
    let orders = [(b'd', 1551), (b'r', 1), (b'd', 39), (b'c', 3), (b'p', 1), (b'c', 1), (b'p', 324)];
    vec![
        with(rows(table("orders", Copying), 7_950_000, 9_600_000, false, 61_204.0), Some(27), &orders),
        order_items,
        with(rows(table("customers", CatchUp), 1_200_311, 1_200_311, true, 1_100.0), None, &[(b'd', 241)]),
        with(rows(table("products", Live), 48_214, 48_214, true, 12.0), None, &[(b'd', 10)]),
        with(rows(table("payments", Queued), 0, 3_100_000, false, 0.0), None, &[]),
        audit_log,
        with(rows(table("carts", Paused), 310_000, 620_000, false, 0.0), None, &[(b'd', 62), (b'p', 62)]),
    ]
}

fn event(seq: u64, kind: EventKind, table: u32, key: &str) -> Event {
    Event {
        seq,
        at: NOW - i64::try_from(40 - seq).unwrap_or(0) * 7_000,
        kind,
        table,
        key: key.to_owned(),
        ..Event::default()
    }
}

fn events() -> Vec<Event> {
    let mut events = Vec::new();
    for seq in 1..=40 {
        let change = |kind, table, key: &str| Event {
            xid: Some(91_827_300 + u32::try_from(seq).unwrap_or(0)),
            lsn: Some(Lsn(0x2A_05A3_C000 + seq * 0x28)),
            latency: Some(0.29 + 0.01 * f64::from(u8::try_from(seq % 3).unwrap_or(0))),
            ..event(seq, kind, table, key)
        };
        let chunk = |table, key: &str| Event {
            rows: Some(5000),
            latency: Some(0.038),
            ..event(seq, EventKind::Snapshot, table, key)
        };
        events.push(match seq % 8 {
            0 => chunk(1, "4019/9500"),
            7 => change(EventKind::Update, 2, "88213"),
            6 => change(EventKind::Insert, 0, "9912031"),
            5 => change(EventKind::Delete, 6, "551"),
            4 => Event {
                detail: "mapper_parsing_exception: failed to parse [qty]".to_owned(),
                ..event(seq, EventKind::Reject, 1, "77120")
            },
            3 => chunk(5, "1820/25600"),
            2 => change(EventKind::Truncate, 3, ""),
            _ => change(EventKind::Insert, 0, "9912030"),
        });
    }
    events
}

fn notices() -> Vec<Notice> {
    let lines = [
        (8050, Level::Info, "slot cdc_shop created at 29/2FAA2858"),
        (448, Level::Info, "products: copy done, 48,214 rows in 00:00:02"),
        (446, Level::Info, "products: live"),
        (266, Level::Warn, "orders: chunk 1571 timed out, attempt 2 of 5"),
        (244, Level::Info, "customers: copy done, 1,200,311 rows in 00:03:22"),
        (69, Level::Warn, "bulk 429 from es-a, backing off 200 ms"),
        (55, Level::Info, "carts: chunk 62 of 124 done, table paused (operator)"),
        (27, Level::Warn, "order_items: 17 documents rejected, set aside"),
    ];
    (1..)
        .zip(lines)
        .map(|(seq, (ago, level, text))| Notice { seq, at: NOW - ago * SECOND, level, text: text.to_owned() })
        .collect()
}

/// A copy of seven tables, in the midst of it.
pub(super) fn backfill() -> Status {
    const GIB: u64 = 1 << 30;
    let confirmed = Lsn(0x2A_05A3_C1F8);
    Status {
        at: NOW,
        started_at: NOW - 8049 * SECOND,
        phase: Phase::Snapshot,
        phase_since: NOW - 8040 * SECOND,
        source: Source {
            host: "pg-prod".to_owned(),
            port: 5432,
            database: "shop".to_owned(),
            version: Some("17.4".to_owned()),
        },
        sink: Sink {
            url: "https://es-a:9200".to_owned(),
            distribution: Some("elasticsearch".to_owned()),
            version: Some("9.1.2".to_owned()),
            documents: 38_404_211,
            documents_per_second: 117_900.0,
            bytes_per_second: 38.2 * 1_048_576.0,
            bulk_documents: Some(1900),
            bulk_bytes: Some(4_299_161),
            latency: Some(Latency { p50: 96.0, p95: 240.0, p99: 412.0, max: 2310.0 }),
            last_latency: Some(101.0),
            indices: vec![
                IndexTotals { index: "orders-v1".to_owned(), indexed: 7_950_611, deleted: 0 },
                IndexTotals { index: "carts-v1".to_owned(), indexed: 310_002, deleted: 44 },
            ],
            in_flight: 6,
            in_flight_limit: 8,
            queued_documents: 12_200,
            throttled_per_second: 3.0,
            retried: 1204,
            rejected: 17,
            superseded: 311,
            trouble: None,
        },
        tables: tables(),
        snapshot: SnapshotStatus {
            running: true,
            seconds: 8040.0,
            workers: 4,
            active_workers: 4,
            eta: Some(12_900),
            held_seconds: Some(2472.0),
        },
        replication: Replication {
            slot: Some("cdc_shop".to_owned()),
            publication: Some("cdc_pub".to_owned()),
            active: Some(true),
            active_pid: Some(4121),
            wal_status: Some("reserved".to_owned()),
            current_lsn: Some(Lsn(confirmed.0 + (58 << 20))),
            received_lsn: Some(Lsn(confirmed.0 + (50 << 20))),
            confirmed_lsn: Some(confirmed),
            restart_lsn: Some(Lsn(0x29_2FAA_2858)),
            lag_bytes: Some(58 << 20),
            lag_seconds: Some(14.2),
            cdc_latency: Some(0.02),
            process_latency: Some(0.31),
            retained_bytes: Some(GIB * 34 / 10),
            retained_limit: Some(50 * GIB),
            safe_bytes: Some(46 << 30),
            wal_per_second: Some(4.1 * 1_048_576.0),
            seconds_to_loss: Some(11_640),
            spilled_bytes: Some(0),
            changes: 1_204_551,
            transactions: 340_112,
            reconnects: 0,
        },
        rates: Rates { snapshot: 117_205.0, insert: 611.0, update: 540.0, delete: 44.0 },
        events: events(),
        events_sampled: 2000,
        notices: notices(),
        rejections: vec![Rejection {
            index: "order_items-v1".to_owned(),
            reason: "mapper_parsing_exception: failed to parse field [qty] of type [integer]".to_owned(),
            count: 17,
            first: NOW - 300 * SECOND,
            last: NOW - 27 * SECOND,
            last_id: "77120".to_owned(),
        }],
        memory: Some(412 << 20),
        ..Status::default()
    }
}

/// Nothing is known yet.
pub(super) fn connecting() -> Status {
    Status {
        at: NOW,
        started_at: NOW - 3 * SECOND,
        phase: Phase::Connecting,
        phase_since: NOW - 3 * SECOND,
        source: Source { host: "pg-prod".to_owned(), port: 5432, database: "shop".to_owned(), version: None },
        sink: Sink { url: "http://es-a:9200".to_owned(), ..Sink::default() },
        ..Status::default()
    }
}

/// All tables follow the stream; the slot has no limit.
pub(super) fn streaming() -> Status {
    let mut status = backfill();
    status.phase = Phase::Streaming;
    for table in &mut status.tables {
        (table.state, table.eta, table.errors, table.attempts) = (TableState::Live, None, 0, 0);
        table.rows_done = table.rows_total.unwrap_or(0);
        (table.rows_total_exact, table.rows_per_second) = (true, 12.0);
        table.chunks = chunks(&[(b'd', table.chunks.len())]);
    }
    status.snapshot = SnapshotStatus { seconds: 9000.0, workers: 4, ..SnapshotStatus::default() };
    status.rates = Rates { snapshot: 0.0, insert: 40.0, update: 31.0, delete: 0.3 };
    status.events_sampled = 1;
    status.events.retain(|event| matches!(event.kind, EventKind::Insert | EventKind::Update | EventKind::Delete));
    (status.sink.rejected, status.sink.throttled_per_second, status.sink.documents_per_second) = (0, 0.0, 71.3);
    (status.sink.in_flight, status.sink.queued_documents, status.sink.bytes_per_second) = (1, 4, 21_400.0);
    status.rejections.clear();
    let replication = &mut status.replication;
    (replication.lag_bytes, replication.lag_seconds) = (Some(0), Some(0.0));
    (replication.retained_bytes, replication.retained_limit) = (Some(17 << 20), None);
    (replication.safe_bytes, replication.seconds_to_loss) = (None, None);
    status
}

/// A pause was asked for.
pub(super) fn pausing() -> Status {
    Status { phase: Phase::Pausing, phase_since: NOW - 2 * SECOND, pause_requested: true, ..backfill() }
}

/// The pause has come.
pub(super) fn paused() -> Status {
    let mut status =
        Status { phase: Phase::Paused, phase_since: NOW - 252 * SECOND, pause_requested: true, ..backfill() };
    (status.sink.in_flight, status.sink.queued_documents, status.sink.documents_per_second) = (0, 0, 0.0);
    (status.sink.bytes_per_second, status.sink.throttled_per_second) = (0.0, 0.0);
    status.rates = Rates::default();
    for table in &mut status.tables {
        (table.rows_per_second, table.eta) = (0.0, None);
    }
    status.snapshot.active_workers = 0;
    (status.replication.active, status.replication.active_pid) = (Some(false), None);
    status
}

/// An operator is needed.
pub(super) fn failed() -> Status {
    let problem = Problem::new(
        ProblemKind::Gap,
        "the slot cdc_shop is lost: PostgreSQL removed WAL that it needed",
        "Raise max_slot_wal_keep_size, drop the slot with `pgtide drop`, and start again: all tables are copied anew.",
    );
    let mut status = Status { phase: Phase::Failed, problem: Some(problem), pause_requested: false, ..paused() };
    status.replication.wal_status = Some("lost".to_owned());
    status.replication.active = Some(false);
    (status.replication.seconds_to_loss, status.replication.safe_bytes) = (None, Some(0));
    status
}

/// The end was asked for.
pub(super) fn stopping() -> Status {
    Status { phase: Phase::Stopping, phase_since: NOW - 2 * SECOND, ..backfill() }
}

/// One table is copied again under the stream, with the disk of the primary filling up.
pub(super) fn recopying() -> Status {
    let mut status = streaming();
    let orders = &mut status.tables[0];
    (orders.state, orders.resnapshot, orders.rows_total_exact) = (TableState::Copying, true, false);
    (orders.rows_done, orders.rows_per_second, orders.eta) = (1_200_000, 61_000.0, Some(138));
    orders.chunks = chunks(&[(b'd', 240), (b'c', 4), (b'p', 1676)]);
    status.snapshot.running = true;
    status.snapshot.eta = Some(138);
    let replication = &mut status.replication;
    (replication.retained_bytes, replication.retained_limit) = (Some(49 << 30), Some(50 << 30));
    (replication.safe_bytes, replication.seconds_to_loss) = (Some(1 << 30), Some(250));
    (replication.wal_status, replication.active) = (Some("extended".to_owned()), Some(true));
    status
}

/// Elasticsearch refuses.
pub(super) fn degraded() -> Status {
    let problem = Problem::new(
        ProblemKind::Elasticsearch,
        "Elasticsearch at es-a:9200 does not answer: connection refused",
        "It is tried again until it does.",
    );
    let mut status = Status { phase: Phase::Degraded, attempts: 7, problem: Some(problem.transient()), ..backfill() };
    status.sink.trouble = Some(Trouble {
        reason: "connection refused".to_owned(),
        hint: "Start it, or check the address.".to_owned(),
        attempts: 7,
        since: NOW - 31 * SECOND,
    });
    status
}

/// Another process streams.
pub(super) fn standby() -> Status {
    let mut status = streaming();
    status.phase = Phase::Standby;
    status.standby =
        Some(Standby { leader: "instance es-feed-1-4711, backend 81231".to_owned(), ..Standby::default() });
    for table in &mut status.tables {
        (table.state, table.rows_per_second) = (TableState::Standby, 0.0);
        (table.inserts, table.updates, table.deletes) = (0, 0, 0);
    }
    status.rates = Rates::default();
    status.events.clear();
    (status.sink.documents_per_second, status.sink.bytes_per_second, status.sink.in_flight) = (0.0, 0.0, 0);
    (status.sink.queued_documents, status.sink.documents) = (0, 0);
    status.replication.received_lsn = None;
    status
}

/// Another process leads the copy, hangs by the look of it, and copies something else.
pub(super) fn idle() -> Status {
    let standby = Standby {
        leader: "instance es-feed-1-4711, backend 81231".to_owned(),
        silent: true,
        helps: false,
        idle: Some("index, columns or condition of public.orders differ from this configuration's".to_owned()),
        ..Standby::default()
    };
    let mut status = Status { phase: Phase::Standby, standby: Some(standby), ..backfill() };
    status.snapshot.held_seconds = None;
    status
}

/// Another process leads the copy, and this one helps.
pub(super) fn helping() -> Status {
    let leader = "instance es-feed-1-4711, backend 81231".to_owned();
    let standby = Standby { leader, helps: true, ..Standby::default() };
    let mut status = Status { phase: Phase::Standby, standby: Some(standby), ..backfill() };
    status.snapshot.held_seconds = None;
    status
}

/// Commands are refused.
pub(super) fn read_only() -> Status {
    Status { read_only: true, ..backfill() }
}

/// As many tables as a large schema has.
pub(super) fn many_tables() -> Status {
    let mut status = backfill();
    let some = status.tables.clone();
    status.tables = (0..500)
        .map(|at| {
            let mut table = some[at % some.len()].clone();
            table.table = TableName(TableId::new("public", format!("part_2026_{at:03}")));
            table
        })
        .collect();
    status
}

/// Names and texts that would like to steer the terminal, or to spoil the columns.
pub(super) fn hostile() -> Status {
    let mut status = backfill();
    let names = [
        "\u{1b}[2J\u{1b}[31mred",
        "注文明細テーブルの長い名前",
        "e\u{301}e\u{301}\u{202e}drow",
        "a\r\nb\tc\u{9b}1m",
        "👩‍👩‍👧 family",
        "",
        "z\u{301}\u{301}\u{301}\u{301}\u{301}\u{301}\u{301}x",
    ];
    for (table, name) in status.tables.iter_mut().zip(names) {
        table.table = TableName(TableId::new("public", name));
        table.index = format!("idx-{name}");
    }
    status.source.database = "shop\u{1b}]0;owned\u{7}".to_owned();
    status.source.version = Some("17.4\u{1b}[0m".to_owned());
    for event in &mut status.events {
        event.key = format!("\u{1b}[5m{}\u{200b}", event.key);
        event.detail = "\u{1b}P\u{9c}注文 failed\n2nd line".to_owned();
    }
    for notice in &mut status.notices {
        notice.text = format!("\u{1b}[H{}\u{85}", notice.text);
    }
    status.rejections[0].index = "注文\u{1b}[0m".to_owned();
    status
}

/// Counters that have run for years.
pub(super) fn huge() -> Status {
    const TRILLION: u64 = 1_000_000_000_000;
    let mut status = backfill();
    for table in &mut status.tables {
        (table.rows_done, table.rows_total) = (TRILLION, Some(3 * TRILLION));
        (table.errors, table.rows_per_second, table.eta) = (TRILLION, 1e12, Some(TRILLION));
    }
    let sink = &mut status.sink;
    (sink.documents, sink.retried, sink.rejected, sink.superseded) = (TRILLION, TRILLION, TRILLION, u64::MAX);
    (sink.documents_per_second, sink.bytes_per_second, sink.throttled_per_second) = (1e12, 1e15, 1e12);
    (sink.queued_documents, sink.bulk_documents, sink.bulk_bytes) = (u64::MAX, Some(u64::MAX), Some(u64::MAX));
    sink.latency = Some(Latency { p50: 1e12, p95: f64::MAX, p99: f64::INFINITY, max: f64::NAN });
    let replication = &mut status.replication;
    (replication.lag_bytes, replication.lag_seconds) = (Some(u64::MAX), Some(1e12));
    (replication.retained_bytes, replication.retained_limit) = (Some(u64::MAX), Some(u64::MAX));
    (replication.seconds_to_loss, replication.current_lsn) = (Some(u64::MAX), Some(Lsn(u64::MAX)));
    status.rates = Rates { snapshot: 1e12, insert: f64::NAN, update: f64::INFINITY, delete: -1.0 };
    status.events_sampled = u64::MAX;
    status.rejections[0].count = TRILLION;
    (status.started_at, status.phase_since, status.memory) = (i64::MIN, i64::MIN, Some(u64::MAX));
    status
}

/// All of them by name.
pub(super) fn all() -> Vec<(&'static str, Status)> {
    vec![
        ("connecting", connecting()),
        ("backfill", backfill()),
        ("streaming", streaming()),
        ("pausing", pausing()),
        ("paused", paused()),
        ("failed", failed()),
        ("stopping", stopping()),
        ("recopying", recopying()),
        ("degraded", degraded()),
        ("standby", standby()),
        ("idle", idle()),
        ("helping", helping()),
        ("read_only", read_only()),
        ("many_tables", many_tables()),
        ("hostile", hostile()),
        ("huge", huge()),
    ]
}
