//! The pipeline: from a PostgreSQL to an Elasticsearch, watched by [`Status`] and steered by [`Control`].

mod control;
mod status;

pub use control::{Answer, Command, Commands, Control};
pub use status::*;
