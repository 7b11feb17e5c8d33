//! Random histories with the rows as the oracle: see docs/testing.md.
//!
//!     cargo test --test model -- --histories 1000
//!     cargo test --test model -- --histories 1 --seed 17

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "what a failed history did is what one wants to read")]
#![allow(unreachable_pub, missing_docs, reason = "a test")]

mod alter;
mod audit;
mod causes;
mod controls;
mod history;
mod host;
mod oracle;
mod plan;
mod processes;
mod profile;
mod schema;
mod search;
mod session;
mod settle;
#[path = "../support/mod.rs"]
mod support;
mod traffic;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use libtest_mimic::{Arguments, Failed, Trial};

use self::controls::CONTROLS;
use self::profile::Profile;
use self::search::Search;

#[derive(Parser)]
struct Options {
    #[command(flatten)]
    test: Arguments,
    /// How many histories
    #[arg(long, env = "PGTIDE_MODEL_HISTORIES", default_value_t = 200)]
    histories: u64,
    /// The seed of the first one; the others have the numbers that follow. Random where none is given
    #[arg(long, env = "PGTIDE_MODEL_SEED")]
    seed: Option<u64>,
    /// How many at once
    #[arg(long, env = "PGTIDE_MODEL_JOBS")]
    jobs: Option<usize>,
    /// Histories of this profile only, by its name; otherwise each seed chooses its own
    #[arg(long, env = "PGTIDE_MODEL_PROFILE", value_parser = Profile::named)]
    profile: Option<Profile>,
    /// Prints what each history does
    #[arg(long)]
    show: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let jobs = options.jobs.unwrap_or_else(|| 4 * std::thread::available_parallelism().map_or(2, usize::from));
    search::allow(jobs);
    let (count, profile, show) = (options.histories, options.profile, options.show);
    let first = options.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    let handle = runtime.handle().clone();
    let mut trials = vec![Trial::test("histories", move || handle.block_on(histories(first, count, profile, show)))];
    if cfg!(debug_assertions) {
        trials.extend(CONTROLS.map(|control| {
            let handle = runtime.handle().clone();
            Trial::test(control.name, move || handle.block_on(control.run(first)))
        }));
    } else {
        println!("the controls need what only a debug build can have broken: left out");
    }
    libtest_mimic::run(&options.test, trials).exit_code()
}

/// Runs `count` histories; the first that fails is told.
async fn histories(first: u64, count: u64, profile: Option<Profile>, show: bool) -> Result<(), Failed> {
    let began = Instant::now();
    println!("histories from seed {first}");
    let search = Search { first, count, profile, environment: Vec::new(), show };
    let (found, run) = search.run().await;
    let seconds = began.elapsed().as_secs_f64();
    #[allow(clippy::cast_precision_loss, reason = "a figure to read")]
    let rate = run.histories as f64 * 60.0 / seconds;
    println!(
        "{} histories, {} transactions, {seconds:.0} s, {rate:.0} histories a minute",
        run.histories, run.transactions
    );
    match found {
        None => Ok(()),
        Some(found) => Err(found.text.into()),
    }
}
