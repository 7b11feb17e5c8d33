use proptest::prelude::*;
use serde_json::{Value, json};

use super::operations;
use crate::change::Action;
use crate::sink::{Body, Target, document_id};

fn text(body: &Body) -> &str {
    std::str::from_utf8(body.as_bytes()).unwrap()
}

fn write(document: &str) -> impl FnOnce(&mut Vec<u8>) {
    move |out: &mut Vec<u8>| out.extend_from_slice(document.as_bytes())
}

#[test]
fn the_bytes_are_those_of_the_protocol() {
    let users = Target::new("users", 0);
    let mut body = Body::with_capacity(0);
    body.index(&users, b"5", 123, write(r#"{"id":5}"#));
    body.delete(&users, b"6", 123);
    body.index(&users, b"7", 124, write("{}"));
    assert_eq!(
        text(&body),
        concat!(
            r#"{"index":{"_index":"users","_id":"5","version":123,"version_type":"external_gte"}}"#,
            "\n{\"id\":5}\n",
            r#"{"delete":{"_index":"users","_id":"6","version":123,"version_type":"external_gte"}}"#,
            "\n",
            r#"{"index":{"_index":"users","_id":"7","version":124,"version_type":"external_gte"}}"#,
            "\n{}\n",
        )
    );
    assert_eq!((body.len(), body.bytes()), (3, text(&body).len()));
}

#[test]
fn handlers_choose_index_and_routing_and_scripts_have_no_version() {
    let users = Target::new("users", 0);
    let mut body = Body::default();
    body.action(&users, &Action::index("a", &json!({"x": 1})).unwrap(), 9).unwrap();
    body.action(&users, &Action::delete("b").in_index("other").routed("r\"1"), 9).unwrap();
    body.action(&users, &Action::script_update("c", json!({"script": {"source": "s"}})), 9).unwrap();
    assert_eq!(
        text(&body),
        concat!(
            r#"{"index":{"_index":"users","_id":"a","version":9,"version_type":"external_gte"}}"#,
            "\n{\"x\":1}\n",
            r#"{"delete":{"_index":"other","_id":"b","routing":"r\"1","version":9,"version_type":"external_gte"}}"#,
            "\n",
            r#"{"update":{"_index":"users","_id":"c","retry_on_conflict":3}}"#,
            "\n{\"script\":{\"source\":\"s\"}}\n",
        )
    );
}

#[test]
fn the_last_item_can_be_dropped() {
    let users = Target::new("users", 0);
    let mut body = Body::default();
    body.delete(&users, b"1", 1);
    let before = body.as_bytes().to_vec();
    body.index(&users, b"2", 2, write("{}"));
    body.truncate_last();
    assert_eq!((body.len(), body.as_bytes()), (1, &before[..]));
    body.truncate_last();
    body.truncate_last();
    assert!(body.is_empty() && body.bytes() == 0);
}

#[test]
fn line_breaks_of_json_text_do_not_become_lines() {
    let mut body = Body::default();
    body.index(&Target::new("i", 0), b"1", 1, write("{\"a\":\n\n[1,\n2]}\n"));
    assert_eq!(operations(body.as_bytes())[0].document, Some(json!({"a": [1, 2]})));
    assert_eq!(memchr::memchr_iter(b'\n', body.as_bytes()).count(), 2);
}

#[test]
fn long_and_broken_ids_become_hashes_and_stay_apart() {
    let longest = "x".repeat(512);
    assert_eq!(document_id(longest.as_bytes()), longest);
    let hash = document_id("x".repeat(513).as_bytes()).into_owned();
    assert_eq!(hash.len(), 64);
    assert!(hash.bytes().all(|byte| byte.is_ascii_hexdigit()));
    assert_ne!(document_id(b"\xff"), document_id(b"\xfe"));
    // As `sha256sum` gives it, so that other programs find the same document.
    assert_eq!(document_id(&[0xFF]).as_ref(), "a8100ae6aa1940d0b663bb31cd466142ebbdbd5187131b92d93818987832eb89");
    let mut body = Body::default();
    body.delete(&Target::new("i", 0), "x".repeat(513).as_bytes(), 1);
    body.delete(&Target::new("i", 0), b"", 1);
    let found = operations(body.as_bytes());
    assert_eq!((&found[0].id, &found[1].id), (&hash, &String::new()));
}

#[test]
fn tables_that_share_an_index_share_its_order() {
    let (first, second) = (Target::new("i", 0), Target::new("i", 1));
    assert_eq!(first.hash(b"5"), second.hash(b"5"));
    assert_ne!(first.hash(b"5"), Target::new("j", 0).hash(b"5"));
}

#[test]
fn parts_of_a_parcel_are_bulk_bodies_of_their_own() {
    let target = Target::new("i", 3);
    let mut body = Body::default();
    for id in 0..7_u32 {
        if id % 2 == 0 {
            body.delete(&target, id.to_string().as_bytes(), 1);
        } else {
            body.index(&target, id.to_string().as_bytes(), 1, write("{\"a\":1}"));
        }
    }
    let parcel = body.into_parcel();
    let ids = |bytes: &[u8]| operations(bytes).iter().map(|operation| operation.id.clone()).collect::<String>();
    let (first, second) = parcel.halves();
    assert_eq!((ids(&first.bytes), ids(&second.bytes)), ("012".to_owned(), "3456".to_owned()));
    let (left, right) = second.halves();
    assert_eq!((ids(&left.bytes), ids(&right.bytes)), ("34".to_owned(), "56".to_owned()));
    let some = right.subset(&[0]).bytes;
    assert_eq!(ids(&some), "5");
    let some = parcel.subset(&[0, 3, 6]);
    assert_eq!(ids(&some.bytes), "036");
    assert_eq!(some.lines(1).1, Some(&b"{\"a\":1}"[..]));
    assert_eq!(some.lines(2).1, None);
    assert_eq!(some.index_of(2), "i");
}

proptest! {
    #[test]
    fn any_content_keeps_its_lines(
        rows in prop::collection::vec((any::<String>(), prop::collection::vec(any::<u8>(), 0..20), ".{0,20}", any::<u64>(), any::<bool>()), 1..20)
    ) {
        let mut body = Body::default();
        for (index, id, value, version, delete) in &rows {
            let target = Target::new(index, 0);
            if *delete {
                body.delete(&target, id, *version);
            } else {
                let document = serde_json::to_string_pretty(&json!({"value": value})).unwrap();
                body.index(&target, id, *version, write(&document));
            }
        }
        prop_assert_eq!(body.len(), rows.len());
        let found = operations(body.as_bytes());
        prop_assert_eq!(found.len(), rows.len());
        for (operation, (index, id, value, version, delete)) in found.iter().zip(&rows) {
            prop_assert_eq!(&operation.index, index);
            prop_assert_eq!(&operation.id, &document_id(id).into_owned());
            prop_assert_eq!(operation.version, Some(*version));
            let document: Option<Value> = (!*delete).then(|| json!({"value": value}));
            prop_assert_eq!(&operation.document, &document);
        }
    }
}
