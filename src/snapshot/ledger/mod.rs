//! The tables in PostgreSQL that remember how far the copy has come: those of the reference, and a few columns more.
//!
//! They live in the schema `public`, where the reference looks for its own. A chunk's row says `pending`,
//! `in_progress` or `completed`; it is completed only after the sink has answered for its last document. Losing the
//! record of a completed chunk costs a second copy of it and nothing else, so chunk rows are written without waiting
//! for the disk.
//!
//! A table that is to be copied again has a row of its own, of chunk -1 and `wanted`, from the wish until documents
//! without a row are removed: its chunks alone would be completed before that.

mod chunks;
mod job;
mod lock;
mod offer;
mod position;
mod recorded;
mod schema;
mod tables;

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{OnceCell, RwLock, RwLockReadGuard, RwLockWriteGuard, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_postgres::{Client, Statement};

pub use self::chunks::{ChunkRow, Done};
pub use self::job::Job;
pub use self::lock::Leader;
pub(crate) use self::lock::try_lock;
pub use self::offer::{Offer, Offered};
pub use self::position::Position;
pub use self::recorded::Recorded;
pub use self::tables::Remembered;
use crate::config::Cdc;
use crate::postgres::connect::connect;
use crate::problem::{Problem, ProblemKind};
use crate::sink::Lease;

/// The ledger of one slot (or, in mode `snapshot_only`, of one job name). Gives a sign of life every `heartbeatInterval`
/// for as long as it lives.
#[derive(Debug)]
pub struct Ledger {
    /// There is one connection, and a transaction has it alone: what another task asks for in between would go down with it,
    /// or bring it down.
    client: RwLock<Client>,
    job: String,
    instance: String,
    claim_timeout: Duration,
    /// What each sign of life renews, and for how long: less than it takes the others to take over.
    lease: (Lease, Duration),
    /// Chunks that this process works on, by their ids: the tokens of its claims.
    claims: std::sync::Mutex<HashMap<i32, i32>>,
    /// Why it is of no use any more.
    lost: watch::Sender<Option<Problem>>,
    claim: OnceCell<Statement>,
    complete: OnceCell<Statement>,
}

/// How soon the end of the ledger's connection is noticed. Nobody tells, so it is looked at.
const LOOK: Duration = Duration::from_millis(100);

impl Ledger {
    /// The ledger of `job`, its tables created where they are missing. `instance` names this process in claims.
    /// `lease` is valid from now on only as long as the signs of life are answered.
    ///
    /// # Errors
    /// No connection, or the tables cannot be created: the role needs CREATE on the schema `public`.
    pub async fn open(cdc: &Cdc, job: &str, instance: &str, lease: Lease) -> Result<Arc<Self>, Problem> {
        let client = connect(cdc, &lock::purpose(instance)).await?;
        // Its answers are short. One that nobody acknowledges must not hold the lock for the minutes of TCP's own patience.
        client.batch_execute("SET synchronous_commit = off; SET tcp_user_timeout = 25000").await?;
        schema::ensure(&client).await?;
        let ledger = Arc::new(Self {
            client: RwLock::new(client),
            job: job.to_owned(),
            instance: instance.to_owned(),
            claim_timeout: cdc.snapshot.claim_timeout,
            lease: (lease, (cdc.snapshot.claim_timeout + cdc.snapshot.heartbeat_interval) / 2),
            claims: std::sync::Mutex::default(),
            lost: watch::Sender::new(None),
            claim: OnceCell::new(),
            complete: OnceCell::new(),
        });
        tokio::spawn(beat(Arc::downgrade(&ledger), cdc.snapshot.heartbeat_interval));
        Ok(ledger)
    }

    /// Ends when the ledger's connection has ended, and the lock with it, or when others have taken over what this process
    /// had claimed: either way it has to begin again.
    pub async fn lost(&self) -> Problem {
        let mut lost = self.lost.subscribe();
        match lost.wait_for(Option::is_some).await.map(|problem| problem.clone()) {
            Ok(Some(problem)) => problem,
            // The sender lives in this ledger.
            _ => std::future::pending().await,
        }
    }

    /// For one statement. Whoever has it must not ask for it again: between the two a transaction may wait for its turn.
    async fn client(&self) -> RwLockReadGuard<'_, Client> {
        self.client.read().await
    }

    /// Begins a transaction that is on this server's disk once it has committed. Dropped without a commit it is rolled back.
    ///
    /// On another server's it need not be: that one is on another timeline, which is noticed. Waiting for standbys, one of which
    /// may be we ourselves (`synchronous_standby_names`), it would keep the ledger, and so the acknowledgements, waiting.
    async fn transaction(&self) -> Result<Open<'_>, Problem> {
        let open = Open { client: self.client.write().await, ended: false };
        open.batch_execute("BEGIN; SET LOCAL synchronous_commit = local").await?;
        Ok(open)
    }
}

/// Says every so often that this process lives, until the ledger is lost or dropped.
async fn beat(ledger: Weak<Ledger>, interval: Duration) {
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last: Option<Instant> = None;
    loop {
        ticks.tick().await;
        let Some(ledger) = ledger.upgrade() else { return };
        let outcome = if ledger.client.try_read().is_ok_and(|client| client.is_closed()) {
            Err(Problem::new(
                ProblemKind::Postgres,
                "the connection of the ledger has ended, and with it the lock that says which process leads",
                "It is made again by itself. If it keeps ending, the server's log says why.",
            )
            .transient())
        } else if last.is_none_or(|last| last.elapsed() >= interval) {
            last = Some(Instant::now());
            ledger.heartbeat().await
        } else {
            Ok(())
        };
        if let Err(problem) = outcome {
            ledger.lost.send_replace(Some(problem));
            return;
        }
    }
}

/// A transaction of the ledger's connection.
struct Open<'a> {
    client: RwLockWriteGuard<'a, Client>,
    ended: bool,
}

impl Open<'_> {
    /// # Errors
    /// It did not commit, or nobody knows.
    async fn commit(mut self) -> Result<(), Problem> {
        // COMMIT is no error in a transaction that has failed; any other statement is.
        self.batch_execute("SELECT; COMMIT").await?;
        self.ended = true;
        Ok(())
    }
}

impl Deref for Open<'_> {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // Queued on the connection before anything that comes later; the answer is of no interest.
            drop(self.batch_execute("ROLLBACK").now_or_never());
        }
    }
}
