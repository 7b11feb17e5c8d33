//! What an operator asks of the engine. A request is not a fact: the answer says that it was taken, and
//! [`Status`](super::Status) says when it has become true.

use tokio::sync::{mpsc, oneshot};

use crate::table::TableId;

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Stop reading and sending. The slot then keeps WAL.
    Pause,
    /// Go on where it stopped.
    Resume,
    /// Stop copying one table; the stream goes on.
    PauseTable(TableId),
    /// Go on copying it.
    ResumeTable(TableId),
    /// Copy one table again while the stream goes on, then remove the documents whose rows are gone.
    Resnapshot(TableId),
    /// Give up a resnapshot that runs or waits; documents stay as they are, all of them valid. Refused for the first copy of a
    /// table, without which documents would be missing.
    CancelResnapshot(TableId),
    /// Stop and acknowledge what is answered for; the next start goes on.
    Stop,
}

/// What the engine says to a [`Command`]: taken, or why not.
pub type Answer = Result<(), String>;

/// The engine's ear. Cheap to clone; never blocks for long.
#[derive(Clone, Debug)]
pub struct Control {
    sender: mpsc::Sender<(Command, oneshot::Sender<Answer>)>,
}

/// The engine's side of [`Control`].
pub type Commands = mpsc::Receiver<(Command, oneshot::Sender<Answer>)>;

impl Control {
    /// A pair of ear and mouth.
    #[must_use]
    pub fn channel() -> (Control, Commands) {
        let (sender, receiver) = mpsc::channel(16);
        (Control { sender }, receiver)
    }

    /// Sends `command` and waits for the answer.
    ///
    /// # Errors
    /// The engine's refusal in words, or that it has ended.
    pub async fn send(&self, command: Command) -> Answer {
        let ended = || "the engine has ended".to_owned();
        let (reply, answer) = oneshot::channel();
        self.sender.send((command, reply)).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }

    /// Sends `command` without waiting, from a thread outside the runtime; the receiver holds the answer once there is one.
    ///
    /// # Errors
    /// The engine has ended, or has 16 commands still to take.
    pub fn request(&self, command: Command) -> Result<oneshot::Receiver<Answer>, String> {
        let (reply, answer) = oneshot::channel();
        self.sender.try_send((command, reply)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => "the engine is busy, try again".to_owned(),
            mpsc::error::TrySendError::Closed(_) => "the engine has ended".to_owned(),
        })?;
        Ok(answer)
    }
}
