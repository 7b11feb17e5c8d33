//! Processes that lead, and end or hang.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pgtide::engine::{Phase, TableState};
use pgtide::store::{Effect, Fault};

use super::support::process::{signal, wait_confirmed};
use super::{Job, LIMIT, done, helps, stands_by, streams};

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_killed_in_the_copy() {
    let job = Job::new().await;
    job.slow(40);
    let (mut one, mut two) = (job.process("one"), job.process("two"));
    job.both_copy(&mut one, &mut two).await;
    job.change("UPDATE items SET n = -1 WHERE id % 3 = 0; DELETE FROM items WHERE id % 10 = 1").await;
    let killed = Instant::now();
    one.kill();
    let before = job.chunks().await;
    assert!(done(&before) < before.len(), "the copy was over");
    two.wait("it goes on with the copy", LIMIT, |status| status.phase == Phase::Snapshot).await;
    println!("the copy has a new leader after {:?}", killed.elapsed());
    job.change("UPDATE items SET n = -2 WHERE id % 3 = 1").await;
    // The one that was killed comes back, and helps.
    one.start();
    one.wait("it helps now", LIMIT, |status| helps(status) || status.tables[0].state == TableState::Standby).await;
    two.wait("it streams", LIMIT, streams).await;
    let after = job.chunks().await;
    for (id, chunk) in &before {
        if chunk.status == "completed" {
            assert_eq!(after.get(id), Some(chunk), "what was done was done again");
        }
    }
    wait_confirmed(&job.client, &job.name, LIMIT).await;
    job.is_exact().await;
    job.store.clear_faults();
    job.delivers("a new leader").await;
}

/// From SIGKILL to the stream of the next it takes 5 s at most.
#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_killed_while_it_streams() {
    let job = Job::new().await;
    let (mut one, mut two) = (job.process("one"), job.process("two"));
    one.start();
    one.wait("it streams", LIMIT, streams).await;
    two.start();
    for round in 0..6 {
        let status = two.wait("the other one stands by", LIMIT, |status| {
            stands_by(status) && status.tables[0].state == TableState::Standby
        });
        let name = if round % 2 == 0 { "instance one" } else { "instance two" };
        assert!(status.await.standby.unwrap().leader.contains(name));
        let (code, text) = two.ask("/pause").await.unwrap();
        assert!(code == 409 && text.contains("stands by") && text.contains(name), "{code} {text}");
        job.change(&format!(
            "INSERT INTO items SELECT i, 'round', 0 FROM generate_series({}, {}) AS i",
            100_000 + round * 10_000,
            100_999 + round * 10_000
        ))
        .await;
        let killed = Instant::now();
        one.kill();
        job.change("UPDATE items SET n = n + 1 WHERE id <= 500").await;
        two.wait("the other one streams", LIMIT, |status| {
            matches!(status.phase, Phase::CatchUp | Phase::Streaming) && status.replication.transactions > 0
        })
        .await;
        let takeover = killed.elapsed();
        println!("takeover after {takeover:?}");
        assert!(takeover < Duration::from_secs(5), "round {round}: {takeover:?}");
        job.delivers(&format!("round {round}")).await;
        one.start();
        std::mem::swap(&mut one, &mut two);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_stopped() {
    let job = Job::new().await;
    let (mut one, mut two) = (job.process("one"), job.process("two"));
    job.one_streams(&mut one, &mut two).await;
    signal(one.pid(), Signal::SIGTERM);
    assert!(one.ended(LIMIT).await.success(), "{}", one.output());
    two.wait("the other one streams", LIMIT, streams).await;
    job.delivers("stopped").await;
    // One that stands by is stopped as well.
    one.start();
    one.wait("it stands by", LIMIT, stands_by).await;
    signal(one.pid(), Signal::SIGTERM);
    assert!(one.ended(LIMIT).await.success(), "{}", one.output());
    assert!(one.output().contains("STANDBY") && one.output().contains("instance two, backend"), "{}", one.output());
    job.delivers("still").await;
}

/// A leader that hangs loses the lead after claimTimeout. Once it goes on it finds its connections ended: what it still
/// sends is older than what is there, and it stands by.
#[tokio::test(flavor = "multi_thread")]
async fn the_leader_hangs() {
    let job = Job::new().await;
    let (mut one, mut two) = (job.hasty("one"), job.hasty("two"));
    job.one_streams(&mut one, &mut two).await;
    // A bulk that the old leader has sent is carried out late.
    job.store.inject(Fault::new(Effect::Hold { applied: false }).times(1));
    job.change("UPDATE items SET name = 'old' WHERE id = 1").await;
    job.store.until_held(1).await;
    // The next ones wait in its memory: a bulk of the same lane goes when the one before it is answered.
    job.change("UPDATE items SET name = 'older' WHERE id = 1").await;
    signal(one.pid(), Signal::SIGSTOP);
    job.change("UPDATE items SET name = 'new' WHERE id = 1; DELETE FROM items WHERE id = 2").await;
    two.wait("the other one streams", LIMIT, streams).await;
    wait_confirmed(&job.client, &job.name, LIMIT).await;
    job.is_equal().await;
    let confirmed = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
    let before: String = job.client.query_one(confirmed, &[&job.name]).await.unwrap().get(0);
    signal(one.pid(), Signal::SIGCONT);
    job.store.clear_faults();
    one.wait("the old leader stands by", LIMIT, stands_by).await;
    let after: String = job.client.query_one(confirmed, &[&job.name]).await.unwrap().get(0);
    assert!(after.parse::<pgtide::lsn::Lsn>().unwrap() >= before.parse().unwrap(), "{before} {after}");
    job.is_equal().await;
    job.delivers("new leader").await;
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'pgtide stream'";
    assert_eq!(job.client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0), 1);
    assert!(two.output().contains("instance one led and has said nothing for 2 s"), "{}", two.output());
}
