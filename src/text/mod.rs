//! PostgreSQL's text forms to JSON. One encoder for the copy and the stream, straight into the bulk body.
//!
//! Values are expected as a session prints them under `DateStyle=ISO`, `TimeZone=UTC`, `bytea_output=hex` and
//! `extra_float_digits=3`. Whatever else comes is written as a JSON string: every output is exactly one JSON value
//! and holds no line break.

mod array;
pub mod copy;
mod encoder;
mod scalar;
mod string;

pub use encoder::{Encoder, RowError};
use scalar::Scalar;
pub use string::write_string;

/// How the text of a type becomes JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    scalar: Scalar,
    /// The delimiter between the elements of an array; none for a single value.
    delimiter: Option<u8>,
}

impl Kind {
    /// The kind of a built-in type by its `pg_type.oid`. Any other type is text: resolve domains to their base types
    /// before.
    ///
    /// ```
    /// use pgtide::text::{Kind, write_value};
    /// let mut out = Vec::new();
    /// write_value(&mut out, Kind::of(1184), b"2024-01-01 10:00:00.5+00");
    /// assert_eq!(out, br#""2024-01-01T10:00:00.5+00:00""#);
    /// ```
    #[must_use]
    pub fn of(type_oid: u32) -> Self {
        match array::element_of(type_oid) {
            Some((element, delimiter)) => Kind { scalar: Scalar::of(element), delimiter: Some(delimiter) },
            None => Kind { scalar: Scalar::of(type_oid), delimiter: None },
        }
    }
}

/// Appends the JSON form of a value's text to `out`: one JSON value without a line break, whatever `text` holds.
///
/// - Integers, `oid`, `numeric` and floats: the number as printed, digit by digit; `NaN` and the infinities are null.
/// - `boolean`: true or false. `json`, `jsonb`: embedded as they are, line breaks between the tokens as spaces.
/// - `date`, `timestamp`, `timestamptz`: `2024-01-01`, `2024-01-01T10:00:00.5`, `2024-01-01T10:00:00.5+00:00`;
///   `infinity`, `-infinity` and years BC are null, for a date field takes none of them.
/// - `bytea`: a string in base64.
/// - Arrays: arrays, nested by dimension, subscript bounds dropped.
/// - All else: a string.
#[inline]
pub fn write_value(out: &mut Vec<u8>, kind: Kind, text: &[u8]) {
    match kind.delimiter {
        None => scalar::write(out, kind.scalar, text),
        Some(delimiter) => array::write(out, kind.scalar, delimiter, text),
    }
}

#[cfg(test)]
mod tests;
