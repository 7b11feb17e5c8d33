//! The sessions that run transactions, as many as they are allowed to.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tokio::sync::watch;
use tokio_postgres::Client;

use super::causes::{Cause, Causes};
use super::schema::Kind;
use super::traffic::{Statement, Traffic};

/// What was done, in order.
#[derive(Clone)]
pub struct Log(Arc<(Instant, Mutex<Vec<String>>)>);

impl Log {
    pub fn new() -> Self {
        Self(Arc::new((Instant::now(), Mutex::default())))
    }

    pub fn add(&self, line: impl AsRef<str>) {
        let (began, lines) = &*self.0;
        lines.lock().unwrap().push(format!("{:7.3} {}", began.elapsed().as_secs_f64(), line.as_ref()));
    }

    pub fn text(&self) -> String {
        self.0.1.lock().unwrap().join("\n")
    }
}

/// All sessions of a history.
pub struct Sessions {
    allowed: watch::Sender<u32>,
    /// Transactions run, by session.
    done: watch::Sender<Vec<u32>>,
    altered: Arc<Mutex<BTreeSet<Kind>>>,
    /// Transactions run before the last [`go`](Self::go).
    before: u32,
}

impl Sessions {
    pub fn start(clients: Vec<Client>, traffic: impl Fn(u64) -> Traffic, causes: &Causes, log: &Log) -> Self {
        let (allowed, done) = (watch::Sender::new(0), watch::Sender::new(vec![0; clients.len()]));
        let altered = Arc::new(Mutex::new(BTreeSet::new()));
        for (number, client) in clients.into_iter().enumerate() {
            let mut session = Session {
                number,
                client,
                traffic: traffic(number as u64),
                log: log.clone(),
                altered: Arc::clone(&altered),
                causes: causes.clone(),
            };
            let (mut allowed, done) = (allowed.subscribe(), done.clone());
            tokio::spawn(async move {
                for count in 1.. {
                    if allowed.wait_for(|allowed| *allowed >= count).await.is_err() {
                        return;
                    }
                    session.transaction().await;
                    done.send_modify(|done| done[session.number] = count);
                }
            });
        }
        Self { allowed, done, altered, before: 0 }
    }

    /// Lets each run so many more.
    pub fn go(&mut self, count: u32) {
        self.before = self.done.borrow().iter().sum();
        self.allowed.send_modify(|allowed| *allowed += count);
    }

    /// Waits until so many were run since the last [`go`](Self::go).
    pub async fn until(&self, count: u32) {
        let wanted = self.before + count;
        self.done.subscribe().wait_for(|done| done.iter().sum::<u32>() >= wanted).await.unwrap();
    }

    /// Waits until all that are allowed were run.
    pub async fn rest(&self) {
        let allowed = *self.allowed.borrow();
        self.done.subscribe().wait_for(|done| done.iter().all(|done| *done >= allowed)).await.unwrap();
    }

    /// Tables whose documents are to be made anew, which the stream does not say: they were altered.
    pub fn altered(&self) -> BTreeSet<Kind> {
        self.altered.lock().unwrap().clone()
    }

    /// The same, by somebody else.
    pub fn alter(&self, table: Kind) {
        self.altered.lock().unwrap().insert(table);
    }

    /// Transactions run.
    pub fn transactions(&self) -> u32 {
        self.done.borrow().iter().sum()
    }
}

struct Session {
    number: usize,
    client: Client,
    traffic: Traffic,
    log: Log,
    altered: Arc<Mutex<BTreeSet<Kind>>>,
    causes: Causes,
}

impl Session {
    async fn transaction(&mut self) {
        let statements = self.traffic.next();
        // What is altered counts once it is committed.
        let (mut altered, mut at_savepoint) = (Vec::<Kind>::new(), 0);
        // A lock stays to the end of the transaction.
        let locks = statements.iter().any(|statement| statement.locks);
        if locks {
            self.causes.begin(Cause::Table);
        }
        for Statement { sql, alters, .. } in &statements {
            let outcome = self.client.batch_execute(sql).await;
            let said = match &outcome {
                Ok(()) => String::new(),
                Err(error) => format!("   -- {}", error.as_db_error().map_or("lost", |error| error.message())),
            };
            self.log.add(format!("session {}: {sql}{said}", self.number));
            if outcome.is_err() {
                self.client.batch_execute("ROLLBACK").await.expect("a session of the test was lost");
                self.log.add(format!("session {}: ROLLBACK", self.number));
                altered.clear();
                break;
            }
            match sql.as_str() {
                "SAVEPOINT s" => at_savepoint = altered.len(),
                "ROLLBACK TO s" => altered.truncate(at_savepoint),
                "ROLLBACK" => altered.clear(),
                _ => altered.extend(alters),
            }
        }
        self.altered.lock().unwrap().extend(altered);
        if locks {
            self.causes.end(Cause::Table);
        }
    }
}
