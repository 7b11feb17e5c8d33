//! `pgtide drop`: takes away what a pipeline left in PostgreSQL.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use indicatif::HumanBytes;
use pgtide::config::Config;
use pgtide::postgres::publication::Maker;
use pgtide::problem::Problem;
use pgtide::removal::{self, Remains};
use pgtide::sink::Client;
use pgtide::table::quote_identifier;

use super::{complain, confirmed, print, shown_text};

/// The answer was no.
const REFUSED: u8 = 1;

#[derive(Args, Debug)]
#[command(after_help = "Documents are not touched. An index whose first copy was cut short gets its settings back.")]
pub(super) struct Arguments {
    /// The configuration, YAML or JSON
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Only say what would be removed
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
    /// Leave the publication, also one that pgtide made
    #[arg(long)]
    keep_publication: bool,
}

pub(super) async fn main(arguments: Arguments) -> Result<ExitCode, Problem> {
    let config = Config::load(&arguments.config)?.config;
    let remains = Remains::find(&config).await?;
    if let Some(problem) = remains.in_use.as_ref().filter(|_| !arguments.dry_run) {
        return Err(problem.clone());
    }
    let publication = !arguments.keep_publication;
    let client = Client::new(&config.elasticsearch)?;
    let (indices, hurried) = match removal::hurried(&config, &client).await {
        Ok((indices, hurried)) => (Some(indices), hurried),
        Err(problem) => {
            let what = "Whether a copy that was cut short has left settings in indices is not known";
            complain(&format!("pgtide: {what}: {}\n", shown_text(&problem.message)));
            (None, Vec::new())
        }
    };
    let mut goes = going(&remains, publication);
    goes.extend(hurried.iter().map(|found| {
        format!(
            "settings of index {} for a copy that was cut short: refresh_interval and number_of_replicas become what they were",
            shown_text(&found.index)
        )
    }));
    let place = format!("database {} on {}", config.cdc.database, pgtide::postgres::connect::address(&config.cdc));
    let job = shown_text(remains.job());
    if goes.is_empty() {
        print(&format!(
            "Nothing of {job} is left in {}.\n{}",
            shown_text(&place),
            list("Stays:", &staying(&remains, &config, publication))
        ))?;
        return Ok(ExitCode::SUCCESS);
    }
    let heading = format!("Goes, of {job} in {}:", shown_text(&place));
    let stays = staying(&remains, &config, publication);
    let in_use: Vec<_> = remains.in_use.iter().map(|problem| shown_text(&problem.message)).collect();
    let in_use = list("In use, so that nothing can be removed now:", &in_use);
    print(&format!("{}{}{in_use}", list(&heading, &goes), list("Stays:", &stays)))?;
    if arguments.dry_run {
        return Ok(ExitCode::SUCCESS);
    }
    if !arguments.yes && !confirmed("Remove it?", "removed")? {
        print("Nothing was removed.\n")?;
        return Ok(ExitCode::from(REFUSED));
    }
    for found in &hurried {
        if let Some(indices) = &indices {
            indices.restore(found).await?;
        }
    }
    let tables = remains.remove(publication).await?;
    let left = if remains.ledger_tables && !tables {
        " The ledger's tables stay, without these rows: another session or another owner has them."
    } else {
        ""
    };
    print(&format!("Removed.{left}\n"))?;
    Ok(ExitCode::SUCCESS)
}

fn list(heading: &str, items: &[String]) -> String {
    let mut out = String::new();
    if !items.is_empty() {
        // Writing to a String does not fail.
        let _ = writeln!(out, "{heading}");
        for item in items {
            let _ = writeln!(out, "  {item}");
        }
    }
    out
}

/// What is removed.
fn going(remains: &Remains, publication: bool) -> Vec<String> {
    let mut items = Vec::new();
    if let Some((name, info)) = &remains.slot {
        let kept =
            info.restart_lsn.map(|restart| format!(", keeps {} of WAL", HumanBytes(info.current_lsn.since(restart))));
        let lost = if info.wal_status == "lost" { ", lost" } else { "" };
        items.push(format!("replication slot {}{lost}{}", shown_text(name), kept.unwrap_or_default()));
    }
    if let Some((name, Maker::Pgtide)) = &remains.publication
        && publication
    {
        items.push(format!("publication {}, made by pgtide for this slot", shown_text(name)));
    }
    if remains.ledger.rows > 0 {
        items.push(format!(
            "{} rows of the ledger (public.cdc_snapshot_job, cdc_snapshot_chunks, cdc_snapshot_tables)",
            remains.ledger.rows
        ));
    }
    if remains.ledger_tables {
        items.push("the ledger's tables: nothing of another pipeline is in them".to_owned());
    }
    items
}

/// What is not, and how it would be.
fn staying(remains: &Remains, config: &Config, publication: bool) -> Vec<String> {
    let mut items = Vec::new();
    if let Some((name, maker)) = &remains.publication
        && (!publication || *maker != Maker::Pgtide)
    {
        let why = match maker {
            Maker::Pgtide => "as asked for",
            Maker::Shared => "the tables of another slot are published by it as well",
            Maker::OtherSlot => "made by pgtide for another slot",
            Maker::Other => "not made by pgtide, or by one that left no mark",
        };
        items.push(format!(
            "publication {}: {why} (DROP PUBLICATION {})",
            shown_text(name),
            shown_text(&quote_identifier(name))
        ));
    }
    if !remains.ledger.others.is_empty() {
        let others: Vec<_> = remains.ledger.others.iter().map(|name| shown_text(name)).collect();
        items.push(format!("the ledger's tables: they are those of {} as well", others.join(", ")));
    }
    for (table, word) in &remains.identities {
        let sql = format!("ALTER TABLE {} REPLICA IDENTITY DEFAULT", table.quoted());
        items.push(format!("REPLICA IDENTITY {word} of {} ({})", shown_text(&table.to_string()), shown_text(&sql)));
    }
    let mut indices: Vec<&String> = config.elasticsearch.table_index_mapping.values().collect();
    indices.dedup();
    if !indices.is_empty() {
        let names: Vec<_> = indices.iter().map(|name| shown_text(name)).collect();
        items.push(format!("the documents, in {}", names.join(", ")));
    }
    items
}
