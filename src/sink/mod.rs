//! The Elasticsearch side: bulk bodies, their order, their answers.
//!
//! ```text
//! Target, Body     what is to be written, ready for the wire
//! Lanes            which body an operation goes into, so that operations on one document stay in order
//! Sink::deliver    sends a body until every item is answered for good
//! Client           HTTP
//! ```
//!
//! Every `index` and `delete` carries an external version (`external_gte`), so sending anything twice is harmless, and
//! a conflict means that a newer version is there.

mod backoff;
mod body;
#[cfg(any(test, fuzzing))]
pub(crate) mod checks;
mod client;
mod dead_letter;
mod deliver;
mod error;
mod json;
mod lanes;
mod lease;
mod letter;
mod memory;
mod response;
mod stats;
mod sweep;
#[cfg(test)]
mod tests;

pub use body::{Body, Target, document_id};
pub use client::{Answer, Client, Content, ServerInfo};
pub use dead_letter::DeadLetters;
pub use deliver::{Delivered, Sink, SinkOptions};
pub use error::SinkError;
pub use lanes::{Lanes, Limits};
pub use lease::{Lease, Moment};
pub use letter::{Letter, Mark};
pub use stats::{SinkStats, TableRejection};
pub use sweep::{FIND, Hit, Scan, Swept};
