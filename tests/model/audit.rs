//! `pgtide verify` at the end of a history, when documents are rows: it has to say so. Documents that are damaged before
//! have to be found, those and no others, and repaired.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use pgtide::config::Config;
use pgtide::verify::{self, DifferenceKind, Outcome};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::history::{Broken, Held, History, LIMIT, Rule, broken};
use super::schema::{Kind, Schema, pick};
use super::support::process::http;
use super::support::wait_until;

/// What is done to a document behind the pipeline's back.
#[derive(Clone, Copy, Debug)]
pub struct Damage {
    table: Kind,
    what: DifferenceKind,
    /// Which one it is done to.
    at: usize,
}

impl Damage {
    /// Some, in some histories.
    pub fn random(rng: &mut Rng, schema: &Schema) -> Vec<Self> {
        let count = if rng.u32(..3) == 0 { rng.usize(1..4) } else { 0 };
        let mut one = || Self {
            table: *pick(rng, &schema.tables),
            what: *pick(rng, &[DifferenceKind::Missing, DifferenceKind::Extra, DifferenceKind::Different]),
            at: rng.usize(..1000),
        };
        (0..count).map(|_| one()).collect()
    }
}

/// Table, id, and in what they differ.
type Harmed = (String, String, DifferenceKind, Vec<String>);
type Found = BTreeSet<Harmed>;

/// A table that was altered may be copied again as late as this, which heals what was damaged: then it is done once more.
const COPIES: u32 = 5;

/// Verifies, after the damage if there is any.
pub async fn audit(history: &History, damage: &[Damage]) -> Held {
    for round in 1..COPIES {
        let before = newest_chunk(history).await;
        let held = damaged(history, damage, round).await;
        if held.is_ok() || newest_chunk(history).await == before {
            return held;
        }
        history.log.add("a table was copied again meanwhile");
        wait_until("nothing is to be copied again", LIMIT, || async {
            history.wanted(false).await.is_none_or(|wanted| wanted.is_empty())
        })
        .await;
        run(history, true).await?;
    }
    damaged(history, damage, COPIES).await
}

/// Each copy plans chunks of its own.
async fn newest_chunk(history: &History) -> Option<i32> {
    let sql = "SELECT max(id) FROM public.cdc_snapshot_chunks WHERE slot_name = $1";
    history.client().query_one(sql, &[&history.place.name]).await.unwrap().get(0)
}

async fn damaged(history: &History, damage: &[Damage], round: u32) -> Held {
    let mut done = Found::new();
    for damage in damage {
        let harmed = harm(history, *damage, round, &done).await;
        done.extend(harmed);
    }
    history.log.add(format!("verify, damaged: {done:?}"));
    let (found, outcome) = run(history, false).await?;
    let expected = if done.is_empty() { Outcome::Equal } else { Outcome::Different };
    if found != done || outcome != expected {
        return broken(Rule::Verify, format!("verify says {outcome:?} {found:?}; damaged was {done:?}"));
    }
    if done.is_empty() {
        return Ok(());
    }
    let (left, outcome) = run(history, true).await?;
    if !left.is_empty() || outcome != Outcome::Equal {
        return broken(Rule::Verify, format!("repaired was {done:?}; verify says {outcome:?} and leaves {left:?}"));
    }
    history.equal().await
}

/// Damages a document; none where there is none, or where it is damaged already.
async fn harm(history: &History, damage: Damage, round: u32, done: &Found) -> Option<Harmed> {
    let Damage { table, what, at } = damage;
    let documents = history.store.documents(table.name());
    // With the version that it has, so that nothing about it but its content is odd.
    let (id, (version, source)) = documents.iter().nth(at % documents.len().max(1))?;
    // As text: a number stays as it is written.
    let mut document: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(source).unwrap();
    let (mut id, mut fields) = (id.clone(), Vec::new());
    let action = if what == DifferenceKind::Missing { "delete" } else { "index" };
    match what {
        DifferenceKind::Missing => {}
        DifferenceKind::Extra => {
            // What an earlier round's was removed at is newer than any row.
            id = format!("9{round}{}{id}", at % 10);
        }
        DifferenceKind::Different => {
            document.insert("v".to_owned(), to_raw_value("damaged").unwrap());
            fields.push("v".to_owned());
        }
    }
    if done.iter().any(|(of, harmed, ..)| *of == table.full_name() && *harmed == id) {
        return None;
    }
    let meta = json!({action: {"_index": table.name(), "_id": id, "version": version, "version_type": "external_gte"}});
    let source = if what == DifferenceKind::Missing {
        String::new()
    } else {
        format!("{}\n", serde_json::to_string(&document).unwrap())
    };
    let request = http().post(format!("{}/_bulk", history.store.url())).header("content-type", "application/x-ndjson");
    let answer = request.body(format!("{meta}\n{source}")).send().await.unwrap().text().await.unwrap();
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer["errors"], false, "{answer}");
    Some((table.full_name(), id, what, fields))
}

async fn run(history: &History, repair: bool) -> Result<(Found, Outcome), Broken> {
    let config = Config::parse(&history.configuration.to_string(), "model", &|_| None).unwrap().config;
    let mut options = verify::Options::new(Arc::new(config));
    options.repair = repair;
    options.timeout = Duration::from_secs(30);
    options.dead_letter_file = std::env::temp_dir().join("pgtide-model-has-no-dead-letters");
    let report = verify::run(&options, &CancellationToken::new(), |_| ()).await;
    let report = report.map_err(|problem| Broken { rule: Rule::Verify, how: format!("verify: {problem:?}") })?;
    let mut found = Found::new();
    for table in &report.tables {
        if !table.not_compared.is_empty() {
            broken(Rule::Verify, format!("verify does not compare {}: {:?}", table.table, table.not_compared))?;
        }
        for difference in &table.differences {
            found.insert((table.table.clone(), difference.id.clone(), difference.kind, difference.fields.clone()));
        }
    }
    Ok((found, report.outcome()))
}
