//! The boxes above the panes.
//!
//! ```text
//! ┌─ Resnapshot public.orders ───────────────────────────────────────┐
//! │ Copies 9.60 M rows again while the stream goes on.               │
//! │ The index orders-v1 stays readable; documents whose rows are     │
//! │ gone are removed at the end. A temporary slot is used for a      │
//! │ moment. WAL kept now: 3.4 of 50 GiB.                             │
//! │                                                                  │
//! │ Type the table name to go on: ord_                               │
//! │                                                                  │
//! │                  [ Cancel ]     Resnapshot                       │
//! └──────────────────────────────────────────────────────────────────┘
//! ```

use ratatui::layout::Rect;

use crate::engine::{Phase, Status};
use crate::table::TableId;
use crate::tui::app::{App, Dialog};
use crate::tui::format;
use crate::tui::style::Token;

use super::replication::wal_kept;
use super::{Canvas, Piece, columns, help, piece};

/// Draws what lies above the panes: an open dialog, else the box of a stop or of a failure.
pub(super) fn draw(canvas: &mut Canvas<'_>, area: Rect, app: &mut App, status: &Status) {
    match app.dialog.take() {
        None if status.phase == Phase::Failed && !app.failure_seen => failed(canvas, area, status),
        None if status.phase == Phase::Stopping || (app.stopping.is_some() && status.phase != Phase::Failed) => {
            stopping(canvas, area, status);
        }
        None => {}
        Some(Dialog::Quit { stop }) => {
            quit(canvas, area, status, stop);
            app.dialog = Some(Dialog::Quit { stop });
        }
        Some(Dialog::Help { scroll }) => {
            let lines = help::lines(app, status);
            let scroll = scrolled(canvas, area, "Help", &lines, scroll);
            app.dialog = Some(Dialog::Help { scroll });
        }
        Some(Dialog::Detail { title, lines, scroll }) => {
            let text = detail(&lines, usize::from(width(area, 100)).saturating_sub(4));
            let scroll = scrolled(canvas, area, &title, &text, scroll);
            app.dialog = Some(Dialog::Detail { title, lines, scroll });
        }
        Some(Dialog::Resnapshot { table, typed, go, wrong }) => {
            resnapshot(canvas, area, status, (&table, &typed, go, wrong));
            app.dialog = Some(Dialog::Resnapshot { table, typed, go, wrong });
        }
        // These two have the status line.
        dialog @ Some(Dialog::Ask { .. } | Dialog::Filter { .. }) => app.dialog = dialog,
    }
}

fn width(area: Rect, wanted: u16) -> u16 {
    wanted.min(area.width.saturating_sub(4))
}

/// A box of at most `wanted` columns in the middle, for `lines` lines; gives what lies within.
fn frame(canvas: &mut Canvas<'_>, area: Rect, title: &[Piece], wanted: u16, lines: usize) -> Rect {
    let width = width(area, wanted);
    let height = u16::try_from(lines).unwrap_or(u16::MAX).saturating_add(2).min(area.height.saturating_sub(3));
    let place = Rect {
        x: area.x + (area.width.saturating_sub(width)) / 2,
        y: area.y + (area.height.saturating_sub(height)) / 2,
        width,
        height,
    };
    canvas.blank(place);
    canvas.pane(place, title, &[], true)
}

fn write(canvas: &mut Canvas<'_>, inner: Rect, lines: &[Vec<Piece>]) {
    for (y, line) in (inner.y..inner.bottom()).zip(lines) {
        canvas.pieces(inner.x + 1, y, inner.width.saturating_sub(2), line);
    }
}

fn wrapped(text: &str, width: usize, token: Token) -> Vec<Vec<Piece>> {
    format::wrap(&format::clean(text), width).into_iter().map(|line| vec![piece(line, token)]).collect()
}

/// The width of the text in the boxes below.
const BOX: u16 = 68;

fn box_text(area: Rect) -> usize {
    usize::from(width(area, BOX).saturating_sub(4))
}

fn scrolled(canvas: &mut Canvas<'_>, area: Rect, title: &str, lines: &[Vec<Piece>], scroll: usize) -> usize {
    let inner = frame(canvas, area, &[piece(format::clean(title), Token::Title)], 100, lines.len());
    let rows = usize::from(inner.height);
    let scroll = scroll.min(lines.len().saturating_sub(rows));
    write(canvas, inner, lines.get(scroll..).unwrap_or_default());
    if lines.len() > rows {
        let text = format!(" {}-{} of {} ", scroll + 1, (scroll + rows).min(lines.len()), lines.len());
        canvas.put_right(inner.right().saturating_sub(1), inner.bottom(), &text, Token::Dim);
    }
    scroll
}

fn detail(lines: &[(String, String)], width: usize) -> Vec<Vec<Piece>> {
    let label = lines.iter().map(|(label, _)| label.len()).max().unwrap_or(0) + 2;
    let mut text = Vec::new();
    for (name, value) in lines {
        let mut name = format::left(name, label);
        for line in format::wrap(&format::clean(value), width.saturating_sub(label)) {
            text.push(vec![piece(name, Token::Dim), piece(line, Token::Text)]);
            name = " ".repeat(label);
        }
    }
    text
}

/// Two buttons; the one that Enter takes stands in brackets and is reversed.
fn buttons(canvas: &mut Canvas<'_>, inner: Rect, y: u16, names: [&str; 2], second: bool) {
    let text = |name: &str, chosen: bool| if chosen { format!("[ {name} ]") } else { format!("  {name}  ") };
    let (first_text, second_text) = (text(names[0], !second), text(names[1], second));
    let total = columns(&first_text) + columns(&second_text) + 3;
    let x = inner.x + inner.width.saturating_sub(total) / 2;
    for (x, text, chosen) in [(x, &first_text, !second), (x + columns(&first_text) + 3, &second_text, second)] {
        let end =
            canvas.put(x, y, inner.right().saturating_sub(x), text, if chosen { Token::Title } else { Token::Dim });
        if chosen {
            canvas.select(Rect { x, y, width: end.saturating_sub(x), height: 1 });
        }
    }
}

/// Draws a text and, on the last line within, two buttons.
fn with_buttons(
    canvas: &mut Canvas<'_>,
    area: Rect,
    title: &[Piece],
    mut lines: Vec<Vec<Piece>>,
    names: [&str; 2],
    second: bool,
) {
    // A box that does not fit loses blank lines first: the buttons must be seen.
    let room = usize::from(area.height.saturating_sub(5));
    while lines.len() + 2 > room && lines.iter().any(Vec::is_empty) {
        let blank = lines.iter().rposition(Vec::is_empty).unwrap_or(0);
        lines.remove(blank);
    }
    let inner = frame(canvas, area, title, BOX, lines.len() + 2);
    write(canvas, Rect { height: inner.height.saturating_sub(1), ..inner }, &lines);
    buttons(canvas, inner, inner.bottom().saturating_sub(1), names, second);
}

fn quit(canvas: &mut Canvas<'_>, area: Rect, status: &Status, stop: bool) {
    let on_their_way = waits_for(status);
    let text = format!("Stops reading, waits for {on_their_way}, acknowledges what is answered for and ends.");
    let mut lines = wrapped(&text, box_text(area), Token::Text);
    let kept = "The next start goes on from there. Until then the slot keeps WAL.";
    if status.replication.slot.is_some() {
        lines.extend(wrapped(kept, box_text(area), Token::Text));
    }
    with_buttons(canvas, area, &[piece("Quit", Token::Title)], lines, ["Cancel", "Stop and checkpoint"], stop);
}

/// What a stop waits for.
fn waits_for(status: &Status) -> String {
    let bulks = status.sink.in_flight;
    match (bulks, status.sink.queued_documents) {
        (0, 0) => "nothing (no request is on its way)".to_owned(),
        (bulks, documents) => {
            let plural = if bulks == 1 { "" } else { "s" };
            format!("{bulks} bulk request{plural} ({} documents)", format::rows(documents))
        }
    }
}

fn stopping(canvas: &mut Canvas<'_>, area: Rect, status: &Status) {
    let text = format!("Waits for {}, then acknowledges what is answered for.", waits_for(status));
    let mut lines = wrapped(&text, box_text(area), Token::Text);
    let force = "Ctrl-C twice leaves at once: the next start then sends some of it again, and loses nothing.";
    lines.extend(wrapped(force, box_text(area), Token::Dim));
    let inner = frame(canvas, area, &[piece("STOPPING", Token::Warn)], BOX, lines.len());
    write(canvas, inner, &lines);
}

fn failed(canvas: &mut Canvas<'_>, area: Rect, status: &Status) {
    let mut lines = Vec::new();
    if let Some(problem) = &status.problem {
        lines.extend(wrapped(&format!("! {}", problem.message), box_text(area), Token::Bad));
        lines.push(Vec::new());
        lines.extend(wrapped(&problem.hint, box_text(area), Token::Text));
    } else {
        lines.extend(wrapped("! No reason was given: see the log (6).", box_text(area), Token::Bad));
    }
    lines.push(Vec::new());
    lines.extend(wrapped("Nothing is acknowledged any more.", box_text(area), Token::Text));
    lines.push(vec![piece("q: quit   Esc: close this box and look at the panes", Token::Dim)]);
    let inner = frame(canvas, area, &[piece("FAILED", Token::Bad)], BOX, lines.len());
    write(canvas, inner, &lines);
}

fn resnapshot(canvas: &mut Canvas<'_>, area: Rect, status: &Status, dialog: (&TableId, &str, bool, bool)) {
    let (id, typed, go, wrong) = dialog;
    let title = [piece(format!("Resnapshot {}", format::clean(&id.to_string())), Token::Title)];
    let text_width = box_text(area);
    let mut lines = Vec::new();
    match status.tables.iter().find(|table| table.table.0 == *id) {
        Some(table) => {
            let rows = match table.rows_total {
                Some(rows) if table.rows_total_exact => format!("{} rows", format::rows(rows)),
                Some(rows) => format!("{} rows", format::rows_about(rows)),
                None => "all its rows".to_owned(),
            };
            let text = format!(
                "Copies {rows} again while the stream goes on. The index {} stays readable; documents whose rows are \
                 gone are removed at the end. A temporary slot is used for a moment. WAL kept now: {}.",
                format::clean(&table.index),
                wal_kept(&status.replication)
            );
            lines.extend(wrapped(&text, text_width, Token::Text));
        }
        None => lines.extend(wrapped("This table is not in the status any more.", text_width, Token::Warn)),
    }
    lines.push(Vec::new());
    let ask = "Type the table name to go on: ";
    let room = text_width.saturating_sub(ask.len() + 1);
    // The end of what is typed stays in sight.
    let mut shown: String = format::clean(typed);
    while usize::from(columns(&shown)) > room {
        shown.remove(0);
    }
    lines.push(vec![piece(ask, Token::Text), piece(format!("{shown}_"), Token::Title)]);
    if wrong {
        lines.push(vec![piece("! That is not its name. Nothing was sent.", Token::Bad)]);
    } else {
        lines.push(Vec::new());
    }
    with_buttons(canvas, area, &title, lines, ["Cancel", "Resnapshot"], go);
}
