//! Tasks that look and count while the pipeline works.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::shared::Shared;
use super::source;
use crate::config::Heartbeat;
use crate::lsn::Lsn;
use crate::postgres::connect::connect;
use crate::postgres::preflight::Server;
use crate::postgres::slot;
use crate::problem::Problem;
use crate::status::{Level, Micros, Rates};
use crate::table::quote_identifier;
use crate::telemetry::{lock, now};

/// The rate of a running total over the last while. Nothing for that long is 0, not a remnant.
#[derive(Clone, Debug, Default)]
pub(super) struct Average {
    /// Seconds and totals, the oldest first.
    points: VecDeque<(f64, f64)>,
    value: f64,
}

/// Points that a span is divided into.
const POINTS: f64 = 20.0;

impl Average {
    /// Takes the running `total`, `elapsed` seconds after the last, into the rate over the last `span` seconds, or over
    /// those there are.
    pub(super) fn sample(&mut self, total: f64, elapsed: f64, span: f64) {
        let Some(&(newest, _)) = self.points.back() else {
            // Now, and the base of the first rate.
            self.points.extend([(0.0, total), (0.0, total)]);
            return;
        };
        if elapsed <= 0.0 {
            return;
        }
        let at = newest + elapsed;
        // The newest point moves on until it is a step from the one before it.
        let stays = self.points.iter().rev().nth(1).is_none_or(|(before, _)| newest - before >= span / POINTS);
        if !stays {
            self.points.pop_back();
        }
        self.points.push_back((at, total));
        while self.points.len() > 2 && self.points.get(1).is_some_and(|(second, _)| at - second >= span) {
            self.points.pop_front();
        }
        if let Some((from, base)) = self.points.front() {
            self.value = ((total - base) / (at - from)).max(0.0);
        }
    }

    pub(super) fn value(&self) -> f64 {
        self.value
    }

    /// The rate, once it is over `seconds` at least: what is read far into the future needs that.
    pub(super) fn over(&self, seconds: f64) -> Option<f64> {
        let ((from, _), (to, _)) = (self.points.front()?, self.points.back()?);
        (to - from >= seconds).then_some(self.value)
    }
}

/// Where PostgreSQL wrote, and when: how far back in time a position lies.
#[derive(Debug, Default)]
pub(super) struct Positions(VecDeque<(Micros, Lsn)>);

/// Positions that are remembered. Beyond it every other one is forgotten, so that hours stay in reach.
const REMEMBERED: usize = 512;

impl Positions {
    fn note(&mut self, at: Micros, current: Lsn) {
        if self.0.len() >= REMEMBERED {
            let mut number = 0_usize;
            self.0.retain(|_| {
                number += 1;
                number % 2 == 1
            });
        }
        self.0.push_back((at, current));
    }

    /// When PostgreSQL wrote at `position`, as near as can be told. None: before the first look.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "a time for a screen")]
    pub(super) fn passed(&self, position: Lsn) -> Option<Micros> {
        let next = self.0.partition_point(|(_, current)| *current <= position);
        let (before, from) = *self.0.get(next.checked_sub(1)?)?;
        let Some((after, to)) = self.0.get(next) else { return Some(before) };
        let part = (position.0 - from.0) as f64 / (to.0 - from.0) as f64;
        Some(before + ((after - before) as f64 * part) as Micros)
    }
}

/// Rates of one table.
#[derive(Clone, Debug, Default)]
pub(super) struct TableRates {
    /// Rows, those that other processes copy included, and changes, over about 10 s.
    pub(super) all: Average,
    /// Rows copied, over about 60 s: what the ETA is computed from.
    pub(super) copied: Average,
}

/// What the sampler has worked out.
#[derive(Clone, Debug, Default)]
pub(super) struct Sampled {
    pub(super) tables: Vec<TableRates>,
    pub(super) rates: [Average; 4],
    pub(super) documents: Average,
    pub(super) bytes: Average,
    pub(super) throttled: Average,
    pub(super) wal: Average,
}

impl Sampled {
    pub(super) fn rates(&self) -> Rates {
        let [snapshot, insert, update, delete] = self.rates.each_ref().map(Average::value);
        Rates { snapshot, insert, update, delete }
    }

    /// Rows copied a second in all tables, over about 60 s.
    pub(super) fn copied(&self) -> f64 {
        self.tables.iter().map(|rates| rates.copied.value()).sum()
    }
}

const SPAN: f64 = 10.0;
/// How long PostgreSQL may take to say how the slot stands.
const ANSWER: Duration = Duration::from_secs(5);

/// Looks for the end of the catch-up forty times a second, and samples the counters four times. Ends never.
pub(super) async fn sample(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(Duration::from_millis(25));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last = Instant::now();
    loop {
        ticks.tick().await;
        shared.caught_up();
        if last.elapsed() < Duration::from_millis(250) {
            continue;
        }
        let elapsed = last.elapsed().as_secs_f64();
        last = Instant::now();
        let sink = shared.sink.stats();
        let mut sampled = lock(&shared.sampled);
        sampled.tables.resize_with(shared.counters.tables.len(), TableRates::default);
        let mut totals = [0_u64; 4];
        for (table, rates) in shared.counters.tables.iter().zip(&mut sampled.tables) {
            let own =
                [&table.snapshot_rows, &table.inserts, &table.updates, &table.deletes].map(|count| count.load(Relaxed));
            let elsewhere = table.elsewhere.load(Relaxed);
            rates.all.sample(float(own.iter().sum::<u64>() + elsewhere), elapsed, SPAN);
            rates.copied.sample(float(own[0] + elsewhere), elapsed, 60.0);
            for (total, own) in totals.iter_mut().zip(own) {
                *total += own;
            }
        }
        for (rate, total) in sampled.rates.iter_mut().zip(totals) {
            rate.sample(float(total), elapsed, SPAN);
        }
        sampled.documents.sample(float(sink.documents), elapsed, SPAN);
        sampled.bytes.sample(float(sink.bytes), elapsed, SPAN);
        sampled.throttled.sample(float(sink.throttled), elapsed, SPAN);
        if let Some(slot) = &*lock(&shared.slot) {
            sampled.wal.sample(float(slot.current_lsn.0), elapsed, 300.0);
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "a rate for a screen")]
fn float(count: u64) -> f64 {
    count as f64
}

/// Looks at the slot every `slotActivityCheckerInterval`; connects again when the connection breaks. Tells `lost` when
/// the slot cannot be streamed on from: in a pause, or while the first copy runs, nothing else would.
pub(super) async fn watch_slot(
    shared: Arc<Shared>,
    server: Server,
    lost: mpsc::Sender<Problem>,
    stop: CancellationToken,
) {
    let config = Arc::clone(&shared.options.config);
    if config.mode() == crate::config::Mode::SnapshotOnly {
        return;
    }
    let interval = config.cdc.slot.activity_checker_interval.max(Duration::from_millis(100));
    let mut client = None;
    let mut warned = false;
    let mut active = false;
    let mut silent = false;
    while !stop.is_cancelled() {
        // Asked before: it may be made meanwhile. One that is being made is not expected; that may fail, and it is dropped again.
        let expected = shared.counters.slot_expected.load(Relaxed);
        let seen = async {
            if client.is_none() {
                client = Some(connect(&config.cdc, "slot monitor").await.map_err(Problem::from)?);
            }
            match &client {
                Some(client) => slot::find(client, &config.cdc.slot.name).await,
                None => Ok(None),
            }
        };
        let seen = tokio::time::timeout(ANSWER.max(2 * interval), seen).await;
        let Ok(seen) = seen else {
            if !std::mem::replace(&mut silent, true) {
                shared.counters.notice(
                    Level::Error,
                    "PostgreSQL takes connections and does not answer: what the screen says of its slot is unknown until it does",
                );
            }
            client = None;
            *lock(&shared.slot) = None;
            continue;
        };
        match seen {
            Ok(info) => {
                if std::mem::take(&mut silent) {
                    shared.counters.notice(Level::Info, "PostgreSQL answers again");
                }
                if let Some(info) = &info {
                    lock(&shared.positions).note(now(), info.current_lsn);
                }
                let endangered = info.as_ref().is_some_and(|info| info.wal_status == "unreserved");
                if endangered && !warned {
                    shared.counters.notice(
                        Level::Error,
                        format!(
                            "slot {} may be lost at the next checkpoint: it keeps more WAL than max_slot_wal_keep_size ({} MiB) allows",
                            config.cdc.slot.name,
                            server.keep_limit().unwrap_or(0) >> 20
                        ),
                    );
                }
                warned = endangered;
                active = info.as_ref().is_some_and(|info| info.active);
                shared.counters.awaited.store(info.as_ref().is_some_and(|info| info.awaited), Relaxed);
                if let Some(problem) = source::lost(&shared, info.as_ref(), expected) {
                    // Told once is enough: it stays so.
                    let _ = lost.try_send(problem);
                }
                *lock(&shared.slot) = info;
            }
            Err(problem) => {
                tracing::debug!(%problem, "slot monitor");
                client = None;
                // What was so before is not known to be so now.
                *lock(&shared.slot) = None;
            }
        }
        // That the stream has begun is worth to be known at once.
        let pause = if active { interval } else { interval.min(Duration::from_millis(250)) };
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Writes the configured heartbeat row, for databases that write nothing else. Its changes are published, not mapped,
/// and acknowledged in turn like all others.
pub(super) async fn heartbeat(shared: Arc<Shared>, heartbeat: Heartbeat, stop: CancellationToken) {
    let table = heartbeat.table.quoted();
    let constraint = quote_identifier(&format!("{}_single_row", heartbeat.table.name));
    let create = format!(
        "CREATE TABLE IF NOT EXISTS {table} (id INTEGER PRIMARY KEY DEFAULT 1, last_heartbeat TIMESTAMPTZ NOT NULL DEFAULT now(),
         CONSTRAINT {constraint} CHECK (id = 1))"
    );
    let beat = format!("INSERT INTO {table} (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET last_heartbeat = now()");
    let mut client = None;
    let mut told = false;
    while !stop.is_cancelled() {
        let beaten = async {
            if client.is_none() {
                let fresh = connect(&shared.options.config.cdc, "heartbeat").await.map_err(Problem::from)?;
                fresh.batch_execute(&create).await?;
                client = Some(fresh);
            }
            match &client {
                Some(client) => client.batch_execute(&beat).await.map_err(Problem::from),
                None => Ok(()),
            }
        };
        let beaten: Result<(), Problem> = beaten.await;
        if let Err(problem) = beaten {
            client = None;
            if !told {
                shared.counters.notice(Level::Warn, format!("heartbeat: {}. {}", problem.message, problem.hint));
                told = true;
            }
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(heartbeat.interval) => {}
        }
    }
}

/// Bytes between two positions; none while one is unknown.
pub(super) fn distance(later: Option<Lsn>, earlier: Option<Lsn>) -> Option<u64> {
    Some(later?.since(earlier?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_its_span_and_nothing_else() {
        let mut average = Average::default();
        average.sample(1_000.0, 0.25, SPAN);
        assert_eq!(average.value(), 0.0, "the first total is no rate");
        average.sample(1_025.0, 0.25, SPAN);
        assert_eq!(average.value(), 100.0, "over the samples there are");
        for n in 2..=400 {
            average.sample(1_000.0 + 25.0 * f64::from(n), 0.25, SPAN);
            assert!((average.value() - 100.0).abs() < 0.1, "{n}: {}", average.value());
            assert!(average.points.len() <= 23, "{n}: {}", average.points.len());
        }
        // Half as much for half a span.
        for n in 1..=20 {
            average.sample(11_000.0 + 12.5 * f64::from(n), 0.25, SPAN);
        }
        assert!((average.value() - 75.0).abs() < 3.0, "{}", average.value());
        for _ in 0..43 {
            average.sample(11_250.0, 0.25, SPAN);
        }
        assert_eq!(average.value(), 0.0, "nothing for a span is nothing");
        // A process that was stopped for an hour.
        average.sample(14_850.0, 3_600.0, SPAN);
        assert!((average.value() - 1.0).abs() < 0.01, "{}", average.value());
        average.sample(0.0, 0.25, SPAN);
        assert_eq!(average.value(), 0.0, "a total that falls is no rate");
    }

    #[test]
    fn a_position_has_the_time_at_which_it_was_written() {
        let mut positions = Positions::default();
        assert_eq!(positions.passed(Lsn(100)), None);
        positions.note(1_000, Lsn(100));
        positions.note(2_000, Lsn(100));
        positions.note(3_000, Lsn(200));
        assert_eq!(positions.passed(Lsn(99)), None, "before the first look");
        assert_eq!(positions.passed(Lsn(100)), Some(2_000));
        assert_eq!(positions.passed(Lsn(150)), Some(2_500));
        assert_eq!(positions.passed(Lsn(900)), Some(3_000));
        for n in 0..10_000_u64 {
            positions.note(3_000 + i64::try_from(n).unwrap_or_default(), Lsn(200 + n));
            assert!(positions.0.len() <= REMEMBERED);
        }
        assert_eq!(positions.passed(Lsn(100)), Some(1_000), "the oldest one stays");
        assert_eq!(positions.passed(Lsn(10_150)), Some(12_950), "the newest stay close");
    }
}
