//! The text that names a document.

use sha2::{Digest, Sha256};

use crate::change::Field;

/// The id of a key of one column whose text is empty: Elasticsearch takes no empty id. No text of PostgreSQL holds this
/// character, so no other key has this id.
pub(super) const EMPTY: &[u8] = b"\0";

/// Appends the id of a key of several columns: their texts joined by `:`, with `\` before each `:` and `\` that is
/// part of a text, so that different keys never share an id. False when a field is missing or NULL.
pub fn write_id<'a>(id: &mut Vec<u8>, fields: impl Iterator<Item = Option<Field<'a>>>) -> bool {
    for (n, field) in fields.enumerate() {
        let Some(Field::Text(text)) = field else { return false };
        if n > 0 {
            id.push(b':');
        }
        for &byte in text {
            if byte == b':' || byte == b'\\' {
                id.push(b'\\');
            }
            id.push(byte);
        }
    }
    true
}

/// Appends the digest of a whole row. Each text goes in with its length, and NULL is not the empty text, so that different
/// rows never share what the digest is made of. False when a field is missing or was not sent.
pub(super) fn write_digest<'a>(id: &mut Vec<u8>, fields: impl Iterator<Item = Option<Field<'a>>>) -> bool {
    let mut digest = Sha256::new();
    for field in fields {
        match field {
            Some(Field::Text(text)) => {
                digest.update((text.len() as u64 + 1).to_le_bytes());
                digest.update(text);
            }
            Some(Field::Null) => digest.update(0_u64.to_le_bytes()),
            Some(Field::Unchanged) | None => return false,
        }
    }
    id.extend(digest.finalize().iter().flat_map(|byte| [byte >> 4, byte & 15].map(|digit| HEX[usize::from(digit)])));
    true
}

const HEX: &[u8; 16] = b"0123456789abcdef";

/// The texts of the key that an id of `columns` columns was made of: the inverse of [`Shape::id`](super::Shape::id).
/// None where no key makes such an id.
#[must_use]
pub fn read_id(id: &str, columns: usize) -> Option<Vec<String>> {
    if columns == 1 {
        let text = if id.as_bytes() == EMPTY { "" } else { id };
        return (!text.contains('\0')).then(|| vec![text.to_owned()]);
    }
    let mut parts = vec![String::new()];
    let mut characters = id.chars();
    while let Some(character) = characters.next() {
        let part = parts.last_mut()?;
        match character {
            '\0' => return None,
            '\\' => part.push(characters.next().filter(|escaped| matches!(escaped, ':' | '\\'))?),
            ':' => parts.push(String::new()),
            other => part.push(other),
        }
    }
    (parts.len() == columns).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(parts: &[Vec<u8>]) -> Vec<u8> {
        let mut out = Vec::new();
        assert!(write_id(&mut out, parts.iter().map(|part| Some(Field::Text(part)))));
        out
    }

    #[test]
    fn plain_keys_stay_readable() {
        assert_eq!(id(&[b"7".to_vec(), b"2024-01-01".to_vec()]), b"7:2024-01-01");
        assert_eq!(id(&[b"a:b".to_vec(), br"c\".to_vec()]), br"a\:b:c\\");
        assert!(!write_id(&mut Vec::new(), [Some(Field::Null)].into_iter()));
    }

    #[test]
    fn different_rows_have_different_digests() {
        let digest = |fields: &[Option<&str>]| {
            let mut id = Vec::new();
            let fields =
                fields.iter().map(|field| Some(field.map_or(Field::Null, |text| Field::Text(text.as_bytes()))));
            assert!(write_digest(&mut id, fields));
            String::from_utf8(id).unwrap_or_default()
        };
        let rows: [&[Option<&str>]; 9] = [
            &[Some("ab"), Some("c")],
            &[Some("a"), Some("bc")],
            &[Some("abc"), Some("")],
            &[Some("abc"), None],
            &[None, Some("abc")],
            &[None, None],
            &[Some(""), None],
            &[Some("")],
            &[Some("\u{1}\0\0\0\0\0\0\0"), Some("")],
        ];
        let digests: std::collections::BTreeSet<String> = rows.iter().map(|row| digest(row)).collect();
        assert_eq!(digests.len(), rows.len());
        assert!(digests.iter().all(|digest| digest.len() == 64), "{digests:?}");
        assert!(!write_digest(&mut Vec::new(), [Some(Field::Text(b"a")), Some(Field::Unchanged)].into_iter()));
    }

    #[test]
    fn what_is_no_id_is_not_read_as_one() {
        assert_eq!(read_id("\0", 1), Some(vec![String::new()]));
        assert_eq!(read_id("a:b", 1), Some(vec!["a:b".to_owned()]));
        for id in ["a", "a:b:c", r"a\b:c", "a:b\\", "a\0:b"] {
            assert_eq!(read_id(id, 2), None, "{id}");
        }
    }

    proptest! {
        #[test]
        fn an_id_is_read_back(parts in prop::collection::vec("[:\\\\aé]{0,4}", 2..4)) {
            let bytes: Vec<Vec<u8>> = parts.iter().map(|part| part.clone().into_bytes()).collect();
            let text = String::from_utf8(id(&bytes)).unwrap_or_default();
            prop_assert_eq!(read_id(&text, parts.len()), Some(parts));
        }

        #[test]
        fn different_keys_never_share_an_id(
            one in prop::collection::vec(prop::collection::vec(prop::sample::select(b":\\a".to_vec()), 0..4), 2..4),
            other in prop::collection::vec(prop::collection::vec(prop::sample::select(b":\\a".to_vec()), 0..4), 2..4),
        ) {
            prop_assume!(one.len() == other.len());
            prop_assert_eq!(id(&one) == id(&other), one == other);
        }
    }
}
