#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::copy::Splitter;
use super::*;
use crate::change::Field;
use crate::table::Column;

const SCALARS: [u32; 13] = [16, 17, 20, 25, 26, 114, 701, 1082, 1114, 1184, 1700, stand_in::HSTORE, stand_in::GEOMETRY];
const ARRAYS: [u32; 12] =
    [199, 1000, 1001, 1009, 1016, 1020, 1115, 1182, 1185, 1231, stand_in::HSTORE_ARRAY, stand_in::GEOMETRY_ARRAY];

fn written(oid: u32, text: &[u8]) -> String {
    let mut out = b"before".to_vec();
    write_value(&mut out, Kind::of(oid), text);
    String::from_utf8(out.split_off(6)).unwrap()
}

fn check(oid: u32, text: &str, expected: &str) {
    assert_eq!(written(oid, text.as_bytes()), expected, "{text} as {oid}");
}

#[test]
fn numbers_keep_their_digits() {
    let huge = format!("1{}.5", "0".repeat(997));
    for text in ["0", "-0", "7", "-9223372036854775808", "0.5", "12345678901234567890.10", "1e+20", "1.5e-07", &huge] {
        check(1700, text, text);
    }
    let longer = format!("-{huge}");
    check(1700, &longer, &format!("\"{longer}\""));
    for text in ["NaN", "Infinity", "-Infinity"] {
        check(701, text, "null");
    }
    for text in ["", "-", "01", ".5", "1.", "1e", "1e+", "+1", "1 ", "0x1", "1e5.5", "--1", "Inf"] {
        check(23, text, &format!("\"{text}\""));
    }
}

#[test]
fn moments_are_iso_8601_or_null() {
    check(1082, "2024-02-29", "\"2024-02-29\"");
    check(1114, "2024-01-01 10:00:00.123", "\"2024-01-01T10:00:00.123\"");
    check(1114, "12024-01-01 10:00:00", "\"12024-01-01T10:00:00\"");
    check(1184, "2024-01-01 10:00:00+00", "\"2024-01-01T10:00:00+00:00\"");
    check(1184, "2024-01-01 10:00:00-05:30", "\"2024-01-01T10:00:00-05:30\"");
    for oid in [1082, 1114, 1184] {
        check(oid, "infinity", "null");
        check(oid, "-infinity", "null");
        check(oid, "0044-03-15 BC", "null");
        check(oid, "24 Jan\n2024", "\"24 Jan\\n2024\"");
    }
    check(1114, "0044-03-15 12:00:00 BC", "null");
}

#[test]
fn booleans_json_and_bytes() {
    check(16, "t", "true");
    check(16, "f", "false");
    check(16, "true", "\"true\"");
    check(3802, r#"{"a": [1, "x\n"]}"#, r#"{"a": [1, "x\n"]}"#);
    check(114, "{\r\n \"a\" :\n1}\n", "{   \"a\" : 1} ");
    check(114, "{\"a\":1", "\"{\\\"a\\\":1\"");
    check(114, "1 2", "\"1 2\"");
    check(114, "", "\"\"");
    check(114, "\"a\nb\"", "\"\\\"a\\nb\\\"\"");
    assert_eq!(written(114, b"\"\xFF\""), "\"\\\"\u{FFFD}\\\"\"");
    check(17, "\\x", "\"\"");
    check(17, "\\x00ff10", "\"AP8Q\"");
    check(17, "\\xDEadbe0F", "\"3q2+Dw==\"");
    check(17, "\\xabc", "\"\\\\xabc\"");
    check(17, "\\xzz", "\"\\\\xzz\"");
}

#[test]
fn long_bytes_join_up() {
    use base64::Engine;
    for length in [767, 768, 769, 5000] {
        let bytes: Vec<u8> = (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = format!("\"{}\"", base64::engine::general_purpose::STANDARD.encode(bytes));
        check(17, &format!("\\x{hex}"), &expected);
    }
}

#[test]
fn arrays_nest_and_unescape() {
    check(1007, "{}", "[]");
    check(1007, "{1,NULL,-3}", "[1,null,-3]");
    check(1007, "{{1,2},{3,4}}", "[[1,2],[3,4]]");
    check(1007, "[2:3]={5,6}", "[5,6]");
    check(1007, "[0:0][-1:0]={{5,6}}", "[[5,6]]");
    check(
        1009,
        r#"{a,"NULL",NULL,"","x,y","q\"b\\s","new
line"}"#,
        r#"["a","NULL",null,"","x,y","q\"b\\s","new\nline"]"#,
    );
    check(1000, "{t,f}", "[true,false]");
    check(3807, r#"{"{\"a\": [1, 2]}",null,7}"#, r#"[{"a": [1, 2]},null,7]"#);
    check(1115, r#"{"2024-01-01 10:00:00",infinity}"#, r#"["2024-01-01T10:00:00",null]"#);
    check(1185, r#"{"2024-01-01 10:00:00+00"}"#, r#"["2024-01-01T10:00:00+00:00"]"#);
    check(1001, r#"{"\\xff00"}"#, r#"["/wA="]"#);
    check(1020, "{(1,1),(0,0);(2,2),(1,1)}", r#"["(1,1),(0,0)","(2,2),(1,1)"]"#);
    check(1022, "{NaN,1e+20}", "[null,1e+20]");
    for broken in ["", "1", "{", "}", "{1", "{1,", "{1,}", "{,1}", "{1}}", "{1}2", "{{1}", "[1:2]", "{{{{{{{1}}}}}}}"] {
        let expected = format!("\"{broken}\"");
        check(1007, broken, &expected);
    }
    check(1009, r#"{"a"#, r#""{\"a""#);
    check(1009, r#"{"a\"#, r#""{\"a\\""#);
}

#[test]
fn types_by_oid() {
    // uuid, interval, inet, money, int4range, point and a type that is no built-in one.
    for oid in [2950, 1186, 869, 790, 3904, 600, 123_456] {
        check(oid, "1", "\"1\"");
    }
    for oid in [20, 21, 23, 26, 700, 701, 1700] {
        check(oid, "1", "1");
    }
}

#[test]
fn strings_escape_what_json_wants() {
    let all: String = (0..=0x7F_u8).map(char::from).chain("\u{2028}\u{e9}\u{1F600}".chars()).collect();
    let text = written(25, all.as_bytes());
    assert_eq!(serde_json::from_str::<String>(&text).unwrap(), all);
    assert!(text.contains('\u{2028}') && text.contains("\\u001b") && text.contains("\\n"), "{text}");
    assert_eq!(written(25, b"a\xFF\xFEb\xE2\x82"), "\"a\u{FFFD}\u{FFFD}b\u{FFFD}\"");
    // Every place within a word, with neighbours that a borrow could touch.
    for at in 0..40 {
        for byte in [0, 0x1F, b' ', b'!', b'"', b'#', b'[', b'\\', b']', 0x7F] {
            let mut bytes = vec![byte.wrapping_add(1) & 0x7F; 40];
            bytes[at] = byte;
            let text = String::from_utf8(bytes).unwrap();
            assert_eq!(serde_json::from_str::<String>(&written(25, text.as_bytes())).unwrap(), text);
        }
    }
}

#[test]
fn hstore_is_an_object_of_strings() {
    let hstore = stand_in::HSTORE;
    check(hstore, "", "{}");
    check(hstore, r#""a"=>"1", "b\"c\\"=>NULL, ""=>"NULL""#, r#"{"a":"1","b\"c\\":null,"":"NULL"}"#);
    check(stand_in::HSTORE_ARRAY, r#"{"\"a\"=>\"1\"",NULL,""}"#, r#"[{"a":"1"},null,{}]"#);
    for broken in
        ["a=>1", "\"a\"", "\"a\"=>", "\"a\"=>1", "\"a\"=>\"1\",", "\"a\"=>\"1\" ", "\"a\"=>\"1", ", \"a\"=>NULL"]
    {
        let expected = serde_json::to_string(broken).unwrap();
        check(hstore, broken, &expected);
    }
}

/// EWKB by its definition: byte order, kind with flags, system, numbers.
fn ewkb(parts: &[&[u8]]) -> String {
    parts.concat().iter().map(|byte| format!("{byte:02X}")).collect()
}

fn doubles(values: &[f64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[test]
fn geometries_in_degrees_are_geo_json() {
    let geometry = stand_in::GEOMETRY;
    let head = |kind: u32, srid: u32| [&[1][..], &(kind | 0x2000_0000).to_le_bytes(), &srid.to_le_bytes()].concat();
    let part = |kind: u32| [&[1][..], &kind.to_le_bytes()].concat();
    let count = |count: u32| count.to_le_bytes();
    let (one, two, three) = (doubles(&[1.0, 2.5]), doubles(&[-3.0, 4.0]), doubles(&[1e-7, 180.0]));

    // SELECT 'SRID=4326;POINT(13 52.5)'::geometry
    let point = "0101000020E61000000000000000002A400000000000404A40";
    check(geometry, point, r#"{"type":"Point","coordinates":[13.0,52.5]}"#);
    let big = ewkb(&[&[0, 0x20, 0, 0, 1, 0, 0, 0x10, 0xE6], &1.0_f64.to_be_bytes(), &2.5_f64.to_be_bytes()]);
    check(geometry, &big, r#"{"type":"Point","coordinates":[1.0,2.5]}"#);
    let height = ewkb(&[&head(0x8000_0001, 4326), &doubles(&[1.0, 2.0, 3.0])]);
    check(geometry, &height, r#"{"type":"Point","coordinates":[1.0,2.0,3.0]}"#);
    let measure = ewkb(&[&head(0x4000_0001, 4326), &doubles(&[1.0, 2.0, 3.0])]);
    check(geometry, &measure, r#"{"type":"Point","coordinates":[1.0,2.0]}"#);
    let line = ewkb(&[&head(2, 4326), &count(2), &one, &two]);
    check(geometry, &line, r#"{"type":"LineString","coordinates":[[1.0,2.5],[-3.0,4.0]]}"#);
    let polygon = ewkb(&[&head(3, 4326), &count(2), &count(1), &one, &count(0)]);
    check(geometry, &polygon, r#"{"type":"Polygon","coordinates":[[[1.0,2.5]],[]]}"#);
    let points = ewkb(&[&head(4, 4326), &count(2), &part(1), &one, &part(1), &three]);
    check(geometry, &points, r#"{"type":"MultiPoint","coordinates":[[1.0,2.5],[1e-7,180.0]]}"#);
    let lines = ewkb(&[&head(5, 4326), &count(1), &part(2), &count(1), &two]);
    check(geometry, &lines, r#"{"type":"MultiLineString","coordinates":[[[-3.0,4.0]]]}"#);
    let polygons = ewkb(&[&head(6, 4326), &count(1), &part(3), &count(1), &count(1), &two]);
    check(geometry, &polygons, r#"{"type":"MultiPolygon","coordinates":[[[[-3.0,4.0]]]]}"#);
    let collection = ewkb(&[&head(7, 4326), &count(2), &part(1), &one, &part(7), &count(0)]);
    let expected = r#"{"type":"GeometryCollection","geometries":[{"type":"Point","coordinates":[1.0,2.5]},{"type":"GeometryCollection","geometries":[]}]}"#;
    check(geometry, &collection, expected);
    check(
        stand_in::GEOMETRY_ARRAY,
        &format!("{{{point}:NULL}}"),
        r#"[{"type":"Point","coordinates":[13.0,52.5]},null]"#,
    );
    check(geometry, &ewkb(&[&head(1, 4326), &doubles(&[f64::NAN, f64::NAN])]), "null");

    // Another system, or none; a curve; a list of other things than it says; too deep; too short; too long; no binary form.
    let deep = [head(7, 4326), [part(7).as_slice(), &[]].concat()].concat();
    let deep = ewkb(&[&deep[..9], &[&count(1)[..], &part(7)].concat().repeat(40), &count(0)]);
    let others = [
        ewkb(&[&head(1, 3857), &one]),
        ewkb(&[&part(1), &one]),
        ewkb(&[&head(8, 4326), &count(0)]),
        ewkb(&[&head(4, 4326), &count(1), &part(2), &count(0)]),
        deep,
        ewkb(&[&head(2, 4326), &count(u32::MAX), &one]),
        ewkb(&[&head(1, 4326), &one, &[0]]),
        "POINT(1 2)".to_owned(),
        point[1..].to_owned(),
        "02".to_owned(),
        String::new(),
    ];
    for other in others {
        check(geometry, &other, &format!("\"{other}\""));
    }
}

fn fields(line: &[u8]) -> Vec<Option<Vec<u8>>> {
    let mut splitter = Splitter::default();
    let own = |field| match field {
        Field::Text(text) => Some(text.to_vec()),
        Field::Null => None,
        Field::Unchanged => panic!("COPY sends every value"),
    };
    splitter.split(b"left\\nover\t\\N");
    splitter.split(line).iter().map(own).collect()
}

#[test]
fn copy_lines_split_and_unescape() {
    let some = |text: &[u8]| Some(text.to_vec());
    assert_eq!(fields(b"1\ta b\t\n"), [some(b"1"), some(b"a b"), some(b"")]);
    assert_eq!(fields(b"\n"), [some(b"")]);
    assert_eq!(fields(b""), [some(b"")]);
    assert_eq!(fields(b"\\N\t\\N"), [None, None]);
    assert_eq!(fields(b"\\\\N\tx\\N"), [some(b"\\N"), some(b"xN")]);
    assert_eq!(fields(b"\\b\\f\\n\\r\\t\\v\\\\\\q\tz\n"), [some(b"\x08\x0C\n\r\t\x0B\\q"), some(b"z")]);
    assert_eq!(fields(b"\\101\\60\\7z\\x41\\x4z\\xz\\1234"), [some(b"A0\x07zA\x04zxzS4")]);
    assert_eq!(fields(b"end\\"), [some(b"end\\")]);
    let mut splitter = Splitter::default();
    let line = splitter.split(b"a\t\\N\t\\\\");
    assert_eq!(line.len(), 3);
    assert_eq!((line.get(1), line.get(2), line.get(3)), (Some(Field::Null), Some(Field::Text(b"\\")), None));
}

fn column(name: &str, type_oid: u32) -> Column {
    Column { name: name.to_owned(), type_oid, key: false }
}

#[test]
fn rows_become_objects_or_leave_no_trace() {
    let encoder = Encoder::new(&[column("id", 20), column("odd\n\"name", 25), column("at", 1114)]);
    let mut out = b"x".to_vec();
    encoder.row(&mut out, [Field::Text(b"7"), Field::Text(b"a\nb"), Field::Null]).unwrap();
    assert_eq!(out, br#"x{"id":7,"odd\n\"name":"a\nb","at":null}"#);
    let hole = [Field::Text(b"7"), Field::Unchanged, Field::Null];
    out.truncate(1);
    assert_eq!(encoder.row(&mut out, hole), Err(RowError::Unchanged(1)));
    assert_eq!(encoder.row(&mut out, [Field::Null; 2]), Err(RowError::Fields { columns: 3, fields: 2 }));
    assert_eq!(encoder.row(&mut out, [Field::Null; 4]), Err(RowError::Fields { columns: 3, fields: 4 }));
    assert_eq!(out, b"x");
    let filled = encoder.row_with(&mut out, hole, |out, at| {
        out.extend_from_slice(at.to_string().as_bytes());
        true
    });
    assert_eq!(filled, Ok(()));
    assert_eq!(out, br#"x{"id":7,"odd\n\"name":1,"at":null}"#);
    let mut empty = Vec::new();
    Encoder::new(&[]).row(&mut empty, []).unwrap();
    assert_eq!(empty, b"{}");
}

/// Arrays, numbers and moments are rare among arbitrary bytes, so half of the texts are made of their letters.
fn texts() -> impl Strategy<Value = Vec<u8>> {
    let letters = prop::sample::select(b"{}[],;:=>\"\\\n\r NULtfxe+-.0123456789aBC\xC3\xA9".to_vec());
    prop_oneof![prop::collection::vec(any::<u8>(), 0..80), prop::collection::vec(letters, 0..40)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn any_text_becomes_one_json_value_on_one_line(text in texts()) {
        for oid in SCALARS.into_iter().chain(ARRAYS) {
            let json = written(oid, &text);
            prop_assert!(serde_json::from_str::<IgnoredAny>(&json).is_ok(), "{oid}: {json}");
            // JSON of the database may be indented by tabs.
            prop_assert!(json.bytes().all(|byte| byte >= 0x20 || byte == b'\t' && [114, 199].contains(&oid)), "{json}");
        }
    }

    #[test]
    fn any_bytes_as_a_geometry_are_one_json_value(
        parts in prop::collection::vec(prop_oneof![
            (0..9_u32).prop_map(|kind| [&[1][..], &kind.to_le_bytes()].concat()),
            (0..3_u32).prop_map(|count| count.to_le_bytes().to_vec()),
            any::<f64>().prop_map(|value| value.to_le_bytes().to_vec()),
            prop::collection::vec(any::<u8>(), 0..5),
        ], 0..12),
        kind in 0..9_u32,
    ) {
        let head = [&[1][..], &(kind | 0x2000_0000).to_le_bytes(), &4326_u32.to_le_bytes()].concat();
        let json = written(stand_in::GEOMETRY, ewkb(&[&head, &parts.concat()]).as_bytes());
        prop_assert!(serde_json::from_str::<IgnoredAny>(&json).is_ok(), "{json}");
    }

    #[test]
    fn any_string_round_trips(text in any::<String>()) {
        let json = written(25, text.as_bytes());
        prop_assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
    }

    #[test]
    fn any_array_of_texts_round_trips(elements in prop::collection::vec(prop::option::of(".*"), 1..8)) {
        let quote = |text: &String| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        let parts: Vec<String> =
            elements.iter().map(|element| element.as_ref().map_or("NULL".to_owned(), quote)).collect();
        let json = written(1009, format!("{{{}}}", parts.join(",")).as_bytes());
        prop_assert_eq!(serde_json::from_str::<Value>(&json).unwrap(), json!(elements));
    }

    #[test]
    fn any_copy_line_round_trips(values in prop::collection::vec(prop::option::of(any::<Vec<u8>>()), 1..6)) {
        let mut line = Vec::new();
        for (at, value) in values.iter().enumerate() {
            if at > 0 {
                line.push(b'\t');
            }
            for &byte in value.as_deref().unwrap_or(b"") {
                match byte {
                    b'\t' => line.extend_from_slice(b"\\t"),
                    b'\n' => line.extend_from_slice(b"\\n"),
                    b'\\' => line.extend_from_slice(b"\\\\"),
                    other => line.push(other),
                }
            }
            if value.is_none() {
                line.extend_from_slice(b"\\N");
            }
        }
        line.push(b'\n');
        prop_assert_eq!(fields(&line), values);
    }

    #[test]
    fn no_copy_line_panics(line in prop::collection::vec(prop::sample::select(b"\\xN017\tab\n".to_vec()), 0..30)) {
        prop_assert_eq!(fields(&line).len(), line.iter().filter(|&&byte| byte == b'\t').count() + 1);
    }
}
