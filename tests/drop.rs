//! `pgtide drop`: takes away what a pipeline left in PostgreSQL, that and nothing else.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io::{Read, Write};
use std::process::{Command, Output, Stdio};

use pgtide::config::{Config, ReplicaIdentity};
use portable_pty::{CommandBuilder, PtySize, native_pty_system};
use serde_json::json;
use support::pipeline::{Rig, stop};
use support::process::PROGRAM;

const ITEMS: &str =
    "CREATE TABLE items (id int PRIMARY KEY, name text); INSERT INTO items VALUES (1, 'one'), (2, 'two')";

struct File {
    folder: tempfile::TempDir,
}

impl File {
    fn of(config: &Config, replica_identity: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cdc = &config.cdc;
        let text = json!({
            "cdc": {
                "host": cdc.host, "port": cdc.port, "database": cdc.database, "username": cdc.username,
                "password": cdc.password.0, "sslMode": "disable",
                "publication": {"name": cdc.publication.name,
                    "tables": [{"name": "items", "replicaIdentity": replica_identity}]},
                "slot": {"name": cdc.slot.name}, "snapshot": {"enabled": true, "mode": "initial"},
            },
            "elasticsearch": {"urls": config.elasticsearch.urls, "tableIndexMapping": {"public.items": "items"}},
        });
        std::fs::write(folder.path().join("pgtide.json"), text.to_string()).unwrap();
        Self { folder }
    }

    fn path(&self) -> String {
        self.folder.path().join("pgtide.json").display().to_string()
    }

    fn drop(&self, more: &[&str]) -> Output {
        Command::new(PROGRAM).args(["drop", "--config", &self.path()]).args(more).stdin(Stdio::null()).output().unwrap()
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Slots, publications, tables of the ledger.
async fn left(rig: &Rig) -> (i64, i64, i64) {
    (
        rig.count(&format!("SELECT count(*) FROM pg_replication_slots WHERE database = '{}'", rig.name)).await,
        rig.count("SELECT count(*) FROM pg_publication").await,
        rig.count("SELECT count(*) FROM pg_class WHERE relname IN ('cdc_snapshot_job', 'cdc_snapshot_chunks')").await,
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_of_a_pipeline_goes_once_it_is_stopped() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let mut config = rig.config(&["items"]);
    config.cdc.publication.tables[0].replica_identity = Some(ReplicaIdentity::Full);
    let engine = rig.run(config.clone()).await;
    let file = File::of(&config, "FULL");

    let running = file.drop(&["--yes"]);
    assert_eq!(running.status.code(), Some(4), "{running:?}");
    assert!(stderr(&running).contains("a pgtide works on"), "{running:?}");
    assert_eq!(left(&rig).await, (1, 1, 2));
    stop(engine).await;

    let dry = file.drop(&["--dry-run"]);
    assert_eq!(dry.status.code(), Some(0), "{dry:?}");
    for part in [
        "replication slot",
        "of WAL",
        "made by pgtide for this slot",
        "rows of the ledger",
        "the ledger's tables",
        "REPLICA IDENTITY FULL of public.items",
        "the documents, in items",
    ] {
        assert!(stdout(&dry).contains(part), "{part}: {dry:?}");
    }
    let unasked = file.drop(&[]);
    assert_eq!(unasked.status.code(), Some(2), "{unasked:?}");
    assert!(stderr(&unasked).contains("--yes"), "{unasked:?}");
    assert_eq!(left(&rig).await, (1, 1, 2));

    let done = file.drop(&["--yes"]);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert_eq!(left(&rig).await, (0, 0, 0));
    assert_eq!(rig.documents("items").len(), 2);
    assert_eq!(rig.text("SELECT relreplident::text FROM pg_class WHERE relname = 'items'").await, "f");
    let again = file.drop(&["--yes"]);
    assert_eq!(again.status.code(), Some(0), "{again:?}");
    assert!(stdout(&again).starts_with("Nothing of "), "{again:?}");

    // A fresh start finds nothing in its way.
    let engine = rig.run(config).await;
    rig.equal("items").await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_belongs_to_others_stays() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let config = rig.config(&["items"]);
    rig.sql(&format!("CREATE PUBLICATION {} FOR TABLE items", rig.name)).await;
    let engine = rig.run(config.clone()).await;
    stop(engine).await;
    rig.sql("INSERT INTO cdc_snapshot_job (slot_name, snapshot_id, snapshot_lsn, started_at) VALUES ('another', '', '0/0', now())")
        .await;
    let file = File::of(&config, "DEFAULT");
    let done = file.drop(&["--yes"]);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert!(stdout(&done).contains("not made by pgtide") && stdout(&done).contains("those of another"), "{done:?}");
    assert_eq!(left(&rig).await, (0, 1, 2));
    assert_eq!(rig.count("SELECT count(*) FROM cdc_snapshot_job").await, 1);
    assert_eq!(rig.count("SELECT count(*) FROM cdc_snapshot_chunks").await, 0);
    assert_eq!(file.drop(&[]).status.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_can_be_kept_and_that_of_another_slot_is() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let config = rig.config(&["items"]);
    stop(rig.run(config.clone()).await).await;
    let kept = File::of(&config, "DEFAULT").drop(&["--yes", "--keep-publication"]);
    assert_eq!(kept.status.code(), Some(0), "{kept:?}");
    assert_eq!(left(&rig).await, (0, 1, 0));

    let mut renamed = config.clone();
    renamed.cdc.slot.name = format!("{}_two", rig.name);
    stop(rig.run(renamed.clone()).await).await;
    // It is published for the other one as well by now, whoever made it.
    stop(rig.run(config.clone()).await).await;
    let shared = File::of(&config, "DEFAULT").drop(&["--yes"]);
    assert!(stdout(&shared).contains("the tables of another slot are published by it as well"), "{shared:?}");
    assert_eq!(left(&rig).await.1, 1);
    let done = File::of(&renamed, "DEFAULT").drop(&["--yes"]);
    assert!(stdout(&done).contains("made by pgtide for another slot"), "{done:?}");
    assert_eq!(left(&rig).await, (0, 1, 0));
}

/// A pgtide that is not streaming, because it copies or its Elasticsearch is away, works on the slot as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pgtide_that_does_not_stream_is_in_the_way_too() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let config = rig.config(&["items"]);
    rig.hold(1000);
    let engine = rig.start(config.clone());
    rig.until_held().await;
    let busy = File::of(&config, "DEFAULT").drop(&["--yes"]);
    assert_eq!(busy.status.code(), Some(4), "{busy:?}");
    assert!(stderr(&busy).contains("a pgtide works on") && stdout(&busy).is_empty(), "{busy:?}");
    let listed = File::of(&config, "DEFAULT").drop(&["--dry-run"]);
    assert_eq!(listed.status.code(), Some(0), "{listed:?}");
    for line in ["replication slot", "made by pgtide", "the ledger's tables", "In use", "a pgtide works on"] {
        assert!(stdout(&listed).contains(line), "{line}: {listed:?}");
    }
    assert_eq!(left(&rig).await, (1, 1, 2));
    rig.store.clear_faults();
    stop(engine).await;
}

/// Answers the question on a terminal; gives the exit code and what was shown.
fn answer(file: &File, word: &str) -> (u32, String) {
    let pty = native_pty_system().openpty(PtySize { rows: 24, cols: 200, ..PtySize::default() }).unwrap();
    let mut command = CommandBuilder::new(PROGRAM);
    command.args(["drop", "--config", &file.path()]);
    let mut child = pty.slave.spawn_command(command).unwrap();
    drop(pty.slave);
    let mut reader = pty.master.try_clone_reader().unwrap();
    let mut shown = Vec::new();
    let mut piece = [0; 1024];
    let mut writer = Some(pty.master.take_writer().unwrap());
    // The end of the pseudo-terminal is an error on Linux.
    while let Ok(length @ 1..) = reader.read(&mut piece) {
        shown.extend_from_slice(&piece[..length]);
        if String::from_utf8_lossy(&shown).contains("[y/N]")
            && let Some(mut writer) = writer.take()
        {
            writer.write_all(format!("{word}\n").as_bytes()).unwrap();
        }
    }
    (child.wait().unwrap().exit_code(), String::from_utf8_lossy(&shown).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_asks_on_a_terminal_and_only_yes_is_yes() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let config = rig.config(&["items"]);
    stop(rig.run(config.clone()).await).await;
    let file = File::of(&config, "DEFAULT");
    for word in ["", "n", "yess"] {
        let (code, shown) = answer(&file, word);
        assert_eq!((code, shown.contains("Nothing was removed")), (1, true), "{word}: {shown}");
        assert_eq!(left(&rig).await, (1, 1, 2));
    }
    let (code, shown) = answer(&file, "y");
    assert_eq!((code, shown.contains("Removed.")), (0, true), "{shown}");
    assert_eq!(left(&rig).await, (0, 0, 0));
}
