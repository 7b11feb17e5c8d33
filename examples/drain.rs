//! Reads a slot to a position and counts, to measure the reader and the server:
//! `drain HOST PORT DATABASE USER SLOT PUBLICATION END_LSN [require]`. The slot stays where it is.

use std::time::Instant;

use anyhow::Context;
use pgtide::config::{Cdc, Secret, SslMode};
use pgtide::lsn::Lsn;
use pgtide::postgres::pgoutput::{Message, decode};
use pgtide::postgres::replication::{Frame, Session};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::print_stdout, reason = "its only purpose")]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [host, port, database, user, slot, publication, end, rest @ ..] = arguments.as_slice() else {
        anyhow::bail!("drain HOST PORT DATABASE USER SLOT PUBLICATION END_LSN [require]");
    };
    let cdc = Cdc {
        host: host.clone(),
        port: port.parse().context("PORT")?,
        database: database.clone(),
        username: user.clone(),
        password: Secret(std::env::var("PGPASSWORD").unwrap_or_default()),
        ssl_mode: if rest.is_empty() { SslMode::Disable } else { SslMode::Require },
        ..Cdc::default()
    };
    let end: Lsn = end.parse()?;
    let session = Session::connect(&cdc, "drain").await?;
    let started = Instant::now();
    let (mut reader, _feedback) = session.start(slot, Lsn::ZERO, publication).await?;
    let (mut rows, mut commits, mut fills, mut bytes, mut at) = (0_u64, 0_u64, 0_u64, 0, Lsn::ZERO);
    while at < end {
        match reader.next_frame()? {
            Some(Frame::Data { data, .. }) => {
                bytes += data.len();
                match decode(data)? {
                    Message::Insert { .. } | Message::Update { .. } | Message::Delete { .. } => rows += 1,
                    Message::Commit { end_lsn, .. } => (commits, at) = (commits + 1, end_lsn),
                    _ => {}
                }
            }
            Some(Frame::KeepAlive { wal_end, .. }) => at = at.max(wal_end),
            None => {
                reader.fill().await?;
                fills += 1;
            }
        }
    }
    println!(
        "{rows} rows, {commits} transactions, {bytes} bytes, {fills} fills, {:.2} s",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}
