//! Sending dead letters again: never what is in the letter, always the row as it is now.
//!
//! A letter leaves the file once the document of its id is known to be the row, or a newer letter of the same id is in the
//! file. So nothing is lost wherever it is cut short; what was sent twice is harmless by its version.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::settle::{Settled, Wrong};
use super::sides::Sides;
use super::{BATCH, Candidate, Comparison, Options, TableReport, wanted};
use crate::problem::{Problem, ProblemKind};
use crate::sink::{DeadLetters, FIND, Letter, Mark};

/// What became of the letters of one index.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Retried {
    /// Its table; empty where the configuration has none.
    pub table: String,
    /// The index.
    pub index: String,
    /// Letters that left: the documents are the rows now.
    pub equal: u64,
    /// Letters that left for a newer one of the same id: Elasticsearch refused the row as it is now, too.
    pub refused: u64,
    /// Letters that stay, by the reason.
    pub stay: BTreeMap<String, u64>,
}

impl Retried {
    /// Nothing of it is left in the file.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.refused == 0 && self.stay.is_empty()
    }
}

/// Copies the rows of the letters that `wanted_letter` chooses as they are now, or removes the documents of rows that are
/// gone, as a repair does ([`run`](super::run)): never an older version over a newer one. `each` gets what became of the
/// letters of an index as soon as it is known. Of `options` the limit, the folder and the switches have no meaning.
///
/// Documents that a handler makes cannot be made here; their letters stay.
///
/// # Errors
/// As [`run`](super::run), and the file cannot be read or written. Letters that did not leave before stay.
pub async fn retry(
    options: &Options,
    wanted_letter: impl Fn(&Letter) -> bool,
    stop: &CancellationToken,
    mut each: impl FnMut(&Retried),
) -> Result<Vec<Retried>, Problem> {
    let dead_letters = options.dead_letters();
    let mut mappings = wanted(&options.config, options.table.as_deref())?;
    // By index and id the lines of the file. The documents in them are of no use.
    let mut found: BTreeMap<String, HashMap<String, Vec<Mark>>> = BTreeMap::new();
    let mut stay: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
    let known: HashSet<&str> = mappings.iter().map(|mapping| mapping.index.as_str()).collect();
    let read = dead_letters.read(|letter| {
        if !wanted_letter(&letter) {
            return;
        }
        let reason = if !known.contains(letter.index.as_str()) {
            "no table of this configuration goes to this index"
        } else if letter.operation == "update" || letter.routing.is_some() {
            "a handler made it"
        } else {
            found.entry(letter.index).or_default().entry(letter.id).or_default().push(letter.mark);
            return;
        };
        *stay.entry(letter.index).or_default().entry(reason.to_owned()).or_default() += 1;
    });
    read.map_err(|error| no_file(&dead_letters, &error))?;
    mappings.retain(|mapping| found.contains_key(&mapping.index));
    let mut report = Vec::new();
    if !mappings.is_empty() {
        let sides = Sides::open(options, &mappings).await?;
        for mapping in &mappings {
            let mut retried = Retried {
                table: mapping.table.to_string(),
                index: mapping.index.clone(),
                stay: stay.remove(&mapping.index).unwrap_or_default(),
                ..Retried::default()
            };
            let mut letters = found.remove(&mapping.index).unwrap_or_default();
            while !letters.is_empty() {
                let chosen: Vec<String> = letters.keys().take(BATCH).cloned().collect();
                let batch: HashMap<_, _> = chosen.iter().filter_map(|id| letters.remove_entry(id)).collect();
                let comparison = sides.of(mapping, stop).await?;
                sides.within_patience(comparison.retry(batch, &dead_letters, &mut retried), stop).await?;
            }
            each(&retried);
            report.push(retried);
        }
    }
    for (index, stay) in stay {
        let retried = Retried { index, stay, ..Retried::default() };
        each(&retried);
        report.push(retried);
    }
    Ok(report)
}

impl Comparison<'_> {
    /// One batch of ids with the lines that are about them.
    async fn retry(
        &self,
        letters: HashMap<String, Vec<Mark>>,
        dead_letters: &DeadLetters,
        retried: &mut Retried,
    ) -> Result<(), Problem> {
        let all: u64 = letters.values().map(|marks| marks.len() as u64).sum();
        if self.copying {
            *retried.stay.entry("the table is being copied again".to_owned()).or_default() += all;
            return Ok(());
        }
        let candidates = letters.keys().map(|id| Candidate { id: id.clone(), raw: None, no_key: false });
        let mut candidates: Vec<Candidate> = candidates.collect();
        let mut settled = Settled::default();
        self.sink.refresh(&self.mapping.index, self.stop).await?;
        while !candidates.is_empty() {
            let chunk = candidates.split_off(candidates.len().saturating_sub(FIND));
            let documents = self.documents().of(&chunk).await?;
            let wrong = |candidate: Candidate| {
                let documents = documents.get(&candidate.id).map_or(&[][..], Vec::as_slice);
                Wrong::refused(candidate, documents)
            };
            settled.wrong.extend(chunk.into_iter().map(wrong));
        }
        let (left, undecided) = self.repair(settled, &mut TableReport::default()).await?;
        if let Some(why) = self.altered().await? {
            *retried.stay.entry(format!("the table was altered meanwhile: {why}")).or_default() += all;
            return Ok(());
        }
        let before: HashSet<&Mark> = letters.values().flatten().collect();
        let mut renewed = HashSet::new();
        let read = dead_letters.read(|letter| {
            if letter.index == self.mapping.index && letters.contains_key(&letter.id) && !before.contains(&letter.mark)
            {
                renewed.insert(letter.id);
            }
        });
        read.map_err(|error| no_file(dead_letters, &error))?;
        let undecided: HashSet<&str> = undecided.iter().map(|candidate| candidate.id.as_str()).collect();
        let differ: HashSet<&str> = left.wrong.iter().map(|wrong| wrong.candidate.id.as_str()).collect();
        let mut leave = HashSet::new();
        for (id, marks) in &letters {
            let count = marks.len() as u64;
            if renewed.contains(id) {
                retried.refused += count;
            } else if differ.contains(id.as_str()) {
                let why = "the document differs all the same: its version is ahead, something else wrote it";
                *retried.stay.entry(why.to_owned()).or_default() += count;
                continue;
            } else if undecided.contains(id.as_str()) {
                let reasons: Vec<_> = left.unsettled.keys().map(String::as_str).collect();
                *retried.stay.entry(format!("sent, but it is not certain yet: {}", reasons.join("; "))).or_default() +=
                    count;
                continue;
            } else {
                retried.equal += count;
            }
            leave.extend(marks);
        }
        dead_letters.remove(&leave).map_err(|error| no_file(dead_letters, &error))?;
        Ok(())
    }
}

fn no_file(dead_letters: &DeadLetters, error: &io::Error) -> Problem {
    Problem::new(
        ProblemKind::Config,
        format!("the dead letters in {} cannot be read or written: {error}", dead_letters.path().display()),
        "Run it as the user that pgtide runs as, with room for a second file of that size beside it.",
    )
}
