//! A copy that several processes share: the leader offers its snapshot, the others copy chunks under it.

use std::convert::Infallible;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::copy::{CopyTable, Copying};
use super::ledger::{Ledger, Offered};
use super::progress::Progress;
use super::{Context, copy, copy_table};
use crate::mapping::TableMapping;
use crate::postgres::connect::connect;
use crate::postgres::preflight;
use crate::problem::{Problem, ProblemKind};

/// How often the leader looks at what it has to tell the others, and at what they have done.
const LOOK: Duration = Duration::from_millis(250);

/// No table is named so.
const CLUSTER: &str = "";

impl Context {
    /// What a copy takes from each table and where to, in a form that two processes can compare: the table's name, and a
    /// digest of its index, columns and condition; the `cluster` under [`CLUSTER`].
    pub(super) fn plan_of(&self, tables: &[CopyTable], cluster: &str) -> String {
        let of = |table: &CopyTable| {
            let columns = format!("{:?}", table.shape.columns());
            let parts = json!([table.mapping.index, columns, table.condition, self.handler.is_some()]);
            (table.mapping.table.to_string(), json!(format!("{:x}", md5::compute(parts.to_string()))))
        };
        let cluster = (CLUSTER.to_owned(), json!(cluster));
        serde_json::Value::Object(tables.iter().map(of).chain([cluster]).collect()).to_string()
    }
}

/// The tables of a plan ([`Context::plan_of`]) and their digests.
fn parse(plan: &str) -> serde_json::Map<String, serde_json::Value> {
    serde_json::from_str(plan).unwrap_or_default()
}

/// Why this process cannot help with a copy of `theirs` by what it would take itself: both by [`Context::plan_of`]. Tables of
/// its own beside those are in nobody's way.
fn differs(theirs: &str, ours: &str) -> Option<String> {
    let (mut theirs, mut ours) = (parse(theirs), parse(ours));
    if theirs.remove(CLUSTER) != ours.remove(CLUSTER) {
        return Some(
            "it copies into another Elasticsearch cluster than this configuration's, or into one that does not say which it \
             is (`cluster_uuid` of GET /)"
                .to_owned(),
        );
    }
    if let Some((table, _)) = theirs.iter().find(|(table, _)| !ours.contains_key(*table)) {
        return Some(format!("it copies {table}, which is not in this configuration"));
    }
    let (table, _) = theirs.iter().find(|(table, digest)| ours.get(*table) != Some(*digest))?;
    Some(format!("index, columns or condition of {table} differ from this configuration's"))
}

impl Copying {
    /// Offers the snapshot to the others for as long as this is polled; not while the operator pauses the copy, and without
    /// the tables that he holds. Counts what they have done. Ends only when a query fails.
    pub(super) async fn offer_it(&self) -> Problem {
        match self.offer_until_failed().await {
            Ok(never) => match never {},
            Err(problem) => problem,
        }
    }

    async fn offer_until_failed(&self) -> Result<Infallible, Problem> {
        let mut pass = self.gate.enter();
        let mut progress = Progress::default();
        let mut offered = None;
        let mut ticks = tokio::time::interval(LOOK);
        loop {
            ticks.tick().await;
            progress.look(&self.ledger, &self.counters).await?;
            if pass.is_closed() {
                if offered.take().is_some() {
                    self.ledger.withdraw_offer().await?;
                }
                // Paused is what nobody works on.
                if !self.ledger.others_at_work().await? {
                    pass.wait().await;
                }
                continue;
            }
            let held = self.held();
            if offered.as_ref() != Some(&held) {
                self.ledger.offer(&self.offer, &held).await?;
                offered = Some(held);
            }
        }
    }
}

/// A share in the copy of another process.
#[derive(Debug, Default)]
pub struct Share {
    /// Tables that the leader's operator holds.
    held: RwLock<Vec<String>>,
}

impl Share {
    /// Notes which tables the leader's operator holds now.
    pub fn hold(&self, held: &[String]) {
        *self.held.write().unwrap_or_else(PoisonError::into_inner) = held.to_vec();
    }

    pub(super) fn held(&self) -> Vec<String> {
        self.held.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Copies chunks of the leader's copy, under the snapshot that it offers, until all of them are completed or `stop` is
/// cancelled. What was claimed and not completed is given back in the end.
///
/// # Errors
/// This configuration would copy something else or elsewhere, and is not transient; the offer has ended, PostgreSQL or
/// Elasticsearch fails, which is. The index holds documents of another server's making.
pub async fn help(
    context: &Context,
    ledger: &Arc<Ledger>,
    wanted: &[Arc<TableMapping>],
    offered: &Offered,
    share: Arc<Share>,
    stop: &CancellationToken,
) -> Result<(), Problem> {
    let theirs = parse(&offered.offer.tables);
    // The leader may have more to copy later, or less in its configuration.
    let wanted: Vec<_> = wanted.iter().filter(|mapping| theirs.contains_key(&mapping.table.to_string())).collect();
    let control = connect(&context.config.cdc, "control").await?;
    let server = preflight::server(&control).await?;
    let ids: Vec<_> = wanted.iter().map(|mapping| mapping.table.clone()).collect();
    let need_key = context.handler.is_none();
    let ready = preflight::look(&control, &context.config, &server, &ids, need_key).await?;
    drop(control);
    let tables: Vec<_> = wanted.iter().zip(&ready).map(|(mapping, ready)| copy_table(mapping, ready)).collect();
    // Of now: this process may have stood by for long.
    let cluster = context.sink.client().info().await?.cluster;
    if let Some(why) = differs(&offered.offer.tables, &context.plan_of(&tables, &cluster)) {
        return Err(Problem::new(
            ProblemKind::Setup,
            why,
            "Give both the same `elasticsearch.urls`, tables, indices, columns and conditions.",
        ));
    }
    let copying =
        Arc::new(Copying { share: Some(share), ..context.copying(ledger, offered.offer.clone(), tables, stop) });
    let helped = tokio::select! {
        copied = copying.run(context.workers()) => copied.map(drop),
        problem = ledger.lost() => Err(problem),
        () = stop.cancelled() => Err(copy::stopped()),
    };
    ledger.give_back().await?;
    helped
}

#[cfg(test)]
mod tests {
    use super::differs;

    #[test]
    fn a_plan_is_helped_with_when_all_of_it_is_known() {
        let ours = r#"{"public.a": "1", "public.b": "2"}"#;
        for (theirs, why) in [
            (ours, None),
            // The leader may copy one of them alone, after the other was rewritten.
            (r#"{"public.b": "2"}"#, None),
            (r#"{"public.b": "3"}"#, Some("index, columns or condition of public.b differ from this configuration's")),
            (r#"{"public.b": "2", "public.c": "1"}"#, Some("it copies public.c, which is not in this configuration")),
        ] {
            assert_eq!(differs(theirs, ours).as_deref(), why, "{theirs}");
        }
    }
}
