//! The reading half of a streaming connection.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf, ReadHalf};
use tokio::time::Instant;

use crate::lsn::Lsn;

use super::super::error::PostgresError;
use super::super::pgoutput::POSTGRES_EPOCH;
use super::feedback::Link;
use super::socket::Stream;
use super::{closed, protocol, server_error};

/// Capacity of the buffer, unless a message is larger.
const BUFFER: usize = 1 << 20;
/// PostgreSQL's own limit of a message.
const LONGEST_MESSAGE: usize = 1 << 30;
/// How long bytes may gather in the kernel while much comes.
const GATHER: Duration = Duration::from_millis(10);
/// Reads that follow each other within [`QUICK`] before much is said to come.
const QUICK_READS: u32 = 16;
/// See [`QUICK_READS`].
const QUICK: Duration = Duration::from_micros(500);
/// Less than this gathered: not much comes any more.
const MUCH: usize = 4 << 10;
/// A read that gave so much is followed by another that does not wait.
const MORE: usize = 2 << 10;

const OBJECT_NOT_IN_PREREQUISITE_STATE: &str = "55000";

/// A message of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A message of the output plugin, for [`decode`](super::super::pgoutput::decode).
    Data {
        /// Where in the log it belongs to; zero for some messages.
        wal_start: Lsn,
        /// How far the server's log is read.
        wal_end: Lsn,
        /// When it was sent, microseconds since 1970 by the server's clock.
        sent_at: i64,
        /// The message.
        data: &'a [u8],
    },
    /// The server says that it is there.
    KeepAlive {
        /// Everything of this publication before here has been sent.
        wal_end: Lsn,
        /// The server wants a sign of life. [`Feedback`](super::Feedback) gives it by itself.
        reply_requested: bool,
    },
}

/// Reads the stream. Dropping it leaves the connection open until the last [`Feedback`](super::Feedback) is gone.
pub struct Reader {
    /// None only while it is being dropped.
    read: Option<ReadHalf<Box<dyn Stream>>>,
    only_try: Arc<AtomicBool>,
    link: Arc<Link>,
    buffer: Vec<u8>,
    /// What is read and not taken yet: `buffer[start..end]`.
    start: usize,
    end: usize,
    received: Lsn,
    pace: Pace,
}

/// Whether to read at once or to let bytes gather. The server pays a wake-up for every message as long as its reader
/// sleeps in the kernel, so a reader that keeps up too eagerly halves the server's speed. A single commit is read at once.
#[derive(Default)]
struct Pace {
    /// Set while much comes: when to read again. A moment, not a span, so that a dropped wait does not begin anew.
    read_at: Option<Instant>,
    quick_reads: u32,
    last: Option<Instant>,
}

impl Pace {
    /// Takes note of a read that gave `bytes` at `now`.
    fn note(&mut self, bytes: usize, now: Instant) {
        let quick = self.read_at.is_none() && self.last.is_some_and(|last| now.duration_since(last) < QUICK);
        self.quick_reads = if quick { self.quick_reads + 1 } else { 0 };
        self.read_at = (bytes >= MUCH || self.quick_reads >= QUICK_READS).then_some(now + GATHER);
        self.last = Some(now);
    }
}

impl Reader {
    pub(super) fn new(read: ReadHalf<Box<dyn Stream>>, only_try: Arc<AtomicBool>, link: Arc<Link>) -> Self {
        Self {
            read: Some(read),
            only_try,
            link,
            buffer: vec![0; BUFFER],
            start: 0,
            end: 0,
            received: Lsn::ZERO,
            pace: Pace::default(),
        }
    }

    /// The next message of those that are read already; none if no whole one is left: then [`Reader::fill`].
    ///
    /// # Errors
    /// The server's error, the end of the stream, or what is no message. The connection is then of no use any more.
    #[inline]
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, PostgresError> {
        loop {
            let Some((tag, from, to)) = self.take()? else { return Ok(None) };
            if tag != b'd' {
                self.other(tag, from, to)?;
                continue;
            }
            let (first, second, third) = match self.buffer[from..to].split_first_chunk::<25>() {
                Some(([b'w', header @ ..], _)) => numbers(header),
                _ => return self.keep_alive(from, to),
            };
            self.saw(Lsn(second));
            return Ok(Some(Frame::Data {
                wal_start: Lsn(first),
                wal_end: Lsn(second),
                sent_at: i64::from_ne_bytes(third.to_ne_bytes()).saturating_add(POSTGRES_EPOCH),
                data: &self.buffer[from + 25..to],
            }));
        }
    }

    /// Takes the next whole message: its tag, and where its payload begins and ends.
    #[inline]
    fn take(&mut self) -> Result<Option<(u8, usize, usize)>, PostgresError> {
        let Some((&[tag, a, b, c, d], _)) = self.buffer[self.start..self.end].split_first_chunk::<5>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes([a, b, c, d]) as usize + 1;
        if !(5..=LONGEST_MESSAGE).contains(&length) {
            return Err(PostgresError::Protocol(format!("a message of {length} bytes")));
        }
        if self.end - self.start < length {
            return Ok(None);
        }
        let from = self.start + 5;
        self.start += length;
        Ok(Some((tag, from, self.start)))
    }

    fn keep_alive(&mut self, from: usize, to: usize) -> Result<Option<Frame<'_>>, PostgresError> {
        let (b'k', &[position @ .., _, _, _, _, _, _, _, _, reply]) = (match self.buffer[from..to].split_first() {
            Some((&kind, rest)) => (kind, <&[u8; 17]>::try_from(rest).map_err(protocol)?),
            None => return Err(PostgresError::Protocol("an empty replication message".to_owned())),
        }) else {
            return Err(PostgresError::Protocol("a replication message of unknown type".to_owned()));
        };
        let wal_end = Lsn(u64::from_be_bytes(position));
        self.saw(wal_end);
        if reply == 1 {
            self.link.reply();
        }
        Ok(Some(Frame::KeepAlive { wal_end, reply_requested: reply == 1 }))
    }

    #[inline]
    fn saw(&mut self, position: Lsn) {
        if position > self.received {
            self.received = position;
            self.link.received(position);
        }
    }

    /// What may come beside the stream.
    #[cold]
    fn other(&self, tag: u8, from: usize, to: usize) -> Result<(), PostgresError> {
        match tag {
            b'E' => Err(PostgresError::Server(server_error(&self.buffer[from..to]).of_a_stream())),
            // CopyDone, or the end of the command.
            b'c' | b'C' | b'Z' => Err(PostgresError::Closed("the server ended the stream".to_owned())),
            // From version 18 on a publication that is missing is a warning, and its changes are left out of the stream.
            b'N' => {
                let notice = server_error(&self.buffer[from..to]);
                let missing = notice.sqlstate == OBJECT_NOT_IN_PREREQUISITE_STATE;
                if missing { Err(PostgresError::Server(notice.of_a_stream())) } else { Ok(()) }
            }
            // Settings, notifications.
            b'S' | b'A' => Ok(()),
            other => Err(PostgresError::Protocol(format!(
                "a message of the type {} in the stream",
                char::from(other).escape_default()
            ))),
        }
    }

    /// Waits for more bytes. While much comes it lets them gather for some milliseconds first. May be dropped at any time
    /// without loss.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn fill(&mut self) -> Result<(), PostgresError> {
        self.make_room();
        if self.end == self.buffer.len() {
            // Full of messages that wait to be taken.
            return Ok(());
        }
        if let Some(moment) = self.pace.read_at {
            tokio::time::sleep_until(moment).await;
        }
        let Self { read: Some(read), only_try, buffer, end, .. } = self else {
            return Err(PostgresError::Closed("it is being given up".to_owned()));
        };
        let before = *end;
        // TLS hands out a few kilobytes at a time, so there may be more where much came from.
        let outcome = poll_fn(|context| {
            loop {
                let mut unfilled = ReadBuf::new(&mut buffer[*end..]);
                only_try.store(*end > before, Ordering::Relaxed);
                match Pin::new(&mut *read).poll_read(context, &mut unfilled) {
                    Poll::Pending if *end == before => return Poll::Pending,
                    Poll::Pending => break,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(closed(&error))),
                    Poll::Ready(Ok(())) => {}
                }
                let bytes = unfilled.filled().len();
                if bytes == 0 {
                    return Poll::Ready(Err(PostgresError::Closed("the server closed it".to_owned())));
                }
                *end += bytes;
                if bytes < MORE || *end == buffer.len() {
                    break;
                }
            }
            Poll::Ready(Ok(()))
        })
        .await;
        // The drained connection is read to its end by another, who waits.
        only_try.store(false, Ordering::Relaxed);
        let bytes = self.end - before;
        self.pace.note(bytes, Instant::now());
        match outcome {
            // The end is found again by the next call, after what came before it.
            Err(_) if bytes > 0 => Ok(()),
            Err(error) => {
                self.link.ended();
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }

    /// Makes room for the rest of the message that has begun, or for more messages.
    fn make_room(&mut self) {
        let left = self.end - self.start;
        let wanted = match self.buffer[self.start..self.end] {
            // The server's own limit is checked when the message is taken.
            [_, a, b, c, d, ..] => (u32::from_be_bytes([a, b, c, d]) as usize + 1).min(LONGEST_MESSAGE),
            _ => 5,
        };
        if wanted > self.buffer.len() || (self.buffer.len() > BUFFER && left.max(wanted) <= BUFFER / 2) {
            // A whole message, and as much again of what follows it, up to the usual size.
            let mut buffer = vec![0; if wanted > BUFFER / 2 { wanted + BUFFER } else { BUFFER }];
            buffer[..left].copy_from_slice(&self.buffer[self.start..self.end]);
            self.buffer = buffer;
        } else if left == 0 || self.buffer.len() - self.end < (wanted.saturating_sub(left)).max(BUFFER / 2) {
            self.buffer.copy_within(self.start..self.end, 0);
        } else {
            return;
        }
        (self.start, self.end) = (0, left);
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if let Some(read) = self.read.take() {
            self.link.give_back(read);
        }
    }
}

/// Three numbers in network order.
#[inline]
fn numbers(header: &[u8; 24]) -> (u64, u64, u64) {
    let (numbers, _) = header.as_chunks::<8>();
    let number = |at: usize| u64::from_be_bytes(numbers[at]);
    (number(0), number(1), number(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_busy_stream_is_left_to_gather() {
        let (mut pace, mut now) = (Pace::default(), Instant::now());
        // Commits a millisecond apart, each in three pieces.
        for _ in 0..100 {
            for _ in 0..3 {
                now += QUICK / 10;
                pace.note(200, now);
                assert_eq!(pace.read_at, None);
            }
            now += GATHER;
        }
        for _ in 0..=QUICK_READS {
            assert_eq!(pace.read_at, None);
            now += QUICK / 10;
            pace.note(200, now);
        }
        assert_eq!(pace.read_at, Some(now + GATHER));
        now += GATHER;
        pace.note(MUCH, now);
        assert_eq!(pace.read_at, Some(now + GATHER));
        now += GATHER;
        pace.note(MUCH - 1, now);
        assert_eq!(pace.read_at, None);
    }
}
