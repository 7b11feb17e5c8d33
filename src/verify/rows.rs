//! The PostgreSQL side: rows as the documents that the copy would make of them.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hasher};
use std::pin::pin;

use futures_util::StreamExt;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::Candidate;
use super::fingerprint::fingerprint;
use crate::mapping::{Shape, TableMapping, read_id};
use crate::postgres::preflight::Ready;
use crate::problem::{Problem, ProblemKind};
use crate::sink::{FIND, document_id};
use crate::table::{quote_identifier, quote_literal};
use crate::text::copy::Splitter;

/// Columns before those of the row: whether a document is due, and which version of the row it is.
const BEFORE: usize = 2;
/// Keys of more bytes may have an id that is a digest. Half of the longest id: a key of several columns may be escaped.
const LONG_KEY: usize = 250;

/// How the rows of a table are read.
pub(super) struct Rows {
    shape: Shape,
    /// `"id", "name", ...`
    select: String,
    /// `ONLY "public"."users"`
    source: String,
    /// The key's columns, quoted.
    key: Vec<String>,
    due: String,
    published: String,
}

/// A row and the document that it makes.
#[derive(Clone, Debug)]
pub(super) struct Row {
    /// The text of its key, as a bulk body takes it.
    pub(super) key: Vec<u8>,
    pub(super) document: Vec<u8>,
    pub(super) fingerprint: u64,
    /// The copy would have brought it; otherwise only a change does (`queryCondition`).
    pub(super) due: bool,
    /// Which version of the row it is: place and transaction. The same only as long as nobody touches it.
    pub(super) tuple: u64,
}

impl Rows {
    pub(super) fn new(mapping: &TableMapping, ready: &Ready) -> Self {
        let info = &ready.info;
        let name = info.id.quoted();
        let condition = |sql: &Option<String>| sql.as_ref().map_or_else(|| "true".to_owned(), |sql| format!("({sql})"));
        Self {
            shape: mapping.shape(info.columns.clone(), None),
            select: info.select_list(),
            // Rows of tables that inherit from it are not its own.
            source: if info.kind == 'p' { name } else { format!("ONLY {name}") },
            key: info.key().into_iter().map(quote_identifier).collect(),
            due: format!("{} IS TRUE", condition(&ready.condition)),
            published: condition(&ready.row_filter),
        }
    }

    /// Every row, in no order. By one statement, so that a row which moves between partitions is seen once.
    pub(super) async fn all(
        &self,
        client: &Client,
        each: impl FnMut(Row) -> Result<(), Problem>,
    ) -> Result<(), Problem> {
        self.read(client, "''", "true", each).await
    }

    /// The rows of these candidates, by their documents' ids. Marks the candidates whose id is that of no key.
    pub(super) async fn of(
        &self,
        client: &Client,
        candidates: &mut [Candidate],
    ) -> Result<HashMap<String, Row>, Problem> {
        let mut found = HashMap::new();
        for chunk in candidates.chunks_mut(FIND) {
            // Where one key is none of the column's type, the whole statement fails: in halves until it stands alone.
            let mut parts = vec![chunk];
            while let Some(part) = parts.pop() {
                match self.by_keys(client, part, &mut found).await {
                    Err(Refused::Key) if part.len() > 1 => {
                        let (one, other) = part.split_at_mut(part.len() / 2);
                        parts.extend([one, other]);
                    }
                    Err(Refused::Key) => part[0].no_key = true,
                    Err(Refused::Other(problem)) => return Err(problem),
                    Ok(()) => {}
                }
            }
        }
        self.by_digests(client, candidates, &mut found).await?;
        Ok(found)
    }

    async fn by_keys(
        &self,
        client: &Client,
        candidates: &[Candidate],
        found: &mut HashMap<String, Row>,
    ) -> Result<(), Refused> {
        let key = |candidate: &Candidate| {
            let parts = read_id(candidate.raw.as_ref().unwrap_or(&candidate.id), self.key.len())?;
            let literals: Vec<_> = parts.iter().map(|part| quote_literal(part)).collect();
            Some(format!("({})", literals.join(", ")))
        };
        let keys: Vec<_> = candidates.iter().filter(|candidate| !candidate.no_key).filter_map(key).collect();
        if keys.is_empty() {
            return Ok(());
        }
        // A key may be equal to another one that is written otherwise, such as 1.0 and 1.00, and give another id.
        let wanted = candidates.iter().map(|candidate| candidate.id.as_str()).collect();
        let condition = format!("({}) IN ({})", self.key.join(", "), keys.join(", "));
        self.find(client, &condition, &wanted, found).await
    }

    /// The rows of ids that may be digests of long keys, or of whole rows, which cannot be read back. Only documents that
    /// nobody saw a row for have such an id and no key.
    async fn by_digests(
        &self,
        client: &Client,
        candidates: &[Candidate],
        found: &mut HashMap<String, Row>,
    ) -> Result<(), Problem> {
        let whole = self.shape.names_by_whole_rows();
        let is_digest = |candidate: &&Candidate| {
            let id = candidate.id.as_bytes();
            (whole || candidate.raw.is_none()) && id.len() == 64 && id.iter().all(u8::is_ascii_hexdigit)
        };
        let wanted: HashSet<&str> =
            candidates.iter().filter(is_digest).map(|candidate| candidate.id.as_str()).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        if whole {
            return self.find(client, "true", &wanted, found).await;
        }
        let lengths: Vec<_> = self.key.iter().map(|name| format!("octet_length({name}::text)")).collect();
        let condition = format!("{} > {LONG_KEY}", lengths.join(" + "));
        self.find(client, &condition, &wanted, found).await
    }

    /// The rows for which the condition holds and whose documents' ids are among those that are wanted.
    async fn find<E: From<tokio_postgres::Error> + From<Problem>>(
        &self,
        client: &Client,
        condition: &str,
        wanted: &HashSet<&str>,
        found: &mut HashMap<String, Row>,
    ) -> Result<(), E> {
        self.read(client, IDENTITY, condition, |row| {
            let id = document_id(&row.key).into_owned();
            if wanted.contains(id.as_str()) {
                found.insert(id, row);
            }
            Ok(())
        })
        .await
    }

    async fn read<E: From<tokio_postgres::Error> + From<Problem>>(
        &self,
        client: &Client,
        identity: &str,
        condition: &str,
        mut each: impl FnMut(Row) -> Result<(), Problem>,
    ) -> Result<(), E> {
        // By COPY, so that values have the same text as in the copy and in the stream.
        let sql = format!(
            "COPY (SELECT {}, {identity}, {} FROM {} WHERE {} AND {condition}) TO STDOUT",
            self.due, self.select, self.source, self.published
        );
        let mut lines = pin!(client.copy_out(&sql).await?);
        let mut splitter = Splitter::default();
        while let Some(line) = lines.next().await {
            let line = line?;
            each(self.row(&mut splitter, &line)?)?;
        }
        Ok(())
    }

    fn row(&self, splitter: &mut Splitter, line: &[u8]) -> Result<Row, Problem> {
        let line = splitter.split(line);
        let fields = line.iter().skip(BEFORE);
        let bytes = |at| match line.get(at) {
            Some(crate::change::Field::Text(text)) => text,
            _ => b"",
        };
        let (mut key, mut document) = (Vec::new(), Vec::new());
        if !self.shape.id(&mut key, fields.clone()) || self.shape.encoder().row(&mut document, fields).is_err() {
            return Err(Problem::new(
                ProblemKind::Setup,
                format!("a row of {} has other fields than its table, or a key that is NULL", self.source),
                "The table was altered meanwhile: start again.",
            ));
        }
        let mut tuple = foldhash::quality::FixedState::default().build_hasher();
        tuple.write(bytes(1));
        let fingerprint = fingerprint(&document);
        Ok(Row { key, document, fingerprint, due: bytes(0) == b"t", tuple: tuple.finish() })
    }
}

/// A version of a row: its table, its place there, and the transaction that wrote it.
const IDENTITY: &str = "tableoid::text || ctid::text || xmin::text";

/// Why rows could not be read by their keys.
enum Refused {
    /// One is no value of its column's type.
    Key,
    Other(Problem),
}

impl From<tokio_postgres::Error> for Refused {
    fn from(error: tokio_postgres::Error) -> Self {
        // Class 22, "data exception".
        if error.code().map(SqlState::code).is_some_and(|code| code.starts_with("22")) {
            return Self::Key;
        }
        Self::Other(error.into())
    }
}

impl From<Problem> for Refused {
    fn from(problem: Problem) -> Self {
        Self::Other(problem)
    }
}
