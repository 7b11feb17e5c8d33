//! `pgtide run`: the engine on the user's PostgreSQL and Elasticsearch.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use pgtide::config::Config;
use pgtide::engine::{Engine, Options};
use pgtide::problem::{Problem, ProblemKind};
use pgtide::{http, telemetry};

use super::Presentation;
use super::present::{Signals, present, screen_wanted};

#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// The configuration, YAML or JSON
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    #[command(flatten)]
    presentation: Presentation,
}

pub(super) async fn main(arguments: Arguments) -> Result<ExitCode, Problem> {
    let Arguments { config: file, presentation } = arguments;
    let loaded = Config::load(&file)?;
    let screen = screen_wanted(&presentation);
    let log = telemetry::log::init(&telemetry::log::Options {
        screen,
        level: loaded.config.cdc.log_level,
        json: false,
        folder: presentation.log_folder.clone(),
    })
    .map_err(|error| Problem::new(ProblemKind::Config, error.to_string(), "Name a folder with --log-folder."))?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let signals = Signals::install()?;
    let config = Arc::new(loaded.config);
    let mut options = Options::new(Arc::clone(&config));
    options.read_only = presentation.read_only;
    options.fail_fast = !screen;
    options.wait_when_failed = screen;
    options.dead_letter_file = dead_letter_file(log.folder(), &pipeline_name(&config));
    let engine = Engine::start(options)?;
    let served = match config.cdc.metric_port {
        None => None,
        Some(port) => {
            // All interfaces, as the reference: Prometheus seldom runs on the same machine. Commands are taken from
            // this machine only.
            let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
            let server = http::serve(address, engine.status_source(), engine.control(), presentation.read_only).await;
            Some(server.map_err(|error| {
                Problem::new(
                    ProblemKind::Config,
                    format!("cannot serve metrics on port {port}: {error}"),
                    "Set another `cdc.metric.port`, or 0 for none.",
                )
            })?)
        }
    };
    let name = pipeline_name(&config);
    let code = present(engine, &presentation, &name, Some(log.folder()), &signals).await;
    drop(served);
    code
}

/// Where refused documents are kept when the configuration does not say.
pub(super) fn dead_letter_file(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}-dead-letters.ndjson"))
}

pub(super) fn pipeline_name(config: &Config) -> String {
    if config.cdc.slot.name.is_empty() { config.cdc.database.clone() } else { config.cdc.slot.name.clone() }
}
