//! The log: a file a day, and stderr when there is no screen to disturb.

use std::io;
use std::path::{Path, PathBuf};

use etcetera::BaseStrategy as _;
use tracing::Subscriber;
use tracing_appender::non_blocking::WorkerGuard;
use tracing_appender::rolling::{InitError, RollingFileAppender, Rotation};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, fmt};

use crate::config::LogLevel;

/// The target of events that the command line says in its own words: they go to the file only.
pub(crate) const END: &str = "pgtide::end";
/// Days whose files are kept.
const DAYS: usize = 7;

/// Where the log goes, and what it looks like.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The terminal belongs to the screen: nothing is written to stdout or stderr.
    pub screen: bool,
    /// pgtide's own events from this level; those of libraries from WARN.
    pub level: LogLevel,
    /// The file holds a JSON object a line instead of text.
    pub json: bool,
    /// The folder of the files; none for `pgtide` in the XDG state folder (`~/.local/state`).
    pub folder: Option<PathBuf>,
}

/// The log cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// There is no home folder, so no place for the files is known.
    #[error("no home folder is known, so there is no place for the log: name a folder for it")]
    NoHome,
    /// The folder cannot be made.
    #[error("cannot make the log's folder {folder}: {source}")]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file cannot be opened.
    #[error("cannot open the log in {folder}: {source}")]
    File {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: InitError,
    },
    /// The process has a log already.
    #[error("the log was set up before: {0}")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

/// Keep it until the process ends: dropping it writes what is still waiting.
#[derive(Debug)]
pub struct LogGuard {
    folder: PathBuf,
    _writer: WorkerGuard,
}

impl LogGuard {
    /// The folder of the files.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Sets up the log of this process. The files are `pgtide.<date>.log`, those of the last seven days are kept. Writing
/// never blocks: should the disk fall 128,000 lines behind, further lines are dropped.
///
/// # Errors
/// There is no place for the files, they cannot be written, or the log was set up before.
pub fn init(options: &Options) -> Result<LogGuard, LogError> {
    let (subscriber, guard) = build(options)?;
    subscriber.try_init()?;
    Ok(guard)
}

fn build(options: &Options) -> Result<(impl Subscriber + Send + Sync, LogGuard), LogError> {
    let folder = folder(options.folder.as_deref())?;
    std::fs::create_dir_all(&folder).map_err(|source| LogError::Folder { folder: folder.clone(), source })?;
    let file = RollingFileAppender::builder()
        .rotation(Rotation::DAILY)
        .filename_prefix("pgtide")
        .filename_suffix("log")
        .max_log_files(DAYS)
        .build(&folder)
        .map_err(|source| LogError::File { folder: folder.clone(), source })?;
    let (writer, guard) = tracing_appender::non_blocking(file);
    // Its own complaints go to stderr, by a macro that panics where nobody reads that any more.
    let lines = fmt::layer().with_writer(writer).with_ansi(false).log_internal_errors(false);
    let lines = if options.json { lines.json().boxed() } else { lines.boxed() };
    let stderr = (!options.screen).then(|| {
        let colour = io::IsTerminal::is_terminal(&io::stderr());
        let lines =
            fmt::layer().with_writer(io::stderr).with_ansi(colour).with_target(false).log_internal_errors(false);
        lines.with_filter(filter_fn(|event| event.target() != END))
    });
    let subscriber = tracing_subscriber::registry().with(filter(options.level)).with(lines).with(stderr);
    Ok((subscriber, LogGuard { folder, _writer: guard }))
}

/// The folder of the files: the one that was asked for, or `pgtide` in the XDG state folder.
///
/// # Errors
/// No home folder is known.
pub fn folder(asked: Option<&Path>) -> Result<PathBuf, LogError> {
    if let Some(folder) = asked {
        return Ok(folder.to_path_buf());
    }
    let base = etcetera::base_strategy::Xdg::new().map_err(|_| LogError::NoHome)?;
    Ok(base.state_dir().ok_or(LogError::NoHome)?.join("pgtide"))
}

/// Libraries are kept to WARN: below it some of them print queries and headers.
fn filter(level: LogLevel) -> EnvFilter {
    EnvFilter::new(match level {
        LogLevel::Debug => "warn,pgtide=debug",
        LogLevel::Info => "warn,pgtide=info",
        LogLevel::Warn => "warn",
        LogLevel::Error => "error",
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn written(options: Options) -> String {
        let folder = tempfile::tempdir().unwrap();
        let nested = folder.path().join("state").join("pgtide");
        let (subscriber, guard) = build(&Options { folder: Some(nested.clone()), screen: true, ..options }).unwrap();
        assert_eq!(guard.folder(), nested);
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!("a detail");
            tracing::info!(table = "public.users", "copied\u{1b}[31m");
            tracing::info!(target: "hyper", "a library's chatter");
            tracing::warn!(target: "hyper", "a library's warning");
            tracing::error!("an operator is needed");
        });
        drop(guard);
        let names: Vec<_> = std::fs::read_dir(&nested).unwrap().map(|entry| entry.unwrap().path()).collect();
        let [file] = names.as_slice() else { panic!("{names:?}") };
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("pgtide.20") && name.ends_with(".log"), "{name}");
        std::fs::read_to_string(file).unwrap()
    }

    #[test]
    fn the_file_holds_what_the_level_asks_for() {
        let text = written(Options::default());
        assert!(
            text.contains("copied") && text.contains("table=\"public.users\"") && text.contains("operator"),
            "{text}"
        );
        assert!(text.contains("a library's warning"), "{text}");
        assert!(!text.contains("a detail") && !text.contains("chatter") && !text.contains('\u{1b}'), "{text}");
        assert!(written(Options { level: LogLevel::Debug, ..Options::default() }).contains("a detail"));
        let errors = written(Options { level: LogLevel::Error, ..Options::default() });
        assert!(errors.contains("operator") && !errors.contains("warning") && !errors.contains("copied"), "{errors}");
    }

    #[test]
    fn json_is_an_object_a_line() {
        let text = written(Options { json: true, ..Options::default() });
        let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first["level"], "INFO");
        assert_eq!(first["fields"]["table"], "public.users");
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let folder = file.path().join("under-a-file");
        let error = build(&Options { folder: Some(folder.clone()), ..Options::default() }).err().unwrap();
        assert!(error.to_string().contains(folder.to_str().unwrap()), "{error}");
    }
}
