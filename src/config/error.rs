//! What is wrong with a configuration file, and where.

use std::fmt;
use std::path::PathBuf;

use crate::problem::{Problem, ProblemKind};

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file says something that cannot be, at one place or several.
    #[error("{}", lines(file, findings))]
    Invalid {
        /// The file's name.
        file: String,
        /// What is wrong, in the order of the file. Never empty.
        findings: Vec<Finding>,
    },
}

/// One thing that is wrong in the file. Holds no secret: a value is shown as the file has it, before `${...}` is replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The key, such as `cdc.slot.name`; empty where the file as a whole is meant.
    pub path: String,
    /// What was expected, and what to write.
    pub message: String,
}

/// `3:9: cdc.port: expected ...`
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.line, self.column)?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

fn lines(file: &str, findings: &[Finding]) -> String {
    findings.iter().map(|finding| format!("{file}:{finding}")).collect::<Vec<_>>().join("\n")
}

impl From<ConfigError> for Problem {
    fn from(error: ConfigError) -> Self {
        let hint = match &error {
            ConfigError::Read { .. } => "Name a file that exists and that this user may read.",
            ConfigError::Invalid { .. } => "Correct the file and start again; docs/configuration.md lists every key.",
        };
        Problem::new(ProblemKind::Config, error.to_string(), hint)
    }
}
