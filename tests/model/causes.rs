//! What a process may end of by itself: only things that the history did to it.

use std::sync::{Arc, Mutex};
use std::time::Instant;

/// What the history does that may end a process, each with the exit code that it leads to (docs/exit-codes.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Connections to PostgreSQL are ended: a process that has just begun gives up.
    Cut = 3,
    /// A table is locked, or is not what the configuration says: gone, unlogged, not published.
    Table = 4,
    /// The document store fails whatever it is asked, at the start as well.
    Store = 5,
}

const ALL: [Cause; 3] = [Cause::Cut, Cause::Table, Cause::Store];

/// Which are so now, and when each was so last.
#[derive(Clone, Default)]
pub struct Causes(Arc<Mutex<[State; 3]>>);

#[derive(Clone, Copy, Default)]
struct State {
    now: u32,
    last: Option<Instant>,
}

impl Causes {
    fn change(&self, cause: Cause, change: impl Fn(u32) -> u32) {
        let mut states = self.0.lock().unwrap();
        let state = &mut states[ALL.iter().position(|one| *one == cause).unwrap()];
        *state = State { now: change(state.now), last: Some(Instant::now()) };
    }

    /// From now on, until as many [`end`](Self::end)s.
    pub fn begin(&self, cause: Cause) {
        self.change(cause, |now| now + 1);
    }

    pub fn end(&self, cause: Cause) {
        self.change(cause, |now| now - 1);
    }

    /// Nothing of it is so any more.
    pub fn over(&self, cause: Cause) {
        if self.0.lock().unwrap()[ALL.iter().position(|one| *one == cause).unwrap()].now > 0 {
            self.change(cause, |_| 0);
        }
    }

    /// At this moment only.
    pub fn once(&self, cause: Cause) {
        self.change(cause, |now| now);
    }

    /// Whether a process that was started at `began` may have ended with this code. Without `began`: ever.
    pub fn explain(&self, code: Option<i32>, began: Option<Instant>) -> bool {
        let states = self.0.lock().unwrap();
        let so =
            |state: &State| state.now > 0 || state.last.is_some_and(|last| began.is_none_or(|began| last >= began));
        ALL.iter().zip(states.iter()).any(|(cause, state)| code == Some(*cause as i32) && so(state))
    }
}
