//! The PostgreSQL side: connections, catalog, publication, slot, replication protocol.

pub mod pgoutput;
