//! Arrays.

use super::scalar::{self, Scalar};
use super::stand_in::{GEOMETRY, GEOMETRY_ARRAY, HSTORE, HSTORE_ARRAY};
use super::string::write_string;

/// PostgreSQL's `MAXDIM`.
const MAX_DIMENSIONS: usize = 6;

/// The element type and the delimiter of an array type.
pub(super) fn element_of(array_oid: u32) -> Option<(u32, u8)> {
    let element = match array_oid {
        143 => 142,   // xml
        199 => 114,   // json
        271 => 5069,  // xid8
        629 => 628,   // line
        651 => 650,   // cidr
        719 => 718,   // circle
        775 => 774,   // macaddr8
        791 => 790,   // money
        1000 => 16,   // bool
        1001 => 17,   // bytea
        1002 => 18,   // "char"
        1003 => 19,   // name
        1005 => 21,   // int2
        1006 => 22,   // int2vector
        1007 => 23,   // int4
        1008 => 24,   // regproc
        1009 => 25,   // text
        1010 => 27,   // tid
        1011 => 28,   // xid
        1012 => 29,   // cid
        1013 => 30,   // oidvector
        1014 => 1042, // bpchar
        1015 => 1043, // varchar
        1016 => 20,   // int8
        1017 => 600,  // point
        1018 => 601,  // lseg
        1019 => 602,  // path
        1020 => 603,  // box
        1021 => 700,  // float4
        1022 => 701,  // float8
        1027 => 604,  // polygon
        1028 => 26,   // oid
        1034 => 1033, // aclitem
        1040 => 829,  // macaddr
        1041 => 869,  // inet
        1115 => 1114, // timestamp
        1182 => 1082, // date
        1183 => 1083, // time
        1185 => 1184, // timestamptz
        1187 => 1186, // interval
        1231 => 1700, // numeric
        1263 => 2275, // cstring
        1270 => 1266, // timetz
        1561 => 1560, // bit
        1563 => 1562, // varbit
        2201 => 1790, // refcursor
        2207 => 2202, // regprocedure
        2208 => 2203, // regoper
        2209 => 2204, // regoperator
        2210 => 2205, // regclass
        2211 => 2206, // regtype
        2949 => 2970, // txid_snapshot
        2951 => 2950, // uuid
        3221 => 3220, // pg_lsn
        3643 => 3614, // tsvector
        3644 => 3642, // gtsvector
        3645 => 3615, // tsquery
        3735 => 3734, // regconfig
        3770 => 3769, // regdictionary
        3807 => 3802, // jsonb
        3905 => 3904, // int4range
        3907 => 3906, // numrange
        3909 => 3908, // tsrange
        3911 => 3910, // tstzrange
        3913 => 3912, // daterange
        3927 => 3926, // int8range
        4073 => 4072, // jsonpath
        4090 => 4089, // regnamespace
        4097 => 4096, // regrole
        4192 => 4191, // regcollation
        5039 => 5038, // pg_snapshot
        6150 => 4451, // int4multirange
        6151 => 4532, // nummultirange
        6152 => 4533, // tsmultirange
        6153 => 4534, // tstzmultirange
        6155 => 4535, // datemultirange
        6157 => 4536, // int8multirange
        HSTORE_ARRAY => HSTORE,
        GEOMETRY_ARRAY => GEOMETRY,
        _ => return None,
    };
    let delimiter = match array_oid {
        1020 => b';',
        GEOMETRY_ARRAY => b':',
        _ => b',',
    };
    Some((element, delimiter))
}

/// A text that is no array of PostgreSQL's becomes a string.
pub(super) fn write(out: &mut Vec<u8>, element: Scalar, delimiter: u8, text: &[u8]) {
    let start = out.len();
    if elements(out, element, delimiter, text).is_none() {
        out.truncate(start);
        write_string(out, text);
    }
}

fn elements(out: &mut Vec<u8>, element: Scalar, delimiter: u8, text: &[u8]) -> Option<()> {
    let mut rest = text;
    if rest.starts_with(b"[") {
        // Subscript bounds: [2:3][0:1]={...}
        rest = &rest[memchr::memchr(b'=', rest)? + 1..];
    }
    let mut unescaped = Vec::new();
    let mut depth = 0;
    loop {
        match *rest.first()? {
            b'{' => {
                depth += 1;
                if depth > MAX_DIMENSIONS {
                    return None;
                }
                out.push(b'[');
                rest = &rest[1..];
                if rest.first() != Some(&b'}') {
                    continue;
                }
            }
            _ if depth == 0 => return None,
            b'"' => rest = quoted(out, element, &rest[1..], &mut unescaped)?,
            _ => {
                let end = rest.iter().position(|&byte| byte == delimiter || byte == b'}')?;
                match &rest[..end] {
                    b"" => return None,
                    b"NULL" => out.extend_from_slice(b"null"),
                    value => scalar::write(out, element, value),
                }
                rest = &rest[end..];
            }
        }
        loop {
            if depth == 0 {
                return rest.is_empty().then_some(());
            }
            let (&next, after) = rest.split_first()?;
            rest = after;
            if next == delimiter {
                out.push(b',');
                break;
            }
            if next != b'}' {
                return None;
            }
            out.push(b']');
            depth -= 1;
        }
    }
}

/// Writes the element that ends at the next quote without a backslash, and gives what comes after that quote.
pub(super) fn quoted<'a>(
    out: &mut Vec<u8>,
    element: Scalar,
    text: &'a [u8],
    unescaped: &mut Vec<u8>,
) -> Option<&'a [u8]> {
    let mut end = memchr::memchr2(b'"', b'\\', text)?;
    if text[end] == b'"' {
        scalar::write(out, element, &text[..end]);
        return Some(&text[end + 1..]);
    }
    unescaped.clear();
    let mut start = 0;
    loop {
        unescaped.extend_from_slice(&text[start..end]);
        if text[end] == b'"' {
            scalar::write(out, element, unescaped);
            return Some(&text[end + 1..]);
        }
        unescaped.push(*text.get(end + 1)?);
        start = end + 2;
        end = start + memchr::memchr2(b'"', b'\\', &text[start..])?;
    }
}
