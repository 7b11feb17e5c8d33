//! The keyboard, read on a thread of its own.
//!
//! crossterm 0.29 has two ways not to come back: half an escape sequence (Alt-[ is one) makes it wait for the other half
//! in a blocking read, and the end of file of a terminal that has hung up makes it read over and over. Neither may keep the
//! screen from being drawn or a signal from being seen.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossterm::event::{self, Event};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::term::foreground;

/// The thread looks this often whether it is still wanted.
const TICK: Duration = Duration::from_millis(100);

/// Events of the terminal, in order.
#[derive(Debug)]
pub(super) struct Keys {
    events: Receiver<io::Result<Event>>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Keys {
    /// Begins to read.
    ///
    /// # Errors
    /// There can be no more threads.
    pub(super) fn start() -> io::Result<Keys> {
        // What is typed faster than it is taken waits in the terminal.
        let (sender, events) = mpsc::sync_channel(512);
        let ends = Arc::new(AtomicBool::new(false));
        let wanted = Arc::clone(&ends);
        let thread = thread::Builder::new().name("keys".to_owned()).spawn(move || read(&sender, &wanted))?;
        Ok(Keys { events, ends, thread: Some(thread) })
    }

    /// The next event, if one comes within `wait`.
    ///
    /// # Errors
    /// The terminal has hung up or cannot be read. There is nothing more to come then.
    pub(super) fn next(&self, wait: Duration) -> io::Result<Option<Event>> {
        match self.events.recv_timeout(wait) {
            Ok(event) => event.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        self.end();
    }
}

impl Keys {
    /// Waits until the thread has let go of the terminal, though not for one that crossterm holds.
    pub(super) fn end(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        let begun = Instant::now();
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) && begun.elapsed() < 2 * TICK {
            thread::sleep(TICK / 10);
        }
    }
}

fn read(events: &SyncSender<io::Result<Event>>, ends: &AtomicBool) {
    let mut wait = TICK;
    while !ends.load(Ordering::SeqCst) {
        let event = match ready(wait) {
            Ok(false) => {
                wait = TICK;
                continue;
            }
            Ok(true) => event::read(),
            Err(error) => Err(error),
        };
        // More may have come with it: crossterm holds that, and the kernel knows nothing of it.
        wait = Duration::ZERO;
        let last = event.is_err();
        if events.send(event).is_err() || last {
            return;
        }
    }
}

/// Whether there is an event to read, after waiting for at most `wait` for one. The kernel is asked first, because
/// crossterm must not be asked once the terminal has hung up.
fn ready(wait: Duration) -> io::Result<bool> {
    let stdin = io::stdin();
    let mut terminal = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    match poll(&mut terminal, PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO)) {
        // A signal, such as a change of size: crossterm knows about it.
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
    if terminal[0].revents().is_some_and(|found| found.intersects(gone)) {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has hung up"));
    }
    // What is typed while we are in the background is the shell's, and to read it would stop us. Asked after the wait: a
    // stopped program is continued in the middle of that.
    if !foreground() {
        thread::sleep(TICK);
        return Ok(false);
    }
    event::poll(Duration::ZERO)
}
