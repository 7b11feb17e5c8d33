//! The processes of a history: one that leads, and sometimes another one with the same configuration.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Instant;

use nix::sys::signal::Signal;
use pgtide::engine::{Phase, Status};

use super::causes::Causes;
use super::history::{Broken, Held, LIMIT, Rule, broken};
use super::session::Log;
use super::support::process::{Pipeline, signal};

/// One of them.
struct Process {
    pipeline: Pipeline,
    began: Instant,
}

/// Both.
pub struct Processes {
    first: Process,
    second: Process,
    causes: Causes,
    log: Log,
    /// Items that the store had when the first said that it was paused.
    pub paused: Option<u64>,
    /// Ends that nobody asked for.
    pub ends: u32,
}

impl Processes {
    pub fn new(make: impl Fn() -> Pipeline, causes: &Causes, log: &Log) -> Self {
        let process = || Process { pipeline: make(), began: Instant::now() };
        Self { first: process(), second: process(), causes: causes.clone(), log: log.clone(), paused: None, ends: 0 }
    }

    /// The first.
    pub fn first(&self) -> &Pipeline {
        &self.first.pipeline
    }

    /// What both printed last.
    pub fn output(&self) -> String {
        format!("{}\n--- and the other\n{}", self.first.pipeline.output(), self.second.pipeline.output())
    }

    /// Starts the first if it does not run.
    pub fn start(&mut self) -> Held {
        if !self.running()? {
            self.first.began = Instant::now();
            self.first.pipeline.start();
        }
        Ok(())
    }

    /// Starts the second if it does not run.
    pub fn start_second(&mut self) -> Held {
        if !self.second_runs()? {
            self.second.began = Instant::now();
            self.second.pipeline.start();
        }
        Ok(())
    }

    /// Whether the first runs. One that has ended must have had a reason.
    pub fn running(&mut self) -> Result<bool, Broken> {
        if let Some(status) = self.first.pipeline.has_ended() {
            self.paused = None;
            self.ends += 1;
            let ended = format!("the process has ended by itself: {status}");
            self.log.add(&ended);
            if !self.causes.explain(status.code(), Some(self.first.began)) {
                broken(Rule::Ends, ended)?;
            }
        }
        Ok(self.first.pipeline.is_started())
    }

    /// Whether the second runs, with the same demand.
    pub fn second_runs(&mut self) -> Result<bool, Broken> {
        std::mem::swap(&mut self.first, &mut self.second);
        let paused = self.paused;
        let runs = self.running();
        self.paused = paused;
        std::mem::swap(&mut self.first, &mut self.second);
        runs
    }

    /// SIGKILL for the first, if it runs.
    pub fn kill(&mut self) -> Held {
        if self.running()? {
            self.first.pipeline.kill();
        }
        self.paused = None;
        Ok(())
    }

    /// From now on the second is the first.
    pub fn second_is_first(&mut self) {
        std::mem::swap(&mut self.first, &mut self.second);
        self.paused = None;
        self.log.add("the second process goes on");
    }

    /// Of two processes the one that stands by is killed.
    pub async fn only_the_leader(&mut self) -> Held {
        if !self.second_runs()? {
            return Ok(());
        }
        let leads = |status: Option<Status>| status.is_some_and(|status| status.phase != Phase::Standby);
        if !self.running()? || !leads(self.first.pipeline.status().await) && leads(self.second.pipeline.status().await)
        {
            self.second_is_first();
        }
        if self.second_runs()? {
            self.second.pipeline.kill();
        }
        Ok(())
    }

    /// SIGTERM for the first, if it runs; returns when it has ended.
    pub async fn terminate(&mut self) -> Held {
        if !self.running()? {
            return Ok(());
        }
        signal(self.first.pipeline.pid(), Signal::SIGTERM);
        let deadline = Instant::now() + LIMIT;
        let status: ExitStatus = loop {
            if let Some(status) = self.first.pipeline.has_ended() {
                break status;
            }
            if Instant::now() > deadline {
                return broken(Rule::Quiet, "the process does not stop");
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        };
        self.paused = None;
        self.log.add(format!("ended: {status}"));
        // A signal that comes before it is waited for ends it, too; and its end may have been under way.
        let asked = status.code() == Some(0) || status.signal() == Some(Signal::SIGTERM as i32);
        if asked || self.causes.explain(status.code(), Some(self.first.began)) {
            return Ok(());
        }
        broken(Rule::Ends, format!("told to stop: {status}"))
    }

    /// Ends both at once.
    pub fn end(&mut self) {
        for process in [&mut self.first, &mut self.second] {
            if process.pipeline.has_ended().is_none() && process.pipeline.is_started() {
                process.pipeline.kill();
            }
        }
    }
}
