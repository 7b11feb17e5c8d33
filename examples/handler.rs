//! A handler of one's own, as in the README of go-pq-cdc-elasticsearch: each row becomes a document of the row and the
//! operation that it came by.
//!
//! ```text
//! cargo run --example handler -- pgtide.yaml
//! ```
#![allow(dead_code, unreachable_pub, reason = "a test uses the handler without the rest")]

use std::sync::Arc;

use pgtide::change::{Action, Change, Operation};
use pgtide::config::Config;
use pgtide::engine::{Engine, Options};
use serde_json::{Map, Value};

/// What becomes of a change. TRUNCATE is left out: the documents stay.
pub fn handler(change: &Change<'_>) -> Vec<Action> {
    let operation = match change.operation {
        Operation::Snapshot => "SNAPSHOT",
        Operation::Insert => "INSERT",
        Operation::Update => "UPDATE",
        Operation::Delete => {
            let id = change.old.and_then(|row| row.get("id"));
            return id.map(|id| Action::delete(text(&id))).into_iter().collect();
        }
        Operation::Truncate => return Vec::new(),
    };
    let Some(row) = change.new else { return Vec::new() };
    let mut document: Map<String, Value> = row.to_json();
    let Some(id) = document.get("id").map(text) else { return Vec::new() };
    document.insert("operation".to_owned(), operation.into());
    Action::index(id, &document).into_iter().collect()
}

fn text(id: &Value) -> String {
    id.as_str().map_or_else(|| id.to_string(), str::to_owned)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = std::env::args().nth(1).ok_or("name a configuration: cargo run --example handler -- pgtide.yaml")?;
    let loaded = Config::load(file)?;
    let mut options = Options::new(Arc::new(loaded.config));
    options.handler = Some(Arc::new(handler));
    let mut engine = Engine::start(options)?;
    tokio::select! {
        ended = engine.wait() => ended?,
        _ = tokio::signal::ctrl_c() => engine.stop().await?,
    }
    Ok(())
}
