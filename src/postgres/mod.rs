//! The PostgreSQL side: connections, catalog, publication, slot, replication protocol.

pub mod catalog;
pub mod column_types;
pub mod connect;
pub mod definition;
mod error;
pub(crate) mod locks;
pub mod pgoutput;
pub mod preflight;
pub mod publication;
pub mod replication;
pub mod slot;

pub use error::{PostgresError, ServerError};
