//! What a JSON text means, in 64 bits.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher};

use foldhash::quality::FixedState;
use serde_json::value::RawValue;

/// Deeper values are taken by their bytes, not by their meaning: a thread's stack has an end.
const DEEPEST: usize = 200;

/// A hash of what a JSON text means: white space, the order of members, the way a string is escaped and a number is
/// written make no difference (`17.5` is `17.50` is `1.75e1`); numbers count to the last digit. Elasticsearch keeps a
/// document's bytes as they were sent, except where an `_update`, a pipeline or a synthetic source writes them anew.
pub(super) fn fingerprint(json: &[u8]) -> u64 {
    Reader { text: json, at: 0, scratch: Vec::new() }.value(0)
}

/// The fields that one document has and the other has not, or has with another meaning.
pub(super) fn differing_fields(one: &[u8], other: &[u8]) -> Vec<String> {
    type Fields<'a> = BTreeMap<Cow<'a, str>, &'a RawValue>;
    let fields = |json| serde_json::from_slice::<Fields<'_>>(json).unwrap_or_default();
    let (one, other) = (fields(one), fields(other));
    let meaning = |fields: &Fields<'_>, name: &Cow<'_, str>| {
        fields.get(name.as_ref()).map(|value| fingerprint(value.get().as_bytes()))
    };
    let names: BTreeSet<&Cow<'_, str>> = one.keys().chain(other.keys()).collect();
    let differs = |name: &&Cow<'_, str>| meaning(&one, name) != meaning(&other, name);
    names.into_iter().filter(differs).map(|name| name.clone().into_owned()).collect()
}

/// The kinds of values, so that `"1"` is not `1`.
#[derive(Clone, Copy)]
enum Tag {
    Object = 1,
    Array,
    Text,
    Number,
    Word,
    Bytes,
}

fn of_bytes(tag: Tag, bytes: &[u8]) -> u64 {
    let mut hasher = FixedState::with_seed(tag as u64).build_hasher();
    hasher.write(bytes);
    hasher.finish()
}

fn of_pair(tag: Tag, one: u64, two: u64) -> u64 {
    let mut hasher = FixedState::with_seed(tag as u64).build_hasher();
    hasher.write_u64(one);
    hasher.write_u64(two);
    hasher.finish()
}

/// Reads one JSON text. What is none gives some hash as well.
struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    scratch: Vec<u8>,
}

impl<'a> Reader<'a> {
    fn peek(&mut self) -> Option<u8> {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.text.get(self.at) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn value(&mut self, depth: usize) -> u64 {
        match self.peek() {
            Some(b'{' | b'[') if depth > DEEPEST => self.skipped(),
            Some(b'{') => self.object(depth),
            Some(b'[') => self.array(depth),
            Some(b'"') => self.string(),
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => {
                let word = self.while_in(|byte| byte.is_ascii_alphabetic());
                if word.is_empty() {
                    self.at += 1;
                }
                of_bytes(Tag::Word, word)
            }
        }
    }

    fn object(&mut self, depth: usize) -> u64 {
        self.at += 1;
        let (mut members, mut sum) = (0, 0_u64);
        loop {
            match self.peek() {
                Some(b'"') => {
                    let name = self.string();
                    if self.peek() == Some(b':') {
                        self.at += 1;
                    }
                    // A sum, for members have no order.
                    sum = sum.wrapping_add(of_pair(Tag::Text, name, self.value(depth + 1)));
                    members += 1;
                }
                Some(b',') => self.at += 1,
                _ => {
                    self.at += 1;
                    return of_pair(Tag::Object, members, sum);
                }
            }
        }
    }

    fn array(&mut self, depth: usize) -> u64 {
        self.at += 1;
        let mut hash = 0;
        loop {
            match self.peek() {
                Some(b',') => self.at += 1,
                None | Some(b']') => {
                    self.at += 1;
                    return of_pair(Tag::Array, hash, 0);
                }
                Some(_) => hash = of_pair(Tag::Array, hash, self.value(depth + 1)),
            }
        }
    }

    /// The string's bytes with their quotes, and whether there is an escape in it.
    fn quoted(&mut self) -> (&'a [u8], bool) {
        let start = self.at;
        let mut escaped = false;
        self.at += 1;
        while let Some(found) = memchr::memchr2(b'"', b'\\', self.text.get(self.at..).unwrap_or_default()) {
            self.at += found + 1;
            if self.text[self.at - 1] == b'"' {
                return (&self.text[start..self.at], escaped);
            }
            escaped = true;
            self.at += 1;
        }
        self.at = self.text.len();
        (&self.text[start.min(self.at)..], escaped)
    }

    fn string(&mut self) -> u64 {
        let (quoted, escaped) = self.quoted();
        if escaped && let Ok(text) = serde_json::from_slice::<String>(quoted) {
            return of_bytes(Tag::Text, text.as_bytes());
        }
        of_bytes(Tag::Text, quoted.get(1..quoted.len().saturating_sub(1)).unwrap_or_default())
    }

    fn number(&mut self) -> u64 {
        let text = self.while_in(|byte| byte.is_ascii_digit() || matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E'));
        let (negative, text) = match text {
            [b'-', rest @ ..] => (true, rest),
            _ => (false, text),
        };
        let (digits, exponent) = match memchr::memchr2(b'e', b'E', text) {
            None => (text, 0),
            Some(at) => {
                let written = std::str::from_utf8(&text[at + 1..]).ok().and_then(|text| text.parse::<i64>().ok());
                match written {
                    Some(exponent) => (&text[..at], exponent),
                    // Beyond 64 bits, or no number.
                    None => return of_bytes(Tag::Bytes, text),
                }
            }
        };
        self.scratch.clear();
        let point = memchr::memchr(b'.', digits).unwrap_or(digits.len());
        let fraction = digits.get(point + 1..).unwrap_or_default();
        self.scratch.extend_from_slice(&digits[..point]);
        self.scratch.extend_from_slice(fraction);
        let significant = without_zeros(&self.scratch);
        if significant.is_empty() {
            return of_bytes(Tag::Number, b"0");
        }
        // The power of ten of the last digit that counts.
        let trailing = self.scratch.iter().rev().take_while(|byte| **byte == b'0').count();
        let scale = exponent.saturating_sub_unsigned(fraction.len() as u64).saturating_add_unsigned(trailing as u64);
        let digits = of_bytes(Tag::Number, significant);
        of_pair(Tag::Number, digits, scale.cast_unsigned().rotate_left(1) ^ u64::from(negative))
    }

    fn while_in(&mut self, belongs: impl Fn(u8) -> bool) -> &'a [u8] {
        let start = self.at;
        while self.text.get(self.at).is_some_and(|byte| belongs(*byte)) {
            self.at += 1;
        }
        &self.text[start..self.at]
    }

    /// A nested value by its bytes.
    fn skipped(&mut self) -> u64 {
        let (start, mut open) = (self.at, 0_usize);
        while let Some(byte) = self.text.get(self.at) {
            match byte {
                b'"' => {
                    self.quoted();
                    continue;
                }
                b'{' | b'[' => open += 1,
                b'}' | b']' => open -= 1,
                _ => {}
            }
            self.at += 1;
            if open == 0 {
                break;
            }
        }
        of_bytes(Tag::Bytes, &self.text[start..self.at])
    }
}

/// Without zeros at either end.
fn without_zeros(digits: &[u8]) -> &[u8] {
    let counts = |byte: &u8| *byte != b'0';
    let start = digits.iter().position(counts).unwrap_or(digits.len());
    let end = digits.iter().rposition(counts).map_or(start, |last| last + 1);
    &digits[start..end]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn same(one: &str, other: &str) -> bool {
        fingerprint(one.as_bytes()) == fingerprint(other.as_bytes())
    }

    #[test]
    fn what_means_the_same_is_equal() {
        for (one, other) in [
            ("17.50", "17.5"),
            ("1e2", "100"),
            ("100.0", "1E+2"),
            ("-0", "0.000"),
            ("0.001", "1e-3"),
            (r#"{"a":1,"b":[2,3]}"#, " { \"b\" : [ 2 , 3.0 ] , \"a\" : 1 } "),
            (r#""é\n""#, r#""\u00e9\u000a""#),
            (r#"{"\u0061":"x"}"#, r#"{"a":"x"}"#),
        ] {
            assert!(same(one, other), "{one} {other}");
        }
    }

    #[test]
    fn what_means_something_else_is_not() {
        for (one, other) in [
            ("1", "\"1\""),
            ("1", "-1"),
            ("1", "10"),
            ("0.1234567890123456789", "0.12345678901234568"),
            ("9007199254740993", "9007199254740992"),
            ("null", "false"),
            ("[]", "{}"),
            ("[1,2]", "[2,1]"),
            ("[[1],2]", "[1,[2]]"),
            (r#"{"a":1}"#, r#"{"a":1,"b":null}"#),
            (r#"{"a":{"b":1}}"#, r#"{"a":1,"b":1}"#),
            (r#"{"a":1,"b":2}"#, r#"{"a":2,"b":1}"#),
            (r#""a\\""#, r#""a""#),
        ] {
            assert!(!same(one, other), "{one} {other}");
        }
    }

    #[test]
    fn what_is_nested_deeply_is_compared_and_does_not_overflow() {
        let nested = |inner: &str| format!("{}{inner}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(same(&nested("1"), &nested("1")));
        assert!(!same(&nested("1"), &nested("2")));
        assert!(!same(&nested("\"]\""), &nested("\"[\"")));
    }

    #[test]
    fn differing_fields_are_named() {
        let one = br#"{"id":1,"price":17.50,"name":"a","gone":null}"#;
        let other = br#"{"name":"b","id":1,"price":17.5,"new":[]}"#;
        assert_eq!(differing_fields(one, other), ["gone", "name", "new"]);
        assert!(differing_fields(one, one).is_empty());
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e300..1e300).prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map(".{0,3}", inner, 0..5).prop_map(|map| json!(map)),
            ]
        })
    }

    proptest! {
        #[test]
        fn equal_values_and_only_they_have_equal_fingerprints(one in any_json(), other in any_json()) {
            let pretty = serde_json::to_string_pretty(&one).unwrap();
            prop_assert!(same(&one.to_string(), &pretty));
            prop_assert_eq!(same(&one.to_string(), &other.to_string()), one == other || both_zero(&one, &other));
        }

        #[test]
        fn any_bytes_are_read_to_their_end(bytes in prop::collection::vec(prop::sample::select(br#"{}[]",:\1e-. "#.to_vec()), 0..40)) {
            fingerprint(&bytes);
        }
    }

    fn both_zero(one: &Value, other: &Value) -> bool {
        one.as_f64() == Some(0.0) && other.as_f64() == Some(0.0)
    }
}
