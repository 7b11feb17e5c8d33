//! What went wrong, in words for the person who has to mend it.

use serde::{Deserialize, Serialize};

/// What kind of thing stands in the way. Decides the exit code and whether waiting may help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// The configuration or the command line. Exit code 2.
    Config,
    /// PostgreSQL does not answer, or refuses the user. Exit code 3.
    Postgres,
    /// PostgreSQL answers but is not set up for the job: `wal_level`, slots, tables, keys, publication. Exit code 4.
    Setup,
    /// Elasticsearch does not answer, refuses the user, or refuses the documents. Exit code 5.
    Elasticsearch,
    /// Going on would break the promise that documents equal rows: slot lost, gap in the stream. Exit code 6.
    Gap,
    /// A fault of pgtide itself. Exit code 70.
    Internal,
}

/// One clear message and what to do about it. Holds no password and no row content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Problem {
    /// What kind of thing stands in the way.
    pub kind: ProblemKind,
    /// What happened, one sentence without a final full stop.
    pub message: String,
    /// What the reader can do, one or two sentences.
    pub hint: String,
    /// Trying again may help without anybody doing anything.
    pub transient: bool,
}

impl Problem {
    /// A problem that stays until somebody mends it.
    pub fn new(kind: ProblemKind, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: hint.into(), transient: false }
    }

    /// The same, marked as one that may pass by itself.
    #[must_use]
    pub fn transient(mut self) -> Self {
        self.transient = true;
        self
    }

    /// The exit code of a process that ends because of it, as `docs/exit-codes.md` lists them.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            ProblemKind::Config => 2,
            ProblemKind::Postgres => 3,
            ProblemKind::Setup => 4,
            ProblemKind::Elasticsearch => 5,
            ProblemKind::Gap => 6,
            ProblemKind::Internal => 70,
        }
    }
}
