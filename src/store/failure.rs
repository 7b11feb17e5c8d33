//! Errors in the shape in which Elasticsearch answers them.

use serde_json::{Value, json};

use super::index::Index;

/// An error of the whole request or of one item.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Failure {
    /// The HTTP status.
    pub(super) status: u16,
    /// `error.type`.
    pub(super) kind: String,
    /// `error.reason`.
    pub(super) reason: String,
    /// The index it is about.
    pub(super) index: Option<String>,
    /// The index's uuid, where there is such an index.
    pub(super) uuid: Option<String>,
}

impl Failure {
    pub(super) fn new(status: u16, kind: &str, reason: impl Into<String>) -> Self {
        Self { status, kind: kind.into(), reason: reason.into(), index: None, uuid: None }
    }

    pub(super) fn about(mut self, index: &str) -> Self {
        self.index = Some(index.to_owned());
        self
    }

    /// About an index that there is.
    pub(super) fn of(self, index: &Index) -> Self {
        Self { uuid: Some(index.uuid.clone()), ..self.about(&index.name) }
    }

    /// 400 `index_closed_exception`.
    pub(super) fn closed(index: &Index) -> Self {
        Self::new(400, "index_closed_exception", "closed").of(index)
    }

    /// 400 `illegal_argument_exception`.
    pub(super) fn argument(reason: impl Into<String>) -> Self {
        Self::new(400, "illegal_argument_exception", reason)
    }

    /// 400 `parsing_exception`.
    pub(super) fn parsing(reason: impl Into<String>) -> Self {
        Self::new(400, "parsing_exception", reason)
    }

    /// 400 `action_request_validation_exception` with one finding.
    pub(super) fn validation(finding: &str) -> Self {
        Self::new(400, "action_request_validation_exception", format!("Validation Failed: 1: {finding};"))
    }

    /// 404 `index_not_found_exception`.
    pub(super) fn no_index(name: &str) -> Self {
        Self::new(404, "index_not_found_exception", format!("no such index [{name}]")).about(name)
    }

    /// The body of the answer when the whole request failed.
    pub(super) fn body(&self) -> Value {
        let mut cause = json!({ "type": self.kind, "reason": self.reason });
        if let Some(index) = &self.index {
            cause["index"] = json!(index);
            cause["index_uuid"] = json!(self.uuid.as_deref().unwrap_or("_na_"));
            if self.kind == "index_not_found_exception" {
                cause["resource.type"] = json!("index_or_alias");
                cause["resource.id"] = json!(index);
            }
        }
        let mut error = cause.clone();
        error["root_cause"] = json!([cause]);
        json!({ "error": error, "status": self.status })
    }
}
