//! Creating a database cluster: `initdb`, or a copy of one that was made before.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::account::Account;
use super::{Installation, ServerError};

/// How the names of the folders of kept clusters begin.
const KEPT: &str = "pgtide-cluster-";

/// Who may connect: everyone who reaches the socket, whose folder is closed to others; by TCP with the password.
const HBA: &str = "\
local all,replication all trust
host all,replication all 127.0.0.1/32 scram-sha-256
";

/// What differs from PostgreSQL's defaults. The demo must survive a killed process, not a power cut: `fsync` and
/// `full_page_writes` are off, `synchronous_commit` is as it is in production.
const SETTINGS: [(&str, &str); 13] = [
    ("wal_level", "logical"),
    ("max_replication_slots", "20"),
    ("max_wal_senders", "20"),
    ("max_connections", "100"),
    ("shared_buffers", "128MB"),
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("synchronous_commit", "on"),
    ("listen_addresses", "127.0.0.1"),
    ("unix_socket_permissions", "0700"),
    ("logging_collector", "off"),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
];

/// Creates a cluster in the folder `data`, which must not exist, by `initdb`.
pub(super) async fn create(installation: &Installation, account: &Account, data: &Path) -> Result<(), ServerError> {
    let folder = data.parent().unwrap_or(Path::new("/"));
    let output = account
        .command(installation.initdb(), folder)
        .args(["--no-sync", "--encoding=UTF8", "--locale=C", "--username=postgres", "--auth=trust", "--pgdata"])
        .arg(data)
        .output()
        .await
        .map_err(ServerError::io("run", &installation.initdb()))?;
    if output.status.success() {
        return Ok(());
    }
    let text = [output.stdout, output.stderr].concat();
    Err(ServerError::Program { program: "initdb", output: last_lines(&text, 12) })
}

/// Creates a cluster as a copy of one in `base` that is made where it is not yet: eight times as fast as `initdb`.
/// Copies have the same system identifier.
pub(super) async fn copy(
    installation: &Installation,
    account: &Account,
    base: &Path,
    data: &Path,
) -> Result<(), ServerError> {
    let kept = base.join(kept_name(installation, account));
    if !whole(&kept, account) {
        let folder = tempfile::Builder::new()
            .prefix(".pgtide-cluster-")
            .tempdir_in(base)
            .map_err(ServerError::io("create", base))?;
        account.own(folder.path())?;
        let made = folder.path().join("cluster");
        create(installation, account, &made).await?;
        // Another may have been faster, which serves as well.
        if let Err(error) = std::fs::rename(&made, &kept)
            && !whole(&kept, account)
        {
            return Err(ServerError::Io { what: "create", path: kept, source: error });
        }
        forget_old(base, account);
    }
    // By the program and as that user, so that owner and modes come out right.
    let folder = data.parent().unwrap_or(Path::new("/"));
    let output = account.command("cp", folder).arg("-Rp").arg(&kept).arg(data).output().await;
    let output = output.map_err(ServerError::io("copy", &kept))?;
    if output.status.success() {
        return Ok(());
    }
    Err(ServerError::Program { program: "cp", output: last_lines(&output.stderr, 4) })
}

/// Writes who may connect and the settings; `extra` wins over ours.
pub(super) fn configure(data: &Path, extra: &[(String, String)]) -> Result<(), ServerError> {
    let hba = data.join("pg_hba.conf");
    std::fs::write(&hba, HBA).map_err(ServerError::io("write", &hba))?;
    let conf = data.join("postgresql.conf");
    let mut text = std::fs::read_to_string(&conf).map_err(ServerError::io("read", &conf))?;
    text.push('\n');
    // The last one of a name counts.
    let ours = SETTINGS.iter().map(|(name, value)| (*name, *value));
    for (name, value) in ours.chain(extra.iter().map(|(name, value)| (name.as_str(), value.as_str()))) {
        text.push_str(&setting_line(name, value)?);
    }
    std::fs::write(&conf, text).map_err(ServerError::io("write", &conf))
}

fn setting_line(name: &str, value: &str) -> Result<String, ServerError> {
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.".contains(&byte));
    if !is_name || value.contains(['\n', '\r', '\0']) {
        return Err(ServerError::BadSetting(name.escape_default().to_string()));
    }
    Ok(format!("{name} = '{}'\n", value.replace('\\', "\\\\").replace('\'', "''")))
}

/// The end of a log, fit for a terminal.
pub(super) fn last_lines(text: &[u8], lines: usize) -> String {
    let text = String::from_utf8_lossy(text);
    let all: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n");
    last.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}

/// One a day: systems remove single old files from their temporary folders, which would leave a torn cluster.
fn kept_name(installation: &Installation, account: &Account) -> String {
    let mut hasher = DefaultHasher::new();
    (&installation.bin, &installation.version).hash(&mut hasher);
    format!("{KEPT}{}-{:016x}-{}", account.uid, hasher.finish(), today())
}

fn today() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 86_400)
}

/// Whether the kept cluster is there and made by us: others can write in a temporary folder, and a cluster names
/// programs to run.
fn whole(kept: &Path, account: &Account) -> bool {
    kept.symlink_metadata().is_ok_and(|meta| meta.is_dir() && meta.uid() == account.uid && meta.mode() & 0o077 == 0)
        && kept.join("global/pg_control").is_file()
}

/// Removes this user's kept clusters of days before yesterday, which nobody copies any more.
fn forget_old(base: &Path, account: &Account) {
    let prefix = format!("{KEPT}{}-", account.uid);
    for entry in std::fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let day = name.strip_prefix(&prefix).and_then(|rest| rest.rsplit('-').next()?.parse::<u64>().ok());
        let ours = entry.metadata().is_ok_and(|meta| meta.is_dir() && meta.uid() == account.uid);
        if ours && day.is_some_and(|day| day + 1 < today()) {
            let path: PathBuf = entry.path();
            let _ = std::fs::remove_dir_all(path);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn settings_are_quoted() {
        assert_eq!(setting_line("a.b", r"it's \n").unwrap(), "a.b = 'it''s \\\\n'\n");
        assert!(setting_line("a b", "1").is_err());
        assert!(setting_line("a", "1\nfsync=on").is_err());
    }

    #[test]
    fn the_end_of_a_log_has_no_escapes() {
        assert_eq!(last_lines(b"one\n\ntwo\n\x1b[31mthree\n", 2), "two\n [31mthree");
        assert_eq!(last_lines(b"", 2), "");
    }
}
