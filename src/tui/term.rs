//! The terminal: taken on start, given back whatever happens.

use std::io::{self, IsTerminal, Write};
use std::panic;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, Once, PoisonError};
use std::thread::{self, ThreadId};

use crossterm::cursor::{Hide, Show};
use crossterm::event::{DisableBracketedPaste, EnableBracketedPaste};
use crossterm::execute;
use crossterm::terminal::{
    EndSynchronizedUpdate, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use nix::unistd::{getpgrp, tcgetpgrp};
use signal_hook::consts::{SIGCONT, SIGTSTP};
use signal_hook::flag;

/// The screen is the shell's, not ours.
static FREE: LazyLock<Arc<AtomicBool>> = LazyLock::new(|| Arc::new(AtomicBool::new(true)));
/// The program was stopped and goes on: somebody else had the terminal meanwhile.
static CONTINUED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
/// The thread that draws.
static DRAWS: Mutex<Option<ThreadId>> = Mutex::new(None);
/// Where another thread panicked while the screen was ours.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Whether a dashboard can be shown: standard input and output are terminals, and not a dumb one.
#[must_use]
pub fn suitable() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal() && std::env::var("TERM").is_ok_and(|term| term != "dumb")
}

/// The alternate screen in raw mode without a cursor, until dropped.
#[derive(Debug)]
pub(super) struct Guard(());

impl Guard {
    /// Takes the terminal. Whatever was changed is changed back if that fails half-way.
    pub(super) fn enter() -> io::Result<Guard> {
        install_panic_hook();
        *DRAWS.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread::current().id());
        PANIC.lock().unwrap_or_else(PoisonError::into_inner).take();
        watch_job_control()?;
        enable_raw_mode()?;
        FREE.store(false, Ordering::SeqCst);
        let guard = Guard(());
        take_screen()?;
        Ok(guard)
    }

    /// Takes the terminal anew when the program was stopped in between.
    pub(super) fn enter_again() -> io::Result<()> {
        // crossterm does nothing where it believes to be in raw mode already.
        disable_raw_mode()?;
        enable_raw_mode()?;
        take_screen()
    }
}

fn take_screen() -> io::Result<()> {
    // Pasted text comes as one piece, so that none of it is taken for keys: a `q` and a newline would stop the pipeline.
    execute!(io::stdout(), EnterAlternateScreen, Hide, EnableBracketedPaste)
}

/// While the screen is ours SIGTSTP does nothing: stopped, it would leave the shell without cursor and echo, and hold the
/// slot back. Nothing can be done about SIGSTOP, but the SIGCONT after it is noticed.
fn watch_job_control() -> io::Result<()> {
    // Twice would also stop twice.
    static WATCHED: Mutex<bool> = Mutex::new(false);
    let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*watched {
        flag::register(SIGCONT, Arc::clone(&CONTINUED))?;
        flag::register_conditional_default(SIGTSTP, Arc::clone(&FREE))?;
        *watched = true;
    }
    Ok(())
}

/// Whether the program was stopped since this was asked last, and goes on.
pub(super) fn continued() -> bool {
    CONTINUED.swap(false, Ordering::SeqCst)
}

/// Whether the terminal is ours to read and to set: not while the shell keeps this program in the background, where
/// either would stop it.
pub(super) fn foreground() -> bool {
    tcgetpgrp(io::stdin()).map_or(true, |group| group == getpgrp())
}

impl Drop for Guard {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back, once; a second call does nothing. Errors are of no use here: the terminal may be gone.
fn restore() {
    if !FREE.swap(true, Ordering::SeqCst) {
        let _ = execute!(io::stdout(), EndSynchronizedUpdate, DisableBracketedPaste, LeaveAlternateScreen, Show);
        if foreground() {
            let _ = disable_raw_mode();
        }
    }
}

/// Where another thread panicked, if one did.
pub(super) fn panicked() -> Option<String> {
    PANIC.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// A panic of the drawing thread gives the terminal back and is then printed. A panic of any other thread, which the
/// runtime may well survive, must not: it is logged, and the screen says so.
fn install_panic_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if FREE.load(Ordering::SeqCst) {
                before(info);
                return;
            }
            let place = info.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
            let draws = *DRAWS.lock().unwrap_or_else(PoisonError::into_inner) == Some(thread::current().id());
            if draws {
                restore();
                before(info);
            } else {
                *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some(place.clone());
            }
            let message = info.payload_as_str().unwrap_or("no message").chars().take(200).collect::<String>();
            tracing::error!(%place, thread = thread::current().name().unwrap_or("?"), %message, "panic");
        }));
    });
}

/// Standard output with the frame held back until it is whole, so that it goes out in one write. After the terminal was
/// given back it swallows what is left: half a frame must not land on the shell's screen.
#[derive(Debug, Default)]
pub(super) struct Output {
    held: Vec<u8>,
    bytes: Arc<AtomicU64>,
}

impl Output {
    /// Counts the bytes written.
    pub(super) fn bytes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.bytes)
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.held.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if !FREE.load(Ordering::SeqCst) && !self.held.is_empty() {
            let mut out = io::stdout().lock();
            out.write_all(&self.held)?;
            out.flush()?;
            self.bytes.fetch_add(self.held.len() as u64, Ordering::Relaxed);
        }
        self.held.clear();
        Ok(())
    }
}
