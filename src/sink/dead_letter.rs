//! Documents that Elasticsearch refused for good, kept in a file before they count as answered.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use serde::de::IgnoredAny;

use super::json::write_string;

/// The file: one JSON object a line, with `time`, `table` (as the configuration names it), `status`, `type`, `reason` (as
/// Elasticsearch gave them), `action` (the action line) and `document` (none for a delete). It holds row contents, so only
/// its owner may read it.
///
/// Several processes may append to it while another takes letters out ([`DeadLetters::remove`]): each holds the lock of
/// the file (`flock`) and makes sure then that the file it has open is the one of that name.
#[derive(Clone, Debug)]
pub struct DeadLetters {
    pub(super) path: Arc<PathBuf>,
    file: Arc<Mutex<Option<File>>>,
}

/// Appends the line of one refused item.
pub(super) fn write_line(
    out: &mut Vec<u8>,
    table: &str,
    status: u16,
    kind: &str,
    reason: &str,
    action: &[u8],
    document: Option<&[u8]>,
) {
    out.extend_from_slice(b"{\"time\":\"");
    out.extend_from_slice(humantime::format_rfc3339_micros(SystemTime::now()).to_string().as_bytes());
    out.extend_from_slice(b"\",\"table\":");
    write_string(out, table.as_bytes());
    out.extend_from_slice(b",\"status\":");
    out.extend_from_slice(itoa::Buffer::new().format(status).as_bytes());
    out.extend_from_slice(b",\"type\":");
    write_string(out, kind.as_bytes());
    out.extend_from_slice(b",\"reason\":");
    write_string(out, reason.as_bytes());
    out.extend_from_slice(b",\"action\":");
    write_json(out, action);
    if let Some(document) = document {
        out.extend_from_slice(b",\"document\":");
        write_json(out, document);
    }
    out.extend_from_slice(b"}\n");
}

/// JSON as it is, to the last digit; what is none, as a string: the line stays one object whatever was refused.
fn write_json(out: &mut Vec<u8>, text: &[u8]) {
    if serde_json::from_slice::<IgnoredAny>(text).is_ok() {
        out.extend_from_slice(text);
    } else {
        write_string(out, text);
    }
}

impl DeadLetters {
    /// The file at `path`. It is created with the first letter.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path: Arc::new(path), file: Arc::default() }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends these lines. They are on the disk when it returns.
    ///
    /// # Errors
    /// The system's. Nothing was added then, as far as the disk allows it to be taken back.
    pub(super) async fn append(&self, lines: Arc<Vec<u8>>) -> io::Result<()> {
        let (path, kept) = (Arc::clone(&self.path), Arc::clone(&self.file));
        let write = move || {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            let mut file = locked(kept.take(), &path, || open_file(&path))?;
            append(&mut file, &lines)?;
            // One that stays locked must not stay open.
            if file.unlock().is_ok() {
                *kept = Some(file);
            }
            Ok(())
        };
        tokio::task::spawn_blocking(write).await.map_err(io::Error::other)?
    }
}

/// The file of that name, locked. Whoever held the lock before may have put another one in its place, and a file that was
/// moved away or removed is not where anybody looks.
pub(super) fn locked(mut kept: Option<File>, path: &Path, open: impl Fn() -> io::Result<File>) -> io::Result<File> {
    loop {
        let file = match kept.take() {
            Some(file) => file,
            None => open()?,
        };
        if is_at(&file, path) {
            file.lock()?;
            if is_at(&file, path) {
                return Ok(file);
            }
        }
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(named)) => open.ino() == named.ino() && open.dev() == named.dev(),
        _ => false,
    }
}

/// The folder that a file is in.
pub(super) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn open_file(path: &Path) -> io::Result<File> {
    let folder = folder_of(path);
    std::fs::create_dir_all(folder)?;
    let file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    // The name of a new file is on the disk only once its folder is.
    File::open(folder)?.sync_all()?;
    Ok(file)
}

fn append(file: &mut File, lines: &[u8]) -> io::Result<()> {
    let before = file.metadata()?.len();
    let mut last = [b'\n'];
    if before > 0 {
        file.read_exact_at(&mut last, before - 1)?;
    }
    // A crash in mid-line.
    let mended = if last == *b"\n" { Ok(()) } else { file.write_all(b"\n") };
    let written = mended.and_then(|()| file.write_all(lines)).and_then(|()| file.sync_all());
    if written.is_err() {
        // Half a letter would spoil the next one.
        let _ = file.set_len(before);
    }
    written
}
