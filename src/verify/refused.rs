//! Which of the differing ids were refused for good: they are in the dead-letter file.

use std::collections::HashMap;

use super::Difference;
use crate::sink::DeadLetters;

/// Marks the differences that have a letter. A file that is not there or cannot be read marks none: it is a courtesy.
pub(super) fn mark(dead_letters: &DeadLetters, index: &str, differences: &mut [Difference]) {
    if differences.is_empty() {
        return;
    }
    let mut by_id: HashMap<String, &mut Difference> =
        differences.iter_mut().map(|difference| (difference.id.clone(), difference)).collect();
    let _ = dead_letters.read(|letter| {
        if letter.index == index
            && let Some(difference) = by_id.get_mut(&letter.id)
            // One that is older was made good since.
            && letter.version >= difference.version
        {
            // Its `reason` may quote values.
            difference.refused = Some(format!("{} {}", letter.status, letter.kind).trim_end().to_owned());
        }
    });
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
        mark(&DeadLetters::new(file.path().to_owned()), "users", &mut differences);
        let refused: Vec<_> = differences.iter().map(|difference| difference.refused.as_deref()).collect();
        assert_eq!(refused, [Some("400 newest"), None, None]);
        mark(&DeadLetters::new("/nonexistent/file".into()), "users", &mut differences);
    }
}
