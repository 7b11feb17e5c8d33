//! The stream: transactions to operations on documents, and what may be acknowledged.

mod acknowledge;
mod apply;
mod fill;
mod relations;
mod tracker;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio::time::error::Elapsed;
use tokio_util::sync::CancellationToken;

use self::acknowledge::Acknowledge;
pub use self::acknowledge::Record;
pub(crate) use self::acknowledge::moved;
use self::apply::Applier;
use self::relations::Relations;
pub(crate) use self::relations::no_key;
pub use self::tracker::Tracker;
use crate::change::Handler;
use crate::config::Config;
use crate::gate::{Gate, Pass};
use crate::lsn::Lsn;
use crate::mapping::TableMapping;
use crate::postgres::connect::connect;
use crate::postgres::replication::{Feedback, Frame, Reader, Session};
use crate::problem::{Problem, ProblemKind};
use crate::sink::{Lanes, Limits, Sink, SinkError};
use crate::snapshot::Resnapshots;
use crate::telemetry::Counters;

/// What the stream needs.
pub struct Options {
    /// How to reach both sides, and how large bulks may be.
    pub config: Arc<Config>,
    /// The tables and their indices.
    pub tables: Vec<Arc<TableMapping>>,
    /// Where operations go.
    pub sink: Sink,
    /// Where progress is shown.
    pub counters: Arc<Counters>,
    /// An embedder's code.
    pub handler: Option<Arc<dyn Handler>>,
    /// Told of deletes while a table is copied again.
    pub resnapshots: Arc<Resnapshots>,
    /// Where acknowledged positions are remembered, and which server they are of.
    pub record: Record,
    /// What to do where changes are lost, for the operator.
    pub copy_again: String,
    /// Closed: nothing is read and nothing is sent.
    pub gate: Gate,
    /// Ends the stream cleanly: what was read is answered for and confirmed.
    pub stop: CancellationToken,
}

/// Streams from the slot until stopped; then everything that was read has been answered for and the position sent.
///
/// # Errors
/// PostgreSQL fails, or sends what cannot be applied. Nothing is confirmed beyond what has been answered for.
/// Elasticsearch's failures are waited out.
pub async fn run(options: Options) -> Result<(), Problem> {
    let Options { config, tables, sink, counters, handler, resnapshots, record, copy_again, gate, stop } = options;
    let cdc = &config.cdc;
    let client = connect(cdc, "stream catalog").await?;
    let limits = Limits {
        documents: config.elasticsearch.batch_size_limit,
        bytes: config.elasticsearch.batch_byte_size_limit,
        linger: config.elasticsearch.batch_ticker_duration,
    };
    // Bulks on their way are given up only when the process is told to stop a second time: their answers decide what
    // may be confirmed.
    let give_up = CancellationToken::new();
    let lanes = Lanes::new(sink.clone(), config.elasticsearch.concurrent_request, limits, give_up.clone());
    let relations = Relations::of(&client, tables, handler.is_none()).await?;
    let mut applier = Applier::new(
        lanes,
        relations,
        client,
        sink,
        Arc::clone(&counters),
        handler,
        resnapshots.clone(),
        give_up.clone(),
    );
    let mut pass = gate.enter();
    // Only a slot that was ours a moment ago is waited for; of another holder the operator is told at once.
    let mut patience = Duration::ZERO;
    loop {
        let (mut reader, feedback, began) = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            started = start(&config, patience, &record, &counters, &copy_again) => started?,
        };
        patience = RELEASE;
        resnapshots.stream_begins(began);
        let mut acknowledge = Acknowledge::start(record.clone(), Arc::clone(&counters), feedback);
        let outcome = read(&mut reader, &mut acknowledge, &mut applier, &resnapshots, &mut pass, &stop).await;
        // Whatever ended it: what was sent is brought home, so that nothing of it arrives behind the back of the next
        // start.
        let drained = tokio::time::timeout(DRAIN, applier.lanes().drain()).await;
        // Nobody reads any more: what the server still sends must not keep it from hearing the last position.
        drop(reader);
        let finished = acknowledge.finish(applier.confirm()).await;
        if let Ok(End::Rest) = outcome {
            if let Err(error) = finished {
                tracing::info!(%error, "the stream was not ended in good order; it begins again where it was confirmed");
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => {
                    let answered = applier.lanes().oldest_unanswered().is_none();
                    return if answered { Ok(()) } else { answered_in_time(drained) };
                }
                rested = rest(&mut applier, &mut pass) => rested?,
            }
            continue;
        }
        give_up.cancel();
        return outcome.map(drop).and(answered_in_time(drained)).and(finished);
    }
}

fn answered_in_time(drained: Result<Result<(), SinkError>, Elapsed>) -> Result<(), Problem> {
    match drained {
        Ok(drained) => drained.map_err(Problem::from),
        Err(_) => Err(Problem::new(
            ProblemKind::Elasticsearch,
            "Elasticsearch did not answer for the last bulks in time",
            "They are sent again at the next start: nothing of them was confirmed.",
        )),
    }
}

/// Begins to stream from wherever the slot stands, and says where: a position of ours that is ahead of it would silently skip.
async fn start(
    config: &Config,
    patience: Duration,
    record: &Record,
    counters: &Counters,
    copy_again: &str,
) -> Result<(Reader, Feedback, Lsn), Problem> {
    let cdc = &config.cdc;
    let began = Instant::now();
    loop {
        let mut session = Session::connect(cdc, "stream").await?;
        let confirmed = record.check(&mut session, &cdc.slot.name, counters, copy_again).await?;
        match session.start(&cdc.slot.name, Lsn::ZERO, &cdc.publication.name).await {
            // The server has not let go of it yet: it was ours a moment ago.
            Err(error) if error.sqlstate() == Some("55006") && began.elapsed() < patience => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            started => return started.map(|(reader, feedback)| (reader, feedback, confirmed)).map_err(Problem::from),
        }
    }
}

/// Waits, without a connection for streaming, until Elasticsearch has answered for everything and the gate is open.
async fn rest(applier: &mut Applier, pass: &mut Pass) -> Result<(), Problem> {
    applier.lanes().drain().await.map_err(Problem::from)?;
    pass.wait().await;
    applier.restart();
    Ok(())
}

/// Why reading ended.
enum End {
    /// For good.
    Stop,
    /// For a while, or for another connection. Not with the connection open: a walsender that writes to somebody who does not read cannot be ended,
    /// and a checkpoint that wants to drop its slot (`max_slot_wal_keep_size`) waits for that.
    Rest,
}

/// How long the end of the stream waits for bulks that are on their way.
const DRAIN: Duration = Duration::from_secs(10);

/// How long the server may take to let go of the slot of a connection that was ended.
const RELEASE: Duration = Duration::from_secs(10);

async fn read(
    reader: &mut Reader,
    acknowledge: &mut Acknowledge,
    applier: &mut Applier,
    resnapshots: &Resnapshots,
    pass: &mut Pass,
    stop: &CancellationToken,
) -> Result<End, Problem> {
    let answered = applier.lanes().answered();
    loop {
        applier.new_read();
        while let Some(frame) = reader.next_frame()? {
            match frame {
                Frame::Data { data, wal_start, .. } => {
                    applier.at(wal_start);
                    tokio::select! {
                        biased;
                        applied = applier.apply(data) => if !applied? {
                            return Ok(End::Rest);
                        },
                        // While a full lane waits for Elasticsearch, neither a stop nor a pause must wait with it.
                        () = stop.cancelled() => return Ok(End::Stop),
                        () = pass.closing() => return Ok(End::Rest),
                    }
                }
                Frame::KeepAlive { wal_end, .. } => applier.tracker.keepalive(wal_end),
            }
        }
        let due = applier.lanes().flush_idle();
        let confirmed = applier.confirm();
        acknowledge.up_to(confirmed, applier.changes);
        if let Some(failed) = applier.lanes().failed() {
            return Err(failed.into());
        }
        // Stop before pause before answers before more to read.
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(End::Stop),
            () = pass.closing() => return Ok(End::Rest),
            problem = acknowledge.failed() => return Err(problem),
            () = resnapshots.stream_anew(confirmed) => return Ok(End::Rest),
            () = answered.notified() => {}
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            filled = reader.fill() => filled?,
        }
    }
}
