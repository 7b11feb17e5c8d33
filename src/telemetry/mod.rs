//! Metric names and handles, and the set-up of the log.

mod counters;

pub(crate) use counters::lock;
pub use counters::{Counters, TableCounters, micros, now};
