//! The writing half of a streaming connection: standby status updates, whoever reads or does not read the other half.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pgwire_replication::protocol::framing::{write_copy_data, write_copy_done};
use pgwire_replication::protocol::replication::{encode_standby_status_update, unix_to_pg_timestamp};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

use crate::lsn::Lsn;

use super::super::error::PostgresError;
use super::socket::Stream;
use super::{closed, wire};

/// Between two updates when nothing happens. A server with a `wal_sender_timeout` that is not well above it gives us up.
const INTERVAL: Duration = Duration::from_secs(1);
/// Between two updates when positions rise one after the other.
const SHORTEST: Duration = Duration::from_millis(100);
/// How long the end of a connection may take.
const PARTING: Duration = Duration::from_secs(5);
/// The message that ends a session.
const TERMINATE: &[u8] = b"X\0\0\0\x04";

/// What the two halves of a connection know of each other.
#[derive(Default)]
pub(super) struct Link {
    received: AtomicU64,
    confirmed: AtomicU64,
    applied: AtomicU64,
    sent: AtomicU64,
    dead: AtomicBool,
    ended: AtomicBool,
    reply: Notify,
    raised: Notify,
    parting: Notify,
    /// The reading half after its reader was dropped.
    unread: Mutex<Option<ReadHalf<Box<dyn Stream>>>>,
}

impl Link {
    /// Has one caller, who calls with rising positions.
    pub(super) fn received(&self, position: Lsn) {
        self.received.store(position.0, Ordering::Relaxed);
    }

    pub(super) fn reply(&self) {
        self.reply.notify_one();
    }

    pub(super) fn ended(&self) {
        self.ended.store(true, Ordering::Release);
        self.parting.notify_one();
    }

    pub(super) fn give_back(&self, read: ReadHalf<Box<dyn Stream>>) {
        *self.unread.lock().unwrap_or_else(PoisonError::into_inner) = Some(read);
        self.parting.notify_one();
    }

    fn take_unread(&self) -> Option<ReadHalf<Box<dyn Stream>>> {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Tells the server what is received and what may be forgotten: every second, when the server asks, and soon after
/// [`Feedback::confirm`] and [`Feedback::applied`]. It does so whether or not anybody reads the stream.
///
/// The connection is closed, without a last word, when the last clone is dropped; [`Feedback::finish`] ends it properly.
#[derive(Clone)]
pub struct Feedback {
    link: Arc<Link>,
    finish: mpsc::Sender<oneshot::Sender<Result<(), PostgresError>>>,
}

impl Feedback {
    /// Everything before `position` is durable elsewhere: the server may forget it. Never goes back.
    pub fn confirm(&self, position: Lsn) {
        if self.link.confirmed.fetch_max(position.0, Ordering::AcqRel) < position.0 {
            self.link.raised.notify_one();
        }
    }

    /// Everything before `position` is answered for. The server shows it as `replay_lsn`, and forgets nothing for it.
    pub fn applied(&self, position: Lsn) {
        if self.link.applied.fetch_max(position.0, Ordering::AcqRel) < position.0 {
            self.link.raised.notify_one();
        }
    }

    /// The newest position that was written to the server as confirmed. It has not said that it got it.
    #[must_use]
    pub fn confirmed_sent(&self) -> Lsn {
        Lsn(self.link.sent.load(Ordering::Acquire))
    }

    /// Nothing is sent any more: the connection failed or was ended.
    #[must_use]
    pub fn dead(&self) -> bool {
        self.link.dead.load(Ordering::Acquire)
    }

    /// Ends the connection: the newest confirmed position is sent and the stream closed. Waits up to 5 s for the server to
    /// have taken it, for which the [`Reader`](super::Reader) has to be dropped or to read to the end.
    ///
    /// # Errors
    /// The connection was lost before, or the server did not close it in time: the position may not have arrived.
    pub async fn finish(self) -> Result<(), PostgresError> {
        let lost = || PostgresError::Closed("it was lost before the last position was sent".to_owned());
        let (answer, answered) = oneshot::channel();
        self.finish.send(answer).await.map_err(|_| lost())?;
        // A write that hangs keeps the task from hearing us.
        match tokio::time::timeout(PARTING + SHORTEST, answered).await {
            Ok(Ok(outcome)) => outcome,
            _ => Err(lost()),
        }
    }
}

/// Starts the task that writes. Until a position is confirmed it confirms none, which changes nothing for the slot.
pub(super) fn start(write: WriteHalf<Box<dyn Stream>>) -> (Feedback, Arc<Link>) {
    let link = Arc::new(Link::default());
    let (finish, finished) = mpsc::channel(1);
    tokio::spawn(run(write, link.clone(), finished));
    (Feedback { link: link.clone(), finish }, link)
}

async fn run(
    mut write: WriteHalf<Box<dyn Stream>>,
    link: Arc<Link>,
    mut finished: mpsc::Receiver<oneshot::Sender<Result<(), PostgresError>>>,
) {
    let mut last = Instant::now();
    let mut due = last + SHORTEST;
    let end = loop {
        // The end first, then what the server waits for, then what can wait.
        tokio::select! {
            biased;
            answer = finished.recv() => break answer,
            () = link.reply.notified() => {}
            // One that is near goes with all that is said until then.
            () = link.raised.notified(), if due > last + SHORTEST => {
                due = last + SHORTEST;
                continue;
            }
            () = tokio::time::sleep_until(due) => {}
        }
        if let Err(error) = update(&mut write, &link).await {
            tracing::debug!(%error, "no standby status update can be sent any more");
            break None;
        }
        last = Instant::now();
        due = last + INTERVAL;
    };
    if let Some(answer) = end {
        let parted = tokio::time::timeout(PARTING, part(write, &link)).await;
        let late = || PostgresError::Closed("the server did not close it in time".to_owned());
        // Nobody may wait for the answer any more.
        let _ = answer.send(parted.unwrap_or_else(|_| Err(late())));
    }
    link.dead.store(true, Ordering::Release);
    link.take_unread();
}

async fn update(write: &mut WriteHalf<Box<dyn Stream>>, link: &Link) -> Result<(), PostgresError> {
    let confirmed = link.confirmed.load(Ordering::Acquire);
    let received = link.received.load(Ordering::Relaxed);
    let applied = link.applied.load(Ordering::Acquire);
    write_copy_data(write, &status_update(received, confirmed, applied)).await.map_err(wire)?;
    link.sent.store(confirmed, Ordering::Release);
    Ok(())
}

/// The last update, then the end, then patience: closing a socket with unread bytes in it makes the kernel throw away
/// what the server has not read yet, and that is the update.
async fn part(mut write: WriteHalf<Box<dyn Stream>>, link: &Link) -> Result<(), PostgresError> {
    update(&mut write, link).await?;
    write_copy_done(&mut write).await.map_err(wire)?;
    write.write_all(TERMINATE).await.map_err(|error| closed(&error))?;
    write.flush().await.map_err(|error| closed(&error))?;
    loop {
        if let Some(mut unread) = link.take_unread() {
            return drain(&mut unread).await;
        }
        if link.ended.load(Ordering::Acquire) {
            return Ok(());
        }
        link.parting.notified().await;
    }
}

async fn drain(unread: &mut ReadHalf<Box<dyn Stream>>) -> Result<(), PostgresError> {
    let mut bytes = vec![0; 64 << 10];
    loop {
        match unread.read(&mut bytes).await {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            // A server that ends by TLS may leave out the farewell.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(closed(&error)),
        }
    }
}

fn status_update(received: u64, confirmed: u64, applied: u64) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
    let now = unix_to_pg_timestamp(i64::try_from(now).unwrap_or(i64::MAX));
    let mut update = encode_standby_status_update(confirmed.into(), now, false);
    // The encoder gives one position for written, flushed and applied. With nothing confirmed, a server that shuts down
    // waits for what is written.
    update[1..9].copy_from_slice(&received.max(confirmed).to_be_bytes());
    update[17..25].copy_from_slice(&applied.max(confirmed).to_be_bytes());
    update
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use tokio::io::{DuplexStream, split};

    use super::*;

    /// `CopyData` with a standby status update: tag, length, the message.
    const LENGTH: usize = 1 + 4 + 34;

    /// Received, confirmed and applied, as the server reads them of the next update.
    async fn next(server: &mut DuplexStream) -> [u64; 3] {
        let mut update = [0; LENGTH];
        server.read_exact(&mut update).await.unwrap();
        assert_eq!((update[0], update[5]), (b'd', b'r'));
        [6, 14, 22].map(|at| u64::from_be_bytes(update[at..at + 8].try_into().unwrap()))
    }

    #[tokio::test]
    async fn what_is_answered_for_is_said_at_once_and_not_for_each_transaction() {
        let (ours, mut server) = tokio::io::duplex(1 << 16);
        let (_read, write) = split(Box::new(ours) as Box<dyn Stream>);
        let (feedback, _link) = start(write);
        assert_eq!(next(&mut server).await, [0; 3]);
        // So long that the next one by itself would end the test.
        let began = Instant::now();
        for round in 1..=10 {
            feedback.applied(Lsn(round * 8));
            while next(&mut server).await[2] < round * 8 {}
        }
        assert!(began.elapsed() < 6 * INTERVAL, "{:?}: each waited for the next regular one", began.elapsed());

        let (began, mut position) = (Instant::now(), 1_000);
        while began.elapsed() < 5 * SHORTEST {
            position += 8;
            feedback.applied(Lsn(position));
            tokio::task::yield_now().await;
        }
        let mut updates = 1;
        while next(&mut server).await[2] < position {
            updates += 1;
        }
        let most = began.elapsed().as_millis() / SHORTEST.as_millis() + 2;
        assert!(updates <= most, "{updates} updates for {} positions, {most} at most", (position - 1_000) / 8);
    }
}
