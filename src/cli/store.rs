//! `pgtide store`: the local document store alone.

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Args;
use pgtide::problem::{Problem, ProblemKind};
use pgtide::store::{Options, Store};

use super::present::Signals;

#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// Address and port; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:9200")]
    listen: SocketAddr,
    /// Count and answer, keep nothing
    #[arg(long)]
    null: bool,
}

pub(super) async fn main(arguments: Arguments) -> Result<ExitCode, Problem> {
    let signals = Signals::install()?;
    let options = Options { null: arguments.null, ..Options::default() };
    let store = Store::bind(arguments.listen, options).await.map_err(|error| {
        Problem::new(
            ProblemKind::Config,
            format!("cannot listen on {}: {error}", arguments.listen),
            "Give another address with --listen; port 0 takes a free one.",
        )
    })?;
    super::print(&format!("{}\n", store.url()))?;
    signals.first().await;
    store.shutdown().await;
    Ok(ExitCode::SUCCESS)
}
