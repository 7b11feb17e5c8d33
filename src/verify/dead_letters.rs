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
    version: Option<u64>,
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
            // One that is older was made good since.
            && letter.action.index.version >= difference.version
        {
            // Its `reason` may quote values.
            difference.refused = Some(format!("{} {}", letter.status, letter.kind).trim_end().to_owned());
        }
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;

    use super::*;
    use crate::verify::DifferenceKind;

    #[test]
    fn only_a_letter_that_is_not_made_good_since_is_a_reason() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let letter = |index: &str, id: &str, version: u64, kind: &str| {
            format!(
                r#"{{"time":"t","status":400,"type":"{kind}","reason":"a value","action":{{"index":{{"_index":"{index}","_id":"{id}","version":{version}}}}}}}"#
            )
        };
        let lines = [
            letter("users", "1", 10, "first"),
            "no letter".to_owned(),
            letter("users", "1", 20, "newest"),
            letter("users", "2", 10, "old"),
            letter("books", "3", 10, "elsewhere"),
        ];
        writeln!(file, "{}", lines.join("\n")).unwrap();
        let difference = |id: &str, version| Difference {
            kind: DifferenceKind::Missing,
            id: id.into(),
            fields: Vec::new(),
            foreign: false,
            version,
            refused: None,
            row: None,
            document: None,
        };
        let mut differences = [difference("1", None), difference("2", Some(11)), difference("3", None)];
        mark(file.path(), "users", &mut differences);
        let refused: Vec<_> = differences.iter().map(|difference| difference.refused.as_deref()).collect();
        assert_eq!(refused, [Some("400 newest"), None, None]);
        mark(Path::new("/nonexistent/file"), "users", &mut differences);
    }
}
