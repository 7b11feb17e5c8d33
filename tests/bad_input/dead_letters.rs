//! `pgtide dead-letters`: what Elasticsearch refused is told, sent again as the rows are now, and dropped.

use std::path::Path;
use std::process::Output;
use std::sync::Arc;

use pgtide::config::Config;
use pgtide::sink::DeadLetters;
use pgtide::store::{Effect, Fault};
use pgtide::verify::{self, Options};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::support::pipeline::{LIMIT, Rig, stop};
use crate::support::process::PROGRAM;
use crate::support::wait_until;

/// Documents with these ids are refused for good from now on.
fn refuse(rig: &Rig, ids: &[&str]) {
    let ids = ids.iter().map(|id| (*id).to_owned()).collect();
    rig.store.inject(Fault::new(Effect::RejectItems { status: 400, kind: None, every: 0, ids }));
}

fn ids(file: &Path) -> Vec<String> {
    let mut ids = Vec::new();
    DeadLetters::new(file.to_owned()).read(|letter| ids.push(letter.id)).unwrap();
    ids
}

/// A letter's line in the file.
fn line(index: &str, id: &str) -> String {
    let action = json!({"index": {"_index": index, "_id": id, "version": 4096}});
    let letter = json!({"time": "2026-01-01T00:00:00Z", "table": 0, "status": 400, "type": "x", "reason": "y",
                        "action": action, "document": {"id": id}});
    format!("{letter}\n")
}

async fn until_letters(file: &Path, expected: &[&str]) {
    wait_until(&format!("the letters are {expected:?}"), LIMIT, || async { ids(file) == expected }).await;
}

/// The configuration of a rig, with its dead letters in the folder.
fn config_of(rig: &Rig, folder: &Path) -> Config {
    let mut config = rig.config(&["items"]);
    config.elasticsearch.dead_letter_file = Some(folder.join("dead.ndjson"));
    config
}

fn write_file(rig: &Rig, config: &Config, folder: &Path) -> String {
    let (cdc, file) = (&config.cdc, folder.join("pgtide.json"));
    let text = json!({
        "cdc": {
            "host": cdc.host, "port": cdc.port, "database": cdc.database, "username": cdc.username,
            "password": cdc.password.0, "sslMode": "disable",
            "publication": {"name": rig.name, "tables": [{"name": "items"}]},
            "slot": {"name": rig.name}, "snapshot": {"enabled": true, "mode": "initial"},
        },
        "elasticsearch": {
            "urls": [rig.store.url()], "tableIndexMapping": {"public.items": "items"},
            "deadLetterFile": config.elasticsearch.dead_letter_file,
        },
    });
    std::fs::write(&file, text.to_string()).unwrap();
    file.to_str().unwrap().to_owned()
}

fn program(command: &str, file: &str, more: &[&str]) -> (Option<i32>, String, String) {
    let mut program = std::process::Command::new(PROGRAM);
    let Output { status, stdout, stderr } =
        program.args(["dead-letters", command, "--config", file]).args(more).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_documents_are_told_and_sent_again_as_the_rows_are_now() {
    let rig = Rig::new().await;
    rig.sql(
        "CREATE TABLE items (id int PRIMARY KEY, name text);
             INSERT INTO items SELECT i, 'private ' || i FROM generate_series(1, 6) AS i;
             UPDATE items SET name = E'\\u202E\\u001B[31mred' WHERE id = 4",
    )
    .await;
    refuse(&rig, &["1", "2", "3", "4"]);
    let folder = tempfile::tempdir().unwrap();
    let config = config_of(&rig, folder.path());
    let file = write_file(&rig, &config, folder.path());
    let letters = folder.path().join("dead.ndjson");
    assert_eq!(program("list", &file, &[]).0, Some(0));
    assert!(program("list", &file, &[]).1.starts_with("No dead letters in "));
    let engine = rig.run(config).await;
    rig.sql("UPDATE items SET name = 'second' WHERE id = 1; DELETE FROM items WHERE id = 2").await;
    rig.delivered().await;
    assert_eq!(ids(&letters).len(), 6, "{:?}", ids(&letters));

    let (code, list, _) = program("list", &file, &["--table", "items"]);
    assert_eq!(code, Some(0));
    assert!(list.starts_with("6 dead letters in ") && list.contains("  public.items -> items: 6, 20"), "{list}");
    assert!(list.contains("\n    400 document_parsing_exception: a fault that was asked for\n"), "{list}");
    assert!(!list.contains("private") && !list.contains("second"), "row contents: {list}");
    let (_, json, _) = program("list", &file, &["--json", "--index", "items", "--id", "1"]);
    let group: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&group["count"], &group["table"]), (&json!(2), &json!("public.items")));
    let (_, shown, _) = program("show", &file, &["--id", "1"]);
    for part in
        [" index of 1 in items, table public.items\n", "  position 0/", "  answer   400 document_parsing_exception"]
    {
        assert_eq!(shown.matches(part).count(), 2, "{part}: {shown}");
    }
    assert!(shown.contains(r#"  document {"id":1,"name":"second"}"#) && shown.contains("private 1"), "{shown}");
    let (_, shown, _) = program("show", &file, &["--id", "4"]);
    assert!(shown.contains(r#""name":"\u{202e}\u001b[31mred""#), "{shown}");
    let (_, none, _) = program("show", &file, &["--table", "others"]);
    assert!(none.starts_with("No dead letters of that table, index or id in "), "{none}");

    // Only 3 is refused again, as it is now.
    rig.store.clear_faults();
    refuse(&rig, &["3"]);
    rig.sql("UPDATE items SET name = 'third' WHERE id = 3").await;
    rig.delivered().await;
    let (code, retried, error) = program("retry", &file, &[]);
    assert_eq!(code, Some(1), "{retried}{error}");
    assert_eq!(
        retried,
        "public.items -> items: 5 gone, their documents are equal to the rows, 2 refused again, as the rows are now\n"
    );
    assert_eq!(ids(&letters), ["3"]);
    let text = std::fs::read_to_string(&letters).unwrap();
    assert!(text.contains(r#""document":{"id":3,"name":"third"}"#), "{text}");
    assert!(!rig.documents("items").contains_key("3"));

    rig.store.clear_faults();
    let (code, retried, error) = program("retry", &file, &["--id", "3"]);
    assert_eq!((code, error.as_str()), (Some(0), ""), "{retried}");
    assert_eq!(ids(&letters), [""; 0]);
    assert!(program("retry", &file, &[]).1.starts_with("No dead letters in "));
    rig.equal("items").await;
    assert_eq!(rig.count("SELECT count(*) FROM pg_replication_slots WHERE temporary").await, 0);
    stop(engine).await;
}

/// While the retried rows are on their way they change, and pgtide itself is refused others; then one is given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_beside_a_pgtide_that_writes_loses_nothing_and_brings_nothing_old() {
    let rig = Rig::new().await;
    rig.sql(
        "CREATE TABLE items (id int PRIMARY KEY, name text);
             INSERT INTO items SELECT i, 'private ' || i FROM generate_series(1, 6) AS i",
    )
    .await;
    refuse(&rig, &["1", "2"]);
    let folder = tempfile::tempdir().unwrap();
    let config = config_of(&rig, folder.path());
    let letters = folder.path().join("dead.ndjson");
    let engine = rig.run(config.clone()).await;
    rig.delivered().await;
    assert_eq!(ids(&letters).len(), 2);
    let options = Options { timeout: LIMIT, ..Options::new(Arc::new(config)) };
    let start = |stop: CancellationToken| {
        let options = options.clone();
        tokio::spawn(async move { verify::retry(&options, |_| true, &stop, |_| {}).await })
    };

    // Given up: both stay, whatever became of the request.
    rig.store.clear_faults();
    rig.hold(1);
    let given_up = CancellationToken::new();
    let retry = start(given_up.clone());
    rig.until_held().await;
    given_up.cancel();
    assert!(retry.await.unwrap().is_err());
    assert_eq!(ids(&letters).len(), 2);
    rig.store.clear_faults();
    rig.store.until_applied().await;

    rig.hold(1);
    let retry = start(CancellationToken::new());
    rig.until_held().await;
    refuse(&rig, &["5"]);
    rig.sql("UPDATE items SET name = 'newer' WHERE id = 1; DELETE FROM items WHERE id = 2").await;
    rig.delivered().await;
    let newer = rig.version("items", "1");
    rig.sql("UPDATE items SET name = 'refused' WHERE id = 5").await;
    rig.delivered().await;
    rig.store.forget_tombstones();
    assert_eq!(ids(&letters).len(), 3);
    rig.store.clear_faults();
    let report = retry.await.unwrap().unwrap();
    assert_eq!((report.len(), report[0].equal, report[0].is_done()), (1, 2, true), "{report:?}");
    until_letters(&letters, &["5"]).await;
    assert_eq!(rig.version("items", "1"), newer);
    assert_eq!(rig.documents("items")["1"]["name"], "newer");
    assert!(!rig.documents("items").contains_key("2"), "a deleted row came back");
    stop(engine).await;

    // Nothing streams, and a change waits: what was sent is not certain yet, so that the letter stays.
    rig.sql("UPDATE items SET name = 'later' WHERE id = 5").await;
    let report = start(CancellationToken::new()).await.unwrap().unwrap();
    assert_eq!((report[0].equal, report[0].stay.values().sum::<u64>()), (0, 1), "{report:?}");
    assert!(report[0].stay.keys().all(|reason| reason.contains("nothing streams")), "{report:?}");
    until_letters(&letters, &["5"]).await;
}

/// SIGKILL before its rows are written, after that, and in the middle of a new file; each time a letter is there or its
/// document is the row, and the pgtide beside it goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_that_is_killed_loses_no_letter_and_does_no_harm() {
    let rig = Rig::new().await;
    rig.sql(
        "CREATE TABLE items (id int PRIMARY KEY, name text);
             INSERT INTO items SELECT i, 'private ' || i FROM generate_series(1, 6) AS i",
    )
    .await;
    refuse(&rig, &["1", "2", "3", "4"]);
    let folder = tempfile::tempdir().unwrap();
    let config = config_of(&rig, folder.path());
    let file = write_file(&rig, &config, folder.path());
    let letters = folder.path().join("dead.ndjson");
    let engine = rig.run(config).await;
    rig.delivered().await;
    // Letters of another pipeline: with them it takes a while to write the file anew.
    let of_others = line("elsewhere", "x").repeat(60_000);
    let written = std::fs::read_to_string(&letters).unwrap() + &of_others;
    std::fs::write(&letters, &written).unwrap();

    let start = || {
        let mut retry = std::process::Command::new(PROGRAM);
        let retry = retry.args(["dead-letters", "retry", "--config", &file, "--index", "items"]);
        retry.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap()
    };
    let kill = |mut retry: std::process::Child| {
        assert_eq!(retry.try_wait().unwrap(), None, "it had ended before the kill");
        retry.kill().unwrap();
        retry.wait().unwrap();
    };
    for applied in [false, true] {
        rig.store.clear_faults();
        rig.store.inject(Fault::new(Effect::Hold { applied }).times(1));
        let retry = start();
        rig.until_held().await;
        kill(retry);
        assert_eq!(std::fs::read_to_string(&letters).unwrap(), written, "applied: {applied}");
        rig.store.clear_faults();
        rig.store.until_applied().await;
        // What the killed one had sent is older than this.
        rig.sql("UPDATE items SET name = 'newer' WHERE id = 1; DELETE FROM items WHERE id = 2").await;
        rig.delivered().await;
    }

    let new = folder.path().join("dead.ndjson.new");
    let retry = start();
    wait_until("the file is written anew", LIMIT, || async { new.exists() }).await;
    kill(retry);
    let left = std::fs::read_to_string(&letters).unwrap();
    assert!(left == written || left == of_others, "{} bytes of {}", left.len(), written.len());
    rig.equal("items").await;

    // The file's lock went with it.
    refuse(&rig, &["5"]);
    rig.sql("UPDATE items SET name = 'refused' WHERE id = 5").await;
    rig.delivered().await;
    assert_eq!(ids(&letters).last().map(String::as_str), Some("5"));
    rig.store.clear_faults();
    let (code, retried, error) = program("retry", &file, &["--index", "items"]);
    assert_eq!((code, error.as_str()), (Some(0), ""), "{retried}");
    assert!(
        std::fs::read_to_string(&letters).unwrap() == of_others && !new.exists(),
        "others' letters are not as they were"
    );
    rig.equal("items").await;
    assert_eq!(rig.count("SELECT count(*) FROM pg_replication_slots WHERE temporary").await, 0);
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_are_dropped_where_that_is_confirmed_and_only_those_that_are_meant() {
    let rig = Rig::new().await;
    let folder = tempfile::tempdir().unwrap();
    let config = config_of(&rig, folder.path());
    let file = write_file(&rig, &config, folder.path());
    let letters = folder.path().join("dead.ndjson");
    std::fs::write(&letters, line("items", "1") + &line("items", "2") + &line("elsewhere", "1")).unwrap();
    let (code, out, error) = program("drop", &file, &["--id", "1"]);
    assert!(code == Some(2) && out.starts_with("2 dead letters in ") && error.contains("--yes"), "{out}{error}");
    assert_eq!(ids(&letters), ["1", "2", "1"]);
    let (code, out, _) = program("drop", &file, &["--id", "1", "--index", "items", "--yes"]);
    assert!(code == Some(0) && out.ends_with("1 dead letter dropped.\n"), "{code:?} {out}");
    assert_eq!(ids(&letters), ["2", "1"]);
    // Of no table of the configuration: told, and kept.
    let (code, out, error) = program("retry", &file, &["--index", "elsewhere"]);
    assert_eq!((code, error.as_str()), (Some(1), ""), "{out}");
    assert_eq!(out, "no table -> elsewhere: 1 stay\n  1 stay: no table of this configuration goes to this index\n");
    assert_eq!(ids(&letters), ["2", "1"]);
}
