//! `pgtide dead-letters`: what Elasticsearch refused.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::HumanCount;
use pgtide::config::Config;
use pgtide::mapping;
use pgtide::problem::{Problem, ProblemKind};
use pgtide::sink::{DeadLetters, Letter};
use pgtide::telemetry;
use pgtide::verify::{self, Retried};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::present::Signals;
use super::run::{dead_letter_file, pipeline_name};
use super::{confirmed, internal, print, shown_json, shown_text};

/// Letters stay, or nothing was dropped.
const SOME_LEFT: u8 = 1;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Count them by table, index and reason
    List {
        #[command(flatten)]
        chosen: Chosen,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Print them whole: what was sent, what was answered, the document
    Show {
        #[command(flatten)]
        chosen: Chosen,
        /// Letters printed, the newest
        #[arg(long, value_name = "N", default_value_t = 20)]
        limit: usize,
    },
    /// Send the rows of their ids as they are now, or remove the documents of rows that are gone
    #[command(after_help = "Exit codes: 0 all left the file, 1 some are left.")]
    Retry {
        #[command(flatten)]
        chosen: Chosen,
        /// How long to wait for the stream, for rows that keep changing, and for Elasticsearch
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
        timeout: Duration,
    },
    /// Remove them from the file; asks first
    Drop {
        #[command(flatten)]
        chosen: Chosen,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

/// Which letters.
#[derive(Args, Debug)]
pub(super) struct Chosen {
    /// The configuration, YAML or JSON
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Only of this table, such as public.users
    #[arg(long, value_name = "TABLE")]
    table: Option<String>,
    /// Only of this index
    #[arg(long, value_name = "INDEX")]
    index: Option<String>,
    /// Only of this id
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// Folder of the log files, where the dead letters are [default: pgtide in the state folder of the user]
    #[arg(long, value_name = "FOLDER")]
    log_folder: Option<PathBuf>,
}

/// The letters that were chosen, and what it takes to tell.
struct Letters {
    options: verify::Options,
    file: DeadLetters,
    /// The table that goes to an index: letters of old name none.
    tables: BTreeMap<String, String>,
    chosen: Chosen,
}

impl Letters {
    fn of(chosen: Chosen) -> Result<Self, Problem> {
        let config = Arc::new(Config::load(&chosen.config)?.config);
        let folder = telemetry::log::folder(chosen.log_folder.as_deref()).map_err(|error| {
            Problem::new(ProblemKind::Config, error.to_string(), "Name a folder with --log-folder.")
        })?;
        let mut options = verify::Options::new(Arc::clone(&config));
        options.dead_letter_file = dead_letter_file(&folder, &pipeline_name(&config));
        let tables = mapping::tables(&config, false)?;
        let tables = tables.iter().map(|table| (table.index.clone(), table.table.to_string())).collect();
        let file = options.dead_letters();
        Ok(Self { options, file, tables, chosen })
    }

    fn table(&self, letter: &Letter) -> Option<String> {
        letter.table.clone().or_else(|| self.tables.get(&letter.index).cloned())
    }

    fn is_chosen(&self, letter: &Letter) -> bool {
        let is = |wanted: &Option<String>, has: &str| wanted.as_deref().is_none_or(|wanted| wanted == has);
        let table = self.chosen.table.as_deref().is_none_or(|wanted| {
            self.table(letter).is_some_and(|table| table == wanted || table.strip_prefix("public.") == Some(wanted))
        });
        table && is(&self.chosen.index, &letter.index) && is(&self.chosen.id, &letter.id)
    }

    /// Gives each that was chosen. Answers how many lines are no letters.
    fn each(&self, mut each: impl FnMut(Letter)) -> Result<u64, Problem> {
        let read = self.file.read(|letter| {
            if self.is_chosen(&letter) {
                each(letter);
            }
        });
        read.map_err(|error| self.unusable("read", &error))
    }

    fn unusable(&self, what: &str, error: &std::io::Error) -> Problem {
        Problem::new(
            ProblemKind::Config,
            format!("{} cannot be {what}: {error}", self.path()),
            "Run it as the user that pgtide runs as, with room for a second file of that size beside it.",
        )
    }

    fn path(&self) -> String {
        shown_text(&self.file.path().display().to_string())
    }

    fn none(&self) -> String {
        let chosen = self.chosen.table.is_some() || self.chosen.index.is_some() || self.chosen.id.is_some();
        let which = if chosen { " of that table, index or id" } else { "" };
        format!("No dead letters{which} in {}.\n", self.path())
    }
}

pub(super) async fn main(command: Command) -> Result<ExitCode, Problem> {
    match command {
        Command::List { chosen, json } => list(&Letters::of(chosen)?, json),
        Command::Show { chosen, limit } => show(&Letters::of(chosen)?, limit),
        Command::Retry { chosen, timeout } => retry(Letters::of(chosen)?, timeout).await,
        Command::Drop { chosen, yes } => drop(&Letters::of(chosen)?, yes),
    }
}

/// Letters of one table and index with the same answer.
#[derive(Debug, PartialEq, Serialize)]
struct Group {
    table: Option<String>,
    index: String,
    /// Without row contents.
    answer: String,
    count: u64,
    first: String,
    last: String,
}

fn groups(letters: &Letters) -> Result<(Vec<Group>, u64), Problem> {
    let mut groups: BTreeMap<(Option<String>, String, String), Group> = BTreeMap::new();
    let others = letters.each(|letter| {
        let (table, index, answer) = (letters.table(&letter), letter.index.clone(), letter.answer());
        let group = groups.entry((table.clone(), index.clone(), answer.clone())).or_insert_with(|| Group {
            table,
            index,
            answer,
            count: 0,
            first: letter.time.clone(),
            last: String::new(),
        });
        group.count += 1;
        group.last = letter.time;
    })?;
    Ok((groups.into_values().collect(), others))
}

fn list(letters: &Letters, json: bool) -> Result<ExitCode, Problem> {
    let (groups, others) = groups(letters)?;
    let mut out = String::new();
    if json {
        for group in &groups {
            let line = serde_json::to_string(group).map_err(|error| internal("a line cannot be written", &error))?;
            // What acts on a terminal is not among what JSON escapes.
            out.push_str(&shown_json(&line));
            out.push('\n');
        }
        print(&out)?;
        return Ok(ExitCode::SUCCESS);
    }
    if groups.is_empty() {
        out.push_str(&letters.none());
    } else {
        let count: u64 = groups.iter().map(|group| group.count).sum();
        // Writing to a String does not fail.
        let _ = writeln!(out, "{} in {}:", plural(count), letters.path());
    }
    for group in &groups {
        let table = group.table.as_deref().map_or_else(|| "no table".to_owned(), shown_text);
        let _ = writeln!(
            out,
            "  {table} -> {}: {}, {} to {}\n    {}",
            shown_text(&group.index),
            HumanCount(group.count),
            shown_text(&group.first),
            shown_text(&group.last),
            shown_text(&group.answer)
        );
    }
    if others > 0 {
        let _ = writeln!(out, "{} lines of it are no letters.", HumanCount(others));
    }
    print(&out)?;
    Ok(ExitCode::SUCCESS)
}

fn plural(count: u64) -> String {
    if count == 1 { "1 dead letter".to_owned() } else { format!("{} dead letters", HumanCount(count)) }
}

fn show(letters: &Letters, limit: usize) -> Result<ExitCode, Problem> {
    let mut newest = std::collections::VecDeque::new();
    let mut count = 0_u64;
    letters.each(|letter| {
        count += 1;
        newest.push_back(letter);
        if newest.len() > limit {
            newest.pop_front();
        }
    })?;
    if count == 0 {
        print(&letters.none())?;
    } else if count > newest.len() as u64 {
        let before = count - newest.len() as u64;
        print(&format!("The newest of {}; {} before (--limit is {limit}).\n", plural(count), HumanCount(before)))?;
    }
    for letter in newest {
        print(&lines(&letter, letters.table(&letter).as_deref()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A letter, whole.
fn lines(letter: &Letter, table: Option<&str>) -> String {
    let mut out = format!(
        "{} {} of {} in {}{}\n",
        shown_text(&letter.time),
        letter.operation,
        shown_text(&letter.id),
        shown_text(&letter.index),
        table.map(|table| format!(", table {}", shown_text(table))).unwrap_or_default()
    );
    // Writing to a String does not fail.
    if let Some((position, version)) = letter.position().zip(letter.version) {
        let _ = writeln!(out, "  position {position}, version {version}");
    }
    if let Some(routing) = &letter.routing {
        let _ = writeln!(out, "  routing  {}", shown_text(routing));
    }
    let _ = writeln!(out, "  answer   {} {}: {}", letter.status, shown_text(&letter.kind), shown_text(&letter.reason));
    if let Some(document) = &letter.document {
        let _ = writeln!(out, "  document {}", shown_json(document.get()));
    }
    out
}

async fn retry(letters: Letters, timeout: Duration) -> Result<ExitCode, Problem> {
    let signals = Signals::install()?;
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        signals.first().await;
        stopping.cancel();
    });
    let options = verify::Options { timeout, ..letters.options.clone() };
    let mut printed = Ok(());
    let report = verify::retry(
        &options,
        |letter| letters.is_chosen(letter),
        &stop,
        |retried| {
            let outcome = print(&outcome(retried));
            if printed.is_ok() {
                printed = outcome;
            }
        },
    )
    .await?;
    printed?;
    if report.is_empty() {
        print(&letters.none())?;
    }
    let done = report.iter().all(Retried::is_done);
    Ok(if done { ExitCode::SUCCESS } else { ExitCode::from(SOME_LEFT) })
}

/// What became of the letters of an index.
fn outcome(retried: &Retried) -> String {
    let table = if retried.table.is_empty() { "no table".to_owned() } else { shown_text(&retried.table) };
    let mut parts = Vec::new();
    if retried.equal > 0 {
        parts.push(format!("{} gone, their documents are equal to the rows", HumanCount(retried.equal)));
    }
    if retried.refused > 0 {
        parts.push(format!("{} refused again, as the rows are now", HumanCount(retried.refused)));
    }
    let stay: u64 = retried.stay.values().sum();
    if stay > 0 {
        parts.push(format!("{} stay", HumanCount(stay)));
    }
    let mut out = format!("{table} -> {}: {}\n", shown_text(&retried.index), parts.join(", "));
    for (reason, count) in &retried.stay {
        let _ = writeln!(out, "  {} stay: {}", HumanCount(*count), shown_text(reason));
    }
    out
}

fn drop(letters: &Letters, yes: bool) -> Result<ExitCode, Problem> {
    let (mut marks, mut count) = (HashSet::new(), 0);
    letters.each(|letter| {
        count += 1;
        marks.insert(letter.mark);
    })?;
    if count == 0 {
        print(&letters.none())?;
        return Ok(ExitCode::SUCCESS);
    }
    print(&format!("{} in {}; their rows and documents are not touched.\n", plural(count), letters.path()))?;
    if !yes && !confirmed("Drop them?", "dropped")? {
        print("Nothing was dropped.\n")?;
        return Ok(ExitCode::from(SOME_LEFT));
    }
    let dropped = letters.file.remove(&marks).map_err(|error| letters.unusable("written", &error))?;
    print(&format!("{} dropped.\n", plural(dropped)))?;
    Ok(ExitCode::SUCCESS)
}
