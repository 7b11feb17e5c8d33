//! Folders and servers that a killed process left behind.
//!
//! A server's folder holds the file `owner`, which its owner keeps locked (`flock`): the system lets go of the lock when
//! the owner ends, however it ends, so a folder whose lock can be had is nobody's.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::account::Account;

/// How the names of the servers' folders begin.
pub(super) const PREFIX: &str = "pgtide-demo-";

/// The file in it that its owner keeps locked.
const OWNER: &str = "owner";

/// The folder of the data in it.
pub(super) const DATA: &str = "data";

/// The temporary folders that are considered, best first.
pub(super) fn bases() -> Vec<PathBuf> {
    let mut bases = vec![std::env::temp_dir()];
    for usual in ["/tmp", "/var/tmp"] {
        if bases.iter().all(|base| base != Path::new(usual)) {
            bases.push(usual.into());
        }
    }
    bases
}

/// Marks a folder as ours for as long as the answer lives.
pub(super) fn claim(folder: &Path) -> io::Result<File> {
    // Locked before it has its name: a sweep that comes between would take it for a leftover.
    let unnamed = folder.join("owner.new");
    let file = File::create(&unnamed)?;
    file.try_lock()?;
    fs::write(&unnamed, format!("{}\n", std::process::id()))?;
    fs::rename(&unnamed, folder.join(OWNER))?;
    Ok(file)
}

/// Stops the servers that killed processes of this user left behind and removes their folders; tells which.
///
/// Blocks. Signals a process only when it is proven to be `postgres` on that very folder. What cannot be removed is left
/// for the next time.
#[must_use]
pub fn sweep() -> Vec<PathBuf> {
    let Ok(account) = Account::choose() else { return Vec::new() };
    let mine = [nix::unistd::geteuid().as_raw(), account.uid];
    let mut removed = Vec::new();
    for base in bases() {
        for entry in fs::read_dir(base).into_iter().flatten().flatten() {
            let folder = entry.path();
            // The entry itself, not what a link points to: others can write in a temporary folder.
            let ours = entry.metadata().is_ok_and(|meta| meta.is_dir() && mine.contains(&meta.uid()));
            if ours && entry.file_name().to_string_lossy().starts_with(PREFIX) && remove(&folder).unwrap_or(false) {
                removed.push(folder);
            }
        }
    }
    removed
}

/// Removes the folder if its owner is gone.
fn remove(folder: &Path) -> io::Result<bool> {
    let owner = match File::open(folder.join(OWNER)) {
        Ok(file) => Some(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    match &owner {
        // Held until the folder is gone, so that two sweeps do not meet in it.
        Some(file) => match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(false),
            Err(TryLockError::Error(error)) => return Err(error),
        },
        // Just being made, or just being removed, unless it is old.
        None => {
            let age = fs::metadata(folder)?.modified()?.elapsed().unwrap_or_default();
            if age < Duration::from_secs(600) {
                return Ok(false);
            }
        }
    }
    let data = folder.join(DATA);
    if let Some(pid) = server_of(&data) {
        stop(pid, &data);
    }
    fs::remove_dir_all(folder)?;
    Ok(true)
}

/// The pid that `postmaster.pid` names.
pub(super) fn server_of(data: &Path) -> Option<u32> {
    fs::read_to_string(data.join("postmaster.pid")).ok()?.lines().next()?.trim().parse().ok()
}

/// SIGQUIT (immediate shutdown), then SIGKILL after some seconds; each only while the proof holds.
fn stop(pid: u32, data: &Path) {
    let Ok(number) = i32::try_from(pid) else { return };
    for signal in [Signal::SIGQUIT, Signal::SIGKILL] {
        if !is_server(pid, data) || kill(Pid::from_raw(number), signal).is_err() {
            return;
        }
        let deadline = Instant::now() + Duration::from_secs(6);
        while is_server(pid, data) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Whether the process is a `postgres` that was started on this data folder.
pub(super) fn is_server(pid: u32, data: &Path) -> bool {
    let Some(arguments) = arguments_of(pid) else { return false };
    let program = arguments.first().map(|first| Path::new(first).file_name() == Some("postgres".as_ref()));
    program == Some(true)
        && arguments.windows(2).any(|pair| pair.first().is_some_and(|flag| flag == "-D") && Path::new(&pair[1]) == data)
}

#[cfg(target_os = "linux")]
fn arguments_of(pid: u32) -> Option<Vec<String>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(bytes.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned()).collect())
}

/// Elsewhere `ps` joins the arguments by spaces; our folders' names have none, or the proof fails.
#[cfg(not(target_os = "linux"))]
fn arguments_of(pid: u32) -> Option<Vec<String>> {
    let output = std::process::Command::new("ps").args(["-ww", "-o", "args=", "-p", &pid.to_string()]).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::Builder::new().prefix("pgtide-leftovers-").tempdir().unwrap()
    }

    #[test]
    fn a_claimed_folder_stays_and_an_orphan_goes() {
        let folder = folder();
        let lock = claim(folder.path()).unwrap();
        assert!(!remove(folder.path()).unwrap());
        drop(lock);
        assert!(remove(folder.path()).unwrap());
        assert!(!folder.path().exists());
    }

    #[test]
    fn a_folder_that_is_just_being_made_stays() {
        let folder = folder();
        assert!(!remove(folder.path()).unwrap());
        assert!(folder.path().exists());
    }

    #[test]
    fn a_process_that_is_not_that_server_is_not_signalled() {
        let folder = folder();
        let data = folder.path().join(DATA);
        fs::create_dir(&data).unwrap();
        let mut innocent = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        fs::write(data.join("postmaster.pid"), format!("{}\n{}\n", innocent.id(), data.display())).unwrap();
        drop(claim(folder.path()).unwrap());
        assert!(remove(folder.path()).unwrap());
        assert_eq!(innocent.try_wait().unwrap(), None, "it was signalled");
        innocent.kill().unwrap();
        innocent.wait().unwrap();
    }
}
