//! `hstore`.

use super::array::quoted;
use super::scalar::Scalar;
use super::string::write_string;

/// An object of strings and nulls. A text that is no hstore becomes a string.
pub(super) fn write(out: &mut Vec<u8>, text: &[u8]) {
    let start = out.len();
    if pairs(out, text).is_none() {
        out.truncate(start);
        write_string(out, text);
    }
}

/// `"a"=>"1", "b"=>NULL`: PostgreSQL prints every key and value in quotes.
fn pairs(out: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    let mut unescaped = Vec::new();
    let mut rest = text;
    out.push(b'{');
    while !rest.is_empty() {
        if rest.len() < text.len() {
            rest = rest.strip_prefix(b", ")?;
            out.push(b',');
        }
        rest = quoted(out, Scalar::Text, rest.strip_prefix(b"\"")?, &mut unescaped)?;
        rest = rest.strip_prefix(b"=>")?;
        out.push(b':');
        rest = if let Some(after) = rest.strip_prefix(b"NULL") {
            out.extend_from_slice(b"null");
            after
        } else {
            quoted(out, Scalar::Text, rest.strip_prefix(b"\"")?, &mut unescaped)?
        };
    }
    out.push(b'}');
    Some(())
}
