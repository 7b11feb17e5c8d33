//! The errors: what do I mend? Grouped by table or index, and reason.
//!
//! ```text
//! ┌─ Errors 2 ────────────────────────────────────────── 17 documents rejected ─┐
//! │  COUNT WHAT            LAST     REASON                                      │
//! │ >   17 order_items     10:31:40 mapper_parsing_exception: failed to parse   │
//! └─────────────────────────────────────────────────────────────────────────────┘
//! ```

use ratatui::layout::Rect;

use crate::engine::Status;
use crate::tui::app::{App, Pane};
use crate::tui::format;
use crate::tui::style::Token;
use crate::tui::text;

use super::{Canvas, columns, frozen_title, piece};

/// Draws the list.
pub(super) fn draw(canvas: &mut Canvas<'_>, area: Rect, app: &mut App, shown: &Status, held: Option<u64>) {
    let lines = app.error_lines(shown);
    let title = [piece(format!("Errors {}", lines.len()), Token::Title)];
    let rejected = shown.sink.rejected;
    let text = match rejected {
        0 => "no document rejected".to_owned(),
        1 => "1 document rejected".to_owned(),
        many => format!("{} documents rejected", format::count(many)),
    };
    let mut right = vec![piece(text, if rejected > 0 { Token::Bad } else { Token::Dim })];
    if let Some(frozen) = frozen_title(held) {
        right.splice(0..0, [frozen, piece("   ", Token::Dim)]);
    }
    if !app.errors.filter.is_empty() {
        right.insert(0, piece(format!("filter: {}   ", app.errors.filter.word()), Token::Warn));
    }
    let inner = canvas.pane(area, &title, &right, app.focused() == Pane::Errors);
    if inner.height == 0 {
        return;
    }
    if lines.is_empty() {
        let text =
            if app.errors.filter.is_empty() { "nothing to mend" } else { "no error matches the filter: Esc clears it" };
        canvas.put(inner.x + 1, inner.y, inner.width.saturating_sub(2), text, Token::Dim);
        return;
    }
    let selected =
        app.errors.selected.as_ref().and_then(|key| lines.iter().position(|line| line.key == *key)).unwrap_or(0);
    let rows = usize::from(inner.height - 1);
    let start = app.errors.window(selected, lines.len(), rows);
    let what = lines.iter().map(|line| columns(&text::clean(&line.what))).max().unwrap_or(0).clamp(4, inner.width / 4);
    let x = inner.x + 2;
    let rest = |at: u16| inner.right().saturating_sub(at + 1);
    let head =
        format!("{} {} {} REASON", text::right("COUNT", 6), text::left("WHAT", what.into()), text::left("LAST", 8));
    canvas.put(x, inner.y, rest(x), &head, Token::Dim);
    for (y, (at, line)) in (inner.y + 1..inner.bottom()).zip(lines.iter().enumerate().skip(start)) {
        let count = text::right(&line.count.map_or_else(format::unknown, format::rows), 6);
        canvas.put(x, y, 6, &count, Token::Bad);
        canvas.put(x + 7, y, what, &text::clean(&line.what), Token::Text);
        let last = match line.last {
            Some(last) if app.ages => text::right(&format::age(last, shown.at), 8),
            Some(last) => format::day_or_time(last, shown.at),
            None => format::unknown(),
        };
        canvas.put(x + 8 + what, y, 8, &last, Token::Dim);
        let reason = x + 17 + what;
        canvas.put(reason, y, rest(reason), &text::clean(&line.reason), Token::Text);
        if at == selected {
            canvas.put(inner.x + 1, y, 1, ">", Token::Title);
            canvas.select(Rect { y, height: 1, ..inner });
        }
    }
}
