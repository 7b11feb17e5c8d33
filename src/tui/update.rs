//! From [`Action`] to view state, or to a command for the engine.

use std::time::Duration;

use crate::engine::{Command, Phase, Status, TableState, TableStatus};
use crate::table::TableId;

use super::app::{App, Dialog, Leave, Pane, Sort, View, event_table, event_word, level_word, short_name};
use super::command::{self, Action, NOT_HERE};
use super::format;
use super::render::replication::headroom;
use super::text;

/// A second Ctrl-C within this time leaves without waiting.
const TWICE: Duration = Duration::from_secs(2);

/// Does what `action` asks for; a command is for the caller to send. `live` is the newest status.
pub(super) fn update(app: &mut App, live: &Status, action: Action) -> Option<Command> {
    match action {
        Action::Interrupt => return interrupt(app, live),
        Action::Redraw => {
            app.redraw = true;
            return None;
        }
        Action::Suspend => {
            app.say("Not suspended: the pipeline goes on. q stops it; or use another terminal".to_owned(), false);
            return None;
        }
        _ => {}
    }
    if let Some(dialog) = app.dialog.take() {
        return in_dialog(app, live, dialog, action);
    }
    if live.phase == Phase::Failed && !app.failure_seen && matches!(action, Action::Back | Action::Enter) {
        app.failure_seen = true;
        return None;
    }
    if let Some(info) = command::info(action)
        && let Some(reason) = info.refusal(app, live)
    {
        if info.steers {
            let place = if reason == NOT_HERE { ": choose a table first" } else { "" };
            app.say(format!("{} refused: {reason}{place}", info.hint.map_or("command", |(word, _)| word)), true);
        }
        return None;
    }
    match action {
        Action::Quit => return quit(app, live),
        Action::Help => app.dialog = Some(Dialog::Help { scroll: 0 }),
        Action::Back => back(app),
        Action::Show(view) => show(app, view),
        Action::NextPane => turn(app, 1),
        Action::PreviousPane => turn(app, -1),
        Action::Up => move_by(app, live, -1),
        Action::Down => move_by(app, live, 1),
        Action::Left if app.focused() == Pane::Chunks => move_by(app, live, -1),
        Action::Right if app.focused() == Pane::Chunks => move_by(app, live, 1),
        Action::PageUp => move_by(app, live, -page(app)),
        Action::PageDown => move_by(app, live, page(app)),
        Action::HalfUp => move_by(app, live, -(page(app) / 2).max(1)),
        Action::HalfDown => move_by(app, live, (page(app) / 2).max(1)),
        Action::Top => move_by(app, live, isize::MIN),
        Action::Bottom => move_by(app, live, isize::MAX),
        Action::Enter => enter(app, live),
        Action::Filter => {
            let pane = app.focused();
            if let Some(filter) = app.filter_mut(pane) {
                let before = filter.clone();
                app.dialog = Some(Dialog::Filter { pane, before });
            }
        }
        Action::Sort => {
            app.sort = app.sort.next();
            app.inverted &= app.sort != Sort::Config;
        }
        Action::Invert => app.inverted = !app.inverted,
        Action::Zoom => app.zoom = if app.zoom.is_some() { None } else { Some(app.focused()) },
        Action::Freeze => app.frozen = if app.frozen.is_some() { None } else { Some(Box::new(live.clone())) },
        Action::Follow => match app.focused() {
            Pane::Events => {
                let newest = live.events.last().map(|event| event.seq);
                follow(&mut app.events, newest);
            }
            Pane::Log => {
                let newest = live.notices.last().map(|notice| notice.seq);
                follow(&mut app.log, newest);
            }
            _ => {}
        },
        Action::Ages => app.ages = !app.ages,
        Action::Pause => return pause(app, live),
        Action::PauseTable => return pause_table(app, live),
        Action::Resnapshot => resnapshot(app, live),
        Action::Left
        | Action::Right
        | Action::Type(_)
        | Action::Erase
        | Action::Yes
        | Action::No
        | Action::Interrupt
        | Action::Redraw
        | Action::Suspend => {}
    }
    None
}

/// Text that was pasted: for a line that is being typed, and never a key.
pub(super) fn paste(app: &mut App, live: &Status, pasted: &str) {
    if !matches!(app.dialog, Some(Dialog::Filter { .. } | Dialog::Resnapshot { .. })) {
        app.say("Pasted text was dropped: there is nothing to type it into".to_owned(), false);
        return;
    }
    // No line takes more than that.
    for c in pasted.chars().filter(|c| !c.is_control()).take(200) {
        update(app, live, Action::Type(c));
    }
}

fn interrupt(app: &mut App, live: &Status) -> Option<Command> {
    let again = app.interrupted.is_some_and(|last| app.clock.saturating_sub(last) <= TWICE);
    app.interrupted = Some(app.clock);
    if again {
        app.leave = Some(Leave::Forced);
        return None;
    }
    match &app.dialog {
        Some(Dialog::Filter { pane, before }) => {
            let (pane, before) = (*pane, before.clone());
            if let Some(filter) = app.filter_mut(pane) {
                *filter = before;
            }
        }
        _ => app.dialog = None,
    }
    quit(app, live)
}

fn quit(app: &mut App, live: &Status) -> Option<Command> {
    app.dialog = None;
    if matches!(live.phase, Phase::Failed | Phase::Stopped) {
        app.leave = Some(Leave::Ended);
    } else if app.stopping.is_none() {
        app.dialog = Some(Dialog::Quit { stop: true });
    }
    None
}

fn stop(app: &mut App) -> Option<Command> {
    app.stopping = Some(app.clock);
    Some(Command::Stop)
}

fn back(app: &mut App) {
    let pane = app.focused();
    if let Some(filter) = app.filter_mut(pane).filter(|filter| !filter.is_empty()) {
        filter.0.clear();
    } else if app.zoom.is_some() {
        app.zoom = None;
    } else if let Some(view) = app.back.pop() {
        app.view = view;
    } else {
        app.view = View::Overview;
    }
}

fn show(app: &mut App, view: View) {
    app.zoom = None;
    if app.view != view {
        if view == View::Overview {
            app.back.clear();
        } else {
            app.back.retain(|earlier| *earlier != view);
            app.back.push(app.view);
        }
        app.view = view;
    }
}

fn turn(app: &mut App, by: isize) {
    let len = app.panes.len();
    if len == 0 || app.single().is_some() {
        return;
    }
    let at = app.panes.iter().position(|pane| *pane == app.focus).unwrap_or(0);
    app.focus = app.panes[at.saturating_add(len).saturating_add_signed(by) % len];
}

fn page(app: &App) -> isize {
    let height = match app.focused() {
        Pane::Tables | Pane::Chunks => app.tables.height,
        Pane::Events => app.events.height,
        Pane::Errors => app.errors.height,
        Pane::Log => app.log.height,
        Pane::Replication | Pane::Sink => 1,
    };
    isize::try_from(height).unwrap_or(1).max(1)
}

/// `at` moved within `len` lines.
fn moved(at: usize, by: isize, len: usize) -> usize {
    at.saturating_add_signed(by).min(len.saturating_sub(1))
}

fn move_by(app: &mut App, live: &Status, by: isize) {
    let frozen = app.frozen.take();
    let shown = frozen.as_deref().unwrap_or(live);
    match app.focused() {
        Pane::Tables | Pane::Chunks => {
            let order = app.table_order(shown);
            let at = app.selected_table(shown).and_then(|table| order.iter().position(|&at| at == table)).unwrap_or(0);
            if let Some(&table) = order.get(moved(at, by, order.len())) {
                app.tables.selected = Some(shown.tables[table].table.0.clone());
            }
        }
        Pane::Events => {
            let seqs: Vec<u64> = app.event_order(shown).iter().map(|&at| shown.events[at].seq).collect();
            move_newest_first(&mut app.events, &seqs, by);
        }
        Pane::Log => {
            let seqs: Vec<u64> = app.log_order(shown).iter().map(|&at| shown.notices[at].seq).collect();
            move_newest_first(&mut app.log, &seqs, by);
        }
        Pane::Errors => {
            let lines = app.error_lines(shown);
            let at = app.errors.selected.as_ref().and_then(|key| lines.iter().position(|line| line.key == *key));
            if let Some(line) = lines.get(moved(at.unwrap_or(0), by, lines.len())) {
                app.errors.selected = Some(line.key.clone());
            }
        }
        Pane::Replication | Pane::Sink => {}
    }
    app.frozen = frozen;
}

/// Moving away from the newest line stops following, going to the first line follows again.
fn move_newest_first(list: &mut super::app::List<u64>, seqs: &[u64], by: isize) {
    let at = App::newest_first(list, seqs.iter().copied());
    let to = moved(at, by, seqs.len());
    list.follow = by == isize::MIN || (list.follow && to == 0);
    list.selected = seqs.get(to).copied();
}

fn follow(list: &mut super::app::List<u64>, newest: Option<u64>) {
    list.follow = !list.follow;
    if !list.follow {
        list.selected = newest;
    }
}

fn enter(app: &mut App, live: &Status) {
    let frozen = app.frozen.take();
    let shown = frozen.as_deref().unwrap_or(live);
    match app.focused() {
        Pane::Tables => {
            if let Some(table) = app.selected_table(shown) {
                app.tables.selected = Some(shown.tables[table].table.0.clone());
                show(app, View::Chunks);
            }
        }
        Pane::Events => {
            let order = app.event_order(shown);
            let at = App::newest_first(&app.events, order.iter().map(|&at| shown.events[at].seq));
            app.dialog = order.get(at).map(|&at| event_detail(shown, at));
        }
        Pane::Log => {
            let order = app.log_order(shown);
            let at = App::newest_first(&app.log, order.iter().map(|&at| shown.notices[at].seq));
            app.dialog = order.get(at).map(|&at| {
                let notice = &shown.notices[at];
                Dialog::Detail {
                    title: format!("Log, {}", level_word(notice.level)),
                    lines: vec![
                        ("at".to_owned(), format!("{} UTC", format::moment(notice.at, shown.at))),
                        ("text".to_owned(), notice.text.clone()),
                    ],
                    scroll: 0,
                }
            });
        }
        Pane::Errors => app.dialog = error_detail(app, shown),
        Pane::Chunks | Pane::Replication | Pane::Sink => {}
    }
    app.frozen = frozen;
}

fn event_detail(shown: &Status, at: usize) -> Dialog {
    let event = &shown.events[at];
    let mut lines = vec![
        ("at".to_owned(), format!("{} UTC", format::time_millis(event.at))),
        ("table".to_owned(), event_table(shown, event.table)),
        (if event.rows.is_some() { "chunk" } else { "id" }.to_owned(), event.key.clone()),
    ];
    let mut add = |label: &str, text: Option<String>| {
        if let Some(text) = text {
            lines.push((label.to_owned(), text));
        }
    };
    add("rows", event.rows.map(format::count));
    add("xid", event.xid.map(|xid| xid.to_string()));
    add("commit at", event.lsn.map(|lsn| lsn.to_string()));
    add("took", event.latency.map(format::latency));
    add("answer", (!event.detail.is_empty()).then(|| event.detail.clone()));
    Dialog::Detail { title: event_word(event.kind).trim_start_matches('!').to_owned(), lines, scroll: 0 }
}

fn error_detail(app: &App, shown: &Status) -> Option<Dialog> {
    let lines = app.error_lines(shown);
    let chosen = app.errors.selected.as_ref().and_then(|key| lines.iter().find(|line| line.key == *key));
    let line = chosen.or_else(|| lines.first())?;
    let moment =
        |at: Option<i64>| at.map_or_else(format::unknown, |at| format!("{} UTC", format::moment(at, shown.at)));
    let mut text = vec![("what".to_owned(), line.what.clone()), ("reason".to_owned(), line.reason.clone())];
    if !line.hint.is_empty() {
        text.push(("what to do".to_owned(), line.hint.clone()));
    }
    text.push(("count".to_owned(), line.count.map_or_else(format::unknown, format::count)));
    text.push(("first seen".to_owned(), moment(line.first)));
    text.push(("last seen".to_owned(), moment(line.last)));
    if !line.last_id.is_empty() {
        text.push(("last id".to_owned(), line.last_id.clone()));
    }
    Some(Dialog::Detail { title: "Error".to_owned(), lines: text, scroll: 0 })
}

/// The live state of the table that the list has its cursor on. Where there is none, it says so.
fn chosen_table<'a>(app: &mut App, live: &'a Status) -> Option<&'a TableStatus> {
    let shown = app.frozen.as_deref().unwrap_or(live);
    let chosen = app.selected_table(shown).map(|at| &shown.tables[at].table.0);
    let table = chosen.and_then(|id| live.tables.iter().find(|table| table.table.0 == *id));
    if table.is_none() {
        let filtered = !app.tables.filter.is_empty();
        let why = if filtered { "no table matches the filter, Esc clears it" } else { "there is no table yet" };
        app.say(format!("Nothing was asked for: {why}"), true);
    }
    table
}

fn pause(app: &mut App, live: &Status) -> Option<Command> {
    if live.pause_requested {
        return Some(Command::Resume);
    }
    let question = format!("Pause (y/N)? Slot grows: {}", headroom(&live.replication));
    app.dialog = Some(Dialog::Ask { question, command: Command::Pause });
    None
}

fn pause_table(app: &mut App, live: &Status) -> Option<Command> {
    let table = chosen_table(app, live)?;
    let id = table.table.0.clone();
    if table.state == TableState::Paused {
        return Some(Command::ResumeTable(id));
    }
    let name = text::clean(&short_name(&id));
    let question = format!("Pause the copy of {name} (y/N)? The stream goes on.");
    app.dialog = Some(Dialog::Ask { question, command: Command::PauseTable(id) });
    None
}

fn resnapshot(app: &mut App, live: &Status) {
    let Some(table) = chosen_table(app, live) else { return };
    let id = table.table.0.clone();
    let name = text::clean(&short_name(&id));
    if table.resnapshot && table.first_copy {
        app.say(format!("The first copy of {name} cannot be given up: P holds it"), true);
        return;
    }
    app.dialog = Some(if table.resnapshot {
        let question = format!("Give up the resnapshot of {name} (y/N)? Its documents stay as they are.");
        Dialog::Ask { question, command: Command::CancelResnapshot(id) }
    } else {
        Dialog::Resnapshot { table: id, typed: String::new(), go: false, wrong: false }
    });
}

/// What was typed names `table`, as it is or as the screen shows it.
fn names(typed: &str, table: &TableId) -> bool {
    let full = table.to_string();
    [&full, &table.name].into_iter().any(|name| typed == name || typed == text::clean(name))
}

fn in_dialog(app: &mut App, live: &Status, dialog: Dialog, action: Action) -> Option<Command> {
    let other = matches!(
        action,
        Action::NextPane | Action::PreviousPane | Action::Left | Action::Right | Action::Up | Action::Down
    );
    app.dialog = match dialog {
        Dialog::Quit { stop: yes } => match action {
            Action::Enter if yes => return stop(app),
            Action::Enter | Action::Back => None,
            _ if other => Some(Dialog::Quit { stop: !yes }),
            _ => Some(Dialog::Quit { stop: yes }),
        },
        Dialog::Help { scroll } => match action {
            Action::Back | Action::Help | Action::Quit | Action::Enter => None,
            _ => Some(Dialog::Help { scroll: scrolled(scroll, action) }),
        },
        Dialog::Detail { title, lines, scroll } => match action {
            Action::Back | Action::Enter | Action::Quit => None,
            _ => Some(Dialog::Detail { title, lines, scroll: scrolled(scroll, action) }),
        },
        Dialog::Ask { question, command } => match action {
            Action::Yes if app.read_only(live) => {
                app.say("refused: read-only".to_owned(), true);
                None
            }
            Action::Yes => return Some(command),
            Action::No => None,
            _ => Some(Dialog::Ask { question, command }),
        },
        Dialog::Filter { pane, before } => {
            if let Some(filter) = app.filter_mut(pane) {
                match action {
                    Action::Type(c) if filter.0.chars().count() < 100 => filter.0.push(c),
                    Action::Erase => {
                        filter.0.pop();
                    }
                    Action::Back => *filter = before.clone(),
                    _ => {}
                }
            }
            (!matches!(action, Action::Enter | Action::Back)).then_some(Dialog::Filter { pane, before })
        }
        Dialog::Resnapshot { table, mut typed, mut go, mut wrong } => {
            match action {
                Action::Back => return None,
                Action::Enter if !go => return None,
                Action::Enter if app.read_only(live) => {
                    app.say("Resnapshot refused: read-only".to_owned(), true);
                    return None;
                }
                Action::Enter if names(&typed, &table) => return Some(Command::Resnapshot(table)),
                Action::Enter => wrong = true,
                Action::Type(c) if typed.chars().count() < 200 => {
                    typed.push(c);
                    wrong = false;
                }
                Action::Erase => {
                    typed.pop();
                    wrong = false;
                }
                _ if other => go = !go,
                _ => {}
            }
            Some(Dialog::Resnapshot { table, typed, go, wrong })
        }
    };
    None
}

/// The drawing clamps it to what there is.
fn scrolled(scroll: usize, action: Action) -> usize {
    match action {
        Action::Up => scroll.saturating_sub(1),
        Action::Down => scroll.saturating_add(1),
        Action::PageUp | Action::HalfUp => scroll.saturating_sub(8),
        Action::PageDown | Action::HalfDown => scroll.saturating_add(8),
        Action::Top => 0,
        Action::Bottom => usize::MAX,
        _ => scroll,
    }
}
