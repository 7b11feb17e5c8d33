//! PostgreSQL's text forms to JSON. One encoder for the copy and the stream, straight into the bulk body.
//!
//! Values are expected as a session prints them under `DateStyle=ISO`, `TimeZone=UTC`, `bytea_output=hex` and
//! `extra_float_digits=3`. Whatever else comes is written as a JSON string: every output is exactly one JSON value
//! and holds no line break.

mod array;
pub mod copy;
mod encoder;
mod geometry;
mod hstore;
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

/// Numbers in place of a `pg_type.oid` for types of extensions, whose own differ from database to database. PostgreSQL
/// counts oids up from 16384; these are the last ones.
pub mod stand_in {
    const JSON: u32 = 114;
    const JSON_ARRAY: u32 = 199;
    /// `hstore`.
    pub const HSTORE: u32 = u32::MAX - 1;
    /// `hstore[]`.
    pub const HSTORE_ARRAY: u32 = u32::MAX - 2;
    /// PostGIS's `geometry` and `geography`.
    pub const GEOMETRY: u32 = u32::MAX - 3;
    /// Arrays of them.
    pub const GEOMETRY_ARRAY: u32 = u32::MAX - 4;

    /// The number for a base type of this name, if its text has a form of its own. The texts of pgvector's are JSON.
    #[must_use]
    pub fn of(type_name: &str) -> Option<u32> {
        match type_name {
            "hstore" => Some(HSTORE),
            "geometry" | "geography" => Some(GEOMETRY),
            "vector" | "halfvec" => Some(JSON),
            _ => None,
        }
    }

    /// The number for arrays of what [`of`] gives.
    #[must_use]
    pub fn array_of(element: u32) -> Option<u32> {
        match element {
            HSTORE => Some(HSTORE_ARRAY),
            GEOMETRY => Some(GEOMETRY_ARRAY),
            JSON => Some(JSON_ARRAY),
            _ => None,
        }
    }
}

impl Kind {
    /// The kind of a built-in type by its `pg_type.oid`, or of a type of an extension by its [`stand_in`]. Any other type
    /// is text: resolve domains to their base types before.
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
/// `docs/types.md` has every type; in short:
///
/// - Integers, `oid`, `numeric` and floats: the number as printed, digit by digit; `NaN` and the infinities are null.
/// - `boolean`: true or false. `json`, `jsonb`: embedded as they are, line breaks between the tokens as spaces.
/// - `date`, `timestamp`, `timestamptz`: `2024-01-01`, `2024-01-01T10:00:00.5`, `2024-01-01T10:00:00.5+00:00`;
///   `infinity`, `-infinity` and years BC are null, for a date field takes none of them.
/// - `bytea`: a string in base64. `hstore`: an object. `geometry` in longitude and latitude: GeoJSON.
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
