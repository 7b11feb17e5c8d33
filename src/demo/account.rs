//! The user that the server runs as: ourselves, or another when we are root.

use std::ffi::OsStr;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use nix::unistd::{User, getegid, geteuid};
use tokio::process::Command;

use super::ServerError;

/// The user that the server and its tools run as.
#[derive(Clone, Copy, Debug)]
pub(super) struct Account {
    /// User id.
    pub(super) uid: u32,
    /// Group id.
    gid: u32,
    /// We are root and must drop to it.
    dropped: bool,
}

impl Account {
    /// Ourselves; for root the user `postgres`, else `nobody`.
    pub(super) fn choose() -> Result<Self, ServerError> {
        if !geteuid().is_root() {
            return Ok(Self { uid: geteuid().as_raw(), gid: getegid().as_raw(), dropped: false });
        }
        ["postgres", "nobody"]
            .into_iter()
            .filter_map(|name| User::from_name(name).ok().flatten())
            .find(|user| !user.uid.is_root())
            .map(|user| Self { uid: user.uid.as_raw(), gid: user.gid.as_raw(), dropped: true })
            .ok_or(ServerError::NoAccount)
    }

    /// A command that runs as this user in `folder`, untouched by the `PG*` variables and the locale of our environment.
    pub(super) fn command(&self, program: impl AsRef<OsStr>, folder: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(folder).env("LC_ALL", "C").kill_on_drop(true);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PG") {
                command.env_remove(name);
            }
        }
        if self.dropped {
            // A home of root's is unreachable; std also drops the supplementary groups.
            command.uid(self.uid).gid(self.gid).env("HOME", "/").env_remove("TMPDIR");
        }
        command
    }

    /// Gives a file or a folder (not what is in it) to this user.
    pub(super) fn own(&self, path: &Path) -> Result<(), ServerError> {
        if self.dropped {
            chown(path, Some(self.uid), Some(self.gid)).map_err(ServerError::io("give away", path))?;
        }
        Ok(())
    }

    /// Whether this user may enter the folder: it and every folder above must have the x bit for it.
    pub(super) fn can_enter(&self, folder: &Path) -> bool {
        let Ok(folder) = folder.canonicalize() else { return false };
        !self.dropped
            || folder.ancestors().all(|step| {
                step.metadata().is_ok_and(|meta| {
                    let bit = if meta.uid() == self.uid {
                        0o100
                    } else if meta.gid() == self.gid {
                        0o010
                    } else {
                        0o001
                    };
                    meta.is_dir() && meta.mode() & bit != 0
                })
            })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_closed_folder_above_is_noticed() {
        let closed = tempfile::tempdir().unwrap();
        let inner = closed.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let stranger = Account { uid: 4_000_000_001, gid: 4_000_000_001, dropped: true };
        set_permissions(closed.path(), Permissions::from_mode(0o711)).unwrap();
        assert!(stranger.can_enter(&inner));
        set_permissions(closed.path(), Permissions::from_mode(0o700)).unwrap();
        assert!(!stranger.can_enter(&inner));
        assert!(!stranger.can_enter(&closed.path().join("absent")));
    }
}
