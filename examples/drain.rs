//! Drains a slot and counts: `drain HOST PORT DATABASE USER SLOT PUBLICATION END_LSN [SSLMODE]`.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use pgtide::config::{Cdc, Secret, SslMode};
use pgtide::lsn::Lsn;
use pgtide::postgres::pgoutput::{Message, decode};
use pgtide::postgres::replication::{Frame, Session};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let a: Vec<String> = std::env::args().collect();
    let cdc = Cdc {
        host: a[1].clone(),
        port: a[2].parse().unwrap(),
        database: a[3].clone(),
        username: a[4].clone(),
        password: Secret(std::env::var("PGPASSWORD").unwrap_or_default()),
        ssl_mode: if a.get(8).is_some_and(|m| m == "require") { SslMode::Require } else { SslMode::Disable },
        ..Cdc::default()
    };
    let end: Lsn = a[7].parse().unwrap();
    let session = Session::connect(&cdc, "drain").await.unwrap();
    let started = std::time::Instant::now();
    let (mut reader, feedback) = session.start(&a[5], Lsn::ZERO, &a[6]).await.unwrap();
    let (mut rows, mut commits, mut fills, mut bytes) = (0_u64, 0_u64, 0_u64, 0_u64);
    let mut at = Lsn::ZERO;
    'all: loop {
        while let Some(frame) = reader.next_frame().unwrap() {
            match frame {
                Frame::Data { data, .. } => {
                    bytes += data.len() as u64;
                    match decode(data).unwrap() {
                        Message::Insert { new, .. } => {
                            rows += 1;
                            std::hint::black_box(new);
                        }
                        Message::Commit { end_lsn, .. } => {
                            commits += 1;
                            at = end_lsn;
                        }
                        _ => {}
                    }
                }
                Frame::KeepAlive { wal_end, .. } => at = at.max(wal_end),
            }
            if at >= end {
                break 'all;
            }
        }
        reader.fill().await.unwrap();
        fills += 1;
    }
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let field: Vec<&str> = stat.split_whitespace().collect();
    println!(
        "{rows} rows {commits} commits {bytes} bytes {:.2} s {fills} fills, cpu ticks user {} system {}",
        started.elapsed().as_secs_f64(),
        field[13],
        field[14]
    );
    drop(reader);
    if std::env::var("CONFIRM").is_ok() {
        feedback.confirm(at);
        feedback.finish().await.unwrap();
    }
}
