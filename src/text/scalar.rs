//! Single values.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::stand_in;
use super::string::write_string;
use super::{geometry, hstore};

/// How the text of a type that is no array becomes JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scalar {
    Text,
    Number,
    Boolean,
    Json,
    Date,
    Timestamp,
    TimestampTz,
    Bytea,
    Hstore,
    Geometry,
}

impl Scalar {
    pub(super) fn of(type_oid: u32) -> Self {
        match type_oid {
            16 => Scalar::Boolean,
            17 => Scalar::Bytea,
            // int8, int2, int4, oid, float4, float8, numeric
            20 | 21 | 23 | 26 | 700 | 701 | 1700 => Scalar::Number,
            114 | 3802 => Scalar::Json,
            1082 => Scalar::Date,
            1114 => Scalar::Timestamp,
            1184 => Scalar::TimestampTz,
            stand_in::HSTORE => Scalar::Hstore,
            stand_in::GEOMETRY => Scalar::Geometry,
            _ => Scalar::Text,
        }
    }
}

#[inline]
pub(super) fn write(out: &mut Vec<u8>, scalar: Scalar, text: &[u8]) {
    match scalar {
        Scalar::Text => write_string(out, text),
        Scalar::Number => number(out, text),
        Scalar::Boolean => match text {
            b"t" => out.extend_from_slice(b"true"),
            b"f" => out.extend_from_slice(b"false"),
            _ => write_string(out, text),
        },
        Scalar::Json => json(out, text),
        Scalar::Date | Scalar::Timestamp | Scalar::TimestampTz => moment(out, scalar, text),
        Scalar::Bytea => bytea(out, text),
        Scalar::Hstore => hstore::write(out, text),
        Scalar::Geometry => geometry::write(out, text),
    }
}

/// Longer ones are strings: newer Elasticsearch refuses a document for one (Jackson's `maxNumberLength`), whatever its field.
const LONGEST_NUMBER: usize = 1000;

#[inline]
fn number(out: &mut Vec<u8>, text: &[u8]) {
    if text.len() <= LONGEST_NUMBER && is_number(text) {
        out.extend_from_slice(text);
    } else if matches!(text, b"NaN" | b"Infinity" | b"-Infinity") {
        out.extend_from_slice(b"null");
    } else {
        write_string(out, text);
    }
}

/// By the grammar of JSON.
#[inline]
fn is_number(text: &[u8]) -> bool {
    let unsigned = text.strip_prefix(b"-").unwrap_or(text);
    let whole = digits(unsigned);
    if whole == 0 || (whole > 1 && unsigned[0] == b'0') {
        return false;
    }
    let mut rest = &unsigned[whole..];
    if rest.is_empty() {
        return true;
    }
    if let Some(fraction) = rest.strip_prefix(b".") {
        let count = digits(fraction);
        if count == 0 {
            return false;
        }
        rest = &fraction[count..];
    }
    if let [b'e' | b'E', exponent @ ..] = rest {
        let exponent = exponent.strip_prefix(b"+").or_else(|| exponent.strip_prefix(b"-")).unwrap_or(exponent);
        return !exponent.is_empty() && digits(exponent) == exponent.len();
    }
    rest.is_empty()
}

#[inline]
fn digits(text: &[u8]) -> usize {
    text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len())
}

/// A column's type may have changed since its kind was looked up, so even the server's JSON is checked: one broken
/// value would break the whole bulk request.
fn json(out: &mut Vec<u8>, text: &[u8]) {
    let valid = std::str::from_utf8(text).is_ok_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok());
    if !valid {
        return write_string(out, text);
    }
    let start = out.len();
    out.extend_from_slice(text);
    // Inside a string a line break would be invalid, so these are white space.
    let mut from = start;
    while let Some(at) = memchr::memchr2(b'\n', b'\r', &out[from..]) {
        out[from + at] = b' ';
        from += at + 1;
    }
}

#[inline]
fn moment(out: &mut Vec<u8>, scalar: Scalar, text: &[u8]) {
    if matches!(text, b"infinity" | b"-infinity") || text.ends_with(b" BC") {
        return out.extend_from_slice(b"null");
    }
    let plain = text.iter().all(|&byte| byte.is_ascii_digit() || matches!(byte, b'-' | b':' | b'.' | b'+' | b' '));
    if !plain {
        return write_string(out, text);
    }
    out.push(b'"');
    let start = out.len();
    out.extend_from_slice(text);
    if scalar != Scalar::Date {
        // Years have four digits or more.
        if let Some(space) = out[start..].iter().position(|&byte| byte == b' ') {
            out[start + space] = b'T';
        }
    }
    if scalar == Scalar::TimestampTz
        && let [.., b'+' | b'-', hour, minute] = text
        && hour.is_ascii_digit()
        && minute.is_ascii_digit()
    {
        out.extend_from_slice(b":00");
    }
    out.push(b'"');
}

fn bytea(out: &mut Vec<u8>, text: &[u8]) {
    let start = out.len();
    if base64_of_hex(out, text).is_none() {
        out.truncate(start);
        write_string(out, text);
    }
}

/// None where `text` is no `\x` with pairs of hexadecimal digits.
fn base64_of_hex(out: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    // A multiple of three bytes needs no padding, so that the pieces join up.
    const PIECE: usize = 3 * 256;
    let (pairs, odd) = text.strip_prefix(b"\\x")?.as_chunks::<2>();
    if !odd.is_empty() {
        return None;
    }
    out.push(b'"');
    let mut bytes = [0; PIECE];
    for piece in pairs.chunks(PIECE) {
        for (byte, [high, low]) in bytes.iter_mut().zip(piece) {
            *byte = hex_digit(*high)? << 4 | hex_digit(*low)?;
        }
        let start = out.len();
        out.resize(start + piece.len().div_ceil(3) * 4, b'=');
        STANDARD.encode_slice(&bytes[..piece.len()], &mut out[start..]).ok()?;
    }
    out.push(b'"');
    Some(())
}

#[inline]
pub(super) fn hex_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}
