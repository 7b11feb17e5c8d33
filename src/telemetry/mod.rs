//! Metric names and handles, and the set-up of the log.

pub mod log;
pub mod metrics;
