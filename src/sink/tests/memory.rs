//! Rejections for want of memory, in the words of Elasticsearch 9.5.3, 7.17.29 and OpenSearch 2.19.6.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use super::deliver::{body, deliver};
use super::{Reply, Request, Server, all_ok, bulk_answer, sink};
use crate::sink::Delivered;
use crate::sink::memory::is_too_large;

fn primary(there: u64, operation: u64) -> String {
    format!(
        "rejected execution of primary operation [coordinating_and_primary_bytes={there}, replica_bytes=0, \
         all_bytes={there}, primary_operation_bytes={operation}, max_primary_bytes=53687091]"
    )
}

fn coordinating(there: u64, operation: u64) -> String {
    format!(
        "rejected execution of coordinating operation [coordinating_and_primary_bytes={there}, replica_bytes=0, \
         all_bytes={there}, coordinating_operation_bytes={operation}, max_coordinating_and_primary_bytes=53687091]"
    )
}

#[test]
fn what_others_fill_is_told_from_what_is_too_large() {
    // Each as it was seen, with the body that it was the answer to.
    assert!(is_too_large(&primary(20_971_732, 83_886_128), 20_971_572, 1));
    assert!(is_too_large(&primary(11_534_548, 46_137_392), 11_534_388, 1), "the request and its operation together");
    assert!(is_too_large(&primary(31_457_704, 62_914_608), 31_457_384, 2));
    assert!(is_too_large(&coordinating(0, 62_914_772), 62_914_612, 1));
    assert!(is_too_large(&coordinating(53_000_000, 62_914_772), 62_914_612, 1), "whatever others do");
    let large = "Request contains an operation of size [62914772] bytes, which exceeds the maximum allowed limit of \
                 [53687091] bytes";
    assert!(is_too_large(large, 1000, 3));

    assert!(!is_too_large(&primary(41_534_548, 46_137_392), 11_534_388, 1), "others are there");
    assert!(!is_too_large(&primary(9_000_000, 46_137_392), 11_534_388, 1), "others on a node that did not take it");
    assert!(!is_too_large(&coordinating(51_472_960, 2_480_713), 2_480_553, 1));
    // Before the request itself is counted, what is there are others, be it as much.
    assert!(!is_too_large(&coordinating(31_457_384, 31_457_544), 31_457_384, 1));
}

#[test]
fn figures_that_are_not_understood_say_nothing() {
    let whole = primary(20_971_732, 83_886_128);
    assert!(is_too_large(&whole, 20_971_572, 1));
    for cut in 0..whole.len() {
        assert!(!is_too_large(&whole[..cut], 20_971_572, 1), "{}", &whole[..cut]);
    }
    for wrong in [
        whole.replace("=83886128", "=eighty"),
        whole.replace("=83886128", "=-1"),
        whole.replace("=83886128", "=99999999999999999999999"),
        whole.replace("max_primary_bytes", "max_bytes"),
        whole.replace("primary_operation_bytes", "max_primary_bytes"),
        whole.replace("primary_operation_bytes", "replica_operation_bytes"),
        "Request contains an operation of size [9] bytes, which exceeds the maximum allowed limit of [a] bytes".into(),
        "rejected execution of org.elasticsearch.action.bulk on EsThreadPoolExecutor[name = n/write, queue capacity = 1]"
            .into(),
    ] {
        assert!(!is_too_large(&wrong, 20_971_572, 1), "{wrong}");
    }
}

fn busy(reason: &str) -> (u16, Value) {
    (429, json!({"type": "es_rejected_execution_exception", "reason": reason}))
}

/// All items of a request with the document `6` are refused, as a node does with those of one shard.
fn refuses_six(request: &Request) -> Value {
    let operations = request.operations();
    let large = operations.iter().any(|operation| operation.id == "6");
    bulk_answer(&operations, |_, operation| match operation.id.as_str() {
        "1" => (200, Value::Null),
        _ if large => busy(&primary(20_971_732, 83_886_128)),
        _ => (200, Value::Null),
    })
}

#[tokio::test]
async fn a_document_too_large_for_the_node_is_a_dead_letter_and_its_neighbours_pass() {
    let server = Server::start(|_, request| Reply::json(200, &refuses_six(request))).await;
    let (sink, folder) = sink(&server.url);
    let delivered = deliver(&sink, body(&["1", "2", "3", "6", "5"])).await;
    assert_eq!(delivered, Delivered { ok: 4, superseded: 0, rejected: 1 });
    let sent: Vec<String> = server.requests().iter().map(|request| request.ids().concat()).collect();
    assert_eq!(sent, ["12365", "23", "65", "6", "5"]);
    let letters = std::fs::read_to_string(folder.path().join("dead.ndjson")).unwrap();
    let letter: Value = serde_json::from_str(letters.trim()).unwrap();
    assert_eq!((&letter["status"], &letter["document"]), (&json!(429), &json!({"id": "6"})));
    assert!(letter["reason"].as_str().unwrap().contains("max_primary_bytes=53687091"), "{letter}");
    let stats = sink.stats();
    assert_eq!(stats.throttled, 0, "nothing is sent more slowly for it");
    let reason = &stats.rejections[0].rejection.reason;
    assert!(reason.contains("needs more memory than indexing_pressure.memory.limit allows"), "{reason}");
}

#[tokio::test]
async fn a_request_too_large_for_the_node_is_halved() {
    let server = Server::start(|_, request| {
        if request.ids().len() > 2 || request.ids().contains(&"6".to_owned()) {
            Reply::error(429, "rejected_execution_exception", &coordinating(0, 62_914_772))
        } else {
            Reply::json(200, &all_ok(request))
        }
    })
    .await;
    let (sink, _folder) = sink(&server.url);
    let delivered = deliver(&sink, body(&["1", "2", "3", "4", "5", "6"])).await;
    assert_eq!(delivered, Delivered { ok: 5, superseded: 0, rejected: 1 });
}

#[tokio::test]
async fn a_node_that_others_fill_is_waited_for() {
    let whole = AtomicBool::new(false);
    let server = Server::start(move |number, request| {
        if number >= 20 {
            return Reply::json(200, &all_ok(request));
        }
        let reason = primary(41_534_548, 46_137_392);
        if whole.fetch_xor(true, Ordering::SeqCst) {
            Reply::error(429, "es_rejected_execution_exception", &reason)
        } else {
            Reply::json(200, &bulk_answer(&request.operations(), |_, _| busy(&reason)))
        }
    })
    .await;
    let (sink, _folder) = sink(&server.url);
    assert_eq!(deliver(&sink, body(&["1", "2"])).await, Delivered { ok: 2, superseded: 0, rejected: 0 });
    let requests = server.requests();
    assert!(requests.len() == 21 && requests.iter().all(|request| request.ids() == ["1", "2"]), "it was split");
    assert_eq!(sink.stats().throttled, 30);
}
