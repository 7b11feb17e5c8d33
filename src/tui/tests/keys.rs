//! Key transcripts: what is typed, and what the engine is asked for.

use std::time::Duration;

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::*;
use crate::engine::{Command, Commands, Control, Phase};
use crate::table::TableId;
use crate::tui::app::{Dialog, Leave, Pane, View};
use crate::tui::{input, update};

fn key(c: char) -> KeyEvent {
    let code = match c {
        '\n' => KeyCode::Enter,
        '\t' => KeyCode::Tab,
        '\u{1b}' => KeyCode::Esc,
        '\u{8}' => KeyCode::Backspace,
        '\u{1a}' => return KeyEvent::new(KeyCode::Char('z'), KeyModifiers::CONTROL),
        '\u{3}' => return KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL),
        c => KeyCode::Char(c),
    };
    KeyEvent::new(code, KeyModifiers::NONE)
}

/// Presses the keys one after the other and gives what was sent.
fn press(app: &mut App, status: &Status, keys: &str) -> Vec<Command> {
    let mut sent = Vec::new();
    for c in keys.chars() {
        sent.extend(input::action(app, key(c)).and_then(|action| update::update(app, status, action)));
    }
    sent
}

fn ready(status: &Status) -> App {
    let mut app = app();
    app.observe(status);
    draw(&mut app, status, 80, 24);
    app
}

fn orders() -> TableId {
    TableId::new("public", "orders")
}

#[test]
fn a_pause_is_asked_for_once_and_only_with_y() {
    let status = fixture::backfill();
    for (keys, sent) in [
        ("py", vec![Command::Pause]),
        ("pY", vec![Command::Pause]),
        ("pn", vec![]),
        ("p\n", vec![]),
        ("p\u{1b}", vec![]),
        ("pp", vec![]),
        ("pqy", vec![]),
        ("Py", vec![Command::PauseTable(orders())]),
        ("jPy", vec![Command::PauseTable(TableId::new("public", "order_items"))]),
        ("Pn", vec![]),
    ] {
        assert_eq!(press(&mut ready(&status), &status, keys), sent, "{keys:?}");
    }
    let mut app = ready(&status);
    press(&mut app, &status, "p");
    let text = text(&draw(&mut app, &status, 80, 24));
    assert!(text.contains("Pause (y/N)? Slot grows: 3.4 of 50 GiB, full in 3h14m at 4.1 MiB/s"), "{text}");
}

#[test]
fn a_resume_asks_nothing() {
    for status in [fixture::paused(), fixture::pausing()] {
        assert_eq!(press(&mut ready(&status), &status, "p"), [Command::Resume]);
    }
    let status = fixture::backfill();
    assert_eq!(press(&mut ready(&status), &status, "GP"), [Command::ResumeTable(TableId::new("public", "carts"))]);
}

#[test]
fn a_pause_during_trouble_is_seen_and_can_be_taken_back() {
    let mut status = fixture::degraded();
    let mut app = ready(&status);
    assert_eq!(press(&mut app, &status, "py"), [Command::Pause]);
    let (control, mut commands) = Control::channel();
    app.track(Command::Pause, control.request(Command::Pause), &status);
    commands.try_recv().unwrap().1.send(Ok(())).unwrap();
    status.pause_requested = true;
    app.observe(&status);
    assert_eq!(app.requests.len(), 0, "it is true, although the phase does not change");
    let shown = text(&draw(&mut app, &status, 80, 24));
    assert!(shown.contains("RETRYING, paused attempt 7") && shown.contains("p:Resume"), "{shown}");
    assert_eq!(press(&mut app, &status, "p"), [Command::Resume]);
    app.track(Command::Resume, control.request(Command::Resume), &status);
    commands.try_recv().unwrap().1.send(Ok(())).unwrap();
    status.pause_requested = false;
    app.observe(&status);
    assert_eq!(app.requests.len(), 0);
    assert!(!text(&draw(&mut app, &status, 80, 24)).contains("paused attempt"));
}

#[test]
fn a_resnapshot_needs_the_name_and_the_button() {
    let status = fixture::backfill();
    for (keys, sends) in [
        ("rorders\n", false),
        ("r\t\n", false),
        ("rordera\t\n", false),
        ("rOrders\t\n", false),
        ("rorders \t\n", false),
        ("rorder\t\n", false),
        ("rordersx\t\n", false),
        ("rorders\t\u{1b}", false),
        ("rorders\t\t\n", false),
        ("rorders\t\n", true),
        ("rpublic.orders\t\n", true),
        ("rordersx\u{8}\t\n", true),
        ("rordera\t\n\u{8}s\n", true),
        ("rorders\t\n\n\n", true),
    ] {
        let wanted = if sends { vec![Command::Resnapshot(orders())] } else { vec![] };
        assert_eq!(press(&mut ready(&status), &status, keys), wanted, "{keys:?}");
    }
}

#[test]
fn the_resnapshot_keeps_its_target_when_the_list_turns_round() {
    let mut status = fixture::backfill();
    let mut app = ready(&status);
    assert_eq!(press(&mut app, &status, "r"), []);
    status.tables.reverse();
    draw(&mut app, &status, 80, 24);
    assert_eq!(press(&mut app, &status, "orders\t\n"), [Command::Resnapshot(orders())]);
}

#[test]
fn a_running_resnapshot_is_given_up_instead() {
    let mut status = fixture::backfill();
    status.tables[0].resnapshot = true;
    assert_eq!(press(&mut ready(&status), &status, "ry"), [Command::CancelResnapshot(orders())]);
    assert_eq!(press(&mut ready(&status), &status, "rn"), []);
    // Its first copy would leave documents missing.
    status.tables[0].first_copy = true;
    let mut app = ready(&status);
    assert_eq!(press(&mut app, &status, "ry"), []);
    let text = text(&draw(&mut app, &status, 80, 24));
    assert!(text.contains("The first copy of orders cannot be given up: P holds it"), "{text}");
}

#[test]
fn read_only_refuses_whatever_steers() {
    let status = fixture::read_only();
    for keys in ["py", "Py", "rorders\t\n", "jPy"] {
        let mut app = ready(&status);
        assert_eq!(press(&mut app, &status, keys), [], "{keys:?}");
    }
    let mut app = ready(&status);
    press(&mut app, &status, "p");
    assert_eq!(app.message.as_ref().map(|message| message.text.as_str()), Some("Pause refused: read-only"));
    let text = text(&draw(&mut app, &status, 200, 60));
    assert!(!text.contains("p:Pause") && !text.contains("r:Resnapshot") && text.contains("RO BACKFILL"));
    // A dialog that was open before sends nothing either.
    let writable = fixture::backfill();
    let mut app = ready(&writable);
    press(&mut app, &writable, "rorders\t");
    assert_eq!(press(&mut app, &status, "\n"), []);
    let mut app = ready(&writable);
    press(&mut app, &writable, "p");
    assert_eq!(press(&mut app, &status, "y"), []);
    // Leaving is no steering.
    assert_eq!(press(&mut ready(&status), &status, "q\n"), [Command::Stop]);
}

#[test]
fn nothing_is_steered_after_the_end() {
    for phase in [Phase::Failed, Phase::Stopping, Phase::Stopped] {
        let status = Status { phase, ..fixture::backfill() };
        assert_eq!(press(&mut ready(&status), &status, "pyPyrorders\t\n"), [], "{phase:?}");
    }
}

#[test]
fn escape_never_quits() {
    for status in [fixture::backfill(), fixture::failed(), fixture::connecting(), fixture::paused()] {
        for keys in ["", "q", "?", "/x", "2", "3", "4j", "5\n", "6\n", "z", "p", "r", "\u{3}"] {
            let mut app = ready(&status);
            press(&mut app, &status, keys);
            app.leave = None;
            for _ in 0..10 {
                assert_eq!(press(&mut app, &status, "\u{1b}"), [], "{keys:?}");
            }
            assert_eq!((app.leave, app.stopping), (None, None), "{keys:?}");
            assert_eq!((app.view, app.single(), app.dialog.as_ref()), (View::Overview, None, None), "{keys:?}");
        }
    }
}

#[test]
fn quitting_asks_and_stops_once() {
    let status = fixture::backfill();
    assert_eq!(press(&mut ready(&status), &status, "q"), []);
    assert_eq!(press(&mut ready(&status), &status, "q\n"), [Command::Stop]);
    assert_eq!(press(&mut ready(&status), &status, "q\nq\n"), [Command::Stop]);
    assert_eq!(press(&mut ready(&status), &status, "q\t\n"), []);
    assert_eq!(press(&mut ready(&status), &status, "qn\u{1b}\n"), []);
    // Where nothing runs, there is nothing to ask.
    let failed = fixture::failed();
    let mut app = ready(&failed);
    assert_eq!(press(&mut app, &failed, "q"), []);
    assert_eq!(app.leave, Some(Leave::Ended));
}

#[test]
fn only_two_interrupts_in_two_seconds_force() {
    let status = fixture::backfill();
    let mut app = ready(&status);
    press(&mut app, &status, "\u{3}");
    assert_eq!((&app.dialog, app.leave), (&Some(Dialog::Quit { stop: true }), None));
    app.clock += Duration::from_millis(2001);
    press(&mut app, &status, "\u{3}");
    assert_eq!(app.leave, None);
    app.clock += Duration::from_millis(1999);
    press(&mut app, &status, "\u{3}");
    assert_eq!(app.leave, Some(Leave::Forced));
    // From any dialog, and while it stops.
    for keys in ["r", "/", "p", "?", "q\n"] {
        let mut app = ready(&status);
        press(&mut app, &status, keys);
        press(&mut app, &status, "\u{3}\u{3}");
        assert_eq!(app.leave, Some(Leave::Forced), "{keys:?}");
    }
}

#[test]
fn pasted_text_is_typed_where_text_is_wanted_and_no_key_anywhere() {
    let status = fixture::backfill();
    for keys in ["", "p", "q", "?", "4j\n", "5"] {
        let mut app = ready(&status);
        press(&mut app, &status, keys);
        let before = app.dialog.clone();
        update::paste(&mut app, &status, "select qty from orders;\nSELECT 1;\ny\n");
        assert_eq!((&app.dialog, app.leave, app.stopping), (&before, None, None), "{keys:?}");
        assert!(app.message.is_some());
    }
    let mut app = ready(&status);
    press(&mut app, &status, "/");
    update::paste(&mut app, &status, "order\r\n\u{1b}_items\n");
    assert!(matches!(app.dialog, Some(Dialog::Filter { .. })));
    assert_eq!(app.tables.filter.0, "order_items");
    let mut app = ready(&status);
    press(&mut app, &status, "r");
    update::paste(&mut app, &status, "orders\t\n");
    assert_eq!(press(&mut app, &status, "\t\n"), [Command::Resnapshot(orders())]);
}

#[test]
fn a_suspension_is_refused_in_words() {
    let status = fixture::backfill();
    for keys in ["\u{1a}", "p\u{1a}n", "/\u{1a}\n", "q\u{1a}\u{1b}"] {
        let mut app = ready(&status);
        assert_eq!(press(&mut app, &status, keys), [], "{keys:?}");
        let shown = text(&draw(&mut app, &status, 80, 24));
        assert!(shown.contains("Not suspended: the pipeline goes on. q stops it; or use another terminal "), "{shown}");
    }
}

#[test]
fn a_key_held_down_moves_and_does_nothing_else() {
    let status = fixture::backfill();
    let mut app = ready(&status);
    let event = |c: char, kind| KeyEvent { kind, ..key(c) };
    for c in ['p', 'q', 'r', ' ', 'z', '\n'] {
        assert_eq!(input::action(&app, event(c, KeyEventKind::Repeat)), None, "{c}");
        assert_eq!(input::action(&app, event(c, KeyEventKind::Release)), None, "{c}");
    }
    assert!(input::action(&app, event('j', KeyEventKind::Repeat)).is_some());
    assert!(input::action(&app, event('j', KeyEventKind::Release)).is_none());
    press(&mut app, &status, "p");
    assert_eq!(input::action(&app, event('y', KeyEventKind::Repeat)), None);
}

#[test]
fn a_request_is_no_fact_until_the_status_says_so() {
    let status = fixture::backfill();
    let mut app = ready(&status);
    let (control, mut commands): (Control, Commands) = Control::channel();
    let line = |app: &mut App, status: &Status| {
        app.observe(status);
        text(&draw(app, status, 80, 24)).lines().nth(22).unwrap().trim().to_owned()
    };
    let mut ask = |app: &mut App| {
        app.track(Command::Pause, control.request(Command::Pause), &status);
        commands.try_recv().unwrap().1
    };
    let reply = ask(&mut app);
    assert_eq!(line(&mut app, &status), "pause requested");
    reply.send(Ok(())).unwrap();
    assert_eq!(line(&mut app, &status), "pause requested and taken, not done yet");
    assert!(line(&mut app, &fixture::pausing()).starts_with("PAUSING 00:00:02  slot grows"));

    let reply = ask(&mut app);
    reply.send(Err("the copy is being planned\u{1b}[2J".to_owned())).unwrap();
    assert_eq!(line(&mut app, &status), "! pause refused: the copy is being planned·[2J");
    app.clock += Duration::from_secs(13);
    assert!(line(&mut app, &status).starts_with("! 17 documents rejected"));

    drop(ask(&mut app));
    assert_eq!(line(&mut app, &status), "! pause refused: the engine has ended");

    let reply = ask(&mut app);
    reply.send(Ok(())).unwrap();
    app.observe(&status);
    app.clock += Duration::from_secs(61);
    assert!(line(&mut app, &status).starts_with("! pause was taken 60 s ago and has not happened yet"));
}

#[test]
fn a_resnapshot_that_ends_between_two_frames_is_seen() {
    let mut status = fixture::backfill();
    status.tables[0].resnapshots_ended = 4;
    let mut app = ready(&status);
    let (control, mut commands) = Control::channel();
    let command = Command::Resnapshot(orders());
    app.track(command.clone(), control.request(command), &status);
    commands.try_recv().unwrap().1.send(Ok(())).unwrap();
    app.observe(&status);
    assert_eq!(app.requests.len(), 1, "nothing has happened yet");
    status.tables[0].resnapshots_ended = 5;
    app.observe(&status);
    assert_eq!(app.requests.len(), 0);
    app.clock += Duration::from_secs(61);
    app.observe(&status);
    assert_eq!(app.message, None);
}

#[test]
fn a_stop_that_is_refused_can_be_asked_for_again() {
    let status = fixture::backfill();
    let mut app = ready(&status);
    let (control, mut commands) = Control::channel();
    assert_eq!(press(&mut app, &status, "q\n"), [Command::Stop]);
    app.track(Command::Stop, control.request(Command::Stop), &status);
    commands.try_recv().unwrap().1.send(Err("not now".to_owned())).unwrap();
    app.observe(&status);
    assert_eq!((app.stopping, app.leave), (None, None));
    assert_eq!(press(&mut app, &status, "q\n"), [Command::Stop]);
    // An engine that has gone cannot be waited for.
    app.track(Command::Stop, control.request(Command::Stop), &status);
    drop(commands);
    app.observe(&status);
    assert_eq!(app.leave, Some(Leave::Ended));
}

#[test]
fn filters_are_live_and_escape_brings_the_old_one_back() {
    let status = fixture::backfill();
    let mut app = ready(&status);
    let names = |app: &App| -> Vec<String> {
        app.table_order(&status).iter().map(|&at| status.tables[at].table.0.name.clone()).collect()
    };
    press(&mut app, &status, "/ORDER");
    assert_eq!(names(&app), ["orders", "order_items"]);
    press(&mut app, &status, "_\n");
    assert_eq!(names(&app), ["order_items"]);
    press(&mut app, &status, "/x\u{1b}");
    assert_eq!(names(&app), ["order_items"]);
    press(&mut app, &status, "\u{1b}");
    assert_eq!(names(&app).len(), 7);
    press(&mut app, &status, "/!o\n");
    assert!(!names(&app).contains(&"orders".to_owned()) && !names(&app).is_empty());
    // What is acted on is what is in sight: the chosen table is hidden by the filter.
    let mut app = ready(&status);
    press(&mut app, &status, "G/orders\n");
    assert_eq!(press(&mut app, &status, "Py"), [Command::PauseTable(orders())]);
    press(&mut app, &status, "/nothing of the kind\n");
    assert_eq!(press(&mut app, &status, "Pyrorders\t\n"), []);
    for key in ["r", "P"] {
        let mut app = ready(&status);
        press(&mut app, &status, &format!("/nothing of the kind\n{key}"));
        let shown = text(&draw(&mut app, &status, 80, 24));
        assert!(shown.contains("! Nothing was asked for: no table matches the filter, Esc clears it"), "{shown}");
    }
}

#[test]
fn the_selection_is_a_table_not_a_row() {
    let mut status = fixture::backfill();
    let mut app = ready(&status);
    press(&mut app, &status, "jj");
    let chosen = |app: &App, status: &Status| status.tables[app.selected_table(status).unwrap()].table.0.name.clone();
    assert_eq!(chosen(&app, &status), "customers");
    status.tables.reverse();
    assert_eq!(chosen(&app, &status), "customers");
    press(&mut app, &status, "sI");
    assert_eq!(chosen(&app, &status), "customers");
    press(&mut app, &status, "kkkkkkkkkkkk");
    assert_eq!(chosen(&app, &status), "products", "the last by name, turned round");
}

#[test]
fn events_stay_where_they_are_looked_at() {
    let mut status = fixture::backfill();
    let mut app = ready(&status);
    press(&mut app, &status, "4");
    let first = |app: &mut App, status: &Status| text(&draw(app, status, 80, 24)).lines().nth(4).unwrap().to_owned();
    first(&mut app, &status);
    press(&mut app, &status, "jjjjj");
    let before = first(&mut app, &status);
    let selected = app.events.selected;
    for _ in 0..3 {
        let mut event = status.events.last().unwrap().clone();
        event.seq += 1;
        event.at += 1000;
        status.events.push(event);
    }
    let _ = first(&mut app, &status);
    assert_eq!(app.events.selected, selected);
    assert!(text(&draw(&mut app, &status, 80, 24)).contains(before.trim_matches(['│', ' '])));
    press(&mut app, &status, "g");
    assert!(app.events.follow);
    press(&mut app, &status, "F");
    assert!(!app.events.follow);
}

#[test]
fn a_frozen_view_stays_while_the_header_lives() {
    let mut status = fixture::backfill();
    let mut app = ready(&status);
    press(&mut app, &status, " ");
    status.at += 12_000_000;
    status.phase = Phase::Failed;
    status.tables[0].rows_done = 0;
    app.failure_seen = true;
    let screen = text(&draw(&mut app, &status, 80, 24));
    assert!(screen.contains("FROZEN 00:12") && screen.contains("FAILED") && screen.contains("82.8%"), "{screen}");
    press(&mut app, &status, " ");
    let screen = text(&draw(&mut app, &status, 80, 24));
    assert!(!screen.contains("FROZEN") && !screen.contains("82.8%"), "{screen}");
}

#[test]
fn panes_and_views_turn() {
    let status = fixture::backfill();
    let mut app = ready(&status);
    draw(&mut app, &status, 120, 40);
    let mut seen = Vec::new();
    for _ in 0..5 {
        seen.push(app.focused());
        press(&mut app, &status, "\t");
    }
    assert_eq!(seen, [Pane::Tables, Pane::Replication, Pane::Chunks, Pane::Sink, Pane::Events]);
    assert_eq!(app.focused(), Pane::Tables);
    press(&mut app, &status, "j\n");
    assert_eq!((app.view, app.focused()), (View::Chunks, Pane::Chunks));
    press(&mut app, &status, "l");
    assert_eq!(app.selected_table(&status), Some(2));
    press(&mut app, &status, "5");
    press(&mut app, &status, "\u{1b}");
    assert_eq!(app.view, View::Chunks);
    press(&mut app, &status, "\u{1b}");
    assert_eq!(app.view, View::Overview);
    press(&mut app, &status, "z");
    assert_eq!(app.single(), Some(Pane::Tables));
}
