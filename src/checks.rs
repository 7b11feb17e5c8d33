//! What has to hold whatever bytes come from outside: used by the fuzz targets (`fuzz/`) and, on their corpus and on
//! random bytes, by `cargo test`. Part of neither the library nor the program.

use serde::de::IgnoredAny;

use crate::change::Field;
use crate::postgres::pgoutput::{Message, Old, Tuple, decode};
use crate::text::{Kind, copy::Splitter, write_value};

pub use crate::sink::checks::response;

/// The types whose texts are parsed, by their oids, and one that is not.
const TYPES: [u32; 25] = [
    16, 17, 20, 25, 26, 114, 700, 701, 1082, 1114, 1184, 1186, 1700, 3802, // single values
    199, 1000, 1001, 1009, 1016, 1020, 1115, 1182, 1185, 1231, 3807, // arrays; those of 1020 are delimited by `;`
];

/// A message of the replication protocol: it is refused, or it is what a writer makes of what was read.
///
/// # Panics
/// It is not.
pub fn pgoutput(input: &[u8]) {
    let Ok(message) = decode(input) else { return };
    let mut out = Vec::new();
    match message {
        Message::Insert { oid, new } => {
            head(&mut out, b'I', oid);
            tuple(&mut out, b'N', new);
        }
        Message::Update { oid, old, new } => {
            head(&mut out, b'U', oid);
            if let Some((kind, old)) = old {
                tuple(&mut out, mark(kind), old);
            }
            tuple(&mut out, b'N', new);
        }
        Message::Delete { oid, kind, old } => {
            head(&mut out, b'D', oid);
            tuple(&mut out, mark(kind), old);
        }
        Message::Truncate { oids, .. } => {
            assert_eq!(oids.iter().len() * 4 + 6, input.len());
            return;
        }
        Message::Relation(relation) => {
            // Flag, oid, modifier and the zero of the name: what is reserved is never more than what came.
            assert!(relation.columns.capacity() * 10 <= input.len());
            return;
        }
        _ => return,
    }
    assert_eq!(out, input);
}

fn head(out: &mut Vec<u8>, message: u8, oid: u32) {
    out.push(message);
    out.extend_from_slice(&oid.to_be_bytes());
}

fn mark(kind: Old) -> u8 {
    match kind {
        Old::Key => b'K',
        Old::Full => b'O',
    }
}

fn tuple(out: &mut Vec<u8>, mark: u8, tuple: Tuple<'_>) {
    assert_eq!(tuple.has_unchanged(), tuple.iter().any(|field| field == Field::Unchanged));
    out.push(mark);
    out.extend_from_slice(&u16::try_from(tuple.len()).expect("the format has 16 bits for it").to_be_bytes());
    for field in tuple {
        match field {
            Field::Null => out.push(b'n'),
            Field::Unchanged => out.push(b'u'),
            Field::Text(text) => {
                out.push(b't');
                out.extend_from_slice(&u32::try_from(text.len()).expect("and 32 for this").to_be_bytes());
                out.extend_from_slice(text);
            }
        }
    }
}

/// A line of COPY: one field more than tabs, none longer than what it was read from, and what PostgreSQL writes for
/// these fields is read as the same fields again.
///
/// # Panics
/// It is not so.
pub fn copy(input: &[u8]) {
    let mut splitter = Splitter::default();
    let line = splitter.split(input);
    assert_eq!(line.len(), input.iter().filter(|&&byte| byte == b'\t').count() + 1);
    let mut written = Vec::new();
    for (at, field) in line.iter().enumerate() {
        if at > 0 {
            written.push(b'\t');
        }
        match field {
            Field::Null => written.extend_from_slice(b"\\N"),
            Field::Unchanged => panic!("COPY has all values"),
            Field::Text(text) => {
                for &byte in text {
                    match byte {
                        b'\t' => written.extend_from_slice(b"\\t"),
                        b'\n' => written.extend_from_slice(b"\\n"),
                        b'\\' => written.extend_from_slice(b"\\\\"),
                        other => written.push(other),
                    }
                }
            }
        }
    }
    written.push(b'\n');
    let mut again = Splitter::default();
    assert!(line.iter().eq(again.split(&written).iter()));
    assert!(
        line.iter().map(|field| if let Field::Text(text) = field { text.len() } else { 2 }).sum::<usize>()
            <= input.len()
    );
}

/// A value's text, whose type the first byte chooses: one JSON value on one line.
///
/// # Panics
/// It is not so.
pub fn text(input: &[u8]) {
    let Some((&first, text)) = input.split_first() else { return };
    let oid = TYPES[usize::from(first) % TYPES.len()];
    let mut out = b"x".to_vec();
    write_value(&mut out, Kind::of(oid), text);
    assert_eq!(out[0], b'x');
    let json = &out[1..];
    serde_json::from_slice::<IgnoredAny>(json).expect("it is no JSON");
    // JSON of the database may be indented by tabs.
    let json_type = [114, 199, 3802, 3807].contains(&oid);
    assert!(json.iter().all(|&byte| byte >= 0x20 || byte == b'\t' && json_type), "a control character is left");
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    /// What the fuzzer found worth keeping, and inputs that once broke something.
    #[test]
    fn the_corpus_holds() {
        for name in ["pgoutput", "copy", "text", "response"] {
            let check = match name {
                "pgoutput" => pgoutput,
                "copy" => copy,
                "text" => text,
                _ => response,
            };
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
            let mut count = 0;
            for entry in std::fs::read_dir(&folder).unwrap() {
                check(&std::fs::read(entry.unwrap().path()).unwrap());
                count += 1;
            }
            assert!(count >= 10, "{} has {count} inputs", folder.display());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn any_bytes_hold(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            pgoutput(&bytes);
            copy(&bytes);
            text(&bytes);
            response(&bytes);
        }
    }
}
