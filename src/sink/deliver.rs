//! Sending until every item is answered for good.

use std::borrow::Cow;
use std::collections::{HashSet, VecDeque};
use std::io::Write as _;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::backoff::Backoff;
use super::body::{Body, Kind, Parcel};
use super::client::{Answer, Client, Content};
use super::dead_letter::{self, DeadLetters};
use super::error::SinkError;
use super::lease::Lease;
use super::memory::is_too_large;
use super::response::{self, ErrorText, Items, Verdict};
use super::stats::{Queued, Refused, SinkStats, Stats, Tally, TroubleGuard, now};

/// Used buffers that are kept for the next bodies.
const SPARE_BUFFERS: usize = 32;
/// A longer one held a huge row; it goes back to the system.
const SPARE_BYTES: usize = 32 << 20;

/// How a [`Sink`] sends.
#[derive(Clone, Debug)]
pub struct SinkOptions {
    /// Bulks in flight at most, those of all lanes and of all who call [`Sink::deliver`] together.
    pub max_in_flight: usize,
    /// The limit of the first wait before trying again.
    pub backoff_base: Duration,
    /// The limit of every wait, unless the server asks for more.
    pub backoff_cap: Duration,
    /// A bulk without an answer for so long is a trouble.
    pub slow: Duration,
    /// The file for documents that Elasticsearch refuses for good.
    pub dead_letters: PathBuf,
    /// What the tables are called in that file, by the numbers that their [`Target`](super::Target)s have.
    pub tables: Vec<String>,
}

impl SinkOptions {
    /// `max_in_flight` bulks, waits of 100 ms to 30 s, patience of 20 s, refused documents to the file `dead_letters`,
    /// where no table has a name.
    #[must_use]
    pub fn new(max_in_flight: usize, dead_letters: PathBuf) -> Self {
        Self {
            max_in_flight: max_in_flight.max(1),
            backoff_base: Duration::from_millis(100),
            backoff_cap: Duration::from_secs(30),
            slow: Duration::from_secs(20),
            dead_letters,
            tables: Vec::new(),
        }
    }

    fn table(&self, number: u32) -> &str {
        usize::try_from(number).ok().and_then(|number| self.tables.get(number)).map_or("", String::as_str)
    }
}

/// What became of a body. Every item is in exactly one of the three.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delivered {
    /// Written or deleted.
    pub ok: u64,
    /// A newer version was there already. Success.
    pub superseded: u64,
    /// Refused for good; the documents are in the dead-letter file.
    pub rejected: u64,
}

/// The way into Elasticsearch. Cheap to clone; all clones share one limit and one set of counters.
#[derive(Clone, Debug)]
pub struct Sink {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    client: Client,
    options: SinkOptions,
    permits: Semaphore,
    stats: Arc<Stats>,
    dead_letters: DeadLetters,
    spare: Mutex<Vec<Vec<u8>>>,
    lease: Lease,
}

/// What an attempt calls for.
enum Step {
    /// The server has dealt with the request; each item has its own answer.
    Judged(Judged),
    /// Too long, or not understood as a whole: in halves it may pass, or show the item that is to blame.
    Split { status: u16, kind: String, reason: String },
    /// Nothing came of it: the same again.
    Again(Again),
}

struct Again {
    reason: String,
    hint: String,
    asked: Option<Duration>,
    /// Only a person can mend it.
    slow: bool,
    throttled: bool,
}

#[derive(Default)]
struct Judged {
    tally: Tally,
    again: Vec<usize>,
    refused: Vec<Refused>,
    letters: Vec<u8>,
    trouble: Option<Again>,
    /// What goes again does so in smaller requests.
    split: bool,
}

impl Sink {
    /// A sink over `client`.
    #[must_use]
    pub fn new(client: Client, options: SinkOptions) -> Self {
        let dead_letters = DeadLetters::new(options.dead_letters.clone());
        let permits = Semaphore::new(options.max_in_flight.max(1));
        let (stats, spare, lease) = (Arc::default(), Mutex::default(), Lease::default());
        let inner = Inner { client, options, permits, stats, dead_letters, spare, lease };
        Self { inner: Arc::new(inner) }
    }

    /// The client, for requests that are no bulk.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.inner.client
    }

    /// What bulks are sent under: none is while it is not valid.
    #[must_use]
    pub fn lease(&self) -> Lease {
        self.inner.lease.clone()
    }

    /// An empty body, in a used buffer when there is one.
    #[must_use]
    pub fn body(&self) -> Body {
        let spare = self.inner.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        spare.map_or_else(Body::default, Body::in_buffer)
    }

    /// Sends `body` until every item has been answered for good, whatever it takes; refused documents are on the disk
    /// before it returns. What is slow to come is told by [`Sink::stats`].
    ///
    /// Of items for one document the last one counts, in the order of the body. For the order between bodies see
    /// [`Lanes`](super::Lanes).
    ///
    /// # Errors
    /// Only [`SinkError::Stopped`], when `stop` is cancelled. Any part of the body may then have been carried out.
    pub async fn deliver(&self, body: Body, stop: &CancellationToken) -> Result<Delivered, SinkError> {
        let queued = self.queue(body.len());
        self.deliver_queued(body, queued, stop).await
    }

    /// Counts `documents` as handed over until the guard is dropped.
    pub(super) fn queue(&self, documents: usize) -> Queued {
        self.inner.stats.queue(documents)
    }

    pub(super) async fn deliver_queued(
        &self,
        body: Body,
        queued: Queued,
        stop: &CancellationToken,
    ) -> Result<Delivered, SinkError> {
        let delivered = stop.run_until_cancelled(self.deliver_all(body.into_parcel())).await;
        drop(queued);
        delivered.ok_or(SinkError::Stopped)
    }

    /// What was done, and what stands in the way.
    #[must_use]
    pub fn stats(&self) -> SinkStats {
        let limit = self.inner.options.max_in_flight.max(1);
        let in_flight = limit - self.inner.permits.available_permits().min(limit);
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        self.inner.stats.snapshot(count(in_flight), count(limit))
    }

    async fn deliver_all(&self, parcel: Parcel) -> Delivered {
        let stats = &self.inner.stats;
        let mut delivered = Delivered::default();
        let mut trouble = stats.trouble();
        let mut backoff = self.backoff();
        // In the order of the body: a part is answered before the next is sent.
        let mut parts = VecDeque::new();
        if parcel.len() > 0 {
            parts.push_back(parcel);
        }
        while let Some(part) = parts.pop_front() {
            let wait = match self.watched_attempt(&part, &mut trouble).await {
                Step::Judged(judged) => {
                    if !judged.refused.is_empty() {
                        self.bury(&part, &judged.refused, judged.letters).await;
                        delivered.rejected += judged.refused.len() as u64;
                    }
                    stats.settled(&part, &judged.tally);
                    delivered.superseded += judged.tally.superseded;
                    delivered.ok += judged.tally.settled.len() as u64 - judged.tally.superseded;
                    if judged.again.len() < part.len() {
                        backoff.reset();
                    }
                    if judged.again.is_empty() {
                        trouble.clear();
                        self.reclaim(part.bytes);
                    } else {
                        let rest = part.subset(&judged.again);
                        if judged.split && rest.len() > 1 {
                            let (first, second) = rest.halves();
                            parts.push_front(second);
                            parts.push_front(first);
                        } else {
                            parts.push_front(rest);
                        }
                    }
                    judged.trouble
                }
                Step::Split { status, kind, reason } if part.len() == 1 => {
                    let error = ErrorText { kind: kind.into(), reason: reason.into() };
                    let mut judged = Judged::default();
                    refuse(&mut judged, &self.inner.options, &part, 0, status, Some(&error));
                    self.bury(&part, &judged.refused, judged.letters).await;
                    delivered.rejected += 1;
                    None
                }
                Step::Split { .. } => {
                    let (first, second) = part.halves();
                    parts.push_front(second);
                    parts.push_front(first);
                    None
                }
                Step::Again(again) => {
                    stats.resent(part.len(), again.throttled);
                    parts.push_front(part);
                    Some(again)
                }
            };
            if let Some(again) = wait {
                let pause = if again.slow { backoff.slow(again.asked) } else { backoff.next(again.asked) };
                trouble.set(again.reason, again.hint);
                tokio::time::sleep(pause).await;
            }
        }
        trouble.clear();
        delivered
    }

    /// An attempt that is told of when it takes long: a server that hangs answers nothing that could be told.
    async fn watched_attempt(&self, part: &Parcel, trouble: &mut TroubleGuard) -> Step {
        let (since, slow) = (now(), self.inner.options.slow);
        let mut attempt = pin!(self.attempt(part));
        if let Ok(step) = tokio::time::timeout(slow, attempt.as_mut()).await {
            return step;
        }
        let reason = format!("a bulk has had no answer for {} s", slow.as_secs());
        let hint = "Elasticsearch is overloaded or hangs, or a firewall drops the answers. It is waited for.";
        trouble.waits(reason, hint.to_owned(), since);
        attempt.await
    }

    async fn attempt(&self, part: &Parcel) -> Step {
        let content = if self.inner.client.gzip() {
            let bytes = part.bytes.clone();
            match tokio::task::spawn_blocking(move || pack(&bytes)).await {
                Ok(Ok(packed)) => Content::PackedBulk(packed),
                // Sent as it is; gzip is a courtesy.
                _ => Content::Bulk(part.bytes.clone()),
            }
        } else {
            Content::Bulk(part.bytes.clone())
        };
        let Ok(_permit) = self.inner.permits.acquire().await else {
            return again(&SinkError::Stopped, None);
        };
        if !self.inner.lease.is_valid() {
            return Step::Again(Again {
                reason: "PostgreSQL has given no answer for so long that another process may have taken over"
                    .to_owned(),
                hint: "Nothing is sent until it answers.".to_owned(),
                asked: None,
                slow: false,
                throttled: false,
            });
        }
        let began = Instant::now();
        let answer = match self.inner.client.bulk(content).await {
            Ok(answer) => answer,
            Err(error) => return again(&error, None),
        };
        if answer.status != 200 {
            return refused_request(answer, part);
        }
        match response::read(&answer.body, &part.items) {
            Ok(items) => {
                self.inner.stats.answered(part.bytes.len(), part.len(), began.elapsed());
                Step::Judged(judge_items(&self.inner.options, part, &items, answer.retry_after))
            }
            Err(reason) => again(&SinkError::Malformed { url: answer.url, reason }, None),
        }
    }

    /// Writes refused items to the dead-letter file, however often it takes, and only then counts them.
    async fn bury(&self, part: &Parcel, refused: &[Refused], letters: Vec<u8>) {
        let mut trouble = self.trouble();
        let letters = Arc::new(letters);
        let mut backoff = self.backoff();
        while let Err(error) = self.inner.dead_letters.append(Arc::clone(&letters)).await {
            trouble.set(
                format!("refused documents cannot be kept: {}: {error}", self.inner.dead_letters.path().display()),
                "Make room or mend the permissions, or name another file in elasticsearch.deadLetterFile and start again. \
                 Nothing is dropped meanwhile."
                    .to_owned(),
            );
            tokio::time::sleep(backoff.next(None)).await;
        }
        trouble.clear();
        self.inner.stats.rejected(part, refused);
    }

    pub(super) fn backoff(&self) -> Backoff {
        Backoff::new(self.inner.options.backoff_base, self.inner.options.backoff_cap)
    }

    pub(super) fn trouble(&self) -> TroubleGuard {
        self.inner.stats.trouble()
    }

    fn reclaim(&self, bytes: Bytes) {
        // Fails where somebody still holds a part of it.
        if let Ok(buffer) = bytes.try_into_mut()
            && buffer.capacity() <= SPARE_BYTES
        {
            let mut spare = self.inner.spare.lock().unwrap_or_else(PoisonError::into_inner);
            if spare.len() < SPARE_BUFFERS {
                spare.push(buffer.into());
            }
        }
    }
}

fn pack(bytes: &[u8]) -> std::io::Result<Bytes> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::with_capacity(bytes.len() / 4), flate2::Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?.into())
}

fn again(error: &SinkError, asked: Option<Duration>) -> Step {
    let slow = !error.is_transient();
    Step::Again(Again { reason: error.to_string(), hint: error.hint(), asked, slow, throttled: false })
}

/// What a status other than 200 calls for.
fn refused_request(answer: Answer, part: &Parcel) -> Step {
    let (status, asked) = (answer.status, answer.retry_after);
    let error = response::error_of(&answer.body);
    match (status, &error) {
        (413, error) => Step::Split {
            status,
            kind: error.as_ref().map_or_else(|| "request_entity_too_large".to_owned(), |error| error.kind.to_string()),
            reason: "the document is longer than http.max_content_length allows".to_owned(),
        },
        // Only in Elasticsearch's own words: a proxy's 400 says nothing about a document.
        (400, Some(error)) if !matches!(response::judge(Kind::Index, status, Some(error)), Verdict::Wait) => {
            Step::Split { status, kind: error.kind.to_string(), reason: error.reason.to_string() }
        }
        (429, Some(error)) if has_no_memory(error, part) => {
            let error = no_memory(error);
            Step::Split { status, kind: error.kind.to_string(), reason: error.reason.to_string() }
        }
        (429, error) => Step::Again(Again {
            reason: response::describe(status, error.as_ref()),
            hint: BUSY.to_owned(),
            asked,
            slow: false,
            throttled: true,
        }),
        _ => again(&answer.into_error(), asked),
    }
}

const BUSY: &str =
    "Elasticsearch has more to do than it can. It is asked more slowly; a smaller concurrentRequest may help.";

fn has_no_memory(error: &ErrorText<'_>, part: &Parcel) -> bool {
    is_too_large(&error.reason, part.bytes.len(), part.len())
}

/// The same in words that say whose fault it is.
fn no_memory<'a>(error: &ErrorText<'a>) -> ErrorText<'a> {
    let reason =
        format!("the document needs more memory than indexing_pressure.memory.limit allows ({})", error.reason);
    ErrorText { kind: error.kind.clone(), reason: reason.into() }
}

/// Judges every item of an answered part.
fn judge_items(options: &SinkOptions, part: &Parcel, items: &Items<'_>, asked: Option<Duration>) -> Judged {
    let mut judged = Judged::default();
    let Items::Each(items) = items else {
        judged.tally.settled = (0..part.len()).collect();
        return judged;
    };
    let verdicts: Vec<Verdict> = items
        .iter()
        .zip(&part.items)
        .map(|(answer, item)| {
            let error = answer.error.as_ref();
            match response::judge(item.kind, answer.status, error) {
                Verdict::Retry { throttled: true } if error.is_some_and(|error| has_no_memory(error, part)) => {
                    Verdict::TooLarge
                }
                verdict => verdict,
            }
        })
        .collect();
    let overtaken = overtaken(part, &verdicts);
    for (position, (verdict, answer)) in verdicts.into_iter().zip(items).enumerate() {
        let throttled =
            verdict == Verdict::Retry { throttled: true } || answer.status == 429 && verdict != Verdict::TooLarge;
        judged.tally.throttled += u64::from(throttled);
        match verdict {
            Verdict::Ok => judged.tally.settled.push(position),
            Verdict::Superseded => {
                judged.tally.superseded += 1;
                judged.tally.settled.push(position);
            }
            Verdict::Retry { .. } | Verdict::TooLarge | Verdict::Wait if overtaken.contains(&position) => {
                judged.tally.superseded += 1;
                judged.tally.settled.push(position);
            }
            Verdict::Retry { .. } | Verdict::Wait => {
                judged.again.push(position);
                judged.tally.retried += 1;
                let slow = verdict == Verdict::Wait;
                if judged.trouble.as_ref().is_none_or(|trouble| slow && !trouble.slow) {
                    judged.trouble =
                        Some(item_trouble(part, position, answer.status, answer.error.as_ref(), slow, asked));
                }
            }
            Verdict::TooLarge if part.len() > 1 => {
                judged.again.push(position);
                judged.tally.retried += 1;
                judged.split = true;
            }
            Verdict::TooLarge => {
                let error = answer.error.as_ref().map(no_memory);
                refuse(&mut judged, options, part, position, answer.status, error.as_ref());
            }
            Verdict::Reject => refuse(&mut judged, options, part, position, answer.status, answer.error.as_ref()),
        }
    }
    judged
}

/// Items to be sent again that a later item for the same document has made void. Sent after it, an item of the same
/// version (one transaction) would put its older content over the newer one.
fn overtaken(part: &Parcel, verdicts: &[Verdict]) -> HashSet<usize> {
    let mut void = HashSet::new();
    let goes_again = |verdict: &Verdict| matches!(verdict, Verdict::Retry { .. } | Verdict::TooLarge | Verdict::Wait);
    if !verdicts.iter().any(goes_again) {
        return void;
    }
    // From the end: whether a later item for the key has gone through.
    let mut done = HashSet::new();
    for (position, verdict) in verdicts.iter().enumerate().rev() {
        let key = key_of(part, position);
        match verdict {
            Verdict::Ok | Verdict::Superseded if part.items[position].kind != Kind::Update => {
                done.insert(key);
            }
            again if goes_again(again) && done.contains(&key) => {
                void.insert(position);
            }
            _ => {}
        }
    }
    void
}

/// Index and id of an item.
fn key_of(part: &Parcel, position: usize) -> (String, String) {
    (part.index_of(position).to_owned(), id_of(part, position))
}

fn id_of(part: &Parcel, position: usize) -> String {
    #[derive(Deserialize)]
    struct Line<'a> {
        #[serde(borrow, alias = "delete", alias = "update")]
        index: Named<'a>,
    }
    #[derive(Deserialize)]
    struct Named<'a> {
        #[serde(rename = "_id", borrow)]
        id: Cow<'a, str>,
    }
    let (action, _) = part.lines(position);
    serde_json::from_slice::<Line<'_>>(action).map(|line| line.index.id.into_owned()).unwrap_or_default()
}

fn refuse(
    judged: &mut Judged,
    options: &SinkOptions,
    part: &Parcel,
    position: usize,
    status: u16,
    error: Option<&ErrorText<'_>>,
) {
    let (action, document) = part.lines(position);
    let (kind, reason) = error.map_or(("", ""), |error| (error.kind.as_ref(), error.reason.as_ref()));
    let table = options.table(part.items[position].table);
    dead_letter::write_line(&mut judged.letters, table, status, kind, reason, action, document);
    judged.refused.push(Refused { position, id: id_of(part, position), reason: response::describe(status, error) });
}

fn item_trouble(
    part: &Parcel,
    position: usize,
    status: u16,
    error: Option<&ErrorText<'_>>,
    slow: bool,
    asked: Option<Duration>,
) -> Again {
    let index = response::printable(part.index_of(position));
    let kind = error.map_or("", |error| error.kind.as_ref());
    let hint = match kind {
        "index_not_found_exception" => {
            format!("Create the index {index}, or allow it to be created (action.auto_create_index).")
        }
        "index_closed_exception" => format!("Open the index {index} (POST /{index}/_open)."),
        "cluster_block_exception" => format!(
            "Writing to {index} is blocked: look at its settings index.blocks.*, and at the disk space of the cluster's nodes."
        ),
        "security_exception" => format!("Let the user of elasticsearch.username write to {index}."),
        _ if slow => format!("Look at the settings of {index}; it is tried again until it works."),
        _ if status == 429 => BUSY.to_owned(),
        _ => "It is tried again until it works. Look at the health of the cluster.".to_owned(),
    };
    Again { reason: response::describe(status, error), hint, asked, slow, throttled: false }
}
