//! Elasticsearch: not there, not for us, not Elasticsearch.

use pgtide::store::{Options, Store};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::case::{Case, STORE_PASSWORD, free_port, loopback};

/// An HTTP server that is no Elasticsearch.
async fn web_server() -> u16 {
    let listener = tokio::net::TcpListener::bind(loopback(0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let page = "<h1>It works!</h1>";
                let reply = format!(
                    "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{page}",
                    page.len()
                );
                let _ = stream.write_all(reply.as_bytes()).await;
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn an_elasticsearch_that_is_not_there_or_not_for_us() {
    let mut case = Case::new().await;
    let good = case.config.clone();
    let url = |port: u16| json!([format!("http://127.0.0.1:{port}")]);

    let down = free_port();
    case.set("/elasticsearch/urls", url(down));
    case.refused(5, &[&format!("127.0.0.1:{down}"), "refused", "elasticsearch.urls"]).await;
    case.set("/elasticsearch/urls", url(web_server().await));
    case.refused(5, &["not as Elasticsearch or OpenSearch do", "elasticsearch.urls"]).await;
    case.set("/elasticsearch/urls", json!(["http://no-such-host.invalid:9200"]));
    case.refused(5, &["no-such-host.invalid", "elasticsearch.urls"]).await;
    case.set("/elasticsearch/urls", json!([case.store.url().replace("http:", "https:")]));
    case.refused(5, &["https://", "http:// instead of https://"]).await;
    // PostgreSQL's port.
    case.set("/elasticsearch/urls", url(good["cdc"]["port"].as_u64().unwrap().try_into().unwrap()));
    case.refused(5, &["elasticsearch.urls"]).await;

    let user = Some(("tide".to_owned(), STORE_PASSWORD.to_owned()));
    let guarded = Store::bind(loopback(0), Options { user, ..Options::default() }).await.unwrap();
    case.set("/elasticsearch/urls", url(guarded.local_addr().port()));
    case.refused(5, &["refused user or password", "401", "elasticsearch.username"]).await;
    case.set("/elasticsearch/username", "tide").set("/elasticsearch/password", "wrong-password");
    case.refused(5, &["refused user or password", "401", "elasticsearch.password"]).await;

    assert_eq!(case.confirmed().await, None, "a slot was made that keeps WAL for nobody");
    case.set("/elasticsearch/password", STORE_PASSWORD);
    case.store = guarded;
    case.starts().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_gone_after_the_copy_is_a_gap() {
    let mut case = Case::new().await;
    case.starts().await;
    // As after a lost volume.
    let empty = Store::bind(loopback(0), Options::default()).await.unwrap();
    case.set("/elasticsearch/urls", json!([empty.url()]));
    case.store = empty;
    for _ in 0..2 {
        case.refused(6, &["no index people", "cdc.snapshot.resnapshot"]).await;
    }
    case.set("/cdc/snapshot/resnapshot", true);
    case.starts().await;
}
