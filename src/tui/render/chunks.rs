//! The chunks of the selected table: where in the table, and what is stuck?
//!
//! ```text
//! ┌─ Chunks: orders  1590/1920 ─────────────────────── 4 workers, 5,000 rows a chunk ─┐
//! │ ████████████████████████████████████████████████████████████████████████████████  │
//! │ ███████████████████████████████████████████████████████████████████████!██████▒▒  │
//! │ ▒·▒·············································································  │
//! │                                                                                   │
//! │ 1 cell = 4 chunks   █ done  ▒ copying  ! retrying  · waiting                      │
//! └───────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Of the chunks that share a cell, the worst off gives it its look.

use ratatui::layout::Rect;

use crate::engine::{ChunkState, Status, TableState, TableStatus};
use crate::tui::app::{App, Pane, short_name};
use crate::tui::format;
use crate::tui::style::Token;
use crate::tui::text;

use super::tables::{state_token, state_word};
use super::{Canvas, frozen_title, piece};

/// Draws the grid, and below it what else there is to say of the table if there is room.
pub(super) fn draw(canvas: &mut Canvas<'_>, area: Rect, app: &mut App, shown: &Status, held: Option<u64>) {
    let focused = app.focused() == Pane::Chunks;
    let table = app.selected_table(shown).map(|at| &shown.tables[at]);
    let mut title = vec![piece("Chunks", Token::Title)];
    if let Some(table) = table {
        title.push(piece(format!(": {}", text::clean(&short_name(&table.table.0))), Token::Title));
        if !table.chunks.is_empty() {
            let (done, all) = (table.chunks.done() as u64, table.chunks.len() as u64);
            title.push(piece(format!("  {}/{}", format::count(done), format::count(all)), Token::Text));
        }
    }
    let mut right = Vec::new();
    if let Some(frozen) = frozen_title(held) {
        right.extend([frozen, piece("   ", Token::Dim)]);
    }
    let snapshot = &shown.snapshot;
    if let Some(table) = table.filter(|table| !table.chunks.is_empty()) {
        let workers = match (snapshot.active_workers, snapshot.workers) {
            (active, all) if active == all => format!("{all} workers"),
            (active, all) => format!("{active} of {all} workers"),
        };
        let workers = if snapshot.running { format!("{workers}, ") } else { String::new() };
        right.push(piece(format!("{workers}{} rows a chunk", format::count(table.chunk_rows)), Token::Dim));
    }
    let inner = canvas.pane(area, &title, &right, focused);
    let (x, width) = (inner.x + 1, inner.width.saturating_sub(2));
    let Some(table) = table else {
        canvas.put(x, inner.y, width, "no table", Token::Dim);
        return;
    };
    // On its own screen, the pane has room for the table's figures.
    let details = if inner.height >= 14 { details(table, shown) } else { Vec::new() };
    let below = u16::try_from(details.len()).unwrap_or(0);
    if table.chunks.is_empty() {
        let text = match table.state {
            TableState::Queued => "not planned yet: the copy of this table has not begun",
            TableState::CatchUp | TableState::Live | TableState::Standby => {
                "no chunks: its copy ended before this start"
            }
            _ => "not planned yet",
        };
        canvas.put(x, inner.y, width, text, Token::Dim);
    } else {
        grid(canvas, Rect { x, width, height: inner.height.saturating_sub(below), ..inner }, table);
    }
    for (y, (label, text, token)) in (inner.bottom().saturating_sub(below)..inner.bottom()).zip(&details) {
        let at = canvas.put(x, y, 12, &text::left(label, 12), Token::Dim);
        canvas.put(at, y, (x + width).saturating_sub(at), text, *token);
    }
}

fn details(table: &TableStatus, shown: &Status) -> Vec<(&'static str, String, Token)> {
    let total = match table.rows_total {
        Some(total) if table.rows_total_exact => format::rows(total),
        Some(total) => format::rows_about(total),
        None => format::unknown(),
    };
    let mut lines = vec![
        ("", String::new(), Token::Text),
        ("state", state_word(table), state_token(table.state)),
        (
            "rows",
            format!(
                "{} of {total}   {}   {} row/s   ETA {}",
                format::rows(table.rows_done),
                format::percent(table.progress()),
                format::rate(table.rows_per_second),
                format::eta(table.eta)
            ),
            Token::Text,
        ),
        ("index", text::clean(&table.index), Token::Text),
        (
            "streamed",
            format!(
                "INSERT {}   UPDATE {}   DELETE {}   TRUNCATE {}",
                format::rows(table.inserts),
                format::rows(table.updates),
                format::rows(table.deletes),
                format::rows(table.truncates)
            ),
            Token::Text,
        ),
        ("rejected", format::errors(table.errors), if table.errors > 0 { Token::Bad } else { Token::Text }),
    ];
    if let Some(seconds) = shown.snapshot.held_seconds {
        let held = format::seconds(Some(seconds));
        lines.push(("snapshot", format!("held for {held}: VACUUM keeps what it can see"), Token::Warn));
    }
    if let Some(problem) = &table.problem {
        lines.push(("problem", format!("!{}", text::clean(&problem.message)), Token::Bad));
        lines.push(("what to do", text::clean(&problem.hint), Token::Text));
    }
    lines
}

/// The worst off of a cell's chunks.
fn worst(states: impl Iterator<Item = ChunkState>) -> ChunkState {
    let rank = |state: &ChunkState| match state {
        ChunkState::Done => 0,
        ChunkState::Pending => 1,
        ChunkState::Claimed => 2,
        ChunkState::Retrying => 3,
    };
    states.max_by_key(rank).unwrap_or(ChunkState::Pending)
}

fn grid(canvas: &mut Canvas<'_>, area: Rect, table: &TableStatus) {
    let legend = area.height >= 3;
    let rows = if legend { area.height - 2 } else { area.height };
    // Whole tens are easy to count.
    let across = if area.width >= 20 { area.width / 10 * 10 } else { area.width };
    let cells = usize::from(across) * usize::from(rows);
    if cells == 0 {
        return;
    }
    let each = table.chunks.len().div_ceil(cells).max(1);
    for (at, chunks) in table.chunks.0.chunks(each).enumerate() {
        let state = worst(chunks.iter().map(|&byte| ChunkState::from_byte(byte)));
        let (glyph, token) = match state {
            ChunkState::Done => ("█", Token::Ok),
            ChunkState::Claimed => ("▒", Token::Busy),
            ChunkState::Retrying => ("!", Token::Bad),
            ChunkState::Pending => ("·", Token::Dim),
        };
        let (row, column) = (at / usize::from(across), at % usize::from(across));
        let (Ok(row), Ok(column)) = (u16::try_from(row), u16::try_from(column)) else { return };
        canvas.put(area.x + column, area.y.saturating_add(row), 1, glyph, token);
    }
    if legend {
        let each = if each == 1 {
            "1 cell = 1 chunk   ".to_owned()
        } else {
            format!("1 cell = {} chunks   ", format::count(each as u64))
        };
        let legend = [
            piece(each, Token::Dim),
            piece("█", Token::Ok),
            piece(" done  ", Token::Dim),
            piece("▒", Token::Busy),
            piece(" copying  ", Token::Dim),
            piece("!", Token::Bad),
            piece(" retrying  ", Token::Dim),
            piece("· waiting", Token::Dim),
        ];
        canvas.pieces(area.x, area.bottom().saturating_sub(1), area.width, &legend);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_state_wins_the_cell() {
        let worst = |text: &str| worst(text.bytes().map(ChunkState::from_byte));
        assert_eq!(worst("dddd"), ChunkState::Done);
        assert_eq!(worst("dpd"), ChunkState::Pending);
        assert_eq!(worst("dpc"), ChunkState::Claimed);
        assert_eq!(worst("crpd"), ChunkState::Retrying);
        assert_eq!(worst(""), ChunkState::Pending);
    }
}
