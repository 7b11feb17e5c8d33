//! Where work waits while the operator has paused it, and how one knows that all of it waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use tokio::sync::watch;

/// A gate that workers pass between two pieces of work. Closed: each parks there once nothing of its own is on its way.
#[derive(Clone, Debug)]
pub struct Gate {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    closed: watch::Sender<bool>,
    workers: AtomicUsize,
    parked: AtomicUsize,
}

impl Default for Gate {
    fn default() -> Self {
        let inner =
            Inner { closed: watch::Sender::new(false), workers: AtomicUsize::new(0), parked: AtomicUsize::new(0) };
        Self { inner: Arc::new(inner) }
    }
}

/// A worker's place at the gate; leaving it (drop) takes the worker out of the count.
#[derive(Debug)]
pub struct Pass {
    gate: Gate,
    closed: watch::Receiver<bool>,
}

impl Gate {
    /// Asks everybody to wait. They park when they next pass.
    pub fn close(&self) {
        self.inner.closed.send_replace(true);
    }

    /// Lets everybody go on.
    pub fn open(&self) {
        self.inner.closed.send_replace(false);
    }

    /// Waiting is asked for.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        *self.inner.closed.borrow()
    }

    /// Waiting is asked for, and every worker waits. True as well while there is no worker at all.
    #[must_use]
    pub fn holds_all(&self) -> bool {
        self.is_closed() && self.inner.parked.load(SeqCst) == self.inner.workers.load(SeqCst)
    }

    /// Tells whether waiting is asked for, and when that changes, to somebody who is no worker.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.inner.closed.subscribe()
    }

    /// A place for one worker.
    #[must_use]
    pub fn enter(&self) -> Pass {
        self.inner.workers.fetch_add(1, SeqCst);
        Pass { gate: self.clone(), closed: self.inner.closed.subscribe() }
    }

    /// A place for one short piece of work that can as well be left out: none while waiting is asked for.
    #[must_use]
    pub fn enter_open(&self) -> Option<Pass> {
        // Counted before it looks: whoever closes the gate meanwhile sees the worker.
        let pass = self.enter();
        (!pass.is_closed()).then_some(pass)
    }
}

impl Pass {
    /// The worker has to park: it should first bring home what it has on its way.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// Ends when the gate is closed. Cancel-safe.
    pub async fn closing(&mut self) {
        // The sender lives in the gate that this pass holds.
        let _ = self.closed.wait_for(|closed| *closed).await;
    }

    /// Parks until the gate opens; at once when it is open. The worker must have nothing on its way. Cancel-safe.
    pub async fn wait(&mut self) {
        if !self.is_closed() {
            return;
        }
        struct Parked<'a>(&'a Inner);
        impl Drop for Parked<'_> {
            fn drop(&mut self) {
                self.0.parked.fetch_sub(1, SeqCst);
            }
        }
        self.gate.inner.parked.fetch_add(1, SeqCst);
        let parked = Parked(&self.gate.inner);
        let _ = self.closed.wait_for(|closed| !*closed).await;
        drop(parked);
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.inner.workers.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_work_is_left_out_in_a_pause_and_holds_one_up() {
        let gate = Gate::default();
        let pass = gate.enter_open().expect("an open gate");
        gate.close();
        assert!(!gate.holds_all(), "it is still at work");
        assert!(gate.enter_open().is_none());
        drop(pass);
        assert!(gate.holds_all(), "and nobody who was turned away is counted");
    }

    #[tokio::test]
    async fn paused_is_a_fact_only_when_every_worker_waits() {
        let gate = Gate::default();
        let (mut one, mut two) = (gate.enter(), gate.enter());
        one.wait().await;
        gate.close();
        assert!(!gate.holds_all());
        let first = tokio::spawn(async move {
            one.wait().await;
            one
        });
        while gate.inner.parked.load(SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        assert!(!gate.holds_all(), "one of two waits");
        let second = tokio::spawn(async move { two.wait().await });
        while !gate.holds_all() {
            tokio::task::yield_now().await;
        }
        gate.open();
        drop(first.await.expect("the worker went on"));
        second.await.expect("the worker went on");
        assert_eq!(gate.inner.workers.load(SeqCst), 0);
        assert_eq!(gate.inner.parked.load(SeqCst), 0);
    }
}
