//! Bulk bodies: action lines and documents, and where each item begins.

use std::borrow::Cow;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::json::write_string;
use crate::change::{Action, ActionBody};

/// The longest id, in bytes, that Elasticsearch takes.
const LONGEST_ID: usize = 512;

/// What an item does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Index,
    Delete,
    Update,
}

impl Kind {
    /// The key of its action line and of its answer.
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Index => "index",
            Kind::Delete => "delete",
            Kind::Update => "update",
        }
    }
}

/// Where the documents of a table go: prepared once, used for every item.
#[derive(Clone, Debug)]
pub struct Target {
    index: Arc<str>,
    table: u32,
    hash: u64,
    index_line: Box<[u8]>,
    delete_line: Box<[u8]>,
}

impl Target {
    /// The index or alias `index` for the documents of `table`, a number of the caller's own that comes back in the
    /// statistics and the dead letters.
    #[must_use]
    pub fn new(index: &str, table: u32) -> Self {
        let line = |kind: Kind| {
            let mut line = Vec::new();
            write_head(&mut line, kind, index);
            line.into_boxed_slice()
        };
        Self {
            index: index.into(),
            table,
            hash: hash_index(index),
            index_line: line(Kind::Index),
            delete_line: line(Kind::Delete),
        }
    }

    /// The index or alias.
    #[must_use]
    pub fn index(&self) -> &str {
        &self.index
    }

    /// The caller's number for the table.
    #[must_use]
    pub fn table(&self) -> u32 {
        self.table
    }

    /// A number that is the same for the same index and id, whichever table they came from: two tables may share an index.
    pub(super) fn hash(&self, id: &[u8]) -> u64 {
        hash_id(self.hash, id)
    }
}

pub(super) fn hash_index(index: &str) -> u64 {
    hash_id(0, index.as_bytes())
}

pub(super) fn hash_id(seed: u64, id: &[u8]) -> u64 {
    let mut hasher = foldhash::quality::FixedState::with_seed(seed).build_hasher();
    hasher.write(id);
    hasher.finish()
}

/// The id under which Elasticsearch knows the document `id`: itself, or the SHA-256 in hexadecimal of one that is
/// longer than 512 bytes or no UTF-8 (replaced characters would make two ids one).
#[must_use]
pub fn document_id(id: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(id) {
        Ok(text) if id.len() <= LONGEST_ID => Cow::Borrowed(text),
        _ => {
            let mut hex = String::with_capacity(64);
            for byte in Sha256::digest(id) {
                hex.push(char::from(b"0123456789abcdef"[usize::from(byte >> 4)]));
                hex.push(char::from(b"0123456789abcdef"[usize::from(byte & 0xF)]));
            }
            Cow::Owned(hex)
        }
    }
}

/// `{"index":{"_index":"users","_id":`
fn write_head(out: &mut Vec<u8>, kind: Kind, index: &str) {
    out.extend_from_slice(b"{\"");
    out.extend_from_slice(kind.name().as_bytes());
    out.extend_from_slice(b"\":{\"_index\":");
    write_string(out, index.as_bytes());
    out.extend_from_slice(b",\"_id\":");
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    /// Where its action line begins.
    pub(super) start: usize,
    /// The caller's number for its table.
    pub(super) table: u32,
    /// Its index, as a position in `indices`.
    pub(super) slot: u32,
    pub(super) kind: Kind,
}

/// A bulk body under construction, with the start of every item, so that items can be sent again apart.
///
/// ```
/// use pgtide::sink::{Body, Target};
///
/// let users = Target::new("users", 0);
/// let mut body = Body::with_capacity(4096);
/// body.index(&users, b"5", 123, |out| out.extend_from_slice(br#"{"id":5}"#));
/// assert_eq!(body.as_bytes(), br#"{"index":{"_index":"users","_id":"5","version":123,"version_type":"external_gte"}}
/// {"id":5}
/// "#);
/// ```
#[derive(Clone, Debug)]
pub struct Body {
    bytes: Vec<u8>,
    items: Vec<Item>,
    indices: Vec<Arc<str>>,
}

impl Default for Body {
    fn default() -> Self {
        Self::with_capacity(0)
    }
}

impl Body {
    /// An empty body with room for `bytes` bytes.
    #[must_use]
    pub fn with_capacity(bytes: usize) -> Self {
        Self::in_buffer(Vec::with_capacity(bytes))
    }

    /// An empty body in a used buffer.
    pub(super) fn in_buffer(mut buffer: Vec<u8>) -> Self {
        buffer.clear();
        Self { bytes: buffer, items: Vec::new(), indices: Vec::new() }
    }

    /// Items.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Bytes, before compression.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// No items.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The body as it will be sent.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Adds a document: never over a newer version, over an equal one always.
    ///
    /// `id` is the raw text of its id (see [`document_id`]); Elasticsearch refuses an empty one, which makes it a dead
    /// letter. `write` appends exactly one JSON object; a line break between its tokens becomes a space.
    pub fn index(&mut self, target: &Target, id: &[u8], version: u64, write: impl FnOnce(&mut Vec<u8>)) {
        self.begin(&target.index, target.table, Kind::Index);
        self.bytes.extend_from_slice(&target.index_line);
        write_id(&mut self.bytes, id);
        self.write_version(version);
        let document = self.bytes.len();
        write(&mut self.bytes);
        self.end_line(document);
    }

    /// Removes a document unless it is newer than `version`. One that does not exist is no error.
    pub fn delete(&mut self, target: &Target, id: &[u8], version: u64) {
        self.begin(&target.index, target.table, Kind::Delete);
        self.bytes.extend_from_slice(&target.delete_line);
        write_id(&mut self.bytes, id);
        self.write_version(version);
    }

    /// Adds what a handler asked for. Its index goes before the target's. A script update carries no version.
    ///
    /// # Errors
    /// The action's JSON does not serialise; the body is then as before.
    pub fn action(&mut self, target: &Target, action: &Action, version: u64) -> Result<(), serde_json::Error> {
        let (kind, document) = match &action.body {
            ActionBody::Index(document) => (Kind::Index, Some(document)),
            ActionBody::Delete => (Kind::Delete, None),
            ActionBody::ScriptUpdate(update) => (Kind::Update, Some(update)),
        };
        match action.index.as_deref() {
            Some(index) => self.begin(&Arc::from(index), target.table, kind),
            None => self.begin(&target.index, target.table, kind),
        }
        write_head(&mut self.bytes, kind, action.index.as_deref().unwrap_or(&target.index));
        write_id(&mut self.bytes, action.id.as_bytes());
        if let Some(routing) = &action.routing {
            self.bytes.extend_from_slice(b",\"routing\":");
            write_string(&mut self.bytes, routing.as_bytes());
        }
        if kind == Kind::Update {
            self.bytes.extend_from_slice(b",\"retry_on_conflict\":3}}\n");
        } else {
            self.write_version(version);
        }
        if let Some(document) = document {
            let start = self.bytes.len();
            if let Err(error) = serde_json::to_writer(&mut self.bytes, document) {
                self.truncate_last();
                return Err(error);
            }
            self.end_line(start);
        }
        Ok(())
    }

    /// Drops the item written last.
    pub fn truncate_last(&mut self) {
        if let Some(item) = self.items.pop() {
            self.bytes.truncate(item.start);
        }
    }

    /// A delete in a concrete index with the routing that the document has.
    pub(crate) fn delete_routed(&mut self, index: &str, id: &str, routing: Option<&str>, version: u64) {
        self.begin(&Arc::from(index), u32::MAX, Kind::Delete);
        write_head(&mut self.bytes, Kind::Delete, index);
        write_string(&mut self.bytes, id.as_bytes());
        if let Some(routing) = routing {
            self.bytes.extend_from_slice(b",\"routing\":");
            write_string(&mut self.bytes, routing.as_bytes());
        }
        self.write_version(version);
    }

    fn begin(&mut self, index: &Arc<str>, table: u32, kind: Kind) {
        let slot = self.slot(index);
        self.items.push(Item { start: self.bytes.len(), table, slot, kind });
    }

    fn slot(&mut self, index: &Arc<str>) -> u32 {
        if let Some(last) = self.items.last()
            && Arc::ptr_eq(&self.indices[last.slot as usize], index)
        {
            return last.slot;
        }
        let at = self.indices.iter().position(|known| known == index).unwrap_or_else(|| {
            self.indices.push(Arc::clone(index));
            self.indices.len() - 1
        });
        u32::try_from(at).unwrap_or(u32::MAX)
    }

    /// Ends an action: `,"version":5,"version_type":"external_gte"}}` and a line break.
    fn write_version(&mut self, version: u64) {
        self.bytes.extend_from_slice(b",\"version\":");
        self.bytes.extend_from_slice(itoa::Buffer::new().format(version).as_bytes());
        self.bytes.extend_from_slice(b",\"version_type\":\"external_gte\"}}\n");
    }

    fn end_line(&mut self, document: usize) {
        // A raw line break can only be white space between tokens (in a string JSON forbids it), such as a `json`
        // column may hold. As a line of its own it would be read as the next action.
        for at in memchr::memchr_iter(b'\n', &self.bytes[document..]).collect::<Vec<_>>() {
            self.bytes[document + at] = b' ';
        }
        self.bytes.push(b'\n');
    }

    /// The body ready to be sent.
    pub(super) fn into_parcel(self) -> Parcel {
        Parcel { bytes: Bytes::from(self.bytes), items: self.items, indices: self.indices.into() }
    }
}

fn write_id(out: &mut Vec<u8>, id: &[u8]) {
    write_string(out, document_id(id).as_bytes());
}

/// A body on its way: its bytes never change, and every part of it can be sent apart.
#[derive(Clone, Debug)]
pub(super) struct Parcel {
    pub(super) bytes: Bytes,
    pub(super) items: Vec<Item>,
    pub(super) indices: Arc<[Arc<str>]>,
}

impl Parcel {
    pub(super) fn len(&self) -> usize {
        self.items.len()
    }

    pub(super) fn index_of(&self, item: usize) -> &str {
        &self.indices[self.items[item].slot as usize]
    }

    /// The lines of one item: its action and, unless it deletes, its document, without the line breaks.
    pub(super) fn lines(&self, item: usize) -> (&[u8], Option<&[u8]>) {
        let end = self.items.get(item + 1).map_or(self.bytes.len(), |next| next.start);
        let text = &self.bytes[self.items[item].start..end];
        let mut lines = text.splitn(3, |&byte| byte == b'\n');
        let action = lines.next().unwrap_or_default();
        (action, lines.next().filter(|line| !line.is_empty()))
    }

    /// The items at these positions, ascending, in a parcel of their own.
    pub(super) fn subset(&self, positions: &[usize]) -> Parcel {
        if positions.len() == self.items.len() {
            return self.clone();
        }
        let mut bytes = Vec::new();
        let mut items = Vec::with_capacity(positions.len());
        for &position in positions {
            let item = self.items[position];
            let end = self.items.get(position + 1).map_or(self.bytes.len(), |next| next.start);
            items.push(Item { start: bytes.len(), ..item });
            bytes.extend_from_slice(&self.bytes[item.start..end]);
        }
        Parcel { bytes: bytes.into(), items, indices: Arc::clone(&self.indices) }
    }

    /// The first and the second half, without a copy. Both hold something when there are two items or more.
    pub(super) fn halves(&self) -> (Parcel, Parcel) {
        let middle = self.items.len() / 2;
        let cut = self.items.get(middle).map_or(self.bytes.len(), |item| item.start);
        let part = |bytes: Bytes, items: &[Item], offset: usize| Parcel {
            bytes,
            items: items.iter().map(|item| Item { start: item.start - offset, ..*item }).collect(),
            indices: Arc::clone(&self.indices),
        };
        (
            part(self.bytes.slice(..cut), &self.items[..middle], 0),
            part(self.bytes.slice(cut..), &self.items[middle..], cut),
        )
    }
}
