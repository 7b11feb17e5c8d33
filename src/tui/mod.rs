//! The dashboard: [`run`] draws a [`Status`] and turns keys into commands for the engine.
//!
//! It runs on a thread of its own and waits in a blocking poll, so that a runtime busy with documents cannot freeze the
//! keys; it holds no lock while it draws, so that a terminal that stops reading cannot hold up the engine. A frame costs
//! the same whether or not anything changed, so what counts is their number: ten a second while something moves, one a
//! second otherwise, one at once after a key.

mod app;
mod command;
mod format;
mod history;
mod input;
mod keys;
mod render;
mod style;
mod term;
mod text;
mod update;

#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossterm::event::Event;
use crossterm::queue;
use crossterm::terminal::{BeginSynchronizedUpdate, EndSynchronizedUpdate};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;

use crate::engine::{Command, Control, Phase, Status};
use crate::problem::Problem;

pub use app::App;
pub use render::render;
pub use style::ColorChoice;
pub use term::suitable;

use app::Leave;
use keys::Keys;
use term::{Guard, Output};

/// How the dashboard looks and what it may do.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The keys that steer the engine are refused.
    pub read_only: bool,
    /// When to use colours.
    pub color: ColorChoice,
    /// Only ASCII, or not; none: as the locale says.
    pub ascii: Option<bool>,
    /// The name in the header, such as the pipeline's.
    pub name: String,
    /// Where the log goes, for the Log pane.
    pub log_path: Option<PathBuf>,
    /// Print the number of frames, their mean and 99th percentile of drawing time and the bytes written at the end.
    pub profile: bool,
    /// The number of a signal that asks for the end (SIGTERM, SIGHUP, SIGINT), 0 until then. The caller's handler sets it.
    pub signal: Arc<AtomicI32>,
}

/// How the dashboard ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The engine has stopped and acknowledged what was answered for, or has ended.
    Stopped,
    /// The operator did not wait for it.
    Forced,
    /// The engine had failed.
    Failed(Problem),
    /// This signal came; the engine was asked to stop and had up to ten seconds for it.
    Signal(i32),
}

/// The terminal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TuiError {
    /// Standard input or output is none.
    #[error("this is no terminal that a dashboard can use: run without one, or set TERM")]
    NotATerminal,
    /// It did not do what it was asked.
    #[error("the terminal failed while {what}: {source}")]
    Terminal {
        /// What it was asked for.
        what: &'static str,
        /// What it answered.
        source: io::Error,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> TuiError {
    move |source| TuiError::Terminal { what, source }
}

/// A frame at most every so often while something moves.
const BUSY: Duration = Duration::from_millis(100);
/// And at least every so often.
const IDLE: Duration = Duration::from_secs(1);
/// A frame that takes longer to write halves the rate.
const SLOW: Duration = Duration::from_millis(50);
/// A terminal this slow gets no fewer frames than one in this time.
const SLOWEST: Duration = Duration::from_secs(2);
/// The loop looks at signals and answers this often.
const TICK: Duration = Duration::from_millis(100);
/// After a signal the engine has this long.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs the dashboard on the calling thread until the operator leaves, a signal comes or the terminal fails. `source` is
/// called once a frame and must not wait. The terminal is given back on every way out, a panic of this thread included.
///
/// A terminal that stops reading holds this thread in a write for as long as it does, and then neither keys nor
/// [`Options::signal`] are seen: a caller that has to end must not join it for ever.
///
/// # Errors
/// There is no terminal, and then nothing was done. Or it failed on the way, such as by going away: the engine was then
/// asked to stop and had up to ten seconds for it.
pub fn run(
    options: Options,
    source: Arc<dyn Fn() -> Status + Send + Sync>,
    control: Control,
) -> Result<Exit, TuiError> {
    if !suitable() {
        return Err(TuiError::NotATerminal);
    }
    // We decide about colours. With NO_COLOR set, crossterm would put a reset in place of each.
    crossterm::style::force_color_output(true);
    let guard = Guard::enter().map_err(failed("being set up"))?;
    let output = Output::default();
    let bytes = output.bytes();
    let backend = CrosstermBackend::new(output);
    let terminal = Terminal::new(backend).map_err(failed("being set up"))?;
    let profile = options.profile;
    let mut screen = Screen {
        keys: Keys::start().map_err(failed("being set up"))?,
        terminal,
        app: App::new(&options),
        pace: Pace::default(),
        draws: Vec::new(),
        unsent_stop: None,
        away: false,
    };
    let mut exit = screen.run(&options, source.as_ref(), &control);
    if exit.is_err() {
        // A terminal that has gone away: the hang-up is on its way or was never sent. The engine stops cleanly either way.
        screen.stop_and_wait(source.as_ref(), &control, false);
        let signal = options.signal.load(Ordering::SeqCst);
        if signal != 0 {
            exit = Ok(Exit::Signal(signal));
        }
    }
    let report = profile.then(|| screen.profile(bytes.load(Ordering::Relaxed)));
    // What is typed from here on is the shell's.
    screen.keys.end();
    // The guard before the screen: what ratatui still writes when it is dropped must not reach a terminal that has gone, which it would
    // report on stderr, nor the shell's screen.
    drop(guard);
    drop(screen);
    if let Some(report) = report {
        eprintln!("{report}");
    }
    exit
}

/// How often frames come.
#[derive(Debug)]
struct Pace {
    least: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { least: BUSY }
    }
}

impl Pace {
    /// Learns how long a frame took: halves the rate after a slow one, restores it slowly.
    fn took(&mut self, time: Duration) {
        self.least = if time > SLOW { self.least * 2 } else { self.least * 9 / 10 }.clamp(BUSY, SLOWEST);
    }

    /// The time to the next frame.
    fn wait(&self, moving: bool) -> Duration {
        if moving { self.least } else { self.least.max(IDLE) }
    }
}

struct Screen {
    keys: Keys,
    terminal: Terminal<CrosstermBackend<Output>>,
    app: App,
    pace: Pace,
    draws: Vec<Duration>,
    /// Since when a stop waits for the engine's ear.
    unsent_stop: Option<Instant>,
    /// The program was stopped and the terminal has not been taken again.
    away: bool,
}

impl Screen {
    fn run(&mut self, options: &Options, source: &dyn Fn() -> Status, control: &Control) -> Result<Exit, TuiError> {
        let begun = Instant::now();
        let mut status = source();
        let mut next = begun;
        loop {
            self.away |= term::continued();
            let signal = options.signal.load(Ordering::SeqCst);
            if signal != 0 {
                self.stop_and_wait(source, control, !self.away);
                return Ok(Exit::Signal(signal));
            }
            if self.away && term::foreground() {
                Guard::enter_again().map_err(failed("being taken again"))?;
                self.away = false;
                self.app.redraw = true;
                next = Instant::now();
            }
            self.app.clock = begun.elapsed();
            let now = Instant::now();
            if now >= next {
                let newer = source();
                let moving = moves(&status, &newer) || !self.app.requests.is_empty();
                status = newer;
                self.app.panic = term::panicked();
                self.app.observe(&status);
                if !self.away {
                    self.draw(&status)?;
                }
                next = Instant::now() + self.pace.wait(moving);
            }
            if let Some(leave) = self.leave(&status) {
                return Ok(leave);
            }
            let wait = next.saturating_duration_since(Instant::now()).min(TICK);
            if self.away {
                thread::sleep(wait);
            } else if let Some(event) = self.keys.next(wait).map_err(failed("being read"))? {
                self.take(event, &status, control)?;
                next = Instant::now();
            }
            self.send_stop(control, &status);
            let waiting = self.app.requests.len();
            self.app.settle(&status);
            if self.app.requests.len() != waiting {
                next = Instant::now();
            }
        }
    }

    /// Takes `event` and all that came after it, so that one frame shows the whole of it.
    fn take(&mut self, event: Event, status: &Status, control: &Control) -> Result<(), TuiError> {
        let mut next = Some(event);
        // A bound, so that a flood of keys cannot keep the screen from being drawn.
        for _ in 0..512 {
            let Some(event) = next else { break };
            match event {
                Event::Key(key) => {
                    if let Some(action) = input::action(&self.app, key)
                        && let Some(command) = update::update(&mut self.app, status, action)
                    {
                        self.send(command, control, status);
                    }
                }
                Event::Paste(text) => update::paste(&mut self.app, status, &text),
                _ => {}
            }
            if self.app.leave.is_some() {
                break;
            }
            next = self.keys.next(Duration::ZERO).map_err(failed("being read"))?;
        }
        Ok(())
    }

    fn send(&mut self, command: Command, control: &Control, status: &Status) {
        if command == Command::Stop {
            self.unsent_stop = Some(Instant::now());
            self.send_stop(control, status);
        } else {
            let sent = control.request(command.clone());
            self.app.track(command, sent, status);
        }
    }

    /// Sends the stop that is still to be sent. An engine that is busy takes it a moment later; one that has taken nothing
    /// for two seconds has ended.
    fn send_stop(&mut self, control: &Control, status: &Status) {
        let Some(since) = self.unsent_stop else { return };
        match control.request(Command::Stop) {
            Ok(receiver) => {
                self.unsent_stop = None;
                self.app.track(Command::Stop, Ok(receiver), status);
            }
            Err(_) if since.elapsed() < Duration::from_secs(2) => {}
            Err(_) => self.app.engine_gone(&Command::Stop),
        }
    }

    /// The way out, if there is one now.
    fn leave(&self, status: &Status) -> Option<Exit> {
        let ended = matches!(status.phase, Phase::Stopped | Phase::Failed);
        match self.app.leave {
            Some(Leave::Forced) => Some(Exit::Forced),
            Some(Leave::Ended) => Some(exit_of(status)),
            None if self.app.stopping.is_some() && ended => Some(exit_of(status)),
            None => None,
        }
    }

    fn draw(&mut self, status: &Status) -> Result<(), TuiError> {
        let begun = Instant::now();
        let drawn = self.try_draw(status);
        let took = begun.elapsed();
        self.pace.took(took);
        if self.draws.len() < 1_000_000 {
            self.draws.push(took);
        }
        drawn.map_err(failed("being drawn on"))
    }

    fn try_draw(&mut self, status: &Status) -> io::Result<()> {
        if std::mem::take(&mut self.app.redraw) {
            // Not Terminal::clear: it asks the terminal for the cursor and waits up to two seconds for the answer.
            let area = self.terminal.size()?.into();
            self.terminal.resize(area)?;
        }
        queue!(self.terminal.backend_mut(), BeginSynchronizedUpdate)?;
        let app = &mut self.app;
        self.terminal.draw(|frame| render(frame.buffer_mut(), app, status))?;
        queue!(self.terminal.backend_mut(), EndSynchronizedUpdate)?;
        io::Write::flush(self.terminal.backend_mut())
    }

    /// Asks the engine to stop and waits for it. Reads no keys: after a hang-up there is nobody to type them.
    fn stop_and_wait(&mut self, source: &dyn Fn() -> Status, control: &Control, mut terminal_works: bool) {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE && self.app.leave.is_none() {
            let status = source();
            if matches!(status.phase, Phase::Stopped | Phase::Failed) {
                break;
            }
            if self.app.stopping.is_none() {
                self.app.stopping = Some(self.app.clock);
                self.send(Command::Stop, control, &status);
            }
            self.send_stop(control, &status);
            self.app.dialog = None;
            self.app.observe(&status);
            terminal_works = terminal_works && self.try_draw(&status).is_ok();
            thread::sleep(TICK);
        }
    }

    fn profile(&mut self, bytes: u64) -> String {
        let frames = self.draws.len();
        self.draws.sort_unstable();
        let total: Duration = self.draws.iter().sum();
        let mean = total.checked_div(u32::try_from(frames).unwrap_or(u32::MAX)).unwrap_or_default();
        let p99 = self.draws.get(frames.saturating_sub(1).min(frames * 99 / 100)).copied().unwrap_or_default();
        format!("frames {frames}  draw mean {mean:.1?}  p99 {p99:.1?}  bytes {bytes}")
    }
}

fn exit_of(status: &Status) -> Exit {
    match (&status.problem, status.phase) {
        (Some(problem), Phase::Failed) => Exit::Failed(problem.clone()),
        _ => Exit::Stopped,
    }
}

/// Something changes fast enough to be worth ten frames a second.
fn moves(before: &Status, now: &Status) -> bool {
    let passing = matches!(now.phase, Phase::Connecting | Phase::Pausing | Phase::Stopping);
    passing
        || before.phase != now.phase
        || before.sink.documents != now.sink.documents
        || before.replication.changes != now.replication.changes
        || before.events.last().map(|event| event.seq) != now.events.last().map(|event| event.seq)
        || before.notices.last().map(|notice| notice.seq) != now.notices.last().map(|notice| notice.seq)
}

#[cfg(test)]
mod pace {
    use super::*;

    #[test]
    fn a_slow_terminal_gets_fewer_frames_and_slowly_more_again() {
        let mut pace = Pace::default();
        assert_eq!((pace.wait(true), pace.wait(false)), (BUSY, IDLE));
        pace.took(Duration::from_millis(51));
        assert_eq!((pace.wait(true), pace.wait(false)), (BUSY * 2, IDLE));
        for _ in 0..20 {
            pace.took(Duration::from_secs(3));
        }
        assert_eq!((pace.wait(true), pace.wait(false)), (SLOWEST, SLOWEST));
        pace.took(Duration::from_millis(1));
        assert!(pace.wait(true) > SLOWEST / 2);
        for _ in 0..100 {
            pace.took(Duration::from_millis(1));
        }
        assert_eq!(pace.wait(true), BUSY);
    }

    #[test]
    fn an_idle_pipeline_costs_one_frame_a_second() {
        let before = Status { phase: Phase::Streaming, ..Status::default() };
        let mut now = before.clone();
        now.at += 1_000_000;
        assert!(!moves(&before, &now));
        now.sink.documents += 1;
        assert!(moves(&before, &now));
    }
}
