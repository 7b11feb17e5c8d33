//! The supervisor: owns every task, decides what a failure means, and answers commands.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::control::{Command, Commands};
use super::indices;
use super::monitor;
use super::obey::answer;
use super::resnapshots::{resnapshots, take_back};
use super::schema::Schema;
use super::shared::{Liveness, Shared};
use super::source::{self, copy_again};
use super::standby::{Over, stand_by};
use crate::config::{Config, Mode};
use crate::lsn::Lsn;
use crate::mapping::TableMapping;
use crate::postgres::connect::connect;
use crate::postgres::preflight::{self, Server};
use crate::postgres::replication::Session;
use crate::postgres::slot::SlotInfo;
use crate::postgres::{publication, slot};
use crate::problem::{Problem, ProblemKind};
use crate::snapshot::{self, Ledger};
use crate::status::{Level, Phase, TableState};
use crate::stream;
use crate::table::TableId;

/// The longest wait between two attempts.
const BACKOFF: Duration = Duration::from_secs(15);
/// How long a process that takes over waits for the slot of the one before, and after how long it ends that one's stream.
const RELEASE: Duration = Duration::from_secs(10);
const POLITE: Duration = Duration::from_millis(500);
/// How long a start waits for a slot that another process still holds, before it fails for good when nobody
/// looks at a screen: a killed predecessor's connection takes a moment to be noticed.
const HELD: Duration = Duration::from_secs(15);

/// Runs the pipeline and answers commands until it is stopped, is done, or needs an operator.
pub(super) async fn supervise(shared: Arc<Shared>, mut commands: Commands) -> Result<(), Problem> {
    let stop = shared.stop.clone();
    let sampler = tokio::spawn(monitor::sample(Arc::clone(&shared)));
    let mut pipeline = tokio::spawn(run(Arc::clone(&shared), stop.clone()));
    let outcome = loop {
        tokio::select! {
            ended = &mut pipeline => break ended.unwrap_or_else(|panic| {
                Err(Problem::new(ProblemKind::Internal, format!("the pipeline died: {panic}"), "Report this; the next start goes on."))
            }),
            Some((command, reply)) = commands.recv() => answer(&shared, command, reply),
        }
    };
    match outcome {
        Ok(()) => {
            shared.set_phase(Phase::Stopped, None);
            shared.live.send_replace(Liveness::Ended);
            sampler.abort();
            Ok(())
        }
        Err(problem) => {
            shared.counters.last_notice(format!("{}. {}", problem.message, problem.hint));
            shared.set_phase(Phase::Failed, Some(problem.clone()));
            shared.live.send_replace(Liveness::Ended);
            // The screen shows why until somebody leaves it.
            while shared.options.wait_when_failed && !stop.is_cancelled() {
                tokio::select! {
                    () = stop.cancelled() => {}
                    Some((command, reply)) = commands.recv() => {
                        if command == Command::Stop {
                            answer(&shared, command, reply);
                        } else {
                            let _ = reply.send(Err(format!("the pipeline has failed: {}", problem.message)));
                        }
                    }
                }
            }
            sampler.abort();
            Err(problem)
        }
    }
}

/// Attempts until one ends well.
async fn run(shared: Arc<Shared>, stop: CancellationToken) -> Result<(), Problem> {
    let (began, mut attempts) = (Instant::now(), 0_u32);
    loop {
        shared.set_ready(false);
        let outcome = tokio::select! {
            outcome = attempt(&shared, &stop) => outcome,
            // What is under way has its own way to end; before there is anything, there is nothing to wait for.
            () = stopped_while_connecting(&shared, &stop) => return Ok(()),
        };
        let problem = match outcome {
            Ok(()) => return Ok(()),
            Err(_) if stop.is_cancelled() => return Ok(()),
            Err(problem) => problem,
        };
        if shared.was_ready() {
            attempts = 0;
        }
        attempts += 1;
        let never_ready = !shared.ever_ready();
        let patient = problem.kind == ProblemKind::Setup && began.elapsed() < HELD;
        if !problem.transient || (never_ready && shared.options.fail_fast && !patient) {
            return Err(problem);
        }
        if attempts == 1 {
            shared.counters.notice(Level::Warn, format!("{}; trying again", problem.message));
        }
        shared.set_trouble(problem, attempts);
        let longest = BACKOFF.min(Duration::from_millis(250) * 2_u32.saturating_pow(attempts.min(10)));
        let mut wait = longest.mul_f64(0.5 + fastrand::f64() / 2.0);
        if patient && never_ready && shared.options.fail_fast {
            wait = wait.min(HELD.saturating_sub(began.elapsed()));
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn stopped_while_connecting(shared: &Shared, stop: &CancellationToken) {
    stop.cancelled().await;
    if shared.was_ready() {
        std::future::pending::<()>().await;
    }
}

/// One life of the connections: looks, leads as soon as nobody else does, works.
async fn attempt(shared: &Arc<Shared>, stop: &CancellationToken) -> Result<(), Problem> {
    if !shared.ever_ready() && shared.phase() != Phase::Degraded {
        // What stands in the way is shown until it is seen to be gone.
        shared.set_phase(Phase::Connecting, None);
    }
    shared.counters.acknowledged_lsn.store(0, Relaxed);
    let info = shared.sink.client().info().await?;
    shared.set_sink(info);
    let Some(lead) = lead(shared, stop).await? else { return Ok(()) };
    let ledger = Arc::clone(&lead.ledger);
    tokio::select! {
        outcome = work(shared, stop, lead) => outcome,
        never = say_paused(shared, &ledger) => match never {},
    }
}

/// Tells the processes that stand by whether the operator has paused this one.
async fn say_paused(shared: &Shared, ledger: &Ledger) -> std::convert::Infallible {
    let (mut closed, mut said) = (shared.gate.watch(), false);
    loop {
        // The gate lives as long as the pipeline.
        let _ = closed.wait_for(|closed| *closed != said).await;
        match ledger.say_paused(!said).await {
            Ok(()) => said = !said,
            Err(problem) => {
                tracing::debug!(%problem, "the others are not told of the pause");
                tokio::time::sleep(POLITE).await;
            }
        }
    }
}

/// What the process that leads does: copies what is to be copied, streams.
async fn work(shared: &Arc<Shared>, stop: &CancellationToken, lead: Lead) -> Result<(), Problem> {
    let Lead { ledger, client, server, mut slot } = lead;
    let config = &shared.options.config;
    let (cdc, mode) = (&config.cdc, config.mode());
    let slot_name = cdc.slot.name.as_str();
    let names: Vec<TableId> = shared.mappings.iter().map(|mapping| mapping.table.clone()).collect();
    source::unchanged(shared, &server, slot.as_ref(), &ledger).await?;
    if slot.is_some() {
        publication_stayed(shared, &client, &ledger, &server).await?;
    }
    if cdc.slot.failover && slot.as_ref().is_some_and(|slot| !slot.failover) {
        Session::connect(cdc, "slot").await?.keep_on_standbys(slot_name).await?;
        shared.counters.notice(Level::Info, format!("slot {slot_name} is a failover slot from now on"));
    }
    let known = ledger.tables().await?;
    for table in preflight::unpublished(&client, config, &server, &names).await? {
        // Of a table that was copied before, the changes since it was taken out of the publication are lost. The wish
        // comes first: once the table is published nothing tells that it was not.
        if known.contains(&table.id) {
            ledger.want(&table.id, 0).await?;
        }
        if publication::add(&client, cdc, table, server.version).await? {
            let name = &cdc.publication.name;
            shared.counters.notice(Level::Info, format!("{}: added to publication {name}", table.id));
        }
    }
    let tables = preflight::tables(&client, config, &server, &names, shared.options.handler.is_none()).await?;
    // Ended by us, what is under way brings home what it has sent.
    let ending = stop.child_token();
    shared.work_with(&server);
    shared.set_ready(true);
    for warning in preflight::warnings(&client, config, &server, &names).await? {
        shared.counters.notice(Level::Warn, warning);
    }
    let monitors = CancellationToken::new();
    let _end_monitors = monitors.clone().drop_guard();
    let copies = mode != Mode::Never && to_copy(shared, &ledger).await?;
    // Nothing depends on it before a copy begins or goes on.
    shared.counters.slot_expected.store(!copies && slot.is_some(), Relaxed);
    let (lost, mut slot_lost) = mpsc::channel(1);
    tokio::spawn(monitor::watch_slot(Arc::clone(shared), server.clone(), lost, monitors.clone()));
    if let Some(heartbeat) = &cdc.heartbeat {
        tokio::spawn(monitor::heartbeat(Arc::clone(shared), heartbeat.clone(), monitors.clone()));
    }

    indices::prepare(shared, &client, &ledger, &tables, copies, &ending).await?;
    if copies {
        shared.set_phase(Phase::Snapshot, None);
        let copied = copied_tables(config, &shared.mappings);
        let began = Instant::now();
        shared.copy_begins();
        let context = shared.snapshot_context(&ending);
        let outcome = loop {
            let outcome = {
                let copying = snapshot::initial(&context, &ledger, &copied, slot.as_ref(), &server);
                tokio::pin!(copying);
                tokio::select! {
                    outcome = &mut copying => outcome,
                    Some(problem) = slot_lost.recv() => {
                        ending.cancel();
                        // Whatever it ends of is a consequence.
                        let _ = copying.await;
                        Err(problem)
                    }
                }
            };
            match outcome {
                Ok(snapshot::Ended::Released) => slot = find_slot(shared, &client).await?,
                outcome => break outcome,
            }
        };
        shared.copy_ended();
        outcome?;
        indices::restore(shared, &ending).await?;
        tracing::info!(seconds = began.elapsed().as_secs_f64(), "snapshot completed successfully");
    }
    if mode == Mode::SnapshotOnly {
        for table in &shared.counters.tables {
            table.set_state(TableState::Live);
        }
        return Ok(());
    }
    if mode == Mode::Never && slot.is_none() {
        let mut session = Session::connect(cdc, "slot").await?;
        let created = session.create_slot(slot_name, cdc.slot.kind()).await?;
        shared.counters.slot_expected.store(true, Relaxed);
        shared.counters.notice(Level::Info, format!("slot {slot_name} created at {}", created.consistent_point));
    }
    shared.resnapshots.keep_in(&ledger);
    let mut schema = Schema::new(shared, &ledger, &client, server.version);
    take_back(shared, &ledger).await;
    let remembered = ledger.remembered().await?;
    for (mapping, counters) in shared.mappings.iter().zip(&shared.counters.tables) {
        if !matches!(counters.state(), TableState::Live) {
            counters.set_state(TableState::CatchUp);
        }
        // What a crash or a lost connection cut short, begun or not.
        let wanted = counters.resnapshot.load(Relaxed) || ledger.has_pending(&mapping.table).await?;
        let copied = remembered.get(&mapping.table).is_some_and(|remembered| remembered.seen.is_some());
        counters.first_copy.store(wanted && !copied, Relaxed);
        let carried_over = wanted && !counters.resnapshot.swap(wanted, Relaxed);
        if wanted {
            counters.set_problem(None);
            if carried_over {
                shared.resnapshots.begun_before(mapping);
            }
            shared.resnapshots.want(mapping, &counters.resnapshot, None).await?;
        } else if shared.resnapshots.lacks(mapping.number).is_some() {
            shared.settle(mapping.number);
        }
    }
    schema.at_start().await?;
    let target = current_position(&client).await?;
    // Whoever streamed before, documents hold nothing that was committed later.
    shared.counters.applied_lsn.fetch_max(target.0, Relaxed);
    shared.catch_up_to(target);
    shared.set_phase(Phase::CatchUp, None);

    shared.stream_on(Some(server.timeline));
    let streaming = stream::run(stream::Options {
        config: Arc::clone(config),
        tables: shared.mappings.clone(),
        sink: shared.sink.clone(),
        counters: Arc::clone(&shared.counters),
        handler: shared.options.handler.clone(),
        resnapshots: Arc::clone(&shared.resnapshots),
        record: stream::Record {
            ledger: Arc::clone(&ledger),
            system_id: server.system_id.clone(),
            timeline: server.timeline,
            segment: server.wal_segment,
        },
        copy_again: copy_again(shared),
        gate: shared.gate.clone(),
        stop: ending.clone(),
    });
    let copying = resnapshots(shared, &ledger);
    let watching = schema.watch();
    tokio::pin!(streaming);
    tokio::select! {
        outcome = &mut streaming => outcome,
        problem = ledger.lost() => {
            shared.set_trouble(problem.clone(), 1);
            ending.cancel();
            // Whatever it ends of is a consequence: without the lease nothing can be sent any more.
            let _ = streaming.await;
            Err(problem)
        }
        problem = watching => {
            ending.cancel();
            let _ = streaming.await;
            Err(problem)
        }
        Some(problem) = slot_lost.recv() => {
            ending.cancel();
            // Whatever it ends of is a consequence.
            let _ = streaming.await;
            Err(problem)
        }
        never = copying => match never {},
    }
}

/// What the process that leads begins with.
struct Lead {
    ledger: Arc<Ledger>,
    client: tokio_postgres::Client,
    server: Server,
    slot: Option<SlotInfo>,
}

/// Looks at the server, and leads the job: at once, or after standing by for as long as another process leads. None: there is
/// nothing to lead any more.
async fn lead(shared: &Arc<Shared>, stop: &CancellationToken) -> Result<Option<Lead>, Problem> {
    let config = &shared.options.config;
    let cdc = &config.cdc;
    let name = cdc.slot.name.as_str();
    let mut ours: Option<Arc<Ledger>> = None;
    loop {
        let client = connect(cdc, "control").await?;
        let server = preflight::server(&client).await?;
        shared.set_server(&server);
        let mut slot = find_slot(shared, &client).await?;
        server.check(config, slot.as_ref())?;
        if let Some(ledger) = ours {
            // The server has yet to see that the stream of the one before has ended.
            let since = Instant::now();
            while slot.as_ref().is_some_and(|slot| slot.active) && since.elapsed() < RELEASE {
                if since.elapsed() > POLITE {
                    slot::end_stream(&client, name).await?;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
                slot = find_slot(shared, &client).await?;
            }
            return free(config, Lead { ledger, client, server, slot }).map(Some);
        }
        let ledger = Ledger::open(cdc, &config.job(), &shared.instance, shared.sink.lease()).await?;
        shared.looks_at(&ledger).await?;
        if ledger.try_lock().await? {
            return free(config, Lead { ledger, client, server, slot }).map(Some);
        }
        drop(client);
        shared.stands_by(true);
        let monitor = CancellationToken::new();
        let _end_monitor = monitor.clone().drop_guard();
        tokio::spawn(monitor::watch_slot(Arc::clone(shared), server, mpsc::channel(1).0, monitor.clone()));
        match stand_by(shared, &ledger, stop).await? {
            Over::Leads => ours = Some(ledger),
            Over::Completed => {
                shared.counters.notice(Level::Info, "the copy is done");
                for table in &shared.counters.tables {
                    table.set_state(TableState::Live);
                }
                return Ok(None);
            }
            Over::Stopped => return Ok(None),
        }
        shared.stands_by(false);
        shared.set_phase(Phase::Connecting, None);
    }
}

/// Makes sure that there is room for what the leader needs, and that nobody else streams from its slot.
fn free(config: &Config, lead: Lead) -> Result<Lead, Problem> {
    lead.server.room(config, lead.slot.as_ref())?;
    if let Some(slot) = &lead.slot {
        slot::free(&config.cdc.slot.name, slot)?;
    }
    Ok(lead)
}

/// The slot, if there is one; none in mode `snapshot_only`, which has no use for it.
async fn find_slot(shared: &Shared, client: &tokio_postgres::Client) -> Result<Option<SlotInfo>, Problem> {
    let config = &shared.options.config;
    if config.mode() == Mode::SnapshotOnly {
        return Ok(None);
    }
    let (name, found) = (&config.cdc.slot.name, slot::find(client, &config.cdc.slot.name).await?);
    if let Some(info) = &found {
        slot::usable(name, info, &config.cdc.database).map_err(|problem| source::without_slot(shared, problem))?;
    }
    Ok(found)
}

/// A slot's changes are published as the publication was when they were made: one that was dropped and is created again
/// leaves out what was committed in between.
async fn publication_stayed(
    shared: &Shared,
    client: &tokio_postgres::Client,
    ledger: &Ledger,
    server: &Server,
) -> Result<(), Problem> {
    let cdc = &shared.options.config.cdc;
    // In mode `never` a job is there as soon as something was streamed.
    let never = shared.options.config.mode() == Mode::Never;
    let known = has_streamed(shared) || ledger.job().await?.is_some_and(|job| job.completed || never);
    if !known || publication::find(client, &cdc.publication.name, server.version).await?.is_some() {
        return Ok(());
    }
    Err(Problem::new(
        ProblemKind::Gap,
        format!(
            "publication {} is gone, but the tables were copied or streamed before: changes since then are lost",
            cdc.publication.name
        ),
        source::drop_and_copy_again(shared),
    ))
}

/// This process has acknowledged something: a slot that is missing was there.
fn has_streamed(shared: &Shared) -> bool {
    shared.counters.confirmed_lsn.load(Relaxed) > 0
}

/// Whether there is something to copy before the stream.
async fn to_copy(shared: &Shared, ledger: &Ledger) -> Result<bool, Problem> {
    let config = &shared.options.config;
    let job = ledger.job().await?;
    if shared.wants_fresh_copy(job.as_ref()) {
        ledger.reopen_job().await?;
        return Ok(true);
    }
    let Some(job) = job else { return Ok(true) };
    if !job.completed {
        return Ok(true);
    }
    let copied = copied_tables(config, &shared.mappings);
    let known = ledger.tables().await?;
    let added = || copied.iter().map(|mapping| &mapping.table).filter(|table| !known.contains(table));
    if config.mode() == Mode::SnapshotOnly {
        let done = added().next().is_none() && !ledger.is_pending().await?;
        if done {
            shared.counters.notice(Level::Info, "the ledger says that this copy is done: nothing to do");
        }
        return Ok(!done);
    }
    for table in added() {
        ledger.want(table, 0).await?;
        shared.counters.notice(Level::Info, format!("{table}: new in the configuration, so it is copied"));
    }
    let configured: Vec<TableId> = shared.mappings.iter().map(|mapping| mapping.table.clone()).collect();
    snapshot::forget_others(ledger, &configured, &shared.counters).await?;
    for (mapping, counters) in shared.mappings.iter().zip(&shared.counters.tables) {
        let rows = ledger.rows(&mapping.table).await?;
        if counters.rows_done.load(Relaxed) == 0 {
            counters.rows_done.store(rows, Relaxed);
            counters.rows_total.store(rows, Relaxed);
        }
        // A handler writes where it likes.
        if rows > 0 && shared.options.handler.is_none() && !shared.sink.client().index_exists(&mapping.index).await? {
            return Err(Problem::new(
                ProblemKind::Gap,
                format!("there is no index {}, but {} was copied into it before", mapping.index, mapping.table),
                format!("Check `tableIndexMapping` and the cluster. If the index is lost: {}", copy_again(shared)),
            ));
        }
    }
    Ok(false)
}

/// The tables that the snapshot copies: `snapshot.tables` where there are any, else all.
pub(super) fn copied_tables(config: &Config, tables: &[Arc<TableMapping>]) -> Vec<Arc<TableMapping>> {
    let wanted = &config.cdc.snapshot.tables;
    let is_wanted =
        |table: &&Arc<TableMapping>| wanted.is_empty() || wanted.iter().any(|entry| entry.id == table.table);
    tables.iter().filter(is_wanted).cloned().collect()
}

pub(super) async fn current_position(client: &tokio_postgres::Client) -> Result<Lsn, Problem> {
    let row = client.query_one("SELECT pg_catalog.pg_current_wal_lsn()::text", &[]).await?;
    Ok(row.get::<_, String>(0).parse().unwrap_or_default())
}
