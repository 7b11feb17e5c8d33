//! The command line: arguments, and one file per subcommand.

mod check;
mod dead_letters;
mod demo;
mod drop;
mod present;
mod run;
mod store;
mod verify;

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use pgtide::problem::{Problem, ProblemKind};

/// Copies PostgreSQL tables into Elasticsearch or OpenSearch, keeps them equal by change data capture, and shows it.
#[derive(Debug, Parser)]
#[command(name = "pgtide", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show it all on a PostgreSQL, a workload and a document store of its own; nothing is left behind
    Demo(demo::Arguments),
    /// Copy and stream the tables of a configuration file
    Run(run::Arguments),
    /// Say what a start would find and make: both servers, tables, indices and their mappings; changes nothing
    Check(check::Arguments),
    /// Compare rows and documents, while changes flow, and repair what differs
    Verify(verify::Arguments),
    /// List, show, send again or drop the documents that Elasticsearch refused
    #[command(subcommand)]
    DeadLetters(dead_letters::Command),
    /// Remove what a pipeline left in PostgreSQL: slot, publication, ledger; asks first
    Drop(drop::Arguments),
    /// Run the local document store alone: the part of Elasticsearch's HTTP API that pgtide uses
    Store(store::Arguments),
    /// Print the completions of a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// How to show what goes on.
#[derive(Args, Debug)]
struct Presentation {
    /// Print lines instead of the screen; so it is without a terminal
    #[arg(long)]
    headless: bool,
    /// End with exit code 0 once all tables are live and the backlog is empty, and print a summary
    #[arg(long)]
    until_live: bool,
    /// Form of the summary
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Use colours
    #[arg(long, value_enum, default_value_t = Color::Auto)]
    color: Color,
    /// Draw with ASCII only, whatever the locale says
    #[arg(long)]
    ascii: bool,
    /// Refuse pause and resnapshot, on the screen and over HTTP
    #[arg(long)]
    read_only: bool,
    /// Folder of the log files [default: pgtide in the state folder of the user]
    #[arg(long, value_name = "FOLDER")]
    log_folder: Option<PathBuf>,
    /// Print how many frames were drawn and how long that took
    #[arg(long, hide = true)]
    profile_ui: bool,
}

/// Form of the summary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Lines for a person
    Text,
    /// One line of JSON
    Json,
}

/// When to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Color {
    /// On a terminal, unless NO_COLOR is set
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// Runs the command; its exit code is as `docs/exit-codes.md` says.
pub(crate) fn main() -> ExitCode {
    // clap itself ends with 2 on wrong arguments, 0 on --help.
    let cli = Cli::parse();
    // Whoever made it first: there is one provider in this program.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let outcome = match cli.command {
        Command::Demo(arguments) => block_on(demo::main(arguments)),
        Command::Run(arguments) => block_on(run::main(arguments)),
        Command::Check(arguments) => block_on(check::main(arguments)),
        Command::Verify(arguments) => block_on(verify::main(arguments)),
        Command::DeadLetters(command) => block_on(dead_letters::main(command)),
        Command::Drop(arguments) => block_on(drop::main(arguments)),
        Command::Store(arguments) => block_on(store::main(arguments)),
        Command::Completions { shell } => {
            let mut out = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "pgtide", &mut out);
            print(&String::from_utf8_lossy(&out)).map(|()| ExitCode::SUCCESS)
        }
    };
    outcome.unwrap_or_else(|problem| {
        explain(&problem);
        ExitCode::from(problem.exit_code())
    })
}

fn block_on(work: impl Future<Output = Result<ExitCode, Problem>>) -> Result<ExitCode, Problem> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| internal("the runtime cannot be started", &error))?;
    let outcome = runtime.block_on(work);
    // A request to a server that does not answer must not hold the process.
    runtime.shutdown_background();
    outcome
}

fn explain(problem: &Problem) {
    complain(&format!("pgtide: {}\n", problem.message));
    if !problem.hint.is_empty() {
        complain(&format!("        {}\n", problem.hint));
    }
}

/// Writes to stderr; `eprint!` panics where nobody reads it any more.
fn complain(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

fn internal(what: &str, error: &dyn std::error::Error) -> Problem {
    Problem::new(ProblemKind::Internal, format!("{what}: {error}"), "")
}

/// Writes to stdout; a reader that has gone (`| head`) is no error.
fn print(text: &str) -> Result<(), Problem> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(internal("stdout cannot be written", &error)),
        _ => Ok(()),
    }
}

/// Text of a database for a terminal: as it is where it is plain, otherwise in quotes with escapes, so that it is neither
/// obeyed nor taken for another.
fn shown_text(text: &str) -> String {
    let escaped = format!("{text:?}");
    let inner = &escaped[1..escaped.len() - 1];
    let plain = !text.is_empty() && text.trim() == text && inner.replace("\\\"", "\"").replace("\\'", "'") == text;
    if plain { text.to_owned() } else { escaped }
}

/// JSON for a terminal: control characters are escapes already, what else acts becomes one.
fn shown_json(json: &str) -> String {
    let shown = |c: char| match c {
        '"' | '\'' | '\\' => c.to_string(),
        c => c.escape_debug().to_string(),
    };
    json.chars().map(shown).collect()
}

/// Asks on the terminal; `done` says what was not done where there is none.
fn confirmed(question: &str, done: &str) -> Result<bool, Problem> {
    let input = io::stdin();
    if !input.is_terminal() {
        return Err(Problem::new(
            ProblemKind::Config,
            format!("nothing was {done}: there is no terminal to ask on"),
            "Give --yes to do it without being asked.",
        ));
    }
    complain(&format!("{question} [y/N] "));
    let mut answer = String::new();
    // An end of input is no yes.
    let _ = input.lock().read_line(&mut answer);
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shown_as_they_are_but_not_obeyed() {
        assert_eq!(shown_json(r#"{"a":"\n'é\\"}"#), r#"{"a":"\n'é\\"}"#);
        assert_eq!(shown_json("a\u{202e}b\u{1b}"), r"a\u{202e}b\u{1b}");
    }

    #[test]
    fn ids_are_shown_and_not_obeyed() {
        assert_eq!(shown_text("2024-01-01 a\"b'ü"), "2024-01-01 a\"b'ü");
        assert_eq!(shown_text("\u{1b}[31m"), r#""\u{1b}[31m""#);
        assert_eq!(shown_text("a\u{202e}b\n"), r#""a\u{202e}b\n""#);
        assert_eq!(shown_text(""), "\"\"");
        assert_eq!(shown_text(" a"), "\" a\"");
        assert_eq!(shown_text(r"a\b"), r#""a\\b""#);
    }
}
