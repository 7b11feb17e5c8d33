//! A PostgreSQL of our own in a temporary folder, and a workload on it.
