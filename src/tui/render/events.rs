//! The events: does this row arrive? Newest first.
//!
//! ```text
//! ┌─ Events 119.6k/s, showing 1 in 2,000 ──────────────────────────── following ─┐
//! │ 10:32:07.412 SNAPSHOT order_items  chunk 4019/9500 5,000 rows  38 ms         │
//! │ 10:32:07.409 UPDATE   customers    id=88213    2A/5A3C1F8   0.31 s           │
//! │ 10:32:07.391 !REJECT  order_items  id=77120    mapper_parsing [qty]          │
//! └──────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! From 110 columns on with the transaction and with the counts of each operation in the title.

use ratatui::layout::Rect;

use crate::engine::{Event, EventKind, Status};
use crate::tui::app::{App, Pane, event_table, event_word};
use crate::tui::format;
use crate::tui::style::Token;

use super::{Canvas, Piece, columns, frozen_title, piece};

/// What the right side of a list's title says of its newest line.
pub(super) fn follow_title(follow: bool, held: Option<u64>) -> Piece {
    frozen_title(held).unwrap_or_else(|| {
        if follow { piece("following", Token::Dim) } else { piece("staying, F follows", Token::Warn) }
    })
}

/// Draws the newest events, or those around the chosen one.
pub(super) fn draw(canvas: &mut Canvas<'_>, area: Rect, app: &mut App, shown: &Status, held: Option<u64>) {
    let focused = app.focused() == Pane::Events;
    let mut right = vec![follow_title(app.events.follow, held)];
    if !app.events.filter.is_empty() {
        right.insert(0, piece(format!("filter: {}   ", app.events.filter.word()), Token::Warn));
    }
    let inner = canvas.pane(area, &title(area.width, shown), &right, focused);
    if inner.height == 0 {
        return;
    }
    let order = app.event_order(shown);
    let selected = App::newest_first(&app.events, order.iter().map(|&at| shown.events[at].seq));
    let start = app.events.window(selected, order.len(), inner.height.into());
    if order.is_empty() {
        let text = if shown.events.is_empty() { "no events yet" } else { "no event matches the filter: Esc clears it" };
        canvas.put(inner.x + 1, inner.y, inner.width.saturating_sub(2), text, Token::Dim);
    }
    for (y, (at, &index)) in (inner.y..inner.bottom()).zip(order.iter().enumerate().skip(start)) {
        line(canvas, Rect { y, height: 1, ..inner }, &shown.events[index], shown, app.ages);
        if at == selected && focused && !app.events.follow {
            canvas.put(inner.x, y, 1, ">", Token::Title);
            canvas.select(Rect { y, height: 1, ..inner });
        }
    }
}

fn title(width: u16, shown: &Status) -> Vec<Piece> {
    let rates = &shown.rates;
    let sampled = match shown.events_sampled {
        0 => String::new(),
        1 => "showing all".to_owned(),
        some => format!("showing 1 in {}", format::short_count(some)),
    };
    if width < 110 {
        let all = rates.snapshot + rates.insert + rates.update + rates.delete;
        let comma = if sampled.is_empty() { "" } else { ", " };
        return vec![
            piece("Events ", Token::Title),
            piece(format!("{}/s{comma}{sampled}", format::rate(all)), Token::Text),
        ];
    }
    let mut pieces = vec![piece("Events  ", Token::Title)];
    for (kind, rate) in [
        (EventKind::Snapshot, rates.snapshot),
        (EventKind::Insert, rates.insert),
        (EventKind::Update, rates.update),
        (EventKind::Delete, rates.delete),
    ] {
        pieces.push(piece(event_word(kind), token(kind)));
        pieces.push(piece(format!(" {}  ", format::rate(rate)), Token::Text));
    }
    if let Some((text, _)) = pieces.last_mut() {
        text.pop();
    }
    let gap = if sampled.is_empty() { "" } else { "   " };
    pieces.push(piece(format!("a second{gap}{sampled}"), Token::Dim));
    pieces
}

fn token(kind: EventKind) -> Token {
    match kind {
        EventKind::Snapshot => Token::Dim,
        EventKind::Insert => Token::Ok,
        EventKind::Update => Token::Busy,
        EventKind::Delete | EventKind::Truncate => Token::Warn,
        EventKind::Reject => Token::Bad,
    }
}

fn line(canvas: &mut Canvas<'_>, row: Rect, event: &Event, shown: &Status, ages: bool) {
    let wide = row.width >= 108;
    let (y, end) = (row.y, row.right().saturating_sub(1));
    let name_width = if row.width >= 150 {
        24
    } else if row.width >= 90 && !wide {
        16
    } else {
        12
    };
    let mut x = row.x + 1;
    let mut put = |canvas: &mut Canvas<'_>, width: u16, text: &str, token: Token| {
        canvas.put(x, y, width.min(end.saturating_sub(x)), text, token);
        x = x.saturating_add(width + 1);
    };
    let time = if ages {
        format::right(&format::age(event.at, shown.at), 12)
    } else {
        format::moment_millis(event.at, shown.at)
    };
    put(canvas, 12, &time, Token::Dim);
    put(canvas, 8, event_word(event.kind), token(event.kind));
    put(canvas, name_width, &format::clean(&event_table(shown, event.table)), Token::Text);
    let took = event.latency.map_or_else(format::unknown, format::latency);
    let key = format::clean(&event.key);
    match event.kind {
        EventKind::Snapshot => {
            let chunk = format!("chunk {key}");
            put(canvas, if wide { 17 } else { columns(&chunk).clamp(15, 17) }, &chunk, Token::Text);
            put(canvas, 11, &format!("{} rows", event.rows.map_or_else(format::unknown, format::count)), Token::Text);
            put(canvas, 28, &if wide { format!("claim to index {took}") } else { took }, Token::Text);
        }
        EventKind::Reject => {
            put(canvas, if wide { 15 } else { 11 }, &format!("id={key}"), Token::Text);
            put(canvas, u16::MAX - 1, &format::clean(&event.detail), Token::Bad);
        }
        EventKind::Insert | EventKind::Update | EventKind::Delete | EventKind::Truncate => {
            let id = if event.kind == EventKind::Truncate { String::new() } else { format!("id={key}") };
            put(canvas, if wide { 15 } else { 11 }, &id, Token::Text);
            if wide {
                put(canvas, 14, &event.xid.map_or_else(String::new, |xid| format!("xid {xid}")), Token::Dim);
            }
            put(canvas, 12, &format::lsn(event.lsn), Token::Dim);
            put(canvas, 28, &if wide { format!("commit to index {took}") } else { took }, Token::Text);
        }
    }
}
