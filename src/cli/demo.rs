//! `pgtide demo`: everything in one command, and nothing left behind.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use pgtide::config::{self, Config, Mode, Secret};
use pgtide::demo::{self, Bars, Server, ServerError, Workload, WorkloadOptions};
use pgtide::engine::{Engine, Options};
use pgtide::http;
use pgtide::problem::{Problem, ProblemKind};
use pgtide::store::{self, Store};
use pgtide::table::TableId;
use pgtide::telemetry::log::{self, LogError, LogGuard};

use super::Presentation;
use super::present::{Signals, present, screen_wanted};

const DATABASE: &str = "demo";
const TABLES: [&str; 2] = ["users", "books"];

#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// Rows of the table users; 1,000 at least
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1_000..))]
    rows: u64,
    /// Changes a second that the workload makes; 0 for none
    #[arg(long, default_value_t = 20)]
    rate: u32,
    /// Use this Elasticsearch or OpenSearch instead of a local document store; the indices pgtide-demo-users and
    /// pgtide-demo-books are made there, and removed at the end
    #[arg(long, value_name = "URL")]
    elasticsearch: Option<String>,
    /// User there; the password comes from the environment variable PGTIDE_ELASTICSEARCH_PASSWORD
    #[arg(long, value_name = "USER", requires = "elasticsearch")]
    elasticsearch_user: Option<String>,
    /// Rows of a chunk
    #[arg(long, default_value_t = 8_000, value_parser = clap::value_parser!(u64).range(1..))]
    chunk_size: u64,
    /// Port of /metrics and /status on 127.0.0.1; 0 for none [default: 8081, or none when that is taken]
    #[arg(long)]
    metrics_port: Option<u16>,
    #[command(flatten)]
    presentation: Presentation,
}

/// What the demo made and has to remove.
struct Stage {
    server: Server,
    store: Option<Store>,
    workload: Workload,
}

pub(super) async fn main(arguments: Arguments) -> Result<ExitCode, Problem> {
    let presentation = &arguments.presentation;
    let screen = screen_wanted(presentation);
    let log = log(presentation.log_folder.clone(), screen)?;
    let signals = Signals::install()?;
    let bars = Bars::new();
    let set_up = set_up(&arguments, &bars);
    let stage = tokio::select! {
        stage = set_up => stage,
        // Dropping what was begun removes it.
        number = signals.first() => return Ok(ExitCode::from(u8::try_from(128 + number).unwrap_or(1))),
    };
    bars.clear();
    let (stage, config) = stage?;

    let mut options = Options::new(Arc::new(config));
    options.read_only = presentation.read_only;
    options.fail_fast = !screen;
    options.wait_when_failed = screen;
    options.dead_letter_file = log.folder().join("demo-dead-letters.ndjson");
    let engine = Engine::start(options)?;
    let served = serve(&arguments, &engine).await?;
    let code = present(engine, presentation, "demo", Some(log.folder()), &signals).await;
    drop(served);
    let removed = tear_down(&arguments, stage).await;
    let code = code?;
    removed?;
    Ok(code)
}

/// The log; in a new temporary folder where the home folder is closed: the demo needs nothing but the program.
fn log(folder: Option<PathBuf>, screen: bool) -> Result<LogGuard, Problem> {
    let init = |folder| log::init(&log::Options { screen, folder, ..log::Options::default() });
    let refused =
        |error: LogError| Problem::new(ProblemKind::Config, error.to_string(), "Name a folder with --log-folder.");
    let named = folder.is_some();
    match init(folder) {
        Err(error @ (LogError::NoHome | LogError::Folder { .. } | LogError::File { .. })) if !named => {
            let Ok(folder) = tempfile::Builder::new().prefix("pgtide-log-").tempdir() else {
                return Err(refused(error));
            };
            let log = init(Some(folder.keep())).map_err(refused)?;
            tracing::warn!("the log is in {}: {error}", log.folder().display());
            Ok(log)
        }
        other => other.map_err(refused),
    }
}

async fn set_up(arguments: &Arguments, bars: &Bars) -> Result<(Stage, Config), Problem> {
    let server =
        Server::start(demo::Options { on_step: bars.on_step(), ..demo::Options::default() }).await.map_err(failed)?;
    server.create_database(DATABASE).await.map_err(failed)?;
    let client = server.connect(DATABASE).await.map_err(failed)?;
    demo::seed(&client, arguments.rows, bars.on_rows()).await.map_err(failed)?;
    let store = match &arguments.elasticsearch {
        Some(_) => None,
        None => Some(
            Store::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), store::Options::default())
                .await
                .map_err(|error| super::internal("the local document store cannot listen", &error))?,
        ),
    };
    let config = configuration(arguments, &server, store.as_ref());
    if arguments.elasticsearch.is_some() {
        // What a demo before this one could not remove: its versions would be those of another server.
        remove_indices(&config).await?;
    }
    let workload =
        Workload::start(server.socket_config(DATABASE), WorkloadOptions { rate: arguments.rate, seed: None });
    Ok((Stage { server, store, workload }, config))
}

fn configuration(arguments: &Arguments, server: &Server, store: Option<&Store>) -> Config {
    let mut config = Config { cdc: server.config(DATABASE), ..Config::default() };
    let cdc = &mut config.cdc;
    cdc.publication.name = "pgtide_demo".to_owned();
    cdc.publication.create_if_not_exists = true;
    cdc.publication.tables = TABLES.iter().map(|name| config::Table::new(TableId::new("public", *name))).collect();
    cdc.slot.name = "pgtide_demo".to_owned();
    cdc.slot.create_if_not_exists = true;
    cdc.snapshot.enabled = true;
    cdc.snapshot.mode = Mode::Initial;
    cdc.snapshot.chunk_size = arguments.chunk_size;
    let elasticsearch = &mut config.elasticsearch;
    let url = store.map(Store::url).or_else(|| arguments.elasticsearch.clone());
    elasticsearch.urls = url.into_iter().collect();
    elasticsearch.username = arguments.elasticsearch_user.clone().unwrap_or_default();
    elasticsearch.password = Secret(std::env::var("PGTIDE_ELASTICSEARCH_PASSWORD").unwrap_or_default());
    // A real cluster may have indices of these names already.
    let prefix = if store.is_some() { "" } else { "pgtide-demo-" };
    elasticsearch.table_index_mapping =
        TABLES.iter().map(|name| (TableId::new("public", *name), format!("{prefix}{name}"))).collect();
    config
}

async fn serve(arguments: &Arguments, engine: &Engine) -> Result<Option<http::Server>, Problem> {
    let port = arguments.metrics_port.unwrap_or(8081);
    if port == 0 {
        return Ok(None);
    }
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let read_only = arguments.presentation.read_only;
    match http::serve(address, engine.status_source(), engine.control(), read_only).await {
        Ok(server) => Ok(Some(server)),
        Err(error) if arguments.metrics_port.is_none() => {
            tracing::warn!("no metrics: port {port}: {error}");
            Ok(None)
        }
        Err(error) => Err(Problem::new(
            ProblemKind::Config,
            format!("cannot serve metrics on port {port}: {error}"),
            "Give another --metrics-port, or 0 for none.",
        )),
    }
}

async fn tear_down(arguments: &Arguments, stage: Stage) -> Result<(), Problem> {
    let config = configuration(arguments, &stage.server, stage.store.as_ref());
    stage.workload.stop().await;
    if let Some(store) = stage.store {
        store.shutdown().await;
    } else {
        remove_indices(&config).await?;
    }
    stage.server.stop().await.map_err(failed)
}

async fn remove_indices(config: &Config) -> Result<(), Problem> {
    let client = pgtide::sink::Client::new(&config.elasticsearch)?;
    for index in config.elasticsearch.table_index_mapping.values() {
        client.delete_index(index).await?;
    }
    Ok(())
}

fn failed(error: ServerError) -> Problem {
    Problem::new(
        ProblemKind::Postgres,
        error.to_string(),
        "The demo needs PostgreSQL 14 or newer, or the network once to fetch one. PGTIDE_PG_BIN names the folder of its programs.",
    )
}
