//! `pgtide demo` in a pseudo-terminal: keys, sizes, ways out, and what is left behind.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use portable_pty::{Child, CommandBuilder, MasterPty, PtySize, SlavePty, native_pty_system};
use support::process::{PROGRAM, processes_with, signal};

/// A slow machine creates a database cluster in some seconds.
const START: Duration = Duration::from_secs(90);
const LIMIT: Duration = Duration::from_secs(30);
/// Stopping the pipeline, the workload and PostgreSQL.
const END: Duration = Duration::from_secs(40);

/// `pgtide demo` and the terminal that it runs in.
struct Demo {
    parser: Arc<Mutex<vt100::Parser>>,
    /// All that the terminal was sent.
    sent: Arc<Mutex<Vec<u8>>>,
    writer: Box<dyn Write + Send>,
    master: Box<dyn MasterPty + Send>,
    /// Kept open, so that the terminal can be looked at when the program has gone.
    _slave: Box<dyn SlavePty + Send>,
    child: Box<dyn Child + Send + Sync>,
    pid: u32,
    before: String,
    _folder: tempfile::TempDir,
}

impl Demo {
    fn start(columns: u16, rows: u16, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let size = PtySize { rows, cols: columns, pixel_width: 0, pixel_height: 0 };
        let pair = native_pty_system().openpty(size).unwrap();
        let before = termios(pair.master.as_ref());
        let folder = tempfile::tempdir().unwrap();
        let mut command = CommandBuilder::new(PROGRAM);
        command.args(["demo", "--rows", "5000", "--rate", "50", "--metrics-port", "0", "--log-folder"]);
        command.arg::<&OsStr>(folder.path().as_ref());
        command.args(arguments);
        for name in ["NO_COLOR", "LC_ALL", "LC_CTYPE"] {
            command.env_remove(name);
        }
        command.env("TERM", "xterm-256color");
        command.env("LANG", "C.UTF-8");
        for (name, value) in environment {
            command.env(name, value);
        }
        let child = pair.slave.spawn_command(command).unwrap();
        let size = |number| NonZeroU16::new(number).unwrap();
        let parser = Arc::new(Mutex::new(vt100::Parser::new(size(rows), size(columns), 0)));
        let mut reader = pair.master.try_clone_reader().unwrap();
        let sent = Arc::new(Mutex::new(Vec::new()));
        let (screen, all) = (Arc::clone(&parser), Arc::clone(&sent));
        std::thread::spawn(move || {
            let mut buffer = [0; 16 << 10];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                all.lock().unwrap().extend_from_slice(&buffer[..count]);
                screen.lock().unwrap().process(&buffer[..count]);
            }
        });
        Self {
            parser,
            sent,
            writer: pair.master.take_writer().unwrap(),
            pid: child.process_id().unwrap(),
            master: pair.master,
            _slave: pair.slave,
            child,
            before,
            _folder: folder,
        }
    }

    fn text(&self) -> String {
        self.parser.lock().unwrap().screen().contents()
    }

    fn line(&self, number: usize) -> String {
        self.text().lines().nth(number).unwrap_or_default().to_owned()
    }

    /// The text of the line that says how a table is doing; empty when there is none.
    fn row_of(&self, table: &str) -> String {
        let row = |line: &&str| {
            line.split_once('│').is_some_and(|(_, rest)| rest.trim_start_matches([' ', '>']).starts_with(table))
        };
        self.text().lines().find(row).unwrap_or_default().to_owned()
    }

    /// The lines of the events, without the title that counts them.
    fn events(&self) -> Vec<String> {
        let text = self.text();
        let lines = text.lines().skip_while(|line| !line.contains("─ Events")).skip(1);
        lines.take_while(|line| line.starts_with('│')).map(str::to_owned).collect()
    }

    fn newest_event(&self) -> String {
        self.events().into_iter().next().unwrap_or_default()
    }

    fn press(&mut self, keys: &str) {
        self.writer.write_all(keys.as_bytes()).unwrap();
        self.writer.flush().unwrap();
    }

    fn resize(&self, columns: u16, rows: u16) {
        let size = |number| NonZeroU16::new(number).unwrap();
        // First the picture: what is drawn for the new size must not meet the old one.
        self.parser.lock().unwrap().screen_mut().set_size(size(rows), size(columns));
        self.master.resize(PtySize { rows, cols: columns, pixel_width: 0, pixel_height: 0 }).unwrap();
    }

    #[track_caller]
    fn wait(&mut self, what: &str, limit: Duration, mut condition: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + limit;
        while !condition(self) {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "it ended ({ended:?}) before: {what}\n{}", self.text());
            assert!(Instant::now() < deadline, "after {limit:?} still not so: {what}\n{}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[track_caller]
    fn wait_text(&mut self, text: &str) {
        self.wait(text, LIMIT, |demo| demo.text().contains(text));
    }

    #[track_caller]
    fn wait_without(&mut self, text: &str) {
        self.wait(&format!("no more {text}"), LIMIT, |demo| !demo.text().contains(text));
    }

    /// All is copied and changes come.
    #[track_caller]
    fn wait_live(&mut self) {
        self.wait("all is copied", START, |demo| {
            let live = |table| demo.row_of(table).contains("live") && demo.row_of(table).contains("100.0%");
            live("users") && live("books") && demo.line(0).contains("STREAMING")
        });
        self.wait("an INSERT", LIMIT, |demo| demo.events().iter().any(|event| event.contains(" INSERT ")));
    }

    /// Waits for its end; the terminal must be as it was and nothing of it may be left.
    #[track_caller]
    fn ends_with(mut self, code: u32) {
        let deadline = Instant::now() + END;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it has not ended after {END:?}\n{}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        };
        assert_eq!((status.exit_code(), status.signal()), (code, None), "{}", self.text());
        // The last bytes may still be on their way through the terminal.
        let restored = |demo: &Self| {
            let parser = demo.parser.lock().unwrap();
            !parser.screen().alternate_screen() && !parser.screen().hide_cursor()
        };
        let deadline = Instant::now() + Duration::from_secs(5);
        while !restored(&self) {
            assert!(Instant::now() < deadline, "the terminal was not given back\n{}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
        let sent = self.sent.lock().unwrap().clone();
        assert_eq!(beside_the_frames(&sent), "", "printed while the screen was up");
        assert_eq!(termios(self.master.as_ref()), self.before, "the line discipline is not as it was");
        assert!(!self.parser.lock().unwrap().screen().bracketed_paste());
        let folders = demo_folders(self.pid);
        assert!(folders.is_empty(), "left behind: {folders:?}");
        let processes = processes_with(format!("/pgtide-demo-{}-", self.pid).as_ref());
        assert!(processes.is_empty(), "left behind: {processes:?}");
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn termios(master: &dyn MasterPty) -> String {
    format!("{:?}", master.get_termios().expect("a terminal has settings"))
}

/// What was printed on the screen while it was the dashboard's, other than by its frames, which are marked.
fn beside_the_frames(sent: &[u8]) -> String {
    let text = String::from_utf8_lossy(sent);
    let (_, text) = text.split_once("\x1b[?1049h").expect("the screen was never taken");
    let (text, _) = text.split_once("\x1b[?1049l").expect("the screen was never given back");
    let (begin, end) = ("\x1b[?2026h", "\x1b[?2026l");
    assert!(text.matches(begin).count() > 1);
    let size = |number| NonZeroU16::new(number).unwrap();
    let mut parser = vt100::Parser::new(size(24), size(80), 0);
    for part in text.split(end) {
        parser.process(part.split(begin).next().unwrap_or_default().as_bytes());
    }
    parser.screen().contents().trim().to_owned()
}

/// The folders that the demo of this process has made.
fn demo_folders(pid: u32) -> Vec<PathBuf> {
    let mut bases = vec![std::env::temp_dir(), "/tmp".into(), "/var/tmp".into()];
    bases.dedup();
    let entries = bases.iter().filter_map(|base| std::fs::read_dir(base).ok()).flatten().flatten();
    let prefix = format!("pgtide-demo-{pid}-");
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)).map(|entry| entry.path()).collect()
}

const ESCAPE: &str = "\x1b";

#[test]
fn every_key_does_what_it_says() {
    // Many chunks, so that a copy lasts longer than a frame.
    let mut demo = Demo::start(120, 40, &["--chunk-size", "20"], &[]);
    demo.wait_live();
    assert!(!demo_folders(demo.pid).is_empty(), "this test looks for the wrong folders");
    assert!(!processes_with(format!("/pgtide-demo-{}-", demo.pid).as_ref()).is_empty());

    demo.press("?");
    demo.wait_text("this help");
    demo.press(ESCAPE);
    demo.wait_without("this help");

    for (key, title, others) in [
        ("2", "Tables 2", ["Chunks", "Events", "Replication"]),
        ("3", "Chunks", ["Tables 2", "Events", "Replication"]),
        ("4", "Events", ["Tables 2", "Chunks", "Replication"]),
        ("5", "Errors", ["Tables 2", "Chunks", "Events"]),
        ("6", "Log", ["Tables 2", "Chunks", "Events"]),
        ("1", "Replication", ["Log ", "Errors ", "nothing else"]),
    ] {
        demo.press(key);
        demo.wait(&format!("view {key}"), LIMIT, |demo| {
            let panes: String = demo.text().lines().filter(|line| line.contains('┌')).collect();
            panes.contains(title) && others.iter().all(|other| !panes.contains(other))
        });
    }

    demo.resize(80, 24);
    demo.wait("80x24", LIMIT, |demo| demo.text().contains("Tables 2") && !demo.text().contains("Replication"));
    demo.resize(120, 40);
    demo.wait("120x40", LIMIT, |demo| demo.text().contains("Replication") && demo.text().contains("Local store"));

    // Anything but y is a no.
    demo.press("p");
    demo.wait_text("Pause (y/N)?");
    demo.press("n");
    demo.wait_without("Pause (y/N)?");
    assert!(demo.line(0).contains("STREAMING"), "{}", demo.line(0));
    demo.press("py");
    demo.wait("PAUSED", LIMIT, |demo| demo.line(0).contains("PAUSED"));
    let (newest, shown) = (demo.newest_event(), demo.text());
    assert!(shown.contains("p:Resume"), "{shown}");
    demo.wait("a pause of 3 s", LIMIT, |demo| {
        // The seconds that the header counts.
        demo.line(0).split_once("PAUSED 00:00:").is_some_and(|(_, rest)| &rest[..2] >= "03")
    });
    assert_eq!(demo.newest_event(), newest, "an event came during the pause\n{}", demo.text());
    demo.press("p");
    demo.wait("STREAMING", LIMIT, |demo| demo.line(0).contains("STREAMING"));
    demo.wait("new events", LIMIT, |demo| demo.newest_event() != newest);

    demo.press("r");
    demo.wait_text("Type the table name to go on");
    demo.press("books\t\r");
    demo.wait_text("That is not its name. Nothing was sent.");
    demo.press(&"\x7f".repeat(5));
    demo.press("users\r");
    demo.wait_without("Type the table name to go on");
    let mut seen = false;
    demo.wait("the copy is done again", LIMIT, |demo| {
        let row = demo.row_of("users");
        seen |= row.contains("recopy");
        seen && row.contains("live") && row.contains("100.0%")
    });
    demo.press("6");
    demo.wait_text("public.users: copied again");
    assert!(!demo.text().contains("public.books: copied again"));
    assert_eq!(demo.text().matches("resnapshot asked for").count(), 1, "{}", demo.text());
    demo.press("1");
    demo.wait_text("Replication");

    demo.press("q");
    demo.wait_text("Stop and checkpoint");
    demo.press(ESCAPE);
    demo.wait_without("Stop and checkpoint");
    demo.press("q");
    demo.wait_text("[ Stop and checkpoint ]");
    demo.press("\r");
    demo.ends_with(0);
}

/// At the size that terminals have at first, and with a signal in place of a key.
#[test]
fn sigterm_ends_it_in_order() {
    let mut demo = Demo::start(80, 24, &["--chunk-size", "500"], &[]);
    demo.wait_live();
    signal(demo.pid, Signal::SIGTERM);
    demo.ends_with(0);
}

/// The terminal was closed; and without colours the selected row is told by its reverse.
#[test]
fn a_hangup_ends_it_and_without_colours_the_selection_is_seen() {
    let mut demo = Demo::start(100, 30, &[], &[("NO_COLOR", "1")]);
    demo.wait_live();
    {
        let parser = demo.parser.lock().unwrap();
        let screen = parser.screen();
        let (rows, columns) = screen.size();
        let mut selected = 0;
        for (row, text) in screen.rows(0, columns.get()).enumerate() {
            let row = u16::try_from(row).unwrap();
            let inverse = (0..columns.get()).filter(|column| screen.cell(row, *column).unwrap().inverse()).count();
            if text.contains(">users") {
                assert_eq!(inverse, usize::from(columns.get()) - 2, "all of it but the border is reversed: {text}");
                selected += 1;
            } else {
                assert_eq!(inverse, 0, "reversed without reason: {text}");
            }
        }
        assert_eq!(selected, 1, "{}", screen.contents());
        let cells = (0..rows.get()).flat_map(|row| (0..columns.get()).map(move |column| (row, column)));
        for (row, column) in cells {
            let cell = screen.cell(row, column).unwrap();
            let plain = (vt100::Color::Default, vt100::Color::Default);
            assert_eq!((cell.fgcolor(), cell.bgcolor()), plain, "a colour at {row}, {column}");
        }
    }
    signal(demo.pid, Signal::SIGHUP);
    demo.ends_with(0);
}

#[test]
fn ctrl_c_asks_and_twice_leaves_at_once() {
    let mut demo = Demo::start(120, 40, &[], &[]);
    demo.wait_live();
    demo.press("\x03");
    demo.wait_text("Stop and checkpoint");
    demo.press(ESCAPE);
    demo.wait_without("Stop and checkpoint");
    demo.press("\x03\x03");
    demo.ends_with(130);
}
