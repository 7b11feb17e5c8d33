use crate::sink::body::{Body, Item, Kind, Target};
use crate::sink::response::{ErrorText, Items, Verdict, describe, judge, read, redact};

fn verdict(kind: Kind, status: u16, error: &str) -> Verdict {
    let text = ErrorText { kind: error.into(), reason: "r".into() };
    judge(kind, status, (!error.is_empty()).then_some(&text))
}

#[test]
fn every_answer_has_its_verdict() {
    let busy = Verdict::Retry { throttled: true };
    let again = Verdict::Retry { throttled: false };
    let table = [
        (200, "", Verdict::Ok),
        (201, "", Verdict::Ok),
        (409, "version_conflict_engine_exception", Verdict::Superseded),
        (429, "es_rejected_execution_exception", busy),
        (429, "rejected_execution_exception", busy),
        (429, "circuit_breaking_exception", busy),
        (429, "cluster_block_exception", Verdict::Wait),
        (403, "cluster_block_exception", Verdict::Wait),
        (403, "security_exception", Verdict::Wait),
        (400, "index_closed_exception", Verdict::Wait),
        (404, "index_not_found_exception", Verdict::Wait),
        (503, "unavailable_shards_exception", again),
        (408, "", again),
        (500, "", again),
        (502, "", again),
        (504, "", again),
        (400, "mapper_parsing_exception", Verdict::Reject),
        (400, "document_parsing_exception", Verdict::Reject),
        (400, "strict_dynamic_mapping_exception", Verdict::Reject),
        (400, "illegal_argument_exception", Verdict::Reject),
        (400, "invalid_index_name_exception", Verdict::Wait),
        (413, "", Verdict::Reject),
    ];
    for (status, error, wanted) in table {
        for kind in [Kind::Index, Kind::Delete] {
            assert_eq!(verdict(kind, status, error), wanted, "{kind:?} {status} {error}");
        }
    }
    assert_eq!(verdict(Kind::Delete, 404, ""), Verdict::Ok);
    assert_eq!(verdict(Kind::Index, 404, ""), Verdict::Reject);
    // A script that met another writer was not carried out.
    assert_eq!(verdict(Kind::Update, 409, "version_conflict_engine_exception"), again);
    assert_eq!(verdict(Kind::Update, 409, ""), again);
    assert_eq!(verdict(Kind::Update, 404, "document_missing_exception"), Verdict::Reject);
}

#[test]
fn an_alias_that_cannot_be_written_is_no_fault_of_the_document() {
    let reason = "no write index is defined for alias [users]. The write index may be explicitly disabled";
    let error = ErrorText { kind: "illegal_argument_exception".into(), reason: reason.into() };
    assert_eq!(judge(Kind::Index, 400, Some(&error)), Verdict::Wait);
}

fn sent() -> Vec<Item> {
    let (mut body, target) = (Body::default(), Target::new("i", 0));
    body.index(&target, b"1", 1, |out| out.extend_from_slice(b"{}"));
    body.delete(&target, b"2", 1);
    body.into_parcel().items
}

#[test]
fn answers_that_cannot_be_right_are_refused() {
    let sent = sent();
    for wrong in [
        "",
        "{}",
        "null",
        r#"{"errors":false}"#,
        r#"{"errors":false,"items":[]}"#,
        r#"{"errors":false,"items":[{"index":{"status":200}}]}"#,
        r#"{"errors":false,"items":[{"index":{"status":200}},{"delete":{"status":200}}"#,
        r#"{"errors":false,"items":[{"index":{"status":200}},{"delete":{"status":200}},{"index":{"status":200}}]}"#,
        r#"{"errors":true,"items":[{"index":{"status":200}},{"delete":{"sta"#,
        r#"{"errors":true,"items":[{"index":{"status":200}}]}"#,
        r#"{"errors":true,"items":[{"index":{"status":200}},{"index":{"status":200}}]}"#,
        r#"{"errors":true,"items":[{"index":{"status":200}},{"delete":{}}]}"#,
        "<html>busy</html>",
    ] {
        assert!(read(wrong.as_bytes(), &sent).is_err(), "taken: {wrong}");
    }
}

#[test]
fn right_answers_are_read_with_and_without_the_filter() {
    let sent = sent();
    let quick = br#"{"errors":false,"items":[{"index":{"status":200}},{"delete":{"status":404}}]}"#;
    assert!(matches!(read(quick, &sent), Ok(Items::AllOk)));
    let whole = br#"{"took":3,"errors":true,"items":[{"index":{"_index":"i","_id":"1","status":400,"error":{"type":"t","reason":"a\u00e4\"","caused_by":{"type":"x"}}}},{"delete":{"_version":3,"status":200}}]}"#;
    let Ok(Items::Each(items)) = read(whole, &sent) else { panic!("not read") };
    assert_eq!((items[0].status, items[1].status), (400, 200));
    let error = items[0].error.as_ref().unwrap();
    assert_eq!((error.kind.as_ref(), error.reason.as_ref()), ("t", "aä\""));
    let silent = br#"{"errors":true,"items":[{"index":{"status":500,"error":{"type":"null_pointer_exception","reason":null}}},{"delete":{"status":200}}]}"#;
    let Ok(Items::Each(items)) = read(silent, &sent) else { panic!("not read") };
    assert_eq!(describe(500, items[0].error.as_ref()), "500 null_pointer_exception");
    // An error under `errors: false` is not taken for a success.
    let odd = br#"{"errors":false,"items":[{"index":{"status":400,"error":{"type":"t"}}},{"delete":{"status":200}}]}"#;
    assert!(matches!(read(odd, &sent), Ok(Items::Each(_))));
}

#[test]
fn reasons_lose_the_values_they_quote() {
    let table = [
        (
            "failed to parse field [age] of type [long] in document with id '5'. Preview of field's value: 'SECRET'",
            "failed to parse field [age] of type [long]",
        ),
        (
            "[1:26] failed to parse field [age] of type [long] in document with id '5'. Preview of field's value: 'SECRET'",
            "failed to parse field [age] of type [long]",
        ),
        ("failed to parse date field [SECRET] with format [SECRET]", "failed to parse date field [..]"),
        ("For input string: \"SECRET\"", ""),
        (
            "Failed to parse value [SECRET] as only [true] or [false] are allowed.",
            "Failed to parse value [..] are allowed.",
        ),
        ("Numeric value (4711) out of range of long (-1 - 2)", "Numeric value (..)"),
        ("'SECRET's own' is not an IP string literal.", "'..' is not an IP string literal."),
        (
            "mapping set to strict, dynamic introduction of [extra] within [_doc] is not allowed",
            "mapping set to strict, dynamic introduction of [extra] within [_doc] is not allowed",
        ),
        ("Value [4711] is out of range for a byte", "Value [..] is out of range for a byte"),
        (
            "object mapping for [a] tried to parse field [a] as object, but found a concrete value",
            "object mapping for [a] tried to parse field [a] as object, but found a concrete value",
        ),
        (
            "Document contains at least one immense term in field=\"body\" (whose UTF8 encoding is longer than the max \
             length 32766), all of which were skipped. The prefix of the first immense term is: '[83, 69]...'",
            "Document contains at least one immense term in field=\"..\" (..), all of which were skipped",
        ),
        ("open ['SECRET", "open [..]"),
        ("no such index [users]", "no such index [users]"),
        (
            "index [users] blocked by: [TOO_MANY_REQUESTS/12/disk usage exceeded flood-stage watermark];",
            "index [users] blocked by: [TOO_MANY_REQUESTS/12/disk usage exceeded flood-stage watermark];",
        ),
    ];
    for (reason, wanted) in table {
        assert_eq!(redact(reason), wanted);
    }
    assert!(redact(&"word ".repeat(200)).len() < 260);
    let error = ErrorText { kind: "a\x1b[2J".into(), reason: "b\x1b]0;x\x07".into() };
    assert!(!describe(400, Some(&error)).contains('\x1b'));
}
