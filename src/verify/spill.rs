//! Keys and fingerprints on disk, by the hash of the key: what two sides have to be compared by, in memory a part at a time.

use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Parts. 300 million rows with short keys make parts of about 12 MB.
pub(super) const BUCKETS: usize = 512;
/// A part is written in pieces of so many bytes: 4 MiB of memory for all of them.
const PIECE: usize = 8 << 10;
const HEAD: usize = 13;

/// One side.
pub(super) struct Spill {
    file: File,
    end: u64,
    buckets: Vec<Bucket>,
    records: u64,
}

#[derive(Default)]
struct Bucket {
    unwritten: Vec<u8>,
    /// Where its pieces are, and how long.
    pieces: Vec<(u64, usize)>,
}

/// A key, what stands under it, and a mark of the caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record<'a> {
    pub(super) key: &'a [u8],
    pub(super) fingerprint: u64,
    pub(super) mark: bool,
}

impl Spill {
    /// An empty one, in a file without a name in `folder`: it is gone with the process, however that ends.
    pub(super) fn new(folder: &Path) -> io::Result<Self> {
        let buckets = (0..BUCKETS).map(|_| Bucket::default()).collect();
        Ok(Self { file: tempfile::tempfile_in(folder)?, end: 0, buckets, records: 0 })
    }

    /// How many records it has.
    pub(super) fn records(&self) -> u64 {
        self.records
    }

    /// Adds a record to the bucket that `id` belongs to. `id` is the same on both sides, the record's key need not be.
    pub(super) fn add(&mut self, id: &[u8], record: Record<'_>) -> io::Result<()> {
        let mut hasher = foldhash::quality::FixedState::default().build_hasher();
        hasher.write(id);
        let bucket = &mut self.buckets[usize::try_from(hasher.finish() % BUCKETS as u64).unwrap_or(0)];
        let length = u32::try_from(record.key.len()).map_err(io::Error::other)?;
        let unwritten = &mut bucket.unwritten;
        unwritten.extend_from_slice(&length.to_le_bytes());
        unwritten.push(u8::from(record.mark));
        unwritten.extend_from_slice(&record.fingerprint.to_le_bytes());
        unwritten.extend_from_slice(record.key);
        if unwritten.len() >= PIECE {
            self.file.write_all_at(unwritten, self.end)?;
            bucket.pieces.push((self.end, unwritten.len()));
            self.end += unwritten.len() as u64;
            unwritten.clear();
            unwritten.shrink_to(2 * PIECE);
        }
        self.records += 1;
        Ok(())
    }

    /// All of a bucket; it is empty afterwards.
    pub(super) fn take(&mut self, bucket: usize) -> io::Result<Vec<u8>> {
        let Bucket { unwritten, pieces } = std::mem::take(&mut self.buckets[bucket]);
        let mut bytes = vec![0; pieces.iter().map(|(_, length)| length).sum()];
        let mut rest = bytes.as_mut_slice();
        for (at, length) in pieces {
            let (piece, behind) = rest.split_at_mut(length);
            self.file.read_exact_at(piece, at)?;
            rest = behind;
        }
        bytes.extend_from_slice(&unwritten);
        Ok(bytes)
    }
}

/// The records of a bucket.
pub(super) fn records(mut bytes: &[u8]) -> impl Iterator<Item = Record<'_>> {
    std::iter::from_fn(move || {
        let (head, rest) = bytes.split_first_chunk::<HEAD>()?;
        let [l0, l1, l2, l3, mark, fingerprint @ ..] = *head;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let (key, rest) = rest.split_at_checked(length)?;
        bytes = rest;
        Some(Record { key, fingerprint: u64::from_le_bytes(fingerprint), mark: mark != 0 })
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn what_goes_in_comes_out_of_the_bucket_of_its_id() {
        let mut one = Spill::new(&std::env::temp_dir()).unwrap();
        let mut other = Spill::new(&std::env::temp_dir()).unwrap();
        let long = vec![b'k'; 3 * PIECE];
        let keys: Vec<Vec<u8>> =
            (0..60_000_u32).map(|n| n.to_string().into_bytes()).chain([long, Vec::new()]).collect();
        for (n, key) in keys.iter().enumerate() {
            one.add(key, Record { key, fingerprint: n as u64, mark: n % 2 == 0 }).unwrap();
            other.add(key, Record { key: b"same", fingerprint: n as u64, mark: false }).unwrap();
        }
        assert!(one.end > 0, "nothing went to the disk");
        assert_eq!(one.records(), 60_002);
        let mut found = BTreeMap::new();
        for bucket in 0..BUCKETS {
            let (bytes, others) = (one.take(bucket).unwrap(), other.take(bucket).unwrap());
            let numbers = |bytes| records(bytes).map(|record| record.fingerprint).collect::<Vec<_>>();
            assert_eq!(numbers(&bytes), numbers(&others), "the same ids on both sides");
            found.extend(records(&bytes).map(|record| (record.key.to_vec(), (record.fingerprint, record.mark))));
        }
        assert_eq!(found.len(), keys.len());
        for (n, key) in keys.iter().enumerate() {
            assert_eq!(found[key], (n as u64, n % 2 == 0));
        }
    }
}
