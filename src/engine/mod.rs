//! The pipeline: from a PostgreSQL to an Elasticsearch, watched by [`Status`] and steered by [`Control`].
//!
//! ```no_run
//! use std::sync::Arc;
//! use pgtide::{config::Config, engine::{Engine, Options}};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let loaded = Config::load("pgtide.yaml")?;
//! let engine = Engine::start(Options::new(Arc::new(loaded.config)))?;
//! engine.live().await;
//! println!("{} documents", engine.status().sink.documents);
//! engine.stop().await?;
//! # Ok(())
//! # }
//! ```

mod collect;
mod control;
mod indices;
mod monitor;
mod obey;
mod pipeline;
mod resnapshots;
mod schema;
mod shared;
mod source;
mod standby;

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use tokio::task::JoinHandle;

pub use control::{Answer, Command, Commands, Control};

use self::shared::{Liveness, Shared};
use crate::change::Handler;
use crate::config::Config;
use crate::mapping;
use crate::problem::{Problem, ProblemKind};
use crate::sink::{self, Client, SinkOptions};
pub use crate::status::*;

/// What to run and how.
#[derive(Clone)]
pub struct Options {
    /// Both sides.
    pub config: Arc<Config>,
    /// Code that turns changes into actions; none: each row is its document.
    pub handler: Option<Arc<dyn Handler>>,
    /// Control commands except stop are refused.
    pub read_only: bool,
    /// A start that finds PostgreSQL or Elasticsearch missing fails instead of trying again.
    pub fail_fast: bool,
    /// A pipeline that has failed stays, to be looked at, until it is told to stop.
    pub wait_when_failed: bool,
    /// Where refused documents are kept when the configuration does not say.
    pub dead_letter_file: PathBuf,
}

impl Options {
    /// Runs `config` without a handler, trying again for ever, refused documents in `pgtide-dead-letters.ndjson` of
    /// the present folder.
    #[must_use]
    pub fn new(config: Arc<Config>) -> Self {
        Self {
            config,
            handler: None,
            read_only: false,
            fail_fast: false,
            wait_when_failed: false,
            dead_letter_file: PathBuf::from("pgtide-dead-letters.ndjson"),
        }
    }
}

/// A running pipeline. Dropped, its tasks go on; [`stop`](Engine::stop) ends it.
pub struct Engine {
    shared: Arc<Shared>,
    control: Control,
    task: JoinHandle<Result<(), Problem>>,
}

/// What was done until all tables were live.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Rows copied.
    pub rows: u64,
    /// Documents that Elasticsearch has answered for, those of the stream included.
    pub documents: u64,
    /// Seconds from the start of the pipeline.
    pub seconds: f64,
    /// Seconds that the copy took.
    pub copy_seconds: f64,
    /// Rows copied a second.
    pub rows_per_second: f64,
    /// Documents refused for good, kept among the dead letters.
    pub rejected: u64,
}

impl Engine {
    /// Starts a pipeline on the present Tokio runtime. It connects by itself: what it finds is in [`Engine::status`].
    ///
    /// # Errors
    /// The configuration cannot be used: a URL, or no table that goes anywhere.
    pub fn start(options: Options) -> Result<Self, Problem> {
        let config = Arc::clone(&options.config);
        let elasticsearch = &config.elasticsearch;
        let client = Client::new(elasticsearch)?;
        let dead_letters = elasticsearch.dead_letter_file.clone().unwrap_or_else(|| options.dead_letter_file.clone());
        let mappings = mapping::tables(&config, options.handler.is_some())?;
        let sink_options = SinkOptions {
            tables: mapping::names(&mappings),
            ..SinkOptions::new(elasticsearch.concurrent_request, dead_letters)
        };
        let sink = sink::Sink::new(client, sink_options);
        let shared = Arc::new(Shared::new(options, sink, mappings));
        let (control, commands) = Control::channel();
        let task = tokio::spawn(pipeline::supervise(Arc::clone(&shared), commands));
        Ok(Self { shared, control, task })
    }

    /// What the pipeline is doing: everything that the screen, `/status` and the metrics show.
    #[must_use]
    pub fn status(&self) -> Status {
        collect::status(&self.shared)
    }

    /// The same as a function that outlives this value.
    #[must_use]
    pub fn status_source(&self) -> Arc<dyn Fn() -> Status + Send + Sync> {
        let shared = Arc::clone(&self.shared);
        Arc::new(move || collect::status(&shared))
    }

    /// The way to give it commands.
    #[must_use]
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Ends once every table is live and what was committed before the stream began has been answered for; or the
    /// pipeline has ended.
    pub fn live(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut live = self.shared.live.subscribe();
        async move {
            // The sender is gone only with the pipeline.
            let _ = live.wait_for(|live| *live != Liveness::NotYet).await;
        }
    }

    /// What was done so far.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let status = self.status();
        let rows = status.tables.iter().map(|table| table.rows_copied).sum();
        let copy_seconds = status.snapshot.seconds;
        #[allow(clippy::cast_precision_loss, reason = "figures for a person")]
        Summary {
            rows,
            documents: status.sink.documents,
            seconds: (status.at - status.started_at) as f64 / 1e6,
            copy_seconds,
            rows_per_second: if copy_seconds > 0.0 { rows as f64 / copy_seconds } else { 0.0 },
            rejected: status.sink.rejected,
        }
    }

    /// The pipeline has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.task.is_finished()
    }

    /// Waits until it ends by itself or by a command.
    ///
    /// # Errors
    /// What it failed of.
    pub async fn wait(&mut self) -> Result<(), Problem> {
        (&mut self.task).await.unwrap_or_else(|panic| {
            Err(Problem::new(ProblemKind::Internal, format!("the engine died: {panic}"), "Report this."))
        })
    }

    /// Stops it: what was sent is answered for and acknowledged; the next start goes on.
    ///
    /// # Errors
    /// What it failed of, if it had failed.
    pub async fn stop(mut self) -> Result<(), Problem> {
        // Refused only where it has ended already.
        let _ = self.control.send(Command::Stop).await;
        self.wait().await
    }
}
