//! The sessions that run transactions, as many as they are allowed to.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tokio::sync::watch;
use tokio_postgres::Client;

use super::schema::Kind;
use super::traffic::{Traffic, Transaction};

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
    pub fn start(clients: Vec<Client>, traffic: impl Fn(u64) -> Traffic, log: &Log) -> Self {
        let (allowed, done) = (watch::Sender::new(0), watch::Sender::new(vec![0; clients.len()]));
        let altered = Arc::new(Mutex::new(BTreeSet::new()));
        for (number, client) in clients.into_iter().enumerate() {
            let mut session = Session {
                number,
                client,
                traffic: traffic(number as u64),
                log: log.clone(),
                altered: Arc::clone(&altered),
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

    /// Tables whose columns a transaction may have altered.
    pub fn altered(&self) -> BTreeSet<Kind> {
        self.altered.lock().unwrap().clone()
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
}

impl Session {
    async fn transaction(&mut self) {
        let Transaction { statements, altered } = self.traffic.next();
        self.altered.lock().unwrap().extend(altered);
        for statement in &statements {
            let outcome = self.client.batch_execute(statement).await;
            let said = match &outcome {
                Ok(()) => String::new(),
                Err(error) => format!("   -- {}", error.as_db_error().map_or("lost", |error| error.message())),
            };
            self.log.add(format!("session {}: {statement}{said}", self.number));
            if outcome.is_err() {
                self.client.batch_execute("ROLLBACK").await.expect("a session of the test was lost");
                self.log.add(format!("session {}: ROLLBACK", self.number));
                return;
            }
        }
    }
}
