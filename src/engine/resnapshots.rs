//! Copies tables again while the stream goes on, as they are asked for.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::shared::Shared;
use crate::mapping::TableMapping;
use crate::problem::{Problem, ProblemKind};
use crate::snapshot::{self, Ledger};
use crate::status::{Level, TableState};

/// The longest wait between two attempts of a resnapshot that something is in the way of.
const BACKOFF: Duration = Duration::from_secs(30);

/// What has been in the way of one table's resnapshot.
#[derive(Default)]
struct Trouble {
    attempts: u32,
    said: Option<Problem>,
}

/// Copies tables again, one at a time; none that the operator holds, which would keep the others waiting. Ends never; dropped
/// when the stream ends.
pub(super) async fn resnapshots(shared: &Arc<Shared>, ledger: &Arc<Ledger>) -> Infallible {
    let mut troubles: Vec<Trouble> = shared.mappings.iter().map(|_| Trouble::default()).collect();
    loop {
        take_back(shared, ledger).await;
        shared.gate.enter().wait().await;
        let held = |number: usize| shared.counters.tables[number].paused.load(Relaxed);
        for (number, trouble) in troubles.iter_mut().enumerate() {
            if !shared.resnapshots.is_wanted(number) {
                // It was given up. Who asks anew does not wait.
                *trouble = Trouble::default();
            }
        }
        let free = shared.mappings.iter().map(|mapping| mapping.number).filter(|number| !held(*number));
        let Some(turn) = shared.resnapshots.take(free) else {
            let due = shared.resnapshots.next_due();
            tokio::select! {
                () = shared.resnapshots.changed() => {}
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {}
            }
            continue;
        };
        let mapping = &shared.mappings[turn.table];
        let number = mapping.number;
        let counters = &shared.counters.tables[number];
        shared.copy_begins();
        let context = shared.snapshot_context(&turn.stop);
        let outcome = snapshot::again(&context, ledger, mapping, turn.wish, &turn.stop).await;
        shared.copy_ended();
        let failed = match outcome {
            Ok(snapshot::Ended::Copied) => {
                counters.first_copy.store(false, Relaxed);
                None
            }
            Ok(snapshot::Ended::Released) => {
                counters.set_state(TableState::Queued);
                continue;
            }
            Err(_) if turn.stop.is_cancelled() => {
                troubles[number] = Trouble::default();
                continue;
            }
            // What somebody has to set up may be set up at any time.
            Err(problem) if problem.transient || problem.kind == ProblemKind::Setup => {
                let trouble = &mut troubles[number];
                trouble.attempts += 1;
                let longest = BACKOFF.min(Duration::from_millis(500) * 2_u32.saturating_pow(trouble.attempts.min(10)));
                turn.not_before(Instant::now() + longest.mul_f64(0.5 + fastrand::f64() / 2.0));
                counters.set_state(TableState::Retrying);
                counters.attempts.store(trouble.attempts, Relaxed);
                if trouble.said.as_ref() != Some(&problem) {
                    shared
                        .counters
                        .notice(Level::Warn, format!("{}: {}; trying again", mapping.table, problem.message));
                }
                counters.set_problem(Some(problem.clone()));
                trouble.said = Some(problem);
                continue;
            }
            Err(problem) => {
                shared.counters.notice(
                    Level::Error,
                    format!(
                        "{}: resnapshot failed: {}. {} The next start tries it again",
                        mapping.table, problem.message, problem.hint
                    ),
                );
                Some(problem)
            }
        };
        troubles[number] = Trouble::default();
        turn.ended(failed);
        ended(shared, number);
    }
}

/// Takes out of the ledger what is left there of resnapshots that were given up.
pub(super) async fn take_back(shared: &Shared, ledger: &Ledger) {
    for mapping in &shared.mappings {
        let Some(wish) = shared.resnapshots.given_up(mapping.number) else { continue };
        if let Err(problem) = ledger.withdraw(&mapping.table, wish).await {
            tracing::warn!("{problem}");
        }
        given_up(shared, mapping);
    }
}

/// A resnapshot is given up by the operator. Every document is a row as it once was; what they lack is said.
pub(super) fn given_up(shared: &Shared, mapping: &TableMapping) {
    let number = mapping.number;
    if !shared.counters.tables[number].resnapshot.load(Relaxed) || shared.resnapshots.is_wanted(number) {
        // It was said already, or somebody has asked again.
        return;
    }
    shared.counters.notice(
        Level::Info,
        format!("{}: resnapshot given up by the operator; what it was to mend is as it was", mapping.table),
    );
    ended(shared, number);
}

/// There is no copy of the table any more, unless one was asked for meanwhile. Nothing is held of it then.
fn ended(shared: &Shared, number: usize) {
    let counters = &shared.counters.tables[number];
    shared.settle(number);
    counters.attempts.store(0, Relaxed);
    counters.paused.store(false, Relaxed);
    counters.end_resnapshot();
    if shared.resnapshots.is_wanted(number) {
        counters.resnapshot.store(true, Relaxed);
    }
}
