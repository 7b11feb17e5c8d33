//! What a start would find and make, for somebody who looks before. Changes nothing on either side.

use serde::Serialize;
use serde_json::Value;

use crate::config::{Config, Mode};
use crate::index::{Difference, Indices, Product, describe};
use crate::mapping;
use crate::postgres::column_types::column_types;
use crate::postgres::connect::connect;
use crate::postgres::preflight::{self, Ready};
use crate::postgres::{publication, slot};
use crate::problem::Problem;
use crate::sink::{Client, ServerInfo};
use crate::table::TableId;

/// Both sides, and each table.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Preview {
    /// `PostgreSQL 17.4`; none where it cannot be asked.
    pub postgres: Option<String>,
    /// `elasticsearch 9.1.0`; likewise.
    pub elasticsearch: Option<String>,
    /// The tables that can be looked at, in the order of the configuration.
    pub tables: Vec<TablePreview>,
    /// What else a start would do, or what is odd and may be meant so.
    pub notes: Vec<String>,
    /// What a start would fail of. Empty: of nothing that can be seen from here.
    pub in_the_way: Vec<Problem>,
}

/// A table and its index.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TablePreview {
    /// The table.
    pub table: TableId,
    /// The name that its documents are sent to.
    pub name: String,
    /// What there is under that name, and what becomes of it.
    #[serde(flatten)]
    pub index: IndexPreview,
    /// Its columns with their fields in an index that pgtide creates.
    pub columns: Vec<ColumnPreview>,
}

/// A column.
#[derive(Debug, Serialize)]
pub struct ColumnPreview {
    /// Its name.
    pub name: String,
    /// Its type in SQL.
    pub sql: String,
    /// Its field, in words.
    pub field: String,
    /// The same as it stands in a mapping.
    pub mapping: Value,
}

/// An index, and what a start does with it.
#[derive(Debug, Serialize)]
#[serde(tag = "action", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum IndexPreview {
    /// There is none: it is created, as this request says.
    Create {
        /// Its own name; the table's name for it is the alias.
        index: String,
        /// The body of `PUT`.
        body: Value,
    },
    /// There is none, and `manageIndices` is off: the cluster makes it with the first document.
    LeftToCluster,
    /// It was made by pgtide: it gets the fields that it lacks.
    Extend {
        /// Its own name.
        index: String,
        /// Columns that it gets a field for.
        added: Vec<String>,
        /// Columns whose field is of another type, which stays.
        differences: Vec<Difference>,
    },
    /// It stays as it is.
    Keep {
        /// Its own name; several behind an alias, joined by commas.
        index: String,
        /// What its mapping has otherwise than one that pgtide would make.
        differences: Vec<Difference>,
    },
}

/// Looks at both sides.
///
/// # Errors
/// The configuration cannot be used. Everything else is [`Preview::in_the_way`].
pub async fn look(config: &Config) -> Result<Preview, Problem> {
    let client = Client::new(&config.elasticsearch)?;
    let mappings = mapping::tables(config, false)?;
    let names: Vec<(TableId, String)> =
        mappings.iter().map(|mapping| (mapping.table.clone(), mapping.index.clone())).collect();
    let mut preview = Preview::default();
    let info = match client.info().await {
        Ok(info) => {
            preview.elasticsearch =
                Some(format!("{} {}", info.distribution, info.version.as_deref().unwrap_or("of an unknown version")));
            Some(info)
        }
        Err(error) => {
            preview.in_the_way.push(error.into());
            None
        }
    };
    if let Err(problem) = tables(config, &client, info, &names, &mut preview).await {
        preview.in_the_way.push(problem);
    }
    Ok(preview)
}

async fn tables(
    config: &Config,
    sink: &Client,
    info: Option<ServerInfo>,
    names: &[(TableId, String)],
    preview: &mut Preview,
) -> Result<(), Problem> {
    let (cdc, streams) = (&config.cdc, config.mode() != Mode::SnapshotOnly);
    let client = connect(cdc, "check").await?;
    let server = preflight::server(&client).await?;
    preview.postgres = Some(format!("PostgreSQL {}", server.version_text));
    let found = if streams { slot::find(&client, &cdc.slot.name).await? } else { None };
    if let Some(found) = &found {
        slot::usable(&cdc.slot.name, found, &cdc.database)?;
    }
    server.check(config, found.as_ref())?;
    server.room(config, found.as_ref())?;
    if streams && found.is_none() {
        preview.notes.push(format!("slot {} is created", cdc.slot.name));
    }
    let publication = match streams {
        true => publication::find(&client, &cdc.publication.name, server.version).await?,
        false => None,
    };
    if streams && publication.is_none() && cdc.publication.create_if_not_exists {
        preview.notes.push(format!("publication {} is created", cdc.publication.name));
    }
    let mut ready = Vec::new();
    for (table, name) in names {
        let is_published =
            |id: &TableId| publication.iter().flat_map(|found| &found.tables).any(|found| found.id == *id);
        let listed = cdc.publication.tables.iter().any(|listed| listed.id == *table);
        let alone = std::slice::from_ref(table);
        let mut looked = preflight::look(&client, config, &server, alone, true).await;
        if looked.is_err() && streams && cdc.publication.create_if_not_exists && listed && !is_published(table) {
            // Not published yet: what the catalog says counts, as it does for a copy without a stream.
            let mut unpublished = config.clone();
            (unpublished.cdc.snapshot.enabled, unpublished.cdc.snapshot.mode) = (true, Mode::SnapshotOnly);
            looked = preflight::look(&client, &unpublished, &server, alone, true).await;
            if publication.is_some() && looked.is_ok() {
                preview.notes.push(format!("{table} is added to publication {}", cdc.publication.name));
            }
        }
        match looked {
            Ok(mut looked) => ready.extend(looked.pop().map(|ready| (table, name, ready))),
            Err(problem) => preview.in_the_way.push(problem),
        }
    }
    let tables: Vec<TableId> = ready.iter().map(|(table, ..)| (*table).clone()).collect();
    preview.notes.extend(preflight::warnings(&client, config, &server, &tables).await?);
    let Some(info) = info else { return Ok(()) };
    let indices = Indices::new(sink, Product::of(&info), &config.job(), config.elasticsearch.json_as);
    for (table, name, ready) in ready {
        preview.tables.push(one(config, &client, &indices, table, name, &ready).await?);
    }
    Ok(())
}

async fn one(
    config: &Config,
    client: &tokio_postgres::Client,
    indices: &Indices<'_>,
    table: &TableId,
    name: &str,
    ready: &Ready,
) -> Result<TablePreview, Problem> {
    let mut columns = column_types(client, ready.info.oid).await?;
    columns.retain(|column| ready.info.columns.iter().any(|published| published.name == column.name));
    let plan = indices.plan(table, name, &columns);
    let found = indices.find(name).await?;
    let index = match found.as_slice() {
        [] if config.elasticsearch.manage_indices => {
            IndexPreview::Create { index: plan.index(1), body: plan.body(&config.job()) }
        }
        [] => IndexPreview::LeftToCluster,
        [found] if config.elasticsearch.manage_indices && found.job().is_some() => {
            let (lacking, differences): (Vec<_>, Vec<_>) =
                indices.compare(found, &plan, &columns).into_iter().partition(|difference| difference.found.is_none());
            let added = lacking.into_iter().map(|difference| difference.column).collect();
            IndexPreview::Extend { index: found.index.clone(), added, differences }
        }
        several => IndexPreview::Keep {
            index: several.iter().map(|found| found.index.as_str()).collect::<Vec<_>>().join(", "),
            differences: several.first().map(|found| indices.compare(found, &plan, &columns)).unwrap_or_default(),
        },
    };
    let column =
        |(name, sql, mapping): (String, String, Value)| ColumnPreview { field: describe(&mapping), name, sql, mapping };
    Ok(TablePreview {
        table: table.clone(),
        name: name.to_owned(),
        index,
        columns: plan.fields.into_iter().map(column).collect(),
    })
}
