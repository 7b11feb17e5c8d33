//! `pgtide check`: what would a start find and make?

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use pgtide::config::Config;
use pgtide::index::Difference;
use pgtide::preview::{self, IndexPreview, Preview, TablePreview};
use pgtide::problem::Problem;

use super::{complain, internal, print, shown_text};

#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes: 0 where nothing is in the way of a start, otherwise the one that it would end with."
)]
pub(super) struct Arguments {
    /// The configuration, YAML or JSON
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// One JSON object, with the requests that create the indices
    #[arg(long)]
    json: bool,
}

pub(super) async fn main(arguments: Arguments) -> Result<ExitCode, Problem> {
    let loaded = Config::load(&arguments.config)?;
    for warning in &loaded.warnings {
        complain(&format!("pgtide: {}\n", shown_text(&warning.to_string())));
    }
    let preview = preview::look(&loaded.config).await?;
    let text = if arguments.json {
        serde_json::to_string_pretty(&preview).map_err(|error| internal("the plan is no JSON", &error))? + "\n"
    } else {
        lines(&preview)
    };
    print(&text)?;
    Ok(preview.in_the_way.first().map_or(ExitCode::SUCCESS, |problem| ExitCode::from(problem.exit_code())))
}

/// For a person. Writing to a String does not fail.
fn lines(preview: &Preview) -> String {
    let mut out = String::new();
    for side in [&preview.postgres, &preview.elasticsearch].into_iter().flatten() {
        let _ = writeln!(out, "{}", shown_text(side));
    }
    for table in &preview.tables {
        let _ =
            writeln!(out, "\n{} -> {}: {}", shown_text(&table.table.to_string()), shown_text(&table.name), fate(table));
        let width = |of: fn(&preview::ColumnPreview) -> &str| {
            table.columns.iter().map(|column| shown_text(of(column)).chars().count()).max().unwrap_or(0)
        };
        let (names, types) = (width(|column| &column.name), width(|column| &column.sql));
        for column in &table.columns {
            let (name, sql) = (shown_text(&column.name), shown_text(&column.sql));
            let _ = writeln!(out, "  {name:<names$}  {sql:<types$}  {}", column.field);
        }
        let (IndexPreview::Extend { differences, .. } | IndexPreview::Keep { differences, .. }) = &table.index else {
            continue;
        };
        for difference in differences {
            let _ = writeln!(out, "  ! {}: {}", shown_text(&difference.column), difference_in_words(difference));
        }
    }
    section(&mut out, "A start also, or by the way:", preview.notes.iter().map(|note| shown_text(note)));
    let problems = preview
        .in_the_way
        .iter()
        .map(|problem| format!("{}\n    {}", shown_text(&problem.message), shown_text(&problem.hint)));
    section(&mut out, "In the way of a start:", problems);
    out
}

fn section(out: &mut String, heading: &str, items: impl Iterator<Item = String>) {
    for (number, item) in items.enumerate() {
        if number == 0 {
            let _ = writeln!(out, "\n{heading}");
        }
        let _ = writeln!(out, "  {item}");
    }
}

/// What becomes of a table's index.
fn fate(table: &TablePreview) -> String {
    match &table.index {
        IndexPreview::Create { index, .. } => {
            format!("index {} is created, {} its alias, with these fields", shown_text(index), shown_text(&table.name))
        }
        IndexPreview::LeftToCluster => "no index yet: the cluster makes it by its dynamic mapping, not with these \
                                        fields, as manageIndices is off"
            .to_owned(),
        IndexPreview::Extend { index, added, .. } if added.is_empty() => {
            format!("index {}, made by pgtide, has its fields", shown_text(index))
        }
        IndexPreview::Extend { index, added, .. } => {
            let added: Vec<_> = added.iter().map(|name| shown_text(name)).collect();
            format!("index {}, made by pgtide, gets the fields {}", shown_text(index), added.join(", "))
        }
        IndexPreview::Keep { index, .. } => {
            format!("index {} is left as it is; pgtide would make these fields", shown_text(index))
        }
    }
}

fn difference_in_words(difference: &Difference) -> String {
    match &difference.found {
        Some(found) => format!("{} in the index", shown_text(found)),
        None if difference.refused => "not in the index, which is strict: documents are refused".to_owned(),
        None => "not in the index".to_owned(),
    }
}
