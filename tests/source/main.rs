//! The server and its slot are not what they were: seen at the start and while running, named, never gone on with in
//! silence.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod server;
mod slot;
mod takeover;

use pgtide::config::Config;
use pgtide::engine::{Engine, Phase};
use pgtide::problem::{Problem, ProblemKind};
use support::pipeline::{Rig, ended, stop};

const BOOKS: &str =
    "CREATE TABLE books (id int PRIMARY KEY, title text); INSERT INTO books VALUES (1, 'one'), (2, 'two')";

/// A pipeline that has copied `books` and was stopped in order.
async fn copied(rig: &Rig) -> Config {
    rig.sql(BOOKS).await;
    let config = rig.config(&["books"]);
    stop(rig.run(config.clone()).await).await;
    config
}

/// Moves the slot over everything that is committed.
async fn advance(rig: &Rig) {
    rig.sql(&format!("SELECT pg_replication_slot_advance('{}', pg_current_wal_lsn())", rig.name)).await;
}

/// The start, or what runs, ends with a gap whose hint names the table.
async fn gap(engine: &mut Engine, words: &[&str]) -> Problem {
    let problem = ended(engine).await.expect_err("it goes on as if nothing was missing");
    assert_eq!((problem.kind, problem.transient), (ProblemKind::Gap, false), "{problem:?}");
    for word in words {
        assert!(problem.message.contains(word), "{word}: {}", problem.message);
    }
    assert!(problem.hint.contains("public.books"), "{}", problem.hint);
    let status = engine.status();
    assert_eq!((status.phase, status.problem.as_ref()), (Phase::Failed, Some(&problem)));
    problem
}
