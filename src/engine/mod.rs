//! The pipeline: from a PostgreSQL to an Elasticsearch, watched by [`Status`] and steered by [`Control`].

mod control;

pub use control::{Answer, Command, Commands, Control};

pub use crate::status::*;
