//! The screen on made-up figures, to look at colours and sizes and to try the keys. Nothing is copied anywhere.
//!
//! `cargo run --example screen -- [SCENARIO] [--mono] [--ascii] [--read-only] [--profile] [--panic-ui | --panic-worker]`

#[path = "../src/tui/tests/fixture.rs"]
#[allow(dead_code)]
mod fixture;

// The fixture names the library through its parent, so that the library's own tests can use it as well.
#[allow(clippy::single_component_path_imports)]
use pgtide;

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pgtide::engine::{Command, Commands, Control, Event, EventKind, Phase, Status, TableState};
use pgtide::tui::{ColorChoice, Exit, Options};
use tokio::signal::unix::{SignalKind, signal};

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(0)
}

/// Moves all times of a fixture from its clock to the real one.
fn to_now(status: &mut Status) {
    let by = now() - fixture::NOW;
    let times = [&mut status.at, &mut status.started_at, &mut status.phase_since];
    let notices = status.notices.iter_mut().map(|notice| &mut notice.at);
    let events = status.events.iter_mut().map(|event| &mut event.at);
    let rejections = status.rejections.iter_mut().flat_map(|rejection| [&mut rejection.first, &mut rejection.last]);
    for time in times.into_iter().chain(notices).chain(events).chain(rejections) {
        *time = time.saturating_add(by);
    }
}

/// A tenth of a second of a copy that goes well.
fn step(status: &mut Status) {
    status.at = now();
    if !matches!(status.phase, Phase::Snapshot | Phase::Streaming | Phase::CatchUp) {
        return;
    }
    let wobble = 0.8 + fastrand::f64() * 0.4;
    status.sink.last_latency = Some(96.0 * wobble * wobble);
    status.replication.lag_bytes = Some(((58 << 20) as f64 * wobble) as u64);
    status.sink.documents += 11_790;
    for (index, table) in status.tables.iter_mut().enumerate() {
        if table.state == TableState::Copying {
            table.rows_per_second = 55_000.0 * wobble;
            table.rows_done += 5500;
            let waiting = table.chunks.0.iter().position(|&state| state != b'd');
            if let Some(at) = waiting.filter(|_| fastrand::u8(..4) == 0) {
                table.chunks.0[at] = b'd';
                let event = Event {
                    seq: status.events.last().map_or(1, |event| event.seq + 1),
                    at: status.at,
                    kind: EventKind::Snapshot,
                    table: index as u32,
                    key: format!("{}/{}", table.chunks.done(), table.chunks.len()),
                    rows: Some(5000),
                    latency: Some(0.04 * wobble),
                    ..Event::default()
                };
                status.events.push(event);
            }
            let claimed = table.chunks.0.iter().filter(|&&state| state == b'c').count();
            if let Some(at) = table.chunks.0.iter().position(|&state| state == b'p').filter(|_| claimed < 3) {
                table.chunks.0[at] = b'c';
            }
        }
    }
    let surplus = status.events.len().saturating_sub(1000);
    status.events.drain(..surplus);
}

/// Takes commands as an engine would: at once, and each becomes true a second later.
fn obey(status: &Mutex<Status>, mut commands: Commands) {
    let mut taken: Vec<(SystemTime, Command)> = Vec::new();
    loop {
        thread::sleep(Duration::from_millis(100));
        let mut status = status.lock().unwrap_or_else(PoisonError::into_inner);
        step(&mut status);
        while let Ok((command, reply)) = commands.try_recv() {
            if let Command::PauseTable(table) = &command {
                let _ = reply.send(Err(format!("{table} is made up and cannot be paused")));
                continue;
            }
            match command {
                Command::Pause => (status.phase, status.pause_requested) = (Phase::Pausing, true),
                Command::Resume => status.pause_requested = false,
                Command::Stop => status.phase = Phase::Stopping,
                _ => {}
            }
            status.phase_since = status.at;
            let _ = reply.send(Ok(()));
            taken.push((SystemTime::now() + Duration::from_secs(1), command));
        }
        let at = status.at;
        taken.retain(|(due, command)| {
            if SystemTime::now() < *due {
                return true;
            }
            match command {
                Command::Pause => (status.phase, status.phase_since) = (Phase::Paused, at),
                Command::Resume => (status.phase, status.phase_since) = (Phase::Snapshot, at),
                Command::Stop => (status.phase, status.phase_since) = (Phase::Stopped, at),
                Command::Resnapshot(id) | Command::CancelResnapshot(id) => {
                    if let Some(table) = status.tables.iter_mut().find(|table| table.table.0 == *id) {
                        table.resnapshot = matches!(command, Command::Resnapshot(_));
                    }
                }
                Command::PauseTable(_) | Command::ResumeTable(_) => {}
            }
            false
        });
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let wanted = arguments.iter().find(|argument| !argument.starts_with("--")).map_or("backfill", String::as_str);
    let scenarios = fixture::all();
    let Some((_, status)) = scenarios.into_iter().find(|(name, _)| *name == wanted) else {
        let names: Vec<&str> = fixture::all().iter().map(|(name, _)| *name).collect();
        return Err(format!("no scenario `{wanted}`: choose one of {}", names.join(", ")).into());
    };
    let mut status = status;
    to_now(&mut status);
    let status = Arc::new(Mutex::new(status));

    let (control, commands) = Control::channel();
    let engine = Arc::clone(&status);
    thread::spawn(move || obey(&engine, commands));

    let caught = Arc::new(AtomicI32::new(0));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    for (kind, number) in [(SignalKind::terminate(), 15), (SignalKind::hangup(), 1), (SignalKind::interrupt(), 2)] {
        let caught = Arc::clone(&caught);
        let _guard = runtime.enter();
        let mut signals = signal(kind)?;
        runtime.spawn(async move {
            signals.recv().await;
            caught.store(number, Ordering::SeqCst);
        });
    }
    if has("--panic-worker") {
        runtime.spawn(async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            panic!("a worker that panics");
        });
    }

    let options = Options {
        read_only: has("--read-only"),
        color: if has("--mono") { ColorChoice::Never } else { ColorChoice::Auto },
        ascii: has("--ascii").then_some(true),
        name: "made up".to_owned(),
        profile: has("--profile"),
        signal: caught,
        ..Options::default()
    };
    let begun = SystemTime::now();
    let panics = has("--panic-ui");
    let source = move || {
        assert!(!panics || begun.elapsed().unwrap_or_default() < Duration::from_secs(1), "a screen that panics");
        status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    };
    let screen = thread::Builder::new().name("screen".to_owned());
    let screen = screen.spawn(move || pgtide::tui::run(options, Arc::new(source), control))?;
    let exit = screen.join().map_err(|_| "the screen panicked")??;
    match exit {
        Exit::Stopped => eprintln!("stopped"),
        Exit::Forced => eprintln!("left without waiting"),
        Exit::Failed(problem) => eprintln!("failed: {problem}"),
        Exit::Signal(number) => std::process::exit(128 + number),
    }
    Ok(())
}
