//! The log: what did it do while I was away? Newest first.
//!
//! ```text
//! ┌─ Log ──────────────────────────────────────────────────── WARN and above: 3 ─┐
//! │ 10:31:40 WARN  order_items 17 documents rejected, set aside                  │
//! │ 10:28:03 INFO  customers: copy done, 1,200,311 rows in 00:03:22              │
//! └──────────────────────────────────────────────────────────────────────────────┘
//! ```

use ratatui::layout::Rect;

use crate::engine::{Level, Status};
use crate::tui::app::{App, Pane, level_word};
use crate::tui::format;
use crate::tui::style::Token;

use super::{Canvas, columns, frozen_title, piece};

/// Draws the newest notices, or those around the chosen one.
pub(super) fn draw(canvas: &mut Canvas<'_>, area: Rect, app: &mut App, shown: &Status, held: Option<u64>) {
    let focused = app.focused() == Pane::Log;
    let loud = shown.notices.iter().filter(|notice| notice.level >= Level::Warn).count();
    let mut right = vec![piece(format!("WARN and above: {loud}"), if loud > 0 { Token::Warn } else { Token::Dim })];
    if let Some(frozen) = frozen_title(held) {
        right.splice(0..0, [frozen, piece("   ", Token::Dim)]);
    } else if !app.log.follow {
        right.splice(0..0, [piece("staying, F follows   ", Token::Warn)]);
    }
    if !app.log.filter.is_empty() {
        right.insert(0, piece(format!("filter: {}   ", app.log.filter.word()), Token::Warn));
    }
    let inner = canvas.pane(area, &[piece("Log", Token::Title)], &right, focused);
    if inner.height == 0 {
        return;
    }
    let order = app.log_order(shown);
    let selected = App::newest_first(&app.log, order.iter().map(|&at| shown.notices[at].seq));
    let start = app.log.window(selected, order.len(), inner.height.into());
    if order.is_empty() {
        let text = if shown.notices.is_empty() { "nothing yet" } else { "no line matches the filter: Esc clears it" };
        canvas.put(inner.x + 1, inner.y, inner.width.saturating_sub(2), text, Token::Dim);
    }
    for (y, (at, &index)) in (inner.y..inner.bottom()).zip(order.iter().enumerate().skip(start)) {
        let notice = &shown.notices[index];
        let time = if app.ages {
            format::right(&format::age(notice.at, shown.at), 8)
        } else {
            format::moment(notice.at, shown.at)
        };
        let token = match notice.level {
            Level::Info => Token::Dim,
            Level::Warn => Token::Warn,
            Level::Error => Token::Bad,
        };
        let line = [
            piece(format!("{time} "), Token::Dim),
            piece(format::left(level_word(notice.level), 6), token),
            piece(format::clean(&notice.text), Token::Text),
        ];
        canvas.pieces(inner.x + 1, y, inner.width.saturating_sub(2), &line);
        if at == selected && focused && !app.log.follow {
            canvas.put(inner.x, y, 1, ">", Token::Title);
            canvas.select(Rect { y, height: 1, ..inner });
        }
    }
    if let Some(path) = app.log_path.as_ref().filter(|_| app.single() == Some(Pane::Log)) {
        let text = format!(" in full: {} ", format::clean(&path.display().to_string()));
        let text = format::cut(&text, usize::from(area.width.saturating_sub(4)));
        if columns(&text) > 4 {
            canvas.put_right(area.right().saturating_sub(2), area.bottom().saturating_sub(1), &text, Token::Dim);
        }
    }
}
