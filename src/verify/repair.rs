//! Copying just the rows that differ, while the stream runs.
//!
//! It is exact for the reasons of a copy made again (`snapshot::again`). The rows are read under the snapshot of a
//! temporary slot with the consistent point C: it holds what was committed before C, and nothing else. What it holds is
//! written at version C - 1; a document whose row it does not hold is deleted at C - 1. Then:
//!
//! - Changes from C on have versions above, so that the stream's word wins, whether it comes before or after.
//! - Changes before C that the stream has not brought yet lose against the document. Against a delete they may win, once
//!   Elasticsearch has forgotten it; but then the row's own delete is among those that follow.
//! - A row that was deleted after C, whose delete Elasticsearch has applied and forgotten before ours arrives, would come
//!   back. For that, every id is verified again after the repair has been answered for, in the way of `settle`: the row is
//!   then seen to be gone (with the care for commits that are not visible yet), the document is one too many, and the next
//!   turn deletes it at its own C - 1. A delete that commits later than that look is applied later than our write.
//!
//! A document with a version above C - 1 stays: it is either newer, and right, or not of this server's making, which no
//! version of ours can mend. The look afterwards tells.

use std::time::Duration;

use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::Repaired;
use super::rows::Rows;
use super::settle::Wrong;
use crate::config::Config;
use crate::lsn::Lsn;
use crate::mapping::TableMapping;
use crate::postgres::catalog::Leaf;
use crate::problem::{Problem, ProblemKind};
use crate::sink::{FIND, Sink};
use crate::snapshot;
use crate::version;

/// A session to repair from: its snapshot, locks on the table's leaves that keep it from being altered, and its position.
pub(super) async fn session(config: &Config, leaves: &[Leaf], timeout: Duration) -> Result<(Client, Lsn), Problem> {
    let taken = tokio::time::timeout(timeout, snapshot::session(config, leaves)).await;
    taken.map_err(|_| {
        Problem::new(
            ProblemKind::Setup,
            format!("no snapshot to repair from within {} s: a transaction has been open for as long", timeout.as_secs()),
            "PostgreSQL makes a slot once every transaction has ended, in whatever database. See them: SELECT pid, datname, \
             xact_start, query FROM pg_stat_activity WHERE backend_xid IS NOT NULL ORDER BY xact_start",
        )
    })?
}

/// Writes or removes the documents of `wrong` as the rows are by the session's snapshot.
pub(super) async fn repair(
    (client, lsn): (Client, Lsn),
    sink: &Sink,
    mapping: &TableMapping,
    rows: &Rows,
    wrong: Vec<Wrong>,
    stop: &CancellationToken,
) -> Result<Repaired, Problem> {
    let version = version::before(lsn);
    let mut repaired = Repaired::default();
    let mut wrong = wrong;
    while !wrong.is_empty() {
        let mut chunk: Vec<_> = wrong.split_off(wrong.len().saturating_sub(FIND));
        let mut candidates: Vec<_> = chunk.iter().map(|wrong| wrong.candidate.clone()).collect();
        let found = rows.of(&client, &mut candidates).await?;
        let mut body = sink.body();
        for Wrong { candidate, documents, .. } in chunk.drain(..) {
            let row = found.get(&candidate.id);
            if let Some(row) = row {
                body.index(&mapping.target, &row.key, version, |out| out.extend_from_slice(&row.document));
                repaired.written += 1;
            }
            for (index, routing) in documents.iter().filter(|(_, routing)| row.is_none() || routing.is_some()) {
                body.delete_routed(index, &candidate.id, routing.as_deref(), version);
                repaired.deleted += 1;
            }
        }
        let delivered = sink.deliver(body, stop).await?;
        repaired.superseded += delivered.superseded;
        repaired.refused += delivered.rejected;
    }
    client.batch_execute("COMMIT").await?;
    Ok(repaired)
}
