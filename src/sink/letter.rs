//! Dead letters read back, and taken out of their file.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::dead_letter::{DeadLetters, folder_of, locked};
use super::response::{ErrorText, describe};
use crate::lsn::Lsn;
use crate::version;

/// What tells a line of the file from all others: a digest of it.
pub type Mark = [u8; 16];

/// A document that Elasticsearch refused.
#[derive(Clone, Debug)]
pub struct Letter {
    /// When, by RFC 3339.
    pub time: String,
    /// Its table; none in letters of old, and where no table is known.
    pub table: Option<String>,
    /// `index`, `delete` or `update`.
    pub operation: &'static str,
    /// Its index.
    pub index: String,
    /// Its id.
    pub id: String,
    /// Its routing, where a handler gave it one.
    pub routing: Option<String>,
    /// Its version. A script has none.
    pub version: Option<u64>,
    /// The HTTP status of the answer.
    pub status: u16,
    /// Elasticsearch's name for the error.
    pub kind: String,
    /// Its reason in Elasticsearch's words, which may quote the document.
    pub reason: String,
    /// The document; none for a delete.
    pub document: Option<Box<RawValue>>,
    /// Which line it is.
    pub mark: Mark,
}

#[derive(Deserialize)]
struct Line {
    time: String,
    // Letters of old have a number of no meaning here.
    #[serde(default)]
    table: Value,
    status: u16,
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    reason: String,
    action: Action,
    document: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
enum Action {
    #[serde(rename = "index")]
    Index(Named),
    #[serde(rename = "delete")]
    Delete(Named),
    #[serde(rename = "update")]
    Update(Named),
}

#[derive(Deserialize)]
struct Named {
    #[serde(rename = "_index")]
    index: String,
    #[serde(rename = "_id")]
    id: String,
    routing: Option<String>,
    version: Option<u64>,
}

impl Letter {
    /// The letter in a line of the file, without its line break. None: it is no letter.
    fn of(text: &[u8]) -> Option<Self> {
        let line: Line = serde_json::from_slice(text).ok()?;
        let (operation, named) = match line.action {
            Action::Index(named) => ("index", named),
            Action::Delete(named) => ("delete", named),
            Action::Update(named) => ("update", named),
        };
        let table = line.table.as_str().filter(|table| !table.is_empty()).map(str::to_owned);
        let Named { index, id, routing, version } = named;
        let (time, status, kind, reason, document) = (line.time, line.status, line.kind, line.reason, line.document);
        Some(Self {
            time,
            table,
            operation,
            index,
            id,
            routing,
            version,
            status,
            kind,
            reason,
            document,
            mark: mark(text),
        })
    }

    /// The answer without anything that it may quote of the document.
    #[must_use]
    pub fn answer(&self) -> String {
        let error = ErrorText { kind: self.kind.as_str().into(), reason: self.reason.as_str().into() };
        describe(self.status, Some(&error).filter(|error| !error.kind.is_empty()))
    }

    /// The position of the change, or the one below which the copy saw its row.
    #[must_use]
    pub fn position(&self) -> Option<Lsn> {
        self.version.map(version::position)
    }
}

fn mark(line: &[u8]) -> Mark {
    let digest = Sha256::digest(line);
    std::array::from_fn(|at| digest[at])
}

impl DeadLetters {
    /// Gives every letter to `each`, oldest first. Answers how many lines are none, such as one that is being
    /// written. A file that is not there has none.
    ///
    /// # Errors
    /// The system's.
    pub fn read(&self, mut each: impl FnMut(Letter)) -> io::Result<u64> {
        let file = match File::open(self.path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            file => file?,
        };
        let mut others = 0;
        lines(&file, |line| {
            match Letter::of(line) {
                Some(letter) => each(letter),
                None => others += 1,
            }
            Ok(())
        })?;
        Ok(others)
    }

    /// Takes the letters with these marks out of the file, all at once: whenever the machine fails, the file of its name is
    /// either the old one or the new one, on the disk. What others append meanwhile stays. Answers how many went.
    ///
    /// # Errors
    /// The system's. The file is as it was then.
    pub fn remove(&self, marks: &HashSet<Mark>) -> io::Result<u64> {
        // A link stays one.
        let path = match std::fs::canonicalize(self.path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            path => path?,
        };
        // Held until the new file has its name: who waits for it then sees that, and opens the new one.
        let file = locked(None, &path, || File::open(&path))?;
        let mut name = path.as_os_str().to_owned();
        name.push(".new");
        let new = Path::new(&name);
        let removed = (|| {
            let mut removed = 0;
            let mut out = BufWriter::new(create(new, &file)?);
            lines(&file, |line| {
                if marks.contains(&mark(line)) {
                    removed += 1;
                    return Ok(());
                }
                out.write_all(line)?;
                out.write_all(b"\n")
            })?;
            out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
            std::fs::rename(new, &path)?;
            File::open(folder_of(&path))?.sync_all()?;
            Ok(removed)
        })();
        if removed.is_err() {
            let _ = std::fs::remove_file(new);
        }
        removed
    }
}

/// An empty file with the owner and the mode of another.
fn create(path: &Path, like: &File) -> io::Result<File> {
    let like = like.metadata()?;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let is = file.metadata()?;
    if (is.uid(), is.gid()) != (like.uid(), like.gid()) {
        // Otherwise a pgtide that runs as its owner could not append to it any more.
        fchown(&file, Some(like.uid()), Some(like.gid()))?;
    }
    file.set_permissions(like.permissions())?;
    Ok(file)
}

/// Each line of a file, without its line break.
fn lines(file: &File, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        line.pop_if(|last| *last == b'\n');
        each(&line)?;
        line.clear();
    }
    Ok(())
}
