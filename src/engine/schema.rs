//! Looks whether the tables and their indices are still what the documents were made of.
//!
//! What is compared is state against state: what the ledger remembers of the last copy, and the catalog of now. So
//! nothing is missed for having happened while nobody looked.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio_postgres::Client;

use super::indices;
use super::pipeline::current_position;
use super::shared::Shared;
use crate::config::{Mode, OnSchemaChange};
use crate::mapping::TableMapping;
use crate::postgres::definition::{self, Announced, Definition, Seen};
use crate::problem::{Problem, ProblemKind};
use crate::snapshot::{Ledger, Remembered};
use crate::status::{Level, TableState};
use crate::table::{TableId, quote_identifier};

/// A difference is acted on once so many looks in a row have found the same: one copy for a burst of ALTER TABLE.
const SETTLED: u32 = 3;
/// Looks at the tables for one at the indices.
const LOOKS: u32 = 5;

/// Watches over the tables of a pipeline.
pub(super) struct Schema<'a> {
    shared: &'a Shared,
    ledger: &'a Ledger,
    client: &'a Client,
    /// `server_version_num`.
    server: u32,
    ids: Vec<TableId>,
    tables: Vec<Watched>,
}

/// What is known of one table since this process connected.
#[derive(Default)]
struct Watched {
    /// The newest look that found it as the ledger remembers it.
    newest: Option<Seen>,
    /// How often in a row it was found different, and as what.
    differs: Option<(Definition, u32)>,
    /// For what a copy was asked for last: a definition, and what was announced that does not fit it. Not again, whatever has
    /// become of that copy.
    asked: Option<(Definition, Vec<Announced>)>,
    /// What keeps its changes out, as it was said.
    trouble: Option<Problem>,
    /// It was said that its application's changes fail.
    warned: bool,
}

impl<'a> Schema<'a> {
    pub(super) fn new(shared: &'a Shared, ledger: &'a Ledger, client: &'a Client, server: u32) -> Self {
        let ids: Vec<TableId> = shared.mappings.iter().map(|mapping| mapping.table.clone()).collect();
        let tables = ids.iter().map(|_| Watched::default()).collect();
        Self { shared, ledger, client, server, ids, tables }
    }

    /// Looks before anything is streamed: what differs is asked for at once, so that nothing is called live that is not.
    ///
    /// # Errors
    /// The catalog cannot be read; an index is another than the documents went to.
    pub(super) async fn at_start(&mut self) -> Result<(), Problem> {
        self.indices().await?;
        self.look(true).await
    }

    /// Looks again and again; ends with what the pipeline cannot go on with.
    pub(super) async fn watch(mut self) -> Problem {
        let interval = self.shared.options.config.cdc.slot.activity_checker_interval.max(Duration::from_millis(100));
        let mut looks = 0_u32;
        loop {
            tokio::time::sleep(interval).await;
            looks = looks.wrapping_add(1);
            let looked = match self.look(false).await {
                Ok(()) if looks.is_multiple_of(LOOKS) => self.indices().await,
                looked => looked,
            };
            if let Err(problem) = looked {
                return problem;
            }
        }
    }

    async fn look(&mut self, at_once: bool) -> Result<(), Problem> {
        // A copy that ends between the two questions has changed what is remembered: not even looked at then.
        let busy = |number: usize| self.shared.counters.tables[number].resnapshot.load(Relaxed);
        let before: Vec<bool> = (0..self.ids.len()).map(busy).collect();
        let remembered = self.ledger.remembered().await?;
        let publication = &self.shared.options.config.cdc.publication.name;
        let now = definition::look(self.client, self.server, &self.ids, publication).await?;
        for ((number, now), before) in now.into_iter().enumerate().zip(before) {
            if before || self.shared.counters.tables[number].resnapshot.load(Relaxed) {
                continue;
            }
            self.table(number, remembered.get(&self.ids[number]), now, at_once).await?;
        }
        Ok(())
    }

    async fn table(
        &mut self,
        number: usize,
        remembered: Option<&Remembered>,
        now: Option<Seen>,
        at_once: bool,
    ) -> Result<(), Problem> {
        let id = self.ids[number].clone();
        let then = remembered.and_then(|remembered| remembered.seen.as_ref());
        let Some(now) = now else {
            let problem = self.gone(&id, then).await?;
            self.trouble(number, Some(problem));
            return Ok(());
        };
        let publication = &self.shared.options.config.cdc.publication.name;
        let lacking = lacking(&id, &now.definition, publication);
        let lacks = lacking.is_some();
        self.trouble(number, lacking);
        self.refusals(number, &now.definition);
        if lacks {
            if now.definition.leaves.iter().any(|leaf| leaf.unlogged) {
                // Logged again it would look as before.
                return self.ledger.define(&id, &now, None).await;
            }
            return Ok(());
        }
        let Some(then) = then else {
            if self.shared.counters.tables[number].first_copy.load(Relaxed) {
                // It has failed, and is still to be made.
                return Ok(());
            }
            // Taken over from somebody who wrote nothing of it down.
            return self.ledger.define(&id, &now, None).await;
        };
        let mut others = remembered.map(|remembered| remembered.announced.clone()).unwrap_or_default();
        others.retain(|announced| !now.definition.fits(announced));
        if then.definition == now.definition && others.is_empty() {
            let watched = &mut self.tables[number];
            (watched.newest, watched.differs, watched.asked) = (Some(now), None, None);
            return Ok(());
        }
        let reason = match then.definition.outdated(&now.definition) {
            Some(reason) => Some(reason),
            None if !others.is_empty() => Some("its columns had other names or types for a while"),
            None => match self.doubt(number, then, &now).await {
                Ok(reason) => reason,
                Err(problem) if self.client.is_closed() => return Err(problem),
                Err(problem) => {
                    // Somebody has a partition locked. What is unknown stays so until it is seen.
                    tracing::debug!(%problem, "looking at partitions");
                    return Ok(());
                }
            },
        };
        let watched = &mut self.tables[number];
        let Some(reason) = reason else {
            (watched.newest, watched.differs) = (Some(now.clone()), None);
            return self.ledger.define(&id, &now, None).await;
        };
        if watched.asked.as_ref().is_some_and(|(asked, of)| *asked == now.definition && *of == others) {
            return Ok(());
        }
        let looks = match watched.differs.take() {
            Some((definition, looks)) if definition == now.definition => looks + 1,
            _ => 1,
        };
        watched.differs = Some((now.definition.clone(), looks));
        if at_once || looks >= SETTLED {
            let (oid, published) = (now.definition.oid, now.definition.published());
            let mapping = &self.shared.mappings[number];
            // Rows that are copied before the fields are there would not be found by them: otherwise the next look does both.
            // At a start it is done.
            let altered = match at_once {
                true => Ok(true),
                false => indices::altered(self.shared, self.client, mapping, oid, &published).await,
            };
            match altered {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(problem) if self.client.is_closed() => return Err(problem),
                Err(problem) => {
                    tracing::warn!(%problem, "extending the index of {id}");
                    return Ok(());
                }
            }
            self.tables[number].asked = Some((now.definition.clone(), others));
            return self.outdated(number, reason, &now).await;
        }
        Ok(())
    }

    /// Rows that came or went with a partition, by the partition itself.
    async fn doubt(&self, number: usize, then: &Seen, now: &Seen) -> Result<Option<&'static str>, Problem> {
        let (came, rewritten) = then.definition.doubtful(&now.definition);
        for leaf in came {
            // Empty by now it had nothing when it came that was not deleted, and streamed, since.
            if definition::holds_rows(self.client, self.server, leaf).await? {
                return Ok(Some("a partition was attached that may have had rows"));
            }
        }
        let newest = self.tables[number].newest.as_ref().filter(|newest| newest.definition == then.definition);
        for leaf in rewritten {
            if !definition::kept_rows(self.client, leaf, newest.unwrap_or(then).horizon).await? {
                return Ok(Some(if now.definition.partitioned {
                    "a partition may have been truncated, or unlogged for a while"
                } else {
                    "it may have been unlogged for a while"
                }));
            }
        }
        Ok(None)
    }

    async fn outdated(&self, number: usize, reason: &str, now: &Seen) -> Result<(), Problem> {
        let (mapping, counters) = (&self.shared.mappings[number], &self.shared.counters);
        if !self.copies(mapping) {
            counters.notice(
                Level::Warn,
                format!(
                    "{}: {reason}; documents of rows that were there before are left as they are, until it is copied again",
                    mapping.table
                ),
            );
            let said = current_position(self.client).await?;
            return self.ledger.define(&mapping.table, now, Some(said)).await;
        }
        counters.notice(Level::Warn, format!("{}: {reason}; it is copied again", mapping.table));
        self.shared.resnapshots.want(mapping, &counters.tables[number].resnapshot, Some(reason)).await
    }

    /// The documents of this table are those of a copy, to be made again when they are outdated.
    fn copies(&self, mapping: &TableMapping) -> bool {
        let config = &self.shared.options.config;
        let (snapshot, tables) = (&config.cdc.snapshot, &config.cdc.snapshot.tables);
        config.mode() == Mode::Initial
            && snapshot.on_schema_change == OnSchemaChange::Copy
            && (tables.is_empty() || tables.iter().any(|table| table.id == mapping.table))
    }

    /// Says what keeps changes of a table from coming, and when that is over.
    fn trouble(&mut self, number: usize, problem: Option<Problem>) {
        let (watched, counters) = (&mut self.tables[number], &self.shared.counters);
        let table = &counters.tables[number];
        match problem {
            Some(problem) => {
                if watched.trouble.as_ref() != Some(&problem) {
                    counters.notice(Level::Error, format!("{}. {}", problem.message, problem.hint));
                }
                table.set_problem(Some(problem.clone()));
                table.set_state(TableState::Failed);
                watched.trouble = Some(problem);
                (watched.differs, watched.asked) = (None, None);
            }
            None if watched.trouble.take().is_some() => {
                self.shared.settle(number);
                counters.notice(Level::Info, format!("{}: its changes are streamed again", table.table));
            }
            None => {}
        }
    }

    /// Says once that the source application's changes fail.
    fn refusals(&mut self, number: usize, now: &Definition) {
        let watched = &mut self.tables[number];
        if !now.refuses_changes() {
            watched.warned = false;
        } else if !std::mem::replace(&mut watched.warned, true) {
            self.shared.counters.notice(Level::Error, refuses_changes(&self.ids[number]));
        }
    }

    async fn gone(&self, id: &TableId, then: Option<&Seen>) -> Result<Problem, Problem> {
        let names = match then {
            Some(then) => crate::postgres::catalog::names(self.client, then.definition.oid).await?,
            None => Vec::new(),
        };
        let hint = "Its documents stay as they are. Make it again and it is copied again; otherwise take it out of the \
                    configuration before the next start.";
        Ok(match names.first() {
            Some(name) => Problem::new(
                ProblemKind::Setup,
                format!("table {id} has been renamed to {name}, which goes to no index"),
                format!("Rename it back, or write {name} in the configuration: the stream stops at its next change."),
            ),
            None => Problem::new(ProblemKind::Setup, format!("table {id} was dropped"), hint),
        })
    }

    /// The documents are in another index than before: those of rows that were not changed since are not in it.
    async fn indices(&self) -> Result<(), Problem> {
        if self.shared.options.handler.is_some() {
            // It writes where it likes.
            return Ok(());
        }
        // Paused means that nothing is sent, not even a question.
        let Some(_pass) = self.shared.gate.enter_open() else { return Ok(()) };
        let remembered: HashMap<TableId, Remembered> = self.ledger.remembered().await?;
        for mapping in &self.shared.mappings {
            let known = remembered.get(&mapping.table).and_then(|remembered| remembered.index.as_deref());
            let found = match self.shared.sink.client().index_uuid(&mapping.index).await {
                Ok(found) => found,
                Err(error) => {
                    // What is wrong with it the deliveries say.
                    tracing::debug!(%error, "looking at index {}", mapping.index);
                    return Ok(());
                }
            };
            match (known, found) {
                (Some(known), found) if found.as_deref() != Some(known) => {
                    return Err(lost_index(mapping, found.is_some()));
                }
                (None, Some(found)) => self.ledger.remember_index(&mapping.table, &found).await?,
                _ => {}
            }
        }
        Ok(())
    }
}

fn lost_index(mapping: &Arc<TableMapping>, another: bool) -> Problem {
    let (index, table) = (&mapping.index, &mapping.table);
    let what = if another {
        format!("index {index} was deleted and made anew: documents of {table} that it held are lost")
    } else {
        format!("index {index}, which holds the documents of {table}, was deleted")
    };
    Problem::new(
        ProblemKind::Gap,
        what,
        "Start once with `cdc.snapshot.resnapshot: true`: the tables are copied again, and documents whose rows are gone are \
         removed.",
    )
}

/// That UPDATE and DELETE of a table fail in the source application, and what to do.
pub(super) fn refuses_changes(table: &TableId) -> String {
    format!(
        "{table}: PostgreSQL refuses UPDATE and DELETE of its rows in the application, because they are published and the \
         replica identity names no row. ALTER TABLE {} REPLICA IDENTITY DEFAULT; with a primary key, else FULL",
        table.quoted()
    )
}

/// What keeps the changes of a table out of the stream.
fn lacking(table: &TableId, now: &Definition, publication: &str) -> Option<Problem> {
    let publication = quote_identifier(publication);
    let setup = |message: String, hint: String| Some(Problem::new(ProblemKind::Setup, message, hint));
    if now.publication.is_none() {
        return setup(
            format!("publication {publication} was dropped: nothing is streamed"),
            "Start again: what to do is said then.".to_owned(),
        );
    }
    if !now.is_published() {
        return setup(
            format!("publication {publication} does not publish table {table} any more: its changes are lost"),
            format!("ALTER PUBLICATION {publication} ADD TABLE {}; then it is copied again by itself.", table.quoted()),
        );
    }
    if now.leaves.iter().any(|leaf| leaf.unlogged) {
        return setup(
            format!("table {table} is unlogged: its changes are not streamed"),
            format!("ALTER TABLE {} SET LOGGED; then it is copied again by itself.", table.quoted()),
        );
    }
    None
}
