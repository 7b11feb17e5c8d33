//! What becomes of an operator's commands.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::sync::oneshot;

use super::control::{Answer, Command};
use super::resnapshots::given_up;
use super::shared::Shared;
use crate::status::{Level, Phase, TableState};
use crate::table::TableId;
use crate::telemetry::lock;

/// An answer that the ledger has a part in.
type Later = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// Does what a command asks for, or refuses it, and answers: where the ledger has to be written, once it is.
pub(super) fn answer(shared: &Arc<Shared>, command: Command, reply: oneshot::Sender<Answer>) {
    let done = obey(shared, &command);
    let told = move |answer: Answer| {
        if let Err(refusal) = &answer {
            tracing::info!(?command, refusal, "command refused");
        }
        // Who asked may have gone.
        let _ = reply.send(answer);
    };
    match done {
        Ok(None) => told(Ok(())),
        Ok(Some(later)) => drop(tokio::spawn(async move { told(later.await) })),
        Err(refusal) => told(Err(refusal)),
    }
}

fn obey(shared: &Arc<Shared>, command: &Command) -> Result<Option<Later>, String> {
    if shared.options.read_only && *command != Command::Stop {
        return Err("this pipeline is read-only".to_owned());
    }
    if shared.phase() == Phase::Standby && *command != Command::Stop {
        let paused = shared.gate.is_closed();
        if !(paused && *command == Command::Resume) {
            let leader = lock(&shared.standby).as_ref().map(|standby| standby.leader.clone());
            let leader = leader.unwrap_or_else(|| "another process".to_owned());
            return Err(format!("this process stands by: {leader} leads, and takes commands"));
        }
    }
    let table = |id: &TableId| {
        let found = shared.counters.tables.iter().position(|table| table.table == *id);
        found.ok_or_else(|| format!("there is no table {id} in this pipeline"))
    };
    match command {
        Command::Pause => {
            if shared.stop.is_cancelled() {
                return Err("the pipeline is stopping".to_owned());
            }
            if !shared.gate.is_closed() {
                shared.pause();
                shared.counters.notice(Level::Warn, "pause asked for by the operator; the slot keeps WAL meanwhile");
            }
        }
        Command::Resume => {
            if !shared.gate.is_closed() {
                return Err("the pipeline is not paused".to_owned());
            }
            shared.resume();
            shared.counters.notice(Level::Info, "resumed by the operator");
        }
        Command::PauseTable(id) => {
            let counters = &shared.counters.tables[table(id)?];
            let copies = matches!(counters.state(), TableState::Queued | TableState::Copying | TableState::Retrying);
            if !copies && !counters.resnapshot.load(Relaxed) {
                return Err(format!(
                    "{id} is not being copied; its changes come with everyone's stream, which p pauses"
                ));
            }
            let chunks = counters.chunks();
            if counters.state() == TableState::Copying && chunks.done() == chunks.len() {
                return Err(format!("all rows of {id} are copied: what is left to do of it p pauses"));
            }
            counters.paused.store(true, Relaxed);
            shared.counters.notice(Level::Info, format!("{id}: copy held by the operator"));
        }
        Command::ResumeTable(id) => {
            let counters = &shared.counters.tables[table(id)?];
            if !counters.paused.swap(false, Relaxed) {
                return Err(format!("{id} is not paused"));
            }
            shared.resnapshots.look_again();
            shared.counters.notice(Level::Info, format!("{id}: copy goes on"));
        }
        Command::Resnapshot(id) => {
            let number = table(id)?;
            if !matches!(shared.phase(), Phase::CatchUp | Phase::Streaming) {
                return Err(format!("{id} can be copied again once the first copy is done and the stream runs"));
            }
            if shared.counters.tables[number].resnapshot.swap(true, Relaxed) {
                return Err(format!("{id} is already being copied again"));
            }
            return Ok(Some(Box::pin(ask(Arc::clone(shared), number))));
        }
        Command::CancelResnapshot(id) => {
            let number = table(id)?;
            let counters = &shared.counters.tables[number];
            if counters.resnapshot.load(Relaxed) && counters.first_copy.load(Relaxed) {
                return Err(format!(
                    "{id} has never been copied to its end: without this copy documents would be missing. Hold it (P), or \
                     take the table out of the configuration and start again"
                ));
            }
            return Ok(Some(Box::pin(give_up(Arc::clone(shared), number))));
        }
        Command::Stop => {
            shared.stop.cancel();
            shared.set_phase(Phase::Stopping, None);
        }
    }
    Ok(None)
}

/// The operator wants a table copied again. What is answered with yes is in the ledger, so that no crash loses it.
async fn ask(shared: Arc<Shared>, number: usize) -> Answer {
    let (mapping, counters) = (&shared.mappings[number], &shared.counters.tables[number]);
    let id = &mapping.table;
    if let Err(problem) = shared.resnapshots.want(mapping, &counters.resnapshot, None).await {
        // The stream may have asked for it meanwhile.
        counters.resnapshot.store(shared.resnapshots.is_wanted(number), Relaxed);
        return Err(format!("{id}: the wish cannot be written into the ledger now: {}", problem.message));
    }
    shared.counters.notice(Level::Info, format!("{id}: resnapshot asked for by the operator"));
    Ok(())
}

/// The operator does not want it any more.
async fn give_up(shared: Arc<Shared>, number: usize) -> Answer {
    let mapping = &shared.mappings[number];
    match shared.resnapshots.cancel(mapping).await {
        Ok(Some(waited)) => {
            if waited {
                given_up(&shared, mapping);
            }
            Ok(())
        }
        Ok(None) => Err(format!("{} is not being copied again", mapping.table)),
        Err(problem) => Err(format!("{}: the ledger cannot be written now: {}", mapping.table, problem.message)),
    }
}
