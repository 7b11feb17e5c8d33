//! The configuration file and the port for metrics.

use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use crate::case::{Case, Ended, PASSWORD, Running, SOON, loopback, run_command};

async fn run_text(text: Option<&str>) -> Ended {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pgtide.yaml");
    if let Some(text) = text {
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    let ended = Running::spawn(run_command(&file, folder.path())).end(SOON).await;
    assert!(!ended.stderr.contains(PASSWORD) && !ended.stdout.contains(PASSWORD), "{ended}");
    ended
}

const GOOD: &str = "
cdc:
  host: localhost
  username: u
  password: s3cr3t-of-the-role
  database: d
  publication: {name: p, tables: [{name: t}]}
  slot: {name: s}
elasticsearch:
  urls: ['http://localhost:9200']
  tableIndexMapping: {public.t: t}
";

#[tokio::test]
async fn a_file_that_cannot_be_used_is_refused_with_its_place() {
    run_text(None).await.refused(2, &["pgtide.yaml", "No such file", "Name a file"]);
    run_text(Some("cdc: [\n  - {")).await.refused(2, &["pgtide.yaml:"]);
    run_text(Some("")).await.refused(2, &["pgtide.yaml:"]);
    for (from, to, words) in [
        ("host: localhost", "hots: localhost", ["cdc.hots", "did you mean `host`"]),
        ("database: d", "database: d\n  port: many", ["cdc.port", "65535"]),
        ("database: d", "database: d\n  port: 70000", ["cdc.port", "65535"]),
        ("name: s}", "name: Not-A-Slot}", ["cdc.slot.name", "lower-case"]),
        ("http://localhost:9200", "localhost:9200", ["elasticsearch.urls[0]", "http://"]),
        ("password: s3cr3t-of-the-role", "password: [s3cr3t-of-the-role]", ["cdc.password", "text"]),
    ] {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD);
        run_text(Some(&text)).await.refused(2, &words);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_for_metrics_that_is_taken() {
    let mut case = Case::new().await;
    let taken = std::net::TcpListener::bind(("0.0.0.0", 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    case.set("/cdc/metric", json!({"port": port}));
    case.refused(2, &[&port.to_string(), "in use", "cdc.metric.port"]).await;
    assert_eq!(case.confirmed().await, None, "a slot was made by a start that was refused");
    drop(taken);
    assert!(std::net::TcpStream::connect(loopback(port)).is_err());
    case.starts().await;
}
