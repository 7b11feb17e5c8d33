//! The end of a history, and each time that no process runs: what has to be so then.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use pgtide::engine::{Phase, Status, TableState, TableStatus};

use super::causes::Cause;
use super::history::{Broken, Held, History, LIMIT, Rule, broken};
use super::oracle::{Pending, differences};
use super::schema::Kind;

/// How soon after everything is at rest an altered table is seen to be one, and has been copied again.
const NOTICED: Duration = Duration::from_secs(30);

impl History {
    /// No process runs any more: what it sent arrives before the next one starts, and what was confirmed is looked at
    /// before that.
    pub async fn down(&mut self) -> Held {
        self.sessions.rest().await;
        self.acknowledged().await?;
        self.release();
        self.store.until_applied().await;
        Ok(())
    }

    /// Every row that the slot has no change to send for is in the store as it is: what was confirmed was answered for.
    async fn acknowledged(&mut self) -> Held {
        let free = "SELECT active FROM pg_replication_slots WHERE slot_name = $1";
        let deadline = Instant::now() + LIMIT;
        let pending = loop {
            match self.client().query_opt(free, &[&self.place.name]).await.unwrap().map(|row| row.get::<_, bool>(0)) {
                None => return Ok(()),
                // The walsender of a process that was killed may take it only now.
                Some(false) => {
                    if let Some(pending) = Pending::of(self.client(), &self.place.name, &self.tables).await {
                        break pending;
                    }
                }
                Some(true) if Instant::now() > deadline => return broken(Rule::Quiet, "the slot stays in use"),
                Some(true) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        let Some(wanted) = self.wanted(true).await else { return Ok(()) };
        let altered = self.sessions.altered();
        let mut found = Vec::new();
        for table in self.tables.iter().filter(|table| !wanted.contains(table.name()) && !altered.contains(table)) {
            found.extend(differences(self.client(), &self.store, *table, &pending).await);
        }
        if !found.is_empty() {
            return broken(
                Rule::Acknowledged,
                format!("confirmed, but not in the store:\n    {}", found.join("\n    ")),
            );
        }
        self.log.add("what is confirmed is in the store");
        Ok(())
    }

    /// Tables that are to be copied again; none while the first copy is not done.
    pub async fn wanted(&self, after_first_copy: bool) -> Option<BTreeSet<String>> {
        let there = "SELECT to_regclass('public.cdc_snapshot_job') IS NOT NULL
                        AND to_regclass('public.cdc_snapshot_chunks') IS NOT NULL";
        if !self.client().query_one(there, &[]).await.unwrap().get::<_, bool>(0) {
            return None;
        }
        let done = "SELECT completed FROM public.cdc_snapshot_job WHERE slot_name = $1";
        let done = self.client().query_opt(done, &[&self.place.name]).await.unwrap();
        if after_first_copy && !done.is_some_and(|row| row.get::<_, bool>(0)) {
            return None;
        }
        let wanted = "SELECT table_name FROM public.cdc_snapshot_chunks WHERE slot_name = $1 AND chunk_index < 0";
        let wanted = self.client().query(wanted, &[&self.place.name]).await.unwrap();
        Some(wanted.iter().map(|row| row.get(0)).collect())
    }

    /// Ends everything that stands in the way, and waits until all is delivered, and what was altered is copied again.
    pub async fn settle(&mut self) -> Held {
        self.sessions.rest().await;
        self.release();
        self.processes.only_the_leader().await?;
        self.resume().await?;
        for table in self.tables.clone() {
            self.ask(table, "resume").await;
        }
        self.back("60s").await?;
        let position = self.position().await;
        self.log.add(format!("to be delivered: {position}"));
        // The limit is for a standstill: a busy machine is slow.
        let (began, mut moved, mut far) = (Instant::now(), Instant::now(), None);
        let (ends, mut last) = (self.processes.ends, None);
        let (mut rest, mut asked) = (None, BTreeSet::new());
        while moved.elapsed() < LIMIT && began.elapsed() < 4 * LIMIT {
            if !self.processes.running()? {
                if self.processes.ends > ends + 1 {
                    return broken(Rule::Ends, "the process ends by itself again and again");
                }
                self.log.add("start");
                self.processes.start()?;
            }
            if let Some(status) = self.processes.first().status().await {
                if status.phase == Phase::Failed {
                    return broken(Rule::Ends, format!("failed: {:?}", status.problem));
                }
                if quiet(&status) && !self.ask_again(&status, &mut asked).await? && self.delivered(&position).await {
                    if !status.rejections.is_empty() {
                        return broken(Rule::Equal, format!("refused for good: {:?}", status.rejections));
                    }
                    if rest.is_none() {
                        self.log.add("quiet");
                    }
                    if rest.get_or_insert_with(Instant::now).elapsed() > NOTICED || self.outdated().await.is_empty() {
                        return Ok(());
                    }
                }
                let rows: u64 = status.tables.iter().map(|table| table.rows_done).sum();
                let now = Some((status.replication.confirmed_lsn, rows));
                if now > far {
                    (moved, far) = (Instant::now(), now);
                }
                last = Some(status);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let said = last.map(|status| {
            let tables: Vec<String> = status
                .tables
                .iter()
                .map(|table| format!("{} {:?} {}", table.table.0, table.state, table.resnapshot))
                .collect();
            format!("{:?} {:?} {tables:?} {:?}", status.phase, status.problem, status.replication.confirmed_lsn)
        });
        broken(
            Rule::Quiet,
            format!("not at rest after {:?}: {said:?}; wanted: {:?}", began.elapsed(), self.wanted(false).await),
        )
    }

    /// Asks for copies that were given up: a copy that meets what does not pass by itself is the operator's to ask for.
    /// Once for each, and only if the history is to blame for that.
    async fn ask_again(&self, status: &Status, asked: &mut BTreeSet<Kind>) -> Result<bool, Broken> {
        let mut asks = Vec::new();
        for table in status.tables.iter().filter(|table| table.problem.is_some()) {
            let name = table.table.0.to_string();
            let kind = *self.tables.iter().find(|kind| kind.full_name() == name).unwrap();
            let explained = [Cause::Cut, Cause::Table, Cause::Store].map(|cause| Some(cause as i32));
            let explained = self.cancelled.contains(&kind)
                || !given_up(table) && explained.into_iter().any(|code| self.causes.explain(code, None));
            if !explained || !asked.insert(kind) {
                broken(Rule::Quiet, format!("the copy of {name} was given up: {:?}", table.problem))?;
            }
            asks.push(kind);
        }
        for table in &asks {
            self.ask(*table, "resnapshot").await;
        }
        Ok(!asks.is_empty())
    }

    /// Everything is confirmed, and nothing is to be copied again.
    async fn delivered(&self, position: &str) -> bool {
        let confirmed = "SELECT confirmed_flush_lsn >= $2::text::pg_lsn FROM pg_replication_slots WHERE slot_name = $1";
        let confirmed = self.client().query_opt(confirmed, &[&self.place.name, &position]).await.unwrap();
        confirmed.is_some_and(|row| row.get::<_, bool>(0)) && self.wanted(false).await.unwrap_or_default().is_empty()
    }

    /// How documents of altered tables differ from their rows.
    async fn outdated(&self) -> Vec<String> {
        let mut found = Vec::new();
        for table in self.sessions.altered() {
            found.extend(differences(self.client(), &self.store, table, &Pending::default()).await);
        }
        found
    }

    /// Documents are rows, in all tables.
    pub async fn equal(&self) -> Held {
        for table in &self.tables {
            let found = differences(self.client(), &self.store, *table, &Pending::default()).await;
            if !found.is_empty() {
                return broken(Rule::Equal, found.join("\n    "));
            }
        }
        Ok(())
    }
}

fn quiet(status: &Status) -> bool {
    status.phase == Phase::Streaming
        && status.tables.iter().all(|table| (table.state == TableState::Live || given_up(table)) && !table.resnapshot)
}

/// A copy was given up that documents need.
fn given_up(table: &TableStatus) -> bool {
    table.state == TableState::Failed
        && table.problem.as_ref().is_some_and(|problem| problem.message.contains("given up"))
}
