//! The last two lines: what matters most now, and the keys.
//!
//! ```text
//!  ! 17 documents rejected on order_items: press 5 for the list
//!  ?:Help  1-6:View  /:Filter  Space:Freeze  p:Pause  r:Resnapshot  q:Quit
//! ```

use ratatui::layout::Rect;

use crate::engine::{Command, Phase, Status, TableState};
use crate::tui::app::{App, Dialog, Pane, request_name, short_name};
use crate::tui::command::{Action, COMMANDS, CommandInfo};
use crate::tui::format;
use crate::tui::style::Token;
use crate::tui::text;

use super::replication::outlook;
use super::{Canvas, Piece, columns, piece};

/// Draws the status line.
pub(super) fn status_line(canvas: &mut Canvas<'_>, area: Rect, app: &mut App, status: &Status) {
    let line = said(app, status).or_else(|| alarm(app, status, area.width >= 110)).unwrap_or_default();
    canvas.pieces(area.x + 1, area.y, area.width.saturating_sub(2), &line);
}

/// What the operator asked for or is asked.
fn said(app: &mut App, status: &Status) -> Option<Vec<Piece>> {
    if let Some(Dialog::Ask { question, .. }) = &app.dialog {
        return Some(vec![piece(question.clone(), Token::Warn)]);
    }
    if let Some(Dialog::Filter { pane, .. }) = app.dialog {
        let shown = app.frozen.as_deref().unwrap_or(status);
        let matches = match pane {
            Pane::Events => app.event_order(shown).len(),
            Pane::Log => app.log_order(shown).len(),
            Pane::Errors => app.error_lines(shown).len(),
            _ => app.table_order(shown).len(),
        };
        let text = app.filter_mut(pane).map(|filter| text::clean(&filter.0)).unwrap_or_default();
        return Some(vec![
            piece(format!("/{text}_"), Token::Title),
            piece(format!("   {} shown", format::count(matches as u64)), Token::Dim),
        ]);
    }
    let mut line = Vec::new();
    if let Some(message) = &app.message {
        let (mark, token) = if message.bad { ("! ", Token::Bad) } else { ("", Token::Text) };
        line.push(piece(format!("{mark}{}   ", text::clean(&message.text)), token));
    }
    // A stop has its box.
    for request in app.requests.iter().filter(|request| request.command != Command::Stop) {
        let word = if request.answer.is_some() { "requested" } else { "requested and taken, not done yet" };
        line.push(piece(format!("{} {word}   ", request_name(&request.command)), Token::Warn));
    }
    (!line.is_empty()).then_some(line)
}

/// The worst thing that is so.
fn alarm(app: &App, status: &Status, wide: bool) -> Option<Vec<Piece>> {
    let bad = |text: String| Some(vec![piece(format!("! {}", text::clean(&text)), Token::Bad)]);
    let warn = |text: String| Some(vec![piece(format!("! {}", text::clean(&text)), Token::Warn)]);
    let replication = &status.replication;
    match (status.phase, &status.problem) {
        (Phase::Failed, Some(problem)) => return bad(format!("FAILED: {}", problem.message)),
        (Phase::Failed, None) => return bad("FAILED: press 6 for the log".to_owned()),
        (Phase::Connecting, None) => {
            let text = "looking at PostgreSQL and Elasticsearch, making slot, publication and ledger";
            return Some(vec![piece(text, Token::Dim)]);
        }
        (Phase::Connecting, Some(problem)) => return warn(format!("{}. {}", problem.message, problem.hint)),
        (Phase::Standby, _) => {
            let standby = status.standby.clone().unwrap_or_default();
            let loud = standby.silent || standby.idle.is_some();
            let text = text::clean(&standby.sentence());
            return Some(vec![piece(text, if loud { Token::Warn } else { Token::Text })]);
        }
        (Phase::Stopped, _) => return Some(vec![piece("STOPPED: q leaves; the next start goes on", Token::Text)]),
        _ => {}
    }
    if replication.wal_status.as_deref() == Some("lost") {
        return bad("the slot is lost: changes since then cannot be read, the tables must be copied again".to_owned());
    }
    let (out, out_token) = outlook(replication, status.phase);
    if matches!(status.phase, Phase::Paused | Phase::Pausing) {
        let held = format::clock_span(format::seconds_since(status.phase_since, status.at));
        let grows = match replication.wal_per_second {
            Some(rate) => format!("slot grows {}", format::byte_rate(rate)),
            None => "slot goes on keeping WAL".to_owned(),
        };
        let out = if out.is_empty() { String::new() } else { format!(", {out}") };
        let token = if out_token == Token::Bad { Token::Bad } else { Token::Warn };
        return Some(vec![piece(format!("{} {held}  {grows}{out}", status.phase.word()), token)]);
    }
    if let (Phase::Degraded, Some(problem)) = (status.phase, &status.problem) {
        return warn(format!("attempt {}: {}. {}", status.attempts, problem.message, problem.hint));
    }
    if let Some(trouble) = &status.sink.trouble {
        return warn(format!("attempt {}: {}. {}", trouble.attempts, trouble.reason, trouble.hint));
    }
    if out_token == Token::Bad {
        return bad(format!("WAL for the slot: {out}, then PostgreSQL may remove it"));
    }
    if let Some(place) = &app.panic {
        return bad(format!("a thread panicked at {place}: the log file says more"));
    }
    if let Some(table) = status.tables.iter().find(|table| table.state == TableState::Failed) {
        let why = table.problem.as_ref().map_or("no reason given", |problem| &problem.message);
        return bad(format!("{} failed: {why}: press 5", short_name(&table.table.0)));
    }
    if status.sink.rejected > 0 {
        let newest = status.rejections.iter().max_by_key(|rejection| rejection.last);
        let at = newest.filter(|_| wide).map(|newest| format!("{}  ", format::moment(newest.last, status.at)));
        let on = match (newest, status.rejections.len()) {
            (Some(newest), 1) => format!(" on {}", newest.index),
            (Some(newest), _) => format!(", the last on {}", newest.index),
            (None, _) => String::new(),
        };
        let documents = if status.sink.rejected == 1 { "document" } else { "documents" };
        let count = format::count(status.sink.rejected);
        return bad(format!("{}{count} {documents} rejected{on}: press 5 for the list", at.unwrap_or_default()));
    }
    None
}

/// A key and its word.
fn hint(info: &CommandInfo, status: &Status) -> Option<(String, u8)> {
    let (word, rank) = info.hint?;
    let resumes = info.action == Action::Pause && status.pause_requested;
    Some((format!("{}:{}", info.label, if resumes { "Resume" } else { word }), rank))
}

/// Draws the keys that do something now; where they do not all fit, those of the highest rank are left out.
pub(super) fn draw(canvas: &mut Canvas<'_>, area: Rect, app: &App, status: &Status) {
    let fixed = match &app.dialog {
        Some(Dialog::Ask { .. }) => Some("y:Yes  any other key:No"),
        Some(Dialog::Filter { .. }) => Some("Enter:Keep  Esc:Undo  a leading ! inverts"),
        Some(Dialog::Quit { .. }) => Some("Enter:Choose  Tab:Other  Esc:Cancel  Ctrl-C twice:Leave at once"),
        Some(Dialog::Resnapshot { .. }) => Some("Enter:Choose  Tab:Other  Esc:Cancel"),
        Some(Dialog::Help { .. } | Dialog::Detail { .. }) => Some("arrows:Scroll  Esc:Close"),
        None => None,
    };
    if let Some(text) = fixed {
        canvas.put(area.x + 1, area.y, area.width.saturating_sub(1), text, Token::Dim);
        return;
    }
    let able: Vec<(String, u8)> = COMMANDS
        .iter()
        .filter(|info| info.refusal(app, status).is_none())
        .filter_map(|info| hint(info, status))
        .collect();
    let width =
        |most: u8| able.iter().filter(|(_, rank)| *rank <= most).map(|(text, _)| columns(text) + 2).sum::<u16>();
    // Two blanks too many in the sum stand for the edges.
    let most = (0..=9).take_while(|&most| width(most) <= area.width).last().unwrap_or(0);
    let mut x = area.x + 1;
    for (text, _) in able.iter().filter(|(_, rank)| *rank <= most) {
        let (key, word) = text.rsplit_once(':').unwrap_or((text, ""));
        x = canvas.put(x, area.y, area.right().saturating_sub(x), key, Token::Accent);
        x = canvas.put(x, area.y, area.right().saturating_sub(x), &format!(":{word}"), Token::Text) + 2;
    }
}
