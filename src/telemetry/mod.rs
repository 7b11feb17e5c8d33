//! Metric names and handles, and the set-up of the log.
