//! The PostgreSQL side: connections, catalog, publication, slot, replication protocol.

pub mod connect;
mod error;
pub mod pgoutput;
pub mod replication;

pub use error::{PostgresError, ServerError};
