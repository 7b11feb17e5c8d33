//! Standing by while another process leads the job: watching it, helping with its copy, taking over when it ends.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::pipeline::copied_tables;
use super::shared::Shared;
use crate::config::Mode;
use crate::problem::Problem;
use crate::snapshot::{self, Job, Leader, Ledger, Offered, Progress, Share};
use crate::status::{ChunkState, Level, Phase, Standby, TableState};
use crate::telemetry::lock;

/// How often the lock is tried.
const LOOK: Duration = Duration::from_millis(300);
/// How long after a trouble it is tried again to help.
const AGAIN: Duration = Duration::from_secs(2);

/// Why standing by has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// The leader has ended, and this process leads.
    Leads,
    /// The job is a copy alone, and it is completed.
    Completed,
    /// This process is to end.
    Stopped,
}

/// Stands by until the leader ends, or there is nothing left to wait for.
///
/// # Errors
/// The ledger cannot be read any more.
pub(super) async fn stand_by(
    shared: &Arc<Shared>,
    ledger: &Arc<Ledger>,
    stop: &CancellationToken,
) -> Result<Over, Problem> {
    // Who leads meanwhile knows how far documents are, and what is held.
    shared.stream_on(None);
    for table in &shared.counters.tables {
        table.paused.store(false, Relaxed);
    }
    let mut follower = Follower {
        shared,
        ledger,
        leader: None,
        held: Vec::new(),
        plan: None,
        progress: Progress::default(),
        help: None,
        done_with: None,
    };
    let over = tokio::select! {
        over = follower.follow() => over,
        problem = ledger.lost() => Err(problem),
        () = stop.cancelled() => Ok(Over::Stopped),
    };
    follower.stop_helping().await;
    *lock(&shared.standby) = None;
    over
}

struct Follower<'a> {
    shared: &'a Arc<Shared>,
    ledger: &'a Arc<Ledger>,
    leader: Option<Leader>,
    /// Tables whose copy its operator holds.
    held: Vec<String>,
    /// The job that the figures belong to, and the newest chunk of its plan.
    plan: Option<(Option<Job>, Option<i32>)>,
    progress: Progress,
    help: Option<Help>,
    /// The offer that was helped with to its end, or cannot be; why; and when it may be tried again.
    done_with: Option<(Offered, Option<String>, Option<Instant>)>,
}

/// Work for the leader.
struct Help {
    offered: Offered,
    share: Arc<Share>,
    stop: CancellationToken,
    task: JoinHandle<Result<(), Problem>>,
}

impl Follower<'_> {
    async fn follow(&mut self) -> Result<Over, Problem> {
        let mut ticks = tokio::time::interval(LOOK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if self.ledger.try_lock().await? {
                self.stop_helping().await;
                self.shared.counters.notice(Level::Info, "the process that led has ended: this one takes over");
                return Ok(Over::Leads);
            }
            let job = self.ledger.job().await?;
            let config = &self.shared.options.config;
            let wants_a_fresh_one = self.shared.wants_fresh_copy(job.as_ref());
            let completed = job.as_ref().is_some_and(|job| job.completed);
            self.look_at_leader().await?;
            self.look_at_copy(job).await?;
            if config.mode() == Mode::SnapshotOnly && completed && !wants_a_fresh_one && self.is_whole().await? {
                return Ok(Over::Completed);
            }
            self.help_out().await?;
            self.show();
        }
    }

    /// The completed job has all tables of this configuration, and none of them is being added just now.
    async fn is_whole(&self) -> Result<bool, Problem> {
        let known = self.ledger.tables().await?;
        let wanted = copied_tables(&self.shared.options.config, &self.shared.mappings);
        Ok(wanted.iter().all(|mapping| known.contains(&mapping.table)) && !self.ledger.is_pending().await?)
    }

    async fn look_at_leader(&mut self) -> Result<(), Problem> {
        let leader = self.ledger.leader().await?;
        let timeout = self.shared.options.config.cdc.snapshot.claim_timeout;
        let is_silent = |leader: &Leader| leader.silent.is_some_and(|silent| silent > timeout);
        if leader.as_ref().is_some_and(is_silent)
            && let Some(instance) = self.ledger.depose().await?
        {
            self.shared.counters.notice(
                Level::Warn,
                format!(
                    "instance {instance} led and has said nothing for {} s: its connection was ended, so that another can lead",
                    timeout.as_secs()
                ),
            );
        }
        if let Some(leader) = &leader
            && self.leader.as_ref().map(|before| before.pid) != Some(leader.pid)
        {
            self.shared.counters.notice(
                Level::Info,
                format!("{} leads: this process stands by, and takes over when that one ends", leader.describe()),
            );
            // What it offers is another snapshot.
            self.stop_helping().await;
            self.done_with = None;
        }
        self.leader = leader.or(self.leader.take());
        Ok(())
    }

    /// The figures of the tables, as the ledger has them.
    async fn look_at_copy(&mut self, job: Option<Job>) -> Result<(), Problem> {
        let shared = self.shared;
        let plan = Some((job, self.ledger.newest().await?));
        if self.plan != plan {
            let chunks = self.ledger.chunks().await?;
            for counters in &shared.counters.tables {
                let own = chunks.iter().filter(|chunk| chunk.table == counters.table);
                let state = |completed| if completed { ChunkState::Done } else { ChunkState::Pending };
                let states: Vec<_> = own.clone().map(|chunk| state(chunk.completed)).collect();
                let rows = own.filter(|chunk| chunk.completed).map(|chunk| chunk.rows).sum();
                counters.begin_copy(&states, rows, None);
            }
            self.plan = plan;
            self.progress = Progress::default();
        }
        self.progress.look(self.ledger, &shared.counters).await?;
        let job = self.plan.as_ref().and_then(|(job, _)| job.as_ref());
        let copies = shared.options.config.mode() != Mode::Never;
        let copied = copied_tables(&shared.options.config, &shared.mappings);
        let runs = job.is_some_and(|job| job.begun && !job.completed);
        for counters in &shared.counters.tables {
            let chunks = counters.chunks();
            let begun = chunks.states().any(|state| state != ChunkState::Pending);
            // One without a chunk is not in the leader's configuration: nobody streams it.
            let unknown = chunks.is_empty() && copies && copied.iter().any(|mapping| mapping.table == counters.table);
            counters.set_state(match (chunks.done() == chunks.len(), begun) {
                (true, _) if !runs && !unknown && (job.is_some() || !copies) => TableState::Standby,
                (false, _) if self.held.contains(&counters.table.to_string()) => TableState::Paused,
                (_, true) => TableState::Copying,
                (_, false) => TableState::Queued,
            });
        }
        if runs && !shared.copy_runs() {
            shared.copy_begins();
        } else if !runs {
            shared.copy_ended();
        }
        Ok(())
    }

    /// Begins to help with what is offered, tells what has changed, and sees when that ends.
    async fn help_out(&mut self) -> Result<(), Problem> {
        let offered = self.ledger.offered().await?;
        self.held = offered.as_ref().map(|offered| offered.held.clone()).unwrap_or_default();
        if self.help.as_ref().is_some_and(|help| help.task.is_finished()) {
            self.helped().await;
        }
        if let Some(help) = &self.help {
            match &offered {
                Some(offered) if offered.offer == help.offered.offer => {
                    help.share.hold(&offered.held);
                    return Ok(());
                }
                _ => self.stop_helping().await,
            }
        }
        let Some(offered) = offered else { return Ok(()) };
        let again = |at: &Option<Instant>| at.is_some_and(|at| Instant::now() >= at);
        if self.done_with.as_ref().is_some_and(|(done, _, at)| done.offer == offered.offer && !again(at)) {
            return Ok(());
        }
        let config = &self.shared.options.config;
        if config.mode() == Mode::Never {
            let why = "cdc.snapshot.mode is never here".to_owned();
            self.done_with = Some((offered, Some(why), None));
            return Ok(());
        }
        self.done_with = None;
        let (stop, share) = (CancellationToken::new(), Arc::new(Share::default()));
        share.hold(&offered.held);
        let context = self.shared.snapshot_context(&stop);
        let (ledger, wanted) = (Arc::clone(self.ledger), copied_tables(config, &self.shared.mappings));
        let (theirs, for_share, for_stop) = (offered.clone(), Arc::clone(&share), stop.clone());
        let task =
            tokio::spawn(
                async move { snapshot::help(&context, &ledger, &wanted, &theirs, for_share, &for_stop).await },
            );
        self.help = Some(Help { offered, share, stop, task });
        Ok(())
    }

    /// Notes how the help ended by itself.
    async fn helped(&mut self) {
        let Some(Help { offered, task, .. }) = self.help.take() else { return };
        let outcome = match task.await {
            Ok(Ok(())) => None,
            Ok(Err(problem)) => Some(problem),
            Err(panic) => Some(Problem::new(
                crate::problem::ProblemKind::Internal,
                format!("a task that copied died: {panic}"),
                "Report this.",
            )),
        };
        let again = outcome.as_ref().filter(|problem| problem.transient).map(|_| Instant::now() + AGAIN);
        if let Some(problem) = &outcome {
            let level = if problem.transient { Level::Info } else { Level::Warn };
            self.shared.counters.notice(
                level,
                format!("this process does not help with the copy: {}. {}", problem.message, problem.hint),
            );
        }
        self.done_with = Some((offered, outcome.map(|problem| problem.message), again));
    }

    /// Gives back what this process has claimed.
    async fn stop_helping(&mut self) {
        let Some(Help { stop, task, .. }) = self.help.take() else { return };
        stop.cancel();
        // It ends with what is cancelled, or with the ledger's connection.
        let _ = task.await;
    }

    fn show(&self) {
        let timeout = self.shared.options.config.cdc.snapshot.claim_timeout;
        let leader = self.leader.as_ref();
        *lock(&self.shared.standby) = Some(Standby {
            leader: leader.map_or_else(|| "another process".to_owned(), Leader::describe),
            silent: leader.and_then(|leader| leader.silent).is_some_and(|silent| silent > timeout),
            helps: self.help.is_some(),
            idle: self.done_with.as_ref().and_then(|(_, why, _)| why.clone()),
            paused: leader.is_some_and(|leader| leader.paused),
            held: self.held.clone(),
        });
        self.shared.set_phase(Phase::Standby, None);
    }
}
