//! pgtide copies PostgreSQL tables into Elasticsearch (or OpenSearch) and keeps them equal by change data capture.
//!
//! The binary is a dashboard around this library; [`engine`] is what an embedder uses.

pub mod change;
pub mod config;
pub mod engine;
pub mod lsn;
pub mod problem;
pub mod table;
pub mod text;
