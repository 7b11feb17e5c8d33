//! Showing a pipeline until it ends: on the screen, or by lines.

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use pgtide::engine::{Command, Engine, Phase, Status, Summary, TableState};
use pgtide::problem::{Problem, ProblemKind};
use pgtide::tui;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::{Color, Format, Presentation, complain, internal, print};

/// A line of progress every so often.
const LINE: Duration = Duration::from_secs(10);
/// The same while tables are being copied.
const COPY_LINE: Duration = Duration::from_secs(1);
/// How long the end waits for a screen that does not give its terminal back: one that nobody reads blocks its writer.
const SCREEN: Duration = Duration::from_secs(2);

/// The signals that ask for the end: SIGINT, SIGTERM, SIGHUP. The second one ends at once.
pub(super) struct Signals {
    flag: Arc<AtomicI32>,
    seen: watch::Receiver<i32>,
}

impl Signals {
    pub(super) fn install() -> Result<Self, Problem> {
        let flag = Arc::new(AtomicI32::new(0));
        let (sender, seen) = watch::channel(0);
        for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
            let mut signals = signal(kind).map_err(|error| internal("signals cannot be handled", &error))?;
            let (flag, sender) = (Arc::clone(&flag), sender.clone());
            let number = kind.as_raw_value();
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    if flag.swap(number, Ordering::SeqCst) != 0 {
                        std::process::exit(128 + number);
                    }
                    sender.send_replace(number);
                }
            });
        }
        Ok(Self { flag, seen })
    }

    /// Ends with the first signal.
    pub(super) async fn first(&self) -> i32 {
        let mut seen = self.seen.clone();
        // The senders live as long as the runtime.
        seen.wait_for(|number| *number != 0).await.map_or(0, |number| *number)
    }
}

/// The screen is to be shown: there is a terminal for it and nobody said otherwise.
pub(super) fn screen_wanted(presentation: &Presentation) -> bool {
    !presentation.headless && tui::suitable() && std::io::stdout().is_terminal()
}

/// Shows the pipeline until it ends. Prints the summary where it was asked for.
pub(super) async fn present(
    engine: Engine,
    presentation: &Presentation,
    name: &str,
    log: Option<&Path>,
    signals: &Signals,
) -> Result<ExitCode, Problem> {
    if screen_wanted(presentation) {
        on_screen(engine, presentation, name, log, signals).await
    } else {
        by_lines(engine, presentation, signals).await
    }
}

async fn on_screen(
    engine: Engine,
    presentation: &Presentation,
    name: &str,
    log: Option<&Path>,
    signals: &Signals,
) -> Result<ExitCode, Problem> {
    let options = tui::Options {
        read_only: presentation.read_only,
        color: match presentation.color {
            Color::Auto => tui::ColorChoice::Auto,
            Color::Always => tui::ColorChoice::Always,
            Color::Never => tui::ColorChoice::Never,
        },
        ascii: presentation.ascii.then_some(true),
        name: name.to_owned(),
        log_path: log.map(Path::to_path_buf),
        profile: presentation.profile_ui,
        signal: Arc::clone(&signals.flag),
    };
    let (source, control) = (engine.status_source(), engine.control());
    let (sender, mut ended) = tokio::sync::oneshot::channel();
    // A thread that is not joined: a terminal that stops reading holds its writer for ever.
    std::thread::Builder::new()
        .name("screen".into())
        .spawn(move || {
            let _ = sender.send(tui::run(options, source, control));
        })
        .map_err(|error| internal("the screen cannot be started", &error))?;
    let mut until_live = None;
    let exit = loop {
        tokio::select! {
            exit = &mut ended => break exit.ok(),
            () = engine.live(), if presentation.until_live && until_live.is_none() => {
                until_live = Some(engine.summary());
                // Refused only where it has ended; the screen leaves when it has.
                let _ = engine.control().send(Command::Stop).await;
            }
            number = signals.first() => {
                // The screen ends by itself on a signal, unless its terminal is gone.
                let _ = engine.control().send(Command::Stop).await;
                let waited = tokio::time::timeout(Duration::from_secs(10) + SCREEN, &mut ended).await;
                break waited.ok().and_then(Result::ok).or(Some(Ok(tui::Exit::Signal(number))));
            }
        }
    };
    let exit = match exit {
        Some(Ok(exit)) => exit,
        Some(Err(error)) => {
            engine.stop().await?;
            return Err(internal("the screen", &error));
        }
        None => {
            engine.stop().await?;
            return Err(Problem::new(ProblemKind::Internal, "the screen died", "The log says more."));
        }
    };
    if exit == tui::Exit::Forced {
        return Ok(ExitCode::from(130));
    }
    // Stopped already, except after a signal that the engine took longer for than the screen waited.
    engine.stop().await?;
    if let Some(summary) = until_live {
        print(&summary_text(&summary, presentation.format))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn by_lines(mut engine: Engine, presentation: &Presentation, signals: &Signals) -> Result<ExitCode, Problem> {
    let json = presentation.format == Format::Json;
    let mut printed = None;
    let mut last = String::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    let live = engine.live();
    tokio::pin!(live);
    let (mut ended, mut is_live) = (false, false);
    let summary = loop {
        tokio::select! {
            outcome = engine.wait() => {
                outcome?;
                ended = true;
                // A copy without a stream has ended.
                break true;
            }
            () = &mut live, if presentation.until_live && !is_live => {
                // An end by failure is for the branch above to tell.
                is_live = true;
                if !engine.status().phase.is_over() {
                    break true;
                }
            }
            _ = signals.first() => break false,
            _ = ticks.tick() => {
                let status = engine.status();
                let every = if status.phase == Phase::Snapshot { COPY_LINE } else { LINE };
                let now = std::time::Instant::now();
                let line = line(&status);
                let word = status.phase.word();
                let due = printed.is_none_or(|(at, before): (std::time::Instant, &str)| now - at >= every || before != word);
                // Why it failed is said once, at the end.
                if due && line != last && status.phase != Phase::Failed {
                    if json {
                        complain(&line);
                    } else {
                        // A full disk must not stop the pipeline.
                        let _ = print(&line);
                    }
                    printed = Some((now, word));
                    last = line;
                }
            }
        }
    };
    let done = engine.summary();
    if !ended {
        engine.stop().await?;
    }
    if summary {
        print(&summary_text(&done, presentation.format))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One line of what goes on.
fn line(status: &Status) -> String {
    let mut text = format!("{:<10}", status.phase.word());
    if let Some(problem) = &status.problem {
        text.push_str(&format!(" attempt {}: {}. {}", status.attempts, problem.message, problem.hint));
    } else if let Some(standby) = &status.standby {
        text.push_str(&format!(" {}", standby.sentence()));
        let done: usize = status.tables.iter().map(|table| table.chunks.done()).sum();
        let all: usize = status.tables.iter().map(|table| table.chunks.len()).sum();
        if done < all {
            text.push_str(&format!(": {done} of {all} chunks copied"));
        }
    } else {
        let copies = status.phase == Phase::Snapshot;
        // A copy goes on where another process left it; before and after it, what this one did counts.
        let copied: u64 =
            status.tables.iter().map(|table| if copies { table.rows_done } else { table.rows_copied }).sum();
        let total: Option<u64> = status.tables.iter().map(|table| table.rows_total).sum();
        let live = status.tables.iter().filter(|table| table.state == TableState::Live).count();
        text.push_str(&format!(" {live} of {} tables live, {copied}", status.tables.len()));
        if let Some(total) = total.filter(|_| copies) {
            let all_exact = status.tables.iter().all(|table| table.rows_total_exact);
            text.push_str(&format!(" of {}{total}", if all_exact { "" } else { "~" }));
        }
        text.push_str(&format!(" rows copied, {} changes", status.replication.changes));
        if let Some(lag) = status.replication.lag_bytes {
            text.push_str(&format!(", {lag} bytes behind"));
        }
        if status.sink.rejected > 0 {
            text.push_str(&format!(", {} documents rejected", status.sink.rejected));
        }
    }
    text.push('\n');
    text
}

fn summary_text(summary: &Summary, format: Format) -> String {
    match format {
        // A struct of numbers always serialises.
        Format::Json => format!("{}\n", serde_json::to_string(summary).unwrap_or_default()),
        Format::Text => format!(
            "{} rows copied in {:.2} s ({:.0} rows/s), {} documents answered for in {:.2} s, {} rejected\n",
            summary.rows,
            summary.copy_seconds,
            summary.rows_per_second,
            summary.documents,
            summary.seconds,
            summary.rejected
        ),
    }
}
