//! Reading an index to its end, and removing what is too old.

use std::borrow::Cow;

use reqwest::Method;
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;
use tokio_util::sync::CancellationToken;

use super::client::{Answer, Content, json as content};
use super::deliver::Sink;
use super::error::SinkError;
use super::stats::TroubleGuard;
use crate::broken::{Rule, broken};
use crate::gate::Gate;

/// Documents in a page.
const PAGE: u32 = 5000;
/// How long the server keeps the scan for the next page.
const KEPT: &str = "5m";
/// Documents in a page that holds the documents themselves.
const FULL_PAGE: u32 = 500;
/// Ids in one [`Sink::find`].
pub const FIND: usize = 500;
/// Only for answers without documents: where anything is filtered, Elasticsearch writes the source anew, and 17.50 becomes
/// 17.5, or a number of 30 digits one of 17.
const FILTER: (&str, &str) = (
    "filter_path",
    "_scroll_id,timed_out,_shards.failed,hits.hits._index,hits.hits._id,hits.hits._version,hits.hits._routing",
);

/// A document found by a [`Scan`].
#[derive(Clone, Debug, Deserialize)]
pub struct Hit {
    /// The index that holds it, never an alias.
    #[serde(rename = "_index")]
    pub index: String,
    /// Its id.
    #[serde(rename = "_id")]
    pub id: String,
    /// Its external version.
    #[serde(rename = "_version")]
    pub version: u64,
    /// Its routing value, if it has one.
    #[serde(rename = "_routing")]
    pub routing: Option<String>,
    /// The document, when asked for, to the byte as it was sent. None as well where the index keeps no source.
    #[serde(rename = "_source")]
    pub source: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
struct Page<'a> {
    #[serde(rename = "_scroll_id", borrow)]
    scroll: Option<Cow<'a, str>>,
    #[serde(default)]
    hits: Hits,
}

#[derive(Deserialize)]
struct Coverage {
    #[serde(default)]
    timed_out: bool,
    #[serde(rename = "_shards")]
    shards: Option<Shards>,
}

#[derive(Deserialize)]
struct Shards {
    #[serde(default)]
    failed: u64,
}

#[derive(Default, Deserialize)]
struct Hits {
    #[serde(default)]
    hits: Vec<Hit>,
}

/// A scan over all documents of an index, as they were when it was refreshed and opened.
///
/// Uses a scroll, which Elasticsearch and OpenSearch have alike. [`close`](Scan::close) it when it is not read to its end.
#[derive(Debug)]
pub struct Scan {
    sink: Sink,
    index: String,
    source: bool,
    page: u32,
    scroll: Option<String>,
    ended: bool,
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Documents that it removed.
    pub removed: u64,
    /// The highest version that it saw.
    pub newest: u64,
}

/// The server has forgotten the scan: it was restarted, or the page took too long.
struct Forgotten;

impl Sink {
    /// A scan over `index` (or an alias); `source` asks for the documents themselves. Refresh first
    /// ([`Client::refresh`](super::Client::refresh)) to see everything written.
    #[must_use]
    pub fn scan(&self, index: &str, source: bool) -> Scan {
        let page = if source { FULL_PAGE } else { PAGE };
        Scan { sink: self.clone(), index: index.to_owned(), source, page, scroll: None, ended: false }
    }

    /// The documents of `index` (or an alias) that have one of these ids, at most [`FIND`] of them, whole; in no order. An
    /// id may have several, by routing or behind an alias. Refresh first ([`Sink::refresh`]) to see everything written.
    ///
    /// # Errors
    /// As [`Scan::next_page`]; [`SinkError::TooLong`] when they are too long for one answer: ask for fewer.
    pub async fn find(&self, index: &str, ids: &[&str], stop: &CancellationToken) -> Result<Vec<Hit>, SinkError> {
        // Not `_mget`: that finds neither a document with a routing of its own nor any behind an alias of two indices.
        let size = ids.len().max(1) * 4;
        let body = json!({"size": size, "version": true, "query": {"ids": {"values": ids}}});
        let query = [("allow_partial_search_results", "false")];
        let answer = self.insist(Method::POST, &[index, "_search"], &query, content(&body), stop).await?;
        if answer.status == 404 {
            return Ok(Vec::new());
        }
        Ok(answer.json::<Page<'_>>()?.hits.hits)
    }

    /// Makes everything written so far visible to searches, however often it has to be asked for. False when there is no
    /// such index.
    ///
    /// # Errors
    /// [`SinkError::Stopped`] when `stop` is cancelled.
    pub async fn refresh(&self, index: &str, stop: &CancellationToken) -> Result<bool, SinkError> {
        let refreshed = self.insist(Method::POST, &[index, "_refresh"], &[], Content::Empty, stop).await?;
        Ok(refreshed.status != 404)
    }

    /// Removes every document of `index` whose external version is below `below`, unless `keep` says otherwise of its
    /// id. The deletes are made at version `at`, so a document written at `at` or above meanwhile stays.
    /// Nothing is removed where there is no such index. Does again what failed until it works,
    /// visible in [`Sink::stats`]. Waits at `gate` between two requests.
    ///
    /// # Errors
    /// [`SinkError::Stopped`] when `stop` is cancelled, and a search that Elasticsearch does not understand
    /// ([`SinkError::Refused`] with status 400).
    pub async fn sweep(
        &self,
        index: &str,
        below: u64,
        at: u64,
        keep: impl Fn(&str) -> bool,
        gate: &Gate,
        stop: &CancellationToken,
    ) -> Result<Swept, SinkError> {
        let mut pass = gate.enter();
        stop.run_until_cancelled(pass.wait()).await;
        if !self.refresh(index, stop).await? {
            return Ok(Swept::default());
        }
        let old = |hit: &Hit| hit.version < below || broken(Rule::SweepBound);
        let mut swept = Swept::default();
        loop {
            let mut scan = self.scan(index, false);
            loop {
                // Cancelled, the next request says so.
                stop.run_until_cancelled(pass.wait()).await;
                let hits = match scan.page(stop).await {
                    Ok(Ok(Some(hits))) => hits,
                    Ok(Ok(None)) => return Ok(swept),
                    // From the beginning: what is removed already is not found again.
                    Ok(Err(Forgotten)) => break,
                    Err(error) => {
                        scan.close().await;
                        return Err(error);
                    }
                };
                swept.newest = hits.iter().map(|hit| hit.version).fold(swept.newest, u64::max);
                let mut body = self.body();
                for hit in hits.iter().filter(|hit| old(hit) && !keep(&hit.id)) {
                    body.delete_routed(&hit.index, &hit.id, hit.routing.as_deref(), at);
                }
                if !body.is_empty() {
                    stop.run_until_cancelled(pass.wait()).await;
                    match self.deliver(body, stop).await {
                        Ok(delivered) => swept.removed += delivered.ok,
                        Err(error) => {
                            scan.close().await;
                            return Err(error);
                        }
                    }
                }
            }
        }
    }

    /// Sends a request until it is answered with 2xx, 404 or a refusal that waiting does not mend.
    async fn insist(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Content,
        stop: &CancellationToken,
    ) -> Result<Answer, SinkError> {
        let mut trouble = self.trouble();
        stop.run_until_cancelled(self.insist_on(method, path, query, body, &mut trouble))
            .await
            .unwrap_or(Err(SinkError::Stopped))
    }

    async fn insist_on(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Content,
        trouble: &mut TroubleGuard,
    ) -> Result<Answer, SinkError> {
        let mut backoff = self.backoff();
        loop {
            let mut asked = None;
            let error = match self.client().send(method.clone(), path, query, body.clone()).await {
                Ok(answer) if matches!(answer.status, 200..=299 | 404) => match incomplete(&answer) {
                    None => {
                        trouble.clear();
                        return Ok(answer);
                    }
                    Some(reason) => SinkError::Malformed { url: answer.url, reason },
                },
                Ok(answer) => {
                    asked = answer.retry_after;
                    answer.into_error()
                }
                Err(error) => error,
            };
            let slow = match &error {
                SinkError::Refused { status: 400, .. }
                | SinkError::TooLong { .. }
                | SinkError::Configuration { .. }
                | SinkError::Stopped => {
                    return Err(error);
                }
                error => !error.is_transient(),
            };
            trouble.set(error.to_string(), error.hint());
            tokio::time::sleep(if slow { backoff.slow(asked) } else { backoff.next(asked) }).await;
        }
    }
}

/// A search that leaves documents out would make a sweep or a comparison say what is not so.
fn incomplete(answer: &Answer) -> Option<String> {
    if answer.status == 404 {
        return None;
    }
    let Ok(page) = serde_json::from_slice::<Coverage>(&answer.body) else {
        return Some("its JSON is cut short or not as expected".to_owned());
    };
    let failed = page.shards.map_or(0, |shards| shards.failed);
    (page.timed_out || failed > 0).then(|| format!("it covers only a part of the index: {failed} shards failed"))
}

impl Scan {
    /// The same with pages of at most so many documents.
    #[must_use]
    pub fn by(mut self, page: u32) -> Self {
        self.page = page.max(1);
        self
    }

    /// Documents in a page at most.
    #[must_use]
    pub fn page_size(&self) -> u32 {
        self.page
    }

    /// The next documents, in no order; none at the end.
    ///
    /// # Errors
    /// [`SinkError::Stopped`] when `stop` is cancelled, [`SinkError::Refused`] when Elasticsearch refuses for good or
    /// has forgotten the scan (status 404): begin again then; [`SinkError::TooLong`]: begin again with smaller pages.
    pub async fn next_page(&mut self, stop: &CancellationToken) -> Result<Option<Vec<Hit>>, SinkError> {
        self.page(stop).await?.map_err(|Forgotten| SinkError::Refused {
            url: self.sink.client().url(),
            status: 404,
            reason: "the scan was forgotten: the server restarted, or more than five minutes passed between two pages"
                .to_owned(),
        })
    }

    async fn page(&mut self, stop: &CancellationToken) -> Result<Result<Option<Vec<Hit>>, Forgotten>, SinkError> {
        if self.ended {
            return Ok(Ok(None));
        }
        let answer = match &self.scroll {
            None => {
                let query = [("scroll", KEPT), ("allow_partial_search_results", "false"), FILTER];
                let query = &query[..query.len() - usize::from(self.source)];
                let body = json!({"size": self.page, "version": true, "_source": self.source, "sort": ["_doc"]});
                let answer =
                    self.sink.insist(Method::POST, &[&self.index, "_search"], query, content(&body), stop).await?;
                if answer.status == 404 {
                    self.ended = true;
                    return Ok(Ok(None));
                }
                answer
            }
            Some(scroll) => {
                let body = json!({"scroll": KEPT, "scroll_id": scroll});
                let query = &[FILTER][usize::from(self.source)..];
                let answer =
                    self.sink.insist(Method::POST, &["_search", "scroll"], query, content(&body), stop).await?;
                if answer.status == 404 {
                    self.scroll = None;
                    return Ok(Err(Forgotten));
                }
                answer
            }
        };
        let page: Page<'_> = answer.json()?;
        if let Some(scroll) = page.scroll {
            self.scroll = Some(scroll.into_owned());
        }
        if page.hits.hits.is_empty() {
            self.close().await;
            return Ok(Ok(None));
        }
        if self.scroll.is_none() {
            return Err(SinkError::Malformed {
                url: answer.url.clone(),
                reason: "it names no scroll to go on with".to_owned(),
            });
        }
        Ok(Ok(Some(page.hits.hits)))
    }

    /// Lets the server forget the scan. It does so by itself after five minutes, too.
    pub async fn close(&mut self) {
        self.ended = true;
        if let Some(scroll) = self.scroll.take() {
            let body = json!({"scroll_id": [scroll]});
            let _ = self.sink.client().send(Method::DELETE, &["_search", "scroll"], &[], content(&body)).await;
        }
    }
}
