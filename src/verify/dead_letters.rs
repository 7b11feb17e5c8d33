//! Which of the differing ids were refused for good: they are in the dead-letter file.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::Deserialize;

use super::Difference;

#[derive(Deserialize)]
struct Letter {
    status: u16,
    #[serde(rename = "type", default)]
    kind: String,
    action: Action,
}

#[derive(Deserialize)]
struct Action {
    #[serde(alias = "delete", alias = "update")]
    index: Named,
}

#[derive(Deserialize)]
struct Named {
    #[serde(rename = "_index")]
    index: String,
    #[serde(rename = "_id")]
    id: String,
}

/// Marks the differences that have a letter. A file that is not there or cannot be read marks none: it is a courtesy.
pub(super) fn mark(file: &Path, index: &str, differences: &mut [Difference]) {
    if differences.is_empty() {
        return;
    }
    let Ok(file) = File::open(file) else { return };
    let mut by_id: HashMap<String, &mut Difference> =
        differences.iter_mut().map(|difference| (difference.id.clone(), difference)).collect();
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
        let letter = serde_json::from_slice::<Letter>(&line).ok().filter(|letter| letter.action.index.index == index);
        if let Some(letter) = letter
            && let Some(difference) = by_id.get_mut(&letter.action.index.id)
        {
            // Its `reason` may quote values.
            difference.refused = Some(format!("{} {}", letter.status, letter.kind).trim_end().to_owned());
        }
        line.clear();
    }
}
