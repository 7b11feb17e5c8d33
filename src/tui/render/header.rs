//! The header: is it working, when does it end, is it safe to leave?
//!
//! ```text
//!  NAME  shop@pg-prod:5432 > es-a:9200           BACKFILL  20.3%   ETA ~03:35:00
//!  lag 58.0 MiB  14.2 s  ▁▂▂▃▅▇   WAL kept 3.4 of 50 GiB, full in 3h14m   slot ok
//!  in 118.4k row/s   out 117.9k doc/s   bulk p99 412 ms   429: 3/s   rejected 17!
//! ```
//!
//! Where the replication pane is in sight, the second line is left to it.

use ratatui::layout::Rect;

use crate::engine::{Phase, Status, TableState};
use crate::tui::app::App;
use crate::tui::format;
use crate::tui::style::Token;
use crate::tui::text;

use super::replication::{outlook, slot_word, wal_kept};
use super::{Canvas, Piece, columns, piece};

/// Draws two or three lines, as `area` has them. `status` is the live one, frozen or not.
pub(super) fn draw(canvas: &mut Canvas<'_>, area: Rect, app: &App, status: &Status) {
    first(canvas, area, app, status);
    if area.height > 2 {
        lag(canvas, area, app, status);
        flow(canvas, Rect { y: area.y + 2, ..area }, status);
    } else {
        flow(canvas, Rect { y: area.y + 1, ..area }, status);
    }
}

/// How a phase looks.
pub(super) fn phase_token(phase: Phase) -> Token {
    match phase {
        Phase::Streaming => Token::Ok,
        Phase::Connecting | Phase::Snapshot | Phase::CatchUp | Phase::Standby => Token::Busy,
        Phase::Pausing | Phase::Paused | Phase::Degraded | Phase::Stopping => Token::Warn,
        Phase::Failed => Token::Bad,
        Phase::Stopped => Token::Dim,
    }
}

/// The share of all rows that are copied; none while a table's size is not known, and 1 only when every copy has ended.
pub(super) fn overall(status: &Status) -> Option<f64> {
    if status.tables.is_empty() {
        return None;
    }
    let (mut done, mut total, mut all) = (0.0, 0.0, true);
    for table in &status.tables {
        let share = table.progress();
        let ended = share == Some(1.0);
        all &= ended;
        let rows = match table.rows_total {
            Some(rows) => format::as_f64(rows.max(table.rows_done)),
            None if ended => format::as_f64(table.rows_done),
            None => return None,
        };
        total += rows;
        done += share.unwrap_or(0.0) * rows;
    }
    if all {
        Some(1.0)
    } else if total > 0.0 {
        Some((done / total).clamp(0.0, 0.999))
    } else {
        Some(0.0)
    }
}

/// A copy runs or is still to come, so that a percentage and a time to its end mean something.
fn copying(status: &Status) -> bool {
    status.snapshot.running
        || status.phase == Phase::Snapshot
        || status.tables.iter().any(|table| matches!(table.state, TableState::Copying | TableState::Retrying))
}

fn phase_pieces(app: &App, status: &Status) -> Vec<Piece> {
    let phase = status.phase;
    let token = phase_token(phase);
    let held = format::clock_span(format::seconds_since(status.phase_since, status.at));
    let mut pieces = vec![piece(phase.word(), token)];
    // The other phases of a pause say so themselves.
    let held_back = phase == Phase::Degraded && status.pause_requested;
    if held_back {
        pieces.push(piece(", paused", token));
    }
    match phase {
        Phase::Connecting | Phase::Pausing | Phase::Paused | Phase::Stopping => {
            pieces.push(piece(format!(" {held}"), token))
        }
        Phase::Degraded => pieces.push(piece(format!(" attempt {}", status.attempts), token)),
        _ => {}
    }
    if app.stopping.is_some() && !matches!(phase, Phase::Stopping | Phase::Stopped | Phase::Failed) {
        pieces.push(piece(" stop requested", Token::Warn));
    } else if copying(status)
        && !held_back
        && !matches!(phase, Phase::Failed | Phase::Stopped | Phase::Stopping | Phase::Connecting)
    {
        let share = overall(status);
        pieces.push(piece(format!("  {}", format::percent(share)), Token::Text));
        // When the last chunk is done, only what has no row any more is left to remove, and nobody knows how long that takes.
        if share != Some(1.0) && !matches!(phase, Phase::Paused | Phase::Pausing | Phase::Degraded) {
            pieces.push(piece(format!("   ETA {}", format::eta(status.snapshot.eta)), Token::Text));
        }
    }
    pieces
}

fn first(canvas: &mut Canvas<'_>, area: Rect, app: &App, status: &Status) {
    let at = |from_right: u16| area.right().saturating_sub(from_right);
    let up = || format!("up {}", format::clock_span(format::seconds_since(status.started_at, status.at)));
    let (phase_x, tail) = if area.width >= 180 {
        let tail = format!(
            "started {}   {}      {} UTC",
            format::moment(status.started_at, status.at),
            up(),
            format::time(status.at)
        );
        (at(103), tail)
    } else if area.width >= 110 {
        (at(51), up())
    } else {
        (at(33), String::new())
    };
    let pieces = phase_pieces(app, status);
    let mut end = canvas.pieces(phase_x, area.y, area.right().saturating_sub(phase_x), &pieces);
    if !tail.is_empty() {
        end = end.max(phase_x + 31) + 3;
        canvas.put(end, area.y, area.right().saturating_sub(end), &tail, Token::Dim);
    }
    let mut left_end = phase_x.saturating_sub(1);
    if app.read_only(status) {
        left_end = left_end.saturating_sub(3);
        canvas.put(left_end + 1, area.y, 2, "RO", Token::Warn);
    }

    let x = canvas.put(area.x + 1, area.y, left_end.saturating_sub(1).min(16), &app.name, Token::Title) + 2;
    let source = &status.source;
    let long = area.width >= 110;
    let version = |text: Option<String>| text.filter(|_| long).map(|text| format!(" ({text})")).unwrap_or_default();
    let mut pieces = vec![
        piece(text::clean(&format!("{}@{}:{}", source.database, source.host, source.port)), Token::Text),
        piece(version(source.version.as_ref().map(|version| text::clean(&format!("PG {version}")))), Token::Dim),
        piece(" > ", Token::Dim),
    ];
    let url = &status.sink.url;
    let host = url.split_once("://").map_or(url.as_str(), |(_, rest)| rest).trim_end_matches('/');
    pieces.push(piece(text::clean(host), Token::Text));
    let sink = match (&status.sink.distribution, &status.sink.version) {
        (Some(name), Some(version)) => Some(format!("{name} {version}")),
        (Some(text), None) | (None, Some(text)) => Some(text.clone()),
        (None, None) => None,
    };
    pieces.push(piece(version(sink.map(|text| text::clean(&text))), Token::Dim));
    if status.source.host.is_empty() {
        pieces = vec![piece("-", Token::Dim)];
    }
    canvas.pieces(x, area.y, left_end.saturating_sub(x), &pieces);
}

fn lag(canvas: &mut Canvas<'_>, area: Rect, app: &App, status: &Status) {
    let y = area.y + 1;
    let replication = &status.replication;
    let line = [
        piece(" lag ", Token::Dim),
        piece(text::left(&format::bytes_opt(replication.lag_bytes), 8), Token::Text),
        piece("  ", Token::Text),
        piece(text::left(&format::seconds(replication.lag_seconds), 6), Token::Text),
        piece("  ", Token::Text),
    ];
    canvas.pieces(area.x, y, area.width, &line);
    // Below 80 columns the line of bars goes first, then a slot that is well.
    let mut x = area.x + 23;
    if area.width >= 80 {
        canvas.put(x, y, 6, &format::sparkline(&app.lag.newest(6)), Token::Accent);
        x += 8;
    }
    let kept = wal_kept(replication);
    let (outlook, token) = outlook(replication, status.phase);
    let outlook = if outlook.is_empty() { String::new() } else { format!(", {outlook}") };
    let mut wanted = columns(&kept) + columns(&outlook) + 5;
    let (slot, slot_token) = slot_word(status);
    let mut end = area.right().saturating_sub(2);
    let fits = x + wanted + columns(&slot) <= end;
    // A slot that will be lost matters more than one that is inactive.
    let deadline = replication.seconds_to_loss.is_some();
    if fits || slot_token == Token::Bad || (slot_token == Token::Warn && !deadline) {
        end = canvas.put_right(end, y, &slot, slot_token);
    }
    let room = end.saturating_sub(x + 1);
    // Whole or not at all: `+96.5 MiB…` would read as a size.
    let mut outlook = outlook;
    if wanted > room + 1 {
        wanted -= columns(&outlook);
        outlook.clear();
    }
    let label = if wanted + 4 <= room { "WAL kept " } else { "WAL " };
    canvas.pieces(x, y, room, &[piece(label, Token::Dim), piece(kept, Token::Text), piece(outlook, token)]);
}

fn flow(canvas: &mut Canvas<'_>, area: Rect, status: &Status) {
    let (x, y) = (area.x, area.y);
    let rates = &status.rates;
    let sink = &status.sink;
    let read = rates.snapshot + rates.insert + rates.update + rates.delete;
    let rejected_token = if sink.rejected > 0 { Token::Bad } else { Token::Text };
    let throttle_token = if sink.throttled_per_second > 0.0 { Token::Warn } else { Token::Text };
    let mut pieces = vec![
        piece(" in ", Token::Dim),
        piece(text::right(&format::rate(read), 6), Token::Text),
        piece(" row/s   out ", Token::Dim),
        piece(text::right(&format::rate(sink.documents_per_second), 6), Token::Text),
        piece(" doc/s   ", Token::Dim),
    ];
    let latencies = sink.latency.as_ref().map(|latency| format::latencies([latency.p50, latency.p95, latency.p99]));
    let ([p50, p95, p99], unit) = latencies.unwrap_or_else(|| ([(); 3].map(|()| format::unknown()), "ms"));
    let throttled = format!("{}/s", format::rate(sink.throttled_per_second));
    if area.width >= 110 {
        let rejected =
            if sink.rejected > 0 { format!("{}!", format::short_count(sink.rejected)) } else { "0".to_owned() };
        let big = area.width >= 180;
        pieces.extend([
            piece(text::right(&format::byte_rate(sink.bytes_per_second), 10), Token::Text),
            piece("   bulk p50 ", Token::Dim),
            piece(p50, Token::Text),
        ]);
        if big {
            pieces.extend([piece(" p95 ", Token::Dim), piece(p95, Token::Text)]);
        }
        pieces.extend([
            piece(" p99 ", Token::Dim),
            piece(format!("{p99} {unit}"), Token::Text),
            piece("   429: ", Token::Dim),
            piece(throttled, throttle_token),
        ]);
        pieces.extend([
            piece("   rejected ", if sink.rejected > 0 { Token::Bad } else { Token::Dim }),
            piece(rejected, rejected_token),
            piece("   queue ", Token::Dim),
            piece(format::rows(sink.queued_documents), Token::Text),
        ]);
        if big {
            pieces.extend([
                piece("   retried ", Token::Dim),
                piece(format::short_count(sink.retried), Token::Text),
                piece("   memory ", Token::Dim),
                piece(format::bytes_opt(status.memory), Token::Text),
            ]);
        }
        canvas.pieces(x, y, area.width, &pieces);
        return;
    }
    // The rejected documents have their place on the right; the rest takes what is left.
    let rejected = text::left(&format::errors(sink.rejected), 4);
    let end = canvas.put_right(area.right(), y, &rejected, rejected_token);
    let end = canvas.put_right(end, y, "rejected ", if sink.rejected > 0 { Token::Bad } else { Token::Dim });
    for (label, text, token) in
        [("bulk p99 ", text::left(&format!("{p99} {unit}"), 9), Token::Text), ("429: ", throttled, throttle_token)]
    {
        let taken: u16 = pieces.iter().map(|(text, _)| columns(text)).sum();
        if taken + columns(label) + columns(text.trim_end()) < end.saturating_sub(x) {
            pieces.extend([piece(label, Token::Dim), piece(text, token)]);
        }
    }
    canvas.pieces(x, y, end.saturating_sub(x + 1), &pieces);
}
