//! Why a server could not be had.

use std::io;
use std::path::{Path, PathBuf};

/// Why a server of our own could not be found, started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// `PGTIDE_PG_BIN` names a folder that does not serve.
    #[error("PGTIDE_PG_BIN={}: {reason}; it must be the folder that holds `postgres` and `initdb` of PostgreSQL 14 or newer", path.display())]
    BadFolder {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// `PGTIDE_PG_FETCH` asks for something that is not built.
    #[error("PGTIDE_PG_FETCH={0}: must be `always` or a major version from 14 to 18")]
    NoBuild(String),
    /// None was found here, and none could be fetched.
    #[error(
        "no PostgreSQL 14 or newer was found here, and fetching {version} failed: {reason}; install PostgreSQL, or set PGTIDE_PG_BIN to the folder of its programs"
    )]
    Fetch {
        /// The version that was asked for.
        version: String,
        /// What went wrong.
        reason: String,
    },
    /// We are root, which PostgreSQL refuses, and there is nobody to be instead.
    #[error("PostgreSQL does not run as root, and there is no user `postgres` or `nobody`: run pgtide as another user")]
    NoAccount,
    /// No temporary folder that the server's user can reach, with a path short enough for a Unix socket.
    #[error(
        "no usable temporary folder among {tried}: set TMPDIR to a folder that every user can enter, with a short path"
    )]
    NoFolder {
        /// The folders that were tried.
        tried: String,
    },
    /// A setting's name is not one.
    #[error("`{0}` is not the name of a PostgreSQL setting")]
    BadSetting(String),
    /// A file or a program could not be used.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A program of the installation failed.
    #[error("{program} failed: {output}")]
    Program {
        /// Which.
        program: &'static str,
        /// The last lines that it wrote.
        output: String,
    },
    /// The server ended while it started.
    #[error("PostgreSQL ended while starting; the last lines of its log:\n{log}")]
    Ended {
        /// The last lines of its log.
        log: String,
    },
    /// The server did not accept connections in time.
    #[error("PostgreSQL accepted no connection within {seconds} s; the last lines of its log:\n{log}")]
    Slow {
        /// How long it was given.
        seconds: u64,
        /// The last lines of its log.
        log: String,
    },
    /// The server did not end, not even by SIGKILL.
    #[error("PostgreSQL in {} does not end", folder.display())]
    Stuck {
        /// Its folder.
        folder: PathBuf,
    },
    /// The system gave no random bytes for the password.
    #[error("the system gives no random bytes")]
    NoRandomness,
    /// The server refused.
    #[error("PostgreSQL: {}", .0.as_db_error().map_or_else(|| .0.to_string(), ToString::to_string))]
    Sql(#[from] tokio_postgres::Error),
}

impl ServerError {
    /// For `map_err` on file operations.
    pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}
