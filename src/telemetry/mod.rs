//! Live figures, metric names, and the set-up of the log.

mod counters;
pub mod log;
pub mod metrics;

pub(crate) use counters::lock;
pub use counters::{Counters, TableCounters, micros, now};
