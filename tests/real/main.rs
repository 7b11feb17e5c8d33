//! The pipeline, and the local document store, beside a real Elasticsearch or OpenSearch: see docs/testing.md.
//!
//!     PGTIDE_ES=opensearch:3.6.0 cargo test --test real

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and says what it left out")]
#![allow(unreachable_pub, missing_docs, reason = "a test")]

mod contract;
#[path = "../types/values.rs"]
mod generator;
mod outages;
mod refusals;
mod scene;
#[path = "../support/mod.rs"]
mod support;
#[allow(dead_code, reason = "tests/types uses the rest")]
#[path = "../types/table.rs"]
mod table;
mod values;
mod writes;

use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use libtest_mimic::{Arguments, Trial};
use nix::sys::signal::Signal;
use tokio::runtime::Runtime;

use self::scene::{LITTLE, Scene, Settings, USUAL};
use self::support::elasticsearch::Installation;

/// One test.
type Test = fn(Scene) -> Pin<Box<dyn Future<Output = ()>>>;

/// Those that have the node alone come last, and those that need a node of other settings after them.
const TESTS: [(&str, Settings, bool, Test); 16] = [
    ("contract", USUAL, false, |scene| Box::pin(contract::same_answers(scene))),
    ("forgotten_deletes", USUAL, false, |scene| Box::pin(writes::forgotten_deletes(scene))),
    ("sweep", USUAL, false, |scene| Box::pin(writes::sweep(scene))),
    ("packed", USUAL, false, |scene| Box::pin(writes::packed(scene))),
    ("alias", USUAL, false, |scene| Box::pin(writes::alias(scene))),
    ("mapping_errors", USUAL, false, |scene| Box::pin(refusals::mapping_errors(scene))),
    ("strict_mapping", USUAL, false, |scene| Box::pin(refusals::strict_mapping(scene))),
    ("blocks", USUAL, false, |scene| Box::pin(refusals::blocks(scene))),
    ("values", USUAL, false, |scene| Box::pin(values::of_every_type(scene))),
    ("closed_index", USUAL, false, |scene| Box::pin(refusals::closed_index(scene))),
    ("no_memory", USUAL, true, |scene| Box::pin(refusals::no_memory(scene))),
    ("restart_while_copying", USUAL, true, |scene| Box::pin(outages::while_copying(scene, Signal::SIGTERM))),
    ("kill_while_copying", USUAL, true, |scene| Box::pin(outages::while_copying(scene, Signal::SIGKILL))),
    ("restart_and_kill_while_streaming", USUAL, true, |scene| Box::pin(outages::while_streaming(scene))),
    ("too_long", LITTLE, true, |scene| Box::pin(refusals::too_long(scene))),
    ("full_queue", LITTLE, true, |scene| Box::pin(refusals::full_queue(scene))),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Most of them wait most of the time.
    arguments.test_threads.get_or_insert(4);
    let installation = if arguments.list { Err("not asked for".to_owned()) } else { Installation::find() };
    let runtime = Arc::new(Runtime::new().unwrap());
    let trials = match installation {
        Ok(installation) => {
            eprintln!("{} {}", installation.product, installation.version);
            TESTS.map(|(name, settings, alone, test)| {
                let (installation, runtime) = (installation.clone(), Arc::clone(&runtime));
                Trial::test(name, move || {
                    let began = Instant::now();
                    runtime.block_on(async { test(Scene::new(installation, settings, alone).await).await });
                    eprintln!("{name}: {:.1} s", began.elapsed().as_secs_f64());
                    Ok(())
                })
            })
        }
        Err(reason) if std::env::var_os("CI").is_some_and(|value| value == "true") => TESTS.map(|(name, ..)| {
            let reason = reason.clone();
            Trial::test(name, move || Err(format!("no real server, and CI=true: {reason}").into()))
        }),
        Err(reason) => {
            if !arguments.list {
                eprintln!("SKIPPED, all tests with a real Elasticsearch: {reason}");
            }
            TESTS.map(|(name, ..)| Trial::test(name, || Ok(())).with_kind("SKIPPED").with_ignored_flag(true))
        }
    };
    let conclusion = libtest_mimic::run(&arguments, trials.into());
    // Statics are not dropped.
    runtime.block_on(Scene::end());
    conclusion.exit_code()
}
