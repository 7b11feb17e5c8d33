//! A true terminal: the dashboard runs in a child process on a pty, and every way out gives the terminal back.
//!
//! The child is this test binary itself, running [`child`] alone.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use portable_pty::{Child, CommandBuilder, MasterPty, PtySize, native_pty_system};

use super::*;
use crate::engine::{Command, Control, Phase};
use crate::tui::Exit;

/// Says in the child what it is to do; where it is not set, [`child`] is nobody's child.
const MODE: &str = "PGTIDE_TEST_SCREEN";

/// The dashboard over a pipeline that stops half a second after it was told to.
#[test]
#[ignore = "the child of the tests below"]
fn child() {
    let Ok(mode) = std::env::var(MODE) else { return };
    let status = Arc::new(Mutex::new(fixture::backfill()));
    let (control, mut commands) = Control::channel();
    let engine = Arc::clone(&status);
    thread::spawn(move || {
        while let Some((command, reply)) = commands.blocking_recv() {
            reply.send(Ok(())).ok();
            if command == Command::Stop {
                let set = |phase| engine.lock().unwrap_or_else(PoisonError::into_inner).phase = phase;
                set(Phase::Stopping);
                thread::sleep(Duration::from_millis(500));
                set(Phase::Stopped);
            }
        }
    });
    let signal = Arc::new(AtomicI32::new(0));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    for (number, kind) in [(1, 1), (2, 2), (15, 15)] {
        let signal = Arc::clone(&signal);
        let _entered = runtime.enter();
        let mut stream = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::from_raw(kind)).unwrap();
        runtime.spawn(async move {
            stream.recv().await;
            signal.store(number, Ordering::SeqCst);
        });
    }
    // The worker panics once the screen has asked for a status, and so has taken the terminal.
    let drawn = Arc::new(tokio::sync::Notify::new());
    if mode == "worker panics" {
        let drawn = Arc::clone(&drawn);
        runtime.spawn(async move {
            drawn.notified().await;
            panic!("a worker that panics");
        });
    }
    let begun = Instant::now();
    let source = move || {
        assert!(mode != "screen panics" || begun.elapsed() < Duration::from_millis(500), "a screen that panics");
        drawn.notify_one();
        let mut status = status.lock().unwrap_or_else(PoisonError::into_inner).clone();
        status.at += i64::try_from(begun.elapsed().as_micros()).unwrap();
        status
    };
    let options = Options { signal, name: "child".to_owned(), ..Options::default() };
    let screen = thread::spawn(move || crate::tui::run(options, Arc::new(source), control));
    // The test harness would hide an exit code of ours among its own.
    std::process::exit(match screen.join() {
        Err(_) => 70,
        Ok(Err(_)) => 71,
        Ok(Ok(Exit::Stopped)) => 80,
        Ok(Ok(Exit::Forced)) => 81,
        Ok(Ok(Exit::Failed(_))) => 82,
        Ok(Ok(Exit::Signal(number))) => 100 + number,
    });
}

struct Terminal {
    master: Option<Box<dyn MasterPty + Send>>,
    keys: Option<Box<dyn Write + Send>>,
    child: Box<dyn Child + Send + Sync>,
    seen: Arc<Mutex<Vec<u8>>>,
    reader: Option<thread::JoinHandle<()>>,
    hung_up: Arc<AtomicBool>,
    before: String,
}

impl Terminal {
    fn start(mode: &str, environment: &[(&str, &str)]) -> Terminal {
        let mut command = CommandBuilder::new(std::env::current_exe().unwrap());
        command.args(["--exact", "tui::tests::terminal::child", "--ignored", "--nocapture", "--test-threads=1"]);
        Self::run(command, mode, environment)
    }

    /// In a shell with job control, as a person starts it; and its process id.
    fn start_in_shell() -> (Terminal, Pid) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let mut command = CommandBuilder::new("bash");
        command.args(["--norc", "--noprofile", "--noediting", "-i"]);
        command.env("PS1", "ready> ");
        command.env("SELF", std::env::current_exe().unwrap());
        command.env("PID_FILE", &file);
        let mut terminal = Self::run(command, "", &[]);
        terminal.wait_for("ready> ");
        let child = "exec \"$SELF\" --exact tui::tests::terminal::child --ignored --nocapture --test-threads=1";
        terminal.press(format!("sh -c 'echo $$ >\"$PID_FILE\"; {child}'\n").as_bytes());
        terminal.wait_for("BACKFILL");
        let pid = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        (terminal, Pid::from_raw(pid))
    }

    fn run(mut command: CommandBuilder, mode: &str, environment: &[(&str, &str)]) -> Terminal {
        let size = PtySize { rows: 24, cols: 80, ..PtySize::default() };
        let pair = native_pty_system().openpty(size).unwrap();
        let before = format!("{:?}", pair.master.get_termios().unwrap());
        command.env_remove("NO_COLOR");
        for (name, value) in [("TERM", "xterm-256color"), ("LC_ALL", "C.UTF-8"), (MODE, mode), ("RUST_BACKTRACE", "0")]
        {
            command.env(name, value);
        }
        for (name, value) in environment {
            command.env(name, value);
        }
        let child = pair.slave.spawn_command(command).unwrap();
        drop(pair.slave);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut reader = pair.master.try_clone_reader().unwrap();
        let bytes = Arc::clone(&seen);
        let hung_up = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&hung_up);
        let reader = thread::spawn(move || {
            let mut buffer = [0; 65_536];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                bytes.lock().unwrap().extend_from_slice(&buffer[..count]);
                if ends.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
        let keys = pair.master.take_writer().unwrap();
        Terminal { master: Some(pair.master), keys: Some(keys), child, seen, reader: Some(reader), hung_up, before }
    }

    /// Closes the terminal's side, as an ssh connection that drops does.
    fn hang_up(&mut self) {
        // The reader ends with the next frame.
        self.hung_up.store(true, Ordering::SeqCst);
        self.reader.take().unwrap().join().unwrap();
        self.keys = None;
        self.master = None;
    }

    fn screen(&self) -> vt100::Parser {
        let mut parser = vt100::Parser::new(24.try_into().unwrap(), 80.try_into().unwrap(), 0);
        parser.process(&self.seen.lock().unwrap());
        parser
    }

    #[track_caller]
    fn wait_for(&self, text: &str) {
        self.wait(text, true);
    }

    #[track_caller]
    fn wait_without(&self, text: &str) {
        self.wait(text, false);
    }

    #[track_caller]
    fn wait(&self, text: &str, there: bool) {
        let begun = Instant::now();
        while self.screen().screen().contents().contains(text) != there {
            let contents = self.screen().screen().contents();
            assert!(begun.elapsed() < Duration::from_secs(20), "`{text}` is not there: {there}\n{contents}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn press(&mut self, keys: &[u8]) {
        let writer = self.keys.as_mut().unwrap();
        writer.write_all(keys).unwrap();
        writer.flush().unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.process_id().unwrap()).unwrap()), signal).unwrap();
    }

    fn code(&mut self) -> u32 {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.exit_code();
            }
            if begun.elapsed() > Duration::from_secs(15) {
                self.child.kill().ok();
                panic!("it does not end:\n{}", self.screen().screen().contents());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends with `code`, and the terminal is as it was.
    fn ends(&mut self, code: u32) {
        assert_eq!(self.code(), code);
        let after = format!("{:?}", self.master.as_ref().unwrap().get_termios().unwrap());
        assert_eq!(after, self.before, "the terminal's settings");
        let begun = Instant::now();
        loop {
            // The last bytes may still be on their way to the reader.
            let parser = self.screen();
            let screen = parser.screen();
            if !screen.alternate_screen() && !screen.hide_cursor() {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(5), "still in the alternate screen, or without a cursor");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn quitting_gives_the_terminal_back() {
    let mut terminal = Terminal::start("", &[]);
    terminal.wait_for("BACKFILL");
    assert!(terminal.screen().screen().alternate_screen() && terminal.screen().screen().hide_cursor());
    terminal.press(b"q");
    terminal.wait_for("Stop and checkpoint");
    terminal.press(b"\r");
    terminal.wait_for("STOPPING");
    terminal.ends(80);
}

#[test]
fn pasted_text_is_no_keys() {
    let mut terminal = Terminal::start("", &[]);
    terminal.wait_for("BACKFILL");
    // What makes the terminal mark it.
    assert!(terminal.screen().screen().bracketed_paste());
    terminal.press(b"\x1b[200~select qty from orders;\nSELECT 1;\n\x1b[201~");
    terminal.wait_for("Pasted text was dropped");
    assert!(!terminal.screen().screen().contents().contains("Stop and checkpoint"));
    terminal.press(b"/\x1b[200~order\n_items\x1b[201~");
    terminal.wait_for("/order_items_");
    terminal.press(b"\x03\x03");
    terminal.ends(81);
    assert!(!terminal.screen().screen().bracketed_paste());
}

#[test]
fn job_control_does_not_take_the_screen_away() {
    let (mut terminal, pid) = Terminal::start_in_shell();
    // Asked to stop, it does not.
    kill(pid, Signal::SIGTSTP).unwrap();
    terminal.press(b"\x1a");
    terminal.wait_for("Not suspended");
    // Stopped without being asked, it takes the terminal again.
    for in_background in [false, true] {
        kill(pid, Signal::SIGSTOP).unwrap();
        terminal.wait_for("Stopped");
        if in_background {
            kill(pid, Signal::SIGCONT).unwrap();
            // It goes on, but leaves the terminal to the shell.
            terminal.press(b"jobs; echo said by the shell\n");
            terminal.wait_for("\nsaid by the shell");
            terminal.wait_for("Running");
        }
        terminal.press(b"fg\n");
        terminal.wait_without("ready> ");
        terminal.wait_for("BACKFILL");
        let parser = terminal.screen();
        let screen = parser.screen();
        assert!(screen.alternate_screen() && screen.hide_cursor() && screen.bracketed_paste());
        assert!(
            !screen.contents().contains("Stopped") && !screen.contents().contains("said by"),
            "{}",
            screen.contents()
        );
        terminal.press(b"?");
        terminal.wait_for("this help");
        terminal.press(b"?");
        terminal.wait_without("this help");
    }
    terminal.press(b"\x03\x03");
    terminal.wait_for("ready> ");
    // With the code of what it ran last.
    terminal.press(b"exit\n");
    terminal.ends(81);
}

#[test]
fn in_the_background_the_pipeline_goes_on_and_ends_in_order() {
    let (mut terminal, pid) = Terminal::start_in_shell();
    kill(pid, Signal::SIGSTOP).unwrap();
    terminal.wait_for("Stopped");
    kill(pid, Signal::SIGCONT).unwrap();
    // Longer than the screen waits before it looks whether the terminal is its own again.
    terminal.press(b"sleep 0.3; jobs\n");
    terminal.wait_for("Running");
    kill(pid, Signal::SIGTERM).unwrap();
    terminal.press(b"wait %1; echo code $?\n");
    terminal.wait_for("code 115");
    terminal.press(b"exit 0\n");
    terminal.ends(0);
}

#[test]
fn two_interrupts_leave_at_once() {
    let mut terminal = Terminal::start("", &[]);
    terminal.wait_for("BACKFILL");
    terminal.press(b"\x03\x03");
    terminal.ends(81);
}

#[test]
fn signals_stop_the_engine_and_give_the_terminal_back() {
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
        let mut terminal = Terminal::start("", &[]);
        terminal.wait_for("BACKFILL");
        terminal.signal(signal);
        terminal.wait_for("STOPPING");
        terminal.ends(100 + signal as u32);
    }
}

#[test]
fn a_terminal_that_goes_away_ends_it() {
    let mut terminal = Terminal::start("", &[]);
    terminal.wait_for("BACKFILL");
    terminal.hang_up();
    assert_eq!(terminal.code(), 101, "the SIGHUP that comes with it is what it reports");
}

/// The first half of an escape sequence makes crossterm wait for the other half. The screen goes on, and so do signals.
#[test]
fn half_an_escape_sequence_freezes_nothing() {
    let mut terminal = Terminal::start("", &[]);
    terminal.wait_for("BACKFILL");
    terminal.press(b"\x1b[");
    let bytes = |terminal: &Terminal| terminal.seen.lock().unwrap().len();
    thread::sleep(Duration::from_millis(300));
    let before = bytes(&terminal);
    let begun = Instant::now();
    while bytes(&terminal) == before {
        assert!(begun.elapsed() < Duration::from_secs(10), "no frame comes any more");
        thread::sleep(Duration::from_millis(20));
    }
    terminal.signal(Signal::SIGTERM);
    terminal.ends(115);
}

#[test]
fn a_panic_of_the_screen_gives_the_terminal_back_and_is_told() {
    let mut terminal = Terminal::start("screen panics", &[]);
    terminal.ends(70);
    terminal.wait_for("a screen that panics");
}

#[test]
fn a_panic_of_a_worker_leaves_the_screen_alone() {
    let mut terminal = Terminal::start("worker panics", &[]);
    terminal.wait_for("! a thread panicked at src/tui/tests/terminal.rs");
    let parser = terminal.screen();
    assert!(parser.screen().alternate_screen() && !parser.screen().contents().contains("a worker that panics"));
    terminal.press(b"?");
    terminal.wait_for("this help");
    terminal.press(b"\x1bq\r");
    // Esc and q in one piece are Alt-q, which is no key of ours.
    terminal.press(b"q");
    terminal.press(b"q");
    terminal.wait_for("Stop and checkpoint");
    terminal.press(b"\r");
    terminal.ends(80);
}

#[test]
fn no_color_keeps_the_selection_in_a_true_terminal() {
    let mut terminal = Terminal::start("", &[("NO_COLOR", "1")]);
    terminal.wait_for(">orders");
    let parser = terminal.screen();
    let cell = |row, column| parser.screen().cell(row, column).unwrap().clone();
    assert!((1..79).all(|column| cell(5, column).inverse()));
    assert!((0..24).all(|row| (0..80).all(|column| cell(row, column).fgcolor() == vt100::Color::Default)));
    terminal.press(b"\x03\x03");
    terminal.ends(81);
}
