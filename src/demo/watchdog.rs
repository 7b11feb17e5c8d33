//! The server's process, and what makes it end when we end.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin};

use super::account::Account;

/// PostgreSQL does not notice that its parent is gone, and `PR_SET_PDEATHSIG` needs unsafe code. So a shell stands
/// between: it reads names of signals from a pipe that only we hold, and at the pipe's end, which comes with our death
/// of whatever kind, it stops the server at once and removes the folder.
///
/// It signals its own child only, whose pid cannot be another's before `wait`; after that it ends the reader first.
/// The reader ignores TERM once it has seen the end, so that its verdict (status 9) reaches the last line.
const SCRIPT: &str = r#"
folder=$1; shift
cd /
exec 3<&0 </dev/null
"$@" 3<&- &
server=$!
(
  while read -r signal <&3; do kill -s "$signal" "$server"; done
  trap '' TERM
  kill -s QUIT "$server"
  exit 9
) >/dev/null 2>&1 &
reader=$!
exec 3<&-
wait "$server"; status=$?
kill -s TERM "$reader" 2>/dev/null
wait "$reader"
if [ $? -eq 9 ]; then rm -rf -- "$folder"; fi
exit $status
"#;

/// A signal that PostgreSQL's main process knows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Signal {
    /// Fast shutdown: ends the sessions, writes a checkpoint.
    Fast,
    /// Immediate shutdown: the next start recovers.
    Immediate,
    /// No shutdown at all.
    Kill,
}

/// A running server. Dropping it stops the server at once and removes the folder, a moment later.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    pipe: ChildStdin,
}

impl Process {
    /// Runs `program` with `arguments` as `account`; both outputs are appended to `log`.
    pub(super) fn spawn(
        account: &Account,
        folder: &Path,
        program: &Path,
        arguments: &[PathBuf],
        log: &File,
    ) -> io::Result<Self> {
        let mut command = account.command("/bin/sh", folder);
        command.arg("-c").arg(SCRIPT).arg("pgtide-demo").arg(folder).arg(program).args(arguments);
        command.stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log.try_clone()?);
        // Ctrl-C is for us: we stop the server when we are done with it. The shell must outlive our handle.
        command.process_group(0).kill_on_drop(false);
        let mut child = command.spawn()?;
        let pipe = child.stdin.take().ok_or_else(|| io::Error::other("no pipe to the shell"))?;
        Ok(Self { child, pipe })
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Signals the server and waits for its end; false when it still runs after `limit`.
    pub(super) async fn end(&mut self, signal: Signal, limit: Duration) -> bool {
        let word: &[u8] = match signal {
            Signal::Fast => b"INT\n",
            Signal::Immediate => b"QUIT\n",
            Signal::Kill => b"KILL\n",
        };
        // A broken pipe means that it has ended already, which the wait tells.
        let _ = self.pipe.write_all(word).await;
        matches!(tokio::time::timeout(limit, self.child.wait()).await, Ok(Ok(_)))
    }
}
