//! The indices of the tables: made where they are missing, extended with the tables' columns, ready for the first copy
//! and put back after it.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::shared::Shared;
use crate::index::{Difference, Found, Indices, Product};
use crate::mapping::TableMapping;
use crate::postgres::column_types::{ColumnType, column_types};
use crate::postgres::preflight::Ready;
use crate::problem::Problem;
use crate::sink::SinkError;
use crate::snapshot::Ledger;
use crate::status::Level;
use crate::telemetry::lock;

/// Before anything is copied or streamed: creates what is missing, and extends what is ours. An index that was there
/// and is gone is left to those who say so. `copies`: the first copy begins, or goes on.
///
/// # Errors
/// PostgreSQL or Elasticsearch fails; told to stop.
pub(super) async fn prepare(
    shared: &Shared,
    client: &tokio_postgres::Client,
    ledger: &Ledger,
    tables: &[Ready],
    copies: bool,
    stop: &CancellationToken,
) -> Result<(), Problem> {
    let Some(mut indices) = indices(shared) else { return Ok(()) };
    let manages = shared.options.config.elasticsearch.manage_indices;
    let remembered = ledger.remembered().await?;
    let mut pass = shared.gate.enter();
    for (mapping, ready) in shared.mappings.iter().zip(tables) {
        tokio::select! {
            () = pass.wait() => {}
            () = stop.cancelled() => return Err(SinkError::Stopped.into()),
        }
        let found = indices.find(&mapping.index).await.map_err(refused)?;
        if let [found] = found.as_slice() {
            if !copies {
                restore_one(shared, &indices, mapping, found).await?;
            }
            if manages && found.job().is_some() {
                let published: Vec<_> = ready.info.columns.iter().map(|column| column.name.as_str()).collect();
                let columns = columns(client, ready.info.oid, &published).await?;
                extend(shared, &mut indices, mapping, found, &columns).await.map_err(refused)?;
            }
        }
        let lost = !copies && remembered.get(&mapping.table).is_some_and(|remembered| remembered.index.is_some());
        if found.is_empty() && manages && !lost {
            let published: Vec<_> = ready.info.columns.iter().map(|column| column.name.as_str()).collect();
            let columns = columns(client, ready.info.oid, &published).await?;
            let (plan, index) = indices.create(&mapping.table, &mapping.index, &columns).await.map_err(refused)?;
            let text = format!("{}: index {index} made for {} columns", mapping.table, plan.fields.len());
            shared.counters.notice(Level::Info, text);
            if copies && let Some(found) = indices.find_one(&index).await? {
                indices.hurry(&found).await.map_err(refused)?;
            }
        }
    }
    Ok(())
}

/// After the first copy: the indices that it went to are as they are to be from now on.
///
/// # Errors
/// Elasticsearch fails, or told to stop; the next start does it.
pub(super) async fn restore(shared: &Shared, stop: &CancellationToken) -> Result<(), Problem> {
    let Some(indices) = indices(shared) else { return Ok(()) };
    let mut pass = shared.gate.enter();
    for mapping in &shared.mappings {
        tokio::select! {
            () = pass.wait() => {}
            () = stop.cancelled() => return Err(SinkError::Stopped.into()),
        }
        if let Some(found) = indices.find_one(&mapping.index).await? {
            restore_one(shared, &indices, mapping, &found).await?;
        }
    }
    Ok(())
}

async fn restore_one(
    shared: &Shared,
    indices: &Indices<'_>,
    mapping: &TableMapping,
    found: &Found,
) -> Result<(), Problem> {
    if indices.restore(found).await.map_err(refused)? {
        let text = format!(
            "{}: refresh_interval and number_of_replicas of {} are as before the copy",
            mapping.table, found.index
        );
        shared.counters.notice(Level::Info, text);
    }
    Ok(())
}

/// A table has changed: its index gets the fields that it lacks, before rows are copied into them. False while paused.
///
/// # Errors
/// PostgreSQL or Elasticsearch fails.
pub(super) async fn altered(
    shared: &Shared,
    client: &tokio_postgres::Client,
    mapping: &Arc<TableMapping>,
    oid: u32,
    published: &[&str],
) -> Result<bool, Problem> {
    let Some(mut indices) = indices(shared).filter(|_| shared.options.config.elasticsearch.manage_indices) else {
        return Ok(true);
    };
    // Paused means that nothing is sent, not even a question.
    let Some(_pass) = shared.gate.enter_open() else { return Ok(false) };
    if let Some(found) = indices.find_one(&mapping.index).await?.filter(|found| found.job().is_some()) {
        let columns = columns(client, oid, published).await?;
        extend(shared, &mut indices, mapping, &found, &columns).await?;
    }
    Ok(true)
}

async fn extend(
    shared: &Shared,
    indices: &mut Indices<'_>,
    mapping: &TableMapping,
    found: &Found,
    columns: &[ColumnType],
) -> Result<(), SinkError> {
    let (added, misfits) = indices.extend(found, &mapping.table, &mapping.index, columns).await?;
    if !added.is_empty() {
        let text = format!("{}: index {} has got the fields {}", mapping.table, found.index, added.join(", "));
        shared.counters.notice(Level::Info, text);
    }
    for misfit in misfits {
        shared.counters.notice(Level::Warn, misfitting(mapping, found, &misfit));
    }
    Ok(())
}

fn misfitting(mapping: &TableMapping, found: &Found, misfit: &Difference) -> String {
    let Difference { column, sql, wanted, .. } = misfit;
    let has = misfit.found.as_deref().unwrap_or_default();
    format!(
        "{}: column {column} ({sql}) is mapped as {has} in index {}, and would be {wanted}; no index changes the type of a \
         field. Values that do not fit are kept in documents and not found by searches, or refused where they are objects; \
         docs/indices.md says how to copy into a new index",
        mapping.table, found.index
    )
}

/// None where a handler writes where it likes.
fn indices(shared: &Shared) -> Option<Indices<'_>> {
    if shared.options.handler.is_some() {
        return None;
    }
    let config = &shared.options.config;
    let info = lock(&shared.sink_info).clone()?;
    Some(Indices::new(shared.sink.client(), Product::of(&info), &config.job(), config.elasticsearch.json_as))
}

/// The columns that documents hold.
async fn columns(client: &tokio_postgres::Client, oid: u32, published: &[&str]) -> Result<Vec<ColumnType>, Problem> {
    let mut columns = column_types(client, oid).await?;
    columns.retain(|column| published.contains(&column.name.as_str()));
    Ok(columns)
}

/// A refusal says how to do without.
fn refused(error: SinkError) -> Problem {
    let forbidden = matches!(error, SinkError::Forbidden { .. });
    let mut problem = Problem::from(error);
    if forbidden {
        problem.hint = "Give the user of elasticsearch.username the privileges `manage` and `view_index_metadata` on the \
                        indices and their aliases, or make the indices yourself and set elasticsearch.manageIndices: false."
            .to_owned();
    }
    problem
}
