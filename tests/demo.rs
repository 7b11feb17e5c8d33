//! The demo as a process: what it says, and what it needs.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::Command;

/// `pgtide demo --headless --until-live --format json` with nothing of this machine's settings.
fn demo(temporary: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgtide"));
    command
        .args(["demo", "--headless", "--until-live", "--format", "json", "--rate", "0", "--metrics-port", "0"])
        .env_remove("XDG_STATE_HOME")
        .env("TMPDIR", temporary)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// A folder that the user of PostgreSQL reaches, too.
fn folder() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    tempfile::Builder::new().permissions(std::fs::Permissions::from_mode(0o755)).tempdir().unwrap()
}

fn is_summary(output: &Output) {
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stdout}{stderr}");
    let summary: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((summary["rows"].as_u64(), summary["documents"].as_u64()), (Some(1_500), Some(1_500)), "{stdout}");
}

#[tokio::test]
async fn a_reader_of_stderr_that_has_gone_is_no_error() {
    let folder = folder();
    let mut child = demo(folder.path()).arg("--log-folder").arg(folder.path()).spawn().unwrap();
    drop(child.stderr.take());
    let output = tokio::time::timeout(Duration::from_secs(60), child.wait_with_output()).await.unwrap().unwrap();
    is_summary(&output);
}

#[tokio::test]
async fn a_home_folder_that_is_closed_is_no_error() {
    let folder = folder();
    // Nobody makes folders there, root neither.
    let child = demo(folder.path()).env("HOME", "/proc/1").spawn().unwrap();
    let output = tokio::time::timeout(Duration::from_secs(60), child.wait_with_output()).await.unwrap().unwrap();
    is_summary(&output);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let said = stderr.lines().find(|line| line.contains("the log is in")).unwrap_or_else(|| panic!("{stderr}"));
    let log = std::fs::read_dir(folder.path()).unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        said.contains(path.to_str().unwrap()).then_some(path)
    });
    let file = std::fs::read_dir(log.unwrap()).unwrap().next().unwrap().unwrap().path();
    assert!(std::fs::read_to_string(file).unwrap().contains("the log is in"));
}
