//! docs/conformance.md names tests: each of them has to be there.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The file that a name's first part means.
fn file(of: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if of.starts_with("src/") {
        return root.join(of);
    }
    let (path, folder) = (root.join("tests").join(of.replace("::", "/")), root.join("tests").join(of).join("main.rs"));
    if folder.exists() { folder } else { path.with_extension("rs") }
}

#[test]
fn every_scenario_and_every_defect_names_tests_that_exist() {
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/conformance.md")).unwrap();
    let mut left: BTreeSet<String> = (1..=67).map(|number| number.to_string()).collect();
    left.extend(('a'..='p').map(String::from));
    left.extend((1..=25).map(|number| format!("D{number}")));
    for row in page.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| |")) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [number, _, tests] = cells[..] else { panic!("three cells: {row}") };
        assert!(left.remove(number), "there is no {number}, or it is there twice");
        let names: Vec<&str> = tests.split('`').filter(|name| name.contains("::")).collect();
        assert!(!names.is_empty(), "{number} names no test");
        for name in names {
            let (of, test) = name.rsplit_once("::").unwrap();
            let text = std::fs::read_to_string(file(of)).unwrap_or_else(|error| panic!("{number}: {name}: {error}"));
            let is = text.lines().any(|line| {
                let line = line.trim_start();
                line.strip_prefix("async ")
                    .unwrap_or(line)
                    .strip_prefix("fn ")
                    .is_some_and(|rest| rest.strip_prefix(test).is_some_and(|rest| rest.starts_with('(')))
            });
            assert!(is, "{number}: there is no test {name}");
        }
    }
    assert_eq!(left, BTreeSet::new(), "without a row");
}
