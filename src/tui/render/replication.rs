//! The replication pane: am I about to fill the primary's disk?
//!
//! ```text
//! ┌─ Replication ───────────────────┐
//! │ behind    58.0 MiB  14.2 s   ▲  │
//! │ ▁▁▁▂▂▃▃▄▄▅▆▅▆▆▇▇██▇▇▆▆▇▇█       │
//! │ WAL kept  3.4 of 50 GiB         │
//! │ █▋░░░░░░░░░░░░░░░░░░░░░░   6.8% │
//! │   full in 3h14m at 4.1 MiB/s    │
//! │ slot      reserved, active      │
//! │ current   2A/943C1F8            │
//! │ confirmed 2A/5A3C1F8            │
//! │ restart   29/2FAA2858           │
//! │ snapshot  held 00:41:12         │
//! │ spilled   0 B                   │
//! └─────────────────────────────────┘
//! ```

use ratatui::layout::Rect;

use crate::engine::{Phase, Replication, Status};
use crate::tui::app::{App, Pane};
use crate::tui::format;
use crate::tui::style::Token;
use crate::tui::text;

use super::{Canvas, Piece, frozen_title, piece};

/// A healthy stream is now and then behind by this many bytes.
const LAG_NOISE: f64 = 1_048_576.0;

/// The WAL kept for the slot, of its limit where there is one.
pub(super) fn wal_kept(replication: &Replication) -> String {
    match (replication.retained_bytes, replication.retained_limit) {
        (Some(kept), Some(limit)) => format::bytes_of(kept, limit),
        (kept, _) => format::bytes_opt(kept),
    }
}

/// How long that may go on. While the stream moves the slot forward it is room; while it stands still it is a deadline.
pub(super) fn outlook(replication: &Replication, phase: Phase) -> (String, Token) {
    if replication.wal_status.as_deref() == Some("lost") {
        return ("slot lost".to_owned(), Token::Bad);
    }
    // Of the process that leads only the slot tells.
    let moving = matches!(phase, Phase::CatchUp | Phase::Streaming)
        || phase == Phase::Standby && replication.active == Some(true);
    if let Some(seconds) = replication.seconds_to_loss {
        let token = match seconds {
            0..3600 => Token::Bad,
            3600..21_600 => Token::Warn,
            _ => Token::Text,
        };
        let text = format!("{} {}", if moving { "room" } else { "full in" }, format::span(seconds));
        return (text, if moving && token == Token::Warn { Token::Text } else { token });
    }
    if replication.safe_bytes.is_some_and(|bytes| bytes <= 0) {
        return ("limit reached!".to_owned(), Token::Bad);
    }
    match (replication.retained_limit, &replication.wal_status, replication.wal_per_second) {
        (Some(_), ..) => ("full in -".to_owned(), Token::Dim),
        (None, Some(_), Some(rate)) => {
            let hour = format::byte_rate(rate * 3600.0).replace("/s", "/h");
            (format!("no limit, +{hour}"), Token::Text)
        }
        (None, Some(_), None) => ("no limit: disk".to_owned(), Token::Text),
        (None, None, _) => (String::new(), Token::Dim),
    }
}

/// What a pause means for the slot, in one line: `3.4 of 50 GiB, full in 3h14m at 4.1 MiB/s`.
pub(in crate::tui) fn headroom(replication: &Replication) -> String {
    let (outlook, _) = outlook(replication, Phase::Paused);
    let kept = wal_kept(replication);
    let kept = if kept == "-" { "how much is not known".to_owned() } else { kept };
    let outlook = if outlook.is_empty() { String::new() } else { format!(", {outlook}") };
    match (replication.wal_per_second, replication.seconds_to_loss) {
        (Some(rate), Some(_)) => format!("{kept}{outlook} at {}", format::byte_rate(rate)),
        _ => format!("{kept}{outlook}"),
    }
}

/// The slot in one or two words, for the header.
pub(in crate::tui) fn slot_word(status: &Status) -> (String, Token) {
    let replication = &status.replication;
    match replication.slot {
        None if status.phase == Phase::Connecting => return ("slot -".to_owned(), Token::Dim),
        None => return ("no slot".to_owned(), Token::Dim),
        Some(_) => {}
    }
    match (replication.wal_status.as_deref(), replication.active) {
        (None, _) => ("slot -".to_owned(), Token::Dim),
        (Some("lost"), _) => ("slot LOST!".to_owned(), Token::Bad),
        (Some("unreserved"), _) => ("slot unreserved!".to_owned(), Token::Bad),
        // A pause lets go of it.
        (Some(_), Some(false)) if status.pause_requested => ("slot inactive, paused".to_owned(), Token::Dim),
        (Some(_), Some(false)) => ("slot inactive".to_owned(), Token::Warn),
        (Some("reserved"), _) => ("slot ok".to_owned(), Token::Ok),
        (Some(other), _) => (text::clean(&format!("slot {other}")), Token::Warn),
    }
}

/// Draws as many of its lines as there is room for.
pub(super) fn draw(canvas: &mut Canvas<'_>, area: Rect, app: &App, shown: &Status, held: Option<u64>) {
    let title = [piece("Replication", Token::Title)];
    let right: Vec<Piece> = frozen_title(held).into_iter().collect();
    let inner = canvas.pane(area, &title, &right, app.focused() == Pane::Replication);
    let width = inner.width.saturating_sub(2);
    let replication = &shown.replication;
    let wide = width >= 45;
    let label = |text: &str| piece(text::left(text, if wide { 12 } else { 10 }), Token::Dim);
    let line = |name: &str, text: String, token: Token| vec![label(name), piece(text, token)];
    let text = |name: &str, text: String| line(name, text, Token::Text);

    // What is not behind does not rise, whatever it did within the last half minute.
    let trend = app.lag.trend(LAG_NOISE).filter(|_| replication.lag_bytes.is_some_and(|lag| lag > 0));
    let (arrow, token) = match trend {
        Some(1) => ("▲ rising", Token::Warn),
        Some(-1) => ("▼ falling", Token::Ok),
        Some(_) => ("= steady", Token::Dim),
        None => ("", Token::Dim),
    };
    let arrow = if wide { arrow } else { arrow.split(' ').next().unwrap_or_default() };
    let mut lines = vec![vec![
        label("behind"),
        piece(text::left(&format::bytes_opt(replication.lag_bytes), if wide { 12 } else { 10 }), Token::Text),
        piece(text::left(&format::seconds(replication.lag_seconds), if wide { 9 } else { 8 }), Token::Text),
        piece(arrow, token),
    ]];
    let cells = usize::from(width).min(60).saturating_sub(if wide { 8 } else { 6 });
    lines.push(vec![piece(format::sparkline(&app.lag.newest(cells)), Token::Accent)]);
    lines.push(text("WAL kept", wal_kept(replication)));
    let (outlook, token) = outlook(replication, shown.phase);
    if let (Some(kept), Some(limit)) = (replication.retained_bytes, replication.retained_limit) {
        let share = format::as_f64(kept) / format::as_f64(limit.max(1));
        let bar = format::bar(share, usize::from(width).saturating_sub(8));
        let bar_token = if token == Token::Text { Token::Accent } else { token };
        lines.push(vec![piece(bar, bar_token), piece(text::right(&format::percent(Some(share)), 7), Token::Text)]);
    }
    let rate = replication.wal_per_second.map(|rate| format!(" at {}", format::byte_rate(rate))).unwrap_or_default();
    let rate = if replication.seconds_to_loss.is_some() { rate } else { String::new() };
    lines.push(vec![piece(format!("  {outlook}{rate}"), token)]);
    if wide {
        lines.push(Vec::new());
    }

    let (word, token) = slot_word(shown);
    let slot = match (&replication.slot, &replication.wal_status) {
        (Some(_), Some(status)) => {
            let active = match replication.active {
                Some(true) => ", active",
                Some(false) if wide && shown.pause_requested => ", inactive, paused",
                Some(false) => ", inactive",
                None => "",
            };
            format!("{}{active}", text::clean(status))
        }
        (Some(_), None) => format::unknown(),
        (None, _) if shown.phase == Phase::Connecting => format::unknown(),
        (None, _) => "none".to_owned(),
    };
    let loud = if matches!(token, Token::Bad) && !word.is_empty() { "!" } else { "" };
    let pid = replication.active_pid.filter(|_| wide).map(|pid| format!(", pid {pid}")).unwrap_or_default();
    lines.push(line("slot", format!("{slot}{loud}{pid}"), if token == Token::Ok { Token::Text } else { token }));
    lines.push(text("current", format::lsn(replication.current_lsn)));
    if wide {
        lines.push(text("received", format::lsn(replication.received_lsn)));
    }
    lines.push(text("confirmed", format::lsn(replication.confirmed_lsn)));
    lines.push(text("restart", format::lsn(replication.restart_lsn)));
    let held = shown.snapshot.held_seconds.map(|seconds| format::clock_span(whole(seconds)));
    let (held, token) = match held {
        Some(held) if wide => (format!("held {held}, VACUUM waits for it"), Token::Warn),
        Some(held) => (format!("held {held}"), Token::Warn),
        None if shown.phase == Phase::Standby => (format::unknown(), Token::Dim),
        None => ("not held".to_owned(), Token::Dim),
    };
    lines.push(line("snapshot", held, token));
    lines.push(text("spilled", format::bytes_opt(replication.spilled_bytes)));
    if wide {
        let name = |name: &Option<String>| name.as_deref().map_or_else(format::unknown, text::clean);
        lines.push(text(
            "changes",
            format!("{} in {} transactions", format::rows(replication.changes), format::rows(replication.transactions)),
        ));
        lines.push(text("slot name", name(&replication.slot)));
        lines.push(text("publication", name(&replication.publication)));
        lines.push(text("reconnects", replication.reconnects.to_string()));
    }
    for (y, line) in (inner.y..inner.bottom()).zip(&lines) {
        canvas.pieces(inner.x + 1, y, width, line);
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative; `as` saturates and NaN is 0")]
fn whole(seconds: f64) -> u64 {
    seconds.max(0.0) as u64
}
