//! Random histories with the rows as the oracle: see docs/testing.md.
//!
//!     cargo test --test model -- --histories 1000
//!     cargo test --test model -- --histories 1 --seed 17

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "what a failed history did is what one wants to read")]
#![allow(unreachable_pub, missing_docs, reason = "a test")]

mod history;
mod oracle;
mod schema;
mod session;
#[path = "../support/mod.rs"]
mod support;
mod traffic;
mod weather;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use futures_util::FutureExt;
use libtest_mimic::{Arguments, Failed, Trial};

use self::history::{Outcome, Rule};
use self::session::Log;
use self::weather::{Plan, Profile};

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
    /// Prints what each history does
    #[arg(long)]
    show: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let handle = runtime.handle().clone();
    let jobs = options.jobs.unwrap_or_else(|| 4 * std::thread::available_parallelism().map_or(2, usize::from));
    let (count, show) = (options.histories, options.show);
    let first = options.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    let trials = vec![Trial::test("histories", move || handle.block_on(histories(first, count, jobs, show)))];
    libtest_mimic::run(&options.test, trials).exit_code()
}

/// Runs `count` histories, `jobs` at once; the first that fails is told.
async fn histories(first: u64, count: u64, jobs: usize, show: bool) -> Result<(), Failed> {
    let began = Instant::now();
    println!("histories {first} to {}, {jobs} at once", first + count - 1);
    let search = Search { first, count, jobs, profile: None, environment: Vec::new(), show };
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

/// Histories with the seeds from `first` on.
struct Search {
    first: u64,
    count: u64,
    jobs: usize,
    profile: Option<Profile>,
    environment: Vec<(&'static str, String)>,
    show: bool,
}

struct Found {
    #[allow(dead_code)]
    rule: Rule,
    text: String,
}

#[derive(Default)]
struct Run {
    histories: u64,
    transactions: u64,
}

impl Search {
    /// Until one fails, or all are done.
    async fn run(self) -> (Option<Found>, Run) {
        let this = Arc::new(self);
        let next = Arc::new(AtomicU64::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        let (mut found, mut run) = (None, Run::default());
        for _ in 0..this.jobs.max(1) {
            tasks.spawn(one(Arc::clone(&this), next.fetch_add(1, Ordering::Relaxed)));
        }
        while let Some(ended) = tasks.join_next().await {
            match ended.unwrap() {
                None => continue,
                Some((_, Ok(transactions))) => {
                    run.histories += 1;
                    run.transactions += u64::from(transactions);
                }
                Some((_, Err(failed))) => {
                    run.histories += 1;
                    found.get_or_insert(failed);
                }
            }
            if found.is_none() {
                tasks.spawn(one(Arc::clone(&this), next.fetch_add(1, Ordering::Relaxed)));
            }
        }
        (found, run)
    }
}

async fn one(search: Arc<Search>, number: u64) -> Option<(u64, Result<u32, Found>)> {
    if number >= search.count {
        return None;
    }
    let seed = search.first + number;
    let plan = Plan::of(seed, search.profile);
    let log = Log::new();
    let ran = std::panic::AssertUnwindSafe(history::run(&plan, &search.environment, &log)).catch_unwind().await;
    let replay = format!("cargo test --test model histories -- --histories 1 --seed {seed}");
    let Ok(Outcome { broken, output, transactions }) = ran else {
        let text = format!("history {seed}: the test itself panicked (above)\n{}\nagain: {replay}", log.text());
        return Some((seed, Err(Found { rule: Rule::Test, text })));
    };
    if search.show {
        println!("=== history {seed}, {}\n{}\n", plan.profile.name, log.text());
    }
    let Some(broken) = broken else { return Some((seed, Ok(transactions))) };
    let text = format!(
        "history {seed} ({}, tables {:?}): {:?}\n    {}\n\n{}\n\n--- the end of what the processes printed\n{output}\n\nagain: {replay}",
        plan.profile.name,
        plan.schema,
        broken.rule,
        broken.how,
        log.text(),
    );
    Some((seed, Err(Found { rule: broken.rule, text })))
}
