//! Looking again at what seemed to differ, until it is certain.
//!
//! Rows and documents are read at different moments, while both change. A round reads the row, lets the stream pass the
//! position of that moment, and reads the document and the row once more. They differ for good where all of this holds:
//!
//! - the row is the same version of itself before and after ([`Row::tuple`]), so that nothing of it was changed in
//!   between;
//! - the stream has passed that version, so that the document is not older than it;
//! - the document's version is from before the round, so that it is not newer than the row: no change since then has
//!   been read in the document that was not yet there when the row was read;
//! - no transaction from before the round is open. The stream brings a commit as soon as it is on disk, and other
//!   sessions see it a moment later, or when a synchronous standby has confirmed it: until then the document is right and
//!   the row looks old.
//!
//! They are equal where the document is what the row was at the beginning or at the end of the round.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use tokio_postgres::Client;

use super::documents::{Document, Documents};
use super::fingerprint::differing_fields;
use super::rows::{Row, Rows};
use super::stream::{Moment, Passed, Stream, position};
use super::{Candidate, Difference, DifferenceKind};
use crate::lsn::Lsn;
use crate::problem::Problem;
use crate::sink::FIND;
use crate::version;

/// Rounds in which a transaction that is only open, with no standby to wait for, keeps a difference from counting.
const OPEN_ROUNDS: u32 = 3;
/// Between two rounds.
const PAUSE: Duration = Duration::from_millis(100);

/// The two sides of one table, and how far to go.
pub(super) struct Settle<'a> {
    pub(super) client: &'a Client,
    pub(super) rows: &'a Rows,
    pub(super) documents: Documents<'a>,
    pub(super) stream: &'a Stream,
    pub(super) timeout: Duration,
    /// Commits may wait for a standby.
    pub(super) synchronous: bool,
    /// Differences that are kept for the report.
    pub(super) limit: usize,
    pub(super) show_values: bool,
}

/// What is certain, and what could not be made so.
#[derive(Default)]
pub(super) struct Settled {
    pub(super) missing: u64,
    pub(super) extra: u64,
    pub(super) different: u64,
    /// Could not be compared, by the reason.
    pub(super) unsettled: BTreeMap<String, u64>,
    pub(super) differences: Vec<Difference>,
    /// All of them, for a repair.
    pub(super) wrong: Vec<Wrong>,
}

/// What a repair has to know.
pub(super) struct Wrong {
    pub(super) candidate: Candidate,
    /// A document without a row, which a newer snapshot can remove.
    left_over: bool,
    /// Its documents: index, routing.
    pub(super) documents: Vec<(String, Option<String>)>,
}

impl Wrong {
    /// An id that is to be as its row, whatever its documents are.
    pub(super) fn refused(candidate: Candidate, documents: &[Document]) -> Self {
        Self { candidate, left_over: false, documents: places(documents) }
    }
}

/// Where documents are: index, routing.
fn places(documents: &[Document]) -> Vec<(String, Option<String>)> {
    documents.iter().map(|document| (document.hit.index.clone(), document.hit.routing.clone())).collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Equal,
    /// Something of it changed during the round.
    Again,
    Differs {
        kind: DifferenceKind,
        /// Its version is ahead of this server: it was written by something else.
        foreign: bool,
    },
}

impl Settled {
    pub(super) fn count(&self) -> u64 {
        self.missing + self.extra + self.different
    }

    /// Takes out what is one too many.
    pub(super) fn take_left_over(&mut self) -> Vec<Wrong> {
        let (taken, stay): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.wrong).into_iter().partition(|wrong| wrong.left_over);
        self.wrong = stay;
        self.extra -= taken.len() as u64;
        self.differences.retain(|difference| difference.foreign || difference.kind != DifferenceKind::Extra);
        taken
    }

    pub(super) fn unsettled(&mut self, reason: impl Into<String>, count: u64) {
        if count > 0 {
            *self.unsettled.entry(reason.into()).or_default() += count;
        }
    }
}

impl Settle<'_> {
    /// Looks at `pending` again, in rounds, until each is certain or the time is up. Gives those that are not.
    pub(super) async fn settle(
        &self,
        mut pending: Vec<Candidate>,
        settled: &mut Settled,
    ) -> Result<Vec<Candidate>, Problem> {
        let deadline = Instant::now() + self.timeout;
        let mut round = 0;
        while !pending.is_empty() {
            round += 1;
            let before = Moment::now(self.client).await?;
            let first = self.rows.of(self.client, &mut pending).await?;
            let first: HashMap<String, Seen> = first
                .into_iter()
                .map(|(id, row)| (id, Seen { tuple: row.tuple, fingerprint: row.fingerprint }))
                .collect();
            let seen_at = position(self.client).await?;
            if let Passed::No(reason) = self.stream.pass(self.client, seen_at, deadline).await? {
                settled.unsettled(reason, pending.len() as u64);
                return Ok(pending);
            }
            self.documents.sink.refresh(self.documents.index, self.documents.stop).await?;
            let (mut again, mut opened) = (Vec::new(), 0);
            while !pending.is_empty() {
                let mut chunk = pending.split_off(pending.len().saturating_sub(FIND));
                let documents = self.documents.of(&chunk).await?;
                let later = position(self.client).await?;
                // Asked before the rows are read: what is open while they are read is open now.
                let open = before.still_open(self.client).await?;
                let second = self.rows.of(self.client, &mut chunk).await?;
                for candidate in chunk {
                    let documents = documents.get(&candidate.id).map_or(&[][..], Vec::as_slice);
                    let row = second.get(&candidate.id);
                    let look = Look { first: first.get(&candidate.id).copied(), row, documents };
                    match look.judge(before.position, later) {
                        Verdict::Equal => {}
                        Verdict::Again => again.push(candidate),
                        Verdict::Differs { .. } if open && (self.synchronous || round < OPEN_ROUNDS) => {
                            opened += 1;
                            again.push(candidate);
                        }
                        Verdict::Differs { kind, foreign } => {
                            self.differs(settled, candidate, kind, foreign, row, documents);
                        }
                    }
                }
            }
            pending = again;
            if pending.is_empty() {
                break;
            }
            if Instant::now() >= deadline {
                settled.unsettled(
                    "a transaction has been open all the time that may be a commit which waits for a synchronous standby",
                    opened,
                );
                settled.unsettled("they keep changing", pending.len() as u64 - opened);
                return Ok(pending);
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(Vec::new())
    }

    fn differs(
        &self,
        settled: &mut Settled,
        candidate: Candidate,
        kind: DifferenceKind,
        foreign: bool,
        row: Option<&Row>,
        documents: &[Document],
    ) {
        *match kind {
            DifferenceKind::Missing => &mut settled.missing,
            DifferenceKind::Extra => &mut settled.extra,
            DifferenceKind::Different => &mut settled.different,
        } += 1;
        if settled.differences.len() < self.limit {
            let document = plain(documents).or(documents.first());
            let fields = match (kind, row, document) {
                (DifferenceKind::Different, Some(row), Some(document)) => {
                    differing_fields(&row.document, document.bytes())
                }
                _ => Vec::new(),
            };
            let value = |bytes: &[u8]| self.show_values.then(|| String::from_utf8_lossy(bytes).into_owned());
            settled.differences.push(Difference {
                id: candidate.id.clone(),
                kind,
                fields,
                foreign,
                version: document.map(|document| document.hit.version),
                refused: None,
                row: row.and_then(|row| value(&row.document)),
                document: document.and_then(|document| value(document.bytes())),
            });
        }
        let left_over = kind == DifferenceKind::Extra && !foreign;
        settled.wrong.push(Wrong { candidate, left_over, documents: places(documents) });
    }
}

/// What is remembered of a row between the two looks of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    tuple: u64,
    fingerprint: u64,
}

/// A round's findings about one id.
struct Look<'a> {
    first: Option<Seen>,
    row: Option<&'a Row>,
    documents: &'a [Document],
}

/// The document as pgtide writes it: it sets no routing.
fn plain(documents: &[Document]) -> Option<&Document> {
    documents.iter().find(|document| document.hit.routing.is_none())
}

impl Look<'_> {
    /// `before`: where PostgreSQL stood before the first look, `later`: after the document was read.
    fn judge(&self, before: Lsn, later: Lsn) -> Verdict {
        let document = plain(self.documents);
        let spare = self.documents.iter().find(|other| document.is_none_or(|plain| !std::ptr::eq(*other, plain)));
        let due = self.row.is_some_and(|row| row.due);
        let content = document.map(|document| document.fingerprint);
        let equal = match content {
            None => self.first.is_none() || self.row.is_none() || !due,
            Some(_) => {
                content == self.first.map(|seen| seen.fingerprint) || content == self.row.map(|row| row.fingerprint)
            }
        };
        let suspect = match (equal, spare) {
            (true, None) => return Verdict::Equal,
            // Of the documents that nobody but somebody else has written, by routing.
            (true, spare) => spare,
            (false, _) => document,
        };
        let kind = match (self.row, equal, document) {
            (_, true, _) | (None, ..) => DifferenceKind::Extra,
            (Some(_), false, None) => DifferenceKind::Missing,
            (Some(_), false, Some(_)) => DifferenceKind::Different,
        };
        let version = suspect.map(|document| document.hit.version);
        if version.is_some_and(|version| version >= version::of(later, 0)) {
            return Verdict::Differs { kind, foreign: true };
        }
        let moved = self.first.map(|seen| seen.tuple) != self.row.map(|row| row.tuple);
        if moved || version.is_some_and(|version| version >= version::of(before, 0)) {
            return Verdict::Again;
        }
        Verdict::Differs { kind, foreign: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::Hit;

    const BEFORE: Lsn = Lsn(1000);
    const LATER: Lsn = Lsn(2000);

    fn row(tuple: u64, fingerprint: u64, due: bool) -> Row {
        Row { key: b"7".to_vec(), document: Vec::new(), fingerprint, due, tuple }
    }

    /// Of the operation that was committed at `position`.
    fn document(position: u64, fingerprint: u64, routing: Option<&str>) -> Document {
        let version = version::of(Lsn(position), 3);
        let routing = routing.map(str::to_owned);
        Document { hit: Hit { index: "i".into(), id: "7".into(), version, routing, source: None }, fingerprint }
    }

    fn judge(first: Option<(u64, u64)>, row: Option<&Row>, documents: &[Document]) -> Verdict {
        let first = first.map(|(tuple, fingerprint)| Seen { tuple, fingerprint });
        Look { first, row, documents }.judge(BEFORE, LATER)
    }

    fn differs(kind: DifferenceKind) -> Verdict {
        Verdict::Differs { kind, foreign: false }
    }

    #[test]
    fn a_row_that_stayed_and_an_old_document_differ() {
        let row = row(1, 10, true);
        let first = Some((1, 10));
        assert_eq!(judge(first, Some(&row), &[]), differs(DifferenceKind::Missing));
        assert_eq!(judge(first, Some(&row), &[document(992, 11, None)]), differs(DifferenceKind::Different));
        assert_eq!(judge(None, None, &[document(992, 11, None)]), differs(DifferenceKind::Extra));
    }

    #[test]
    fn what_changed_in_between_is_looked_at_again() {
        // The row was written anew, even with the same content: deleted and made again, say.
        let written = row(2, 10, true);
        assert_eq!(judge(Some((1, 10)), Some(&written), &[]), Verdict::Again);
        assert_eq!(judge(None, Some(&written), &[document(992, 11, None)]), Verdict::Again);
        assert_eq!(judge(Some((1, 10)), None, &[document(992, 11, None)]), Verdict::Again);
        // The document is from a change of the round.
        assert_eq!(judge(None, None, &[document(1000, 11, None)]), Verdict::Again);
        assert_eq!(judge(Some((2, 10)), Some(&written), &[document(1992, 11, None)]), Verdict::Again);
    }

    #[test]
    fn a_document_that_is_what_the_row_was_is_equal() {
        let after = row(2, 20, true);
        for content in [10, 20] {
            assert_eq!(judge(Some((1, 10)), Some(&after), &[document(1504, content, None)]), Verdict::Equal);
        }
        assert_eq!(judge(None, Some(&after), &[]), Verdict::Equal);
        assert_eq!(judge(Some((1, 10)), None, &[]), Verdict::Equal);
        assert_eq!(judge(None, None, &[]), Verdict::Equal);
    }

    #[test]
    fn rows_that_the_copy_leaves_out_need_no_document_and_must_not_have_a_wrong_one() {
        let outside = row(1, 10, false);
        assert_eq!(judge(Some((1, 10)), Some(&outside), &[]), Verdict::Equal);
        let wrong = [document(5, 11, None)];
        assert_eq!(judge(Some((1, 10)), Some(&outside), &wrong), differs(DifferenceKind::Different));
    }

    #[test]
    fn a_version_ahead_of_the_server_is_of_something_else() {
        let found = judge(Some((1, 10)), Some(&row(1, 10, true)), &[document(2000, 11, None)]);
        assert_eq!(found, Verdict::Differs { kind: DifferenceKind::Different, foreign: true });
    }

    #[test]
    fn a_second_document_by_routing_is_one_too_many() {
        let row = row(1, 10, true);
        let both = [document(5, 10, Some("r")), document(5, 10, None)];
        assert_eq!(judge(Some((1, 10)), Some(&row), &both), differs(DifferenceKind::Extra));
        assert_eq!(judge(Some((1, 10)), Some(&row), &both[..1]), differs(DifferenceKind::Missing));
    }
}
