//! A PostgreSQL of our own in a temporary folder, and a workload on it.
//!
//! [`Server`] is a real server. Its programs are those of the folder `$PGTIDE_PG_BIN`, else the first PostgreSQL 14 or
//! newer on PATH, else the newest one in the usual folders; where there is none, a build is fetched and kept in the
//! cache folder (`~/.cache/pgtide/postgresql`). With `PGTIDE_PG_FETCH=always` that build is used whatever is installed,
//! with `PGTIDE_PG_FETCH=17` the one of that major version; there are builds of 14 to 18.
//! As root the server runs as the user `postgres`, else `nobody`. It goes when its owner goes, however that ends.

mod account;
mod binaries;
mod cluster;
mod error;
mod fetch;
mod leftovers;
mod progress;
mod seed;
mod server;
mod watchdog;
mod workload;

pub use binaries::Installation;
pub use error::ServerError;
pub use leftovers::sweep;
pub use progress::Bars;
pub use seed::{INIT_SQL, Loaded, seed};
pub use server::{Options, Server};
pub use workload::{Stats, Workload, WorkloadOptions};

use std::sync::Arc;

/// What is being done while a server starts, for a progress line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// No PostgreSQL was found: one is being fetched. The size is not known beforehand; this is told once.
    Fetching,
    /// The archive came, of so many bytes, and is being unpacked.
    Unpacking(u64),
    /// The database cluster is being created.
    Creating,
    /// The server is starting.
    Starting,
    /// It accepts connections.
    Ready,
}

/// Hears the [`Step`]s of a start.
pub type OnStep = Arc<dyn Fn(Step) + Send + Sync>;
