//! Status, metrics and control over HTTP.
