//! What all processes of a job have copied, for the screen of each.

use std::collections::HashSet;

use super::ledger::Ledger;
use crate::problem::Problem;
use crate::status::ChunkState;
use crate::telemetry::Counters;

/// Follows in the ledger what others claim and complete. What this process does itself it counts as it does it.
#[derive(Debug)]
pub struct Progress {
    since: String,
    /// Table and chunk of what was claimed at the last look.
    claimed: HashSet<(usize, usize)>,
}

impl Default for Progress {
    fn default() -> Self {
        Self { since: "-infinity".to_owned(), claimed: HashSet::new() }
    }
}

impl Progress {
    /// Looks once. `counters` has the plan as it stands in the ledger.
    ///
    /// # Errors
    /// The query fails.
    pub async fn look(&mut self, ledger: &Ledger, counters: &Counters) -> Result<(), Problem> {
        let (now, moved) = ledger.moved(&self.since).await?;
        self.since = now;
        let mut claimed = HashSet::new();
        for chunk in moved {
            let Some(number) = counters.tables.iter().position(|table| table.table == chunk.table) else { continue };
            let table = &counters.tables[number];
            self.claimed.remove(&(number, chunk.index));
            if !chunk.completed {
                claimed.insert((number, chunk.index));
                table.move_chunk(chunk.index, ChunkState::Pending, ChunkState::Claimed);
            } else if !chunk.own {
                table.done_elsewhere(chunk.index, chunk.rows);
            }
        }
        // Given back and claimed by nobody since.
        for (number, index) in self.claimed.drain() {
            counters.tables[number].move_chunk(index, ChunkState::Claimed, ChunkState::Pending);
        }
        self.claimed = claimed;
        Ok(())
    }
}
