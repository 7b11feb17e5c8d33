//! Documents that Elasticsearch refused for good, kept in a file before they count as answered.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use serde::de::IgnoredAny;

use super::json::write_string;

/// The file: one JSON object a line, with
/// `time`, `table` (the caller's number), `status`, `type`, `reason` (as Elasticsearch gave them), `action` (the
/// action line) and `document` (none for a delete). It holds row contents, so only its owner may read it.
#[derive(Clone, Debug)]
pub(super) struct DeadLetters {
    path: Arc<PathBuf>,
    file: Arc<Mutex<Option<File>>>,
}

/// Appends the line of one refused item.
pub(super) fn write_line(
    out: &mut Vec<u8>,
    table: u32,
    status: u16,
    kind: &str,
    reason: &str,
    action: &[u8],
    document: Option<&[u8]>,
) {
    out.extend_from_slice(b"{\"time\":\"");
    out.extend_from_slice(humantime::format_rfc3339_micros(SystemTime::now()).to_string().as_bytes());
    out.extend_from_slice(b"\",\"table\":");
    out.extend_from_slice(itoa::Buffer::new().format(table).as_bytes());
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
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path: Arc::new(path), file: Arc::default() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Appends these lines. They are on the disk when it returns.
    ///
    /// # Errors
    /// The system's. Nothing was added then, as far as the disk allows it to be taken back.
    pub(super) async fn append(&self, lines: Arc<Vec<u8>>) -> io::Result<()> {
        let (path, file) = (Arc::clone(&self.path), Arc::clone(&self.file));
        let write = move || {
            let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
            let mut open = match file.take() {
                // A file that was moved away or removed is not where anybody looks.
                Some(open) if is_at(&open, &path) => open,
                _ => open_file(&path)?,
            };
            append(&mut open, &lines)?;
            *file = Some(open);
            Ok(())
        };
        tokio::task::spawn_blocking(write).await.map_err(io::Error::other)?
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(named)) => open.ino() == named.ino() && open.dev() == named.dev(),
        _ => false,
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)?;
    let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    // The name of a new file is on the disk only once its folder is.
    File::open(parent)?.sync_all()?;
    let length = file.metadata()?.len();
    if length > 0 {
        let mut last = [0];
        file.seek(SeekFrom::Start(length - 1))?;
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            // A crash in mid-line.
            file.write_all(b"\n")?;
        }
    }
    Ok(file)
}

fn append(file: &mut File, lines: &[u8]) -> io::Result<()> {
    let before = file.metadata()?.len();
    let written = file.write_all(lines).and_then(|()| file.sync_all());
    if written.is_err() {
        // Half a letter would spoil the next one.
        let _ = file.set_len(before);
    }
    written
}
