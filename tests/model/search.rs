//! Histories, one seed after the other, until one fails.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use futures_util::FutureExt;
use tokio::sync::Semaphore;

use super::history::{self, Outcome, Rule};
use super::plan::Plan;
use super::profile::Profile;
use super::session::Log;

/// How many histories run at once, of all searches together.
static JOBS: OnceLock<(Semaphore, usize)> = OnceLock::new();

/// Sets how many histories run at once. Before the first search.
pub fn allow(jobs: usize) {
    JOBS.get_or_init(|| (Semaphore::new(jobs.max(1)), jobs.max(1)));
}

/// Histories with the seeds from `first` on.
pub struct Search {
    pub first: u64,
    pub count: u64,
    /// None: the seed chooses.
    pub profile: Option<Profile>,
    /// Of the processes.
    pub environment: Vec<(&'static str, String)>,
    /// Prints each history.
    pub show: bool,
}

/// A history that failed.
pub struct Found {
    /// Its place in the search, from 0.
    pub number: u64,
    pub rule: Rule,
    pub text: String,
}

/// What was run.
#[derive(Default)]
pub struct Run {
    pub histories: u64,
    pub transactions: u64,
}

/// A history that was run.
struct Ran {
    transactions: u32,
    failed: Option<Found>,
}

impl Search {
    /// Until one fails, or all are done.
    pub async fn run(self) -> (Option<Found>, Run) {
        let began = Instant::now();
        let (this, next) = (Arc::new(self), Arc::new(AtomicU64::new(0)));
        let jobs = JOBS.get().expect("the number of jobs is set first");
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..jobs.1 {
            let (this, next) = (Arc::clone(&this), Arc::clone(&next));
            tasks.spawn(async move {
                let mut ran = Vec::new();
                loop {
                    let _permit = jobs.0.acquire().await.unwrap();
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= this.count {
                        return ran;
                    }
                    ran.push(this.history(number).await);
                    if number > 0 && number.is_multiple_of(100) {
                        // Hours may pass until the last one.
                        eprintln!(
                            "{number} histories of {} begun {:.0} s ago",
                            this.count,
                            began.elapsed().as_secs_f64()
                        );
                    }
                    if ran.iter().any(|ran| ran.failed.is_some()) {
                        // The others end, too.
                        next.store(this.count, Ordering::Relaxed);
                    }
                }
            });
        }
        let ran: Vec<Ran> = tasks.join_all().await.into_iter().flatten().collect();
        let run =
            Run { histories: ran.len() as u64, transactions: ran.iter().map(|ran| u64::from(ran.transactions)).sum() };
        let found = ran.into_iter().filter_map(|ran| ran.failed).min_by_key(|found| found.number);
        (found, run)
    }

    async fn history(&self, number: u64) -> Ran {
        let seed = self.first + number;
        let plan = Plan::of(seed, self.profile);
        let log = Log::new();
        let ran = std::panic::AssertUnwindSafe(history::run(&plan, &self.environment, &log)).catch_unwind().await;
        if self.show {
            println!("=== history {seed}, {}\n{}\n", plan.profile.name, log.text());
        }
        let (rule, how, output, transactions) = match ran {
            Ok(Outcome { broken: None, transactions, .. }) => return Ran { transactions, failed: None },
            Ok(Outcome { broken: Some(broken), output, transactions }) => {
                (broken.rule, broken.how, output, transactions)
            }
            Err(_) => (Rule::Test, "the test itself panicked (above)".to_owned(), String::new(), 0),
        };
        let text = format!(
            "history {seed} ({}, tables {:?}): {rule:?}\n    {how}\n\n{}\n\n--- the end of what the processes printed\n{output}\n\n\
             again: cargo test --test model histories -- --histories 1 --seed {seed} --profile {}",
            plan.profile.name,
            plan.schema,
            log.text(),
            plan.profile.name,
        );
        Ran { transactions, failed: Some(Found { number, rule, text }) }
    }
}
