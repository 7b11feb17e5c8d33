//! A physical standby of a server, made by a base backup; and commits that wait for one that there is not.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pgtide::demo::Server;
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use super::pipeline::LIMIT;
use super::{own_server, wait_until};

/// The physical slot by which the standby is fed.
pub const SLOT: &str = "standby";

/// What becomes of the primary's logical slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slots {
    /// They are left out, as `pg_basebackup` does.
    LeftOut,
    /// They are copied with the rest, as some cluster managers do where PostgreSQL cannot synchronize them.
    Copied,
    /// PostgreSQL synchronizes failover slots (17).
    Synchronized,
}

fn data(server: &Server) -> PathBuf {
    server.socket_dir().join("data")
}

/// A standby that streams from `primary`, which needs room for a slot and a WAL sender.
pub async fn of(primary: &Server, slots: Slots) -> Server {
    let client = primary.connect("postgres").await.unwrap();
    client.execute("SELECT pg_create_physical_replication_slot($1, TRUE)", &[&SLOT]).await.unwrap();
    // The folder and the port are a server's own; what is in the folder is replaced.
    let mut standby = own_server().await;
    standby.kill_hard().await.unwrap();
    let (from, to) = (data(primary), data(&standby));
    fs::remove_dir_all(&to).unwrap();
    let new = primary.installation().major() >= 15;
    client
        .batch_execute(if new {
            "SELECT pg_backup_start('standby', TRUE)"
        } else {
            "SELECT pg_start_backup('standby', TRUE, FALSE)"
        })
        .await
        .unwrap();
    // Files come and go under a server that runs: cp says so, and the WAL mends it.
    Command::new("cp").arg("-Rp").arg(&from).arg(&to).output().unwrap();
    let label = if new {
        "SELECT labelfile FROM pg_backup_stop(FALSE)"
    } else {
        "SELECT labelfile FROM pg_stop_backup(FALSE, FALSE)"
    };
    let label: String = client.query_one(label, &[]).await.unwrap().get(0);
    write(&to, "backup_label", &label);
    fs::remove_file(to.join("postmaster.pid")).unwrap();
    write(&to, "standby.signal", "");
    for slot in fs::read_dir(to.join("pg_replslot")).unwrap() {
        let slot = slot.unwrap().path();
        if slots != Slots::Copied || slot.ends_with(SLOT) {
            fs::remove_dir_all(slot).unwrap();
        }
    }
    let synchronized = if slots == Slots::Synchronized { "sync_replication_slots = on\n" } else { "" };
    let settings = format!(
        "primary_conninfo = 'host={} port={} user=postgres dbname=postgres'\nprimary_slot_name = '{SLOT}'\n\
         hot_standby_feedback = on\nwal_receiver_status_interval = 1\n{synchronized}",
        primary.socket_dir().display(),
        primary.port()
    );
    append(&to.join("postgresql.conf"), &settings);
    standby.restart().await.unwrap();
    wait_until("the standby is fed", LIMIT, || async {
        let sql = "SELECT active FROM pg_replication_slots WHERE slot_name = $1";
        client.query_one(sql, &[&SLOT]).await.unwrap().get(0)
    })
    .await;
    standby
}

/// A file of the user that the folder belongs to: we may be root.
fn write(folder: &Path, name: &str, text: &str) {
    let owner = fs::metadata(folder).unwrap();
    fs::write(folder.join(name), text).unwrap();
    chown(folder.join(name), Some(owner.uid()), Some(owner.gid())).unwrap();
}

fn append(file: &Path, text: &str) {
    let mut all = fs::read_to_string(file).unwrap();
    all.push_str(text);
    fs::write(file, all).unwrap();
}

/// The standby gets nothing from now on.
pub async fn cut_off(standby: &Server) {
    let client = standby.connect("postgres").await.unwrap();
    client.batch_execute("ALTER SYSTEM SET primary_conninfo = ''").await.unwrap();
    client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    wait_until("the standby is cut off", LIMIT, || async {
        let sql = "SELECT count(*) FROM pg_stat_wal_receiver";
        client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
}

/// The standby has everything that the primary has now.
pub async fn caught_up(primary: &Server, standby: &Server) {
    let sql = "SELECT pg_current_wal_flush_lsn()::text";
    let now: String = primary.connect("postgres").await.unwrap().query_one(sql, &[]).await.unwrap().get(0);
    let client = standby.connect("postgres").await.unwrap();
    wait_until("the standby has caught up", LIMIT, || async {
        let sql = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn";
        client.query_one(sql, &[&now]).await.unwrap().get(0)
    })
    .await;
}

/// Makes the standby a primary.
pub async fn promote(standby: &Server) {
    let client = standby.connect("postgres").await.unwrap();
    let done: bool = client.query_one("SELECT pg_promote(TRUE, 60)", &[]).await.unwrap().get(0);
    assert!(done, "the standby was not promoted");
}

/// Commits of a server that wait for a synchronous standby, and nobody is one.
pub struct Unconfirmed {
    ended: Arc<AtomicBool>,
    probe: JoinHandle<()>,
}

impl Unconfirmed {
    /// From here on every commit waits. The server heeds the setting a moment later than it shows it, so `probe` commits
    /// until one of its own does.
    pub async fn begin(client: &Client, probe: Client) -> Self {
        alter(client, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'").await;
        let ended = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&ended);
        let probe = tokio::spawn(async move {
            while !until.load(Ordering::Relaxed) {
                probe.batch_execute("SELECT pg_logical_emit_message(TRUE, 'probe', '')").await.unwrap();
            }
        });
        waits(client, "SELECT pg_logical_emit_message%").await;
        Self { ended, probe }
    }

    /// They go on.
    pub async fn end(self, client: &Client) {
        self.ended.store(true, Ordering::Relaxed);
        alter(client, "ALTER SYSTEM RESET synchronous_standby_names").await;
        self.probe.await.unwrap();
    }
}

/// Waits until the commit of a statement like this one waits for a standby.
pub async fn waits(client: &Client, statement: &str) {
    wait_until("the commit waits", LIMIT, || async {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE $1";
        client.query_one(sql, &[&statement]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;
}

async fn alter(client: &Client, sql: &str) {
    client.batch_execute(sql).await.unwrap();
    client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
}
