//! Processes that help with the copy, and end or hang in it.

use std::collections::BTreeMap;
use std::time::Duration;

use nix::sys::signal::Signal;
use pgtide::engine::{Phase, Status, TableState};

use super::support::process::{Pipeline, signal, wait_confirmed};
use super::support::wait_until;
use super::{Chunk, Job, LIMIT, completed_by, done, helps, in_hand_of, stands_by, streams};

/// What another process had in hand when it was killed is taken over at once: its backend is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_helper_is_killed() {
    let job = Job::new().await;
    job.slow(40);
    let (mut one, mut two) = (job.process("one"), job.process("two"));
    one.start();
    two.start();
    job.chunks_when("both have copied some", |chunks| completed_by(chunks).len() == 2).await;
    let mut helper = if helps(&one.wait("it works", LIMIT, |status| status.phase != Phase::Connecting).await) {
        two.wait("it leads", LIMIT, |status| status.phase == Phase::Snapshot).await;
        one
    } else {
        two.wait("it helps", LIMIT, helps).await;
        std::mem::replace(&mut two, one)
    };
    let mut leader = two;
    let name = if helper.status().await.unwrap().standby.unwrap().leader.contains("one") { "two" } else { "one" };
    let lost = loop {
        let chunks = job.chunks_when("it has chunks in hand", |chunks| !in_hand_of(chunks, name).is_empty()).await;
        helper.kill();
        // What it had sent by then is carried out.
        job.until_ledgers(name, "no backend", "TRUE").await;
        let after = job.chunks().await;
        let completed = |id: &i32| after[id].status == "completed" && after[id].by.as_deref() == Some(name);
        let left: Vec<i32> = in_hand_of(&chunks, name).into_iter().filter(|id| !completed(id)).collect();
        if !left.is_empty() {
            break left;
        }
        assert!(done(&chunks) < chunks.len(), "the copy ended before a kill in the middle of a chunk");
        helper.start();
        helper.wait("it helps again", LIMIT, helps).await;
    };
    leader.wait("the other one streams", LIMIT, streams).await;
    let chunks = job.chunks().await;
    for id in &lost {
        assert!(chunks[id].attempts > 1, "{id}: {chunks:?}");
    }
    job.is_exact().await;
    job.store.clear_faults();
    job.delivers("killed").await;
}

/// A helper that hangs is taken over from after claimTimeout. Once it goes on, nothing that it still does has an effect.
#[tokio::test(flavor = "multi_thread")]
async fn a_helper_hangs() {
    let job = Job::new().await;
    let (chunks, _leader, mut helper) = hang(&job, None).await;
    let back = |status: &Status| stands_by(status) && status.tables[0].state == TableState::Standby && !helps(status);
    helper.wait("the helper stands by again", LIMIT, back).await;
    assert_eq!(job.chunks().await, chunks, "a late completion counted");
    job.is_exact().await;
    assert!(helper.output().contains("another process has taken over"), "{}", helper.output());
}

/// The same without the token of claims: what it completes late is counted once more. Without the lease either, which
/// would keep it from sending what it then completes.
#[tokio::test(flavor = "multi_thread")]
async fn a_helper_hangs_and_shows_no_token() {
    let job = Job::new().await;
    let (chunks, _leader, _helper) = hang(&job, Some("ClaimToken,Lease")).await;
    let sql = "SELECT completed_chunks::int8 FROM cdc_snapshot_job WHERE slot_name = $1";
    wait_until("more chunks are completed than there are", LIMIT, || async {
        let count: i64 = job.client.query_one(sql, &[&job.name]).await.unwrap().get(0);
        count > i64::try_from(chunks.len()).unwrap()
    })
    .await;
}

/// The same without the lease: what it sends late brings deleted documents back. Not where it hangs with a chunk in hand of
/// which it has not read a row yet, or sent the last one: then another one has to.
#[tokio::test(flavor = "multi_thread")]
async fn a_helper_hangs_and_has_no_lease() {
    for _ in 0..5 {
        let job = Job::new().await;
        let (_, _leader, _helper) = hang(&job, Some("Lease")).await;
        let back = async {
            while job.store.documents("items").len() <= 3 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(15), back).await.is_ok() {
            return;
        }
    }
    panic!("deleted documents are never back");
}

/// A helper hangs in the copy, another process does its work, and what was copied is deleted and forgotten before it goes on.
/// Gives the
/// chunks of before, the leader, and the helper, which breaks a rule.
async fn hang(job: &Job, broken: Option<&str>) -> (BTreeMap<i32, Chunk>, Pipeline, Pipeline) {
    job.slow(40);
    let (mut leader, mut helper) = (job.hasty("one"), job.hasty("two"));
    helper.environment(&broken.map(|rule| ("PGTIDE_BROKEN", rule.to_owned())).into_iter().collect::<Vec<_>>());
    job.both_copy(&mut leader, &mut helper).await;
    let stuck = loop {
        job.chunks_when("it has chunks in hand", |chunks| !in_hand_of(chunks, "two").is_empty()).await;
        signal(helper.pid(), Signal::SIGSTOP);
        // What it had sent by then is carried out.
        job.until_ledgers("two", "an idle backend", "state <> 'idle'").await;
        let settled = in_hand_of(&job.chunks().await, "two");
        if !settled.is_empty() {
            break settled;
        }
        signal(helper.pid(), Signal::SIGCONT);
    };
    leader.wait("the leader streams", LIMIT, streams).await;
    let chunks = job.chunks().await;
    for id in &stuck {
        assert_eq!((chunks[id].by.as_deref(), chunks[id].attempts), (Some("one"), 2), "{id}");
    }
    job.is_exact().await;
    // What the helper still holds in memory would bring these back, once Elasticsearch has forgotten that they are gone.
    job.store.clear_faults();
    job.change("DELETE FROM items; INSERT INTO items SELECT i, 'new', i FROM generate_series(1, 3) AS i").await;
    wait_confirmed(&job.client, &job.name, LIMIT).await;
    job.is_equal().await;
    job.store.forget_tombstones();
    signal(helper.pid(), Signal::SIGCONT);
    (chunks, leader, helper)
}
