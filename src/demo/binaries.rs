//! Where PostgreSQL is installed.

use std::path::{Path, PathBuf};

use super::account::Account;
use super::{OnStep, ServerError, fetch};

/// The oldest major version that serves.
const OLDEST: u32 = 14;

/// Folders of programs, `*` standing for any name, that are usual.
const USUAL: [&str; 8] = [
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
    "/usr/local/pgsql/bin",
    "/usr/libexec/postgresql*",
    "/opt/local/lib/postgresql*/bin",
];

/// An installed PostgreSQL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    /// The folder that holds `postgres` and `initdb`.
    pub bin: PathBuf,
    /// As `postgres --version` names it: `15.18`, `17beta1`.
    pub version: String,
}

impl Installation {
    /// The major version.
    #[must_use]
    pub fn major(&self) -> u32 {
        major(&self.version)
    }

    pub(super) fn postgres(&self) -> PathBuf {
        self.bin.join("postgres")
    }

    pub(super) fn initdb(&self) -> PathBuf {
        self.bin.join("initdb")
    }
}

/// `$PGTIDE_PG_BIN`, else the first of PATH, else the newest of the usual folders, else one that is fetched.
/// With `PGTIDE_PG_FETCH` a fetched one without looking: the usual one (`always`) or that of a major version (`17`).
pub(super) async fn find(account: &Account, step: &OnStep) -> Result<Installation, ServerError> {
    if let Some(folder) = std::env::var_os("PGTIDE_PG_BIN").filter(|value| !value.is_empty()) {
        let path = PathBuf::from(folder);
        return inspect(&path, account).await.map_err(|reason| ServerError::BadFolder { path, reason });
    }
    let asked_for = match std::env::var("PGTIDE_PG_FETCH") {
        Ok(value) if !value.is_empty() => Some(fetch::asked_for(&value)?),
        _ => None,
    };
    if asked_for.is_none() {
        for folder in on_path().await {
            if let Ok(found) = inspect(&folder, account).await {
                return Ok(found);
            }
        }
        let mut usual = Vec::new();
        for folder in USUAL.iter().flat_map(|pattern| expand(pattern)) {
            usual.extend(inspect(&folder, account).await.ok());
        }
        usual.sort_by_key(|found| numbers(&found.version));
        if let Some(newest) = usual.pop() {
            return Ok(newest);
        }
    }
    fetch::fetch(asked_for, account, step).await
}

/// What is in a folder of programs, or why it does not serve. Runs `postgres --version` as the server's user, which
/// proves that the user reaches it.
pub(super) async fn inspect(folder: &Path, account: &Account) -> Result<Installation, String> {
    // Debian and Homebrew link single programs; the rest of the installation lies beside the real one.
    let postgres = folder.join("postgres").canonicalize().map_err(|error| format!("no program `postgres`: {error}"))?;
    let bin = postgres.parent().ok_or("`postgres` has no folder")?.to_owned();
    if !bin.join("initdb").is_file() {
        return Err("no program `initdb` (the server's package is not complete)".into());
    }
    let output = account.command(&postgres, Path::new("/")).arg("--version").output().await;
    let output = output.map_err(|error| format!("`postgres --version` does not run: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = parse_version(&text).ok_or("`postgres --version` tells no version")?;
    if major(&version) < OLDEST {
        return Err(format!("PostgreSQL {version} is too old"));
    }
    Ok(Installation { bin, version })
}

async fn on_path() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = std::env::var_os("PATH")
        .map(|path| std::env::split_paths(&path).filter(|folder| folder.join("postgres").is_file()).collect())
        .unwrap_or_default();
    if let Ok(output) = tokio::process::Command::new("pg_config").arg("--bindir").output().await {
        folders.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    folders
}

/// The folders that a pattern with at most one `*` means.
fn expand(pattern: &str) -> Vec<PathBuf> {
    let Some((before, after)) = pattern.split_once('*') else { return vec![PathBuf::from(pattern)] };
    let (parent, prefix) = before.rsplit_once('/').unwrap_or(("", before));
    let Ok(entries) = std::fs::read_dir(if parent.is_empty() { "/" } else { parent }) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path().join(after.trim_start_matches('/')))
        .filter(|folder| folder.is_dir())
        .collect()
}

/// `15.18` of `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`.
fn parse_version(text: &str) -> Option<String> {
    let version = text.split_whitespace().nth(2)?;
    version.starts_with(|c: char| c.is_ascii_digit()).then(|| version.to_owned())
}

fn numbers(version: &str) -> Vec<u32> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

fn major(version: &str) -> u32 {
    numbers(version).first().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn versions() {
        assert_eq!(parse_version("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n").unwrap(), "15.18");
        assert_eq!(major("17beta1"), 17);
        assert!(numbers("9.6.24") < numbers("16.2"));
        assert_eq!(parse_version("postgres"), None);
        assert_eq!(parse_version("postgres (PostgreSQL) devel"), None);
    }

    #[test]
    fn patterns_become_folders() {
        let root = tempfile::tempdir().unwrap();
        for name in ["pgsql-15/bin", "pgsql-16/bin", "pgsql-17", "other/bin"] {
            std::fs::create_dir_all(root.path().join(name)).unwrap();
        }
        let mut found = expand(&format!("{}/pgsql-*/bin", root.path().display()));
        found.sort();
        assert_eq!(found, ["pgsql-15/bin", "pgsql-16/bin"].map(|name| root.path().join(name)));
    }

    #[tokio::test]
    async fn a_folder_without_programs_says_why() {
        let empty = tempfile::tempdir().unwrap();
        let reason = inspect(empty.path(), &Account::choose().unwrap()).await.unwrap_err();
        assert!(reason.starts_with("no program `postgres`"), "{reason}");
    }
}
