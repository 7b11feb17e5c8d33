//! Why nothing is delivered, and what the reader can do.

use crate::problem::{Problem, ProblemKind};

/// Why a request was not served. Holds no password and no row content. URLs are without user and password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SinkError {
    /// The configuration cannot work.
    #[error("{message}")]
    Configuration {
        /// What is wrong with which key.
        message: String,
        /// What to write instead.
        hint: String,
    },
    /// No connection.
    #[error("no connection to {url}: {reason}")]
    Unreachable {
        /// Where to.
        url: String,
        /// The system's or the TLS library's words.
        reason: String,
    },
    /// No answer in time. The request may have been carried out all the same.
    #[error("{url} did not answer within {seconds} s")]
    Timeout {
        /// Who.
        url: String,
        /// How long it had.
        seconds: u64,
    },
    /// The connection broke before the answer was complete. The request may have been carried out all the same.
    #[error("connection to {url} broke: {reason}")]
    Broken {
        /// Where to.
        url: String,
        /// The system's words.
        reason: String,
    },
    /// 401, or 403 for the user as such.
    #[error("{url} refused user or password: {reason}")]
    Unauthorized {
        /// Who.
        url: String,
        /// The status, and the error as far as it names no values.
        reason: String,
    },
    /// 403: the user may not do this.
    #[error("{url} does not let the user do this: {reason}")]
    Forbidden {
        /// Who.
        url: String,
        /// The status, and the error as far as it names no values.
        reason: String,
    },
    /// Something answers there, and it is neither Elasticsearch nor OpenSearch.
    #[error("{url} answers, but not as Elasticsearch or OpenSearch do: {reason}")]
    NotElasticsearch {
        /// Who.
        url: String,
        /// What it answered.
        reason: String,
    },
    /// Another status that was not expected.
    #[error("{url} refused: {reason}")]
    Refused {
        /// Who.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The status, and the error as far as it names no values.
        reason: String,
    },
    /// An answer that cannot be understood: cut short, no JSON, or not one item for each that was sent.
    #[error("{url} gave an answer that cannot be right: {reason}")]
    Malformed {
        /// Who.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An answer of more bytes than pgtide keeps in memory.
    #[error("{url} gave an answer of more than 256 MiB")]
    TooLong {
        /// Who.
        url: String,
    },
    /// Told to stop before everything was answered.
    #[error("stopped before Elasticsearch had answered for everything")]
    Stopped,
    /// A fault of pgtide itself.
    #[error("{0}: this is a fault of pgtide")]
    Fault(String),
}

impl SinkError {
    /// What the reader can do, one or two sentences.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            SinkError::Configuration { hint, .. } => hint.clone(),
            SinkError::Unreachable { reason, .. } => unreachable_hint(reason).to_owned(),
            SinkError::Timeout { .. } => {
                "Elasticsearch is overloaded or a firewall drops the answers. A smaller elasticsearch.batchByteSizeLimit \
                 or concurrentRequest may help."
                    .to_owned()
            }
            SinkError::Broken { .. } => {
                "Look into the log of Elasticsearch, or of the proxy before it: did it restart? Do elasticsearch.urls name its \
                 port for HTTP, not another one?"
                    .to_owned()
            }
            SinkError::Unauthorized { .. } => {
                "Check elasticsearch.username and elasticsearch.password, or apiKey or bearerToken, in the configuration."
                    .to_owned()
            }
            SinkError::Forbidden { .. } => {
                "Give the user of elasticsearch.username, or the API key, the privileges `monitor` on the cluster and `create_index`, \
                 `index`, `delete`, `read`, `view_index_metadata` and `maintenance` on the indices and their aliases, and \
                 `manage` unless elasticsearch.manageIndices is false."
                    .to_owned()
            }
            SinkError::NotElasticsearch { .. } => {
                "Check elasticsearch.urls: host, port, and the path if a proxy stands before it.".to_owned()
            }
            SinkError::Refused { .. } => "Look into the log of Elasticsearch for the reason.".to_owned(),
            SinkError::TooLong { .. } => "The documents are too long to be read together.".to_owned(),
            SinkError::Malformed { .. } => {
                "Is it Elasticsearch 7.17 or newer or OpenSearch, without a proxy that changes its answers?".to_owned()
            }
            SinkError::Stopped | SinkError::Fault(_) => "Start again: it goes on where it stopped.".to_owned(),
        }
    }

    /// Trying again may help without anybody doing anything.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            SinkError::Unreachable { .. }
            | SinkError::Timeout { .. }
            | SinkError::Broken { .. }
            | SinkError::Malformed { .. }
            | SinkError::TooLong { .. }
            | SinkError::Stopped => true,
            SinkError::Refused { status, .. } => matches!(status, 408 | 429 | 500..),
            SinkError::Configuration { .. }
            | SinkError::Unauthorized { .. }
            | SinkError::Forbidden { .. }
            | SinkError::NotElasticsearch { .. }
            | SinkError::Fault(_) => false,
        }
    }
}

fn unreachable_hint(reason: &str) -> &'static str {
    let reason = reason.to_ascii_lowercase();
    if reason.contains("refused") {
        "Is Elasticsearch running there? Check host and port in elasticsearch.urls."
    } else if reason.contains("certificate") || reason.contains("unknownissuer") {
        "The certificate is not signed by an authority that is known, or is for another name. Name the authority's PEM file in \
         elasticsearch.ssl.certificateAuthorities; where the name does not fit, `ssl.verificationMode: certificate`."
    } else if reason.contains("lookup") || reason.contains("resolve") || reason.contains("dns") {
        "The host name is not known. Check elasticsearch.urls."
    } else if reason.contains("message") || reason.contains("corrupt") {
        "It does not speak TLS there: write http:// instead of https:// in elasticsearch.urls, or mend its TLS."
    } else {
        "Check host and port in elasticsearch.urls, and that no firewall stands between."
    }
}

impl From<SinkError> for Problem {
    fn from(error: SinkError) -> Self {
        let kind = match error {
            SinkError::Configuration { .. } => ProblemKind::Config,
            SinkError::Fault(_) => ProblemKind::Internal,
            _ => ProblemKind::Elasticsearch,
        };
        let problem = Problem::new(kind, error.to_string(), error.hint());
        if error.is_transient() { problem.transient() } else { problem }
    }
}
