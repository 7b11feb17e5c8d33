//! The decoder of `pgoutput`, protocol version 1. Borrows from the message; rows cost no allocation.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::change::Field;
use crate::lsn::Lsn;

/// Microseconds from 1970-01-01 to 2000-01-01, PostgreSQL's own epoch.
pub(super) const POSTGRES_EPOCH: i64 = 946_684_800_000_000;

/// The moment of `micros` microseconds since 1970-01-01 UTC.
#[must_use]
pub fn system_time(micros: i64) -> SystemTime {
    let distance = Duration::from_micros(micros.unsigned_abs());
    let moment = if micros < 0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) };
    moment.unwrap_or(UNIX_EPOCH)
}

/// One message. Times are microseconds since 1970-01-01 UTC.
#[derive(Clone, Debug, PartialEq)]
pub enum Message<'a> {
    /// A transaction begins; its changes and its [`Message::Commit`] follow, nothing of another between them.
    Begin {
        /// Where the commit record starts: equal to [`Message::Commit`]'s `commit_lsn`, rising from transaction to transaction.
        final_lsn: Lsn,
        /// When it was committed.
        commit_time: i64,
        /// The transaction.
        xid: u32,
    },
    /// The transaction ends.
    Commit {
        /// Where the commit record starts.
        commit_lsn: Lsn,
        /// Where the commit record ends: to be confirmed once all its changes are answered for.
        end_lsn: Lsn,
        /// When it was committed.
        commit_time: i64,
    },
    /// The shape of a table; comes before its first change and again when the shape may have changed.
    Relation(Relation<'a>),
    /// A row was inserted.
    Insert {
        /// The table.
        oid: u32,
        /// The row.
        new: Tuple<'a>,
    },
    /// A row was updated.
    Update {
        /// The table.
        oid: u32,
        /// What is told of the row before. None: the key is as it was.
        old: Option<(Old, Tuple<'a>)>,
        /// The row now.
        new: Tuple<'a>,
    },
    /// A row was deleted.
    Delete {
        /// The table.
        oid: u32,
        /// How much `old` tells.
        kind: Old,
        /// What is told of the row before.
        old: Tuple<'a>,
    },
    /// Tables were emptied.
    Truncate {
        /// The tables.
        oids: Oids<'a>,
        /// `CASCADE`; the tables that it reached are in `oids`.
        cascade: bool,
        /// `RESTART IDENTITY`.
        restart_identity: bool,
    },
    /// A type of a column that follows in a [`Message::Relation`].
    Type {
        /// Its `pg_type.oid`.
        oid: u32,
        /// Its schema.
        schema: &'a str,
        /// Its name.
        name: &'a str,
    },
    /// The transaction came to the server by replication.
    Origin {
        /// Its commit on the server that it comes from.
        commit_lsn: Lsn,
        /// The origin's name.
        name: &'a str,
    },
    /// Somebody called `pg_logical_emit_message`.
    Logical {
        /// It belongs to the transaction around it.
        transactional: bool,
        /// Where it stands.
        lsn: Lsn,
        /// What it is for.
        prefix: &'a str,
        /// What it says.
        content: &'a [u8],
    },
}

/// How much is told of a row as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Old {
    /// The columns of the replica identity; the others are NULL in the tuple and mean nothing.
    Key,
    /// All columns: `REPLICA IDENTITY FULL`.
    Full,
}

/// The shape of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation<'a> {
    /// `pg_class.oid`; with `publish_via_partition_root` the root's.
    pub oid: u32,
    /// Its schema.
    pub schema: &'a str,
    /// Its name.
    pub name: &'a str,
    /// `pg_class.relreplident`: `d`, `n`, `f` or `i`.
    pub replica_identity: u8,
    /// Its published columns in the order of the tuples.
    pub columns: Vec<RelationColumn<'a>>,
}

/// A column of a [`Relation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelationColumn<'a> {
    /// Part of the replica identity.
    pub key: bool,
    /// Its name.
    pub name: &'a str,
    /// `pg_type.oid`, not resolved: it may be a domain.
    pub type_oid: u32,
    /// `pg_attribute.atttypmod`.
    pub type_modifier: i32,
}

/// A row's fields.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tuple<'a> {
    count: u16,
    unchanged: bool,
    /// Validated: `count` fields and nothing else.
    bytes: &'a [u8],
}

/// Without the values: a tuple may end up in a log.
impl std::fmt::Debug for Tuple<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tuple({} fields, {} bytes)", self.count, self.bytes.len())
    }
}

impl<'a> Tuple<'a> {
    /// How many fields there are.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(self.count)
    }

    /// There are no fields, as in a table without columns.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// At least one field is [`Field::Unchanged`].
    #[must_use]
    pub fn has_unchanged(&self) -> bool {
        self.unchanged
    }

    /// The fields in order.
    #[must_use]
    pub fn iter(&self) -> Fields<'a> {
        Fields { left: self.count, bytes: self.bytes }
    }
}

impl<'a> IntoIterator for Tuple<'a> {
    type Item = Field<'a>;
    type IntoIter = Fields<'a>;

    fn into_iter(self) -> Fields<'a> {
        self.iter()
    }
}

/// The fields of a [`Tuple`].
#[derive(Clone, Debug)]
pub struct Fields<'a> {
    left: u16,
    bytes: &'a [u8],
}

impl<'a> Iterator for Fields<'a> {
    type Item = Field<'a>;

    #[inline]
    fn next(&mut self) -> Option<Field<'a>> {
        let (&kind, rest) = self.bytes.split_first()?;
        self.left -= 1;
        self.bytes = rest;
        match kind {
            b'n' => Some(Field::Null),
            b'u' => Some(Field::Unchanged),
            _ => {
                let (length, rest) = self.bytes.split_first_chunk::<4>()?;
                let (text, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
                self.bytes = rest;
                Some(Field::Text(text))
            }
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (usize::from(self.left), Some(usize::from(self.left)))
    }
}

impl ExactSizeIterator for Fields<'_> {}

/// The tables of a TRUNCATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oids<'a>(&'a [[u8; 4]]);

impl<'a> Oids<'a> {
    /// Their `pg_class.oid`s.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.0.iter().map(|oid| u32::from_be_bytes(*oid))
    }
}

/// The bytes are no message of protocol version 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// There is no message in it.
    #[error("an empty replication message came")]
    Empty,
    /// A type of message that version 1 does not have.
    #[error("a replication message of the unknown type {} came", char::from(*.0).escape_default())]
    Unknown(u8),
    /// It ends too early, goes on too long, or something in it has an unknown mark.
    #[error("a replication message of the type {} is malformed: {what}", char::from(*.message).escape_default())]
    Malformed {
        /// The type of the message.
        message: u8,
        /// What is wrong.
        what: &'static str,
    },
}

/// Decodes one message. Checks all of it, so that what it returns needs no further check.
///
/// # Errors
/// The bytes are no message of protocol version 1, or a field is in binary form, which nobody asked for.
#[inline]
pub fn decode(bytes: &[u8]) -> Result<Message<'_>, DecodeError> {
    let (&message, body) = bytes.split_first().ok_or(DecodeError::Empty)?;
    let mut cursor = Cursor { bytes: body };
    let decoded = match message {
        b'I' => insert(&mut cursor),
        b'U' => update(&mut cursor),
        b'D' => delete(&mut cursor),
        b'B' => begin(&mut cursor),
        b'C' => commit(&mut cursor),
        b'R' => relation(&mut cursor),
        b'T' => truncate(&mut cursor),
        b'Y' => type_(&mut cursor),
        b'O' => origin(&mut cursor),
        b'M' => logical(&mut cursor),
        unknown => return Err(DecodeError::Unknown(unknown)),
    };
    match decoded {
        Ok(decoded) if cursor.bytes.is_empty() => Ok(decoded),
        Ok(_) => Err(DecodeError::Malformed { message, what: "it goes on after its end" }),
        Err(what) => Err(DecodeError::Malformed { message, what }),
    }
}

/// What is wrong, in words.
type Parsed<T> = Result<T, &'static str>;

const SHORT: &str = "it ends too early";

struct Cursor<'a> {
    bytes: &'a [u8],
}

impl<'a> Cursor<'a> {
    #[inline]
    fn take<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let (taken, rest) = self.bytes.split_first_chunk::<N>().ok_or(SHORT)?;
        self.bytes = rest;
        Ok(*taken)
    }

    #[inline]
    fn u8(&mut self) -> Parsed<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    #[inline]
    fn u32(&mut self) -> Parsed<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn lsn(&mut self) -> Parsed<Lsn> {
        self.take().map(|bytes| Lsn(u64::from_be_bytes(bytes)))
    }

    fn time(&mut self) -> Parsed<i64> {
        self.take().map(|bytes| i64::from_be_bytes(bytes).saturating_add(POSTGRES_EPOCH))
    }

    #[inline]
    fn slice(&mut self, length: usize) -> Parsed<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(length).ok_or(SHORT)?;
        self.bytes = rest;
        Ok(taken)
    }

    fn string(&mut self) -> Parsed<&'a str> {
        let end = memchr::memchr(0, self.bytes).ok_or("a name has no end")?;
        let text = std::str::from_utf8(&self.bytes[..end]).map_err(|_| "a name is no UTF-8")?;
        self.bytes = &self.bytes[end + 1..];
        Ok(text)
    }

    /// An empty namespace stands for `pg_catalog`.
    fn schema(&mut self) -> Parsed<&'a str> {
        self.string().map(|schema| if schema.is_empty() { "pg_catalog" } else { schema })
    }

    #[inline]
    fn tuple(&mut self) -> Parsed<Tuple<'a>> {
        let count = u16::from_be_bytes(self.take()?);
        let start = self.bytes;
        let mut unchanged = false;
        for _ in 0..count {
            match self.u8()? {
                b't' => {
                    let length = self.u32()? as usize;
                    self.slice(length)?;
                }
                b'n' => {}
                b'u' => unchanged = true,
                b'b' => return Err("a field is in binary form"),
                _ => return Err("a field has an unknown mark"),
            }
        }
        Ok(Tuple { count, unchanged, bytes: &start[..start.len() - self.bytes.len()] })
    }
}

#[inline]
fn insert<'a>(cursor: &mut Cursor<'a>) -> Parsed<Message<'a>> {
    let oid = cursor.u32()?;
    match cursor.u8()? {
        b'N' => Ok(Message::Insert { oid, new: cursor.tuple()? }),
        _ => Err("it has no new row"),
    }
}

fn update<'a>(cursor: &mut Cursor<'a>) -> Parsed<Message<'a>> {
    let oid = cursor.u32()?;
    let mut mark = cursor.u8()?;
    let mut old = None;
    if let Some(kind) = old_kind(mark) {
        old = Some((kind, cursor.tuple()?));
        mark = cursor.u8()?;
    }
    match mark {
        b'N' => Ok(Message::Update { oid, old, new: cursor.tuple()? }),
        _ => Err("it has no new row"),
    }
}

fn delete<'a>(cursor: &mut Cursor<'a>) -> Parsed<Message<'a>> {
    let oid = cursor.u32()?;
    let kind = old_kind(cursor.u8()?).ok_or("it has no old row")?;
    Ok(Message::Delete { oid, kind, old: cursor.tuple()? })
}

fn old_kind(mark: u8) -> Option<Old> {
    match mark {
        b'K' => Some(Old::Key),
        b'O' => Some(Old::Full),
        _ => None,
    }
}

fn begin<'a>(cursor: &mut Cursor<'a>) -> Parsed<Message<'a>> {
    Ok(Message::Begin { final_lsn: cursor.lsn()?, commit_time: cursor.time()?, xid: cursor.u32()? })
}

fn commit<'a>(cursor: &mut Cursor<'a>) -> Parsed<Message<'a>> {
    let _flags = cursor.u8()?;
    Ok(Message::Commit { commit_lsn: cursor.lsn()?, end_lsn: cursor.lsn()?, commit_time: cursor.time()? })
}

fn relation<'a>(cursor: &mut Cursor<'a>) -> Parsed<Message<'a>> {
    let (oid, schema, name) = (cursor.u32()?, cursor.schema()?, cursor.string()?);
    let replica_identity = cursor.u8()?;
    let count = u16::from_be_bytes(cursor.take()?);
    // The count is not to be trusted with memory before the columns are seen.
    let mut columns = Vec::with_capacity(usize::from(count).min(cursor.bytes.len() / 10));
    for _ in 0..count {
        columns.push(RelationColumn {
            key: cursor.u8()? & 1 != 0,
            name: cursor.string()?,
            type_oid: cursor.u32()?,
            type_modifier: i32::from_be_bytes(cursor.take()?),
        });
    }
    Ok(Message::Relation(Relation { oid, schema, name, replica_identity, columns }))
}

fn truncate<'a>(cursor: &mut Cursor<'a>) -> Parsed<Message<'a>> {
    let count = cursor.u32()? as usize;
    let options = cursor.u8()?;
    let (oids, _) = cursor.slice(count.checked_mul(4).ok_or(SHORT)?)?.as_chunks();
    Ok(Message::Truncate { oids: Oids(oids), cascade: options & 1 != 0, restart_identity: options & 2 != 0 })
}

fn type_<'a>(cursor: &mut Cursor<'a>) -> Parsed<Message<'a>> {
    Ok(Message::Type { oid: cursor.u32()?, schema: cursor.schema()?, name: cursor.string()? })
}

fn origin<'a>(cursor: &mut Cursor<'a>) -> Parsed<Message<'a>> {
    Ok(Message::Origin { commit_lsn: cursor.lsn()?, name: cursor.string()? })
}

fn logical<'a>(cursor: &mut Cursor<'a>) -> Parsed<Message<'a>> {
    let transactional = cursor.u8()? & 1 != 0;
    let (lsn, prefix) = (cursor.lsn()?, cursor.string()?);
    let length = cursor.u32()? as usize;
    Ok(Message::Logical { transactional, lsn, prefix, content: cursor.slice(length)? })
}

#[cfg(test)]
#[path = "pgoutput_tests.rs"]
mod tests;
