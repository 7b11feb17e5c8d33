//! What the supervisor, its tasks and the status share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Options;
use super::monitor::{Positions, Sampled};
use crate::gate::Gate;
use crate::lsn::Lsn;
use crate::mapping::TableMapping;
use crate::postgres::preflight::Server;
use crate::postgres::slot::SlotInfo;
use crate::problem::Problem;
use crate::sink::{ServerInfo, Sink};
use crate::snapshot::{Context, Job, Ledger, Resnapshots};
use crate::status::{Micros, Phase, Standby, TableState};
use crate::telemetry::{Counters, TableCounters, lock, now};

/// Phase, and what stands in its way.
#[derive(Clone, Debug, Default)]
pub(super) struct PhaseState {
    pub(super) phase: Phase,
    pub(super) since: Micros,
    pub(super) paused_since: Option<Micros>,
    pub(super) problem: Option<Problem>,
    pub(super) attempts: u32,
}

/// What waits for all tables to be live has to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Liveness {
    /// Something is to be copied, or the backlog of the start is not empty.
    NotYet,
    /// Every table was live with an empty backlog.
    Live,
    /// The pipeline has ended.
    Ended,
}

/// How long copies have taken.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CopyClock {
    pub(super) began: Option<Instant>,
    pub(super) seconds: f64,
}

pub(super) struct Shared {
    pub(super) options: Options,
    pub(super) instance: String,
    pub(super) started_at: Micros,
    pub(super) counters: Arc<Counters>,
    pub(super) mappings: Vec<Arc<TableMapping>>,
    pub(super) sink: Sink,
    pub(super) gate: Gate,
    pub(super) resnapshots: Arc<Resnapshots>,
    pub(super) stop: CancellationToken,
    pub(super) state: Mutex<PhaseState>,
    pub(super) server: Mutex<Option<Server>>,
    pub(super) sink_info: Mutex<Option<ServerInfo>>,
    pub(super) slot: Mutex<Option<SlotInfo>>,
    pub(super) positions: Mutex<Positions>,
    pub(super) sampled: Mutex<Sampled>,
    pub(super) copy: Mutex<CopyClock>,
    pub(super) standby: Mutex<Option<Standby>>,
    pub(super) held: watch::Sender<Option<Instant>>,
    pub(super) live: watch::Sender<Liveness>,
    /// The system identifier of the server that this process works with.
    pub(super) worked_with: Mutex<Option<String>>,
    /// The timeline that this process has streamed from: it knows how far documents are.
    pub(super) streamed_on: Mutex<Option<u32>>,
    catch_up: AtomicU64,
    ready: AtomicBool,
    ever_ready: AtomicBool,
    stood_by: AtomicBool,
    /// When this process first looked at the ledger, by the server's clock.
    since: OnceLock<String>,
}

impl Shared {
    pub(super) fn new(options: Options, sink: Sink, mappings: Vec<Arc<TableMapping>>) -> Self {
        let tables = mappings.iter().map(|mapping| (mapping.table.clone(), mapping.index.clone()));
        let started_at = now();
        Self {
            instance: options.config.cdc.snapshot.instance_id.clone().unwrap_or_else(instance),
            started_at,
            counters: Arc::new(Counters::new(tables)),
            resnapshots: Arc::new(Resnapshots::new(mappings.len())),
            mappings,
            sink,
            gate: Gate::default(),
            stop: CancellationToken::new(),
            state: Mutex::new(PhaseState { since: started_at, ..PhaseState::default() }),
            server: Mutex::new(None),
            sink_info: Mutex::new(None),
            slot: Mutex::new(None),
            positions: Mutex::default(),
            sampled: Mutex::new(Sampled::default()),
            copy: Mutex::new(CopyClock::default()),
            standby: Mutex::default(),
            held: watch::Sender::new(None),
            live: watch::Sender::new(Liveness::NotYet),
            worked_with: Mutex::new(None),
            streamed_on: Mutex::new(None),
            catch_up: AtomicU64::new(u64::MAX),
            ready: AtomicBool::new(false),
            ever_ready: AtomicBool::new(false),
            stood_by: AtomicBool::new(false),
            since: OnceLock::new(),
            options,
        }
    }

    pub(super) fn phase(&self) -> Phase {
        lock(&self.state).phase
    }

    /// Moves to `phase`, unless the pipeline is on its way out and `phase` is not its end.
    pub(super) fn set_phase(&self, phase: Phase, problem: Option<Problem>) {
        let mut state = lock(&self.state);
        let ending = matches!(state.phase, Phase::Stopping | Phase::Stopped | Phase::Failed);
        if ending && !matches!(phase, Phase::Stopped | Phase::Stopping | Phase::Failed) {
            return;
        }
        if state.phase != phase {
            tracing::info!(from = state.phase.word(), to = phase.word(), "phase");
            state.phase = phase;
            state.since = now();
        }
        state.problem = problem;
        state.attempts = 0;
    }

    /// Something that may pass is in the way, for the `attempts`th time.
    pub(super) fn set_trouble(&self, problem: Problem, attempts: u32) {
        // Nobody looks at the slot until there is a connection again.
        *lock(&self.slot) = None;
        self.set_phase(Phase::Degraded, Some(problem));
        lock(&self.state).attempts = attempts;
    }

    pub(super) fn pause(&self) {
        lock(&self.state).paused_since = Some(now());
        self.gate.close();
    }

    pub(super) fn resume(&self) {
        lock(&self.state).paused_since = None;
        self.gate.open();
    }

    pub(super) fn set_server(&self, server: &Server) {
        *lock(&self.server) = Some(server.clone());
    }

    /// This is the server, whatever answers later.
    pub(super) fn work_with(&self, server: &Server) {
        lock(&self.worked_with).get_or_insert_with(|| server.system_id.clone());
    }

    /// This process streams from this timeline; none: somebody else does.
    pub(super) fn stream_on(&self, timeline: Option<u32>) {
        *lock(&self.streamed_on) = timeline;
    }

    /// The server goes on from `end` on another timeline: positions beyond it were of another history.
    pub(super) fn follow(&self, end: Lsn) {
        let counters = &self.counters;
        for position in [&counters.received_lsn, &counters.confirmed_lsn] {
            position.fetch_min(end.0, Relaxed);
        }
        counters.acknowledged_lsn.store(0, Relaxed);
        *lock(&self.positions) = Positions::default();
    }

    pub(super) fn set_sink(&self, info: ServerInfo) {
        *lock(&self.sink_info) = Some(info);
    }

    /// Connected and checked: the pipeline works from here on, until it is said again.
    pub(super) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Relaxed);
        if ready && self.ever_ready.swap(true, Relaxed) {
            self.counters.reconnects.fetch_add(1, Relaxed);
        }
    }

    /// Another process leads: this one works too, without having connected for a stream.
    pub(super) fn stands_by(&self, stands_by: bool) {
        self.ready.store(stands_by, Relaxed);
        self.stood_by.store(true, Relaxed);
    }

    pub(super) fn was_ready(&self) -> bool {
        self.ready.load(Relaxed)
    }

    pub(super) fn ever_ready(&self) -> bool {
        self.ever_ready.load(Relaxed) || self.stood_by.load(Relaxed)
    }

    /// Notes when this process first looked at the ledger.
    pub(super) async fn looks_at(&self, ledger: &Ledger) -> Result<(), Problem> {
        if self.since.get().is_none() {
            let _ = self.since.set(ledger.now().await?);
        }
        Ok(())
    }

    /// The copy that `snapshot.resnapshot` asks for is still to begin. One that any process has begun since the start of this
    /// one will do: whatever cuts it short, it is gone on with.
    pub(super) fn wants_fresh_copy(&self, job: Option<&Job>) -> bool {
        let begun = |job: &Job| job.ours && self.since.get().is_some_and(|since| job.started_at > *since);
        self.options.config.cdc.snapshot.resnapshot && !job.is_some_and(begun)
    }

    /// The backlog is empty once everything before `target` is confirmed.
    pub(super) fn catch_up_to(&self, target: Lsn) {
        self.catch_up.store(target.0, Relaxed);
    }

    /// Moves on to Streaming when the backlog is empty.
    pub(super) fn caught_up(&self) {
        let caught_up = self.counters.confirmed_lsn.load(Relaxed) >= self.catch_up.load(Relaxed);
        if self.phase() == Phase::Streaming || self.phase() == Phase::CatchUp && caught_up {
            for table in &self.counters.tables {
                // One that waits to be copied may have no documents yet.
                if table.state() == TableState::CatchUp && !table.resnapshot.load(Relaxed) {
                    table.set_state(TableState::Live);
                }
            }
            if self.phase() == Phase::CatchUp {
                self.set_phase(Phase::Streaming, None);
            }
        }
        // A table that is being copied again is not live, and one that waits for that, or has failed, is not either.
        let lacks = |table: &TableCounters| table.resnapshot.load(Relaxed) || table.state() == TableState::Failed;
        if self.phase() == Phase::Streaming && !self.counters.tables.iter().any(lacks) {
            self.live.send_if_modified(|live| match live {
                Liveness::NotYet => {
                    *live = Liveness::Live;
                    true
                }
                _ => false,
            });
        }
    }

    /// Says of a table, no copy of which runs, whether its documents follow the stream, or what they lack.
    pub(super) fn settle(&self, table: usize) {
        let (counters, lacks) = (&self.counters.tables[table], self.resnapshots.lacks(table));
        counters.set_state(match (&lacks, self.phase()) {
            (Some(_), _) => TableState::Failed,
            (None, Phase::Streaming) => TableState::Live,
            (None, _) => TableState::CatchUp,
        });
        counters.set_problem(lacks);
    }

    pub(super) fn copy_begins(&self) {
        *lock(&self.copy) = CopyClock { began: Some(Instant::now()), seconds: 0.0 };
    }

    pub(super) fn copy_runs(&self) -> bool {
        lock(&self.copy).began.is_some()
    }

    pub(super) fn copy_ended(&self) {
        let mut copy = lock(&self.copy);
        if let Some(began) = copy.began.take() {
            copy.seconds = began.elapsed().as_secs_f64();
        }
    }

    pub(super) fn snapshot_context(&self, stop: &CancellationToken) -> Context {
        Context {
            config: Arc::clone(&self.options.config),
            sink: self.sink.clone(),
            cluster: lock(&self.sink_info).as_ref().map(|info| info.cluster.clone()).unwrap_or_default(),
            counters: Arc::clone(&self.counters),
            handler: self.options.handler.clone(),
            gate: self.gate.clone(),
            resnapshots: Arc::clone(&self.resnapshots),
            held: self.held.clone(),
            stop: stop.clone(),
        }
    }
}

/// `hostname-pid`, as the reference names its instances.
fn instance() -> String {
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    format!("{}-{}", host.unwrap_or_else(|| "localhost".to_owned()), std::process::id())
}
