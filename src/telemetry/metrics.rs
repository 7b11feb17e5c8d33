//! The metrics of `GET /metrics`: the names of go-pq-cdc and go-pq-cdc-elasticsearch, and ours beside them.
//!
//! Every number comes from [`Status`], so that metrics, screen and `GET /status` cannot disagree. What is unknown is
//! left out, but for latencies, which are NaN until there was one. Counters count from the start of the process.

use std::collections::{BTreeMap, HashMap};

use prometheus::core::Collector;
use prometheus::{GaugeVec, IntCounterVec, Opts, Registry, TextEncoder};

use crate::engine::{Phase, Status};

/// The content type of what [`render`] gives.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// `status` in Prometheus's text format.
///
/// All metrics have the labels `slot_name` (`snapshot_only` where there is no slot) and `host` (this machine's name);
/// those that are counted by table have `table`, as `schema.table`, too.
#[must_use]
pub fn render(status: &Status) -> String {
    let host = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    render_for(status, &host)
}

fn render_for(status: &Status, host: &str) -> String {
    let slot = status.replication.slot.as_deref().unwrap_or("snapshot_only");
    let labels = [("slot_name", slot), ("host", host)].map(|(name, value)| (name.to_owned(), value.to_owned()));
    let metrics = Metrics { registry: Registry::new(), labels: labels.into() };
    let text = gather(&metrics, status).and_then(|()| TextEncoder::new().encode_to_string(&metrics.registry.gather()));
    // Names and labels are constants, so this stays unseen; a scrape with a hole must not look like one without.
    text.unwrap_or_else(|error| format!("# metrics cannot be rendered: {error}\n"))
}

struct Metrics {
    registry: Registry,
    labels: HashMap<String, String>,
}

impl Metrics {
    fn options(&self, name: &str, help: &str) -> Opts {
        Opts::new(name, help).const_labels(self.labels.clone())
    }

    fn register(&self, collector: impl Collector + 'static) -> prometheus::Result<()> {
        self.registry.register(Box::new(collector))
    }

    /// A counter for each value of `label`.
    fn counters(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: impl Iterator<Item = (String, u64)>,
    ) -> prometheus::Result<()> {
        let vector = IntCounterVec::new(self.options(name, help), &[label])?;
        for (value, number) in values {
            vector.get_metric_with_label_values(&[value])?.inc_by(number);
        }
        self.register(vector)
    }

    fn counter(&self, name: &str, help: &str, number: u64) -> prometheus::Result<()> {
        let vector = IntCounterVec::new(self.options(name, help), &[])?;
        vector.get_metric_with_label_values::<&str>(&[])?.inc_by(number);
        self.register(vector)
    }

    /// A gauge for each value of `label`.
    fn gauges(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: impl Iterator<Item = (String, f64)>,
    ) -> prometheus::Result<()> {
        let vector = GaugeVec::new(self.options(name, help), &[label])?;
        for (value, number) in values {
            vector.get_metric_with_label_values(&[value])?.set(number);
        }
        self.register(vector)
    }

    /// A gauge; none is left out.
    fn gauge(&self, name: &str, help: &str, number: Option<f64>) -> prometheus::Result<()> {
        let Some(number) = number else { return Ok(()) };
        let vector = GaugeVec::new(self.options(name, help), &[])?;
        vector.get_metric_with_label_values::<&str>(&[])?.set(number);
        self.register(vector)
    }
}

#[allow(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
fn float(number: u64) -> f64 {
    number as f64
}

fn gather(metrics: &Metrics, status: &Status) -> prometheus::Result<()> {
    stream(metrics, status)?;
    slot(metrics, status)?;
    snapshot(metrics, status)?;
    elasticsearch(metrics, status)?;
    ours(metrics, status)
}

fn stream(metrics: &Metrics, status: &Status) -> prometheus::Result<()> {
    let tables = || status.tables.iter().map(|table| (table.table.0.to_string(), table));
    let inserts = tables().map(|(name, table)| (name, table.inserts));
    metrics.counters("go_pq_cdc_insert_total", "INSERTs received", "table", inserts)?;
    let updates = tables().map(|(name, table)| (name, table.updates));
    metrics.counters("go_pq_cdc_update_total", "UPDATEs received", "table", updates)?;
    let deletes = tables().map(|(name, table)| (name, table.deletes));
    metrics.counters("go_pq_cdc_delete_total", "DELETEs received", "table", deletes)?;
    let truncates = tables().map(|(name, table)| (name, table.truncates));
    metrics.counters("pgtide_truncate_total", "TRUNCATEs received", "table", truncates)?;

    let nanoseconds = |seconds: Option<f64>| Some(seconds.map_or(f64::NAN, |seconds| seconds * 1e9));
    let milliseconds = |seconds: Option<f64>| Some(seconds.map_or(f64::NAN, |seconds| seconds * 1e3));
    let (cdc, process) = (status.replication.cdc_latency, status.replication.process_latency);
    let help = "From the commit of the newest received transaction to its receipt";
    metrics.gauge("go_pq_cdc_cdc_latency_current", &format!("{help}, nanoseconds"), nanoseconds(cdc))?;
    metrics.gauge("go_pq_cdc_cdc_latency_current_milliseconds", &format!("{help}, milliseconds"), milliseconds(cdc))?;
    let help = "From the receipt of the newest answered transaction to the answer of the sink";
    metrics.gauge("go_pq_cdc_process_latency_current", &format!("{help}, nanoseconds"), nanoseconds(process))?;
    metrics.gauge(
        "go_pq_cdc_process_latency_current_milliseconds",
        &format!("{help}, milliseconds"),
        milliseconds(process),
    )
}

fn slot(metrics: &Metrics, status: &Status) -> prometheus::Result<()> {
    let replication = &status.replication;
    metrics.gauge(
        "go_pq_cdc_replication_slot_slot_is_active",
        "1 while somebody streams from the slot",
        replication.active.map(|active| f64::from(u8::from(active))),
    )?;
    metrics.gauge(
        "go_pq_cdc_replication_slot_slot_confirmed_flush_lsn",
        "The slot's confirmed_flush_lsn, as a number",
        replication.confirmed_lsn.map(|lsn| float(lsn.0)),
    )?;
    metrics.gauge(
        "go_pq_cdc_replication_slot_slot_current_lsn",
        "Where PostgreSQL writes now, as a number",
        replication.current_lsn.map(|lsn| float(lsn.0)),
    )?;
    metrics.gauge(
        "go_pq_cdc_replication_slot_slot_retained_wal_size",
        "Bytes of WAL kept for the slot",
        replication.retained_bytes.map(float),
    )?;
    metrics.gauge(
        "go_pq_cdc_replication_slot_slot_lag",
        "Bytes from confirmed_flush_lsn to the current position",
        replication.lag_bytes.map(float),
    )
}

fn snapshot(metrics: &Metrics, status: &Status) -> prometheus::Result<()> {
    let snapshot = &status.snapshot;
    let copied = || status.tables.iter().filter(|table| !table.chunks.is_empty());
    let name = |table: &crate::engine::TableStatus| table.table.0.to_string();
    let float = |number: usize| float(number as u64);
    metrics.gauge(
        "go_pq_cdc_snapshot_in_progress",
        "1 while tables are copied",
        Some(f64::from(u8::from(snapshot.running))),
    )?;
    metrics.gauge("go_pq_cdc_snapshot_total_tables", "Tables whose copy is planned", Some(float(copied().count())))?;
    let done = copied().filter(|table| table.chunks.done() == table.chunks.len()).count();
    metrics.gauge("go_pq_cdc_snapshot_completed_tables", "Tables whose last chunk is done", Some(float(done)))?;
    metrics.gauge(
        "go_pq_cdc_snapshot_duration_seconds",
        "Seconds that the copy took so far",
        Some(snapshot.seconds),
    )?;
    metrics.gauge(
        "go_pq_cdc_snapshot_active_workers",
        "Workers that have a chunk",
        Some(f64::from(snapshot.active_workers)),
    )?;
    let all = || status.tables.iter();
    let chunks = all().map(|table| (name(table), float(table.chunks.len())));
    metrics.gauges("go_pq_cdc_snapshot_total_chunks", "Chunks to copy", "table", chunks)?;
    let chunks = all().map(|table| (name(table), float(table.chunks.done())));
    metrics.gauges("go_pq_cdc_snapshot_completed_chunks", "Chunks copied and answered for", "table", chunks)?;
    let rows = all().map(|table| (name(table), table.rows_copied));
    metrics.counters("go_pq_cdc_snapshot_total_rows", "Rows copied and answered for, over all copies", "table", rows)
}

fn elasticsearch(metrics: &Metrics, status: &Status) -> prometheus::Result<()> {
    metrics.gauge(
        "go_pq_cdc_elasticsearch_process_latency_current",
        "From the receipt of the newest answered transaction to the answer of the sink, nanoseconds",
        Some(status.replication.process_latency.map_or(f64::NAN, |seconds| seconds * 1e9)),
    )?;
    metrics.gauge(
        "go_pq_cdc_elasticsearch_bulk_request_process_latency_current",
        "What the newest bulk's answer took, nanoseconds",
        Some(status.sink.last_latency.map_or(f64::NAN, |milliseconds| milliseconds * 1e6)),
    )?;
    // A mapped index counts from 0, or the first documents would be no increase; a handler may write into others.
    let mut indices: BTreeMap<&str, (u64, u64)> =
        status.tables.iter().map(|table| (table.index.as_str(), (0, 0))).collect();
    indices.extend(status.sink.indices.iter().map(|index| (index.index.as_str(), (index.indexed, index.deleted))));
    let indexed = indices.iter().map(|(index, counts)| ((*index).to_owned(), counts.0));
    metrics.counters(
        "go_pq_cdc_elasticsearch_index_total",
        "index and update items answered for",
        "index_name",
        indexed,
    )?;
    let deleted = indices.iter().map(|(index, counts)| ((*index).to_owned(), counts.1));
    metrics.counters("go_pq_cdc_elasticsearch_delete_total", "delete items answered for", "index_name", deleted)
}

fn ours(metrics: &Metrics, status: &Status) -> prometheus::Result<()> {
    let (sink, replication) = (&status.sink, &status.replication);
    let phases = PHASES.map(|phase| (phase_name(phase).to_owned(), f64::from(u8::from(phase == status.phase))));
    metrics.gauges("pgtide_phase", "1 for what the pipeline does, 0 for the rest", "phase", phases.into_iter())?;
    metrics.gauge("pgtide_lag_bytes", "Bytes of WAL that are not answered for", replication.lag_bytes.map(float))?;
    metrics.gauge(
        "pgtide_lag_seconds",
        "Seconds since the commit of the oldest transaction not answered for; 0 while nothing is behind",
        replication.lag_seconds,
    )?;
    #[allow(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
    let safe = replication.safe_bytes.map(|bytes| bytes as f64);
    metrics.gauge("pgtide_slot_safe_bytes", "Bytes of WAL until PostgreSQL may drop the slot", safe)?;
    metrics.counter(
        "pgtide_reconnects_total",
        "Times that the connections were made again after they had worked",
        replication.reconnects.into(),
    )?;
    metrics.counter("pgtide_documents_total", "Documents answered for", sink.documents)?;
    metrics.counter("pgtide_rejected_total", "Documents that Elasticsearch refused for good", sink.rejected)?;
    metrics.counter("pgtide_retried_total", "Items and requests that were sent again", sink.retried)?;
    metrics.counter(
        "pgtide_superseded_total",
        "Items answered with 409: a newer version was there",
        sink.superseded,
    )?;
    metrics.gauge("pgtide_in_flight_requests", "Bulks on their way", Some(sink.in_flight.into()))?;
    metrics.gauge("pgtide_queued_documents", "Documents not answered for yet", Some(float(sink.queued_documents)))?;
    metrics.gauge("process_resident_memory_bytes", "Resident memory, bytes", status.memory.map(float))
}

const PHASES: [Phase; 11] = [
    Phase::Connecting,
    Phase::Standby,
    Phase::Snapshot,
    Phase::CatchUp,
    Phase::Streaming,
    Phase::Pausing,
    Phase::Paused,
    Phase::Degraded,
    Phase::Failed,
    Phase::Stopping,
    Phase::Stopped,
];

/// The word of `GET /status`.
fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Connecting => "connecting",
        Phase::Standby => "standby",
        Phase::Snapshot => "snapshot",
        Phase::CatchUp => "catch_up",
        Phase::Streaming => "streaming",
        Phase::Pausing => "pausing",
        Phase::Paused => "paused",
        Phase::Degraded => "degraded",
        Phase::Failed => "failed",
        Phase::Stopping => "stopping",
        Phase::Stopped => "stopped",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::engine::{ChunkMap, IndexTotals, Replication, SnapshotStatus, TableName, TableState, TableStatus};
    use crate::lsn::Lsn;
    use crate::table::TableId;

    fn fixture() -> Status {
        let mut status = Status { phase: Phase::Streaming, memory: Some(50 << 20), ..Status::default() };
        status.tables = vec![
            TableStatus {
                table: TableName(TableId::new("public", "users")),
                state: TableState::Live,
                chunks: ChunkMap(b"ddd".to_vec()),
                rows_copied: 1000,
                inserts: 11,
                updates: 12,
                deletes: 13,
                truncates: 1,
                ..TableStatus::default()
            },
            TableStatus {
                table: TableName(TableId::new("public", "odd \"name\"\\\n")),
                state: TableState::Copying,
                chunks: ChunkMap(b"dcp".to_vec()),
                rows_copied: 20,
                inserts: 2,
                ..TableStatus::default()
            },
            TableStatus { table: TableName(TableId::new("public", "unplanned")), ..TableStatus::default() },
        ];
        status.snapshot =
            SnapshotStatus { running: true, seconds: 12.5, workers: 4, active_workers: 1, ..Default::default() };
        status.replication = Replication {
            slot: Some("tide".into()),
            active: Some(true),
            current_lsn: Some(Lsn(0x16_B374_D848)),
            confirmed_lsn: Some(Lsn(0x16_B374_D800)),
            lag_bytes: Some(72),
            lag_seconds: Some(0.25),
            cdc_latency: Some(0.002),
            process_latency: Some(0.015),
            retained_bytes: Some(4096),
            safe_bytes: Some(-5),
            reconnects: 3,
            ..Replication::default()
        };
        status.sink.last_latency = Some(7.5);
        status.sink.indices = vec![IndexTotals { index: "users".into(), indexed: 23, deleted: 13 }];
        status.sink.documents = 36;
        status.sink.rejected = 4;
        status.sink.retried = 5;
        status.sink.superseded = 6;
        status.sink.in_flight = 2;
        status.sink.queued_documents = 70;
        status
    }

    #[test]
    fn every_metric_has_its_name_type_labels_and_value() {
        let text = render_for(&fixture(), "box");
        let samples: String =
            text.lines().filter(|line| !line.starts_with("# HELP")).map(|line| format!("{line}\n")).collect();
        insta::assert_snapshot!(samples);
    }

    #[test]
    fn what_is_unknown_is_left_out() {
        let text = render_for(&Status::default(), "box");
        assert_eq!(
            text.lines().filter(|line| line.contains("latency_current") && line.ends_with(" NaN")).count(),
            6,
            "{text}"
        );
        for name in ["slot_is_active", "_lsn", "lag", "retained", "safe", "memory", "index_total"] {
            assert!(!text.lines().any(|line| line.contains(name)), "{name}: {text}");
        }
        assert!(
            text.contains("pgtide_phase{host=\"box\",phase=\"connecting\",slot_name=\"snapshot_only\"} 1\n"),
            "{text}"
        );
        assert!(
            text.contains("go_pq_cdc_snapshot_in_progress{host=\"box\",slot_name=\"snapshot_only\"} 0\n"),
            "{text}"
        );
    }

    #[test]
    fn phases_have_the_words_of_the_status() {
        for phase in PHASES {
            assert_eq!(serde_json::to_value(phase).unwrap(), phase_name(phase));
        }
    }

    #[test]
    fn the_label_host_is_this_machine() {
        let host = nix::unistd::gethostname().unwrap();
        assert!(render(&fixture()).contains(&format!("host=\"{}\"", host.to_str().unwrap())));
    }
}
