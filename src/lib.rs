//! pgtide copies PostgreSQL tables into Elasticsearch (or OpenSearch) and keeps them equal by change data capture.
//!
//! The binary is a dashboard around this library; [`engine`] is what an embedder uses.

mod broken;
pub mod change;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod checks;
pub mod config;
pub mod demo;
pub mod engine;
pub mod gate;
pub mod http;
pub mod index;
pub mod lsn;
pub mod mapping;
pub mod postgres;
pub mod preview;
pub mod problem;
pub mod removal;
pub mod sink;
pub mod snapshot;
pub mod status;
pub mod store;
pub mod stream;
pub mod table;
pub mod telemetry;
pub mod text;
mod tls;
pub mod tui;
pub mod verify;
pub mod version;
