//! Both sides, connected and looked at.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::rows::Rows;
use super::stream::{self, Stream};
use super::{Comparison, Options, stopped};
use crate::config::{Config, Mode};
use crate::mapping::{self, TableMapping};
use crate::postgres::connect::connect;
use crate::postgres::definition::{self, Definition};
use crate::postgres::preflight::{self, Server};
use crate::problem::{Problem, ProblemKind};
use crate::sink::{self, DeadLetters, Sink, SinkOptions};
use crate::snapshot::Recorded;
use crate::table::TableId;

/// Both sides.
pub(super) struct Sides<'a> {
    options: &'a Options,
    client: Client,
    sink: Sink,
    server: Server,
    recorded: Recorded,
    synchronous: bool,
    pub(super) dead_letters: DeadLetters,
}

impl<'a> Sides<'a> {
    /// Connects. Whatever is in the way of one of the tables is said before the first is read.
    pub(super) async fn open(options: &'a Options, mappings: &[Arc<TableMapping>]) -> Result<Self, Problem> {
        let config = &options.config;
        let dead_letters = options.dead_letters();
        let sink_options = SinkOptions {
            tables: mapping::names(&mapping::tables(config, false)?),
            ..SinkOptions::new(config.elasticsearch.concurrent_request, dead_letters.path().to_owned())
        };
        let sink = Sink::new(sink::Client::new(&config.elasticsearch)?, sink_options);
        sink.client().info().await?;
        let client = connect(&config.cdc, "verify").await?;
        let server = preflight::server(&client).await?;
        let recorded = Recorded::read(&client, &config.job()).await?;
        if recorded.half_done && config.mode() != Mode::Never {
            return Err(Problem::new(
                ProblemKind::Setup,
                "the tables are still being copied for the first time",
                "Compare once the copy is done: `pgtide run` says so.",
            ));
        }
        let names: Vec<TableId> = mappings.iter().map(|mapping| mapping.table.clone()).collect();
        preflight::look(&client, config, &server, &names, true).await?;
        let synchronous = stream::synchronous(&client).await?;
        Ok(Self { options, client, sink, server, recorded, synchronous, dead_letters })
    }

    /// What the reader of a comparison should know.
    pub(super) async fn notes(&self, names: &[TableId]) -> Result<Vec<String>, Problem> {
        let config = &self.options.config;
        let mut notes = preflight::warnings(&self.client, config, &self.server, names).await?;
        let copied = config.cdc.snapshot.tables.iter().map(|table| &table.id).collect::<Vec<_>>();
        for name in names {
            if config.mode() == Mode::Never || !copied.is_empty() && !copied.contains(&name) {
                notes.push(format!(
                    "{name}: is not copied by this configuration, so rows from before its slot count as missing"
                ));
            }
        }
        Ok(notes)
    }

    /// One table of both.
    pub(super) async fn of<'b>(
        &'b self,
        mapping: &'b TableMapping,
        stop: &'b CancellationToken,
    ) -> Result<Comparison<'b>, Problem> {
        let (config, table) = (&self.options.config, std::slice::from_ref(&mapping.table));
        // In this order: what is read of the table is not older than its definition.
        let defined = definition(&self.client, config, &self.server, &mapping.table).await?;
        let looked = preflight::look(&self.client, config, &self.server, table, true).await?.pop();
        let (Some(defined), Some(ready)) = (defined, looked) else { return Err(gone(&mapping.table)) };
        Ok(Comparison {
            options: self.options,
            client: &self.client,
            sink: &self.sink,
            mapping,
            rows: Rows::new(mapping, &ready),
            ready,
            server: &self.server,
            defined,
            stream: Stream::new(config),
            synchronous: self.synchronous,
            copying: self.recorded.wanted.contains(&mapping.table),
            stop,
        })
    }

    /// The work, unless Elasticsearch is in trouble for too long: what reads from it tries again for ever.
    pub(super) async fn within_patience<T>(
        &self,
        work: impl Future<Output = Result<T, Problem>>,
        stop: &CancellationToken,
    ) -> Result<T, Problem> {
        tokio::select! {
            done = work => done,
            problem = trouble(&self.sink, self.options.timeout) => Err(problem),
            () = stop.cancelled() => Err(stopped()),
        }
    }
}

async fn trouble(sink: &Sink, timeout: Duration) -> Problem {
    let mut since = None;
    loop {
        match sink.stats().trouble {
            None => since = None,
            Some(trouble) => {
                if since.get_or_insert_with(Instant::now).elapsed() >= timeout {
                    return Problem::new(ProblemKind::Elasticsearch, trouble.reason, trouble.hint);
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// What a table is now; none where there is none of its name.
pub(super) async fn definition(
    client: &Client,
    config: &Config,
    server: &Server,
    table: &TableId,
) -> Result<Option<Definition>, Problem> {
    let publication = &config.cdc.publication.name;
    let looked = definition::look(client, server.version, std::slice::from_ref(table), publication).await?;
    Ok(looked.into_iter().flatten().next().map(|seen| seen.definition))
}

fn gone(table: &TableId) -> Problem {
    Problem::new(ProblemKind::Setup, format!("table {table} was dropped or renamed meanwhile"), "Start again.")
}
