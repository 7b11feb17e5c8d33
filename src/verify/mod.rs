//! Comparing rows with documents, by key and content, while both change; and copying just those that differ.
//!
//! ```text
//! fingerprint  what a document means, in 64 bits
//! spill        keys and fingerprints of one side, on disk, in parts that fit into memory
//! rows         the PostgreSQL side, as the copy would write it
//! documents    the Elasticsearch side
//! settle       looks at what seems to differ until it is certain
//! stream       waits until the stream has passed a position
//! repair       copies just the rows that differ
//! retry        copies just the rows of dead letters, which leave their file
//! refused      which of the differing ids have a dead letter
//! sides        the connections to both sides
//! report       what was found
//! ```
//!
//! Both sides are read once, in whatever order they come, into parts by a hash of the id; the parts are compared one after
//! another. So memory does not grow with the table: it holds two parts of 512, at most 100,000 ids that are looked at
//! again, and a page of documents. The disk holds about 21 bytes a row and a document, and their ids.

mod documents;
mod fingerprint;
mod refused;
mod repair;
mod report;
mod retry;
mod rows;
mod settle;
mod sides;
mod spill;
mod stream;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use self::documents::Documents;
pub use self::report::{Difference, DifferenceKind, Outcome, Repaired, Report, TableReport};
pub use self::retry::{Retried, retry};
use self::rows::Rows;
use self::settle::{Settle, Settled};
use self::sides::{Sides, definition};
use self::spill::{BUCKETS, Record, Spill, records};
use self::stream::Stream;
use crate::config::Config;
use crate::mapping::{self, TableMapping};
use crate::postgres::definition::Definition;
use crate::postgres::preflight::{Ready, Server};
use crate::problem::{Problem, ProblemKind};
use crate::sink::{DeadLetters, Sink, document_id};
use crate::table::TableId;

/// Ids that are looked at again together.
const BATCH: usize = 100_000;
/// Differences of a table after which nothing more is looked at again: it should be copied again as a whole.
const ENOUGH: u64 = 100_000;
/// How often a repair is made again for ids that differ after it.
const TURNS: u32 = 3;

/// What to compare and how.
#[derive(Clone)]
pub struct Options {
    /// Both sides, as the pipeline has them.
    pub config: Arc<Config>,
    /// Only this table: as the configuration names it, `schema.table`, or the name alone of one in `public`.
    pub table: Option<String>,
    /// Write and remove documents where they differ from the rows.
    pub repair: bool,
    /// How long the stream may take to pass a position, a row may keep changing, Elasticsearch may not answer.
    pub timeout: Duration,
    /// Differences of a table that are listed. All are counted.
    pub limit: usize,
    /// List the rows and documents themselves as well.
    pub show_values: bool,
    /// Where the temporary files go.
    pub folder: PathBuf,
    /// The dead letters when the configuration does not say where they are.
    pub dead_letter_file: PathBuf,
    /// Told how far it has come.
    pub progress: Option<OnProgress>,
}

impl Options {
    /// Compares all tables of `config`, with a timeout of 60 s, and lists 100 differences of each.
    #[must_use]
    pub fn new(config: Arc<Config>) -> Self {
        Self {
            config,
            table: None,
            repair: false,
            timeout: Duration::from_secs(60),
            limit: 100,
            show_values: false,
            folder: std::env::temp_dir(),
            dead_letter_file: PathBuf::from("pgtide-dead-letters.ndjson"),
            progress: None,
        }
    }

    /// Where refused documents are.
    #[must_use]
    pub fn dead_letters(&self) -> DeadLetters {
        let configured = self.config.elasticsearch.dead_letter_file.as_ref();
        DeadLetters::new(configured.unwrap_or(&self.dead_letter_file).clone())
    }
}

/// Is told how far it has come.
pub type OnProgress = Arc<dyn Fn(&Progress) + Send + Sync>;

/// How far it has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The table.
    pub table: String,
    /// Rows read.
    pub rows: u64,
    /// Documents read.
    pub documents: u64,
    /// What it does beside reading.
    pub step: &'static str,
}

/// An id to be looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    /// The document's id.
    id: String,
    /// The text of the key, where the id is a digest of it.
    raw: Option<String>,
    /// The id is that of no key: a text where the key is a number, say.
    no_key: bool,
}

/// Compares. `each` gets the report of a table as soon as it is made.
///
/// # Errors
/// A server does not answer or refuses the user, a table is gone, the copy is not done, `stop` is cancelled: it could not
/// be compared.
pub async fn run(
    options: &Options,
    stop: &CancellationToken,
    mut each: impl FnMut(&TableReport),
) -> Result<Report, Problem> {
    let mappings = wanted(&options.config, options.table.as_deref())?;
    let sides = Sides::open(options, &mappings).await?;
    let names: Vec<TableId> = mappings.iter().map(|mapping| mapping.table.clone()).collect();
    let mut report = Report { notes: sides.notes(&names).await?, ..Report::default() };
    for mapping in &mappings {
        let comparison = sides.of(mapping, stop).await?;
        let table = sides.within_patience(comparison.run(&sides.dead_letters), stop).await?;
        each(&table);
        report.tables.push(table);
    }
    Ok(report)
}

fn wanted(config: &Config, table: Option<&str>) -> Result<Vec<Arc<TableMapping>>, Problem> {
    let all = mapping::tables(config, false)?;
    let Some(table) = table else { return Ok(all) };
    let named: Vec<String> = all.iter().map(|mapping| mapping.table.to_string()).collect();
    let is_named = |id: &TableId| id.to_string() == table || id.schema == "public" && id.name == table;
    let chosen: Vec<_> = all.into_iter().filter(|mapping| is_named(&mapping.table)).collect();
    if chosen.is_empty() {
        return Err(Problem::new(
            ProblemKind::Config,
            format!("table {table} goes to no index by this configuration"),
            format!("It has: {}.", named.join(", ")),
        ));
    }
    Ok(chosen)
}

fn stopped() -> Problem {
    Problem::new(ProblemKind::Internal, "stopped before everything was compared", "")
}

/// One table.
struct Comparison<'a> {
    options: &'a Options,
    client: &'a Client,
    sink: &'a Sink,
    mapping: &'a TableMapping,
    rows: Rows,
    ready: Ready,
    server: &'a Server,
    /// What the table was before anything of it was read.
    defined: Definition,
    stream: Stream,
    synchronous: bool,
    /// The ledger says that it is to be copied again.
    copying: bool,
    stop: &'a CancellationToken,
}

impl Comparison<'_> {
    async fn run(&self, dead_letters: &DeadLetters) -> Result<TableReport, Problem> {
        let mut report = TableReport {
            table: self.mapping.table.to_string(),
            index: self.mapping.index.clone(),
            ..TableReport::default()
        };
        let outcome = self.compare(&mut report).await;
        // Rows and documents of two definitions were compared, or the rows could not be read any more.
        if let Some(why) = self.altered().await? {
            let count = report.rows.max(report.documents);
            let reason = format!("the table was altered while it was compared: {why}");
            return Ok(TableReport {
                missing: 0,
                extra: 0,
                different: 0,
                left: None,
                not_compared: [(reason, count)].into(),
                differences: Vec::new(),
                ..report
            });
        }
        outcome?;
        refused::mark(dead_letters, &self.mapping.index, &mut report.differences);
        Ok(report)
    }

    /// Why what was read by the table's definition of the beginning is not what it is now.
    async fn altered(&self) -> Result<Option<&'static str>, Problem> {
        let now = definition(self.client, &self.options.config, self.server, &self.mapping.table).await?;
        Ok(now.map_or(Some("it was dropped or renamed"), |now| self.defined.outdated(&now)))
    }

    async fn compare(&self, report: &mut TableReport) -> Result<(), Problem> {
        let (mut rows, mut documents) = self.read().await?;
        (report.rows, report.documents) = (rows.records(), documents.records());
        let settle = self.settle();
        let (mut settled, mut pending) = (Settled::default(), Vec::new());
        for bucket in 0..BUCKETS {
            unequal(&rows.take(bucket).map_err(no_room)?, &documents.take(bucket).map_err(no_room)?, &mut pending);
            if settled.count() >= ENOUGH {
                settled.unsettled("enough differ already: they were not looked at again", pending.len() as u64);
                pending.clear();
            }
            while pending.len() >= BATCH || bucket + 1 == BUCKETS && !pending.is_empty() {
                self.step("looking again at what seems to differ", report.rows, report.documents);
                let batch = pending.split_off(pending.len().saturating_sub(BATCH));
                settle.settle(batch, &mut settled).await?;
            }
        }
        drop((rows, documents));
        if self.copying && settled.count() > 0 {
            let count = settled.count();
            settled = Settled { unsettled: settled.unsettled, ..Settled::default() };
            settled.unsettled("the table is being copied again", count);
        }
        (report.missing, report.extra, report.different) = (settled.missing, settled.extra, settled.different);
        if self.options.repair && settled.count() > 0 {
            (settled, _) = self.repair(settled, report).await?;
            report.left = Some(settled.count());
        }
        report.not_compared = settled.unsettled;
        report.differences = settled.differences;
        report.differences.sort_by(|one, other| (one.kind, &one.id).cmp(&(other.kind, &other.id)));
        Ok(())
    }

    fn settle(&self) -> Settle<'_> {
        Settle {
            client: self.client,
            rows: &self.rows,
            documents: self.documents(),
            stream: &self.stream,
            timeout: self.options.timeout,
            synchronous: self.synchronous,
            limit: self.options.limit,
            show_values: self.options.show_values,
        }
    }

    fn documents(&self) -> Documents<'_> {
        Documents { sink: self.sink, index: &self.mapping.index, stop: self.stop }
    }

    /// Repairs, and looks again at what was repaired. What is one too many then is repaired again: its row was deleted
    /// meanwhile. All else that still differs was refused, or is of something else's making, and would be so again.
    /// Gives as well what could not be looked at.
    async fn repair(&self, settled: Settled, report: &mut TableReport) -> Result<(Settled, Vec<Candidate>), Problem> {
        let mut undecided = Vec::new();
        let mut done = Repaired::default();
        let mut left = Settled { unsettled: settled.unsettled, ..Settled::default() };
        let mut wrong = settled.wrong;
        for turn in 1..=TURNS {
            self.step("repairing", report.rows, report.documents);
            let session = repair::session(&self.options.config, &self.ready.info.leaves, self.options.timeout).await?;
            // Under its locks nobody alters the table. Rows that are not what was compared are left as they are.
            if self.altered().await?.is_some() {
                break;
            }
            let again: Vec<Candidate> = wrong.iter().map(|wrong| wrong.candidate.clone()).collect();
            let repaired = repair::repair(session, self.sink, self.mapping, &self.rows, wrong, self.stop).await?;
            done.written += repaired.written;
            done.deleted += repaired.deleted;
            done.superseded += repaired.superseded;
            done.refused += repaired.refused;
            report.repaired = Some(done);
            undecided.extend(self.settle().settle(again, &mut left).await?);
            wrong = if turn < TURNS { left.take_left_over() } else { Vec::new() };
            if wrong.is_empty() {
                break;
            }
        }
        Ok((left, undecided))
    }

    /// Reads both sides at the same time.
    async fn read(&self) -> Result<(Spill, Spill), Problem> {
        let spill = || Spill::new(&self.options.folder).map_err(no_room);
        let (mut rows, documents) = (spill()?, Mutex::new(spill()?));
        let (row_count, document_count) = (AtomicU64::new(0), AtomicU64::new(0));
        let shown = |counter: &AtomicU64, count: u64| {
            counter.store(count, Relaxed);
            if count.is_multiple_of(1000) {
                self.step("", row_count.load(Relaxed), document_count.load(Relaxed));
            }
        };
        let from_rows = self.rows.all(self.client, |row| {
            let id = document_id(&row.key);
            let record = Record { key: &row.key, fingerprint: row.fingerprint, mark: row.due };
            rows.add(id.as_bytes(), record).map_err(no_room)?;
            shown(&row_count, rows.records());
            Ok(())
        });
        let held = || documents.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = || {
            *held() = spill()?;
            Ok(())
        };
        let of_index = self.documents();
        let from_documents = of_index.all(begin, |id, fingerprint| {
            let mut documents = held();
            let record = Record { key: id.as_bytes(), fingerprint, mark: false };
            documents.add(id.as_bytes(), record).map_err(no_room)?;
            shown(&document_count, documents.records());
            Ok(())
        });
        tokio::try_join!(from_rows, from_documents)?;
        Ok((rows, documents.into_inner().unwrap_or_else(PoisonError::into_inner)))
    }

    fn step(&self, step: &'static str, rows: u64, documents: u64) {
        if let Some(progress) = &self.options.progress {
            progress(&Progress { table: self.mapping.table.to_string(), rows, documents, step });
        }
    }
}

/// The ids of two parts that are not equal by what was read of them.
fn unequal(rows: &[u8], documents: &[u8], found: &mut Vec<Candidate>) {
    // None: several have the id, by routing or behind an alias.
    let mut left: HashMap<&[u8], Option<u64>> = HashMap::new();
    for document in records(documents) {
        left.entry(document.key).and_modify(|several| *several = None).or_insert(Some(document.fingerprint));
    }
    for row in records(rows) {
        let id = document_id(row.key);
        let equal = match left.remove(id.as_bytes()) {
            None => !row.mark,
            Some(fingerprint) => fingerprint == Some(row.fingerprint),
        };
        if !equal {
            let raw = matches!(id, Cow::Owned(_)).then(|| text(row.key));
            found.push(Candidate { id: id.into_owned(), raw, no_key: false });
        }
    }
    found.extend(left.into_keys().map(|id| Candidate { id: text(id), raw: None, no_key: false }));
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn no_room(error: std::io::Error) -> Problem {
    Problem::new(
        ProblemKind::Config,
        format!("the temporary files cannot be written or read: {error}"),
        "They need about 21 bytes for each row and each document, and the length of its id. Name a folder with room by \
         --temp-folder.",
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// The candidates of two sides: keys with fingerprints, rows with whether a document is due.
    fn found(rows: &[(&[u8], u64, bool)], documents: &[(&[u8], u64)]) -> Vec<(String, bool)> {
        let folder = std::env::temp_dir();
        let (mut one, mut other) = (Spill::new(&folder).unwrap(), Spill::new(&folder).unwrap());
        for &(key, fingerprint, mark) in rows {
            one.add(document_id(key).as_bytes(), Record { key, fingerprint, mark }).unwrap();
        }
        for &(key, fingerprint) in documents {
            other.add(key, Record { key, fingerprint, mark: false }).unwrap();
        }
        let mut found = Vec::new();
        for bucket in 0..BUCKETS {
            unequal(&one.take(bucket).unwrap(), &other.take(bucket).unwrap(), &mut found);
        }
        let mut found: Vec<_> = found.into_iter().map(|found| (found.id, found.raw.is_some())).collect();
        found.sort();
        found
    }

    #[test]
    fn each_id_that_is_not_equal_is_looked_at_once() {
        let long = [b'k'; 600];
        let digest = document_id(&long).into_owned();
        let rows: [(&[u8], u64, bool); 6] = [
            (b"same", 1, true),
            (b"other", 1, true),
            (b"gone", 1, true),
            (b"left out", 1, false),
            (b"two", 1, true),
            (&long, 1, true),
        ];
        let documents: [(&[u8], u64); 6] =
            [(b"same", 1), (b"other", 2), (b"two", 1), (b"two", 1), (b"extra", 1), (b"extra", 1)];
        let mut expected: Vec<_> = ["extra", "gone", "other", "two"]
            .map(|id| (id.to_owned(), false))
            .into_iter()
            .chain([(digest.clone(), true)])
            .collect();
        expected.sort();
        assert_eq!(found(&rows, &documents), expected);
        // The long key has its document under the digest.
        assert_eq!(found(&rows[5..], &[(digest.as_bytes(), 1)]), []);
    }
}
