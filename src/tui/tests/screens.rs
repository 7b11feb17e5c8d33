//! The whole screen, as text and at every size.

use super::*;
use crate::tui::app::{Dialog, Pane, View};
use crate::tui::input;
use crate::tui::style::Token;
use crate::tui::update::update;
use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

/// Two minutes of history, so that the sparklines have something to show.
fn warm(app: &mut App, status: &Status) {
    for step in (1..=24_i32).rev() {
        let mut earlier = status.clone();
        earlier.at -= i64::from(step) * 5_000_000;
        let level = f64::from(24 - step) / 24.0;
        earlier.replication.lag_bytes =
            status.replication.lag_bytes.map(|lag| lag / 24 * u64::try_from(24 - step).unwrap());
        earlier.sink.last_latency = status.sink.last_latency.map(|latency| latency * (0.4 + (level * 9.0).sin().abs()));
        app.observe(&earlier);
    }
    app.observe(status);
}

fn press(app: &mut App, status: &Status, keys: &str) {
    for c in keys.chars() {
        let code = match c {
            '\n' => KeyCode::Enter,
            '\t' => KeyCode::Tab,
            c => KeyCode::Char(c),
        };
        if let Some(action) = input::action(app, KeyEvent::new(code, KeyModifiers::NONE)) {
            assert_eq!(update(app, status, action), None, "a picture sends nothing");
        }
    }
}

fn snapshot(name: &str, keys: &str, status: &Status, sizes: &[(u16, u16)]) {
    for &(width, height) in sizes {
        let mut app = app();
        warm(&mut app, status);
        draw(&mut app, status, width, height);
        press(&mut app, status, keys);
        let buffer = draw(&mut app, status, width, height);
        let mut settings = insta::Settings::clone_current();
        settings.set_snapshot_path("../snapshots");
        settings.set_prepend_module_to_snapshot(false);
        settings.bind(|| insta::assert_snapshot!(format!("{name}_{width}x{height}"), text(&buffer)));
    }
}

#[test]
fn scenarios() {
    for (name, status) in fixture::all() {
        snapshot(name, "", &status, &[(80, 24), (120, 40), (200, 60)]);
    }
    snapshot(
        "backfill",
        "",
        &fixture::backfill(),
        &[(59, 14), (60, 15), (70, 20), (80, 36), (100, 50), (110, 36), (180, 54), (200, 24)],
    );
}

#[test]
fn views() {
    let status = fixture::backfill();
    for (name, keys) in
        [("view_tables", "2"), ("view_chunks", "3"), ("view_events", "4"), ("view_errors", "5"), ("view_log", "6")]
    {
        snapshot(name, keys, &status, &[(80, 24), (120, 40)]);
    }
    snapshot("zoom_events", "\tz", &status, &[(80, 24)]);
    snapshot("errors_of_retries", "5", &fixture::degraded(), &[(80, 24)]);
}

#[test]
fn dialogs() {
    let status = fixture::backfill();
    for (name, keys) in [
        ("dialog_quit", "q"),
        ("dialog_help", "?"),
        ("dialog_resnapshot", "rord"),
        ("dialog_pause", "p"),
        ("dialog_filter", "/!item"),
        ("dialog_event", "4j\n"),
        ("dialog_error", "5\n"),
    ] {
        snapshot(name, keys, &status, &[(80, 24), (60, 15)]);
    }
    snapshot("help_read_only", "?", &fixture::read_only(), &[(120, 40)]);
    snapshot("hostile_errors", "5\n", &fixture::hostile(), &[(80, 24)]);
}

#[test]
fn ascii() {
    let status = fixture::hostile();
    let mut app = App::new(&Options {
        color: ColorChoice::Never,
        ascii: Some(true),
        name: "NAME".to_owned(),
        ..Options::default()
    });
    warm(&mut app, &status);
    let text = text(&draw(&mut app, &status, 120, 40));
    assert!(text.is_ascii());
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.bind(|| insta::assert_snapshot!("ascii_120x40", text));
}

/// What is drawn twice from the same state is the same, cell for cell, styles included: no frame depends on the one before.
#[test]
fn drawing_again_changes_nothing() {
    for (name, status) in fixture::all() {
        let mut app = app();
        warm(&mut app, &status);
        for (width, height) in [(80, 24), (200, 60)] {
            let first = draw(&mut app, &status, width, height);
            assert!(first == draw(&mut app, &status, width, height), "{name} at {width}x{height}");
        }
    }
}

/// No cell holds anything that a terminal would obey.
#[test]
fn no_order_reaches_a_cell() {
    let status = fixture::hostile();
    for keys in ["", "2", "3", "4", "4j\n", "5", "5\n", "6", "6\n", "r", "P", "/\u{1b}\u{202e}", "jjr"] {
        for (width, height) in [(60, 15), (80, 24), (120, 40), (200, 60)] {
            let mut app = app();
            draw(&mut app, &status, width, height);
            press(&mut app, &status, keys);
            let buffer = draw(&mut app, &status, width, height);
            for cell in &buffer.content {
                let bad = |c: char| {
                    c.is_control()
                        || ('\u{200b}'..='\u{200f}').contains(&c)
                        || ('\u{2028}'..='\u{202e}').contains(&c)
                        || ('\u{2066}'..='\u{2069}').contains(&c)
                };
                assert!(!cell.symbol().chars().any(bad), "{:?} after {keys:?}", cell.symbol());
            }
        }
    }
}

/// The header, the status line and the key hints never go, and neither does the selection's mark.
#[test]
fn what_never_goes() {
    for (width, height) in [(60, 15), (79, 20), (80, 24), (110, 36), (120, 40), (180, 54), (200, 60)] {
        let mut app = app();
        let text = text(&draw(&mut app, &fixture::backfill(), width, height));
        for wanted in ["BACKFILL", "58.0 MiB", "of 50 GiB", "3h14m", "rejected", "17!", "?:Help", "q:Quit", ">orders"] {
            assert!(text.contains(wanted), "{wanted} is missing at {width}x{height}:\n{text}");
        }
    }
}

/// Half of a rate reads as a size.
#[test]
fn what_does_not_fit_the_header_goes_as_a_whole() {
    let mut status = fixture::streaming();
    let replication = &mut status.replication;
    (replication.retained_bytes, replication.active) = (Some(2_831_155), Some(false));
    replication.wal_per_second = Some(96.5 * 1_048_576.0 / 3600.0);
    let line = |width| {
        let text = text(&draw(&mut app(), &status, width, 24));
        text.lines().nth(1).unwrap().to_owned()
    };
    let narrow = line(80);
    assert!(narrow.contains("WAL kept 2.7 MiB ") && narrow.contains("slot inactive"), "{narrow}");
    assert!(!narrow.contains('+') && !narrow.contains('…'), "{narrow}");
    assert!(line(100).contains("2.7 MiB, no limit, +96.5 MiB/h"), "{}", line(100));
    // A deadline stays before a slot that is inactive.
    let mut status = fixture::backfill();
    status.replication.active = Some(false);
    let text = text(&draw(&mut app(), &status, 60, 15));
    let line = text.lines().nth(1).unwrap();
    assert!(line.contains("3.4 of 50 GiB, full in 3h14m") && !line.contains('…'), "{line}");
}

#[test]
fn slow_answers_fit_their_pane() {
    let mut status = fixture::backfill();
    status.sink.latency = Some(crate::engine::Latency { p50: 4_145.0, p95: 12_714.0, p99: 14_612.0, max: 20_000.0 });
    for (width, height, wanted) in [
        (80, 24, "bulk p99 14.6 s"),
        (120, 40, "p50 4.1  p95 12.7  p99 14.6 s"),
        (120, 40, "bulk p50 4.1 p99 14.6 s"),
        (200, 60, "p50 4.1  p95 12.7  p99 14.6  max 20.0 s"),
    ] {
        let shown = text(&draw(&mut app(), &status, width, height));
        assert!(shown.contains(wanted), "{wanted} is missing:\n{shown}");
    }
}

#[test]
fn a_sweep_has_no_time_to_its_end() {
    let mut status = fixture::streaming();
    status.tables[0].state = crate::engine::TableState::Copying;
    let header = text(&draw(&mut app(), &status, 80, 24)).lines().next().unwrap().to_owned();
    assert!(header.contains("100.0%") && !header.contains("ETA"), "{header}");
}

#[test]
fn an_outage_is_one_error_and_its_begin_is_not_its_last_time() {
    let mut status = fixture::degraded();
    let errors = |status: &Status| {
        let mut app = app();
        draw(&mut app, status, 80, 24);
        press(&mut app, status, "5");
        text(&draw(&mut app, status, 80, 24))
    };
    // The problem of a PostgreSQL that is gone, and a sink that is gone too.
    let shown = errors(&status);
    assert!(
        shown.contains("(pipeline)      -        Elasticsearch at") && shown.contains("(elasticsearch) -"),
        "{shown}"
    );
    status.problem.as_mut().unwrap().message = "connection refused".to_owned();
    let shown = errors(&status);
    assert!(!shown.contains("(pipeline)") && shown.contains("(elasticsearch)"), "{shown}");
}

#[test]
fn the_trend_of_the_lag_is_no_noise() {
    const MIB: u64 = 1 << 20;
    let trend = |lags: [u64; 2], now: u64| {
        let mut app = app();
        let mut status = fixture::streaming();
        for (step, lag) in lags.into_iter().flat_map(|lag| [lag; 4]).chain([now]).enumerate() {
            // All but the last within bins of their own.
            status.at = fixture::NOW + i64::try_from(step.min(7)).unwrap() * 5_000_000;
            status.replication.lag_bytes = Some(lag);
            status.at += i64::from(step == 8);
            app.observe(&status);
        }
        let shown = text(&draw(&mut app, &status, 200, 60));
        ["▲ rising", "▼ falling", "= steady"].into_iter().find(|word| shown.contains(word))
    };
    assert_eq!(trend([0, 700], 300), Some("= steady"));
    assert_eq!(trend([MIB, 3 * MIB], 3 * MIB), Some("▲ rising"));
    assert_eq!(trend([3 * MIB, MIB], MIB), Some("▼ falling"));
    assert_eq!(trend([MIB, 3 * MIB], 0), None);
}

/// A pause lets go of the slot: that is no warning. Whatever else makes it inactive is one.
#[test]
fn an_inactive_slot_is_a_warning_unless_the_pipeline_is_paused() {
    let token = |status: &Status| crate::tui::render::replication::slot_word(status);
    let mut status = fixture::paused();
    assert_eq!(token(&status), ("slot inactive, paused".to_owned(), Token::Dim));
    for (width, height, wanted) in [(100, 24, "slot inactive, paused"), (200, 60, "reserved, inactive, paused")] {
        let shown = text(&draw(&mut app(), &status, width, height));
        assert!(shown.contains(wanted), "{shown}");
    }
    status.pause_requested = false;
    assert_eq!(token(&status), ("slot inactive".to_owned(), Token::Warn));
    status.pause_requested = true;
    status.replication.wal_status = Some("unreserved".to_owned());
    assert_eq!(token(&status).1, Token::Bad);
}

/// A list must show what is selected, wherever the cursor goes.
#[test]
fn the_selected_table_is_in_sight_and_keeps_its_place() {
    let status = fixture::many_tables();
    let mut app = app();
    for keys in ["", "G", "kkkkkkkkkkkk", "g", "s", "I", "sss"] {
        press(&mut app, &status, keys);
        let text = text(&draw(&mut app, &status, 80, 24));
        let at = app.selected_table(&status).unwrap();
        let name = format!(">{}", status.tables[at].table.0.name);
        assert!(text.contains(&name), "{name} after {keys}:\n{text}");
    }
}

/// Not a panic at any size, in any state, whatever is open.
#[test]
fn every_size() {
    let dialogs = [
        None,
        Some(Dialog::Quit { stop: true }),
        Some(Dialog::Help { scroll: usize::MAX }),
        Some(Dialog::Detail {
            title: "注文".to_owned(),
            lines: vec![("a".to_owned(), "b ".repeat(500))],
            scroll: usize::MAX,
        }),
        Some(Dialog::Resnapshot {
            table: fixture::backfill().tables[0].table.0.clone(),
            typed: "注文".repeat(60),
            go: true,
            wrong: true,
        }),
        Some(Dialog::Filter { pane: Pane::Tables, before: crate::tui::app::Filter::default() }),
    ];
    let views = [View::Overview, View::Tables, View::Chunks, View::Events, View::Errors, View::Log];
    let scenarios =
        [fixture::backfill(), fixture::hostile(), fixture::huge(), fixture::failed(), fixture::connecting()];
    let mut turn = 0;
    let mut app = app();
    for width in (0..=130).chain((131..=220).step_by(13)) {
        for height in (0..=40).chain((41..=70).step_by(9)) {
            // By turns the overview, and one of the other views with one of the boxes.
            turn += 1;
            let status = &scenarios[turn % scenarios.len()];
            (app.view, app.zoom, app.dialog) = (View::Overview, None, None);
            if turn % 2 == 0 {
                draw(&mut app, status, width, height);
                continue;
            }
            app.view = views[turn / 5 % views.len()];
            app.zoom = (turn % 7 == 0).then_some(Pane::Replication).or((turn % 11 == 0).then_some(Pane::Sink));
            app.dialog = dialogs[turn % dialogs.len()].clone();
            draw(&mut app, status, width, height);
        }
    }
}

/// The row of the selection is reversed in the terminal, colours or not. crossterm is told that there are none, as it
/// tells itself when NO_COLOR is set: it then writes a full reset in place of a colour, and reversing must outlive that.
#[test]
fn the_selection_stays_visible_without_colours() {
    use ratatui::Terminal;
    use ratatui::backend::CrosstermBackend;
    use ratatui::{TerminalOptions, Viewport};
    let status = fixture::backfill();
    let reversed = |color: ColorChoice| {
        let mut app = App::new(&Options { color, ascii: Some(false), ..Options::default() });
        let mut bytes = Vec::new();
        let viewport = Viewport::Fixed(Rect::new(0, 0, 80, 24));
        let mut terminal =
            Terminal::with_options(CrosstermBackend::new(&mut bytes), TerminalOptions { viewport }).unwrap();
        terminal.draw(|frame| crate::tui::render(frame.buffer_mut(), &mut app, &status)).unwrap();
        drop(terminal);
        let mut parser = vt100::Parser::new(24.try_into().unwrap(), 80.try_into().unwrap(), 0);
        parser.process(&bytes);
        let inverse = |row: u16| (1..79).all(|column| parser.screen().cell(row, column).unwrap().inverse());
        assert!(parser.screen().contents().contains(">orders"));
        assert!(!inverse(6), "only the selected row is reversed");
        inverse(5)
    };
    crossterm::style::force_color_output(false);
    assert!(reversed(ColorChoice::Never));
    assert!(!reversed(ColorChoice::Always), "crossterm has been mended: the theme without colours may be simplified");
    crossterm::style::force_color_output(true);
    assert!(reversed(ColorChoice::Always) && reversed(ColorChoice::Never));
}

/// A box over half a wide character must not lose its border.
#[test]
fn a_box_cuts_wide_characters_cleanly() {
    let mut status = fixture::backfill();
    for shift in 0..2 {
        for table in &mut status.tables {
            let name = format!("{}{}", "x".repeat(shift), "注".repeat(20));
            table.table.0 = crate::table::TableId::new("public", name);
        }
        let mut app = app();
        draw(&mut app, &status, 80, 24);
        press(&mut app, &status, "r");
        let buffer = draw(&mut app, &status, 80, 24);
        let text = text(&buffer);
        let borders = text.lines().filter(|line| line.matches('│').count() >= 4).count();
        assert!(borders >= 6, "{text}");
    }
}
