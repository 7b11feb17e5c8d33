//! From status to cells. One file per pane; this one decides which panes there are and where.
//!
//! Breakpoints: width 80, 110, 180; height 24, 36. What goes first when space shrinks: log, chunks, sink, events, table
//! columns. What never goes: phase, lag, WAL headroom, rejected documents, key hints.

pub(super) mod chunks;
pub(super) mod dialog;
pub(super) mod errors;
pub(super) mod events;
pub(super) mod header;
pub(super) mod help;
pub(super) mod hints;
pub(super) mod log;
pub(super) mod replication;
pub(super) mod sink;
pub(super) mod tables;

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use unicode_width::UnicodeWidthStr;

use crate::engine::Status;

use super::app::{App, Pane};
use super::format;
use super::style::{Theme, Token};

/// The smallest screen that is drawn.
pub(super) const SMALLEST: (u16, u16) = (60, 15);

/// A piece of a line and what it means.
pub(super) type Piece = (String, Token);

/// A piece of a line.
pub(super) fn piece(text: impl Into<String>, token: Token) -> Piece {
    (text.into(), token)
}

/// Cells to draw on, and how tokens look there. Whatever lies outside is cut.
pub(super) struct Canvas<'a> {
    pub(super) buffer: &'a mut Buffer,
    pub(super) theme: Theme,
}

impl Canvas<'_> {
    /// Writes `text` at `x`, `y` in at most `width` columns and gives the column after it.
    pub(super) fn put(&mut self, x: u16, y: u16, width: u16, text: &str, token: Token) -> u16 {
        let area = self.buffer.area;
        if y < area.top() || y >= area.bottom() || x < area.left() || x >= area.right() || width == 0 {
            return x;
        }
        let width = usize::from(width.min(area.right() - x));
        self.buffer.set_stringn(x, y, format::cut(text, width), width, self.theme.style(token)).0
    }

    /// Writes pieces one after the other.
    pub(super) fn pieces(&mut self, x: u16, y: u16, width: u16, pieces: &[Piece]) -> u16 {
        let end = x.saturating_add(width);
        let mut at = x;
        for (text, token) in pieces {
            at = self.put(at, y, end.saturating_sub(at), text, *token);
        }
        at
    }

    /// Writes `text` so that it ends before column `end`, and gives the column where it starts.
    pub(super) fn put_right(&mut self, end: u16, y: u16, text: &str, token: Token) -> u16 {
        let width = columns(text);
        let x = end.saturating_sub(width);
        self.put(x, y, width, text, token);
        x
    }

    /// Draws a border with a title on the left and one on the right, and gives what lies within.
    ///
    /// ```text
    /// ┌─ left ───────────────── right ─┐
    /// ```
    pub(super) fn pane(&mut self, area: Rect, left: &[Piece], right: &[Piece], focused: bool) -> Rect {
        let area = area.intersection(self.buffer.area);
        if area.width < 4 || area.height < 2 {
            return Rect::ZERO;
        }
        let border = self.theme.border(focused);
        let (last_x, last_y) = (area.right() - 1, area.bottom() - 1);
        for x in area.left()..=last_x {
            for y in [area.top(), last_y] {
                self.buffer[(x, y)].set_char('─').set_style(border);
            }
        }
        for y in area.top()..=last_y {
            for x in [area.left(), last_x] {
                self.buffer[(x, y)].set_char('│').set_style(border);
            }
        }
        for (x, y, corner) in [
            (area.left(), area.top(), '┌'),
            (last_x, area.top(), '┐'),
            (area.left(), last_y, '└'),
            (last_x, last_y, '┘'),
        ] {
            self.buffer[(x, y)].set_char(corner);
        }
        let room = area.width.saturating_sub(6);
        let width = |pieces: &[Piece]| pieces.iter().map(|(text, _)| columns(text)).fold(0, u16::saturating_add);
        let left_width = width(left).min(room);
        if left_width > 0 {
            self.put(area.left() + 2, area.top(), 1, " ", Token::Text);
            let end = self.pieces(area.left() + 3, area.top(), room, left);
            self.put(end, area.top(), 1, " ", Token::Text);
        }
        let right_width = width(right);
        if right_width > 0 && left_width.saturating_add(right_width).saturating_add(3) <= room {
            let x = last_x.saturating_sub(right_width + 2);
            self.put(x - 1, area.top(), 1, " ", Token::Text);
            let end = self.pieces(x, area.top(), right_width, right);
            self.put(end, area.top(), 1, " ", Token::Text);
        }
        Rect { x: area.x + 1, y: area.y + 1, width: area.width - 2, height: area.height - 2 }
    }

    /// Marks a row as the selected one.
    pub(super) fn select(&mut self, row: Rect) {
        self.buffer.set_style(row.intersection(self.buffer.area), self.theme.selected());
    }

    /// Makes an area blank.
    pub(super) fn blank(&mut self, area: Rect) {
        let area = area.intersection(self.buffer.area);
        for position in area.positions() {
            self.buffer[position].reset();
        }
    }
}

/// The columns that `text` takes.
pub(super) fn columns(text: &str) -> u16 {
    u16::try_from(text.width()).unwrap_or(u16::MAX)
}

/// Which panes there are and where.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) header: Rect,
    pub(super) panes: Vec<(Pane, Rect)>,
    pub(super) status: Rect,
    pub(super) hints: Rect,
}

/// Divides a screen of at least [`SMALLEST`].
///
/// ```text
/// 80x24           80x50                       120x40                      200x60
/// header (3)      header (3)                  header (2)                  header (2)
/// Tables          Tables                      Tables      Replication     Tables       Replication
/// Events          Chunks                      Chunks      Elasticsearch   Chunks       Elasticsearch
/// status, hints   Replication Elasticsearch   Events                      Events       Log
///                 Events                      status, hints               status, hints
///                 status, hints
/// ```
pub(super) fn plan(area: Rect, app: &App, tables: usize) -> Plan {
    let single = app.single();
    let wide = single.is_none() && area.width >= 110 && area.height >= 36;
    let row = |y: u16, height: u16| Rect { x: area.x, y: area.y.saturating_add(y), width: area.width, height };
    let header_height = if wide { 2 } else { 3 };
    let body = row(header_height, area.height.saturating_sub(header_height + 2));
    let mut panes = Vec::new();
    let tables = u16::try_from(tables).unwrap_or(u16::MAX);
    if let Some(pane) = single {
        panes.push((pane, body));
    } else if wide {
        let big = area.width >= 180;
        let tall = area.height >= 54;
        let side = if big { 54 } else { 35 };
        let (first, second) = if tall && big { (20, 18) } else { (13, 10) };
        // More tables than rows: half of what is left over goes to them.
        let spare = body.height.saturating_sub(first + second + 13) / 2;
        let first = first + tables.saturating_add(3).saturating_sub(first).min(spare);
        let third = body.height.saturating_sub(first + second);
        let split = |y: u16, height: u16, side: u16| {
            let main = Rect { x: body.x, y: body.y + y, width: body.width - side, height };
            (main, Rect { x: main.right(), width: side, ..main })
        };
        let (left, right) = split(0, first, side);
        panes.extend([(Pane::Tables, left), (Pane::Replication, right)]);
        let (left, right) = split(first, second, side);
        panes.extend([(Pane::Chunks, left), (Pane::Sink, right)]);
        let (left, right) = split(first + second, third, if big { 80 } else { 0 });
        panes.push((Pane::Events, left));
        if big {
            panes.push((Pane::Log, right));
        }
    } else {
        // A tall screen has room for the sides as well, one above the other.
        let chunks = if area.width >= 80 && area.height >= 36 { 10 } else { 0 };
        let sides = if area.width >= 80 && area.height >= 50 { 13 } else { 0 };
        let lists = body.height - chunks - sides;
        // Eight lines of tables before any event; beyond that, what the tables need, up to three fifths.
        let wanted = tables.saturating_add(3).clamp(11, (lists * 3 / 5).max(11));
        let first = if lists < wanted + 3 { lists } else { wanted };
        let mut y = body.y;
        let mut take = |height: u16| {
            let taken = Rect { y, height, ..body };
            y += height;
            taken
        };
        panes.push((Pane::Tables, take(first)));
        if chunks > 0 {
            panes.push((Pane::Chunks, take(chunks)));
        }
        if sides > 0 {
            let row = take(sides);
            let left = Rect { width: row.width / 2, ..row };
            panes.push((Pane::Replication, left));
            panes.push((Pane::Sink, Rect { x: left.right(), width: row.width - left.width, ..row }));
        }
        if first < lists {
            panes.push((Pane::Events, take(lists - first)));
        }
    }
    Plan {
        header: row(0, header_height),
        panes,
        status: row(area.height.saturating_sub(2), 1),
        hints: row(area.height.saturating_sub(1), 1),
    }
}

/// Draws the whole screen. The clock is `status.at`; nothing else is asked for the time.
pub fn render(buffer: &mut Buffer, app: &mut App, status: &Status) {
    let area = buffer.area;
    let theme = app.theme;
    let mut canvas = Canvas { buffer, theme };
    if area.width < SMALLEST.0 || area.height < SMALLEST.1 {
        too_small(&mut canvas, area);
    } else {
        // Taken out for the time of the drawing, so that the panes can read it while they write the view state.
        let frozen = app.frozen.take();
        let shown = frozen.as_deref().unwrap_or(status);
        let plan = plan(area, app, shown.tables.len());
        app.panes = plan.panes.iter().map(|(pane, _)| *pane).collect();
        if app.single().is_none() && !app.panes.contains(&app.focus) {
            app.focus = app.panes.first().copied().unwrap_or(Pane::Tables);
        }
        let held = frozen.as_ref().map(|frozen| format::seconds_since(frozen.at, status.at));
        header::draw(&mut canvas, plan.header, app, status);
        for &(pane, area) in &plan.panes {
            match pane {
                Pane::Tables => tables::draw(&mut canvas, area, app, shown, held),
                Pane::Replication => replication::draw(&mut canvas, area, app, shown, held),
                Pane::Chunks => chunks::draw(&mut canvas, area, app, shown, held),
                Pane::Sink => sink::draw(&mut canvas, area, app, shown, held),
                Pane::Events => events::draw(&mut canvas, area, app, shown, held),
                Pane::Errors => errors::draw(&mut canvas, area, app, shown, held),
                Pane::Log => log::draw(&mut canvas, area, app, shown, held),
            }
        }
        app.frozen = frozen;
        hints::status_line(&mut canvas, plan.status, app, status);
        hints::draw(&mut canvas, plan.hints, app, status);
        dialog::draw(&mut canvas, area, app, status);
    }
    theme.finish(canvas.buffer);
}

/// The word that a frozen pane has in its title: `FROZEN 00:12`.
pub(super) fn frozen_title(held: Option<u64>) -> Option<Piece> {
    held.map(|seconds| piece(format!("FROZEN {:02}:{:02}", seconds / 60, seconds % 60), Token::Warn))
}

/// ```text
/// Terminal too small: 52x12, need 60x15
/// ```
fn too_small(canvas: &mut Canvas<'_>, area: Rect) {
    let token = |number, need| if number < need { Token::Bad } else { Token::Text };
    let line = [
        piece("Terminal too small: ", Token::Text),
        piece(area.width.to_string(), token(area.width, SMALLEST.0)),
        piece("x", Token::Text),
        piece(area.height.to_string(), token(area.height, SMALLEST.1)),
        piece(format!(", need {}x{}", SMALLEST.0, SMALLEST.1), Token::Text),
    ];
    canvas.pieces(area.x, area.y, area.width, &line);
}
