//! The Elasticsearch side.

use std::collections::HashMap;

use tokio_util::sync::CancellationToken;

use super::Candidate;
use super::fingerprint::fingerprint;
use crate::problem::{Problem, ProblemKind};
use crate::sink::{FIND, Hit, Sink, SinkError};

/// Documents in a page at first. Where they are so long that an answer would not fit into memory, less.
const PAGE: u32 = 500;

/// An index, and when to give up.
pub(super) struct Documents<'a> {
    pub(super) sink: &'a Sink,
    pub(super) index: &'a str,
    pub(super) stop: &'a CancellationToken,
}

/// A document.
#[derive(Clone, Debug)]
pub(super) struct Document {
    pub(super) hit: Hit,
    pub(super) fingerprint: u64,
}

impl Document {
    /// Its content.
    pub(super) fn bytes(&self) -> &[u8] {
        self.hit.source.as_deref().map_or(b"", |source| source.get().as_bytes())
    }
}

impl Documents<'_> {
    /// Every document of the index. `begin` is called before the first one, and again where the scan has to begin anew:
    /// the server restarted, or the pages were too long. False when there is no such index.
    pub(super) async fn all(
        &self,
        mut begin: impl FnMut() -> Result<(), Problem>,
        mut each: impl FnMut(&str, u64) -> Result<(), Problem>,
    ) -> Result<bool, Problem> {
        if !self.sink.refresh(self.index, self.stop).await? {
            begin()?;
            return Ok(false);
        }
        let mut page = PAGE;
        loop {
            begin()?;
            let mut scan = self.sink.scan(self.index, true).by(page);
            let outcome = loop {
                match scan.next_page(self.stop).await {
                    Ok(None) => return Ok(true),
                    Ok(Some(hits)) => {
                        let read = hits.iter().try_for_each(|hit| each(&hit.id, self.content(hit)?));
                        if let Err(problem) = read {
                            break Err(problem);
                        }
                    }
                    Err(SinkError::TooLong { .. }) if page > 1 => {
                        page = (page / 4).max(1);
                        break Ok(());
                    }
                    // Forgotten.
                    Err(SinkError::Refused { status: 404, .. }) => break Ok(()),
                    Err(error) => break Err(error.into()),
                }
            };
            scan.close().await;
            outcome?;
        }
    }

    /// The documents of at most [`FIND`] candidates, by id. Refresh before.
    pub(super) async fn of(&self, candidates: &[Candidate]) -> Result<HashMap<String, Vec<Document>>, Problem> {
        let ids: Vec<&str> = candidates.iter().map(|candidate| candidate.id.as_str()).collect();
        let mut found: HashMap<String, Vec<Document>> = HashMap::new();
        let mut parts: Vec<&[&str]> = ids.chunks(FIND).collect();
        while let Some(part) = parts.pop() {
            match self.sink.find(self.index, part, self.stop).await {
                Ok(hits) => {
                    for hit in hits {
                        let fingerprint = self.content(&hit)?;
                        found.entry(hit.id.clone()).or_default().push(Document { hit, fingerprint });
                    }
                }
                Err(SinkError::TooLong { .. }) if part.len() > 1 => {
                    let (one, other) = part.split_at(part.len() / 2);
                    parts.extend([one, other]);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(found)
    }

    fn content(&self, hit: &Hit) -> Result<u64, Problem> {
        let Some(source) = &hit.source else {
            return Err(Problem::new(
                ProblemKind::Elasticsearch,
                format!("index {} does not keep its documents (`_source` is off)", hit.index),
                "There is nothing to compare the rows with.",
            ));
        };
        Ok(fingerprint(source.get().as_bytes()))
    }
}
