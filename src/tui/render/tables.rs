//! The table list: which table is behind?
//!
//! ```text
//! ┌─ Tables 7 ──────────────────────────────────── order: config   filter: none ─┐
//! │  TABLE            STATE    PROGRESS           %   ROW/s        ETA  ERR      │
//! │ >orders           copy     █████████▉░░   82.8%   61.2k  ~00:00:27    0      │
//! └──────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! From 83 columns on with rows done and to do, from 140 on with the index and the rates of the last two minutes. Below
//! 74 columns the ETA goes, then the rate.

use ratatui::layout::Rect;

use crate::engine::{Status, TableState, TableStatus};
use crate::tui::app::{App, Pane, short_name};
use crate::tui::format;
use crate::tui::style::Token;
use crate::tui::text;

use super::{Canvas, columns, frozen_title, piece};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    Name,
    Index,
    State,
    Bar,
    Percent,
    Done,
    Total,
    Rate,
    Recent,
    Eta,
    Errors,
}

/// A column, the blanks before it, and its width.
type Placed = (Column, u16, u16);

const NARROW: &[Placed] = &[
    (Column::Name, 0, 16),
    (Column::State, 1, 8),
    (Column::Bar, 1, 12),
    (Column::Percent, 2, 6),
    (Column::Rate, 2, 6),
    (Column::Eta, 2, 9),
    (Column::Errors, 1, 4),
];

const MEDIUM: &[Placed] = &[
    (Column::Name, 0, 14),
    (Column::State, 1, 8),
    (Column::Bar, 1, 12),
    (Column::Percent, 2, 6),
    (Column::Done, 2, 6),
    (Column::Total, 2, 6),
    (Column::Rate, 1, 6),
    (Column::Eta, 1, 9),
    (Column::Errors, 0, 4),
];

const WIDE: &[Placed] = &[
    (Column::Name, 0, 19),
    (Column::Index, 1, 19),
    (Column::State, 1, 8),
    (Column::Bar, 2, 24),
    (Column::Percent, 2, 6),
    (Column::Done, 3, 6),
    (Column::Total, 3, 6),
    (Column::Rate, 2, 6),
    (Column::Recent, 2, 12),
    (Column::Eta, 2, 9),
    (Column::Errors, 1, 4),
];

/// The columns for `width` columns, of which the first two are the cursor's; `names` is the width that the names want.
fn choose(width: u16, names: u16) -> Vec<Placed> {
    let mut placed = if width >= 140 {
        WIDE
    } else if width >= 83 {
        MEDIUM
    } else {
        NARROW
    }
    .to_vec();
    let total = |placed: &[Placed]| placed.iter().map(|(_, gap, width)| gap + width).sum::<u16>() + 2;
    for lost in [Column::Eta, Column::Rate] {
        if total(&placed) > width {
            placed.retain(|(column, ..)| *column != lost);
        }
    }
    let mut spare = width.saturating_sub(total(&placed));
    for (column, want) in [(Column::Name, names), (Column::Index, names + 3)] {
        if let Some((_, _, width)) = placed.iter_mut().find(|(other, ..)| *other == column) {
            // One column stays, so that nothing touches the border.
            let more = want.saturating_sub(*width).min(spare.saturating_sub(1));
            *width += more;
            spare -= more;
        }
    }
    // A few columns stay blank on the right, as an edge; a wider screen has a longer bar.
    if let Some((_, _, width)) = placed.iter_mut().find(|(column, ..)| *column == Column::Bar) {
        *width += spare.saturating_sub(6).min(40);
    }
    placed
}

/// Draws the list and keeps its window.
pub(super) fn draw(canvas: &mut Canvas<'_>, area: Rect, app: &mut App, shown: &Status, held: Option<u64>) {
    let focused = app.focused() == Pane::Tables;
    let order = app.table_order(shown);
    let some = if order.len() == shown.tables.len() { String::new() } else { format!("{} of ", order.len()) };
    let title = [piece("Tables ", Token::Title), piece(format!("{some}{}", shown.tables.len()), Token::Title)];
    let direction = if app.inverted { " inverted" } else { "" };
    let filter_token = if app.tables.filter.is_empty() { Token::Dim } else { Token::Warn };
    let mut right = vec![
        piece(format!("order: {}{direction}   ", app.sort.word()), Token::Dim),
        piece(format!("filter: {}", app.tables.filter.word()), filter_token),
    ];
    if let Some(frozen) = frozen_title(held) {
        right.splice(0..0, [frozen, piece("   ", Token::Dim)]);
    }
    let inner = canvas.pane(area, &title, &right, focused);
    if inner.height == 0 {
        return;
    }
    let name = |at: usize| text::clean(&short_name(&shown.tables[at].table.0));
    let selected = app.selected_table(shown);
    let selected_row = order.iter().position(|&at| Some(at) == selected).unwrap_or(0);
    let rows = usize::from(inner.height - 1);
    let start = app.tables.window(selected_row, order.len(), rows);
    let visible: Vec<usize> = order.iter().skip(start).take(rows).copied().collect();
    let names = visible.iter().map(|&at| columns(&name(at))).max().unwrap_or(0);
    let placed = choose(inner.width, names.min(40));

    let mut x = inner.x + 2;
    for &(column, gap, width) in &placed {
        x += gap;
        let (head, right) = head(column);
        let text = if right { text::right(head, width.into()) } else { head.to_owned() };
        canvas.put(x, inner.y, width, &text, Token::Dim);
        x += width;
    }
    if visible.is_empty() {
        let text = if shown.tables.is_empty() { "no tables yet" } else { "no table matches the filter: Esc clears it" };
        canvas.put(inner.x + 2, inner.y + 1, inner.width.saturating_sub(2), text, Token::Dim);
    }
    for (row, &at) in (1_u16..).zip(&visible) {
        let y = inner.y + row;
        let table = &shown.tables[at];
        if Some(at) == selected {
            canvas.put(inner.x + 1, y, 1, ">", Token::Title);
        }
        let mut x = inner.x + 2;
        // Both are worth working out once for a row: the share counts chunks.
        let (share, name) = (table.progress(), name(at));
        for &(column, gap, width) in &placed {
            x += gap;
            cell(canvas, (x, y, width), column, (table, share, &name), app);
            x += width;
        }
        if Some(at) == selected {
            canvas.select(Rect { x: inner.x, y, width: inner.width, height: 1 });
        }
    }
    let below = order.len().saturating_sub(start + visible.len());
    if start > 0 || below > 0 {
        let text = format!(" {}-{} of {} ", start + 1, start + visible.len(), order.len());
        canvas.put_right(area.right().saturating_sub(2), area.bottom().saturating_sub(1), &text, Token::Dim);
    }
}

/// A column's head, and whether it stands on the right.
fn head(column: Column) -> (&'static str, bool) {
    match column {
        Column::Name => ("TABLE", false),
        Column::Index => ("INDEX", false),
        Column::State => ("STATE", false),
        Column::Bar => ("PROGRESS", false),
        Column::Percent => ("%", true),
        Column::Done => ("DONE", true),
        Column::Total => ("TOTAL", true),
        Column::Rate => ("ROW/s", true),
        Column::Recent => ("LAST 2 MIN", false),
        Column::Eta => ("ETA", true),
        Column::Errors => ("ERR", true),
    }
}

/// How a table's state looks.
pub(super) fn state_token(state: TableState) -> Token {
    match state {
        TableState::Queued => Token::Wait,
        TableState::Copying | TableState::CatchUp | TableState::Standby => Token::Busy,
        TableState::Live => Token::Ok,
        TableState::Paused | TableState::Retrying => Token::Warn,
        TableState::Failed => Token::Bad,
    }
}

/// The word of a table's state; a copy that is done again is said to be one.
pub(super) fn state_word(table: &TableStatus) -> String {
    match table.state {
        TableState::Retrying => format!("RETRY {}", table.attempts.min(99)),
        TableState::Copying if table.resnapshot => "recopy".to_owned(),
        state => state.word().to_owned(),
    }
}

fn cell(
    canvas: &mut Canvas<'_>,
    (x, y, width): (u16, u16, u16),
    column: Column,
    (table, share, name): (&TableStatus, Option<f64>, &str),
    app: &App,
) {
    let columns = usize::from(width);
    let (text, token) = match column {
        Column::Name => (name.to_owned(), Token::Text),
        Column::Index => (text::clean(&table.index), Token::Dim),
        Column::State => (state_word(table), state_token(table.state)),
        Column::Bar => (format::bar(share.unwrap_or(0.0), columns), state_token(table.state)),
        Column::Percent => (format::percent(share), Token::Text),
        Column::Done => (format::rows(table.rows_done), Token::Text),
        Column::Total => match table.rows_total {
            Some(total) if table.rows_total_exact => (format::rows(total), Token::Text),
            Some(total) => (format::rows_about(total), Token::Text),
            None => (format::unknown(), Token::Dim),
        },
        Column::Rate if table.state == TableState::Queued => (format::unknown(), Token::Dim),
        Column::Rate => (format::rate(table.rows_per_second), Token::Text),
        Column::Recent => (format::sparkline(&app.table_rates(&table.table.0, columns)), Token::Accent),
        Column::Eta => (format::eta(table.eta), Token::Text),
        Column::Errors => (format::errors(table.errors), if table.errors > 0 { Token::Bad } else { Token::Text }),
    };
    let text = if head(column).1 { text::right(&text, columns) } else { text };
    canvas.put(x, y, width, &text, token);
}
