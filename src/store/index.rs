//! An index: its documents, their versions, and the tombstones of those deleted.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use foldhash::fast::RandomState;
use serde_json::Value;

use super::fields::Mapping;

/// A document as it is held: two allocations and about 90 bytes on top of id and source.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) version: i64,
    /// Its sequence number; also its place in the order `_doc`.
    pub(super) seq: u64,
    id_len: u16,
    routing_len: u16,
    /// Id, routing and source, one after the other.
    text: Box<str>,
}

impl Document {
    /// `id` has at most 512 bytes. A routing of more than 65,535 bytes is dropped.
    pub(super) fn new(id: &str, routing: &str, source: &str) -> Self {
        let routing_len = u16::try_from(routing.len()).unwrap_or(0);
        let routing = if routing_len == 0 { "" } else { routing };
        let mut text = String::with_capacity(id.len() + routing.len() + source.len());
        text.push_str(id);
        text.push_str(routing);
        text.push_str(source);
        let id_len = u16::try_from(id.len()).unwrap_or(0);
        Self { version: 0, seq: 0, id_len, routing_len, text: text.into_boxed_str() }
    }

    pub(super) fn id(&self) -> &str {
        &self.text[..usize::from(self.id_len)]
    }

    pub(super) fn routing(&self) -> Option<&str> {
        let start = usize::from(self.id_len);
        (self.routing_len > 0).then(|| &self.text[start..start + usize::from(self.routing_len)])
    }

    pub(super) fn source(&self) -> &str {
        &self.text[usize::from(self.id_len) + usize::from(self.routing_len)..]
    }
}

/// A document as a member of a set keyed by id.
struct Held(Arc<Document>);

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.0.id() == other.0.id()
    }
}

impl Eq for Held {}

impl Hash for Held {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.id().hash(state);
    }
}

impl Borrow<str> for Held {
    fn borrow(&self) -> &str {
        self.0.id()
    }
}

#[derive(Clone, Copy)]
struct Tombstone {
    version: i64,
    seq: u64,
    at: Instant,
}

/// What a write demands of the version that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Versioning {
    /// Nothing: the version counts up.
    Internal,
    /// `op_type: create`: there must be no document.
    Create,
    /// `if_seq_no` and `if_primary_term`.
    IfSeqNo(u64, u64),
    /// `external`: must be lower.
    External(i64),
    /// `external_gte`: must not be higher.
    ExternalGte(i64),
}

/// What a write did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Created {
        version: i64,
        seq: u64,
    },
    Updated {
        version: i64,
        seq: u64,
    },
    Deleted {
        version: i64,
        seq: u64,
    },
    /// A delete of what is not there; it leaves a tombstone all the same.
    NotFound {
        version: i64,
        seq: u64,
    },
    /// `version_conflict_engine_exception` with this reason.
    Conflict(String),
}

/// The documents and tombstones of an index.
pub(super) struct Documents {
    held: HashSet<Held, RandomState>,
    tombstones: HashMap<Box<str>, Tombstone, RandomState>,
    /// Tombstones at which the old ones are looked for: makes pruning cost a constant per delete.
    prune_at: usize,
    next_seq: u64,
    bytes: u64,
    deleted: u64,
}

const PRUNE_AT_LEAST: usize = 4096;

impl Documents {
    fn new() -> Self {
        Self {
            held: HashSet::default(),
            tombstones: HashMap::default(),
            prune_at: PRUNE_AT_LEAST,
            next_seq: 0,
            bytes: 0,
            deleted: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// Ids and sources together, bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Deletes that found something, since the index was made.
    pub(super) fn deleted(&self) -> u64 {
        self.deleted
    }

    pub(super) fn get(&self, id: &str) -> Option<&Arc<Document>> {
        self.held.get(id).map(|held| &held.0)
    }

    /// All documents as they are now, in no order.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Document>> {
        self.held.iter().map(|held| &held.0)
    }

    pub(super) fn forget_tombstones(&mut self) {
        self.tombstones.clear();
    }

    /// Writes `document`. `gc_deletes` none: tombstones are kept for good.
    pub(super) fn index(
        &mut self,
        mut document: Document,
        versioning: Versioning,
        now: Instant,
        gc_deletes: Option<Duration>,
    ) -> Outcome {
        let current = self.held.get(document.id()).map(|held| (held.0.version, held.0.seq));
        let tombstone = match current {
            Some(_) => None,
            None => self.tombstone(document.id(), now, gc_deletes),
        };
        let version = match next_version(document.id(), versioning, current, tombstone) {
            Ok(version) => version,
            Err(reason) => return Outcome::Conflict(reason),
        };
        let seq = self.take_seq();
        document.version = version;
        document.seq = seq;
        self.bytes += document.text.len() as u64;
        if current.is_none() && !self.tombstones.is_empty() {
            self.tombstones.remove(document.id());
        }
        match self.held.replace(Held(Arc::new(document))) {
            Some(old) => {
                self.bytes -= old.0.text.len() as u64;
                Outcome::Updated { version, seq }
            }
            None => Outcome::Created { version, seq },
        }
    }

    /// Removes the document `id` and leaves a tombstone, whether there was one or not.
    pub(super) fn delete(
        &mut self,
        id: &str,
        versioning: Versioning,
        now: Instant,
        gc_deletes: Option<Duration>,
    ) -> Outcome {
        let current = self.held.get(id).map(|held| (held.0.version, held.0.seq));
        let tombstone = match current {
            Some(_) => None,
            None => self.tombstone(id, now, gc_deletes),
        };
        let version = match next_version(id, versioning, current, tombstone) {
            Ok(version) => version,
            Err(reason) => return Outcome::Conflict(reason),
        };
        let seq = self.take_seq();
        self.tombstones.insert(id.into(), Tombstone { version, seq, at: now });
        if self.tombstones.len() >= self.prune_at
            && let Some(gc_deletes) = gc_deletes
        {
            self.tombstones.retain(|_, tombstone| now.saturating_duration_since(tombstone.at) <= gc_deletes);
            self.prune_at = (self.tombstones.len() * 2).max(PRUNE_AT_LEAST);
        }
        match self.held.take(id) {
            Some(old) => {
                self.bytes -= old.0.text.len() as u64;
                self.deleted += 1;
                Outcome::Deleted { version, seq }
            }
            None => Outcome::NotFound { version, seq },
        }
    }

    fn tombstone(&self, id: &str, now: Instant, gc_deletes: Option<Duration>) -> Option<(i64, u64)> {
        if self.tombstones.is_empty() {
            return None;
        }
        let tombstone = self.tombstones.get(id)?;
        let forgotten = gc_deletes.is_some_and(|limit| now.saturating_duration_since(tombstone.at) > limit);
        (!forgotten).then_some((tombstone.version, tombstone.seq))
    }

    fn take_seq(&mut self) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        seq
    }
}

/// The version to write, or why not. `current` and `tombstone` are versions with their sequence numbers.
fn next_version(
    id: &str,
    versioning: Versioning,
    current: Option<(i64, u64)>,
    tombstone: Option<(i64, u64)>,
) -> Result<i64, String> {
    let known = current.or(tombstone).map(|(version, _)| version);
    let counted = known.map_or(1, |version| version.saturating_add(1));
    match versioning {
        Versioning::Internal => Ok(counted),
        Versioning::Create => match current {
            Some((version, _)) => {
                Err(format!("[{id}]: version conflict, document already exists (current version [{version}])"))
            }
            None => Ok(counted),
        },
        Versioning::IfSeqNo(seq, term) => match current {
            Some((_, found)) if found == seq && term == 1 => Ok(counted),
            Some((_, found)) => Err(format!(
                "[{id}]: version conflict, required seqNo [{seq}], primary term [{term}]. current document has seqNo [{found}] and primary term [1]"
            )),
            None => Err(format!(
                "[{id}]: version conflict, required seqNo [{seq}], primary term [{term}]. but no document was found"
            )),
        },
        Versioning::External(new) => match known {
            Some(old) if old >= new => Err(format!(
                "[{id}]: version conflict, current version [{old}] is higher or equal to the one provided [{new}]"
            )),
            _ => Ok(new),
        },
        Versioning::ExternalGte(new) => match known {
            Some(old) if old > new => Err(format!(
                "[{id}]: version conflict, current version [{old}] is higher than the one provided [{new}]"
            )),
            _ => Ok(new),
        },
    }
}

/// What is set for an index.
#[derive(Clone)]
pub(super) struct Meta {
    /// Flat, every name with its `index.` in front.
    pub(super) settings: BTreeMap<String, String>,
    /// As it was given, merged.
    pub(super) mapping_json: Value,
    pub(super) mapping: Arc<Mapping>,
    pub(super) closed: bool,
}

/// What [`Meta`] says about writes, read once for many of them.
#[derive(Clone)]
pub(super) struct WriteRules {
    pub(super) mapping: Arc<Mapping>,
    pub(super) closed: bool,
    /// `index.mapping.ignore_malformed`.
    pub(super) ignore_malformed: bool,
    pub(super) block_write: bool,
    pub(super) block_delete_only: bool,
    pub(super) gc_deletes: Option<Duration>,
}

impl Meta {
    pub(super) fn write_rules(&self) -> WriteRules {
        let is_set = |name: &str| self.settings.get(name).is_some_and(|value| value == "true");
        WriteRules {
            mapping: Arc::clone(&self.mapping),
            closed: self.closed,
            ignore_malformed: is_set("index.mapping.ignore_malformed"),
            block_write: is_set("index.blocks.write") || is_set("index.blocks.read_only"),
            block_delete_only: is_set("index.blocks.read_only_allow_delete"),
            gc_deletes: match self.settings.get("index.gc_deletes") {
                Some(text) if text == "-1" => None,
                Some(text) => time_value(text).or(Some(DEFAULT_GC_DELETES)),
                None => Some(DEFAULT_GC_DELETES),
            },
        }
    }
}

const DEFAULT_GC_DELETES: Duration = Duration::from_secs(60);

/// A time in Elasticsearch's notation: `500ms`, `1s`, `1m`, `24h`, `7d`.
pub(super) fn time_value(text: &str) -> Option<Duration> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let nanos_per_unit = match &text[digits..] {
        "nanos" => 1,
        "micros" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        "d" => 86_400_000_000_000,
        "" if number == 0 => 1,
        _ => return None,
    };
    Some(Duration::from_nanos(number.checked_mul(nanos_per_unit)?))
}

/// An index. Its documents have one lock, what is set for it another.
pub(super) struct Index {
    pub(super) name: String,
    pub(super) uuid: String,
    /// Milliseconds since 1970.
    pub(super) created: u128,
    meta: RwLock<Meta>,
    documents: Mutex<Documents>,
    /// Documents that null mode counted and did not keep.
    counted: AtomicU64,
}

impl Index {
    pub(super) fn new(name: &str, meta: Meta) -> Self {
        Self {
            name: name.to_owned(),
            uuid: random_id(22),
            created: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis(),
            meta: RwLock::new(meta),
            documents: Mutex::new(Documents::new()),
            counted: AtomicU64::new(0),
        }
    }

    /// Counts documents that are not kept.
    pub(super) fn count_only(&self, documents: u64) {
        self.counted.fetch_add(documents, Ordering::Relaxed);
    }

    /// Documents, those only counted included.
    pub(super) fn count(&self) -> u64 {
        self.documents().len() as u64 + self.counted.load(Ordering::Relaxed)
    }

    pub(super) fn documents(&self) -> MutexGuard<'_, Documents> {
        self.documents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn meta(&self) -> RwLockReadGuard<'_, Meta> {
        self.meta.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn meta_mut(&self) -> RwLockWriteGuard<'_, Meta> {
        self.meta.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `length` random characters, as ids and UUIDs of Elasticsearch have them.
pub(super) fn random_id(length: usize) -> String {
    (0..length).map(|_| fastrand::alphanumeric()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GC: Option<Duration> = Some(Duration::from_secs(1));

    fn document(id: &str) -> Document {
        Document::new(id, "", r#"{"a":1}"#)
    }

    #[test]
    fn keeps_id_routing_and_source_apart() {
        let document = Document::new("ü1", "r", "{}");
        assert_eq!((document.id(), document.routing(), document.source()), ("ü1", Some("r"), "{}"));
        assert_eq!(Document::new("1", "", "{}").routing(), None);
    }

    #[test]
    fn external_gte_lets_equal_versions_overwrite() {
        let mut documents = Documents::new();
        let now = Instant::now();
        let mut index = |version| documents.index(document("1"), Versioning::ExternalGte(version), now, GC);
        assert_eq!(index(10), Outcome::Created { version: 10, seq: 0 });
        assert_eq!(index(10), Outcome::Updated { version: 10, seq: 1 });
        assert!(
            matches!(index(9), Outcome::Conflict(reason) if reason.contains("current version [10] is higher than the one provided [9]"))
        );
        assert!(matches!(
            documents.index(document("1"), Versioning::External(10), now, GC),
            Outcome::Conflict(reason) if reason.contains("higher or equal")
        ));
    }

    #[test]
    fn tombstones_keep_older_versions_out_until_they_are_forgotten() {
        let mut documents = Documents::new();
        let now = Instant::now();
        let gte = Versioning::ExternalGte;
        documents.index(document("1"), gte(10), now, GC);
        assert_eq!(documents.delete("1", gte(11), now, GC), Outcome::Deleted { version: 11, seq: 1 });
        assert!(matches!(documents.index(document("1"), gte(10), now, GC), Outcome::Conflict(_)));
        assert_eq!(documents.delete("1", gte(11), now, GC), Outcome::NotFound { version: 11, seq: 2 });
        assert_eq!(documents.index(document("1"), gte(11), now, GC), Outcome::Created { version: 11, seq: 3 });

        assert!(matches!(documents.delete("never", gte(5), now, GC), Outcome::NotFound { version: 5, .. }));
        assert!(matches!(documents.index(document("never"), gte(4), now, GC), Outcome::Conflict(_)));
        let later = now + Duration::from_millis(2500);
        assert!(matches!(documents.index(document("never"), gte(4), later, None), Outcome::Conflict(_)));
        assert!(matches!(documents.index(document("never"), gte(4), later, GC), Outcome::Created { version: 4, .. }));
    }

    #[test]
    fn internal_versions_count_on_over_a_tombstone() {
        let mut documents = Documents::new();
        let now = Instant::now();
        documents.index(document("1"), Versioning::Internal, now, GC);
        assert!(matches!(documents.delete("1", Versioning::Internal, now, GC), Outcome::Deleted { version: 2, .. }));
        assert!(matches!(
            documents.index(document("1"), Versioning::Create, now, GC),
            Outcome::Created { version: 3, seq: 2 }
        ));
        assert!(matches!(documents.index(document("1"), Versioning::Create, now, GC), Outcome::Conflict(_)));
        assert!(matches!(documents.index(document("1"), Versioning::IfSeqNo(1, 1), now, GC), Outcome::Conflict(_)));
        assert!(matches!(
            documents.index(document("1"), Versioning::IfSeqNo(2, 1), now, GC),
            Outcome::Updated { version: 4, .. }
        ));
    }

    #[test]
    fn prunes_old_tombstones_and_keeps_young_ones() {
        let mut documents = Documents::new();
        let start = Instant::now();
        for id in 0..PRUNE_AT_LEAST - 1 {
            documents.delete(&id.to_string(), Versioning::ExternalGte(1), start, GC);
        }
        assert_eq!(documents.tombstones.len(), PRUNE_AT_LEAST - 1);
        documents.delete("last", Versioning::ExternalGte(1), start + Duration::from_secs(5), GC);
        assert_eq!(documents.tombstones.len(), 1);
    }

    #[test]
    fn counts_bytes_and_documents() {
        let mut documents = Documents::new();
        let now = Instant::now();
        documents.index(Document::new("1", "", "{}"), Versioning::Internal, now, GC);
        documents.index(Document::new("1", "", r#"{"a":1}"#), Versioning::Internal, now, GC);
        assert_eq!((documents.len(), documents.bytes()), (1, 8));
        documents.delete("1", Versioning::Internal, now, GC);
        assert_eq!((documents.len(), documents.bytes(), documents.deleted()), (0, 0, 1));
    }

    #[test]
    fn reads_times() {
        assert_eq!(time_value("7d"), Some(Duration::from_secs(604_800)));
        assert_eq!(time_value("500ms"), Some(Duration::from_millis(500)));
        assert_eq!((time_value("1"), time_value("s"), time_value("99999999999999d")), (None, None, None));
    }
}
