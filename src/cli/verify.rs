//! `pgtide verify`: are the documents equal to the rows?

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget};
use pgtide::config::Config;
use pgtide::problem::{Problem, ProblemKind};
use pgtide::telemetry;
use pgtide::verify::{self, Difference, DifferenceKind, Outcome, Progress, TableReport};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::present::Signals;
use super::run::pipeline_name;
use super::{complain, explain, internal, print, shown_json, shown_text};

/// They differ.
const DIFFERENT: u8 = 1;
/// It could not be told.
const NOT_COMPARED: u8 = 2;

#[derive(Args, Debug)]
#[command(after_help = "Exit codes: 0 equal, 1 different, 2 could not compare.")]
pub(super) struct Arguments {
    /// The configuration, YAML or JSON
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Only this table, such as public.users
    #[arg(long, value_name = "TABLE")]
    table: Option<String>,
    /// Copy just the rows that differ, remove just the documents without a row, and compare those again
    #[arg(long)]
    repair: bool,
    /// How long to wait for the stream, for rows that keep changing, and for Elasticsearch
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Differences listed of each table; all are counted
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
    /// List the rows and documents themselves as well
    #[arg(long)]
    show_values: bool,
    /// One JSON object a line: each difference, then each table
    #[arg(long)]
    json: bool,
    /// Folder of the temporary files: about 40 bytes a row [default: the system's]
    #[arg(long, value_name = "FOLDER")]
    temp_folder: Option<PathBuf>,
    /// Folder of the log files, where the dead letters are [default: pgtide in the state folder of the user]
    #[arg(long, value_name = "FOLDER")]
    log_folder: Option<PathBuf>,
}

/// Its exit codes are its own: whatever stands in the way is "could not compare".
pub(super) async fn main(arguments: Arguments) -> Result<ExitCode, Problem> {
    let outcome = match compare(arguments).await {
        Ok(Outcome::Equal) => return Ok(ExitCode::SUCCESS),
        Ok(Outcome::Different) => DIFFERENT,
        Ok(Outcome::NotCompared) => NOT_COMPARED,
        Err(problem) => {
            explain(&problem);
            NOT_COMPARED
        }
    };
    Ok(ExitCode::from(outcome))
}

async fn compare(arguments: Arguments) -> Result<Outcome, Problem> {
    let config = Arc::new(Config::load(&arguments.config)?.config);
    let signals = Signals::install()?;
    let mut options = verify::Options::new(Arc::clone(&config));
    options.table = arguments.table;
    options.repair = arguments.repair;
    options.timeout = arguments.timeout;
    options.limit = arguments.limit;
    options.show_values = arguments.show_values;
    if let Some(folder) = arguments.temp_folder {
        options.folder = folder;
    }
    let folder = telemetry::log::folder(arguments.log_folder.as_deref())
        .map_err(|error| Problem::new(ProblemKind::Config, error.to_string(), "Name a folder with --log-folder."))?;
    options.dead_letter_file = super::run::dead_letter_file(&folder, &pipeline_name(&config));
    let bar = Bar::new();
    let shown = bar.clone();
    options.progress = Some(Arc::new(move |progress: &Progress| shown.show(progress)));
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        signals.first().await;
        stopping.cancel();
    });
    let mut printed = Ok(());
    let report = verify::run(&options, &stop, |table| {
        bar.0.suspend(|| {
            let text = if arguments.json { lines_of_json(table) } else { Ok(lines(table, arguments.limit)) };
            let outcome = text.and_then(|text| print(&text));
            if printed.is_ok() {
                printed = outcome;
            }
        });
    })
    .await;
    bar.0.finish_and_clear();
    let report = report?;
    printed?;
    for note in &report.notes {
        complain(&format!("pgtide: {}\n", shown_text(note)));
    }
    Ok(report.outcome())
}

/// What it does, on stderr; nothing when that is not a terminal.
#[derive(Clone)]
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Self {
        let target =
            if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target);
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(bar)
    }

    fn show(&self, progress: &Progress) {
        let Progress { table, rows, documents, step } = progress;
        let (rows, documents) = (HumanCount(*rows), HumanCount(*documents));
        let step = if step.is_empty() { String::new() } else { format!(", {step}") };
        self.0.set_message(format!("{}: {rows} rows, {documents} documents read{step}", shown_text(table)));
    }
}

/// A table for a person.
fn lines(table: &TableReport, limit: usize) -> String {
    use std::fmt::Write;
    let mut out = format!(
        "{} -> {}: {} rows, {} documents: ",
        shown_text(&table.table),
        shown_text(&table.index),
        HumanCount(table.rows),
        HumanCount(table.documents)
    );
    let counts = [(table.missing, "missing"), (table.extra, "extra"), (table.different, "different")];
    let mut found: Vec<String> =
        counts.iter().filter(|(count, _)| *count > 0).map(|(n, word)| format!("{} {word}", HumanCount(*n))).collect();
    if found.is_empty() && table.not_compared.is_empty() {
        found.push("equal".to_owned());
    }
    let apart: u64 = table.not_compared.values().sum();
    if apart > 0 {
        found.push(format!("{} not compared", HumanCount(apart)));
    } else if !table.not_compared.is_empty() {
        found.push("not compared".to_owned());
    }
    out.push_str(&found.join(", "));
    out.push('\n');
    for (reason, count) in &table.not_compared {
        // Writing to a String does not fail.
        let _ = writeln!(out, "  not compared {}: {}", HumanCount(*count), shown_text(reason));
    }
    if let Some(repaired) = table.repaired {
        let _ =
            write!(out, "  repaired: {} sent, {} removed", HumanCount(repaired.written), HumanCount(repaired.deleted));
        if repaired.superseded > 0 {
            let _ = write!(out, ", {} had a newer version", HumanCount(repaired.superseded));
        }
        if repaired.refused > 0 {
            let _ = write!(out, ", {} refused (see the dead letters)", HumanCount(repaired.refused));
        }
        let left = table.left.unwrap_or_default();
        let _ = match left {
            0 => writeln!(out, "; none differs any more"),
            left => writeln!(out, "; {} still differ", HumanCount(left)),
        };
    }
    for difference in &table.differences {
        out.push_str(&line(difference));
    }
    if table.unequal() > table.differences.len() as u64 {
        let more = table.unequal() - table.differences.len() as u64;
        let _ = writeln!(out, "  and {} more (--limit is {limit})", HumanCount(more));
    }
    out
}

fn line(difference: &Difference) -> String {
    let kind = match difference.kind {
        DifferenceKind::Missing => "missing",
        DifferenceKind::Extra => "extra",
        DifferenceKind::Different => "different",
    };
    let mut line = format!("  {kind:<9} {}", shown_text(&difference.id));
    if !difference.fields.is_empty() {
        let names: Vec<_> = difference.fields.iter().map(|name| shown_text(name)).collect();
        line.push_str(&format!("  {}", names.join(", ")));
    }
    if difference.foreign {
        line.push_str("  (its version is ahead of the server: something else wrote it)");
    }
    if let Some(refused) = &difference.refused {
        line.push_str(&format!("  (in the dead-letter file: {})", shown_text(refused)));
    }
    line.push('\n');
    for (side, value) in [("row", &difference.row), ("document", &difference.document)] {
        if let Some(value) = value {
            line.push_str(&format!("    {side:<8} {}\n", shown_json(value)));
        }
    }
    line
}

/// The same for a program.
fn lines_of_json(table: &TableReport) -> Result<String, Problem> {
    #[derive(Serialize)]
    struct Line<'a, T> {
        #[serde(rename = "type")]
        kind: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        table: Option<&'a str>,
        #[serde(flatten)]
        rest: &'a T,
    }
    let failed = |error: serde_json::Error| internal("the report cannot be written as JSON", &error);
    let mut out = String::new();
    for difference in &table.differences {
        let line = Line { kind: "difference", table: Some(&table.table), rest: difference };
        out.push_str(&serde_json::to_string(&line).map_err(failed)?);
        out.push('\n');
    }
    out.push_str(&serde_json::to_string(&Line { kind: "table", table: None, rest: table }).map_err(failed)?);
    out.push('\n');
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_says_what_differs_and_what_became_of_it() {
        let table = TableReport {
            table: "public.users".into(),
            index: "users".into(),
            rows: 1200,
            documents: 1201,
            missing: 1,
            extra: 2,
            not_compared: [("they keep changing".to_owned(), 3)].into(),
            repaired: Some(verify::Repaired { written: 1, deleted: 1, refused: 1, ..Default::default() }),
            left: Some(2),
            differences: vec![Difference {
                kind: DifferenceKind::Different,
                id: "7".into(),
                fields: vec!["name".into(), "od\nd".into()],
                foreign: false,
                version: None,
                refused: Some("400 mapper_parsing_exception".into()),
                row: Some("{\"id\":7}".into()),
                document: None,
            }],
            ..TableReport::default()
        };
        assert_eq!(
            lines(&table, 1),
            "public.users -> users: 1,200 rows, 1,201 documents: 1 missing, 2 extra, 3 not compared
  not compared 3: they keep changing
  repaired: 1 sent, 1 removed, 1 refused (see the dead letters); 2 still differ
  different 7  name, \"od\\nd\"  (in the dead-letter file: 400 mapper_parsing_exception)
    row      {\"id\":7}
  and 1 more (--limit is 1)
"
        );
        let json = lines_of_json(&table).expect("JSON");
        let lines: Vec<serde_json::Value> =
            json.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
        assert_eq!(lines[0]["type"], "difference");
        assert_eq!(lines[0]["table"], "public.users");
        assert_eq!(lines[0]["kind"], "different");
        assert_eq!(lines[1]["type"], "table");
        assert_eq!(lines[1]["left"], 2);
    }
}
